//! What only several servers can do: slots that move, primaries that change; and data sets that are lost.

use std::sync::Arc;
use std::time::Duration;

use weir_ratelimit::redis::{ColdStart, RedisLimiter, RedisOptions};
use weir_ratelimit::*;

use crate::harness::*;

const MINUTE: Duration = Duration::from_secs(60);

async fn ask(node: &Server, command: &[&str]) -> ::redis::RedisResult<::redis::Value> {
    let mut asked = ::redis::cmd(command[0]);
    command[1..].iter().for_each(|arg| {
        asked.arg(*arg);
    });
    asked.query_async(&mut node.raw().await).await
}

async fn text(node: &Server, command: &[&str]) -> String {
    ::redis::from_redis_value(ask(node, command).await.expect("answer")).expect("text")
}

/// Moves a slot with all its keys, as an operator's tool would.
async fn migrate(cluster: &Cluster, slot: u16, to: usize) {
    let mut ids = Vec::new();
    for node in &cluster.nodes {
        ids.push(text(node, &["CLUSTER", "MYID"]).await);
    }
    let from = (usize::from(slot) * 3 / 16384..3)
        .find(|n| (n * 16384 / 3..(n + 1) * 16384 / 3).contains(&usize::from(slot)))
        .expect("an owner");
    let (source, target, slot) = (&cluster.nodes[from], &cluster.nodes[to], slot.to_string());
    ask(target, &["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]).await.expect("importing");
    ask(source, &["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]).await.expect("migrating");
    loop {
        let keys: Vec<String> = ::redis::from_redis_value(
            ask(source, &["CLUSTER", "GETKEYSINSLOT", &slot, "100"]).await.expect("keys"),
        )
        .expect("names");
        if keys.is_empty() {
            break;
        }
        let mut command = vec!["MIGRATE", "127.0.0.1", target.port(), "", "0", "5000", "KEYS"];
        command.extend(keys.iter().map(String::as_str));
        ask(source, &command).await.expect("migrate");
    }
    for node in [target, source] {
        ask(node, &["CLUSTER", "SETSLOT", &slot, "NODE", &ids[to]]).await.expect("node");
    }
}

/// Four clients get exactly the limit while its hash slot moves to another server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_under_load_admits_exactly_the_limit() {
    let cluster = Arc::new(Cluster::start().await);
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(300, 0, MINUTE))].into();
    let key = scopes[0].record.as_str();
    let slot: u16 =
        ::redis::from_redis_value(ask(&cluster.nodes[0], &["CLUSTER", "KEYSLOT", key]).await.expect("slot"))
            .expect("number");
    let owner = usize::from(slot) * 3 / 16384;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let limiter = cluster.limiter().await;
        let scopes = scopes.clone();
        tasks.spawn(async move {
            let mut admitted = 0;
            for _ in 0..200 {
                let call = call(scopes.clone());
                // An error says nothing was decided, or that nobody knows: asked again under the same id.
                let decision = loop {
                    match limiter.acquire(&call).await {
                        Ok(decision) => break decision,
                        Err(error) => assert_ne!(error.trouble(), Trouble::Caller, "{error}"),
                    }
                };
                admitted += usize::from(granted(&decision));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            admitted
        });
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    migrate(&cluster, slot, (owner + 1) % 3).await;
    assert_eq!(tasks.join_all().await.into_iter().sum::<usize>(), 300);
}

/// A refusal in one hash slot leaves nothing in the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_in_a_later_slot_is_compensated_exactly() {
    let cluster = Arc::new(Cluster::start().await);
    let world = World::cluster(&cluster).await;
    let global = || {
        let mut scope = scope("any");
        (scope.record, scope.leases) = scope_keys(Scope::Global);
        scope.buckets[Kind::Requests as usize] = bucket(5, 0, MINUTE);
        scope
    };
    let mut tenant = limited("acme", Kind::Requests, bucket(100, 0, MINUTE));
    tenant.concurrency = Some(100);
    let scopes: Scopes = [global(), tenant].into();
    for _ in 0..20 {
        let call = call(scopes.clone());
        let first = granted(&world.acquire(&call).await);
        assert_eq!(granted(&world.acquire(&call).await), first, "the same id gets the same answer");
    }
    let stand: Vec<u64> = world.peek(&scopes).await.iter().map(|limit| limit.remaining).collect();
    assert_eq!(stand, [0, 95, 95]);
}

/// A settlement that one server took and another one refused is no settlement that never was: it is told again under its id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settlement_done_in_part_is_of_unknown_outcome_and_counts_once() {
    let cluster = Arc::new(Cluster::start().await);
    let limiter = cluster.limiter().await;
    let mut global = scope("any");
    (global.record, global.leases) = scope_keys(Scope::Global);
    global.buckets[Kind::Requests as usize] = bucket(100, 0, MINUTE);
    let mut owners = Vec::new();
    let mut tenants =
        (0..100).map(|n| limited(&format!("tenant-{n}"), Kind::Requests, bucket(100, 0, MINUTE)));
    // A tenant whose record is at another server, and comes first.
    let tenant = loop {
        let tenant = tenants.next().expect("one of a hundred");
        owners.clear();
        for key in [tenant.record.as_str(), global.record.as_str()] {
            let slot: u16 = ::redis::from_redis_value(
                ask(&cluster.nodes[0], &["CLUSTER", "KEYSLOT", key]).await.expect("a slot"),
            )
            .expect("a number");
            owners.push(usize::from(slot) * 3 / 16384);
        }
        if owners[0] != owners[1] {
            break tenant;
        }
    };
    let scopes: Scopes = [tenant, global].into();
    let call = call(scopes.clone());
    assert!(granted(&limiter.acquire(&call).await.expect("decided")));
    let mut units = [0; Kind::COUNT];
    units[Kind::Requests as usize] = 3;
    let actual = Cost::new(units);
    let settle = Settle { id: call.id, actual, scopes: scopes.clone(), slot: None, usage: None };
    let refusing = &cluster.nodes[owners[1]];
    ask(refusing, &["ACL", "SETUSER", "default", "-@scripting"]).await.expect("set");
    assert_eq!(limiter.settle(&settle).await.expect_err("one refuses"), Error::Lost);
    ask(refusing, &["ACL", "SETUSER", "default", "+@all"]).await.expect("set");
    limiter.settle(&settle).await.expect("settled");
    limiter.settle(&settle).await.expect("settled");
    let stand = limiter.peek(&scopes).await.expect("known");
    assert_eq!(stand.iter().map(|limit| limit.remaining).collect::<Vec<_>>(), [97, 97]);
}

/// What the servers wrote so far, in changes.
async fn changes(cluster: &Cluster) -> u64 {
    let mut sum = 0;
    for node in &cluster.nodes {
        let info = text(node, &["INFO", "persistence"]).await;
        let line = info.lines().find_map(|line| line.strip_prefix("rdb_changes_since_last_save:"));
        sum += line.expect("changes").trim().parse::<u64>().expect("a number");
    }
    sum
}

/// No request is refused because of the charge of a refused request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_refused_lately_refuses_before_anything_is_charged() {
    let cluster = Arc::new(Cluster::start().await);
    let world = World::cluster(&cluster).await;
    let mut everything = scope("any");
    (everything.record, everything.leases) = scope_keys(Scope::Global);
    everything.buckets[Kind::Requests as usize] = bucket(5, 0, MINUTE);
    let tenant = limited("acme", Kind::Requests, bucket(100, 0, MINUTE));
    let by_limit = || call([everything.clone(), tenant.clone()]);
    let by_slots = || Acquire { candidates: vec![candidate("a", 1)], ..call([tenant.clone()]) };
    let refused = async |call: Acquire, times: usize| {
        for _ in 0..times {
            assert!(!granted(&world.acquire(&call).await));
        }
    };
    for _ in 0..5 {
        assert!(granted(&world.acquire(&by_limit()).await));
    }
    let owner = by_slots();
    assert!(granted(&world.acquire(&owner).await));
    refused(by_limit(), 1).await;
    refused(by_slots(), 1).await;
    let before = changes(&cluster).await;
    refused(by_limit(), 20).await;
    refused(by_slots(), 20).await;
    assert_eq!(changes(&cluster).await, before, "refused, and nothing was written");
    assert!(granted(&world.acquire(&owner).await), "who holds the slot is granted again");
    let stand: Vec<u64> = world.peek(&by_limit().scopes).await.iter().map(|limit| limit.remaining).collect();
    assert_eq!(stand, [0, 94]);
}

/// The primary stops for good, and Sentinel makes its replica the primary.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_by_sentinel_is_followed() {
    // Replication leaves a dump, which a server started in the same folder would load.
    let (dir, other) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    let path = |dir: &tempfile::TempDir| dir.path().to_str().expect("path").to_owned();
    let primary = Server::start_with(&["--dir", &path(&dir)]).await;
    let replica =
        Server::start_with(&["--dir", &path(&other), "--replicaof", "127.0.0.1", primary.port()]).await;
    let file = dir.path().join("sentinel.conf");
    let watched = format!(
        "sentinel monitor weir 127.0.0.1 {} 1\nsentinel down-after-milliseconds weir 300\nsentinel failover-timeout weir 3000\n",
        primary.port()
    );
    std::fs::write(&file, watched).expect("configuration");
    let sentinel = Server::start_sentinel(file.to_str().expect("path")).await;
    let url = format!("redis+sentinel://127.0.0.1:{}/weir", sentinel.port());
    let options = RedisOptions { silence: Duration::from_secs(1), ..RedisOptions::default() };
    let limiter = RedisLimiter::connect(&url, options).await.expect("connect");
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(10, 0, MINUTE))].into();
    for _ in 0..4 {
        assert!(granted(&limiter.acquire(&call(scopes.clone())).await.expect("granted")));
    }
    until("the replica has it, and Sentinel the replica", async || {
        let has = ask(&replica, &["EXISTS", scopes[0].record.as_str()]).await;
        let known = format!("{:?}", ask(&sentinel, &["SENTINEL", "REPLICAS", "weir"]).await);
        has == Ok(::redis::Value::Int(1)) && known.contains(replica.port()) && !known.contains("disconnected")
    })
    .await;
    let address = format!("127.0.0.1:{}", primary.port());
    drop(primary);
    // Its port stays taken: Sentinel would make a replica of whatever server of another test came to live there.
    let mut grave = None;
    until("the port is free", async || {
        grave = std::net::TcpListener::bind(&address).ok();
        grave.is_some()
    })
    .await;
    let mut admitted = 0;
    until("served by the new primary", async || limiter.peek(&scopes).await.is_ok()).await;
    for _ in 0..20 {
        let call = call(scopes.clone());
        let decision = loop {
            if let Ok(decision) = limiter.acquire(&call).await {
                break decision;
            }
        };
        admitted += usize::from(granted(&decision));
    }
    assert_eq!(admitted, 6, "what was used before counts after");
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..3000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// `cold_start: strict`: a store that returns empty grants no second burst.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_data_set_hands_out_no_burst_when_strict() {
    let mut server = Server::start().await;
    let strict = RedisOptions {
        silence: Duration::from_secs(1),
        cold_start: ColdStart::Strict,
        ..RedisOptions::default()
    };
    let limiter = RedisLimiter::connect(&server.url, strict).await.expect("connect");
    let of = |rate, period| -> Scopes { [limited("acme", Kind::Requests, bucket(100, rate, period))].into() };
    let slow = of(100, Duration::from_secs(3600));
    assert!(!granted(&limiter.acquire(&call(slow.clone())).await.expect("decided")), "full at birth");
    let charge = Charge {
        record: Key::tenant("charged"),
        kind: Kind::Requests,
        bucket: bucket(100, 100, Duration::from_secs(3600)).expect("some"),
        needed: 1,
        added: 1,
        rule: ChargeRule::AllOrNothing,
    };
    let charges = std::slice::from_ref(&charge);
    assert!(!granted(&limiter.charge(charges).await.expect("decided")), "for charges too");
    let fast = of(100_000, Duration::from_secs(1));
    until("drained since birth", async || limiter.peek(&fast).await.expect("peek")[0].remaining == 100).await;
    assert!(granted(&limiter.acquire(&call(fast.clone())).await.expect("decided")));
    server.kill();
    server.restart().await;
    until("back", async || limiter.peek(&slow).await.is_ok()).await;
    let decision = limiter.acquire(&call(slow.clone())).await.expect("decided");
    let Outcome::Limited { wait: Some(wait) } = decision.outcome else { panic!("{decision:?}") };
    assert!(
        wait > Duration::from_secs(30) && wait <= Duration::from_secs(36),
        "one unit of a hundred an hour: {wait:?}"
    );
    let burst = RedisOptions { cold_start: ColdStart::Burst, ..strict };
    let lenient = RedisLimiter::connect(&server.url, burst).await.expect("connect");
    assert!(granted(&lenient.acquire(&call(slow)).await.expect("decided")));
    assert!(granted(&lenient.charge(charges).await.expect("decided")));
}

#[test]
fn a_wrong_address_is_told_without_its_password() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        for url in [
            "redis+sentinel://:hunter2@host:1",
            "redis+ring://:hunter2@host",
            "nothing",
            "redis+cluster://:hunter2@[",
        ] {
            let error = RedisLimiter::open(url, RedisOptions::default()).expect_err(url);
            assert!(
                matches!(error, Error::Invalid(_)) && !error.to_string().contains("hunter2"),
                "{url}: {error}"
            );
        }
        for url in [
            "rediss://host",
            "redis+cluster://u:p@a:1,b:2/",
            "rediss+cluster://a",
            "rediss+sentinel://a,b:5/main/3",
        ] {
            RedisLimiter::open(url, RedisOptions::default()).expect(url);
        }
    });
}
