//! Decides in which order backends are tried, which are left out for now, and how often a request may be retried.
//!
//! Everything here is pure: time, weights and chance are passed in. Whoever owns the state holds its lock only for
//! one call, which does no I/O. The simulator of `weir-bench` runs this very code.
//!
//! - [`Balancer`]: orders of preference by policy, over [`View`]s of the backends.
//! - [`Effective`]: weight x load x latency x health. [`Scheduler`]: smooth weighted round-robin over it, whose state
//!   outlives changes of weight and membership. [`Speeds`]: latency per unit of work.
//! - [`HedgeDelays`]: how long a backend may be silent before another is tried as well.
//! - [`Ejector`]: local ejection on passive evidence, within a budget.
//! - [`RetryBudget`]: bounds retries to a share of the requests.

mod affinity;
mod choose;
mod eject;
mod hedge_delay;
mod retry;
mod schedule;
mod speed;
mod weight;

pub use self::affinity::{prefix_hash, stable_hash};
pub use self::choose::{Balancer, Candidate, Candidates, ChooseConfig, Policy, is_panic};
pub use self::eject::{EjectConfig, EjectionStatus, Ejector};
pub use self::hedge_delay::{HedgeDelayConfig, HedgeDelays};
pub use self::retry::{RetryBudget, RetryConfig};
pub use self::schedule::{Order, Scheduler};
pub use self::speed::{Measure, Pace, Sample, Speeds};
pub use self::weight::{Effective, RAMP, Usability, View, health_factor};
