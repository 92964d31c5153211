//! Listening, with a bound on everything a stranger can make us hold.

mod addresses;
mod stall;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use http::{HeaderValue, Version, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use weir_runtime::ServerTls;

use self::addresses::Addresses;
use self::stall::StallGuard;
use crate::stack::{self, Gateway};

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at once: 10 000.
    pub connections: usize,
    /// Connections of one address (of one /64 with IPv6): as many as in all, since behind an edge all come from one.
    pub connections_per_address: usize,
    /// To shake hands, where TLS is spoken: 10 s.
    pub handshake_timeout: Duration,
    /// To send the head of a request: 10 s.
    pub header_timeout: Duration,
    /// Bytes of a head: 64 KiB.
    pub header_bytes: usize,
    /// Headers of a request: 100.
    pub headers: usize,
    /// HTTP/2 streams per connection: 250.
    pub streams: u32,
    /// A client that takes nothing for so long is cut: 30 s.
    pub write_stall: Duration,
    /// To end in time once told to: after readiness is withdrawn, so long are new connections still taken: 2 s.
    pub pre_stop: Duration,
    /// And so long may streams run: 600 s.
    pub drain: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_address: 10_000,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(10),
            header_bytes: 64 << 10,
            headers: 100,
            streams: 250,
            write_stall: Duration::from_secs(30),
            pre_stop: Duration::from_secs(2),
            drain: Duration::from_secs(600),
        }
    }
}

/// Serves until `shutdown`, then drains: keep accepting for `pre_stop`, then refuse, let streams run for `drain` or
/// until `hurry`. With `tls` nothing else is spoken.
pub async fn serve(
    listener: TcpListener,
    tls: Option<ServerTls>,
    gateway: Arc<Gateway>,
    bounds: Bounds,
    shutdown: CancellationToken,
    hurry: CancellationToken,
) {
    let door = Arc::new(Door {
        builder: protocols(&bounds),
        tls,
        gateway: gateway.clone(),
        bounds,
        shutdown: shutdown.clone(),
    });
    let room = Arc::new(Semaphore::new(bounds.connections));
    let addresses = Addresses::new(bounds.connections_per_address);
    let graceful = GracefulShutdown::new();
    let stop_accepting = async {
        shutdown.cancelled().await;
        tokio::select! {
            () = tokio::time::sleep(bounds.pre_stop) => {}
            () = hurry.cancelled() => {}
        }
    };
    tokio::pin!(stop_accepting);
    let take = |(socket, peer): (TcpStream, SocketAddr)| {
        let (Ok(permit), Some(place)) = (room.clone().try_acquire_owned(), addresses.place(peer.ip())) else {
            gateway.metrics.connections_refused.inc();
            return;
        };
        let connection = door.clone().connection(socket, peer.ip(), graceful.watcher());
        let open = gateway.metrics.connections.clone();
        open.inc();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "connection ended");
            }
            open.dec();
            drop((permit, place));
        });
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop_accepting => break,
        };
        match accepted {
            Ok(accepted) => take(accepted),
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to come back instead of spinning.
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    // Whoever is connected already and not yet accepted would be cut when the listener goes.
    for _ in 0..bounds.connections {
        let Some(Ok(accepted)) = listener.accept().now_or_never() else { break };
        take(accepted);
    }
    drop(listener);
    tracing::info!(streams = gateway.metrics.in_flight.get(), "draining");
    tokio::select! {
        () = graceful.shutdown() => tracing::info!("drained"),
        () = tokio::time::sleep(bounds.drain) => tracing::warn!(cut = gateway.metrics.in_flight.get(), "drain limit reached"),
        () = hurry.cancelled() => tracing::warn!(cut = gateway.metrics.in_flight.get(), "told to hurry"),
    }
}

fn protocols(bounds: &Bounds) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.header_timeout)
        .max_buf_size(bounds.header_bytes)
        .max_headers(bounds.headers)
        .pipeline_flush(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(bounds.streams)
        .max_header_list_size(bounds.header_bytes as u32)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What all connections have in common.
struct Door {
    builder: Builder<TokioExecutor>,
    tls: Option<ServerTls>,
    gateway: Arc<Gateway>,
    bounds: Bounds,
    shutdown: CancellationToken,
}

impl Door {
    async fn connection(
        self: Arc<Self>,
        socket: TcpStream,
        peer: IpAddr,
        watcher: Watcher,
    ) -> Result<(), Failure> {
        let _ = socket.set_nodelay(true);
        let socket = StallGuard::new(socket, self.bounds.write_stall);
        match &self.tls {
            None => self.requests(socket, peer, watcher).await,
            Some(tls) => {
                let handshake = tls.acceptor().accept(socket);
                let socket = tokio::time::timeout(self.bounds.handshake_timeout, handshake).await??;
                self.requests(socket, peer, watcher).await
            }
        }
    }

    async fn requests<S>(&self, socket: S, peer: IpAddr, watcher: Watcher) -> Result<(), Failure>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (gateway, shutdown) = (self.gateway.clone(), self.shutdown.clone());
        let service = service_fn(move |request| {
            let (gateway, shutdown) = (gateway.clone(), shutdown.clone());
            async move {
                let old = request.version() < Version::HTTP_2;
                let mut response = stack::handle(gateway, request, Some(peer)).await;
                // While draining, clients leave with their next answer instead of being cut between two requests.
                // HTTP/2 has its own word for it, which hyper says.
                if old && shutdown.is_cancelled() {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, std::convert::Infallible>(response)
            }
        });
        watcher.watch(self.builder.serve_connection(TokioIo::new(socket), service).into_owned()).await
    }
}
