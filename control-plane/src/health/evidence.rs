//! Observers, their observations, and the votes that summarise them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::params::{DETAIL_MAX_BYTES, PASS_REPORTED_WITHIN};
use super::tier::Tier;

/// Time since the creation of the state machine. Monotonic; [`crate::verdicts`] keeps the origin.
pub(crate) type Timestamp = Duration;

/// An observer of backends.
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
    /// The connection was refused.
    Refused,
    /// No answer within the timeout.
    Timeout,
    /// The connection broke.
    Broken,
    /// A status that means failure.
    Status,
    /// The model is missing, or another model answers.
    WrongModel,
    /// The answer is not valid.
    BadAnswer,
    /// The account at the provider has no quota left.
    QuotaUsedUp,
}

/// The outcome of one probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The probe passed.
    Pass,
    /// 429, or 503 with Retry-After: the backend works and is overloaded.
    Busy,
    /// The backend is loading its model.
    Loading,
    /// The probe failed.
    Failed(Cause),
}

impl Outcome {
    /// Whether the backend works: it passed or is busy.
    pub(crate) const fn is_good(self) -> bool {
        matches!(self, Self::Pass | Self::Busy)
    }

    /// Every [`Self::name`].
    pub(crate) const NAMES: [&'static str; 10] = [
        "pass",
        "busy",
        "loading",
        "refused",
        "timeout",
        "broken",
        "status",
        "wrong_model",
        "bad_answer",
        "quota_used_up",
    ];

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
            Self::Failed(Cause::QuotaUsedUp) => "quota_used_up",
        }
    }
}

/// The values that a deep probe read; `None` where the backend does not report one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Reading {
    /// Output tokens per second of one answer.
    pub(crate) tokens_per_second: Option<f64>,
    /// The used part of the KV cache, 0 to 1.
    pub(crate) cache_used: Option<f64>,
    /// Requests waiting in the engine.
    pub(crate) queue: Option<u64>,
}

/// One probe of one backend.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Observation {
    pub(crate) tier: Tier,
    pub(crate) outcome: Outcome,
    /// A description for people.
    pub(crate) detail: String,
    /// The time to the answer; `None` without an answer.
    pub(crate) latency: Option<Duration>,
    /// Deep tier only.
    pub(crate) reading: Reading,
}

/// The results of a gateway's requests to a backend since its last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Passive {
    pub(crate) successes: u64,
    pub(crate) connect_failures: u64,
    pub(crate) server_errors: u64,
    pub(crate) timeouts: u64,
    pub(crate) busy: u64,
    /// The gateway has ejected the backend locally.
    pub(crate) ejected: bool,
    /// Requests in flight now.
    pub(crate) in_flight: u32,
    /// Bytes of answers came.
    pub(crate) answering: bool,
    /// Failures that the request may have caused.
    pub(crate) suspected: u64,
    /// What the last failed request saw.
    pub(crate) seen: Option<Seen>,
}

/// What a failed request saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// An answer with this status that is a failure.
    Status(u16),
    /// Anything else, in words.
    Said(&'static str),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::Said(text) => f.write_str(text),
        }
    }
}

impl Passive {
    /// Whether somebody got an answer, or a part of one.
    pub(crate) const fn is_answered(&self) -> bool {
        self.successes > 0 || self.answering
    }

    pub(crate) const fn failures(&self) -> u64 {
        self.connect_failures.saturating_add(self.server_errors).saturating_add(self.timeouts)
    }
}

/// The vote of one observer at one tier: the summary of its probes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Vote {
    pub(crate) last: Outcome,
    pub(crate) at: Timestamp,
    /// When the present row of passes or of failures began.
    pub(crate) since: Timestamp,
    /// Consecutive failed probes.
    pub(crate) failures: u32,
    /// Consecutive passed probes.
    pub(crate) passes: u32,
    pub(crate) detail: String,
}

impl Vote {
    /// The vote after one more probe.
    pub(crate) fn after(before: Option<&Self>, outcome: Outcome, detail: &str, at: Timestamp) -> Self {
        let same = before.filter(|vote| vote.last.is_good() == outcome.is_good());
        let since = same.map_or(at, |vote| vote.since);
        let (failures, passes) = before.map_or((0, 0), |v| (v.failures, v.passes));
        let (failures, passes) =
            if outcome.is_good() { (0, passes.saturating_add(1)) } else { (failures.saturating_add(1), 0) };
        Self { last: outcome, at, since, failures, passes, detail: cut(detail).to_owned() }
    }

    /// Whether this row of passes and a row of failures overlap in time. Passes from before the first failure, or from after the
    /// last one, say nothing against the failures: the backend may have died or come back between them. A failure is reported
    /// at once, and a pass later.
    pub(crate) fn contradicts(&self, failing: &Self) -> bool {
        self.last.is_good() && self.since <= failing.at && failing.since + PASS_REPORTED_WITHIN <= self.at
    }
}

/// The text cut to [`DETAIL_MAX_BYTES`].
pub(crate) fn cut(text: &str) -> &str {
    let mut end = text.len().min(DETAIL_MAX_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAILED: Outcome = Outcome::Failed(Cause::Refused);

    /// The vote after probes at these seconds, those before it included.
    fn vote(probes: &[(u64, Outcome)]) -> Vote {
        let cast = |before: Option<Vote>, (second, outcome): &(u64, Outcome)| {
            Some(Vote::after(before.as_ref(), *outcome, "", Duration::from_secs(*second)))
        };
        probes.iter().fold(None, cast).expect("a probe")
    }

    #[test]
    fn a_row_begins_anew_with_another_result_and_busy_is_a_pass() {
        let passes = [(1, Outcome::Pass), (2, Outcome::Busy), (3, Outcome::Pass)];
        assert_eq!((vote(&passes).since, vote(&passes).passes), (Duration::from_secs(1), 3));
        let failures = [(1, Outcome::Pass), (4, FAILED), (5, Outcome::Loading), (6, FAILED)];
        assert_eq!((vote(&failures).since, vote(&failures).failures), (Duration::from_secs(4), 3));
    }

    #[test]
    fn only_passes_at_the_time_of_the_failures_contradict_them() {
        let failing = vote(&[(1, Outcome::Pass), (10, FAILED), (15, FAILED)]);
        for (passes, contradict) in [
            (&[(9, Outcome::Pass)][..], false),
            (&[(5, Outcome::Pass), (9, Outcome::Pass)], false),
            // Probed before the first failure, perhaps, and reported after it.
            (&[(5, Outcome::Pass), (11, Outcome::Pass)], false),
            (&[(5, Outcome::Pass), (12, Outcome::Pass)], true),
            (&[(16, Outcome::Pass)], false),
            (&[(10, FAILED), (16, Outcome::Pass)], false),
            (&[(15, Outcome::Busy)], true),
            (&[(9, Outcome::Pass), (16, Outcome::Pass)], true),
            (&[(14, Outcome::Pass), (15, FAILED)], false),
        ] {
            assert_eq!(vote(passes).contradicts(&failing), contradict, "{passes:?}");
        }
    }
}
