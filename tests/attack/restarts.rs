//! Gateways that are restarted one after the other under load, and clients that all return at once after an outage.

mod balancer;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use mock_llm::Config as MockConfig;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1;
use weir_tests::cluster::{KEY, Resources, mock};
use weir_tests::eventually;
use weir_tests::plane;
use weir_tests::process::signal;
use weir_tests::redis::Redis;
use weir_tests::stack::Stack;

use self::balancer::Balancer;
use crate::fleet::{Fleet, Traffic, is_whole, plenty, roomy};

/// The time for which a gateway accepts connections after it was told to end, so that load balancers notice.
const PRE_STOP_S: u64 = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_restarted_one_after_the_other_under_load_lose_no_request_and_no_stream() {
    const UNARY: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;
    const STREAM: &str =
        r#"{"model":"gpt-4.1","stream":true,"max_tokens":10,"messages":[{"role":"user","content":"hi"}]}"#;
    /// A machine that cannot bear the load gets what it can, instead of a growing backlog.
    const IN_FLIGHT_MAX: usize = 256;
    let (rounds, per_second, streams) = if is_whole() { (20, 500, 200) } else { (2, 60, 20) };
    let rounds = std::env::var("WEIR_TEST_RESTARTS").ok().and_then(|n| n.parse().ok()).unwrap_or(rounds);
    // A stream takes 2.5 s: longer than a gateway accepts connections after it was told to end.
    let slow = MockConfig { decode_tokens_per_s: 4.0, ..roomy() };
    let mock = mock(slow, &CancellationToken::new()).await;
    let manifest = format!(
        "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 0 }} }}\n\
         ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{}\", max_concurrency: 10000, \
         models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 1000000, concurrency: 10000 }} }}\n",
        mock.address
    );
    let mut stack = Stack::start(0, &manifest).await;
    let grpc = stack.control_plane.text("grpc").to_owned();
    let mut addresses = Vec::new();
    for k in 0..3 {
        let gateway = stack.gateway_with(k, &grpc, PRE_STOP_S).await;
        addresses.push(gateway.text("clients").parse().expect("an address"));
        stack.gateways.push(gateway);
    }
    let balancer = Arc::new(Balancer::new(addresses, stack.key()));
    let stop = CancellationToken::new();
    let lost = Arc::new(Mutex::new(Vec::<String>::new()));
    let (done, streamed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let judge = |lost: &Mutex<Vec<String>>,
                 done: &AtomicUsize,
                 answer: Result<(StatusCode, Bytes), String>,
                 stream: bool| {
        done.fetch_add(1, Ordering::Relaxed);
        let problem = match answer {
            Err(why) => why,
            Ok((StatusCode::OK, body)) if !stream || body.ends_with(b"data: [DONE]\n\n") => return,
            Ok((status, body)) => format!("{status} {}", String::from_utf8_lossy(&body)),
        };
        lost.lock().expect("whole").push(problem);
    };
    let mut load = JoinSet::new();
    for worker in 0..streams {
        let (balancer, stop, lost, streamed) =
            (balancer.clone(), stop.clone(), lost.clone(), streamed.clone());
        load.spawn(async move {
            while !stop.is_cancelled() {
                judge(&lost, &streamed, balancer.ask(STREAM, worker % 2 == 0).await, true);
            }
        });
    }
    {
        let (balancer, stop, lost, done) = (balancer.clone(), stop.clone(), lost.clone(), done.clone());
        load.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
            let (mut requests, room) = (JoinSet::new(), Arc::new(Semaphore::new(IN_FLIGHT_MAX)));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            for n in 0.. {
                ticks.tick().await;
                if stop.is_cancelled() {
                    break;
                }
                let (balancer, lost, done) = (balancer.clone(), lost.clone(), done.clone());
                let permit = room.clone().acquire_owned().await.expect("never closed");
                requests.spawn(async move {
                    let _permit = permit;
                    judge(&lost, &done, balancer.ask(UNARY, n % 2 == 0).await, false);
                });
                while requests.try_join_next().is_some() {}
            }
            requests.join_all().await;
        });
    }
    let began = Instant::now();
    for round in 0..rounds {
        for k in 0..3 {
            let before = streamed.load(Ordering::Relaxed);
            eventually("streams run", || async { streamed.load(Ordering::Relaxed) > before }).await;
            signal(&stack.gateways[k].child, "-TERM").await;
            let ended = stack.gateways[k].child.wait().await.expect("ends");
            assert_eq!(ended.code(), Some(0), "gateway {k} in round {round}");
            stack.gateways[k] = stack.gateway_with(k, &grpc, PRE_STOP_S).await;
            let address = stack.gateways[k].text("clients").parse().expect("an address");
            balancer.moved(k, address);
        }
    }
    stop.cancel();
    while let Some(ended) = load.join_next().await {
        ended.expect("no panic");
    }
    let lost = lost.lock().expect("whole").clone();
    let (done, streamed) = (done.load(Ordering::Relaxed), streamed.load(Ordering::Relaxed));
    eprintln!(
        "{} restarts in {:?}: {done} requests, {streamed} streams, {} lost",
        rounds * 3,
        began.elapsed(),
        lost.len()
    );
    let kinds: std::collections::BTreeSet<&String> = lost.iter().collect();
    assert!(lost.is_empty(), "{} lost: {:?}", lost.len(), kinds.iter().take(5).collect::<Vec<_>>());
    eventually("every lease is given back", || async { stack.redis.standing("acme").await.leases == 0 })
        .await;
}

/// The memory of a process, KiB: now and at its peak. `None` without /proc.
fn memory_kib(id: u32) -> Option<(u64, u64)> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let of = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
    };
    Some((of("VmRSS:")?, of("VmHWM:")?))
}

/// One client that reconnects and asks for the models.
async fn models(address: SocketAddr) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /v1/models HTTP/1.1\r\nhost: weir\r\nauthorization: Bearer {KEY}\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    match &head {
        b"HTTP/1.1 200" => Ok(stream),
        other => Err(std::io::Error::other(String::from_utf8_lossy(other).into_owned())),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_back_at_once_after_an_outage_is_in_step_within_ten_seconds() {
    const GATEWAYS: usize = 20;
    // Ten seconds are promised; a machine that is busy with other tests has twice as many.
    const IN_STEP: Duration = Duration::from_secs(20);
    let clients = if is_whole() { 2000 } else { 400 };
    let mocks = [mock(roomy(), &CancellationToken::new()).await];
    let mut redis = Redis::start().await;
    let url = redis.url();
    let resources = Resources::limited(&mocks, 10_000, plenty());
    let mut fleet = Fleet::start(GATEWAYS, &resources, |_, config| config.redis = Some(url.clone())).await;
    let traffic = Traffic::start(&fleet.clients(), GATEWAYS, Duration::from_millis(100));
    let addresses: Vec<SocketAddr> = fleet.gateways.iter().map(|one| one.running.address).collect();
    let connect = async || {
        let mut all = JoinSet::new();
        for n in 0..clients {
            all.spawn(models(addresses[n % GATEWAYS]));
        }
        let mut held = Vec::new();
        while let Some(one) = all.join_next().await {
            held.push(one.expect("no panic").expect("served"));
        }
        held
    };
    let held = connect().await;
    let before = fleet.plane.child.id().and_then(memory_kib);
    let (listen, directory) = (fleet.plane.address(), fleet.data.path().join("plane"));
    fleet.plane.child.kill().await.expect("killed");
    redis.kill().await;
    drop(held);
    traffic.more(100).await;
    let began = Instant::now();
    let (plane, (), _held) =
        tokio::join!(plane::start(&listen, &directory, None), redis.restart(), connect());
    fleet.plane = plane;
    fleet.admin = fleet.plane.admin().await;
    let revision = fleet.touch("after the outage").await;
    for one in &fleet.gateways {
        let mut revisions = one.running.live.revisions();
        let left = IN_STEP.saturating_sub(began.elapsed());
        let synced = tokio::time::timeout(left, revisions.wait_for(|now| *now >= revision)).await;
        synced.unwrap_or_else(|_| panic!("not within {IN_STEP:?}")).expect("lives");
    }
    let in_step = began.elapsed();
    let list = fleet.admin.list_gateways(v1::ListGatewaysRequest {}).await.expect("answers").into_inner();
    assert_eq!(list.gateways.len(), GATEWAYS);
    fleet.uses_redis().await;
    let after = fleet.plane.child.id().and_then(memory_kib);
    eprintln!(
        "{GATEWAYS} gateways and {clients} clients in step after {in_step:?}; Redis decides after {:?}; \
         control plane before {before:?}, after {after:?} KiB (now, most)",
        began.elapsed()
    );
    if let (Some((before, _)), Some((_, most))) = (before, after) {
        assert!(most <= 2 * before, "the control plane took {most} KiB, and {before} before");
    }
    traffic.end().await.only(&[200], "the outage and its end");
    for one in &fleet.gateways {
        one.shutdown.cancel();
    }
}
