//! What the control plane last said of each backend.
//!
//! Configuration comes over another stream: a verdict can be there before the backend it is about, and it is said only
//! once. So it is kept, and taken in again whenever the configuration has changed.

use std::collections::BTreeMap;
use std::time::SystemTime;

use weir_proto::v1::{BackendHealth, FleetLoad, StreamReportsResponse};

use crate::control::live_config::LiveConfig;

/// Most backends remembered; more than any configuration has.
const BACKENDS_MAX: usize = 10_000;

/// The latest of each.
#[derive(Debug, Default)]
pub(super) struct LastReceived {
    health: BTreeMap<String, BackendHealth>,
    load: BTreeMap<String, u32>,
}

impl LastReceived {
    /// Remembers what a message says.
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

    /// When the changes of state that a message brings were decided, by the control plane's clock. What it says of a
    /// backend for the first time is part of the picture and of any age.
    pub(super) fn decided(&self, message: &StreamReportsResponse) -> Vec<SystemTime> {
        let changed = message.health.iter().filter(|health| {
            self.health
                .get(&health.backend)
                .is_some_and(|old| old.state != health.state && old.since != health.since)
        });
        changed.filter_map(|health| SystemTime::try_from(health.since?).ok()).collect()
    }

    /// All of it as one message; loads only of backends of which none is known, since the others have newer ones.
    pub(super) fn for_new_configuration(&self, live: &LiveConfig) -> StreamReportsResponse {
        let snapshot = live.snapshot();
        let unknown = |name: &str| snapshot.backends.get(name).is_some_and(|b| !b.state.knows_fleet());
        let load = self.load.iter().filter(|(name, _)| unknown(name));
        StreamReportsResponse {
            health: self.health.values().cloned().collect(),
            load: load.map(|(name, load)| FleetLoad { backend: name.clone(), in_flight: *load }).collect(),
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
            load: vec![FleetLoad { backend: "b".into(), in_flight: 3 }],
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
