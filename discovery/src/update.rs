//! What an owner is told of a change: each changed resource as it was and as it is to be.

use std::collections::BTreeMap;
use std::sync::Arc;

use weir_proto::resource::Resource;
use weir_proto::v1::ResourceKind;

use crate::config_state::{ConfigState, Refused, ResourceId};

/// A change of one resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The kind of the resource.
    pub kind: ResourceKind,
    /// Its name.
    pub name: Arc<str>,
    /// As it is in force; `None` if it is new.
    pub before: Option<Resource>,
    /// As it is to be; `None` if it is removed, or cannot be used.
    pub after: Option<Resource>,
}

/// A configuration that is to be in force, as a change of the one in force.
#[derive(Debug, Clone, Copy)]
pub struct Update<'a> {
    /// The epoch of the store.
    pub epoch: &'a str,
    /// The store revision.
    pub revision: u64,
    /// What changes, by kind and name. With no configuration in force this is everything.
    pub changes: &'a [Change],
    config: &'a ConfigState,
}

impl Update<'_> {
    /// A resource of the configuration that is to be in force.
    pub fn get(&self, kind: ResourceKind, name: &str) -> Option<Resource> {
        self.config.get(kind.into(), name)?.checked().ok()
    }

    /// All its resources: for owners that compile the whole each time, at a cost that grows with all that is declared.
    pub fn all(&self) -> Vec<Resource> {
        self.config.checked().0
    }
}

/// A step from the configuration in force to another one.
#[derive(Debug, Default)]
pub(crate) struct Step {
    changes: Vec<Change>,
    /// Resources of the other configuration that cannot be decoded, those before included.
    pub(crate) unusable: BTreeMap<ResourceId, String>,
}

impl Step {
    /// The step to `next`, which differs from `config` in some of these resources.
    pub(crate) fn between<'a>(
        config: &ConfigState,
        unusable: &BTreeMap<ResourceId, String>,
        next: &ConfigState,
        ids: impl IntoIterator<Item = &'a ResourceId>,
    ) -> Self {
        let mut step = Self { changes: Vec::new(), unusable: unusable.clone() };
        for id in ids {
            let (before, after) = (config.resources.get(id), next.resources.get(id));
            if before == after {
                continue;
            }
            step.unusable.remove(id);
            let before = before.and_then(|before| before.checked().ok());
            step.push(id, before, after.map(crate::config_state::Encoded::checked));
        }
        step
    }

    /// The step from nothing.
    pub(crate) fn to_all(next: &ConfigState) -> Self {
        let mut step = Self::default();
        for (id, encoded) in next.resources.iter() {
            step.push(id, None, Some(encoded.checked()));
        }
        step
    }

    fn push(&mut self, id: &ResourceId, before: Option<Resource>, after: Option<Result<Resource, String>>) {
        let after = match after {
            None => None,
            Some(Ok(after)) => Some(after),
            Some(Err(message)) => {
                self.unusable.insert(id.clone(), message);
                None
            }
        };
        let kind = ResourceKind::try_from(id.0).unwrap_or_default();
        if before != after {
            self.changes.push(Change { kind, name: Arc::clone(&id.1), before, after });
        }
    }

    /// The number of changes.
    pub(crate) fn len(&self) -> usize {
        self.changes.len()
    }

    /// As the owner is told of it.
    pub(crate) fn update<'a>(&'a self, next: &'a ConfigState) -> Update<'a> {
        Update { epoch: &next.epoch, revision: next.revision, changes: &self.changes, config: next }
    }

    /// The resources that cannot be decoded, as refused ones.
    pub(crate) fn refused(&self) -> Vec<Refused> {
        let refused = self.unusable.iter().map(|((kind, name), message)| Refused {
            kind: ResourceKind::try_from(*kind).unwrap_or_default(),
            name: name.to_string(),
            message: message.clone(),
        });
        refused.collect()
    }
}

/// An update from nothing, for owners that are tested without a subscriber.
#[doc(hidden)]
pub fn with_update_between<T>(
    from: &ConfigState,
    to: &ConfigState,
    work: impl FnOnce(&Update<'_>) -> T,
) -> T {
    let differ = from.resources.changes(&to.resources).map(|(id, _, _)| id);
    let step = Step::between(from, &BTreeMap::new(), to, differ);
    work(&step.update(to))
}
