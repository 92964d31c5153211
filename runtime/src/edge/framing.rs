//! HTTP/1 message framing as RFC 9112 writes it, checked before hyper parses.
//!
//! hyper follows the RFC's leniencies: bare line feeds, several transfer codings, white space behind a chunk size.
//! Each of them lets two servers in a row see different messages. This scanner follows the bytes of a connection,
//! message by message, and reports the first message that breaks the grammar. It changes nothing and holds no bytes
//! but the beginning of a line that is split between two reads.

use std::fmt;

use http::StatusCode;

/// Bytes that are kept of a line of a head that is split between reads. The fields that frame a message are never
/// longer.
const LINE_KEPT_BYTES: usize = 512;
/// Empty lines that are skipped before a request (RFC 9112, 2.2: at least one).
const LEADING_LINES_MAX: u8 = 4;
/// The longest line with a chunk's size and extensions.
const CHUNK_LINE_MAX_BYTES: usize = 4 << 10;
/// The size of all trailer fields together, which is hyper's own bound.
const TRAILERS_MAX_BYTES: usize = 16 << 10;
/// Hexadecimal digits of a chunk's size, so that it fits into 60 bits.
const CHUNK_DIGITS_MAX: usize = 15;

/// The bounds of a request's head.
#[derive(Debug, Clone, Copy)]
pub struct HeadBounds {
    /// Bytes from the first of the request line to the last of the empty line.
    pub bytes: usize,
    /// Header fields.
    pub fields: usize,
    /// Bytes of the request line.
    pub target_bytes: usize,
}

/// Why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation {
    /// The status of the refusal.
    pub status: StatusCode,
    /// The fault, as a sentence without its end.
    pub what: &'static str,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }
}

impl std::error::Error for Violation {}

const fn bad(what: &'static str) -> Violation {
    Violation { status: StatusCode::BAD_REQUEST, what }
}

/// The position of the next byte in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first byte of a request, after this number of skipped empty lines.
    Between(u8),
    /// In the request line.
    RequestLine,
    /// In a header field or the empty line behind them.
    Field,
    /// In a body of known length, with this number of bytes left.
    Body(u64),
    /// In the line with a chunk's size.
    ChunkSize,
    /// In a chunk, with this number of bytes left.
    Chunk(u64),
    /// In the line end behind a chunk.
    ChunkEnd,
    /// In a trailer field or the empty line behind them.
    Trailer,
}

/// Follows the requests of one connection.
#[derive(Debug)]
pub struct Framing {
    bounds: HeadBounds,
    state: State,
    /// The beginning of a line whose end has not arrived, cut at [`LINE_KEPT_BYTES`].
    line: Vec<u8>,
    /// The bytes of the current line so far.
    line_bytes: usize,
    /// Whether the last byte of the current line is a carriage return.
    after_return: bool,
    /// The bytes of the current head, or of the current trailers.
    part_bytes: usize,
    fields: usize,
    version_11: bool,
    length: Option<u64>,
    chunked: bool,
    coded: bool,
    hosts: u8,
    /// The bytes of the latest call up to the end of the last complete line or part of a body.
    checked: usize,
}

impl Framing {
    /// A scanner before the first byte of a connection.
    pub const fn new(bounds: HeadBounds) -> Self {
        Self {
            bounds,
            state: State::Between(0),
            line: Vec::new(),
            line_bytes: 0,
            after_return: false,
            part_bytes: 0,
            fields: 0,
            version_11: false,
            length: None,
            chunked: false,
            coded: false,
            hosts: 0,
            checked: 0,
        }
    }

    /// Whether a request has begun whose head is not complete.
    pub const fn in_head(&self) -> bool {
        matches!(self.state, State::RequestLine | State::Field)
    }

    /// Whether a head was complete and its body is not.
    pub const fn in_body(&self) -> bool {
        !matches!(self.state, State::Between(_) | State::RequestLine | State::Field)
    }

    /// The bytes of the latest call that are known to be right: all bytes up to an incomplete line or an error. The
    /// first bytes of that line may be from earlier calls.
    pub const fn checked(&self) -> usize {
        self.checked
    }

    /// Follows the next bytes. An error is returned once; nothing may be followed after it.
    pub fn follow(&mut self, all: &[u8]) -> Result<(), Violation> {
        let mut bytes = all;
        self.checked = 0;
        while !bytes.is_empty() {
            bytes = match self.state {
                State::Body(left) | State::Chunk(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    let left = left - taken as u64;
                    self.state = match (self.state, left) {
                        (State::Body(_), 0) => State::Between(0),
                        (State::Body(_), left) => State::Body(left),
                        (_, 0) => State::ChunkEnd,
                        (_, left) => State::Chunk(left),
                    };
                    &bytes[taken..]
                }
                _ => self.follow_line(bytes)?,
            };
            if self.line_bytes == 0 {
                self.checked = all.len() - bytes.len();
            }
        }
        Ok(())
    }

    /// Follows bytes up to the end of a line, or all of them.
    fn follow_line<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Violation> {
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            self.grow(bytes)?;
            let room = LINE_KEPT_BYTES.saturating_sub(self.line.len()).min(bytes.len());
            self.line.extend_from_slice(&bytes[..room]);
            self.after_return = bytes.ends_with(b"\r");
            return Ok(&[]);
        };
        let rest = &bytes[end + 1..];
        let returned = if end == 0 { self.after_return } else { bytes[end - 1] == b'\r' };
        if !returned {
            return Err(bad("a line ends with a bare line feed"));
        }
        self.grow(&bytes[..=end])?;
        if self.line_bytes == end + 1 {
            self.ended(&bytes[..end - 1])?;
        } else {
            let room = LINE_KEPT_BYTES.saturating_sub(self.line.len()).min(end);
            self.line.extend_from_slice(&bytes[..room]);
            let mut line = std::mem::take(&mut self.line);
            // The carriage return was kept, unless the line was cut before it.
            if line.len() == self.line_bytes - 1 {
                line.pop();
            }
            let ended = self.ended(&line);
            line.clear();
            self.line = line;
            ended?;
        }
        self.line_bytes = 0;
        self.after_return = false;
        Ok(rest)
    }

    /// Checks the length of the current line against the bounds.
    fn grow(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        if let State::Between(_) = self.state
            && bytes.first().is_some_and(|b| !matches!(b, b'\r' | b'\n'))
            && self.line_bytes == 0
        {
            self.begin();
        }
        self.line_bytes += bytes.len();
        self.part_bytes += bytes.len();
        let too_large = |what| Violation { status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, what };
        match self.state {
            State::RequestLine if self.line_bytes > self.bounds.target_bytes => {
                Err(Violation { status: StatusCode::URI_TOO_LONG, what: "the request line is too long" })
            }
            State::RequestLine | State::Field if self.part_bytes > self.bounds.bytes => {
                Err(too_large("the head of the request is too large"))
            }
            State::ChunkSize if self.line_bytes > CHUNK_LINE_MAX_BYTES => {
                Err(bad("the line with a chunk's size is too long"))
            }
            State::Trailer if self.part_bytes > TRAILERS_MAX_BYTES => {
                Err(bad("the trailer fields are too large"))
            }
            State::ChunkEnd if self.line_bytes > 2 => Err(bad("a chunk is longer than its size says")),
            // A bare carriage return before a request.
            State::Between(_) if self.line_bytes > 2 => Err(bad("a line ends with a bare carriage return")),
            _ => Ok(()),
        }
    }

    /// Starts a request.
    fn begin(&mut self) {
        self.state = State::RequestLine;
        (self.part_bytes, self.fields, self.hosts) = (0, 0, 0);
        (self.length, self.chunked, self.coded, self.version_11) = (None, false, false, false);
    }

    /// Handles a complete line. `line` is without its end, and cut if it is long.
    fn ended(&mut self, line: &[u8]) -> Result<(), Violation> {
        // Chunk extensions and targets included: a server that takes a bare carriage return for the end of a line
        // must not see another line than this one.
        if memchr::memchr2(b'\r', b'\0', line).is_some() {
            return Err(bad("a line holds a carriage return or a NUL byte"));
        }
        match self.state {
            State::Between(skipped) => {
                if skipped >= LEADING_LINES_MAX {
                    return Err(bad("too many empty lines stand before the request"));
                }
                self.state = State::Between(skipped + 1);
            }
            State::RequestLine => self.request_line(line)?,
            State::Field if line.is_empty() => self.head_ended()?,
            State::Field => self.field(line)?,
            State::ChunkSize => {
                let size = chunk_size(line)?;
                self.part_bytes = 0;
                self.state = if size == 0 { State::Trailer } else { State::Chunk(size) };
            }
            State::ChunkEnd if line.is_empty() => self.state = State::ChunkSize,
            State::ChunkEnd => return Err(bad("a chunk is longer than its size says")),
            State::Trailer if line.is_empty() => self.state = State::Between(0),
            State::Trailer if !is_field(line) => return Err(bad("a trailer field is malformed")),
            State::Trailer | State::Body(_) | State::Chunk(_) => {}
        }
        Ok(())
    }

    fn request_line(&mut self, line: &[u8]) -> Result<(), Violation> {
        // Only the beginning of a cut line is known here; hyper sees the whole line.
        if self.line_bytes <= LINE_KEPT_BYTES || line.len() == self.line_bytes - 2 {
            let version = line.rsplit(|b| *b == b' ').next().unwrap_or_default();
            match version {
                b"HTTP/1.1" => self.version_11 = true,
                b"HTTP/1.0" => {}
                [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
                    if major.is_ascii_digit() && minor.is_ascii_digit() =>
                {
                    let status = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
                    return Err(Violation {
                        status,
                        what: "this version of HTTP is not spoken here; use HTTP/1.1 or HTTP/2",
                    });
                }
                _ => return Err(bad("the request line is malformed")),
            }
            let mut parts = line.split(|b| *b == b' ');
            let (method, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
            let whole = parts.next().is_some() && parts.next().is_none();
            if !whole || target.is_empty() || method.is_empty() || !method.iter().all(|b| is_token(*b)) {
                return Err(bad("the request line is malformed"));
            }
            if target.iter().any(|b| *b <= b' ' || *b == 0x7f) {
                return Err(bad("the request target holds a control character"));
            }
        } else {
            self.version_11 = true;
        }
        self.state = State::Field;
        Ok(())
    }

    fn field(&mut self, line: &[u8]) -> Result<(), Violation> {
        self.fields += 1;
        if self.fields > self.bounds.fields {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return Err(Violation { status, what: "the request has too many header fields" });
        }
        if matches!(line[0], b' ' | b'\t') {
            return Err(bad("a header field is folded over two lines"));
        }
        if !is_field(line) {
            return Err(bad("a header field is malformed"));
        }
        let colon = memchr::memchr(b':', line).unwrap_or(line.len());
        let (name, value) = (&line[..colon], line[colon..].get(1..).unwrap_or_default().trim_ascii());
        // The three fields that decide where a message ends and which server it is for.
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = content_length(value).ok_or(bad("Content-Length is not a number"))?;
            if self.length.is_some_and(|other| other != length) {
                return Err(bad("two Content-Length fields differ"));
            }
            self.length = Some(length);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            if self.coded || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(bad("Transfer-Encoding may only be 'chunked', once"));
            }
            (self.coded, self.chunked) = (true, true);
        } else if name.eq_ignore_ascii_case(b"host") {
            self.hosts = self.hosts.saturating_add(1);
        }
        Ok(())
    }

    fn head_ended(&mut self) -> Result<(), Violation> {
        if self.coded && self.length.is_some() {
            return Err(bad("Content-Length and Transfer-Encoding are both given"));
        }
        if self.coded && !self.version_11 {
            return Err(bad("Transfer-Encoding is not of HTTP/1.0"));
        }
        if self.hosts > 1 {
            return Err(bad("the Host field is given twice"));
        }
        if self.hosts == 0 && self.version_11 {
            return Err(bad("the Host field is missing"));
        }
        self.state = match self.length {
            _ if self.chunked => State::ChunkSize,
            Some(length) if length > 0 => State::Body(length),
            _ => State::Between(0),
        };
        Ok(())
    }
}

/// Checks name, colon and value: no white space before the colon (RFC 9112, 5.1) and no control character anywhere.
fn is_field(line: &[u8]) -> bool {
    let Some(colon) = memchr::memchr(b':', line) else {
        // Only the beginning of a long line is known here, and no name is that long.
        return false;
    };
    let (name, value) = line.split_at(colon);
    !name.is_empty()
        && name.iter().all(|b| is_token(*b))
        && value.iter().all(|b| *b == b'\t' || (*b >= b' ' && *b != 0x7f))
}

const fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'!' | b'#'
                | b'$'
                | b'%'
                | b'&'
                | b'\''
                | b'*'
                | b'+'
                | b'-'
                | b'.'
                | b'^'
                | b'_'
                | b'`'
                | b'|'
                | b'~'
        )
}

/// Digits only: no sign, no list, no white space.
fn content_length(value: &[u8]) -> Option<u64> {
    // 18 digits fit into 64 bits. No client sends a longer body.
    if value.is_empty() || value.len() > 18 {
        return None;
    }
    value.iter().try_fold(0, |sum, b| b.is_ascii_digit().then(|| sum * 10 + u64::from(b - b'0')))
}

fn chunk_size(line: &[u8]) -> Result<u64, Violation> {
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    if digits == 0 || digits > CHUNK_DIGITS_MAX {
        return Err(bad("the size of a chunk is not a number"));
    }
    let (size, extensions) = line.split_at(digits);
    // `;` may follow white space (RFC 9112, 7.1.1); white space alone may not end the size.
    let extension = extensions.trim_ascii_start();
    let fits = extensions.is_empty() || extension.first() == Some(&b';');
    if !fits || extension.iter().any(|b| *b != b'\t' && (*b < b' ' || *b == 0x7f)) {
        return Err(bad("something other than an extension stands behind the size of a chunk"));
    }
    Ok(size.iter().fold(0, |sum, b| sum * 16 + u64::from(char::from(*b).to_digit(16).unwrap_or_default())))
}

#[cfg(test)]
mod tests;
