//! The limiter in Redis: each call is one script, run where the data is.
//!
//! A call goes to one of a few multiplexed connections; whatever waits on a connection travels
//! together, so callers pipeline each other without knowing. Scripts go by hash; a server that forgot them
//! (restart, failover, flush) is sent the text once, by the call that noticed. Admissions, and settlements, under the
//! same limits are merged into one call where they would queue up. Every call has a deadline, after
//! which its outcome is unknown; ids make a retry harmless.
//!
//! Needs Redis 7: scripts that free or credit are flagged to run even when memory is full.

mod batch;
mod calls;
mod client;
mod coalesce;
mod connection;
mod eval;
mod failures;
#[doc(hidden)]
pub mod fuzzing;
mod lag;
mod limiter;
mod options;
mod prolonged;
mod recent_refusals;
mod reply;
mod script;
mod split;
mod topology;

pub use self::limiter::RedisLimiter;
pub use self::options::{ColdStart, RedisOptions};
