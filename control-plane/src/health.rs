//! Whether a backend lives, judged from votes. Pure: the shell that probes is [`crate::probe`].
//!
//! Votes are kept by vantage point. Today the only one is the control plane itself, so the rule is the one for a
//! single vantage point: so many failures in a row make a backend unhealthy, so many successes make it healthy.

use std::collections::BTreeMap;
use std::time::SystemTime;

use weir_proto::resource::HealthProfile;
use weir_proto::v1::{BackendHealth, HealthState};

/// From where a backend was looked at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Vantage {
    /// The control plane's own probe.
    ControlPlane,
}

/// What one look saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The server answered.
    Alive,
    /// It did not, and why.
    Failed(String),
}

/// The recent outcomes of one vantage point.
#[derive(Debug, Clone, Default)]
struct Streak {
    failures: u32,
    successes: u32,
}

/// The verdict on one backend and what it rests on.
#[derive(Debug, Clone)]
pub(crate) struct Liveness {
    state: HealthState,
    reason: String,
    since: SystemTime,
    votes: BTreeMap<Vantage, Streak>,
}

impl Liveness {
    /// Nothing is known yet.
    pub(crate) fn new(now: SystemTime) -> Self {
        let reason = "not probed yet".to_owned();
        Self { state: HealthState::Unknown, reason, since: now, votes: BTreeMap::new() }
    }

    /// Takes a vote; true when the verdict changed.
    pub(crate) fn vote(
        &mut self,
        vantage: Vantage,
        outcome: &Outcome,
        profile: &HealthProfile,
        now: SystemTime,
    ) -> bool {
        let streak = self.votes.entry(vantage).or_default();
        let next = match outcome {
            Outcome::Alive => {
                streak.failures = 0;
                streak.successes = streak.successes.saturating_add(1);
                let enough = streak.successes >= profile.healthy_threshold;
                // A backend that was never seen to fail is used on its first answer.
                let (first, again) = (self.state == HealthState::Unknown, enough);
                (self.state != HealthState::Healthy && (first || again))
                    .then(|| (HealthState::Healthy, format!("answered {} probes in a row", streak.successes)))
            }
            Outcome::Failed(why) => {
                streak.successes = 0;
                streak.failures = streak.failures.saturating_add(1);
                (self.state != HealthState::Unhealthy && streak.failures >= profile.unhealthy_threshold).then(
                    || (HealthState::Unhealthy, format!("{} failures in a row: {why}", streak.failures)),
                )
            }
        };
        let Some((state, reason)) = next else { return false };
        (self.state, self.reason, self.since) = (state, reason, now);
        true
    }

    /// As it is published.
    pub(crate) fn verdict(&self, backend: &str) -> BackendHealth {
        BackendHealth {
            backend: backend.to_owned(),
            state: self.state.into(),
            reason: self.reason.clone(),
            since: Some(self.since.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PROFILE: HealthProfile = HealthProfile {
        liveness_interval: Duration::from_secs(5),
        timeout: Duration::from_secs(2),
        unhealthy_threshold: 3,
        healthy_threshold: 2,
    };

    #[test]
    fn thresholds_in_a_row_decide() {
        let mut liveness = Liveness::new(SystemTime::UNIX_EPOCH);
        let failed = Outcome::Failed("refused".into());
        let mut run = |outcome: &Outcome| {
            liveness.vote(Vantage::ControlPlane, outcome, &PROFILE, SystemTime::UNIX_EPOCH);
            liveness.verdict("b").state()
        };
        assert_eq!(run(&Outcome::Alive), HealthState::Healthy, "the first answer is enough at birth");
        assert_eq!(run(&failed), HealthState::Healthy);
        assert_eq!(run(&failed), HealthState::Healthy);
        assert_eq!(run(&Outcome::Alive), HealthState::Healthy, "an answer starts the count anew");
        for expected in [HealthState::Healthy, HealthState::Healthy, HealthState::Unhealthy] {
            assert_eq!(run(&failed), expected);
        }
        assert_eq!(run(&Outcome::Alive), HealthState::Unhealthy);
        assert_eq!(run(&failed), HealthState::Unhealthy);
        assert_eq!(run(&Outcome::Alive), HealthState::Unhealthy);
        assert_eq!(run(&Outcome::Alive), HealthState::Healthy);
        assert_eq!(liveness.verdict("b").reason, "answered 2 probes in a row");
    }
}
