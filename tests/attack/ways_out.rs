//! Ways out of a request, drawn at random: whatever clients, backends, limits and the operator do, gauges, leases and
//! memory are back at their old values when no request runs any more.
//!
//! `WEIR_TEST_SEED` repeats the draws of a run, `WEIR_TEST_SECONDS` sets its length.

mod client;
mod panics;
mod script;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Method;
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_gateway::config::Config;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_runtime::Secret;
use weir_tests::client::Client;
use weir_tests::cluster::{Resources, digest, gateway_config, gateway_over};
use weir_tests::eventually;
use weir_tests::line::Line;
use weir_tests::plane::{ADMIN_TOKEN, Admin};
use weir_tests::process::Process;
use weir_tests::random::{Random, given, seed, seed_of_now};
use weir_tests::redis::Redis;

use self::client::Heard;
use self::script::Backends;
use crate::fleet::Fleet;
use crate::lab::{connect, http1};

/// Concurrent clients.
const CLIENTS: u64 = 24;
/// The total timeout of a request.
const TOTAL: Duration = Duration::from_secs(2);
/// The longest way out is a body that never ends: it takes ten seconds, and more on a busy machine.
const LONGEST: Duration = Duration::from_secs(60);
/// Leases are renewed every five seconds: one that is renewed after the end of its request is back by then.
const RENEWED: Duration = Duration::from_secs(6);
/// The key of a tenant with a small limit.
const SELDOM_KEY: &str = "weir_test_key_of_few";

fn seconds() -> Duration {
    Duration::from_secs(given("WEIR_TEST_SECONDS").unwrap_or(10))
}

fn wire(time: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(time).ok()
}

/// A model `gpt-4.1` at two backends; `passing`, whose backend comes and goes, falls back to it; `seldom` has a small
/// limit. Everything has few slots, short queues and short timeouts.
fn resources(backends: &Backends) -> Resources {
    let [first, second, passing] = backends.addresses();
    let mut resources = Resources::at(&[first, second]);
    let timeouts = v1::Timeouts {
        first_byte: wire(Duration::from_secs(1)),
        idle: wire(Duration::from_secs(1)),
        total: wire(TOTAL),
        ..Default::default()
    };
    let pool = v1::PoolSpec {
        timeouts: Some(timeouts),
        health: Some(v1::HealthProfile { paid_probes_per_hour: Some(0), ..Default::default() }),
        queue: Some(v1::Queue { max_waiting: 8, max_wait: wire(Duration::from_millis(300)) }),
        hedging: Some(v1::Hedging {
            floor: wire(Duration::from_millis(50)),
            unary: true,
            ..Default::default()
        }),
        retry_budget: Some(v1::RetryBudget { percent: 100, min_per_second: 100, max_attempts: 3 }),
        // Failing backends go and come back: both are ways out.
        ejection: Some(v1::Ejection {
            base_duration: wire(Duration::from_secs(1)),
            max_duration: wire(Duration::from_secs(1)),
            ..Default::default()
        }),
        ..Default::default()
    };
    resources.put("chat", Spec::Pool(pool.clone())).put("aside", Spec::Pool(pool));
    for name in ["b0", "b1"] {
        resources.rebuild(name, |spec| {
            let Spec::Backend(spec) = spec else { panic!("a backend") };
            spec.max_concurrency = Some(8);
        });
    }
    let aside = v1::BackendSpec {
        pool: "aside".into(),
        url: format!("http://{passing}"),
        models: [("passing".to_owned(), String::new())].into(),
        max_concurrency: Some(3),
        ..Default::default()
    };
    let with_fallback =
        v1::ModelSpec { pool: "aside".into(), fallbacks: vec!["gpt-4.1".into()], ..Default::default() };
    resources.put("b2", Spec::Backend(aside)).put("passing", Spec::Model(with_fallback));
    // The limits hardly drain, so that charges can be read.
    let most = v1::Rates {
        requests_per_minute: Some(100),
        tokens_per_minute: Some(10_000),
        burst_multiplier: Some(1000.0),
        concurrency: Some(16),
        ..Default::default()
    };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(most), ..Default::default() }));
    // Attempts at the second backend have leases of its account as well.
    resources.rebuild("b1", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.account = "provider".into();
    });
    let selector = v1::LimitSelector { account: "provider".into(), ..Default::default() };
    let rates = v1::Rates { concurrency: Some(6), ..most };
    let of_account = v1::LimitSpec { selector: Some(selector), rates: Some(rates) };
    resources.put("of-provider", Spec::Limit(of_account));
    let few = v1::Rates { requests_per_minute: Some(60), concurrency: Some(1), ..Default::default() };
    resources.put("few", Spec::Tenant(v1::TenantSpec { limits: Some(few), ..Default::default() }));
    let known = v1::KeyDigest { sha256: digest(SELDOM_KEY), prefix: "weir_test".into(), expire_time: None };
    let key = v1::ApiKeySpec { tenant: "few".into(), digests: vec![known], ..Default::default() };
    resources.put("few-key", Spec::ApiKey(key));
    resources
}

/// The actions and results of clients.
#[derive(Debug, Default)]
struct Tally {
    ways: BTreeMap<String, u64>,
    /// Requests whose head was sent completely.
    sent: u64,
    /// The statuses that clients received.
    seen: BTreeMap<u16, u64>,
}

impl Tally {
    fn add(&mut self, way: String, heard: Heard) {
        *self.ways.entry(way).or_default() += 1;
        self.sent += heard.sent;
        for status in heard.statuses {
            *self.seen.entry(status).or_default() += 1;
        }
    }

    fn join(&mut self, other: Tally) {
        for (way, count) in other.ways {
            *self.ways.entry(way).or_default() += count;
        }
        for (status, count) in other.seen {
            *self.seen.entry(status).or_default() += count;
        }
        self.sent += other.sent;
    }

    fn drawn(&self) -> u64 {
        self.ways.values().sum()
    }
}

/// Draws ways out for this time, and returns when all have ended.
async fn draw_for(time: Duration, clients: std::net::SocketAddr, seed: u64, done: &AtomicU64) -> Tally {
    let until = Instant::now() + time;
    let mut workers = JoinSet::new();
    let round = done.fetch_add(1, Ordering::SeqCst);
    for worker in 0..CLIENTS {
        let mut draw = Random::new(seed ^ (round << 32) ^ worker);
        workers.spawn(async move {
            let mut tally = Tally::default();
            while Instant::now() < until {
                let before = draw.clone();
                let (way, acting) = client::way(&mut draw, clients);
                match tokio::time::timeout(LONGEST, acting).await {
                    Ok(heard) => tally.add(way, heard),
                    Err(_) => panic!("{way} did not end within {LONGEST:?}, drawn from {before:?}"),
                }
            }
            tally
        });
    }
    let mut all = Tally::default();
    while let Some(tally) = workers.join_next().await {
        all.join(tally.expect("no client fails"));
    }
    all
}

/// The page of metrics, by series.
async fn page(ops: &Client) -> BTreeMap<String, f64> {
    let page = ops.ask(Method::GET, "/metrics", "").await;
    let series = page.text().lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    series.collect()
}

/// The sum of a metric over the series whose labels contain this.
fn sum(page: &BTreeMap<String, f64>, name: &str, label: &str) -> f64 {
    let of_name = |series: &str| {
        series.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'))
            && series.contains(label)
    };
    page.iter().filter(|(series, _)| of_name(series)).map(|(_, value)| value).sum()
}

/// The values that are not back where they were.
async fn left_over(ops: &Client) -> Vec<String> {
    let page = page(ops).await;
    let gauges = [
        ("weir_requests_in_flight", ""),
        ("weir_connections", ""),
        ("weir_listener_connections", "listener=\"clients\""),
        ("weir_limit_waiting", ""),
        ("weir_request_body_bytes", ""),
        ("weir_limit_store_pending_records", ""),
    ];
    let stands = |(name, label)| (name, sum(&page, name, label));
    let left = gauges.into_iter().map(stands).filter(|(_, value)| *value != 0.0);
    left.map(|(name, value)| format!("{name} is {value}")).collect()
}

/// All leases in the store. A lease that was never released and has expired is still there.
async fn leases(redis: &Redis) -> Vec<String> {
    // All sorted sets except the membership.
    let script = "local all = {}; for _, key in ipairs(redis.call('KEYS', '*')) do \
                  if redis.call('TYPE', key).ok == 'zset' and not string.find(key, ':roll$') then \
                  for _, id in ipairs(redis.call('ZRANGE', key, 0, -1)) do table.insert(all, key .. ' ' .. id) end \
                  end end; return all";
    let printed = redis.cli(&["EVAL", script, "0"]).await;
    printed.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Returns when nothing is left over.
async fn at_rest<F: Future<Output = Vec<String>>>(what: &str, mut left: impl FnMut() -> F) {
    let until = Instant::now() + LONGEST;
    loop {
        let left = left().await;
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < until, "{what}: {}", left.join("; "));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Every request was counted under one code, once.
fn assert_counted_once(page: &BTreeMap<String, f64>, tally: &Tally) {
    let counted = sum(page, "weir_requests_total", "");
    let seen: u64 = tally.seen.values().sum();
    assert!(counted <= tally.sent as f64, "{counted} counted, {} sent", tally.sent);
    assert!(counted >= seen as f64, "{counted} counted, clients saw {:?}", tally.seen);
    for (status, seen) in tally.seen.iter().filter(|(status, _)| **status != 200) {
        let counted = sum(page, "weir_requests_total", &format!("status=\"{status}\""));
        assert!(counted >= *seen as f64, "{counted} counted with {status}, clients saw {seen}");
    }
    let timed = sum(page, "weir_request_duration_seconds_count", "");
    assert_eq!(timed, counted, "each request was timed once");
    for never in [
        "weir_settlements_lost_total",
        "weir_limit_store_lost_records_total",
        "weir_limit_store_outages_total",
    ] {
        assert_eq!(sum(page, never, ""), 0.0, "{never}");
    }
}

/// Backends and slots come and go until told to stop.
async fn change(mut admin: Admin, whole: Resources, mut draw: Random, stop: CancellationToken) -> u64 {
    let mut changes = 0;
    loop {
        let mut resources = whole.clone();
        let is_last = stop.is_cancelled();
        // Only members of the set can leave it.
        if changes > 0 && !is_last && draw.chance(50) {
            resources = resources.without("b2");
            if draw.chance(50) {
                resources = resources.without("passing");
            }
        }
        for name in ["b0", "b1"] {
            resources.rebuild(name, |spec| {
                let Spec::Backend(spec) = spec else { panic!("a backend") };
                spec.max_concurrency = Some(2 + u32::try_from(draw.below(7)).expect("small"));
                if !is_last && draw.chance(20) {
                    spec.set_admin_state(v1::AdminState::Draining);
                }
            });
        }
        let apply = v1::ApplyRequest {
            resources: resources.all(),
            apply_set: "ways".into(),
            prune: true,
            allow_mass_removal: true,
            take_over: true,
            ..Default::default()
        };
        admin.apply(apply).await.expect("applied");
        changes += 1;
        if is_last {
            return changes;
        }
        let pause = Duration::from_millis(100) + draw.pause(500);
        stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_every_way_out_gauges_leases_and_memory_return_to_where_they_were() {
    /// The number of times that the test waits for rest.
    const ROUNDS: u32 = 3;
    /// The maximum of tokens of a prompt here, and of an answer.
    const REQUEST_TOKENS: u64 = 400;
    /// The attempts of one request.
    const TRIES: u64 = 3;
    let seed = seed(seed_of_now);
    let end = CancellationToken::new();
    let _guard = end.clone().drop_guard();
    let backends = Backends::start(&end).await;
    let whole = resources(&backends);
    let fleet = Fleet::start(0, &whole, |_, _| {}).await;
    let redis = Redis::start().await;
    let limiter = RedisLimiter::connect(&redis.url(), RedisOptions::default()).await.expect("a Redis");
    let config = Config {
        control_plane: fleet.plane.url.clone(),
        gateway_token: Some(Secret::new(ADMIN_TOKEN.into())),
        id: Some("ways".into()),
        ..gateway_config(&fleet.data.path().join("ways"))
    };
    let force = CancellationToken::new();
    let gateway =
        weir_gateway::start(config, Some(limiter.into()), end.clone(), force).await.expect("starts");
    gateway.serving().await;
    let ops = Client::new(gateway.ops_address, "");
    let (done, mut tally, mut changes) = (AtomicU64::new(0), Tally::default(), 0);
    let mut runtimes = BTreeMap::new();
    for round in 1..=ROUNDS {
        let stop = CancellationToken::new();
        let changing = tokio::spawn(change(
            fleet.admin.clone(),
            whole.clone(),
            Random::new(seed ^ u64::from(round)),
            stop.clone(),
        ));
        let watching = async {
            let mut most = 0;
            loop {
                for backend in gateway.live.snapshot().backends.values() {
                    runtimes.insert(Arc::as_ptr(&backend.state) as usize, backend.state.clone());
                }
                most = most.max(leases(&redis).await.len());
                tokio::select! {
                    () = stop.cancelled() => return most,
                    () = tokio::time::sleep(Duration::from_millis(100)) => {}
                }
            }
        };
        let drawing = async {
            let drawn = draw_for(seconds() / ROUNDS, gateway.address, seed, &done).await;
            stop.cancel();
            drawn
        };
        let (most, drawn) = tokio::join!(watching, drawing);
        tally.join(drawn);
        changes += changing.await.expect("no panic");
        assert!(most > 0, "leases are counted");
        let left = || async {
            let mut left = left_over(&ops).await;
            left.extend(leases(&redis).await.into_iter().map(|lease| format!("there is the lease {lease}")));
            left.extend(
                runtimes
                    .values()
                    .map(|runtime| runtime.in_flight())
                    .filter(|held| *held > 0)
                    .map(|held| format!("{held} in flight at a backend")),
            );
            left
        };
        at_rest(&format!("seed {seed}, round {round}"), left).await;
        if round == ROUNDS {
            tokio::time::sleep(RENEWED).await;
            at_rest(&format!("seed {seed}, after leases were renewed"), left).await;
            assert!(leases(&redis).await.is_empty(), "seed {seed}: nothing is renewed for ever");
        }
    }
    let page = page(&ops).await;
    let standing = redis.standing("acme").await;
    let poured = backends.poured();
    let (counted, codes) = (sum(&page, "weir_requests_total", ""), page.keys());
    let codes = codes.filter(|series| series.starts_with("weir_requests_total")).count();
    println!(
        "seed {seed}: {} ways drawn, {} kinds of them; {} requests sent, {counted} counted under {codes} labels, seen \
         {:?}; {changes} configurations; {poured} bytes poured; charged {standing:?}",
        tally.drawn(),
        tally.ways.len(),
        tally.sent,
        tally.seen,
    );
    assert_counted_once(&page, &tally);
    let possible = tally.sent * TRIES * REQUEST_TOKENS + poured;
    let settled = sum(&page, "weir_tokens_total", "");
    assert!(settled <= possible as f64, "{settled} tokens settled, {possible} were possible");
    assert!(standing.tokens <= possible, "{standing:?}: {possible} tokens were possible");
    assert!(standing.requests <= tally.sent, "{standing:?}: {} requests were sent", tally.sent);
    end.cancel();
    gateway.ended().await.expect("ends well");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_is_as_large_after_many_ways_out_as_before() {
    /// The allowed difference between two readings: memory that the allocator keeps of the peak.
    const NOISE_KIB: u64 = 16 << 10;
    let seed = seed(seed_of_now);
    let time = (seconds() / 2).min(Duration::from_secs(30));
    let end = CancellationToken::new();
    let _guard = end.clone().drop_guard();
    let backends = Backends::start(&end).await;
    let data = tempfile::tempdir().expect("a directory");
    resources(&backends).save(data.path());
    let directory = data.path().to_str().expect("UTF-8");
    let args = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"];
    let args = [&args[..], &["--pre-stop=0s", "--data-dir", directory]].concat();
    let process = Process::start("weir-gateway", &args, "serving").await;
    let address = |field| process.text(field).parse().expect("an address");
    let (clients, ops) = (address("clients"), Client::new(address("ops"), ""));
    let done = AtomicU64::new(0);
    let (mut sizes, mut all) = (Vec::new(), Tally::default());
    for round in 1..=3 {
        let drawn = draw_for(time / 2, clients, seed, &done).await;
        all.join(drawn);
        at_rest(&format!("seed {seed}, round {round}"), || left_over(&ops)).await;
        sizes.push(crate::lab::resident_kib(process.child.id().expect("it runs")));
    }
    println!("seed {seed}: {} ways drawn; resident after each round: {sizes:?} KiB", all.drawn());
    assert_counted_once(&page(&ops).await, &all);
    // The first round loads the code and the buffers that all rounds need.
    let grown = sizes[2].saturating_sub(sizes[0]);
    assert!(grown <= NOISE_KIB, "seed {seed}: {sizes:?} KiB after each round");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_a_slot_is_asked_for_leaves_no_lease_behind() {
    for hedges in [false, true] {
        let end = CancellationToken::new();
        let _guard = end.clone().drop_guard();
        let backends = Backends::start(&end).await;
        let redis = Redis::start().await;
        let line = Line::to(redis.address(), &end).await;
        let url = format!("redis://{}", line.address);
        let limiter = RedisLimiter::connect(&url, RedisOptions::default()).await.expect("a Redis");
        let gateway = gateway_over(&resources(&backends), limiter.into()).await;
        let ops = Client::new(gateway.running.ops_address, "");
        // There are no hedges before a backend is known: both are after this number of answers.
        for _ in 0..50 {
            let heard = http1::exchange(gateway.running.address, http1::chat("gpt-4.1", "good", true)).await;
            assert_eq!(heard.statuses(), [200], "{heard:?}");
        }
        // The first call of each script loads it, which takes two round trips. A retry moves a slot.
        let heard = http1::exchange(gateway.running.address, http1::chat("gpt-4.1", "closed", true)).await;
        assert_eq!(heard.statuses(), [502], "{heard:?}");
        at_rest("before", || leases(&redis)).await;
        let asked = backends.asked();
        // Later decisions get no answer.
        if !hedges {
            line.silence_to_client();
        }
        let mut socket = connect(gateway.running.address).await;
        // The first backend is silent; after a twentieth of a second a slot of the other one is taken as well.
        socket.write_all(&http1::chat("gpt-4.1", "hang", false)).await.expect("sent");
        if hedges {
            eventually("the first backend is asked", || async { backends.asked() == asked + 1 }).await;
            line.silence_to_client();
        }
        let slots = async || leases(&redis).await.iter().filter(|lease| lease.contains("{b:")).count();
        let taken = 1 + usize::from(hedges);
        eventually("the store has granted it", || async { slots().await == taken }).await;
        drop(socket);
        eventually("nothing is under way", || async {
            sum(&page(&ops).await, "weir_requests_in_flight", "") == 0.0
        })
        .await;
        line.mend();
        at_rest(&format!("hedges: {hedges}"), || leases(&redis)).await;
    }
}
