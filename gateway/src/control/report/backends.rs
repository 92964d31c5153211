//! Backends as this gateway sees them, in the form of a report.

use weir_proto::v1::{AttemptFailure, BackendReport};

use super::speeds;
use crate::control::live_config::LiveConfig;
use crate::routing::backend_state::LastFailure;

/// The backends as they stand, with what was counted of them since the last time.
pub(super) fn with_counts(live: &LiveConfig) -> Vec<BackendReport> {
    reports(live, true)
}

/// The backends as they stand; what was counted of them stays for the next report.
pub(super) fn without_counts(live: &LiveConfig) -> Vec<BackendReport> {
    reports(live, false)
}

fn failure(seen: LastFailure) -> AttemptFailure {
    AttemptFailure {
        time: Some(seen.at.into()),
        model: seen.model,
        outcome: seen.outcome.label().to_owned(),
        status: seen.status.map_or(0, u32::from),
        message: seen.seen,
    }
}

fn reports(live: &LiveConfig, counted: bool) -> Vec<BackendReport> {
    let snapshot = live.snapshot();
    let mut speeds = speeds::seen(&snapshot);
    let backends = snapshot.backends.values().map(|backend| {
        let ejected =
            snapshot.pools.get(&backend.spec.pool).is_some_and(|p| p.state.is_ejected(&backend.name));
        let standing = BackendReport {
            backend: backend.name.to_string(),
            in_flight: backend.state.report_in_flight(),
            ejected,
            speeds: speeds.remove(&backend.id).unwrap_or_default(),
            last_failure: backend.state.last_failure().map(failure),
            ..BackendReport::default()
        };
        if !counted {
            return standing;
        }
        let counts = backend.state.take_counts();
        let mean = backend.state.take_first_byte_mean();
        let (answers, tokens, decode) = backend.state.take_decoded();
        BackendReport {
            successes: counts.successes,
            connect_failures: counts.connect_failures,
            server_errors: counts.server_errors,
            timeouts: counts.timeouts,
            busy: counts.busy,
            suspected_failures: counts.suspected,
            first_byte_mean: mean.and_then(|mean| prost_types::Duration::try_from(mean).ok()),
            output_tokens: tokens,
            decode_time: prost_types::Duration::try_from(decode).ok(),
            first_byte_counts: backend.state.take_first_byte_counts(),
            timed_answers: answers,
            answering: backend.state.take_answering(),
            ..standing
        }
    });
    backends.collect()
}
