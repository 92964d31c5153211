use bytes::Bytes;
use weir_gateway::api::usage::UsageBounds;
use weir_gateway::api::response::{RewritePlan, Rewriter, StreamFacts, begins_with_error};
use weir_gateway::api::sse::{EVENT_BYTES_MAX, Events};

use crate::input::{Input, chunks};

const MODEL: &str = "the-clients-name-of-the-model";
/// What may come behind a stream: an end of the last event, and the last one.
const DONE: &[u8] = b"\n\ndata: [DONE]\n\n";
/// Names in one event that are written anew, at the most.
const NAMES_MAX: usize = 8;

/// Output and facts of a stream do not depend on how it is cut; without a change to make it passes as it is; and what is
/// added is bounded by the number of its events.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (flags, seed) = (input.byte(), input.byte());
    let bytes = input.rest();
    begins_with_error(bytes);
    let plan = RewritePlan {
        rename_model: (flags & 1 != 0).then(|| MODEL.to_owned()),
        drop_usage_chunk: flags & 2 != 0,
        append_done: flags & 4 != 0,
        bounds: UsageBounds::default(),
    };
    let (whole, facts) = rewrite(&plan, [bytes].into_iter());
    assert_eq!((whole.clone(), facts.clone()), rewrite(&plan, chunks(bytes, seed).into_iter()));
    if flags & 3 == 0 {
        assert!(whole.starts_with(bytes) && DONE.ends_with(&whole[bytes.len()..]), "it was changed");
    }
    let mut events = Events::default();
    let (mut count, mut again) = (0, Vec::with_capacity(bytes.len()));
    let mut take = |piece: weir_gateway::api::sse::Piece<'_>| {
        count += 1;
        again.extend_from_slice(piece.bytes());
    };
    events.feed(bytes, &mut take);
    assert!(events.carried() <= EVENT_BYTES_MAX);
    events.finish(&mut take);
    assert_eq!(again, bytes, "the pieces are not the stream");
    let most = bytes.len() + DONE.len() + count * NAMES_MAX * (MODEL.len() + 2);
    assert!(whole.len() <= most, "{} bytes became {}", bytes.len(), whole.len());
    if let Some(usage) = facts.usage {
        let bounds = UsageBounds::default();
        assert!(usage.prompt.unwrap_or(0) <= bounds.prompt);
        assert!(usage.completion.unwrap_or(0) <= bounds.completion.max(facts.content_bytes));
        assert!(facts.implausible.is_none());
    }
    assert!(facts.completion_estimate() <= bytes.len() as u64);
}

fn rewrite<'a>(plan: &RewritePlan, chunks: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, StreamFacts) {
    let mut rewriter = Rewriter::new(plan.clone());
    let mut out = Vec::new();
    for chunk in chunks {
        out.extend_from_slice(&rewriter.push(Bytes::copy_from_slice(chunk)));
    }
    out.extend_from_slice(&rewriter.finish());
    (out, rewriter.facts().clone())
}
