//! The body of an answer, and the end of its request.
//!
//! A request ends when its body ends, so the body owns everything that must be given back: the reservation (tokens
//! and leases), the backend's count of requests in flight, and the context that becomes the log line. Dropping the
//! body, finished or not, gives all of it back once.

use std::convert::Infallible;
use std::fmt;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt as _, Full};
use tokio::time::{Instant, Sleep};
use weir_ratelimit::Kind;
use weir_runtime::edge::RequestClock;

use crate::api::response::Rewriter;
use crate::api::usage::Tokens;
use crate::error::GatewayError;
use crate::http::attempt::Target;
use crate::http::bounds::WRITE_STALL;
use crate::http::context::RequestContext;
use crate::http::request_body::Room;
use crate::limits::reservation::{Reservation, STEP_TOKENS};
use crate::routing::backend_state::{AttemptOutcome, InFlight};
use crate::routing::upstream::AnswerBody;

/// What is handed out at a time of a complete answer.
const PIECE_BYTES: usize = 32 << 10;
/// The body itself ends a stream at its deadline, with a last event. A client that takes nothing keeps the body from being
/// polled: then the stream is cut so much later.
const CUT_GRACE: Duration = Duration::from_millis(500);

/// What the client is sent.
#[derive(Debug)]
pub enum Body {
    /// Short, and made here.
    Full(Full<Bytes>),
    /// A backend's answer that is complete.
    Unary(UnaryBody),
    /// As it comes.
    Stream(Pin<Box<StreamBody>>),
    /// Comments, until it is known which of the others it is.
    Later(Pin<Box<dyn LaterBody>>),
}

/// A body that is made elsewhere.
pub trait LaterBody: http_body::Body<Data = Bytes, Error = Infallible> + fmt::Debug + Send {}

impl<B: http_body::Body<Data = Bytes, Error = Infallible> + fmt::Debug + Send> LaterBody for B {}

impl Body {
    /// A body that is made elsewhere.
    pub fn later(body: impl LaterBody + 'static) -> Self {
        Self::Later(Box::pin(body))
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self::Full(Full::new(bytes))
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Self::Full(full) => Pin::new(full).poll_frame(cx),
            Self::Unary(unary) => Poll::Ready(unary.next().map(|piece| Ok(Frame::data(piece)))),
            Self::Stream(stream) => {
                stream.as_mut().get_mut().poll_chunk(cx).map(|c| c.map(|b| Ok(Frame::data(b))))
            }
            Self::Later(later) => later.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(full) => full.is_end_stream(),
            Self::Unary(unary) => unary.rest.is_empty(),
            Self::Stream(stream) => matches!(stream.state, State::Done),
            Self::Later(later) => later.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(full) => full.size_hint(),
            Self::Unary(unary) => SizeHint::with_exact(unary.rest.len() as u64),
            Self::Stream(_) | Self::Later(_) => SizeHint::default(),
        }
    }
}

/// A unary answer, handed out in pieces: of a single piece it would not be known how much the client has taken.
#[derive(Debug)]
pub struct UnaryBody {
    rest: Bytes,
    clock: Arc<RequestClock>,
    /// Given back with the last of it.
    _room: Room,
}

impl UnaryBody {
    /// All of `answer`; a client that takes nothing of it is cut by the request's clock.
    pub const fn new(answer: Bytes, room: Room, clock: Arc<RequestClock>) -> Self {
        Self { rest: answer, clock, _room: room }
    }

    fn next(&mut self) -> Option<Bytes> {
        let piece = self.rest.split_to(self.rest.len().min(PIECE_BYTES));
        self.clock.cut_at(Instant::now() + WRITE_STALL);
        Some(piece).filter(|piece| !piece.is_empty())
    }
}

/// The two clocks of a stream; the third, to the first byte, has stopped before a stream is made.
#[derive(Debug, Clone, Copy)]
pub struct Clocks {
    /// Between two chunks.
    pub idle: Duration,
    /// When the whole request must have ended.
    pub deadline: Instant,
}

/// A stream on its way from a backend to the client.
#[derive(Debug)]
pub struct StreamBody {
    state: State,
    /// `None` once nothing more is read of it.
    upstream: Option<AnswerBody>,
    rewriter: Rewriter,
    clocks: Clocks,
    /// One timer for both clocks. It is moved only when it fires, so that a chunk costs no timer operation.
    timer: Pin<Box<Sleep>>,
    last_chunk: Instant,
    /// Tokens of the answer that the limits know of.
    charged: u64,
    /// Given back on drop.
    end: StreamEnd,
}

#[derive(Debug)]
enum State {
    /// The chunk that was awaited before 200 was sent.
    Peeked(Bytes),
    Flowing,
    Done,
}

/// What a stream gives back at its end.
#[derive(Debug)]
pub struct StreamEnd {
    /// What it reserved.
    pub reservation: Reservation,
    /// The prompt's tokens as reserved, for when the backend does not say.
    pub prompt_tokens: u64,
    /// Where it runs.
    pub target: Target,
    /// Its place in the backend's count.
    pub in_flight: InFlight,
    /// Its facts.
    pub context: Box<RequestContext>,
}

impl StreamBody {
    /// A stream whose first chunk has been awaited.
    pub fn new(
        first: Bytes,
        upstream: Option<AnswerBody>,
        mut rewriter: Rewriter,
        clocks: Clocks,
        end: StreamEnd,
    ) -> Self {
        let now = Instant::now();
        let first = rewriter.push(first);
        let timer = Box::pin(tokio::time::sleep_until(clocks.deadline.min(now + clocks.idle)));
        let charged = end.reservation.reserved.get(Kind::OutputTokens);
        Self { state: State::Peeked(first), upstream, rewriter, clocks, timer, last_chunk: now, charged, end }
    }

    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let chunk = self.poll_next(cx);
        let overdue = self.clocks.deadline + CUT_GRACE;
        let clock = &self.end.context.client.clock;
        match chunk {
            // The body is not polled until the client has taken this, so its own clocks do not run meanwhile.
            Poll::Ready(_) => clock.cut_at(overdue.min(Instant::now() + WRITE_STALL)),
            Poll::Pending => clock.cut_at(overdue),
        }
        chunk
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.end.context.client.clock.poll_ending(cx) && !matches!(self.state, State::Done) {
            return Poll::Ready(Some(self.cut(&GatewayError::Draining)));
        }
        match std::mem::replace(&mut self.state, State::Flowing) {
            State::Peeked(first) if self.rewriter.is_over() => return Poll::Ready(self.over(first, cx)),
            State::Peeked(first) if !first.is_empty() => return Poll::Ready(Some(first)),
            State::Peeked(_) | State::Flowing => {}
            State::Done => {
                self.state = State::Done;
                return Poll::Ready(None);
            }
        }
        loop {
            let Some(upstream) = &mut self.upstream else { return Poll::Ready(self.ended()) };
            match Pin::new(upstream).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.last_chunk = Instant::now();
                    self.end.target.backend.state.note_answered(self.last_chunk);
                    let Ok(data) = frame.into_data() else { continue };
                    let out = self.rewriter.push(data);
                    self.charge();
                    if self.rewriter.is_over() {
                        return Poll::Ready(self.over(out, cx));
                    }
                    if !out.is_empty() {
                        return Poll::Ready(Some(out));
                    }
                }
                Poll::Ready(Some(Err(_))) => {
                    return Poll::Ready(Some(self.broken(AttemptOutcome::ConnectFailure)));
                }
                Poll::Ready(None) => return Poll::Ready(self.ended()),
                Poll::Pending => {
                    if let Some(event) = ready!(self.poll_clocks(cx)) {
                        return Poll::Ready(Some(event));
                    }
                }
            }
        }
    }

    /// Charges what the answer has grown by since the last step.
    fn charge(&mut self) {
        let tokens = self.rewriter.facts().completion_tokens();
        if tokens >= self.charged.saturating_add(STEP_TOKENS) {
            self.charged = tokens;
            let cost = self.end.target.cost(&self.tokens());
            self.end.reservation.streamed(cost);
        }
    }

    /// What was used so far: counted by the backend, or else here.
    fn tokens(&self) -> Tokens {
        let facts = self.rewriter.facts();
        Tokens::of(facts.usage, self.end.prompt_tokens, facts.completion_estimate())
    }

    /// Ready with an event when a clock ran out; ready without one never; pending otherwise.
    fn poll_clocks(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let idle_until = self.last_chunk + self.clocks.idle;
            if now >= self.clocks.deadline {
                return Poll::Ready(Some(self.cut(&GatewayError::Deadline)));
            }
            if now >= idle_until {
                return Poll::Ready(Some(self.broken(AttemptOutcome::Timeout)));
            }
            self.timer.as_mut().reset(idle_until.min(self.clocks.deadline));
        }
    }

    /// The last event of the stream is here, whatever the connection does from now on.
    fn over(&mut self, last: Bytes, cx: &mut Context<'_>) -> Option<Bytes> {
        self.told_to_the_end();
        if let Some(upstream) = self.upstream.take() {
            finish_reading(upstream, cx);
        }
        Some(last).filter(|last| !last.is_empty())
    }

    /// The upstream closed its stream. That is an end only if it had finished.
    fn ended(&mut self) -> Option<Bytes> {
        let rest = self.rewriter.finish();
        self.upstream = None;
        let facts = self.rewriter.facts();
        if facts.complete() || facts.error_seen {
            self.told_to_the_end();
            return Some(rest).filter(|r| !r.is_empty());
        }
        let mut out = Vec::from(rest);
        out.extend_from_slice(&self.broken(AttemptOutcome::ConnectFailure));
        Some(out.into())
    }

    /// The backend said all it had to say: an answer, or an error that it told the client itself. An error may be the
    /// request's own doing, and no other backend can be asked any more.
    fn told_to_the_end(&mut self) {
        let facts = self.rewriter.facts();
        self.state = State::Done;
        match facts.error_seen {
            false => {
                self.end.target.succeed(facts.completion_tokens());
                self.end.context.finished(StatusCode::OK, "ok");
            }
            true => {
                self.end.target.fail_without_blame(AttemptOutcome::ServerError);
                self.end.context.finished(StatusCode::OK, "error_in_stream");
            }
        }
    }

    /// The backend's fault, after bytes were sent: an error event, and no `[DONE]`.
    fn broken(&mut self, outcome: AttemptOutcome) -> Bytes {
        self.end.target.fail(outcome);
        let error = match outcome {
            AttemptOutcome::Timeout => GatewayError::UpstreamTimeout,
            _ => GatewayError::UpstreamBroken,
        };
        self.cut(&error)
    }

    fn cut(&mut self, error: &GatewayError) -> Bytes {
        self.state = State::Done;
        self.end.context.finished(StatusCode::OK, error.facts().label);
        // Of a long event a part may have gone out: the empty line ends it, so that this one is read as its own.
        let end = if self.rewriter.is_inside_event() { "\n\n" } else { "" };
        format!("{end}{}", error.sse_event()).into()
    }
}

/// What a connection may still bring after the last event, bytes: the end of its framing, comments.
const LEFTOVER_MAX_BYTES: usize = 16 << 10;
/// And how long it may take to.
const LEFTOVER_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads the end of a stream that is over, so that its connection can be used again; nobody waits for it. A connection that
/// does not end within [`LEFTOVER_TIMEOUT`] is closed.
fn finish_reading(mut upstream: AnswerBody, cx: &mut Context<'_>) {
    let mut left = LEFTOVER_MAX_BYTES;
    // Mostly the end is here already.
    loop {
        match Pin::new(&mut upstream).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    return;
                }
            }
            Poll::Ready(None | Some(Err(_))) => return,
            Poll::Pending => break,
        }
    }
    tokio::spawn(async move {
        let reading = async {
            while let Some(Ok(frame)) = upstream.frame().await {
                left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                if left == 0 {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(LEFTOVER_TIMEOUT, reading).await;
    });
}

impl Drop for StreamBody {
    fn drop(&mut self) {
        if !matches!(self.state, State::Done) && self.end.context.client.took_nothing() {
            self.end.context.finished(StatusCode::OK, "client_stalled");
        }
        let tokens = self.tokens();
        // First: it is charged whatever becomes of the rest.
        self.end.context.tokens = Some(tokens);
        let cost = self.end.target.cost(&tokens);
        self.end.reservation.used(cost);
        let facts = self.rewriter.facts();
        if let Some(found) = &facts.implausible {
            self.end.target.implausible(found);
        } else if facts.complete() {
            let prompt = facts.usage.and_then(|usage| usage.prompt);
            self.end.reservation.learn(prompt, Some(tokens.completion));
        }
    }
}
