//! A socket that reports its progress to its connection, and fails once the connection is cut.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::connection::{Connection, Cut};
use super::table::Open;

/// Bytes that the kernel buffers for a peer beyond what is in flight. With the kernel's own figure, megabytes of each
/// answer would lie there for a slow reader, and free room would be reported only when a third is free. Half of the
/// buffer must be sent before a write continues, which a peer that takes 2 KB/s must manage well within
/// `write_stall`.
const UNSENT_BYTES: u32 = 32 << 10;

/// One accepted connection, which stays in its listener's table until it is dropped.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    open: Open,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, open: Open) -> Self {
        // Without either option the connection is slower, and works.
        let _ = stream.set_nodelay(true);
        #[cfg(target_os = "linux")]
        let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT_BYTES);
        Self { stream, open }
    }

    /// The state of the connection.
    pub const fn connection(&self) -> &Arc<Connection> {
        self.open.connection()
    }

    /// Nothing has arrived as far as tokio knows. Cuts the connection if it was asked to close, unless the kernel has
    /// bytes.
    fn close_if_asked(&self) {
        let connection = self.connection();
        if !connection.is_closed_by_socket() {
            return;
        }
        let Some(why) = connection.take_asked_to_close() else { return };
        let mut byte = [MaybeUninit::uninit()];
        let unread = matches!(socket2::SockRef::from(&self.stream).peek(&mut byte), Ok(1..));
        if !(unread && connection.is_spared()) {
            connection.cut(why);
        }
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
            // A client that was too slow with a head gets an answer.
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
            self.close_if_asked();
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::task::Waker;
    use std::time::Duration;

    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;
    use crate::edge::connection::Bounds;
    use crate::edge::metrics::EdgeMetrics;
    use crate::edge::table::Table;

    /// A socket that was never read from, and its peer.
    async fn pair() -> (Socket, std::net::TcpStream) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let peer = std::net::TcpStream::connect(address).expect("connects");
        let (stream, from) = listener.accept().await.expect("accepts");
        let table = Table::new("test", Bounds::grpc(), EdgeMetrics::default());
        (Socket::new(stream, table.admit(from.ip()).expect("room")), peer)
    }

    /// Writes and waits until the bytes are in the socket, without letting tokio notice.
    fn write(socket: &Socket, peer: &mut std::net::TcpStream) {
        peer.write_all(b"request").expect("written");
        let mut byte = [MaybeUninit::uninit()];
        while !matches!(socket2::SockRef::from(&socket.stream).peek(&mut byte), Ok(1..)) {
            std::thread::yield_now();
        }
    }

    fn poll_read(socket: &mut Socket, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(socket).poll_read(cx, &mut ReadBuf::new(&mut [0; 64]))
    }

    #[tokio::test]
    async fn a_socket_that_is_asked_to_close_closes_unless_bytes_lie_unread_and_those_save_it_once() {
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut socket, mut peer) = pair().await;
        assert!(poll_read(&mut socket, cx).is_pending());
        for spared in [true, false] {
            write(&socket, &mut peer);
            socket.connection().ask_to_close(Cut::Idle);
            assert_eq!(poll_read(&mut socket, cx).is_pending(), spared);
            assert_eq!(socket.connection().was_cut().is_none(), spared);
            if spared {
                assert_eq!(socket.read(&mut [0; 64]).await.expect("reads"), 7);
            }
        }
    }

    #[tokio::test]
    async fn a_socket_whose_request_came_is_spared_again() {
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut socket, mut peer) = pair().await;
        for _ in 0..3 {
            assert!(poll_read(&mut socket, cx).is_pending());
            write(&socket, &mut peer);
            socket.connection().ask_to_close(Cut::Evicted);
            assert!(poll_read(&mut socket, cx).is_pending());
            assert_eq!(socket.read(&mut [0; 64]).await.expect("reads"), 7);
            drop(socket.connection().begin());
        }
    }

    #[tokio::test]
    async fn an_empty_socket_that_is_asked_to_close_fails_its_reader_at_once() {
        for leaves in [false, true] {
            let (mut socket, peer) = pair().await;
            let connection = Arc::clone(socket.connection());
            let reads = tokio::spawn(async move { poll_fn(|cx| poll_read(&mut socket, cx)).await });
            let peer = (!leaves).then_some(peer);
            connection.ask_to_close(Cut::Drained);
            let read =
                tokio::time::timeout(Duration::from_secs(30), reads).await.expect("in time").expect("a task");
            assert!(leaves || read.is_err_and(|error| error.kind() == io::ErrorKind::TimedOut));
            drop(peer);
        }
    }
}
