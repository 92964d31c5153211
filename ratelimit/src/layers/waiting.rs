//! Waiting for a limit instead of being refused at once.
//!
//! A refused call stands in the queue of what refused it: a scope's buckets, its concurrency, or the slots of some
//! backends. Only the head of a queue asks again: at the time the limiter named, at once when something was given
//! back in this process ([`Waiting::released`]), and for leases, whose end nobody can name, every few milliseconds.
//! A call that could not be served in time is refused at once, with the time at which it would fit.
//!
//! Waiters hold nothing: dropping the future leaves the queue, and whatever the dropped ask may have been granted is
//! the caller's to cancel by the call's id.

mod acquire;
#[cfg(test)]
mod fairness;
mod policy;
mod queue;
mod shared;
#[cfg(test)]
mod tests;
mod wait;

pub use self::policy::{Alternatives, GaveUp, LIMIT_QUEUE_MAX, Priority, QueuePolicy, SlotQueue, Waited};
pub use self::queue::{BYTES_MAX, Entry, Full, Note, Outlook, QueueId, Queues, Turn, WAITERS_MAX};
pub use self::shared::Waiting;
