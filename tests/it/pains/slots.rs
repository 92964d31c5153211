//! Requests in flight.

use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::{Faults, Hang, HangAt};
use tokio::task::JoinSet;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::redis::RedisLimiter;
use weir_ratelimit::{
    Acquire, Cost, Kind, Limiter, Mode, Outcome, ReservationId, Scope, ScopeLimits, Settle, WithoutStore,
    scope_keys,
};
use weir_tests::eventually;

use super::{CHAT, ENDLESS, World, config, endless};

fn at_once(most: u32) -> v1::Rates {
    v1::Rates { concurrency: Some(most), ..Default::default() }
}

/// After upstream timeouts the counter never fell, and the key was blocked until Redis was restarted.
#[tokio::test]
async fn p13_a_backend_that_times_out_leaves_no_slot_taken() {
    let world = World::with(1, config(), |resources| {
        resources
            .put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(at_once(2)), ..Default::default() }));
        let soon = Some(prost_types::Duration { seconds: 0, nanos: 300_000_000 });
        let timeouts = v1::Timeouts { first_byte: soon, total: soon, ..Default::default() };
        let model = v1::ModelSpec { pool: "chat".into(), timeouts: Some(timeouts), ..Default::default() };
        resources.put("gpt-4.1", Spec::Model(model));
    })
    .await;
    let hang = Hang { at: HangAt::Headers, probability: 1.0 };
    world.mock.handle.set_faults(Faults { hang: Some(hang), ..Faults::default() }).expect("valid");
    for _ in 0..4 {
        let answer = world.client(0).chat(CHAT).await;
        assert!(answer.status.is_server_error(), "{}: {}", answer.status, answer.text());
    }
    world.mock.handle.clear_faults();
    eventually("no slot is taken", || async { world.redis.standing("acme").await.leases == 0 }).await;
    eventually("served again", || async { world.client(0).chat(CHAT).await.status == StatusCode::OK }).await;
}

/// Clients that open streams and cancel them, as coding agents do, made the counter grow.
#[tokio::test]
async fn p14_streams_that_are_cancelled_leave_nothing_behind() {
    let world = World::of(2, endless(), at_once(3)).await;
    for n in 0..15 {
        let streams =
            [world.client(n).open_stream(ENDLESS).await, world.client(n + 1).open_stream(ENDLESS).await];
        // One is dropped while its request is in flight.
        let third = tokio::time::timeout(
            Duration::from_millis(1),
            world.client(n).send(Method::POST, "/v1/chat/completions", ENDLESS),
        );
        drop((third.await, streams));
        eventually("everything is given back", || async {
            world.redis.standing("acme").await.leases == 0 && world.mock.handle.counters().in_flight == 0
        })
        .await;
    }
}

/// The slot of a dead holder stayed alive, because the requests of others renewed the counter's expiry.
#[tokio::test(flavor = "multi_thread")]
async fn p15_a_slot_nobody_renews_runs_out_under_steady_traffic() {
    let redis = weir_tests::redis::Redis::start().await;
    let limiter = RedisLimiter::connect(&redis.url(), Default::default()).await.expect("there");
    let (record, leases) = scope_keys(Scope::Tenant("acme"));
    let limits = ScopeLimits {
        record,
        leases,
        buckets: [None; Kind::COUNT],
        concurrency: Some(2),
        mode: Mode::Enforce,
        without_store: WithoutStore::LocalShare,
        prefetch: Default::default(),
    };
    let call = |lease_ttl| Acquire {
        id: ReservationId::now_v7(),
        cost: Cost::of_request(0, 0, 0),
        estimated: true,
        scopes: [limits.clone()].into_iter().collect(),
        candidates: Vec::new(),
        lease_ttl,
    };
    let asked = async |call: &Acquire| loop {
        if let Ok(decision) = limiter.acquire(call).await {
            return matches!(decision.outcome, Outcome::Granted { .. });
        }
    };
    assert!(asked(&call(Duration::from_millis(400))).await, "its holder never comes back");
    // The other slot is taken and released all the time; the lost one must become free all the same.
    eventually("both places can be had", || async {
        let pair = [call(Duration::from_secs(15)), call(Duration::from_secs(15))];
        let mut got = 0;
        for one in &pair {
            if asked(one).await {
                got += 1;
            }
        }
        for one in &pair {
            let end = Settle {
                id: one.id,
                actual: Cost::default(),
                scopes: one.scopes.clone(),
                slot: None,
                usage: None,
            };
            while limiter.settle(&end).await.is_err() {}
        }
        got == 2
    })
    .await;
}

/// The limit did not hold under load.
#[tokio::test(flavor = "multi_thread")]
async fn p16_concurrency_holds_under_load() {
    let backend = mock_llm::Config { decode_tokens_per_s: 200.0, ..config() };
    let world = World::of(3, backend, at_once(4)).await;
    let mut requests = JoinSet::new();
    for n in 0..300 {
        let client = world.client(n).clone();
        requests.spawn(async move { client.chat(&CHAT.replace(":1,", ":20,")).await.status });
    }
    let mut answered = 0;
    while let Some(status) = requests.join_next().await {
        answered += u32::from(status.expect("no panic") == StatusCode::OK);
    }
    let most = world.mock.handle.counters().max_in_flight;
    assert!(answered > 0 && most <= 4, "{most} at the same time, {answered} answered");
    eventually("nothing is left", || async { world.redis.standing("acme").await.leases == 0 }).await;
}

/// "Concurrent" was a bucket that refilled while streams still ran.
#[tokio::test]
async fn p18c_concurrency_is_a_number_and_not_a_rate() {
    let world = World::of(1, endless(), at_once(1)).await;
    let stream = world.client(0).open_stream(ENDLESS).await;
    for _ in 0..200 {
        assert_eq!(world.client(0).chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS);
    }
    drop(stream);
    eventually("free as soon as it has ended", || async {
        world.client(0).chat(CHAT).await.status == StatusCode::OK
    })
    .await;
}
