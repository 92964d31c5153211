//! The stream as the client is to see it.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use serde_json::Value;
use smallvec::SmallVec;
use weir_proto::resource::Dialect;

use super::endpoint::Endpoint;
use super::long_event::LongEvent;
use super::payload::UntoldError;
use super::repeated::Payloads;
use super::{EditPoints, StreamFacts};
use crate::api::json_edit::quoted;
use crate::api::request::RouteKind;
use crate::api::sse::{Events, MARK, Piece, data_lines};
use crate::api::upstream_error;
use crate::api::usage::{Usage, UsageBounds};

/// What must be changed in a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RewritePlan {
    /// The endpoint that answers: it says where the facts stand.
    pub kind: RouteKind,
    /// The dialect of the backend: it says what its usage means.
    pub dialect: Dialect,
    /// The model name the client is to see, whatever the upstream says: some engines echo a third name. Not written into
    /// events longer than [`EVENT_BYTES_MAX`](crate::api::sse::EVENT_BYTES_MAX).
    pub rename_model: Option<String>,
    /// Drop the event that only carries usage, since the client did not ask for it, and `"usage": null` from all others. Usage
    /// that rides on another event stays.
    pub drop_usage_chunk: bool,
    /// Add `[DONE]` when the upstream finished without. Not for `/v1/responses`, which has none.
    pub append_done: bool,
    /// How many tokens the upstream may say it used.
    pub bounds: UsageBounds,
    /// The client asked for usage, and some engines send none all the same (llama.cpp's server among them), or in a place or
    /// under names that are not the API's: then a chunk with what they count, or else our own count, is put in the API's
    /// place for it, before `[DONE]`.
    pub missing_usage: Option<MissingUsage>,
}

/// What a chunk with usage is made of when the upstream sends none that clients read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MissingUsage {
    /// The chunk up to the value of `usage`, without the closing brace.
    head: String,
    /// Tokens of the prompt, as counted here.
    prompt_tokens: u64,
}

impl MissingUsage {
    /// For a stream that begins with `first`, of which the chunk takes over id and time. `model` is the client's name.
    pub fn new(first: &[u8], kind: RouteKind, model: &str, prompt_tokens: u64) -> Self {
        let begun: Value =
            data_lines(first).find_map(|line| serde_json::from_slice(line).ok()).unwrap_or_default();
        let object = match kind {
            RouteKind::Completions => "text_completion",
            _ => "chat.completion.chunk",
        };
        let (id, created, model) = (&begun["id"], &begun["created"], quoted(model));
        let head = format!(
            r#"{{"id":{id},"object":"{object}","created":{created},"model":{model},"choices":[],"usage":"#
        );
        Self { head, prompt_tokens }
    }

    /// The chunk, with `counted` where the upstream reported nothing.
    pub(super) fn event(&self, reported: Option<Usage>, counted: u64) -> String {
        let usage = reported.unwrap_or_default();
        let prompt = usage.prompt.unwrap_or(self.prompt_tokens);
        let output = usage.completion.unwrap_or(counted);
        let (head, total) = (&self.head, prompt.saturating_add(output));
        let details = |whole: &str, part: &str, count: u64| match count {
            0 => String::new(),
            count => format!(r#","{whole}_tokens_details":{{"{part}_tokens":{count}}}"#),
        };
        let cached = details("prompt", "cached", usage.cache_read);
        let reasoning = details("completion", "reasoning", usage.reasoning);
        format!(
            "data: {head}{{\"prompt_tokens\":{prompt},\"completion_tokens\":{output},\"total_tokens\":{total}{cached}{reasoning}}}}}\n\n"
        )
    }
}

/// Reads the facts of a stream, and rewrites it where the plan asks for it.
#[derive(Debug)]
pub struct Rewriter {
    /// Bytes of the byte order mark that have come; `None` once something else has.
    mark: Option<usize>,
    events: Events,
    reading: Reading,
    quoted_model: Option<String>,
    drop_usage_chunk: bool,
    append_done: bool,
    /// The last event was dropped, and so must be an LF that still belongs to it.
    dropped: bool,
    /// The stream says that it is over by an event of its own, and not by `[DONE]`.
    ends_by_event: bool,
    missing_usage: Option<MissingUsage>,
    /// Where chunks are changed: its memory is used again once a chunk has been sent.
    spare: BytesMut,
}

/// Memory of a larger chunk is not kept for the next one.
const SPARE_BYTES_MAX: usize = 16 << 10;
/// Room for names somewhat longer than the upstream's.
const LONGER_NAMES_BYTES: usize = 64;

impl Rewriter {
    /// Starts a stream.
    pub fn new(plan: RewritePlan) -> Self {
        Self {
            mark: Some(0),
            events: Events::default(),
            reading: Reading {
                payloads: Payloads::new(Endpoint::Of(plan.kind), plan.dialect),
                facts: StreamFacts { bounds: plan.bounds, ..StreamFacts::default() },
                long: None,
                error_event: None,
            },
            quoted_model: plan.rename_model.as_deref().map(quoted),
            drop_usage_chunk: plan.drop_usage_chunk,
            append_done: plan.append_done,
            dropped: false,
            ends_by_event: plan.kind == RouteKind::Responses,
            missing_usage: plan.missing_usage,
            spare: BytesMut::new(),
        }
    }

    /// Whether the stream is over by what it said: `[DONE]`, an error, or the last event of an endpoint that has no `[DONE]`.
    /// Bytes after that event are dropped.
    pub fn is_over(&self) -> bool {
        is_over(&self.reading.facts, self.ends_by_event)
    }

    /// Whether the beginning of an event was given whose end has not come.
    pub fn is_inside_event(&self) -> bool {
        self.reading.long.is_some()
    }

    /// What is known so far.
    pub fn facts(&self) -> &StreamFacts {
        &self.reading.facts
    }

    /// For the caller to note when content was first seen.
    pub fn facts_mut(&mut self) -> &mut StreamFacts {
        &mut self.reading.facts
    }

    /// Takes a chunk of the upstream and gives the bytes to send, which may be none.
    ///
    /// Without a change to make, the very chunk is given back at once. With a model to rename or a chunk to drop, an
    /// event waits until it is whole; what comes out is still the same memory unless something in it changed.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        if self.is_over() {
            return Bytes::new();
        }
        let chunk = self.without_mark(chunk);
        let out = self.pass(chunk);
        match self.reading.error_event.take() {
            Some(event) => [&out[..], event.as_bytes()].concat().into(),
            None => out,
        }
    }

    /// The chunk without the byte order mark that a stream may begin with: clients take it for a part of the first field's
    /// name, and lose the event.
    fn without_mark(&mut self, chunk: Bytes) -> Bytes {
        let Some(seen) = self.mark else { return chunk };
        let rest = &MARK[seen..];
        let same = chunk.iter().zip(rest).take_while(|(byte, of_mark)| byte == of_mark).count();
        self.mark = None;
        if same == rest.len() {
            chunk.slice(same..)
        } else if same == chunk.len() {
            self.mark = Some(seen + same);
            Bytes::new()
        } else if seen == 0 {
            chunk
        } else {
            // It is none: what was held back goes first.
            [&MARK[..seen], &chunk[..]].concat().into()
        }
    }

    fn pass(&mut self, chunk: Bytes) -> Bytes {
        let ends_by_event = self.ends_by_event;
        let (reading, quoted) = (&mut self.reading, self.quoted_model.as_deref());
        let missing = self.missing_usage.as_ref();
        if quoted.is_none() && !self.drop_usage_chunk && missing.is_none() {
            let (mut after, mut crlf) = (0, false);
            self.events.feed(&chunk, |piece| match is_over(&reading.facts, ends_by_event) {
                true => after += piece.bytes().len(),
                false => {
                    crlf = lacks_lf(piece);
                    drop(reading.observe(piece));
                }
            });
            if self.is_over() {
                // What is carried came after the end, with this chunk.
                let end = chunk.len() - after - self.events.carried();
                return with_lf(chunk.slice(..end), crlf);
            }
            return chunk;
        }
        let mut out = Out::new(&chunk, &mut self.spare);
        if self.events.carried() > 0 {
            out.copy(self.events.carried());
        }
        let (drop_usage, dropped) = (self.drop_usage_chunk, &mut self.dropped);
        let mut crlf = false;
        self.events.feed(&chunk, |piece| match is_over(&reading.facts, ends_by_event) {
            true => out.cut(),
            false => {
                crlf = lacks_lf(piece);
                if missing.is_some() && is_done(piece) {
                    out.insert(reading.usage_event(missing));
                }
                out.piece(reading, quoted, drop_usage, dropped, piece);
            }
        });
        let out = if out.copied { self.changed() } else { chunk.slice(..out.same) };
        with_lf(out, crlf && self.is_over())
    }

    /// What was written in place of a chunk.
    fn changed(&mut self) -> Bytes {
        let out = self.spare.split().freeze();
        if out.len() > SPARE_BYTES_MAX {
            self.spare = BytesMut::new();
        }
        out
    }

    /// The upstream closed its stream cleanly: gives what is still held, and `[DONE]` where one is due.
    ///
    /// Not to be called after a failure, since a failed answer must not look finished.
    pub fn finish(&mut self) -> Bytes {
        if self.is_over() {
            return Bytes::new();
        }
        let (reading, quoted) = (&mut self.reading, self.quoted_model.as_deref());
        let (drop_usage, dropped) = (self.drop_usage_chunk, &mut self.dropped);
        let held = quoted.is_some() || drop_usage || self.missing_usage.is_some();
        let (boundary, is_sent_in_part) = (self.events.at_boundary(), !held || reading.long.is_some());
        let missing = self.missing_usage.as_ref();
        let mut out = Out { is_last: true, ..Out::new(&[], &mut self.spare) };
        out.copy(self.events.carried());
        self.events.finish(|piece| {
            if missing.is_some() && is_done(piece) {
                out.insert(reading.usage_event(missing));
            }
            if held {
                out.piece(reading, quoted, drop_usage, dropped, piece);
            } else {
                drop(reading.observe(piece));
            }
        });
        let out = &mut self.spare;
        // Clients do not take up an event before the empty line that ends it.
        if !boundary && (!out.is_empty() || is_sent_in_part) {
            out.extend_from_slice(b"\n\n");
        }
        out.extend_from_slice(self.reading.error_event.take().unwrap_or_default().as_bytes());
        if self.append_done && self.reading.facts.complete() && !self.reading.facts.done_seen {
            out.extend_from_slice(self.reading.usage_event(missing).unwrap_or_default().as_bytes());
            out.extend_from_slice(b"data: [DONE]\n\n");
            self.reading.facts.done_seen = true;
        }
        self.changed()
    }
}

/// What goes out for one chunk: a prefix of it for as long as nothing changed, a copy from then on.
struct Out<'a> {
    chunk: &'a [u8],
    same: usize,
    /// Whether `spare` is what goes out.
    copied: bool,
    spare: &'a mut BytesMut,
    /// The stream has ended: what cannot be read is the beginning of an event, and clients that read it fail by it.
    is_last: bool,
}

impl<'a> Out<'a> {
    fn new(chunk: &'a [u8], spare: &'a mut BytesMut) -> Self {
        Self { chunk, same: 0, copied: false, spare, is_last: false }
    }

    /// From here on a copy goes out; so many bytes besides the chunk will be in it.
    fn copy(&mut self, besides: usize) {
        self.copied = true;
        self.spare.reserve(besides + self.chunk.len() + LONGER_NAMES_BYTES);
        self.spare.extend_from_slice(&self.chunk[..self.same]);
    }

    fn piece(
        &mut self,
        reading: &mut Reading,
        quoted: Option<&str>,
        drop_usage: bool,
        dropped: &mut bool,
        piece: Piece<'_>,
    ) {
        let (events, unread) = (reading.facts.events, reading.facts.unread_events);
        let edit_points = reading.observe(piece);
        let was_read = reading.facts.events > events && reading.facts.unread_events == unread;
        if !was_read && (self.is_last || is_without_data(piece)) {
            self.changed();
            *dropped = true;
            return;
        }
        let bytes = piece.bytes();
        if edit_points.untold_error == Some(UntoldError::AtTop) && matches!(piece, Piece::Event(_)) {
            self.changed();
            return;
        }
        if !matches!(piece, Piece::Tail(_)) {
            *dropped = drop_usage && edit_points.usage_only;
        }
        if *dropped {
            self.changed();
            return;
        }
        let edits = edits(bytes, edit_points, quoted, drop_usage);
        if edits.is_empty() && !self.copied {
            self.same += bytes.len();
            return;
        }
        let (out, mut from) = (self.changed(), 0);
        for (range, with) in edits {
            out.extend_from_slice(&bytes[from..range.start]);
            out.extend_from_slice(with.as_bytes());
            from = range.end;
        }
        out.extend_from_slice(&bytes[from..]);
    }

    /// Puts an event before the next piece.
    fn insert(&mut self, event: Option<String>) {
        if let Some(event) = event {
            self.changed().extend_from_slice(event.as_bytes());
        }
    }

    /// Drops a piece, and those after it.
    fn cut(&mut self) {
        self.changed();
    }

    fn changed(&mut self) -> &mut BytesMut {
        if !self.copied {
            self.copy(0);
        }
        self.spare
    }
}

/// The changes of an event, in its order: the client's name of the model, and no `"usage": null` where the client did not ask
/// for usage.
fn edits<'a>(
    event: &[u8],
    found: EditPoints,
    quoted: Option<&'a str>,
    drop_usage: bool,
) -> SmallVec<[(Range<usize>, &'a str); 3]> {
    let EditPoints { models, null_usage, .. } = found;
    let mut edits: SmallVec<[(Range<usize>, &str); 3]> = SmallVec::new();
    if let Some(quoted) = quoted {
        let other = models.into_iter().filter(|range| event[range.clone()] != *quoted.as_bytes());
        edits.extend(other.map(|range| (range, quoted)));
    }
    if let Some(range) = null_usage.filter(|_| drop_usage) {
        let at = edits.iter().position(|(other, _)| other.start > range.start);
        edits.insert(at.unwrap_or(edits.len()), (range, ""));
    }
    edits
}

/// Whether this is an event without data, and no comment.
fn is_without_data(piece: Piece<'_>) -> bool {
    let Piece::Event(event) = piece else { return false };
    let mut lines = event.split(|b| matches!(b, b'\n' | b'\r'));
    data_lines(event).all(|line| line.trim_ascii().is_empty())
        && lines.any(|line| !line.is_empty() && !line.starts_with(b":"))
}

/// Whether this is the event that ends a stream.
fn is_done(piece: Piece<'_>) -> bool {
    const DONE_BYTES_MAX: usize = 64;
    let Piece::Event(event) = piece else { return false };
    event.len() <= DONE_BYTES_MAX && data_lines(event).any(|line| line.trim_ascii() == b"[DONE]")
}

/// Whether the LF of the event's last line end is still to come, in a stream whose lines end with CRLF.
fn lacks_lf(piece: Piece<'_>) -> bool {
    matches!(piece, Piece::Event(event) if event.ends_with(b"\r\n\r"))
}

/// The last bytes of a stream; with the LF that its last line end lacks, since nothing is read after them.
fn with_lf(last: Bytes, lacks_lf: bool) -> Bytes {
    match lacks_lf {
        true => [&last[..], b"\n"].concat().into(),
        false => last,
    }
}

fn is_over(facts: &StreamFacts, ends_by_event: bool) -> bool {
    facts.done_seen || facts.error_seen || (ends_by_event && facts.finished)
}

/// What is read of a stream, and how.
#[derive(Debug)]
struct Reading {
    payloads: Payloads,
    facts: StreamFacts,
    /// The event that is too long to be kept, while it passes.
    long: Option<Box<LongEvent>>,
    /// What is to be sent after an error that clients would not find.
    error_event: Option<String>,
}

impl Reading {
    /// The chunk with the usage, for a stream that finished without one that the client reads.
    fn usage_event(&self, missing: Option<&MissingUsage>) -> Option<String> {
        let facts = &self.facts;
        let wanted = facts.finished && !facts.error_seen && !facts.usage_shown();
        missing.filter(|_| wanted).map(|missing| missing.event(facts.usage, facts.completion_estimate()))
    }

    fn observe(&mut self, piece: Piece<'_>) -> EditPoints {
        let edit_points = self.read(piece);
        if edit_points.untold_error.is_some() {
            let event = match piece {
                Piece::Event(event) => event,
                Piece::Part { .. } | Piece::Tail(_) => &[],
            };
            let payload = data_lines(event).collect::<Vec<_>>().join(&b'\n');
            self.error_event = Some(format!("data: {}\n\n", upstream_error::in_stream(&payload)));
        }
        edit_points
    }

    fn read(&mut self, piece: Piece<'_>) -> EditPoints {
        match piece {
            Piece::Event(event) => self.facts.take(event, &mut self.payloads),
            Piece::Part { bytes, last } => {
                let begin = || Box::new(LongEvent::new(self.payloads.reader()));
                let long = self.long.get_or_insert_with(begin);
                self.facts.content_bytes += long.feed(bytes);
                match self.long.take_if(|_| last) {
                    Some(long) => self.facts.take_long(long.finish()),
                    None => EditPoints::default(),
                }
            }
            Piece::Tail(_) => EditPoints::default(),
        }
    }
}
