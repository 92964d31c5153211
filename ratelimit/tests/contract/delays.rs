//! Exactly means exactly: what several gateways admit under one limit while calls of any of them are late by any time.
//!
//! The guarantee: all gateways together admit no more than the limit. A gateway that has heard nothing from the store
//! for [`SILENCE`] decides alone; only beside gateways that the store still answers may that be more than the limit,
//! by no more than its share, the limit divided by the number of gateways and rounded down.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use weir_ratelimit::fallback::Phase;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_ratelimit::usage::UsageLines;
use weir_ratelimit::*;

use crate::harness::*;

/// What ships.
const SILENCE: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// The longest time by which one call is late, although others are answered.
const DELAY_MAX_MS: u64 = 60_000;
/// Something else is asked, and answered, that often.
const HEARD_EVERY_MS: u64 = 150;
/// When all asking ends.
const ASKED_WITHIN_MS: u64 = 3000;

/// A gateway's way to the store, on which calls are late.
struct Way {
    store: Arc<MemoryLimiter>,
    /// Nothing passes in either direction while it is cut.
    cut: watch::Receiver<bool>,
    /// By how much each reservation is late, and whether before the store decides or after.
    late: HashMap<ReservationId, (Duration, bool)>,
    first_asked: Mutex<HashMap<ReservationId, Instant>>,
    /// Calls that wait, and since when nothing was heard.
    silence: Arc<Mutex<(usize, Option<Instant>)>>,
}

impl Way {
    async fn call<T, F>(
        &self,
        id: Option<ReservationId>,
        run: impl FnOnce(Arc<MemoryLimiter>) -> F + Send + 'static,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>> + Send,
        T: Send + 'static,
    {
        let asked = Instant::now();
        let (late, before) = id.and_then(|id| self.late.get(&id).copied()).unwrap_or_default();
        let first =
            id.map_or(asked, |id| *self.first_asked.lock().expect("first").entry(id).or_insert(asked));
        let (store, mut cut) = (self.store.clone(), self.cut.clone());
        let served = tokio::spawn(async move {
            let mut whole = async || cut.wait_for(|cut| !*cut).await.map(drop).map_err(|_| Error::Lost);
            whole().await?;
            if before {
                sleep_until(first + late).await;
            }
            let answer = run(store).await;
            sleep_until(first + late).await;
            whole().await?;
            answer
        });
        tokio::pin!(served);
        {
            let mut silence = self.silence.lock().expect("silence");
            silence.0 += 1;
            silence.1.get_or_insert(asked);
        }
        loop {
            let since = self.silence.lock().expect("silence").1.unwrap_or(asked);
            let until = (since + SILENCE).max(asked + SILENCE / 20).min(asked + 3 * SILENCE);
            let answer = tokio::time::timeout_at(until, &mut served).await;
            let mut silence = self.silence.lock().expect("silence");
            if let Ok(answer) = answer {
                silence.0 -= 1;
                silence.1 = (silence.0 > 0).then(Instant::now);
                return answer.expect("served");
            }
            if silence.1.is_none_or(|now| now == since) || Instant::now() >= asked + 3 * SILENCE {
                silence.0 -= 1;
                let over = silence.1.is_some_and(|since| Instant::now() >= since + SILENCE);
                return Err(if over { Error::Timeout(SILENCE) } else { Error::Late });
            }
        }
    }
}

impl Limiter for Way {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        let (id, call) = (call.id, call.clone());
        self.call(Some(id), |store| async move { store.acquire(&call).await }).await
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        let (from, candidates) = (from.cloned(), candidates.to_vec());
        let moved = move |store: Arc<MemoryLimiter>| async move {
            store.move_slot(id, from.as_ref(), &candidates, lease_ttl).await
        };
        self.call(None, moved).await
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        let call = call.clone();
        self.call(None, |store| async move { store.settle(&call).await }).await
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        let renewals = renewals.to_vec();
        self.call(None, move |store| async move { store.renew(&renewals, lease_ttl).await }).await
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        let leases = leases.to_vec();
        self.call(None, move |store| async move { store.release(id, &leases).await }).await
    }

    async fn free_orphans(&self, owner: OwnerId, leases: &[Key]) -> Result<Option<u64>, Error> {
        let leases = leases.to_vec();
        self.call(None, move |store| async move { store.free_orphans(owner, &leases).await }).await
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        let charges = charges.to_vec();
        self.call(None, |store| async move { store.charge(&charges).await }).await
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let scopes = scopes.to_vec();
        self.call(None, |store| async move { store.peek(&scopes).await }).await
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        let records = records.to_vec();
        self.call(None, |store| async move { store.usage(&records).await }).await
    }
}

/// One request of a case.
#[derive(Debug, Clone)]
struct Asked {
    gateway: usize,
    at_ms: u64,
    late_ms: u64,
    /// Whether it is late on its way to the store, and not on the way back.
    before: bool,
}

/// For how long a gateway hears nothing.
#[derive(Debug, Clone)]
struct Cut {
    gateway: usize,
    at_ms: u64,
    for_ms: u64,
}

#[derive(Debug)]
struct Found {
    admitted: u64,
    /// Decisions without the store, by gateway.
    alone: Vec<u64>,
}

async fn play(limit: u64, gateways: usize, asked: &[Asked], cuts: &[Cut]) -> Found {
    let store = Arc::new(MemoryLimiter::new());
    let scopes: Scopes = [limited("acme", Kind::Requests, bucket(limit, 0, MINUTE))].into();
    let calls: Vec<Acquire> = asked.iter().map(|_| call(scopes.clone())).collect();
    let began = Instant::now();
    let (mut cut, mut fleet) = (Vec::new(), Vec::new());
    for gateway in 0..gateways {
        let (tell, told) = watch::channel(false);
        let own = asked.iter().zip(&calls).filter(|(asked, _)| asked.gateway == gateway);
        let late = own.map(|(asked, call)| (call.id, (Duration::from_millis(asked.late_ms), asked.before)));
        let way = Way {
            store: store.clone(),
            cut: told,
            late: late.collect(),
            first_asked: Mutex::default(),
            silence: Arc::default(),
        };
        fleet.push(Arc::new(Fallback::new(way, Arc::new(move || gateways as u32))));
        cut.push(tell);
    }
    let mut background = JoinSet::new();
    for gateway in &fleet {
        // What is asked about other limits meanwhile: the store serves.
        let (gateway, other) = (gateway.clone(), scope("other"));
        background.spawn(async move {
            loop {
                sleep(Duration::from_millis(HEARD_EVERY_MS)).await;
                let _ = gateway.peek(std::slice::from_ref(&other)).await;
            }
        });
    }
    for Cut { gateway, at_ms, for_ms } in cuts.iter().cloned() {
        let tell = cut[gateway].clone();
        background.spawn(async move {
            sleep_until(began + Duration::from_millis(at_ms)).await;
            tell.send_replace(true);
            sleep(Duration::from_millis(for_ms)).await;
            tell.send_replace(false);
        });
    }
    let mut requests = JoinSet::new();
    for (asked, call) in asked.iter().cloned().zip(calls) {
        let gateway = fleet[asked.gateway].clone();
        requests.spawn(async move {
            sleep_until(began + Duration::from_millis(asked.at_ms)).await;
            granted(&gateway.acquire(&call).await.expect("decided"))
        });
    }
    let mut admitted = requests.join_all().await.into_iter().filter(|granted| *granted).count() as u64;
    for gateway in &fleet {
        while gateway.status().phase != Phase::Closed || gateway.status().pending > 0 {
            sleep(Duration::from_millis(50)).await;
        }
    }
    // Who asks later finds what is left, and no second burst.
    for gateway in &fleet {
        for _ in 0..limit {
            admitted += u64::from(granted(&gateway.acquire(&call(scopes.clone())).await.expect("decided")));
        }
    }
    Found { admitted, alone: fleet.iter().map(|gateway| gateway.status().local_decisions).collect() }
}

fn asked(gateways: usize) -> impl Strategy<Value = Vec<Asked>> {
    let late = prop_oneof![3 => Just(0), 2 => 0..900_u64, 2 => 0..DELAY_MAX_MS];
    let one = (0..gateways, 0..ASKED_WITHIN_MS, late, any::<bool>())
        .prop_map(|(gateway, at_ms, late_ms, before)| Asked { gateway, at_ms, late_ms, before });
    prop::collection::vec(one, 20..200)
}

fn paused<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("a runtime").block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn late_calls_are_no_outage_and_exactly_the_limit_is_admitted(
        limit in 1_u64..80,
        (gateways, asked) in (2_usize..6).prop_flat_map(|gateways| (Just(gateways), asked(gateways)))
    ) {
        let found = paused(play(limit, gateways, &asked, &[]));
        prop_assert_eq!(found.admitted, limit, "{:?}", &found);
        prop_assert!(found.alone.iter().all(|alone| *alone == 0), "{:?}", &found);
    }

    #[test]
    fn who_hears_nothing_decides_its_share_and_nobody_more(
        limit in 1_u64..80,
        (gateways, asked, cuts) in (2_usize..6).prop_flat_map(|gateways| {
            let cut = (0..gateways, 0..ASKED_WITHIN_MS, 100..8000_u64)
                .prop_map(|(gateway, at_ms, for_ms)| Cut { gateway, at_ms, for_ms });
            (Just(gateways), asked(gateways), prop::collection::vec(cut, 1..5))
        })
    ) {
        let found = paused(play(limit, gateways, &asked, &cuts));
        // Cuts of one gateway may overlap and follow one another, and the silence before one counts.
        let deaf = |gateway| {
            let own = cuts.iter().filter(|cut| cut.gateway == gateway);
            let cut: u64 = own.map(|cut| cut.for_ms + HEARD_EVERY_MS).sum();
            u128::from(cut) >= SILENCE.as_millis()
        };
        for (gateway, alone) in found.alone.iter().enumerate() {
            prop_assert!(deaf(gateway) || *alone == 0, "gateway {} heard the store: {:?}", gateway, &found);
        }
        let share = limit / gateways as u64;
        let shares = (0..gateways).filter(|gateway| deaf(*gateway)).count() as u64 * share;
        prop_assert!(found.admitted <= limit + shares, "{:?}, a share is {}", &found, share);
    }
}

/// Passes bytes on in both directions, each piece late by up to so many milliseconds.
async fn slow_way(to: String, late_ms: fn(u64) -> u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    // Ends with the test's runtime.
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(&to).await.expect("a server");
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            for (mut from, mut into) in [(near_in, far_out), (far_in, near_out)] {
                tokio::spawn(async move {
                    let mut piece = vec![0; 1 << 16];
                    while let Ok(read @ 1..) = from.read(&mut piece).await {
                        let seed = ReservationId::new_v4().as_u128() as u64;
                        sleep(Duration::from_millis(late_ms(seed))).await;
                        if into.write_all(&piece[..read]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    format!("redis://{address}/")
}

/// The first gateway's way is slow, the second one's stalls now and then, the third one's is good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_limit_over_slow_connections_to_redis() {
    const LIMIT: u64 = 40;
    let server = Server::start().await;
    let direct = format!("127.0.0.1:{}", server.port());
    let ways: [fn(u64) -> u64; 3] =
        [|seed| 20 + seed % 130, |seed| if seed.is_multiple_of(5) { 450 } else { 0 }, |_| 0];
    let mut fleet = Vec::new();
    for late in ways {
        let url = slow_way(direct.clone(), late).await;
        let limiter = timeout(MINUTE, RedisLimiter::connect(&url, RedisOptions::default())).await;
        let limiter = limiter.expect("in time").expect("connected");
        fleet.push(Arc::new(Fallback::new(limiter, Arc::new(|| 3))));
    }
    for round in 0..5 {
        let scopes: Scopes = [limited(&format!("t{round}"), Kind::Requests, bucket(LIMIT, 0, MINUTE))].into();
        let mut requests = JoinSet::new();
        for n in 0..3 * LIMIT {
            let (gateway, call) = (fleet[n as usize % 3].clone(), call(scopes.clone()));
            requests.spawn(async move { granted(&gateway.acquire(&call).await.expect("decided")) });
        }
        let admitted = requests.join_all().await.into_iter().filter(|granted| *granted).count() as u64;
        assert_eq!(admitted, LIMIT, "round {round}");
    }
    for gateway in fleet {
        assert_eq!(gateway.status().local_decisions, 0);
    }
}
