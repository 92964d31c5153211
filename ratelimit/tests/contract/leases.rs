//! Requests in flight.

use std::time::Duration;

use smallvec::SmallVec;
use uuid::Uuid;
use weir_ratelimit::*;

use crate::harness::*;

fn in_flight(most: u32) -> Scopes {
    let mut limits = scope("acme");
    limits.concurrency = Some(most);
    [limits].into()
}

fn leases_of(scopes: &Scopes) -> SmallVec<[Key; 4]> {
    scopes.iter().map(|scope| scope.leases.clone()).collect()
}

pub(crate) async fn concurrency_is_exact(world: World) {
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (limiter, call) = (world.limiter.clone(), call(in_flight(7)));
        tasks.spawn(async move { granted(&limiter.acquire(&call).await.expect("acquire")) });
    }
    assert_eq!(tasks.join_all().await.into_iter().filter(|granted| *granted).count(), 7);
}

pub(crate) async fn a_lost_lease_frees_its_slot(world: World) {
    let short = Duration::from_millis(60);
    let owner = Acquire { lease_ttl: short, ..call(in_flight(1)) };
    let since = world.acquire(&owner).await.now_us;
    let refused = world.acquire(&call(in_flight(1))).await;
    if refused.now_us < since + 60_000 {
        let Outcome::Limited { wait: Some(wait) } = refused.outcome else { panic!("{refused:?}") };
        assert_eq!(refused.now_us + wait.as_micros() as u64, since + 60_000);
    }
    world.until(since + 60_000).await;
    let next = call(in_flight(1));
    assert!(granted(&world.acquire(&next).await));
    let late = Renewal { id: owner.id, leases: leases_of(&owner.scopes) };
    assert_eq!(world.limiter.renew(&[late], LEASE).await.expect("renew"), [owner.id]);
    // The late holder ends; the slot stays with the next one.
    world.settle(&owner, owner.cost, None).await;
    world.limiter.release(owner.id, &leases_of(&owner.scopes)).await.expect("release");
    assert!(!granted(&world.acquire(&call(in_flight(1))).await));
}

pub(crate) async fn renewal_keeps_a_lease(world: World) {
    let owner = Acquire { lease_ttl: Duration::from_secs(1), ..call(in_flight(1)) };
    let since = world.acquire(&owner).await.now_us;
    let mine = Renewal { id: owner.id, leases: leases_of(&owner.scopes) };
    let other = Renewal { id: Uuid::now_v7(), leases: leases_of(&owner.scopes) };
    let lost = world.limiter.renew(&[mine, other.clone()], LEASE).await.expect("renew");
    assert_eq!(lost, [other.id], "renewal extends, it does not create");
    world.until(since + 1_000_000).await;
    assert!(!granted(&world.acquire(&call(in_flight(1))).await));
}

pub(crate) async fn release_is_idempotent(world: World) {
    let (first, second) = (call(in_flight(1)), call(in_flight(1)));
    assert!(granted(&world.acquire(&first).await));
    world.limiter.release(first.id, &leases_of(&first.scopes)).await.expect("release");
    assert!(granted(&world.acquire(&second).await));
    world.limiter.release(first.id, &leases_of(&first.scopes)).await.expect("release");
    assert!(!granted(&world.acquire(&call(in_flight(1))).await), "a second release frees nobody else's slot");
    world.limiter.release(first.id, &[]).await.expect("release");
}

pub(crate) async fn candidates_are_tried_in_order(world: World) {
    let try_one = async || {
        let candidates = vec![candidate("a", 1), candidate("b", 2)];
        world.acquire(&Acquire { candidates, ..call(Scopes::new()) }).await.outcome
    };
    assert_eq!(try_one().await, Outcome::Granted { slot: Some(0) });
    assert_eq!(try_one().await, Outcome::Granted { slot: Some(1) });
    assert_eq!(try_one().await, Outcome::Granted { slot: Some(1) });
    let Outcome::NoSlot { wait } = try_one().await else { panic!("full") };
    assert!(wait <= LEASE && wait > LEASE - Duration::from_secs(10), "{wait:?}");
}

pub(crate) async fn a_moved_slot_is_freed_and_taken(world: World) {
    let (a, b) = (candidate("a", 1), candidate("b", 1));
    let owner = Acquire { candidates: vec![a.clone(), b.clone()], ..call(Scopes::new()) };
    assert_eq!(world.acquire(&owner).await.outcome, Outcome::Granted { slot: Some(0) });
    let to_b = std::slice::from_ref(&b);
    let moved = world.limiter.move_slot(owner.id, Some(&a.leases), to_b, LEASE).await.expect("move");
    assert_eq!(moved, Some(0));
    let again = world.limiter.move_slot(owner.id, Some(&a.leases), to_b, LEASE).await.expect("move");
    assert_eq!(again, Some(0), "a repeated move keeps its slot");
    let other = Acquire { candidates: vec![b.clone(), a.clone()], ..call(Scopes::new()) };
    assert_eq!(world.acquire(&other).await.outcome, Outcome::Granted { slot: Some(1) });
    // Both full: nothing to move to, and the old slot is free all the same.
    let none = world.limiter.move_slot(other.id, Some(&a.leases), to_b, LEASE).await.expect("move");
    assert_eq!(none, None);
    let third = Acquire { candidates: vec![a.clone()], ..call(Scopes::new()) };
    assert_eq!(world.acquire(&third).await.outcome, Outcome::Granted { slot: Some(0) });
    // To where it already is.
    let same = world
        .limiter
        .move_slot(third.id, Some(&a.leases), std::slice::from_ref(&a), LEASE)
        .await
        .expect("move");
    assert_eq!(same, Some(0));
}

pub(crate) async fn a_lowered_maximum_waits_for_its_surplus(world: World) {
    let mut held = Vec::new();
    for n in 0..3u64 {
        let owner = Acquire { lease_ttl: LEASE + Duration::from_secs(n), ..call(in_flight(3)) };
        held.push((world.acquire(&owner).await.now_us, owner));
    }
    let refused = world.acquire(&call(in_flight(1))).await;
    let Outcome::Limited { wait: Some(wait) } = refused.outcome else { panic!("{refused:?}") };
    let last = held[2].0 + held[2].1.lease_ttl.as_micros() as u64;
    assert_eq!(refused.now_us + wait.as_micros() as u64, last, "all three must go first");
    for (_, owner) in &held[..2] {
        world.settle(owner, owner.cost, None).await;
    }
    assert!(!granted(&world.acquire(&call(in_flight(1))).await));
    world.settle(&held[2].1, held[2].1.cost, None).await;
    assert!(granted(&world.acquire(&call(in_flight(1))).await));
}

pub(crate) async fn settlement_frees_every_lease(world: World) {
    let owner = Acquire { candidates: vec![candidate("a", 1)], ..call(in_flight(1)) };
    assert!(granted(&world.acquire(&owner).await));
    let settled = world.settle(&owner, owner.cost, Some(&owner.candidates[0].leases)).await;
    assert_eq!(settled.limits[0].remaining, 1);
    let next = Acquire { id: Uuid::now_v7(), ..owner };
    assert!(granted(&world.acquire(&next).await));
}

pub(crate) async fn a_closed_candidate_is_never_taken(world: World) {
    let call = Acquire { candidates: vec![candidate("a", 0)], ..call(Scopes::new()) };
    assert_eq!(world.acquire(&call).await.outcome, Outcome::NoSlot { wait: LEASE });
}

pub(crate) async fn shadow_concurrency_admits(world: World) {
    let mut scopes = in_flight(1);
    scopes[0].mode = Mode::Shadow;
    world.acquire(&call(scopes.clone())).await;
    let over = world.acquire(&call(scopes)).await;
    assert!(granted(&over));
    assert!(matches!(over.limits[0].verdict, Verdict::Wait(_)));
}

/// What a process held is freed once it is gone, and nothing of another; one that says that it lives loses nothing.
pub(crate) async fn leases_of_a_holder_that_is_gone_are_freed(world: World) {
    let (gone, other) = (OwnerId::of("gone"), OwnerId::of("other"));
    let mut model = scope("x");
    (model.record, model.leases) = scope_keys(Scope::Model("m"));
    let model = ScopeLimits { concurrency: Some(10), ..model };
    let scopes: Scopes = in_flight(10).iter().cloned().chain([model]).collect();
    let take = |owner: OwnerId| Acquire {
        id: owner.id(),
        candidates: vec![candidate("b", 10)],
        ..call(scopes.clone())
    };
    for owner in [gone, gone, other, gone] {
        assert!(granted(&world.acquire(&take(owner)).await));
    }
    let sets: Vec<Key> = scopes
        .iter()
        .map(|s| s.leases.clone())
        .chain([Key::backend_slots("b"), Key::backend_slots("c")])
        .collect();
    let left = async || world.peek(&scopes).await.iter().map(|limit| limit.remaining).collect::<Vec<_>>();
    membership::heartbeat(&world.limiter, gone).await.expect("beat");
    assert_eq!(world.limiter.free_orphans(gone, &sets).await, Ok(None), "it lives");
    assert_eq!(left().await, [6, 6]);
    world.pass(membership::MEMBERSHIP_LIFE).await;
    assert_eq!(world.limiter.free_orphans(gone, &sets).await, Ok(Some(9)));
    assert_eq!(left().await, [9, 9]);
    assert_eq!(world.limiter.free_orphans(gone, &sets).await, Ok(Some(0)), "asked again");
    membership::heartbeat(&world.limiter, other).await.expect("beat");
    membership::leave(&world.limiter, other).await.expect("leave");
    assert_eq!(world.limiter.free_orphans(other, &sets[..1]).await, Ok(Some(1)));
    assert_eq!(left().await, [10, 9]);
    let many = vec![sets[0].clone(); ORPHAN_SETS_MAX + 1];
    assert!(matches!(world.limiter.free_orphans(gone, &many).await, Err(Error::Invalid(_))));
}

pub(crate) async fn a_part_of_what_all_have_is_bounded_by_live_counts(world: World) {
    let part = |millionths| Some(Bound { millionths, elsewhere: 0, estimate: 2 });
    // As prefix affinity asks: first within the bound, then wherever there is a slot.
    let ask = |first: &str, then: &str| Acquire {
        candidates: vec![
            Candidate { bound: part(500_000), ..candidate(first, 10) },
            candidate(then, 10),
            candidate(first, 10),
        ],
        ..call(Scopes::new())
    };
    let mut taken = Vec::new();
    for _ in 0..6 {
        let decision = world.acquire(&ask("bounded", "other")).await;
        let Outcome::Granted { slot: Some(slot) } = decision.outcome else { panic!("{decision:?}") };
        taken.push(slot);
    }
    // Of all, this one included: 1 of 1, 1 of 2, 2 of 3, 2 of 4, 3 of 5, 3 of 6 are at most half, rounded up.
    let by_live_counts = vec![0, 1, 0, 1, 0, 1];
    // Where no call sees all candidates, the caller's estimate holds.
    let by_estimate = vec![0, 0, 1, 1, 1, 1];
    assert!(taken == by_live_counts || (world.is_split() && taken == by_estimate), "{taken:?}");
}

pub(crate) async fn what_others_have_in_flight_counts_towards_a_part_of_all(world: World) {
    let part = Bound { millionths: 100_000, elsewhere: 39, estimate: 2 };
    let ask = || Acquire {
        candidates: vec![
            Candidate { bound: Some(part), ..candidate("of-many", 10) },
            candidate("another", 10),
        ],
        ..call(Scopes::new())
    };
    let mut taken = Vec::new();
    for _ in 0..7 {
        let decision = world.acquire(&ask()).await;
        let Outcome::Granted { slot: Some(slot) } = decision.outcome else { panic!("{decision:?}") };
        taken.push(slot);
    }
    // A tenth of 39, of those here and of this one, rounded up: 4, then 5 until there are 10 here.
    let by_live_counts = vec![0, 0, 0, 0, 0, 1, 1];
    let by_estimate = vec![0, 0, 1, 1, 1, 1, 1];
    assert!(taken == by_live_counts || (world.is_split() && taken == by_estimate), "{taken:?}");
}
