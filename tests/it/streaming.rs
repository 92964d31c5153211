//! Streams: bytes pass, the end is reported truthfully, everything is given back.

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use mock_llm::{Config, CutAfterTokens, Faults};
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Mock, Resources, gateway, mock};
use weir_tests::eventually;

const STREAM: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":20,"messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

async fn one_mock(config: Config) -> [Mock; 1] {
    [mock(config, &CancellationToken::new()).await]
}

#[tokio::test]
async fn a_stream_ends_with_done_and_without_usage_nobody_asked_for() {
    let mocks = one_mock(config()).await;
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let answer = gw.client.chat(STREAM).await;
    assert_eq!(answer.status, StatusCode::OK);
    let text = answer.text();
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    assert!(!text.contains(r#""choices":[]"#), "the usage chunk was ours alone: {text}");
    assert_eq!(text.matches("data: [DONE]").count(), 1);
}

#[tokio::test]
async fn the_client_sees_the_name_it_asked_for() {
    let mocks = one_mock(Config { models: vec!["upstream-name".into()], ..Config::default() }).await;
    let mut resources = Resources::in_front_of(&mocks);
    let backend = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mocks[0].address),
        models: [("gpt-4.1".to_owned(), "upstream-name".to_owned())].into(),
        ..Default::default()
    };
    resources.put("b0", Spec::Backend(backend));
    let gw = gateway(&resources, None).await;
    let text = gw.client.chat(STREAM).await.text().to_owned();
    assert!(text.contains(r#""model":"gpt-4.1""#) && !text.contains("upstream-name"), "{text}");
    let unary = gw.client.chat(r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#).await;
    assert_eq!(unary.json()["model"], "gpt-4.1");
}

#[tokio::test]
async fn a_stream_cut_by_its_backend_says_so_and_never_says_done() {
    let mocks = one_mock(config()).await;
    let faults = Faults {
        cut_after_tokens: Some(CutAfterTokens { tokens: 5, probability: 1.0 }),
        ..Faults::default()
    };
    mocks[0].handle.set_faults(faults).expect("valid");
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let text = gw.client.chat(STREAM).await.text().to_owned();
    assert!(!text.contains("[DONE]"), "{text}");
    assert!(text.contains(r#""error""#), "{text}");
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_lease_and_is_charged_for_what_it_got() {
    let slow = Config { decode_tokens_per_s: 100.0, ..config() };
    let mocks = one_mock(slow).await;
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates { concurrency: Some(1), tokens_per_minute: Some(100_000), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let long = r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"messages":[{"role":"user","content":"hi"}]}"#;
    let mut stream = gw.client.send(Method::POST, "/v1/chat/completions", long).await.into_body();
    stream.frame().await.expect("a chunk").expect("whole");
    assert_eq!(gw.client.chat(STREAM).await.status, StatusCode::TOO_MANY_REQUESTS, "the one slot is taken");
    drop(stream);
    eventually("the upstream call is cancelled", || async { mocks[0].handle.counters().cancelled == 1 })
        .await;
    eventually("the slot is free", || async { gw.client.chat(STREAM).await.status == StatusCode::OK }).await;
}

#[tokio::test]
async fn settled_tokens_are_the_providers_count() {
    let mocks = one_mock(config()).await;
    let mut resources = Resources::in_front_of(&mocks);
    let limits =
        v1::Rates { tokens_per_minute: Some(1000), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let redis = weir_tests::redis::Redis::start().await;
    let gw = gateway(&resources, Some(redis.url())).await;
    eventually("redis is connected", || async { gw.client.chat(STREAM).await.status == StatusCode::OK })
        .await;
    // The prompt's estimate and 20 tokens were reserved; after the settlement the charge is what the provider
    // reported.
    eventually("settled", || async { (1..200).contains(&redis.standing("acme").await.tokens) }).await;
}

#[tokio::test]
async fn a_stream_beyond_its_estimate_is_charged_while_it_runs() {
    let mocks = one_mock(Config { decode_tokens_per_s: 2000.0, output_tokens: 100_000, ..config() }).await;
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates {
        output_tokens_per_minute: Some(1000),
        burst_multiplier: Some(500.0),
        ..Default::default()
    };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let left = |answer: &weir_tests::client::Answer| -> u64 {
        answer.headers["x-ratelimit-remaining-tokens"].to_str().expect("text").parse().expect("a number")
    };
    let long =
        r#"{"model":"gpt-4.1","stream":true,"max_tokens":90000,"messages":[{"role":"user","content":"hi"}]}"#;
    let stream = gw.client.send(Method::POST, "/v1/chat/completions", long).await;
    assert_eq!(stream.status(), StatusCode::OK);
    let mut body = stream.into_body();
    let reader = tokio::spawn(async move { while body.frame().await.is_some() {} });
    // 500 000 less its estimate of 512 tokens; then less what it has generated beyond.
    eventually("two steps are charged", || async { left(&gw.client.chat(STREAM).await) < 498_000 }).await;
    assert!(!reader.is_finished(), "long before its end");
    reader.abort();
}
