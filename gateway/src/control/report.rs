//! The report streams. A gateway sends its reports about once a second to every control plane; the leader sends verdicts
//! and the aggregates of all reports.
//!
//! Every control plane receives all reports, so each of them can become the leader at any time. The fencing token, which
//! rises with every election, tells the leader from a former leader that has not noticed its loss. The latest value wins
//! in both directions. Without a stream the last verdicts stay in force.

mod backends;
mod incoming;
mod last_received;
mod leader;
mod outgoing;
mod speeds;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_discovery::{Identity, Link};
use weir_proto::v1::StreamReportsResponse;

use self::last_received::LastReceived;
use self::leader::Leader;
use self::outgoing::{Observed, Outgoing};
use self::stream::{Event, ReportStream};
use super::live_config::LiveConfig;
use super::probe_channel::ProbeChannel;
use super::questions::Questions;
use super::traffic_report::TrafficCounter;
use crate::metrics::Metrics;

/// Between two reports.
const INTERVAL: Duration = Duration::from_secs(1);
/// Events of the streams that wait to be taken in; a stream waits when there is no room.
const EVENTS: usize = 16;

/// Reports what this gateway sees and takes in what the fleet sees.
#[derive(Debug)]
pub struct Reporter {
    /// The configuration whose backends are reported.
    pub live: Arc<LiveConfig>,
    /// What is counted of verdicts.
    pub metrics: Arc<Metrics>,
    /// What requests came to.
    pub traffic: Arc<TrafficCounter>,
    /// Where assignments of probes go and their results come from.
    pub probes: Arc<ProbeChannel>,
    /// Where the incarnations of gateways go that are gone.
    pub gone: mpsc::Sender<String>,
    /// Where the questions of control planes go.
    pub questions: Questions,
    /// Who this gateway is.
    pub identity: Identity,
}

impl Reporter {
    /// Follows the report streams until `shutdown`, each on a connection of its own.
    pub async fn run(self, links: Vec<Link>, shutdown: CancellationToken) {
        let (sender, mut events) = mpsc::channel(EVENTS);
        let outgoing: Vec<_> = links.iter().map(|_| Arc::new(Outgoing::default())).collect();
        let identity = Arc::new(self.identity.clone());
        // They end with the set.
        let mut streams = JoinSet::new();
        for (at, (link, outgoing)) in links.into_iter().zip(&outgoing).enumerate() {
            let (live, identity) = (Arc::clone(&self.live), Arc::clone(&identity));
            let (outgoing, events, questions) =
                (Arc::clone(outgoing), sender.clone(), self.questions.clone());
            streams.spawn(ReportStream { at, live, identity, link, outgoing, events, questions }.run());
        }
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut last, mut leader) = (LastReceived::default(), Leader::default());
        let mut revisions = self.live.revisions();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some((at, event)) = events.recv() => match event {
                    Event::Connected => self.report(&outgoing),
                    Event::Received(message) => self.received(at, &message, &mut leader, &mut last),
                    Event::Disconnected => if leader.disconnected(at) {
                        self.lost_leader();
                    },
                },
                Ok(()) = revisions.changed() => {
                    incoming::take(&self.live, &self.probes, &last.for_new_configuration(&self.live));
                }
                _ = ticks.tick() => self.report(&outgoing),
                () = self.probes.urgent_result() => self.report(&outgoing),
            }
        }
    }

    /// Applies a message if it comes from the leader.
    fn received(
        &self,
        at: usize,
        message: &StreamReportsResponse,
        leader: &mut Leader,
        last: &mut LastReceived,
    ) {
        let before = leader.stream();
        if !leader.received(at, message.leadership.as_ref()) {
            if before == Some(at) {
                self.lost_leader();
            }
            return;
        }
        self.probes.connected();
        let decided = last.decided(message);
        last.note(message);
        for incarnation in &message.gone_incarnations {
            // Without room its leases run out by themselves.
            let _ = self.gone.try_send(incarnation.clone());
        }
        incoming::take(&self.live, &self.probes, message);
        let delays = decided.iter().filter_map(|at| weir_runtime::wall_clock().duration_since(*at).ok());
        delays.for_each(|delay| self.metrics.verdict_delay.observe(delay.as_secs_f64()));
    }

    fn lost_leader(&self) {
        self.probes.disconnected();
        incoming::forget_fleet(&self.live);
    }

    /// Hands what was seen since the last time to every stream that is open. Without any it goes on being counted.
    fn report(&self, outgoing: &[Arc<Outgoing>]) {
        if !outgoing.iter().any(|stream| stream.is_open()) {
            return;
        }
        let observed = Observed {
            backends: backends::with_counts(&self.live),
            results: self.probes.take_results(),
            traffic: Some(self.traffic.take_traffic()),
            limits: self.traffic.take_limits(),
        };
        outgoing.iter().for_each(|stream| stream.add(&observed));
    }
}
