//! Reads facts from an answer while it passes, and changes the few bytes that must change.
//!
//! Invariants:
//! - Bytes are untouched unless the plan asks for a change in that very event; then that event alone is spliced. What the
//!   rules of event streams tell readers to pass over is not passed on where events are held: some clients fail by an event
//!   without data, and by one that the end of the connection has cut. Comments pass.
//! - What comes only because Weir asked for usage is taken out again: the chunk of usage, and `"usage": null` of the others.
//! - Reading allocates nothing: the payload is scanned where it lies, except when it is spread over several lines. An event
//!   longer than [`EVENT_BYTES_MAX`](super::sse::EVENT_BYTES_MAX) is read while it passes, with a state of some hundred
//!   bytes; nothing in it is changed.
//! - Where a fact stands depends on the endpoint, what its usage means on the backend's dialect.
//! - Output and facts depend on the bytes, not on how they were cut into chunks.
//! - `[DONE]` is only added to a stream that its upstream finished, never to one that broke or reported an error.
//! - An error in another form than OpenAI's is followed by the same error in that form, or replaced by it where clients would
//!   find the other one first and read no text in it. Clients look for no other form, and would take the end of the stream
//!   for the end of the answer.
//!
//! Tokens are counted so that a missing `usage` cannot make an answer free: [`StreamFacts::completion_estimate`] is
//! the larger of the deltas with content (each is a token at least) and the bytes of content over
//! [`BYTES_PER_TOKEN`]. Content is text, reasoning (once, though some backends send it under several names) and the
//! arguments of tools; base64 of sound and images is none.

mod endpoint;
#[cfg(test)]
mod golden;
mod long_event;
mod payload;
mod repeated;
mod rewrite;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;
use weir_proto::resource::Dialect;

pub use self::rewrite::{MissingUsage, RewritePlan, Rewriter};

use self::endpoint::Endpoint;
use self::payload::{Lists, Payload, UntoldError};
use self::repeated::Payloads;
use super::json_edit::{Edit, quoted, splice};
use super::json_scanner::Fault;
use super::request::RouteKind;
use super::sse::data_lines;
use super::usage::{Implausible, Usage, UsageBounds};

/// Bytes of content that are taken for one token where the upstream does not count.
pub const BYTES_PER_TOKEN: u64 = 4;

/// What is known of a streamed answer so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StreamFacts {
    /// The usage that the upstream reported so far, as long as all it reported is possible. Zeros beside text are no counts.
    pub usage: Option<Usage>,
    /// The first report of the upstream that cannot be true; none of its reports counts then.
    pub implausible: Option<Implausible>,
    /// What its reports may say.
    bounds: UsageBounds,
    /// All that it reported, zeros included.
    reported: Option<Usage>,
    /// A bit for each choice that has begun, and for each that has a finish reason.
    choices: (u128, u128),
    /// Events with data, `[DONE]` included.
    pub events: u64,
    /// Deltas that carried content: text, reasoning, tool call arguments, of any choice.
    pub chunks: u64,
    /// Bytes of that content, unescaped.
    pub content_bytes: u64,
    /// Whether every choice that has begun has a finish reason, or `response.completed` or its like was seen.
    pub finished: bool,
    /// Whether `[DONE]` was seen.
    pub done_seen: bool,
    /// Whether the upstream reported an error inside the stream.
    pub error_seen: bool,
    /// Tokens of the answer as the client reads them, where the upstream sent a `usage` in the API's own place and form.
    shown_completion: Option<u64>,
    /// Events that could not be read, being no JSON object. Their bytes count as content.
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

    /// Whether a client that asked for usage has got one that counts what was written.
    fn usage_shown(&self) -> bool {
        let counts = |completion| completion > 0 || self.content_bytes == 0;
        self.implausible.is_none() && self.shown_completion.is_some_and(counts)
    }

    /// Whether the upstream said all it had to say. What follows may be cut without harm. `[DONE]` after an error is no
    /// success.
    pub fn complete(&self) -> bool {
        (self.finished || self.done_seen) && !self.error_seen
    }

    fn unread(&mut self, bytes: u64) {
        self.unread_events += 1;
        self.content_bytes += bytes;
    }

    /// Takes the facts of one event and says what could be changed in it.
    fn take(&mut self, event: &[u8], payloads: &mut Payloads) -> EditPoints {
        let mut lines = data_lines(event);
        let Some(first) = lines.next() else {
            return EditPoints::default();
        };
        if let Some(second) = lines.next() {
            // Rare enough to pay for a copy. Nothing is changed in it: the ranges would not fit the event.
            let joined =
                lines.fold([first, second].join(&b'\n'), |joined, line| [&joined, line].join(&b'\n'));
            let read = self.take_payload(&joined, payloads);
            return EditPoints { untold_error: read.untold_error, ..EditPoints::default() };
        }
        let first = first.trim_ascii();
        let offset = first.as_ptr().addr() - event.as_ptr().addr();
        let mut edit_points = self.take_payload(first, payloads);
        let ranges = edit_points.models.iter_mut().chain(&mut edit_points.null_usage);
        ranges.for_each(|range| *range = range.start + offset..range.end + offset);
        edit_points
    }

    fn take_payload(&mut self, payload: &[u8], payloads: &mut Payloads) -> EditPoints {
        let payload = payload.trim_ascii();
        if payload.is_empty() {
            return EditPoints::default();
        }
        self.events += 1;
        if payload == b"[DONE]" {
            self.done_seen = true;
            return EditPoints::default();
        }
        match payloads.read(payload) {
            Ok(read) => {
                let null_usage = read.null_usage.clone().map(|member| with_comma(payload, member));
                EditPoints { null_usage, ..self.add(read) }
            }
            Err(_) => {
                self.unread(payload.len() as u64);
                EditPoints::default()
            }
        }
    }

    /// Takes the facts of an event that was too long to be kept, or the bytes of its data when it could not be read. Nothing
    /// can be changed in it.
    fn take_long(&mut self, read: Result<Option<Payload>, u64>) -> EditPoints {
        self.events += u64::from(!matches!(read, Ok(None)));
        match read {
            Ok(Some(read)) => {
                let untold_error = self.add(read).untold_error;
                EditPoints { untold_error, ..EditPoints::default() }
            }
            Ok(None) => EditPoints::default(),
            Err(bytes) => {
                self.unread(bytes);
                EditPoints::default()
            }
        }
    }

    /// Adds what one payload says.
    fn add(&mut self, read: Payload) -> EditPoints {
        self.chunks += u64::from(read.deltas);
        self.content_bytes += read.content_bytes;
        if read.finished {
            // The last event of `/v1/responses` repeats all that was written, which may have come without deltas.
            self.content_bytes = self.content_bytes.max(read.output_bytes);
        }
        self.choices.0 |= read.begun;
        self.choices.1 |= read.ended;
        let all_ended = self.choices.1 != 0 && self.choices.0 & !self.choices.1 == 0;
        self.finished = all_ended || read.finished || (self.finished && self.choices.0 == 0);
        self.error_seen |= read.error;
        self.shown_completion = self.shown_completion.max(read.shown_completion);
        if self.implausible.is_none() {
            if let Err(found) = self.bounds.check(read.usage, read.most_tokens, self.content_bytes) {
                (self.reported, self.implausible) = (None, Some(found));
            } else if let Some(usage) = read.usage {
                self.reported = Some(self.reported.unwrap_or_default().then(usage));
            }
            self.usage = self.reported.and_then(|usage| usage.counted(self.content_bytes > 0));
        }
        let (usage_only, untold_error) = (read.usage_only(), read.untold_error());
        EditPoints { usage_only, untold_error, models: read.models, null_usage: None }
    }
}

/// What could be changed in an event.
#[derive(Debug, Default)]
struct EditPoints {
    models: SmallVec<[Range<usize>; 2]>,
    usage_only: bool,
    /// The member `"usage": null`, with the comma that goes with it.
    null_usage: Option<Range<usize>>,
    /// It holds an error that clients of OpenAI's API would not find or not read.
    untold_error: Option<UntoldError>,
}

/// A member of an object with one of the commas beside it, so that the rest is JSON without it.
fn with_comma(text: &[u8], member: Range<usize>) -> Range<usize> {
    let is_blank = |byte: &&u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    let blank = |at: usize| at + text[at..].iter().take_while(is_blank).count();
    let comma = blank(member.end);
    if text.get(comma) == Some(&b',') {
        return member.start..blank(comma + 1);
    }
    let before = member.start - text[..member.start].iter().rev().take_while(is_blank).count();
    match text[..before].last() {
        Some(b',') => before - 1..member.end,
        _ => member,
    }
}

/// Whether an answer is an error, whatever its status says.
pub fn is_error_body(body: &[u8]) -> bool {
    is_error_object(body).is_ok_and(|error| error)
}

/// Whether a JSON object is an error: one with an `error` that has something in it. An empty one beside an answer is none.
///
/// # Errors
/// When the text is not one JSON object, with all of it checked.
pub fn is_error_object(body: &[u8]) -> Result<bool, Fault> {
    ReadAnswer::of_any(body).map(|read| read.is_error)
}

/// What a complete answer says, read in one pass.
#[derive(Debug, Default)]
pub struct ReadAnswer {
    /// It is an error, as [`is_error_object`] says.
    pub is_error: bool,
    /// Where it names its model.
    pub models: ModelNames,
    lists: Lists,
    usage: Option<Usage>,
    /// The largest count in it.
    most_tokens: u64,
    /// Bytes that the model wrote.
    written: u64,
}

impl ReadAnswer {
    /// Reads an answer of this endpoint, in the dialect of the backend. White space around it is allowed.
    ///
    /// # Errors
    /// When the text is not one JSON object, with all of it checked.
    pub fn of(body: &[u8], kind: RouteKind, dialect: Dialect) -> Result<Self, Fault> {
        Self::read(body, Endpoint::Of(kind), dialect)
    }

    /// Reads an object of any endpoint: whether it is an error, and where it names its model.
    fn of_any(body: &[u8]) -> Result<Self, Fault> {
        Self::read(body, Endpoint::Any, Dialect::OpenAi)
    }

    fn read(body: &[u8], endpoint: Endpoint, dialect: Dialect) -> Result<Self, Fault> {
        let blank = body.len() - body.trim_ascii_start().len();
        let mut read = Payload::read(body.trim_ascii(), endpoint, dialect)?;
        read.models.iter_mut().for_each(|range| *range = range.start + blank..range.end + blank);
        Ok(Self {
            is_error: read.error,
            models: ModelNames(read.models),
            lists: read.lists,
            usage: read.usage,
            most_tokens: read.most_tokens,
            written: read.content_bytes.max(read.output_bytes),
        })
    }

    /// Whether a member of this name is an array: one of those that tell the answers of an endpoint.
    pub fn has_list(&self, name: &str) -> bool {
        self.lists.contains(name)
    }

    /// The usage that it reports. It has `bytes` bytes.
    ///
    /// # Errors
    /// A report that cannot be true.
    pub fn usage(&self, bytes: usize, bounds: &UsageBounds) -> Result<Option<Usage>, Implausible> {
        bounds.check(self.usage, self.most_tokens, bytes as u64)?;
        Ok(self.usage.and_then(|usage| usage.counted(self.written > 0)))
    }

    /// Its tokens as counted here: those of its text, or of all its bytes where no text is found in it. An answer of the
    /// embeddings endpoint has none.
    pub fn completion_estimate(&self, bytes: usize, kind: RouteKind) -> u64 {
        match (kind, self.written) {
            (RouteKind::Embeddings, _) => 0,
            (_, 0) => (bytes as u64).div_ceil(BYTES_PER_TOKEN),
            (_, written) => written.div_ceil(BYTES_PER_TOKEN),
        }
    }
}

/// Where a complete answer names its model.
#[derive(Debug, Default)]
pub struct ModelNames(SmallVec<[Range<usize>; 2]>);

impl ModelNames {
    /// Those of an answer; none in what is no JSON object.
    pub fn of(body: &[u8]) -> Self {
        ReadAnswer::of_any(body).unwrap_or_default().models
    }

    /// The answer with the model named as the client named it; shared when nothing changes.
    pub fn renamed(&self, body: &Bytes, client_model: &str) -> Bytes {
        let is_plain = !client_model.contains(['"', '\\']) && !client_model.contains(char::is_control);
        let is_named = |range: &Range<usize>| {
            is_plain && body.get(range.start + 1..range.end - 1) == Some(client_model.as_bytes())
        };
        if self.0.iter().all(is_named) {
            return body.clone();
        }
        let quoted = quoted(client_model);
        let other = self.0.iter().filter(|range| body[(*range).clone()] != *quoted.as_bytes());
        let edits: SmallVec<[Edit; 2]> =
            other.map(|range| Edit::new(range.clone(), quoted.clone())).collect();
        if edits.is_empty() { body.clone() } else { splice(body, &edits) }
    }
}
