//! HTTP/1 and HTTP/2 on one connection.
//!
//! hyper speaks the protocols. What is added here: which of the two it is, found out under the connection's clock; the
//! strict grammar of HTTP/1; refusals that reach a client which is still sending; requests whose clocks run whether or not
//! their bodies are polled; an end that waits for nobody.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout, timeout_at};

use super::framing::{Framing, HeadBounds, Violation};
use super::table::{Busy, Connection, Cut, RequestClock};

/// How a connection of HTTP/2 begins (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a refusal may take to be written.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);
/// What a client sends after it was answered is read for so long in all, and so long between two reads: nginx's own
/// figures of `lingering_time` and `lingering_timeout`. Closed at once, the reset would overtake the answer.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_PAUSE: Duration = Duration::from_secs(5);
/// An HTTP/2 client that was sent a GOAWAY has so long to close.
const LINGER_HTTP2: Duration = Duration::from_secs(1);
const LINGER_BUFFER_BYTES: usize = 16 << 10;
/// What hyper holds of an answer for an HTTP/2 client that does not take it.
const SEND_BUFFER_BYTES: usize = 16 << 10;
/// What is handed to hyper of an HTTP/1 answer before the socket has taken some of it. hyper's own bound is that of a head,
/// which it fills before it writes.
const AHEAD_BYTES: usize = 16 << 10;
/// A silent HTTP/2 client is asked after so long whether it is there, and has so long to answer.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// What requests of a connection may take.
#[derive(Debug, Clone, Copy)]
pub struct HttpBounds {
    /// Of each head.
    pub head: HeadBounds,
    /// HTTP/2 streams at once.
    pub streams: u32,
}

/// Who sent a request, and the request's clock.
#[derive(Debug, Clone)]
pub struct Client {
    /// The connection it came on.
    pub connection: Arc<Connection>,
    /// The clock of the request.
    pub clock: Arc<RequestClock>,
}

impl Client {
    /// One on no listener, whom no clock ever cuts: for tests and benches.
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
    /// Value of `x-request-id`, if it is to have one.
    pub request_id: Option<String>,
}

/// Words the answer to a head that cannot be read, and counts it.
pub type Refuse = fn(Violation) -> Refusal;

tokio::task_local! {
    /// The clock of the HTTP/2 stream whose task runs.
    static STREAM: Arc<RequestClock>;
}

/// Serves HTTP/1 or HTTP/2, whichever the client speaks, until the connection ends.
pub async fn serve_http<I, S, F, B>(
    io: I,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    service: S,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Fn(Client, Request<Incoming>) -> F + Clone + Unpin + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut begun = Begun { io, prefix: [0; PREFACE.len()], length: 0, replayed: 0, until: None };
    match begun.is_http2().await {
        Ok(true) => http2(begun, connection, bounds, service).await,
        Ok(false) => http1(begun, connection, bounds, refuse, service).await,
        Err(error) => tracing::debug!(peer = %connection.peer(), %error, "connection ended before a request"),
    }
}

/// Serves HTTP/1 alone until the connection ends.
pub async fn serve_http1<I, S, F, B>(
    io: I,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    service: S,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Fn(Client, Request<Incoming>) -> F + Clone + Unpin + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let begun = Begun { io, prefix: [0; PREFACE.len()], length: 0, replayed: 0, until: None };
    http1(begun, connection, bounds, refuse, service).await;
}

/// A connection whose first bytes were looked at, and are read again.
struct Begun<I> {
    io: I,
    prefix: [u8; PREFACE.len()],
    length: usize,
    replayed: usize,
    /// Of HTTP/2, once our side is closed: until when the client may close its own.
    until: Option<Pin<Box<Sleep>>>,
}

impl<I: AsyncRead + Unpin> Begun<I> {
    /// Reads until it is clear which protocol is spoken. The connection's clock ends the wait.
    async fn is_http2(&mut self) -> io::Result<bool> {
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
    /// Closes. The end of an HTTP/2 connection waits for the client's: closed at once, a request on its way would be
    /// answered by a reset, which takes the GOAWAY and the last answers with it. HTTP/1 does so by itself, in [`linger`].
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

/// What hyper may hold of a head beyond the bound of it.
const HEAD_SLACK_BYTES: usize = 8 << 10;
/// Bytes read at once behind the beginning of a line.
const LINE_READ_BYTES: usize = 4 << 10;

/// The bytes of an HTTP/1 connection on their way to hyper, checked. hyper parses what it has of a head, and answers what
/// it finds wrong in its own way; it is therefore given whole lines alone.
struct Framed<I> {
    begun: Begun<I>,
    framing: Framing,
    /// What was read and not passed on: the beginning of a line, at most as long as a head may be.
    held: Vec<u8>,
    /// Bytes of `held` that are whole lines.
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
    /// Follows what was just read; returns how many bytes of it may be passed on.
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

    /// Passes on what is held and checked, as far as there is room.
    fn pass(&mut self, buffer: &mut ReadBuf<'_>) {
        let count = self.checked.min(buffer.remaining());
        buffer.put_slice(&self.held[..count]);
        self.held.drain(..count);
        self.checked -= count;
        if self.held.is_empty() {
            // Long lines are rare, and connections are many.
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
                // Whoever reads the body says it.
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
                // The line that had begun is whole once anything behind it is.
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

/// The body of an answer; its request runs for as long as it is there.
struct BusyBody<B> {
    body: B,
    /// Of HTTP/1, where one task drives the body and the socket.
    ahead: Option<Ahead>,
    _busy: Busy,
}

/// What hyper was handed of an answer and has not written.
struct Ahead {
    connection: Arc<Connection>,
    bytes: usize,
    /// What the socket had taken when this count began.
    written: u64,
}

impl Ahead {
    fn new(connection: Arc<Connection>) -> Self {
        Self { bytes: 0, written: connection.written(), connection }
    }

    /// Whether there is enough of it. hyper writes as soon as a body has nothing for it; where the socket takes nothing, its
    /// readiness wakes the task.
    fn is_enough(&mut self, cx: &Context<'_>) -> bool {
        if self.bytes < AHEAD_BYTES {
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
        if self.ahead.as_mut().is_some_and(|ahead| ahead.is_enough(cx)) {
            return Poll::Pending;
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let (Some(ahead), Some(Ok(frame))) = (&mut self.ahead, &frame) {
            ahead.bytes += frame.data_ref().map_or(0, Buf::remaining);
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

/// How a connection of HTTP/1 came to its end.
enum End {
    Done,
    Malformed,
    Cut(Cut),
}

async fn http1<I, S, F, B>(
    begun: Begun<I>,
    connection: Arc<Connection>,
    bounds: HttpBounds,
    refuse: Refuse,
    service: S,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Fn(Client, Request<Incoming>) -> F + Clone + Unpin + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let framing = Framing::new(bounds.head);
    let framed = Framed {
        begun,
        framing,
        held: Vec::new(),
        checked: 0,
        violation: None,
        ended: false,
        connection: Arc::clone(&connection),
    };
    let client = Client { connection: Arc::clone(&connection), clock: Arc::clone(&connection.clock) };
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = client.connection.begin();
        client.clock.stop();
        let (answer, connection) = (service(client.clone(), request), Arc::clone(&client.connection));
        let ahead = Some(Ahead::new(Arc::clone(&connection)));
        // Boxed, since hyper moves it, and asks for what can be moved.
        Box::pin(async move {
            let mut response = answer.await.map(|body| BusyBody { body, ahead, _busy: busy });
            // Clients leave with their next answer instead of being cut between two requests.
            if connection.is_draining() {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        })
    });
    let mut builder = http1::Builder::new();
    // The clock of a head is the connection's own; more bytes and fields than are let through, so that the framing
    // refuses first.
    builder
        .header_read_timeout(None)
        .max_buf_size(bounds.head.bytes + HEAD_SLACK_BYTES)
        .max_headers(bounds.head.fields + 1);
    let mut driver = builder.serve_connection(TokioIo::new(framed), service);
    let end = poll_fn(|cx| {
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
        // What was answered before has been written: hyper writes all it has before it waits for anything else.
        if connection.is_malformed() && !connection.is_busy() && !connection.is_write_waiting() {
            return Poll::Ready(End::Malformed);
        }
        Poll::Pending
    })
    .await;
    let parts = driver.into_parts();
    let unread = !parts.read_buf.is_empty();
    let mut framed = parts.io.into_inner();
    let refusal = match (end, framed.violation) {
        (End::Malformed, Some(violation)) => Some(violation),
        (End::Cut(Cut::Head), _) if framed.framing.in_head() => {
            let status = StatusCode::REQUEST_TIMEOUT;
            Some(Violation { status, what: "the head of the request did not arrive in time" })
        }
        (End::Cut(_), _) => return,
        _ => None,
    };
    if let Some(violation) = refusal {
        let text = in_full(violation, refuse(violation));
        if timeout(REFUSAL_TIMEOUT, framed.begun.io.write_all(text.as_bytes())).await.is_err() {
            return;
        }
    }
    let is_sending = unread || framed.framing.in_body() || framed.violation.is_some();
    linger(&mut framed.begun.io, &connection, is_sending && !framed.ended).await;
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

/// Closes; what the client still sends is read first, so that it comes to read the answer.
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
        // Ends with the stream: with its answer, the client, the connection, or its clock. Dropping hyper's side resets it.
        tokio::spawn(STREAM.scope(clock, async move {
            poll_fn(|cx| match open.clock.poll_cut(cx) {
                true => Poll::Ready(()),
                false => stream.as_mut().poll(cx).map(drop),
            })
            .await;
        }));
    }
}

async fn http2<I, S, F, B>(begun: Begun<I>, connection: Arc<Connection>, bounds: HttpBounds, service: S)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Fn(Client, Request<Incoming>) -> F + Clone + Unpin + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let own = Arc::clone(&connection);
    let service = service_fn(move |request: Request<Incoming>| {
        let (busy, service, connection) = (own.begin(), service.clone(), Arc::clone(&own));
        async move {
            // hyper polls this in the task of the stream.
            let clock = STREAM.try_with(Arc::clone).unwrap_or_default();
            let response = service(Client { connection, clock }, request).await;
            Ok::<_, std::convert::Infallible>(response.map(|body| BusyBody {
                body,
                ahead: None,
                _busy: busy,
            }))
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
    let mut told = false;
    let ended = poll_fn(|cx| {
        if connection.poll_cut(cx).is_some() {
            return Poll::Ready(Ok(()));
        }
        if !told && connection.ends() {
            told = true;
            driver.as_mut().graceful_shutdown();
        }
        driver.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!(peer = %connection.peer(), %error, "connection ended");
    }
}
