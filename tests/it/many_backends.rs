//! Pools of more backends than a request asks for at first.

use http::{Method, StatusCode};
use mock_llm::{Config, ErrorStatus, Faults};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, BalancingPolicy, resource::Spec};
use weir_tests::cluster::{Mock, Resources, gateway, mock};
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
/// At two tokens per second it does not end within a test.
const LONG: &str =
    r#"{"model":"gpt-4.1","max_tokens":10000,"stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
const BACKENDS: usize = 90;

fn slow() -> Config {
    Config { models: vec!["gpt-4.1".into()], slots: 4096, decode_tokens_per_s: 2.0, ..Config::default() }
}

fn backend(mock: &Mock, region: &str) -> v1::BackendSpec {
    v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mock.address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        region: region.into(),
        max_concurrency: Some(1),
        ..Default::default()
    }
}

/// Many backends of one slot each, without time to wait for one.
fn many(mocks: &[Mock], policy: BalancingPolicy) -> Resources {
    let mut resources = Resources::in_front_of(mocks);
    let queue =
        v1::Queue { max_waiting: 1, max_wait: Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 }) };
    let pool = v1::PoolSpec { balancing_policy: policy.into(), queue: Some(queue), ..Default::default() };
    resources.put("chat", Spec::Pool(pool));
    for n in 0..BACKENDS {
        resources.put(&format!("b{n}"), Spec::Backend(backend(&mocks[0], "")));
    }
    resources
}

#[tokio::test]
async fn every_slot_of_many_backends_is_found_and_a_refusal_means_that_all_are_taken() {
    for policy in
        [BalancingPolicy::WeightedRoundRobin, BalancingPolicy::LeastRequest, BalancingPolicy::PrefixAffinity]
    {
        let end = CancellationToken::new();
        let mocks = [mock(slow(), &end).await];
        let redis = Redis::start().await;
        let resources = many(&mocks, policy);
        let gateways =
            [gateway(&resources, Some(redis.url())).await, gateway(&resources, Some(redis.url())).await];
        let mut requests = JoinSet::new();
        for n in 0..BACKENDS {
            let client = gateways[n % 2].client.clone();
            requests.spawn(async move { client.send(Method::POST, "/v1/chat/completions", LONG).await });
        }
        let streams = requests.join_all().await;
        assert!(streams.iter().all(|stream| stream.status() == StatusCode::OK), "{policy:?}");
        for gateway in &gateways {
            let refused = gateway.client.chat(CHAT).await;
            assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE, "{policy:?}: {}", refused.text());
        }
        assert_eq!(mocks[0].handle.counters().max_in_flight, BACKENDS, "{policy:?}: each once");
    }
}

#[tokio::test]
async fn an_attempt_that_fails_at_the_only_near_backend_is_made_again_at_a_far_one() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(), &end).await, mock(slow(), &end).await];
    let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
    let faults = Faults { error_status: Some(error), ..Faults::default() };
    mocks[0].handle.set_faults(faults).expect("valid");
    let mut resources = Resources::in_front_of(&mocks);
    let regions = vec!["near".into(), "far".into()];
    resources.put("chat", Spec::Pool(v1::PoolSpec { regions, ..Default::default() }));
    resources.put("b0", Spec::Backend(backend(&mocks[0], "near")));
    for n in 1..20 {
        resources.put(&format!("b{n}"), Spec::Backend(backend(&mocks[1], "far")));
    }
    let gateway = gateway(&resources, None).await;
    let answer = gateway.client.chat(CHAT).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let asked = [0, 1].map(|at: usize| mocks[at].handle.counters().requests);
    assert_eq!(asked, [1, 1], "the near one first");
}
