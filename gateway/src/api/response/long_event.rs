//! An event of a stream that is too long to be kept: read while it passes, in constant memory.

use super::payload::{Payload, PayloadReader};
use crate::api::json_scanner::Fault;
use memchr::memchr2;

const DATA: &[u8] = b"data:";

/// The state between two parts of an event.
#[derive(Debug)]
pub(super) struct LongEvent {
    payload: PayloadReader,
    fault: Option<Fault>,
    line: Line,
    /// Bytes of its `data` lines.
    data_bytes: u64,
    /// Bytes of content that were given so far.
    counted: u64,
}

/// What the line is that is read.
#[derive(Debug, Clone, Copy)]
enum Line {
    /// So many bytes of `data:` were read.
    Begins(usize),
    Data,
    Other,
}

impl LongEvent {
    pub(super) fn new(payload: PayloadReader) -> Self {
        Self { payload, fault: None, line: Line::Begins(0), data_bytes: 0, counted: 0 }
    }

    /// Reads the next part. Gives the bytes of content that it adds, those of data that is no JSON included: they count at
    /// once, since an event may have no end.
    pub(super) fn feed(&mut self, part: &[u8]) -> u64 {
        self.read(part);
        let content = match self.fault {
            Some(_) => self.data_bytes,
            None => self.payload.content_so_far(),
        };
        let added = content.saturating_sub(self.counted);
        self.counted += added;
        added
    }

    fn read(&mut self, part: &[u8]) {
        let mut rest = part;
        while let Some(&first) = rest.first() {
            let used = match self.line {
                Line::Begins(read) => {
                    self.line = match first {
                        b'\n' | b'\r' => Line::Begins(0),
                        // The byte order mark that a stream may begin with.
                        0xEF | 0xBB | 0xBF if read == 0 => Line::Begins(0),
                        byte if DATA.get(read) != Some(&byte) => Line::Other,
                        _ if read + 1 == DATA.len() => Line::Data,
                        _ => Line::Begins(read + 1),
                    };
                    1
                }
                Line::Data | Line::Other => {
                    let end = memchr2(b'\n', b'\r', rest);
                    let line = &rest[..end.unwrap_or(rest.len())];
                    if matches!(self.line, Line::Data) {
                        self.data_bytes += line.len() as u64;
                        self.data(line);
                        // Lines are joined by a line break.
                        if end.is_some() {
                            self.data(b"\n");
                        }
                    }
                    if end.is_some() {
                        self.line = Line::Begins(0);
                    }
                    line.len() + usize::from(end.is_some())
                }
            };
            rest = &rest[used..];
        }
    }

    fn data(&mut self, bytes: &[u8]) {
        if self.fault.is_none() {
            self.fault = self.payload.feed(bytes).err();
        }
    }

    /// The event is over: its facts without the content that [`feed`](Self::feed) has given, `None` when it has no data.
    ///
    /// # Errors
    /// The bytes of its data that `feed` has not given, when they are no JSON object.
    pub(super) fn finish(self) -> Result<Option<Payload>, u64> {
        let unread = self.data_bytes - self.counted.min(self.data_bytes);
        match self.fault {
            _ if self.data_bytes == 0 => Ok(None),
            Some(_) => Err(unread),
            None => match self.payload.finish() {
                Ok(mut payload) => {
                    payload.content_bytes -= self.counted.min(payload.content_bytes);
                    Ok(Some(payload))
                }
                Err(_) => Err(unread),
            },
        }
    }
}
