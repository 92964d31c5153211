//! A socket that tells its connection what it waits for, and fails once the connection is cut.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::connection::{Connection, Cut};
use super::table::Open;

/// Bytes that the kernel holds for a peer beyond what is on its way: with what the kernel takes by itself, megabytes of
/// each answer would lie there for a peer that reads slowly, and the room would be noticed only when a third is free.
/// Half of it must be sent before a write goes on, which a peer that takes 2 KB/s must manage well within `write_stall`.
const UNSENT_BYTES: u32 = 32 << 10;

/// One accepted connection, in its listener's table until it is dropped.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    open: Open,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, open: Open) -> Self {
        // Without either the connection is slower, and works.
        let _ = stream.set_nodelay(true);
        #[cfg(target_os = "linux")]
        let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
        Self { stream, open }
    }

    /// What is known of the connection.
    pub const fn connection(&self) -> &Arc<Connection> {
        self.open.connection()
    }

    fn judge(&self, cx: &Context<'_>, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let connection = self.connection();
        if let Poll::Ready(Ok(bytes)) = &wrote {
            connection.wrote(*bytes);
        }
        connection.write_waits(wrote.is_pending());
        if wrote.is_pending() {
            connection.writes(cx.waker());
        }
        match connection.was_cut() {
            // Who was too slow with a head is told so.
            Some(Cut::Head) | None => wrote,
            Some(why) => Poll::Ready(Err(error(why))),
        }
    }
}

fn error(why: Cut) -> io::Error {
    let text = match why {
        Cut::Head => "the head of a request did not come in time",
        Cut::Idle => "no request came in time",
        Cut::Stalled => "the peer takes nothing",
        Cut::Evicted => "others needed the room of an idle connection",
        Cut::Drained => "the process ends",
    };
    io::Error::new(io::ErrorKind::TimedOut, text)
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        let connection = self.connection();
        if read.is_pending() {
            connection.reads(cx.waker());
        }
        match connection.was_cut() {
            Some(why) => Poll::Ready(Err(error(why))),
            None => read,
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(cx, wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.judge(cx, wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
