//! The configuration stream: one task per gateway, one delta at a time.

mod session;
mod status_only;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weir_proto::v1::discovery_service_server::DiscoveryService;
use weir_proto::v1::stream_config_request::Message as Up;
use weir_proto::v1::stream_config_response::Message as Down;
use weir_proto::v1::{self, StreamConfigRequest, StreamConfigResponse};

use self::session::{Answered, Lateness, Session};
use super::{Shared, check_about};
use crate::auth::Caller;
use crate::gateways::membership::OpenStream;
use crate::gateways::registry::{Claim, Connection, Taken};
use crate::model::Key;
use crate::publish::{ConfigState, Snapshot};

/// A stream without a hello within this time is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const HEARTBEAT: Duration = Duration::from_secs(10);
/// The approximate maximum age of a stream, so that gateways spread over replicas and use renewed certificates.
const AGE: Duration = Duration::from_secs(30 * 60);
/// Messages in the outbox. At most one delta is in flight, and heartbeats leave room for it.
const OUTBOX: usize = 4;
/// The longest time of a permit for an initial synchronisation; most are acknowledged within milliseconds.
const PERMIT_MAX: Duration = Duration::from_secs(3);

/// The discovery service.
#[derive(Debug, Clone)]
pub(crate) struct Discovery(pub(crate) Shared);

type Outbox = mpsc::Sender<Result<StreamConfigResponse, Status>>;

#[tonic::async_trait]
impl DiscoveryService for Discovery {
    type StreamConfigStream = ReceiverStream<Result<StreamConfigResponse, Status>>;

    async fn stream_config(
        &self,
        request: Request<Streaming<StreamConfigRequest>>,
    ) -> Result<Response<Self::StreamConfigStream>, Status> {
        super::open(&self.0, request, OUTBOX, serve)
    }
}

async fn hello(inbound: &mut Streaming<StreamConfigRequest>) -> Result<v1::Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::invalid_argument("no hello within 5 s"))??;
    let Some(Up::Hello(hello)) = first.and_then(|request| request.message) else {
        return Err(Status::invalid_argument("the first message on a stream is hello"));
    };
    let about = [("region", &*hello.region), ("build", &hello.build), ("incarnation", &hello.incarnation)];
    check_about(&hello.gateway_id, &about)?;
    Ok(hello)
}

/// The permit for an initial synchronisation: it bounds how many gateways receive the entire configuration at once.
enum Admission {
    /// No permit is needed, or it was released.
    None,
    Asked(BoxFuture<'static, Option<OwnedSemaphorePermit>>),
    /// The permit is kept until the gateway's first answer, and until `until` at most: a gateway that does not answer must
    /// not keep others waiting.
    Granted {
        #[expect(dead_code, reason = "kept, not read: dropping the permit frees it for the next stream")]
        permit: OwnedSemaphorePermit,
        until: Instant,
    },
}

impl Admission {
    /// When a granted permit is released at the latest.
    const fn ends(&self) -> Option<Instant> {
        match self {
            Self::Granted { until, .. } => Some(*until),
            Self::None | Self::Asked(_) => None,
        }
    }
}

/// One gateway's stream.
struct Stream {
    shared: Shared,
    caller: Caller,
    outbox: Outbox,
    connection: Connection,
    /// Counts the gateway as connected while its stream is open; `None` for a limit service.
    _member: Option<OpenStream>,
    session: Session,
    admission: Admission,
    id: String,
}

async fn serve(
    shared: Shared,
    caller: Caller,
    mut inbound: Streaming<StreamConfigRequest>,
    outbox: Outbox,
) -> Result<(), Status> {
    let hello = hello(&mut inbound).await?;
    shared.authority.speaks_for(&caller, &hello.gateway_id)?;
    if hello.status_only {
        return status_only::serve(shared, caller, hello, inbound, outbox).await;
    }
    let mut snapshots = shared.snapshots.clone();
    let snapshot = snapshots.borrow_and_update().clone();
    let stream = Stream::open(shared, caller, &hello, outbox, &snapshot)?;
    stream.run(inbound, snapshots, snapshot).await
}

/// The status for a refused stream. The gateway connects again.
fn taken(taken: Taken) -> Status {
    if matches!(taken, Taken::ByAnother(_)) {
        tracing::warn!(reason = %taken, "configuration stream refused");
    }
    Status::aborted(taken.to_string())
}

/// Sends a heartbeat if the outbox has room for it and a delta.
fn heartbeat(outbox: &Outbox, store_revision: u64) {
    let heartbeat = v1::Heartbeat { store_revision, time: Some(weir_runtime::wall_clock().into()) };
    if outbox.capacity() > 1 {
        let response = StreamConfigResponse { message: Some(Down::Heartbeat(heartbeat)) };
        let _ = outbox.try_send(Ok(response));
    }
}

/// The age at which a stream ends, a random value, so that streams that started together do not end together.
fn age_limit() -> Result<Duration, Status> {
    let mut random = [0_u8; 2];
    getrandom::fill(&mut random).map_err(|_| Status::unavailable("the system has no randomness"))?;
    let spread = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
    Ok(AGE.mul_f64(0.9 + 0.2 * spread))
}

impl Stream {
    fn open(
        shared: Shared,
        caller: Caller,
        hello: &v1::Hello,
        outbox: Outbox,
        snapshot: &Snapshot,
    ) -> Result<Self, Status> {
        let session = Session::new(ConfigState::of(hello), shared.differences.clone());
        let known = session.config.epoch == snapshot.epoch;
        if known && session.config.revision > snapshot.revision {
            tracing::warn!(
                gateway = hello.gateway_id,
                revision = session.config.revision,
                "gateway refused: its revision is newer than this store"
            );
            return Err(Status::failed_precondition(
                "this control plane is behind the revision of the gateway",
            ));
        }
        if !known && !session.config.versions.is_empty() {
            shared.metrics.foreign_epochs.inc();
            tracing::error!(
                gateway = hello.gateway_id,
                held_epoch = &*session.config.epoch,
                store_epoch = &*snapshot.epoch,
                resources = session.config.versions.len(),
                "a gateway holds the configuration of another store; was this one replaced or lost? It takes no mass \
                 removal without allow_mass_removal"
            );
        }
        // A gateway at this revision with other versions has not applied it completely.
        let differs = session.config.is(snapshot) && session.differs(snapshot);
        let applied = if known && !differs { session.config.revision } else { 0 };
        let claim = Claim::of(&caller);
        let connection = shared.registry.connect(hello, &session.config, applied, claim).map_err(taken)?;
        let limit_service = hello.role() == v1::SubscriberRole::LimitService;
        let member = (!limit_service).then(|| shared.membership.enter(&hello.gateway_id));
        tracing::info!(
            gateway = hello.gateway_id,
            caller = &*caller.name,
            build = hello.build,
            region = hello.region,
            "gateway connected"
        );
        let admission = if session.lacks(snapshot) {
            let permit = Arc::clone(&shared.initial_syncs).acquire_owned();
            Admission::Asked(async move { permit.await.ok() }.boxed())
        } else {
            Admission::None
        };
        let id = hello.gateway_id.clone();
        Ok(Self { shared, caller, outbox, connection, _member: member, session, admission, id })
    }

    async fn run(
        mut self,
        mut inbound: Streaming<StreamConfigRequest>,
        mut snapshots: watch::Receiver<Snapshot>,
        mut snapshot: Snapshot,
    ) -> Result<(), Status> {
        let replaced = self.connection.replaced.clone();
        let mut heartbeat = interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.reset();
        let ends = Instant::now() + age_limit()?;
        loop {
            self.send_delta(&snapshot)?;
            let deadline = self.session.deadline();
            let asked = matches!(self.admission, Admission::Asked(_));
            let permit_ends = self.admission.ends();
            tokio::select! {
                () = replaced.cancelled() => {
                    return Err(Status::aborted("another stream of this gateway took over"));
                }
                permit = self.permit(), if asked => {
                    let permit = permit.ok_or_else(|| Status::unavailable("the control plane is stopping"))?;
                    self.admission = Admission::Granted { permit, until: Instant::now() + PERMIT_MAX };
                }
                () = sleep_until(permit_ends.unwrap_or_else(Instant::now)), if permit_ends.is_some() => {
                    self.admission = Admission::None;
                }
                message = inbound.message() => match message? {
                    None => return Ok(()),
                    Some(request) => self.answered(request)?,
                },
                changed = snapshots.changed() => {
                    changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                    snapshot = snapshots.borrow_and_update().clone();
                }
                _ = heartbeat.tick() => {
                    self.shared.authority.still(&self.caller)?;
                    self.heartbeat();
                }
                // The stream ends between two deltas; the gateway connects again, maybe to another replica.
                () = sleep_until(ends), if !self.session.is_waiting() => return Ok(()),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.late()?,
            }
        }
    }

    /// Waits for the permit. Cancel-safe: the position in the queue is kept.
    async fn permit(&mut self) -> Option<OwnedSemaphorePermit> {
        match &mut self.admission {
            Admission::Asked(permit) => permit.await,
            Admission::None | Admission::Granted { .. } => std::future::pending().await,
        }
    }

    fn send_delta(&mut self, snapshot: &Snapshot) -> Result<(), Status> {
        if matches!(self.admission, Admission::Asked(_)) {
            return Ok(());
        }
        let Some(delta) = self.session.next(snapshot, Instant::now()) else { return Ok(()) };
        let bytes: usize = delta.upserts.iter().map(|upsert| upsert.body.len()).sum();
        self.shared.metrics.sent(delta.upserts.len(), bytes);
        let response = StreamConfigResponse { message: Some(Down::Delta(delta)) };
        self.outbox.try_send(Ok(response)).map_err(|_| Status::cancelled("the stream is closed"))?;
        self.connection.sent();
        Ok(())
    }

    fn answered(&mut self, request: StreamConfigRequest) -> Result<(), Status> {
        let (nonce, errors) = match request.message {
            Some(Up::Ack(ack)) => (ack.nonce, Vec::new()),
            Some(Up::Nack(nack)) if nack.errors.is_empty() => {
                let entire = v1::ResourceError { resource: None, message: "the entire delta".into() };
                (nack.nonce, vec![entire])
            }
            Some(Up::Nack(nack)) => (nack.nonce, nack.errors),
            Some(Up::Retry(_)) => {
                self.session.retry();
                return Ok(());
            }
            Some(Up::Hello(_) | Up::Applied(_)) => {
                return Err(Status::invalid_argument(
                    "hello is sent once, and applied on status-only streams",
                ));
            }
            None => return Err(Status::invalid_argument("a message is needed")),
        };
        match self.session.answered(nonce, errors) {
            Answered::Late => return Ok(()),
            Answered::Applied(revision) => {
                self.shared.metrics.acks.inc();
                self.connection.acknowledged(revision, &self.session.config);
            }
            Answered::Still { errors, revision } => {
                self.shared.metrics.acks.inc();
                self.connection.refused(&errors, revision, &self.session.config);
            }
            Answered::Refused { errors, revision, whole } => {
                for error in &errors {
                    let resource = error.resource.as_ref().and_then(Key::of_ref);
                    let resource =
                        resource.map_or_else(|| "the entire delta".to_owned(), |key| key.to_string());
                    let reason = &error.message;
                    tracing::warn!(gateway = self.id, resource, reason, "resource refused by a gateway");
                }
                self.shared.metrics.nacks.inc();
                if whole {
                    self.shared.metrics.full_nacks.inc();
                }
                self.connection.refused(&errors, revision, &self.session.config);
            }
        }
        self.admission = Admission::None;
        Ok(())
    }

    fn heartbeat(&self) {
        heartbeat(&self.outbox, self.session.config.revision);
    }

    fn late(&mut self) -> Result<(), Status> {
        match self.session.lateness(Instant::now()) {
            Lateness::InTime => Ok(()),
            Lateness::Stale => {
                tracing::warn!(gateway = self.id, "gateway is stale: no answer to a delta for 30 s");
                self.connection.stale();
                Ok(())
            }
            Lateness::Dead => Err(Status::deadline_exceeded("no answer to a delta for 120 s")),
        }
    }
}
