//! One backend fails: no client notices, as long as nothing was sent.

use http::{Method, StatusCode};
use mock_llm::{Config, ErrorInStream, ErrorStatus, Faults, Hang, HangAt};
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{Mock, Resources, digest, gateway, mock};
use weir_tests::eventually;

fn millis(ms: i32) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: 0, nanos: ms * 1_000_000 })
}

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
const STREAM: &str = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Asks until each of these backends is known: there are no hedges before.
async fn learn(client: &Client, mocks: &[Mock], body: &str) {
    while mocks.iter().any(|mock| mock.handle.counters().requests < 25) {
        let answer = client.chat(body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
}

fn hangs(mock: &Mock) {
    let hang = Hang { at: HangAt::Headers, probability: 1.0 };
    mock.handle.set_faults(Faults { hang: Some(hang), ..Faults::default() }).expect("valid");
}

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

#[tokio::test]
async fn a_dead_backend_costs_no_request_and_is_left_alone() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await, mock(config(), &end).await];
    let resources = Resources::in_front_of(&mocks);
    let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
    mocks[1].handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    let gw = gateway(&resources, None).await;
    for i in 0..60 {
        let answer = gw.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "request {i}: {}", answer.text());
    }
    let tried = mocks[1].handle.counters().requests;
    assert!(tried <= 3, "ejected after three failures in a row, tried {tried} times");
}

#[tokio::test]
async fn a_clients_own_mistake_is_never_held_against_a_backend() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let error = ErrorStatus { status: 400, probability: 1.0, retry_after_s: None };
    mocks[0].handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    for _ in 0..10 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::BAD_REQUEST);
    }
    mocks[0].handle.clear_faults();
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    assert_eq!(mocks[0].handle.counters().requests, 11, "each was sent once");
}

#[tokio::test]
async fn with_every_backend_down_the_answer_is_ours_and_attempts_are_bounded() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let error = ErrorStatus { status: 503, probability: 1.0, retry_after_s: Some(1) };
    for m in &mocks {
        let faults = Faults { error_status: Some(error.clone()), ..Faults::default() };
        m.handle.set_faults(faults).expect("valid");
    }
    for _ in 0..10 {
        let answer = gw.client.chat(CHAT).await;
        assert!(answer.status.is_server_error(), "never 429 for our trouble: {}", answer.status);
    }
    let attempts: u64 = mocks.iter().map(|m| m.handle.counters().requests).sum();
    assert!(attempts <= 20, "{attempts} attempts for 10 requests");
}

#[tokio::test]
async fn a_backend_that_hangs_costs_nobody_a_second_and_is_left_alone() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await, mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let narrow = v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mocks[1].address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        max_concurrency: Some(1),
        ..Default::default()
    };
    resources.put("b1", Spec::Backend(narrow));
    let gw = gateway(&resources, None).await;
    learn(&gw.client, &mocks, STREAM).await;
    hangs(&mocks[1]);
    let before = mocks[1].handle.counters().requests;
    for i in 0..60 {
        let answer = gw.client.chat(STREAM).await;
        let whole = answer.text().contains("[DONE]");
        assert!(answer.status == StatusCode::OK && whole, "request {i}: {}", answer.text());
    }
    // It has one slot, which a cancelled call that kept its slot would hold.
    let tried = mocks[1].handle.counters().requests - before;
    assert!(
        (3..=4).contains(&tried),
        "left alone after three that others answered first, tried {tried} times"
    );
}

#[tokio::test]
async fn a_pool_that_waits_alone_does_not_try_elsewhere() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let clocks = v1::Timeouts { first_byte: millis(300), ..Default::default() };
    let pool = v1::PoolSpec {
        timeouts: Some(clocks),
        hedging: Some(v1::Hedging { disabled: true, floor: millis(1), unary: true }),
        retry_budget: Some(v1::RetryBudget { max_attempts: 1, ..Default::default() }),
        ..Default::default()
    };
    resources.put("chat", Spec::Pool(pool));
    let gw = gateway(&resources, None).await;
    learn(&gw.client, &mocks, STREAM).await;
    mocks.iter().for_each(hangs);
    let before: u64 = mocks.iter().map(|m| m.handle.counters().requests).sum();
    assert_eq!(gw.client.chat(STREAM).await.status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(mocks.iter().map(|m| m.handle.counters().requests).sum::<u64>(), before + 1);
}

/// A request that was refused held the only trial of an ejected backend for ten seconds.
#[tokio::test]
async fn refused_requests_do_not_keep_a_backend_out_that_works_again() {
    const OTHER_KEY: &str = "weir_test_key_of_others";
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let second = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let ejection = v1::Ejection { base_duration: second, max_duration: second, ..Default::default() };
    resources.put("chat", Spec::Pool(v1::PoolSpec { ejection: Some(ejection), ..Default::default() }));
    let once = v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("few", Spec::Tenant(v1::TenantSpec { limits: Some(once), ..Default::default() }));
    let known = v1::KeyDigest { sha256: digest(OTHER_KEY), prefix: "weir_test".into(), expire_time: None };
    let key = v1::ApiKeySpec { tenant: "few".into(), digests: vec![known], ..Default::default() };
    resources.put("few-key", Spec::ApiKey(key));
    let gw = gateway(&resources, None).await;
    let (few, ops) = (Client::new(gw.running.address, OTHER_KEY), Client::new(gw.running.ops_address, ""));
    assert_eq!(few.chat(CHAT).await.status, StatusCode::OK, "its one request of this minute");
    let ejected = async || {
        let page = ops.ask(Method::GET, "/metrics", "").await;
        page.text().lines().any(|line| line.starts_with("weir_backend_ejected{backend=\"b1\"} 1"))
    };
    let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
    mocks[1].handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    eventually("it is ejected", async || {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
        ejected().await
    })
    .await;
    mocks[1].handle.clear_faults();
    eventually("it is on probation", async || !ejected().await).await;
    for _ in 0..20 {
        assert_eq!(few.chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS);
    }
    let before = mocks[1].handle.counters().requests;
    // Its share is small, because it failed.
    let mut asked = 0;
    while mocks[1].handle.counters().requests == before && asked < 100 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
        asked += 1;
    }
    assert!(mocks[1].handle.counters().requests > before, "not one of {asked} in turn tried it");
}

#[tokio::test]
async fn an_error_inside_a_200_is_tried_elsewhere_and_counts() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await, mock(config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let error = ErrorInStream { after_tokens: 0, probability: 1.0 };
    mocks[1].handle.set_faults(Faults { error_in_stream: Some(error), ..Faults::default() }).expect("valid");
    let stream = CHAT.replace(r#"{"model""#, r#"{"stream":true,"model""#);
    for i in 0..30 {
        for body in [CHAT, &stream] {
            let answer = gw.client.chat(body).await;
            let text = answer.text();
            assert!(answer.status == StatusCode::OK && !text.contains("\"error\":{"), "request {i}: {text}");
        }
    }
    let tried = mocks[1].handle.counters().requests;
    assert!(tried <= 3, "ejected after three failures in a row, tried {tried} times");
}

#[tokio::test]
async fn requests_that_begin_alike_go_to_one_backend_from_every_gateway() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await, mock(config(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let policy = v1::BalancingPolicy::PrefixAffinity.into();
    resources.put("chat", Spec::Pool(v1::PoolSpec { balancing_policy: policy, ..Default::default() }));
    let gateways = [gateway(&resources, None).await, gateway(&resources, None).await];
    let mut used = 0;
    for topic in 0..12 {
        let before: Vec<u64> = mocks.iter().map(|m| m.handle.counters().requests).collect();
        for gw in &gateways {
            for question in 0..3 {
                let long = format!("topic {topic} {}", "x".repeat(300));
                let body = CHAT.replace("hi", &format!("{long} question {question}"));
                assert_eq!(gw.client.chat(&body).await.status, StatusCode::OK);
            }
        }
        let after = mocks.iter().zip(before).map(|(m, b)| m.handle.counters().requests - b);
        let hit: Vec<usize> = after.enumerate().filter(|(_, n)| *n > 0).map(|(i, _)| i).collect();
        assert_eq!(hit.len(), 1, "topic {topic} went to {hit:?}");
        used |= 1 << hit[0];
    }
    assert_eq!(used, 0b111, "different beginnings spread");
}

/// The request was answered 503 at once, although the pool's queue lets a request wait for a slot.
#[tokio::test]
async fn a_retry_that_finds_every_slot_taken_waits_for_one() {
    let end = CancellationToken::new();
    let slow = || Config { slots: 4096, decode_tokens_per_s: 50.0, output_tokens: 100_000, ..config() };
    let mocks = [mock(slow(), &end).await, mock(slow(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    for (i, mock) in mocks.iter().enumerate() {
        let one_slot = v1::BackendSpec {
            pool: "chat".into(),
            url: format!("http://{}", mock.address),
            models: [("gpt-4.1".to_owned(), String::new())].into(),
            max_concurrency: Some(1),
            ..Default::default()
        };
        resources.put(&format!("b{i}"), Spec::Backend(one_slot));
    }
    let queue =
        v1::Queue { max_waiting: 10, max_wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }) };
    resources.put("chat", Spec::Pool(v1::PoolSpec { queue: Some(queue), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let endless = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
    let stream = gw.client.send(Method::POST, "/v1/chat/completions", endless).await;
    assert_eq!(stream.status(), StatusCode::OK);
    assert!(!stream.headers().contains_key("x-weir-wait-ms"), "it did not wait");
    let taken = usize::from(mocks[1].handle.counters().in_flight == 1);
    let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
    let other = &mocks[1 - taken].handle;
    other.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    let client = gw.client.clone();
    let short = CHAT.replace(r#""messages""#, r#""max_tokens":2,"messages""#);
    let retried = tokio::spawn(async move { client.chat(&short).await });
    let ops = Client::new(gw.running.ops_address, weir_tests::cluster::OPS_TOKEN);
    eventually("the retry waits", || async {
        let page = ops.ask(Method::GET, "/limits?key=acme-key&model=gpt-4.1", "").await.json();
        other.counters().requests == 1 && page["waiting"] == 1
    })
    .await;
    drop(stream);
    let answer = retried.await.expect("answered");
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    let waited = answer.headers["x-weir-wait-ms"].to_str().expect("text").parse::<u64>();
    assert!(waited.is_ok_and(|ms| ms > 0), "{:?}", answer.headers);
    assert_eq!(other.counters().requests, 1, "it was served by the slot that came free");
}
