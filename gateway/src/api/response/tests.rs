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
const NULL_USAGE: &str = r#","usage":null"#;
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
    let role = ROLE.replace(NULL_USAGE, "");
    assert_eq!(out, stream(&[&role, HELLO, TOOL, STOP, "[DONE]"], "\n"));
    let usage = Usage { prompt: Some(7), completion: Some(3), cache_read: 2, ..Usage::default() };
    assert_eq!(facts.usage, Some(usage));
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
    let completed = r#"data: {"type":"response.completed","response":{"output":[]}}"#;
    let plan = RewritePlan { kind: RouteKind::Responses, ..plan("mine", false, false) };
    let (out, facts) = run(&plan, &[completed.as_bytes()]);
    assert!(
        facts.complete() && out == format!("{completed}\n\n"),
        "clients take no event up before its end: {out}"
    );
}

#[test]
fn responses_events_are_understood() {
    let created =
        r#"{"type":"response.created","response":{"id":"r","model":"up","error":null,"usage":null}}"#;
    let delta = r#"{"type":"response.output_text.delta","delta":"hello"}"#;
    let completed = r#"{"type":"response.completed","response":{"model":"up","usage":{"input_tokens":4,"output_tokens":2}}}"#;
    let text = stream(&[created, delta, completed], "\n").replace("data:", "event: x\ndata:");
    let responses = |rename, drop| RewritePlan { kind: RouteKind::Responses, ..plan(rename, drop, false) };
    let (out, facts) = run(&responses("mine", true), &[text.as_bytes()]);
    assert_eq!(out, text.replace("\"up\"", "\"mine\""));
    assert_eq!(facts.usage, Some(Usage { prompt: Some(4), completion: Some(2), ..Usage::default() }));
    assert!(facts.finished && facts.chunks == 1 && facts.content_bytes == 5);
    let failed = r#"{"type":"response.failed","response":{"error":{"code":"x"}}}"#;
    assert!(run(&responses("", false), &[stream(&[failed], "\n").as_bytes()]).1.error_seen);
    let (_, chat) = run(&plan("", false, false), &[text.as_bytes()]);
    assert!(!chat.finished && chat.usage.is_none() && chat.chunks == 0, "it is no event of another endpoint");
}

#[test]
fn nothing_to_change_shares_the_chunk() {
    let bare = ROLE.replace(NULL_USAGE, "");
    for (role, plan) in
        [(ROLE, plan("", false, true)), (ROLE, plan("up", false, true)), (&bare, plan("up", true, true))]
    {
        let chunk = Bytes::from(stream(&[role, HELLO], "\n"));
        let mut rewriter = Rewriter::new(plan);
        assert_eq!(rewriter.push(chunk.clone()).as_ptr(), chunk.as_ptr());
    }
}

#[test]
fn chunks_that_change_one_after_the_other_share_memory() {
    let chunk = Bytes::from(stream(&[ROLE], "\n"));
    let mut rewriter = Rewriter::new(plan("another", true, true));
    let places: std::collections::BTreeSet<usize> =
        (0..1000).map(|_| rewriter.push(chunk.clone()).as_ptr().addr()).collect();
    assert!(places.len() < 10, "each was sent before the next came: {}", places.len());
}

#[test]
fn usage_null_that_comes_because_weir_asked_is_taken_out() {
    for (payload, without) in [
        (r#"{"choices":[],"usage":null}"#, r#"{"choices":[]}"#),
        (r#"{"usage":null,"choices":[]}"#, r#"{"choices":[]}"#),
        (r#"{"a":1,"usage":null,"model":"up"}"#, r#"{"a":1,"model":"up"}"#),
        (r#"{"model":"up","usage":null,"model":"up"}"#, r#"{"model":"up","model":"up"}"#),
        (r#"{ "a" : 1 , "usage" : null , "model" : "up" }"#, r#"{ "a" : 1 , "model" : "up" }"#),
        (r#"{ "a" : 1 , "usage" : null }"#, r#"{ "a" : 1  }"#),
        (r#"{"usage":null}"#, "{}"),
        (r#"{ "usage": null }"#, "{  }"),
        // What is of another object, of another value or of a text is none of it.
        (r#"{"choices":[{"delta":{},"usage":null}]}"#, r#"{"choices":[{"delta":{},"usage":null}]}"#),
        (r#"{"x":{"usage":null},"y":[{"usage":null}]}"#, r#"{"x":{"usage":null},"y":[{"usage":null}]}"#),
        (r#"{"usage":[null],"a":null}"#, r#"{"usage":[null],"a":null}"#),
        (r#"{"usage":{"prompt_tokens":null},"a":1}"#, r#"{"usage":{"prompt_tokens":null},"a":1}"#),
        (r#"{"usages":null,"Usage":null,"u":"usage"}"#, r#"{"usages":null,"Usage":null,"u":"usage"}"#),
        (
            r#"{"choices":[{"delta":{"content":",\"usage\":null"}}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":",\"usage\":null"}}]}"#,
        ),
    ] {
        for end in ["\n", "\r\n", "\r"] {
            let streams = [payload, without].map(|payload| stream(&[HELLO, payload, STOP, "[DONE]"], end));
            for rename in ["", "up", "mine"] {
                let [asked, unasked] = streams.each_ref().map(|text| match rename {
                    "mine" => text
                        .replace(r#""model":"up""#, r#""model":"mine""#)
                        .replace(r#"model" : "up"#, r#"model" : "mine"#),
                    _ => text.clone(),
                });
                for cut in 0..=streams[0].len() {
                    let (one, two) = streams[0].as_bytes().split_at(cut);
                    assert_eq!(run(&plan(rename, true, true), &[one, two]).0, unasked, "{payload} at {cut}");
                    assert_eq!(run(&plan(rename, false, true), &[one, two]).0, asked, "{payload} at {cut}");
                }
            }
        }
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
    let data = long.len() - "data:".len() - "\n\n".len();
    assert_eq!((facts.unread_events, facts.content_bytes), (1, data as u64));
    let mut endless = Rewriter::new(plan("", false, false));
    endless.push(Bytes::from(long[..long.len() - 2].to_owned()));
    assert_eq!(endless.facts().content_bytes, data as u64, "at once, since it may have no end");
    let comment = format!(": {}\n\n", "x".repeat(EVENT_BYTES_MAX));
    let (_, facts) = run(&plan("mine", true, true), &[comment.as_bytes()]);
    assert_eq!(
        (facts.unread_events, facts.content_bytes),
        (0, 0),
        "a comment is nothing that the model wrote"
    );
}

#[test]
fn unary_answers_are_read_and_renamed() {
    let body = Bytes::from_static(
        br#"{"model":"up","choices":[{"message":{"content":"x"},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"total_tokens":5}}"#,
    );
    let kind = RouteKind::ChatCompletions;
    let read = |body| ReadAnswer::of(body, kind, Dialect::OpenAi);
    assert_eq!(
        read(&body).expect("JSON").usage(body.len(), &UsageBounds::default()),
        Ok(Some(Usage { prompt: Some(5), ..Usage::default() }))
    );
    assert!(ModelNames::of(&body).renamed(&body, "a\"b").starts_with(br#"{"model":"a\"b","choices""#));
    assert_eq!(ModelNames::of(&body).renamed(&body, "up").as_ptr(), body.as_ptr());
    assert!(read(b"<html>").is_err());
    let padded = Bytes::from([b" \n\x0c ", &body[..], b"\n"].concat());
    let renamed = ModelNames::of(&padded).renamed(&padded, "mine");
    assert!(renamed.starts_with(b" \n\x0c {\"model\":\"mine\",\"choices\""), "{renamed:?}");
    assert_eq!(ModelNames::of(b"<html>").renamed(&padded, "mine"), padded);
}

const ABSURD: &str = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9223372036854775807}}"#;

#[test]
fn a_report_beyond_what_is_possible_is_left_aside_and_so_is_every_other_one() {
    for absurd in [
        r#"{"prompt_tokens":7,"completion_tokens":9223372036854775807}"#,
        r#"{"prompt_tokens":18446744073709551615,"completion_tokens":3}"#,
        r#"{"input_tokens":7,"output_tokens":18446744073709551616}"#,
        r#"{"prompt_tokens":7,"completion_tokens":1e308}"#,
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
        let (kind, bounds) = (RouteKind::ChatCompletions, UsageBounds::default());
        let read = ReadAnswer::of(body.as_bytes(), kind, Dialect::OpenAi).expect("JSON");
        assert!(read.usage(body.len(), &bounds).is_err(), "{absurd}");
    }
}

#[test]
fn what_is_no_count_is_absent_and_no_alarm() {
    for odd in ["-1", "1.5", "\"5\"", "null", "[1]"] {
        let chunk = format!(r#"{{"choices":[],"usage":{{"prompt_tokens":7,"completion_tokens":{odd}}}}}"#);
        let (_, facts) = run(&plan("", true, true), &[stream(&[HELLO, STOP, &chunk], "\n").as_bytes()]);
        assert_eq!(facts.usage, Some(Usage { prompt: Some(7), ..Usage::default() }), "{odd}");
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
    let renamed = ModelNames::of(body.as_bytes()).renamed(&Bytes::from(body.clone()), &name);
    assert!(renamed.len() <= body.len() + 8 * name.len(), "{} of {}", renamed.len(), body.len());
    let event = format!("data: {}\n\n", &body.replace(&r#""model":"","#.repeat(9_000), ""));
    let (out, _) = run(&plan(&name, false, false), &[event.as_bytes()]);
    assert!(out.len() <= event.len() + 8 * name.len(), "{} of {}", out.len(), event.len());
}

/// A stream that is over, and then more: what a client gets ends with the event that ended it, however it was cut.
#[test]
fn a_stream_is_over_at_its_last_event_however_it_is_cut() {
    let completed = r#"{"type":"response.completed","response":{"model":"up","usage":{"input_tokens":7,"output_tokens":3}}}"#;
    let failure = r#"{"error":{"message":"boom"}}"#;
    for (last, append_done) in [("[DONE]", true), (completed, false), (failure, true)] {
        for end in ["\n", "\r\n", "\r"] {
            let good = stream(&[HELLO, STOP, last], end);
            for more in ["", ": ping\n\n", "data: {\"error\":1}\n\ndata: x", "\n", "garbage"] {
                let text = format!("{good}{more}");
                let kind = if append_done { RouteKind::ChatCompletions } else { RouteKind::Responses };
                for plan in [
                    plan("", false, append_done),
                    plan("", true, append_done),
                    plan("mine", true, append_done),
                ] {
                    let plan = RewritePlan { kind, ..plan };
                    let want = match &plan.rename_model {
                        Some(_) => good.replace(r#""model":"up""#, r#""model":"mine""#),
                        None => good.clone(),
                    };
                    // The model's name inside a string of the answer is not the model's name.
                    let want = want.replace(r#"\"model\":\"mine\""#, r#"\"model\":\"up\""#);
                    for cut in 0..=text.len() {
                        let (one, two) = text.as_bytes().split_at(cut);
                        let mut rewriter = Rewriter::new(plan.clone());
                        let mut out = rewriter.push(Bytes::copy_from_slice(one)).to_vec();
                        out.extend_from_slice(&rewriter.push(Bytes::copy_from_slice(two)));
                        assert!(rewriter.is_over(), "{text:?} at {cut}");
                        assert_eq!(String::from_utf8_lossy(&out), want, "{text:?} at {cut}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_empty_error_beside_an_answer_is_none_and_a_full_one_is() {
    let body = |error: &str| format!(r#"{{"choices":[{{"message":{{"content":"x"}}}}],"error":{error}}}"#);
    for empty in [r#""""#, "{}", "null", "[]", "0", "false"] {
        assert_eq!(is_error_object(body(empty).as_bytes()), Ok(false), "{empty}");
        assert!(
            is_error_body(format!("{{\"error\":{empty},\"message\":\"\"}}").as_bytes()) == (empty != "null"),
            "{empty} alone"
        );
    }
    for full in
        [r#""overloaded""#, r#"{"message":"x"}"#, r#"{"code":null}"#, "[1]", "[{}]", "1", "502.5", "true"]
    {
        assert_eq!(is_error_object(body(full).as_bytes()), Ok(true), "{full}");
    }
    for error in [
        r#"{"object":"error","message":"full","type":"429","code":429}"#,
        r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#,
        r#"{"error":"Model is overloaded","error_type":"overloaded"}"#,
        r#"{"choices":[{"error":{"code":502},"finish_reason":"error"}]}"#,
    ] {
        assert_eq!(is_error_object(error.as_bytes()), Ok(true), "{error}");
    }
    for good in [
        r#"{"object":"list","data":[],"error":{}}"#,
        r#"{"choices":[{"message":{"error":{"a":1}},"content_filter_results":{"error":{"code":"x"}}}]}"#,
        r#"{"object":"response","output":[],"error":null,"instructions":"error"}"#,
    ] {
        assert_eq!(is_error_object(good.as_bytes()), Ok(false), "{good}");
    }
}

#[test]
fn a_stream_is_not_over_before_it_says_so() {
    for text in [stream(&[HELLO, STOP, USAGE], "\n"), stream(&[HELLO], "\n") + "data: [DONE", String::new()] {
        let mut rewriter = Rewriter::new(plan("", true, true));
        let _ = rewriter.push(Bytes::from(text.clone()));
        assert!(!rewriter.is_over(), "{text}");
    }
}

#[test]
fn text_that_comes_under_several_names_counts_once() {
    let bytes = |delta: &str| {
        let chunk = format!(r#"{{"choices":[{{"delta":{delta}}}]}}"#);
        run(&plan("", false, false), &[stream(&[&chunk], "\n").as_bytes()]).1.content_bytes
    };
    for (delta, counted) in [
        (
            r#"{"reasoning":"four","reasoning_content":"four","reasoning_details":[{"type":"reasoning.text","text":"four"}]}"#,
            4,
        ),
        (
            r#"{"reasoning_content":"four","thinking_blocks":[{"type":"thinking","thinking":"four","signature":"AAAA"}],"provider_specific_fields":{"x":"four"}}"#,
            4,
        ),
        (r#"{"reasoning_details":[{"type":"reasoning.encrypted","data":"AAAAAAAA"}]}"#, 0),
        (r#"{"reasoning":"four","content":"three"}"#, 9),
        (r#"{"thoughts":"of its own"}"#, 10),
        (r#"{"words":"of its own","role":"assistant"}"#, 10),
        (r#"{"audio":{"id":"a","data":"UklGRiQ=","transcript":"hey"}}"#, 3),
        (r#"{"images":[{"image_url":{"url":"data:image/png;base64,AAAA"}}]}"#, 0),
        (
            r#"{"tool_calls":[{"index":0,"id":"call_1","type":"function","function":{"name":"f","arguments":"{}"}}]}"#,
            3,
        ),
        (
            r#"{"tool_calls":[{"function":{"name":"f","arguments":{"city":"Oslo","days":[1,"two"]}}}]}"#,
            1 + 4 + 3,
        ),
        (r#"{"tool_calls":[{"custom":{"name":"f","input":"abc"}}]}"#, 4),
        (r#"{"function_call":{"name":"f","arguments":"abc"}}"#, 4),
        (r#"{"refusal":"no","annotations":[{"title":"long title"}]}"#, 2),
    ] {
        assert_eq!(bytes(delta), counted, "{delta}");
    }
}

#[test]
fn a_chunk_of_usage_alone_is_dropped_also_without_a_list_of_choices() {
    for choices in [r#""choices":[],"#, r#""choices":null,"#, ""] {
        let usage = format!(r#"{{{choices}"usage":{{"prompt_tokens":11,"completion_tokens":2}}}}"#);
        let text = stream(&[HELLO, STOP, &usage, "[DONE]"], "\n");
        let (out, facts) = run(&plan("", true, true), &[text.as_bytes()]);
        assert_eq!(out, stream(&[HELLO, STOP, "[DONE]"], "\n"), "{choices}");
        assert_eq!(facts.usage.and_then(|usage| usage.prompt), Some(11));
    }
}

#[test]
fn an_answer_without_usage_is_counted_by_its_text() {
    let count = |body: &str, kind| {
        let read = ReadAnswer::of(body.as_bytes(), kind, Dialect::OpenAi).unwrap_or_default();
        read.completion_estimate(body.len(), kind)
    };
    let image = "A".repeat(4000);
    let chat = format!(r#"{{"choices":[{{"message":{{"content":"twelve bytes","images":["{image}"]}}}}]}}"#);
    assert_eq!(count(&chat, RouteKind::ChatCompletions), 3);
    let responses = format!(
        r#"{{"instructions":"{image}","output":[{{"type":"message","content":[{{"type":"output_text","text":"twelve bytes"}}]}}]}}"#
    );
    assert_eq!(count(&responses, RouteKind::Responses), 3);
    assert_eq!(
        count(r#"{"text":"sixteen"}"#, RouteKind::ChatCompletions),
        5,
        "an unknown form is counted whole"
    );
    assert_eq!(count("not JSON", RouteKind::Completions), 2);
    assert_eq!(count(r#"{"data":[{"embedding":[0.5]}]}"#, RouteKind::Embeddings), 0);
}

#[test]
fn usage_that_a_client_asked_for_and_an_engine_does_not_send_is_counted_in_its_place() {
    let role = r#"{"id":"chatcmpl-1","created":7,"model":"up","choices":[{"index":0,"delta":{"role":"assistant"}}]}"#;
    let missing =
        |first: &str| Some(MissingUsage::new(first.as_bytes(), RouteKind::ChatCompletions, "mine", 11));
    let own = r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"mine","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}}"#;
    let first = stream(&[role], "\n");
    let plan = RewritePlan { missing_usage: missing(&first), ..plan("mine", false, true) };
    let whole = stream(&[role, HELLO, STOP, "[DONE]"], "\n");
    for cut in 0..=whole.len() {
        let (one, two) = whole.as_bytes().split_at(cut);
        let (out, _) = run(&plan, &[one, two]);
        let renamed = role.replace(r#""up""#, r#""mine""#);
        assert!(out.starts_with(&stream(&[&renamed], "\n")), "{out}");
        assert!(out.ends_with(&stream(&[own, "[DONE]"], "\n")), "{cut}: {out}");
    }
    let (out, _) = run(&plan, &[stream(&[role, HELLO, STOP], "\n").as_bytes()]);
    assert!(out.ends_with(&stream(&[own, "[DONE]"], "\n")), "without [DONE] of its own: {out}");
    let (out, _) = run(&plan, &[stream(&[role, HELLO, STOP, USAGE, "[DONE]"], "\n").as_bytes()]);
    assert_eq!(out.matches("prompt_tokens\"").count(), 1, "it sent its own: {out}");
    let (out, _) = run(&plan, &[stream(&[role, HELLO, "[DONE]"], "\n").as_bytes()]);
    assert!(!out.contains("prompt_tokens"), "it did not finish: {out}");
    let odd = MissingUsage::new(b": comment", RouteKind::Completions, "m", 1).event(None, 2);
    assert!(odd.contains(r#""id":null,"object":"text_completion""#), "{odd}");
}

#[test]
fn usage_that_stands_where_no_client_looks_is_sent_in_the_apis_place() {
    let own = |counts: &str| {
        format!(
            r#"{{"id":"1","object":"chat.completion.chunk","created":null,"model":"mine","choices":[],"usage":{counts}}}"#
        )
    };
    for (payloads, dialect, counts) in [
        (
            &[
                r#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop","usage":{"prompt_tokens":19,"completion_tokens":13,"cached_tokens":8}}]}"#,
            ][..],
            Dialect::OpenAi,
            r#"{"prompt_tokens":19,"completion_tokens":13,"total_tokens":32,"prompt_tokens_details":{"cached_tokens":8}}"#,
        ),
        (
            &[
                r#"{"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":"stop"}],"x_groq":{"usage":{"prompt_tokens":3,"completion_tokens":7}}}"#,
            ],
            Dialect::Groq,
            r#"{"prompt_tokens":3,"completion_tokens":7,"total_tokens":10}"#,
        ),
        (
            &[
                STOP,
                r#"{"choices":[],"usage":{"input_tokens":5,"output_tokens":9,"output_tokens_details":{"thinking_tokens":4}}}"#,
            ],
            Dialect::Anthropic,
            r#"{"prompt_tokens":5,"completion_tokens":9,"total_tokens":14,"completion_tokens_details":{"reasoning_tokens":4}}"#,
        ),
        (
            &[
                HELLO,
                STOP,
                r#"{"choices":[],"usageMetadata":{"promptTokenCount":6,"candidatesTokenCount":2}}"#,
            ],
            Dialect::Gemini,
            r#"{"prompt_tokens":6,"completion_tokens":2,"total_tokens":8}"#,
        ),
        // Zeros beside text are no counts.
        (
            &[HELLO, STOP, r#"{"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0}}"#],
            Dialect::Ollama,
            r#"{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}"#,
        ),
    ] {
        let missing = MissingUsage::new(ROLE.as_bytes(), RouteKind::ChatCompletions, "mine", 11);
        let plan = RewritePlan { dialect, missing_usage: Some(missing), ..plan("mine", false, true) };
        let text = stream(&[&[ROLE], payloads, &["[DONE]"]].concat(), "\n");
        let (out, _) = run(&plan, &[text.as_bytes()]);
        let own = own(counts).replace(r#""id":"1""#, r#""id":null"#);
        assert!(out.ends_with(&stream(&[&own, "[DONE]"], "\n")), "{counts}: {out}");
    }
}

#[test]
fn an_error_that_clients_would_not_find_is_told_once_more_in_openais_form() {
    for (error, message) in [
        (r#"{"error":"CUDA out of memory","error_type":"overloaded"}"#, "CUDA out of memory"),
        (r#"{"object":"error","message":"queue full","code":429}"#, "queue full"),
        (r#"{"type":"error","message":"bare"}"#, "bare"),
        (r#"{"choices":[{"error":{"code":502,"message":"gone"},"finish_reason":"error"}]}"#, "gone"),
        (r#"{"choices":[{"delta":{},"finish_reason":"error"}]}"#, "reported an error in the stream"),
        (r#"{"choices":[{"delta":{}}],"x_groq":{"error":"over capacity"}}"#, "over capacity"),
        (r#"{"error":{"code":500}}"#, "reported an error in the stream"),
        (r#"{"error":true}"#, "reported an error in the stream"),
    ] {
        for end in ["\n", "\r\n", "\r"] {
            for plan in [plan("", false, true), plan("mine", true, true)] {
                let text = stream(&[HELLO, error, "[DONE]"], end);
                let (whole, facts) = run(&plan, &[text.as_bytes()]);
                assert!(facts.error_seen && !whole.contains("[DONE]"), "{whole}");
                let own = whole.rsplit("data: ").next().expect("an event");
                let own: serde_json::Value = serde_json::from_str(own).unwrap_or_else(|_| panic!("{whole}"));
                let said = own["error"]["message"].as_str().expect("a message");
                assert!(said.contains(message) && own["error"]["type"].is_string(), "{own}");
                // Where clients would find it first and read no text, it is replaced.
                let passes = plan.rename_model.is_none() || !error.starts_with(r#"{"error""#);
                assert_eq!(whole.contains(error), passes, "{whole}");
                for cut in 0..=text.len() {
                    let (one, two) = text.as_bytes().split_at(cut);
                    assert_eq!(run(&plan, &[one, two]).0, whole, "cut at {cut}");
                }
            }
        }
        // The connection may end without the empty line.
        let text = format!("{}data: {error}", stream(&[HELLO], "\n"));
        let (out, _) = run(&plan("mine", true, true), &[text.as_bytes()]);
        assert!(out.ends_with("}\n\n") && out.contains("\n\ndata: {\"error\":{"), "{out}");
    }
    for plain in [r#"{"error":{"message":"boom"}}"#, r#"{"type":"error","error":{"message":"boom"}}"#] {
        let text = stream(&[HELLO, plain], "\n");
        assert_eq!(run(&plan("", false, true), &[text.as_bytes()]).0, text, "it is in that form already");
    }
}

#[test]
fn the_beginning_of_an_event_that_never_ends_is_not_passed_on() {
    let whole = stream(&[HELLO], "\n");
    for rest in ["data: {\"model\":\"up\",\"choi", "data: [DON", "event: mess", ": pin", "data: ", "i"] {
        for plan in [plan("mine", true, true), plan("", true, false)] {
            let (out, facts) = run(&plan, &[format!("{whole}{rest}").as_bytes()]);
            assert_eq!(out, run(&plan, &[whole.as_bytes()]).0, "{rest}");
            assert!(!facts.complete(), "{rest}");
        }
    }
}

#[test]
fn an_event_without_data_is_not_passed_on_and_a_comment_is() {
    for end in ["\n", "\r\n", "\r"] {
        for empty in ["event: ping", "retry: 3000", "id: 7", "data:", "data", "event: x|data: ", "id"] {
            let empty = format!("{}{end}{end}", empty.replace('|', end));
            let hello = stream(&[HELLO], end);
            let comment = format!(": ping{end}{end}");
            let text = format!("{comment}{empty}{hello}{empty}{comment}{}", stream(&[STOP, "[DONE]"], end));
            for plan in [plan("up", true, true), plan("", true, true)] {
                let (whole, facts) = run(&plan, &[text.as_bytes()]);
                assert_eq!(whole, text.replace(&empty, ""), "{empty:?}");
                assert_eq!((facts.events, facts.unread_events), (3, 0), "{empty:?}");
                for cut in 0..=text.len() {
                    let (one, two) = text.as_bytes().split_at(cut);
                    assert_eq!(run(&plan, &[one, two]), (whole.clone(), facts.clone()), "{empty:?} at {cut}");
                }
            }
        }
    }
}
