//! What a snapshot is made of: tenants, keys, models and pools.

use std::sync::Arc;
use std::time::SystemTime;

use weir_proto::resource::{Model, Name, Pool, Priority, Timeouts};

use super::accounts::Accounts;
use super::backend::ModelBackend;
use super::balance::Candidates;
use super::pool_state::{BackendWeight, PoolState};
use super::scope::ScopeEntry;

/// A tenant.
#[derive(Debug)]
pub struct TenantEntry {
    /// Its name.
    pub name: Name,
    /// The models it may use; empty is all.
    pub allowed_models: Vec<Name>,
    /// Its limits.
    pub scope: Option<ScopeEntry>,
    /// Its name in the queues.
    pub queue: Arc<str>,
    /// Who goes first when several wait.
    pub priority: Priority,
}

/// An API key.
#[derive(Debug)]
pub struct KeyEntry {
    /// Its name.
    pub name: Name,
    /// Whose it is.
    pub tenant: Arc<TenantEntry>,
    /// The models it may use; empty is all the tenant may.
    pub allowed_models: Vec<Name>,
    /// From then on this digest is refused.
    pub expires: Option<SystemTime>,
    /// Its limits.
    pub scope: Option<ScopeEntry>,
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
    /// The clocks of its requests.
    pub timeouts: Timeouts,
    /// The pool's backends that serve it.
    pub backends: Vec<ModelBackend>,
    /// The limits of the providers' accounts that these backends bill.
    pub accounts: Accounts,
    /// Its limits.
    pub scope: Option<ScopeEntry>,
    /// The name of the queue for its slots.
    pub queue: Arc<str>,
}

/// A pool.
#[derive(Debug)]
pub struct PoolEntry {
    /// Its name.
    pub name: Name,
    /// Its spec.
    pub spec: Pool,
    /// What outlives a change of it.
    pub state: Arc<PoolState>,
}

impl ModelEntry {
    /// The backends in the order in which to try them; see [`PoolState::order`].
    pub fn order(&self, gateways: u32, prefix: Option<u64>) -> Candidates {
        self.pool.state.order(&self.name, &self.backends, gateways, prefix)
    }

    /// The effective weights of the backends now, and whether the pool is in panic for this model.
    pub fn weights(&self, gateways: u32) -> (Vec<BackendWeight>, bool) {
        self.pool.state.weights(&self.name, &self.backends, gateways)
    }

    /// The first choice had no free slot and another was used; see [`PoolState::reassign`].
    pub fn reassign(&self, picked: usize, used: usize) {
        self.pool.state.reassign(&self.name, &self.backends[picked].entry, &self.backends[used].entry);
    }
}
