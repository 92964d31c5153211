//! Queues: requests wait for a limit or a slot instead of being refused at once.
//!
//! A refused call joins the queue of what refused it: the buckets of a scope, its concurrency, or the slots of backends. Only
//! the head of a queue asks again: at the time that the limiter returned, at once when something is given back in this
//! process ([`Waiting::released`]), and for leases, whose end is unknown, every few milliseconds. A call that cannot be
//! admitted in time is refused at once, with the time at which it would fit.
//!
//! Waiting requests hold nothing. Dropping the future leaves the queue; the caller cancels by the call's id what a dropped
//! call may have been granted.

mod acquire;
#[cfg(test)]
mod fairness;
mod policy;
mod queue;
mod shared;
#[cfg(test)]
mod tests;
mod wait;

pub use self::policy::{
    Alternatives, GaveUp, LIMIT_QUEUE_MAX, Places, Priority, QueuePolicy, SlotQueue, Waited,
};
pub use self::queue::{BYTES_MAX, Entry, Full, Note, Outlook, QueueId, Queues, Turn, WAITERS_MAX};
pub use self::shared::Waiting;
