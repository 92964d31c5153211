//! What only a store across a network can do wrong.

use std::time::Duration;

use smallvec::smallvec;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::*;

use crate::harness::*;

fn still(capacity: u64) -> Scopes {
    [limited("acme", Kind::Requests, bucket(capacity, 0, Duration::from_secs(60)))].into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forgotten_scripts_are_sent_again() {
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    for left in (0..5).rev() {
        ::redis::cmd("SCRIPT").arg("FLUSH").exec_async(&mut raw).await.expect("flush");
        let decision = world.acquire(&call(still(5))).await;
        assert_eq!(decision.limits[0].remaining, left);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_is_survived_and_its_errors_are_told() {
    let mut server = Server::start().await;
    let limiter = RedisLimiter::connect(
        &server.url,
        RedisOptions { silence: Duration::from_millis(500), connections: 2, ..RedisOptions::default() },
    )
    .await
    .expect("connect");
    limiter.acquire(&call(still(5))).await.expect("acquire");
    server.kill();
    for _ in 0..5 {
        let error = limiter.acquire(&call(still(5))).await.expect_err("no server");
        assert!(matches!(error, Error::Unreachable(_) | Error::Timeout(_) | Error::Lost), "{error:?}");
    }
    server.restart().await;
    // Every connection must come back, so several calls in a row.
    let mut in_a_row = 0;
    while in_a_row < 4 {
        match limiter.acquire(&call(still(500))).await {
            Ok(_) => in_a_row += 1,
            Err(_) => {
                in_a_row = 0;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_of_the_server_are_not_limits() {
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    let record = Key::tenant("acme");
    ::redis::cmd("LPUSH").arg(record.as_str()).arg("x").exec_async(&mut raw).await.expect("lpush");
    let wrong = world.limiter.acquire(&call(still(1))).await.expect_err("wrong type");
    assert!(
        matches!(&wrong, Error::Refused { fault: Fault::Record, detail } if detail.starts_with("WRONGTYPE")),
        "{wrong:?}"
    );
    ::redis::cmd("SET").arg(record.as_str()).arg("other").exec_async(&mut raw).await.expect("set");
    let version = world.limiter.acquire(&call(still(1))).await.expect_err("other version");
    assert!(
        matches!(&version, Error::Refused { fault: Fault::Record, detail } if detail.starts_with("WRONGTYPE")),
        "{version:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_store_still_settles() {
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    let mut scopes = still(2);
    scopes[0].concurrency = Some(2);
    let held = call(scopes.clone());
    assert!(granted(&world.acquire(&held).await));
    ::redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg("1").exec_async(&mut raw).await.expect("config");
    let full = world.limiter.acquire(&call(scopes.clone())).await.expect_err("full");
    assert!(
        matches!(&full, Error::Refused { fault: Fault::Full, detail } if detail.starts_with("OOM")),
        "{full:?}"
    );
    let renewal = Renewal { id: held.id, leases: smallvec![scopes[0].leases.clone()] };
    assert!(world.limiter.renew(&[renewal], LEASE).await.expect("renew").is_empty());
    assert!(world.settle(&held, Cost::default(), None).await.applied);
    assert_eq!(world.peek(&scopes).await[0].remaining, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_a_timeout() {
    let world = World::redis().await;
    let options = RedisOptions { silence: Duration::from_millis(50), ..RedisOptions::default() };
    let limiter = RedisLimiter::connect(&world.server().url, options).await.expect("connect");
    let mut raw = world.server().raw().await;
    ::redis::cmd("CLIENT").arg("PAUSE").arg(400).exec_async(&mut raw).await.expect("pause");
    let late = call(still(5));
    assert!(matches!(limiter.acquire(&late).await, Err(Error::Timeout(_))));
    // The outcome was unknown; the retry with the same id pays once, whichever it was.
    let decision = world.acquire(&late).await;
    assert!(granted(&decision));
    assert_eq!(world.peek(&late.scopes).await[0].remaining, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn passwords_are_never_shown() {
    let bad =
        RedisLimiter::connect("redis://:hunter2@[/", RedisOptions::default()).await.expect_err("no address");
    assert!(!format!("{bad:?} {bad}").contains("hunter2"));
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    ::redis::cmd("CONFIG")
        .arg("SET")
        .arg("requirepass")
        .arg("other")
        .exec_async(&mut raw)
        .await
        .expect("config");
    let url = world.server().url.replace("redis://", "redis://:hunter2@");
    let limiter = RedisLimiter::open(&url, RedisOptions::default()).expect("open");
    let error = loop {
        match limiter.acquire(&call(still(1))).await.expect_err("wrong password") {
            Error::Timeout(_) => {}
            error => break error,
        }
    };
    assert!(matches!(error, Error::Refused { fault: Fault::Denied, .. }), "{error:?}");
    assert!(!format!("{error:?} {error} {limiter:?}").contains("hunter2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_stays_behind() {
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    let mut limits = limited("acme", Kind::Tokens, bucket(100, 100, Duration::from_secs(1)));
    limits.concurrency = Some(3);
    let held = Acquire { candidates: vec![candidate("a", 3)], ..tokens([limits], 10) };
    assert!(granted(&world.acquire(&held).await));
    let keys: Vec<String> = ::redis::cmd("KEYS").arg("*").query_async(&mut raw).await.expect("keys");
    let mark = Key::birth();
    assert_eq!(keys.len(), 5, "the mark of the data set stays");
    for key in keys.iter().filter(|key| *key != mark.as_str()) {
        let life: i64 = ::redis::cmd("PTTL").arg(key).query_async(&mut raw).await.expect("pttl");
        assert!(life > 0, "{key} would live for ever");
    }
}

/// The script's arithmetic gives the same bits as ours, also where products are rounded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lua_and_rust_give_the_same_bits() {
    const TAIL: &str = "
        local out = {}
        for i = 1, #ARGV, 4 do
          local elapsed, need, num, den = tonumber(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
          out[#out + 1] = fmt('%.17g', drained(elapsed, num, den))
          out[#out + 1] = fmt('%.17g', time_to_drain(need, num, den) or -1)
        end
        return out";
    let world = World::redis().await;
    let script = include_str!("../../src/store/redis/scripts/leaky_bucket.lua");
    // Up to 53 bits, of every magnitude.
    let number = |seed: u128, shift: u32| (seed as u64 & ((1 << 53) - 1)) >> (shift % 53);
    let mut command = ::redis::cmd("EVAL");
    command.arg(format!("{script}{TAIL}")).arg(0);
    let mut expected = Vec::new();
    for _ in 0..2_000 {
        let (a, b) = (uuid::Uuid::new_v4().as_u128(), uuid::Uuid::new_v4().as_u128());
        let elapsed = number(a, (b >> 64) as u32 & 63);
        let need = number(a >> 64, (b >> 72) as u32 & 63);
        let bucket = Bucket {
            capacity: 1,
            rate: number(b, (b >> 80) as u32 & 63).min(Bucket::MAX_UNITS),
            period: Duration::from_micros((number(a >> 32, (b >> 88) as u32 & 63) >> 8).max(1_000)),
        };
        let terms = leaky_bucket::Terms::of(Kind::Tokens, &bucket);
        command.arg(elapsed).arg(need).arg(terms.num as u64).arg(terms.den as u64);
        expected.push(terms.drained(elapsed as f64));
        expected.push(terms.time_to_drain(need as f64).unwrap_or(-1.0));
    }
    let got: Vec<String> = command.query_async(&mut world.server().raw().await).await.expect("eval");
    let got: Vec<f64> = got.iter().map(|text| text.parse().expect("a number")).collect();
    assert_eq!(got, expected);
}

/// Records of an earlier version are read, and written in the present form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_and_reservations_of_version_one_are_read() {
    let world = World::redis().await;
    let mut raw = world.server().raw().await;
    let mut scopes: Scopes =
        [limited("acme", Kind::Tokens, bucket(100, 0, Duration::from_secs(3600)))].into();
    scopes[0].concurrency = Some(2);
    let old = tokens(scopes.clone(), 40);
    let write = "
        local now = redis.call('TIME')
        now = now[1] * 1000000 + now[2]
        redis.call('SET', KEYS[1], struct.pack('<Bdddddddddd', 1, 0, 0, 70000000, now, 0, 0, 0, 0, 0, 0), 'PX', 60000)
        redis.call('ZADD', KEYS[3], string.format('%.0f', now + 30000000), ARGV[1])
        local held = { 1, 0, '', { KEYS[1], 0, 40000000, 0, 0, 0 } }
        redis.call('SET', KEYS[2], cmsgpack.pack(held), 'PX', 60000)";
    let reservation = Key::reservation_of(&scopes, old.id);
    let mut command = ::redis::cmd("EVAL");
    command.arg(write).arg(3).arg(scopes[0].record.as_str()).arg(reservation.as_str());
    command.arg(scopes[0].leases.as_str()).arg(old.id.simple().to_string());
    command.exec_async(&mut raw).await.expect("written");
    let stand = async |what: &str, expected: [u64; 2]| {
        let left: Vec<u64> = world.peek(&scopes).await.iter().map(|limit| limit.remaining).collect();
        assert_eq!(left, expected, "{what}");
    };
    stand("as it was", [30, 1]).await;
    assert!(granted(&world.acquire(&old).await), "granted before");
    stand("and pays nothing", [30, 1]).await;
    let new = tokens(scopes.clone(), 5);
    assert!(granted(&world.acquire(&new).await));
    stand("a new one beside it", [25, 0]).await;
    assert!(world.settle(&old, Cost::of_request(10, 0, 0), None).await.applied);
    stand("what it did not use is back", [55, 1]).await;
    assert!(!world.settle(&old, Cost::of_request(10, 0, 0), None).await.applied);
    assert!(world.settle(&new, Cost::default(), None).await.applied);
    stand("and of the new one", [60, 2]).await;
}

/// Concurrent calls under the same limits are coalesced. Each gets the answer of a single call, in order.
#[tokio::test]
async fn coalesced_calls_are_decided_one_after_the_other() {
    let world = World::redis().await;
    let options =
        RedisOptions { silence: Duration::from_secs(10), connections: 1, ..RedisOptions::default() };
    let merging = RedisLimiter::connect(&world.server().url, options).await.expect("connect");
    let memory = World::memory();
    let mut tenant = limited("acme", Kind::Tokens, bucket(2_000, 0, Duration::from_secs(60)));
    tenant.concurrency = Some(90);
    let mut everything = limited("zenith", Kind::Requests, bucket(120, 0, Duration::from_secs(60)));
    everything.buckets[Kind::Spend as usize] = bucket(1_000_000, 0, Duration::from_secs(60));
    let scopes: Scopes = [tenant, everything].into();
    let calls: Vec<Acquire> = (0..200u64)
        .map(|n| Acquire {
            cost: Cost::of_request(n % 37, n % 11, n * 97 % 12_000),
            candidates: vec![candidate("a", 30), candidate(if n % 3 == 0 { "b" } else { "c" }, 25)],
            ..call(scopes.clone())
        })
        .collect();
    // A reply in no hurry: all that can be merged is.
    let mut raw = world.server().raw().await;
    ::redis::cmd("CLIENT").arg("PAUSE").arg(100).exec_async(&mut raw).await.expect("pause");
    let merged = futures_util::future::join_all(calls.iter().map(|call| merging.acquire(call))).await;
    assert!(merging.coalesced_calls() > 100, "{}", merging.coalesced_calls());
    let outcome = |decision: &Decision| match decision.outcome {
        Outcome::NoSlot { .. } => Outcome::NoSlot { wait: Duration::ZERO },
        Outcome::Limited { wait } => Outcome::Limited { wait: wait.map(|_| Duration::ZERO) },
        granted @ Outcome::Granted { .. } => granted,
    };
    let told = |limits: &[LimitState]| -> Vec<_> {
        limits.iter().map(|l| (l.what, l.remaining, std::mem::discriminant(&l.verdict))).collect()
    };
    let mut open = Vec::new();
    for (call, merged) in calls.iter().zip(merged) {
        let (alone, merged) = (memory.acquire(call).await, merged.expect("decided"));
        assert_eq!(
            (outcome(&alone), told(&alone.limits)),
            (outcome(&merged), told(&merged.limits)),
            "{call:?}"
        );
        if let Outcome::Granted { slot: Some(slot) } = merged.outcome {
            open.push((call, Some(call.candidates[slot].leases.clone())));
        }
    }
    assert!(open.len() > 40 && open.len() < 120, "{}", open.len());
    let ends: Vec<Settle> = open
        .iter()
        .enumerate()
        .map(|(n, (call, slot))| Settle {
            id: call.id,
            actual: Cost::of_request(n as u64 % 50, 3, n as u64),
            scopes: scopes.clone(),
            slot: slot.clone(),
            usage: None,
        })
        .collect();
    let before = merging.coalesced_calls();
    let settled = futures_util::future::join_all(ends.iter().map(|end| merging.settle(end))).await;
    assert!(merging.coalesced_calls() > before);
    for (end, settled) in ends.iter().zip(settled) {
        assert!(memory.limiter.settle(end).await.expect("settled").applied);
        assert!(settled.expect("settled").applied);
    }
    assert_eq!(told(&world.peek(&scopes).await), told(&memory.peek(&scopes).await));
    let again = merging.acquire(&call(scopes.clone())).await.expect("decided");
    assert!(granted(&again));
}
