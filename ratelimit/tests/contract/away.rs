//! Four gateways over one store that goes away under load and comes back: what they let through together stands beside
//! what one limit allows. On a paused clock, so that half a minute takes moments.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use weir_ratelimit::fallback::Phase;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::usage::UsageLines;
use weir_ratelimit::*;

use crate::harness::*;

const GATEWAYS: u32 = 4;
const DEADLINE: Duration = Duration::from_millis(50);
/// One way to the store.
const WAY: Duration = Duration::from_micros(400);
const LEASE: Duration = Duration::from_secs(15);
const RENEWED: Duration = Duration::from_secs(5);
/// How long load arrives, seconds.
const LENGTH: f64 = 34.0;
/// Runs of each case.
const SEEDS: u64 = 6;
/// What the sums of the judge may be off by, units.
const ROUNDING: f64 = 1e-3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Serves,
    /// Reads nothing and answers nothing; what it was sent it does when it is back.
    Silent,
    /// Does what it is sent, and its answers are lost.
    Mute,
    Refuses,
}

/// A gateway's connection to the store they share.
#[derive(Clone)]
struct Line {
    store: Arc<MemoryLimiter>,
    state: watch::Receiver<State>,
}

impl Line {
    async fn call<T, F>(&self, run: impl FnOnce(Arc<MemoryLimiter>) -> F + Send + 'static) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>> + Send,
        T: Send + 'static,
    {
        let refused = || Error::Unreachable("stopped".into());
        if *self.state.borrow() == State::Refuses {
            return Err(refused());
        }
        let (store, mut state) = (self.store.clone(), self.state.clone());
        let served = tokio::spawn(async move {
            sleep(WAY).await;
            let now = *state.wait_for(|state| *state != State::Silent).await.map_err(|_| Error::Lost)?;
            if now == State::Refuses {
                return Err(Error::Lost);
            }
            let answer = run(store).await;
            sleep(WAY).await;
            let is_mute = *state.borrow() == State::Mute;
            if is_mute {
                std::future::pending::<()>().await;
            }
            answer
        });
        match tokio::time::timeout(DEADLINE, served).await {
            Ok(answer) => answer.expect("served"),
            Err(_) => Err(Error::Timeout(DEADLINE)),
        }
    }
}

impl Limiter for Line {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        let call = call.clone();
        self.call(|store| async move { store.acquire(&call).await }).await
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let (from, candidates) = (from.cloned(), candidates.to_vec());
        self.call(
            move |store| async move { store.move_slot(id, from.as_ref(), &candidates, lease_ttl).await },
        )
        .await
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        let call = call.clone();
        self.call(|store| async move { store.settle(&call).await }).await
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        let renewals = renewals.to_vec();
        self.call(move |store| async move { store.renew(&renewals, lease_ttl).await }).await
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let leases = leases.to_vec();
        self.call(move |store| async move { store.release(id, &leases).await }).await
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        let leases = leases.to_vec();
        self.call(move |store| async move { store.free_orphans(owner, &leases).await }).await
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let charges = charges.to_vec();
        self.call(move |store| async move { store.charge(&charges).await }).await
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let scopes = scopes.to_vec();
        self.call(move |store| async move { store.peek(&scopes).await }).await
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let records = records.to_vec();
        self.call(move |store| async move { store.usage(&records).await }).await
    }
}

/// Numbers that a seed decides.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    /// Until the next arrival of so many per second.
    fn pause(&mut self, per_second: f64) -> Duration {
        let even = (self.next() >> 11) as f64 / (1_u64 << 53) as f64;
        Duration::from_secs_f64(-(1.0 - even).ln() / per_second)
    }
}

/// What is asked under a limit of its own.
#[derive(Clone)]
struct Load {
    scopes: Scopes,
    candidates: Vec<Candidate>,
    per_second: f64,
    /// What a request costs, and how long it takes, milliseconds: from and to.
    cost: (u64, u64),
    takes: (u64, u64),
    /// Of a hundred so many take ten times as long.
    long: u64,
    /// From when on, seconds.
    from: f64,
    /// Which gateways it goes to at a time.
    to: fn(f64) -> std::ops::Range<usize>,
}

impl Load {
    fn of(scope: ScopeLimits, per_second: f64) -> Self {
        Self {
            scopes: [scope].into(),
            candidates: Vec::new(),
            per_second,
            cost: (1, 1),
            takes: (100, 600),
            long: 0,
            from: 0.0,
            to: |_| 0..GATEWAYS as usize,
        }
    }
}

/// What was admitted of a load.
#[derive(Default)]
struct Log {
    /// When, microseconds, and at what cost.
    admitted: Vec<(u64, u64)>,
    /// From when until when, microseconds, and in which candidate's slot.
    in_flight: Vec<(u64, u64, usize)>,
    /// Answers that were errors.
    failed: usize,
}

impl Log {
    /// By how much the worst of all windows exceeds the limit, units.
    fn beyond(&self, limit: &Bucket) -> f64 {
        let mut admitted = self.admitted.clone();
        admitted.sort_unstable();
        let per_us = limit.rate as f64 / limit.period.as_micros() as f64;
        let (mut level, mut at, mut worst) = (0.0_f64, 0, 0.0_f64);
        for (now, cost) in admitted {
            level = (level - (now - at) as f64 * per_us).max(0.0) + cost as f64;
            at = now;
            worst = worst.max(level - limit.capacity as f64);
        }
        worst
    }

    fn most_in_flight(&self, slot: usize) -> i32 {
        let of_slot = self.in_flight.iter().filter(|(_, _, at)| *at == slot);
        let mut steps: Vec<(u64, i32)> =
            of_slot.flat_map(|(from, until, _)| [(*from, 1), (*until, -1)]).collect();
        // Who leaves at a moment makes room for who comes then.
        steps.sort_unstable();
        let mut present = 0;
        steps
            .iter()
            .map(|(_, step)| {
                present += step;
                present
            })
            .max()
            .unwrap_or(0)
    }

    fn units(&self) -> u64 {
        self.admitted.iter().map(|(_, cost)| cost).sum()
    }
}

/// When the store changes, seconds, and to what.
type Script = Vec<(f64, State)>;

/// It goes so often for so many seconds, first in silence, then refusing, and so on.
fn goes(times: u32, every: f64, away: f64) -> Script {
    let once = |k: u32| {
        let (at, how) =
            (8.0 + every * f64::from(k), if k.is_multiple_of(2) { State::Silent } else { State::Refuses });
        [(at, how), (at + away, State::Serves)]
    };
    (0..times).flat_map(once).collect()
}

struct Scene {
    gateways: Vec<Arc<Fallback<Line>>>,
    state: watch::Sender<State>,
    began: Instant,
}

impl Scene {
    fn new() -> Self {
        let store = Arc::new(MemoryLimiter::new());
        let (state, at) = watch::channel(State::Serves);
        let gateway =
            || Fallback::new(Line { store: store.clone(), state: at.clone() }, Arc::new(|| GATEWAYS));
        let gateways = (0..GATEWAYS).map(|_| Arc::new(gateway())).collect();
        Self { gateways, state, began: Instant::now() }
    }

    fn at(&self, seconds: f64) -> Instant {
        self.began + Duration::from_secs_f64(seconds)
    }

    fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// Follows the script, and waits until every gateway has gone back to the store.
    async fn play(self: Arc<Self>, script: Script) {
        for (at, state) in script {
            sleep_until(self.at(at)).await;
            self.state.send_replace(state);
        }
        for gateway in &self.gateways {
            while gateway.status().phase != Phase::Closed {
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    async fn load(self: Arc<Self>, load: Load, seed: u64) -> Log {
        let mut dice = Dice(seed);
        let log = Arc::new(Mutex::new(Log::default()));
        let mut requests = JoinSet::new();
        let mut next = self.at(load.from);
        while next < self.at(LENGTH) {
            sleep_until(next).await;
            let to = (load.to)(self.began.elapsed().as_secs_f64());
            let gateway = dice.between(to.start as u64, to.end as u64 - 1) as usize;
            let long = if dice.between(1, 100) <= load.long { 10 } else { 1 };
            let takes = Duration::from_millis(dice.between(load.takes.0, load.takes.1) * long);
            let mut call = tokens(load.scopes.clone(), dice.between(load.cost.0, load.cost.1));
            (call.candidates, call.lease_ttl) = (load.candidates.clone(), LEASE);
            requests.spawn(self.clone().request(gateway, call, takes, log.clone()));
            next += dice.pause(load.per_second);
        }
        while requests.join_next().await.is_some() {}
        std::mem::take(&mut *log.lock().expect("log"))
    }

    async fn request(self: Arc<Self>, gateway: usize, call: Acquire, takes: Duration, log: Arc<Mutex<Log>>) {
        let gateway = &self.gateways[gateway];
        let decision = match gateway.acquire(&call).await {
            Ok(decision) => decision,
            Err(_) => return log.lock().expect("log").failed += 1,
        };
        let Outcome::Granted { slot } = decision.outcome else { return };
        let from = self.now_us();
        log.lock().expect("log").admitted.push((from, call.cost.get(Kind::Tokens)));
        let slot_key = slot.map(|at| call.candidates[at].leases.clone());
        let limited = call.scopes.iter().filter(|scope| scope.concurrency.is_some());
        let leases = limited.map(|scope| scope.leases.clone()).chain(slot_key.clone()).collect();
        let renewal = Renewal { id: call.id, leases };
        let ends = Instant::now() + takes;
        while Instant::now() + RENEWED < ends {
            sleep(RENEWED).await;
            // A store that is away is told of the lease when it is back.
            let _ = gateway.renew(std::slice::from_ref(&renewal), LEASE).await;
        }
        sleep_until(ends).await;
        log.lock().expect("log").in_flight.push((from, self.now_us(), slot.unwrap_or(0)));
        let settle =
            Settle { id: call.id, actual: call.cost, scopes: call.scopes, slot: slot_key, usage: None };
        gateway.settle(&settle).await.expect("settled or deferred");
    }
}

/// Runs the loads against a store that does what the script says.
async fn run(seed: u64, loads: Vec<Load>, script: Script) -> (Vec<Log>, Arc<Scene>) {
    let scene = Arc::new(Scene::new());
    let playing = tokio::spawn(scene.clone().play(script));
    let each = loads.into_iter().zip(seed * 100..);
    let loads: Vec<_> = each.map(|(load, seed)| tokio::spawn(scene.clone().load(load, seed))).collect();
    let mut logs = Vec::new();
    for load in loads {
        logs.push(load.await.expect("load"));
    }
    playing.await.expect("script");
    assert!(scene.gateways.iter().all(|gateway| gateway.status().local_decisions > 0), "each decided alone");
    assert_eq!(logs.iter().map(|log| log.failed).sum::<usize>(), 0, "an outage fails no request");
    (logs, scene)
}

fn per_minute(units: u64) -> Bucket {
    bucket(units, units, Duration::from_secs(60)).expect("a bucket")
}

/// Requests, tokens and requests in flight of a tenant each, `times` as many as the limits allow or a little less.
async fn holds(seed: u64, times: f64, script: Script) {
    let (requests, all_tokens) = (per_minute(300), per_minute(12_000));
    let mut crowd = scope("c");
    crowd.concurrency = Some(8);
    let loads = vec![
        Load::of(limited("a", Kind::Requests, Some(requests)), 10.0 * times),
        Load { cost: (20, 70), ..Load::of(limited("b", Kind::Tokens, Some(all_tokens)), 9.0 * times) },
        Load { takes: (300, 2000), long: 10, ..Load::of(crowd, 8.0 * times) },
    ];
    let (logs, _) = run(seed, loads, script).await;
    let beyond = (logs[0].beyond(&requests), logs[1].beyond(&all_tokens));
    assert!(beyond.0 < ROUNDING && beyond.1 < ROUNDING, "seed {seed}: {beyond:?} beyond the limits");
    let most = logs[2].most_in_flight(0);
    assert!(most <= 8, "seed {seed}: {most} in flight of 8");
    if times > 1.0 {
        let admitted = logs[1].units() as f64 / (12_000.0 + 200.0 * LENGTH);
        assert!(admitted > 0.97, "seed {seed}: only {admitted} of what the limit allows");
    }
}

#[tokio::test(start_paused = true)]
async fn limits_hold_while_the_store_is_away_and_when_it_is_back() {
    for seed in 0..SEEDS {
        for times in [0.7, 4.0] {
            holds(seed, times, goes(1, 0.0, 15.0)).await;
            holds(seed, times, vec![(10.0, State::Refuses), (20.0, State::Serves)]).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn limits_hold_when_the_store_comes_and_goes() {
    for seed in 0..SEEDS {
        // Back for less time than a return takes, and for a little more.
        holds(seed, 4.0, goes(6, 3.0, 0.7)).await;
        holds(seed, 4.0, goes(3, 5.0, 2.1)).await;
    }
}

/// It would be the ninth lease. The refusal tells how long that may last.
#[tokio::test(start_paused = true)]
async fn who_held_none_of_a_full_limit_gets_its_share_after_the_time_of_a_lease() {
    let scene = Scene::new();
    let mut crowd = scope("c");
    crowd.concurrency = Some(8);
    let ask = async |gateway: usize| {
        let call = Acquire { lease_ttl: LEASE, ..call([crowd.clone()]) };
        scene.gateways[gateway].acquire(&call).await.expect("decided").outcome
    };
    for _ in 0..8 {
        assert_eq!(ask(0).await, Outcome::Granted { slot: None });
    }
    assert!(matches!(ask(3).await, Outcome::Limited { .. }));
    scene.state.send_replace(State::Refuses);
    let Outcome::Limited { wait: Some(wait) } = ask(3).await else { panic!("let in beside eight") };
    assert_eq!(wait, LEASE);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(ask(3).await, Outcome::Limited { wait: Some(LEASE - Duration::from_secs(5)) });
    sleep(wait - Duration::from_secs(5)).await;
    let shares = [ask(3).await, ask(3).await];
    assert_eq!(shares, [Outcome::Granted { slot: None }; 2]);
    assert_eq!(
        ask(3).await,
        Outcome::Limited { wait: Some(LEASE) },
        "its leases are renewed, so this is a bound"
    );
}

/// The store may have given any of the candidates, and the gateway another one.
#[tokio::test(start_paused = true)]
async fn a_grant_whose_answer_was_lost_leaves_no_slot_taken() {
    for seconds in [0, 5] {
        for settled_before in [false, true] {
            let scene = Scene::new();
            let slots = ["one", "two"].map(|name| candidate(name, 8));
            let ask = |gateway: usize, limit: Option<Bucket>| {
                let asked = Acquire {
                    candidates: slots.to_vec(),
                    lease_ttl: LEASE,
                    ..call([limited("acme", Kind::Requests, limit)])
                };
                let gateway = scene.gateways[gateway].clone();
                async move { (gateway.acquire(&asked).await.expect("decided").outcome, asked) }
            };
            let plenty = || bucket(1000, 0, Duration::from_secs(7 * 24 * 3600));
            let settle = async |(outcome, asked): (Outcome, Acquire)| {
                let Outcome::Granted { slot } = outcome else { return };
                let slot = slot.map(|at| asked.candidates[at].leases.clone());
                let end =
                    Settle { id: asked.id, actual: asked.cost, scopes: asked.scopes, slot, usage: None };
                scene.gateways[0].settle(&end).await.expect("settled or deferred");
            };
            scene.state.send_replace(State::Mute);
            // Some are decided alone and granted, others refused.
            let granted = [ask(0, plenty()).await, ask(0, plenty()).await];
            let refused = ask(0, bucket(0, 0, Duration::from_secs(60))).await;
            assert!(!matches!(refused.0, Outcome::Granted { .. }));
            scene.state.send_replace(State::Refuses);
            sleep(Duration::from_secs(seconds)).await;
            let mut open = Some(granted);
            if settled_before {
                for one in open.take().into_iter().flatten() {
                    settle(one).await;
                }
            }
            scene.state.send_replace(State::Serves);
            // The one that asks afterwards too: while it joins, it asks for its share only.
            for gateway in &scene.gateways {
                while gateway.status().phase != Phase::Closed || gateway.status().pending > 0 {
                    sleep(Duration::from_millis(50)).await;
                }
            }
            for one in open.into_iter().flatten() {
                settle(one).await;
            }
            let mut free = 0;
            while matches!(ask(1, plenty()).await.0, Outcome::Granted { slot: Some(_) }) {
                free += 1;
            }
            assert_eq!(free, 16, "after {seconds} s, settled before its end: {settled_before}");
        }
    }
}

/// The store remembers for ten minutes what it has settled.
#[tokio::test(start_paused = true)]
async fn a_settlement_whose_answer_was_lost_counts_once_however_long_the_store_is_away() {
    for (minutes, lost) in [(1, 0), (9, 1), (11, 1), (60, 1)] {
        let scene = Scene::new();
        let limit = limited("acme", Kind::Tokens, bucket(1000, 0, Duration::from_secs(7 * 24 * 3600)));
        let call = tokens([limit.clone()], 100);
        let gateway = &scene.gateways[0];
        assert!(granted(&gateway.acquire(&call).await.expect("decided")));
        scene.state.send_replace(State::Mute);
        let usage = Usage {
            record: Key::usage("acme", "2026-11-30"),
            model: "m".into(),
            tally: Tally { requests: 1, ..Tally::default() },
        };
        let settle = Settle {
            id: call.id,
            actual: Cost::of_request(40, 0, 0),
            scopes: call.scopes.clone(),
            slot: None,
            usage: Some(usage.clone()),
        };
        gateway.settle(&settle).await.expect("deferred");
        scene.state.send_replace(State::Refuses);
        sleep(Duration::from_secs(60 * minutes)).await;
        scene.state.send_replace(State::Serves);
        while gateway.status().phase != Phase::Closed || gateway.status().pending > 0 {
            sleep(Duration::from_millis(50)).await;
        }
        let stands = gateway.peek(&call.scopes).await.expect("peek");
        assert_eq!(stands[0].remaining, 960, "after {minutes} minutes");
        let lines = gateway.usage(std::slice::from_ref(&usage.record)).await.expect("usage");
        assert_eq!(lines[0], [("m".to_owned(), usage.tally)], "after {minutes} minutes");
        assert_eq!(gateway.status().lost, lost, "after {minutes} minutes");
    }
}

/// A waiting call asks again under its id.
#[tokio::test(start_paused = true)]
async fn what_the_store_refuses_while_a_gateway_joins_is_decided_anew_when_asked_again() {
    let scene = Scene::new();
    let limit = limited("acme", Kind::Requests, bucket(8, 0, Duration::from_secs(60)));
    let [mut held, waiting, next, last] = std::array::from_fn(|_| call([limit.clone()]));
    held.cost = Cost::new([8, 0, 0, 0, 0]);
    let ask = async |gateway: usize, call: &Acquire| {
        granted(&scene.gateways[gateway].acquire(call).await.expect("decided"))
    };
    assert!(ask(0, &held).await);
    // The other one finds out by itself, and has never seen that limit.
    scene.state.send_replace(State::Refuses);
    while scene.gateways[3].status().phase != Phase::Open {
        sleep(Duration::from_millis(10)).await;
    }
    scene.state.send_replace(State::Serves);
    while scene.gateways[3].status().phase != Phase::Joining {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(!ask(3, &waiting).await && !ask(3, &waiting).await, "its share has room, the store has none");
    let half = Settle {
        id: held.id,
        actual: Cost::new([4, 0, 0, 0, 0]),
        scopes: held.scopes.clone(),
        slot: None,
        usage: None,
    };
    assert!(scene.gateways[0].settle(&half).await.expect("settled").applied);
    assert!(ask(3, &waiting).await && ask(3, &next).await, "its share");
    assert!(!ask(3, &last).await, "more than its share, though the store has room");
    while scene.gateways[3].status().phase != Phase::Closed {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(ask(3, &last).await);
}

/// A gateway without traffic cannot detect the outage by its calls, and would otherwise be the first to ask.
#[tokio::test(start_paused = true)]
async fn a_gateway_without_traffic_finds_out_too() {
    for seed in 0..SEEDS {
        let limit = per_minute(300);
        let load = Load {
            to: |at| match at {
                // All have seen that the limit is used up.
                ..8.0 => 0..4,
                ..16.5 => 0..3,
                _ => 3..4,
            },
            ..Load::of(limited("a", Kind::Requests, Some(limit)), 40.0)
        };
        let (logs, scene) = run(seed, vec![load], goes(1, 0.0, 8.0)).await;
        let beyond = logs[0].beyond(&limit);
        assert!(beyond < ROUNDING, "seed {seed}: {beyond} beyond the limit");
        assert_eq!(scene.gateways[3].status().opened, 1);
    }
}

/// Fractions of a unit drain before they are reported. The rest counts.
#[tokio::test(start_paused = true)]
async fn a_slow_limit_that_is_first_used_in_an_outage_holds() {
    for seed in 0..SEEDS {
        let limit = bucket(20, 1, Duration::from_secs(60)).expect("a bucket");
        let load = Load { from: 9.0, ..Load::of(limited("a", Kind::Requests, Some(limit)), 20.0) };
        let (logs, _) = run(seed, vec![load], goes(1, 0.0, 8.0)).await;
        let beyond = logs[0].beyond(&limit);
        assert!(beyond < ROUNDING, "seed {seed}: {beyond} beyond the limit");
        assert_eq!(logs[0].units(), 20);
    }
}

/// Two of eight backends, which are asked for from the middle of an outage until long after it.
#[tokio::test(start_paused = true)]
async fn slots_of_backends_hold_when_the_store_is_back() {
    for seed in 0..SEEDS {
        // A bound that a part of the candidates alone would never meet.
        let bound = Some(Bound { millionths: 800_000, elsewhere: 0, estimate: 16 });
        let candidates = ["one", "two"].map(|name| Candidate { bound, ..candidate(name, 8) });
        let load = Load {
            candidates: candidates.to_vec(),
            from: 9.0,
            takes: (300, 2000),
            long: 10,
            ..Load::of(scope("a"), 40.0)
        };
        let (logs, _) = run(seed, vec![load], goes(1, 0.0, 8.0)).await;
        assert_eq!([logs[0].most_in_flight(0), logs[0].most_in_flight(1)], [8, 8], "seed {seed}");
    }
}
