//! All resources of a state, with the indexes that a plan asks. Versions share what is equal in both, and a change costs what it
//! changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use weir_proto::resource::{Name, Spec};
use weir_proto::v1::{ResourceKind, SubscriberRole};
use weir_runtime::PersistentMap;

use super::{Key, Stored, Versions};

/// What a limit selects: tenant, model, key and account.
pub(crate) type Selector = [Option<Name>; 4];

/// Resources by kind and name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Resources {
    by_key: PersistentMap<Key, Arc<Stored>>,
    /// The version of every resource that gateways want, and of every one that limit services want.
    versions: [Versions; 2],
    /// The key that has a digest.
    digests: PersistentMap<[u8; 32], Key>,
    /// What is referred to, with what refers to it.
    referrers: PersistentMap<(Key, Key), ()>,
    /// The number of limits with a selector.
    selectors: PersistentMap<Selector, usize>,
    /// The number of resources of a kind.
    counts: BTreeMap<ResourceKind, usize>,
}

/// Whether subscribers of a role receive resources of a kind. A limit service needs no backends, and a gateway no descriptor
/// rules.
pub(crate) const fn wanted(role: SubscriberRole, kind: ResourceKind) -> bool {
    use ResourceKind as Kind;
    match role {
        SubscriberRole::Unspecified | SubscriberRole::Gateway => !matches!(kind, Kind::DescriptorRule),
        SubscriberRole::LimitService => {
            matches!(kind, Kind::Model | Kind::Tenant | Kind::ApiKey | Kind::Limit | Kind::DescriptorRule)
        }
    }
}

const ROLES: [SubscriberRole; 2] = [SubscriberRole::Gateway, SubscriberRole::LimitService];

impl Stored {
    /// The digests of an API key.
    fn digests(&self) -> impl Iterator<Item = [u8; 32]> {
        let digests = match &self.checked.spec {
            Spec::ApiKey(key) => key.digests.as_slice(),
            _ => &[],
        };
        digests.iter().map(|digest| digest.sha256)
    }

    /// What a limit selects.
    pub(super) fn selector(&self) -> Option<Selector> {
        let Spec::Limit(limit) = &self.checked.spec else { return None };
        Some([limit.tenant.clone(), limit.model.clone(), limit.api_key.clone(), limit.account.clone()])
    }

    /// What it refers to.
    pub(super) fn targets(&self) -> impl Iterator<Item = Key> {
        self.checked
            .references()
            .into_iter()
            .map(|reference| Key::new(reference.kind, reference.name.as_str()))
    }
}

impl Resources {
    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Stored>> {
        self.by_key.get(key)
    }

    pub(crate) fn contains_key(&self, key: &Key) -> bool {
        self.by_key.contains_key(key)
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (&Key, &Arc<Stored>)> {
        self.by_key.iter()
    }

    pub(crate) fn keys(&self) -> impl DoubleEndedIterator<Item = &Key> {
        self.by_key.keys()
    }

    pub(crate) fn values(&self) -> impl DoubleEndedIterator<Item = &Arc<Stored>> {
        self.by_key.values()
    }

    /// The resources of one kind, by name.
    pub(crate) fn of_kind(&self, kind: ResourceKind) -> impl Iterator<Item = &Arc<Stored>> {
        let of_kind = self.by_key.from_where(move |key| key.kind < kind);
        of_kind.take_while(move |(key, _)| key.kind == kind).map(|(_, stored)| stored)
    }

    /// The number of resources of a kind.
    pub(crate) fn count(&self, kind: ResourceKind) -> usize {
        self.counts.get(&kind).copied().unwrap_or_default()
    }

    /// The API key that has a digest.
    pub(crate) fn owner(&self, digest: &[u8; 32]) -> Option<&Key> {
        self.digests.get(digest)
    }

    /// What refers to a resource.
    pub(crate) fn referrers(&self, target: &Key) -> impl Iterator<Item = &Key> {
        let by = self.referrers.from_where(|(candidate, _)| candidate < target);
        by.take_while(move |((candidate, _), ())| candidate == target).map(|((_, by), ())| by)
    }

    /// The number of limits with a selector.
    pub(crate) fn limits(&self, selector: &Selector) -> usize {
        self.selectors.get(selector).copied().unwrap_or_default()
    }

    /// The version of every resource that subscribers of a role want.
    pub(crate) fn versions(&self, role: SubscriberRole) -> &Versions {
        let [gateways, limit_services] = &self.versions;
        if role == SubscriberRole::LimitService { limit_services } else { gateways }
    }

    /// Adds or replaces a resource.
    pub(crate) fn insert(&mut self, key: Key, stored: Arc<Stored>) {
        self.remove(&key);
        let version: Arc<str> = stored.published.version.as_str().into();
        for (role, versions) in ROLES.into_iter().zip(&mut self.versions) {
            if wanted(role, key.kind) {
                versions.insert(key.clone(), Arc::clone(&version));
            }
        }
        for digest in stored.digests() {
            self.digests.insert(digest, key.clone());
        }
        for target in stored.targets() {
            self.referrers.insert((target, key.clone()), ());
        }
        if let Some(selector) = stored.selector() {
            let count = self.limits(&selector) + 1;
            self.selectors.insert(selector, count);
        }
        *self.counts.entry(key.kind).or_default() += 1;
        self.by_key.insert(key, stored);
    }

    /// Removes a resource.
    pub(crate) fn remove(&mut self, key: &Key) {
        let Some(stored) = self.by_key.remove(key) else { return };
        for versions in &mut self.versions {
            versions.remove(key);
        }
        for digest in stored.digests() {
            if self.digests.get(&digest) == Some(key) {
                self.digests.remove(&digest);
            }
        }
        for target in stored.targets() {
            self.referrers.remove(&(target, key.clone()));
        }
        if let Some(selector) = stored.selector() {
            match self.limits(&selector) {
                0 | 1 => self.selectors.remove(&selector),
                more => self.selectors.insert(selector, more - 1),
            };
        }
        if let Some(count) = self.counts.get_mut(&key.kind) {
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests;
