use bytes::Bytes;
use weir_gateway::api::request::RouteKind;
use weir_gateway::api::usage::UsageBounds;
use weir_gateway::api::response::{RewritePlan, Rewriter, StreamFacts};
use weir_gateway::api::sse::{EVENT_BYTES_MAX, Events, MARK};

use weir_proto::resource::Dialect;

use crate::input::{Input, chunks};

const KINDS: [RouteKind; 4] =
    [RouteKind::ChatCompletions, RouteKind::Completions, RouteKind::Embeddings, RouteKind::Responses];

const MODEL: &str = "the-clients-name-of-the-model";
/// What may come behind a stream: an end of the last event, and the last one.
const DONE: &[u8] = b"\n\ndata: [DONE]\n\n";
/// How an error begins that is told once more.
const ERROR: &[u8] = b"data: {\"error\":{";
/// And how long it may be.
const ERROR_BYTES_MAX: usize = 8 << 10;
/// Names in one event that are written anew, at the most.
const NAMES_MAX: usize = 8;

/// Output and facts of a stream do not depend on how it is cut; without a change to make it passes as it is, without its byte
/// order mark and up to its last event, an error told once more; and what is added is bounded by the number of its events.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (flags, seed) = (input.byte(), input.byte());
    let bytes = input.rest();
    let plan = RewritePlan {
        kind: KINDS[usize::from(flags >> 3 & 3)],
        dialect: Dialect::ALL[usize::from(flags >> 5) * 2],
        rename_model: (flags & 1 != 0).then(|| MODEL.to_owned()),
        drop_usage_chunk: flags & 2 != 0,
        append_done: flags & 4 != 0,
        bounds: UsageBounds::default(),
        missing_usage: None,
    };
    let (whole, facts) = rewrite(&plan, [bytes].into_iter());
    assert_eq!((whole.clone(), facts.clone()), rewrite(&plan, chunks(bytes, seed).into_iter()));
    if flags & 3 == 0 {
        let bytes = bytes.strip_prefix(MARK).unwrap_or(bytes);
        let completed = || whole.starts_with(bytes) && DONE.ends_with(&whole[bytes.len()..]);
        let begins = |end: usize| {
            let head = &whole[..end];
            let ends = [head, head.strip_suffix(b"\n").unwrap_or(head), head.strip_suffix(b"\n\n").unwrap_or(head)];
            ends.iter().any(|head| bytes.starts_with(head))
        };
        let told = whole.windows(ERROR.len()).rposition(|window| window == ERROR).filter(|_| facts.error_seen);
        assert!(begins(whole.len()) || completed() || told.is_some_and(begins), "it was changed");
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
    let most = bytes.len() + DONE.len() + ERROR_BYTES_MAX + count * NAMES_MAX * (MODEL.len() + 2);
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
