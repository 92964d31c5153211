//! Comments to a client whose stream has not begun, so that no proxy on the way takes the connection for dead.
//!
//! A request is answered as always when it ends within the first interval. After that the status is said: 200, and what
//! fails then is told by an error event. The request itself knows nothing of it: it is admitted, attempted and attempted
//! elsewhere as without comments, since none of them is a byte of an answer.

use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use tokio::time::{Instant, Sleep, sleep, timeout};
use weir_runtime::edge::RequestClock;

use super::answer::Reply;
use super::bounds::WRITE_STALL;
use super::context::RequestContext;
use super::headers::{self, Content};
use super::response_body::Body;
use crate::error::GatewayError;

/// What a client reads over, by the grammar of event streams.
const COMMENT: &[u8] = b": keep-alive\n\n";

/// A request that ended, and its facts.
pub(super) type Done = (Result<Reply, GatewayError>, Box<RequestContext>);
/// A request under way. It ends by itself when its time is over, the gateway is told to end, or a bug is met.
pub(super) type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// How a request is answered.
pub(super) struct KeepAlive {
    /// Between two comments.
    pub(super) every: Duration,
    pub(super) clock: Arc<RequestClock>,
    pub(super) request_id: HeaderValue,
}

impl KeepAlive {
    /// Answers with what the work comes to: as `answered` does if that is soon, or else as a stream of comments first.
    pub(super) async fn answer(
        self,
        mut work: Work,
        answered: impl FnOnce(Done) -> Response<Body>,
    ) -> Response<Body> {
        if let Ok(done) = timeout(self.every, &mut work).await {
            return answered(done);
        }
        let headers = self.headers();
        let Self { every, clock, .. } = self;
        // The first comment goes out with the headers, which a server would hold back otherwise.
        let state = State::Waiting { work, timer: Box::pin(sleep(Duration::ZERO)) };
        let stream = CommentedStream { every, clock, state };
        let mut response = Response::new(Body::later(stream));
        *response.headers_mut() = headers;
        response
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(headers::REQUEST_ID, self.request_id.clone());
        headers::content_type(&mut headers, Content::Events);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx and its like hold streams back unless told not to.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        headers
    }
}

/// Comments, and after them the stream or the failure.
struct CommentedStream {
    every: Duration,
    clock: Arc<RequestClock>,
    state: State,
}

enum State {
    Waiting { work: Work, timer: Pin<Box<Sleep>> },
    Flowing(Body),
    Over,
}

impl fmt::Debug for CommentedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommentedStream").field("every", &self.every).finish_non_exhaustive()
    }
}

impl http_body::Body for CommentedStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        match &mut this.state {
            State::Waiting { work, timer } => {
                if let Poll::Ready((reply, context)) = work.as_mut().poll(cx) {
                    return this.begin(reply, context, cx);
                }
                // No client takes nothing while nothing is given to it.
                this.clock.stop();
                ready!(timer.as_mut().poll(cx));
                timer.as_mut().reset(Instant::now() + this.every);
                // Nothing is polled until the client has taken this.
                this.clock.cut_at(Instant::now() + WRITE_STALL);
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(COMMENT)))))
            }
            State::Flowing(body) => Pin::new(body).poll_frame(cx),
            State::Over => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.state {
            State::Waiting { .. } => false,
            State::Flowing(body) => body.is_end_stream(),
            State::Over => true,
        }
    }
}

impl CommentedStream {
    /// The request came to something.
    fn begin(
        &mut self,
        reply: Result<Reply, GatewayError>,
        mut context: Box<RequestContext>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let last = match reply {
            Ok(Reply::Stream(stream)) => {
                let mut body = stream.into_response(context).into_body();
                let first = Pin::new(&mut body).poll_frame(cx);
                self.state = State::Flowing(body);
                return first;
            }
            Ok(Reply::Complete(response)) => event_of(response.into_body(), cx),
            Err(error) => {
                context.finished(StatusCode::OK, error.facts().label);
                error.sse_event().into()
            }
        };
        self.last(last)
    }

    fn last(&mut self, event: Bytes) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.state = State::Over;
        self.clock.cut_at(Instant::now() + WRITE_STALL);
        Poll::Ready(Some(Ok(Frame::data(event))))
    }
}

/// An answer that is complete, as one event. Such as a backend's word on what is wrong with the request.
fn event_of(mut body: Body, cx: &mut Context<'_>) -> Bytes {
    let mut text = Vec::new();
    // It waits for nothing.
    while let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut body).poll_frame(cx) {
        text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
    }
    event(&text)
}

/// Each line of a text is a line of the event.
fn event(text: &[u8]) -> Bytes {
    let mut event = Vec::with_capacity(text.len() + 16);
    for line in text.split(|byte| matches!(byte, b'\n' | b'\r')).filter(|line| !line.is_empty()) {
        event.extend_from_slice(b"data: ");
        event.extend_from_slice(line);
        event.push(b'\n');
    }
    event.push(b'\n');
    event.into()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use prometheus_client::registry::Registry;
    use tokio::time::advance;
    use weir_runtime::edge::Client;

    use super::*;
    use crate::http::answer;
    use crate::metrics::Metrics;

    const EVERY: Duration = Duration::from_secs(15);

    fn context() -> Box<RequestContext> {
        let client = Client::detached("127.0.0.1".parse().expect("an address"));
        let metrics = Metrics::new(&mut Registry::default());
        RequestContext::begin(&metrics, &Arc::default(), &HeaderMap::new(), client)
    }

    fn keep_alive() -> KeepAlive {
        KeepAlive { every: EVERY, clock: Arc::default(), request_id: HeaderValue::from_static("id") }
    }

    /// A request that ends after so long.
    fn work(takes: Duration, reply: impl FnOnce() -> Result<Reply, GatewayError> + Send + 'static) -> Work {
        let context = context();
        Box::pin(async move {
            sleep(takes).await;
            (reply(), context)
        })
    }

    fn answered((reply, _): Done) -> Response<Body> {
        let status = reply.err().map_or(StatusCode::OK, |error| error.facts().status);
        answer::json(status, Bytes::from_static(b"{}"))
    }

    fn late() -> Result<Reply, GatewayError> {
        Err(GatewayError::UpstreamTimeout)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_ends_soon_is_answered_with_its_own_status() {
        let work = work(EVERY - Duration::from_millis(1), late);
        let response = keep_alive().answer(work, answered).await;
        assert_eq!(response.status(), StatusCode::GATEWAY_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments_and_a_failure_is_an_event() {
        let began = Instant::now();
        let response = keep_alive().answer(work(EVERY * 7 / 2, late), answered).await;
        assert_eq!((response.status(), began.elapsed()), (StatusCode::OK, EVERY));
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        assert_eq!(response.headers()["x-request-id"], "id");
        let mut body = response.into_body();
        let mut heard = Vec::new();
        while let Some(frame) = body.frame().await {
            let data = frame.expect("infallible").into_data().expect("data");
            heard.push((began.elapsed(), String::from_utf8(data.to_vec()).expect("text")));
        }
        let comments: Vec<_> = heard.iter().filter(|(_, text)| text == ": keep-alive\n\n").collect();
        let times: Vec<_> = comments.iter().map(|(at, _)| *at).collect();
        assert_eq!(times, [EVERY, EVERY * 2, EVERY * 3]);
        let (at, last) = heard.last().expect("an end");
        assert_eq!(*at, EVERY * 7 / 2);
        assert!(last.starts_with("data: {\"error\"") && last.contains("upstream_timeout"), "{last}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_backends_own_word_is_an_event_line_by_line() {
        let refusal = || {
            let body = Bytes::from_static(b"{\"error\":\r\n{\"code\":\"bad\"}}\n");
            Ok(Reply::Complete(answer::json(StatusCode::BAD_REQUEST, body)))
        };
        let response = keep_alive().answer(work(EVERY * 3 / 2, refusal), answered).await;
        let all = response.into_body().collect().await.expect("infallible").to_bytes();
        assert_eq!(all, ": keep-alive\n\ndata: {\"error\":\ndata: {\"code\":\"bad\"}}\n\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_ends_the_request() {
        let (held, ended) = tokio::sync::oneshot::channel::<()>();
        let context = context();
        let work: Work = Box::pin(async move {
            let _held = held;
            sleep(EVERY * 1000).await;
            (late(), context)
        });
        let response = keep_alive().answer(work, answered).await;
        drop(response);
        advance(Duration::from_millis(1)).await;
        assert!(ended.await.is_err(), "all that it held is given back");
    }
}
