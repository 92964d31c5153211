//! Trouble with Redis.

use std::time::Duration;

use http::StatusCode;
use tokio_util::sync::CancellationToken;
use weir_proto::v1;
use weir_tests::client::Client;
use weir_tests::eventually;
use weir_tests::process::signal;
use weir_tests::stack::Stack;

use super::{CHAT, World, config};

/// The number of local decisions on a gateway's operations page.
async fn alone(ops: &Client) -> u64 {
    let page = ops.ask(http::Method::GET, "/metrics", "").await;
    let of = page
        .text()
        .lines()
        .filter(|line| line.starts_with("weir_limiter_calls_total") && line.contains("by=\"local\""));
    of.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// An error of Redis counted as an empty bucket and admitted everything, or silently gave every replica the whole
/// limit.
#[tokio::test(flavor = "multi_thread")]
async fn p05_without_redis_the_replicas_share_the_limit_and_say_so() {
    let mock = weir_tests::cluster::mock(config(), &CancellationToken::new()).await;
    let manifest = format!(
        "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
         ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{}\", models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 1, burst_multiplier: 40 }} }}\n",
        mock.address
    );
    let mut stack = Stack::start(2, &manifest).await;
    let clients = [stack.client(0), stack.client(1)];
    let ops = |k: usize| Client::new(stack.gateways[k].text("ops").parse().expect("an address"), "");
    let pages = [ops(0), ops(1)];
    for page in &pages {
        eventually("each knows of the other", || async {
            let metrics = page.ask(http::Method::GET, "/metrics", "").await;
            metrics.text().lines().any(|line| line == "weir_live_gateways 2")
        })
        .await;
    }
    stack.redis.kill().await;
    let mut admitted = 0;
    for n in 0..200 {
        let answer = clients[n % 2].chat(CHAT).await;
        match answer.status {
            StatusCode::OK => admitted += 1,
            StatusCode::TOO_MANY_REQUESTS => {}
            other => panic!("an outage of Redis is nobody's error: {other} {}", answer.text()),
        }
    }
    assert!((38..=42).contains(&admitted), "{admitted} of 40, and one for each gateway at most");
    for page in &pages {
        assert!(alone(page).await > 0, "the page of each gateway shows who decided");
    }
}

/// An unreachable Redis hung every request, because timeouts were ignored and the circuit breaker could not open.
#[tokio::test(flavor = "multi_thread")]
async fn p29_a_silent_redis_holds_a_few_requests_for_a_moment_and_then_nobody() {
    const ASKED: u32 = 1000;
    let plenty = v1::Rates { requests_per_minute: Some(1_000_000), ..Default::default() };
    let world = World::of(1, config(), plenty).await;
    eventually("served", || async { world.client(0).chat(CHAT).await.status == StatusCode::OK }).await;
    signal(world.redis.child(), "-STOP").await;
    // One after the other: a thousand timeouts of 50 ms would be fifty seconds, and the connection's own timeouts
    // more.
    let all = tokio::time::timeout(Duration::from_secs(25), async {
        for n in 0..ASKED {
            let answer = world.client(0).chat(CHAT).await;
            assert_eq!(answer.status, StatusCode::OK, "request {n}: {}", answer.text());
        }
    });
    all.await.expect("nobody waits for a dead store");
    signal(world.redis.child(), "-CONT").await;
    let ops = Client::new(world.gateways[0].running.ops_address, "");
    let before = alone(&ops).await;
    assert!(before >= u64::from(ASKED), "{before} of {ASKED} were decided without it");
    eventually("Redis is asked again", || async {
        let before = alone(&ops).await;
        assert_eq!(world.client(0).chat(CHAT).await.status, StatusCode::OK);
        alone(&ops).await == before
    })
    .await;
}
