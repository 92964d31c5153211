//! Tokens per minute.

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use mock_llm::Config;
use tokio::task::JoinSet;
use weir_proto::v1;
use weir_tests::eventually;

use super::{CHAT, ENDLESS, World, config, endless, header};

/// A capacity of this number of tokens that drains one per minute.
fn tokens(capacity: u32) -> v1::Rates {
    v1::Rates {
        tokens_per_minute: Some(1),
        burst_multiplier: Some(f64::from(capacity)),
        ..Default::default()
    }
}

/// Streamed tokens were charged when the stream ended, so streams had no limit until then.
#[tokio::test]
async fn p07_a_stream_weighs_on_its_limit_from_its_start() {
    let world = World::of(2, endless(), tokens(1000)).await;
    let before = world.client(1).chat(CHAT).await;
    // It names no maximum, and the server has a million tokens for it.
    let unbounded = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    let stream = world.client(0).send(Method::POST, "/v1/chat/completions", unbounded).await;
    assert_eq!(stream.status(), StatusCode::OK);
    let mut stream = stream.into_body();
    stream.frame().await.expect("a chunk").expect("whole");
    let during = world.client(1).chat(CHAT).await;
    let left = |answer| header(answer, "x-ratelimit-remaining-tokens");
    assert!(
        left(&during) + 100 < left(&before),
        "{} of the stream's tokens are reserved while it runs",
        left(&before) - left(&during)
    );
}

/// Five concurrent calls used 663 of 100 tokens.
#[tokio::test(flavor = "multi_thread")]
async fn p08_five_calls_at_once_do_not_use_six_times_the_limit() {
    let world = World::of(2, Config { output_tokens: 130, ..config() }, tokens(100)).await;
    let unbounded = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
    let mut calls = JoinSet::new();
    for n in 0..5 {
        let client = world.client(n).clone();
        calls.spawn(async move { client.chat(unbounded).await.status });
    }
    let mut answered = 0;
    while let Some(status) = calls.join_next().await {
        answered += u32::from(status.expect("no panic") == StatusCode::OK);
    }
    assert_eq!(answered, 1, "one fills the bucket with its guess; the others wait for what it leaves");
}

/// The reservation refused the very first call of a key with a small limit; and a tiny max_tokens hid a huge
/// max_completion_tokens.
#[tokio::test]
async fn p09_a_small_limit_serves_its_first_call_and_the_larger_bound_counts() {
    let world = World::of(1, config(), tokens(100)).await;
    let hidden = r#"{"model":"gpt-4.1","max_tokens":1,"max_completion_tokens":5000,"messages":[{"role":"user","content":"hi"}]}"#;
    let refused = world.client(0).chat(hidden).await;
    assert_eq!((refused.status, &*refused.error_code()), (StatusCode::BAD_REQUEST, "request_exceeds_limit"));
    let unbounded = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
    assert_eq!(world.client(0).chat(unbounded).await.status, StatusCode::OK, "nothing was used before");
}

/// Some endpoints skipped the limit for streams, and released their slot at the first byte.
#[tokio::test]
async fn p11_every_endpoint_is_charged_and_holds_its_slot_to_the_end() {
    let limits = v1::Rates { concurrency: Some(1), ..tokens(1000) };
    let world = World::of(1, endless(), limits).await;
    let client = world.client(0);
    for (path, body) in [
        ("/v1/chat/completions", ENDLESS),
        ("/v1/completions", r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"prompt":"hi"}"#),
        ("/v1/responses", r#"{"model":"gpt-4.1","stream":true,"max_output_tokens":100000,"input":"hi"}"#),
    ] {
        let body = body.replace("100000", "300");
        let answer = client.send(Method::POST, path, body).await;
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
        let mut stream = answer.into_body();
        stream.frame().await.expect("a chunk").expect("whole");
        let during = world.redis.standing("acme").await;
        assert_eq!(during.leases, 1, "{path} holds its slot while it streams");
        assert!(during.tokens >= 300, "{path} has reserved what it may use: {during:?}");
        assert_eq!(client.chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS, "{path}: nobody beside it");
        drop(stream);
        eventually("given back", || async { world.redis.standing("acme").await.leases == 0 }).await;
    }
    let before = world.redis.standing("acme").await.tokens;
    let embedded = client
        .ask(Method::POST, "/v1/embeddings", r#"{"model":"gpt-4.1","input":"one two three four"}"#)
        .await;
    assert_eq!(embedded.status, StatusCode::OK, "{}", embedded.text());
    eventually("embeddings count too", || async { world.redis.standing("acme").await.tokens > before }).await;
}

/// Streams were counted by a guess, or as one token each, because the provider was not asked for usage.
#[tokio::test]
async fn p12_a_stream_costs_what_its_provider_counted() {
    let world = World::of(1, config(), tokens(1000)).await;
    let stream =
        r#"{"model":"gpt-4.1","stream":true,"max_tokens":37,"messages":[{"role":"user","content":"hi"}]}"#;
    for _ in 0..3 {
        let answer = world.client(0).chat(stream).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(!answer.text().contains("prompt_tokens"), "the client did not ask for it: {}", answer.text());
    }
    eventually("what stands is what the provider billed", || async {
        let billed = world.mock.handle.counters();
        world.redis.standing("acme").await.tokens == billed.prompt_tokens + billed.generation_tokens
    })
    .await;
}
