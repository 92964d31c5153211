//! Computes one verdict per backend for the whole cluster. Pure: time is an argument; [`crate::verdicts`] does the I/O.
//!
//! - [`evidence`]: observers and their observations; [`tally`]: the count of votes; [`isolation`]: observers without a vote.
//! - [`event`]: health events and alarms.
//! - [`record`]: the health record of one backend, a state machine; [`degrade`]: signs that degrade a backend; [`requests`]: what
//!   requests say of it.
//! - [`guard`]: the maximum of ejections and panic mode of a pool. [`cluster`]: the health of all backends.
//! - [`assign`]: which observers probe which backends. [`params`]: every constant with its reason. [`rule`]: names of states
//!   and rules.
//!
//! Invariants, each a property test in `tests`: one observer never ejects a backend that another one reaches. If all
//! observers see failures, the backend is ejected within a bound. A pool never loses more backends than the maximum. Missing
//! reports change no state. Every verdict names its rule.

pub(crate) mod assign;
pub(crate) mod cluster;
mod degrade;
pub(crate) mod event;
pub(crate) mod evidence;
mod guard;
mod isolation;
pub(crate) mod params;
pub(crate) mod record;
mod requests;
pub(crate) mod rule;
pub(crate) mod tally;
#[cfg(test)]
mod tests;
mod tier;

pub(crate) use assign::Regions;
pub(crate) use cluster::{Cluster, Order, Target};
pub(crate) use evidence::{Cause, Observation, Observer, Outcome, Passive, Reading, Seen, Timestamp};
pub(crate) use rule::{Rule, State};
pub(crate) use tier::Tier;

#[cfg(test)]
fn no_isolated_observers() -> isolation::IsolatedObservers {
    isolation::IsolatedObservers::default()
}
