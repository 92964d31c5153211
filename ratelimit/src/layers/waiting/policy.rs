//! The policy of a wait, and its result.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::model::call::Decision;
use crate::model::key::Key;

/// Waiters in the queue of one limit.
pub const LIMIT_QUEUE_MAX: usize = 1000;
/// The first pause between two asks for a lease; it doubles up to [`POLL_MAX`].
pub(super) const POLL_MIN: Duration = Duration::from_millis(5);
/// The longest pause between two asks for a lease: how late a release by another process is noticed.
pub(super) const POLL_MAX: Duration = Duration::from_millis(50);
/// For this time a process with more than its even part of the slots leaves free ones to other processes. Each of
/// them has asked by then.
pub(super) const OFFER: Duration = Duration::from_millis(60);
/// The shortest pause between two asks of a head for which several processes compete.
pub(super) const ASK_PAUSE_MIN: Duration = Duration::from_millis(1);

/// The order of service among waiters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Served before all others.
    High = 0,
    /// The default.
    #[default]
    Normal = 1,
    /// Served only when nobody else waits.
    Low = 2,
}

impl Priority {
    /// The number of priorities.
    pub const COUNT: usize = 3;

    /// The name used in metrics labels.
    pub const fn name(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }
}

/// How long a call may wait, and on whose behalf.
#[derive(Debug, Clone)]
pub struct QueuePolicy {
    /// The tenant whose share of the queue it uses.
    pub tenant: Arc<str>,
    /// Its priority.
    pub priority: Priority,
    /// The caller's own deadline.
    pub deadline: Instant,
    /// The longest wait for each scope of the call, in the order of the scopes. A missing one is zero: refused at
    /// once.
    pub scopes: SmallVec<[Duration; 8]>,
    /// The wait for a slot; `None` refuses at once.
    pub slots: Option<SlotQueue>,
    /// Bytes that the caller keeps in memory during the wait.
    pub bytes: u64,
    /// Ranges of the call's scopes of which one must have room, and not all: limits of accounts that can stand in for
    /// each other. Scopes outside of all ranges must have room in any case. Empty: all must have room.
    pub alternatives: Alternatives,
}

/// Ranges of scopes in a call that can stand in for each other.
pub type Alternatives = SmallVec<[Range<usize>; 2]>;

/// The wait for a slot.
#[derive(Debug, Clone)]
pub struct SlotQueue {
    /// The queue. Calls for the same backends share one.
    pub queue: Arc<str>,
    /// The longest wait.
    pub max_wait: Duration,
    /// The maximum of waiters in that queue.
    pub bound: usize,
    /// The backends whose slots the call waits for, if these are not its candidates alone.
    pub places: Option<Arc<Places>>,
}

/// Lease sets in which a waiter could get a lease, with the maximum of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(HashMap<Key, u32>);

impl Places {
    /// The maximum of this one, if it is one of them.
    pub fn maximum(&self, key: &Key) -> Option<u32> {
        self.0.get(key).copied()
    }
}

impl FromIterator<(Key, u32)> for Places {
    /// Of a lease set that comes twice, the first maximum counts.
    fn from_iter<I: IntoIterator<Item = (Key, u32)>>(places: I) -> Self {
        let mut map = HashMap::new();
        for (key, maximum) in places {
            map.entry(key).or_insert(maximum);
        }
        Self(map)
    }
}

/// Why a refused call did not wait longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GaveUp {
    /// It would not fit in time, or never.
    TooLong,
    /// The queue had no room.
    QueueFull,
    /// Its longest wait is over.
    Expired,
}

impl GaveUp {
    /// The name used in metrics labels.
    pub const fn name(self) -> &'static str {
        match self {
            GaveUp::TooLong => "too_long",
            GaveUp::QueueFull => "queue_full",
            GaveUp::Expired => "expired",
        }
    }
}

/// The result of a wait.
#[derive(Debug)]
pub struct Waited<T> {
    /// The last decision. If it comes from the queue alone, it names only the limit that the queue waits for.
    pub decision: Decision,
    /// The last value that `ask` returned beside the decision; `None` if it was never asked.
    pub with: Option<T>,
    /// The time spent in queues.
    pub waited: Duration,
    /// The number of waiters before it when it first joined a queue; `None` if it joined none.
    pub ahead: Option<usize>,
    /// Why it was refused; `None` if it was granted.
    pub gave_up: Option<GaveUp>,
}
