//! One verdict per backend for the whole cluster. Pure: time is an argument, the shell is [`crate::verdicts`].
//!
//! - [`evidence`]: observations and who made them; [`tally`]: how votes are counted; [`isolation`]: whose votes count.
//! - [`event`]: what happened, for people.
//! - [`record`]: the state machine of one backend; [`degrade`]: what makes it worse without making it useless.
//! - [`guard`]: what a pool makes of its backends' states. [`cluster`]: all of it together.
//! - [`assign`]: which observers probe which backends. [`params`]: every number with its reason. [`rule`]: states and rules by name.
//!
//! Invariants, each a property in `tests`: one observer never ejects a backend that another one reaches; when
//! all agree it is ejected within a bound; a pool is never left with less than its budget; silence changes nothing;
//! every verdict names its rule.

pub(crate) mod assign;
pub(crate) mod cluster;
mod degrade;
pub(crate) mod event;
pub(crate) mod evidence;
mod guard;
mod isolation;
pub(crate) mod params;
pub(crate) mod record;
pub(crate) mod rule;
pub(crate) mod tally;
#[cfg(test)]
mod tests;
mod tier;

pub(crate) use assign::Regions;
pub(crate) use cluster::{Cluster, Order, Target};
pub(crate) use evidence::{Cause, Observation, Observer, Outcome, Passive, Reading, Timestamp};
pub(crate) use rule::{Rule, State};
pub(crate) use tier::Tier;

#[cfg(test)]
fn no_isolated_observers() -> isolation::IsolatedObservers {
    isolation::IsolatedObservers::default()
}
