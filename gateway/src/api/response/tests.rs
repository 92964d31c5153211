use proptest::prelude::*;

use super::*;
use crate::api::sse::EVENT_BYTES_MAX;

fn run(plan: &RewritePlan, chunks: &[&[u8]]) -> (String, StreamFacts) {
    let mut rewriter = Rewriter::new(plan.clone());
    let mut out = Vec::new();
    for chunk in chunks {
        out.extend_from_slice(&rewriter.push(Bytes::copy_from_slice(chunk)));
    }
    out.extend_from_slice(&rewriter.finish());
    (String::from_utf8_lossy(&out).into_owned(), rewriter.facts().clone())
}

fn plan(rename: &str, drop_usage_chunk: bool, append_done: bool) -> RewritePlan {
    let rename_model = (!rename.is_empty()).then(|| rename.to_owned());
    RewritePlan { rename_model, drop_usage_chunk, append_done, ..RewritePlan::default() }
}

const ROLE: &str = r#"{"id":"1","model":"up","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}"#;
const HELLO: &str =
    r#"{"model":"up","choices":[{"delta":{"content":"hello \"model\":\"up\""},"finish_reason":null}]}"#;
const TOOL: &str = r#"{"model":"up","choices":[{"delta":{"tool_calls":[{"index":0,"id":"x","function":{"arguments":"{\"a\""}}]}}]}"#;
const STOP: &str = r#"{"model":"up","choices":[{"delta":{},"finish_reason":"stop"}]}"#;
const USAGE: &str = r#"{"model":"up","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10,"prompt_tokens_details":{"cached_tokens":2}}}"#;
const STOP_USAGE: &str = r#"{"choices":[{"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":7,"completion_tokens":3},"model":"third"}"#;

fn stream(payloads: &[&str], end: &str) -> String {
    payloads.iter().map(|payload| format!("data: {payload}{end}{end}")).collect()
}

#[test]
fn usage_on_a_chunk_of_its_own_is_read_and_dropped() {
    let text = stream(&[ROLE, HELLO, TOOL, STOP, USAGE, "[DONE]"], "\n");
    let (out, facts) = run(&plan("", true, true), &[text.as_bytes()]);
    assert_eq!(out, stream(&[ROLE, HELLO, TOOL, STOP, "[DONE]"], "\n"));
    assert_eq!(facts.usage, Some(Usage { prompt: Some(7), completion: Some(3) }));
    assert_eq!((facts.chunks, facts.content_bytes), (2, 18 + 4));
    assert!(facts.finished && facts.done_seen && !facts.error_seen && facts.complete());
}

#[test]
fn transformers_gets_its_done_and_keeps_its_last_choice() {
    let text = stream(&[HELLO, STOP_USAGE], "\r\n");
    let (out, facts) = run(&plan("mine", true, true), &[text.as_bytes()]);
    let want = text.replacen(r#"{"model":"up""#, r#"{"model":"mine""#, 1).replace("third", "mine");
    assert_eq!(out, want + "data: [DONE]\n\n");
    assert_eq!(facts.usage.and_then(|usage| usage.completion), Some(3));
}

#[test]
fn llama_cpp_without_usage_is_counted() {
    let (_, facts) = run(&plan("", false, true), &[stream(&[HELLO, STOP, "[DONE]"], "\n").as_bytes()]);
    assert_eq!(facts.usage, None);
    assert_eq!(facts.completion_tokens(), 5);
}

#[test]
fn done_is_never_forged() {
    let error = r#"{"error":{"message":"boom"}}"#;
    for payloads in [&[HELLO][..], &[HELLO, STOP, error], &[error]] {
        let text = stream(payloads, "\n");
        assert_eq!(run(&plan("", true, true), &[text.as_bytes()]).0, text);
    }
    assert!(run(&plan("", false, true), &[stream(&[error], "\n").as_bytes()]).1.error_seen);
}

#[test]
fn an_unterminated_last_event_is_read_and_closed() {
    let text = format!("data: {STOP}");
    for rename in ["", "up"] {
        let (out, _) = run(&plan(rename, false, true), &[text.as_bytes()]);
        assert_eq!(out, format!("{text}\n\ndata: [DONE]\n\n"));
    }
}

#[test]
fn responses_events_are_understood() {
    let created =
        r#"{"type":"response.created","response":{"id":"r","model":"up","error":null,"usage":null}}"#;
    let delta = r#"{"type":"response.output_text.delta","delta":"hello"}"#;
    let completed = r#"{"type":"response.completed","response":{"model":"up","usage":{"input_tokens":4,"output_tokens":2}}}"#;
    let text = stream(&[created, delta, completed], "\n").replace("data:", "event: x\ndata:");
    let (out, facts) = run(&plan("mine", true, false), &[text.as_bytes()]);
    assert_eq!(out, text.replace("\"up\"", "\"mine\""));
    assert_eq!(facts.usage, Some(Usage { prompt: Some(4), completion: Some(2) }));
    assert!(facts.finished && facts.chunks == 1 && facts.content_bytes == 5);
    let failed = r#"{"type":"response.failed","response":{"error":{"code":"x"}}}"#;
    assert!(run(&plan("", false, false), &[stream(&[failed], "\n").as_bytes()]).1.error_seen);
}

#[test]
fn nothing_to_change_shares_the_chunk() {
    let chunk = Bytes::from(stream(&[ROLE, HELLO], "\n"));
    for plan in [plan("", false, true), plan("up", true, true)] {
        let mut rewriter = Rewriter::new(plan);
        assert_eq!(rewriter.push(chunk.clone()).as_ptr(), chunk.as_ptr());
    }
}

#[test]
fn blanks_around_a_payload_do_not_shift_the_name() {
    let (out, _) = run(&plan("mine", false, false), &[b"data: \t {\"model\": \"up\"} \n\n"]);
    assert_eq!(out, "data: \t {\"model\": \"mine\"} \n\n");
}

#[test]
fn a_payload_over_several_lines_is_read() {
    let text = format!("data: {}\n\n", USAGE.replacen(',', ",\ndata: ", 2));
    assert!(run(&plan("", false, false), &[text.as_bytes()]).1.usage.is_some());
}

#[test]
fn what_cannot_be_read_is_charged_by_its_bytes() {
    let long = format!("data: {}\n\n", "x".repeat(EVENT_BYTES_MAX));
    let (out, facts) = run(&plan("mine", true, true), &[long.as_bytes()]);
    assert_eq!(out, long);
    assert_eq!((facts.unread_events, facts.content_bytes), (1, long.len() as u64));
}

#[test]
fn unary_answers_are_read_and_renamed() {
    let body = Bytes::from_static(
        br#"{"model":"up","choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"total_tokens":5}}"#,
    );
    let bounds = UsageBounds::default();
    assert_eq!(usage_of_body(&body, &bounds), Ok(Some(Usage { prompt: Some(5), completion: None })));
    assert!(rename_model_in_body(&body, "a\"b").starts_with(br#"{"model":"a\"b","choices""#));
    assert_eq!(rename_model_in_body(&body, "up").as_ptr(), body.as_ptr());
    assert_eq!(usage_of_body(b"<html>", &bounds), Ok(None));
}

const ABSURD: &str = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9223372036854775807}}"#;

#[test]
fn a_report_beyond_what_is_possible_is_left_aside_and_so_is_every_other_one() {
    for absurd in [
        r#"{"prompt_tokens":7,"completion_tokens":9223372036854775807}"#,
        r#"{"prompt_tokens":18446744073709551615,"completion_tokens":3}"#,
        r#"{"input_tokens":7,"output_tokens":18446744073709551616}"#,
        r#"{"prompt_tokens":7,"completion_tokens":3,"total_tokens":1000000000000}"#,
        r#"{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":1000000000000}}"#,
        r#"{"prompt_tokens":7,"completion_tokens":3,"completion_tokens_details":{"reasoning_tokens":99999999999999999999}}"#,
    ] {
        let chunk = format!(r#"{{"choices":[],"usage":{absurd}}}"#);
        for payloads in
            [&[HELLO, STOP, &chunk][..], &[HELLO, &chunk, STOP_USAGE], &[USAGE, HELLO, STOP, &chunk]]
        {
            let (_, facts) = run(&plan("", true, true), &[stream(payloads, "\n").as_bytes()]);
            assert!(facts.usage.is_none() && facts.implausible.is_some(), "{absurd}");
            assert_eq!(facts.completion_tokens(), facts.completion_estimate(), "{absurd}");
        }
        let body = format!(r#"{{"choices":[],"usage":{absurd}}}"#);
        assert!(usage_of_body(body.as_bytes(), &UsageBounds::default()).is_err(), "{absurd}");
    }
}

#[test]
fn what_is_no_count_is_absent_and_no_alarm() {
    for odd in ["-1", "1.5", "1e308", "\"5\"", "null", "[1]"] {
        let chunk = format!(r#"{{"choices":[],"usage":{{"prompt_tokens":7,"completion_tokens":{odd}}}}}"#);
        let (_, facts) = run(&plan("", true, true), &[stream(&[HELLO, STOP, &chunk], "\n").as_bytes()]);
        assert_eq!(facts.usage, Some(Usage { prompt: Some(7), completion: None }), "{odd}");
        assert!(facts.implausible.is_none(), "{odd}");
    }
}

proptest! {
    #[test]
    fn cuts_do_not_matter(
        picks in proptest::collection::vec((0usize..10, 0usize..3), 0..10), ended in any::<bool>(),
        cuts in proptest::collection::vec(0usize..1500, 0..12), rename in any::<bool>(), drop in any::<bool>(),
    ) {
        let payloads = [ROLE, HELLO, TOOL, STOP, USAGE, STOP_USAGE, "[DONE]", "junk", r#"{"error":1}"#, ABSURD];
        let mut text: String = picks.iter()
            .map(|&(payload, end)| stream(&[payloads[payload]], ["\n", "\r\n", "\r"][end])).collect();
        if !ended {
            text.truncate(text.len().saturating_sub(3));
        }
        let plan = plan(if rename { "mine" } else { "" }, drop, true);
        let whole = run(&plan, &[text.as_bytes()]);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &text.as_bytes()[pair[0]..pair[1]]).collect();
        prop_assert_eq!(&run(&plan, &chunks), &whole);
        let bytes: Vec<&[u8]> = text.as_bytes().chunks(1).collect();
        prop_assert_eq!(run(&plan, &bytes), whole);
    }

    #[test]
    fn random_bytes_never_panic(chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8)) {
        let chunks: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
        run(&plan("m", true, true), &chunks);
    }
}

#[test]
fn an_answer_of_nothing_but_names_does_not_grow() {
    let body = format!("{{{}}}", vec![r#""model":"""#; 10_000].join(","));
    let name = "n".repeat(63);
    let renamed = rename_model_in_body(&Bytes::from(body.clone()), &name);
    assert!(renamed.len() <= body.len() + 8 * name.len(), "{} of {}", renamed.len(), body.len());
    let event = format!("data: {}\n\n", &body.replace(&r#""model":"","#.repeat(9_000), ""));
    let (out, _) = run(&plan(&name, false, false), &[event.as_bytes()]);
    assert!(out.len() <= event.len() + 8 * name.len(), "{} of {}", out.len(), event.len());
}
