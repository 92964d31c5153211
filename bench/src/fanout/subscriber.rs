//! A gateway as the control plane sees it: two streams, each on its own connection.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use weir_discovery::reconnect_backoff;
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::stream_config_response::Message as Down;
use weir_proto::v1::{self, HealthState, ProbeOutcome, ProbeTier};
use weir_runtime::Backoff;

use super::authorized;

/// The interval of a gateway's reports.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Backends with traffic, by gateway.
const REPORTED: usize = 10;
/// How often a waiting caller checks.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Revisions with remembered times.
const REMEMBERED: usize = 4;

/// All gateways.
pub(super) struct Fleet {
    board: Arc<Board>,
    started: Instant,
    tasks: JoinSet<()>,
}

/// The records of all gateways.
struct Board {
    plane: SocketAddr,
    token: String,
    backends: usize,
    gateways: Vec<Mutex<Gateway>>,
    body_bytes: AtomicU64,
    connected: AtomicUsize,
    /// The backend that does not work.
    broken: watch::Sender<Option<String>>,
    /// Gateways with a lower number do not read.
    stalled: watch::Sender<usize>,
}

/// The configuration of one gateway, and the times of changes.
#[derive(Default)]
struct Gateway {
    epoch: String,
    revision: u64,
    versions: BTreeMap<(i32, String), String>,
    /// Revisions and the times at which they were reached.
    reached: VecDeque<(u64, Instant)>,
    /// Why its last stream ended.
    error: Option<String>,
    /// When its configuration stream was last opened.
    connected: Option<Instant>,
    /// The states of backends that it received, and how long after the verdict.
    told: BTreeMap<String, (HealthState, Duration)>,
}

impl Fleet {
    pub(super) fn new(plane: SocketAddr, token: &str, gateways: usize, backends: usize) -> Self {
        let board = Board {
            plane,
            token: token.to_owned(),
            backends,
            gateways: (0..gateways).map(|_| Mutex::default()).collect(),
            body_bytes: AtomicU64::new(0),
            connected: AtomicUsize::new(0),
            broken: watch::Sender::new(None),
            stalled: watch::Sender::new(0),
        };
        Self { board: Arc::new(board), started: Instant::now(), tasks: JoinSet::new() }
    }

    /// Lets all of them connect, at once.
    pub(super) fn start(&mut self) {
        self.started = Instant::now();
        for i in 0..self.len() {
            self.tasks.spawn(again(Arc::clone(&self.board), i, StreamKind::Config));
            self.tasks.spawn(again(Arc::clone(&self.board), i, StreamKind::Report));
        }
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    pub(super) fn len(&self) -> usize {
        self.board.gateways.len()
    }

    pub(super) fn authorized<T>(&self, message: T) -> tonic::Request<T> {
        authorized(&self.board.token, message)
    }

    /// The bodies of resources that all gateways received.
    pub(super) fn body_bytes(&self) -> u64 {
        self.board.body_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn break_backend(&self, name: Option<String>) {
        self.board.broken.send_replace(name);
    }

    /// Lets this number of gateways stop reading.
    pub(super) fn stall(&self, gateways: usize) {
        self.board.stalled.send_replace(gateways);
    }

    /// The gateways that read.
    fn reading(&self) -> impl Iterator<Item = MutexGuard<'_, Gateway>> {
        let stalled = *self.board.stalled.borrow();
        (stalled..self.len()).map(|i| self.board.gateway(i))
    }

    pub(super) async fn everybody_has(&self, revision: u64) {
        self.until(|gateway| gateway.revision >= revision).await;
    }

    pub(super) async fn everything_healthy(&self) {
        let backends = self.board.backends;
        let healthy = |gateway: &Gateway| {
            let healthy = gateway.told.values().filter(|(state, _)| *state == HealthState::Healthy);
            healthy.count() == backends
        };
        self.until(healthy).await;
    }

    /// Waits until all have the verdict that a backend is unhealthy. Returns the delays after the verdict.
    pub(super) async fn everybody_told(&self, backend: &str) -> Vec<Duration> {
        let delay = |gateway: &Gateway| {
            let told = gateway.told.get(backend).filter(|(state, _)| *state == HealthState::Unhealthy);
            told.map(|(_, delay)| *delay)
        };
        self.until(|gateway| delay(gateway).is_some()).await;
        self.reading().filter_map(|gateway| delay(&gateway)).collect()
    }

    async fn until(&self, done: impl Fn(&Gateway) -> bool) {
        while !self.reading().all(|gateway| done(&gateway)) {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    pub(super) async fn nobody_connected(&self) {
        while self.board.connected.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The delays after `start` until each had a revision.
    pub(super) fn delays_to(&self, revision: u64, start: Instant) -> Vec<Duration> {
        let reached = |gateway: MutexGuard<'_, Gateway>| {
            let reached = gateway.reached.iter().find(|(at, _)| *at >= revision);
            reached.map(|(_, when)| when.duration_since(start))
        };
        self.reading().filter_map(reached).collect()
    }

    /// The delays after `start` until each had its stream open.
    pub(super) fn delays_to_connect(&self, start: Instant) -> Vec<Duration> {
        self.reading().filter_map(|gateway| Some(gateway.connected?.duration_since(start))).collect()
    }

    /// The reasons of ended streams, with the number of gateways for which each was the last.
    pub(super) fn errors(&self) -> BTreeMap<String, usize> {
        let mut errors = BTreeMap::new();
        for error in self.reading().filter_map(|gateway| gateway.error.clone()) {
            *errors.entry(error).or_default() += 1;
        }
        errors
    }

    /// Checks that all hold the same.
    pub(super) fn check_held(&self, revision: u64) -> anyhow::Result<()> {
        let first = self.board.gateway(0).versions.clone();
        ensure!(first.len() > self.board.backends, "a gateway holds {} resources", first.len());
        for i in 0..self.len() {
            let gateway = self.board.gateway(i);
            ensure!(gateway.revision == revision, "gateway {i} is at revision {}", gateway.revision);
            ensure!(gateway.versions == first, "gateway {i} holds something else than gateway 0");
        }
        Ok(())
    }
}

impl Board {
    fn gateway(&self, i: usize) -> MutexGuard<'_, Gateway> {
        self.gateways[i].lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn channel(&self) -> anyhow::Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.plane))?.tcp_nodelay(true);
        Ok(endpoint.connect_timeout(Duration::from_secs(5)).connect().await?)
    }

    /// Waits while this gateway does not read.
    async fn reads(&self, i: usize) {
        // The sender lives as long as the board.
        let _ = self.stalled.subscribe().wait_for(|stalled| i >= *stalled).await;
    }
}

#[derive(Clone, Copy)]
enum StreamKind {
    Config,
    Report,
}

/// Reconnects whenever a stream ends, as a gateway does.
async fn again(board: Arc<Board>, i: usize, kind: StreamKind) {
    let mut backoff = reconnect_backoff();
    loop {
        let ended = match kind {
            StreamKind::Config => config(&board, i, &mut backoff).await,
            StreamKind::Report => report(&board, i, &mut backoff).await,
        };
        // The bench ends streams itself; a stream that never comes back fails the bench, with this reason.
        if let Err(error) = ended {
            board.gateway(i).error = Some(format!("{error:#}"));
        }
        tokio::time::sleep(backoff.next_pause()).await;
    }
}

fn name(i: usize) -> String {
    format!("gateway-{i}")
}

/// Stops counting a gateway when its stream ends.
struct Connected<'a>(&'a AtomicUsize);

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn config(board: &Board, i: usize, backoff: &mut Backoff) -> anyhow::Result<()> {
    let mut client = DiscoveryServiceClient::new(board.channel().await?).max_decoding_message_size(64 << 20);
    let (up, messages) = mpsc::channel(2);
    let hello = {
        let gateway = board.gateway(i);
        let held = gateway.versions.iter().map(|((kind, name), version)| v1::ResourceVersion {
            kind: *kind,
            name: name.clone(),
            version: version.clone(),
        });
        v1::Hello {
            gateway_id: name(i),
            incarnation: "1".into(),
            region: format!("region-{}", i % 3),
            build: weir_runtime::version().into(),
            store_epoch: gateway.epoch.clone(),
            store_revision: gateway.revision,
            resource_versions: held.collect(),
            role: v1::SubscriberRole::Gateway.into(),
            status_only: false,
        }
    };
    let say = |message: Up| up.send(v1::StreamConfigRequest { message: Some(message) });
    say(Up::Hello(hello)).await?;
    let request = authorized(&board.token, ReceiverStream::new(messages));
    let mut stream = client.stream_config(request).await?.into_inner();
    backoff.reset();
    board.connected.fetch_add(1, Ordering::Relaxed);
    let _connected = Connected(&board.connected);
    board.gateway(i).connected = Some(Instant::now());
    loop {
        board.reads(i).await;
        let Some(message) = stream.message().await? else { return Ok(()) };
        if let Some(Down::Delta(delta)) = message.message {
            let bytes: usize = delta.upserts.iter().map(|upsert| upsert.body.len()).sum();
            board.body_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            let nonce = delta.nonce;
            board.gateway(i).apply(delta);
            say(Up::Ack(v1::Ack { nonce })).await?;
        }
    }
}

impl Gateway {
    fn apply(&mut self, delta: v1::Delta) {
        for upsert in delta.upserts {
            self.versions.insert((upsert.kind, upsert.name), upsert.version);
        }
        for gone in delta.removals {
            self.versions.remove(&(gone.kind, gone.name));
        }
        self.epoch = delta.store_epoch;
        self.revision = delta.store_revision;
        self.reached.push_back((self.revision, Instant::now()));
        if self.reached.len() > REMEMBERED {
            self.reached.pop_front();
        }
    }
}

/// The reports of a gateway.
struct Reporting<'a> {
    board: &'a Board,
    i: usize,
    sequence: u64,
    /// The backends that it probes regularly.
    assigned: BTreeSet<String>,
    out: mpsc::Sender<v1::StreamReportsRequest>,
}

async fn report(board: &Board, i: usize, backoff: &mut Backoff) -> anyhow::Result<()> {
    let mut client = ReportServiceClient::new(board.channel().await?);
    let (out, messages) = mpsc::channel(4);
    let mut own = Reporting { board, i, sequence: 0, assigned: BTreeSet::new(), out };
    own.send(Vec::new(), Vec::new()).await?;
    let request = authorized(&board.token, ReceiverStream::new(messages));
    let mut stream = client.stream_reports(request).await?.into_inner();
    backoff.reset();
    let mut broken = board.broken.subscribe();
    // Not all at the same time.
    let phase = REPORT_INTERVAL.mul_f64(i as f64 / board.gateways.len() as f64);
    let mut tick = interval_at(Instant::now() + phase, REPORT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        board.reads(i).await;
        tokio::select! {
            message = stream.message() => {
                let Some(message) = message? else { return Ok(()) };
                own.told(message).await?;
            }
            _ = tick.tick() => {
                let loads = (0..REPORTED).map(|n| v1::BackendReport {
                    backend: format!("backend-{}", (i + n * 7) % board.backends),
                    in_flight: u32::try_from((own.sequence as usize + i + n) % 10).unwrap_or_default(),
                    ..Default::default()
                });
                let results = own.assigned.iter().flat_map(|backend| own.probe(backend)).collect();
                own.send(loads.collect(), results).await?;
            }
            changed = broken.changed() => {
                changed.context("the bench is over")?;
                let results = own.assigned.iter().flat_map(|backend| own.probe(backend)).collect();
                own.send(Vec::new(), results).await?;
            }
        }
    }
}

impl Reporting<'_> {
    async fn told(&mut self, message: v1::StreamReportsResponse) -> anyhow::Result<()> {
        let now = weir_runtime::wall_clock();
        {
            let mut gateway = self.board.gateway(self.i);
            for health in message.health {
                let state = health.state();
                let since = health.since.and_then(|since| SystemTime::try_from(since).ok());
                let delay = since.and_then(|since| now.duration_since(since).ok()).unwrap_or_default();
                match gateway.told.get_mut(&health.backend) {
                    // Only the first word of a state counts.
                    Some(told) if told.0 == state => {}
                    _ => {
                        gateway.told.insert(health.backend, (state, delay));
                    }
                }
            }
        }
        let mut results = Vec::new();
        if let Some(assignments) = message.assignments {
            let liveness = assignments.assignments.iter().filter(|a| a.tier() == ProbeTier::Liveness);
            self.assigned = liveness.map(|a| a.backend.clone()).collect();
            results.extend(self.assigned.iter().flat_map(|backend| self.probe(backend)));
        }
        for order in &message.orders {
            results.extend(self.probe(&order.backend));
            results.extend(self.probe(&order.backend));
        }
        if results.is_empty() { Ok(()) } else { self.send(Vec::new(), results).await }
    }

    /// The result of a probe of a backend.
    fn probe(&self, backend: &str) -> [v1::ProbeResult; 1] {
        let broken = self.board.broken.borrow().as_deref() == Some(backend);
        let outcome = if broken { ProbeOutcome::Refused } else { ProbeOutcome::Pass };
        [v1::ProbeResult {
            backend: backend.to_owned(),
            tier: ProbeTier::Liveness.into(),
            outcome: outcome.into(),
            ..Default::default()
        }]
    }

    async fn send(
        &mut self,
        backends: Vec<v1::BackendReport>,
        results: Vec<v1::ProbeResult>,
    ) -> anyhow::Result<()> {
        self.sequence += 1;
        let report = v1::StreamReportsRequest {
            gateway_id: name(self.i),
            incarnation: "1".into(),
            sequence: self.sequence,
            region: format!("region-{}", self.i % 3),
            can_probe: true,
            backends,
            probe_results: results,
            ..Default::default()
        };
        self.out.send(report).await.context("the stream ended")
    }
}
