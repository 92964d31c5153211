//! Edits of JSON text in place: everything that is not edited keeps its bytes.

use std::borrow::Cow;
use std::ops::Range;

use bytes::Bytes;

/// Bytes to put in place of a range.
#[derive(Debug)]
pub struct Edit {
    pub(super) range: Range<usize>,
    with: Cow<'static, str>,
}

impl Edit {
    /// Puts `with` in place of `range`.
    pub fn new(range: Range<usize>, with: impl Into<Cow<'static, str>>) -> Self {
        Self { range, with: with.into() }
    }
}

/// Applies edits, which are in order and do not overlap, with one allocation.
pub fn splice(body: &[u8], edits: &[Edit]) -> Bytes {
    let added: usize = edits.iter().map(|edit| edit.with.len()).sum();
    let mut out = Vec::with_capacity(body.len() + added);
    let mut from = 0;
    for edit in edits {
        out.extend_from_slice(&body[from..edit.range.start]);
        out.extend_from_slice(edit.with.as_bytes());
        from = edit.range.end;
    }
    out.extend_from_slice(&body[from..]);
    Bytes::from(out)
}

/// A string as JSON, with its quotes.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
