//! A backend in a snapshot.

use std::sync::{Arc, OnceLock};

use http::{HeaderValue, Uri};
use weir_proto::resource::{Backend, Name};
use weir_ratelimit::Key;

use super::backend_state::BackendState;
use super::upstream::Upstream;
use crate::api::request::RouteKind;

/// A backend.
#[derive(Debug)]
pub struct BackendEntry {
    /// Its name.
    pub name: Name,
    /// Its spec.
    pub spec: Backend,
    /// The Authorization header sent to it.
    pub authorization: Option<HeaderValue>,
    /// Its lease set.
    pub slots: Key,
    /// A hash of its name, equal on every gateway, by which the balancer knows it.
    pub id: u64,
    /// The position of its region in the pool's regions; after the last one if it is in none of them.
    pub region_rank: usize,
    /// The state that outlives a change of the backend.
    pub state: Arc<BackendState>,
    /// Its connections.
    pub upstream: Upstream,
    /// The addresses of its endpoints, each made when it is first asked for.
    pub endpoints: Endpoints,
}

/// Addresses by endpoint.
#[derive(Debug, Default)]
pub struct Endpoints([OnceLock<Uri>; RouteKind::COUNT]);

impl BackendEntry {
    /// Whether the other one is asked at the same place, in the same way and with the same credential. If not, what was seen of
    /// either says nothing of the other.
    pub fn is_asked_like(&self, other: &Self) -> bool {
        let terms = |of: &Self| {
            let spec = &of.spec;
            (spec.url.clone(), spec.api_base_path.clone(), spec.health_path.clone(), spec.dialect)
        };
        self.spec.models == other.spec.models
            && self.authorization == other.authorization
            && terms(self) == terms(other)
    }

    /// The address of the endpoint that answers requests of this kind, which has this path in OpenAI's API.
    ///
    /// # Errors
    /// As [`BackendEntry::endpoint`].
    pub fn endpoint_of(&self, kind: RouteKind, path: &str) -> Result<Uri, http::Error> {
        let known = &self.endpoints.0[kind as usize];
        if known.get().is_none() {
            // Whoever is first, they are the same.
            let _ = known.set(self.endpoint(path)?);
        }
        Ok(known.get().cloned().unwrap_or_default())
    }

    /// The address of an endpoint of OpenAI's API at this backend, such as `/v1/chat/completions`.
    ///
    /// # Errors
    /// If `path` is not the path of a URL, which the constants of the API are.
    pub fn endpoint(&self, path: &str) -> Result<Uri, http::Error> {
        self.upstream.uri(&self.spec.api_path(path.strip_prefix("/v1").unwrap_or(path)))
    }
}

/// A backend that serves a model.
#[derive(Debug, Clone)]
pub struct ModelBackend {
    /// The backend.
    pub entry: Arc<BackendEntry>,
    /// The name of the model at this backend.
    pub upstream_model: String,
}
