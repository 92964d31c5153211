//! Bounded sockets for tonic's servers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::codegen::Service;
use tonic::transport::server::Connected;
use tower_layer::Layer;

use super::busy::BusyBody;
use super::connection::{Busy, Connection};
use super::socket::Socket;
use super::{Edge, ServerTls};

/// Connections that wait to be served.
const QUEUE: usize = 64;

/// A connection for tonic.
#[derive(Debug)]
pub enum GrpcSocket {
    /// Without TLS.
    Plain(Socket),
    /// With TLS, after the handshake.
    Tls(Box<TlsStream<Socket>>),
}

/// The peer, in the extensions of every request.
#[derive(Debug, Clone)]
pub struct GrpcPeer {
    /// The connection.
    pub connection: Arc<Connection>,
    /// The certificate that the peer showed and that was verified.
    pub certificate: Option<CertificateDer<'static>>,
}

/// Accepts until `stop`. A handshake is the task of its connection, under the connection's clock.
pub fn incoming(
    edge: Edge,
    tls: Option<ServerTls>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> mpsc::Receiver<io::Result<GrpcSocket>> {
    let (ready, connections) = mpsc::channel(QUEUE);
    let own = tasks.clone();
    // Ends with the stop signal or with the server.
    tasks.spawn(async move {
        loop {
            let socket = tokio::select! {
                () = stop.cancelled() => return,
                () = ready.closed() => return,
                socket = edge.accept() => socket,
            };
            let Some(tls) = &tls else {
                if ready.send(Ok(GrpcSocket::Plain(socket))).await.is_err() {
                    return;
                }
                continue;
            };
            let (acceptor, ready, stop) = (tls.acceptor(), ready.clone(), stop.clone());
            // Ends with the handshake, or when the connection is cut.
            own.spawn(async move {
                let shaken = tokio::select! {
                    () = stop.cancelled() => return,
                    shaken = acceptor.accept(socket) => shaken,
                };
                match shaken {
                    Ok(stream) => {
                        let _ = ready.send(Ok(GrpcSocket::Tls(Box::new(stream)))).await;
                    }
                    Err(error) => tracing::debug!(%error, "a TLS handshake failed"),
                }
            });
        }
    });
    connections
}

impl Connected for GrpcSocket {
    type ConnectInfo = GrpcPeer;

    fn connect_info(&self) -> GrpcPeer {
        match self {
            Self::Plain(socket) => {
                GrpcPeer { connection: Arc::clone(socket.connection()), certificate: None }
            }
            Self::Tls(stream) => {
                let (socket, tls) = stream.get_ref();
                let certificate = tls.peer_certificates().and_then(<[_]>::first).cloned();
                GrpcPeer {
                    connection: Arc::clone(socket.connection()),
                    certificate: certificate.map(CertificateDer::into_owned),
                }
            }
        }
    }
}

impl AsyncRead for GrpcSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for GrpcSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, parts),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// Marks the connection of every call as busy until the call has ended.
#[derive(Debug, Clone, Copy, Default)]
pub struct BusyLayer;

impl<S> Layer<S> for BusyLayer {
    type Service = BusyService<S>;

    fn layer(&self, inner: S) -> BusyService<S> {
        BusyService(inner)
    }
}

/// The service of a [`BusyLayer`].
#[derive(Debug, Clone)]
pub struct BusyService<S>(S);

impl<S, Q, B> Service<http::Request<Q>> for BusyService<S>
where
    S: Service<http::Request<Q>, Response = http::Response<B>>,
    S::Future: Unpin,
{
    type Response = http::Response<BusyBody<B>>;
    type Error = S::Error;
    type Future = BusyFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Q>) -> Self::Future {
        let busy = request.extensions().get::<GrpcPeer>().map(|peer| peer.connection.begin());
        BusyFuture { answer: self.0.call(request), busy }
    }
}

/// A call in progress. Its answer keeps the connection busy.
#[derive(Debug)]
pub struct BusyFuture<F> {
    answer: F,
    busy: Option<Busy>,
}

impl<F, B, E> Future for BusyFuture<F>
where
    F: Future<Output = Result<http::Response<B>, E>> + Unpin,
{
    type Output = Result<http::Response<BusyBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.answer).poll(cx))?;
        let busy = self.busy.take();
        Poll::Ready(Ok(answer.map(|body| BusyBody::new(body, busy))))
    }
}
