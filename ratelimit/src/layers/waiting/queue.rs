//! The queues of one process: who asks next. No clock, no I/O; times are microseconds of the caller's clock.
//!
//! Invariants:
//! - Only the head of a queue asks. Later calls stand behind it, whatever they cost, so that small requests do not
//!   starve a large one.
//! - A higher priority goes first. Within a priority, tenants share by cost: each tenant has a clock that advances by
//!   the cost of what it was served, and the tenant with the least clock is next (start-time fair queueing). A tenant
//!   that returns keeps its clock while that is ahead, so leaving and returning gains nothing.
//! - Waiters hold nothing, so a waiter can leave at any time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::policy::{Places, Priority};
use crate::model::cost::Cost;
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::LimitState;

/// The maximum of waiters of one process.
pub const WAITERS_MAX: usize = 10_000;
/// The maximum of bytes that all waiters of one process keep in memory.
pub const BYTES_MAX: u64 = 256 << 20;
/// The pause before the next offer after one that no other process took, in microseconds. During the pause a process
/// asks for everything that it gave back.
const OFFER_PAUSE_MIN: u64 = 60_000;
/// The longest such pause, after several offers.
const OFFER_PAUSE_MAX: u64 = 480_000;
/// The maximum of simultaneous offers.
const OFFERED_MAX: usize = 1024;
/// Releases that are remembered for calls that are being decided while they happen.
const RELEASES_KEPT: usize = 1024;

/// The subject of a queue.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum QueueId {
    /// A scope's buckets (its record) or its concurrency (its lease set).
    Limit(Key),
    /// A slot at one of the backends that serve this model.
    Slots(Arc<str>),
}

/// A waiter.
#[derive(Debug)]
pub struct Entry<H> {
    /// The tenant whose share it uses.
    pub tenant: Arc<str>,
    /// Its priority.
    pub priority: Priority,
    /// Its cost.
    pub cost: Cost,
    /// Bytes that it keeps in memory while it waits.
    pub bytes: u64,
    /// The lease sets in which it could get a lease, with the maximum of each: of backends in a queue for slots, of a
    /// scope in a queue for concurrency. Empty for buckets.
    pub places: Arc<Places>,
    /// The lease sets of its backends, if their release may admit it.
    pub slots: Option<Arc<Places>>,
    /// Other keys whose release may admit it: those of other accounts.
    pub wakes: Vec<Key>,
    /// The handle that wakes it.
    pub handle: H,
}

/// The queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Whether it is a waiter's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It may ask now.
    Now,
    /// It may ask at that time.
    At(u64),
    /// Another waiter is before it.
    Later,
}

/// The last refusal of a queue, with which newcomers are answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The limit that refused.
    pub state: LimitState,
    /// The bucket, if a bucket refused: its rate tells how fast the queue moves.
    pub bucket: Option<(Kind, Bucket)>,
}

/// The state of a queue for a newcomer.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Waiters that are served before it.
    pub ahead: usize,
    /// When its turn would come and it would fit, if the rate of the queue is known.
    pub fits_at: Option<u64>,
    /// The last refusal of the queue.
    pub note: Option<Note>,
}

#[derive(Debug)]
struct Waiter<H> {
    number: u64,
    cost: Cost,
    bytes: u64,
    places: Arc<Places>,
    wakes: Wakes,
    due: u64,
    handle: H,
}

/// The keys whose release may admit a waiter, beside that of its queue.
#[derive(Debug, Clone, Default)]
struct Wakes {
    slots: Option<Arc<Places>>,
    keys: Vec<Key>,
}

impl Wakes {
    fn contains(&self, key: &Key) -> bool {
        self.slots.as_ref().is_some_and(|slots| slots.maximum(key).is_some()) || self.keys.contains(key)
    }
}

#[derive(Debug)]
struct Flow<H> {
    /// The cost of what was served, in the units of the queue.
    clock: u64,
    waiters: VecDeque<Waiter<H>>,
}

#[derive(Debug)]
struct Class<H> {
    /// The clock of the tenant that was served last.
    clock: u64,
    flows: BTreeMap<Arc<str>, Flow<H>>,
    len: usize,
}

#[derive(Debug)]
struct Queue<H> {
    classes: [Class<H>; Priority::COUNT],
    len: usize,
    note: Option<Note>,
    hold: Hold,
}

/// Lets other processes ask first where this one has more than its even part of the leases: it asks for what it gave
/// back and for nothing else. From time to time it offers a lease that it gave back to the others and asks for it
/// later. Once others have taken an offer, it offers each lease that it gives back.
#[derive(Debug, Default)]
struct Hold {
    /// It holds back until this time, which each lease that it gives back extends.
    until: u64,
    /// Leases that it gave back and may ask for.
    passes: u32,
    /// When it may ask for each lease that it offered.
    offered: VecDeque<u64>,
    /// Others took the last offer.
    wanted: bool,
    /// The pause before the next offer while others do not take offers.
    pause: u64,
    next_offer: u64,
}

impl Hold {
    /// When a head that is due at `due` may ask.
    fn allows(&self, due: u64) -> u64 {
        match (self.passes, self.offered.front()) {
            (1.., _) => due,
            (0, Some(offered)) => due.max(self.until.min(*offered)),
            (0, None) => due.max(self.until),
        }
    }

    /// Records that it asked, and whether it got a lease.
    fn asked(&mut self, served: bool) {
        if self.passes > 0 {
            self.passes -= 1;
        } else if self.offered.pop_front().is_some() {
            self.wanted = !served;
            self.pause = if served { (self.pause * 2).clamp(OFFER_PAUSE_MIN, OFFER_PAUSE_MAX) } else { 0 };
        }
    }

    /// Records that it gave back one of too many leases. Returns true if it offers that one to others.
    fn gave_back(&mut self, now: u64, offer: u64) -> bool {
        if now >= self.until {
            (self.passes, self.until) = (0, now);
            self.offered.clear();
        }
        self.until = now.saturating_add(offer);
        let offers = (self.wanted || now >= self.next_offer) && self.offered.len() < OFFERED_MAX;
        if offers {
            self.offered.push_back(self.until);
            self.next_offer = self.until.saturating_add(self.pause);
        }
        offers
    }
}

/// All queues of a process.
#[derive(Debug)]
pub struct Queues<H> {
    queues: HashMap<QueueId, Queue<H>>,
    numbers: u64,
    len: usize,
    bytes: u64,
    released: VecDeque<Key>,
    releases: u64,
}

impl<H> Default for Queues<H> {
    fn default() -> Self {
        Self { queues: HashMap::new(), numbers: 0, len: 0, bytes: 0, released: VecDeque::new(), releases: 0 }
    }
}

impl<H: Clone> Queues<H> {
    /// The number of waiters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no waiters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether a queue has waiters.
    pub fn has(&self, id: &QueueId) -> bool {
        self.queues.contains_key(id)
    }

    /// The state of a queue for a newcomer of that tenant, priority and cost; `None` for a queue without waiters.
    pub fn outlook(&self, id: &QueueId, tenant: &str, priority: Priority, cost: &Cost) -> Option<Outlook> {
        let queue = self.queues.get(id)?;
        let higher = &queue.classes[..priority as usize];
        let mut ahead: usize = higher.iter().map(|class| class.len).sum();
        let waiting = |class: &Class<H>| -> u64 {
            class.flows.values().flat_map(|f| &f.waiters).map(|w| queue.units(&w.cost)).sum()
        };
        let mut units: u64 = higher.iter().map(waiting).sum();
        let class = &queue.classes[priority as usize];
        let own = class.flows.get(tenant);
        let start = own.map_or(class.clock, |flow| {
            let before: u64 = flow.waiters.iter().map(|w| queue.units(&w.cost)).sum();
            flow.clock.max(class.clock).saturating_add(before)
        });
        for (name, flow) in &class.flows {
            let mut clock = flow.clock.max(class.clock);
            for waiter in &flow.waiters {
                // With equal clocks the older waiter goes first, and all of these are older.
                if clock > start && **name != *tenant {
                    break;
                }
                ahead += 1;
                units = units.saturating_add(queue.units(&waiter.cost));
                clock = clock.saturating_add(queue.units(&waiter.cost));
            }
        }
        let pace = queue.note.as_ref().and_then(|note| note.bucket).filter(|_| ahead > 0);
        let fits_at = pace.and_then(|(kind, bucket)| {
            let head = queue.head()?;
            // At its due time the head fits exactly. Each waiter after it needs its own cost to drain.
            let after = units.saturating_sub(queue.units(&head.cost)).saturating_add(cost.get(kind).max(1));
            let us = (u128::from(after) * bucket.period.as_micros()).checked_div(u128::from(bucket.rate))?;
            Some(head.due.saturating_add(u64::try_from(us).unwrap_or(u64::MAX)))
        });
        Some(Outlook { ahead, fits_at, note: queue.note.clone() })
    }

    /// Adds a waiter that is due at that time to a queue of at most `bound`. Returns the waiter's number.
    pub fn join(&mut self, id: &QueueId, entry: Entry<H>, bound: usize, due: u64) -> Result<u64, Full> {
        let there = self.queues.get(id).map_or(0, |queue| queue.len);
        let bytes = self.bytes.saturating_add(entry.bytes);
        if there >= bound || self.len >= WAITERS_MAX || bytes > BYTES_MAX {
            return Err(Full);
        }
        self.numbers += 1;
        let number = self.numbers;
        let queue = self.queues.entry(id.clone()).or_insert_with(Queue::new);
        queue.len += 1;
        let class = &mut queue.classes[entry.priority as usize];
        class.len += 1;
        let clock = class.clock;
        let flow =
            class.flows.entry(entry.tenant).or_insert_with(|| Flow { clock, waiters: VecDeque::new() });
        if flow.waiters.is_empty() {
            flow.clock = flow.clock.max(clock);
        }
        let Entry { cost, bytes: held, places, slots, wakes, handle, .. } = entry;
        let wakes = Wakes { slots, keys: wakes };
        flow.waiters.push_back(Waiter { number, cost, bytes: held, places, wakes, due, handle });
        self.len += 1;
        self.bytes = bytes;
        Ok(number)
    }

    /// Whether it is this waiter's turn.
    pub fn turn(&self, id: &QueueId, number: u64, now: u64) -> Turn {
        let Some((queue, head)) = self.queues.get(id).and_then(|queue| Some((queue, queue.head()?))) else {
            // A waiter that has left the queue has nothing to wait for.
            return Turn::Now;
        };
        match queue.hold.allows(head.due) {
            _ if head.number != number => Turn::Later,
            due if due > now => Turn::At(due),
            _ => Turn::Now,
        }
    }

    /// Records that the head was refused. It is due again at that time, or at once if what it waits for was released
    /// since `seen`.
    pub fn postpone(&mut self, id: &QueueId, number: u64, due: u64, seen: u64, note: Option<Note>) {
        let mut wakes = Wakes::default();
        if let Some(waiter) = self.queues.get_mut(id).and_then(|queue| queue.find(number)) {
            wakes.clone_from(&waiter.wakes);
        }
        let due = if self.released_since(seen, id, &wakes) { 0 } else { due };
        if let Some(queue) = self.queues.get_mut(id) {
            queue.hold.asked(false);
            queue.note = note.or_else(|| queue.note.take());
            if let Some(waiter) = queue.find(number) {
                waiter.due = due;
            }
        }
    }

    /// Removes a waiter. `served` means that it was granted, which its tenant's clock is charged for. Returns the
    /// handle of the head if that is another waiter now.
    pub fn leave(&mut self, id: &QueueId, tenant: &str, number: u64, served: bool) -> Option<H> {
        let queue = self.queues.get_mut(id)?;
        let before = queue.head().map(|head| head.number);
        if served {
            queue.hold.asked(true);
        }
        let waiter = queue.remove(tenant, number, served)?;
        self.len -= 1;
        self.bytes -= waiter.bytes.min(self.bytes);
        if queue.len == 0 {
            self.queues.remove(id);
            return None;
        }
        queue.head().filter(|head| Some(head.number) != before).map(|head| head.handle.clone())
    }

    /// The number of releases.
    pub fn releases(&self) -> u64 {
        self.releases
    }

    /// Records that these records and lease sets have room again. Their heads are due at once; returns the handles to
    /// wake.
    pub fn release<'a>(&mut self, keys: impl IntoIterator<Item = &'a Key>) -> Vec<H> {
        let mut woken = Vec::new();
        for key in keys {
            self.releases += 1;
            if self.released.len() == RELEASES_KEPT {
                self.released.pop_front();
            }
            self.released.push_back(key.clone());
            if self.len == 0 {
                continue;
            }
            for (id, queue) in &mut self.queues {
                let own = matches!(id, QueueId::Limit(waited) if waited == key);
                let waits = own || queue.head().is_some_and(|head| head.wakes.contains(key));
                if waits && let Some(head) = queue.head_mut() {
                    head.due = 0;
                    woken.push(head.handle.clone());
                    queue.hold.passes = queue.hold.passes.saturating_add(1);
                }
            }
        }
        woken
    }

    /// Records that this process, one of `processes`, gave back a lease of a set and still holds `held` of it. If it
    /// had more than its even part of what somebody waits for, its heads leave other leases to other processes for
    /// the time of `offer`, and perhaps this one too. Returns whether they leave this one; otherwise its heads are to
    /// be woken.
    pub fn give_back(&mut self, key: &Key, held: u32, processes: u32, now: u64, offer: u64) -> bool {
        let mut offered = false;
        for queue in self.queues.values_mut() {
            let Some(places) = queue.head().and_then(|head| head.places.maximum(key)) else { continue };
            if (u64::from(held) + 1) * u64::from(processes) > u64::from(places) {
                offered |= queue.hold.gave_back(now, offer);
            } else {
                queue.hold.until = queue.hold.until.min(now);
            }
        }
        offered
    }

    /// Whether what a queue waits for was released after the first `seen` releases. Returns true if that is too long
    /// ago to know.
    fn released_since(&self, seen: u64, id: &QueueId, wakes: &Wakes) -> bool {
        let missed = self.releases.saturating_sub(seen);
        let Ok(missed) = usize::try_from(missed) else { return true };
        if missed > self.released.len() {
            return true;
        }
        let waited = |key: &Key| matches!(id, QueueId::Limit(waited) if waited == key);
        self.released.iter().rev().take(missed).any(|key| waited(key) || wakes.contains(key))
    }
}

impl<H> Queue<H> {
    fn new() -> Self {
        let class = || Class { clock: 0, flows: BTreeMap::new(), len: 0 };
        Self { classes: std::array::from_fn(|_| class()), len: 0, note: None, hold: Hold::default() }
    }

    /// The cost in the units of this queue: of the refusing bucket's kind, or one.
    fn units(&self, cost: &Cost) -> u64 {
        self.note.as_ref().and_then(|note| note.bucket).map_or(1, |(kind, _)| cost.get(kind).max(1))
    }

    fn next_flow(class: &Class<H>) -> Option<(&Arc<str>, &Flow<H>)> {
        let waiting = class.flows.iter().filter(|(_, flow)| !flow.waiters.is_empty());
        waiting.min_by_key(|(_, flow)| (flow.clock, flow.waiters.front().map(|w| w.number)))
    }

    fn head(&self) -> Option<&Waiter<H>> {
        let class = self.classes.iter().find(|class| class.len > 0)?;
        Self::next_flow(class)?.1.waiters.front()
    }

    fn head_mut(&mut self) -> Option<&mut Waiter<H>> {
        let class = self.classes.iter_mut().find(|class| class.len > 0)?;
        let tenant = Self::next_flow(class)?.0.clone();
        class.flows.get_mut(&tenant)?.waiters.front_mut()
    }

    fn find(&mut self, number: u64) -> Option<&mut Waiter<H>> {
        let flows = self.classes.iter_mut().flat_map(|class| class.flows.values_mut());
        flows.flat_map(|flow| &mut flow.waiters).find(|waiter| waiter.number == number)
    }

    fn remove(&mut self, tenant: &str, number: u64, served: bool) -> Option<Waiter<H>> {
        for at in 0..self.classes.len() {
            let class = &mut self.classes[at];
            let Some(flow) = class.flows.get_mut(tenant) else { continue };
            let Some(index) = flow.waiters.iter().position(|waiter| waiter.number == number) else {
                continue;
            };
            let waiter = flow.waiters.remove(index)?;
            class.len -= 1;
            self.len -= 1;
            let units = self.units(&waiter.cost);
            let class = &mut self.classes[at];
            if let Some(flow) = class.flows.get_mut(tenant).filter(|_| served) {
                class.clock = class.clock.max(flow.clock);
                flow.clock = flow.clock.saturating_add(units);
            }
            let clock = class.clock;
            class.flows.retain(|_, flow| !flow.waiters.is_empty() || flow.clock > clock);
            return Some(waiter);
        }
        None
    }
}
