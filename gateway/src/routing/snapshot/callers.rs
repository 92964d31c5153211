//! The part of a snapshot that says who may ask: tenants, API keys and the limits over them. Snapshots share what a change does
//! not touch.
//!
//! A change marks the tenants and keys that it touches, which are then compiled from the resources declared. A changed tenant
//! touches all of its keys, since a key refers to its tenant.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::sync::Arc;

use weir_discovery::{Change, Refused};
use weir_proto::resource::{ApiKey, Limit, Name, Rates, Resource, Spec};
use weir_proto::v1::ResourceKind;
use weir_ratelimit::{Declared as DeclaredLimit, Scope};
use weir_runtime::PersistentMap;

use super::serving::surplus_message;
use super::{Declared, Snapshot};
use crate::routing::entries::{KeyEntry, TenantEntry};
use crate::routing::scope::ScopeEntry;

/// What finds the tenants and keys that a change touches.
#[derive(Debug, Clone, Default)]
pub(super) struct Callers {
    /// The entries of all keys by tenant and key.
    members: PersistentMap<Member, ()>,
    /// Keys without an entry, by tenant and key: revoked, or without a digest, or of a tenant that does not exist.
    idle: PersistentMap<(Name, Name), ()>,
    /// Limit resources by what they are over, in the order of their names.
    limits: PersistentMap<CallerScope, Arc<[Name]>>,
    /// The resources that are left out, with reasons.
    refused: PersistentMap<(ResourceKind, Name), Arc<str>>,
}

/// An entry of a key in the order of tenants, keys and digests.
#[derive(Debug, Clone)]
struct Member(Arc<KeyEntry>);

impl Member {
    fn order(&self) -> (&str, &str, &[u8; 32]) {
        (self.0.tenant.name.as_str(), self.0.name.as_str(), &self.0.digest)
    }
}

impl PartialEq for Member {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Member {}

impl PartialOrd for Member {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Member {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

/// What a limit of callers is over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum CallerScope {
    Tenant(Name),
    TenantModel(Name, Name),
    ApiKey(Name),
}

impl CallerScope {
    fn of(limit: &Limit) -> Option<Self> {
        match (&limit.account, &limit.tenant, &limit.model, &limit.api_key) {
            (Some(_), ..) => None,
            (None, _, _, Some(key)) => Some(Self::ApiKey(key.clone())),
            (None, Some(tenant), Some(model), None) => Some(Self::TenantModel(tenant.clone(), model.clone())),
            (None, Some(tenant), None, None) => Some(Self::Tenant(tenant.clone())),
            (None, None, _, None) => None,
        }
    }
}

impl Callers {
    /// The resources that are left out.
    pub(super) fn refused(&self) -> impl Iterator<Item = Refused> {
        self.refused.iter().map(|((kind, name), message)| Refused {
            kind: *kind,
            name: name.to_string(),
            message: message.to_string(),
        })
    }

    /// The entries of a tenant's keys, or of one of its keys.
    fn members(&self, tenant: &Name, key: Option<&Name>) -> Vec<Arc<KeyEntry>> {
        let first = (tenant.as_str(), key.map_or("", Name::as_str));
        let is_before = |member: &Member| (member.order().0, member.order().1) < first;
        let of_tenant = self.members.from_where(is_before).map(|(Member(entry), ())| entry);
        let of_tenant = of_tenant.take_while(|entry| entry.tenant.name == *tenant);
        of_tenant.take_while(|entry| key.is_none_or(|key| entry.name == *key)).cloned().collect()
    }

    /// The names of the limits over something that are in force.
    fn limits(&self, scope: &CallerScope) -> &[Name] {
        let all = self.limits.get(scope).map_or(&[][..], |names| names);
        all.get(..Limit::PER_SELECTOR_MAX).unwrap_or(all)
    }

    /// Adds or removes a limit resource, and judges again which of those over the same are in force.
    fn set_limit(&mut self, scope: &CallerScope, limit: &Name, exists: bool) {
        let mut names: BTreeSet<Name> =
            self.limits.get(scope).into_iter().flat_map(|names| names.iter().cloned()).collect();
        for name in names.iter().chain([limit]) {
            self.refused.remove(&(ResourceKind::Limit, name.clone()));
        }
        if exists {
            names.insert(limit.clone());
        } else {
            names.remove(limit);
        }
        for name in names.iter().skip(Limit::PER_SELECTOR_MAX) {
            self.refused.insert((ResourceKind::Limit, name.clone()), surplus_message().into());
        }
        if names.is_empty() {
            self.limits.remove(scope);
        } else {
            self.limits.insert(scope.clone(), names.into_iter().collect());
        }
    }
}

/// Compiles what a change touches.
pub(super) fn compile(next: &mut Snapshot, changes: &[Change], declared: &dyn Declared) {
    let mut compiler = Compiler { next, declared, tenants: BTreeSet::new(), keys: BTreeSet::new() };
    changes.iter().for_each(|change| compiler.mark(change));
    for tenant in std::mem::take(&mut compiler.tenants) {
        compiler.tenant(&tenant);
    }
    for key in std::mem::take(&mut compiler.keys) {
        compiler.key(&key);
    }
}

struct Compiler<'a> {
    next: &'a mut Snapshot,
    declared: &'a dyn Declared,
    /// The tenants and keys that a change touches.
    tenants: BTreeSet<Name>,
    keys: BTreeSet<Name>,
}

impl Compiler<'_> {
    fn mark(&mut self, change: &Change) {
        for (resource, exists) in [(&change.before, false), (&change.after, true)] {
            let Some(Resource { name, spec }) = resource else { continue };
            match spec {
                Spec::Tenant(_) => {
                    self.tenants.insert(name.clone());
                }
                Spec::ApiKey(key) => {
                    self.forget(&key.tenant, name);
                    self.keys.insert(name.clone());
                }
                Spec::Limit(limit) => self.mark_limit(name, limit, exists),
                Spec::Pool(_) | Spec::Backend(_) | Spec::Model(_) | Spec::DescriptorRule(_) => {}
            }
        }
    }

    fn mark_limit(&mut self, name: &Name, limit: &Limit, exists: bool) {
        let Some(scope) = CallerScope::of(limit) else { return };
        self.next.callers.set_limit(&scope, name, exists);
        match scope {
            CallerScope::Tenant(tenant) | CallerScope::TenantModel(tenant, _) => self.tenants.insert(tenant),
            CallerScope::ApiKey(key) => self.keys.insert(key),
        };
    }

    /// Removes the entries of a key.
    fn forget(&mut self, tenant: &Name, key: &Name) {
        let callers = &mut self.next.callers;
        for entry in callers.members(tenant, Some(key)) {
            self.next.keys.remove(&entry);
            callers.members.remove(&Member(entry));
        }
        if callers.idle.remove(&(tenant.clone(), key.clone())).is_some() {
            callers.refused.remove(&(ResourceKind::ApiKey, key.clone()));
        }
    }

    /// Adds an entry, in place of one of the same key and digest.
    fn add(&mut self, entry: Arc<KeyEntry>) {
        let member = Member(Arc::clone(&entry));
        self.next.callers.members.remove(&member);
        self.next.callers.members.insert(member, ());
        self.next.keys.insert(entry);
    }

    fn tenant(&mut self, name: &Name) {
        let members = self.next.callers.members(name, None);
        self.mark_idle(name);
        let Some(entry) = self.tenant_entry(name) else {
            self.next.tenants.remove(name);
            for member in members {
                self.forget(name, &member.name);
                self.keys.insert(member.name.clone());
            }
            return;
        };
        self.next.tenants.insert(name.clone(), Arc::clone(&entry));
        for member in members {
            self.add(Arc::new(KeyEntry { tenant: Arc::clone(&entry), ..KeyEntry::clone(&member) }));
        }
    }

    /// Marks the keys of a tenant that have no entry.
    fn mark_idle(&mut self, name: &Name) {
        let idle = self.next.callers.idle.from_where(|(tenant, _)| tenant < name);
        let idle = idle.take_while(|((tenant, _), ())| tenant == name);
        self.keys.extend(idle.map(|((_, key), ())| key.clone()));
    }

    fn tenant_entry(&self, name: &Name) -> Option<Arc<TenantEntry>> {
        let Spec::Tenant(spec) = self.declared.get(ResourceKind::Tenant, name)?.spec else { return None };
        let tenant = name.as_str();
        let own = spec.limits.as_ref();
        let callers = &self.next.callers;
        let of_tenant = |scope: &CallerScope| match scope {
            CallerScope::TenantModel(tenant, model) if tenant == name => Some(model.clone()),
            _ => None,
        };
        let before_own = |scope: &CallerScope| match scope {
            CallerScope::Tenant(_) => true,
            CallerScope::TenantModel(tenant, _) => tenant < name,
            CallerScope::ApiKey(_) => false,
        };
        let models =
            callers.limits.from_where(before_own).map_while(|(scope, _)| Some((of_tenant(scope)?, scope)));
        let model_scopes = models.map(|(model, scope)| {
            let over = Scope::TenantModel { tenant, model: model.as_str() };
            let scopes = self.scopes(over, None, scope);
            (model, scopes)
        });
        Some(Arc::new(TenantEntry {
            name: name.clone(),
            scopes: self.scopes(Scope::Tenant(tenant), own, &CallerScope::Tenant(name.clone())),
            model_scopes: model_scopes.collect(),
            allowed_models: spec.allowed_models,
            queue: tenant.into(),
            priority: spec.priority,
        }))
    }

    /// The limits over something: its own first, then the limit resources by name.
    fn scopes(&self, over: Scope<'_>, own: Option<&Rates>, scope: &CallerScope) -> Box<[ScopeEntry]> {
        let limits = self.next.callers.limits(scope).iter().filter_map(|name| {
            match self.declared.get(ResourceKind::Limit, name)?.spec {
                Spec::Limit(limit) => Some((name, limit.rates)),
                _ => None,
            }
        });
        let limits: Vec<(&Name, Rates)> = limits.collect();
        let own = own.map(|rates| DeclaredLimit { limit: None, rates });
        let limits = limits.iter().map(|(name, rates)| DeclaredLimit { limit: Some(*name), rates });
        ScopeEntry::over(over, &own.into_iter().chain(limits).collect::<Vec<_>>()).into()
    }

    fn key(&mut self, name: &Name) {
        let Some(Spec::ApiKey(spec)) = self.declared.get(ResourceKind::ApiKey, name).map(|r| r.spec) else {
            return;
        };
        self.forget(&spec.tenant, name);
        let Some(tenant) = self.next.tenants.get(&spec.tenant).cloned() else {
            let message = format!("api_key.tenant: there is no tenant {}", spec.tenant);
            self.next.callers.idle.insert((spec.tenant, name.clone()), ());
            self.next.callers.refused.insert((ResourceKind::ApiKey, name.clone()), message.into());
            return;
        };
        if spec.revoked || spec.digests.is_empty() {
            self.next.callers.idle.insert((spec.tenant, name.clone()), ());
        } else {
            self.entries(name, spec, &tenant);
        }
    }

    fn entries(&mut self, name: &Name, spec: ApiKey, tenant: &Arc<TenantEntry>) {
        let over = Scope::ApiKey { tenant: tenant.name.as_str(), key: name.as_str() };
        let scopes = self.scopes(over, spec.limits.as_ref(), &CallerScope::ApiKey(name.clone()));
        let allowed_models: Box<[Name]> = spec.allowed_models.into();
        for digest in spec.digests {
            self.add(Arc::new(KeyEntry {
                digest: digest.sha256,
                name: name.clone(),
                tenant: Arc::clone(tenant),
                allowed_models: allowed_models.clone(),
                expires: digest.expires,
                scopes: scopes.clone(),
            }));
        }
    }
}
