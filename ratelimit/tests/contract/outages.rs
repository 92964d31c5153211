//! A store that refuses, goes silent, dies and comes back: what its errors mean, what is decided without it, and that
//! nothing is admitted twice when it returns.

use std::sync::Arc;
use std::time::Duration;

use weir_ratelimit::fallback::Phase;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::*;

use crate::harness::*;

const MINUTE: Duration = Duration::from_secs(60);

fn still(capacity: u64) -> Scopes {
    [limited("acme", Kind::Requests, bucket(capacity, 0, MINUTE))].into()
}

/// One of `of` gateways that share a server.
async fn gateway(server: &Server, of: u32) -> Arc<Fallback<RedisLimiter>> {
    let limiter = RedisLimiter::connect(&server.url, RedisOptions::default()).await.expect("connect");
    Arc::new(Fallback::new(limiter, Arc::new(move || of)))
}

async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    for _ in 0..2000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

async fn is(gateway: &Fallback<RedisLimiter>, phase: Phase) {
    eventually(&format!("{phase:?}"), async || gateway.status().phase == phase).await;
}

/// Asks until nothing is asked of the store any more.
async fn opens(gateway: &Fallback<RedisLimiter>) {
    let probe = limited("prober", Kind::Requests, bucket(1, 0, MINUTE));
    eventually("open", async || {
        let _ = gateway.peek(std::slice::from_ref(&probe)).await;
        gateway.status().phase == Phase::Open
    })
    .await;
}

async fn returns(gateway: &Fallback<RedisLimiter>) {
    is(gateway, Phase::Closed).await;
    eventually("everything told", async || gateway.status().pending == 0).await;
}

async fn admitted(gateway: &Fallback<RedisLimiter>, scopes: &Scopes, asked: usize) -> Vec<Acquire> {
    let mut grants = Vec::new();
    for _ in 0..asked {
        let call = call(scopes.clone());
        if granted(&gateway.acquire(&call).await.expect("decided, with or without the store")) {
            grants.push(call);
        }
    }
    grants
}

async fn remaining(server: &Server, scopes: &Scopes) -> u64 {
    server.limiter().await.peek(scopes).await.expect("peek")[0].remaining
}

async fn fault(limiter: &RedisLimiter) -> Option<(Fault, Trouble)> {
    match limiter.acquire(&call(still(5))).await {
        Err(error @ Error::Refused { fault, .. }) => Some((fault, error.trouble())),
        _ => None,
    }
}

async fn config(server: &Server, setting: &str, value: &str) {
    let mut raw = server.raw().await;
    ::redis::cmd("CONFIG").arg("SET").arg(setting).arg(value).exec_async(&mut raw).await.expect("config");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_of_the_server_has_its_name() {
    let server = Server::start().await;
    let limiter = server.limiter().await;
    config(&server, "maxmemory", "1").await;
    assert_eq!(fault(&limiter).await, Some((Fault::Full, Trouble::Away)));
    config(&server, "maxmemory", "0").await;
    config(&server, "min-replicas-to-write", "1").await;
    assert_eq!(fault(&limiter).await, Some((Fault::NoReplicas, Trouble::Away)));
    config(&server, "min-replicas-to-write", "0").await;
    let mut raw = server.raw().await;
    ::redis::cmd("REPLICAOF").arg("127.0.0.1").arg(1).exec_async(&mut raw).await.expect("replicaof");
    assert_eq!(fault(&limiter).await, Some((Fault::ReadOnly, Trouble::Away)));
    ::redis::cmd("REPLICAOF").arg("NO").arg("ONE").exec_async(&mut raw).await.expect("replicaof");
    eventually("a primary again", async || limiter.acquire(&call(still(50))).await.is_ok()).await;
    ::redis::cmd("ACL")
        .arg(&["SETUSER", "default", "-evalsha", "-eval"])
        .exec_async(&mut raw)
        .await
        .expect("acl");
    assert_eq!(fault(&limiter).await, Some((Fault::Denied, Trouble::Away)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_busy_with_a_script_is_busy() {
    let server = Server::start().await;
    let limiter = server.limiter().await;
    config(&server, "busy-reply-threshold", "20").await;
    let (mut stuck, mut raw) = (server.raw().await, server.raw().await);
    let endless = tokio::spawn(async move {
        let _ = ::redis::cmd("EVAL").arg("while true do end").arg(0).exec_async(&mut stuck).await;
    });
    eventually("busy", async || fault(&limiter).await == Some((Fault::Busy, Trouble::Away))).await;
    ::redis::cmd("SCRIPT").arg("KILL").exec_async(&mut raw).await.expect("kill");
    endless.await.expect("ended");
    assert!(limiter.acquire(&call(still(5))).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_loads_its_data_is_loading() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().to_str().expect("path");
    let mut server = Server::start_with(&["--dir", path]).await;
    let mut raw = server.raw().await;
    ::redis::cmd("DEBUG").arg("POPULATE").arg(20_000).exec_async(&mut raw).await.expect("populate");
    ::redis::cmd("SAVE").exec_async(&mut raw).await.expect("save");
    server.kill();
    let slowly =
        ["--dir", path, "--key-load-delay", "500", "--loading-process-events-interval-bytes", "1024"];
    server.restart_unready(&slowly);
    let options = RedisOptions { silence: Duration::from_secs(5), connections: 1, ..RedisOptions::default() };
    let limiter = RedisLimiter::open(&server.url, options).expect("open");
    eventually("loading", async || fault(&limiter).await == Some((Fault::Loading, Trouble::Away))).await;
    config(&server, "key-load-delay", "0").await;
    eventually("loaded", async || limiter.acquire(&call(still(500))).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_unreachable_and_a_mute_server_a_timeout() {
    let mut server = Server::start().await;
    server.kill();
    let limiter = RedisLimiter::open(&server.url, RedisOptions::default()).expect("open");
    eventually("unreachable", async || {
        matches!(limiter.acquire(&call(still(5))).await, Err(e @ Error::Unreachable(_)) if e.trouble() == Trouble::Away)
    })
    .await;
    let mute = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("redis://{}/", mute.local_addr().expect("address"));
    let accepting = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((socket, _)) = mute.accept().await {
            open.push(socket);
        }
    });
    let limiter = RedisLimiter::open(&url, RedisOptions::default()).expect("open");
    let error = limiter.acquire(&call(still(5))).await.expect_err("mute");
    assert_eq!(
        (error.clone(), error.trouble()),
        (Error::Timeout(RedisOptions::default().silence), Trouble::Unknown)
    );
    accepting.abort();
}

/// A stopped server keeps its data: usage before, during and after the outage must fit the limit once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_admits_what_was_left_and_its_end_no_second_burst() {
    let server = Server::start().await;
    let (a, b) = (gateway(&server, 2).await, gateway(&server, 2).await);
    let scopes = still(100);
    let before = admitted(&a, &scopes, 20).await.len() + admitted(&b, &scopes, 20).await.len();
    assert_eq!(admitted(&a, &scopes, 1).await.len(), 1, "both have seen how it stands");
    server.signal("STOP");
    opens(&a).await;
    opens(&b).await;
    let during = admitted(&a, &scopes, 100).await.len() + admitted(&b, &scopes, 100).await.len();
    assert!((55..=60).contains(&during), "{during} admitted where 59 were left");
    server.signal("CONT");
    returns(&a).await;
    returns(&b).await;
    let after = admitted(&a, &scopes, 100).await.len() + admitted(&b, &scopes, 100).await.len();
    assert!(before + 1 + during + after <= 101, "{before} + 1 + {during} + {after}");
    assert_eq!(remaining(&server, &scopes).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_granted_alone_settles_in_the_store() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(1000, 0, MINUTE))].into();
    server.signal("STOP");
    opens(&gateway).await;
    let (ended, open) = (tokens(scopes.clone(), 100), tokens(scopes.clone(), 200));
    for call in [&ended, &open] {
        let decision = gateway.acquire(call).await.expect("local");
        assert!(granted(&decision) && decision.degraded);
    }
    let end = |of: &Acquire, used| Settle {
        id: of.id,
        actual: Cost::of_request(used, 0, 0),
        scopes: of.scopes.clone(),
        slot: None,
        usage: None,
    };
    assert!(gateway.settle(&end(&ended, 70)).await.expect("settled").applied);
    server.signal("CONT");
    returns(&gateway).await;
    assert_eq!(remaining(&server, &scopes).await, 730, "70 used and 200 reserved");
    assert!(
        gateway.settle(&end(&open, 50)).await.expect("settled").applied,
        "the store knows the reservation"
    );
    assert_eq!(remaining(&server, &scopes).await, 880);
    assert!(
        !gateway.settle(&end(&ended, 70)).await.expect("settled").applied
            || remaining(&server, &scopes).await == 880
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settlement_during_an_outage_waits_for_its_end() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    let mut limits = limited("acme", Kind::Tokens, bucket(1000, 0, MINUTE));
    limits.concurrency = Some(1);
    let scopes: Scopes = [limits].into();
    let held = tokens(scopes.clone(), 400);
    assert!(granted(&gateway.acquire(&held).await.expect("granted")));
    server.signal("STOP");
    opens(&gateway).await;
    let refused = gateway.acquire(&tokens(scopes.clone(), 1)).await.expect("local");
    assert!(!granted(&refused), "the slot the store granted counts here too");
    let settle = Settle {
        id: held.id,
        actual: Cost::of_request(10, 0, 0),
        scopes: scopes.clone(),
        slot: None,
        usage: None,
    };
    gateway.settle(&settle).await.expect("waits");
    assert_eq!(gateway.status().pending, 1);
    assert!(granted(&gateway.acquire(&tokens(scopes.clone(), 1)).await.expect("local")));
    server.signal("CONT");
    returns(&gateway).await;
    let stands = server.limiter().await.peek(&scopes).await.expect("peek");
    assert_eq!(
        (stands[0].remaining, stands[1].remaining),
        (989, 0),
        "its slot and its charge are the store's now"
    );
    assert_eq!(gateway.status().lost, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_of_running_requests_outlive_an_outage() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    let mut limits = scope("acme");
    limits.concurrency = Some(1);
    let held = Acquire { lease_ttl: Duration::from_millis(300), ..call([limits]) };
    assert!(granted(&gateway.acquire(&held).await.expect("granted")));
    let mut raw = server.raw().await;
    config(&server, "min-replicas-to-write", "1").await;
    eventually("open", async || {
        let _ = gateway.acquire(&call(still(5))).await;
        gateway.status().phase == Phase::Open
    })
    .await;
    ::redis::cmd("DEL").arg(held.scopes[0].leases.as_str()).exec_async(&mut raw).await.ok();
    eventually("run out", async || {
        server.limiter().await.peek(&held.scopes).await.expect("peek")[0].remaining == 1
    })
    .await;
    config(&server, "min-replicas-to-write", "0").await;
    eventually("taken again", async || {
        server.limiter().await.peek(&held.scopes).await.expect("peek")[0].remaining == 0
    })
    .await;
}

/// Six of six in flight, four of them held by a gateway that asks nothing.
async fn full_house(server: &Server) -> (Arc<Fallback<RedisLimiter>>, Arc<Fallback<RedisLimiter>>, Scopes) {
    let (idle, busy) = (gateway(server, 2).await, gateway(server, 2).await);
    let mut limits = scope("acme");
    limits.concurrency = Some(6);
    let scopes: Scopes = [limits].into();
    assert_eq!(admitted(&idle, &scopes, 4).await.len(), 4);
    assert_eq!(admitted(&busy, &scopes, 5).await.len(), 2);
    (idle, busy, scopes)
}

async fn free_slots(server: &Server, scopes: &Scopes) -> u64 {
    server.limiter().await.peek(scopes).await.expect("peek")[0].remaining
}

/// The data loss is found although no process asks or renews.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_of_a_lost_data_set_are_counted_again() {
    let server = Server::start().await;
    let (idle, busy, scopes) = full_house(&server).await;
    ::redis::cmd("FLUSHALL").exec_async(&mut server.raw().await).await.expect("flushed");
    eventually("counted again", async || free_slots(&server, &scopes).await == 0).await;
    for gateway in [&idle, &busy] {
        returns(gateway).await;
        assert_eq!(gateway.status().opened, 1);
        assert_eq!(admitted(gateway, &scopes, 1).await.len(), 0, "six are in flight");
    }
}

/// A store that returns empty before three calls have failed shows no outage by its errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_back_empty_at_once_lets_nobody_in_beside_what_is_in_flight() {
    let mut server = Server::start().await;
    let (idle, busy, scopes) = full_house(&server).await;
    server.kill();
    server.restart().await;
    let mut more = 0;
    for _ in 0..2000 {
        more += admitted(&busy, &scopes, 1).await.len();
        let status = idle.status();
        if status.opened > 0 && status.phase == Phase::Closed && busy.status().phase == Phase::Closed {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((idle.status().opened, free_slots(&server, &scopes).await), (1, 0), "counted again");
    more += admitted(&busy, &scopes, 5).await.len() + admitted(&idle, &scopes, 5).await.len();
    assert_eq!(more, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_limit_does_what_it_says_for_an_outage() {
    let mut server = Server::start().await;
    let gateway = gateway(&server, 4).await;
    let of = |capacity, without_store| -> Scopes {
        let mut scopes = still(capacity);
        scopes[0].without_store = without_store;
        scopes
    };
    server.kill();
    opens(&gateway).await;
    assert_eq!(admitted(&gateway, &of(100, WithoutStore::LocalShare), 100).await.len(), 25);
    assert_eq!(admitted(&gateway, &of(10, WithoutStore::Open), 50).await.len(), 50);
    let closed = gateway.acquire(&call(of(10, WithoutStore::Closed))).await;
    assert!(matches!(closed, Err(Error::Unreachable(_) | Error::Refused { .. })), "{closed:?}");
    // A share smaller than one request still serves one, once nobody can be asking the store.
    let small: Scopes = [limited("small", Kind::Tokens, bucket(100, 0, MINUTE))].into();
    eventually("the whole limit allows it", async || {
        let decided = gateway.acquire(&tokens(small.clone(), 80)).await.expect("local");
        if let Outcome::Limited { wait } = decided.outcome {
            assert!(wait.is_some_and(|wait| wait <= Duration::from_secs(3)), "{wait:?}");
        }
        granted(&decided)
    })
    .await;
    let never = gateway.acquire(&tokens(small, 101)).await.expect("local");
    assert_eq!(never.outcome, Outcome::Limited { wait: None });
    server.restart().await;
    returns(&gateway).await;
    assert!(remaining(&server, &of(100, WithoutStore::LocalShare)).await <= 75, "told to the new data set");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn open_the_breaker_asks_nothing_of_the_store() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    server.signal("STOP");
    opens(&gateway).await;
    let local = gateway.status().local_decisions;
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(1_000_000, 0, MINUTE))].into();
    // A thousand deadlines would be fifty seconds.
    let all = tokio::time::timeout(Duration::from_secs(20), admitted(&gateway, &scopes, 1000)).await;
    assert_eq!(all.expect("no request pays the deadline").len(), 1000);
    assert_eq!(gateway.status().local_decisions - local, 1000);
    server.signal("CONT");
    returns(&gateway).await;
    assert_eq!(remaining(&server, &scopes).await, 1_000_000 - 1000);
    assert_eq!(gateway.status().opened, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_broken_record_is_no_outage() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    let mut raw = server.raw().await;
    let record = Key::tenant("acme");
    ::redis::cmd("SET").arg(record.as_str()).arg("not ours").exec_async(&mut raw).await.expect("set");
    let local = admitted(&gateway, &still(5), 20).await;
    assert_eq!(local.len(), 5, "decided here");
    let other: Scopes = [limited("other", Kind::Requests, bucket(5, 0, MINUTE))].into();
    assert!(!gateway.acquire(&call(other)).await.expect("store").degraded);
    assert_eq!((gateway.status().phase, gateway.status().opened), (Phase::Closed, 0));
}

/// Usage that was decided, settled or both during the outage is in the usage record afterwards, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn usage_of_an_outage_is_told_once() {
    let server = Server::start().await;
    let gateway = gateway(&server, 1).await;
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(1000, 0, MINUTE))].into();
    let record = Key::usage("acme", "2026-11-23");
    let end = |of: &Acquire, tokens: i64| Settle {
        id: of.id,
        actual: Cost::of_request(tokens as u64, 0, 0),
        scopes: of.scopes.clone(),
        slot: None,
        usage: Some(Usage {
            record: record.clone(),
            model: "m".into(),
            tally: Tally { requests: 1, input_tokens: tokens, ..Tally::default() },
        }),
    };
    let held = tokens(scopes.clone(), 1);
    assert!(granted(&gateway.acquire(&held).await.expect("granted")));
    server.signal("STOP");
    opens(&gateway).await;
    let alone: Vec<Acquire> = (0..20).map(|_| tokens(scopes.clone(), 1)).collect();
    for call in &alone {
        assert!(gateway.acquire(call).await.expect("local").degraded);
    }
    for call in &alone[..15] {
        gateway.settle(&end(call, 2)).await.expect("settled");
    }
    gateway.settle(&end(&held, 100)).await.expect("waits");
    assert_eq!(gateway.status().pending, 2, "one settlement, and one line for all that ended here");
    server.signal("CONT");
    returns(&gateway).await;
    for call in &alone[15..] {
        gateway.settle(&end(call, 2)).await.expect("settled");
    }
    let expected = Tally { requests: 21, input_tokens: 140, ..Tally::default() };
    eventually("told", async || {
        gateway
            .usage(std::slice::from_ref(&record))
            .await
            .is_ok_and(|read| read[0] == [("m".to_owned(), expected)])
    })
    .await;
    assert_eq!((gateway.status().pending, gateway.status().lost), (0, 0));
}

/// A slot of a probe, which no settlement ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_without_a_request_is_a_share_in_an_outage_and_leaves_nothing_behind() {
    let server = Server::start().await;
    let gateway = gateway(&server, 2).await;
    let place = [Candidate { leases: Key::backend_slots("b"), max_concurrency: 4, bound: None }];
    let ids: Vec<ReservationId> = (0..4).map(|_| ReservationId::now_v7()).collect();
    let take = async |id: ReservationId| {
        let ttl = Duration::from_secs(15);
        gateway.move_slot(id, None, &place, ttl).await.expect("decided, with or without the store").is_some()
    };
    assert!(take(ids[0]).await, "of the store");
    let mut raw = server.raw().await;
    config(&server, "min-replicas-to-write", "1").await;
    eventually("open", async || {
        let _ = gateway.acquire(&call(still(5))).await;
        gateway.status().phase == Phase::Open
    })
    .await;
    assert!(take(ids[1]).await && !take(ids[2]).await, "half of four, one of them held before");
    gateway.release(ids[1], &[place[0].leases.clone()]).await.expect("noted");
    assert!(take(ids[2]).await, "given back");
    gateway.release(ids[0], &[place[0].leases.clone()]).await.expect("noted");
    assert!(take(ids[3]).await, "given back, though the store had granted it");
    gateway.release(ids[3], &[place[0].leases.clone()]).await.expect("noted");
    config(&server, "min-replicas-to-write", "0").await;
    returns(&gateway).await;
    eventually("only what is held is left", async || {
        let key = place[0].leases.as_str();
        let found = ::redis::cmd("ZRANGE").arg(key).arg(0).arg(-1).query_async(&mut raw.clone()).await;
        let found: Vec<String> = found.expect("a set");
        found == [ids[2].simple().to_string()]
    })
    .await;
    gateway.release(ids[2], &[place[0].leases.clone()]).await.expect("freed");
    let left: u64 =
        ::redis::cmd("ZCARD").arg(place[0].leases.as_str()).query_async(&mut raw).await.expect("a set");
    assert_eq!(left, 0);
}
