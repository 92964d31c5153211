//! The last received verdict and load of each backend.
//!
//! Configuration comes on another stream, so a verdict can arrive before its backend, and it is sent only once. So it is
//! kept, and applied again after each change of the configuration.

use std::collections::BTreeMap;
use std::time::SystemTime;

use weir_proto::v1::{AggregateLoad, BackendHealth, StreamReportsResponse};

use crate::control::live_config::LiveConfig;

/// The maximum of backends; more than any configuration has.
const BACKENDS_MAX: usize = 10_000;

/// The latest values per backend.
#[derive(Debug, Default)]
pub(super) struct LastReceived {
    health: BTreeMap<String, BackendHealth>,
    load: BTreeMap<String, u32>,
}

impl LastReceived {
    /// Records a message.
    pub(super) fn note(&mut self, message: &StreamReportsResponse) {
        for health in &message.health {
            if self.health.len() < BACKENDS_MAX || self.health.contains_key(&health.backend) {
                self.health.insert(health.backend.clone(), health.clone());
            }
        }
        for load in &message.load {
            if self.load.len() < BACKENDS_MAX || self.load.contains_key(&load.backend) {
                self.load.insert(load.backend.clone(), load.in_flight);
            }
        }
    }

    /// When the control plane decided the changed states of a message, by its clock. The first state of a backend is not a
    /// change and can have any age.
    pub(super) fn decided(&self, message: &StreamReportsResponse) -> Vec<SystemTime> {
        let changed = message.health.iter().filter(|health| {
            self.health
                .get(&health.backend)
                .is_some_and(|old| old.state != health.state && old.since != health.since)
        });
        changed.filter_map(|health| SystemTime::try_from(health.since?).ok()).collect()
    }

    /// All values as one message; loads only for backends without one, because the others have newer loads.
    pub(super) fn for_new_configuration(&self, live: &LiveConfig) -> StreamReportsResponse {
        let snapshot = live.snapshot();
        let unknown = |name: &str| snapshot.backends.get(name).is_some_and(|b| !b.state.knows_fleet());
        let load = self.load.iter().filter(|(name, _)| unknown(name));
        StreamReportsResponse {
            health: self.health.values().cloned().collect(),
            load: load
                .map(|(name, load)| AggregateLoad { backend: name.clone(), in_flight: *load })
                .collect(),
            ..StreamReportsResponse::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use weir_proto::v1::HealthState;

    use super::*;

    #[test]
    fn a_verdict_that_came_before_its_backend_is_said_again_and_only_the_last() {
        let mut last = LastReceived::default();
        let verdict = |state: HealthState| StreamReportsResponse {
            health: vec![BackendHealth {
                backend: "b".into(),
                state: state.into(),
                ..BackendHealth::default()
            }],
            load: vec![AggregateLoad { backend: "b".into(), in_flight: 3 }],
            ..StreamReportsResponse::default()
        };
        last.note(&verdict(HealthState::Unknown));
        let mut later = verdict(HealthState::Unhealthy);
        later.health[0].since = Some(prost_types::Timestamp { seconds: 7, nanos: 0 });
        assert_eq!(last.decided(&later), [SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7)]);
        last.note(&verdict(HealthState::Healthy));
        last.note(&StreamReportsResponse::default());
        let again = last.for_new_configuration(&LiveConfig::default());
        assert_eq!(again.health, verdict(HealthState::Healthy).health);
        assert!(again.load.is_empty(), "there is no such backend yet");
    }
}
