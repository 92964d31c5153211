//! The report lanes: what this gateway sees goes up about once a second to every control plane, what all gateways see
//! comes down from the one that leads.
//!
//! Every control plane takes in the same, so any of them can lead from one moment to the next; a number that rises with
//! every election tells the one that leads from one that thinks it still does. The latest value wins in both
//! directions. Without a lane the last verdicts stay in force.

mod lane;
mod leader;
mod outgoing;
mod pace;
mod said;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_discovery::{Identity, Link};
use weir_proto::v1::{BackendHealth, BackendReport, FleetTraffic, HealthState, StreamReportsResponse};

use self::lane::{Lane, News};
use self::leader::Leader;
use self::outgoing::{Outgoing, Seen};
use self::said::Said;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::pulse::Pulse;
use crate::routing::backend_state::Totals;

/// Between two reports.
const INTERVAL: Duration = Duration::from_secs(1);
/// News of the lanes that wait to be taken in; a lane waits when there is no room.
const NEWS: usize = 16;

/// Follows the report lanes until `shutdown`, each on a connection of its own.
pub async fn run(
    live: Arc<Live>,
    metrics: Metrics,
    gone: mpsc::Sender<String>,
    identity: Identity,
    links: Vec<Link>,
    shutdown: CancellationToken,
) {
    let (identity, (say, mut news)) = (Arc::new(identity), mpsc::channel(NEWS));
    let mut lanes = JoinSet::new();
    let outgoing: Vec<_> = links.iter().map(|_| Arc::new(Outgoing::default())).collect();
    for (at, (link, outgoing)) in links.into_iter().zip(&outgoing).enumerate() {
        let (live, identity, say) = (Arc::clone(&live), Arc::clone(&identity), say.clone());
        let lane = Lane { at, live, identity, link, outgoing: Arc::clone(outgoing), news: say };
        lanes.spawn(lane.run());
    }
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut said, mut revisions, mut leader) = (Said::default(), live.revisions(), Leader::default());
    loop {
        tokio::select! {
            // Lanes end with the set.
            () = shutdown.cancelled() => return,
            Some((at, news)) = news.recv() => match news {
                News::Open => report(&live, &metrics.pulse, &outgoing),
                News::Said(message) => {
                    let before = leader.lane();
                    if leader.heard(at, message.leadership.as_ref()) {
                        live.probes().heard();
                        let decided = said.decided(&message);
                        said.note(&message);
                        for incarnation in &message.gone_incarnations {
                            // Without room its leases run out by themselves.
                            let _ = gone.try_send(incarnation.clone());
                        }
                        take(&live, &message);
                        let delays = decided.iter().filter_map(|at| SystemTime::now().duration_since(*at).ok());
                        delays.for_each(|delay| metrics.verdict_delay.observe(delay.as_secs_f64()));
                    } else if before == Some(at) {
                        away(&live);
                    }
                }
                News::Closed => if leader.gone(at) {
                    away(&live);
                },
            },
            Ok(()) = revisions.changed() => take(&live, &said.again(&live)),
            _ = ticks.tick() => report(&live, &metrics.pulse, &outgoing),
            () = live.probes().hurry() => report(&live, &metrics.pulse, &outgoing),
        }
    }
}

/// Nobody leads, as far as is known here: verdicts keep; loads, speeds and counts do not, since they are wrong within
/// seconds.
fn away(live: &Live) {
    live.probes().away();
    let snapshot = live.snapshot();
    for backend in snapshot.backends.values() {
        backend.state.set_fleet(None);
        backend.state.set_fleet_totals(None);
    }
    snapshot.pools.values().for_each(|pool| pool.state.forget_others());
}

/// Hands what was seen since the last time to every lane that is open. Without any it goes on being counted.
fn report(live: &Live, pulse: &Pulse, outgoing: &[Arc<Outgoing>]) {
    if !outgoing.iter().any(|lane| lane.is_open()) {
        return;
    }
    let seen = Seen {
        backends: backends(live, true),
        results: live.probes().take_results(),
        traffic: Some(pulse.take_traffic()),
        limits: pulse.take_limits(),
    };
    for lane in outgoing {
        lane.add(&seen);
    }
}

/// The backends as they stand, with what was counted of them or without.
fn backends(live: &Live, counted: bool) -> Vec<BackendReport> {
    let snapshot = live.snapshot();
    let mut speeds = pace::seen(&snapshot);
    let backends = snapshot.backends.values().map(|backend| {
        let ejected =
            snapshot.pools.get(&backend.spec.pool).is_some_and(|p| p.state.is_ejected(&backend.name));
        let standing = BackendReport {
            backend: backend.name.to_string(),
            in_flight: backend.state.report_in_flight(),
            ejected,
            speeds: speeds.remove(&backend.id).unwrap_or_default(),
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
            first_byte_mean: mean.and_then(|mean| prost_types::Duration::try_from(mean).ok()),
            output_tokens: tokens,
            decode_time: prost_types::Duration::try_from(decode).ok(),
            first_byte_counts: backend.state.take_first_byte_counts(),
            timed_answers: answers,
            ..standing
        }
    });
    backends.collect()
}

fn take(live: &Live, message: &StreamReportsResponse) {
    if message.live_gateways > 0 {
        live.set_live_gateways(message.live_gateways);
    }
    if let Some(assignments) = &message.assignments {
        live.probes().assign(assignments.clone());
    }
    message.orders.iter().for_each(|order| live.probes().order(order.clone()));
    let snapshot = live.snapshot();
    for load in &message.load {
        if let Some(backend) = snapshot.backends.get(load.backend.as_str()) {
            backend.state.set_fleet(Some(load.in_flight));
        }
    }
    for speed in &message.speeds {
        pace::take(&snapshot, speed);
    }
    for traffic in &message.traffic {
        if let Some(backend) = snapshot.backends.get(traffic.backend.as_str()) {
            backend.state.set_fleet_totals(Some(totals(traffic)));
        }
    }
    for health in &message.health {
        let Some(backend) = snapshot.backends.get(health.backend.as_str()) else { continue };
        let state = in_use(health);
        if state != HealthState::Unspecified && state != backend.state.health() {
            tracing::info!(
                backend = health.backend,
                state = state.as_str_name(),
                reason = health.reason,
                "verdict"
            );
            let duration =
                |wire: Option<prost_types::Duration>| wire.and_then(|wire| Duration::try_from(wire).ok());
            let takes = duration(health.ramp).unwrap_or(crate::routing::balance::RAMP);
            backend.state.set_health_since(state, duration(health.ramp_elapsed).unwrap_or_default(), takes);
        }
    }
}

fn totals(traffic: &FleetTraffic) -> Totals {
    let decode = traffic.decode_time.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default();
    Totals {
        good: traffic.good,
        bad: traffic.bad,
        answers: traffic.answers,
        tokens: traffic.output_tokens,
        decode_us: u64::try_from(decode.as_micros()).unwrap_or(u64::MAX),
    }
}

/// The state to go by: that of the verdict, unless its pool says otherwise. One that is used against its state counts
/// like one nobody knows; one that is not to be used yet, like one that is broken.
fn in_use(health: &BackendHealth) -> HealthState {
    match (health.overridden, health.factor) {
        (true, _) => HealthState::Unknown,
        (false, Some(factor)) if factor <= 0.0 => HealthState::Unhealthy,
        (false, _) => health.state(),
    }
}
