//! Health probes of backends, as gateways and the control plane both make them.
//!
//! - [`Schedule`]: when to probe which backend. Observers probe one after the other by Unix time; a first failure is
//!   confirmed at once.
//! - [`InFlight`]: probes in progress, each in a task. The key of a task that panics is known.
//! - [`liveness`]: HEAD, and GET if HEAD is not conclusive. The caller provides the connection.
//! - [`Finding`]: the finding of one probe. [`Answer::liveness`] and [`Answer::refusal`] evaluate answers.
//! - [`FAILURES_IN_A_ROW`] and [`expiry`]: what several probes of one observer prove.
//!
//! Probes that cost tokens are part of the gateway, because the control plane has no credentials.

mod answer;
mod evidence;
mod in_flight;
mod liveness;
mod schedule;

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

pub use self::answer::{Answer, Finding, mentions};
pub use self::evidence::{FAILURES_IN_A_ROW, expiry};
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
