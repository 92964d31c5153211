//! What backends of all dialects send, and the facts that are read of it. Written after their documents and sources; the
//! streams are in `golden/*.sse`, their facts in `golden/streams.jsonl`, the usage objects in `golden/usages.rs`. The test
//! with OpenAI's SDK (`tests/sdk/test_golden.py`) sends the same streams and reads the same table.

mod usages;

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;

use bytes::Bytes;
use serde_json::Value;
use weir_proto::resource::Dialect::{self, *};

use super::*;
use crate::api::request::RouteKind::{self, *};

/// The facts of a stream.
#[derive(Debug, PartialEq)]
struct Expected {
    /// Events with data.
    events: u64,
    /// Prompt, of it from the cache and to it; answer, of it reasoning.
    usage: Option<[u64; 5]>,
    /// Deltas with content and its bytes.
    content: (u64, u64),
    /// Of `f`inished, `d`one and `e`rror those that were seen.
    seen: String,
}

fn expect(events: u64, usage: Option<[u64; 5]>, content: (u64, u64), seen: &str) -> Expected {
    Expected { events, usage, content, seen: seen.to_owned() }
}

/// A row of `streams.jsonl`. What it names in `seen` says how the stream ends for a client too: one with an `e` holds an
/// error, one with nothing is cut, and the others are good.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// Of its file.
    name: String,
    endpoint: String,
    /// As resources name it.
    dialect: String,
    events: u64,
    usage: Option<[u64; 5]>,
    deltas: u64,
    bytes: u64,
    seen: String,
    /// What the client is told of the error.
    #[serde(default)]
    error: Option<String>,
}

impl Row {
    fn expected(&self) -> Expected {
        expect(self.events, self.usage, (self.deltas, self.bytes), &self.seen)
    }

    fn kind(&self) -> RouteKind {
        match self.endpoint.as_str() {
            "chat_completions" => ChatCompletions,
            "completions" => Completions,
            "responses" => Responses,
            other => panic!("{}: no endpoint {other}", self.name),
        }
    }

    fn dialect(&self) -> Dialect {
        let name = self.dialect.replace('_', "");
        let found = Dialect::ALL.into_iter().find(|dialect| format!("{dialect:?}").to_lowercase() == name);
        found.unwrap_or_else(|| panic!("{}: no dialect {name}", self.name))
    }

    fn text(&self) -> Vec<u8> {
        std::fs::read(folder().join(format!("{}.sse", self.name))).expect("its stream")
    }
}

fn folder() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src/api/response/golden"))
}

fn all() -> Vec<Row> {
    let row = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    include_str!("golden/streams.jsonl").lines().map(row).collect()
}

fn read<'a>(
    kind: RouteKind,
    dialect: Dialect,
    chunks: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<u8>, StreamFacts) {
    let plan = RewritePlan { kind, dialect, rename_model: Some("mine".into()), ..RewritePlan::default() };
    rewritten(&plan, chunks)
}

fn rewritten<'a>(plan: &RewritePlan, chunks: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, StreamFacts) {
    let mut rewriter = Rewriter::new(plan.clone());
    let mut out = Vec::new();
    for chunk in chunks {
        out.extend_from_slice(&rewriter.push(Bytes::copy_from_slice(chunk)));
    }
    out.extend_from_slice(&rewriter.finish());
    (out, rewriter.facts().clone())
}

fn facts(facts: &StreamFacts) -> Expected {
    let usage = facts.usage.map(|usage| {
        let [prompt, completion] = [usage.prompt, usage.completion].map(|count| count.unwrap_or(u64::MAX));
        [prompt, usage.cache_read, usage.cache_write, completion, usage.reasoning]
    });
    let seen = [(facts.finished, 'f'), (facts.done_seen, 'd'), (facts.error_seen, 'e')];
    let seen = seen.into_iter().filter_map(|(is, letter)| is.then_some(letter)).collect();
    Expected { events: facts.events, usage, content: (facts.chunks, facts.content_bytes), seen }
}

/// What a client gets of a stream: the model's name is its own, nothing comes before the first field or after an error.
fn passed(row: &Row, text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text).trim_start_matches('\u{feff}').to_owned();
    // Events without data are not for clients.
    let is_for_clients = |event: &&str| event.contains("data: ") || event.starts_with(':');
    let text: String = text.split_inclusive("\n\n").filter(is_for_clients).collect();
    let renamed = match row.name.as_str() {
        // The places of a payload over several lines are not those of the event.
        "split_payload" => text,
        _ => text.replace(r#""model":"up""#, r#""model":"mine""#),
    };
    let renamed = renamed.replace(r#""model":"""#, r#""model":"mine""#);
    match row.seen.contains('e') {
        true => renamed.trim_end_matches("data: [DONE]\n\n").to_owned(),
        false => renamed,
    }
}

/// The message of the last event, where clients of the endpoint look for an error.
fn told(kind: RouteKind, out: &str) -> Option<String> {
    let last = out.trim_end().rsplit("\n\n").next()?;
    let payload = last.lines().find_map(|line| line.strip_prefix("data: "))?;
    let event: Value = serde_json::from_str(payload).ok()?;
    let own = [&event["response"]["error"]["message"], &event["message"]];
    let own = if kind == Responses { &own[..] } else { &[] };
    let mut places = std::iter::once(&event["error"]["message"]).chain(own.iter().copied());
    places.find_map(Value::as_str).map(str::to_owned)
}

#[test]
fn every_stream_has_its_facts_however_it_is_cut() {
    for row in all() {
        let (name, text, expected) = (&row.name, row.text(), row.expected());
        let (kind, dialect) = (row.kind(), row.dialect());
        let whole = read(kind, dialect, [text.as_slice()]);
        assert_eq!(facts(&whole.1), expected, "{name}");
        assert_eq!((whole.1.unread_events, whole.1.implausible), (0, None), "{name}");
        assert_eq!(whole.1.complete(), !row.seen.is_empty() && !row.seen.contains('e'), "{name}");
        let out = String::from_utf8_lossy(&whole.0).into_owned();
        let passed = passed(&row, &text);
        assert_eq!(row.error.is_some(), row.seen.contains('e'), "{name}");
        if row.error.is_none() {
            assert_eq!(out, passed, "{name}");
        } else {
            let before = out.trim_end().rsplit_once("\n\n").map_or("", |(before, _)| before);
            assert!(passed.starts_with(before), "{name}: {out}");
            assert_eq!(told(kind, &out), row.error, "{name}: {out}");
        }
        for at in 0..=text.len() {
            assert_eq!(read(kind, dialect, [&text[..at], &text[at..]]), whole, "{name} cut at {at}");
        }
        assert_eq!(read(kind, dialect, text.chunks(1)), whole, "{name} byte by byte");
    }
}

/// The payloads of a stream, as what they mean.
fn payloads(text: &[u8]) -> Vec<serde_json::Value> {
    let (mut payloads, mut events) = (Vec::new(), crate::api::sse::Events::default());
    let mut take = |piece: crate::api::sse::Piece<'_>| {
        let lines: Vec<&[u8]> = data_lines(piece.bytes()).collect();
        if !lines.is_empty() {
            let text = lines.join(&b'\n');
            let text = text.trim_ascii();
            if text.is_empty() {
                return;
            }
            payloads
                .push(serde_json::from_slice(text).unwrap_or_else(|_| String::from_utf8_lossy(text).into()));
        }
    };
    events.feed(text, &mut take);
    events.finish(&mut take);
    payloads
}

/// What a client that did not ask for usage is to get of a stream: Weir did ask, and nobody else.
fn unasked(name: &str, text: &[u8], ended_by_error: bool) -> Vec<serde_json::Value> {
    let mut payloads = payloads(text);
    // An event in several lines passes as it is, and nothing passes after an error.
    if name != "split_payload" {
        payloads.retain(|payload| {
            let has_choices = payload["choices"].as_array().is_some_and(|choices| !choices.is_empty());
            !payload["usage"].is_object() || has_choices || payload.get("error").is_some()
        });
    }
    for payload in payloads.iter_mut().filter_map(serde_json::Value::as_object_mut) {
        if payload.get("usage").is_some_and(serde_json::Value::is_null) {
            payload.remove("usage");
        }
    }
    payloads.pop_if(|last| ended_by_error && *last == "[DONE]");
    payloads
}

#[test]
fn a_client_that_did_not_ask_for_usage_sees_nothing_of_it_however_a_stream_is_cut() {
    let mut had_null = 0;
    for row in all().into_iter().filter(|row| row.kind() != Responses) {
        let (name, text, is_error) = (&row.name, row.text(), row.error.is_some());
        let plan = RewritePlan {
            kind: row.kind(),
            dialect: row.dialect(),
            drop_usage_chunk: true,
            ..RewritePlan::default()
        };
        let whole = rewritten(&plan, [text.as_slice()]);
        assert_eq!(facts(&whole.1), row.expected(), "{name}: what is taken out is counted");
        let (mut sent, mut expected) = (payloads(&whole.0), unasked(name, &text, is_error));
        if is_error {
            // The error may be told in another form, in an event of its own.
            expected.pop();
            sent.truncate(expected.len());
        }
        assert_eq!(sent, expected, "{name}");
        let is_null = |payload: &serde_json::Value| payload.get("usage").is_some_and(|usage| usage.is_null());
        had_null += usize::from(payloads(&text).iter().any(is_null));
        for at in 0..=text.len() {
            assert_eq!(rewritten(&plan, [&text[..at], &text[at..]]), whole, "{name} cut at {at}");
        }
        assert_eq!(rewritten(&plan, text.chunks(1)), whole, "{name} byte by byte");
    }
    assert!(had_null >= 2, "{had_null}");
}

#[test]
fn there_are_streams_of_many_providers_and_each_has_its_row() {
    let all = all();
    let dialects: HashSet<Dialect> = all.iter().map(Row::dialect).collect();
    assert!(all.len() >= 20 && dialects.len() >= 12, "{dialects:?}");
    let files = std::fs::read_dir(folder()).expect("a folder").filter_map(|entry| {
        let name = entry.expect("readable").file_name().into_string().expect("UTF-8");
        name.strip_suffix(".sse").map(str::to_owned)
    });
    let files: BTreeSet<String> = files.collect();
    let rows: BTreeSet<String> = all.iter().map(|row| row.name.clone()).collect();
    assert!(rows == files && rows.len() == all.len(), "{rows:?} are not {files:?}");
}

/// A stream of `/v1/responses` whose events repeat so many bytes of instructions.
fn large(instructions: usize) -> String {
    let text = "You are an agent. ".repeat(instructions / 18 + 1);
    let response = |status: &str, usage: &str| {
        format!(
            r#"{{"id":"r","status":"{status}","error":null,"instructions":"{text}","model":"up","output":[{{"type":"message","content":[{{"type":"output_text","text":"Hi"}}]}}],"tools":[{{"usage":{{"output_tokens":9}},"error":{{"a":1}},"finish_reason":"stop"}}],"usage":{usage}}}"#
        )
    };
    let event = |kind: &str, rest: String| format!("event: {kind}\ndata: {{\"type\":\"{kind}\",{rest}}}\n\n");
    [
        event("response.created", format!("\"response\":{}", response("in_progress", "null"))),
        event("response.output_text.delta", r#""delta":"Hi""#.into()),
        event(
            "response.completed",
            format!("\"response\":{}", response("completed", r#"{"input_tokens":5000,"output_tokens":20,"total_tokens":5020,"input_tokens_details":{"cached_tokens":4000}}"#)),
        ),
    ]
    .concat()
}

#[test]
fn the_last_event_of_responses_is_read_whatever_its_length() {
    let expected = expect(3, Some([5000, 4000, 0, 20, 0]), (1, 2), "f");
    for size in [100, 60_000, 65_000, 66_000, 72_000, 300_000] {
        let text = large(size);
        let whole = read(Responses, OpenAi, [text.as_bytes()]);
        assert_eq!(facts(&whole.1), expected, "{size}");
        assert!(whole.1.complete() && whole.1.unread_events == 0);
        let at: Vec<usize> =
            (1..300).chain((300..text.len()).step_by(9973)).chain(text.len() - 400..text.len()).collect();
        for at in at {
            let (first, second) = text.as_bytes().split_at(at);
            assert_eq!(read(Responses, OpenAi, [first, second]), whole, "{size} cut at {at}");
        }
        assert_eq!(read(Responses, OpenAi, text.as_bytes().chunks(1)), whole, "{size} byte by byte");
        if size > crate::api::sse::EVENT_BYTES_MAX {
            assert_eq!(whole.0, text.as_bytes(), "a long event passes as it is");
        }
    }
}

#[test]
fn an_event_of_64_mib_is_read_in_constant_memory() {
    let (head, tail) = (
        br#"data: {"type":"response.completed","response":{"model":"up","instructions":""#.as_slice(),
        br#"","usage":{"input_tokens":7,"output_tokens":3}}}"#.as_slice(),
    );
    let piece = Bytes::from(vec![b'x'; 1 << 20]);
    let plan = RewritePlan { kind: Responses, ..RewritePlan::default() };
    let mut rewriter = Rewriter::new(plan);
    let mut passed = rewriter.push(Bytes::from_static(head)).len();
    for _ in 0..65 {
        passed += rewriter.push(piece.clone()).len();
    }
    passed +=
        rewriter.push(Bytes::from_static(tail)).len() + rewriter.push(Bytes::from_static(b"\n\n")).len();
    assert_eq!(passed, head.len() + (65 << 20) + tail.len() + 2);
    let facts = rewriter.facts();
    assert!(facts.complete() && facts.unread_events == 0);
    assert_eq!(facts.usage.and_then(|usage| usage.completion), Some(3));
    assert_eq!(facts.content_bytes, 0, "what repeats the request is no output");
}

#[test]
fn an_event_without_an_end_counts_while_it_passes() {
    for (kind, head, tail) in [
        (ChatCompletions, r#"data: {"choices":[{"delta":{"content":""#, r#""}}]}"#),
        (ChatCompletions, r#"data: {"choices":[{"delta":{"reasoning":"x","reasoning_content":""#, r#""}}]}"#),
        (Completions, r#"data: {"choices":[{"text":""#, r#""}]}"#),
        (Responses, r#"data: {"type":"response.output_text.delta","delta":""#, r#""}"#),
    ] {
        let mut rewriter = Rewriter::new(RewritePlan { kind, ..RewritePlan::default() });
        rewriter.push(Bytes::from_static(head.as_bytes()));
        for written in 1..=4 {
            rewriter.push(Bytes::from(vec![b'x'; 1 << 20]));
            assert_eq!(rewriter.facts().content_bytes, written << 20, "{head}");
        }
        rewriter.push(Bytes::from(format!("{tail}\n\n")));
        let facts = rewriter.facts();
        assert_eq!((facts.content_bytes, facts.chunks, facts.unread_events), (4 << 20, 1, 0), "{head}");
    }
}
