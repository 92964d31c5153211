//! HTTP/2 frame by frame: the test decides every frame that is sent.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::Instant;
use weir_tests::cluster::KEY;

use super::{SOON, connect};

/// The preface of a connection.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Types of frames.
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
/// Flags.
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
/// The setting of a stream's initial window.
pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;

/// A frame.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
    pub(crate) payload: Vec<u8>,
}

/// A frame's bytes.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A SETTINGS frame.
pub(crate) fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let pair = |(id, value): &(u16, u32)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &values.iter().flat_map(pair).collect::<Vec<_>>())
}

/// A WINDOW_UPDATE frame.
pub(crate) fn window_update(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

/// An RST_STREAM frame with the code CANCEL.
pub(crate) fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}

fn length(out: &mut Vec<u8>, first: u8, bits: u32, value: usize) {
    let max = (1_usize << bits) - 1;
    if value < max {
        return out.push(first | u8::try_from(value).expect("small"));
    }
    out.push(first | u8::try_from(max).expect("small"));
    let mut rest = value - max;
    while rest >= 128 {
        out.push(u8::try_from(rest % 128).expect("small") | 128);
        rest /= 128;
    }
    out.push(u8::try_from(rest).expect("small"));
}

/// A header block of literals that enter no table.
pub(crate) fn block(fields: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in fields {
        literal(&mut out, 0, name, value);
    }
    out
}

/// One literal field; `first` decides what happens to it in the table.
pub(crate) fn literal(out: &mut Vec<u8>, first: u8, name: &[u8], value: &[u8]) {
    out.push(first);
    for text in [name, value] {
        length(out, 0, 7, text.len());
        out.extend(text);
    }
}

/// The fields of a request with the key.
pub(crate) fn fields(method: &str, path: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    let key = format!("Bearer {KEY}");
    [(":method", method), (":scheme", "http"), (":authority", "x"), (":path", path), ("authorization", &key)]
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
        .to_vec()
}

/// A HEADERS frame of these fields.
pub(crate) fn headers(stream: u32, fields: &[(Vec<u8>, Vec<u8>)], end: bool) -> Vec<u8> {
    let fields: Vec<(&[u8], &[u8])> = fields.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    frame(HEADERS, END_HEADERS | if end { END_STREAM } else { 0 }, stream, &block(&fields))
}

/// A request for the list of models.
pub(crate) fn models(stream: u32) -> Vec<u8> {
    headers(stream, &fields("GET", "/v1/models"), true)
}

/// A request for a chat completion, which the backend answers as `act` says.
pub(crate) fn chat(stream: u32, model: &str, act: &str) -> Vec<u8> {
    let mut fields = fields("POST", "/v1/chat/completions");
    for (name, value) in [("content-type", "application/json"), ("x-client-request-id", act)] {
        fields.push((name.into(), value.into()));
    }
    let body = super::http1::body(model, act != "ok" && act != "big");
    [headers(stream, &fields, false), frame(DATA, END_STREAM, stream, body.as_bytes())].concat()
}

/// The status in a block of the server: `:status` comes first, after changes of the table's size.
fn status(block: &[u8]) -> Option<u16> {
    const STATIC: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    let mut block = block;
    while block.first()? >> 5 == 1 {
        block = &block[1..];
    }
    let (&first, rest) = block.split_first()?;
    if first >= 0x80 {
        return STATIC.get(usize::from(first & 0x7f).checked_sub(8)?).copied();
    }
    let (&length, text) = rest.split_first()?;
    let text = text.get(..usize::from(length & 0x7f))?;
    if length < 0x80 {
        return std::str::from_utf8(text).ok()?.parse().ok();
    }
    // Digits in HPACK's Huffman code: 0, 1 and 2 have five bits, the others six.
    let bits: Vec<u8> = text.iter().flat_map(|byte| (0..8).rev().map(move |i| byte >> i & 1)).collect();
    let (mut at, mut number) = (0, 0);
    for _ in 0..3 {
        let code = |bits: &[u8]| bits.iter().fold(0_u16, |code, bit| code << 1 | u16::from(*bit));
        let five = code(bits.get(at..at + 5)?);
        let (digit, width) = if five < 3 { (five, 5) } else { (code(bits.get(at..at + 6)?) - 22, 6) };
        (at, number) = (at + width, number * 10 + digit);
    }
    Some(number)
}

impl Frame {
    /// The status of an answer that begins with this frame.
    pub(crate) fn status(&self) -> Option<u16> {
        (self.kind == HEADERS).then(|| status(&self.payload)).flatten()
    }

    /// The error code of a RST_STREAM or GOAWAY.
    pub(crate) fn error(&self) -> Option<u32> {
        let at = match self.kind {
            RST_STREAM => 0,
            GOAWAY => 4,
            _ => return None,
        };
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }
}

/// The next event of a connection.
#[derive(Debug)]
pub(crate) enum Next {
    /// A frame.
    Frame(Frame),
    /// Nothing for as long as the test waited.
    Silence,
    /// The peer closed it.
    Closed,
}

/// How one stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With a complete answer of this status.
    Answer(u16),
    /// The stream was reset, with this code.
    Reset(u32),
    /// By a GOAWAY with this code.
    GoAway(u32),
    /// By the end of the connection.
    Closed,
    /// Not within the time that the test waited.
    Open,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Http2 {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Http2 {
    /// Opens one with these settings.
    pub(crate) async fn connect(address: SocketAddr, values: &[(u16, u32)]) -> Self {
        Self::over(connect(address).await, values).await
    }

    /// The same over a socket.
    pub(crate) async fn over(socket: TcpStream, values: &[(u16, u32)]) -> Self {
        let mut connection = Self { socket, buffer: Vec::new() };
        assert!(connection.send(&[PREFACE, &settings(values)].concat()).await, "it listens");
        connection
    }

    /// Sends bytes. Returns whether the peer takes them in time.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        self.send_within(bytes, SOON).await
    }

    /// The same with a time of the test's own.
    pub(crate) async fn send_within(&mut self, bytes: &[u8], within: Duration) -> bool {
        matches!(tokio::time::timeout(within, self.socket.write_all(bytes)).await, Ok(Ok(())))
    }

    /// The next frame. SETTINGS and PING of the peer are acknowledged on the way.
    pub(crate) async fn next(&mut self, quiet: Duration) -> Next {
        let until = Instant::now() + quiet;
        loop {
            if let Some(head) = self.buffer.get(..9) {
                let size = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                if self.buffer.len() >= 9 + size {
                    let id = [head[5] & 0x7f, head[6], head[7], head[8]];
                    let (kind, flags, stream) = (head[3], head[4], u32::from_be_bytes(id));
                    let payload = self.buffer[9..9 + size].to_vec();
                    self.buffer.drain(..9 + size);
                    if matches!(kind, SETTINGS | PING) && flags & ACK == 0 {
                        let back = if kind == PING { &payload[..] } else { &[] };
                        // The peer may have closed after what it sent.
                        let _ = self.socket.try_write(&frame(kind, ACK, 0, back));
                    }
                    return Next::Frame(Frame { kind, flags, stream, payload });
                }
            }
            match tokio::time::timeout_at(until, self.socket.read_buf(&mut self.buffer)).await {
                Ok(Ok(1..)) => {}
                Ok(_) => return Next::Closed,
                Err(_) => return Next::Silence,
            }
        }
    }

    /// Waits for the end of this stream.
    pub(crate) async fn ended(&mut self, stream: u32) -> Ended {
        let mut said = None;
        loop {
            let frame = match self.next(SOON).await {
                Next::Frame(frame) => frame,
                Next::Closed => return Ended::Closed,
                Next::Silence => return Ended::Open,
            };
            match frame.kind {
                GOAWAY => return Ended::GoAway(frame.error().unwrap_or(u32::MAX)),
                RST_STREAM if frame.stream == stream => {
                    return match (said, frame.error()) {
                        // A complete answer, without the rest of the request.
                        (Some(status), Some(0)) => Ended::Answer(status),
                        (_, code) => Ended::Reset(code.unwrap_or(u32::MAX)),
                    };
                }
                HEADERS | DATA if frame.stream == stream => {
                    said = frame.status().or(said);
                    if frame.flags & END_STREAM != 0 {
                        return said.map_or(Ended::Reset(u32::MAX), Ended::Answer);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether a PING is answered.
    pub(crate) async fn answers_pings(&mut self) -> bool {
        let opaque = *b"are you?";
        if !self.send(&frame(PING, 0, 0, &opaque)).await {
            return false;
        }
        loop {
            match self.next(SOON).await {
                Next::Frame(f) if f.kind == PING && f.flags & ACK != 0 && f.payload == opaque => return true,
                Next::Frame(_) => {}
                Next::Silence | Next::Closed => return false,
            }
        }
    }
}
