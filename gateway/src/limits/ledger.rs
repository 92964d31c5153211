//! The ledger of open reservations, and the worker that settles and renews them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use smallvec::SmallVec;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weir_ratelimit::deny_cache::DenyCache;
use weir_ratelimit::fallback::LiveGateways;
use weir_ratelimit::quota_prefetch::QuotaPrefetch;
use weir_ratelimit::reservation::{LeaseBook, Leases};
use weir_ratelimit::waiting::Waiting;
use weir_ratelimit::{
    AnyLimiter, Candidate, Charge, Error, Fallback, Key, LimitStack, Limiter, OwnerId, Settle, Trouble,
};

use super::estimates::Estimates;
use crate::control::traffic_report::TrafficCounter;
use crate::metrics::Metrics;

/// How long a lease lives without renewal: 15 s; it is renewed every 5 s.
pub const LEASE_TTL: Duration = Duration::from_secs(15);

/// Settlements in the queue of the worker.
const QUEUE: usize = 65_536;
/// Concurrent settlements.
const CONCURRENT: usize = 256;
/// Attempts of one settlement. Settlements are idempotent, so an unknown result is tried again.
const ATTEMPTS: u32 = 6;
/// Concurrent calls that take stale leases again.
const RETAKES: usize = 64;

/// The time at the end of the process to report decisions made during a store outage.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// The open reservations of this gateway. Cheap to clone.
#[derive(Debug)]
pub struct Ledger {
    /// Decides limits for the cluster, and with the local share during a store outage.
    pub limiter: Fallback<QuotaPrefetch<AnyLimiter>>,
    /// The queues of waiting requests.
    pub waiting: Waiting,
    /// The deny cache.
    pub denials: DenyCache,
    /// Estimates of the costs of requests.
    pub estimates: Estimates,
    pub(super) metrics: Arc<Metrics>,
    /// Where it is counted what requests used of each limit.
    traffic: Arc<TrafficCounter>,
    pub(super) holder: OwnerId,
    queue: mpsc::Sender<Job>,
    /// Whether jobs are done by whoever has one: the limiter answers at once.
    at_once: bool,
    pub(super) leases: LeaseBook,
}

/// The worker of a ledger.
#[derive(Debug)]
pub struct LedgerWorker {
    ledger: Arc<Ledger>,
    queue: mpsc::Receiver<Job>,
}

/// A task of the worker.
#[derive(Debug)]
pub(super) enum Job {
    /// Settle a reservation. The settlements are made in order and take effect once, however often they are tried. A
    /// credit says that less was used than reserved, so a waiting request may fit.
    Settle(Settles, Credit),
    /// Settle a reservation that ended during the limiter call, then free the slots that the call may have taken.
    Cancel(Settles, Box<(Uuid, Vec<Key>)>),
    /// Release a slot or a lease of a provider account while the request continues.
    Release(Uuid, Key),
    /// Give back what the steps of a stream charged beyond its usage.
    GiveBack(Vec<Charge>),
}

/// Settlements that belong together.
pub(super) type Settles = SmallVec<[Box<Settle>; 1]>;

/// Whether a settlement makes room in buckets.
pub(super) type Credit = bool;

impl Job {
    /// The lease sets in which one more lease is free after the job.
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
            Job::GiveBack(_) => SmallVec::new(),
        }
    }

    /// Whether the job may be repeated after this error. Giving back has no id that the store would recognise, so it
    /// is not repeated after an unknown outcome: too much may stay charged, never too little.
    fn may_repeat(&self, error: &Error) -> bool {
        match error.trouble() {
            Trouble::Caller => false,
            Trouble::Unknown => !matches!(self, Job::GiveBack(_)),
            Trouble::Away | Trouble::Keys => true,
        }
    }

    /// What the job charges in the end, to which scopes.
    fn charged(&self) -> impl Iterator<Item = &Settle> {
        let settles = match self {
            Job::Settle(settles, _) | Job::Cancel(settles, _) => &settles[..],
            Job::Release(..) | Job::GiveBack(_) => &[],
        };
        settles.iter().map(AsRef::as_ref)
    }

    /// The buckets that have more room after the job.
    fn records(&self) -> SmallVec<[&Key; 4]> {
        match self {
            Job::Settle(settles, true) | Job::Cancel(settles, _) => {
                settles.iter().flat_map(|settle| &settle.scopes).map(|s| &s.record).collect()
            }
            Job::GiveBack(charges) => charges.iter().map(|charge| &charge.record).collect(),
            Job::Settle(_, false) | Job::Release(..) => SmallVec::new(),
        }
    }
}

impl Ledger {
    /// A ledger and its worker, which must be run. Leases have the owner id `holder`. Needs a tokio runtime.
    pub fn new(
        limiter: AnyLimiter,
        holder: OwnerId,
        gateways: LiveGateways,
        metrics: Arc<Metrics>,
        traffic: Arc<TrafficCounter>,
    ) -> (Arc<Self>, LedgerWorker) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let at_once = limiter.is_here();
        let LimitStack { waiting, deny_cache, limiter } = LimitStack::new(limiter, gateways);
        let ledger = Arc::new(Self {
            limiter,
            waiting,
            denials: deny_cache,
            estimates: Estimates::default(),
            metrics,
            traffic,
            holder,
            queue: sender,
            at_once,
            leases: LeaseBook::default(),
        });
        (ledger.clone(), LedgerWorker { ledger, queue })
    }

    /// Does a job, or has the worker do it. False if there is no room in its queue.
    pub(super) fn hand_over(&self, job: Job) -> bool {
        if self.at_once && try_once(self, &job).now_or_never().is_some_and(|done| done.is_ok()) {
            self.done(&job);
            return true;
        }
        self.queue.try_send(job).is_ok()
    }

    /// Lets those know of a job for whom there is room now.
    fn done(&self, job: &Job) {
        // Before waking the queue, so that woken requests ask the store.
        let (leases, records) = (job.leases(), job.records());
        self.denials.given_back(leases.iter().chain(&records).copied());
        job.charged().for_each(|settle| self.traffic.consumed(&settle.scopes, &settle.actual));
        self.waiting.released(records);
        leases.into_iter().for_each(|key| self.gave_back(key));
    }

    /// Records that a lease was freed, so that a waiting request, here or at another gateway, may take it.
    pub(super) fn gave_back(&self, key: &Key) {
        let held = self.leases.count(key);
        self.waiting.gave_back(key, held, self.limiter.gateways());
    }

    /// The reservations with leases: one per request, and with limited accounts one per further attempt.
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
            tracing::warn!("settlements of prefetched quota not reported to the limit store completely");
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
            // A request that ended meanwhile has released its leases; only open ones lost them.
            let lost: Vec<(Uuid, Leases)> =
                lost.iter().filter_map(|id| Some((*id, ledger.leases.leases_of(*id)?))).collect();
            if !lost.is_empty() {
                ledger.metrics.stale_leases.inc_by(lost.len() as u64);
                let lost_now = lost.len();
                tracing::warn!(
                    lost = lost_now,
                    "leases expired before they were renewed; their requests continue"
                );
                let taking = lost.into_iter().map(|(id, leases)| retake(&ledger, id, leases));
                futures_util::stream::iter(taking).for_each_concurrent(RETAKES, |taken| taken).await;
            }
        }
        Err(error) => tracing::warn!(%error, leases = renewals.len(), "leases not renewed"),
    }
}

/// Takes the stale leases of a running request again, even above the maximum, so that no other request is admitted in its
/// place. New requests wait until the surplus has ended.
async fn retake(ledger: &Ledger, id: Uuid, leases: Leases) {
    for key in &leases {
        let place = [Candidate { leases: key.clone(), max_concurrency: u32::MAX, bound: None }];
        match ledger.limiter.move_slot(id, None, &place, LEASE_TTL).await {
            Ok(_) => ledger.metrics.leases_retaken.inc(),
            // The next renewal finds the lease missing again.
            Err(error) => {
                tracing::debug!(%error, reservation = %id, "stale lease not taken again");
                return;
            }
        };
    }
    // The request may have ended before its leases were taken again.
    let ended = ledger.leases.leases_of(id).is_none();
    if ended && let Err(error) = ledger.limiter.release(id, &leases).await {
        tracing::debug!(%error, reservation = %id, "lease of an ended request not released; it expires");
    }
}

async fn with_retries(ledger: Arc<Ledger>, job: Job) {
    let mut pause = Duration::from_millis(20);
    for attempt in 1..=ATTEMPTS {
        match try_once(&ledger, &job).await {
            Ok(()) => return ledger.done(&job),
            Err(error) if job.may_repeat(&error) && attempt < ATTEMPTS => {
                tracing::debug!(%error, attempt, "call of the limit store repeated");
                tokio::time::sleep(pause).await;
                pause *= 3;
            }
            Err(error) => {
                match &job {
                    Job::Settle(settles, _) | Job::Cancel(settles, _) => {
                        ledger.metrics.settlements_lost.inc();
                        let id = settles.last().map(|settle| settle.id).unwrap_or_default();
                        tracing::error!(%error, reservation = %id, "settlement lost; the reservation stays charged");
                    }
                    Job::Release(id, _) => {
                        tracing::warn!(%error, reservation = %id, "slot not released; its lease expires");
                    }
                    Job::GiveBack(_) => {
                        tracing::warn!(%error, "what a stream was charged too much stays charged");
                    }
                }
                return;
            }
        }
    }
}

async fn try_once(ledger: &Ledger, job: &Job) -> Result<(), Error> {
    let limiter = &ledger.limiter;
    match job {
        Job::Settle(settles, _) => settle_all(ledger, settles).await,
        Job::Cancel(settles, perhaps) => match settle_all(ledger, settles).await {
            // Retried later. The store refuses the original call if it arrives after this one.
            Ok(()) => limiter.release(perhaps.0, &perhaps.1).await,
            failed => failed,
        },
        Job::Release(id, slot) => limiter.release(*id, std::slice::from_ref(slot)).await,
        Job::GiveBack(charges) => limiter.charge(charges).await.map(drop),
    }
}

async fn settle_all(ledger: &Ledger, settles: &[Box<Settle>]) -> Result<(), Error> {
    for settle in settles {
        ledger.limiter.settle(settle).await?;
    }
    Ok(())
}
