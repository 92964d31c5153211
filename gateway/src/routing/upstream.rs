//! Connections to one backend: a pool of its own, so that no backend can use up another's.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{ConfigBuilderExt, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use weir_proto::resource::Backend;
use weir_runtime::{EgressConnector, EgressPolicy};

use self::resolve::HostResolver;

mod resolve;

pub use self::resolve::{Found, Lookup, Resolver};

/// What is read of an answer ahead of its client, and the largest head of an answer. hyper's own bound of 400 KiB would be
/// the memory of each stream whose client reads slowly.
const READ_BUFFER_BYTES: usize = 16 << 10;

/// The connections of one backend. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Upstream {
    settings: Arc<Settings>,
    client: Client<HttpsConnector<EgressConnector<HostResolver>>, Full<Bytes>>,
    host: HostResolver,
}

/// What the connections depend on: when it changes they are made anew.
#[derive(Debug, PartialEq, Eq)]
struct Settings {
    url: http::Uri,
    max_idle: u32,
    idle_timeout: Duration,
    connect_timeout: Duration,
}

impl Settings {
    fn of(spec: &Backend, connect_timeout: Duration) -> Self {
        Self {
            url: spec.url.clone(),
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
            http.set_keepalive(Some(Duration::from_secs(30)));
        });
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(TLS.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(spec.max_idle as usize)
            .pool_idle_timeout(spec.idle_timeout)
            .pool_timer(TokioTimer::new())
            .timer(TokioTimer::new())
            // Retried by the stack, which knows what may be tried again.
            .retry_canceled_requests(false)
            .http1_max_headers(100)
            .http1_max_buf_size(READ_BUFFER_BYTES)
            .build(connector);
        Self { settings: Arc::new(Settings::of(spec, connect_timeout)), client, host }
    }

    /// Whether these connections still fit the spec.
    pub fn serves(&self, spec: &Backend, connect_timeout: Duration) -> bool {
        *self.settings == Settings::of(spec, connect_timeout)
    }

    /// The address of a path such as `/v1/chat/completions` there.
    pub fn uri(&self, path: &str) -> Result<http::Uri, http::Error> {
        let base = &self.settings.url;
        let prefix = base.path().trim_end_matches('/');
        let mut parts = http::uri::Parts::default();
        parts.scheme = base.scheme().cloned();
        parts.authority = base.authority().cloned();
        parts.path_and_query = Some(http::uri::PathAndQuery::try_from(format!("{prefix}{path}"))?);
        Ok(http::Uri::from_parts(parts)?)
    }

    /// Sends a request; dropping the future closes the connection.
    pub async fn send(
        &self,
        request: http::Request<Full<Bytes>>,
    ) -> Result<http::Response<hyper::body::Incoming>, hyper_util::client::legacy::Error> {
        let answer = self.client.request(request).await;
        if answer.as_ref().is_err_and(|error| error.is_connect()) {
            self.host.distrust();
        }
        answer
    }
}
