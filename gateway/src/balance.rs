//! Decides in which order backends are tried, which are left out for now, and how often a request may be retried.
//!
//! Everything here is pure: time, weights and chance are passed in. Whoever owns the state holds its lock only for
//! one call, which does no I/O.
//!
//! - [`Scheduler`]: orders of preference. Its state outlives changes of weight and membership.
//! - [`Ejector`]: local ejection on passive evidence, within a budget.
//! - [`RetryBudget`]: bounds retries to a share of the requests.

mod eject;
mod retry;
mod schedule;

pub use self::eject::{EjectConfig, Ejector, Standing};
pub use self::retry::{RetryBudget, RetryConfig};
pub use self::schedule::{Order, Scheduler, random, round_robin};
