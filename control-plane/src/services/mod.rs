//! The gRPC services: thin layers between the wire and the parts that know.

pub(crate) mod admin;
pub(crate) mod discovery;
mod keys;
pub(crate) mod report;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::catalog::{self, Catalog};
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::model::Refusal;
use crate::publish::Snapshot;
use crate::registry::Registry;
use crate::store;

/// What the services share.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) catalog: Arc<Catalog>,
    pub(crate) snapshots: watch::Receiver<Snapshot>,
    pub(crate) registry: Registry,
    pub(crate) fleet: Fleet,
    pub(crate) metrics: Arc<Metrics>,
    /// Streams are tasks of their own; the end waits for them.
    pub(crate) tasks: TaskTracker,
    /// Ends every stream.
    pub(crate) stop: CancellationToken,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::NotFound(_) => Self::not_found(message),
            Refusal::AlreadyExists(_) => Self::already_exists(message),
            Refusal::EtagMismatch { .. } => Self::aborted(message),
            Refusal::Invalid(_) => Self::invalid_argument(message),
            Refusal::Referred { .. } | Refusal::MassRemoval { .. } | Refusal::Precondition(_) => {
                Self::failed_precondition(message)
            }
        }
    }
}

impl From<catalog::Error> for Status {
    fn from(error: catalog::Error) -> Self {
        match error {
            catalog::Error::Refused(refusal) => refusal.into(),
            catalog::Error::RequestIdReused => Self::invalid_argument(format!("request_id: {error}")),
            catalog::Error::Contended => Self::aborted(error.to_string()),
            catalog::Error::Behind => Self::unavailable(error.to_string()),
            catalog::Error::Store(store::Error::Conflict(_)) => Self::aborted(error.to_string()),
            catalog::Error::Store(_) => {
                // The text may name paths of this machine; it is for the operator's log.
                tracing::error!(%error, "a change failed");
                Self::unavailable("the store failed; see the control plane's log")
            }
        }
    }
}
