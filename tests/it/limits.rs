//! Limits that hold over several gateways.

use http::StatusCode;
use mock_llm::Config;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Resources, gateway, mock};
use weir_tests::eventually;
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], slots: 4096, ..Config::default() }
}

/// A capacity of 100 that drains one per minute.
fn hundred() -> v1::Rates {
    v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(100.0), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_of_two_thousand_over_three_gateways() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    resources.put(
        "gpt-4.1",
        Spec::Model(v1::ModelSpec { pool: "chat".into(), limits: Some(hundred()), ..Default::default() }),
    );
    let backend = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mocks[0].address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        max_concurrency: Some(10_000),
        ..Default::default()
    };
    resources.put("b0", Spec::Backend(backend));
    let redis = Redis::start().await;
    let mut gateways = Vec::new();
    for _ in 0..3 {
        gateways.push(gateway(&resources, Some(redis.url())).await);
    }
    let clients: Vec<_> = gateways.iter().map(|g| g.client.clone()).collect();
    let mut requests = JoinSet::new();
    for i in 0..2000 {
        let client = clients[i % 3].clone();
        requests.spawn(async move { client.chat(CHAT).await });
    }
    let (mut granted, mut refused) = (0, 0);
    while let Some(answer) = requests.join_next().await {
        let answer = answer.expect("no panic");
        match answer.status {
            StatusCode::OK => granted += 1,
            StatusCode::TOO_MANY_REQUESTS => {
                refused += 1;
                assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
                assert!(answer.headers.contains_key("retry-after-ms"));
                assert_eq!(answer.json()["error"]["scope"]["kind"], "model", "{}", answer.text());
            }
            other => panic!("{other}: {}", answer.text()),
        }
    }
    assert_eq!((granted, refused), (100, 1900));
    assert_eq!(mocks[0].handle.counters().requests, 100, "what was refused reached no backend");
}

#[tokio::test]
async fn an_answer_says_what_is_left() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(hundred()), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let answer = gw.client.chat(CHAT).await;
    assert_eq!(answer.headers["x-ratelimit-limit-requests"], "1", "the declared rate, not the burst");
    assert_eq!(answer.headers["x-ratelimit-remaining-requests"], "99");
    assert!(answer.headers.contains_key("x-ratelimit-reset-requests"));
}

#[tokio::test]
async fn a_backend_never_sees_more_than_its_maximum() {
    let end = CancellationToken::new();
    let slow = Config { decode_tokens_per_s: 50.0, ..config() };
    let mocks = [mock(slow, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let backend = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mocks[0].address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        max_concurrency: Some(4),
        ..Default::default()
    };
    resources.put("b0", Spec::Backend(backend));
    let redis = Redis::start().await;
    let gateways =
        [gateway(&resources, Some(redis.url())).await, gateway(&resources, Some(redis.url())).await];
    let mut requests = JoinSet::new();
    for i in 0..40 {
        let client = gateways[i % 2].client.clone();
        requests.spawn(async move {
            client
                .chat(r#"{"model":"gpt-4.1","max_tokens":5,"messages":[{"role":"user","content":"hi"}]}"#)
                .await
                .status
        });
    }
    while let Some(status) = requests.join_next().await {
        assert_eq!(status.expect("no panic"), StatusCode::OK, "forty fit into four, one after the other");
    }
    assert!(mocks[0].handle.counters().max_in_flight <= 4);
}

#[tokio::test]
async fn redis_gone_fails_no_request() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(hundred()), ..Default::default() }));
    let mut redis = Redis::start().await;
    let gw = gateway(&resources, Some(redis.url())).await;
    eventually("served", || async { gw.client.chat(CHAT).await.status == StatusCode::OK }).await;
    redis.kill().await;
    for _ in 0..20 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    let mut admitted = 20;
    while gw.client.chat(CHAT).await.status == StatusCode::OK {
        admitted += 1;
        assert!(admitted <= 100, "this gateway's share of the limit still holds");
    }
}
