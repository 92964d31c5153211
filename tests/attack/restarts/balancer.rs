//! A client with several gateways. It uses the next one if a connection is refused or a request was certainly not processed,
//! and obeys `Connection: close` and GOAWAY.
//!
//! Its connections are its own. A pool that hands requests to the task of a connection can lose one in the queue between
//! them while that task ends, and such a request would be held against a gateway that never saw it.

use std::collections::HashMap;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// A client keeps idle connections for less than a gateway that ends, so none is used while it is being closed.
const IDLE: Duration = Duration::from_millis(300);
/// Far above the time to the whole of any answer here.
const UNANSWERED: Duration = Duration::from_secs(60);
/// The number of gateways that a request is tried at while they refuse connections.
const TRIES: usize = 30;

/// Why there is no answer.
enum Failure {
    /// No gateway processed the request: the connection was refused or had ended before, or HTTP/2 says so.
    Unread(String),
    Lost(String),
}

type Answer = Result<(StatusCode, Bytes), Failure>;

pub(super) struct Balancer {
    gateways: Mutex<Vec<SocketAddr>>,
    next: AtomicUsize,
    key: String,
    idle: Mutex<HashMap<SocketAddr, Vec<(Instant, Connection)>>>,
    shared: Mutex<HashMap<SocketAddr, h2::client::SendRequest<Bytes>>>,
}

impl Balancer {
    pub(super) fn new(gateways: Vec<SocketAddr>, key: &str) -> Self {
        Self {
            gateways: Mutex::new(gateways),
            next: AtomicUsize::new(0),
            key: key.to_owned(),
            idle: Mutex::default(),
            shared: Mutex::default(),
        }
    }

    /// A gateway has another address from now on.
    pub(super) fn moved(&self, gateway: usize, address: SocketAddr) {
        self.gateways.lock().expect("whole")[gateway] = address;
    }

    /// The complete answer, or why the request is lost.
    pub(super) async fn ask(&self, body: &'static str, two: bool) -> Result<(StatusCode, Bytes), String> {
        let mut refused = String::new();
        for _ in 0..TRIES {
            let address = {
                let gateways = self.gateways.lock().expect("whole");
                gateways[self.next.fetch_add(1, Ordering::Relaxed) % gateways.len()]
            };
            let asked = async {
                if two { self.over_http2(address, body).await } else { self.over_http1(address, body).await }
            };
            match tokio::time::timeout(UNANSWERED, asked).await {
                Err(_) => return Err(format!("no answer for {UNANSWERED:?}")),
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Lost(why))) => return Err(why),
                Ok(Err(Failure::Unread(why))) => refused = why,
            }
        }
        Err(format!("refused by everybody: {refused}"))
    }

    fn request(&self, target: impl AsRef<str>) -> http::request::Builder {
        Request::post(target.as_ref())
            .header("authorization", format!("Bearer {}", self.key))
            .header("content-type", "application/json")
    }

    async fn over_http1(&self, address: SocketAddr, body: &'static str) -> Answer {
        let request = self
            .request("/v1/chat/completions")
            .header("host", address.to_string())
            .body(Full::new(Bytes::from_static(body.as_bytes())))
            .expect("a valid request");
        let mut connection = match self.idle(address) {
            Some(connection) => connection,
            None => Connection::open(address).await?,
        };
        let answer = connection.exchange(request).await?;
        if connection.is_free() {
            let mut idle = self.idle.lock().expect("whole");
            idle.entry(address).or_default().push((Instant::now(), connection));
        }
        Ok(answer)
    }

    /// An idle connection that may be used.
    fn idle(&self, address: SocketAddr) -> Option<Connection> {
        let mut idle = self.idle.lock().expect("whole");
        let idle = idle.get_mut(&address)?;
        idle.retain(|(since, _)| since.elapsed() < IDLE);
        std::iter::from_fn(|| idle.pop())
            .map(|(_, connection)| connection)
            .find_map(|mut connection| connection.is_free().then_some(connection))
    }

    async fn over_http2(&self, address: SocketAddr, body: &'static str) -> Answer {
        let shared = self.shared.lock().expect("whole").get(&address).cloned();
        let sender = match shared {
            Some(sender) => sender,
            None => self.share(address).await?,
        };
        let Ok(mut sender) = sender.ready().await else {
            // It ends. The next request opens another one.
            self.shared.lock().expect("whole").remove(&address);
            return Err(Failure::Unread("the connection ends".into()));
        };
        let request =
            self.request(format!("http://{address}/v1/chat/completions")).body(()).expect("a valid request");
        let (answer, mut sending) = sender.send_request(request, false).map_err(failed)?;
        // Where the stream was refused by now, the answer says so.
        let _ = sending.send_data(Bytes::from_static(body.as_bytes()), true);
        let answer = answer.await.map_err(failed)?;
        let (status, mut body) = (answer.status(), answer.into_body());
        let mut whole = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data.map_err(|error| Failure::Lost(format!("the answer broke off: {error:?}")))?;
            // Fails on a connection that has ended, of which the body tells.
            let _ = body.flow_control().release_capacity(data.len());
            whole.extend_from_slice(&data);
        }
        Ok((status, whole.freeze()))
    }

    /// Opens a connection for all requests over HTTP/2.
    async fn share(&self, address: SocketAddr) -> Result<h2::client::SendRequest<Bytes>, Failure> {
        let unread = |error: String| Failure::Unread(error);
        let stream = TcpStream::connect(address).await.map_err(|error| unread(error.to_string()))?;
        let (sender, connection) =
            h2::client::handshake(stream).await.map_err(|error| unread(error.to_string()))?;
        tokio::spawn(connection);
        self.shared.lock().expect("whole").insert(address, sender.clone());
        Ok(sender)
    }
}

/// Whether HTTP/2 says that a request was not processed: by REFUSED_STREAM, or by a GOAWAY without an error that excludes it.
fn failed(error: h2::Error) -> Failure {
    let why = format!("{error:?}");
    let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    let excluded = error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
    if error.is_remote() && (refused || excluded) { Failure::Unread(why) } else { Failure::Lost(why) }
}

type Driver = http1::Connection<TokioIo<TcpStream>, Full<Bytes>>;

/// A connection over HTTP/1, driven by whoever uses it.
struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
    /// `None`: it has ended.
    driver: Option<Driver>,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self, Failure> {
        let stream = TcpStream::connect(address).await.map_err(|error| Failure::Unread(error.to_string()))?;
        let opened = http1::handshake(TokioIo::new(stream)).await;
        let (sender, driver) = opened.map_err(|error| Failure::Unread(error.to_string()))?;
        Ok(Self { sender, driver: Some(driver) })
    }

    /// Whether another request may be sent, as far as is known.
    fn is_free(&mut self) -> bool {
        drive(&mut self.driver, &mut Context::from_waker(Waker::noop()));
        self.driver.is_some() && self.sender.is_ready()
    }

    async fn exchange(&mut self, request: Request<Full<Bytes>>) -> Answer {
        let Self { sender, driver } = self;
        let answer =
            driven(driver, sender.try_send_request(request)).await.map_err(|mut failed| {
                match failed.take_message() {
                    Some(_) => Failure::Unread("the connection had ended".into()),
                    None => Failure::Lost(format!("{:?}", failed.into_error())),
                }
            })?;
        let status = answer.status();
        let body = driven(driver, answer.into_body().collect()).await;
        body.map(|body| (status, body.to_bytes()))
            .map_err(|error| Failure::Lost(format!("the answer broke off: {error:?}")))
    }
}

/// Waits for what only this connection can bring.
async fn driven<T>(driver: &mut Option<Driver>, wanted: impl Future<Output = T>) -> T {
    let mut wanted = pin!(wanted);
    poll_fn(|cx| {
        drive(driver, cx);
        wanted.as_mut().poll(cx)
    })
    .await
}

fn drive(driver: &mut Option<Driver>, cx: &mut Context<'_>) {
    if let Some(driven) = driver
        && let Poll::Ready(_) = Pin::new(driven).poll(cx)
    {
        *driver = None;
    }
}
