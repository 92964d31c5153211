//! Takes what a target needs off the front of the fuzzer's bytes.

use sha2::{Digest as _, Sha256};

/// Ends a field; in no UTF-8 text, so that texts in a corpus stay readable.
const END: u8 = 0xff;

/// The bytes that are left.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte, or zero.
    pub(crate) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    /// Up to the end of the field, or all that is left.
    pub(crate) fn field(&mut self) -> &'a [u8] {
        let end = self.0.iter().position(|byte| *byte == END);
        let (field, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest.get(1..).unwrap_or_default();
        field
    }

    /// The next field as text; empty when it is none.
    pub(crate) fn text(&mut self) -> &'a str {
        std::str::from_utf8(self.field()).unwrap_or_default()
    }

    pub(crate) const fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Cuts bytes into chunks, of sizes that follow from `seed`.
pub(crate) fn chunks(bytes: &[u8], seed: u8) -> Vec<&[u8]> {
    let (mut rest, mut state, mut chunks) = (bytes, u32::from(seed), Vec::new());
    while !rest.is_empty() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Mostly small ones: that is where cuts fall into tokens.
        let most = if state & 0x100 == 0 { 4 } else { 64 };
        let (chunk, after) = rest.split_at(rest.len().min((state >> 16) as usize % most + 1));
        chunks.push(chunk);
        rest = after;
    }
    chunks
}

/// A file that opens with `magic` and a digest of the rest: as it is or, when `right`, with a right opening before it, which
/// a fuzzer would never find.
pub(crate) fn sealed(magic: &[u8; 8], right: bool, body: &[u8]) -> Vec<u8> {
    match right {
        true => [magic.as_slice(), &Sha256::digest(body), body].concat(),
        false => body.to_vec(),
    }
}
