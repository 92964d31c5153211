//! The bytes of a connection between socket and hyper: which protocol they speak, and whether HTTP/1 heads keep the
//! grammar.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::connection::Connection;
use super::framing::{Framing, HeadBounds, Violation};

/// The first bytes of a connection of HTTP/2 (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The time in which an HTTP/2 client must close after it was sent a GOAWAY.
const LINGER_HTTP2: Duration = Duration::from_secs(1);
/// Bytes of one read behind the beginning of a line.
const LINE_READ_BYTES: usize = 4 << 10;

/// A connection whose first bytes were read to find the protocol, and are read again.
pub(super) struct Begun<I> {
    io: I,
    prefix: [u8; PREFACE.len()],
    length: usize,
    replayed: usize,
    /// Only for HTTP/2, after our side is closed: the time until which the client may close its side.
    until: Option<Pin<Box<Sleep>>>,
}

impl<I: AsyncRead + Unpin> Begun<I> {
    pub(super) const fn new(io: I) -> Self {
        Self { io, prefix: [0; PREFACE.len()], length: 0, replayed: 0, until: None }
    }

    /// Reads until the protocol is known. The connection's clock ends the wait.
    pub(super) async fn is_http2(&mut self) -> io::Result<bool> {
        while self.length < PREFACE.len() {
            let read = self.io.read(&mut self.prefix[self.length..]).await?;
            self.length += read;
            if read == 0 || self.prefix[..self.length] != PREFACE[..self.length] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn poll_replay(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.replayed < self.length {
            let count = (self.length - self.replayed).min(buffer.remaining());
            buffer.put_slice(&self.prefix[self.replayed..self.replayed + count]);
            self.replayed += count;
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> Begun<I> {
    /// Closes. The end of an HTTP/2 connection waits for the client's end. If it closed at once, a request in flight
    /// would be answered by a reset, which discards the GOAWAY and the last answers with it. HTTP/1 does the same in
    /// [`linger`].
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.until.is_none() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        }
        if self.length < PREFACE.len() {
            return Poll::Ready(Ok(()));
        }
        let until = self.until.get_or_insert_with(|| Box::pin(sleep(LINGER_HTTP2)));
        if until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        let mut part = [0; LINE_READ_BYTES];
        loop {
            let mut part = ReadBuf::new(&mut part);
            match ready!(Pin::new(&mut self.io).poll_read(cx, &mut part)) {
                Ok(()) if !part.filled().is_empty() => {}
                _ => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Begun<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_replay(cx, buffer)
    }
}

/// The bytes of an HTTP/1 connection between socket and hyper, checked. hyper parses an incomplete head and answers
/// errors in its own way, so it only gets complete lines.
pub(super) struct Framed<I> {
    begun: Begun<I>,
    framing: Framing,
    /// Bytes that were read and not passed on: the beginning of a line, at most as long as a head may be.
    held: Vec<u8>,
    /// The bytes of `held` that are complete lines.
    checked: usize,
    violation: Option<Violation>,
    ended: bool,
    connection: Arc<Connection>,
}

impl<I: AsyncRead + AsyncWrite + Unpin> Framed<I> {
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.begun.io).poll_shutdown(cx)
    }
}

impl<I: AsyncRead + Unpin> Framed<I> {
    pub(super) fn new(begun: Begun<I>, bounds: HeadBounds, connection: Arc<Connection>) -> Self {
        Self {
            begun,
            framing: Framing::new(bounds),
            held: Vec::new(),
            checked: 0,
            violation: None,
            ended: false,
            connection,
        }
    }

    /// Returns the socket after hyper has ended.
    pub(super) const fn io(&mut self) -> &mut I {
        &mut self.begun.io
    }

    /// How the bytes broke the grammar.
    pub(super) const fn violation(&self) -> Option<Violation> {
        self.violation
    }

    /// Whether a head has begun and is not complete.
    pub(super) fn is_in_head(&self) -> bool {
        self.framing.in_head()
    }

    /// Whether the client may still be sending bytes that nobody reads.
    pub(super) fn is_sending(&self, unread: bool) -> bool {
        !self.ended && (unread || self.framing.in_body() || self.violation.is_some())
    }

    /// Checks the bytes of a read. Returns how many of them may be passed on.
    fn follow(&mut self, read: &[u8]) -> usize {
        let was_in_head = self.framing.in_head();
        let followed = self.framing.follow(read);
        if let Err(violation) = followed {
            self.violation = Some(violation);
            if !self.framing.in_body() {
                self.connection.malformed();
            }
        } else if self.framing.in_head() && !was_in_head && !self.connection.is_busy() {
            self.connection.head_began();
        }
        self.framing.checked()
    }

    /// Passes on checked bytes as far as there is room.
    fn pass(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.checked.min(buffer.remaining());
        buffer.put_slice(&self.held[..count]);
        self.held.drain(..count);
        self.checked -= count;
        if self.held.is_empty() {
            // Long lines are rare and connections are many, so the buffer is given back.
            self.held = Vec::new();
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Framed<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if this.checked > 0 {
                this.pass(buffer);
                return Poll::Ready(Ok(()));
            }
            match this.violation {
                // The reader of the body reports this error.
                Some(violation) if this.framing.in_body() => {
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, violation)));
                }
                // The driver answers and closes as soon as the requests before have their answers.
                Some(_) => return Poll::Pending,
                None => {}
            }
            if this.held.is_empty() {
                let before = buffer.filled().len();
                ready!(this.begun.poll_replay(cx, buffer))?;
                let read = &buffer.filled()[before..];
                if read.is_empty() {
                    this.ended = true;
                    return Poll::Ready(Ok(()));
                }
                let checked = this.follow(read);
                if this.violation.is_none() {
                    this.held.extend_from_slice(&read[checked..]);
                }
                buffer.set_filled(before + checked);
                if checked > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let mut part = [0; LINE_READ_BYTES];
                let mut part = ReadBuf::new(&mut part);
                ready!(this.begun.poll_replay(cx, &mut part))?;
                let read = part.filled();
                if read.is_empty() {
                    this.ended = true;
                    return Poll::Ready(Ok(()));
                }
                let (before, checked) = (this.held.len(), this.follow(read));
                this.held.extend_from_slice(read);
                // If there are bytes behind it, the line that had begun is complete.
                this.checked = if checked > 0 { before + checked } else { 0 };
            }
        }
    }
}

macro_rules! write_through {
    ($wrapper:ident, $($field:ident).+) => {
        impl<I: AsyncRead + AsyncWrite + Unpin> AsyncWrite for $wrapper<I> {
            fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.$($field).+).poll_write(cx, bytes)
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                parts: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.$($field).+).poll_write_vectored(cx, parts)
            }

            fn is_write_vectored(&self) -> bool {
                self.$($field).+.is_write_vectored()
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.$($field).+).poll_flush(cx)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                self.poll_end(cx)
            }
        }
    };
}

write_through!(Begun, io);
write_through!(Framed, begun.io);
