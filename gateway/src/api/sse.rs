//! Finds server-sent events in a stream of chunks.
//!
//! Invariants:
//! - What is reported depends on the bytes alone, never on how they were cut into chunks.
//! - An event inside one chunk is lent from it; only one that spans chunks is copied, into a carry of at most
//!   [`EVENT_BYTES_MAX`]. A longer event is reported in parts, so that it can pass in constant memory.
//! - LF, CRLF and CR end a line. An empty line ends an event with its first byte: the LF of a CRLF is reported apart,
//!   since it may only come with the next chunk.

use memchr::memchr2;

/// Longest event that is reported as a whole, so that it can be changed.
pub const EVENT_BYTES_MAX: usize = 64 * 1024;

/// The byte order mark that a stream may begin with.
pub const MARK: &[u8] = b"\xEF\xBB\xBF";

/// A carry larger than this is given back once its event is over.
const CARRY_BYTES_KEPT: usize = 4 * 1024;

/// A piece of the stream; the pieces in order are the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece<'a> {
    /// A whole event with its empty line.
    Event(&'a [u8]),
    /// Bytes of an event that is too long; `last` is set when it ends here.
    Part {
        /// The bytes.
        bytes: &'a [u8],
        /// Whether the event is over.
        last: bool,
    },
    /// The LF that belongs to the event before it.
    Tail(&'a [u8]),
}

impl<'a> Piece<'a> {
    /// The bytes of the piece.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Self::Event(bytes) | Self::Part { bytes, .. } | Self::Tail(bytes) => bytes,
        }
    }
}

/// The state between chunks.
#[derive(Debug)]
pub struct Events {
    carry: Vec<u8>,
    too_long: bool,
    line_empty: bool,
    after_cr: bool,
    between: bool,
}

impl Default for Events {
    fn default() -> Self {
        Self { carry: Vec::new(), too_long: false, line_empty: true, after_cr: false, between: true }
    }
}

impl Events {
    /// Whether nothing is carried: the last byte seen ended an event.
    pub fn at_boundary(&self) -> bool {
        self.between
    }

    /// How many bytes wait for the rest of their event.
    pub fn carried(&self) -> usize {
        self.carry.len()
    }

    /// Reports the pieces that `chunk` completes.
    pub fn feed(&mut self, chunk: &[u8], mut report: impl FnMut(Piece<'_>)) {
        let mut rest = chunk;
        while !rest.is_empty() {
            if self.between && self.after_cr && rest[0] == b'\n' {
                self.after_cr = false;
                report(Piece::Tail(&rest[..1]));
                rest = &rest[1..];
                continue;
            }
            self.between = false;
            let end = self.event_end(rest);
            let (event, after) = rest.split_at(end.unwrap_or(rest.len()));
            self.between = end.is_some();
            self.piece(event, end.is_some(), &mut report);
            rest = after;
        }
    }

    /// Reports what is left when the stream is over: an event without its empty line.
    pub fn finish(&mut self, mut report: impl FnMut(Piece<'_>)) {
        let carry = std::mem::take(&mut self.carry);
        if self.too_long {
            self.too_long = false;
            report(Piece::Part { bytes: &carry, last: true });
        } else if !carry.is_empty() {
            report(Piece::Event(&carry));
        }
    }

    fn piece(&mut self, bytes: &[u8], ends: bool, report: &mut impl FnMut(Piece<'_>)) {
        if !self.too_long && self.carry.len() + bytes.len() > EVENT_BYTES_MAX {
            self.too_long = true;
            let carry = std::mem::take(&mut self.carry);
            report(Piece::Part { bytes: &carry, last: false });
        }
        if self.too_long {
            self.too_long = !ends;
            report(Piece::Part { bytes, last: ends });
        } else if !ends {
            self.carry.extend_from_slice(bytes);
        } else if self.carry.is_empty() {
            report(Piece::Event(bytes));
        } else {
            let mut carry = std::mem::take(&mut self.carry);
            carry.extend_from_slice(bytes);
            report(Piece::Event(&carry));
            if carry.capacity() <= CARRY_BYTES_KEPT {
                carry.clear();
                self.carry = carry;
            }
        }
    }

    /// Where the event that is being read ends in `bytes`, if it does.
    fn event_end(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < bytes.len() {
            if std::mem::take(&mut self.after_cr) && bytes[at] == b'\n' {
                at += 1;
                continue;
            }
            let line = memchr2(b'\n', b'\r', &bytes[at..]);
            let Some(line) = line else {
                self.line_empty = false;
                return None;
            };
            let over = self.line_empty && line == 0;
            self.after_cr = bytes[at + line] == b'\r';
            self.line_empty = true;
            at += line + 1;
            if over {
                return Some(at);
            }
        }
        None
    }
}

/// The payloads of the `data` lines of an event. A stream may begin with a byte order mark, which is no part of its first
/// line.
pub fn data_lines(event: &[u8]) -> impl Iterator<Item = &[u8]> {
    lines(event.strip_prefix(MARK).unwrap_or(event)).filter_map(|line| {
        let data = line.strip_prefix(b"data:")?;
        Some(data.strip_prefix(b" ").unwrap_or(data))
    })
}

/// What stands before, between and after the line ends of a text; between the two bytes of a CRLF is an empty line.
fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = memchr2(b'\n', b'\r', text);
        rest = end.map(|end| &text[end + 1..]);
        Some(&text[..end.unwrap_or(text.len())])
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// All pieces, parts of one long event joined.
    fn pieces(chunks: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let mut out: Vec<(u8, Vec<u8>)> = Vec::new();
        let mut events = Events::default();
        let mut open = false;
        let mut take = |piece: Piece<'_>| match piece {
            Piece::Event(bytes) => out.push((b'e', bytes.to_vec())),
            Piece::Tail(bytes) => out.push((b't', bytes.to_vec())),
            Piece::Part { bytes, last } => {
                if !std::mem::replace(&mut open, !last) {
                    out.push((b'p', Vec::new()));
                }
                out.last_mut().unwrap().1.extend_from_slice(bytes);
            }
        };
        for chunk in chunks {
            events.feed(chunk, &mut take);
            assert!(events.carried() <= EVENT_BYTES_MAX);
        }
        events.finish(&mut take);
        out
    }

    #[test]
    fn every_line_ending_ends_an_event() {
        for end in ["\n", "\r\n", "\r"] {
            let stream = format!("data: a{end}{end}: keep-alive{end}{end}data: b{end}data:c{end}{end}");
            let events: Vec<_> =
                pieces(&[stream.as_bytes()]).into_iter().filter(|(kind, _)| *kind == b'e').collect();
            assert_eq!(events.len(), 3, "{end:?}");
            let lines: Vec<&[u8]> = data_lines(&events[2].1).collect();
            assert_eq!(lines, [b"b", b"c"]);
        }
    }

    #[test]
    fn a_long_event_passes_in_parts_however_it_is_cut() {
        for size in [EVENT_BYTES_MAX - 2, EVENT_BYTES_MAX - 1, EVENT_BYTES_MAX * 3] {
            let stream = [vec![b'x'; size], b"\n\ndata: a\n\n".to_vec()].concat();
            let whole = pieces(&[&stream]);
            assert_eq!(whole[0].0, if size + 2 > EVENT_BYTES_MAX { b'p' } else { b'e' });
            assert_eq!(pieces(&stream.chunks(1000).collect::<Vec<_>>()), whole);
        }
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(stream in "(a|data: b|\n|\r|\r\n){0,40}", cuts in proptest::collection::vec(0usize..60, 0..8)) {
            let whole = pieces(&[stream.as_bytes()]);
            prop_assert_eq!(whole.iter().flat_map(|(_, bytes)| bytes.clone()).collect::<Vec<_>>(), stream.as_bytes());
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &stream.as_bytes()[pair[0]..pair[1]]).collect();
            prop_assert_eq!(pieces(&chunks), whole);
        }
    }
}
