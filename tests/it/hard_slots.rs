//! A backend never sees more at once than its slots, whoever asks: requests of all gateways and the probes that ask for
//! tokens.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::Config;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::stack::Stack;

const GATEWAYS: usize = 4;
const SLOTS: usize = 16;
/// Clients of each gateway: four for each slot, over all.
const CLIENTS: usize = 16;
const OVERLOADED_FOR: Duration = Duration::from_secs(6);
const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_slots_under_overload_from_four_gateways_are_sixteen_for_requests_and_probes_together() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let config = Config {
        models: vec!["gpt-4.1".into()],
        // More than its declared slots: what would be one too many is counted and not refused.
        slots: 1000,
        decode_tokens_per_s: 100.0,
        ..Config::default()
    };
    let mock = mock(config, &end).await;
    // Looked at far more often than the fleet hears what requests came to, so that these save few probes.
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
    // What the backend was asked beyond the requests, but for HEADs and pages, are probes that asked for tokens.
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
