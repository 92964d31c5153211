//! The part of a snapshot that decides where requests go: pools, backends and models, with the limits over models, provider
//! accounts and everything. It is compiled whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use weir_discovery::{Change, Refused};
use weir_proto::resource::{AdminState, Limit, Name, Resource, Spec};
use weir_ratelimit::{DeclaredLimits, Key, Scope};

use super::{Authorize, Snapshot};
use crate::routing::accounts::Accounts;
use crate::routing::backend::{BackendEntry, Endpoints, ModelBackend};
use crate::routing::balance::stable_hash;
use crate::routing::entries::{ModelEntry, PoolEntry};
use crate::routing::pool_state::PoolState;
use crate::routing::roster::Roster;
use crate::routing::scope::ScopeEntry;
use crate::routing::upstream::Upstream;

/// The resources of this part, by kind and name.
#[derive(Debug, Clone, Default)]
pub(super) struct Serving(Arc<Vec<Resource>>);

impl Serving {
    /// The resources after a change, which are shared with those before if it touches none.
    pub(super) fn after(&self, changes: &[Change]) -> Self {
        let touches = |change: &&Change| [&change.before, &change.after].into_iter().flatten().any(belongs);
        let mut touching = changes.iter().filter(touches).peekable();
        if touching.peek().is_none() {
            return self.clone();
        }
        let mut all: BTreeMap<_, &Resource> =
            self.0.iter().map(|r| ((r.kind(), r.name.as_str()), r)).collect();
        for change in touching {
            match change.after.as_ref().filter(|after| belongs(after)) {
                Some(after) => all.insert((change.kind, &*change.name), after),
                None => all.remove(&(change.kind, &*change.name)),
            };
        }
        Self(Arc::new(all.into_values().cloned().collect()))
    }

    pub(super) fn resources(&self) -> &[Resource] {
        &self.0
    }
}

/// Whether a resource is of this part.
fn belongs(resource: &Resource) -> bool {
    match &resource.spec {
        Spec::Pool(_) | Spec::Backend(_) | Spec::Model(_) => true,
        Spec::Limit(limit) => limit.tenant.is_none() && limit.api_key.is_none(),
        Spec::Tenant(_) | Spec::ApiKey(_) | Spec::DescriptorRule(_) => false,
    }
}

/// Why a limit is not in force.
pub(super) fn surplus_message() -> String {
    let most = Limit::PER_SELECTOR_MAX;
    format!("limit.selector: {most} limits have this selector already, the most there may be")
}

/// Compiles this part of the next snapshot and returns the resources that are left out.
pub(super) fn compile(next: &mut Snapshot, previous: &Snapshot, authorize: Authorize<'_>) -> Vec<Refused> {
    let serving = next.serving.clone();
    let resources = serving.resources();
    let mut compiler = Compiler { next, refused: Vec::new() };
    compiler.pools(resources, previous);
    compiler.backends(resources, previous, authorize);
    let limits = DeclaredLimits::of(resources);
    compiler.models(resources, &limits);
    compiler.limits(resources, &limits);
    compiler.refused
}

struct Compiler<'a> {
    next: &'a mut Snapshot,
    refused: Vec<Refused>,
}

impl Compiler<'_> {
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

    /// Compiles the global limits. The others are compiled with what they are over.
    fn limits(&mut self, resources: &[Resource], limits: &DeclaredLimits<'_>) {
        self.next.global = ScopeEntry::all(Scope::Global, limits);
        for name in limits.surplus() {
            let surplus = resources.iter().find(|r| matches!(r.spec, Spec::Limit(_)) && r.name == **name);
            if let Some(resource) = surplus {
                self.refuse(resource, surplus_message());
            }
        }
    }
}
