//! A TCP connection that a fault can reset or fill with garbage below HTTP.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Sent instead of a response: neither a status line nor an HTTP/2 frame, without a line end.
const GARBAGE: &[u8] = b"\x00\xff\xfe\x13\x37 this is not HTTP \xc0\xaf\x00";

/// States of [`Control`]. In state 0 the connection works normally.
const RESET: u8 = 1;
const GARBAGE_DUE: u8 = 2;
const GARBAGE_SENT: u8 = 3;

/// The faults that a request can cause on its connection.
#[derive(Debug, Default)]
pub(crate) struct Control(AtomicU8);

impl Control {
    /// The connection ends with RST instead of FIN.
    pub(crate) fn arm_reset(&self) {
        self.0.store(RESET, Relaxed);
    }

    /// The next write is replaced by garbage, and later ones are dropped.
    pub(crate) fn arm_garbage(&self) {
        self.0.store(GARBAGE_DUE, Relaxed);
    }
}

/// The stream handed to hyper.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    control: Arc<Control>,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream, control: Arc<Control>) -> Self {
        Self { stream, control }
    }

    fn poll_garbage(&mut self, context: &mut Context<'_>, swallowed: usize) -> Poll<io::Result<usize>> {
        if self.control.0.load(Relaxed) == GARBAGE_DUE {
            ready!(Pin::new(&mut self.stream).poll_write(context, GARBAGE))?;
            self.control.0.store(GARBAGE_SENT, Relaxed);
        }
        Poll::Ready(Ok(swallowed))
    }

    fn is_garbage(&self) -> bool {
        matches!(self.control.0.load(Relaxed), GARBAGE_DUE | GARBAGE_SENT)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.control.0.load(Relaxed) == RESET {
            // With zero linger, closing sends RST. If the option cannot be set, the client sees FIN, which is a cut
            // as well.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.is_garbage() {
            return self.poll_garbage(context, data.len());
        }
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.is_garbage() {
            return self.poll_garbage(context, data.iter().map(|slice| slice.len()).sum());
        }
        Pin::new(&mut self.stream).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.control.0.load(Relaxed) == RESET {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
