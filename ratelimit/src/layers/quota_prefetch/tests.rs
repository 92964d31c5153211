use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::*;
use crate::model::cost::Cost;
use crate::model::key::{Scope, scope_keys};
use crate::model::kind::Bucket;
use crate::model::limits::{Verdict, WithoutStore};
use crate::store::any::AnyLimiter;
use crate::store::memory::MemoryLimiter;

/// A limit of so many requests and tokens, a part of both set aside.
fn scope(of: Scope<'_>, requests: u64, tokens: u64, rate: u64, aside: u64) -> ScopeLimits {
    let (record, leases) = scope_keys(of);
    let mut limits = ScopeLimits {
        record,
        leases,
        buckets: [None; Kind::COUNT],
        concurrency: None,
        mode: Mode::Enforce,
        without_store: WithoutStore::LocalShare,
        prefetch: [0; Kind::COUNT],
    };
    for (kind, capacity) in [(Kind::Requests, requests), (Kind::Tokens, tokens)] {
        let set_aside = capacity * aside / 100;
        limits.prefetch[kind as usize] = set_aside;
        let period = Duration::from_secs(60);
        limits.buckets[kind as usize] = Some(Bucket { capacity: capacity - set_aside, rate, period });
    }
    limits
}

fn call(scopes: &Scopes, tokens: u64) -> Acquire {
    Acquire {
        id: ReservationId::now_v7(),
        cost: Cost::of_request(tokens, 0, 0),
        estimated: false,
        scopes: scopes.clone(),
        candidates: Vec::new(),
        lease_ttl: Duration::from_secs(15),
    }
}

fn end(call: &Acquire, tokens: u64) -> Settle {
    let actual = Cost::of_request(tokens, 0, 0);
    Settle { id: call.id, actual, scopes: call.scopes.clone(), slot: None, usage: None }
}

fn processes(store: &AnyLimiter, how_many: usize) -> Vec<QuotaPrefetch<AnyLimiter>> {
    (0..how_many).map(|_| QuotaPrefetch::new(store.clone())).collect()
}

fn granted(decision: &Decision) -> bool {
    matches!(decision.outcome, Outcome::Granted { .. })
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

#[tokio::test(start_paused = true)]
async fn a_hot_limit_is_decided_here_and_settled_in_the_store() {
    let store = AnyLimiter::from(MemoryLimiter::new());
    let hot = QuotaPrefetch::new(store.clone());
    let scopes: Scopes = [scope(Scope::Global, 100_000, 10_000_000, 0, 20)].into_iter().collect();
    let mut used = 0;
    for n in 0..2_000u64 {
        let call = call(&scopes, 10);
        let decision = hot.acquire(&call).await.expect("decided");
        assert!(granted(&decision));
        assert_eq!(decision.limits.len(), 2);
        let of =
            decision.limits.iter().find(|l| l.what == crate::model::limits::What::Bucket(Kind::Requests));
        assert!(of.is_some_and(|l| l.verdict == Verdict::Fits && l.limit == 80_000 && l.remaining > 70_000));
        let actual = 5 + n % 9;
        assert!(hot.settle(&end(&call, actual)).await.expect("settled").applied);
        assert!(!hot.settle(&end(&call, actual)).await.expect("settled").applied, "once");
        used += actual;
        pass(Duration::from_millis(1)).await;
    }
    assert!(hot.status().decided > 1_800, "{:?}", hot.status());
    pass(VALID + REPORT_EVERY * 2).await;
    assert_eq!(hot.status().held, [0; Kind::COUNT], "what is not used is given back");
    let stands: Vec<u64> = store.peek(&scopes).await.expect("peek").iter().map(|l| l.remaining).collect();
    assert_eq!(stands, [80_000 - 2_000, 8_000_000 - used]);
}

#[tokio::test(start_paused = true)]
async fn the_other_limits_of_a_request_are_asked_about() {
    let store = AnyLimiter::from(MemoryLimiter::new());
    let hot = QuotaPrefetch::new(store.clone());
    let mut tenant = scope(Scope::Tenant("acme"), 300, 100_000, 0, 0);
    tenant.concurrency = Some(2);
    let scopes: Scopes = [scope(Scope::Model("m"), 100_000, 10_000_000, 0, 20), tenant].into_iter().collect();
    let mut admitted = 0;
    for _ in 0..400 {
        let call = call(&scopes, 10);
        let decision = hot.acquire(&call).await.expect("decided");
        assert_eq!(
            decision.limits.iter().map(|l| l.position_in(&call.scopes)).collect::<Vec<_>>(),
            [0, 0, 1, 1, 1].map(Some)
        );
        if granted(&decision) {
            admitted += 1;
            assert!(granted(&hot.acquire(&call).await.expect("decided")), "the same id, the same answer");
            assert!(hot.settle(&end(&call, 10)).await.expect("settled").applied);
        }
        pass(Duration::from_millis(1)).await;
    }
    assert!(hot.status().decided > 100);
    assert_eq!(admitted, 300);
    pass(VALID + REPORT_EVERY * 2).await;
    let stands: Vec<u64> = store.peek(&scopes).await.expect("peek").iter().map(|l| l.remaining).collect();
    assert_eq!(stands, [80_000 - 300, 8_000_000 - 3_000, 0, 97_000, 2], "refused ones gave theirs back");
}

/// Quota loses nothing: in the end exactly the part that is not set aside is admitted.
#[tokio::test(start_paused = true)]
async fn exactly_the_limit_over_several_processes() {
    let store = AnyLimiter::from(MemoryLimiter::new());
    let processes = processes(&store, 3);
    let scopes: Scopes = [scope(Scope::Global, 2_000, 1_000_000, 0, 20)].into_iter().collect();
    let mut admitted = 0;
    for n in 0..6_000usize {
        let decision = processes[n % 3].acquire(&call(&scopes, 10)).await.expect("decided");
        admitted += usize::from(granted(&decision));
        pass(Duration::from_millis(1)).await;
    }
    let here: u64 = processes.iter().map(|process| process.status().decided).sum();
    assert!(here > 200, "{here}");
    assert_eq!(admitted, 1_600);
}

/// The quota of a process that was killed stays charged.
#[tokio::test(start_paused = true)]
async fn a_killed_process_admits_nothing_twice() {
    let store = AnyLimiter::from(MemoryLimiter::new());
    let scopes: Scopes = [scope(Scope::Global, 2_000, 1_000_000, 0, 20)].into_iter().collect();
    let (mut admitted, mut lost) = (0, 0);
    for _ in 0..10 {
        let doomed = QuotaPrefetch::new(store.clone());
        for _ in 0..100 {
            admitted += u64::from(granted(&doomed.acquire(&call(&scopes, 10)).await.expect("decided")));
            pass(Duration::from_millis(1)).await;
        }
        lost += doomed.status().held[Kind::Requests as usize];
    }
    let left = store.peek(&scopes).await.expect("peek")[0].remaining;
    assert!(lost > 0);
    assert_eq!(admitted + lost + left, 1_600);
}

/// Over all windows: usage between two times never exceeds the capacity, set-aside part included, and what drains.
#[test]
fn the_envelope_holds_by_the_time_of_use() {
    let steps = prop::collection::vec((0usize..3, 1u64..40, 0u64..30_000, 1u64..30), 50..400);
    let limit = (100u64..3_000, 0u64..200_000, 5u64..50);
    let config = Config { cases: 60, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&(limit, steps), |((capacity, rate, aside), steps)| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .expect("runtime");
        runtime.block_on(async move {
            let store = AnyLimiter::from(MemoryLimiter::new());
            let processes = processes(&store, 3);
            let scopes: Scopes =
                [scope(Scope::Global, capacity, capacity * 10, rate, aside)].into_iter().collect();
            let since = Instant::now();
            let mut levels: BTreeMap<Kind, (i128, i128)> = BTreeMap::new();
            for (process, requests, us, tokens) in steps {
                pass(Duration::from_micros(us)).await;
                for _ in 0..requests {
                    let call = call(&scopes, tokens);
                    if !granted(&processes[process].acquire(&call).await.expect("decided")) {
                        continue;
                    }
                    let now = since.elapsed().as_micros() as i128;
                    for (kind, capacity, cost) in
                        [(Kind::Requests, capacity, 1), (Kind::Tokens, capacity * 10, tokens)]
                    {
                        let minute = 60_000_000i128;
                        let (level, at) = levels.entry(kind).or_insert((0, now));
                        *level = (*level - (now - *at) * i128::from(rate)).max(0) + i128::from(cost) * minute;
                        *at = now;
                        prop_assert!(*level <= i128::from(capacity) * minute, "{kind:?} at {now}");
                    }
                }
            }
            Ok::<(), TestCaseError>(())
        })
    });
    outcome.unwrap_or_else(|failure| panic!("{failure}"));
}
