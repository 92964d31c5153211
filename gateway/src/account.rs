//! Accounting, exactly once on every way out.
//!
//! An [`Admission`] exists from before the limiter is asked until the last byte went out. Whatever ends the
//! request ends the admission: it is settled with what was used by then, and dropping it is enough. `Drop` never
//! waits: it hands the settlement to the [`Ledger`]'s worker over a bounded channel and counts what does not fit
//! (those reservations stand at what was reserved, and their leases run out).

mod open;
mod slot;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use smallvec::SmallVec;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use weir_ratelimit::denials::Denials;
use weir_ratelimit::fallback::LiveGateways;
use weir_ratelimit::waiting::Waiting;
use weir_ratelimit::{
    AnyLimiter, Candidate, Cost, Fallback, Holder, Key, Kind, Limiter, Renewal, Scopes, Settle, Tally,
    Trouble, Usage,
};

use self::open::OpenLeases;
pub use self::slot::SlotLease;
use crate::calendar;
use crate::estimate::Estimates;
use crate::metrics::Metrics;
use crate::snapshot::LEASE_TTL;

/// Settlements that may wait for the worker.
const QUEUE: usize = 65_536;
/// Settlements under way at once.
const CONCURRENT: usize = 256;
/// Tries of one settlement; it is idempotent, so an unknown outcome is simply tried again.
const TRIES: u32 = 6;
/// Lost leases taken again at once.
const RETAKES: usize = 64;

/// At the end of the process: for what was decided while the limit store was away.
const FLUSH_MAX: Duration = Duration::from_secs(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Owns what is reserved and not yet settled.
#[derive(Debug)]
pub struct Ledger {
    /// Decides limits for the cluster, and this gateway's share of them while the cluster's store is away.
    pub limiter: Fallback<AnyLimiter>,
    /// Who waits for them.
    pub waiting: Waiting,
    /// Refusals that need not be asked for again.
    pub denials: Denials,
    /// What requests will probably cost.
    pub estimates: Estimates,
    metrics: Metrics,
    holder: Holder,
    queue: mpsc::Sender<Job>,
    leases: Mutex<OpenLeases>,
}

/// The worker's end of a ledger.
#[derive(Debug)]
pub struct LedgerWorker {
    ledger: Arc<Ledger>,
    queue: mpsc::Receiver<Job>,
}

/// What an admission hands to the worker.
#[derive(Debug)]
enum Job {
    /// It ended. With a credit, less was used than reserved: somebody who waits for a bucket may fit then.
    Settle(Box<Settle>, Credit),
    /// It goes on without this slot.
    Release(Uuid, Key),
}

/// Whether a settlement gives something back.
type Credit = bool;

impl Job {
    /// The lease sets that have a place more afterwards.
    fn leases(&self) -> SmallVec<[&Key; 4]> {
        match self {
            Job::Settle(settle, _) => {
                let leases = settle.scopes.iter().filter(|s| s.concurrency.is_some()).map(|s| &s.leases);
                leases.chain(&settle.slot).collect()
            }
            Job::Release(_, slot) => smallvec::smallvec![slot],
        }
    }

    /// The buckets that have more room afterwards.
    fn records(&self) -> SmallVec<[&Key; 4]> {
        match self {
            Job::Settle(settle, true) => settle.scopes.iter().map(|s| &s.record).collect(),
            Job::Settle(_, false) | Job::Release(..) => SmallVec::new(),
        }
    }
}

impl Ledger {
    /// A ledger and the worker that must be run for it; its leases bear the mark of `holder`. Needs a tokio runtime.
    pub fn new(
        limiter: AnyLimiter,
        holder: Holder,
        gateways: LiveGateways,
        metrics: Metrics,
    ) -> (Arc<Self>, LedgerWorker) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let limiter = Fallback::new(limiter, gateways);
        let ledger = Arc::new(Self {
            limiter,
            waiting: Waiting::default(),
            denials: Denials::default(),
            estimates: Estimates::default(),
            metrics,
            holder,
            queue: sender,
            leases: Mutex::default(),
        });
        (ledger.clone(), LedgerWorker { ledger, queue })
    }

    fn leases(&self) -> MutexGuard<'_, OpenLeases> {
        lock(&self.leases)
    }

    /// The store has freed a lease: somebody who waits, here or at another gateway, has a place.
    fn gave_back(&self, key: &Key) {
        let held = self.leases().at(key);
        self.waiting.gave_back(key, held, self.limiter.gateways());
    }

    /// Requests that hold leases now.
    pub fn open_leases(&self) -> usize {
        self.leases().len()
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
    let renewals: Vec<Renewal> =
        ledger.leases().iter().map(|(id, leases)| Renewal { id, leases: leases.clone() }).collect();
    if renewals.is_empty() {
        return;
    }
    match ledger.limiter.renew(&renewals, LEASE_TTL).await {
        Ok(lost) => {
            // A request that ended meanwhile has released its own; only those still open have lost one.
            let lost: Vec<(Uuid, SmallVec<[Key; 4]>)> = {
                let open = ledger.leases();
                lost.iter().filter_map(|id| Some((*id, open.get(*id)?.clone()))).collect()
            };
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
/// so that nobody is let in beside it. The next ones wait until the count has come down.
async fn retake(ledger: &Ledger, id: Uuid, leases: SmallVec<[Key; 4]>) {
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
    let ended = ledger.leases().get(id).is_none();
    if ended && let Err(error) = ledger.limiter.release(id, &leases).await {
        tracing::debug!(%error, reservation = %id, "a lease of an ended request runs out by itself");
    }
}

async fn with_retries(ledger: Arc<Ledger>, job: Job) {
    let limiter = &ledger.limiter;
    let mut pause = Duration::from_millis(20);
    for attempt in 1..=TRIES {
        let done = match &job {
            Job::Settle(settle, _) => limiter.settle(settle).await.map(|_| ()),
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
            Err(error) if error.trouble() != Trouble::Caller && attempt < TRIES => {
                tracing::debug!(%error, attempt, "the limit store is asked again");
                tokio::time::sleep(pause).await;
                pause *= 3;
            }
            Err(error) => {
                match &job {
                    Job::Settle(settle, _) => {
                        ledger.metrics.settlements_lost.inc();
                        tracing::error!(%error, reservation = %settle.id, "settlement lost: the reservation stands");
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

/// Tokens that a stream may be ahead of what it was charged for. What it generates beyond its reservation is charged
/// in steps of this size, so that a long answer weighs on its limits while it runs.
pub const STEP_TOKENS: u64 = 256;

/// Whom and what an admission is for.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The tenant's name.
    pub tenant: Arc<str>,
    /// The model's name.
    pub model: Arc<str>,
    /// Bytes of the prompt; `None` when they say little about its tokens.
    pub prompt_bytes: Option<u64>,
    /// Answers asked for, at least one.
    pub choices: u32,
}

/// A reservation and its leases, from before it is asked for to the end of the request.
#[derive(Debug)]
pub struct Admission {
    ledger: Arc<Ledger>,
    /// The reservation.
    pub id: Uuid,
    /// What the request is under.
    pub scopes: Scopes,
    /// What was reserved.
    pub reserved: Cost,
    actual: Cost,
    /// What was charged beyond the reservation while the answer streamed.
    stepped: Cost,
    /// Its day in the account of who used what: that of its admission.
    day: u64,
    /// What that account has of it.
    noted: Tally,
    subject: Subject,
    /// One, or two while a silent backend is not waited for alone.
    slots: SmallVec<[Key; 2]>,
    armed: bool,
}

impl Admission {
    /// Ready to ask. Dropped from here on, it cancels whatever the limiter may have granted: a caller that goes
    /// away while the limiter is asked leaves nothing behind.
    pub fn prepare(ledger: &Arc<Ledger>, scopes: Scopes, reserved: Cost, subject: Subject) -> Self {
        Self {
            ledger: ledger.clone(),
            id: ledger.holder.id(),
            day: calendar::day_of(SystemTime::now()),
            noted: Tally::default(),
            scopes,
            reserved,
            actual: Cost::default(),
            stepped: Cost::default(),
            subject,
            slots: SmallVec::new(),
            armed: true,
        }
    }

    /// Whose it is.
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Who decides and settles.
    pub fn limiter(&self) -> &Fallback<AnyLimiter> {
        &self.ledger.limiter
    }

    /// Refused: nothing was written, nothing is to be settled.
    pub fn refused(&mut self) {
        self.armed = false;
    }

    /// Granted, with the slot of this backend.
    pub fn granted(&mut self, slot: Option<Key>) {
        self.slots = slot.into_iter().collect();
        self.enter();
    }

    /// A slot of another backend was taken as well.
    pub fn took(&mut self, slot: Key) {
        self.slots.push(slot);
        self.enter();
    }

    /// This slot is held no more: the limiter has freed it.
    pub fn moved(&mut self, from: &Key) {
        self.slots.retain(|slot| slot != from);
        self.enter();
        self.ledger.gave_back(from);
    }

    /// This slot is not needed any more, while the request goes on.
    pub fn release(&mut self, slot: &Key) {
        self.slots.retain(|held| held != slot);
        self.enter();
        // Without room in the queue its lease runs out.
        let _ = self.ledger.queue.try_send(Job::Release(self.id, slot.clone()));
    }

    /// Says to the ledger which leases to renew.
    fn enter(&self) {
        let concurrency = self.scopes.iter().filter(|s| s.concurrency.is_some()).map(|s| s.leases.clone());
        let leases: SmallVec<[Key; 4]> = concurrency.chain(self.slots.iter().cloned()).collect();
        if leases.is_empty() {
            self.ledger.leases().remove(self.id);
        } else {
            self.ledger.leases().insert(self.id, leases);
        }
    }

    /// What the request has used so far: what is settled if it ends now.
    pub fn used(&mut self, actual: Cost) {
        self.actual = actual;
    }

    /// A stream has used so much by now. What goes beyond the reservation by a whole step is charged at once, under an
    /// id of its own; the settlement charges the rest.
    pub fn streamed(&mut self, so_far: Cost) {
        let mut step = Cost::default();
        for (kind, step) in step.0.iter_mut().enumerate().skip(1) {
            let charged = self.reserved.0[kind].saturating_add(self.stepped.0[kind]);
            *step = so_far.0[kind].saturating_sub(charged);
        }
        if step.get(Kind::Tokens) < STEP_TOKENS {
            return;
        }
        let mut scopes = self.scopes.clone();
        scopes.iter_mut().for_each(|scope| scope.concurrency = None);
        let usage = self.usage(&so_far);
        let noted = usage.as_ref().map_or(self.noted, |usage| self.noted.plus(usage.tally));
        let settle = Settle { id: Uuid::now_v7(), actual: step, scopes, slot: None, usage };
        let job = Job::Settle(Box::new(settle), false);
        // Without room the next step, or the settlement, charges this one too.
        if self.ledger.queue.try_send(job).is_ok() {
            self.ledger.metrics.settlement_steps.inc();
            self.stepped.0.iter_mut().zip(step.0).for_each(|(all, step)| *all += step);
            self.noted = noted;
        }
    }

    /// By how much the account of who used what differs from this.
    fn usage(&self, used: &Cost) -> Option<Usage> {
        let tally = Tally::of(used).minus(self.noted);
        let record = || Key::usage(&self.subject.tenant, &calendar::label(self.day));
        (!tally.is_zero()).then(|| Usage { record: record(), model: self.subject.model.clone(), tally })
    }

    /// What the provider counted of a whole answer: the next estimates follow it.
    pub fn learn(&self, prompt: Option<u64>, completion: Option<u64>) {
        let Subject { tenant, model, prompt_bytes, choices } = &self.subject;
        if let (Some(bytes), Some(tokens)) = (prompt_bytes, prompt) {
            self.ledger.estimates.learn_prompt(model, *bytes, tokens);
        }
        if let Some(tokens) = completion {
            self.ledger.estimates.learn_output(tenant, model, tokens.div_ceil(u64::from(*choices).max(1)));
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        while self.slots.len() > 1 {
            let slot = self.slots[1].clone();
            self.release(&slot);
        }
        self.ledger.leases().remove(self.id);
        let mut actual = self.actual;
        actual.0.iter_mut().zip(self.stepped.0).for_each(|(all, charged)| *all = all.saturating_sub(charged));
        let usage = self.usage(&self.actual);
        let (scopes, slot) = (std::mem::take(&mut self.scopes), self.slots.pop());
        let settle = Settle { id: self.id, actual, scopes, slot, usage };
        let credit = self.actual.0.iter().zip(self.reserved.0).any(|(actual, reserved)| *actual < reserved);
        let job = Job::Settle(Box::new(settle), credit);
        if self.ledger.queue.try_send(job).is_err() {
            self.ledger.metrics.settlements_lost.inc();
        }
    }
}
