//! The body of an answer. Its request counts as running for as long as the body exists.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Buf;
use http_body::{Body, Frame, SizeHint};

use super::connection::{Busy, Connection};

/// Bytes of an HTTP/1 answer that hyper gets before the socket has taken some of them. hyper's own bound is that of a
/// head, and it fills its buffer before it writes.
const UNWRITTEN_BYTES_MAX: usize = 16 << 10;
/// The body of an answer; its request runs for as long as the body exists.
#[derive(Debug)]
pub struct BusyBody<B> {
    body: B,
    /// Only for HTTP/1, where one task drives the body and the socket.
    unwritten: Option<Unwritten>,
    _busy: Option<Busy>,
}

impl<B> BusyBody<B> {
    /// A body that is polled whenever its reader wants more.
    pub(super) const fn new(body: B, busy: Option<Busy>) -> Self {
        Self { body, unwritten: None, _busy: busy }
    }

    /// A body of HTTP/1. It is polled only when the socket has taken the bytes before.
    pub(super) const fn paced(body: B, busy: Busy, unwritten: Unwritten) -> Self {
        Self { body, unwritten: Some(unwritten), _busy: Some(busy) }
    }
}

/// The bytes of an answer that hyper got and has not written.
#[derive(Debug)]
pub(super) struct Unwritten {
    connection: Arc<Connection>,
    bytes: usize,
    /// The bytes that the socket had taken when this count began.
    written: u64,
}

impl Unwritten {
    pub(super) fn new(connection: Arc<Connection>) -> Self {
        Self { bytes: 0, written: connection.written(), connection }
    }

    /// Whether hyper has enough bytes. It writes as soon as a body is pending; if the socket takes nothing, its
    /// readiness wakes the task.
    fn is_enough(&mut self, cx: &Context<'_>) -> bool {
        if self.bytes < UNWRITTEN_BYTES_MAX {
            return false;
        }
        if self.connection.is_write_waiting() {
            return true;
        }
        let written = self.connection.written();
        if written == self.written {
            cx.waker().wake_by_ref();
            return true;
        }
        (self.bytes, self.written) = (0, written);
        false
    }
}

impl<B: Body + Unpin> Body for BusyBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        if self.unwritten.as_mut().is_some_and(|unwritten| unwritten.is_enough(cx)) {
            return Poll::Pending;
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(unwritten), Some(Ok(frame))) = (&mut self.unwritten, &frame) {
            unwritten.bytes += frame.data_ref().map_or(0, Buf::remaining);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
