//! The report stream: receives the reports of gateways and sends verdicts and aggregates. The latest value wins: nothing is
//! queued for a gateway that does not read; later it receives the difference to the last message.
//!
//! Only the leader sends verdicts and aggregates. The other control planes send that they are not the leader, and receive
//! reports.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weir_proto::v1::report_service_server::ReportService;
use weir_proto::v1::{
    self, AggregateLoad, AggregateTraffic, AnswerQuestionsRequest, AnswerQuestionsResponse, Leadership,
    ProbeAssignments, ProbeOrder, ProbeTier, StreamReportsRequest, StreamReportsResponse,
};

use super::{Shared, check_about, questions};
use crate::auth::Caller;
use crate::gateways::aggregate::{Departures, LastSentSpeeds, Reporter};
use crate::gateways::loads::{Loads, Traffic};
use crate::gateways::registry::Claim;
use crate::health::Observer;
use crate::leader::Leads;
use crate::verdicts::{Duties, Healths, Verdicts, gateway, view};

/// Messages in the outbox of a stream; the latest value wins.
const OUTBOX: usize = 2;
const FIRST_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two messages at most: a gateway that hears nothing for three times as long tries another connection.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A gateway reports every second.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// The shortest interval between two messages with loads or the number of gateways, which change often. Verdicts are sent
/// without this delay.
const LOAD_INTERVAL: Duration = Duration::from_millis(500);
/// Messages with loads per second over all gateways. With many gateways each of them receives loads less often...
const LOADS_PER_SECOND: f64 = 2000.0;
/// ...but at least this often, so that loads are not older than reports.
const LOAD_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// The report service.
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

    type AnswerQuestionsStream = ReceiverStream<Result<AnswerQuestionsResponse, Status>>;

    async fn answer_questions(
        &self,
        request: Request<Streaming<AnswerQuestionsRequest>>,
    ) -> Result<Response<Self::AnswerQuestionsStream>, Status> {
        super::open(&self.0, request, questions::OUTBOX, questions::serve)
    }
}

/// The values that a gateway was last sent.
#[derive(Default)]
struct LastSent {
    healths: Arc<Healths>,
    loads: Arc<Loads>,
    speeds: LastSentSpeeds,
    traffic: Traffic,
    live: u32,
    assignments: Arc<ProbeAssignments>,
    /// The serial of the last order sent.
    serial: u64,
    /// The number of the last departure sent.
    departure: u64,
}

/// The values that can be sent now.
struct Current {
    healths: Arc<Healths>,
    loads: Arc<Loads>,
    live: u32,
}

impl LastSent {
    /// Whether there are assignments or orders that were not sent yet.
    fn lacks(&self, duties: &Duties, of: &Observer) -> bool {
        assignments(duties, of) != self.assignments || duties.orders_after(self.serial, of).next().is_some()
    }

    /// Returns the difference to the last message, and records it as sent.
    fn advance(
        &mut self,
        now: Current,
        duties: &Duties,
        own: &Observer,
        verdicts: &Verdicts,
    ) -> StreamReportsResponse {
        let health = now.healths.iter().filter(|(name, health)| self.healths.get(*name) != Some(health));
        let changed = now.loads.iter().filter(|(name, load)| self.loads.get(*name) != Some(load));
        // A backend without reports has no requests in flight.
        let gone = self.loads.iter().filter(|(name, load)| **load > 0 && !now.loads.contains_key(*name));
        let load = changed.map(|(name, load)| (name, *load)).chain(gone.map(|(name, _)| (name, 0)));
        let order = |order: &crate::health::Order| ProbeOrder {
            backend: order.backend.clone(),
            tier: view::tier(order.tier).into(),
        };
        let assigned = assignments(duties, own);
        let answer = StreamReportsResponse {
            health: health.map(|(_, health)| verdicts.at_present(health)).collect(),
            load: load.map(|(name, in_flight)| AggregateLoad { backend: name.clone(), in_flight }).collect(),
            live_gateways: now.live,
            assignments: (assigned != self.assignments).then(|| (*assigned).clone()),
            orders: duties.orders_after(self.serial, own).map(order).collect(),
            ..StreamReportsResponse::default()
        };
        (self.healths, self.loads, self.live) = (now.healths, now.loads, now.live);
        self.assignments = assigned;
        self.serial = duties.serial().max(self.serial);
        answer
    }
}

/// The probe assignments of one gateway; an empty list is valid.
fn assignments(duties: &Duties, of: &Observer) -> Arc<ProbeAssignments> {
    duties.assignments.get(of).cloned().unwrap_or_default()
}

/// The channels of all values that can be sent.
struct Sources {
    healths: watch::Receiver<Arc<Healths>>,
    duties: watch::Receiver<Arc<Duties>>,
    loads: watch::Receiver<Arc<Loads>>,
    /// Changes when there are new speeds or traffic.
    served: watch::Receiver<()>,
    departures: watch::Receiver<Departures>,
    live: watch::Receiver<u32>,
    leads: Leads,
}

/// One report stream: the values that were sent, and what is still to be sent.
struct ReportStream {
    shared: Shared,
    gateway_id: String,
    own: Observer,
    reporter: Reporter,
    sources: Sources,
    sent: LastSent,
    /// The fencing token while this control plane is the leader.
    leading: Option<u64>,
    /// Not yet sent to the gateway: whether this control plane is the leader.
    leadership: Option<Leadership>,
    /// Something is to be sent at once.
    urgent: bool,
    /// A message is to be sent, whatever there is to say.
    heartbeat: bool,
    /// Something is to be sent when the next loads are due.
    load_changed: bool,
    load_due: Instant,
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
    ReportStream::open(shared, &caller, &first)?.run(inbound, outbox).await
}

impl ReportStream {
    fn open(shared: Shared, caller: &Caller, first: &StreamReportsRequest) -> Result<Self, Status> {
        // Orders and departures from before this stream are not sent: they are answered or have expired.
        let mut duties = shared.verdicts.duties();
        let serial = duties.borrow_and_update().serial();
        let mut departures = shared.aggregate.departures();
        let departure = departures.borrow_and_update().last();
        let reporter = shared.aggregate.join(first, &Claim::of(caller)).map_err(|taken| {
            tracing::warn!(reason = %taken, "report stream refused");
            Status::aborted(taken.to_string())
        })?;
        reporter.report(first);
        let mut leads = shared.leads.clone();
        let leading = *leads.borrow_and_update();
        let sources = Sources {
            healths: shared.verdicts.healths(),
            duties,
            loads: shared.aggregate.loads(),
            served: shared.aggregate.served(),
            departures,
            live: shared.membership.count(),
            leads,
        };
        Ok(Self {
            gateway_id: first.gateway_id.clone(),
            own: gateway(&first.gateway_id),
            reporter,
            sources,
            sent: LastSent { serial, departure, ..LastSent::default() },
            leading,
            leadership: Some(claim(&shared, leading)),
            // The first message contains all values.
            urgent: true,
            heartbeat: false,
            load_changed: true,
            load_due: Instant::now(),
            shared,
        })
    }

    async fn run(
        mut self,
        mut inbound: Streaming<StreamReportsRequest>,
        outbox: Outbox,
    ) -> Result<(), Status> {
        let mut heartbeats = interval(HEARTBEAT);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeats.reset();
        let mut silent_at = Instant::now() + SILENCE_MAX;
        loop {
            let load_ready = self.load_changed && self.load_due <= Instant::now();
            let news = self.leadership.is_some() || self.leading.is_some() && (self.urgent || load_ready);
            let to_send = news || self.heartbeat;
            tokio::select! {
                permit = outbox.reserve(), if to_send => {
                    let permit = permit.map_err(|_| Status::cancelled("the stream is closed"))?;
                    if let Some(message) = self.next_message(load_ready) {
                        permit.send(Ok(message));
                        heartbeats.reset();
                    }
                }
                _ = heartbeats.tick() => self.heartbeat = true,
                () = sleep_until(silent_at) => {
                    return Err(Status::deadline_exceeded("no report for 30 s"));
                }
                message = inbound.message() => match message? {
                    None => return Ok(()),
                    Some(report) => {
                        silent_at = Instant::now() + SILENCE_MAX;
                        self.reporter.report(&report);
                    }
                },
                changed = self.sources.leads.changed() => {
                    changed.map_err(stopping)?;
                    self.leader_changed();
                }
                changed = self.sources.healths.changed() => {
                    changed.map_err(stopping)?;
                    self.urgent |= is_urgent(&self.sent.healths, &self.sources.healths.borrow_and_update());
                    self.load_changed = true;
                }
                changed = self.sources.duties.changed() => {
                    changed.map_err(stopping)?;
                    self.urgent |= self.sent.lacks(&self.sources.duties.borrow_and_update(), &self.own);
                }
                changed = self.sources.departures.changed() => {
                    changed.map_err(stopping)?;
                    self.urgent |= self.shared.aggregate.cleans_up(&self.gateway_id);
                }
                // Sent with the next loads. While a message is pending, further changes do not wake the stream, because
                // they would wake each of a thousand streams a thousand times a second.
                changed = self.sources.loads.changed(), if !self.load_changed => {
                    changed.map_err(stopping)?;
                    self.load_changed = *self.sources.loads.borrow_and_update() != self.sent.loads;
                }
                changed = self.sources.served.changed(), if !self.load_changed => {
                    changed.map_err(stopping)?;
                    self.load_changed = true;
                }
                changed = self.sources.live.changed(), if !self.load_changed => {
                    changed.map_err(stopping)?;
                    self.load_changed = *self.sources.live.borrow_and_update() != self.sent.live;
                }
                () = sleep_until(self.load_due), if self.load_changed && !load_ready => {}
            }
        }
    }

    /// The message to send now, if there is one.
    fn next_message(&mut self, load_ready: bool) -> Option<StreamReportsResponse> {
        // The leader may have changed while the stream waited for room in the outbox.
        if *self.sources.leads.borrow() != self.leading {
            return None;
        }
        let heartbeat = std::mem::take(&mut self.heartbeat);
        if self.leading.is_none() {
            let leadership = self.leadership.take();
            return Some(StreamReportsResponse { leadership, ..Default::default() });
        }
        let empty = StreamReportsResponse { live_gateways: self.sent.live, ..Default::default() };
        let sources = &mut self.sources;
        let now = Current {
            healths: sources.healths.borrow_and_update().clone(),
            // A message with a verdict contains loads only if they are due.
            loads: if load_ready {
                sources.loads.borrow_and_update().clone()
            } else {
                self.sent.loads.clone()
            },
            live: if load_ready { *sources.live.borrow_and_update() } else { self.sent.live },
        };
        let verdicts = &self.shared.verdicts;
        let mut answer = self.sent.advance(now, &sources.duties.borrow_and_update(), &self.own, verdicts);
        let cleans_up = self.shared.aggregate.cleans_up(&self.gateway_id);
        {
            let departures = sources.departures.borrow_and_update();
            if cleans_up {
                answer.gone_incarnations = departures.after(self.sent.departure);
            }
            self.sent.departure = departures.last();
        }
        if load_ready {
            self.add_figures(&mut answer);
            self.load_changed = false;
            self.load_due = Instant::now() + load_interval(self.sent.live);
        }
        self.urgent = false;
        answer.leadership = self.leadership.take();
        (heartbeat || answer != empty).then_some(answer)
    }

    /// Adds changed speeds and traffic.
    fn add_figures(&mut self, answer: &mut StreamReportsResponse) {
        let aggregate = &self.shared.aggregate;
        answer.speeds = self.sent.speeds.news(&aggregate.speeds_without(&self.gateway_id));
        let traffic = aggregate.traffic_at(&paid(&self.sent.assignments));
        let is_news =
            |(name, traffic): &(&String, &AggregateTraffic)| self.sent.traffic.get(*name) != Some(traffic);
        answer.traffic = traffic.iter().filter(is_news).map(|(_, traffic)| traffic.clone()).collect();
        self.sent.traffic = traffic;
    }

    fn leader_changed(&mut self) {
        self.leading = *self.sources.leads.borrow_and_update();
        self.leadership = Some(claim(&self.shared, self.leading));
        // Everything is sent again, because the values sent by the former leader are unknown here; so are all departures
        // since the start of this stream, which the former leader may not have sent.
        let serial = self.sources.duties.borrow_and_update().serial();
        self.sent = LastSent { serial, departure: self.sent.departure, ..LastSent::default() };
        (self.urgent, self.load_changed, self.load_due) = (true, true, Instant::now());
    }
}

fn stopping(_: watch::error::RecvError) -> Status {
    Status::unavailable("the control plane is stopping")
}

/// The interval between two messages with loads to one gateway, for a number of gateways.
fn load_interval(live: u32) -> Duration {
    Duration::from_secs_f64(f64::from(live) / LOADS_PER_SECOND).clamp(LOAD_INTERVAL, LOAD_INTERVAL_MAX)
}

/// Whether verdicts differ in how backends are used. The suspect mark and the reason wait for the next loads. Otherwise,
/// with many gateways, they would still be sent when the verdict itself follows.
fn is_urgent(sent: &Healths, now: &Healths) -> bool {
    let used = |health: &v1::BackendHealth| {
        (health.state, health.factor, health.overridden, health.stale, health.slow_start)
    };
    now.iter().any(|(name, health)| sent.get(name).is_none_or(|sent| used(sent) != used(health)))
}

fn claim(shared: &Shared, leading: Option<u64>) -> Leadership {
    let store_epoch = shared.catalog.state().epoch.to_string();
    Leadership { store_epoch, fencing_token: leading.unwrap_or_default() }
}

/// The backends that a gateway probes at a tier that costs tokens. It skips such a probe if requests of all gateways prove
/// the backend.
fn paid(assignments: &ProbeAssignments) -> BTreeSet<&str> {
    let paid = assignments.assignments.iter().filter(|a| a.tier() != ProbeTier::Liveness);
    paid.map(|a| a.backend.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspect_mark_waits_for_the_next_report_and_a_verdict_does_not() {
        let health = |suspect: bool, state: v1::HealthState| {
            let health = v1::BackendHealth { suspect, state: state.into(), ..Default::default() };
            Healths::from([("b".to_owned(), health)])
        };
        let sent = health(false, v1::HealthState::Healthy);
        assert!(!is_urgent(&sent, &health(true, v1::HealthState::Healthy)));
        assert!(is_urgent(&sent, &health(true, v1::HealthState::Unhealthy)));
        assert!(is_urgent(&Healths::new(), &sent), "a backend that was not sent yet");
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
        let mut sent = LastSent { loads: loads(&[("a", 1), ("b", 2), ("c", 3)]), ..LastSent::default() };
        let now =
            Current { loads: loads(&[("a", 1), ("b", 5)]), healths: sent.healths.clone(), live: sent.live };
        let load = |name: &str, in_flight| AggregateLoad { backend: name.into(), in_flight };
        let verdicts =
            Verdicts::new(Arc::default(), None, tokio::sync::watch::Sender::new(Some(1)).subscribe());
        let answer = sent.advance(now, &Duties::default(), &gateway("g"), &verdicts);
        assert_eq!(answer.load, [load("b", 5), load("c", 0)]);
    }
}
