//! Connections to one backend: a pool of its own, so that no backend can use up another's.

use std::error::Error;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderValue, Request, Response, Uri, header};
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use tokio::time::Instant;
use tower_service::Service as _;
use weir_proto::resource::Backend;
use weir_runtime::{EgressConnector, EgressPolicy};

use self::connection::{Connection, NoAnswer};
use self::idle::Idle;
use self::resolve::HostResolver;

mod body;
mod connection;
mod idle;
mod resolve;

pub use self::body::AnswerBody;
pub use self::connection::{HEAD_BYTES_MAX, HEAD_FIELDS_MAX};
pub use self::resolve::{Found, Lookup, Resolver};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is no connection.
    #[error("no connection")]
    Connect(#[source] Box<dyn Error + Send + Sync>),
    /// The connection broke, or what came is no answer.
    #[error("no answer")]
    Broken(#[source] hyper::Error),
    /// The connection was closed as soon as it was open.
    #[error("the connection was closed before the request was sent")]
    Closed,
}

impl SendError {
    /// Whether there was no connection.
    pub fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }

    /// Whether the head of the answer is beyond [`HEAD_BYTES_MAX`] or [`HEAD_FIELDS_MAX`], which are the gateway's bounds.
    pub fn is_head_too_large(&self) -> bool {
        matches!(self, Self::Broken(error) if error.is_parse_too_large())
    }
}

/// A connection whose other end does not confirm within this what was sent, or that it is still there, has broken. The
/// clocks of requests are too long to notice: an answer that is not streamed is silent for as long as it takes.
const UNCONFIRMED_MAX: Duration = Duration::from_secs(30);
/// Silence after which the other end is asked whether it is there, and between two such questions.
const ASK_AFTER: Duration = Duration::from_secs(15);
const ASK_EVERY: Duration = Duration::from_secs(5);

type Connector = HttpsConnector<EgressConnector<HostResolver>>;

/// The connections of one backend. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Upstream {
    settings: Arc<Settings>,
    connector: Connector,
    idle: Arc<Idle>,
    host: HostResolver,
    /// Requests sent again; see [`Self::send`].
    resent: Arc<AtomicU64>,
}

/// What the connections depend on: when it changes they are made anew.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    url: Uri,
    host: HeaderValue,
    max_idle: u32,
    idle_timeout: Duration,
    connect_timeout: Duration,
}

impl Settings {
    fn of(spec: &Backend, connect_timeout: Duration) -> Self {
        Self {
            url: spec.url.clone(),
            host: host_of(&spec.url),
            max_idle: spec.max_idle,
            idle_timeout: spec.idle_timeout,
            connect_timeout,
        }
    }
}

/// The machine's certificate authorities, read once. Without any, https backends fail with a clear error and http
/// ones work.
static TLS: LazyLock<rustls::ClientConfig> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = || {
        rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring supports the default TLS versions")
    };
    match builder().with_native_roots() {
        Ok(config) => config.with_no_client_auth(),
        Err(error) => {
            tracing::warn!(%error, "no certificate authorities on this machine: https backends cannot be reached");
            builder().with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth()
        }
    }
});

impl Upstream {
    /// Connections as the backend's spec asks for, to addresses that the policy allows; its host is looked up by
    /// `resolver`. None is opened yet.
    pub fn new(
        spec: &Backend,
        connect_timeout: Duration,
        egress: &EgressPolicy,
        resolver: &Resolver,
    ) -> Self {
        let host = resolver.host(spec.url.host().unwrap_or_default()).waiting(connect_timeout);
        let http = EgressConnector::resolving(host.clone(), egress.clone(), |http| {
            http.set_nodelay(true);
            http.set_connect_timeout(Some(connect_timeout));
            http.set_keepalive(Some(ASK_AFTER));
            http.set_keepalive_interval(Some(ASK_EVERY));
            let questions = (UNCONFIRMED_MAX - ASK_AFTER).as_secs() / ASK_EVERY.as_secs();
            http.set_keepalive_retries(u32::try_from(questions).ok());
            #[cfg(target_os = "linux")]
            http.set_tcp_user_timeout(Some(UNCONFIRMED_MAX));
        });
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(TLS.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let idle = Idle::new(spec.max_idle, spec.idle_timeout);
        let settings = Arc::new(Settings::of(spec, connect_timeout));
        Self { settings, connector, idle, host, resent: Arc::default() }
    }

    /// Requests that were sent again since their kept connection had been closed.
    pub fn resent(&self) -> u64 {
        self.resent.load(Ordering::Relaxed)
    }

    /// Whether these connections still fit the spec.
    pub fn serves(&self, spec: &Backend, connect_timeout: Duration) -> bool {
        *self.settings == Settings::of(spec, connect_timeout)
    }

    /// The address of a path such as `/v1/chat/completions` there, as it stands in a request.
    ///
    /// # Errors
    /// The path is none.
    pub fn uri(&self, path: &str) -> Result<Uri, http::Error> {
        let prefix = self.settings.url.path().trim_end_matches('/');
        Ok(PathAndQuery::try_from(format!("{prefix}{path}"))?.into())
    }

    /// Sends a request, which `request` makes, to one of [`Self::uri`]'s addresses; dropping the future closes the connection. A server may close an idle connection at the moment at which
    /// a request is sent on it (RFC 9112, 9.3.1), and nobody is to blame: the request is sent once more, on a new connection. That
    /// is no failure of the backend, and no retry. It was of that kind if the connection was kept, nothing was heard since the
    /// request was written, and the end came at once. A server that ends a connection after seconds of work has failed.
    ///
    /// # Errors
    /// No connection, or one that broke.
    pub async fn send(
        &self,
        request: impl Fn() -> Request<Full<Bytes>>,
    ) -> Result<Response<AnswerBody>, SendError> {
        let made = || {
            let mut request = request();
            request.headers_mut().insert(header::HOST, self.settings.host.clone());
            request
        };
        let mut unsent = None;
        while let Some(mut kept) = self.idle.take() {
            let asked = Instant::now();
            match kept.exchange(unsent.take().unwrap_or_else(made)).await {
                Ok(answer) if connection::announces_a_close(&answer, asked) => {}
                Ok(answer) => return Ok(self.reading(answer, kept)),
                Err(NoAnswer::Unsent(request)) => {
                    unsent = Some(*request);
                    continue;
                }
                Err(NoAnswer::Broken { at_once: true, .. }) => {}
                Err(NoAnswer::Broken { error, .. }) => return Err(SendError::Broken(error)),
            }
            self.resent.fetch_add(1, Ordering::Relaxed);
            break;
        }
        let mut opened = self.open().await?;
        match opened.exchange(unsent.unwrap_or_else(made)).await {
            Ok(answer) => Ok(self.reading(answer, opened)),
            Err(NoAnswer::Unsent(_)) => Err(SendError::Closed),
            Err(NoAnswer::Broken { error, .. }) => Err(SendError::Broken(error)),
        }
    }

    async fn open(&self) -> Result<Box<Connection>, SendError> {
        let mut connector = self.connector.clone();
        let opening = async {
            poll_fn(|cx| connector.poll_ready(cx)).await?;
            connector.call(self.settings.url.clone()).await
        };
        let opened = opening.await.map_err(|error| {
            self.host.distrust();
            SendError::Connect(error)
        })?;
        Connection::over(opened).await.map_err(SendError::Broken)
    }

    fn reading(
        &self,
        answer: Response<hyper::body::Incoming>,
        from: Box<Connection>,
    ) -> Response<AnswerBody> {
        answer.map(|body| AnswerBody::new(body, from, self.idle.clone()))
    }
}

/// The `Host` of a URL: without the port that its scheme has anyway.
fn host_of(url: &Uri) -> HeaderValue {
    let standard = if url.scheme() == Some(&Scheme::HTTPS) { 443 } else { 80 };
    let (host, port) = (url.host().unwrap_or_default(), url.port_u16());
    let text = match port {
        Some(port) if port != standard => format!("{host}:{port}"),
        _ => host.to_owned(),
    };
    // The host of a URL is a valid value.
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests;
