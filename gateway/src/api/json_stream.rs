//! A strict JSON reader that is fed a text in pieces, of any length, and keeps a bounded state of some hundred bytes.
//!
//! Invariants:
//! - What a [`Sink`] is told depends on the bytes alone, never on how they were cut into pieces.
//! - It takes and refuses the same texts as [`Scanner`](super::json_scanner::Scanner), which borrows from a whole text and
//!   is read in the order of the code; this one reads in the order of the text.
//! - No allocation. Of a string or a number only the first [`SHORT_BYTES`] are kept; of a longer one only its length and
//!   its place are told.

#[cfg(test)]
mod tests;
mod utf8;

use std::ops::Range;

use self::utf8::Utf8;
use super::json_scanner::{DEPTH_MAX, Fault, plain_run};

/// Longest string or number, as written, whose text is told.
pub const SHORT_BYTES: usize = 64;

/// Is told what stands in a text, in its order.
pub trait Sink {
    /// An object or an array begins, as the next value.
    fn open(&mut self, container: Container);
    /// The innermost object or array ends.
    fn close(&mut self);
    /// A member of the innermost object; its value is told next.
    fn name(&mut self, name: Text<'_>);
    /// A value.
    fn string(&mut self, text: Text<'_>);
    /// A value.
    fn number(&mut self, text: Text<'_>);
    /// A value: `true`, `false` or `null`, that ends just before this place of the whole text.
    fn word(&mut self, word: Word, end: usize);
}

/// What has values in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// `{`
    Object,
    /// `[`
    Array,
}

/// A value that is a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// `true`
    True,
    /// `false`
    False,
    /// `null`
    Null,
}

/// A string or a number of the text.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// As written, without quotes and still escaped; `None` when it is longer than [`SHORT_BYTES`].
    pub short: Option<&'a [u8]>,
    /// Bytes, unescaped.
    pub len: u64,
    /// Its place in the whole text, quotes included.
    pub start: usize,
    /// Just past its place.
    pub end: usize,
}

impl Text<'_> {
    /// Its place in the whole text, quotes included.
    pub fn range(&self) -> Range<usize> {
        self.start..self.end
    }

    /// Whether it is this text, written without escapes.
    pub fn is(&self, text: &[u8]) -> bool {
        self.short == Some(text)
    }
}

/// The state between two pieces.
#[derive(Debug, Clone)]
pub struct Reader {
    state: State,
    /// The string that is read is a name.
    in_name: bool,
    /// Bit n is set where the container of depth n is an object.
    objects: u128,
    depth: u32,
    /// Bytes read so far.
    at: usize,
    /// Where the string or number begins that is read.
    start: usize,
    /// Its bytes as written.
    raw: usize,
    /// Its bytes unescaped.
    len: u64,
    short: [u8; SHORT_BYTES],
    utf8: Utf8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A value must come.
    Value,
    /// A value, or the end of an array.
    FirstItem,
    /// A name, or the end of an object.
    FirstName,
    /// A name must come.
    Name,
    Colon,
    /// A comma, or the end of the container.
    After,
    String(Escape),
    Number(Part),
    Word {
        word: Word,
        read: u8,
    },
    /// Only white space may come.
    End,
}

/// What of an escape was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Escape {
    None,
    Slash,
    /// `\u` and so many of its digits.
    Hex {
        read: u8,
        unit: u32,
        low: bool,
    },
    /// A high surrogate; a low one must come.
    High,
    HighSlash,
}

/// Where in the grammar of a number the last byte stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Begin,
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    E,
    Sign,
    Exponent,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            state: State::Value,
            in_name: false,
            objects: 0,
            depth: 0,
            at: 0,
            start: 0,
            raw: 0,
            len: 0,
            short: [0; SHORT_BYTES],
            utf8: Utf8::default(),
        }
    }
}

impl Reader {
    /// Reads the next piece.
    ///
    /// # Errors
    /// The text is no JSON. Nothing may be fed after that.
    pub fn feed(&mut self, piece: &[u8], sink: &mut impl Sink) -> Result<(), Fault> {
        if !self.utf8.take(piece) {
            return Err(self.fault("invalid UTF-8"));
        }
        let mut rest = piece;
        while let Some(&first) = rest.first() {
            let used = match self.state {
                State::String(escape) => self.in_string(escape, rest, sink)?,
                State::Number(part) => self.in_number(part, rest, sink)?,
                State::Word { word, read } => self.in_word(word, read, rest, sink)?,
                _ if matches!(first, b' ' | b'\t' | b'\n' | b'\r') => 1,
                state => self.between(state, first, sink)?,
            };
            self.at += used;
            rest = &rest[used..];
        }
        Ok(())
    }

    /// Says that the text is over.
    ///
    /// # Errors
    /// Something is missing at its end.
    pub fn finish(&mut self, sink: &mut impl Sink) -> Result<(), Fault> {
        if let State::Number(part) = self.state {
            self.number_over(part, sink)?;
        }
        match self.state == State::End && self.utf8.is_complete() {
            true => Ok(()),
            false => Err(self.fault("the text ends early")),
        }
    }

    /// Bytes of the value that is being read, unescaped, if it is a string.
    pub fn open_string(&self) -> u64 {
        match self.state {
            State::String(_) if !self.in_name => self.len,
            _ => 0,
        }
    }

    fn fault(&self, what: &'static str) -> Fault {
        Fault { at: self.at, what }
    }

    fn in_object(&self) -> bool {
        self.depth > 0 && self.objects >> (self.depth - 1) & 1 == 1
    }

    /// The byte at the beginning of a value or between two of them; how many bytes it used.
    fn between(&mut self, state: State, byte: u8, sink: &mut impl Sink) -> Result<usize, Fault> {
        match (state, byte) {
            (State::Colon, b':') => self.state = State::Value,
            (State::Colon, _) => return Err(self.fault("expected a colon")),
            (State::FirstName, b'}') | (State::FirstItem, b']') => self.leave(sink),
            (State::FirstName | State::Name, b'"') => self.begin_string(true),
            (State::FirstName | State::Name, _) => return Err(self.fault("expected a string")),
            (State::After, b',') => {
                self.state = if self.in_object() { State::Name } else { State::Value };
            }
            (State::After, b'}') if self.in_object() => self.leave(sink),
            (State::After, b']') if !self.in_object() => self.leave(sink),
            (State::After, _) => return Err(self.fault("expected a comma or a closing brace")),
            (State::Value | State::FirstItem, _) => return self.value(byte, sink),
            _ => return Err(self.fault("unexpected bytes after the value")),
        }
        Ok(1)
    }

    /// The first byte of a value; those of numbers and words are read again by their state.
    fn value(&mut self, byte: u8, sink: &mut impl Sink) -> Result<usize, Fault> {
        let word = |word| State::Word { word, read: 0 };
        match byte {
            b'{' => self.enter(Container::Object, sink)?,
            b'[' => self.enter(Container::Array, sink)?,
            b'"' => self.begin_string(false),
            b'-' | b'0'..=b'9' => {
                (self.start, self.raw, self.len) = (self.at, 0, 0);
                self.state = State::Number(Part::Begin);
                return Ok(0);
            }
            b't' => self.state = word(Word::True),
            b'f' => self.state = word(Word::False),
            b'n' => self.state = word(Word::Null),
            _ => return Err(self.fault("expected a value")),
        }
        Ok(usize::from(!matches!(byte, b't' | b'f' | b'n')))
    }

    fn enter(&mut self, container: Container, sink: &mut impl Sink) -> Result<(), Fault> {
        if self.depth == DEPTH_MAX {
            return Err(self.fault("nested too deeply"));
        }
        let bit = 1 << self.depth;
        self.depth += 1;
        self.state = match container {
            Container::Object => {
                self.objects |= bit;
                State::FirstName
            }
            Container::Array => {
                self.objects &= !bit;
                State::FirstItem
            }
        };
        sink.open(container);
        Ok(())
    }

    fn leave(&mut self, sink: &mut impl Sink) {
        self.depth -= 1;
        self.value_over();
        sink.close();
    }

    fn value_over(&mut self) {
        self.state = if self.depth == 0 { State::End } else { State::After };
    }

    fn begin_string(&mut self, in_name: bool) {
        (self.start, self.raw, self.len) = (self.at, 0, 0);
        (self.in_name, self.state) = (in_name, State::String(Escape::None));
    }

    /// Keeps what is written of a string or number, as far as there is room.
    fn keep(&mut self, bytes: &[u8]) {
        if self.raw < SHORT_BYTES {
            let kept = bytes.len().min(SHORT_BYTES - self.raw);
            self.short[self.raw..self.raw + kept].copy_from_slice(&bytes[..kept]);
        }
        self.raw += bytes.len();
    }

    fn text(&self, end: usize) -> Text<'_> {
        let short = (self.raw <= SHORT_BYTES).then(|| &self.short[..self.raw]);
        Text { short, len: self.len, start: self.start, end }
    }

    fn in_string(&mut self, escape: Escape, rest: &[u8], sink: &mut impl Sink) -> Result<usize, Fault> {
        if escape != Escape::None {
            self.keep(&rest[..1]);
            let next = self.in_escape(escape, rest[0])?;
            self.state = State::String(next);
            return Ok(1);
        }
        let run = plain_run(rest);
        self.keep(&rest[..run]);
        self.len += run as u64;
        match rest.get(run) {
            None => Ok(run),
            Some(b'"') => {
                match self.in_name {
                    true => self.state = State::Colon,
                    false => self.value_over(),
                }
                let text = self.text(self.at + run + 1);
                match self.in_name {
                    true => sink.name(text),
                    false => sink.string(text),
                }
                Ok(run + 1)
            }
            Some(b'\\') => {
                self.keep(b"\\");
                self.state = State::String(Escape::Slash);
                Ok(run + 1)
            }
            Some(_) => Err(Fault { at: self.at + run, what: "control character in a string" }),
        }
    }

    /// One byte of an escape. Adds to the length when the escape is over.
    fn in_escape(&mut self, escape: Escape, byte: u8) -> Result<Escape, Fault> {
        let hex = |low| Escape::Hex { read: 0, unit: 0, low };
        match (escape, byte) {
            (Escape::Slash, b'u') => Ok(hex(false)),
            (Escape::Slash, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.len += 1;
                Ok(Escape::None)
            }
            (Escape::Slash, _) => Err(self.fault("unknown escape")),
            (Escape::High, b'\\') => Ok(Escape::HighSlash),
            (Escape::HighSlash, b'u') => Ok(hex(true)),
            (Escape::High | Escape::HighSlash, _) => Err(self.fault("lone surrogate")),
            (Escape::Hex { read, unit, low }, _) => {
                let digit = char::from(byte).to_digit(16);
                let unit = unit * 16 + digit.ok_or_else(|| self.fault("expected four hex digits"))?;
                match (read, unit, low) {
                    (0..3, ..) => Ok(Escape::Hex { read: read + 1, unit, low }),
                    (_, 0xDC00..=0xDFFF, true) => {
                        self.len += 4;
                        Ok(Escape::None)
                    }
                    (_, 0xD800..=0xDBFF, false) => Ok(Escape::High),
                    (_, 0xDC00..=0xDFFF, false) | (_, _, true) => Err(self.fault("lone surrogate")),
                    (_, unit, false) => {
                        self.len += char::from_u32(unit).map_or(1, char::len_utf8) as u64;
                        Ok(Escape::None)
                    }
                }
            }
            (Escape::None, _) => Ok(Escape::None),
        }
    }

    /// The bytes of a number; the first one that is none of it is left to what follows.
    fn in_number(&mut self, mut part: Part, rest: &[u8], sink: &mut impl Sink) -> Result<usize, Fault> {
        let mut used = 0;
        while let Some(&byte) = rest.get(used) {
            // Embeddings are long runs of digits.
            if matches!(part, Part::Integer | Part::Fraction | Part::Exponent) && byte.is_ascii_digit() {
                used += rest[used..].iter().take_while(|b| b.is_ascii_digit()).count();
                continue;
            }
            let Some(next) = part.next(byte) else {
                self.keep(&rest[..used]);
                self.at += used;
                self.number_over(part, sink)?;
                self.at -= used;
                return Ok(used);
            };
            (part, used) = (next, used + 1);
        }
        self.keep(rest);
        self.state = State::Number(part);
        Ok(rest.len())
    }

    fn number_over(&mut self, part: Part, sink: &mut impl Sink) -> Result<(), Fault> {
        match part {
            Part::Zero | Part::Integer | Part::Fraction | Part::Exponent => {}
            Part::Begin | Part::Minus => return Err(self.fault("expected a value")),
            Part::Point | Part::E | Part::Sign => return Err(self.fault("expected a digit")),
        }
        self.value_over();
        self.len = self.raw as u64;
        sink.number(self.text(self.at));
        Ok(())
    }

    fn in_word(&mut self, word: Word, read: u8, rest: &[u8], sink: &mut impl Sink) -> Result<usize, Fault> {
        let text: &[u8] = match word {
            Word::True => b"true",
            Word::False => b"false",
            Word::Null => b"null",
        };
        let missing = &text[usize::from(read)..];
        let used = missing.iter().zip(rest).take_while(|(missing, byte)| missing == byte).count();
        if used == missing.len() {
            self.value_over();
            sink.word(word, self.at + used);
        } else if used == rest.len() {
            self.state = State::Word { word, read: read + used as u8 };
        } else {
            self.at += used;
            return Err(self.fault("expected a value"));
        }
        Ok(used)
    }
}

impl Part {
    /// The part that a byte leads to; `None` when it is not of the number.
    fn next(self, byte: u8) -> Option<Self> {
        match (self, byte) {
            (Self::Begin, b'-') => Some(Self::Minus),
            (Self::Begin | Self::Minus, b'0') => Some(Self::Zero),
            (Self::Begin | Self::Minus, b'1'..=b'9') | (Self::Integer, b'0'..=b'9') => Some(Self::Integer),
            (Self::Zero | Self::Integer, b'.') => Some(Self::Point),
            (Self::Point | Self::Fraction, b'0'..=b'9') => Some(Self::Fraction),
            (Self::Zero | Self::Integer | Self::Fraction, b'e' | b'E') => Some(Self::E),
            (Self::E, b'+' | b'-') => Some(Self::Sign),
            (Self::E | Self::Sign | Self::Exponent, b'0'..=b'9') => Some(Self::Exponent),
            _ => None,
        }
    }
}
