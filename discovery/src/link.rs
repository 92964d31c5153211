//! The connection to a control plane: its address, the identity of this process, and the pauses between attempts.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use weir_proto::v1::stream_config_request::Message;
use weir_proto::v1::{StreamConfigRequest, SubscriberRole};
use weir_runtime::Backoff;

/// Longest pause between two tries to connect: everybody is back within ten seconds of an outage, however long it was.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// First pause.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// A control plane that sends nothing for so long (three heartbeats) is taken for dead.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Who this process is to the control plane.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its name.
    pub id: String,
    /// What it is: decides which kinds of resources it gets.
    pub role: SubscriberRole,
    /// This start of the process.
    pub incarnation: String,
    /// Where it runs.
    pub region: String,
    /// Sent as the bearer token; `None` to a control plane in the same process without one.
    pub token: Option<weir_runtime::Secret>,
}

impl Identity {
    /// A request with the token.
    pub fn request<T>(&self, message: T) -> Result<Request<T>, String> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.expose())
                .parse()
                .map_err(|_| "the token for the control plane is not a valid header value".to_owned())?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

/// The address of a control plane, the CA that signs its certificate, and the certificate of this process.
#[derive(Debug, Clone)]
pub struct Link {
    url: String,
    ca: Option<PathBuf>,
    own: Option<(PathBuf, PathBuf)>,
}

impl Link {
    /// The control planes at URLs with commas between them: all of one store. For https: who signs their certificates
    /// (`None`: who the system trusts), and this process's own certificate and key.
    pub fn all(
        urls: &str,
        ca: Option<PathBuf>,
        own: Option<(PathBuf, PathBuf)>,
    ) -> Result<Vec<Self>, String> {
        let mut links: Vec<Self> = Vec::new();
        for url in urls.split(',').map(str::trim) {
            if links.iter().any(|link| link.url == url) {
                return Err(format!("control plane address '{url}' is given twice"));
            }
            links.push(Self::new(url, ca.clone(), own.clone())?);
        }
        Ok(links)
    }

    fn new(url: &str, ca: Option<PathBuf>, own: Option<(PathBuf, PathBuf)>) -> Result<Self, String> {
        let link = Self { url: url.to_owned(), ca, own };
        if (link.ca.is_some() || link.own.is_some()) && !url.starts_with("https://") {
            return Err(format!("certificates are for https, and the control plane address is '{url}'"));
        }
        link.endpoint().map(|_| link)
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A channel with bounds on connecting and silence. The files are read each time, so that the next connection uses
    /// a renewed certificate; they are small.
    pub fn endpoint(&self) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from_shared(self.url.clone())
            .map_err(|_| {
                format!("control plane address '{}' is not a URL, such as http://host:7070", self.url)
            })?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        if !self.url.starts_with("https://") {
            return Ok(endpoint);
        }
        let read = |path: &PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let mut tls = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((cert, key)) = &self.own {
            tls = tls.identity(tonic::transport::Identity::from_pem(read(cert)?, read(key)?));
        }
        endpoint.tls_config(tls).map_err(|e| error_chain(&e))
    }
}

/// The pauses between two attempts to connect.
pub const fn reconnect_backoff() -> Backoff {
    Backoff::new(BACKOFF_MIN, BACKOFF_MAX)
}

pub(crate) async fn send(up: &mpsc::Sender<StreamConfigRequest>, message: Message) -> Result<(), String> {
    let sent = up.send(StreamConfigRequest { message: Some(message) }).await;
    sent.map_err(|_| "the stream ended".to_owned())
}

/// An error with its causes: transport errors keep the useful part in the source.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
