//! Waiting for limits and slots, over a real Redis and several gateways.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::Config;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Mock, Resources, gateway, mock};
use weir_tests::eventually;
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
/// At 50 tokens per second: two seconds.
const LONG: &str =
    r#"{"model":"gpt-4.1","max_tokens":100,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

fn slow() -> Config {
    Config { models: vec!["gpt-4.1".into()], slots: 4096, decode_tokens_per_s: 50.0, ..Config::default() }
}

fn wait(seconds: u64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: seconds.cast_signed(), nanos: 0 })
}

/// One slot, and a queue for it with this length and longest wait.
fn one_slot(mocks: &[Mock], max_waiting: u32, max_wait: u64) -> Resources {
    let mut resources = Resources::in_front_of(mocks);
    let backend = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mocks[0].address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        max_concurrency: Some(1),
        ..Default::default()
    };
    resources.put("b0", Spec::Backend(backend));
    let queue = v1::Queue { max_waiting, max_wait: wait(max_wait) };
    resources.put("chat", Spec::Pool(v1::PoolSpec { queue: Some(queue), ..Default::default() }));
    resources
}

#[tokio::test]
async fn a_models_concurrency_is_waited_for_and_never_exceeded_over_two_gateways() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates { concurrency: Some(2), max_wait: wait(60), ..Default::default() };
    resources.put(
        "gpt-4.1",
        Spec::Model(v1::ModelSpec { pool: "chat".into(), limits: Some(limits), ..Default::default() }),
    );
    let redis = Redis::start().await;
    let gateways =
        [gateway(&resources, Some(redis.url())).await, gateway(&resources, Some(redis.url())).await];
    let mut requests = JoinSet::new();
    for i in 0..16 {
        let client = gateways[i % 2].client.clone();
        requests.spawn(async move { client.chat(CHAT).await.status });
    }
    while let Some(status) = requests.join_next().await {
        assert_eq!(status.expect("no panic"), StatusCode::OK, "nobody is refused who can wait");
    }
    let most = mocks[0].handle.counters().max_in_flight;
    assert!(most <= 2, "{most} at once");
}

#[tokio::test]
async fn a_callers_own_limit_refuses_at_once_and_says_when() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let one = v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(one), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    let refused = gw.client.chat(CHAT).await;
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused.headers["x-ratelimit-remaining-requests"], "0", "on refusals too");
    let ms: u64 = refused.headers["retry-after-ms"].to_str().expect("text").parse().expect("a number");
    assert!((50_000..=60_000).contains(&ms), "{ms}");
    assert_eq!(refused.json()["error"]["retry_after_ms"], ms);
}

#[tokio::test]
async fn a_slot_freed_in_this_gateway_goes_to_who_waits_first() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await];
    let redis = Redis::start().await;
    let gw = gateway(&one_slot(&mocks, 10, 30), Some(redis.url())).await;
    let first = gw.client.send(Method::POST, "/v1/chat/completions", LONG).await;
    assert_eq!(first.status(), StatusCode::OK);
    let client = gw.client.clone();
    let second = tokio::spawn(async move { client.chat(CHAT).await.status });
    drop(first);
    assert_eq!(second.await.expect("no panic"), StatusCode::OK);
    assert_eq!(mocks[0].handle.counters().max_in_flight, 1);
}

#[tokio::test]
async fn a_full_queue_and_a_wait_in_vain_are_503_with_a_time_to_come_back() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await];
    let gw = gateway(&one_slot(&mocks, 1, 1), None).await;
    let first = gw.client.send(Method::POST, "/v1/chat/completions", LONG).await;
    assert_eq!(first.status(), StatusCode::OK);
    let both = {
        let (a, b) = (gw.client.clone(), gw.client.clone());
        tokio::join!(async move { a.chat(CHAT).await }, async move { b.chat(CHAT).await })
    };
    for answer in [both.0, both.1] {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE, "{}", answer.text());
        assert_eq!(answer.error_code(), "overloaded");
        assert!(answer.headers.contains_key("retry-after"));
    }
    drop(first);
    eventually("the slot is free again", || async { gw.client.chat(CHAT).await.status == StatusCode::OK })
        .await;
}

#[tokio::test]
async fn a_full_model_waits_in_its_queue_and_then_goes_to_its_fallback() {
    let end = CancellationToken::new();
    let other = Config { models: vec!["small".into()], ..slow() };
    let mocks = [mock(slow(), &end).await, mock(other, &end).await];
    let mut resources = one_slot(&mocks, 10, 1);
    resources.put("spare", Spec::Pool(v1::PoolSpec::default()));
    let backend = v1::BackendSpec {
        pool: "spare".into(),
        url: format!("http://{}", mocks[1].address),
        models: [("small".to_owned(), String::new())].into(),
        ..Default::default()
    };
    resources.put("b1", Spec::Backend(backend));
    resources.put("small", Spec::Model(v1::ModelSpec { pool: "spare".into(), ..Default::default() }));
    let model = v1::ModelSpec { pool: "chat".into(), fallbacks: vec!["small".into()], ..Default::default() };
    resources.put("gpt-4.1", Spec::Model(model));
    let gw = gateway(&resources, None).await;
    let first = gw.client.send(Method::POST, "/v1/chat/completions", LONG).await;
    assert_eq!(first.status(), StatusCode::OK);
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    assert_eq!(mocks[1].handle.counters().requests, 1, "by the fallback");
}

#[tokio::test]
async fn a_request_that_can_never_fit_is_told_so_and_not_asked_to_come_back() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let small = v1::Rates { tokens_per_minute: Some(50), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(small), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let refused = gw.client.chat(LONG).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.text());
    assert_eq!(refused.error_code(), "request_exceeds_limit");
    assert!(!refused.headers.contains_key("retry-after"));
    let unbounded = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
    assert_eq!(gw.client.chat(unbounded).await.status, StatusCode::OK, "a guess is clamped to the bucket");
}

#[tokio::test]
async fn a_lost_lease_is_taken_again_while_its_stream_goes_on() {
    let end = CancellationToken::new();
    let mocks = [mock(Config { output_tokens: 100_000, ..slow() }, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates { concurrency: Some(1), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let redis = Redis::start().await;
    let gw = gateway(&resources, Some(redis.url())).await;
    let long = LONG.replace("100,", "100000,");
    let stream = gw.client.send(Method::POST, "/v1/chat/completions", long).await;
    assert_eq!(stream.status(), StatusCode::OK);
    eventually("its lease is there", || async { redis.standing("acme").await.leases == 1 }).await;
    redis.flush().await;
    assert_eq!(redis.standing("acme").await.leases, 0, "the store lost everything");
    eventually("it is counted again", || async { redis.standing("acme").await.leases == 1 }).await;
    assert_eq!(
        gw.client.chat(CHAT).await.status,
        StatusCode::TOO_MANY_REQUESTS,
        "nobody is let in beside it"
    );
    drop(stream);
    eventually("and once only", || async { redis.standing("acme").await.leases == 0 }).await;
}

/// The life of a lease, 15 s, says nothing about that.
#[tokio::test]
async fn a_refusal_for_concurrency_says_when_a_place_is_likely_free() {
    let end = CancellationToken::new();
    let mocks = [mock(Config { output_tokens: 100_000, ..slow() }, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates { concurrency: Some(1), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let long = LONG.replace("100,", "100000,");
    let began = Instant::now();
    let refused = async || {
        let stream = gw.client.send(Method::POST, "/v1/chat/completions", long.clone()).await;
        assert_eq!(stream.status(), StatusCode::OK);
        let answer = gw.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.text());
        let error = answer.json()["error"].clone();
        assert_eq!((&error["type"], &error["kind"]), (&"requests".into(), &"concurrency".into()), "{error}");
        Duration::from_millis(error["retry_after_ms"].as_u64().expect("a time"))
    };
    assert_eq!(refused().await, Duration::from_secs(1), "nothing has ended yet");
    eventually("the place is free", || async { gw.client.chat(CHAT).await.status == StatusCode::OK }).await;
    let wait = refused().await;
    assert!(wait <= began.elapsed(), "no request has taken {wait:?}");
}
