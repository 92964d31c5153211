//! Complaints P32 to P41 of users of other gateways, each by name. docs/health.md lists those that a unit test
//! answers.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::{Config, ErrorStatus, Faults};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::{Gateway, Mock, Resources, gateway, mock};
use weir_tests::eventually;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":20,"messages":[{"role":"user","content":"hi"}]}"#;

/// One token, which comes at once.
const SHORT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

async fn mocks<const N: usize>(config: Config) -> [Mock; N] {
    let end = CancellationToken::new();
    let mut mocks = Vec::new();
    for _ in 0..N {
        mocks.push(mock(config.clone(), &end).await);
    }
    mocks.try_into().expect("so many were started")
}

fn answers(mock: &Mock, status: u16, retry_after_s: Option<u32>) {
    let error = ErrorStatus { status, probability: 1.0, retry_after_s };
    mock.handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
}

fn is_ejected(gw: &Gateway, backend: &str) -> bool {
    let snapshot = gw.running.live.snapshot();
    let backend = snapshot.backends.get(backend).expect("configured");
    snapshot.pools.get(&backend.spec.pool).expect("configured").state.is_ejected(&backend.name)
}

fn in_flight(gw: &Gateway) -> u32 {
    gw.running.live.snapshot().backends.values().map(|backend| backend.state.in_flight()).sum()
}

/// A minute for each answer: no client waits for it here.
fn slow() -> Config {
    Config { decode_tokens_per_s: 0.3, ..config() }
}

/// Sends a request, and leaves when a backend has it.
async fn leave_once_asked(gw: &Gateway, mocks: &[Mock]) {
    let requests = || mocks.iter().map(|mock| mock.handle.counters().requests).sum::<u64>();
    let before = requests();
    tokio::select! {
        answer = gw.client.chat(CHAT) => panic!("answered: {}", answer.text()),
        () = eventually("a backend is asked", || async { requests() > before }) => {}
    }
}

#[tokio::test]
async fn p32_a_long_cooldown_is_not_cut_short_and_failures_in_a_row_eject() {
    let mocks: [Mock; 3] = mocks(config()).await;
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let before = [0, 1].map(|i: usize| mocks[i].handle.counters().requests);
    answers(&mocks[0], 503, Some(60));
    answers(&mocks[1], 500, None);
    let began = Instant::now();
    for i in 0..60 {
        let answer = gw.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "request {i}: {}", answer.text());
        if i == 20 {
            // Whatever it would answer now, it is not asked for a minute.
            answers(&mocks[0], 503, Some(1));
        }
    }
    let asked = [0, 1].map(|i: usize| mocks[i].handle.counters().requests - before[i]);
    assert_eq!(asked[0], 1, "left alone for as long as it asked");
    // An ejection lasts 5 s at first; on a machine that is slow it is asked again.
    let again = began.elapsed().as_secs() / 5;
    assert!(asked[1] <= 3 + again, "three failures in a row eject: {asked:?}");
}

#[tokio::test]
async fn p33_a_clients_own_impatience_never_ejects_a_backend() {
    let mocks: [Mock; 2] = mocks(slow()).await;
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    for _ in 0..20 {
        leave_once_asked(&gw, &mocks).await;
    }
    eventually("all of them were cancelled", || async {
        mocks.iter().map(|m| m.handle.counters().cancelled).sum::<u64>() == 20
    })
    .await;
    assert!(!is_ejected(&gw, "b0") && !is_ejected(&gw, "b1"));
    assert_eq!(gw.client.chat(SHORT).await.status, StatusCode::OK);
}

#[tokio::test]
async fn p34_counts_in_flight_come_back_to_nothing_and_no_backend_draws_nearly_all() {
    let mocks: [Mock; 3] = mocks(Config { decode_tokens_per_s: 200.0, ..config() }).await;
    let mut resources = Resources::in_front_of(&mocks);
    let policy = v1::BalancingPolicy::LeastRequest.into();
    resources.put("chat", Spec::Pool(v1::PoolSpec { balancing_policy: policy, ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let mut requests = JoinSet::new();
    for i in 0..120_u64 {
        let client = gw.client.clone();
        let stream = CHAT.replace(r#"{"model""#, r#"{"stream":true,"model""#);
        requests.spawn(async move {
            let body = if i % 2 == 0 { CHAT } else { &stream };
            // A third of the clients leave: before the first byte, in the middle, near the end.
            let patience = if i % 3 == 0 { Duration::from_millis(i) } else { Duration::from_secs(60) };
            let _ = tokio::time::timeout(patience, client.chat(body)).await;
        });
    }
    while requests.join_next().await.is_some() {}
    eventually("nothing is counted as in flight", || async { in_flight(&gw) == 0 }).await;
    let before: Vec<u64> = mocks.iter().map(|m| m.handle.counters().requests).collect();
    for _ in 0..300 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    for (mock, before) in mocks.iter().zip(before) {
        let drawn = mock.handle.counters().requests - before;
        // Their split depends on the speeds that each showed under the load before: between a fifth and twice the
        // usual, so that one has 5 % to 83 % of them.
        assert!((3..=270).contains(&drawn), "{drawn} of 300 went to one of three");
    }
}

#[tokio::test]
async fn p35_a_client_that_leaves_cancels_the_call_upstream_also_without_a_stream() {
    let mocks: [Mock; 1] = mocks(slow()).await;
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    leave_once_asked(&gw, &mocks).await;
    eventually("the call upstream is cancelled", || async { mocks[0].handle.counters().cancelled == 1 })
        .await;
    eventually("its slot is free", || async { in_flight(&gw) == 0 }).await;
}

#[tokio::test]
async fn p36_every_refusal_says_when_to_come_back() {
    let mocks: [Mock; 1] = mocks(config()).await;
    let mut resources = Resources::in_front_of(&mocks);
    let limits =
        v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    let own = gw.client.chat(CHAT).await;
    assert_eq!(own.status, StatusCode::TOO_MANY_REQUESTS);
    let millis: u64 = own.headers["retry-after-ms"].to_str().expect("text").parse().expect("a number");
    assert!((1..=60_000).contains(&millis) && own.headers.contains_key("retry-after"), "{:?}", own.headers);
    // A provider's 429 without a time, and all backends down: the gateway decides the time.
    let busy = gateway(&Resources::in_front_of(&mocks), None).await;
    for status in [429, 500] {
        answers(&mocks[0], status, None);
        let answer = busy.client.chat(CHAT).await;
        assert!(answer.status.is_server_error(), "{}", answer.status);
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            assert!(answer.headers.contains_key("retry-after"), "{:?}", answer.headers);
        }
    }
}

#[tokio::test]
async fn p37_every_route_that_spends_is_under_the_same_limits() {
    let mocks: [Mock; 1] = mocks(config()).await;
    let mut resources = Resources::in_front_of(&mocks);
    let limits =
        v1::Rates { requests_per_minute: Some(4), burst_multiplier: Some(1.0), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
    let gw = gateway(&resources, None).await;
    let routes = [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", r#"{"model":"gpt-4.1","max_tokens":2,"prompt":"hi"}"#),
        ("/v1/embeddings", r#"{"model":"gpt-4.1","input":"hi"}"#),
        ("/v1/responses", r#"{"model":"gpt-4.1","max_output_tokens":2,"input":"hi"}"#),
    ];
    for (path, body) in routes {
        let answer = gw.client.ask(Method::POST, path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
    }
    for (path, body) in routes {
        assert_eq!(
            gw.client.ask(Method::POST, path, body).await.status,
            StatusCode::TOO_MANY_REQUESTS,
            "{path}"
        );
    }
    for path in ["/v1/images/generations", "/openai/v1/chat/completions", "/v1/chat/completions/../models"] {
        assert_eq!(gw.client.ask(Method::POST, path, CHAT).await.status, StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(mocks[0].handle.counters().requests, 4);
}

#[tokio::test]
async fn p39_engines_that_are_all_slow_are_busy_and_not_dead() {
    let mocks: [Mock; 2] = mocks(Config { decode_tokens_per_s: 4000.0, ..config() }).await;
    let mut resources = Resources::in_front_of(&mocks);
    let floor = Some(prost_types::Duration { seconds: 0, nanos: 50_000_000 });
    let hedging = v1::Hedging { floor, unary: true, ..Default::default() };
    let pool = v1::PoolSpec { hedging: Some(hedging), ..Default::default() };
    resources.put("chat", Spec::Pool(pool));
    let gw = gateway(&resources, None).await;
    while mocks.iter().any(|mock| mock.handle.counters().requests < 25) {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    // From now on an answer takes far longer than any timeout.
    for mock in &mocks {
        mock.handle.set_faults(Faults { slow_factor: Some(100.0), ..Faults::default() }).expect("valid");
    }
    for _ in 0..12 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    assert!(!is_ejected(&gw, "b0") && !is_ejected(&gw, "b1"), "slow as a whole is not broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn p40_a_thousand_at_once_with_one_backend_dead() {
    let (end, death) = (CancellationToken::new(), CancellationToken::new());
    let config = Config { slots: 2000, queue: 2000, decode_tokens_per_s: 200.0, ..config() };
    let mocks =
        [mock(config.clone(), &end).await, mock(config.clone(), &end).await, mock(config, &death).await];
    let mut resources = Resources::in_front_of(&mocks);
    for (i, mock) in mocks.iter().enumerate() {
        let backend = v1::BackendSpec {
            pool: "chat".into(),
            url: format!("http://{}", mock.address),
            models: [("gpt-4.1".to_owned(), String::new())].into(),
            max_concurrency: Some(2000),
            ..Default::default()
        };
        resources.put(&format!("b{i}"), Spec::Backend(backend));
    }
    let gw = gateway(&resources, None).await;
    death.cancel();
    // The gateway has served for a while: retries are a share of what was served.
    for _ in 0..100 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    let mut requests = JoinSet::new();
    for _ in 0..1000 {
        let client = gw.client.clone();
        requests.spawn(async move { client.chat(CHAT).await.status });
    }
    while let Some(status) = requests.join_next().await {
        assert_eq!(status.expect("no panic"), StatusCode::OK);
    }
}

#[tokio::test]
async fn p41_when_all_die_the_list_of_models_stays_and_when_they_come_back_so_does_service() {
    let mocks: [Mock; 3] = mocks(config()).await;
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    mocks.iter().for_each(|mock| answers(mock, 500, None));
    for _ in 0..20 {
        assert!(gw.client.chat(CHAT).await.status.is_server_error());
    }
    let models = gw.client.ask(Method::GET, "/v1/models", "").await;
    assert_eq!((models.status, models.json()["data"][0]["id"].as_str()), (StatusCode::OK, Some("gpt-4.1")));
    mocks.iter().for_each(|mock| mock.handle.clear_faults());
    eventually("served again", || async { gw.client.chat(CHAT).await.status == StatusCode::OK }).await;
    // By more than the backend that was tried first as well.
    let before: Vec<u64> = mocks.iter().map(|m| m.handle.counters().requests).collect();
    for _ in 0..30 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    }
    let drawing =
        mocks.iter().zip(before).filter(|(m, before)| m.handle.counters().requests > *before).count();
    assert!(drawing >= 2, "{drawing} of three are used");
}
