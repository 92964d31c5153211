//! HTTP/1 and HTTP/2 on one connection.
//!
//! hyper speaks the protocols. This module adds: the choice between the two, under the connection's clock; the strict
//! grammar of HTTP/1; refusals that reach a client which is still sending; requests whose clocks run whether or not
//! their bodies are polled; an end that does not wait for clients.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, timeout, timeout_at};

use super::busy::{BusyBody, Unwritten};
use super::clock::RequestClock;
use super::connection::{Busy, Connection, Cut};
use super::framed::{Begun, Framed};
use super::framing::{HeadBounds, Violation};

/// Bytes that hyper may hold of a head beyond its bound.
const HEAD_SLACK_BYTES: usize = 8 << 10;
/// Fields that hyper takes by itself. Told another number, it makes its tables on the heap, for each head.
const HYPER_FIELDS: usize = 100;
/// The longest time to write a refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The time for which the bytes that a client sends after its answer are read, in all and between two reads: nginx's
/// `lingering_time` and `lingering_timeout`. If the connection closed at once, its reset would overtake the answer.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_PAUSE: Duration = Duration::from_secs(5);
const LINGER_BUFFER_BYTES: usize = 16 << 10;
/// Bytes that hyper holds of an answer for an HTTP/2 client that does not take it.
const SEND_BUFFER_BYTES: usize = 16 << 10;
/// The time in which an HTTP/2 client that is told of the end of its idle connection must acknowledge and close.
const GOAWAY_GRACE: Duration = Duration::from_secs(2);
/// The time after which a silent HTTP/2 client is pinged, and the time it has to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// The bounds of the requests of a connection.
#[derive(Debug, Clone, Copy)]
pub struct HttpBounds {
    /// The bounds of each head.
    pub head: HeadBounds,
    /// The maximum of HTTP/2 streams of a connection.
    pub streams: u32,
}

/// The sender of a request, and the request's clock.
#[derive(Debug, Clone)]
pub struct Client {
    /// Its connection.
    pub connection: Arc<Connection>,
    /// The clock of the request.
    pub clock: Arc<RequestClock>,
}

impl Client {
    /// A client without a listener, which no clock ever cuts: for tests and benches.
    pub fn detached(peer: std::net::IpAddr) -> Self {
        let connection = Arc::new(Connection::new(peer, super::Bounds::operations()));
        Self { clock: Arc::clone(&connection.clock), connection }
    }

    /// Whether the request was cut because the client takes nothing of its answer.
    pub fn took_nothing(&self) -> bool {
        self.clock.was_cut() || self.connection.was_cut() == Some(Cut::Stalled)
    }
}

/// The answer to a head that cannot be read.
#[derive(Debug)]
pub struct Refusal {
    /// JSON.
    pub body: String,
    /// The value of `x-request-id`, if there is one.
    pub request_id: Option<String>,
}

/// Makes the answer to a head that cannot be read, and counts it.
pub type Refuse = fn(Violation) -> Refusal;

/// A connection on which HTTP is served.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send + 'static> Transport for T {}

/// Answers requests: any function from a client and its request to an answer.
pub trait Handler: Clone + Unpin + Send + 'static {
    /// The body of an answer.
    type Body: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
        + Unpin
        + Send
        + 'static;

    /// An answer in progress. In a box where it is large: it is moved several times on its way to hyper.
    type Answer: Future<Output = Response<Self::Body>> + Unpin + Send + 'static;

    /// The answer to one request.
    fn handle(&self, client: Client, request: Request<Incoming>) -> Self::Answer;
}

impl<S, F, B> Handler for S
where
    S: Fn(Client, Request<Incoming>) -> F + Clone + Unpin + Send + 'static,
    F: Future<Output = Response<B>> + Unpin + Send + 'static,
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Unpin + Send + 'static,
{
    type Body = B;
    type Answer = F;

    fn handle(&self, client: Client, request: Request<Incoming>) -> F {
        self(client, request)
    }
}

tokio::task_local! {
    /// The clock of the HTTP/2 stream whose task runs.
    static STREAM: Arc<RequestClock>;
}

/// Serves the protocol that the client speaks, HTTP/1 or HTTP/2, until the connection ends.
pub async fn serve_http(
    io: impl Transport,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    handler: impl Handler,
) {
    let mut begun = Begun::new(io);
    match begun.is_http2().await {
        Ok(true) => http2(begun, connection, bounds, handler).await,
        Ok(false) => http1(begun, connection, bounds, refuse, handler).await,
        Err(error) => tracing::debug!(peer = %connection.peer(), %error, "connection ended before a request"),
    }
}

/// Serves only HTTP/1 until the connection ends.
pub async fn serve_http1(
    io: impl Transport,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    handler: impl Handler,
) {
    let begun = Begun::new(io);
    http1(begun, connection, bounds, refuse, handler).await;
}

/// An answer of HTTP/1 in progress.
struct Answering<F> {
    answer: F,
    /// What its body takes over.
    body_of: Option<(Busy, Unwritten)>,
    connection: Arc<Connection>,
}

impl<F: Future<Output = Response<B>> + Unpin, B> Future for Answering<F> {
    type Output = Result<Response<BusyBody<B>>, std::convert::Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.answer).poll(cx));
        let body_of = self.body_of.take();
        let mut response = answer.map(|body| match body_of {
            Some((busy, unwritten)) => BusyBody::paced(body, busy, unwritten),
            // Not polled after its end.
            None => BusyBody::new(body, None),
        });
        // Clients leave with their next answer instead of being cut between two requests.
        if self.connection.is_draining() {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        Poll::Ready(Ok(response))
    }
}

/// How a connection of HTTP/1 ended.
enum End {
    Done,
    Malformed,
    Cut(Cut),
}

async fn http1<I: Transport>(
    begun: Begun<I>,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    handler: impl Handler,
) {
    connection.closes_itself();
    let framed = Framed::new(begun, bounds.head, Arc::clone(&connection));
    let client = Client { connection: Arc::clone(&connection), clock: Arc::clone(&connection.clock) };
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = client.connection.begin();
        client.clock.stop();
        let connection = Arc::clone(&client.connection);
        let body_of = Some((busy, Unwritten::new(Arc::clone(&connection))));
        Answering { answer: handler.handle(client.clone(), request), body_of, connection }
    });
    let mut builder = http1::Builder::new();
    // The connection's own clock times heads. hyper's bounds are not below those of the framing check, so that the
    // framing check refuses first.
    builder.header_read_timeout(None).max_buf_size(bounds.head.bytes + HEAD_SLACK_BYTES);
    if bounds.head.fields > HYPER_FIELDS {
        builder.max_headers(bounds.head.fields);
    }
    let mut driver = builder.serve_connection(TokioIo::new(framed), service);
    let end = until_asked(&connection, |cx| {
        if let Some(why) = connection.poll_cut(cx) {
            return Poll::Ready(End::Cut(why));
        }
        if connection.clock.poll_cut(cx) {
            return Poll::Ready(End::Cut(Cut::Stalled));
        }
        if let Poll::Ready(done) = driver.poll_without_shutdown(cx) {
            if let Err(error) = done {
                tracing::debug!(peer = %connection.peer(), %error, "connection ended");
            }
            return Poll::Ready(End::Done);
        }
        // Earlier answers are written already: hyper writes everything before it waits for anything else.
        if connection.is_malformed() && !connection.is_busy() && !connection.is_write_waiting() {
            return Poll::Ready(End::Malformed);
        }
        Poll::Pending
    })
    .await;
    let end = end.unwrap_or_else(|why| {
        connection.cut(why);
        End::Cut(why)
    });
    let parts = driver.into_parts();
    let unread = !parts.read_buf.is_empty();
    let mut framed = parts.io.into_inner();
    finish(&mut framed, &connection, end, unread, refuse).await;
}

/// Tells the client why the connection ends, if the client is the cause, and closes.
async fn finish<I: Transport>(
    framed: &mut Framed<I>,
    connection: &Connection,
    end: End,
    unread: bool,
    refuse: Refuse,
) {
    let refusal = match (end, framed.violation()) {
        (End::Malformed, Some(violation)) => Some(violation),
        (End::Cut(Cut::Head), _) if framed.is_in_head() => {
            let status = StatusCode::REQUEST_TIMEOUT;
            Some(Violation { status, what: "the head of the request did not arrive in time" })
        }
        (End::Cut(_), _) => return,
        _ => None,
    };
    if let Some(violation) = refusal {
        let text = in_full(violation, refuse(violation));
        if timeout(REFUSAL_TIMEOUT, framed.io().write_all(text.as_bytes())).await.is_err() {
            return;
        }
    }
    let is_sending = framed.is_sending(unread);
    linger(framed.io(), connection, is_sending).await;
}

/// Drives a connection until it ends, or until it is asked to close and no request has come. The error says why.
async fn until_asked(
    connection: &Connection,
    mut drive: impl FnMut(&mut Context<'_>) -> Poll<End>,
) -> Result<End, Cut> {
    loop {
        let ended = poll_fn(|cx| match drive(cx) {
            Poll::Ready(end) => Poll::Ready(Some(end)),
            Poll::Pending if connection.is_asked_to_close() => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        });
        if let Some(end) = ended.await {
            return Ok(end);
        }
        // On a busy machine a request may lie unread for longer than the connection seems idle, and closing the
        // connection would lose it. tokio polls the sockets before it resumes a task that yields.
        tokio::task::yield_now().await;
        if let Poll::Ready(end) = poll_fn(|cx| Poll::Ready(drive(cx))).await {
            return Ok(end);
        }
        if let Some(why) = connection.take_asked_to_close().filter(|why| connection.is_at_rest(*why)) {
            return Err(why);
        }
    }
}

/// Drives a connection of HTTP/2 to its end. The client is told first which of its requests are answered.
async fn until_told(connection: &Connection, mut drive: impl FnMut(&mut Context<'_>) -> Poll<End>) {
    loop {
        let Err(why) = until_asked(connection, &mut drive).await else { return };
        if connection.is_to_be_told(why) {
            // The driver sends a GOAWAY, and the last one when the client has answered. Then it ends by itself.
            connection.drain();
            let ended = timeout(GOAWAY_GRACE, poll_fn(&mut drive)).await.is_ok();
            if !ended && !connection.is_at_rest(why) {
                continue;
            }
        }
        return connection.cut(why);
    }
}

fn in_full(violation: Violation, refusal: Refusal) -> String {
    let Refusal { body, request_id } = refusal;
    let id = request_id.map(|id| format!("x-request-id: {id}\r\n")).unwrap_or_default();
    let reason = violation.status.canonical_reason().unwrap_or_default();
    format!(
        "HTTP/1.1 {} {reason}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{id}connection: close\r\n\r\n{body}",
        violation.status.as_u16(),
        body.len()
    )
}

/// Closes after a time in which the client's bytes are still read, so that the client reads the answer.
async fn linger<I: AsyncRead + AsyncWrite + Unpin>(io: &mut I, connection: &Connection, is_sending: bool) {
    if timeout(REFUSAL_TIMEOUT, io.shutdown()).await.is_err() || !is_sending {
        return;
    }
    connection.lingers(LINGER);
    let end = Instant::now() + LINGER;
    let mut buffer = vec![0; LINGER_BUFFER_BYTES];
    loop {
        let until = end.min(Instant::now() + LINGER_PAUSE);
        match timeout_at(until, io.read(&mut buffer)).await {
            Ok(Ok(count)) if count > 0 && Instant::now() < end => {}
            _ => return,
        }
    }
}

/// Runs the streams of one connection, each with a clock.
#[derive(Debug, Clone)]
struct Streams(Arc<Connection>);

impl<F> hyper::rt::Executor<F> for Streams
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, stream: F) {
        let open = self.0.stream();
        let clock = Arc::clone(&open.clock);
        let mut stream = Box::pin(stream);
        // Ends with the stream: with its answer, its client, the connection or its clock. Dropping hyper's side
        // resets the stream.
        tokio::spawn(STREAM.scope(clock, async move {
            poll_fn(|cx| match open.clock.poll_cut(cx) {
                true => Poll::Ready(()),
                false => stream.as_mut().poll(cx).map(drop),
            })
            .await;
        }));
    }
}

async fn http2<I: Transport>(
    begun: Begun<I>,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    handler: impl Handler,
) {
    connection.closes_itself();
    let own = Arc::clone(&connection);
    let service = service_fn(move |request: Request<Incoming>| {
        let (busy, handler, connection) = (own.begin(), handler.clone(), Arc::clone(&own));
        async move {
            // hyper polls this in the task of the stream.
            let clock = STREAM.try_with(Arc::clone).unwrap_or_default();
            let response = handler.handle(Client { connection, clock }, request).await;
            Ok::<_, std::convert::Infallible>(response.map(|body| BusyBody::new(body, Some(busy))))
        }
    });
    let mut builder = http2::Builder::new(Streams(Arc::clone(&connection)));
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(bounds.streams)
        .max_header_list_size(u32::try_from(bounds.head.bytes).unwrap_or(u32::MAX))
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    let mut driver = std::pin::pin!(builder.serve_connection(TokioIo::new(begun), service));
    let mut goaway_sent = false;
    until_told(&connection, |cx| {
        if let Some(why) = connection.poll_cut(cx) {
            return Poll::Ready(End::Cut(why));
        }
        if !goaway_sent && connection.ends() {
            goaway_sent = true;
            driver.as_mut().graceful_shutdown();
        }
        driver.as_mut().poll(cx).map(|ended| {
            if let Err(error) = ended {
                tracing::debug!(peer = %connection.peer(), %error, "connection ended");
            }
            End::Done
        })
    })
    .await;
}

#[cfg(test)]
mod tests;
