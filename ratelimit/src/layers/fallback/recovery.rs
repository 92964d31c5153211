//! The background task: probes the store during an outage, and reports decisions when it is back.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::task::JoinSet;

use super::breaker::Phase;
use super::inner::{Inner, lock, waits};
use super::local::{Grant, Pending, leases_of};
use crate::model::call::{Acquire, Candidate, Settle};
use crate::model::cost::Cost;
use crate::model::data_set::DataSetsLost;
use crate::model::error::{Error, Trouble};
use crate::model::id::ReservationId;
use crate::model::key::{Key, Scope, scope_keys};
use crate::model::kind::Kind;
use crate::model::limiter::Limiter;
use crate::model::limits::{Mode, ScopeLimits};

/// Concurrent calls while local decisions are reported.
const AT_ONCE: usize = 64;
/// The pause before the store is probed after a failure, while the breaker is closed.
const DOUBT: Duration = Duration::from_millis(50);
/// A store that was not called for this time is probed.
const UNASKED: Duration = Duration::from_secs(1);
/// The pause before single local decisions are reported while the store serves.
const SETTLE_DOWN: Duration = Duration::from_millis(200);

/// Runs until aborted.
pub(super) async fn run<L: Limiter + 'static>(inner: Arc<Inner<L>>) {
    let inner = &inner;
    let mut leases_retaken = true;
    loop {
        if inner.hear_of_loss() {
            leases_retaken = false;
        }
        let (phase, due) = {
            let breaker = lock(&inner.breaker);
            (breaker.phase(), breaker.due())
        };
        match phase {
            Phase::Closed => {
                leases_retaken = true;
                if inner.suspicious.load(Ordering::Relaxed) {
                    tokio::time::sleep(DOUBT).await;
                    doubt(inner).await;
                } else if inner.engaged.load(Ordering::Relaxed) {
                    tokio::time::sleep(SETTLE_DOWN).await;
                    if inner.is(Phase::Closed) && report(inner).await.is_ok() {
                        reset_if_clear(inner);
                    }
                } else {
                    let mut lost = inner.data_sets_lost.clone();
                    tokio::select! {
                        () = inner.wake.notified() => {}
                        () = another_lost(&mut lost, inner.heard_of.load(Ordering::Relaxed)) => {}
                        () = unasked(inner) => nudge(inner).await,
                    }
                }
            }
            Phase::Joining => {
                tokio::time::sleep(SETTLE_DOWN.min(due.saturating_sub(inner.now()))).await;
                // A gateway without calls and reports must find out too that the store is away again.
                doubt(inner).await;
                match report(inner).await {
                    Err(error) => away_again(inner, &error),
                    Ok(()) if inner.now() >= lock(&inner.breaker).due() => close(inner).await,
                    Ok(()) => {}
                }
            }
            Phase::Open => {
                leases_retaken = false;
                tokio::time::sleep(due.saturating_sub(inner.now())).await;
                let good = probe(inner).await.is_ok();
                step(inner, good);
            }
            Phase::Returning => {
                let mut reported = Ok(());
                if !leases_retaken {
                    reported = retake_leases(inner).await;
                    leases_retaken = reported.is_ok();
                }
                if reported.is_ok() {
                    reported = report(inner).await;
                }
                match reported {
                    Err(error) => away_again(inner, &error),
                    Ok(()) if inner.now() >= due => join(inner),
                    Ok(()) => tokio::time::sleep(SETTLE_DOWN.min(due.saturating_sub(inner.now()))).await,
                }
            }
        }
    }
}

/// Returns if the store was not called for a while. A gateway without traffic must detect an outage too; otherwise it
/// would be the first to ask a store to which the others have not yet reported their admissions.
async fn unasked<L: Limiter>(inner: &Inner<L>) {
    loop {
        let calls = inner.calls.load(Ordering::Relaxed);
        tokio::time::sleep(UNASKED).await;
        if calls == inner.calls.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// Returns when the store has lost more data sets than `heard_of`; never for a store that cannot tell.
async fn another_lost(lost: &mut Option<DataSetsLost>, heard_of: u64) {
    let more = match lost {
        Some(lost) => lost.wait_for(|lost| *lost != heard_of).await.is_ok(),
        None => false,
    };
    if !more {
        std::future::pending::<()>().await;
    }
}

fn step<L: Limiter>(inner: &Inner<L>, good: bool) {
    let jitter = f64::from(ReservationId::new_v4().as_u128() as u8) / 255.0;
    let mut breaker = lock(&inner.breaker);
    breaker.probed(inner.now(), good, jitter);
    inner.publish(breaker.phase());
}

fn away_again<L: Limiter>(inner: &Inner<L>, error: &Error) {
    tracing::warn!(%error, "store outage continues: the limit store failed again");
    step(inner, false);
}

/// Lets requests use the store within the local share.
fn join<L: Limiter>(inner: &Inner<L>) {
    let mut breaker = lock(&inner.breaker);
    // In another phase the store has lost its data meanwhile.
    if breaker.phase() == Phase::Returning {
        breaker.join(inner.now());
        inner.suspicious.store(false, Ordering::Relaxed);
        inner.publish(breaker.phase());
    }
}

/// Lets requests use the store without the local share, and reports the remaining decisions at once.
async fn close<L: Limiter + 'static>(inner: &Arc<Inner<L>>) {
    {
        let mut breaker = lock(&inner.breaker);
        if breaker.phase() != Phase::Joining {
            // The store failed again, or has lost its data.
            return;
        }
        breaker.close(inner.now());
        inner.publish(breaker.phase());
    }
    tracing::info!("store outage ended; all local decisions are reported");
    if report(inner).await.is_ok() {
        reset_if_clear(inner);
    }
}

fn reset_if_clear<L: Limiter>(inner: &Inner<L>) {
    let mut local = lock(&inner.local);
    if local.is_clear() && inner.is(Phase::Closed) {
        local.reset();
        inner.engaged.store(false, Ordering::Relaxed);
    }
}

/// Probes the store after a single failure, because with little traffic no other call would detect an outage.
async fn doubt<L: Limiter>(inner: &Inner<L>) {
    match probe(inner).await {
        Ok(()) => inner.answered(),
        Err(error) => inner.failed(&error, None),
    }
}

/// Makes a call that writes, changes nothing and leaves nothing behind: there may be a thousand gateways without
/// traffic.
async fn nudge<L: Limiter>(inner: &Inner<L>) {
    let (_, leases) = scope_keys(Scope::Global);
    match inner.store.release(ReservationId::now_v7(), &[leases]).await {
        Ok(()) => inner.answered(),
        Err(error) => inner.failed(&error, None),
    }
}

/// Makes a call that writes like a request, on the keys of the last failure, so that it fails where requests would.
async fn probe<L: Limiter>(inner: &Inner<L>) -> Result<(), Error> {
    let scope = lock(&inner.reason).1.clone();
    let blank = |scope: ScopeLimits| ScopeLimits { buckets: [None; Kind::COUNT], concurrency: None, ..scope };
    let call = Acquire {
        id: ReservationId::now_v7(),
        cost: Cost::default(),
        estimated: true,
        scopes: scope.map(blank).into_iter().collect(),
        candidates: Vec::new(),
        lease_ttl: Duration::from_secs(1),
    };
    let end =
        Settle { id: call.id, actual: Cost::default(), scopes: call.scopes.clone(), slot: None, usage: None };
    match inner.store.acquire(&call).await {
        Ok(_) => inner.store.settle(&end).await.map(drop),
        Err(error) => Err(error),
    }
}

/// Takes leases again whatever the limit is, because their requests still run although the leases may have expired.
async fn retake_leases<L: Limiter + 'static>(inner: &Arc<Inner<L>>) -> Result<(), Error> {
    let held = inner.store_leases.list().into_iter();
    let each = held.flat_map(|(id, lease)| lease.leases.into_iter().map(move |key| (id, key, lease.life)));
    each_at_once(each, |(id, key, life)| {
        let inner = inner.clone();
        async move { take(&inner, id, key, life).await }
    })
    .await
}

async fn take<L: Limiter>(
    inner: &Inner<L>,
    id: ReservationId,
    leases: Key,
    life: Duration,
) -> Result<(), Error> {
    let room = Candidate { leases, max_concurrency: u32::MAX, bound: None };
    passable(inner, inner.store.move_slot(id, None, std::slice::from_ref(&room), life).await.map(drop))
}

/// Reports all local decisions to the store.
pub(super) async fn report<L: Limiter + 'static>(inner: &Arc<Inner<L>>) -> Result<(), Error> {
    settle_pending(inner).await?;
    // One pass each, because under load there is always more, and the next round comes soon.
    let grants = lock(&inner.local).unadopted();
    each_at_once(grants, |(id, grant)| adopt(inner.clone(), id, grant)).await?;
    let charges = lock(&inner.local).charges(inner.sharing(), inner.now_us());
    each_at_once(charges, |charge| {
        let inner = inner.clone();
        async move {
            passable(&inner, tell(&inner, &charge).await)?;
            lock(&inner.local).charged(&charge);
            Ok(())
        }
    })
    .await?;
    let notes = lock(&inner.local).usage_notes();
    each_at_once(notes, |note| {
        let inner = inner.clone();
        async move {
            passable(&inner, tell(&inner, &note).await)?;
            lock(&inner.local).noted(&note);
            Ok(())
        }
    })
    .await?;
    settle_pending(inner).await
}

async fn settle_pending<L: Limiter + 'static>(inner: &Arc<Inner<L>>) -> Result<(), Error> {
    let waiting = std::mem::take(&mut lock(&inner.local).pending);
    each_at_once(waiting, |pending| {
        let inner = inner.clone();
        async move {
            let done = match &pending {
                Pending::Settle(settle) => tell(&inner, settle).await,
                Pending::Release(id, leases) => inner.store.release(*id, leases).await,
            };
            if done.as_ref().is_err_and(waits) {
                let mut local = lock(&inner.local);
                let id = match &pending {
                    Pending::Settle(settle) => settle.id,
                    Pending::Release(id, _) => *id,
                };
                if !inner.defer(&mut local, pending) {
                    local.told(id, false);
                }
            }
            passable(&inner, done)
        }
    })
    .await
}

/// Tells the store a settlement, which may have been told before. After a long time without an answer the store does not
/// remember any more whether it has carried it out: then it is not told again, so that nothing counts twice, and its leases
/// are released. What was reserved stays charged.
async fn tell<L: Limiter>(inner: &Inner<L>, settle: &Settle) -> Result<(), Error> {
    if lock(&inner.local).is_too_late(settle.id) {
        let leases = leases_of(settle);
        if !leases.is_empty() {
            inner.store.release(settle.id, &leases).await?;
        }
        lock(&inner.local).told(settle.id, false);
        inner.lost.fetch_add(1, Ordering::Relaxed);
        return Ok(());
    }
    let told = inner.store.settle(settle).await.map(drop);
    let unknown = told.as_ref().is_err_and(|error| error.trouble() == Trouble::Unknown);
    // A refusal after which it is told again leaves open what came of an earlier attempt.
    if unknown || !told.as_ref().is_err_and(waits) {
        lock(&inner.local).told(settle.id, unknown);
    }
    told
}

/// Reports a local grant to the store under the same id. The store charges and counts it whatever the limits are, because
/// the request was admitted already.
async fn adopt<L: Limiter>(inner: Arc<Inner<L>>, id: ReservationId, grant: Grant) -> Result<(), Error> {
    let mut leases: SmallVec<[Key; 4]> = grant.slot.iter().cloned().collect();
    let unknown = grant.unknown;
    let Some(mut call) = grant.call else {
        for key in &leases {
            take(&inner, id, key.clone(), grant.lease_ttl).await?;
        }
        taken_over(&inner, id, &leases, grant.lease_ttl, &[]);
        return Ok(());
    };
    let scopes = call.scopes.clone();
    leases.extend(scopes.iter().filter(|s| s.concurrency.is_some()).map(|s| s.leases.clone()));
    call.scopes.iter_mut().for_each(|scope| scope.mode = Mode::Shadow);
    let room = |leases| Candidate { leases, max_concurrency: u32::MAX, bound: None };
    let asked = std::mem::replace(&mut call.candidates, grant.slot.clone().map(room).into_iter().collect());
    passable(&inner, inner.store.acquire(&call).await.map(drop))?;
    if unknown {
        // The store may have granted it before, with another slot than the local one.
        let others = asked.into_iter().map(|c| c.leases).filter(|slot| Some(slot) != grant.slot.as_ref());
        let others: SmallVec<[Key; 4]> = others.collect();
        if !others.is_empty() {
            passable(&inner, inner.store.release(id, &others).await)?;
        }
        if let Some(slot) = grant.slot {
            take(&inner, id, slot, call.lease_ttl).await?;
        }
    }
    taken_over(&inner, id, &leases, call.lease_ttl, &scopes);
    Ok(())
}

fn taken_over<L: Limiter>(
    inner: &Inner<L>,
    id: ReservationId,
    leases: &[Key],
    life: Duration,
    scopes: &[ScopeLimits],
) {
    let mut local = lock(&inner.local);
    if local.grant(id).is_some() {
        inner.store_leases.hold(id, leases.into(), life);
        local.adopted(id, leases, inner.sharing(), inner.now_us());
    } else {
        // The reservation ended meanwhile; the local bucket state contains its usage.
        let end = Settle {
            id,
            actual: Cost::default(),
            scopes: scopes.into(),
            slot: leases.first().cloned(),
            usage: None,
        };
        inner.defer(&mut local, Pending::Settle(Box::new(end)));
        inner.defer(&mut local, Pending::Release(id, leases.into()));
    }
}

/// Counts and skips what the store refuses permanently; only a store failure ends a round.
fn passable<L>(inner: &Inner<L>, done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(error) if matches!(error.trouble(), Trouble::Keys | Trouble::Caller) => {
            if !waits(&error) {
                inner.lost.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%error, "local decision refused by the limit store");
            }
            if waits(&error) { Err(error) } else { Ok(()) }
        }
        done => done,
    }
}

/// Runs all futures, a few concurrently; returns the first error after all have ended.
async fn each_at_once<T, F>(items: impl IntoIterator<Item = T>, run: impl Fn(T) -> F) -> Result<(), Error>
where
    F: Future<Output = Result<(), Error>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let mut first = Ok(());
    let mut note = |ended: Result<Result<(), Error>, tokio::task::JoinError>| {
        if let (Ok(Err(error)), true) = (ended, first.is_ok()) {
            first = Err(error);
        }
    };
    for item in items {
        if tasks.len() >= AT_ONCE
            && let Some(ended) = tasks.join_next().await
        {
            note(ended);
        }
        tasks.spawn(run(item));
    }
    while let Some(ended) = tasks.join_next().await {
        note(ended);
    }
    first
}
