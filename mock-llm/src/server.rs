//! The listener: accepts connections, routes requests, adds headers to responses, drains at shutdown.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::{HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin;
use crate::body::Body;
use crate::config::Config;
use crate::connection::{Connection, Control};
use crate::error::ApiError;
use crate::faults::HangAt;
use crate::generate::generate;
use crate::handle::{Handle, Shared};
use crate::openai::{Endpoint, error_response};
use crate::rng::Rng;

/// The longest time for a request head. It also ends idle connections, so it is longer than clients keep them.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(300);
/// The pause after a failed accept, which is mostly caused by a lack of file descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);
/// Bytes that are read to let requests to `/admin/` through a hang at accept.
const PEEK_BYTES: usize = 256;
/// The start of such a request line.
const ADMIN: &[u8] = b"/admin/";
/// Concurrent HTTP/2 streams of one connection.
const H2_STREAMS_MAX: u32 = 1024;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REGION: HeaderName = HeaderName::from_static("x-mock-region");
const INSTANCE: HeaderName = HeaderName::from_static("x-mock-instance");
/// A header that gateways pass on; they drop a server's own headers.
const PASSED_ON: HeaderName = HeaderName::from_static("request-id");

/// A bound simulated LLM server.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    local_addr: SocketAddr,
    stamp: Stamp,
    shared: Arc<Shared>,
}

/// Headers on every response.
#[derive(Clone, Debug)]
struct Stamp {
    region: HeaderValue,
    instance: HeaderValue,
    passed_on: HeaderValue,
}

impl Server {
    /// Checks the configuration and binds; the cold start begins now. Needs a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// `InvalidInput` for an invalid configuration, else what binding said.
    pub async fn bind(addr: impl ToSocketAddrs, config: Config) -> io::Result<Self> {
        let invalid =
            |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidInput, error.to_string());
        config.validate().map_err(|error| invalid(&error))?;
        let listener = TcpListener::bind(addr).await?;
        let local_addr = listener.local_addr()?;
        let instance = match config.instance.as_str() {
            "" => format!("mock-{}", local_addr.port()),
            name => name.to_owned(),
        };
        let stamp = Stamp {
            region: HeaderValue::from_str(&config.region).map_err(|error| invalid(&error))?,
            instance: HeaderValue::from_str(&instance).map_err(|error| invalid(&error))?,
            passed_on: HeaderValue::from_str(&format!("req-{instance}")).map_err(|error| invalid(&error))?,
        };
        Ok(Self { listener, local_addr, stamp, shared: Arc::new(Shared::new(config)) })
    }

    /// The address bound, with the real port.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Faults and counters of this server.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { shared: Arc::clone(&self.shared) }
    }

    /// Serves until `shutdown` is cancelled, then lets open answers end for at most [`Config::drain`], then cuts them.
    /// Dropping the future instead leaves open connections to end on their own.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { listener, stamp, shared, .. } = self;
        let connections = Arc::new(Semaphore::new(shared.config.connections_max));
        let tasks = TaskTracker::new();
        let kill = CancellationToken::new();
        let serving = async {
            loop {
                // The semaphore is never closed, so this only waits.
                let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
                let stream = match listener.accept().await {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "accept failed");
                        sleep(ACCEPT_RETRY).await;
                        continue;
                    }
                };
                let connection = serve(stream, Arc::clone(&shared), stamp.clone(), shutdown.clone());
                let kill = kill.clone();
                // Ends with its connection. A panic ends only that connection.
                tasks.spawn(async move {
                    let _permit = permit;
                    kill.run_until_cancelled(connection).await;
                });
            }
        };
        shutdown.run_until_cancelled(serving).await;
        drop(listener);
        tasks.close();
        if timeout(shared.config.drain, tasks.wait()).await.is_err() {
            tracing::warn!(connections = tasks.len(), "drain time is over, cutting connections");
            kill.cancel();
            tasks.wait().await;
        }
    }
}

async fn serve(stream: TcpStream, shared: Arc<Shared>, stamp: Stamp, shutdown: CancellationToken) {
    let number = shared.metrics.connections.fetch_add(1, Relaxed);
    let mut rng = Rng::new(!shared.config.seed, number);
    if shared.faults().hangs_on_accept(&mut rng) {
        tokio::select! {
            () = shared.hang_released(HangAt::Accept) => {}
            () = first_request_is_admin(&stream) => {}
            () = shutdown.cancelled() => return,
        }
    }
    // Tokens are small writes that must not wait for each other. Without the option the connection is only slower.
    let _ = stream.set_nodelay(true);
    let control = Arc::new(Control::default());
    let idle = shared.faults().close_idle_after_ms.map(|ms| Duration::from_millis(ms.into()));
    let io = TokioIo::new(Connection::new(stream, Arc::clone(&control)));
    let service = service_fn(move |request| {
        let (shared, stamp, control) = (Arc::clone(&shared), stamp.clone(), Arc::clone(&control));
        async move { Ok::<_, Infallible>(respond(&shared, &stamp, &control, request).await) }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle.unwrap_or(HEADER_READ_TIMEOUT));
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(H2_STREAMS_MAX);
    let mut connection = pin!(builder.serve_connection(io, service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        // Clients leave and faults cut connections; an operator need not act.
        tracing::debug!(%error, "connection ended early");
    }
}

/// Resolves when the first request is for `/admin/`, so that a hang at accept can be switched off again over HTTP;
/// never for other requests. Cancel-safe: nothing is taken from the stream.
async fn first_request_is_admin(stream: &TcpStream) {
    let mut start = [0; PEEK_BYTES];
    if let Ok(length) = stream.peek(&mut start).await
        && start[..length].split(|byte| *byte == b'\r').next().is_some_and(is_admin_line)
    {
        return;
    }
    std::future::pending().await
}

/// A request line in origin or absolute form.
fn is_admin_line(line: &[u8]) -> bool {
    line.windows(ADMIN.len()).any(|window| window == ADMIN)
}

async fn respond(
    shared: &Arc<Shared>,
    stamp: &Stamp,
    control: &Arc<Control>,
    request: Request<Incoming>,
) -> Response<Body> {
    let request_id = request.headers().get(REQUEST_ID).cloned();
    let answer = match Endpoint::of(request.uri().path()) {
        Some(endpoint) if request.method() == Method::POST => {
            if let Some(id) = request_id.as_ref().and_then(|id| id.to_str().ok()) {
                shared.count_request_id(id);
            }
            generate(shared, control, endpoint, request).await
        }
        Some(_) => Ok(admin::wrong_method("POST")),
        None => admin::answer(shared, request).await,
    };
    let mut response = answer.unwrap_or_else(|error: ApiError| error_response(&error));
    let headers = response.headers_mut();
    if let Some(id) = request_id {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(REGION, stamp.region.clone());
    headers.insert(INSTANCE, stamp.instance.clone());
    headers.insert(PASSED_ON, stamp.passed_on.clone());
    response
}
