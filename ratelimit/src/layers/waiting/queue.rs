//! Who asks next: the queues of one process. No clock, no I/O; times are microseconds of the caller's clock.
//!
//! Invariants:
//! - Only the head of a queue asks. Whoever joins later, and whatever it costs, stands behind: a large request is
//!   not starved by small ones that would fit.
//! - A higher priority goes first. Within one, tenants share by what they take: each has a clock that advances by
//!   the cost of what it was served, and the least clock is next (start-time fair queueing). A tenant that comes
//!   back keeps its clock for as long as it is ahead, so coming and going gains nothing.
//! - Waiters hold nothing, so a queue can be left at any moment.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use super::policy::Priority;
use crate::model::cost::Cost;
use crate::model::key::Key;
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::LimitState;

/// Most waiters of one process.
pub const WAITERS_MAX: usize = 10_000;
/// Most bytes that all waiters of one process may keep in memory.
pub const BYTES_MAX: u64 = 256 << 20;
/// After an offer that nobody took, microseconds: how long a process asks for all it gave back before the next one.
const OFFER_PAUSE_MIN: u64 = 60_000;
/// The same after several of them.
const OFFER_PAUSE_MAX: u64 = 480_000;
/// Places offered at once, at most.
const OFFERED_MAX: usize = 1024;
/// Releases that are remembered for those who are asking while they happen.
const RELEASES_KEPT: usize = 1024;

/// What a queue waits for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum QueueId {
    /// A scope's buckets (its record) or its concurrency (its lease set).
    Limit(Key),
    /// A slot at one of the backends that serve this.
    Slots(Arc<str>),
}

/// A waiter.
#[derive(Debug)]
pub struct Entry<H> {
    /// Whose share it is served from.
    pub tenant: Arc<str>,
    /// Its class.
    pub priority: Priority,
    /// What it asks for.
    pub cost: Cost,
    /// What it keeps in memory while it waits.
    pub bytes: u64,
    /// The lease sets it could have a place in, and the places of each: of backends for a queue of slots, of a scope for
    /// its concurrency. Empty for buckets.
    pub places: Vec<(Key, u32)>,
    /// What else has room for it when it is released: the slots of a queue of slots, and other accounts.
    pub wakes: Vec<Key>,
    /// How it is woken.
    pub handle: H,
}

/// Why nobody may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// This one's, now.
    Now,
    /// This one's, at that time.
    At(u64),
    /// Somebody else's.
    Later,
}

/// How a queue was refused last: what newcomers are answered without asking.
#[derive(Debug, Clone, PartialEq)]
pub struct Note {
    /// The limit that refused.
    pub state: LimitState,
    /// The bucket, when it was one: its pace says how long a queue takes.
    pub bucket: Option<(Kind, Bucket)>,
}

/// What a newcomer finds.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Waiters that are served before it.
    pub ahead: usize,
    /// When its turn would come and it would fit, if the queue's pace can be known.
    pub fits_at: Option<u64>,
    /// How the queue was refused last.
    pub note: Option<Note>,
}

#[derive(Debug)]
struct Waiter<H> {
    number: u64,
    cost: Cost,
    bytes: u64,
    places: Vec<(Key, u32)>,
    wakes: Vec<Key>,
    due: u64,
    handle: H,
}

#[derive(Debug)]
struct Flow<H> {
    /// What was served, in the queue's units.
    clock: u64,
    waiters: VecDeque<Waiter<H>>,
}

#[derive(Debug)]
struct Class<H> {
    /// The clock of who was served last when it was its turn.
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

/// How a process with more than its even part of some places lets others ask first: it asks for what it gave back, and
/// for nothing else. Now and then it offers a place that it gave back and asks for it only later; once that finds such
/// places taken, it offers each.
#[derive(Debug, Default)]
struct Hold {
    /// For so long after it last gave something back.
    until: u64,
    /// Places it gave back and may ask for.
    passes: u32,
    /// When it may ask for each of those it offered.
    offered: VecDeque<u64>,
    /// The last one was taken by others.
    wanted: bool,
    /// While they are not, it waits for so long before the next.
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

    /// It asked, and got a place or not.
    fn asked(&mut self, served: bool) {
        if self.passes > 0 {
            self.passes -= 1;
        } else if self.offered.pop_front().is_some() {
            self.wanted = !served;
            self.pause = if served { (self.pause * 2).clamp(OFFER_PAUSE_MIN, OFFER_PAUSE_MAX) } else { 0 };
        }
    }

    /// It gave one of too many places back. True when it leaves that one to others.
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
    /// How many wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether somebody waits there.
    pub fn has(&self, id: &QueueId) -> bool {
        self.queues.contains_key(id)
    }

    /// What a newcomer of that tenant, class and cost would find; `None` when nobody waits.
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
                // Of equal clocks the older goes first, and all of these are older.
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
            // At its due moment the head fits exactly; each one after it needs its own cost drained.
            let after = units.saturating_sub(queue.units(&head.cost)).saturating_add(cost.get(kind).max(1));
            let us = (u128::from(after) * bucket.period.as_micros()).checked_div(u128::from(bucket.rate))?;
            Some(head.due.saturating_add(u64::try_from(us).unwrap_or(u64::MAX)))
        });
        Some(Outlook { ahead, fits_at, note: queue.note.clone() })
    }

    /// Takes a place that is due at that moment, in a queue of at most `bound`. Returns its number.
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
        let Entry { cost, bytes: held, places, wakes, handle, .. } = entry;
        flow.waiters.push_back(Waiter { number, cost, bytes: held, places, wakes, due, handle });
        self.len += 1;
        self.bytes = bytes;
        Ok(number)
    }

    /// Whether it is this one's turn.
    pub fn turn(&self, id: &QueueId, number: u64, now: u64) -> Turn {
        let Some((queue, head)) = self.queues.get(id).and_then(|queue| Some((queue, queue.head()?))) else {
            // Somebody who is not in the queue any more has nothing to wait for.
            return Turn::Now;
        };
        match queue.hold.allows(head.due) {
            _ if head.number != number => Turn::Later,
            due if due > now => Turn::At(due),
            _ => Turn::Now,
        }
    }

    /// The head was refused and is due again at that moment, or at once if what it waits for was released since
    /// `seen`.
    pub fn postpone(&mut self, id: &QueueId, number: u64, due: u64, seen: u64, note: Option<Note>) {
        let mut wakes = Vec::new();
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

    /// Gives the place up; `served` when it got what it waited for, which its tenant's share is charged for. Returns
    /// who must be woken: the head, if it is another one now.
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

    /// How many releases there were so far.
    pub fn releases(&self) -> u64 {
        self.releases
    }

    /// These records and lease sets have room again: their heads are due at once and must be woken.
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

    /// One place of this lease set was given back by this process, which is one of `processes` and still has `held`
    /// there. If it had more than its even part of what somebody waits for here, its heads leave other places to others
    /// for the time of `offer`, and perhaps this one too. Returns whether they do; else they are to be told.
    pub fn give_back(&mut self, key: &Key, held: u32, processes: u32, now: u64, offer: u64) -> bool {
        let mut offered = false;
        for queue in self.queues.values_mut() {
            let Some(places) = queue.head().and_then(|head| head.places_of(key)) else { continue };
            if (u64::from(held) + 1) * u64::from(processes) > u64::from(places) {
                offered |= queue.hold.gave_back(now, offer);
            } else {
                queue.hold.until = queue.hold.until.min(now);
            }
        }
        offered
    }

    /// Whether what a queue waits for was released after the first `seen` releases. Says yes when it is too long ago
    /// to know.
    pub fn released_since(&self, seen: u64, id: &QueueId, wakes: &[Key]) -> bool {
        let missed = self.releases.saturating_sub(seen);
        let Ok(missed) = usize::try_from(missed) else { return true };
        if missed > self.released.len() {
            return true;
        }
        let waited = |key: &Key| matches!(id, QueueId::Limit(waited) if waited == key);
        self.released.iter().rev().take(missed).any(|key| waited(key) || wakes.contains(key))
    }
}

impl<H> Waiter<H> {
    /// How many places there are in this lease set, if it waits for one.
    fn places_of(&self, key: &Key) -> Option<u32> {
        self.places.iter().find(|(place, _)| place == key).map(|(_, places)| *places)
    }
}

impl<H> Queue<H> {
    fn new() -> Self {
        let class = || Class { clock: 0, flows: BTreeMap::new(), len: 0 };
        Self { classes: std::array::from_fn(|_| class()), len: 0, note: None, hold: Hold::default() }
    }

    /// What a cost counts for here: in the refusing bucket's kind, or one.
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
