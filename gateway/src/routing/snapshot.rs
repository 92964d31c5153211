//! The snapshot: an immutable form of the configuration in force, compiled for the request path.
//!
//! A request loads one [`Snapshot`] and keeps it to its end, so that it never sees half a change. State that outlives
//! a change (schedulers, ejections, connection pools, in-flight counts) is in [`PoolState`] and
//! [`BackendState`](super::backend_state::BackendState), which the next snapshot takes over by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use http::HeaderValue;
use weir_discovery::Refused;
use weir_proto::resource::{AdminState, Backend, Limit, Name, Resource, Spec};
use weir_ratelimit::{DeclaredLimits, Key, Scope};
use weir_runtime::EgressPolicy;

use super::accounts::Accounts;
use super::backend::{BackendEntry, Endpoints, ModelBackend};
use super::balance::stable_hash;
use super::entries::{KeyEntry, ModelEntry, PoolEntry, TenantEntry};
use super::model_use::ModelUses;
use super::pool_state::PoolState;
use super::roster::Roster;
use super::scope::ScopeEntry;
use super::upstream::{Resolver, Upstream};

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
    pub keys: HashMap<[u8; 32], Arc<KeyEntry>>,
    /// Every tenant, those without a key included.
    pub tenants: BTreeSet<Name>,
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
    /// The limits of a tenant's use of one model.
    pub tenant_models: HashMap<(Name, Name), Vec<ScopeEntry>>,
    /// The addresses that backends may have: a setting of the process, which each snapshot passes on to the next.
    pub egress: EgressPolicy,
    /// What was asked for so far of keys and models together.
    pub uses: ModelUses,
}

/// Returns the Authorization header of a backend, or why it has none. A trait object, so that tests bring their own.
pub type Authorize<'a> = &'a dyn Fn(&Backend) -> Result<Option<HeaderValue>, String>;

impl Snapshot {
    /// Compiles resources and takes over the lasting state of `previous`. A resource that cannot be used is left out
    /// and reported, and so is one that refers to a missing resource.
    pub fn compile(
        epoch: &str,
        revision: u64,
        resources: &[Resource],
        previous: &Snapshot,
        authorize: Authorize<'_>,
    ) -> (Self, Vec<Refused>) {
        let (egress, resolver) = (previous.egress.clone(), previous.resolver.clone());
        let next = Self { epoch: epoch.into(), revision, egress, resolver, ..Self::default() };
        let mut compiler = Compiler { next, refused: Vec::new() };
        compiler.pools(resources, previous);
        compiler.backends(resources, previous, authorize);
        let limits = DeclaredLimits::of(resources);
        compiler.models(resources, &limits);
        compiler.limits(resources, &limits);
        compiler.keys(resources, &limits);
        (compiler.next, compiler.refused)
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

    /// Every scope of a request with this key for this model.
    pub fn scopes<'a>(&'a self, key: &'a KeyEntry, model: &Name) -> Vec<&'a ScopeEntry> {
        let tenant_model = (key.tenant.name.clone(), model.clone());
        let key_and_tenant = key.scopes.iter().chain(&key.tenant.scopes);
        let of_model = self.models_by_name.get(model).map(|m| &m.scopes);
        let others = self.tenant_models.get(&tenant_model).into_iter().chain(of_model).flatten();
        key_and_tenant.chain(others).chain(&self.global).collect()
    }
}

struct Compiler {
    next: Snapshot,
    refused: Vec<Refused>,
}

impl Compiler {
    fn refuse(&mut self, resource: &Resource, message: String) {
        self.refused.push(Refused { kind: resource.kind(), name: resource.name.to_string(), message });
    }

    fn pools(&mut self, resources: &[Resource], previous: &Snapshot) {
        for resource in resources {
            let Spec::Pool(spec) = &resource.spec else { continue };
            let state = match previous.pools.get(&resource.name) {
                Some(old) => old.state.clone(),
                None => Arc::new(PoolState::new(spec)),
            };
            let entry = PoolEntry { name: resource.name.clone(), spec: spec.clone(), state };
            self.next.pools.insert(resource.name.clone(), Arc::new(entry));
        }
    }

    fn backends(&mut self, resources: &[Resource], previous: &Snapshot, authorize: Authorize<'_>) {
        for resource in resources {
            let Spec::Backend(spec) = &resource.spec else { continue };
            let Some(pool) = self.next.pools.get(&spec.pool).cloned() else {
                self.refuse(resource, format!("backend.pool: there is no pool {}", spec.pool));
                continue;
            };
            let authorization = match authorize(spec) {
                Ok(authorization) => authorization,
                Err(message) => {
                    self.refuse(resource, message);
                    continue;
                }
            };
            let old = previous.backends.get(&resource.name);
            let connect = pool.spec.timeouts.connect;
            let upstream = old.filter(|o| o.upstream.serves(spec, connect)).map_or_else(
                || Upstream::new(spec, connect, &previous.egress, &previous.resolver),
                |o| o.upstream.clone(),
            );
            let rank = pool.spec.regions.iter().position(|r| *r == spec.region);
            let entry = BackendEntry {
                name: resource.name.clone(),
                spec: spec.clone(),
                authorization,
                slots: Key::backend_slots(resource.name.as_str()),
                id: stable_hash(resource.name.as_str().as_bytes()),
                region_rank: rank.unwrap_or(pool.spec.regions.len()),
                state: old.map_or_else(Arc::default, |o| o.state.clone()),
                upstream,
                endpoints: Endpoints::default(),
            };
            self.next.backends.insert(resource.name.clone(), Arc::new(entry));
        }
    }

    fn models(&mut self, resources: &[Resource], limits: &DeclaredLimits<'_>) {
        // An index, because a search of all backends for every model would delay a revocation.
        let mut serving: HashMap<(Name, Name), Vec<Arc<BackendEntry>>> = HashMap::new();
        for backend in self.next.backends.values() {
            if backend.spec.admin_state != AdminState::Disabled {
                for model in backend.spec.models.keys() {
                    let id = (backend.spec.pool.clone(), model.clone());
                    serving.entry(id).or_default().push(backend.clone());
                }
            }
        }
        for resource in resources {
            let Spec::Model(spec) = &resource.spec else { continue };
            let Some(pool) = self.next.pools.get(&spec.pool).cloned() else {
                self.refuse(resource, format!("model.pool: there is no pool {}", spec.pool));
                continue;
            };
            let id = (spec.pool.clone(), resource.name.clone());
            let backends = serving.remove(&id).unwrap_or_default().into_iter().map(|entry| {
                let upstream_model = entry.spec.models.get(&resource.name).filter(|name| !name.is_empty());
                let upstream_model = upstream_model.unwrap_or(&spec.client_name).clone();
                ModelBackend { entry, upstream_model }
            });
            let backends: Vec<ModelBackend> = backends.collect();
            let entry = Arc::new(ModelEntry {
                name: resource.name.clone(),
                timeouts: spec.timeouts.over(&pool.spec.timeouts),
                accounts: Accounts::of_model(&resource.name, &backends, limits),
                backends,
                queue: resource.name.as_str().into(),
                roster: Roster::default(),
                scopes: ScopeEntry::all(Scope::Model(resource.name.as_str()), limits),
                spec: spec.clone(),
                pool,
            });
            self.next.models_by_name.insert(resource.name.clone(), entry.clone());
            self.next.models.insert(spec.client_name.clone(), entry);
        }
    }

    /// Compiles the global limits and those of a tenant's use of a model. The others are compiled with what they are over.
    fn limits(&mut self, resources: &[Resource], limits: &DeclaredLimits<'_>) {
        self.next.global = ScopeEntry::all(Scope::Global, limits);
        for (scope, _) in limits.scopes() {
            let Scope::TenantModel { tenant, model } = scope else { continue };
            if let (Ok(tenant), Ok(model)) = (Name::parse(tenant), Name::parse(model)) {
                self.next.tenant_models.insert((tenant, model), ScopeEntry::all(scope, limits));
            }
        }
        let is_surplus = |resource: &Resource| limits.surplus().contains(&&resource.name);
        for resource in resources.iter().filter(|r| matches!(r.spec, Spec::Limit(_)) && is_surplus(r)) {
            let most = Limit::PER_SELECTOR_MAX;
            self.refuse(
                resource,
                format!("limit.selector: {most} limits have this selector already, the most there may be"),
            );
        }
    }

    fn keys(&mut self, resources: &[Resource], limits: &DeclaredLimits<'_>) {
        let mut tenants: BTreeMap<&Name, Arc<TenantEntry>> = BTreeMap::new();
        for resource in resources {
            let Spec::Tenant(spec) = &resource.spec else { continue };
            let name = &resource.name;
            let entry = TenantEntry {
                name: name.clone(),
                allowed_models: spec.allowed_models.clone(),
                queue: name.as_str().into(),
                priority: spec.priority,
                scopes: ScopeEntry::all(Scope::Tenant(name.as_str()), limits),
            };
            tenants.insert(name, Arc::new(entry));
        }
        self.next.tenants = tenants.keys().map(|name| (*name).clone()).collect();
        for resource in resources {
            let Spec::ApiKey(spec) = &resource.spec else { continue };
            let Some(tenant) = tenants.get(&spec.tenant) else {
                self.refuse(resource, format!("api_key.tenant: there is no tenant {}", spec.tenant));
                continue;
            };
            if spec.revoked {
                continue;
            }
            for digest in &spec.digests {
                let name = &resource.name;
                let scope = Scope::ApiKey { tenant: spec.tenant.as_str(), key: name.as_str() };
                let entry = KeyEntry {
                    name: name.clone(),
                    tenant: tenant.clone(),
                    allowed_models: spec.allowed_models.clone(),
                    expires: digest.expires,
                    scopes: ScopeEntry::all(scope, limits),
                };
                self.next.keys.insert(digest.sha256, Arc::new(entry));
            }
        }
    }
}

#[cfg(test)]
mod tests;
