//! The body of an answer, which reads its own connection.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::connection::Connection;
use super::idle::Idle;

/// The body of a backend's answer. Read to its end, it gives the connection back; dropped before, it closes it, unless the
/// rest is there already.
#[derive(Debug)]
pub struct AnswerBody {
    /// `None` only while this is dropped.
    body: Option<Incoming>,
    /// Until the end of the body.
    connection: Option<Box<Connection>>,
    idle: Arc<Idle>,
}

impl AnswerBody {
    pub(super) fn new(body: Incoming, connection: Box<Connection>, idle: Arc<Idle>) -> Self {
        let is_over = body.is_end_stream();
        let mut body = Self { body: Some(body), connection: Some(connection), idle };
        if is_over {
            body.give_back();
        }
        body
    }

    fn give_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.idle.put(connection);
        }
    }

    /// What of the body is there. Only the connection can bring more of it, so its wake-up is enough.
    fn next(&mut self) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let mut next = self.next();
        if next.is_pending()
            && let Some(connection) = &mut self.connection
        {
            connection.drive(cx);
            next = self.next();
        }
        match &next {
            Poll::Ready(None) => self.give_back(),
            Poll::Ready(Some(Err(_))) => self.connection = None,
            _ => {}
        }
        next
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl Drop for AnswerBody {
    fn drop(&mut self) {
        if self.connection.is_some() {
            // hyper reads to the end of a body that is dropped, if it need not wait for it.
            self.body = None;
            self.give_back();
        }
    }
}
