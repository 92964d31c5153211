//! One HTTP/1.1 connection to a server under load, as cheap as possible: the request is prepared bytes, the body of
//! the answer is counted and discarded.

use std::io;
use std::net::SocketAddr;

use bytes::{Buf, BytesMut};
use httparse::{EMPTY_HEADER, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The read buffer.
const READ_BYTES: usize = 64 << 10;
/// Largest head of an answer.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// The bytes that are kept of the body of an answer other than 200, to report the error.
const EXCERPT_BYTES: usize = 512;
/// The bytes that are kept of a body that the caller wants.
const EXCERPT_BYTES_MAX: usize = 1 << 20;

/// A complete answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// Bytes of the body.
    pub(crate) body_bytes: u64,
    /// When the head was complete.
    pub(crate) head_at: Option<Instant>,
    /// The start of the body, if it is not 200 or was wanted.
    pub(crate) excerpt: String,
}

impl Answer {
    /// Whether the answer is the expected one.
    pub(crate) fn is_ok(&self) -> bool {
        self.status == 200 && self.body_bytes > 0
    }
}

#[derive(Debug, Clone, Copy)]
enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// A connection that is kept between requests.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: BytesMut,
    closes: bool,
    /// Bytes of a body to keep even if the status is 200.
    excerpt_max: usize,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: BytesMut::with_capacity(READ_BYTES), closes: false, excerpt_max: 0 })
    }

    /// Whether the server closes it after the last answer.
    pub(crate) fn closes(&self) -> bool {
        self.closes
    }

    /// Sends a request and reads its answer to the end. Not cancel-safe: drop the connection then.
    pub(crate) async fn call(&mut self, request: &[u8]) -> io::Result<Answer> {
        self.stream.write_all(request).await?;
        let (status, framing) = self.head().await?;
        let mut answer = Answer { status, head_at: Some(Instant::now()), ..Answer::default() };
        match framing {
            Framing::Length(length) => self.take(length, &mut answer).await?,
            Framing::Chunked => self.chunks(&mut answer).await?,
            Framing::UntilClose => {
                while self.fill().await? {}
                let length = self.buffer.len() as u64;
                self.take(length, &mut answer).await?;
            }
        }
        Ok(answer)
    }

    /// The same for a small page whose body is wanted, of at most [`EXCERPT_BYTES_MAX`] bytes.
    pub(crate) async fn call_for_body(&mut self, request: &[u8]) -> io::Result<(Answer, String)> {
        self.excerpt_max = EXCERPT_BYTES_MAX;
        let mut answer = self.call(request).await?;
        let body = std::mem::take(&mut answer.excerpt);
        Ok((answer, body))
    }

    /// Sends a request and returns when the head and the first byte of the body have arrived.
    pub(crate) async fn begin(&mut self, request: &[u8]) -> io::Result<u16> {
        self.stream.write_all(request).await?;
        let (status, _) = self.head().await?;
        while self.buffer.is_empty() {
            if !self.fill().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(status)
    }

    /// Reads and discards bytes until the server closes the connection.
    pub(crate) async fn drain(&mut self) -> io::Result<()> {
        loop {
            self.buffer.clear();
            if !self.fill().await? {
                return Ok(());
            }
        }
    }

    async fn fill(&mut self) -> io::Result<bool> {
        self.buffer.reserve(READ_BYTES / 4);
        Ok(self.stream.read_buf(&mut self.buffer).await? > 0)
    }

    async fn more(&mut self) -> io::Result<()> {
        if self.fill().await? { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    async fn head(&mut self) -> io::Result<(u16, Framing)> {
        loop {
            if !self.buffer.is_empty()
                && let Some((length, status, framing, closes)) = parse_head(&self.buffer)?
            {
                self.buffer.advance(length);
                self.closes = closes;
                return Ok((status, framing));
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(invalid("head too long"));
            }
            self.more().await?;
        }
    }

    /// Takes this number of bytes of the body.
    async fn take(&mut self, mut left: u64, answer: &mut Answer) -> io::Result<()> {
        answer.body_bytes += left;
        while left > 0 {
            if self.buffer.is_empty() {
                self.more().await?;
            }
            let now = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let wanted =
                if answer.status == 200 { self.excerpt_max } else { EXCERPT_BYTES.max(self.excerpt_max) };
            let room = wanted.saturating_sub(answer.excerpt.len()).min(now);
            if room > 0 {
                answer.excerpt.push_str(&String::from_utf8_lossy(&self.buffer[..room]));
            }
            self.buffer.advance(now);
            left -= now as u64;
        }
        Ok(())
    }

    async fn chunks(&mut self, answer: &mut Answer) -> io::Result<()> {
        loop {
            let (line, size) = loop {
                match httparse::parse_chunk_size(&self.buffer) {
                    Ok(Status::Complete(found)) => break found,
                    Ok(Status::Partial) => self.more().await?,
                    Err(_) => return Err(invalid("chunk size")),
                }
            };
            self.buffer.advance(line);
            if size > 0 {
                self.take(size, answer).await?;
            }
            // The line break after a chunk's data; after the last chunk, the empty trailer section.
            self.skip(2).await?;
            if size == 0 {
                return Ok(());
            }
        }
    }

    async fn skip(&mut self, length: usize) -> io::Result<()> {
        while self.buffer.len() < length {
            self.more().await?;
        }
        self.buffer.advance(length);
        Ok(())
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The length of the head, the status, the framing of the body, and whether the connection ends with it.
fn parse_head(bytes: &[u8]) -> io::Result<Option<(usize, u16, Framing, bool)>> {
    let mut headers = [EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) => return Ok(None),
        Err(_) => return Err(invalid("head")),
    };
    let mut framing = Framing::UntilClose;
    let mut closes = false;
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(header.value).ok().and_then(|v| v.trim().parse().ok());
            framing = Framing::Length(value.ok_or_else(|| invalid("content-length"))?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            framing = Framing::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") {
            closes = header.value.eq_ignore_ascii_case(b"close");
        }
    }
    closes |= matches!(framing, Framing::UntilClose);
    Ok(Some((length, response.code.unwrap_or(0), framing, closes)))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Serves one connection with one byte per write, and returns what a client reads from it.
    async fn answer(text: &'static str) -> io::Result<Answer> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let serve = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await?;
            let mut request = [0; 4];
            socket.read_exact(&mut request).await?;
            for byte in text.as_bytes() {
                socket.write_all(&[*byte]).await?;
            }
            io::Result::Ok(())
        });
        let mut connection = Connection::open(address).await?;
        let answer = connection.call(b"GET ").await;
        serve.await.expect("no panic")?;
        answer
    }

    #[tokio::test]
    async fn every_framing_is_read_to_its_end() {
        let whole = answer("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello").await.expect("read");
        assert!(whole.is_ok() && whole.body_bytes == 5);
        let chunked = "HTTP/1.1 429 No\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let chunked = answer(chunked).await.expect("read");
        assert_eq!((chunked.status, chunked.body_bytes, &*chunked.excerpt), (429, 5, "abcde"));
        let closed = answer("HTTP/1.1 200 OK\r\n\r\nuntil the end").await.expect("read");
        assert_eq!(closed.body_bytes, 13);
    }

    #[tokio::test]
    async fn a_cut_answer_is_an_error() {
        for cut in ["HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel", "HTTP/1.1 2", ""] {
            assert!(answer(cut).await.is_err(), "{cut:?}");
        }
    }
}
