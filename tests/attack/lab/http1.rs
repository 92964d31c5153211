//! HTTP/1 as bytes: the test decides every byte that is sent.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use weir_tests::cluster::KEY;

use super::{SOON, connect};

/// The state of a connection when the test stopped reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The peer closed it.
    Closed,
    /// The peer reset it.
    Reset,
    /// Open, and silent for as long as the test waited.
    Open,
}

/// The received bytes and the state of the connection.
pub(crate) struct Heard {
    /// All bytes.
    pub(crate) bytes: Vec<u8>,
    /// The state afterwards.
    pub(crate) end: End,
}

impl std::fmt::Debug for Heard {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 600;
        let shown = &self.bytes[..self.bytes.len().min(SHOWN)];
        write!(out, "{:?} after {} bytes: {:?}", self.end, self.bytes.len(), String::from_utf8_lossy(shown))
    }
}

/// One answer.
#[derive(Debug)]
pub(crate) struct Reply {
    /// The status.
    pub(crate) status: u16,
    /// The status line and the headers.
    pub(crate) head: String,
    /// The received part of the body.
    pub(crate) body: Vec<u8>,
}

impl Reply {
    /// A header's first value.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.into_iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// The message of an error in OpenAI's form.
    pub(crate) fn error(&self) -> Option<String> {
        let body: serde_json::Value = serde_json::from_slice(&self.body).ok()?;
        Some(body["error"]["message"].as_str()?.to_owned())
    }
}

impl Heard {
    /// The answers, without those of 1xx.
    pub(crate) fn replies(&self) -> Vec<Reply> {
        let (mut rest, mut replies) = (&self.bytes[..], Vec::new());
        while let Some(at) = rest.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&rest[..at]).into_owned();
            let status = head.get(9..12).and_then(|code| code.parse().ok());
            let Some(status) = status.filter(|_| head.starts_with("HTTP/1.")) else { break };
            rest = &rest[at + 4..];
            let mut reply = Reply { status, head, body: Vec::new() };
            if status < 200 {
                continue;
            }
            if reply.header("transfer-encoding").is_some() {
                rest = dechunk(rest, &mut reply.body);
            } else {
                let length = reply.header("content-length").and_then(|n| n.parse().ok());
                let body = &rest[..length.unwrap_or(rest.len()).min(rest.len())];
                reply.body.extend_from_slice(body);
                rest = &rest[body.len()..];
            }
            replies.push(reply);
        }
        replies
    }

    /// Their statuses.
    pub(crate) fn statuses(&self) -> Vec<u16> {
        self.replies().iter().map(|reply| reply.status).collect()
    }
}

/// Removes the chunks at the front of `rest`. Returns the bytes behind them.
fn dechunk<'a>(mut rest: &'a [u8], body: &mut Vec<u8>) -> &'a [u8] {
    while let Some(line) = rest.windows(2).position(|w| w == b"\r\n") {
        let size =
            std::str::from_utf8(&rest[..line]).ok().and_then(|hex| usize::from_str_radix(hex, 16).ok());
        let Some(size) = size else { return rest };
        rest = &rest[line + 2..];
        let part = &rest[..size.min(rest.len())];
        body.extend_from_slice(part);
        rest = rest.get(part.len() + 2..).unwrap_or_default();
        if size == 0 {
            return rest;
        }
    }
    rest
}

/// Reads until the peer closes, or is silent for `quiet`.
pub(crate) async fn listen(socket: &mut (impl AsyncRead + Unpin), quiet: Duration) -> Heard {
    let mut bytes = Vec::new();
    loop {
        let end = match tokio::time::timeout(quiet, socket.read_buf(&mut bytes)).await {
            Ok(Ok(0)) => End::Closed,
            Ok(Ok(_)) => continue,
            Ok(Err(_)) => End::Reset,
            Err(_) => End::Open,
        };
        return Heard { bytes, end };
    }
}

/// Sends these bytes and reads at the same time, until the peer closes.
pub(crate) async fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> Heard {
    exchange_until(address, bytes, SOON).await
}

/// The same until the peer is silent for `quiet`.
pub(crate) async fn exchange_until(address: SocketAddr, bytes: impl AsRef<[u8]>, quiet: Duration) -> Heard {
    let (mut reader, mut writer) = connect(address).await.into_split();
    let sent = async {
        // The peer may refuse without reading to the end.
        let _ = writer.write_all(bytes.as_ref()).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        heard = listen(&mut reader, quiet) => heard,
        () = sent => unreachable!("it only ends with the other"),
    }
}

/// Sends everything before it reads, as simple clients do, then reads.
pub(crate) async fn write_then_read(
    address: SocketAddr,
    bytes: impl AsRef<[u8]>,
) -> (std::io::Result<()>, Heard) {
    let mut socket = connect(address).await;
    let sent = tokio::time::timeout(SOON, socket.write_all(bytes.as_ref())).await;
    let sent = sent.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
    (sent, listen(&mut socket, SOON).await)
}

/// The body of a chat completion.
pub(crate) fn body(model: &str, stream: bool) -> String {
    format!(r#"{{"model":"{model}","stream":{stream},"messages":[{{"role":"user","content":"hi"}}]}}"#)
}

/// The head of a POST with the key, up to and without the headers that frame its body and without the empty line.
pub(crate) fn post() -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    )
}

/// A whole request for a chat completion, which the backend answers as `act` says.
pub(crate) fn chat(model: &str, act: &str, close: bool) -> Vec<u8> {
    request(&body(model, act != "ok" && act != "big"), act, close)
}

fn request(body: &str, act: &str, close: bool) -> Vec<u8> {
    let connection = if close { "Connection: close\r\n" } else { "" };
    let length = body.len();
    let head =
        format!("{}X-Client-Request-Id: {act}\r\n{connection}Content-Length: {length}\r\n\r\n", post());
    [head.as_bytes(), body.as_bytes()].concat()
}

/// A request for the list of models, with more headers.
pub(crate) fn models(more: &str) -> Vec<u8> {
    format!("GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{more}\r\n").into_bytes()
}
