//! What is seen, by whom, and what remains of it as votes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::params::DETAIL_MAX_BYTES;
use super::tier::Tier;

/// Time since the machine was made. Monotonic; the shell keeps its origin.
pub(crate) type Timestamp = Duration;

/// Who observes a backend.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Observer {
    /// The control plane itself.
    ControlPlane,
    /// A gateway, by id.
    Gateway(Arc<str>),
}

impl fmt::Display for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ControlPlane => f.write_str("control-plane"),
            Self::Gateway(id) => f.write_str(id),
        }
    }
}

/// Why a probe failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cause {
    /// No connection: nobody listens.
    Refused,
    /// No answer in time.
    Timeout,
    /// The connection broke.
    Broken,
    /// A status that says broken.
    Status,
    /// The model is not there, or another one answers.
    WrongModel,
    /// An answer that is none.
    BadAnswer,
}

/// The outcome of one probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All is well.
    Pass,
    /// It asks to be left alone for a while: alive.
    Busy,
    /// It is loading its model.
    Loading,
    /// It failed.
    Failed(Cause),
}

impl Outcome {
    /// The server is there and does its work, if reluctantly.
    pub(crate) const fn is_good(self) -> bool {
        matches!(self, Self::Pass | Self::Busy)
    }

    /// Every [`Self::name`].
    pub(crate) const NAMES: [&'static str; 9] =
        ["pass", "busy", "loading", "refused", "timeout", "broken", "status", "wrong_model", "bad_answer"];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Busy => "busy",
            Self::Loading => "loading",
            Self::Failed(Cause::Refused) => "refused",
            Self::Failed(Cause::Timeout) => "timeout",
            Self::Failed(Cause::Broken) => "broken",
            Self::Failed(Cause::Status) => "status",
            Self::Failed(Cause::WrongModel) => "wrong_model",
            Self::Failed(Cause::BadAnswer) => "bad_answer",
        }
    }
}

/// What a deep probe read; `None` where the backend does not say.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Reading {
    /// Output tokens per second of one answer.
    pub(crate) tokens_per_second: Option<f64>,
    /// Share of the KV cache in use, 0 to 1.
    pub(crate) cache_used: Option<f64>,
    /// Requests waiting in the engine.
    pub(crate) queue: Option<u64>,
}

/// One probe of one backend.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observation {
    pub(crate) tier: Tier,
    pub(crate) outcome: Outcome,
    /// For people.
    pub(crate) detail: String,
    /// How long the answer took; absent without one.
    pub(crate) latency: Option<Duration>,
    /// Of the deep tier.
    pub(crate) reading: Reading,
}

/// What a gateway's requests to a backend came to since its last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Passive {
    pub(crate) successes: u64,
    pub(crate) connect_failures: u64,
    pub(crate) server_errors: u64,
    pub(crate) timeouts: u64,
    pub(crate) busy: u64,
    /// The gateway keeps away from it.
    pub(crate) ejected: bool,
}

impl Passive {
    pub(crate) const fn failures(&self) -> u64 {
        self.connect_failures.saturating_add(self.server_errors).saturating_add(self.timeouts)
    }
}

/// The vote of one observer at one tier: the summary of its probes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Vote {
    pub(crate) last: Outcome,
    pub(crate) at: Timestamp,
    /// Failed probes in a row.
    pub(crate) failures: u32,
    /// Passed probes in a row.
    pub(crate) passes: u32,
    pub(crate) detail: String,
}

impl Vote {
    /// The vote after one more probe.
    pub(crate) fn after(before: Option<&Self>, outcome: Outcome, detail: &str, at: Timestamp) -> Self {
        let (failures, passes) = before.map_or((0, 0), |v| (v.failures, v.passes));
        let (failures, passes) =
            if outcome.is_good() { (0, passes.saturating_add(1)) } else { (failures.saturating_add(1), 0) };
        Self { last: outcome, at, failures, passes, detail: cut(detail).to_owned() }
    }
}

/// A text within its bound.
pub(crate) fn cut(text: &str) -> &str {
    let mut end = text.len().min(DETAIL_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
