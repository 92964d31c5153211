//! Listening, with a bound on everything a stranger can make us hold.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderValue, Version, header};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use crate::stack::{self, Gateway};

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at once: 10 000.
    pub connections: usize,
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
/// until `hurry`.
pub async fn serve(
    listener: TcpListener,
    gateway: Arc<Gateway>,
    bounds: Bounds,
    shutdown: CancellationToken,
    hurry: CancellationToken,
) {
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
    let builder = Arc::new(builder);
    let room = Arc::new(Semaphore::new(bounds.connections));
    let graceful = GracefulShutdown::new();
    let stop_accepting = async {
        shutdown.cancelled().await;
        tokio::select! {
            () = tokio::time::sleep(bounds.pre_stop) => {}
            () = hurry.cancelled() => {}
        }
    };
    tokio::pin!(stop_accepting);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop_accepting => break,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to come back instead of spinning.
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            gateway.metrics.connections_refused.inc();
            continue;
        };
        let _ = socket.set_nodelay(true);
        let connection =
            connection(&builder, socket, peer, gateway.clone(), bounds.write_stall, shutdown.clone());
        let connection = graceful.watch(connection);
        let open = gateway.metrics.connections.clone();
        open.inc();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%peer, %error, "connection ended");
            }
            open.dec();
            drop(permit);
        });
    }
    drop(listener);
    tracing::info!(streams = gateway.metrics.in_flight.get(), "draining");
    tokio::select! {
        () = graceful.shutdown() => tracing::info!("drained"),
        () = tokio::time::sleep(bounds.drain) => tracing::warn!(cut = gateway.metrics.in_flight.get(), "drain limit reached"),
        () = hurry.cancelled() => tracing::warn!(cut = gateway.metrics.in_flight.get(), "told to hurry"),
    }
}

fn connection(
    builder: &Builder<TokioExecutor>,
    socket: TcpStream,
    peer: SocketAddr,
    gateway: Arc<Gateway>,
    stall: Duration,
    shutdown: CancellationToken,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = Box<dyn std::error::Error + Send + Sync>>
+ Send
+ 'static {
    let service = service_fn(move |request| {
        let (gateway, shutdown) = (gateway.clone(), shutdown.clone());
        async move {
            let old = request.version() < Version::HTTP_2;
            let mut response = stack::handle(gateway, request, Some(peer.ip())).await;
            // While draining, clients leave with their next answer instead of being cut between two requests. HTTP/2
            // has its own word for it, which hyper says.
            if old && shutdown.is_cancelled() {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    builder.serve_connection(TokioIo::new(StallGuard::new(socket, stall)), service).into_owned()
}

/// A socket whose writes fail once the peer has taken nothing for too long. hyper has no such clock, and while it
/// waits for room it does not poll the body, so no clock of the body's runs either.
#[derive(Debug)]
struct StallGuard {
    socket: TcpStream,
    limit: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl StallGuard {
    fn new(socket: TcpStream, limit: Duration) -> Self {
        Self { socket, limit, stalled: None }
    }

    fn judge<T>(&mut self, cx: &mut Context<'_>, wrote: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        use std::future::Future as _;
        if wrote.is_ready() {
            self.stalled = None;
            return wrote;
        }
        let limit = self.limit;
        let timer =
            self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + limit)));
        timer
            .as_mut()
            .poll(cx)
            .map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for StallGuard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for StallGuard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.judge(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.judge(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
