//! Limits of a provider's account that several backends bill.

mod process;

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use http_body_util::BodyExt;
use mock_llm::{Config, ErrorStatus, Faults, Hang, HangAt};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::RedisLimiter;
use weir_ratelimit::{AnyLimiter, Scope};
use weir_tests::client::{Answer, Client};
use weir_tests::cluster::{Gateway, Mock, Resources, gateway, gateway_over, mock};
use weir_tests::eventually;
use weir_tests::process::signal;
use weir_tests::redis::{Redis, Standing, standing_of, standing_of_limit};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":7,"messages":[{"role":"user","content":"hi"}]}"#;
const ENDLESS: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":100000,"messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], slots: 4096, ..Config::default() }
}

fn endless() -> Config {
    Config { decode_tokens_per_s: 50.0, output_tokens: 1_000_000, ..config() }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// A limit of concurrent requests, of which one per minute drains; requests that do not fit are refused.
fn requests(capacity: u32) -> v1::Rates {
    v1::Rates {
        requests_per_minute: Some(1),
        burst_multiplier: Some(f64::from(capacity)),
        max_wait: seconds(0),
        ..Default::default()
    }
}

/// Above the use of any test.
fn wide() -> v1::Rates {
    v1::Rates {
        requests_per_minute: Some(1),
        tokens_per_minute: Some(1000),
        burst_multiplier: Some(1000.0),
        concurrency: Some(100),
        ..Default::default()
    }
}

/// A gateway over a limiter that the test can read; the backends are tried in their order, each under an account.
struct World {
    gateway: Gateway,
    mocks: Vec<Mock>,
    limiter: AnyLimiter,
}

impl World {
    async fn of(backends: &[&str], mock_config: Config, limits: &[(&str, v1::Rates)]) -> Self {
        Self::with(backends, mock_config, limits, |_| {}).await
    }

    async fn with(
        backends: &[&str],
        mock_config: Config,
        limits: &[(&str, v1::Rates)],
        change: impl FnOnce(&mut Resources),
    ) -> Self {
        let (mocks, mut resources) = resources(backends, mock_config, limits).await;
        change(&mut resources);
        let limiter = AnyLimiter::Memory(Arc::new(MemoryLimiter::new()));
        let gateway = gateway_over(&resources, limiter.clone()).await;
        Self { gateway, mocks, limiter }
    }

    fn client(&self) -> &Client {
        &self.gateway.client
    }

    async fn chat(&self) -> Answer {
        self.client().chat(CHAT).await
    }

    async fn stands(&self, account: &str) -> Standing {
        standing_of_limit(&self.limiter, Scope::Account(account), account).await
    }

    /// The refusals that `weir limits explain` predicts.
    async fn explained(&self) -> serde_json::Value {
        let ops = Client::new(self.gateway.running.ops_address, weir_tests::cluster::OPS_TOKEN);
        let page = ops.ask(Method::GET, "/limits?key=acme-key&model=gpt-4.1", "").await;
        page.json()["refuses"].clone()
    }

    fn reached(&self, at: usize) -> u64 {
        self.mocks[at].handle.counters().requests
    }

    /// Tokens that a backend billed.
    fn billed(&self, at: usize) -> u64 {
        let counters = self.mocks[at].handle.counters();
        counters.prompt_tokens + counters.generation_tokens
    }

    fn breaks(&self, at: usize) {
        let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
        let faults = Faults { error_status: Some(error), ..Faults::default() };
        self.mocks[at].handle.set_faults(faults).expect("valid");
    }
}

/// A pool of backends that are tried in their order, each under an account, and the limits of the accounts.
async fn resources(
    backends: &[&str],
    mock_config: Config,
    limits: &[(&str, v1::Rates)],
) -> (Vec<Mock>, Resources) {
    let end = CancellationToken::new();
    let mut mocks = Vec::new();
    for _ in backends {
        mocks.push(mock(mock_config.clone(), &end).await);
    }
    let mut resources = Resources::in_front_of(&mocks);
    let mut pool = v1::PoolSpec::default();
    pool.set_balancing_policy(v1::BalancingPolicy::Priority);
    resources.put("chat", Spec::Pool(pool));
    for (i, (mock, account)) in mocks.iter().zip(backends).enumerate() {
        resources.put(&format!("b{i}"), Spec::Backend(backend(mock, account, i as u32)));
    }
    for (account, rates) in limits {
        resources.put(account, Spec::Limit(limit(account, *rates)));
    }
    (mocks, resources)
}

fn backend(mock: &Mock, account: &str, priority: u32) -> v1::BackendSpec {
    v1::BackendSpec {
        pool: "chat".into(),
        url: format!("http://{}", mock.address),
        models: [("gpt-4.1".to_owned(), String::new())].into(),
        account: account.into(),
        priority,
        ..Default::default()
    }
}

fn limit(account: &str, rates: v1::Rates) -> v1::LimitSpec {
    let selector = v1::LimitSelector { account: account.into(), ..Default::default() };
    v1::LimitSpec { selector: Some(selector), rates: Some(rates) }
}

fn assert_refused_by(answer: &Answer, account: &str) {
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS, "{}", answer.text());
    let error = &answer.json()["error"];
    assert_eq!((&error["scope"]["kind"], &error["scope"]["name"]), (&"account".into(), &account.into()));
    let ms = error["retry_after_ms"].as_u64().expect("a time");
    assert_eq!(answer.headers["retry-after-ms"], ms.to_string());
    assert!((1..=60_000).contains(&ms), "{ms}");
    for field in ["limit", "remaining"] {
        assert!(error.get(field).is_none(), "how the account stands is not the client's to know: {error}");
    }
    let told = answer.headers.keys().find(|name| name.as_str().starts_with("x-ratelimit"));
    assert!(told.is_none(), "{:?}", answer.headers);
}

#[tokio::test]
async fn a_limit_of_an_account_holds_over_its_backends() {
    let world = World::of(&["x", "x"], config(), &[("x", requests(6))]).await;
    for n in 0..6 {
        let answer = world.chat().await;
        assert_eq!(answer.status, StatusCode::OK, "request {n}: {}", answer.text());
        let told = answer.headers.keys().find(|name| name.as_str().starts_with("x-ratelimit"));
        assert!(told.is_none(), "headers tell of the caller's own limits: {:?}", answer.headers);
    }
    assert_refused_by(&world.chat().await, "x");
    assert_eq!(world.reached(0) + world.reached(1), 6);
}

#[tokio::test]
async fn a_full_account_is_passed_by_without_a_refusal() {
    let world = World::of(&["x", "y", ""], config(), &[("x", requests(3)), ("y", requests(2))]).await;
    for n in 0..9 {
        let answer = world.chat().await;
        assert_eq!(answer.status, StatusCode::OK, "request {n}: {}", answer.text());
    }
    assert_eq!([world.reached(0), world.reached(1), world.reached(2)], [3, 2, 4]);
}

#[tokio::test]
async fn when_every_account_is_full_the_one_that_fits_soonest_is_named() {
    let fast = v1::Rates { requests_per_minute: Some(6), burst_multiplier: Some(1.0), ..requests(1) };
    let world = World::of(&["x", "y"], config(), &[("x", requests(3)), ("y", fast)]).await;
    for n in 0..9 {
        assert!(world.explained().await.is_null(), "after {n} some account has room");
        assert_eq!(world.chat().await.status, StatusCode::OK);
    }
    assert_eq!(world.explained().await, "requests of account y");
    let refused = world.chat().await;
    assert_refused_by(&refused, "y");
    let ms = refused.json()["error"]["retry_after_ms"].as_u64().expect("a time");
    assert!(ms <= 10_000, "y drains one in ten seconds, x in a minute: {ms}");
}

#[tokio::test]
async fn the_callers_own_limit_stands_before_any_account() {
    let world = World::with(&["x", "y"], config(), &[("x", requests(9)), ("y", requests(9))], |resources| {
        let own = v1::TenantSpec { limits: Some(requests(2)), ..Default::default() };
        resources.put("acme", Spec::Tenant(own));
    })
    .await;
    for _ in 0..2 {
        let answer = world.chat().await;
        assert_eq!(
            (answer.status, &answer.headers["x-ratelimit-limit-requests"]),
            (StatusCode::OK, &"1".parse().expect("a value")),
            "the rate of the caller's own limit"
        );
    }
    let refused = world.chat().await;
    assert_eq!(refused.json()["error"]["scope"]["kind"], "tenant", "{}", refused.text());
    assert_eq!(world.stands("y").await.requests, 0, "nobody was asked in vain");
}

#[tokio::test]
async fn a_failed_try_stands_at_its_account_and_the_answer_at_the_other() {
    // It hardly drains, so that what was charged can be read however long the request takes.
    let slow = v1::Rates { tokens_per_minute: Some(1), ..wide() };
    let world = World::with(&["x", "y"], config(), &[("x", slow), ("y", slow)], |resources| {
        let own = v1::TenantSpec { limits: Some(slow), ..Default::default() };
        resources.put("acme", Spec::Tenant(own));
    })
    .await;
    world.breaks(0);
    assert_eq!(world.chat().await.status, StatusCode::OK);
    eventually("settled", || async { world.stands("y").await.tokens == world.billed(1) }).await;
    let (x, y) = (world.stands("x").await, world.stands("y").await);
    assert_eq!((x.requests, x.leases, y.requests, y.leases), (1, 0, 1, 0));
    assert!(x.tokens >= 7, "what was reserved there stands: {x:?}");
    eventually("the tenant used what was answered", || async {
        let own = standing_of(&world.limiter, Scope::Tenant("acme")).await;
        (own.requests, own.tokens, own.leases) == (1, world.billed(1), 0)
    })
    .await;
}

#[tokio::test]
async fn a_retry_within_an_account_is_counted_there_and_needs_room_for_one_only() {
    let one = v1::Rates { concurrency: Some(1), ..wide() };
    let world = World::of(&["x", "x"], config(), &[("x", one)]).await;
    world.breaks(0);
    let answer = world.chat().await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    eventually("both tries are counted, and no lease is left", || async {
        let x = world.stands("x").await;
        (x.requests, x.leases) == (2, 0)
    })
    .await;
    assert_eq!([world.reached(0), world.reached(1)], [1, 1]);
}

/// Both accounts are used up during the outage, and its end admits nothing more.
#[tokio::test]
async fn limits_of_accounts_hold_while_redis_is_away_and_when_it_is_back() {
    let limits = [("x", requests(20)), ("y", requests(10))];
    let (mocks, resources) = resources(&["x", "y"], config(), &limits).await;
    let redis = Redis::start().await;
    let gateway = gateway(&resources, Some(redis.url())).await;
    let reached = || [0, 1].map(|at| mocks[at].handle.counters().requests);
    eventually("served", || async { gateway.client.chat(CHAT).await.status == StatusCode::OK }).await;
    for _ in 1..5 {
        assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK);
    }
    signal(redis.child(), "-STOP").await;
    let mut admitted = 5;
    let refusal = loop {
        let answer = gateway.client.chat(CHAT).await;
        if answer.status != StatusCode::OK {
            break answer;
        }
        admitted += 1;
    };
    assert_refused_by(&refusal, "x");
    // What drains in a second, here a sixtieth of a request, counts as used by others.
    assert!((29..=30).contains(&admitted), "{admitted}");
    let [x, y] = reached();
    assert!(x <= 20 && y == 10, "a full account is passed by: {x}, {y}");
    signal(redis.child(), "-CONT").await;
    let limiter = RedisLimiter::connect(&redis.url(), Default::default()).await.expect("there");
    eventually("Redis knows", || async {
        let of = async |account| standing_of_limit(&limiter, Scope::Account(account), account).await.requests;
        let refused = gateway.client.chat(CHAT).await.status == StatusCode::TOO_MANY_REQUESTS;
        refused && (of("x").await, of("y").await) == (20, 10)
    })
    .await;
    assert_eq!(reached(), [20, 10]);
}

#[tokio::test]
async fn a_retry_goes_past_an_account_that_is_full() {
    let world =
        World::of(&["x", "y", "z"], config(), &[("x", wide()), ("y", requests(1)), ("z", wide())]).await;
    world.breaks(0);
    for _ in 0..2 {
        let answer = world.chat().await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    assert_eq!([world.reached(1), world.reached(2)], [1, 1]);
}

#[tokio::test]
async fn with_no_answer_at_all_the_caller_pays_nothing_and_the_accounts_stand() {
    let world = World::with(&["x", "y"], config(), &[("x", wide()), ("y", wide())], |resources| {
        let own = v1::TenantSpec { limits: Some(wide()), ..Default::default() };
        resources.put("acme", Spec::Tenant(own));
    })
    .await;
    world.breaks(0);
    world.breaks(1);
    assert!(world.chat().await.status.is_server_error());
    eventually("settled", || async {
        let (x, y) = (world.stands("x").await, world.stands("y").await);
        let own = standing_of(&world.limiter, Scope::Tenant("acme")).await;
        (own.requests, own.tokens, own.leases, x.leases + y.leases) == (0, 0, 0, 0)
    })
    .await;
    let (x, y) = (world.stands("x").await, world.stands("y").await);
    assert_eq!((x.requests, y.requests), (1, 1), "providers count failed requests");
    assert!(x.tokens >= 7 && y.tokens >= 7, "{x:?} {y:?}");
}

#[tokio::test]
async fn an_overtaken_try_stands_at_its_account() {
    // It hardly drains while the backend is learned.
    let slow = v1::Rates { tokens_per_minute: Some(1), ..wide() };
    let world = World::with(&["x", "y"], config(), &[("x", slow), ("y", slow)], |resources| {
        let floor = Some(prost_types::Duration { seconds: 0, nanos: 50_000_000 });
        let hedging = v1::Hedging { floor, unary: true, ..Default::default() };
        let mut pool = v1::PoolSpec { hedging: Some(hedging), ..Default::default() };
        pool.set_balancing_policy(v1::BalancingPolicy::Priority);
        resources.put("chat", Spec::Pool(pool));
    })
    .await;
    // There are no hedges before the backend is known.
    for _ in 0..25 {
        assert_eq!(world.chat().await.status, StatusCode::OK);
    }
    eventually("settled", || async { world.stands("x").await.tokens == world.billed(0) }).await;
    let known = world.stands("x").await;
    assert_eq!(world.stands("y").await.requests, 0);
    let hang = Hang { at: HangAt::Headers, probability: 1.0 };
    world.mocks[0].handle.set_faults(Faults { hang: Some(hang), ..Faults::default() }).expect("valid");
    assert_eq!(world.chat().await.status, StatusCode::OK);
    eventually("settled", || async {
        let (x, y) = (world.stands("x").await, world.stands("y").await);
        (x.requests, x.leases, y.requests, y.leases, y.tokens)
            == (known.requests + 1, 0, 1, 0, world.billed(1))
    })
    .await;
    assert!(world.stands("x").await.tokens >= known.tokens + 7);
}

#[tokio::test]
async fn a_stream_weighs_on_the_account_that_answers_while_it_runs() {
    let quick = Config { decode_tokens_per_s: 2000.0, ..endless() };
    let world = World::of(&["x", "y"], quick, &[("x", wide()), ("y", wide())]).await;
    world.breaks(0);
    let mut stream = world.client().open_stream(ENDLESS).await;
    let reading =
        tokio::spawn(async move { while stream.frame().await.is_some_and(|frame| frame.is_ok()) {} });
    let begun = world.stands("y").await.tokens;
    eventually("steps are charged", || async { world.stands("y").await.tokens > begun + 512 }).await;
    assert_eq!(world.stands("y").await.leases, 1);
    reading.abort();
    eventually("the lease is free", || async { world.stands("y").await.leases == 0 }).await;
    assert_eq!(world.stands("x").await.requests, 1);
}

#[tokio::test]
async fn a_full_account_is_waited_for_in_turn() {
    let one_a_second = v1::Rates {
        requests_per_minute: Some(60),
        burst_multiplier: Some(1.0),
        max_wait: seconds(30),
        ..Default::default()
    };
    let world = World::of(&["x", "x"], config(), &[("x", one_a_second)]).await;
    let mut asking = JoinSet::new();
    let began = Instant::now();
    for _ in 0..62 {
        let client = world.client().clone();
        asking.spawn(async move { client.chat(CHAT).await });
    }
    let mut waited = 0;
    while let Some(answer) = asking.join_next().await {
        let answer = answer.expect("no panic");
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        waited += u32::from(answer.headers.contains_key("x-weir-wait-ms"));
    }
    assert!(waited >= 1, "sixty fit at once, the rest one a second");
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn who_waits_is_woken_by_whichever_account_has_room_first() {
    let one = v1::Rates { concurrency: Some(1), max_wait: seconds(60), ..Default::default() };
    let world = World::of(&["x", "y"], endless(), &[("x", one), ("y", one)]).await;
    let (_first, second) =
        (world.client().open_stream(ENDLESS).await, world.client().open_stream(ENDLESS).await);
    let client = world.client().clone();
    let third = tokio::spawn(async move { client.open_stream(ENDLESS).await });
    let ops = Client::new(world.gateway.running.ops_address, weir_tests::cluster::OPS_TOKEN);
    eventually("it waits", || async {
        let page = ops.ask(Method::GET, "/limits?key=acme-key&model=gpt-4.1", "").await;
        page.json()["waiting"] == 1
    })
    .await;
    drop(second);
    let _third = third.await.expect("granted");
    assert_eq!(world.reached(1), 2, "the second account had room");
}

#[tokio::test]
async fn a_model_whose_accounts_are_full_leaves_it_to_its_fallback() {
    let world = World::with(&["x", "y"], config(), &[("x", requests(1)), ("y", wide())], |resources| {
        let fallback = v1::ModelSpec { pool: "chat".into(), ..Default::default() };
        resources.put("other", Spec::Model(fallback.clone()));
        resources.put("gpt-4.1", Spec::Model(v1::ModelSpec { fallbacks: vec!["other".into()], ..fallback }));
        // The second backend serves only the fallback.
        resources.rebuild("b1", |spec| {
            if let Spec::Backend(backend) = spec {
                backend.models = [("other".to_owned(), "gpt-4.1".to_owned())].into();
            }
        });
    })
    .await;
    for n in 0..3 {
        let answer = world.chat().await;
        assert_eq!(answer.status, StatusCode::OK, "request {n}: {}", answer.text());
    }
    assert_eq!([world.reached(0), world.reached(1)], [1, 2]);
}
