//! Gateways that are killed, paused, short of descriptors or overloaded.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use mock_llm::Config as MockConfig;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Resources, mock};
use weir_tests::eventually;
use weir_tests::plane::ADMIN_TOKEN;
use weir_tests::process::{Process, binary, command_of, signal};
use weir_tests::stack::Stack;

use crate::fleet::{CHAT, Counts, Fleet, Traffic, ask, is_whole, plenty, roomy};

/// The tokens of the answers that the tests here ask for.
const ANSWER: u64 = 8;
const UNARY: &str = r#"{"model":"gpt-4.1","max_tokens":8,"messages":[{"role":"user","content":"hi"}]}"#;
const STREAM: &str =
    r#"{"model":"gpt-4.1","stream":true,"max_tokens":8,"messages":[{"role":"user","content":"hi"}]}"#;
/// Above the tokens of any prompt here.
const PROMPT_MAX: u64 = 64;

/// One backend, and limits that count and never refuse, except `concurrency`.
fn manifest(backend: std::net::SocketAddr, concurrency: u32) -> String {
    format!(
        "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
         ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{backend}\", \
         max_concurrency: 10000, models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 60, tokens_per_minute: 600, \
         burst_multiplier: 1000, concurrency: {concurrency} }} }}\n"
    )
}

/// The drain of a bucket during a test: the tests read buckets with a rate of one per minute, gateways with their
/// own.
fn drained(per_minute: u64, since: Instant) -> u64 {
    per_minute * (since.elapsed().as_secs() + 1) / 60 + 1
}

/// The requests and results of clients.
#[derive(Default)]
struct Ledger {
    sent: AtomicU64,
    /// Tokens of answers that clients received, broken ones included.
    delivered: AtomicU64,
    failed: AtomicU64,
}

impl Ledger {
    async fn ask(&self, client: &Client, body: &str) {
        self.sent.fetch_add(1, Ordering::SeqCst);
        let text = match client.try_chat(body).await {
            Ok(answer) if answer.status == StatusCode::OK => answer.body.to_vec(),
            Ok(_) => {
                self.failed.fetch_add(1, Ordering::SeqCst);
                return;
            }
            Err(broken) => {
                self.failed.fetch_add(1, Ordering::SeqCst);
                broken.body.unwrap_or_default()
            }
        };
        let text = String::from_utf8_lossy(&text);
        let tokens = match text.starts_with("data:") {
            // The first event has the role and no token.
            true => text.matches("\"content\":\"").count().saturating_sub(1) as u64,
            false => serde_json::from_str::<serde_json::Value>(&text)
                .ok()
                .and_then(|answer| answer["usage"]["completion_tokens"].as_u64())
                .unwrap_or_default(),
        };
        self.delivered.fetch_add(tokens, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_killed_under_load_leave_one_charge_for_each_request_no_lease_and_fail_nobody_elses() {
    let kills = if is_whole() { 60 } else { 6 };
    let config = MockConfig { decode_tokens_per_s: 200.0, output_tokens: ANSWER, ..roomy() };
    let mock = mock(config, &CancellationToken::new()).await;
    let began = Instant::now();
    let mut stack = Stack::start(2, &manifest(mock.address, 10_000)).await;
    let (doomed, safe) = (Arc::new(Mutex::new(stack.client(0))), stack.client(1));
    let (at_doomed, at_safe) = (Arc::new(Ledger::default()), Arc::new(Ledger::default()));
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for worker in 0..8 {
        let (doomed, safe, stop) = (doomed.clone(), safe.clone(), stop.clone());
        let ledger = if worker % 2 == 0 { at_doomed.clone() } else { at_safe.clone() };
        workers.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let client =
                    if worker % 2 == 0 { doomed.lock().expect("whole").clone() } else { safe.clone() };
                ledger.ask(&client, if worker < 4 { UNARY } else { STREAM }).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    for kill in 0..kills {
        let before = mock.handle.counters().requests;
        eventually("requests arrive", || async { mock.handle.counters().requests >= before + 20 }).await;
        // At a different time within the requests each time.
        tokio::time::sleep(Duration::from_millis(kill * 7 % 50)).await;
        stack.gateways[0].kill().await;
        stack.gateways[0] = stack.gateway(0).await;
        *doomed.lock().expect("whole") = stack.client(0);
    }
    stop.store(true, Ordering::SeqCst);
    while let Some(ended) = workers.join_next().await {
        ended.expect("no panic");
    }
    assert_eq!(at_safe.failed.load(Ordering::SeqCst), 0, "the other gateway served everybody");
    eventually("no lease of the dead is left", || async { stack.redis.standing("acme").await.leases == 0 })
        .await;
    let standing = stack.redis.standing("acme").await;
    let both = |of: fn(&Ledger) -> &AtomicU64| {
        of(&at_doomed).load(Ordering::SeqCst) + of(&at_safe).load(Ordering::SeqCst)
    };
    let (sent, delivered) = (both(|l| &l.sent), both(|l| &l.delivered));
    let arrived = mock.handle.counters().requests;
    eprintln!(
        "{kills} kills: {sent} sent, {arrived} arrived, {delivered} tokens seen by clients; charged: {standing:?}"
    );
    // A request that was admitted and not yet sent when its gateway died is charged and did not arrive.
    let requests = standing.requests..=standing.requests + drained(60, began);
    assert!(
        *requests.end() >= arrived && *requests.start() <= sent,
        "{arrived} to {sent}: charged {requests:?}"
    );
    let tokens = standing.tokens..=standing.tokens + drained(600, began);
    assert!(*tokens.end() >= delivered, "{delivered} were delivered, charged {tokens:?}");
    assert!(*tokens.start() <= sent * (PROMPT_MAX + ANSWER), "{sent} were sent, charged {tokens:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_paused_for_longer_than_its_leases_charges_nothing_twice_and_answers_when_it_wakes() {
    const CONCURRENCY: u32 = 6;
    const HELD: usize = 2;
    let config = MockConfig { decode_tokens_per_s: 50.0, output_tokens: 1_000_000, ..roomy() };
    let mock = mock(config, &CancellationToken::new()).await;
    let began = Instant::now();
    let stack = Stack::start(2, &manifest(mock.address, CONCURRENCY)).await;
    let (paused, other) = (stack.client(0), stack.client(1));
    let endless = STREAM.replace("\"max_tokens\":8", "\"max_tokens\":100000");
    let mut streams = Vec::new();
    for _ in 0..HELD {
        let answer = paused.send(Method::POST, "/v1/chat/completions", endless.clone()).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let mut body = answer.into_body();
        body.frame().await.expect("a chunk").expect("whole");
        streams.push(body);
    }
    signal(&stack.gateways[0].child, "-STOP").await;
    // These requests arrive in its socket and wait there. The tenant may be refused meanwhile.
    let mut waiting = JoinSet::new();
    for _ in 0..10 {
        let paused = paused.clone();
        waiting.spawn(async move { paused.try_chat(UNARY).await });
    }
    let traffic = Traffic::start(std::slice::from_ref(&other), 8, Duration::from_millis(20));
    eventually("its leases are over", || async {
        let (now, leases) = (stack.redis.now().await, stack.redis.leases("acme").await);
        leases.values().filter(|runs_out| **runs_out > now).count() > CONCURRENCY as usize - HELD
    })
    .await;
    traffic.more(50).await;
    let counts = traffic.end().await;
    counts.only(&[200, 429], "while one gateway is paused");
    signal(&stack.gateways[0].child, "-CONT").await;
    while let Some(answer) = waiting.join_next().await {
        let answer = answer.expect("no panic").expect("an answer");
        let fine = [StatusCode::OK, StatusCode::TOO_MANY_REQUESTS].contains(&answer.status);
        assert!(fine, "{} {}", answer.status, answer.text());
    }
    let most = mock.handle.counters().max_in_flight;
    assert!(most <= CONCURRENCY as usize + HELD, "{most} in flight of {CONCURRENCY}, {HELD} had run out");
    assert_eq!(paused.chat(UNARY).await.status, StatusCode::OK, "it serves again");
    drop(streams);
    eventually("every lease is given back", || async { stack.redis.standing("acme").await.leases == 0 })
        .await;
    let (standing, arrived) = (stack.redis.standing("acme").await, mock.handle.counters().requests);
    let charged = standing.requests..=standing.requests + drained(60, began);
    assert!(charged.contains(&arrived), "{arrived} arrived, charged {charged:?}");
}

/// CPU ticks of a process; `None` without /proc.
fn ticks(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // After the name, which may contain anything: state is the first field, user and system time are the 12th and
    // 13th.
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_without_descriptors_goes_on_with_what_it_has_rests_and_recovers() {
    const DESCRIPTORS: u32 = 256;
    /// Ticks per second, on every Linux.
    const HERTZ: u64 = 100;
    let end = CancellationToken::new();
    let config = MockConfig { decode_tokens_per_s: 50.0, output_tokens: 1_000_000, ..roomy() };
    let mocks = [mock(config, &end).await];
    let fleet = Fleet::start(0, &Resources::limited(&mocks, 10_000, plenty()), |_, _| {}).await;
    let mut shell = command_of("sh");
    let line = format!("ulimit -n {DESCRIPTORS}; exec \"$0\" \"$@\"");
    shell.arg("-c").arg(line).arg(binary("weir-gateway"));
    shell.args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--id=short", "--control-plane"]);
    shell.arg(&fleet.plane.url).arg("--data-dir").arg(fleet.data.path().join("short"));
    shell.env("WEIR_GATEWAY_TOKEN", ADMIN_TOKEN);
    let gateway = Process::start_by(shell, "weir-gateway", "serving").await;
    let address = gateway.text("clients").to_owned();
    let client = Client::new(address.parse().expect("an address"), KEY);
    let endless = STREAM.replace("\"max_tokens\":8", "\"max_tokens\":100000");
    let answer = client.send(Method::POST, "/v1/chat/completions", endless).await;
    let mut stream = answer.into_body();
    stream.frame().await.expect("a chunk").expect("whole");
    let mut held = Vec::new();
    for _ in 0..2 * DESCRIPTORS {
        if let Ok(Ok(one)) = tokio::time::timeout(Duration::from_secs(1), TcpStream::connect(&address)).await
        {
            held.push(one);
        }
    }
    let (id, began) = (gateway.child.id().expect("it lives"), Instant::now());
    let before = ticks(id);
    for _ in 0..100 {
        stream.frame().await.expect("the open stream goes on").expect("whole");
    }
    if let (Some(before), Some(after)) = (before, ticks(id)) {
        let (used, passed) = ((after - before) as f64 / HERTZ as f64, began.elapsed().as_secs_f64());
        eprintln!("without descriptors: {used:.2} s of CPU in {passed:.2} s");
        assert!(used < passed / 2.0, "it does not turn in circles: {used} s of {passed} s");
    }
    drop(held);
    let released = Instant::now();
    eventually("it answers again", || async {
        let one = Client::new(address.parse().expect("an address"), KEY);
        let asked = tokio::time::timeout(Duration::from_secs(1), one.try_chat(CHAT)).await;
        asked.is_ok_and(|answer| answer.is_ok_and(|answer| answer.status == StatusCode::OK))
    })
    .await;
    eprintln!("without descriptors: it answered {:?} after they were free", released.elapsed());
    assert!(released.elapsed() < Duration::from_secs(15), "{:?}", released.elapsed());
    stream.frame().await.expect("the open stream goes on").expect("whole");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_times_the_load_leaves_the_good_answers_per_second_where_they_were() {
    // Few, so that the machine itself is not overloaded.
    const SLOTS: u32 = 2;
    /// The requests per second that the backend can serve: each holds a slot for 0.1 s.
    const CAPACITY: u32 = 20;
    const FOR: Duration = Duration::from_secs(4);
    /// Sixteen times the slots. A machine that cannot bear the load gets what it can, instead of a growing backlog.
    const IN_FLIGHT_MAX: usize = 32;
    /// The required part of the answers per second under a load it can bear, with room for a busy machine.
    const KEPT: f64 = 0.5;
    let config = MockConfig {
        slots: SLOTS as usize,
        decode_tokens_per_s: 10.0 * ANSWER as f64,
        output_tokens: ANSWER,
        ..roomy()
    };
    let mocks = [mock(config, &CancellationToken::new()).await];
    let mut resources = Resources::limited(&mocks, SLOTS, plenty());
    resources.rebuild("chat", |spec| {
        let Spec::Pool(pool) = spec else { panic!("a pool") };
        let wait = Some(prost_types::Duration { seconds: 0, nanos: 500_000_000 });
        pool.queue = Some(v1::Queue { max_wait: wait, ..Default::default() });
    });
    let fleet = Fleet::start(1, &resources, |_, _| {}).await;
    let client = &fleet.gateways[0].client;
    let offer = async |per_second: u32| {
        let (counts, mut all) = (Arc::new(Mutex::new(Counts::default())), JoinSet::new());
        let (began, mut ticks) = (Instant::now(), tokio::time::interval(Duration::from_secs(1) / per_second));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        while began.elapsed() < FOR {
            ticks.tick().await;
            while let Some(ended) = all.try_join_next() {
                ended.expect("no panic");
            }
            if all.len() >= IN_FLIGHT_MAX
                && !is_whole()
                && let Some(ended) = all.join_next().await
            {
                ended.expect("no panic");
            }
            let (client, counts) = (client.clone(), counts.clone());
            all.spawn(async move { ask(&client, UNARY, &counts).await });
        }
        while let Some(ended) = all.join_next().await {
            ended.expect("no panic");
        }
        let counts = counts.lock().expect("whole").clone();
        (counts.of(200) as f64 / began.elapsed().as_secs_f64(), counts)
    };
    let (alone, quiet) = offer(CAPACITY).await;
    let (crowded, counts) = offer(10 * CAPACITY).await;
    eprintln!(
        "{alone:.1} good answers a second at {CAPACITY}, {crowded:.1} at {}: {counts:?}",
        10 * CAPACITY
    );
    quiet.only(&[200, 503], "at its capacity");
    counts.only(&[200, 503], "at ten times that");
    assert!(crowded >= KEPT * alone, "{crowded} of {alone} a second");
    assert!(counts.slowest < Duration::from_secs(10), "nobody hangs: {:?}", counts.slowest);
    let sent = Instant::now();
    assert_eq!(client.chat(UNARY).await.status, StatusCode::OK);
    assert!(sent.elapsed() < Duration::from_secs(2), "it is over at once: {:?}", sent.elapsed());
}
