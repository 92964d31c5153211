//! Requests outweigh probes: what answers probes and no request is left out and named, and what answers requests while probes wait
//! behind them is not called dead. In `weir up`, counted at the backend.
//!
//! `WEIR_TEST_WHOLE=1` runs the serial engines for ten minutes with answers of twelve seconds.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use http::StatusCode;
use mock_llm::Config as MockConfig;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::process::{Up, up, up_with};
use weir_tests::scripted::{Asked, Scripted, answer, json_answer};

const JSON: (&str, &str) = ("content-type", "application/json");
/// How long there is traffic.
const TRAFFIC: Duration = Duration::from_secs(60);
/// Between two requests of one gateway for one model.
const PACE: Duration = Duration::from_millis(400);

async fn events_of(up: &Up, subject: &str) -> Vec<Value> {
    up.json(&["events", subject]).await.as_array().expect("a list").clone()
}

/// A backend that answers probes, and other requests from the moment on that it turns bad as `says` does.
struct Gray {
    backend: Scripted,
    turned: Arc<AtomicBool>,
    probes: Arc<AtomicUsize>,
}

fn is_probe(asked: &Asked) -> bool {
    asked.head.starts_with("HEAD")
        || asked.head.starts_with("GET")
        || serde_json::from_slice::<Value>(&asked.body).is_ok_and(|body| body["max_tokens"] == 1)
}

impl Gray {
    /// `probe` answers a probe that asks for a token.
    async fn start(end: &CancellationToken, probe: Vec<u8>, says: Vec<u8>) -> Self {
        let (turned, probes) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
        let (is_turned, counted) = (turned.clone(), probes.clone());
        let backend = Scripted::start(end, move |asked, mut wire| {
            let is_turned = is_turned.load(Ordering::SeqCst);
            counted.fetch_add(usize::from(is_turned && is_probe(&asked)), Ordering::SeqCst);
            let says = match (asked.head.starts_with("POST"), is_turned, is_probe(&asked)) {
                (false, ..) => answer(200, &[], ""),
                (true, false, _) => json_answer("fine", ""),
                (true, true, true) => probe.clone(),
                (true, true, false) => says.clone(),
            };
            async move {
                wire.send(says).await;
                Some(wire)
            }
        })
        .await;
        Self { backend, turned, probes }
    }
}

fn pool(name: &str, backends: &[(&str, std::net::SocketAddr)], spec: &str, of_each: &str) -> String {
    let mut text = format!(
        "---\nkind: pool\nname: {name}\nspec: {spec}\n---\nkind: model\nname: {name}\nspec: {{ pool: {name} }}\n"
    );
    for (backend, address) in backends {
        let _ = writeln!(
            text,
            "---\nkind: backend\nname: {name}-{backend}\nspec: {{ pool: {name}, url: \"http://{address}\", models: {{ {name}: gpt-4.1 }} {of_each} }}",
        );
    }
    text
}

fn body(model: &str) -> String {
    json!({ "model": model, "max_tokens": 20, "messages": [{ "role": "user", "content": "hi" }] }).to_string()
}

/// Asks for a model at a steady pace. Gives what was not answered well.
async fn asks(client: Client, model: &'static str, time: Duration) -> Vec<String> {
    let (end, mut wrong) = (Instant::now() + time, Vec::new());
    let mut clock = tokio::time::interval(PACE);
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < end {
        clock.tick().await;
        let answer = client.chat(&body(model)).await;
        if answer.status != StatusCode::OK {
            wrong.push(format!("{model}: {} {}", answer.status, answer.text()));
        }
    }
    wrong
}

/// What a backend is that fails every request, of as many gateways.
async fn is_left_out_and_named(gateways: usize) {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let not_found = || answer(404, &[JSON], r#"{"detail":"Not Found"}"#);
    let boom = r#"{"error":{"message":"CUDA error","type":"InternalServerError","param":null,"code":null}}"#;
    let path = Gray::start(&end, not_found(), not_found()).await;
    let token = Gray::start(&end, json_answer("f", ""), answer(500, &[JSON], boom)).await;
    let well = Scripted::start(&end, |asked, mut wire| async move {
        let says =
            if asked.head.starts_with("POST") { json_answer("fine", "") } else { answer(200, &[], "") };
        wire.send(says).await;
        Some(wire)
    })
    .await;
    let pools = ["path", "token"].map(|name| {
        let bad = if name == "path" { path.backend.address } else { token.backend.address };
        pool(name, &[("bad", bad), ("well", well.address)], "{}", "")
    });
    let up = up_with(gateways, &pools.concat()).await;
    path.turned.store(true, Ordering::SeqCst);
    token.turned.store(true, Ordering::SeqCst);
    let began = Instant::now();
    let mut traffic = JoinSet::new();
    for gateway in 0..gateways {
        for model in ["path", "token"] {
            traffic.spawn(asks(up.client(gateway), model, TRAFFIC));
        }
    }
    for (name, cause) in [("path", "404 to every request of "), ("token", "500 to every request of ")] {
        let bad = format!("{name}-bad");
        eventually(&format!("{bad} is left out by {gateways} gateways and the cause is named"), || async {
            let status = up.backend(&bad).await;
            status["health"] == "unhealthy"
                && status["reason"].as_str().is_some_and(|why| why.starts_with(cause))
        })
        .await;
        assert!(began.elapsed() < Duration::from_secs(30), "after {:?}", began.elapsed());
    }
    while let Some(wrong) = traffic.join_next().await {
        assert_eq!(wrong.expect("no panic"), [""; 0], "no client sees it");
    }
    let seconds = began.elapsed().as_secs_f64();
    // Three probes of life within 5 s and two completions within 30 s.
    let scheduled = seconds * (3.0 / 5.0 + 2.0 / 30.0);
    for (name, gray) in [("path", path), ("token", token)] {
        let probes = gray.probes.load(Ordering::SeqCst) as f64;
        println!(
            "{gateways} gateways, {name}: {probes} probes in {seconds:.0} s, {scheduled:.0} by the schedule"
        );
        assert!(
            probes <= 1.5 * scheduled,
            "{name}: {probes} probes in {seconds:.0} s, {scheduled:.0} scheduled"
        );
        let events = events_of(&up, &format!("{name}-bad")).await;
        let mut messages: Vec<&str> =
            events.iter().map(|event| event["message"].as_str().expect("text")).collect();
        let all = messages.len();
        messages.sort_unstable();
        messages.dedup();
        assert!(messages.len() == all && all < 12, "each event is there once: {messages:#?}");
        assert_eq!(up.backend(&format!("{name}-well")).await["health"], "healthy");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_every_request_is_left_out_and_named_and_probed_no_oftener() {
    tokio::join!(is_left_out_and_named(1), is_left_out_and_named(2), is_left_out_and_named(5));
}

#[tokio::test]
async fn the_only_backend_that_fails_every_request_is_degraded_and_its_path_is_named() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let not_found = || answer(404, &[JSON], r#"{"detail":"Not Found"}"#);
    let gray = Gray::start(&end, not_found(), not_found()).await;
    let address = gray.backend.address;
    let up = up_with(1, &pool("only", &[("bad", address)], "{}", "")).await;
    gray.turned.store(true, Ordering::SeqCst);
    let asking = tokio::spawn(asks(up.client(0), "only", Duration::from_secs(12)));
    let cause = format!("requests go to http://{address}/v1/chat/completions");
    eventually("it is degraded, and the address is named", || async {
        let status = up.backend("only-bad").await;
        status["health"] == "degraded" && status["reason"].as_str().is_some_and(|why| why.ends_with(&cause))
    })
    .await;
    asking.abort();
}

#[tokio::test]
async fn a_backend_whose_failing_was_mended_in_its_spec_is_in_use_at_once() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    // It knows the model by another name than the configuration says.
    let backend = Scripted::start(&end, |asked, mut wire| async move {
        let unknown = r#"{"error":{"message":"The model does not exist","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#;
        let knows = String::from_utf8_lossy(&asked.body).contains("gpt-right");
        let says = match (asked.head.starts_with("POST"), knows) {
            (false, _) => answer(200, &[], ""),
            (true, true) => json_answer("fine", "").to_vec(),
            (true, false) => answer(404, &[JSON], unknown),
        };
        wire.send(says).await;
        Some(wire)
    })
    .await;
    let resources = |name: &str| {
        pool("m", &[("b", backend.address)], "{ health: { readiness_interval: 1h } }", "")
            .replace("gpt-4.1", name)
    };
    let data = tempfile::tempdir().expect("a directory");
    let file = data.path().join("resources.yaml");
    let write = |name: &str| {
        let text = format!("kind: tenant\nname: acme\nspec: {{}}\n{}", resources(name));
        std::fs::write(&file, text).expect("written");
    };
    write("gpt-wrong");
    let file = file.to_str().expect("UTF-8");
    let up = up(&["--gateways", "2", "--config", file]).await;
    eventually("a probe finds that the model is unknown", || async {
        up.backend("m-b").await["health"] == "unhealthy"
    })
    .await;
    write("gpt-right");
    let (code, _, err) = up.weir(&["apply", "-f", file]).await;
    assert_eq!(code, 0, "{err}");
    let applied = Instant::now();
    eventually("it is healthy", || async { up.backend("m-b").await["health"] == "healthy" }).await;
    assert!(
        applied.elapsed() < Duration::from_secs(30),
        "not with the next regular probe: {:?}",
        applied.elapsed()
    );
    assert_eq!(up.client(0).chat(&body("m")).await.status, StatusCode::OK);
}

/// Four callers of an engine that answers one request at a time, as the only backend or as one of two.
async fn serial_engine(gateways: usize, alone: bool) {
    let whole = std::env::var_os("WEIR_TEST_WHOLE").is_some();
    let (answer_s, time_s) = if whole { (12.0, 600) } else { (3.0, 45) };
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let engine = |slots| MockConfig {
        models: vec!["gpt-4.1".into()],
        slots,
        decode_tokens_per_s: 20.0 / answer_s,
        ..MockConfig::default()
    };
    let (serial, other) = (mock(engine(1), &end).await, mock(engine(256), &end).await);
    let both = [("serial", serial.address), ("other", other.address)];
    let backends = if alone { &both[..1] } else { &both[..] };
    // By the whole test's measure the clocks are those that ship.
    let spec = match whole {
        true => "{}",
        false => {
            "{ health: { liveness_interval: 1s, timeout: 1s, readiness_interval: 2s, paid_probes_per_hour: 10000 } }"
        }
    };
    let mut resources = pool("m", backends, spec, ", max_concurrency: 4");
    if !whole {
        resources = resources.replace("{ pool: m }", "{ pool: m, health_timeout: 1s }");
    }
    let up = up_with(gateways, &resources).await;
    let until = Instant::now() + Duration::from_secs(time_s);
    let mut callers = JoinSet::new();
    for n in 0..4 {
        let client = up.client(n % gateways);
        callers.spawn(async move {
            let mut answered = 0;
            while Instant::now() < until {
                let answer = client.chat(&body("m")).await;
                assert_eq!(answer.status, StatusCode::OK, "caller {n}: {}", answer.text());
                answered += 1;
            }
            answered
        });
    }
    let mut answered = 0;
    while let Some(done) = callers.join_next().await {
        answered += done.expect("no request fails");
    }
    println!("{gateways} gateways, alone: {alone}: {answered} answers");
    let fell = |event: &&Value| event["message"].as_str().is_some_and(|text| text.contains("-> unhealthy"));
    let events = events_of(&up, "m-serial").await;
    assert_eq!(events.iter().find(fell), None, "it was never found unhealthy");
    let alarms = events_of(&up, "m").await;
    assert_eq!(alarms.iter().find(|event| event["kind"] == "alarm"), None, "and there was no alarm");
    let refused = up.backend("m-serial").await;
    assert_eq!(refused["ejected_by"], json!([]), "{refused:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_answers_one_at_a_time_is_busy_and_not_dead() {
    tokio::join!(
        serial_engine(1, true),
        serial_engine(3, true),
        serial_engine(1, false),
        serial_engine(3, false)
    );
}
