//! The timeouts of requests: room for generation, one deadline, and connections that close at the wrong moment.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::{Config, Faults, Hang, HangAt};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, HealthState, resource::Spec};
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::{AnyLimiter, Scope};
use weir_tests::client::Client;
use weir_tests::cluster::{Gateway, Mock, OPS_TOKEN, Resources, gateway, gateway_over, mock};
use weir_tests::eventually;
use weir_tests::process::{Up, up};
use weir_tests::redis::standing_of;
use weir_tests::scripted::{Scripted, chunk, delta, head, json_answer, stream_end};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;
const STREAM: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;
const MINUTE: Duration = Duration::from_secs(60);

/// An answer of ten tokens at this interval.
fn slow(each: Duration) -> Config {
    Config {
        models: vec!["gpt-4.1".into()],
        decode_tokens_per_s: 1.0 / each.as_secs_f64(),
        output_tokens: 10,
        jitter: 0.0,
        ..Config::default()
    }
}

fn quick() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

fn millis(ms: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: ms / 1000, nanos: (ms % 1000) as i32 * 1_000_000 })
}

fn hangs(mock: &Mock) {
    let hang = Hang { at: HangAt::Headers, probability: 1.0 };
    mock.handle.set_faults(Faults { hang: Some(hang), ..Faults::default() }).expect("valid");
}

/// The sum of a metric over the series whose labels contain this.
async fn metric(ops: std::net::SocketAddr, token: &str, name: &str, label: &str) -> f64 {
    let page = Client::new(ops, token).ask(Method::GET, "/metrics", "").await;
    let of_name = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
    };
    let values = page.text().lines().filter(of_name).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<f64>().expect("a number")).sum()
}

async fn of(gateway: &Gateway, name: &str, label: &str) -> f64 {
    metric(gateway.running.ops_address, OPS_TOKEN, name, label).await
}

/// Above the use of any test; it hardly drains.
fn wide() -> v1::Rates {
    v1::Rates {
        requests_per_minute: Some(1),
        tokens_per_minute: Some(1),
        burst_multiplier: Some(1000.0),
        concurrency: Some(100),
        ..Default::default()
    }
}

/// A gateway over a limiter that the test can read.
async fn limited(mut resources: Resources) -> (Gateway, AnyLimiter) {
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(wide()), ..Default::default() }));
    let limiter = AnyLimiter::Memory(std::sync::Arc::new(MemoryLimiter::new()));
    (gateway_over(&resources, limiter.clone()).await, limiter)
}

/// Waits until nothing is in flight, and returns the tenant's used requests and tokens.
async fn stands(limiter: &AnyLimiter) -> (u64, u64) {
    eventually("nothing is under way", || async {
        standing_of(limiter, Scope::Tenant("acme")).await.leases == 0
    })
    .await;
    let standing = standing_of(limiter, Scope::Tenant("acme")).await;
    (standing.requests, standing.tokens)
}

#[tokio::test(start_paused = true)]
async fn a_stream_with_long_silences_and_a_slow_whole_answer_pass_with_default_clocks() {
    let end = CancellationToken::new();
    let mocks = [mock(slow(2 * MINUTE), &end).await, mock(slow(2 * MINUTE), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let began = Instant::now();
    let answer = gw.client.chat(STREAM).await;
    let text = answer.text();
    assert!(text.trim_end().ends_with("data: [DONE]") && !text.contains("\"error\""), "{text}");
    assert!(began.elapsed() >= 18 * MINUTE, "{:?}", began.elapsed());

    let mocks = [mock(slow(MINUTE * 9 / 10), &end).await, mock(slow(MINUTE * 9 / 10), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let began = Instant::now();
    let answer = gw.client.chat(CHAT).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert!(began.elapsed() >= 8 * MINUTE, "{:?}", began.elapsed());
    assert_eq!(mocks.iter().map(|mock| mock.handle.counters().requests).sum::<u64>(), 1);
    assert_eq!(of(&gw, "weir_backend_attempts_total", "").await, 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_slow_model_is_asked_for_once_however_seldom_it_is_used() {
    let end = CancellationToken::new();
    let eight_seconds = slow(Duration::from_millis(800));
    let mocks = [mock(eight_seconds.clone(), &end).await, mock(eight_seconds, &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let asked = || mocks.iter().map(|mock| mock.handle.counters().requests).sum::<u64>();
    for body in [CHAT, STREAM] {
        let before = asked();
        for _ in 0..30 {
            let answer = gw.client.chat(body).await;
            assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
            sleep(MINUTE).await;
        }
        assert_eq!(asked() - before, 30, "{body}");
    }
    assert_eq!(of(&gw, "weir_hedges_total", "").await, 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_is_asked_once_a_minute_is_learned_and_a_hedge_is_counted_and_priced() {
    let end = CancellationToken::new();
    let mocks = [mock(quick(), &end).await, mock(quick(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let model = v1::ModelSpec {
        pool: "chat".into(),
        input_price_micro_dollars: 2_000_000,
        output_price_micro_dollars: 8_000_000,
        ..Default::default()
    };
    resources.put("gpt-4.1", Spec::Model(model));
    let gw = gateway(&resources, None).await;
    while mocks.iter().any(|mock| mock.handle.counters().requests < 22) {
        assert_eq!(gw.client.chat(STREAM).await.status, StatusCode::OK);
        sleep(MINUTE).await;
    }
    assert_eq!(of(&gw, "weir_hedges_total", "").await, 0.0);
    hangs(&mocks[0]);
    let asked = mocks[0].handle.counters().requests;
    while mocks[0].handle.counters().requests == asked {
        let began = Instant::now();
        assert_eq!(gw.client.chat(STREAM).await.status, StatusCode::OK);
        assert!(began.elapsed() < MINUTE, "{:?}", began.elapsed());
    }
    for event in ["event=\"started\"", "event=\"won\""] {
        assert_eq!(of(&gw, "weir_hedges_total", event).await, 1.0, "{event}");
    }
    let tokens = of(&gw, "weir_hedge_lost_tokens_total", "model=\"gpt-4.1\"").await;
    let micro_dollars = of(&gw, "weir_hedge_lost_micro_dollars_total", "model=\"gpt-4.1\"").await;
    assert!(tokens >= 1.0 && micro_dollars == 2.0 * tokens, "the prompt: {tokens}, {micro_dollars}");
}

#[tokio::test]
async fn after_the_deadline_no_fallback_is_asked_or_charged() {
    let end = CancellationToken::new();
    let mocks = [mock(quick(), &end).await, mock(quick(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.models = ["second", "third"].map(|name| (name.to_owned(), "gpt-4.1".to_owned())).into();
    });
    let timeouts = Some(v1::Timeouts { total: millis(700), ..Default::default() });
    let model = |fallbacks: &[&str], timeouts| {
        let fallbacks = fallbacks.iter().map(|name| (*name).to_owned()).collect();
        Spec::Model(v1::ModelSpec { pool: "chat".into(), fallbacks, timeouts, ..Default::default() })
    };
    resources.put("gpt-4.1", model(&["second", "third"], timeouts));
    resources.put("second", model(&[], None)).put("third", model(&[], None));
    let (gw, limiter) = limited(resources).await;
    hangs(&mocks[0]);
    for body in [CHAT, STREAM] {
        let (requests, tokens) = stands(&limiter).await;
        let answer = gw.client.chat(body).await;
        assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT, "{}", answer.text());
        assert_eq!(answer.error_code(), "deadline_exceeded");
        let (after, charged) = stands(&limiter).await;
        assert_eq!(after - requests, 1, "{body}: what the first may have generated stands, once");
        assert!(charged > tokens);
    }
    assert_eq!(mocks[1].handle.counters().requests, 0);
}

#[tokio::test]
async fn a_fallback_is_asked_within_the_time_of_the_model_that_was_named() {
    let end = CancellationToken::new();
    let mocks = [mock(quick(), &end).await, mock(quick(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.models = [("second".to_owned(), "gpt-4.1".to_owned())].into();
    });
    let total = |ms| Some(v1::Timeouts { total: millis(ms), ..Default::default() });
    let first_byte = v1::Timeouts { first_byte: millis(300), ..Default::default() };
    let first = v1::ModelSpec {
        pool: "chat".into(),
        fallbacks: vec!["second".into()],
        timeouts: Some(first_byte),
        ..Default::default()
    };
    resources.put("gpt-4.1", Spec::Model(first));
    // Less than the first model takes: counted from when it is asked.
    let second = v1::ModelSpec { pool: "chat".into(), timeouts: total(60_000), ..Default::default() };
    resources.put("second", Spec::Model(second));
    let (gw, _) = limited(resources).await;
    hangs(&mocks[0]);
    let answer = gw.client.chat(STREAM).await;
    assert!(answer.status == StatusCode::OK && answer.text().contains("[DONE]"), "{}", answer.text());
}

#[tokio::test]
async fn what_an_attempt_may_have_generated_stays_charged_and_what_it_cannot_does_not() {
    let end = CancellationToken::new();
    let json = ("content-type", "application/json");
    let cut_unary = [head(200, &[json, ("content-length", "1000")]), b"{\"id\":\"c\",".to_vec()].concat();
    let cut_stream = head(200, &[("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]);
    let cases = [
        ("a whole answer that breaks off", CHAT, cut_unary, "upstream_disconnected", 1),
        ("a stream that ends before its first event", STREAM, cut_stream, "upstream_disconnected", 1),
        ("no answer at all", CHAT, Vec::new(), "upstream_unavailable", 0),
    ];
    for (case, body, says, code, stays) in cases {
        let backend = Scripted::raw(&end, says).await;
        let (gw, limiter) = limited(Resources::at(&[backend.address])).await;
        let answer = gw.client.chat(body).await;
        assert_eq!((answer.status, answer.error_code().as_str()), (StatusCode::BAD_GATEWAY, code), "{case}");
        let (requests, tokens) = stands(&limiter).await;
        assert_eq!(requests, stays, "{case}");
        assert_eq!(tokens > 0, stays > 0, "{case}: {tokens} tokens");
    }
}

#[tokio::test]
async fn an_attempt_that_timed_out_stays_charged_though_there_was_no_slot_elsewhere() {
    let end = CancellationToken::new();
    let lasting = Config { decode_tokens_per_s: 5.0, output_tokens: 1_000_000, ..quick() };
    let mocks = [mock(quick(), &end).await, mock(lasting, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let mut pool = v1::PoolSpec {
        timeouts: Some(v1::Timeouts { first_byte: millis(300), ..Default::default() }),
        queue: Some(v1::Queue { max_wait: millis(0), ..Default::default() }),
        ..Default::default()
    };
    pool.set_balancing_policy(v1::BalancingPolicy::Priority);
    resources.put("chat", Spec::Pool(pool));
    resources.put("aside", Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() }));
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        (spec.max_concurrency, spec.priority) = (Some(1), 1);
        spec.models.insert("aside".to_owned(), "gpt-4.1".to_owned());
    });
    let (gw, limiter) = limited(resources).await;
    let taking = STREAM.replace("gpt-4.1", "aside").replace("10", "500");
    let taken = gw.client.send(Method::POST, "/v1/chat/completions", taking).await;
    assert_eq!(taken.status(), StatusCode::OK);
    hangs(&mocks[0]);
    let answer = gw.client.chat(STREAM).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.error_code(), "overloaded");
    drop(taken);
    assert_eq!(stands(&limiter).await.0, 2, "the one that took the slot, and the one that timed out");
}

#[tokio::test]
async fn no_request_fails_at_a_server_that_closes_what_it_was_just_sent() {
    let usage = r#"{"prompt_tokens":2,"completion_tokens":2}"#;
    let begin = head(200, &[("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]);
    let stream = [begin, chunk(delta("hello")), chunk(stream_end(usage)), chunk("")].concat();
    for (body, answer) in [(CHAT, json_answer("hello", usage)), (STREAM, stream)] {
        let end = CancellationToken::new();
        // It answers the first request of each connection, and closes with the first byte of the second.
        let backend = Scripted::start(&end, move |_, mut wire| {
            let answer = answer.clone();
            async move {
                if wire.send(answer).await {
                    wire.next_byte().await;
                }
                None
            }
        })
        .await;
        let gw = gateway(&Resources::at(&[backend.address]), None).await;
        for i in 0..300 {
            let answer = gw.client.chat(body).await;
            assert_eq!(answer.status, StatusCode::OK, "request {i}: {}", answer.text());
        }
        assert!(of(&gw, "weir_backend_resends_total", "backend=\"b0\"").await > 0.0, "some were kept");
        assert_eq!(of(&gw, "weir_backend_attempts_total", "outcome=\"ok\"").await, 300.0);
        assert_eq!(of(&gw, "weir_backend_attempts_total", "").await, 300.0, "nobody is blamed");
        end.cancel();
    }
}

/// A whole Weir as a process in front of one backend.
async fn up_before(mock: &Mock) -> (Up, tempfile::TempDir) {
    let data = tempfile::tempdir().expect("a directory");
    let file = data.path().join("resources.yaml");
    let text = format!(
        "kind: tenant\nname: acme\nspec: {{}}\n---\nkind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
         ---\nkind: backend\nname: b0\nspec: {{ pool: chat, url: \"http://{}\", max_concurrency: 200, models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n",
        mock.address
    );
    std::fs::write(&file, text).expect("written");
    (up(&["--config", file.to_str().expect("UTF-8")]).await, data)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_3000_requests_none_fails_at_a_backend_that_closes_idle_connections_after_300_ms() {
    const AT_ONCE: u64 = 50;
    let mock = mock(Config { slots: 200, ..quick() }, &CancellationToken::new()).await;
    let closes = Faults { close_idle_after_ms: Some(300), ..Faults::default() };
    mock.handle.set_faults(closes).expect("valid");
    let (up, _data) = up_before(&mock).await;
    let (client, connections) = (up.client(0), || mock.handle.counters().connections);
    let ops = up.line["ops"][0].as_str().and_then(|url| url.strip_prefix("http://"));
    let ops: std::net::SocketAddr = ops.expect("a gateway").parse().expect("an address");
    let resends = || metric(ops, "", "weir_backend_resends_total", "backend=\"b0\"");
    let (mut gap, mut sent) = (Duration::from_millis(297), 0);
    // All connections are idle for about as long when the next requests come. The gap follows the border between those that
    // are closed in time and those that are not, where requests meet the close.
    while sent < 3000 || (resends().await == 0.0 && sent < 9000) {
        let before = connections();
        let mut requests = JoinSet::new();
        for n in 0..AT_ONCE {
            let (client, body) = (client.clone(), [CHAT, STREAM][(n % 2) as usize]);
            requests.spawn(async move { client.chat(body).await });
        }
        while let Some(answer) = requests.join_next().await {
            let answer = answer.expect("no panic");
            assert_eq!(answer.status, StatusCode::OK, "after {sent}: {}", answer.text());
            assert!(!answer.text().contains("\"error\""), "after {sent}: {}", answer.text());
        }
        sent += AT_ONCE;
        let step = Duration::from_micros(700);
        gap = if connections() - before > AT_ONCE / 2 { gap.saturating_sub(step) } else { gap + step };
        sleep(gap.max(Duration::from_millis(200))).await;
    }
    let resends = resends().await;
    assert!(resends > 0.0, "some requests met the close");
    let ok = metric(ops, "", "weir_backend_attempts_total", "outcome=\"ok\"").await;
    let all = metric(ops, "", "weir_backend_attempts_total", "").await;
    assert_eq!((ok, all), (sent as f64, sent as f64), "nobody is blamed, {resends} were sent again");
}

#[tokio::test(start_paused = true)]
async fn a_model_of_eight_seconds_gets_as_many_calls_as_there_are_requests_many_at_once() {
    let end = CancellationToken::new();
    // Eight seconds for the whole answer, or for its first token.
    let thinks = Config { prefill_tokens_per_s: 0.25, ..quick() };
    for config in [slow(Duration::from_millis(800)), thinks] {
        let config = Config { slots: 64, ..config };
        let mocks = [mock(config.clone(), &end).await, mock(config, &end).await];
        let gw = gateway(&Resources::in_front_of(&mocks), None).await;
        let asked = || mocks.iter().map(|mock| mock.handle.counters().requests).sum::<u64>();
        for body in [CHAT, STREAM] {
            for at_once in [1, 20, 20, 20, 1, 20] {
                let before = asked();
                let mut requests = JoinSet::new();
                for _ in 0..at_once {
                    let client = gw.client.clone();
                    requests.spawn(async move { client.chat(body).await });
                }
                while let Some(answer) = requests.join_next().await {
                    let answer = answer.expect("no panic");
                    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
                }
                assert_eq!(asked() - before, at_once, "{body}");
            }
        }
        assert_eq!(of(&gw, "weir_hedges_total", "").await, 0.0);
    }
}

#[tokio::test]
async fn silence_before_a_stream_is_filled_with_comments_and_others_are_still_tried() {
    let end = CancellationToken::new();
    let mocks = [mock(quick(), &end).await, mock(quick(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let clocks = v1::Timeouts { first_byte: millis(2500), keep_alive: millis(1000), ..Default::default() };
    let mut pool = v1::PoolSpec { timeouts: Some(clocks), ..Default::default() };
    pool.set_balancing_policy(v1::BalancingPolicy::Priority);
    resources.put("chat", Spec::Pool(pool));
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.priority = 1;
    });
    let gw = gateway(&resources, None).await;
    let comments = |text: &str| text.matches(": keep-alive\n\n").count();

    let prompt = gw.client.chat(STREAM).await;
    assert_eq!((prompt.status, comments(prompt.text())), (StatusCode::OK, 0), "no silence, no comment");

    hangs(&mocks[0]);
    let answer = gw.client.chat(STREAM).await;
    let text = answer.text();
    assert_eq!(answer.status, StatusCode::OK);
    assert!(comments(text) >= 1 && text.starts_with(": keep-alive\n\n"), "{text}");
    assert!(text.trim_end().ends_with("data: [DONE]") && !text.contains("\"error\""), "{text}");
    assert!(answer.headers.contains_key("x-request-id"));

    hangs(&mocks[1]);
    let answer = gw.client.chat(STREAM).await;
    let text = answer.text();
    assert_eq!(answer.status, StatusCode::OK);
    assert!(comments(text) >= 1 && text.contains("upstream_timeout") && !text.contains("[DONE]"), "{text}");

    let whole =
        gw.client.ask(Method::POST, "/v1/chat/completions", r#"{"model":"none","stream":true}"#).await;
    assert_eq!(whole.status, StatusCode::NOT_FOUND, "what is known at once has its own status");
    eventually("nothing is under way", || async { of(&gw, "weir_requests_in_flight", "").await == 0.0 })
        .await;
}

#[tokio::test]
async fn a_request_that_waits_at_a_backend_found_unhealthy_is_answered_by_another() {
    let end = CancellationToken::new();
    let mocks = [mock(quick(), &end).await, mock(quick(), &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    // Also if hedges are disabled: this request has no answer to wait for any more.
    let hedging = v1::Hedging { disabled: true, ..Default::default() };
    let mut pool = v1::PoolSpec { hedging: Some(hedging), ..Default::default() };
    pool.set_balancing_policy(v1::BalancingPolicy::Priority);
    resources.put("chat", Spec::Pool(pool));
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.priority = 1;
    });
    for body in [CHAT, STREAM] {
        let gw = gateway(&resources, None).await;
        hangs(&mocks[0]);
        let asked = mocks[0].handle.counters().requests;
        let client = gw.client.clone();
        let waiting = tokio::spawn(async move { client.chat(body).await });
        eventually("the one that hangs is asked", || async { mocks[0].handle.counters().requests > asked })
            .await;
        // The control plane's verdict, put in force.
        let snapshot = gw.running.live.snapshot();
        let found = snapshot.backends.values().find(|backend| backend.name.as_str() == "b0");
        found.expect("there").state.set_health(HealthState::Unhealthy);
        let answer = waiting.await.expect("no panic");
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        let label = "cause=\"unhealthy\",event=\"won\"";
        assert_eq!(of(&gw, "weir_hedges_total", label).await, 1.0);
    }
}
