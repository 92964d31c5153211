//! One connection to a backend, driven by the task of the request that uses it.
//!
//! No task of its own and no channel between tasks: who waits for the answer polls the connection. So nothing is read that
//! nobody takes, one wake-up serves both, and a connection cannot end while its request lies unseen in a queue.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_rustls::MaybeHttpsStream;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take};
use tokio::net::TcpStream;
use tokio::task::unconstrained;
use tokio::time::Instant;

/// The largest head of an answer, bytes. hyper's own bound of 400 KiB would be memory of each stream.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// The most fields of it: hyper's own number. Told one, it makes its tables on the heap, for each head.
pub const HEAD_FIELDS_MAX: usize = 100;

/// What is read at a time, bytes: what a client that takes nothing holds. One less than hyper's smallest buffer, since a read
/// that fills hyper's buffer makes it grow.
const READ_MAX: u64 = (8 << 10) - 1;

/// A close that meets a request comes within one round trip; the rest is for machines that are busy.
const AT_ONCE: Duration = Duration::from_secs(5);

/// What the connector opens.
pub(super) type Opened = MaybeHttpsStream<TokioIo<TcpStream>>;

type Driver = http1::Connection<TokioIo<Noting<TokioIo<Opened>>>, Full<Bytes>>;

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None`: it has ended.
    driver: Option<Driver>,
    /// Something came since something was last written.
    heard: Arc<AtomicBool>,
}

/// Why a request got no answer on a connection.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The connection had ended before the request was written.
    Unsent(Box<Request<Full<Bytes>>>),
    /// The connection ended, or what came is no answer.
    Broken {
        /// What hyper says.
        error: hyper::Error,
        /// It ended at once, and nothing was heard.
        at_once: bool,
    },
}

impl Connection {
    /// # Errors
    /// Those of hyper's handshake, which has none for HTTP/1.
    pub(super) async fn over(io: Opened) -> Result<Box<Self>, hyper::Error> {
        let heard = Arc::<AtomicBool>::default();
        let io = TokioIo::new(Noting { io: TokioIo::new(io).take(READ_MAX), heard: heard.clone() });
        let mut settings = http1::Builder::new();
        settings.max_buf_size(HEAD_BYTES_MAX);
        let (sender, driver) = settings.handshake(io).await?;
        Ok(Box::new(Self { sender, driver: Some(driver), heard }))
    }

    /// Reads and writes what can be.
    pub(super) fn drive(&mut self, cx: &mut Context<'_>) {
        drive(&mut self.driver, cx);
    }

    /// Whether another request may be sent on it, as far as is known by now. Wakes nobody later.
    pub(super) fn is_free(&mut self) -> bool {
        self.drive(&mut Context::from_waker(Waker::noop()));
        self.driver.is_some() && self.sender.is_ready()
    }

    /// Sends a request and reads the head of its answer. Dropping the future and the connection ends both.
    pub(super) async fn exchange(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, NoAnswer> {
        let asked = Instant::now();
        let Self { sender, driver, heard } = self;
        // Unconstrained, since a task that is to pause would be woken by a waker that it does not have.
        let mut answering = pin!(unconstrained(sender.try_send_request(request)));
        let answer = std::future::poll_fn(|cx| {
            drive(driver, cx);
            // Only the driver can bring the answer, so its wake-up is enough.
            answering.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        });
        answer.await.map_err(|mut failed| match failed.take_message() {
            Some(request) => NoAnswer::Unsent(Box::new(request)),
            None => NoAnswer::Broken {
                at_once: asked.elapsed() < AT_ONCE && !heard.load(Ordering::Relaxed),
                error: failed.into_error(),
            },
        })
    }
}

fn drive(driver: &mut Option<Driver>, cx: &mut Context<'_>) {
    let Some(driven) = driver else { return };
    if let Poll::Ready(ended) = Pin::new(driven).poll(cx) {
        if let Err(error) = ended {
            tracing::debug!(%error, "a connection to a backend ended");
        }
        // By this, what waits for an answer inside learns of the end.
        *driver = None;
    }
}

/// Whether this answer to a request says that the connection was closed as idle: servers that announce it do so with a 408.
pub(super) fn announces_a_close<B>(answer: &Response<B>, asked: Instant) -> bool {
    answer.status() == StatusCode::REQUEST_TIMEOUT && asked.elapsed() < AT_ONCE
}

/// A connection that notes whether something came, and reads little at a time.
#[derive(Debug)]
struct Noting<T> {
    io: Take<T>,
    heard: Arc<AtomicBool>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Noting<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        self.io.set_limit(READ_MAX);
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.heard.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Noting<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.heard.store(false, Ordering::Relaxed);
        Pin::new(self.io.get_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.io.get_mut()).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.heard.store(false, Ordering::Relaxed);
        Pin::new(self.io.get_mut()).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.get_ref().is_write_vectored()
    }
}
