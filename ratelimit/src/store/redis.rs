//! The limiter in Redis: each call is one script, which runs in the server.
//!
//! Calls share a few multiplexed connections, which pipeline whatever waits. Scripts are called by hash. A server
//! that does not know a script (after a restart, a failover or a flush) gets its text once, from the call that found
//! out. Admissions, and settlements, under the same limits are coalesced into one call where they would queue up.
//! A call without an answer fails when the server has been silent for too long. Its outcome is unknown then; ids make a
//! retry harmless.
//!
//! Needs Redis 7: scripts that free or credit carry a flag that lets them run when memory is full.

mod batch;
mod calls;
mod client;
mod coalesce;
mod connection;
mod eval;
mod failures;
#[doc(hidden)]
pub mod fuzzing;
mod limiter;
mod options;
mod prolonged;
mod recent_refusals;
mod reply;
mod script;
mod silence;
mod split;
mod topology;

pub use self::limiter::RedisLimiter;
pub use self::options::{ColdStart, RedisOptions};
