//! How long a call may wait, and what waiting came to.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::model::call::Decision;

/// Most waiters of one limit's queue.
pub const LIMIT_QUEUE_MAX: usize = 1000;
/// Between two asks for a lease, at first; doubled up to [`POLL_MAX`].
pub(super) const POLL_MIN: Duration = Duration::from_millis(5);
/// Between two asks for a lease, at most: how late a release by another process is noticed.
pub(super) const POLL_MAX: Duration = Duration::from_millis(50);
/// A process with more than its even part leaves places to others for this long: each of them has asked by then.
pub(super) const OFFER: Duration = Duration::from_millis(60);
/// The least time between two asks of a head that several processes contend with.
pub(super) const ASK_PAUSE_MIN: Duration = Duration::from_millis(1);

/// Who goes first when several wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Priority {
    /// Before all others.
    High = 0,
    /// The rest.
    #[default]
    Normal = 1,
    /// Only when nobody else waits.
    Low = 2,
}

impl Priority {
    /// How many there are.
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

/// How long a call may wait, and as whom.
#[derive(Debug, Clone)]
pub struct QueuePolicy {
    /// Whose share it is served from.
    pub tenant: Arc<str>,
    /// Its class.
    pub priority: Priority,
    /// The caller's own deadline.
    pub deadline: Instant,
    /// The longest wait for each scope of the call, in its order; a missing one is zero: refused at once.
    pub scopes: SmallVec<[Duration; 8]>,
    /// How to wait for a slot; `None` refuses at once.
    pub slots: Option<SlotQueue>,
    /// What the caller keeps in memory meanwhile.
    pub bytes: u64,
    /// Places of the call's scopes of which one run must have room, not all: limits of accounts that can stand in for
    /// each other. Scopes in none of them must have room in any case. Empty: all must.
    pub alternatives: Alternatives,
}

/// Runs of scopes, by their places in a call, that can stand in for each other.
pub type Alternatives = SmallVec<[Range<usize>; 2]>;

/// How to wait for a slot.
#[derive(Debug, Clone)]
pub struct SlotQueue {
    /// The queue: all that wait for the same backends share one.
    pub queue: Arc<str>,
    /// The longest wait.
    pub max_wait: Duration,
    /// Most waiters in that queue.
    pub bound: usize,
}

/// Why a call that was refused did not wait longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GaveUp {
    /// It would not have fitted in time, or not at all.
    TooLong,
    /// The queue had no room.
    QueueFull,
    /// It waited as long as it may.
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

/// What waiting came to.
#[derive(Debug)]
pub struct Waited<T> {
    /// The last decision. One that comes from the queue alone names only the limit that the queue waits for.
    pub decision: Decision,
    /// What the last ask gave beside it; `None` when it never asked.
    pub with: Option<T>,
    /// The time spent in queues.
    pub waited: Duration,
    /// How many stood before it when it first joined a queue; `None` when it never did.
    pub ahead: Option<usize>,
    /// Why it was refused; `None` when it was granted.
    pub gave_up: Option<GaveUp>,
}
