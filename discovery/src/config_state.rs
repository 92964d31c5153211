//! The configuration in force in its encoded form. A copy is cheap, and what a delta costs does not grow with what it leaves as
//! it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use weir_proto::resource::Resource;
use weir_proto::v1::{self, ResourceKind};
use weir_runtime::PersistentMap;

/// Kind and name of a resource.
pub type ResourceId = (i32, Arc<str>);

/// The encoded form of a resource: its version and its body, in one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    version_bytes: u16,
    block: Arc<[u8]>,
}

impl Encoded {
    fn new(version: &str, body: &[u8]) -> Self {
        // A version is a hash; one that is absurdly long is cut, so that the resource is sent again.
        let version_bytes = u16::try_from(version.len()).unwrap_or(u16::MAX);
        let version = version.as_bytes().get(..usize::from(version_bytes)).unwrap_or_default();
        Self { version_bytes, block: [version, body].concat().into() }
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        self.block.split_at_checked(usize::from(self.version_bytes)).unwrap_or_default()
    }

    /// The version.
    pub fn version(&self) -> &str {
        std::str::from_utf8(self.parts().0).unwrap_or_default()
    }

    /// The body as the control plane sent it.
    pub fn body(&self) -> &[u8] {
        self.parts().1
    }

    /// The resource; the error says why it cannot be used.
    pub fn checked(&self) -> Result<Resource, String> {
        let wire = v1::Resource::decode(self.body()).map_err(|e| e.to_string())?;
        Resource::try_from(&wire).map_err(|e| e.to_string())
    }
}

/// Resources by kind and name, each with its version and encoded body.
#[derive(Debug, Clone, Default)]
pub struct ConfigState {
    /// The store epoch; empty without a configuration.
    pub epoch: String,
    /// The applied revision; zero without a configuration.
    pub revision: u64,
    /// The applied resources.
    pub(crate) resources: PersistentMap<ResourceId, Encoded>,
}

/// A refused resource. The rest of the configuration is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The kind of the resource.
    pub kind: ResourceKind,
    /// The name of the resource.
    pub name: String,
    /// The reason.
    pub message: String,
}

/// Why an entire delta was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// The delta is older than the applied revision: a lagging control plane must not take a gateway back.
    #[error("revision {offered} is older than the applied revision {held} of the same store")]
    Backwards {
        /// The revision of the delta.
        offered: u64,
        /// The applied revision.
        held: u64,
    },
    /// The delta removes more than half of a pool's backends, or of all models, tenants or keys for those of another store, and
    /// the operator has not allowed that.
    #[error(
        "it removes {removed} of {had} {what} ({}) without allow_mass_removal; if that is meant: weir apply --allow-mass-removal",
        listed(.names, *.removed)
    )]
    MassRemoval {
        /// What is removed, such as "backends of pool chat" or "API keys".
        what: String,
        /// How many are removed.
        removed: usize,
        /// How many there were.
        had: usize,
        /// The names of the first few that are removed.
        names: Vec<String>,
    },
}

/// Names in an error.
const NAMES_SHOWN: usize = 5;

fn listed(names: &[String], all: usize) -> String {
    let more = all.saturating_sub(names.len());
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.join(", "))
}

impl ConfigState {
    /// Without resources, at a revision of a store.
    pub fn new(epoch: &str, revision: u64) -> Self {
        Self { epoch: epoch.into(), revision, ..Self::default() }
    }

    /// The version of every applied resource, for Hello.
    pub fn versions(&self) -> Vec<v1::ResourceVersion> {
        let held = self.resources.iter();
        held.map(|((kind, name), encoded)| v1::ResourceVersion {
            kind: *kind,
            name: name.to_string(),
            version: encoded.version().to_owned(),
        })
        .collect()
    }

    /// Version and body of every resource by kind and name: for tests and tools, which have few.
    pub fn bodies(&self) -> BTreeMap<(i32, String), (String, Bytes)> {
        let held = self.resources.iter();
        held.map(|((kind, name), encoded)| {
            let body = Bytes::copy_from_slice(encoded.body());
            ((*kind, name.to_string()), (encoded.version().to_owned(), body))
        })
        .collect()
    }

    /// Adds or replaces a resource.
    pub fn insert(&mut self, kind: i32, name: &str, version: &str, body: &[u8]) {
        self.resources.insert((kind, name.into()), Encoded::new(version, body));
    }

    /// The number of resources.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether there is no resource.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// A resource in its encoded form.
    pub fn get(&self, kind: i32, name: &str) -> Option<&Encoded> {
        self.resources.get(&(kind, Arc::from(name)))
    }

    /// The configuration after a delta. With an error nothing changes.
    pub fn after(&self, delta: &v1::Delta) -> Result<Self, DeltaError> {
        if delta.store_epoch == self.epoch && delta.store_revision < self.revision {
            return Err(DeltaError::Backwards { offered: delta.store_revision, held: self.revision });
        }
        let mut next = self.clone();
        for removal in &delta.removals {
            next.resources.remove(&(removal.kind, Arc::from(removal.name.as_str())));
        }
        for upsert in &delta.upserts {
            next.insert(upsert.kind, &upsert.name, &upsert.version, &upsert.body);
        }
        if !delta.allow_mass_removal {
            // Within a store the control plane has checked removals, and a revoked key must go at once. Of another store, or until
            // all of it is held, nothing is known of why something is missing.
            let is_other_store = delta.store_epoch != self.epoch || self.revision == 0;
            self.check_mass_removal(&next, delta, is_other_store)?;
        }
        next.epoch.clone_from(&delta.store_epoch);
        next.revision = delta.store_revision;
        Ok(next)
    }

    /// Restores the refused resources of a delta to their version before it. Returns whether there were any.
    pub fn keep(&mut self, before: &Self, delta: &v1::Delta, refused: &[Refused]) -> bool {
        let refused: BTreeSet<(i32, &str)> = refused.iter().map(|r| (r.kind as i32, &*r.name)).collect();
        let mut any = false;
        for upsert in &delta.upserts {
            if !refused.contains(&(i32::from(upsert.kind()), &*upsert.name)) {
                continue;
            }
            any = true;
            let id = (upsert.kind, Arc::from(upsert.name.as_str()));
            match before.resources.get(&id) {
                Some(old) => self.resources.insert(id, old.clone()),
                None => self.resources.remove(&id),
            };
        }
        any
    }

    fn check_mass_removal(
        &self,
        next: &Self,
        delta: &v1::Delta,
        is_other_store: bool,
    ) -> Result<(), DeltaError> {
        // Only a group that a delta takes something from can lose most of it.
        let mut lost: BTreeMap<Group, BTreeSet<Arc<str>>> = BTreeMap::new();
        for id in ids(delta) {
            let group =
                |config: &Self| config.resources.get(&id).and_then(|e| Group::of(id.0, e, is_other_store));
            let before = group(self);
            if let Some(group) = before.filter(|before| group(next).as_ref() != Some(before)) {
                lost.entry(group).or_default().insert(Arc::clone(&id.1));
            }
        }
        for (group, gone) in lost {
            let (had, stay) = (self.count(&group, is_other_store), next.count(&group, is_other_store));
            // The control plane marks removals that it accepted. Without the mark even the only backend of a pool stays.
            let removed = had.saturating_sub(stay);
            if removed * 2 > had {
                let names = gone.iter().take(NAMES_SHOWN).map(|name| name.to_string()).collect();
                return Err(DeltaError::MassRemoval { what: group.to_string(), removed, had, names });
            }
        }
        Ok(())
    }

    /// The number of resources of a group.
    fn count(&self, group: &Group, is_other_store: bool) -> usize {
        let kind = group.kind();
        let first: ResourceId = (kind, Arc::from(""));
        let of_kind = self.resources.from(&first).take_while(|((k, _), _)| *k == kind);
        of_kind.filter(|(_, e)| Group::of(kind, e, is_other_store).as_ref() == Some(group)).count()
    }

    /// The decoded and validated resources, and the ones that are refused.
    pub fn checked(&self) -> (Vec<Resource>, Vec<Refused>) {
        let (mut good, mut refused) = (Vec::new(), Vec::new());
        for ((kind, name), encoded) in self.resources.iter() {
            match encoded.checked() {
                Ok(resource) => good.push(resource),
                Err(message) => {
                    let kind = ResourceKind::try_from(*kind).unwrap_or_default();
                    refused.push(Refused { kind, name: name.to_string(), message });
                }
            }
        }
        (good, refused)
    }
}

/// What must not disappear in bulk: the backends of each pool, and for another store its models, tenants and keys.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    Backends { pool: String },
    Models,
    Tenants,
    ApiKeys,
}

impl Group {
    fn of(kind: i32, encoded: &Encoded, is_other_store: bool) -> Option<Self> {
        match ResourceKind::try_from(kind) {
            Ok(ResourceKind::Backend) => {
                let spec = v1::Resource::decode(encoded.body()).ok().and_then(|r| r.spec);
                let Some(v1::resource::Spec::Backend(backend)) = spec else { return None };
                Some(Self::Backends { pool: backend.pool })
            }
            Ok(ResourceKind::Model) if is_other_store => Some(Self::Models),
            Ok(ResourceKind::Tenant) if is_other_store => Some(Self::Tenants),
            Ok(ResourceKind::ApiKey) if is_other_store => Some(Self::ApiKeys),
            _ => None,
        }
    }

    const fn kind(&self) -> i32 {
        match self {
            Self::Backends { .. } => ResourceKind::Backend as i32,
            Self::Models => ResourceKind::Model as i32,
            Self::Tenants => ResourceKind::Tenant as i32,
            Self::ApiKeys => ResourceKind::ApiKey as i32,
        }
    }
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Backends { pool } => write!(f, "backends of pool {pool}"),
            Self::Models => f.write_str("models"),
            Self::Tenants => f.write_str("tenants"),
            Self::ApiKeys => f.write_str("API keys"),
        }
    }
}

/// Kind and name of everything in a delta, each once and in order.
pub(crate) fn ids(delta: &v1::Delta) -> BTreeSet<ResourceId> {
    let upserts = delta.upserts.iter().map(|upsert| (upsert.kind, Arc::from(upsert.name.as_str())));
    upserts.chain(delta.removals.iter().map(|r| (r.kind, Arc::from(r.name.as_str())))).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn backend(name: &str, revision: u64) -> v1::VersionedResource {
        let spec = v1::BackendSpec { pool: "chat".into(), url: "http://h".into(), ..Default::default() };
        let body = v1::Resource {
            name: name.into(),
            spec: Some(v1::resource::Spec::Backend(spec)),
            ..Default::default()
        };
        v1::VersionedResource {
            kind: ResourceKind::Backend as i32,
            name: name.into(),
            version: revision.to_string(),
            body: body.encode_to_vec().into(),
        }
    }

    pub(crate) fn held(names: &[&str], revision: u64) -> ConfigState {
        let upserts = names.iter().map(|n| backend(n, revision)).collect();
        let delta =
            v1::Delta { store_epoch: "e".into(), store_revision: revision, upserts, ..Default::default() };
        ConfigState::default().after(&delta).expect("applies")
    }

    #[test]
    fn a_lagging_control_plane_cannot_take_a_gateway_back() {
        let delta = v1::Delta { store_epoch: "e".into(), store_revision: 4, ..Default::default() };
        let error = held(&["a"], 5).after(&delta).expect_err("refused");
        assert_eq!(error, DeltaError::Backwards { offered: 4, held: 5 });
    }

    #[test]
    fn losing_most_of_a_pool_takes_the_operators_word() {
        let held = held(&["a", "b", "c", "d"], 5);
        let removals = ["a", "b", "c"]
            .map(|n| v1::ResourceRef { kind: ResourceKind::Backend as i32, name: n.into() })
            .to_vec();
        let mut delta =
            v1::Delta { store_epoch: "e".into(), store_revision: 6, removals, ..Default::default() };
        assert!(matches!(held.after(&delta), Err(DeltaError::MassRemoval { removed: 3, had: 4, .. })));
        delta.allow_mass_removal = true;
        assert_eq!(held.after(&delta).expect("meant").len(), 1);
    }

    #[test]
    fn an_empty_store_of_another_epoch_takes_nothing_away_not_even_the_only_backend() {
        for names in [&["a", "b", "c"][..], &["a", "b"], &["a"]] {
            let removal =
                |n: &&str| v1::ResourceRef { kind: ResourceKind::Backend as i32, name: (*n).into() };
            let removals = names.iter().map(removal).collect();
            let delta =
                v1::Delta { store_epoch: "other".into(), store_revision: 1, removals, ..Default::default() };
            assert!(held(names, 5).after(&delta).is_err(), "{names:?}");
        }
    }

    #[test]
    fn another_store_takes_no_keys_tenants_or_models_in_bulk_and_the_own_one_does() {
        let of = |kind: ResourceKind, name: &str| v1::VersionedResource {
            kind: kind as i32,
            name: name.into(),
            version: "1".into(),
            body: Bytes::new(),
        };
        for kind in [ResourceKind::ApiKey, ResourceKind::Tenant, ResourceKind::Model] {
            let upserts = ["a", "b", "c"].map(|name| of(kind, name)).to_vec();
            let first =
                v1::Delta { store_epoch: "e".into(), store_revision: 1, upserts, ..Default::default() };
            let held = ConfigState::default().after(&first).expect("applies");
            let removals = |names: &[&str]| {
                names.iter().map(|name| v1::ResourceRef { kind: kind as i32, name: (*name).into() }).collect()
            };
            let delta = |epoch: &str, names: &[&str]| v1::Delta {
                store_epoch: epoch.into(),
                store_revision: 2,
                removals: removals(names),
                ..Default::default()
            };
            let error = held.after(&delta("other", &["a", "b"])).expect_err("nobody has said so").to_string();
            assert!(error.contains("2 of 3 ") && error.contains("(a, b)"), "{error}");
            held.after(&delta("other", &["a"])).expect("a few may go");
            held.after(&v1::Delta { allow_mass_removal: true, ..delta("other", &["a", "b", "c"]) })
                .expect("meant");
            held.after(&delta("e", &["a", "b", "c"])).expect("revoked is revoked");
        }
    }

    #[test]
    fn of_a_refused_change_the_version_held_stays_and_a_refused_new_one_is_not_held() {
        let before = held(&["a", "b"], 5);
        let upserts = vec![backend("a", 6), backend("new", 6), backend("b", 6)];
        let delta = v1::Delta { store_epoch: "e".into(), store_revision: 6, upserts, ..Default::default() };
        let mut next = before.after(&delta).expect("applies");
        let refused =
            |name: &str| Refused { kind: ResourceKind::Backend, name: name.into(), message: "no".into() };
        assert!(!next.keep(&before, &delta, &[refused("other")]));
        assert!(next.keep(&before, &delta, &[refused("a"), refused("new")]));
        let versions: Vec<_> = next.versions().into_iter().map(|h| (h.name, h.version)).collect();
        assert_eq!(versions, [("a".to_owned(), "5".to_owned()), ("b".to_owned(), "6".to_owned())]);
    }
}
