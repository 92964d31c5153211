//! What is reserved and not yet settled, and the worker that settles and renews it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use smallvec::SmallVec;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weir_ratelimit::deny_cache::DenyCache;
use weir_ratelimit::fallback::LiveGateways;
use weir_ratelimit::quota_prefetch::QuotaPrefetch;
use weir_ratelimit::reservation::{LeaseBook, Leases};
use weir_ratelimit::waiting::Waiting;
use weir_ratelimit::{AnyLimiter, Candidate, Fallback, Key, LimitStack, Limiter, OwnerId, Settle, Trouble};

use super::estimates::Estimates;
use crate::metrics::Metrics;

/// How long a lease lives without renewal: 15 s; it is renewed every 5 s.
pub const LEASE_TTL: Duration = Duration::from_secs(15);

/// Settlements that may wait for the worker.
const QUEUE: usize = 65_536;
/// Settlements under way at once.
const CONCURRENT: usize = 256;
/// Attempts at one settlement; it is idempotent, so an unknown outcome is simply tried again.
const ATTEMPTS: u32 = 6;
/// Lost leases taken again at once.
const RETAKES: usize = 64;

/// At the end of the process: for what was decided while the limit store was away.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// Owns what is reserved and not yet settled.
#[derive(Debug)]
pub struct Ledger {
    /// Decides limits for the cluster, and this gateway's share of them while the cluster's store is away.
    pub limiter: Fallback<QuotaPrefetch<AnyLimiter>>,
    /// Who waits for them.
    pub waiting: Waiting,
    /// Refusals that need not be asked for again.
    pub denials: DenyCache,
    /// What requests will probably cost.
    pub estimates: Estimates,
    pub(super) metrics: Metrics,
    pub(super) holder: OwnerId,
    pub(super) queue: mpsc::Sender<Job>,
    pub(super) leases: LeaseBook,
}

/// The worker's end of a ledger.
#[derive(Debug)]
pub struct LedgerWorker {
    ledger: Arc<Ledger>,
    queue: mpsc::Receiver<Job>,
}

/// What a reservation hands to the worker.
#[derive(Debug)]
pub(super) enum Job {
    /// It ended; each is made after the one before it, and once, however often it is tried. With a credit, less was
    /// used than reserved: somebody who waits for a bucket may fit then.
    Settle(Settles, Credit),
    /// The same for one that ended while it was asked for: afterwards the slots are freed that the call may have taken.
    Cancel(Settles, Box<(Uuid, Vec<Key>)>),
    /// It goes on without this slot, or this lease of an account.
    Release(Uuid, Key),
}

/// Settlements that belong together.
pub(super) type Settles = SmallVec<[Box<Settle>; 1]>;

/// Whether a settlement gives something back.
pub(super) type Credit = bool;

impl Job {
    /// The lease sets in which one more lease is free afterwards.
    fn leases(&self) -> SmallVec<[&Key; 4]> {
        match self {
            Job::Settle(settles, _) => {
                let scopes = settles.iter().flat_map(|settle| &settle.scopes);
                let leases = scopes.filter(|s| s.concurrency.is_some()).map(|s| &s.leases);
                leases.chain(settles.iter().filter_map(|settle| settle.slot.as_ref())).collect()
            }
            Job::Cancel(settles, perhaps) => {
                let scopes = settles.iter().flat_map(|settle| &settle.scopes);
                let leases = scopes.filter(|s| s.concurrency.is_some()).map(|s| &s.leases);
                leases.chain(&perhaps.1).collect()
            }
            Job::Release(_, slot) => smallvec::smallvec![slot],
        }
    }

    /// The buckets that have more room afterwards.
    fn records(&self) -> SmallVec<[&Key; 4]> {
        match self {
            Job::Settle(settles, true) | Job::Cancel(settles, _) => {
                settles.iter().flat_map(|settle| &settle.scopes).map(|s| &s.record).collect()
            }
            Job::Settle(_, false) | Job::Release(..) => SmallVec::new(),
        }
    }
}

impl Ledger {
    /// A ledger and the worker that must be run for it; its leases bear the mark of `holder`. Needs a tokio runtime.
    pub fn new(
        limiter: AnyLimiter,
        holder: OwnerId,
        gateways: LiveGateways,
        metrics: Metrics,
    ) -> (Arc<Self>, LedgerWorker) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let LimitStack { waiting, deny_cache, limiter } = LimitStack::new(limiter, gateways);
        let ledger = Arc::new(Self {
            limiter,
            waiting,
            denials: deny_cache,
            estimates: Estimates::default(),
            metrics,
            holder,
            queue: sender,
            leases: LeaseBook::default(),
        });
        (ledger.clone(), LedgerWorker { ledger, queue })
    }

    /// The store has freed a lease: a request that waits, here or at another gateway, may take it.
    pub(super) fn gave_back(&self, key: &Key) {
        let held = self.leases.count(key);
        self.waiting.gave_back(key, held, self.limiter.gateways());
    }

    /// Reservations that hold leases now: one for each request, and where accounts are limited for each later attempt.
    pub fn open_leases(&self) -> usize {
        self.leases.len()
    }
}

impl LedgerWorker {
    /// Settles and renews until `shutdown`, then settles what is queued and ends.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tasks = tokio::task::JoinSet::new();
        let mut renewals = tokio::time::interval(LEASE_TTL / 3);
        renewals.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                settle = self.queue.recv(), if tasks.len() < CONCURRENT => match settle {
                    Some(job) => {
                        tasks.spawn(with_retries(self.ledger.clone(), job));
                    }
                    None => break,
                },
                Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
                _ = renewals.tick() => { tasks.spawn(renew(self.ledger.clone())); }
                () = shutdown.cancelled() => break,
            }
        }
        self.queue.close();
        while let Some(job) = self.queue.recv().await {
            if tasks.len() >= CONCURRENT {
                tasks.join_next().await;
            }
            tasks.spawn(with_retries(self.ledger.clone(), job));
        }
        while tasks.join_next().await.is_some() {}
        let untold = self.ledger.limiter.flush(FLUSH_MAX).await;
        if tokio::time::timeout(FLUSH_MAX, self.ledger.limiter.store().flush()).await.is_err() {
            tracing::warn!("the limit store was not told all that was settled out of quota");
        }
        self.ledger.metrics.settlements_lost.inc_by(untold as u64);
    }
}

async fn renew(ledger: Arc<Ledger>) {
    let renewals = ledger.leases.renewals();
    if renewals.is_empty() {
        return;
    }
    match ledger.limiter.renew(&renewals, LEASE_TTL).await {
        Ok(lost) => {
            // A request that ended meanwhile has released its own; only those still open have lost one.
            let lost: Vec<(Uuid, Leases)> =
                lost.iter().filter_map(|id| Some((*id, ledger.leases.leases_of(*id)?))).collect();
            if !lost.is_empty() {
                ledger.metrics.leases_lost.inc_by(lost.len() as u64);
                let lost_now = lost.len();
                tracing::warn!(
                    lost = lost_now,
                    "leases ran out before they were renewed; their requests go on"
                );
                let taking = lost.into_iter().map(|(id, leases)| retake(&ledger, id, leases));
                futures_util::stream::iter(taking).for_each_concurrent(RETAKES, |taken| taken).await;
            }
        }
        Err(error) => tracing::warn!(%error, held = renewals.len(), "leases were not renewed"),
    }
}

/// A request goes on although its leases ran out, or somebody freed them: it is counted again, also above the maximum,
/// so that no other request is admitted in its place. The next ones wait until the count has come down.
async fn retake(ledger: &Ledger, id: Uuid, leases: Leases) {
    for key in &leases {
        let place = [Candidate { leases: key.clone(), max_concurrency: u32::MAX, bound: None }];
        match ledger.limiter.move_slot(id, None, &place, LEASE_TTL).await {
            Ok(_) => ledger.metrics.leases_retaken.inc(),
            // The next renewal finds it lost again.
            Err(error) => {
                tracing::debug!(%error, reservation = %id, "a lease was not taken again");
                return;
            }
        };
    }
    // It may have ended meanwhile, before its leases were taken again.
    let ended = ledger.leases.leases_of(id).is_none();
    if ended && let Err(error) = ledger.limiter.release(id, &leases).await {
        tracing::debug!(%error, reservation = %id, "a lease of an ended request runs out by itself");
    }
}

async fn with_retries(ledger: Arc<Ledger>, job: Job) {
    let limiter = &ledger.limiter;
    let mut pause = Duration::from_millis(20);
    for attempt in 1..=ATTEMPTS {
        let done = match &job {
            Job::Settle(settles, _) => settle_all(&ledger, settles).await,
            Job::Cancel(settles, perhaps) => match settle_all(&ledger, settles).await {
                // Later: from now on the call is refused if it has not arrived yet.
                Ok(()) => limiter.release(perhaps.0, &perhaps.1).await,
                failed => failed,
            },
            Job::Release(id, slot) => limiter.release(*id, std::slice::from_ref(slot)).await,
        };
        match done {
            Ok(()) => {
                // First, so that those who are woken ask the store.
                let (leases, records) = (job.leases(), job.records());
                ledger.denials.given_back(leases.iter().chain(&records).copied());
                ledger.waiting.released(records);
                leases.into_iter().for_each(|key| ledger.gave_back(key));
                return;
            }
            Err(error) if error.trouble() != Trouble::Caller && attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "the limit store is asked again");
                tokio::time::sleep(pause).await;
                pause *= 3;
            }
            Err(error) => {
                match &job {
                    Job::Settle(settles, _) | Job::Cancel(settles, _) => {
                        ledger.metrics.settlements_lost.inc();
                        let id = settles.last().map(|settle| settle.id).unwrap_or_default();
                        tracing::error!(%error, reservation = %id, "settlement lost: the reservation stands");
                    }
                    Job::Release(id, _) => {
                        tracing::warn!(%error, reservation = %id, "a slot was not given back; its lease runs out");
                    }
                }
                return;
            }
        }
    }
}

async fn settle_all(ledger: &Ledger, settles: &[Box<Settle>]) -> Result<(), weir_ratelimit::Error> {
    for settle in settles {
        ledger.limiter.settle(settle).await?;
    }
    Ok(())
}
