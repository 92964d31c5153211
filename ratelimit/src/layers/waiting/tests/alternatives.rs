//! Waiting for one of several limits that can stand in for each other.

use super::*;

/// Calls under either of two limits, as under two accounts: each run is asked where nobody else waits for it.
async fn ask_either(process: &Process, full: &Acquire, policy: &QueuePolicy) -> Waited<usize> {
    let ask = |queue: Option<&QueueId>| {
        let queue = queue.cloned();
        async move {
            let mut soonest: Option<(usize, Decision)> = None;
            for run in 0..2 {
                if process.waiting.is_awaited(&full.scopes[run..=run], queue.as_ref()) {
                    continue;
                }
                let call = Acquire { id: Uuid::now_v7(), ..call(&full.scopes[run..=run], 1, vec![]) };
                let decision = process.limiter.acquire(&call).await?;
                let wait = |of: &Decision| match of.outcome {
                    Outcome::Limited { wait } => wait,
                    _ => None,
                };
                if matches!(decision.outcome, Outcome::Granted { .. }) {
                    return Ok::<_, Error>((decision, run));
                }
                if soonest.as_ref().is_none_or(|(_, before)| wait(&decision) < wait(before)) {
                    soonest = Some((run, decision));
                }
            }
            let (run, decision) = soonest.expect("somebody is asked");
            Ok((decision, run))
        }
    };
    process.waiting.acquire(full, policy, ask).await.expect("memory always answers")
}

fn of_account(name: &str, rate: u64) -> ScopeLimits {
    let (record, leases) = scope_keys(Scope::Account(name));
    ScopeLimits { record, leases, ..per_second(1, rate) }
}

#[tokio::test(start_paused = true)]
async fn of_alternatives_the_soonest_is_waited_for_and_nobody_passes_those_who_wait() {
    let process = process();
    let full = call(&[of_account("x", 1), of_account("y", 2)], 1, vec![]);
    let policy = || QueuePolicy { alternatives: smallvec::smallvec![0..1, 1..2], ..policy("a", 30 * SECOND) };
    for _ in 0..2 {
        assert!(ask_either(&process, &full, &policy()).await.ahead.is_none(), "there is room for two");
    }
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for i in 0..6 {
        let (process, full, policy) = (process.clone(), full.clone(), policy());
        tasks.spawn(async move {
            let waited = ask_either(&process, &full, &policy).await;
            assert_eq!(waited.gave_up, None, "{i}");
            process.order.lock().unwrap().push(i.to_string());
        });
    }
    tasks.join_all().await;
    // Three a second together, and no more.
    let took = began.elapsed();
    assert!((1900..=3100).contains(&took.as_millis()), "{took:?}");
    assert!(process.waiting.is_empty());
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_one_alternative_is_woken_by_another() {
    let process = process();
    let held = |name| {
        let (record, leases) = scope_keys(Scope::Account(name));
        ScopeLimits { record, leases, ..scope(Some(1)) }
    };
    let owners = [call(&[held("x")], 1, vec![]), call(&[held("y")], 1, vec![])];
    for owner in &owners {
        process.ask(owner, &policy("a", SECOND)).await;
    }
    let full = call(&[held("x"), held("y")], 1, vec![]);
    let policy = QueuePolicy { alternatives: smallvec::smallvec![0..1, 1..2], ..policy("a", 30 * SECOND) };
    let waiting = tokio::spawn({
        let process = process.clone();
        async move { ask_either(&process, &full, &policy).await.with }
    });
    process.waiters(1).await;
    let began = Instant::now();
    process.settle(&owners[1]).await;
    assert_eq!(waiting.await.expect("no panic"), Some(1));
    assert_eq!(began.elapsed(), Duration::ZERO, "woken, not found by looking");
}
