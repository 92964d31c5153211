//! The entries of a snapshot: tenants, keys, models and pools.

use std::sync::Arc;
use std::time::SystemTime;

use weir_proto::resource::{Model, Name, Pool, Priority, Timeouts};
use weir_ratelimit::waiting::Places;

use super::accounts::Accounts;
use super::backend::ModelBackend;
use super::balance::{Candidate, Candidates, FEW};
use super::pool_state::{BackendWeight, PoolState, Selection};
use super::probation::Probation;
use super::roster::Roster;
use super::scope::ScopeEntry;

/// A tenant.
#[derive(Debug)]
pub struct TenantEntry {
    /// Its name.
    pub name: Name,
    /// The models that it may use; empty for all.
    pub allowed_models: Vec<Name>,
    /// Its limits.
    pub scopes: Box<[ScopeEntry]>,
    /// The limits of its use of single models, by model.
    pub model_scopes: Box<[(Name, Box<[ScopeEntry]>)]>,
    /// Its name in queues.
    pub queue: Arc<str>,
    /// Its priority in queues.
    pub priority: Priority,
}

impl TenantEntry {
    /// The limits of its use of a model.
    pub fn scopes_for(&self, model: &Name) -> &[ScopeEntry] {
        let found = self.model_scopes.binary_search_by(|(name, _)| name.cmp(model));
        found.ok().and_then(|at| self.model_scopes.get(at)).map_or(&[], |(_, scopes)| scopes)
    }
}

/// A digest of an API key. There may be a million of them, so that what most keys lack takes no room.
#[derive(Debug, Clone)]
pub struct KeyEntry {
    /// The SHA-256 of the secret.
    pub digest: [u8; 32],
    /// The name of the key.
    pub name: Name,
    /// Its tenant.
    pub tenant: Arc<TenantEntry>,
    /// The models that it may use; empty for all that the tenant may use.
    pub allowed_models: Box<[Name]>,
    /// The time from which on this digest is refused.
    pub expires: Option<SystemTime>,
    /// Its limits.
    pub scopes: Box<[ScopeEntry]>,
}

impl KeyEntry {
    /// Whether key and tenant allow a model.
    pub fn allows(&self, model: &Name) -> bool {
        let listed = |list: &[Name]| list.is_empty() || list.contains(model);
        listed(&self.allowed_models) && listed(&self.tenant.allowed_models)
    }
}

/// A model and the backends that serve it.
#[derive(Debug)]
pub struct ModelEntry {
    /// Its resource name: the only form in which it becomes a label or a Redis key.
    pub name: Name,
    /// Its spec.
    pub spec: Model,
    /// Its pool.
    pub pool: Arc<PoolEntry>,
    /// The timeouts of its requests.
    pub timeouts: Timeouts,
    /// The pool's backends that serve it.
    pub backends: Vec<ModelBackend>,
    /// The limits of the provider accounts that these backends bill.
    pub accounts: Accounts,
    /// Its limits.
    pub scopes: Vec<ScopeEntry>,
    /// The name of the queue for its slots.
    pub queue: Arc<str>,
    /// What is kept for the choice among the backends.
    pub roster: Roster,
}

/// A pool.
#[derive(Debug)]
pub struct PoolEntry {
    /// Its name.
    pub name: Name,
    /// Its spec.
    pub spec: Pool,
    /// The state that outlives a change of the pool.
    pub state: Arc<PoolState>,
}

impl ModelEntry {
    /// The first backends in the order of attempts, and the probe of the first backend if that is on probation; see
    /// [`PoolState::order`].
    pub fn order(&self, gateways: u32, prefix: Option<u64>) -> (Candidates, Option<Probation>) {
        let state = &self.pool.state;
        let (candidates, number) = state.order(&self.selection(gateways, prefix));
        let probation = number.zip(candidates.first()).map(|(number, first)| {
            let name = self.backends[first.index].entry.name.clone();
            Probation::new(state.clone(), name, first.index, number)
        });
        (candidates, probation)
    }

    /// Whether there can be backends after the first few.
    pub fn has_rest(&self) -> bool {
        self.roster.active(&self.backends).len() > FEW
    }

    /// The backends after these first `few`; see [`PoolState::rest`].
    pub fn rest(&self, gateways: u32, prefix: Option<u64>, few: &[Candidate]) -> Candidates {
        self.pool.state.rest(&self.selection(gateways, prefix), few)
    }

    /// The effective weights of the backends, and whether the pool is in panic mode for this model.
    pub fn weights(&self, gateways: u32) -> (Vec<BackendWeight>, bool) {
        self.pool.state.weights(&self.selection(gateways, None))
    }

    /// The slots that a request for this model may wait for.
    pub fn places(&self) -> Arc<Places> {
        self.roster.places(&self.backends)
    }

    fn selection(&self, gateways: u32, prefix: Option<u64>) -> Selection<'_> {
        Selection { model: &self.name, backends: &self.backends, roster: &self.roster, gateways, prefix }
    }

    /// Records that another backend was used because the first choice had no free slot; see [`PoolState::reassign`].
    pub fn reassign(&self, picked: usize, used: usize) {
        self.pool.state.reassign(&self.name, &self.backends[picked].entry, &self.backends[used].entry);
    }
}
