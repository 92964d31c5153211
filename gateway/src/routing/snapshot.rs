//! The snapshot: an immutable form of the configuration in force, compiled for the request path.
//!
//! A request loads one [`Snapshot`] and keeps it to its end, so that it never sees half a change. State that outlives
//! a change (schedulers, ejections, connection pools, in-flight counts) is in [`PoolState`](super::pool_state::PoolState) and
//! [`BackendState`](super::backend_state::BackendState), which the next snapshot takes over by name.
//!
//! A snapshot is made from the one before it. What serves requests (pools, backends, models and their limits) is compiled anew
//! each time, because it is small and its parts belong together: `serving`. Tenants, keys and their limits may be many; the
//! snapshots share them, and only what a change touches is compiled: `callers`.

mod callers;
mod serving;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderValue;
use weir_discovery::{Change, Refused, Update};
use weir_proto::resource::{Backend, Name, Resource};
use weir_proto::v1::ResourceKind;
use weir_runtime::{EgressPolicy, PersistentMap};

use self::callers::Callers;
use self::serving::Serving;
use super::backend::BackendEntry;
use super::entries::{KeyEntry, ModelEntry, PoolEntry, TenantEntry};
use super::key_table::KeyTable;
use super::model_use::{ModelUse, ModelUses};
use super::scope::ScopeEntry;
use super::upstream::Resolver;

/// The configuration in force.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The epoch of the store.
    pub epoch: String,
    /// The store revision.
    pub revision: u64,
    /// The resolver of backends' hosts. All snapshots of a gateway share it.
    pub resolver: Resolver,
    /// API keys by the SHA-256 of their secret.
    pub keys: KeyTable,
    /// Every tenant, those without a key included.
    pub tenants: PersistentMap<Name, Arc<TenantEntry>>,
    /// Models by their client-facing name.
    pub models: HashMap<String, Arc<ModelEntry>>,
    /// Models by their resource name, for fallbacks.
    pub models_by_name: BTreeMap<Name, Arc<ModelEntry>>,
    /// Pools by name.
    pub pools: BTreeMap<Name, Arc<PoolEntry>>,
    /// Backends by name.
    pub backends: BTreeMap<Name, Arc<BackendEntry>>,
    /// The global limits.
    pub global: Vec<ScopeEntry>,
    /// The addresses that backends may have: a setting of the process, which each snapshot passes on to the next.
    pub egress: EgressPolicy,
    /// What was asked for so far of keys and models together.
    pub uses: ModelUses,
    /// What pools, backends and models are compiled from.
    serving: Serving,
    /// What finds the tenants and keys that a change touches.
    callers: Callers,
}

/// Returns the Authorization header of a backend, or why it has none. A trait object, so that tests bring their own.
pub type Authorize<'a> = &'a dyn Fn(&Backend) -> Result<Option<HeaderValue>, String>;

/// The resources that a snapshot is compiled from.
trait Declared {
    fn get(&self, kind: ResourceKind, name: &Name) -> Option<Resource>;
}

impl Declared for Update<'_> {
    fn get(&self, kind: ResourceKind, name: &Name) -> Option<Resource> {
        Update::get(self, kind, name.as_str())
    }
}

impl Snapshot {
    /// The snapshot after a change, which takes over the lasting state of this one. A resource that cannot be used is left out
    /// and reported, and so is one that refers to a missing resource.
    pub fn updated(&self, update: &Update<'_>, authorize: Authorize<'_>) -> (Self, Vec<Refused>) {
        let next = Self {
            epoch: update.epoch.into(),
            revision: update.revision,
            keys: self.keys.clone(),
            tenants: self.tenants.clone(),
            serving: self.serving.clone(),
            callers: self.callers.clone(),
            ..Self::without_resources(self.egress.clone(), self.resolver.clone())
        };
        next.compiled(update.changes, update, self, authorize)
    }

    /// Without a configuration; backends may be where the policy allows, and their hosts are looked up by `resolver`.
    pub fn without_resources(egress: EgressPolicy, resolver: Resolver) -> Self {
        Self { egress, resolver, ..Self::default() }
    }

    fn compiled(
        mut self,
        changes: &[Change],
        declared: &dyn Declared,
        previous: &Self,
        authorize: Authorize<'_>,
    ) -> (Self, Vec<Refused>) {
        self.serving = self.serving.after(changes);
        let mut refused = serving::compile(&mut self, previous, authorize);
        callers::compile(&mut self, changes, declared);
        refused.extend(self.callers.refused());
        (self, refused)
    }

    /// The resources that decide where requests go: pools, backends and models, with their limits.
    pub fn serving(&self) -> &[Resource] {
        self.serving.resources()
    }
}

impl Snapshot {
    /// Applies this snapshot to the lasting state. Only a snapshot in force does: a configuration that is only tried
    /// must not remove backends from pools.
    pub fn take_effect(&self, previous: &Self) {
        let mut members: HashMap<&Name, BTreeSet<Name>> = HashMap::new();
        for backend in self.backends.values() {
            members.entry(&backend.spec.pool).or_default().insert(backend.name.clone());
            let before = previous.backends.get(&backend.name);
            if before.is_some_and(|before| !before.is_asked_like(backend))
                && let Some(pool) = self.pools.get(&backend.spec.pool)
            {
                pool.state.forget_failures(&backend.name);
            }
        }
        for pool in self.pools.values() {
            pool.state.configure(&pool.spec);
            pool.state.retain(&members.remove(&pool.name).unwrap_or_default());
        }
    }

    /// What requests of this key for this model have in common at `now`. Both are of this snapshot.
    pub fn model_use(&self, key: &KeyEntry, model: &ModelEntry, now: SystemTime) -> Arc<ModelUse> {
        self.uses.of(key, model, || self.scopes(key, &model.name), now)
    }

    /// Every scope of a request with this key for this model.
    pub fn scopes<'a>(&'a self, key: &'a KeyEntry, model: &Name) -> Vec<&'a ScopeEntry> {
        let key_and_tenant = key.scopes.iter().chain(&key.tenant.scopes);
        let of_model = self.models_by_name.get(model).map(|m| &m.scopes);
        let others = key.tenant.scopes_for(model).iter().chain(of_model.into_iter().flatten());
        key_and_tenant.chain(others).chain(&self.global).collect()
    }
}

#[cfg(test)]
impl Declared for BTreeMap<(ResourceKind, Name), Resource> {
    fn get(&self, kind: ResourceKind, name: &Name) -> Option<Resource> {
        BTreeMap::get(self, &(kind, name.clone())).cloned()
    }
}

#[cfg(test)]
impl Snapshot {
    /// Compiles resources from nothing and takes over the lasting state of `previous`.
    pub(crate) fn compile(
        epoch: &str,
        revision: u64,
        resources: &[Resource],
        previous: &Self,
        authorize: Authorize<'_>,
    ) -> (Self, Vec<Refused>) {
        let change = |resource: &Resource| Change {
            kind: resource.kind(),
            name: resource.name.as_str().into(),
            before: None,
            after: Some(resource.clone()),
        };
        let changes: Vec<Change> = resources.iter().map(change).collect();
        let declared: BTreeMap<_, _> =
            resources.iter().map(|r| ((r.kind(), r.name.clone()), r.clone())).collect();
        let empty = Self::without_resources(previous.egress.clone(), previous.resolver.clone());
        let next = Self { epoch: epoch.into(), revision, ..empty };
        next.compiled(&changes, &declared, previous, authorize)
    }
}

#[cfg(test)]
mod tests;
