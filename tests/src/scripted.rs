//! A backend of which a test decides every byte: answers that are cut short, malformed, compressed, too long, or more
//! than asked for.
//!
//! ```ignore
//! let backend = Scripted::start(&end, |asked, mut wire| async move {
//!     wire.send(answer(200, &[("content-type", "application/json")], b"{}")).await;
//!     Some(wire) // or None, which closes the connection; or wire.reset()
//! })
//! .await;
//! let resources = Resources::at(&[backend.address]);
//! ```

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// Largest head of a request that is read.
const HEAD_MAX_BYTES: usize = 1 << 20;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Its number among all requests, from 0.
    pub number: u64,
    /// The request line and the headers, unchanged.
    pub head: String,
    /// The body, of the length in the head.
    pub body: Bytes,
}

impl Asked {
    /// The requested path.
    pub fn path(&self) -> &str {
        self.head.split_whitespace().nth(1).unwrap_or_default()
    }

    /// The first header of this name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers(name).next()
    }

    /// All headers of this name.
    pub fn headers(&self, name: &str) -> impl Iterator<Item = &str> {
        let fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.filter(move |(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// The connection of a request. Dropping it closes it.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    read: BytesMut,
}

impl Wire {
    /// Writes these bytes. Returns false if the other side has gone.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).await.is_ok()
    }

    /// Writes the same bytes up to `times` times. Returns how often, until the other side went.
    pub async fn repeat(&mut self, bytes: impl AsRef<[u8]>, times: u64) -> u64 {
        for sent in 0..times {
            if !self.send(bytes.as_ref()).await {
                return sent;
            }
        }
        times
    }

    /// Waits for one more byte, or until the other side closes.
    pub async fn next_byte(&mut self) -> Option<u8> {
        self.stream.read_u8().await.ok()
    }

    /// Waits until the other side closes, which may never happen.
    pub async fn until_closed(&mut self) {
        let mut rest = [0; 4096];
        while self.stream.read(&mut rest).await.is_ok_and(|count| count > 0) {}
    }

    /// Closes the connection with a reset.
    pub fn reset(self) -> Option<Self> {
        // Without it the end is a FIN, and the test would see that.
        self.stream.set_zero_linger().expect("a socket");
        None
    }

    /// The next request; `None` if there is none, or if the bytes are none.
    async fn next(&mut self, number: &AtomicU64) -> Option<Asked> {
        let end = loop {
            if let Some(at) = self.read.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if self.read.len() > HEAD_MAX_BYTES || self.stream.read_buf(&mut self.read).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8_lossy(&self.read.split_to(end)).into_owned();
        let mut asked = Asked { number: number.fetch_add(1, Ordering::SeqCst), head, body: Bytes::new() };
        let length = asked.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        while self.read.len() < length {
            if self.stream.read_buf(&mut self.read).await.ok()? == 0 {
                return None;
            }
        }
        asked.body = self.read.split_to(length).freeze();
        Some(asked)
    }
}

/// A backend that does what a test says.
#[derive(Debug)]
pub struct Scripted {
    /// Its address.
    pub address: SocketAddr,
    requests: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
}

impl Scripted {
    /// Listens until `shutdown`. `behaviour` answers each request, and returns the connection if another request may
    /// follow on it.
    pub async fn start<B, F>(shutdown: &CancellationToken, behaviour: B) -> Self
    where
        B: Fn(Asked, Wire) -> F + Send + Sync + 'static,
        F: Future<Output = Option<Wire>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let requests = Arc::new(AtomicU64::new(0));
        let connections = Arc::new(AtomicU64::new(0));
        let opened = connections.clone();
        let (behaviour, numbers, end) = (Arc::new(behaviour), requests.clone(), shutdown.clone());
        let serving = async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                opened.fetch_add(1, Ordering::SeqCst);
                let (behaviour, numbers, end) = (behaviour.clone(), numbers.clone(), end.clone());
                let connection = async move {
                    let mut wire = Wire { stream, read: BytesMut::new() };
                    while let Some(asked) = wire.next(&numbers).await {
                        match behaviour(asked, wire).await {
                            Some(kept) => wire = kept,
                            None => return,
                        }
                    }
                };
                tokio::spawn(async move { end.run_until_cancelled(connection).await });
            }
        };
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(serving).await });
        Self { address, requests, connections }
    }

    /// Answers every request with these bytes and closes the connection.
    pub async fn raw(shutdown: &CancellationToken, bytes: impl Into<Bytes>) -> Self {
        let bytes = bytes.into();
        Self::start(shutdown, move |_, mut wire| {
            let bytes = bytes.clone();
            async move {
                wire.send(bytes).await;
                None
            }
        })
        .await
    }

    /// The number of connections.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    /// The number of requests.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }
}

/// An answer with its length.
pub fn answer(status: u16, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = body.len().to_string();
    let mut out = head(status, &[headers, &[("content-length", length.as_str())]].concat());
    out.extend_from_slice(body);
    out
}

/// The head of an answer. All following bytes are its body until the connection closes, unless `headers` say
/// otherwise.
pub fn head(status: u16, headers: &[(&str, &str)]) -> Vec<u8> {
    let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("HTTP/1.1 {status} Scripted\r\n{lines}\r\n").into_bytes()
}

/// One chunk of a chunked body. An empty one ends the body.
pub fn chunk(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [format!("{:x}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// A chat completion with this text and, if it is not empty, this `usage`.
pub fn completion(text: &str, usage: &str) -> String {
    let usage = if usage.is_empty() { String::new() } else { format!(r#","usage":{usage}"#) };
    let message = serde_json::json!({ "role": "assistant", "content": text });
    format!(
        r#"{{"id":"c","object":"chat.completion","model":"gpt-4.1","choices":[{{"index":0,"message":{message},"finish_reason":"stop"}}]{usage}}}"#
    )
}

/// A 200 with a complete chat completion.
pub fn json_answer(text: &str, usage: &str) -> Vec<u8> {
    answer(200, &[("content-type", "application/json")], completion(text, usage))
}

/// One event of a stream.
pub fn event(payload: &str) -> String {
    format!("data: {payload}\n\n")
}

/// The event with this text.
pub fn delta(text: &str) -> String {
    let delta = serde_json::json!({ "content": text });
    event(&format!(
        r#"{{"id":"c","model":"gpt-4.1","choices":[{{"index":0,"delta":{delta},"finish_reason":null}}]}}"#
    ))
}

/// The end of a stream: its finish reason, its `usage` if that is not empty, and `[DONE]`.
pub fn stream_end(usage: &str) -> String {
    let stop =
        event(r#"{"id":"c","model":"gpt-4.1","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}"#);
    let usage = match usage {
        "" => String::new(),
        usage => event(&format!(r#"{{"id":"c","model":"gpt-4.1","choices":[],"usage":{usage}}}"#)),
    };
    stop + &usage + "data: [DONE]\n\n"
}

/// The head of a stream that ends with its connection.
pub fn stream_head() -> Vec<u8> {
    head(200, &[("content-type", "text/event-stream"), ("connection", "close")])
}
