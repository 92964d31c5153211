//! The configuration lane: one task per gateway, one delta at a time.

use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use weir_proto::v1::discovery_service_server::DiscoveryService;
use weir_proto::v1::stream_config_request::Message as Said;
use weir_proto::v1::stream_config_response::Message as Say;
use weir_proto::v1::{self, StreamConfigRequest, StreamConfigResponse};

use super::Shared;
use crate::model::Key;
use crate::publish::{Held, Snapshot, delta};
use crate::registry::Connection;

/// A stream that does not say hello by then is closed.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Without an answer to a delta for so long, a gateway is logged as stale.
const STALE_AFTER: Duration = Duration::from_secs(30);
/// And for so long, its stream is closed: it is stuck, and a new stream begins from what it really holds.
const CLOSED_AFTER: Duration = Duration::from_secs(120);
/// One delta is in flight at most, so it always finds a place; heartbeats leave one free.
const OUTBOX: usize = 4;
const GATEWAY_ID_MAX_BYTES: usize = 63;

/// See the module.
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
        let (outbox, stream) = mpsc::channel(OUTBOX);
        let shared = self.0.clone();
        let stop = shared.stop.clone();
        let inbound = request.into_inner();
        // Ends with the stream: the gateway's end, an error, or the stop signal, which `serve` watches.
        self.0.tasks.spawn(async move {
            let served = tokio::select! {
                served = serve(shared, inbound, outbox.clone()).boxed() => served,
                () = stop.cancelled() => Err(Status::unavailable("the control plane is stopping")),
            };
            if let Err(status) = served {
                // When the outbox is full nobody reads, and nobody misses the reason.
                let _ = outbox.try_send(Err(status));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

async fn hello(inbound: &mut Streaming<StreamConfigRequest>) -> Result<v1::Hello, Status> {
    let first = timeout(HELLO_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::invalid_argument("no hello within 5 s"))??;
    let Some(Said::Hello(hello)) = first.and_then(|request| request.message) else {
        return Err(Status::invalid_argument("the first message on a stream is hello"));
    };
    if hello.gateway_id.is_empty() || hello.gateway_id.len() > GATEWAY_ID_MAX_BYTES {
        return Err(Status::invalid_argument("hello.gateway_id: must be 1 to 63 bytes"));
    }
    Ok(hello)
}

/// One gateway's stream.
struct Stream {
    shared: Shared,
    outbox: Outbox,
    connection: Connection,
    held: Held,
    /// The delta that is not answered yet, since when, and whether that was logged.
    waiting: Option<(v1::Delta, Instant, bool)>,
    /// The snapshot that was refused in part: sent again only when there is a newer one.
    refused: Option<u64>,
    nonce: u64,
    id: String,
}

async fn serve(
    shared: Shared,
    mut inbound: Streaming<StreamConfigRequest>,
    outbox: Outbox,
) -> Result<(), Status> {
    let hello = hello(&mut inbound).await?;
    let mut snapshots = shared.snapshots.clone();
    let mut snapshot = snapshots.borrow_and_update().clone();
    let held = Held::of(&hello);
    let known = held.epoch == *snapshot.epoch;
    if known && held.revision > snapshot.revision {
        tracing::warn!(
            gateway = hello.gateway_id,
            revision = held.revision,
            "a gateway is ahead of this store"
        );
        return Err(Status::failed_precondition("this control plane is behind what the gateway holds"));
    }
    // Who says it is at this revision but holds something else has yet to apply it.
    let differs = held.is(&snapshot) && !is_empty(&delta(&snapshot, &held, 0));
    let applied = if known && !differs { held.revision } else { 0 };
    let connection = shared.registry.connect(&hello, applied);
    let replaced = connection.replaced.clone();
    tracing::info!(
        gateway = hello.gateway_id,
        build = hello.build,
        region = hello.region,
        "gateway connected"
    );
    let id = hello.gateway_id;
    let mut stream = Stream { shared, outbox, connection, held, waiting: None, refused: None, nonce: 0, id };
    let mut heartbeat = interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    heartbeat.reset();
    loop {
        stream.send_delta(&snapshot)?;
        let deadline = stream.deadline();
        tokio::select! {
            () = replaced.cancelled() => {
                return Err(Status::aborted("another stream of this gateway took over"));
            }
            said = inbound.message() => match said? {
                None => return Ok(()),
                Some(request) => stream.answered(request)?,
            },
            changed = snapshots.changed() => {
                changed.map_err(|_| Status::unavailable("the control plane is stopping"))?;
                snapshot = snapshots.borrow_and_update().clone();
            }
            _ = heartbeat.tick() => stream.heartbeat(),
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => stream.late()?,
        }
    }
}

impl Stream {
    /// Sends what differs, unless an answer is due, nothing differs, or just this was refused.
    fn send_delta(&mut self, snapshot: &Snapshot) -> Result<(), Status> {
        if self.waiting.is_some() || self.refused == Some(snapshot.revision) {
            return Ok(());
        }
        let delta = delta(snapshot, &self.held, self.nonce + 1);
        if is_empty(&delta) && self.held.is(snapshot) {
            return Ok(());
        }
        self.nonce += 1;
        let response = StreamConfigResponse { message: Some(Say::Delta(delta.clone())) };
        self.outbox.try_send(Ok(response)).map_err(|_| Status::cancelled("the stream is closed"))?;
        self.shared.metrics.deltas.inc();
        self.waiting = Some((delta, Instant::now(), false));
        Ok(())
    }

    fn answered(&mut self, request: StreamConfigRequest) -> Result<(), Status> {
        let (nonce, errors) = match request.message {
            Some(Said::Ack(ack)) => (ack.nonce, Vec::new()),
            Some(Said::Nack(nack)) if nack.errors.is_empty() => {
                let whole = v1::ResourceError { resource: None, message: "the whole delta".into() };
                (nack.nonce, vec![whole])
            }
            Some(Said::Nack(nack)) => (nack.nonce, nack.errors),
            Some(Said::Hello(_)) => return Err(Status::invalid_argument("hello is said once")),
            None => return Err(Status::invalid_argument("a message is needed")),
        };
        // The answer to an older delta says nothing about this one.
        let Some((delta, _, _)) = self.waiting.take_if(|(delta, _, _)| delta.nonce == nonce) else {
            return Ok(());
        };
        if errors.is_empty() {
            self.held.apply(&delta, &[]);
            self.shared.metrics.acks.inc();
            self.connection.acknowledged(delta.store_revision);
            return Ok(());
        }
        for error in &errors {
            let resource = named(error).map(|key| key.to_string()).unwrap_or_default();
            tracing::warn!(
                gateway = self.id,
                resource,
                reason = error.message,
                "a gateway refused a resource"
            );
        }
        // An error without a name is about the whole delta: nothing of it was applied.
        if let Some(refused) = errors.iter().map(named).collect::<Option<Vec<_>>>() {
            self.held.apply(&delta, &refused);
        }
        self.refused = Some(delta.store_revision);
        self.shared.metrics.nacks.inc();
        self.connection.refused(&errors);
        Ok(())
    }

    fn heartbeat(&self) {
        let heartbeat =
            v1::Heartbeat { store_revision: self.held.revision, time: Some(SystemTime::now().into()) };
        if self.outbox.capacity() > 1 {
            let response = StreamConfigResponse { message: Some(Say::Heartbeat(heartbeat)) };
            let _ = self.outbox.try_send(Ok(response));
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let (_, since, logged) = self.waiting.as_ref()?;
        Some(*since + if *logged { CLOSED_AFTER } else { STALE_AFTER })
    }

    fn late(&mut self) -> Result<(), Status> {
        match &mut self.waiting {
            Some((delta, since, logged)) if since.elapsed() < CLOSED_AFTER => {
                tracing::warn!(
                    gateway = self.id,
                    revision = delta.store_revision,
                    "gateway is stale: no answer"
                );
                *logged = true;
                Ok(())
            }
            Some(_) => Err(Status::deadline_exceeded("no answer to a delta for 120 s")),
            None => Ok(()),
        }
    }
}

fn is_empty(delta: &v1::Delta) -> bool {
    delta.upserts.is_empty() && delta.removals.is_empty()
}

/// The resource of an error; `None` when it names none.
fn named(error: &v1::ResourceError) -> Option<Key> {
    error.resource.as_ref().filter(|reference| !reference.name.is_empty()).and_then(Key::of_ref)
}
