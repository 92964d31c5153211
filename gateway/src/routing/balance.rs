//! Decides in which order backends are tried, which backends are ejected, and how often a request may be retried.
//!
//! Everything here is pure: time, weights and random numbers are arguments. The owner of the state holds its lock for one
//! call only, which does no I/O. The simulator of `weir-bench` runs the same code.
//!
//! - [`Balancer`]: orders of preference by policy, over [`View`]s of the backends. [`Views`] are arranged once for many
//!   choices.
//! - [`Effective`]: weight x load x latency x health. [`Scheduler`]: smooth weighted round-robin over effective weights,
//!   whose state survives changes of weights and members. [`Speeds`]: latency per unit of work.
//! - [`HedgeDelays`]: the time without a first byte after which a second backend is tried.
//! - [`Ejector`]: local ejection because of failed requests, for a bounded part of the pool. [`claim_probe`]: which request
//!   tries a backend on probation.
//! - [`RetryBudget`]: limits retries to a share of the requests.

mod affinity;
mod choose;
mod eject;
mod hedge_delay;
mod policy;
mod probation;
mod retry;
mod schedule;
mod speed;
mod views;
mod weight;

pub use self::affinity::{prefix_hash, stable_hash};
pub use self::choose::{Balancer, Candidate, Candidates, is_panic};
pub use self::eject::{EjectConfig, EjectionStatus, Ejector};
pub use self::hedge_delay::{HedgeDelayConfig, HedgeDelays};
pub use self::policy::{ChooseConfig, FEW, Policy};
pub use self::probation::{claim_probe, leave_probation};
pub use self::retry::{RetryBudget, RetryConfig};
pub use self::schedule::{Order, Scheduler};
pub use self::speed::{Measure, Pace, Sample, Speeds};
pub use self::views::Views;
pub use self::weight::{Effective, RAMP, Usability, View, health_factor};
