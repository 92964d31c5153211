//! The stream as the client is to see it.

use bytes::Bytes;

use super::{EditPoints, StreamFacts, rename};
use crate::api::json_edit::quoted;
use crate::api::sse::{Events, Piece};
use crate::api::usage::UsageBounds;

/// What must be changed in a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RewritePlan {
    /// The model name the client is to see, whatever the upstream says: some engines echo a third name.
    pub rename_model: Option<String>,
    /// Drop the event that only carries usage, since the client did not ask for it. Usage that rides on another
    /// event stays.
    pub drop_usage_chunk: bool,
    /// Add `[DONE]` when the upstream finished without. Not for `/v1/responses`, which has none.
    pub append_done: bool,
    /// How many tokens the upstream may say it used.
    pub bounds: UsageBounds,
}

/// Reads the facts of a stream, and rewrites it where the plan asks for it.
#[derive(Debug)]
pub struct Rewriter {
    events: Events,
    facts: StreamFacts,
    quoted_model: Option<String>,
    drop_usage_chunk: bool,
    append_done: bool,
    /// The last event was dropped, and so must be an LF that still belongs to it.
    dropped: bool,
}

impl Rewriter {
    /// Starts a stream.
    pub fn new(plan: RewritePlan) -> Self {
        Self {
            events: Events::default(),
            facts: StreamFacts { bounds: plan.bounds, ..StreamFacts::default() },
            quoted_model: plan.rename_model.as_deref().map(quoted),
            drop_usage_chunk: plan.drop_usage_chunk,
            append_done: plan.append_done,
            dropped: false,
        }
    }

    /// What is known so far.
    pub fn facts(&self) -> &StreamFacts {
        &self.facts
    }

    /// For the caller to note when content was first seen.
    pub fn facts_mut(&mut self) -> &mut StreamFacts {
        &mut self.facts
    }

    /// Takes a chunk of the upstream and gives the bytes to send, which may be none.
    ///
    /// Without a change to make, the very chunk is given back at once. With a model to rename or a chunk to drop, an
    /// event waits until it is whole; what comes out is still the same memory unless something in it changed.
    pub fn push(&mut self, chunk: Bytes) -> Bytes {
        let (facts, quoted) = (&mut self.facts, self.quoted_model.as_deref());
        if quoted.is_none() && !self.drop_usage_chunk {
            self.events.feed(&chunk, |piece| drop(observe(facts, piece)));
            return chunk;
        }
        let mut out = Out { copy: (self.events.carried() > 0).then(Vec::new), same: 0, chunk: &chunk };
        let (drop_usage, dropped) = (self.drop_usage_chunk, &mut self.dropped);
        self.events.feed(&chunk, |piece| out.piece(facts, quoted, drop_usage, dropped, piece));
        match out.copy {
            Some(copy) => Bytes::from(copy),
            None => chunk.slice(..out.same),
        }
    }

    /// The upstream closed its stream cleanly: gives what is still held, and `[DONE]` where one is due.
    ///
    /// Not to be called after a failure, since a failed answer must not look finished.
    pub fn finish(&mut self) -> Bytes {
        let (facts, quoted) = (&mut self.facts, self.quoted_model.as_deref());
        let (drop_usage, dropped) = (self.drop_usage_chunk, &mut self.dropped);
        let held = quoted.is_some() || drop_usage;
        let boundary = self.events.at_boundary();
        let mut out = Out { copy: Some(Vec::new()), same: 0, chunk: &[] };
        self.events.finish(|piece| {
            if held {
                out.piece(facts, quoted, drop_usage, dropped, piece);
            } else {
                drop(observe(facts, piece));
            }
        });
        let mut copy = out.copy.unwrap_or_default();
        if self.append_done && self.facts.finished && !self.facts.done_seen && !self.facts.error_seen {
            if !boundary {
                copy.extend_from_slice(b"\n\n");
            }
            copy.extend_from_slice(b"data: [DONE]\n\n");
            self.facts.done_seen = true;
        }
        Bytes::from(copy)
    }
}

/// What goes out for one chunk: a prefix of it for as long as nothing changed, a copy from then on.
struct Out<'a> {
    copy: Option<Vec<u8>>,
    same: usize,
    chunk: &'a [u8],
}

impl Out<'_> {
    fn piece(
        &mut self,
        facts: &mut StreamFacts,
        quoted: Option<&str>,
        drop_usage: bool,
        dropped: &mut bool,
        piece: Piece<'_>,
    ) {
        let edit_points = observe(facts, piece);
        let bytes = piece.bytes();
        if !matches!(piece, Piece::Tail(_)) {
            *dropped = drop_usage && edit_points.usage_only;
        }
        if *dropped {
            self.changed();
            return;
        }
        match quoted.and_then(|quoted| rename(bytes, &edit_points.models, quoted)) {
            Some(renamed) => self.changed().extend_from_slice(&renamed),
            None => match &mut self.copy {
                Some(copy) => copy.extend_from_slice(bytes),
                None => self.same += bytes.len(),
            },
        }
    }

    fn changed(&mut self) -> &mut Vec<u8> {
        let (chunk, same) = (self.chunk, self.same);
        self.copy.get_or_insert_with(|| {
            // Room for a name somewhat longer than the upstream's.
            let mut copy = Vec::with_capacity(chunk.len() + 64);
            copy.extend_from_slice(&chunk[..same]);
            copy
        })
    }
}

fn observe(facts: &mut StreamFacts, piece: Piece<'_>) -> EditPoints {
    match piece {
        Piece::Event(event) => facts.take(event),
        Piece::Part { bytes, last } => {
            facts.unread(bytes.len(), last);
            EditPoints::default()
        }
        Piece::Tail(_) => EditPoints::default(),
    }
}
