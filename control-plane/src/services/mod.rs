//! The gRPC services: thin layers between the protocol and the logic.

pub(crate) mod admin;
pub(crate) mod discovery;
mod keys;
mod questions;
pub(crate) mod report;

use std::sync::Arc;

use futures_util::FutureExt as _;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Request, Response, Status, Streaming};
use weir_proto::resource::{Violation, Violations};
use weir_proto::status::{self, with_reason};

use crate::auth::{Authority, Caller, is_gateway_id};
use crate::catalog::{self, Catalog};
use crate::gateways::aggregate::Aggregate;
use crate::gateways::membership::Membership;
use crate::gateways::questions::Questions;
use crate::gateways::registry::Registry;
use crate::leader::Leads;
use crate::metrics::Metrics;
use crate::model::Refusal;
use crate::publish::{Differences, Snapshot};
use crate::store;
use crate::verdicts::Verdicts;

/// The state that all services share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) snapshots: watch::Receiver<Snapshot>,
    pub(crate) differences: Differences,
    pub(crate) registry: Registry,
    pub(crate) membership: Membership,
    pub(crate) aggregate: Aggregate,
    /// Questions to gateways.
    pub(crate) questions: Questions,
    pub(crate) verdicts: Verdicts,
    /// The fencing token while this control plane is the leader.
    pub(crate) leads: Leads,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) authority: Authority,
    /// Permits for initial synchronisations of gateways.
    pub(crate) initial_syncs: Arc<Semaphore>,
    /// Permits for probes on demand.
    pub(crate) probes: Arc<Semaphore>,
    /// Streams are tasks of their own; the end waits for them.
    pub(crate) tasks: TaskTracker,
    /// Ends every stream.
    pub(crate) stop: CancellationToken,
}

/// Longest region, build and incarnation of a gateway, bytes.
const ABOUT_MAX_BYTES: usize = 128;

/// Checks the id and the texts by which a gateway introduces itself.
fn check_about(gateway_id: &str, about: &[(&str, &str)]) -> Result<(), Status> {
    if !is_gateway_id(gateway_id) {
        return Err(Status::invalid_argument(
            "gateway_id: must be 1 to 63 printable ASCII characters without spaces",
        ));
    }
    for (field, text) in about {
        if text.len() > ABOUT_MAX_BYTES || text.chars().any(char::is_control) {
            let rule = format!("{field}: must be at most {ABOUT_MAX_BYTES} bytes without control characters");
            return Err(Status::invalid_argument(rule));
        }
    }
    Ok(())
}

/// The caller, which the gate has authenticated.
fn caller<T>(request: &tonic::Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::unauthenticated("the caller is not known"))
}

/// What a stream sends.
type Outbox<A> = mpsc::Sender<Result<A, Status>>;

/// Opens a stream and serves it in a task of its own, to its end or the stop signal, with room for so many answers.
fn open<Q, A, F>(
    shared: &Shared,
    request: Request<Streaming<Q>>,
    room: usize,
    serve: impl FnOnce(Shared, Caller, Streaming<Q>, Outbox<A>) -> F,
) -> Result<Response<ReceiverStream<Result<A, Status>>>, Status>
where
    A: Send + 'static,
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let (outbox, stream) = mpsc::channel(room);
    let caller = caller(&request)?;
    let stop = shared.stop.clone();
    // On the heap: these futures are large.
    let serving = serve(shared.clone(), caller, request.into_inner(), outbox.clone()).boxed();
    shared.tasks.spawn(async move {
        let served = tokio::select! {
            served = serving => served,
            () = stop.cancelled() => Err(Status::unavailable("the control plane is stopping")),
        };
        if let Err(status) = served {
            // If the outbox is full, the client does not read and misses the reason.
            let _ = outbox.try_send(Err(status));
        }
    });
    Ok(Response::new(ReceiverStream::new(stream)))
}

/// The status of a request with one wrong field.
pub(crate) fn invalid(field: &str, message: &str) -> Status {
    let violation = Violation { path: field.to_owned(), message: message.to_owned() };
    status::invalid_argument(&Violations(vec![violation]))
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let (code, reason) = match refusal {
            Refusal::Invalid(violations) => return status::invalid_argument(&Violations(violations)),
            Refusal::NotFound(_) => (Code::NotFound, "NOT_FOUND"),
            Refusal::AlreadyExists(_) => (Code::AlreadyExists, "ALREADY_EXISTS"),
            Refusal::EtagMismatch { .. } => (Code::Aborted, "ETAG_MISMATCH"),
            Refusal::Referred { .. } => (Code::FailedPrecondition, "REFERRED_TO"),
            Refusal::MassRemoval { .. } => (Code::FailedPrecondition, "MASS_REMOVAL"),
            Refusal::OtherSets { .. } => (Code::FailedPrecondition, "OTHER_SET"),
            Refusal::Precondition(_) => (Code::FailedPrecondition, "PRECONDITION"),
        };
        with_reason(code, &message, reason)
    }
}

impl From<catalog::Error> for Status {
    fn from(error: catalog::Error) -> Self {
        let message = error.to_string();
        match error {
            catalog::Error::Refused(refusal) => refusal.into(),
            catalog::Error::RequestIdReused => invalid("request_id", &message),
            catalog::Error::Contended => with_reason(Code::Aborted, &message, "CONTENDED"),
            catalog::Error::Behind => with_reason(Code::Unavailable, &message, "BEHIND"),
            catalog::Error::Lagging => with_reason(Code::Unavailable, &message, "LAGGING"),
            catalog::Error::Forgotten { .. } => with_reason(Code::OutOfRange, &message, "FORGOTTEN"),
            catalog::Error::Ahead { .. } => with_reason(Code::OutOfRange, &message, "AHEAD"),
            catalog::Error::Store(store::Error::Conflict(_)) => {
                with_reason(Code::Aborted, &message, "CONFLICT")
            }
            catalog::Error::Store(store::Error::Full(_)) => {
                with_reason(Code::ResourceExhausted, &message, "STORE_FULL")
            }
            catalog::Error::Store(store::Error::TooLarge) => {
                with_reason(Code::FailedPrecondition, &message, "STORE_TOO_LARGE")
            }
            catalog::Error::Store(store::Error::Away { .. }) => {
                tracing::error!(error = message, "change failed");
                with_reason(
                    Code::Unavailable,
                    "the store does not answer; see the control plane's log",
                    "STORE_AWAY",
                )
            }
            catalog::Error::Store(_) => {
                // The text may name paths of this machine; it is for the operator's log.
                tracing::error!(error = message, "change failed");
                Self::unavailable("the store failed; see the control plane's log")
            }
        }
    }
}
