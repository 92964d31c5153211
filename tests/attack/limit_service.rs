//! The limit service under attack and with its parts failing: floods, huge descriptors, wrong tokens, Redis away, killed
//! and told to end under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::{Code, Status};
use weir_proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use weir_proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::Entry;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::Code as Verdict;
use weir_proto::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use weir_tests::eventually;
use weir_tests::limits::Limits;
use weir_tests::process::{Process, signal};
use weir_tests::redis::Redis;

const TOKEN: &str = "token-of-the-limit-service";
/// The longest time of a call on a busy machine without faults.
const SOON: Duration = Duration::from_secs(5);

/// Limit services over one Redis with one configuration: a tenant with a number of requests that hardly drain, and
/// another one whose limit is never reached.
struct World {
    redis: Redis,
    services: Vec<Process>,
    directory: TempDir,
}

impl World {
    async fn start(services: usize, requests: u32) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let text = format!(
            "kind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 1, burst_multiplier: {requests} }} }}\n\
             ---\nkind: tenant\nname: big\nspec: {{ limits: {{ requests_per_minute: 10000000 }} }}\n\
             ---\nkind: descriptor_rule\nname: edge-tenant\nspec: {{ domain: edge, entries: [{{ key: tenant }}], \
             consumes: [{{ tenant: \"{{tenant}}\" }}] }}\n"
        );
        std::fs::write(directory.path().join("rules.yaml"), text).expect("written");
        std::fs::write(directory.path().join("token"), TOKEN).expect("written");
        let mut world = Self { redis: Redis::start().await, services: Vec::new(), directory };
        for _ in 0..services {
            let service = world.service().await;
            world.services.push(service);
        }
        world
    }

    async fn service(&self) -> Process {
        let file = |name: &str| self.directory.path().join(name).to_str().expect("UTF-8").to_owned();
        let (rules, token, redis) = (file("rules.yaml"), file("token"), self.redis.url());
        let args = [
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            "--pre-stop=1s",
            "--config",
            &rules,
            "--token-file",
            &token,
            "--redis",
            &redis,
        ];
        Process::start("weir-ratelimit", &args, "serving").await
    }

    fn limits(&self, k: usize) -> Limits {
        Limits::with_token(self.services[k].text("grpc"), TOKEN)
    }
}

fn request(descriptors: Vec<RateLimitDescriptor>) -> RateLimitRequest {
    RateLimitRequest { domain: "edge".into(), descriptors, hits_addend: 1 }
}

fn descriptor(entries: &[(&str, &str)]) -> RateLimitDescriptor {
    let entries = entries.iter().map(|(key, value)| Entry { key: (*key).into(), value: (*value).into() });
    RateLimitDescriptor { entries: entries.collect(), ..Default::default() }
}

fn of(tenant: &str) -> RateLimitRequest {
    request(vec![descriptor(&[("tenant", tenant)])])
}

async fn timed(limits: &Limits, request: RateLimitRequest) -> Result<RateLimitResponse, Status> {
    let answer = tokio::time::timeout(SOON, limits.try_ask(request)).await;
    answer.unwrap_or_else(|_| panic!("no answer within {SOON:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_huge_descriptors_and_wrong_tokens_are_refused_and_disturb_nobody() {
    let world = World::start(1, 1000).await;
    let good = world.limits(0);
    eventually("served", || async { timed(&good, of("big")).await.is_ok() }).await;
    let stop = Arc::new(AtomicBool::new(false));
    let beside = {
        let (stop, good) = (stop.clone(), good.clone());
        tokio::spawn(async move {
            let (mut slowest, mut calls) = (Duration::ZERO, 0);
            while !stop.load(Ordering::SeqCst) {
                let asked = Instant::now();
                let answer = timed(&good, of("big")).await.expect("nobody else is disturbed");
                assert_eq!(answer.overall_code(), Verdict::Ok);
                slowest = slowest.max(asked.elapsed());
                calls += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (slowest, calls)
        })
    };
    // More streams at once than a connection may have: they wait for each other, and every one is answered.
    let flood = world.limits(0);
    let mut calls = JoinSet::new();
    for _ in 0..3000 {
        let flood = flood.clone();
        calls.spawn(async move { flood.try_ask(of("big")).await });
    }
    while let Some(answer) = calls.join_next().await {
        answer.expect("no panic").expect("answered");
    }
    // A message above the bound, more descriptors than allowed, and none.
    let long = "x".repeat(5 << 20);
    let entries: Vec<(&str, &str)> = std::iter::repeat_n(("tenant", "big"), 10_000).collect();
    let wrong = [
        (of(&long), [Code::OutOfRange, Code::ResourceExhausted]),
        (request(vec![descriptor(&[("tenant", "big")]); 10_000]), [Code::InvalidArgument; 2]),
        (request(Vec::new()), [Code::InvalidArgument; 2]),
    ];
    for (request, codes) in wrong {
        for _ in 0..20 {
            let status = timed(&flood, request.clone()).await.expect_err("refused");
            assert!(codes.contains(&status.code()), "{status:?}");
            assert!(
                status.message().len() < 1000,
                "the refusal is no echo: {} bytes",
                status.message().len()
            );
        }
    }
    // Long values and many entries are decided like all others: an error would be an admission.
    for odd in [descriptor(&[("tenant", &long[..64 << 10])]), descriptor(&entries)] {
        let answer =
            timed(&flood, request(vec![odd, descriptor(&[("tenant", "big")])])).await.expect("decided");
        assert_eq!((answer.overall_code(), answer.statuses.len()), (Verdict::Ok, 2));
    }
    // Without a token, with a wrong token, and with half of the right one.
    let address = world.services[0].text("grpc");
    let strangers = [
        Limits::new(address),
        Limits::with_token(address, "wrong"),
        Limits::with_token(address, &TOKEN[..8]),
    ];
    for _ in 0..300 {
        for stranger in &strangers {
            let status = timed(stranger, of("big")).await.expect_err("refused");
            assert_eq!(status.code(), Code::Unauthenticated);
            assert!(!status.message().contains(TOKEN), "{status:?}");
        }
    }
    stop.store(true, Ordering::SeqCst);
    let (slowest, calls) = beside.await.expect("nobody else is disturbed");
    eprintln!("{calls} calls beside the floods, the slowest took {slowest:?}");
    assert!(calls > 0);
}

/// Asks until the limit is used up. Returns the number of admissions. On a busy machine Redis may be too late for a
/// call, which then is UNAVAILABLE and may be charged all the same.
async fn until_over(limits: &Limits) -> u32 {
    let mut passed = 0;
    loop {
        match timed(limits, of("acme")).await.map(|answer| answer.overall_code()) {
            Ok(Verdict::Ok) => passed += 1,
            Ok(Verdict::OverLimit) => return passed,
            Ok(other) => panic!("{other:?}"),
            Err(status) => {
                assert!([Code::Unavailable, Code::DeadlineExceeded].contains(&status.code()), "{status:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_away_is_unavailable_at_once_and_what_was_used_counts_when_it_is_back() {
    const LIMIT: u32 = 50;
    let mut world = World::start(1, LIMIT).await;
    let limits = world.limits(0);
    eventually("served", || async { timed(&limits, of("big")).await.is_ok() }).await;
    let used_up = until_over(&limits).await;
    assert!(used_up <= LIMIT, "{used_up}");
    // Missing scripts are sent again without an error.
    world.redis.cli(&["SCRIPT", "FLUSH"]).await;
    assert_eq!(until_over(&limits).await, 0);
    // Silent, then back with its data.
    signal(world.redis.child(), "-STOP").await;
    for _ in 0..20 {
        let status = timed(&limits, of("acme")).await.expect_err("nobody can tell");
        assert!([Code::Unavailable, Code::DeadlineExceeded].contains(&status.code()), "{status:?}");
    }
    signal(world.redis.child(), "-CONT").await;
    eventually("served again", || async { timed(&limits, of("big")).await.is_ok() }).await;
    assert_eq!(until_over(&limits).await, 0, "it knew");
    // Killed, then back without data.
    world.redis.kill().await;
    eventually("the outage is noticed", || async { timed(&limits, of("big")).await.is_err() }).await;
    world.redis.restart().await;
    eventually("served again", || async { timed(&limits, of("big")).await.is_ok() }).await;
    let admitted = until_over(&limits).await;
    assert!(admitted <= LIMIT, "a lost data set grants the burst once more, and no second one: {admitted}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_killed_and_told_to_end_under_load_admit_no_more_and_lose_no_call_they_took() {
    const LIMIT: u64 = 400;
    const WORKERS: u64 = 8;
    let mut world = World::start(2, u32::try_from(LIMIT).expect("small")).await;
    for k in 0..2 {
        eventually("served", || async { timed(&world.limits(k), of("big")).await.is_ok() }).await;
    }
    let ways = Arc::new(std::sync::Mutex::new([world.limits(0), world.limits(1)]));
    let stop = Arc::new(AtomicBool::new(false));
    let (admitted, failed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut workers = JoinSet::new();
    for worker in 0..WORKERS {
        let (ways, stop) = (ways.clone(), stop.clone());
        let (admitted, failed) = (admitted.clone(), failed.clone());
        workers.spawn(async move {
            let mut way = worker as usize % 2;
            while !stop.load(Ordering::SeqCst) {
                let limits = ways.lock().expect("whole")[way].clone();
                match timed(&limits, of("acme")).await {
                    Ok(answer) => {
                        let passes = answer.overall_code() == Verdict::Ok;
                        admitted.fetch_add(u64::from(passes), Ordering::SeqCst);
                    }
                    // Asks the other service next time, as a proxy does.
                    Err(_) => {
                        failed.fetch_add(1, Ordering::SeqCst);
                        way = 1 - way;
                    }
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    let asked = async |more: u64| {
        let before = admitted.load(Ordering::SeqCst);
        let enough = || async { admitted.load(Ordering::SeqCst) >= (before + more).min(LIMIT) };
        eventually("calls go on", enough).await;
    };
    asked(40).await;
    world.services[0].kill().await;
    asked(40).await;
    world.services[0] = world.service().await;
    ways.lock().expect("whole")[0] = world.limits(0);
    let by_kill = failed.load(Ordering::SeqCst);
    assert!(by_kill <= 2 * WORKERS, "those that were under way, and one try each to connect: {by_kill}");
    asked(40).await;
    // A service that is told to end accepts calls until the last moment and answers them. Later calls are refused and
    // go to the other one.
    signal(&world.services[1].child, "-TERM").await;
    let ended = tokio::time::timeout(Duration::from_secs(30), world.services[1].child.wait()).await;
    assert_eq!(ended.expect("ends").expect("ended").code(), Some(0));
    asked(40).await;
    let by_end = failed.load(Ordering::SeqCst) - by_kill;
    assert!(by_end <= WORKERS, "one refused try each: {by_end}");
    // Exactly the rest is admitted.
    let all = || async { !world.limits(0).passes("acme").await };
    eventually("the limit is used up", all).await;
    stop.store(true, Ordering::SeqCst);
    while let Some(ended) = workers.join_next().await {
        ended.expect("no panic");
    }
    let admitted = admitted.load(Ordering::SeqCst);
    eprintln!("{admitted} of {LIMIT} admitted; {by_kill} calls failed by a kill, {by_end} by an end");
    assert!(admitted <= LIMIT, "{admitted}");
}
