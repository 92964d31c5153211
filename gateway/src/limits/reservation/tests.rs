//! What own limits and accounts stand at after every way a request can go.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::{AnyLimiter, Bucket, Candidate, Mode, OwnerId, Scope, What, WithoutStore, scope_keys};

use super::*;
use crate::limits::ledger::LedgerWorker;
use crate::metrics::Metrics;

const CAPACITY: u64 = 10_000;

fn scope(of: Scope<'_>) -> ScopeLimits {
    let (record, leases) = scope_keys(of);
    let mut buckets = [None; Kind::COUNT];
    for kind in [Kind::Requests, Kind::Tokens] {
        buckets[kind as usize] =
            Some(Bucket { capacity: CAPACITY, rate: 0, period: Duration::from_secs(3600) });
    }
    let (mode, without_store) = (Mode::Enforce, WithoutStore::LocalShare);
    ScopeLimits {
        record,
        leases,
        buckets,
        concurrency: Some(9),
        mode,
        without_store,
        prefetch: Default::default(),
    }
}

fn own() -> ScopeLimits {
    scope(Scope::Tenant("acme"))
}

fn account(name: &str) -> ScopeLimits {
    scope(Scope::Account(name))
}

fn slot(backend: &str) -> Key {
    Key::backend_slots(backend)
}

fn tokens(n: u64) -> Cost {
    Cost::of_request(0, n, 0)
}

struct World {
    ledger: Arc<Ledger>,
    worker: LedgerWorker,
}

fn world() -> World {
    let limiter = AnyLimiter::from(MemoryLimiter::new());
    let holder = OwnerId::of("test");
    let (ledger, worker) =
        Ledger::new(limiter, holder, Arc::new(|| 1), Metrics::new(&mut Default::default()), Arc::default());
    World { ledger, worker }
}

impl World {
    /// Admitted under the tenant's limits and those of account `x`, at backend `bx`, with 100 tokens reserved.
    async fn admitted(&self) -> Reservation {
        let mut reservation = self.granted(&[own(), account("x")], "bx", Some(subject())).await;
        reservation.under_account(1);
        reservation
    }

    /// A later attempt, under account `y` at backend `by`.
    async fn elsewhere(&self) -> Box<Reservation> {
        let mut reservation = self.granted(&[account("y")], "by", None).await;
        reservation.under_account(0);
        Box::new(reservation)
    }

    async fn granted(&self, scopes: &[ScopeLimits], backend: &str, subject: Option<Subject>) -> Reservation {
        let call = Acquire {
            id: Uuid::nil(),
            cost: tokens(100),
            estimated: true,
            scopes: scopes.iter().cloned().collect(),
            candidates: vec![Candidate { leases: slot(backend), max_concurrency: 9, bound: None }],
            lease_ttl: crate::limits::ledger::LEASE_TTL,
        };
        let asked = Reservation::ask(&self.ledger, call, subject).await;
        assert!(matches!(asked.decision.expect("decided").outcome, Outcome::Granted { .. }));
        let mut reservation = asked.reservation;
        reservation.granted(Some(slot(backend)));
        reservation
    }

    /// Requests and tokens that are charged, and leases, of the tenant, of `x` and of `y`; after everything was settled.
    async fn stands(self) -> [(u64, u64, u64); 3] {
        let end = CancellationToken::new();
        end.cancel();
        self.worker.run(end).await;
        assert_eq!(self.ledger.open_leases(), 0, "nothing is renewed any more");
        let free = ScopeLimits { buckets: [None; Kind::COUNT], ..own() };
        for backend in ["bx", "by"] {
            let slots = ScopeLimits { record: slot(backend), leases: slot(backend), ..free.clone() };
            let states = self.ledger.limiter.peek(&[slots]).await.expect("peeks");
            assert_eq!(states[0].remaining, 9, "{backend} has all its slots");
        }
        let mut all = [(0, 0, 0); 3];
        for (all, scope) in all.iter_mut().zip([own(), account("x"), account("y")]) {
            let states = self.ledger.limiter.peek(&[scope]).await.expect("peeks");
            let left = |what| states.iter().find(|state| state.what == what).expect("limited").remaining;
            let (requests, tokens) = (What::Bucket(Kind::Requests), What::Bucket(Kind::Tokens));
            *all = (CAPACITY - left(requests), CAPACITY - left(tokens), 9 - left(What::Concurrency));
        }
        all
    }
}

fn subject() -> Subject {
    Subject {
        tenant: "acme".into(),
        model: "m".into(),
        record: Key::usage("acme", "2026-11-23"),
        prompt_bytes: None,
        choices: 1,
    }
}

#[tokio::test(start_paused = true)]
async fn the_account_of_the_only_attempt_is_settled_with_what_was_used() {
    let world = world();
    let mut reservation = world.admitted().await;
    reservation.used(tokens(70));
    drop(reservation);
    assert_eq!(world.stands().await, [(1, 70, 0), (1, 70, 0), (0, 0, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_failed_attempt_stands_at_its_account_and_the_winner_is_settled_with_what_was_used() {
    for used in [70, 100, 250] {
        let world = world();
        let mut reservation = world.admitted().await;
        reservation.used(tokens(100));
        reservation.vacate(&slot("bx"), true).await.expect("given back");
        let mut other = world.elsewhere().await;
        other.used(tokens(100));
        reservation.answered_under(other);
        reservation.used(tokens(used));
        drop(reservation);
        assert_eq!(world.stands().await, [(1, used, 0), (1, 100, 0), (1, used, 0)], "{used} used");
    }
}

#[tokio::test(start_paused = true)]
async fn an_overtaken_attempt_stands_and_gives_back_what_it_holds_at_once() {
    let world = world();
    let mut reservation = world.admitted().await;
    let mut other = world.elsewhere().await;
    other.used(other.reserved);
    drop(other);
    reservation.used(tokens(30));
    drop(reservation);
    assert_eq!(world.stands().await, [(1, 30, 0), (1, 30, 0), (1, 100, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_got_no_answer_used_nothing_but_its_accounts_stand() {
    let world = world();
    let mut reservation = world.admitted().await;
    reservation.leave_account();
    let mut other = world.elsewhere().await;
    other.used(other.reserved);
    drop(other);
    reservation.used(Cost::default());
    drop(reservation);
    assert_eq!(world.stands().await, [(0, 0, 0), (1, 100, 0), (1, 100, 0)]);
}

#[tokio::test(start_paused = true)]
async fn steps_of_a_stream_weigh_on_the_account_that_answers() {
    let world = world();
    let mut reservation = world.admitted().await;
    reservation.leave_account();
    reservation.answered_under(world.elsewhere().await);
    reservation.streamed(tokens(100 + STEP_TOKENS));
    reservation.used(tokens(400));
    drop(reservation);
    assert_eq!(world.stands().await, [(1, 400, 0), (1, 100, 0), (1, 400, 0)]);
}

#[tokio::test(start_paused = true)]
async fn what_the_steps_of_a_stream_charged_too_much_is_given_back() {
    for used in [0, 20, 100, 250, 1000, 100 + 10 * STEP_TOKENS, 4000] {
        let world = world();
        let mut reservation = world.admitted().await;
        reservation.streamed(tokens(100 + 4 * STEP_TOKENS));
        reservation.streamed(tokens(100 + 10 * STEP_TOKENS));
        reservation.used(tokens(used));
        drop(reservation);
        assert_eq!(world.stands().await, [(1, used, 0), (1, used, 0), (0, 0, 0)], "{used} used");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_charged_too_much_is_given_back_to_the_account_that_answered() {
    let world = world();
    let mut reservation = world.admitted().await;
    reservation.leave_account();
    reservation.answered_under(world.elsewhere().await);
    reservation.streamed(tokens(100 + 10 * STEP_TOKENS));
    reservation.used(tokens(300));
    drop(reservation);
    assert_eq!(world.stands().await, [(1, 300, 0), (1, 100, 0), (1, 300, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_without_a_word_stands_at_what_it_had_streamed() {
    let world = world();
    let mut reservation = world.admitted().await;
    reservation.used(tokens(1));
    reservation.streamed(tokens(900));
    drop(reservation);
    assert_eq!(world.stands().await, [(1, 900, 0), (1, 900, 0), (0, 0, 0)]);
}

#[tokio::test(start_paused = true)]
async fn who_leaves_while_an_account_is_asked_leaves_nothing_behind() {
    let world = world();
    let reservation = world.admitted().await;
    let mut other = world.elsewhere().await;
    // Granted, and dropped before anything was sent there.
    other.used(Cost::default());
    drop((reservation, other));
    assert_eq!(world.stands().await, [(0, 0, 0); 3]);
}
