//! What is admitted, what is refused, and what a refusal says.

use std::time::Duration;

use weir_ratelimit::*;

use crate::harness::*;

const MINUTE: Duration = Duration::from_secs(60);

pub(crate) async fn exactly_a_hundred_of_two_thousand(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(100, 0, MINUTE))].into();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..2000 {
        let (limiter, call) = (world.limiter.clone(), call(scopes.clone()));
        tasks.spawn(async move { granted(&limiter.acquire(&call).await.expect("acquire")) });
    }
    let outcomes = tasks.join_all().await;
    assert_eq!(outcomes.into_iter().filter(|granted| *granted).count(), 100);
}

pub(crate) async fn a_refusal_changes_nothing(world: World) {
    let mut wide = limited("wide", Kind::Requests, bucket(10, 0, MINUTE));
    wide.concurrency = Some(5);
    let narrow = limited("narrow", Kind::Tokens, bucket(100, 0, MINUTE));
    let both: Scopes = [wide, narrow].into();
    assert!(granted(&world.acquire(&tokens(both.clone(), 60)).await));
    let (before, stood) = (world.dump().await, world.peek(&both).await);
    let refused = world.acquire(&tokens(both.clone(), 60)).await;
    assert_eq!(refused.outcome, Outcome::Limited { wait: None });
    assert_eq!(refused.limits[0].verdict, Verdict::Fits);
    let full = Acquire { candidates: vec![candidate("shut", 0)], ..tokens(both.clone(), 1) };
    assert!(matches!(world.acquire(&full).await.outcome, Outcome::NoSlot { .. }));
    assert_eq!(world.dump().await, before);
    let after = world.peek(&both).await;
    let left = |limits: &[LimitState]| limits.iter().map(|limit| limit.remaining).collect::<Vec<_>>();
    assert_eq!(left(&after), left(&stood));
    assert_eq!(left(&after), [9, 4, 40]);
}

/// Every decision is right for its own moment: refused before the announced time, granted from then on.
pub(crate) async fn a_wait_is_exact(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(100, 700, Duration::from_secs(3)))].into();
    assert!(granted(&world.acquire(&tokens(scopes.clone(), 100)).await));
    for cost in [25, 33, 70] {
        let first = world.acquire(&tokens(scopes.clone(), cost)).await;
        let Outcome::Limited { wait: Some(wait) } = first.outcome else { panic!("{first:?}") };
        let fits_at = first.now_us + wait.as_micros() as u64;
        world.until(fits_at - 1_000).await;
        loop {
            let next = world.acquire(&tokens(scopes.clone(), cost)).await;
            assert_eq!(granted(&next), next.now_us >= fits_at, "{next:?}, announced {fits_at}");
            match next.outcome {
                Outcome::Limited { wait: Some(wait) } => {
                    assert_eq!(next.now_us + wait.as_micros() as u64, fits_at);
                    world.until(fits_at).await;
                }
                _ => break,
            }
        }
        // Full again for the next round.
        let left = world.peek(&scopes).await[0].remaining;
        world.acquire(&tokens(scopes.clone(), left)).await;
    }
}

pub(crate) async fn a_repeated_acquire_is_free(world: World) {
    let mut limits = limited("acme", Kind::Requests, bucket(1, 0, MINUTE));
    limits.concurrency = Some(1);
    let mut call = call([limits]);
    call.candidates = vec![candidate("a", 0), candidate("b", 1)];
    for _ in 0..3 {
        let decision = world.acquire(&call).await;
        assert_eq!(decision.outcome, Outcome::Granted { slot: Some(1) });
        assert_eq!(decision.limits[0].remaining, 0);
    }
    world.settle(&call, call.cost, Some(&call.candidates[1].leases)).await;
    assert_eq!(world.acquire(&call).await.outcome, Outcome::Granted { slot: Some(1) });
    assert_eq!(world.peek(&call.scopes).await[1].remaining, 1, "a late retry takes no lease");
}

pub(crate) async fn a_changed_limit_keeps_consumption(world: World) {
    let of = |capacity| -> Scopes { [limited("acme", Kind::Tokens, bucket(capacity, 0, MINUTE))].into() };
    world.acquire(&tokens(of(100), 80)).await;
    assert_eq!(world.peek(&of(200)).await[0].remaining, 120);
    assert_eq!(world.peek(&of(50)).await[0].remaining, 0);
    assert!(!granted(&world.acquire(&tokens(of(50), 1)).await));
    assert!(granted(&world.acquire(&tokens(of(200), 120)).await));
    assert_eq!(world.peek(&of(200)).await[0].remaining, 0);
}

pub(crate) async fn shadow_reports_and_admits(world: World) {
    let mut shadow = limited("acme", Kind::Tokens, bucket(100, 0, MINUTE));
    shadow.mode = Mode::Shadow;
    let scopes: Scopes = [shadow].into();
    assert!(granted(&world.acquire(&tokens(scopes.clone(), 70)).await));
    let over = world.acquire(&tokens(scopes.clone(), 70)).await;
    assert!(granted(&over));
    assert_eq!((over.limits[0].verdict, over.limits[0].remaining), (Verdict::Never, 0));
    let mut wider = scopes.clone();
    wider[0].buckets[Kind::Tokens as usize] = bucket(1000, 0, MINUTE);
    assert_eq!(world.peek(&wider).await[0].remaining, 860, "shadow still charges");
}

pub(crate) async fn estimates_are_clamped_and_explicit_costs_are_not(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(100, 60, MINUTE))].into();
    let explicit = world.acquire(&tokens(scopes.clone(), 5000)).await;
    assert_eq!(explicit.outcome, Outcome::Limited { wait: None });
    assert_eq!(explicit.limits[0].verdict, Verdict::Never);
    let guess = Acquire { estimated: true, ..tokens(scopes.clone(), 5000) };
    assert!(granted(&world.acquire(&guess).await));
    // Requests are never an estimate.
    let none: Scopes = [limited("none", Kind::Requests, bucket(0, 60, MINUTE))].into();
    let refused = world.acquire(&Acquire { estimated: true, ..call(none) }).await;
    assert_eq!(refused.outcome, Outcome::Limited { wait: None });
}

pub(crate) async fn rate_zero_never_drains(world: World) {
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(1, 0, Duration::from_millis(1)))].into();
    assert!(granted(&world.acquire(&call(scopes.clone())).await));
    world.pass(Duration::from_millis(30)).await;
    let refused = world.acquire(&call(scopes)).await;
    assert_eq!(refused.outcome, Outcome::Limited { wait: None });
    assert_eq!(refused.limits[0].reset, FOREVER);
}

pub(crate) async fn huge_limits_stay_exact(world: World) {
    let max = Bucket::MAX_UNITS;
    let year = Duration::from_secs(365 * 24 * 3600);
    let scopes: Scopes = [limited("acme", Kind::Tokens, bucket(max, 1, year))].into();
    assert!(granted(&world.acquire(&tokens(scopes.clone(), max - 1)).await));
    assert!(granted(&world.acquire(&tokens(scopes.clone(), 1)).await));
    let refused = world.acquire(&tokens(scopes.clone(), 1)).await;
    let Outcome::Limited { wait: Some(wait) } = refused.outcome else { panic!("{refused:?}") };
    assert!(wait <= year && wait > year - MINUTE, "{wait:?}");
    assert!(!granted(&world.acquire(&tokens(scopes, u64::MAX)).await));
    let fast: Scopes = [limited("fast", Kind::Tokens, bucket(max, max, Duration::from_millis(1)))].into();
    assert!(granted(&world.acquire(&tokens(fast.clone(), max)).await));
    world.pass(Duration::from_millis(1)).await;
    assert!(granted(&world.acquire(&tokens(fast, max)).await));
}

pub(crate) async fn peek_writes_nothing(world: World) {
    let mut limits = limited("acme", Kind::Requests, bucket(5, 0, MINUTE));
    limits.concurrency = Some(2);
    let scopes: Scopes = [limits].into();
    let states = world.peek(&scopes).await;
    assert_eq!(states.iter().map(|state| state.remaining).collect::<Vec<_>>(), [5, 2]);
    assert!(world.dump().await.is_empty());
    world.acquire(&call(scopes.clone())).await;
    let before = world.dump().await;
    let states = world.peek(&scopes).await;
    assert_eq!(states.iter().map(|state| state.remaining).collect::<Vec<_>>(), [4, 1]);
    assert_eq!(world.dump().await, before);
}

pub(crate) async fn broken_calls_are_refused(world: World) {
    let refused = async |call: Acquire| matches!(world.limiter.acquire(&call).await, Err(Error::Invalid(_)));
    assert!(refused(call([scope("a"), scope("a")])).await);
    assert!(refused(call((0..=MAX_SCOPES).map(|n| scope(&format!("t{n}"))).collect::<Scopes>())).await);
    assert!(refused(call([limited("a", Kind::Tokens, bucket(Bucket::MAX_UNITS + 1, 1, MINUTE))])).await);
    assert!(refused(call([limited("a", Kind::Spend, bucket(9_000_000_000_000_001, 0, MINUTE))])).await);
    assert!(refused(call([limited("a", Kind::Spend, bucket(1, 1, Duration::ZERO))])).await);
    assert!(refused(Acquire { lease_ttl: Duration::ZERO, ..call(Scopes::new()) }).await);
    assert!(
        refused(Acquire { candidates: vec![candidate("a", 1); MAX_CANDIDATES + 1], ..call(Scopes::new()) })
            .await
    );
}

pub(crate) async fn the_wait_is_the_longest_of_all_limits(world: World) {
    let quick = limited("quick", Kind::Requests, bucket(1, 1, MINUTE));
    let slow = limited("slow", Kind::Requests, bucket(1, 1, MINUTE * 60));
    let scopes: Scopes = [quick, slow].into();
    assert!(granted(&world.acquire(&call(scopes.clone())).await));
    let refused = world.acquire(&call(scopes)).await;
    let Verdict::Wait(longest) = refused.limits[1].verdict else { panic!("{refused:?}") };
    assert_eq!(refused.outcome, Outcome::Limited { wait: Some(longest) });
    assert!(matches!(refused.limits[0].verdict, Verdict::Wait(wait) if wait < longest));
}

pub(crate) async fn a_budget_counts_money_beyond_what_tokens_could(world: World) {
    let month = MINUTE * 60 * 24 * 31;
    let budget: Scopes = [limited("acme", Kind::Spend, bucket(90_000_000_000_000, 0, month))].into();
    let spend = |micro| Acquire { cost: Cost::of_request(0, 0, micro), ..call(budget.clone()) };
    let most = world.acquire(&spend(89_999_999_999_999)).await;
    assert_eq!(most.limits[0].remaining, 1);
    let refused = world.acquire(&spend(2)).await;
    assert_eq!((refused.outcome, refused.limits[0].remaining), (Outcome::Limited { wait: None }, 1));
    assert!(granted(&world.acquire(&spend(1)).await));
}
