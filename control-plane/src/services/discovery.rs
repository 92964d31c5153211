//! The configuration stream: one task per gateway, one delta at a time.

mod observer;
mod session;

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

/// A stream that does not say hello by then is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const HEARTBEAT: Duration = Duration::from_secs(10);
/// A stream ends about this old, so that gateways spread over replicas and read their certificates anew.
const AGE: Duration = Duration::from_secs(30 * 60);
/// One delta is in flight at most, so it always finds room; heartbeats leave room for it.
const OUTBOX: usize = 4;
/// An initial synchronisation has its permit for so long at most; most are answered within milliseconds.
const PERMIT_MAX: Duration = Duration::from_secs(3);

/// The service that gateways follow.
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

/// The permit for an initial synchronisation: few gateways take everything at once.
enum Admission {
    /// It is not needed, or not any more.
    None,
    Asked(BoxFuture<'static, Option<OwnedSemaphorePermit>>),
    /// ConfigState until the first answer, at most until the time given: a gateway that does not answer must not keep others waiting.
    Granted {
        #[expect(dead_code, reason = "held, not read: dropping it frees it for the next")]
        permit: OwnedSemaphorePermit,
        until: Instant,
    },
}

impl Admission {
    /// When a permit that is held is given up.
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
    /// Of a gateway: it counts as there while its stream is open.
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
    if hello.observer {
        return observer::serve(shared, caller, hello, inbound, outbox).await;
    }
    let mut snapshots = shared.snapshots.clone();
    let snapshot = snapshots.borrow_and_update().clone();
    let stream = Stream::open(shared, caller, &hello, outbox, &snapshot)?;
    stream.run(inbound, snapshots, snapshot).await
}

/// Why a stream of a gateway is not taken. It comes back by itself.
fn taken(taken: Taken) -> Status {
    if matches!(taken, Taken::ByAnother(_)) {
        tracing::warn!(reason = %taken, "a gateway was refused");
    }
    Status::aborted(taken.to_string())
}

/// Says that the control plane lives, when there is room.
fn heartbeat(outbox: &Outbox, store_revision: u64) {
    let heartbeat = v1::Heartbeat { store_revision, time: Some(weir_runtime::wall_clock().into()) };
    if outbox.capacity() > 1 {
        let response = StreamConfigResponse { message: Some(Down::Heartbeat(heartbeat)) };
        let _ = outbox.try_send(Ok(response));
    }
}

/// The age at which a stream ends: drawn from a range, so that those that came together do not go together.
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
                "a gateway is ahead of this store"
            );
            return Err(Status::failed_precondition("this control plane is behind what the gateway holds"));
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
        // A gateway that names this revision and holds something else has yet to apply it.
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
                // A clean end between two deltas: the gateway comes back at once, perhaps to another replica.
                () = sleep_until(ends), if !self.session.is_waiting() => return Ok(()),
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => self.late()?,
            }
        }
    }

    /// Waits for the permit. Cancel-safe: the turn in the queue is kept.
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
                let whole = v1::ResourceError { resource: None, message: "the whole delta".into() };
                (nack.nonce, vec![whole])
            }
            Some(Up::Nack(nack)) => (nack.nonce, nack.errors),
            Some(Up::Retry(_)) => {
                self.session.retry();
                return Ok(());
            }
            Some(Up::Hello(_) | Up::Applied(_)) => {
                return Err(Status::invalid_argument("hello is said once, and applied by observers"));
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
                        resource.map_or_else(|| "the whole delta".to_owned(), |key| key.to_string());
                    let reason = &error.message;
                    tracing::warn!(gateway = self.id, resource, reason, "a gateway refused a resource");
                }
                self.shared.metrics.nacks.inc();
                if whole {
                    self.shared.metrics.refused_whole.inc();
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
