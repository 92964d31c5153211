//! Counts of tokens that cannot be true, and those that can: what is charged, and what is learned.

use http::{Method, StatusCode};
use weir_tests::scripted::{answer, delta, json_answer, stream_end, stream_head};

use super::{CHAT, JSON, LIMIT, STREAM, Scene, left, with_limit};

const ABSURD: [&str; 10] = [
    r#"{"prompt_tokens":2,"completion_tokens":9223372036854775807,"total_tokens":9}"#,
    r#"{"prompt_tokens":2,"completion_tokens":18446744073709551615,"total_tokens":9}"#,
    r#"{"prompt_tokens":2,"completion_tokens":18446744073709551616,"total_tokens":9}"#,
    r#"{"prompt_tokens":9223372036854775807,"completion_tokens":2,"total_tokens":9}"#,
    r#"{"prompt_tokens":10000000,"completion_tokens":2,"total_tokens":10000002}"#,
    r#"{"input_tokens":18446744073709551615,"output_tokens":18446744073709551615}"#,
    r#"{"prompt_tokens":2,"completion_tokens":10000000000}"#,
    r#"{"prompt_tokens":2,"completion_tokens":2,"total_tokens":18446744073709551615}"#,
    r#"{"prompt_tokens":2,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":9223372036854775807}}"#,
    r#"{"prompt_tokens":2,"completion_tokens":2,"completion_tokens_details":{"reasoning_tokens":99999999999999999999}}"#,
];

#[tokio::test]
async fn an_absurd_count_is_replaced_by_our_own_and_moves_neither_limits_nor_estimates() {
    let scene = Scene::with(with_limit).await;
    let honest = r#"{"prompt_tokens":2,"completion_tokens":2}"#;
    for _ in 0..20 {
        assert_eq!(scene.ask(json_answer("hello", honest), CHAT).await.status, StatusCode::OK);
    }
    let mut before = scene.metric("weir_tokens_total", &[]).await;
    for usage in ABSURD {
        let whole = scene.ask(json_answer("hello", usage), CHAT).await;
        let streamed = [stream_head(), delta("hello").into(), stream_end(usage).into()].concat();
        let streamed = scene.ask(streamed, STREAM).await;
        for answer in [whole, streamed] {
            assert_eq!(answer.status, StatusCode::OK, "{usage}");
            assert!(left(&answer) > LIMIT - 20_000, "{usage}: {}", left(&answer));
        }
        // A counter neither wraps nor jumps.
        let after = scene.metric("weir_tokens_total", &[]).await;
        assert!(after >= before && after - before < 1000.0, "{usage}: {before} {after}");
        before = after;
    }
    scene.counts("weir_implausible_usage_total", &["backend=\"b0\""], 2.0 * ABSURD.len() as f64).await;
    assert!(scene.metric("weir_tokens_total", &["source=\"counted\""]).await > 0.0);
    // What was learned of the good ones still holds: one more reserves a few tokens.
    let next = scene.ask(json_answer("hello", honest), CHAT).await;
    assert!(left(&next) > LIMIT - 20_000, "{}", left(&next));
    let reserved = scene.gateway.client.ask(Method::POST, "/v1/chat/completions", CHAT).await;
    assert_eq!(reserved.status, StatusCode::OK);
}

#[tokio::test]
async fn one_request_is_charged_at_most_what_max_tokens_and_the_bytes_seen_allow() {
    let scene = Scene::with(with_limit).await;
    let asked = r#"{"model":"gpt-4.1","max_tokens":10,"n":2,"messages":[{"role":"user","content":"hi"}]}"#;
    let usage = |completion: u64| format!(r#"{{"prompt_tokens":2,"completion_tokens":{completion}}}"#);
    scene.ask(json_answer("hello", &usage(20)), asked).await;
    scene.counts("weir_implausible_usage_total", &[], 0.0).await;
    let believed = scene.metric("weir_tokens_total", &["direction=\"output\""]).await;
    assert_eq!(believed, 20.0);
    scene.ask(json_answer("hello", &usage(5000)), asked).await;
    scene.counts("weir_implausible_usage_total", &["direction=\"output\""], 1.0).await;
    // A backend that does not know max_tokens wrote all that, and the bytes show it.
    let long = "word ".repeat(2000);
    scene.ask(json_answer(&long, &usage(2000)), asked).await;
    scene.counts("weir_implausible_usage_total", &[], 1.0).await;
}

#[tokio::test]
async fn reasoning_that_is_not_sent_and_images_that_are_not_text_are_believed() {
    let scene = Scene::new().await;
    let usage = r#"{"prompt_tokens":9,"completion_tokens":100000,"completion_tokens_details":{"reasoning_tokens":99990}}"#;
    scene.ask(json_answer("42", usage), CHAT).await;
    let image = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://example.com/a.png"}}]}]}"#;
    let usage = r#"{"prompt_tokens":60000,"completion_tokens":5}"#;
    scene.ask(json_answer("a cat", usage), image).await;
    scene.counts("weir_tokens_total", &["source=\"provider\""], 160_014.0).await;
    scene.counts("weir_implausible_usage_total", &[], 0.0).await;
}

#[tokio::test]
async fn embeddings_are_bounded_by_their_input() {
    let scene = Scene::with(with_limit).await;
    let body = |tokens: u64| {
        let body = format!(
            r#"{{"object":"list","model":"gpt-4.1","data":[{{"index":0,"embedding":[0.5]}}],"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}}}}"#
        );
        answer(200, &[JSON], body)
    };
    let asked = r#"{"model":"gpt-4.1","input":"hello"}"#;
    for tokens in [2, 9_223_372_036_854_775_807] {
        let answer = scene.ask_at("/v1/embeddings", body(tokens), asked).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(left(&answer) > LIMIT - 5000, "{tokens}: {}", left(&answer));
    }
    scene.counts("weir_implausible_usage_total", &["direction=\"input\""], 1.0).await;
}
