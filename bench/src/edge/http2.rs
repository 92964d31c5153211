//! The part of HTTP/2 that a client needs which asks for streams and reads them slowly, or not at all.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The preface of a connection.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The largest window.
pub(super) const WINDOW_MAX: u32 = (1 << 31) - 1;
/// The window of a connection at its start.
const CONNECTION_WINDOW: u32 = 65_535;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const INITIAL_WINDOW_SIZE: u16 = 4;
/// The size of a frame's head, bytes.
const HEAD: usize = 9;

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    out.extend(&length[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
}

/// Lets a stream send more bytes.
pub(super) fn window_update(out: &mut Vec<u8>, stream: u32, by: u32) {
    frame(out, WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
}

/// A literal that enters no table. Its texts are shorter than 16 KiB.
fn literal(out: &mut Vec<u8>, name: &str, value: &str) {
    /// The longest length that fits into one byte.
    const ONE_BYTE: usize = 127;
    out.push(0);
    for text in [name, value] {
        match text.len() {
            short @ 0..ONE_BYTE => out.push(short as u8),
            long => {
                let rest = long - ONE_BYTE;
                out.extend([ONE_BYTE as u8, (rest & 0x7f) as u8 | 0x80, (rest >> 7) as u8]);
            }
        }
        out.extend(text.as_bytes());
    }
}

/// A chat request.
fn chat(out: &mut Vec<u8>, stream: u32, key: &str, body: &str) {
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":authority", "bench"),
        (":path", "/v1/chat/completions"),
        ("content-type", "application/json"),
        ("authorization", &format!("Bearer {key}")),
    ] {
        literal(&mut block, name, value);
    }
    frame(out, HEADERS, END_HEADERS, stream, &block);
    frame(out, DATA, END_STREAM, stream, body.as_bytes());
}

/// Finds pings in the bytes that arrive in pieces: a client that does not answer them counts as gone.
#[derive(Debug, Default)]
pub(super) struct Pings {
    head: Vec<u8>,
    payload: usize,
    ping: Option<Vec<u8>>,
}

impl Pings {
    /// Takes the next piece, and adds the answers to `out`.
    pub(super) fn read(&mut self, mut piece: &[u8], out: &mut Vec<u8>) {
        while !piece.is_empty() {
            if self.payload == 0 {
                let (head, rest) = piece.split_at(piece.len().min(HEAD - self.head.len()));
                self.head.extend(head);
                piece = rest;
                if let [a, b, c, kind, flags, ..] = self.head[..]
                    && self.head.len() == HEAD
                {
                    self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
                    self.ping = (kind == PING && flags & ACK == 0).then(Vec::new);
                    self.head.clear();
                }
                continue;
            }
            let (payload, rest) = piece.split_at(piece.len().min(self.payload));
            piece = rest;
            self.payload -= payload.len();
            if let Some(opaque) = &mut self.ping {
                opaque.extend(payload);
                if self.payload == 0 {
                    frame(out, PING, ACK, 0, opaque);
                }
            }
        }
    }
}

/// The numbers of the streams of a connection.
pub(super) fn streams(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(|n| 2 * n + 1)
}

/// Opens a connection whose streams have this window, and sends this number of requests.
pub(super) async fn begin(
    socket: &mut TcpStream,
    window: u32,
    count: u32,
    key: &str,
    body: &str,
) -> io::Result<()> {
    let mut out = PREFACE.to_vec();
    let setting = [&INITIAL_WINDOW_SIZE.to_be_bytes()[..], &window.to_be_bytes()].concat();
    frame(&mut out, SETTINGS, 0, 0, &setting);
    window_update(&mut out, 0, WINDOW_MAX - CONNECTION_WINDOW);
    socket.write_all(&out).await?;
    // The server's settings come first, and may only be acknowledged after they have arrived.
    let mut head = [0; HEAD];
    socket.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    if head[3] != SETTINGS || length > CONNECTION_WINDOW as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not the settings of HTTP/2"));
    }
    socket.read_exact(&mut vec![0; length]).await?;
    let mut out = Vec::new();
    frame(&mut out, SETTINGS, ACK, 0, &[]);
    for stream in streams(count) {
        chat(&mut out, stream, key, body);
    }
    socket.write_all(&out).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_answered_however_the_bytes_arrive() {
        let mut sent = Vec::new();
        frame(&mut sent, DATA, 0, 1, b"0123456789");
        frame(&mut sent, PING, 0, 0, b"are you?");
        frame(&mut sent, SETTINGS, ACK, 0, b"");
        frame(&mut sent, PING, ACK, 0, b"I am it.");
        let mut wanted = Vec::new();
        frame(&mut wanted, PING, ACK, 0, b"are you?");
        for size in 1..sent.len() {
            let (mut pings, mut out) = (Pings::default(), Vec::new());
            for piece in sent.chunks(size) {
                pings.read(piece, &mut out);
            }
            assert_eq!(out, wanted, "pieces of {size}");
        }
    }
}
