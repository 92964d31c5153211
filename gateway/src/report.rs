//! The report lane: what this gateway sees goes up about once a second, what all of them see comes down.
//!
//! The latest value wins in both directions. Without the lane the last verdicts stay in force.

mod said;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use weir_discovery::{Backoff, Identity, Link, error_chain};
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::{
    BackendHealth, BackendReport, HealthState, StreamReportsRequest, StreamReportsResponse,
};

use self::said::Said;
use crate::live::Live;
use crate::pulse::Pulse;
use crate::reap::Gone;

/// Between two reports.
const INTERVAL: Duration = Duration::from_secs(1);

/// Follows the report lane until `shutdown`, on a connection of its own.
pub async fn run(
    live: Arc<Live>,
    pulse: Arc<Pulse>,
    gone: Gone,
    identity: Identity,
    link: Link,
    shutdown: CancellationToken,
) {
    let own = Own { live: &live, pulse: &pulse, gone: &gone, identity: &identity };
    let mut backoff = Backoff::default();
    loop {
        let ended = tokio::select! {
            ended = follow(own, &link, &mut backoff) => ended,
            () = shutdown.cancelled() => return,
        };
        live.probes().away();
        tracing::debug!(reason = ended.err(), "report lane away; the last verdicts stay");
        // Verdicts keep, loads do not: they are wrong within seconds.
        live.snapshot().backends.values().for_each(|backend| backend.runtime.set_fleet(None));
        tokio::select! {
            () = tokio::time::sleep(backoff.next_pause()) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// What reports are made of.
#[derive(Clone, Copy)]
struct Own<'a> {
    live: &'a Live,
    pulse: &'a Pulse,
    gone: &'a Gone,
    identity: &'a Identity,
}

async fn follow(own: Own<'_>, link: &Link, backoff: &mut Backoff) -> Result<(), String> {
    let Own { live, gone, identity, .. } = own;
    let channel = link.endpoint()?.connect().await.map_err(|e| error_chain(&e))?;
    let mut client = ReportServiceClient::new(channel);
    // Room for one: a report that cannot go yet is replaced by the next, which says the newer thing.
    let (up, reports) = mpsc::channel(1);
    // Zero is what was never reported.
    let mut sequence = 1;
    let first = report(own, sequence);
    up.try_send(first).map_err(|_| "no room for the first report".to_owned())?;
    let request = identity.request(ReceiverStream::new(reports))?;
    let mut stream = client.stream_reports(request).await.map_err(|s| s.message().to_owned())?.into_inner();
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut said, mut revisions) = (Said::default(), live.revisions());
    loop {
        tokio::select! {
            message = stream.message() => match message.map_err(|s| s.message().to_owned())? {
                Some(message) => {
                    backoff.reset();
                    live.probes().heard();
                    said.note(&message);
                    message.gone_incarnations.iter().for_each(|incarnation| gone.tell(incarnation));
                    take(live, &message);
                }
                None => return Ok(()),
            },
            Ok(()) = revisions.changed() => take(live, &said.again(live)),
            _ = ticks.tick() => say(own, &up, &mut sequence),
            () = live.probes().hurry() => say(own, &up, &mut sequence),
        }
    }
}

/// Reports, if the last report has gone: what is not said now is said by the next.
fn say(own: Own<'_>, up: &mpsc::Sender<StreamReportsRequest>, sequence: &mut u64) {
    if let Ok(permit) = up.try_reserve() {
        *sequence += 1;
        permit.send(report(own, *sequence));
    }
}

fn report(Own { live, pulse, identity, .. }: Own<'_>, sequence: u64) -> StreamReportsRequest {
    let snapshot = live.snapshot();
    let backends = snapshot.backends.values().map(|backend| {
        let counts = backend.runtime.take_counts();
        let mean = backend.runtime.take_first_byte_mean();
        let (tokens, decode) = backend.runtime.take_decoded();
        let ejected =
            snapshot.pools.get(&backend.spec.pool).is_some_and(|p| p.runtime.is_ejected(&backend.name));
        BackendReport {
            backend: backend.name.to_string(),
            in_flight: backend.runtime.report_in_flight(),
            successes: counts.successes,
            connect_failures: counts.connect_failures,
            server_errors: counts.server_errors,
            timeouts: counts.timeouts,
            busy: counts.busy,
            first_byte_mean: mean.and_then(|mean| prost_types::Duration::try_from(mean).ok()),
            ejected,
            output_tokens: tokens,
            decode_time: prost_types::Duration::try_from(decode).ok(),
            first_byte_counts: backend.runtime.take_first_byte_counts(),
        }
    });
    StreamReportsRequest {
        gateway_id: identity.id.clone(),
        incarnation: identity.incarnation.clone(),
        sequence,
        backends: backends.collect(),
        region: identity.region.clone(),
        probes: true,
        results: live.probes().take_results(),
        traffic: Some(pulse.take_traffic()),
        limits: pulse.take_limits(),
    }
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
            backend.runtime.set_fleet(Some(load.in_flight));
        }
    }
    for health in &message.health {
        let Some(backend) = snapshot.backends.get(health.backend.as_str()) else { continue };
        let state = in_use(health);
        if state != HealthState::Unspecified && state != backend.runtime.health() {
            tracing::info!(
                backend = health.backend,
                state = state.as_str_name(),
                reason = health.reason,
                "verdict"
            );
            let duration =
                |wire: Option<prost_types::Duration>| wire.and_then(|wire| Duration::try_from(wire).ok());
            let takes = duration(health.ramp).unwrap_or(crate::balance::RAMP);
            backend.runtime.set_health_since(state, duration(health.ramp_elapsed).unwrap_or_default(), takes);
        }
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
