//! Applies the messages of the leader.

use std::time::Duration;

use weir_proto::v1::{AggregateTraffic, BackendHealth, HealthState, StreamReportsResponse};

use super::speeds;
use crate::control::live_config::LiveConfig;
use crate::control::probe_channel::ProbeChannel;
use crate::routing::backend_state::Totals;
use crate::routing::balance::RAMP;
use crate::routing::snapshot::Snapshot;

/// Applies a message: loads, speeds and results of all gateways' requests, verdicts, probe assignments and probe orders.
pub(super) fn take(live: &LiveConfig, probes: &ProbeChannel, message: &StreamReportsResponse) {
    if message.live_gateways > 0 {
        live.set_live_gateways(message.live_gateways);
    }
    if let Some(assignments) = &message.assignments {
        probes.assign(assignments.clone());
    }
    message.orders.iter().for_each(|order| probes.order(order.clone()));
    let snapshot = live.snapshot();
    for load in &message.load {
        if let Some(backend) = snapshot.backends.get(load.backend.as_str()) {
            backend.state.set_fleet(Some(load.in_flight));
        }
    }
    for speed in &message.speeds {
        speeds::take(&snapshot, speed);
    }
    for traffic in &message.traffic {
        if let Some(backend) = snapshot.backends.get(traffic.backend.as_str()) {
            backend.state.set_fleet_totals(Some(totals(traffic)));
        }
    }
    message.health.iter().for_each(|health| take_verdict(&snapshot, health));
}

fn take_verdict(snapshot: &Snapshot, health: &BackendHealth) {
    let Some(backend) = snapshot.backends.get(health.backend.as_str()) else { return };
    let state = in_use(health);
    if state == HealthState::Unspecified || state == backend.state.health() {
        return;
    }
    tracing::info!(backend = health.backend, state = state.as_str_name(), reason = health.reason, "verdict");
    let duration = |wire: Option<prost_types::Duration>| wire.and_then(|wire| Duration::try_from(wire).ok());
    let slow_start = duration(health.slow_start).unwrap_or(RAMP);
    backend.state.set_health_since(
        state,
        duration(health.slow_start_elapsed).unwrap_or_default(),
        slow_start,
    );
}

/// Without a leader, verdicts stay in force; loads, speeds and counts do not, since they are wrong
/// within seconds.
pub(super) fn forget_fleet(live: &LiveConfig) {
    let snapshot = live.snapshot();
    for backend in snapshot.backends.values() {
        backend.state.set_fleet(None);
        backend.state.set_fleet_totals(None);
    }
    snapshot.pools.values().for_each(|pool| pool.state.forget_others());
}

fn totals(traffic: &AggregateTraffic) -> Totals {
    let decode = traffic.decode_time.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default();
    Totals {
        successes: traffic.successes,
        failures: traffic.failures,
        timed_answers: traffic.timed_answers,
        tokens: traffic.output_tokens,
        decode_us: u64::try_from(decode.as_micros()).unwrap_or(u64::MAX),
    }
}

/// The state that the gateway uses: that of the verdict, unless the pool overrides it. A backend that is used although its
/// state says otherwise counts as unknown; a backend with a factor of zero counts as unhealthy.
fn in_use(health: &BackendHealth) -> HealthState {
    match (health.overridden, health.factor) {
        (true, _) => HealthState::Unknown,
        (false, Some(factor)) if factor <= 0.0 => HealthState::Unhealthy,
        (false, _) => health.state(),
    }
}
