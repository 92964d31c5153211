//! A backend never has more requests at once than slots: requests of all gateways and probes that ask for tokens
//! together.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::{Config, Faults, Hang, HangAt};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::stack::Stack;

const GATEWAYS: usize = 4;
const SLOTS: usize = 16;
/// Clients of each gateway: four per slot over all gateways.
const CLIENTS: usize = 16;
const OVERLOADED_FOR: Duration = Duration::from_secs(6);
const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_slots_under_overload_from_four_gateways_are_sixteen_for_requests_and_probes_together() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let config = Config {
        models: vec!["gpt-4.1".into()],
        // More than its declared slots, so that one request too many is counted and not refused.
        slots: 1000,
        decode_tokens_per_s: 100.0,
        ..Config::default()
    };
    let mock = mock(config, &end).await;
    // Probes are far more frequent than reports of requests, so that requests save few of them.
    let manifest = format!(
        "kind: pool\nname: chat\nspec:\n  health: {{ readiness_interval: 100ms, deep_interval: 1s, \
         paid_probes_per_hour: 100000 }}\n---\nkind: backend\nname: b0\nspec: {{ pool: chat, url: \"http://{}\", \
         max_concurrency: {SLOTS}, models: {{ gpt-4.1: \"\" }} }}\n---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{}}\n",
        mock.address
    );
    let stack = Stack::start(GATEWAYS, &manifest).await;
    eventually("it is found healthy", async || {
        stack.weir(&["-o", "json", "backends"]).await.contains("\"health\": \"healthy\"")
    })
    .await;
    let until = Instant::now() + OVERLOADED_FOR;
    let mut clients = JoinSet::new();
    for k in 0..GATEWAYS * CLIENTS {
        let client = stack.client(k % GATEWAYS);
        clients.spawn(async move {
            let (mut served, mut failed) = (0_u64, Vec::new());
            while Instant::now() < until {
                let answer = client.chat(CHAT).await;
                match answer.status {
                    StatusCode::OK => served += 1,
                    status => failed.push(format!("{status}: {}", answer.text())),
                }
            }
            (served, failed)
        });
    }
    let (mut served, mut failed) = (0, Vec::new());
    while let Some(done) = clients.join_next().await {
        let (good, bad) = done.expect("no panic");
        served += good;
        failed.extend(bad);
    }
    let counters = mock.handle.counters();
    // Calls of the backend beyond the requests, HEADs and pages excluded, are probes that asked for tokens.
    let mut paid = 0.0;
    for gateway in &stack.gateways {
        let ops = Client::new(gateway.text("ops").parse().expect("an address"), "");
        let page = ops.ask(Method::GET, "/metrics", "").await;
        let asked = |line: &&str| {
            line.starts_with("weir_gateway_probes_total") && line.contains("tier=\"readiness\"")
        };
        let counts = page.text().lines().filter(asked).filter_map(|line| line.rsplit_once(' '));
        paid += counts.filter_map(|(_, count)| count.parse::<f64>().ok()).sum::<f64>();
    }
    assert!(failed.is_empty(), "{} of {served} failed: {:?}", failed.len(), failed.first());
    assert!(paid >= 5.0, "{paid} probes among {served} requests prove nothing");
    assert_eq!(counters.max_in_flight, SLOTS, "{served} requests, {paid} probes");
}

/// Liveness passes, and every slot is taken by a request without an answer. Only a completion would show the fault,
/// and probes get no slot but those that requests give up.
#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_hangs_with_all_its_slots_taken_is_judged_all_the_same() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let mock = mock(Config { models: vec!["gpt-4.1".into()], ..Config::default() }, &end).await;
    let manifest = format!(
        "kind: pool\nname: chat\nspec:\n  health: {{ liveness_interval: 1s, timeout: 1s, readiness_interval: 1s, slow_start: 2s, \
         paid_probes_per_hour: 100000 }}\n---\nkind: backend\nname: b0\nspec: {{ pool: chat, url: \"http://{}\", \
         max_concurrency: 2, models: {{ gpt-4.1: \"\" }} }}\n---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat, \
         health_timeout: 1s, timeouts: {{ total: 2s }} }}\n---\nkind: tenant\nname: acme\nspec: {{}}\n",
        mock.address
    );
    let stack = Stack::start(2, &manifest).await;
    let is = async |state: &str| {
        stack.weir(&["-o", "json", "backends"]).await.contains(&format!("\"health\": \"{state}\""))
    };
    eventually("it is found healthy", async || is("healthy").await).await;
    let mut clients = JoinSet::new();
    for k in 0..8 {
        let client = stack.client(k % 2);
        clients.spawn(async move {
            loop {
                client.chat(CHAT).await;
            }
        });
    }
    eventually("it serves", async || mock.handle.counters().requests > 100).await;
    let hang = Hang { at: HangAt::Headers, probability: 1.0 };
    mock.handle.set_faults(Faults { hang: Some(hang), ..Faults::default() }).expect("valid");
    eventually("its verdict tells the truth", async || is("unhealthy").await).await;
    let why = stack.weir(&["-o", "json", "why", "b0"]).await;
    // By both gateways, or by one if the other was late.
    assert!(why.contains("\"rule\": \"readiness_"), "{why}");
    mock.handle.clear_faults();
    eventually("it is back under the same requests", async || is("healthy").await).await;
}
