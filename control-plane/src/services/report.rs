//! The report lane: takes in what gateways see, tells each what all of them see. The latest value wins: while a
//! gateway does not read, nothing queues up, and then it gets what differs from what it last got.
//!
//! Of several control planes only the one that leads tells; the others say that they do not lead, and take in.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weir_proto::v1::report_service_server::ReportService;
use weir_proto::v1::{
    self, FleetLoad, FleetTraffic, Leadership, ProbeAssignments, ProbeOrder, ProbeTier, StreamReportsRequest,
    StreamReportsResponse,
};

use super::{Shared, check_about};
use crate::auth::Caller;
use crate::fleet::{Loads, ToldSpeeds, Traffic};
use crate::health::Vantage;
use crate::registry::Claim;
use crate::verdicts::{Duties, Healths, Verdicts, gateway, view};

/// Answers that may lie unread; the latest value wins.
const OUTBOX: usize = 2;
const FIRST_TIMEOUT: Duration = Duration::from_secs(5);
/// Loads change all the time, and how many gateways there are changes with each that comes; verdicts do not wait for this.
const LOAD_INTERVAL: Duration = Duration::from_millis(500);
/// Of a large fleet each gateway is told less often, so that all together are told so often a second.
const LOADS_PER_SECOND: f64 = 2000.0;
/// But never less often than that: a picture of the loads is not to be older than their reports.
const LOAD_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Reports(pub(crate) Shared);

type Outbox = mpsc::Sender<Result<StreamReportsResponse, Status>>;

#[tonic::async_trait]
impl ReportService for Reports {
    type StreamReportsStream = ReceiverStream<Result<StreamReportsResponse, Status>>;

    async fn stream_reports(
        &self,
        request: Request<Streaming<StreamReportsRequest>>,
    ) -> Result<Response<Self::StreamReportsStream>, Status> {
        super::open(&self.0, request, OUTBOX, serve)
    }
}

/// What a gateway was last told.
#[derive(Default)]
struct Told {
    healths: Arc<Healths>,
    loads: Arc<Loads>,
    speeds: ToldSpeeds,
    traffic: Traffic,
    live: u32,
    assignments: Arc<ProbeAssignments>,
    /// Orders up to this one.
    serial: u64,
    /// Departures up to this one.
    departure: u64,
}

impl Told {
    /// Whether a gateway has to do something that it was not yet told.
    fn misses(&self, duties: &Duties, of: &Vantage) -> bool {
        assignments(duties, of) != self.assignments || duties.orders_after(self.serial, of).next().is_some()
    }
}

/// What a gateway is assigned; nothing is an assignment too.
fn assignments(duties: &Duties, of: &Vantage) -> Arc<ProbeAssignments> {
    duties.assignments.get(of).cloned().unwrap_or_default()
}

async fn serve(
    shared: Shared,
    caller: Caller,
    mut inbound: Streaming<StreamReportsRequest>,
    outbox: Outbox,
) -> Result<(), Status> {
    let first = timeout(FIRST_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::invalid_argument("no report within 5 s"))??;
    let first = first.ok_or_else(|| Status::invalid_argument("the first message is a report"))?;
    check_about(&first.gateway_id, &[("region", &first.region), ("incarnation", &first.incarnation)])?;
    shared.authority.speaks_for(&caller, &first.gateway_id)?;
    let own = gateway(&first.gateway_id);
    let (mut healths, mut duties) = (shared.verdicts.healths(), shared.verdicts.duties());
    // What was ordered before this stream was there is answered or given up by now.
    let mut told = Told { serial: duties.borrow_and_update().serial(), ..Told::default() };
    let mut departures = shared.fleet.departures();
    told.departure = departures.borrow_and_update().last();
    let reporter = shared.fleet.join(&first, &Claim::of(&caller)).map_err(|taken| {
        tracing::warn!(reason = %taken, "the reports of a gateway were refused");
        Status::aborted(taken.to_string())
    })?;
    reporter.report(&first);
    let (mut loads, mut served) = (shared.fleet.loads(), shared.fleet.served());
    let mut live = shared.presence.count();
    let mut leads = shared.leads.clone();
    let mut leading = *leads.borrow_and_update();
    let mut leadership = Some(claim(&shared, leading));
    // At first the whole picture, whatever it is.
    let (mut urgent, mut load_changed) = (true, true);
    let mut load_due = Instant::now();
    loop {
        let load_ready = load_changed && load_due <= Instant::now();
        tokio::select! {
            permit = outbox.reserve(), if leadership.is_some() || leading.is_some() && (urgent || load_ready) => {
                let permit = permit.map_err(|_| Status::cancelled("the stream is closed"))?;
                // Perhaps it was waited for longer than the lease.
                if *leads.borrow() != leading {
                    continue;
                }
                if leading.is_none() {
                    let leadership = leadership.take();
                    permit.send(Ok(StreamReportsResponse { leadership, ..Default::default() }));
                    continue;
                }
                let now = Told {
                    healths: healths.borrow_and_update().clone(),
                    // Loads and speeds ride along with a verdict when they are due, never earlier.
                    loads: if load_ready { loads.borrow_and_update().clone() } else { told.loads.clone() },
                    live: if load_ready { *live.borrow_and_update() } else { told.live },
                    speeds: ToldSpeeds::default(),
                    traffic: Traffic::default(),
                    assignments: told.assignments.clone(),
                    serial: told.serial,
                    departure: told.departure,
                };
                let (mut now, mut answer) = {
                    let duties = duties.borrow_and_update();
                    difference(&told, now, &duties, &own, &shared.verdicts)
                };
                if shared.fleet.cleans_up(&first.gateway_id) {
                    answer.gone_incarnations = departures.borrow_and_update().after(told.departure);
                }
                now.departure = departures.borrow().last();
                (now.speeds, now.traffic) = (told.speeds, told.traffic);
                if load_ready {
                    answer.speeds = now.speeds.news(&shared.fleet.speeds_without(&first.gateway_id));
                    let traffic = shared.fleet.traffic_at(&paid(&now.assignments));
                    let news = |(name, traffic): &(&String, &FleetTraffic)| now.traffic.get(*name) != Some(traffic);
                    answer.traffic = traffic.iter().filter(news).map(|(_, traffic)| traffic.clone()).collect();
                    now.traffic = traffic;
                }
                answer.leadership = leadership.take();
                let nothing = StreamReportsResponse { live_gateways: told.live, ..StreamReportsResponse::default() };
                if answer != nothing {
                    permit.send(Ok(answer));
                }
                told = now;
                urgent = false;
                if load_ready {
                    load_changed = false;
                    load_due = Instant::now() + load_interval(told.live);
                }
            }
            said = inbound.message() => match said? {
                None => return Ok(()),
                Some(report) => {
                    reporter.report(&report);
                }
            },
            changed = leads.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                leading = *leads.borrow_and_update();
                leadership = Some(claim(&shared, leading));
                // What another one said since is not known here: the whole picture again, and all departures of this
                // stream's time, since the one that led may have gone with one of them.
                let serial = duties.borrow_and_update().serial();
                told = Told { serial, departure: told.departure, ..Told::default() };
                (urgent, load_changed, load_due) = (true, true, Instant::now());
            }
            changed = healths.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                urgent |= is_urgent(&told.healths, &healths.borrow_and_update());
                load_changed = true;
            }
            changed = duties.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                urgent |= told.misses(&duties.borrow_and_update(), &own);
            }
            // Once there is something to say, more of it wakes nobody: of a thousand streams each would wake a thousand times
            // a second.
            changed = loads.changed(), if !load_changed => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                load_changed = *loads.borrow_and_update() != told.loads;
            }
            changed = served.changed(), if !load_changed => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                load_changed = true;
            }
            changed = departures.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                urgent |= shared.fleet.cleans_up(&first.gateway_id);
            }
            changed = live.changed(), if !load_changed => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                load_changed = *live.borrow_and_update() != told.live;
            }
            () = sleep_until(load_due), if load_changed && !load_ready => {}
        }
    }
}

/// Between two times a gateway is told the loads, in a fleet of so many.
fn load_interval(live: u32) -> Duration {
    Duration::from_secs_f64(f64::from(live) / LOADS_PER_SECOND).clamp(LOAD_INTERVAL, LOAD_INTERVAL_MAX)
}

/// Whether verdicts differ in how backends are used. That one is suspected, and why, can wait for the next loads: on a
/// large fleet the push would otherwise be still under way when the verdict itself follows.
fn is_urgent(told: &Healths, now: &Healths) -> bool {
    let used = |health: &v1::BackendHealth| {
        (health.state, health.factor, health.overridden, health.stale, health.ramp)
    };
    now.iter().any(|(name, health)| told.get(name).is_none_or(|told| used(told) != used(health)))
}

fn claim(shared: &Shared, leading: Option<u64>) -> Leadership {
    let store_epoch = shared.catalog.state().epoch.to_string();
    Leadership { store_epoch, fencing: leading.unwrap_or_default() }
}

/// The backends that a gateway asks for tokens: it leaves that out where requests of the fleet say as much.
fn paid(assignments: &ProbeAssignments) -> BTreeSet<&str> {
    let paid = assignments.assignments.iter().filter(|a| a.tier() != ProbeTier::Liveness);
    paid.map(|a| a.backend.as_str()).collect()
}

/// What a gateway does not know yet, and what it will know then.
fn difference(
    told: &Told,
    mut now: Told,
    duties: &Duties,
    own: &Vantage,
    verdicts: &Verdicts,
) -> (Told, StreamReportsResponse) {
    let health = now.healths.iter().filter(|(name, health)| told.healths.get(*name) != Some(health));
    let changed = now.loads.iter().filter(|(name, load)| told.loads.get(*name) != Some(load));
    // Of a backend that nobody reports any more, nothing is in flight.
    let gone = told.loads.iter().filter(|(name, load)| **load > 0 && !now.loads.contains_key(*name));
    let load = changed.map(|(name, load)| (name, *load)).chain(gone.map(|(name, _)| (name, 0)));
    let orders = duties.orders_after(told.serial, own);
    let order = |order: &crate::health::Order| ProbeOrder {
        backend: order.backend.clone(),
        tier: view::tier(order.tier).into(),
    };
    let assigned = assignments(duties, own);
    let answer = StreamReportsResponse {
        health: health.map(|(_, health)| verdicts.at_present(health)).collect(),
        load: load.map(|(name, in_flight)| FleetLoad { backend: name.clone(), in_flight }).collect(),
        live_gateways: now.live,
        assignments: (assigned != told.assignments).then(|| (*assigned).clone()),
        orders: orders.map(order).collect(),
        ..StreamReportsResponse::default()
    };
    now.assignments = assigned;
    now.serial = duties.serial().max(told.serial);
    (now, answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspicion_waits_and_a_verdict_does_not() {
        let health = |suspect: bool, state: v1::HealthState| {
            let health = v1::BackendHealth { suspect, state: state.into(), ..Default::default() };
            Healths::from([("b".to_owned(), health)])
        };
        let told = health(false, v1::HealthState::Healthy);
        assert!(!is_urgent(&told, &health(true, v1::HealthState::Healthy)));
        assert!(is_urgent(&told, &health(true, v1::HealthState::Unhealthy)));
        assert!(is_urgent(&Healths::new(), &told), "a backend nobody was told of");
    }

    #[test]
    fn a_large_fleet_is_told_its_load_less_often_but_every_second() {
        let millis = |live| load_interval(live).as_millis();
        assert_eq!([millis(3), millis(1000), millis(1600), millis(9000)], [500, 500, 800, 1000]);
    }

    #[tokio::test]
    async fn a_load_that_nobody_reports_any_more_is_zero() {
        let loads = |pairs: &[(&str, u32)]| {
            Arc::new(pairs.iter().map(|(name, load)| ((*name).to_owned(), *load)).collect::<Loads>())
        };
        let told = Told { loads: loads(&[("a", 1), ("b", 2), ("c", 3)]), ..Told::default() };
        let now = Told { loads: loads(&[("a", 1), ("b", 5)]), ..Told::default() };
        let load = |name: &str, in_flight| FleetLoad { backend: name.into(), in_flight };
        let verdicts =
            Verdicts::new(Arc::default(), None, tokio::sync::watch::Sender::new(Some(1)).subscribe());
        let (_, answer) = difference(&told, now, &Duties::default(), &gateway("g"), &verdicts);
        assert_eq!(answer.load, [load("b", 5), load("c", 0)]);
    }
}
