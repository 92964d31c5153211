//! The connection to a control plane: its address, the identity of this process, and the pauses between attempts.

use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use weir_proto::v1::stream_config_request::Message;
use weir_proto::v1::{Hello, StreamConfigRequest, SubscriberRole};
use weir_runtime::Backoff;

use crate::config_state::ConfigState;

/// The longest pause between two attempts to connect, so that every process is connected within ten seconds after an outage.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The first pause.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// A control plane that sends nothing for this time (three heartbeats) counts as dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What a control plane answers within [`SILENCE_MAX`], such as the opening of a stream: a server that accepts connections and
/// answers nothing must not be waited for.
///
/// # Errors
/// What the control plane said, or that it said nothing.
pub async fn answered<T>(call: impl Future<Output = Result<T, tonic::Status>>) -> Result<T, tonic::Status> {
    match tokio::time::timeout(SILENCE_MAX, call).await {
        Ok(answer) => answer,
        Err(_) => Err(tonic::Status::deadline_exceeded(format!("no answer for {SILENCE_MAX:?}"))),
    }
}

/// The identity of this process at the control plane.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The name of this process.
    pub id: String,
    /// The role, which decides the kinds of resources.
    pub role: SubscriberRole,
    /// New with every start of the process.
    pub incarnation: String,
    /// The region; empty when unknown.
    pub region: String,
    /// The bearer token; `None` for a control plane in the same process.
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
    /// The control planes of one store at comma-separated URLs. For https: the CA certificate (`None`: those of the system),
    /// and the client certificate and key of this process.
    pub fn all(
        urls: &str,
        ca: Option<PathBuf>,
        own: Option<(PathBuf, PathBuf)>,
    ) -> Result<Vec<Self>, String> {
        let mut links: Vec<Self> = Vec::new();
        for url in urls.split(',').map(str::trim) {
            if links.iter().any(|link| link.url == url) {
                return Err(format!("control plane address '{url}' is listed twice"));
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

    /// A channel with a connect timeout and keep-alive. The small certificate files are read each time, so that a new
    /// connection uses a renewed certificate.
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

/// An error with its causes, because transport errors have the reason in their source.
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

/// What a process says of itself and of the configuration that it holds.
pub(crate) fn hello(identity: &Identity, config: &ConfigState) -> Hello {
    Hello {
        gateway_id: identity.id.clone(),
        role: identity.role.into(),
        incarnation: identity.incarnation.clone(),
        region: identity.region.clone(),
        build: weir_runtime::version().to_owned(),
        store_epoch: config.epoch.clone(),
        store_revision: config.revision,
        resource_versions: config.versions(),
        status_only: false,
    }
}
