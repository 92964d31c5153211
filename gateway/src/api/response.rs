//! Reads facts from an answer while it passes, and changes the few bytes that must change.
//!
//! Invariants:
//! - Bytes are untouched unless the plan asks for a change in that very event; then that event alone is spliced.
//! - Reading allocates nothing: the payload is scanned where it lies, except when it is spread over several lines.
//! - Output and facts depend on the bytes, not on how they were cut into chunks.
//! - `[DONE]` is only added to a stream that its upstream finished, never to one that broke or reported an error.
//!
//! Tokens are counted so that a missing `usage` cannot make an answer free: [`StreamFacts::completion_estimate`] is
//! the larger of the deltas with content (each is a token at least) and the bytes of content over
//! [`BYTES_PER_TOKEN`].

mod payload;
mod rewrite;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

pub use self::rewrite::{RewritePlan, Rewriter};

use self::payload::Payload;
use super::json_edit::{Edit, quoted, splice};
use super::json_scanner::Fault;
use super::sse::data_lines;
use super::usage::{Implausible, Usage, UsageBounds};

/// Bytes of content that are taken for one token where the upstream does not count.
pub const BYTES_PER_TOKEN: u64 = 4;

/// What is known of a streamed answer so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StreamFacts {
    /// The last usage the upstream reported, as long as all it reported is possible.
    pub usage: Option<Usage>,
    /// The first report of the upstream that cannot be true; none of its reports counts then.
    pub implausible: Option<Implausible>,
    /// What its reports may say.
    bounds: UsageBounds,
    /// Deltas that carried content: text, reasoning, tool call arguments, of any choice.
    pub chunks: u64,
    /// Bytes of that content, unescaped.
    pub content_bytes: u64,
    /// Whether a finish reason (or `response.completed`) was seen.
    pub finished: bool,
    /// Whether `[DONE]` was seen.
    pub done_seen: bool,
    /// Whether the upstream reported an error inside the stream.
    pub error_seen: bool,
    /// Events that could not be read: too long, or not JSON. Their bytes count as content.
    pub unread_events: u64,
    /// When content was first seen; the caller's to set, since this module has no clock.
    pub first_content_at: Option<Instant>,
}

impl StreamFacts {
    /// Tokens generated so far: the upstream's own count, or else the estimate.
    pub fn completion_tokens(&self) -> u64 {
        self.usage.and_then(|usage| usage.completion).unwrap_or_else(|| self.completion_estimate())
    }

    /// Tokens generated so far, as seen from here.
    pub fn completion_estimate(&self) -> u64 {
        self.chunks.max(self.content_bytes.div_ceil(BYTES_PER_TOKEN))
    }

    /// Whether the upstream said all it had to say. What follows may be cut without harm.
    pub fn complete(&self) -> bool {
        (self.finished || self.done_seen) && !self.error_seen
    }

    fn unread(&mut self, bytes: usize, event_over: bool) {
        self.unread_events += u64::from(event_over);
        self.content_bytes += bytes as u64;
    }

    /// Takes the facts of one event and says what could be changed in it.
    fn take(&mut self, event: &[u8]) -> EditPoints {
        let mut lines = data_lines(event);
        let Some(first) = lines.next() else {
            return EditPoints::default();
        };
        if let Some(second) = lines.next() {
            // Rare enough to pay for a copy. Nothing is changed in it: the ranges would not fit the event.
            let joined =
                lines.fold([first, second].join(&b'\n'), |joined, line| [&joined, line].join(&b'\n'));
            self.take_payload(&joined);
            return EditPoints::default();
        }
        let first = first.trim_ascii();
        let offset = first.as_ptr().addr() - event.as_ptr().addr();
        let mut edit_points = self.take_payload(first);
        edit_points.models.iter_mut().for_each(|range| *range = range.start + offset..range.end + offset);
        edit_points
    }

    fn take_payload(&mut self, payload: &[u8]) -> EditPoints {
        let payload = payload.trim_ascii();
        if payload == b"[DONE]" {
            self.done_seen = true;
            return EditPoints::default();
        }
        let Ok(read) = Payload::read(payload) else {
            self.unread(payload.len(), true);
            return EditPoints::default();
        };
        self.chunks += u64::from(read.deltas);
        self.content_bytes += read.content_bytes;
        if self.implausible.is_none() {
            self.usage = read.usage.or(self.usage);
            if let Err(found) = self.bounds.check(read.usage, read.most_tokens, self.content_bytes) {
                (self.usage, self.implausible) = (None, Some(found));
            }
        }
        self.finished |= read.finished;
        self.error_seen |= read.error;
        EditPoints { usage_only: read.usage_only(), models: read.models }
    }
}

/// What could be changed in an event.
#[derive(Debug, Default)]
struct EditPoints {
    models: SmallVec<[Range<usize>; 2]>,
    usage_only: bool,
}

/// Whether the first event of a stream is an error. An event that is not whole yet is not taken for one.
pub fn begins_with_error(chunk: &[u8]) -> bool {
    let end = chunk.windows(2).position(|pair| pair == b"\n\n").or_else(|| {
        let crlf = chunk.windows(4).position(|four| four == b"\r\n\r\n");
        crlf.map(|at| at + 2)
    });
    let Some(end) = end else { return false };
    data_lines(&chunk[..end]).next().is_some_and(is_error_body)
}

/// Whether an answer is an error, whatever its status says.
pub fn is_error_body(body: &[u8]) -> bool {
    is_error_object(body).is_ok_and(|error| error)
}

/// Whether a JSON object is an error.
///
/// # Errors
/// When the text is not one JSON object, with all of it checked.
pub fn is_error_object(body: &[u8]) -> Result<bool, Fault> {
    Payload::read(body.trim_ascii()).map(|read| read.error)
}

/// The usage an unary answer reports.
///
/// # Errors
/// A report that cannot be true.
pub fn usage_of_body(body: &[u8], bounds: &UsageBounds) -> Result<Option<Usage>, Implausible> {
    let Ok(read) = Payload::read(body) else { return Ok(None) };
    bounds.check(read.usage, read.most_tokens, body.len() as u64)?;
    Ok(read.usage)
}

/// An unary answer with the model named as the client named it; shared when nothing changes.
pub fn rename_model_in_body(body: &Bytes, client_model: &str) -> Bytes {
    let quoted = quoted(client_model);
    match Payload::read(body) {
        Ok(read) => rename(body, &read.models, &quoted).unwrap_or_else(|| body.clone()),
        Err(_) => body.clone(),
    }
}

/// The text with another name at each of the ranges, or `None` if it is there already.
fn rename(text: &[u8], models: &[Range<usize>], quoted: &str) -> Option<Bytes> {
    let edits: SmallVec<[Edit; 2]> = models
        .iter()
        .filter(|range| &text[(*range).clone()] != quoted.as_bytes())
        .map(|range| Edit::new(range.clone(), quoted.to_owned()))
        .collect();
    (!edits.is_empty()).then(|| splice(text, &edits))
}
