//! Usage by tenant: the records equal the backends' counts, and all gateways share them.

use http::{Method, StatusCode};
use mock_llm::Config;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{Gateway, OPS_TOKEN, Resources, gateway, mock};
use weir_tests::eventually;
use weir_tests::process::command;
use weir_tests::redis::Redis;

async fn page(gateway: &Gateway, query: &str) -> Value {
    let answer = Client::new(gateway.running.ops_address, OPS_TOKEN).ask(Method::GET, query, "").await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    answer.json()
}

/// Short and long requests, unary and streamed (beyond the reservation, so charged in steps), over two gateways:
/// every figure is the sum of the backends' counts, and the money is that times the price.
#[tokio::test]
async fn usage_is_the_sum_of_what_the_backends_did() {
    let end = CancellationToken::new();
    let config = || Config { models: vec!["gpt-4.1".into(), "small".into()], ..Config::default() };
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    for (model, backend) in [("gpt-4.1", 0), ("small", 1)] {
        let spec = v1::ModelSpec {
            pool: "chat".into(),
            input_price_micro_dollars: 2_000_000,
            output_price_micro_dollars: 8_000_000,
            ..Default::default()
        };
        resources.put(model, Spec::Model(spec));
        let backend_spec = v1::BackendSpec {
            pool: "chat".into(),
            url: format!("http://{}", mocks[backend].address),
            models: [(model.to_owned(), String::new())].into(),
            ..Default::default()
        };
        resources.put(&format!("b{backend}"), Spec::Backend(backend_spec));
    }
    // With limits and without: the records do not depend on them.
    let limits = v1::Rates { tokens_per_minute: Some(1_000_000), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let redis = Redis::start().await;
    let gateways =
        [gateway(&resources, Some(redis.url())).await, gateway(&resources, Some(redis.url())).await];
    let asked = (0..40).map(|n| {
        let (model, stream, tokens) =
            (["gpt-4.1", "small"][n % 2], n % 3 == 0, if n % 5 == 0 { 1500 } else { 7 + n });
        let body = format!(
            r#"{{"model":"{model}","stream":{stream},"max_tokens":{tokens},"messages":[{{"role":"user","content":"number {n}"}}]}}"#
        );
        let client = &gateways[n % 2].client;
        let client = client.clone();
        tokio::spawn(async move { assert_eq!(client.chat(&body).await.status, StatusCode::OK) })
    });
    for asked in asked.collect::<Vec<_>>() {
        asked.await.expect("answered");
    }
    let done: Vec<_> = mocks.iter().map(|mock| mock.handle.counters()).collect();
    let sum = |of: fn(&mock_llm::Counters) -> u64| done.iter().map(of).sum::<u64>();
    eventually("all is settled", || async {
        page(&gateways[0], "/usage").await["total"]["requests"] == sum(|c| c.requests)
    })
    .await;
    let told = page(&gateways[1], "/usage?by=model").await;
    for (row, counters) in told["rows"].as_array().expect("rows").iter().zip(&done) {
        let (input, output) = (counters.prompt_tokens, counters.generation_tokens);
        assert_eq!(row["requests"], 20, "{row}");
        assert_eq!((&row["input_tokens"], &row["output_tokens"]), (&input.into(), &output.into()), "{row}");
        assert_eq!(row["cost_micro_dollars"], input * 2 + output * 8, "{row}");
    }
    assert_eq!(told["total"]["output_tokens"], sum(|c| c.generation_tokens));
    assert_eq!(page(&gateways[0], "/usage?tenant=nobody").await["total"]["requests"], 0);
    let small = page(&gateways[0], "/usage?model=small&by=tenant").await;
    assert_eq!(
        (small["rows"][0]["tenant"].as_str(), small["total"]["requests"].as_u64()),
        (Some("acme"), Some(20))
    );

    let url = format!("http://{}", gateways[0].running.ops_address);
    let mut usage = command("weir");
    usage.args(["usage", "--by", "tenant,model", "--gateway", &url]).env("WEIR_OPS_TOKEN", OPS_TOKEN);
    let printed = usage.output().await;
    let printed = String::from_utf8(printed.expect("runs").stdout).expect("UTF-8");
    let dollars = (sum(|c| c.prompt_tokens) * 2 + sum(|c| c.generation_tokens) * 8) as f64 / 1e6;
    assert!(printed.starts_with("TENANT  MODEL") && printed.contains("total"), "{printed}");
    assert!(printed.contains(&format!("${dollars:.2}")[..4]), "{printed} has {dollars}");
}
