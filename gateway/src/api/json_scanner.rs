//! A strict, borrowing JSON scanner: it walks a text and lets the caller pick what it needs.
//!
//! Invariants:
//! - Every byte is checked against RFC 8259, also of values that are skipped, so what passes here means the same
//!   to a backend. Lone surrogates, control characters, a byte order mark, `NaN` and trailing bytes are faults.
//! - No allocation and no tree; [`Text::decode`] allocates only for a string that holds escapes.
//! - Nesting is bounded by [`DEPTH_MAX`], so the native stack is too.

use std::borrow::Cow;
use std::ops::Range;

use memchr::memchr2;

/// How deep arrays and objects may nest; the same bound as serde_json's.
pub const DEPTH_MAX: u32 = 128;

/// Why a text is not the JSON it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub struct Fault {
    /// Offset of the first byte that cannot be right.
    pub at: usize,
    /// What is wrong there, in words a client may read.
    pub what: &'static str,
}

/// The type of the value that comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `{`
    Object,
    /// `[`
    Array,
    /// `"`
    String,
    /// `-` or a digit
    Number,
    /// `true` or `false`
    Bool,
    /// `null`
    Null,
}

/// A string of the text, still escaped.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// What stands between the quotes.
    pub raw: &'a str,
    /// Offset of the opening quote.
    pub start: usize,
    /// Bytes that unescaping takes away; 0 exactly when there is no escape.
    pub shrink: usize,
}

impl<'a> Text<'a> {
    /// Range of the string in the text, quotes included.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.raw.len() + 2
    }

    /// Length in bytes once unescaped.
    pub fn len(&self) -> usize {
        self.raw.len() - self.shrink
    }

    /// Whether the string is empty.
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// The string itself; borrowed unless it holds escapes.
    pub fn decode(&self) -> Cow<'a, str> {
        if self.shrink == 0 { Cow::Borrowed(self.raw) } else { Cow::Owned(unescape(self.raw)) }
    }
}

/// The scanner: a position in a text that is known to be UTF-8.
#[derive(Debug)]
pub struct Scanner<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
    shrink: usize,
    numbers: usize,
}

impl<'a> Scanner<'a> {
    /// Starts at the beginning of `bytes`, which must be UTF-8.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Fault> {
        if bytes.starts_with(b"\xEF\xBB\xBF") {
            return Err(Fault { at: 0, what: "a byte order mark, which JSON must not begin with," });
        }
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Self { text, at: 0, depth: 0, shrink: 0, numbers: 0 }),
            Err(error) => Err(Fault { at: error.valid_up_to(), what: "invalid UTF-8" }),
        }
    }

    /// Offset of the next unread byte.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes that unescaping would have taken away from all strings read so far.
    pub fn shrink(&self) -> usize {
        self.shrink
    }

    /// How many numbers were read so far.
    pub fn numbers(&self) -> usize {
        self.numbers
    }

    /// The type of the next value; moves over white space only.
    pub fn kind(&mut self) -> Result<Kind, Fault> {
        match self.peek() {
            Some(b'{') => Ok(Kind::Object),
            Some(b'[') => Ok(Kind::Array),
            Some(b'"') => Ok(Kind::String),
            Some(b'-' | b'0'..=b'9') => Ok(Kind::Number),
            Some(b't' | b'f') => Ok(Kind::Bool),
            Some(b'n') => Ok(Kind::Null),
            Some(_) => Err(self.fault("expected a value")),
            None => Err(self.fault("the text ends early")),
        }
    }

    /// Reads an object; `member` is called with each name and must read the value.
    pub fn object<E: From<Fault>>(
        &mut self,
        mut member: impl FnMut(&mut Self, Text<'a>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.enter(b'{')?;
        if self.peek() == Some(b'}') {
            return self.leave();
        }
        loop {
            let name = self.string()?;
            self.expect(b':', "expected a colon")?;
            member(self, name)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => return self.leave(),
                _ => return Err(self.fault("expected a comma or a closing brace").into()),
            }
        }
    }

    /// Reads an array; `item` is called before each item and must read it.
    pub fn array<E: From<Fault>>(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.enter(b'[')?;
        if self.peek() == Some(b']') {
            return self.leave();
        }
        loop {
            item(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => return self.leave(),
                _ => return Err(self.fault("expected a comma or a closing bracket").into()),
            }
        }
    }

    /// Reads a string.
    pub fn string(&mut self) -> Result<Text<'a>, Fault> {
        self.expect(b'"', "expected a string")?;
        let start = self.at - 1;
        let mut shrink = 0;
        loop {
            self.at += plain_run(&self.text.as_bytes()[self.at..]);
            match self.next() {
                Some(b'"') => break,
                Some(b'\\') => shrink += self.escape()?,
                Some(_) => {
                    self.at -= 1;
                    return Err(self.fault("control character in a string"));
                }
                None => return Err(self.fault("the text ends inside a string")),
            }
        }
        self.shrink += shrink;
        Ok(Text { raw: &self.text[start + 1..self.at - 1], start, shrink })
    }

    /// Reads a number and gives its digits as written.
    pub fn number(&mut self) -> Result<&'a str, Fault> {
        self.peek();
        let start = self.at;
        self.eat(b'-');
        if !self.eat(b'0') && self.digits() == 0 {
            return Err(self.fault("expected a value"));
        }
        if self.eat(b'.') && self.digits() == 0 {
            return Err(self.fault("expected a digit"));
        }
        if self.eat(b'e') || self.eat(b'E') {
            let _sign = self.eat(b'+') || self.eat(b'-');
            if self.digits() == 0 {
                return Err(self.fault("expected a digit"));
            }
        }
        self.numbers += 1;
        Ok(&self.text[start..self.at])
    }

    /// Reads `true` or `false`.
    pub fn boolean(&mut self) -> Result<bool, Fault> {
        let value = self.peek() == Some(b't');
        self.word(if value { "true" } else { "false" })?;
        Ok(value)
    }

    /// Reads `null`.
    pub fn null(&mut self) -> Result<(), Fault> {
        self.peek();
        self.word("null")
    }

    /// Reads any value and forgets it.
    pub fn skip(&mut self) -> Result<(), Fault> {
        match self.kind()? {
            Kind::Object => self.object(|s, _| s.skip()),
            Kind::Array => self.array(Self::skip),
            Kind::String => self.string().map(drop),
            Kind::Number => self.number().map(drop),
            Kind::Bool => self.boolean().map(drop),
            Kind::Null => self.null(),
        }
    }

    /// Makes sure that only white space is left.
    pub fn end(&mut self) -> Result<(), Fault> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.fault("unexpected bytes after the value")),
        }
    }

    fn fault(&self, what: &'static str) -> Fault {
        Fault { at: self.at, what }
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.text.as_bytes().get(self.at).copied();
        self.at += usize::from(byte.is_some());
        byte
    }

    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let blank = rest.iter().take_while(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')).count();
        self.at += blank;
        rest.get(blank).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.text.as_bytes().get(self.at) == Some(&byte);
        self.at += usize::from(found);
        found
    }

    fn digits(&mut self) -> usize {
        let run = self.text.as_bytes()[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        self.at += run;
        run
    }

    fn word(&mut self, word: &'static str) -> Result<(), Fault> {
        if self.text.as_bytes()[self.at..].starts_with(word.as_bytes()) {
            self.at += word.len();
            return Ok(());
        }
        Err(self.fault("expected a value"))
    }

    fn expect(&mut self, byte: u8, what: &'static str) -> Result<(), Fault> {
        if self.peek() == Some(byte) {
            self.at += 1;
            return Ok(());
        }
        Err(self.fault(what))
    }

    fn enter(&mut self, byte: u8) -> Result<(), Fault> {
        self.expect(byte, if byte == b'{' { "expected an object" } else { "expected an array" })?;
        if self.depth == DEPTH_MAX {
            return Err(self.fault("nested too deeply"));
        }
        self.depth += 1;
        Ok(())
    }

    fn leave<E>(&mut self) -> Result<(), E> {
        self.at += 1;
        self.depth -= 1;
        Ok(())
    }

    /// Checks one escape, the backslash being read, and says how many bytes shorter it is unescaped.
    fn escape(&mut self) -> Result<usize, Fault> {
        match self.next() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(1),
            Some(b'u') => match self.hex4()? {
                0xD800..=0xDBFF => {
                    if self.eat(b'\\') && self.eat(b'u') && matches!(self.hex4()?, 0xDC00..=0xDFFF) {
                        return Ok(8);
                    }
                    Err(self.fault("lone surrogate"))
                }
                0xDC00..=0xDFFF => Err(self.fault("lone surrogate")),
                unit => Ok(6 - char::from_u32(unit).map_or(1, char::len_utf8)),
            },
            _ => Err(self.fault("unknown escape")),
        }
    }

    fn hex4(&mut self) -> Result<u32, Fault> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self.next().and_then(|b| char::from(b).to_digit(16));
            unit = unit * 16 + digit.ok_or_else(|| self.fault("expected four hex digits"))?;
        }
        Ok(unit)
    }
}

/// How many bytes from the start are neither a quote, a backslash nor a control character: most of a prompt.
pub(super) fn plain_run(bytes: &[u8]) -> usize {
    // Names and most values are short: then looking at eight bytes at a time is done before a search has begun.
    let mut at = 0;
    while at < SHORT_RUN_BYTES
        && let Some(Ok(eight)) = bytes.get(at..at + 8).map(<[u8; 8]>::try_from)
    {
        let ends = ends_of_run(u64::from_le_bytes(eight));
        if ends != 0 {
            return at + ends.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    at + plain_run_of_many(&bytes[at..])
}

/// Bytes that are looked at before a search begins.
const SHORT_RUN_BYTES: usize = 32;

/// The highest bit of the first byte that ends a run is set; of the bytes after that one nothing is said.
const fn ends_of_run(eight: u64) -> u64 {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    // A subtraction borrows from the next byte only where it has found one.
    const fn below(word: u64, bound: u64) -> u64 {
        word.wrapping_sub(ONES * bound) & !word & HIGH
    }
    below(eight, 0x20) | below(eight ^ (ONES * b'"' as u64), 1) | below(eight ^ (ONES * b'\\' as u64), 1)
}

fn plain_run_of_many(bytes: &[u8]) -> usize {
    let run = &bytes[..memchr2(b'"', b'\\', bytes).unwrap_or(bytes.len())];
    // Without a way out of the loop it is done in vectors.
    match run.iter().fold(u8::MAX, |least, &byte| least.min(byte)) < 0x20 {
        true => run.iter().position(|&byte| byte < 0x20).unwrap_or(run.len()),
        false => run.len(),
    }
}

/// Unescapes a string the scanner has checked.
fn unescape(raw: &str) -> String {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(slash) = rest.find('\\') {
        out.push_str(&rest[..slash]);
        let escape = &rest[slash..];
        let unit = |at: usize| escape.get(at..at + 4).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let mut used = 2;
        out.push(match escape.as_bytes().get(1) {
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                used = 6;
                let mut code = unit(2).unwrap_or(0xFFFD);
                if let (0xD800..=0xDBFF, Some(low @ 0xDC00..=0xDFFF)) = (code, unit(8)) {
                    used = 12;
                    code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
                }
                char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            Some(&other) => char::from(other),
            None => '\\',
        });
        rest = escape.get(used..).unwrap_or("");
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(bytes: &[u8]) -> Result<(), Fault> {
        let mut scanner = Scanner::new(bytes)?;
        scanner.skip()?;
        scanner.end()
    }

    #[test]
    fn what_json_forbids_is_a_fault() {
        let cases: [&[u8]; 19] = [
            b"",
            b"{",
            b"\xEF\xBB\xBF{}",
            b"{} x",
            b"NaN",
            b"-",
            b"01",
            b"1.",
            b"1e",
            b"[1,]",
            b"{\"a\":1,}",
            b"{a:1}",
            b"\"\\ud800\"",
            b"\"\\udc00\"",
            b"\"\\u+123\"",
            b"\"\x00\"",
            b"\"\xFF\"",
            b"truth",
            b"'a'",
        ];
        for case in cases {
            assert!(check(case).is_err(), "{case:?}");
        }
        assert!(check("[".repeat(100_000).as_bytes()).is_err());
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(check(deep(128).as_bytes()).is_ok());
        assert!(check(deep(129).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn a_run_ends_at_the_first_byte_that_is_not_plain(
            bytes in proptest::collection::vec(
                prop_oneof![9 => 0x20u8..=255, 1 => prop_oneof![Just(b'"'), Just(b'\\'), 0u8..0x20, Just(0x7f), Just(0x80)]],
                0..120),
        ) {
            let ends = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
            prop_assert_eq!(plain_run(&bytes), bytes.iter().position(ends).unwrap_or(bytes.len()));
        }

        #[test]
        fn a_run_ends_where_a_byte_by_byte_walk_ends(
            plain in proptest::collection::vec(0x20u8.., 0..100),
            rest in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let bytes = [plain, rest].concat();
            let end = bytes.iter().position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\');
            prop_assert_eq!(plain_run(&bytes), end.unwrap_or(bytes.len()));
        }

        #[test]
        fn agrees_with_serde_json_on_any_text(text in r#"[\[\]{}",:\\ue0-9dDcC.\-+ntrfalseu\x00-\x20é]{0,24}"#) {
            // serde_json refuses numbers beyond f64, which a scanner that reads no value has no reason to do.
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            if let Err(error) = &theirs && error.to_string().contains("out of range") {
                return Ok(());
            }
            prop_assert_eq!(check(text.as_bytes()).is_ok(), theirs.is_ok(), "{:?} {:?}", text, theirs);
        }

        #[test]
        fn strings_decode_as_in_serde_json(text in r#"([a-zé"😀]|\\[nrtbf"\\/]|\\u00[0-9a-f]{2}|\\ud83d\\ude00){0,40}"#) {
            let json = format!("\"{}\"", text.replace('"', "\\\""));
            if let Ok(theirs) = serde_json::from_str::<String>(&json) {
                let mut scanner = Scanner::new(json.as_bytes()).unwrap();
                let ours = scanner.string().unwrap();
                prop_assert_eq!(ours.len(), theirs.len());
                prop_assert_eq!(ours.decode(), theirs);
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _verdict = check(&bytes);
        }
    }
}
