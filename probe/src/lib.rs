//! Health probes of backends, as gateways and the control plane both make them.
//!
//! - [`Schedule`]: when to probe what. Observers take turns by Unix time, a first failure is checked again at once.
//! - [`InFlight`]: probes under way, each in a task. One that panics is still known by its key.
//! - [`liveness`]: HEAD, and GET where HEAD does not tell. Whoever calls it brings the connection.
//! - [`Finding`]: what one probe found. [`Answer::liveness`] and [`Answer::refusal`] judge answers.
//!
//! What asks a model for tokens is the gateways' own: the control plane has no credentials.

mod answer;
mod in_flight;
mod liveness;
mod schedule;

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

pub use self::answer::{Answer, Finding, mentions};
pub use self::in_flight::InFlight;
pub use self::liveness::{late, liveness, no_answer};
pub use self::schedule::{End, Key, Now, Schedule, interval};

impl Now {
    /// Reads both clocks.
    pub fn read() -> Self {
        let unix =
            weir_runtime::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self { instant: Instant::now(), unix }
    }
}
