//! A backend, as a snapshot holds it.

use std::sync::Arc;

use http::HeaderValue;
use weir_proto::resource::{Backend, Name};
use weir_ratelimit::Key;

use super::backend_state::BackendState;
use super::upstream::Upstream;

/// A backend.
#[derive(Debug)]
pub struct BackendEntry {
    /// Its name.
    pub name: Name,
    /// Its spec.
    pub spec: Backend,
    /// The Authorization header sent to it.
    pub authorization: Option<HeaderValue>,
    /// The sorted set of its leases.
    pub slots: Key,
    /// A hash of its name, equal on every gateway: who it is to the balancer.
    pub id: u64,
    /// Its position in the pool's regions; after the last when it is in none of them.
    pub region_rank: usize,
    /// What outlives a change of it.
    pub state: Arc<BackendState>,
    /// Its connections.
    pub upstream: Upstream,
}

/// A backend that serves a model.
#[derive(Debug, Clone)]
pub struct ModelBackend {
    /// The backend.
    pub entry: Arc<BackendEntry>,
    /// The name that the backend knows the model by.
    pub upstream_model: String,
}
