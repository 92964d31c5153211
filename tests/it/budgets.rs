//! Money: budgets per period, reserved and settled like tokens.

use http::StatusCode;
use mock_llm::Config;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Resources, gateway, mock};
use weir_tests::eventually;
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;

#[tokio::test]
async fn a_budget_holds_over_gateways_and_says_when_it_begins_anew() {
    let end = CancellationToken::new();
    let config = Config { models: vec!["gpt-4.1".into()], ..Config::default() };
    let mocks = [mock(config, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    // A dollar per output token, so an answer of ten tokens is ten dollars.
    let model = v1::ModelSpec {
        pool: "chat".into(),
        output_price_micro_dollars: 1_000_000_000_000,
        ..Default::default()
    };
    resources.put("gpt-4.1", Spec::Model(model));
    // Far above what a bucket of tokens could count.
    let budget = v1::Budget { micro_dollars: 20_000_000, period: v1::BudgetPeriod::Month.into() };
    let limits = v1::Rates { budget: Some(budget), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let redis = Redis::start().await;
    let gateways =
        [gateway(&resources, Some(redis.url())).await, gateway(&resources, Some(redis.url())).await];
    for gateway in &gateways {
        assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK);
    }
    let mut refused = None;
    eventually("twenty dollars are spent", || async {
        gateways[0].client.chat(CHAT).await.status != StatusCode::OK
    })
    .await;
    for gateway in &gateways {
        refused = Some(gateway.client.chat(CHAT).await);
    }
    let refused = refused.expect("asked");
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS, "{}", refused.text());
    assert_eq!(refused.error_code(), "insufficient_quota");
    let error = &refused.json()["error"];
    assert_eq!((error["kind"].as_str(), error["scope"]["kind"].as_str()), (Some("spend"), Some("tenant")));
    let ms = error["retry_after_ms"].as_u64().expect("a time");
    assert!(ms > 0 && ms <= 31 * 24 * 3600 * 1000, "{ms}: until the first of the next month");
    assert!(refused.headers.contains_key("retry-after-ms"));
}

#[tokio::test]
async fn what_stands_between_a_key_and_a_model_is_explained_without_its_secret() {
    let end = CancellationToken::new();
    let config = Config { models: vec!["gpt-4.1".into()], ..Config::default() };
    let mocks = [mock(config, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let limits = v1::Rates {
        requests_per_minute: Some(1),
        burst_multiplier: Some(2.0),
        budget: Some(v1::Budget { micro_dollars: 5_000_000, ..Default::default() }),
        ..Default::default()
    };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let redis = Redis::start().await;
    let gw = gateway(&resources, Some(redis.url())).await;
    let ops = weir_tests::client::Client::new(gw.running.ops_address, weir_tests::cluster::OPS_TOKEN);
    let ask = || ops.ask(http::Method::GET, "/limits?key=acme-key&model=gpt-4.1", "");
    let before = ask().await;
    assert_eq!(before.status, StatusCode::OK, "{}", before.text());
    assert!(before.json()["refuses"].is_null(), "{}", before.text());
    for _ in 0..2 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    let after = ask().await.json();
    assert_eq!(after["refuses"], "requests of tenant acme", "{after}");
    let requests = &after["limits"][0];
    assert_eq!((requests["kind"].as_str(), requests["remaining"].as_u64()), (Some("requests"), Some(0)));
    let (said, refused) = (requests["wait_ms"].as_u64(), gw.client.chat(CHAT).await);
    let said = said.expect("a time");
    let told = refused.json()["error"]["retry_after_ms"].as_u64().expect("a time");
    assert!(told <= said && said - told < 5000, "the same time, a moment later: {said} and {told}");
    assert_eq!(after["limits"][1]["limit"], 5_000_000, "{after}");
    assert_eq!(after["backends"][0]["slots"], 50);
    assert_eq!(
        ops.ask(http::Method::GET, "/limits?key=nobody&model=gpt-4.1", "").await.status,
        StatusCode::NOT_FOUND
    );
}
