//! The state of all resources as one immutable value, and the plans of changes. Pure: no clock, no store, no network.

pub(crate) mod audit;
mod edit;
pub(crate) mod fields;
mod plan;
mod resources;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use weir_proto::resource::{Resource, Spec, Violation, Violations, kind_name, kind_of};
use weir_proto::v1;
use weir_runtime::PersistentMap;

use crate::encoding::short_hash;
use crate::reflect::canonical;
use crate::store::{Batch, Range, Write};

pub(crate) use edit::{BOOTSTRAP_SET, apply_edits, update_edit};
pub(crate) use plan::{Edit, Options, Plan, TokenStep, plan};
pub(crate) use resources::{Resources, wanted};

/// Where everything but the audit log is.
pub(crate) const PREFIX: &str = "c/";
/// The key rewritten by every change: comparing it makes a change see all it was checked against. Its value is the end
/// of the audit log.
pub(crate) const HEAD: &str = "c/m/head";
/// Rewritten by every accepted removal of a backend.
pub(crate) const REMOVAL: &str = "c/m/removal";
/// Rewritten by every change for which the operator allowed a mass removal.
pub(crate) const ALLOWED: &str = "c/m/allowed";
const RESOURCES: &str = "c/r/";
const REQUESTS: &str = "c/q/";
const TOKENS: &str = "c/t/";

/// Where a remembered answer is in the store.
pub(crate) fn request_path(id: &str) -> String {
    format!("{REQUESTS}{id}")
}

/// Where a token is in the store.
pub(crate) fn token_path(name: &str) -> String {
    format!("{TOKENS}{name}")
}

/// Kind and name of a resource. Ordered by kind, what is referred to first.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) kind: v1::ResourceKind,
    pub(crate) name: Arc<str>,
}

impl Key {
    pub(crate) fn new(kind: v1::ResourceKind, name: &str) -> Self {
        Self { kind, name: name.into() }
    }

    /// The key of a wire reference; `None` when its kind is not known.
    pub(crate) fn of_ref(reference: &v1::ResourceRef) -> Option<Self> {
        match reference.kind() {
            v1::ResourceKind::Unspecified => None,
            kind => Some(Self::new(kind, &reference.name)),
        }
    }

    pub(crate) fn to_ref(&self) -> v1::ResourceRef {
        v1::ResourceRef { kind: self.kind.into(), name: self.name.to_string() }
    }

    /// Where it is in the store.
    pub(crate) fn path(&self) -> String {
        format!("{RESOURCES}{}/{}", i32::from(self.kind), self.name)
    }

    fn parse(path: &str) -> Option<Self> {
        let (kind, name) = path.strip_prefix(RESOURCES)?.split_once('/')?;
        let kind = v1::ResourceKind::try_from(kind.parse::<i32>().ok()?).ok()?;
        Some(Self::new(kind, name))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", kind_name(self.kind), self.name)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A resource with everything derived from it, once.
#[derive(Debug)]
pub(crate) struct Stored {
    /// With its output-only fields.
    pub(crate) wire: v1::Resource,
    /// Checked.
    pub(crate) checked: Resource,
    /// As gateways get it: name and spec, canonically encoded, so that the same content has the same version on
    /// every replica and after restarts.
    pub(crate) published: v1::VersionedResource,
}

impl Stored {
    /// Derives everything; the violations when it is not valid.
    pub(crate) fn new(mut wire: v1::Resource) -> Result<Self, Violations> {
        let checked = Resource::try_from(&wire)?;
        let encode = |name: &str| {
            let bare =
                v1::Resource { name: name.to_owned(), spec: wire.spec.clone(), ..v1::Resource::default() };
            canonical("weir.v1.Resource", &bare)
                .map_err(|e| Violations(vec![Violation { path: "spec".into(), message: e.to_string() }]))
        };
        let body = encode(&wire.name)?;
        // The name comes first, and the etag is that of the rest.
        let name = v1::Resource { name: wire.name.clone(), ..v1::Resource::default() }.encode_to_vec();
        wire.etag = match body.strip_prefix(&name[..]) {
            Some(unnamed) => short_hash(unnamed),
            None => short_hash(&encode("")?),
        };
        let published = v1::VersionedResource {
            kind: checked.kind().into(),
            name: wire.name.clone(),
            version: short_hash(&body),
            body: body.into(),
        };
        Ok(Self { wire, checked, published })
    }

    pub(crate) fn with_revision(value: &[u8], revision: u64) -> Option<Self> {
        let wire = v1::Resource::decode(value).ok()?;
        Self::new(v1::Resource { revision, ..wire }).ok()
    }

    /// The value in the store: without what follows from it.
    pub(crate) fn value(&self) -> Bytes {
        let stripped = v1::Resource { etag: String::new(), revision: 0, ..self.wire.clone() };
        stripped.encode_to_vec().into()
    }

    pub(crate) fn key(&self) -> Key {
        Key::new(kind_of(&self.wire), &self.wire.name)
    }

    /// Of a backend, its pool.
    pub(crate) fn pool(&self) -> Option<&str> {
        match &self.checked.spec {
            Spec::Backend(backend) => Some(backend.pool.as_str()),
            _ => None,
        }
    }
}

/// An answer kept under its request id.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Remembered {
    /// Milliseconds since the epoch.
    #[prost(uint64, tag = "1")]
    pub(crate) time_ms: u64,
    /// SHA-256 over method and request.
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) digest: Vec<u8>,
    /// The answer, without the revision.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) answer: Vec<u8>,
    /// The revision of the key, filled in when it is read.
    #[prost(uint64, tag = "4")]
    pub(crate) revision: u64,
}

/// Resource -> version.
pub(crate) type Versions = PersistentMap<Key, Arc<str>>;

/// Everything declared, at one revision. A copy is cheap.
#[derive(Debug, Clone, Default)]
pub(crate) struct State {
    pub(crate) epoch: Arc<str>,
    pub(crate) revision: u64,
    pub(crate) resources: Resources,
    /// Answers by request id.
    pub(crate) requests: PersistentMap<Arc<str>, Arc<Remembered>>,
    /// Tokens by name.
    pub(crate) tokens: BTreeMap<Arc<str>, Arc<v1::Token>>,
    /// The end of the audit log.
    pub(crate) audit: audit::Head,
    /// The revision of [`HEAD`]: of the newest change.
    pub(crate) head: u64,
    /// The revision of [`REMOVAL`].
    pub(crate) removal: u64,
    /// The revision of [`ALLOWED`].
    pub(crate) allowed: u64,
}

/// The store holds something this version cannot read.
#[derive(Debug, thiserror::Error)]
#[error("the store's key {0} cannot be read by this version")]
pub(crate) struct Unreadable(pub(crate) String);

impl State {
    /// The state of a whole store.
    pub(crate) fn load(range: &Range) -> Result<Self, Unreadable> {
        let mut state =
            Self { epoch: range.epoch.as_str().into(), revision: range.revision, ..Self::default() };
        for entry in &range.entries {
            state.set(&entry.key, Some(&entry.value), entry.revision)?;
        }
        Ok(state)
    }

    /// The state after one more transaction.
    pub(crate) fn after(&self, batch: &Batch) -> Result<Self, Unreadable> {
        let mut next = self.clone();
        next.revision = batch.revision;
        for write in &batch.writes {
            match write {
                Write::Put(key, value) => next.set(key, Some(value), batch.revision)?,
                Write::Delete(key) => next.set(key, None, batch.revision)?,
            }
        }
        Ok(next)
    }

    fn set(&mut self, path: &str, value: Option<&Bytes>, revision: u64) -> Result<(), Unreadable> {
        let unreadable = || Unreadable(path.to_owned());
        match path {
            HEAD => {
                self.head = revision;
                let end = value.cloned().unwrap_or_default();
                self.audit = audit::Head::decode(end).map_err(|_| unreadable())?;
            }
            REMOVAL => self.removal = revision,
            ALLOWED => self.allowed = revision,
            _ if path.starts_with(RESOURCES) => {
                let key = Key::parse(path).ok_or_else(unreadable)?;
                match value {
                    Some(value) => {
                        let stored = Stored::with_revision(value, revision).ok_or_else(unreadable)?;
                        self.resources.insert(key, Arc::new(stored));
                    }
                    None => {
                        self.resources.remove(&key);
                    }
                }
            }
            _ if path.starts_with(TOKENS) => {
                let name = path.strip_prefix(TOKENS).ok_or_else(unreadable)?;
                match value {
                    Some(value) => {
                        let token = v1::Token::decode(value.clone()).map_err(|_| unreadable())?;
                        self.tokens.insert(name.into(), Arc::new(token));
                    }
                    None => {
                        self.tokens.remove(name);
                    }
                }
            }
            // The log is read by those who need it.
            _ if path.starts_with(audit::AUDIT_PREFIX) => {}
            _ => {
                let id = path.strip_prefix(REQUESTS).ok_or_else(unreadable)?;
                match value {
                    Some(value) => {
                        let kept = Remembered::decode(value.clone()).map_err(|_| unreadable())?;
                        self.requests.insert(id.into(), Arc::new(Remembered { revision, ..kept }));
                    }
                    None => {
                        self.requests.remove(id);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes a change back: the newest first.
    pub(crate) fn undo(&mut self, logged: &audit::Logged) -> Result<(), Unreadable> {
        for change in logged.record.changes.iter().rev() {
            change.undo(self)?;
        }
        self.revision = logged.record.base;
        Ok(())
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Stored>> {
        self.resources.get(key)
    }

    /// The resources of one kind, by name.
    pub(crate) fn of_kind(&self, kind: v1::ResourceKind) -> impl Iterator<Item = &Arc<Stored>> {
        self.resources.of_kind(kind)
    }
}

/// Why a change is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("there is no {0}")]
    NotFound(Key),
    #[error("{0} is there already")]
    AlreadyExists(Key),
    #[error("{key} has changed: its etag is {found}, the request has {sent}; read it again and retry")]
    EtagMismatch { key: Key, found: String, sent: String },
    #[error("{}", Violations(.0.clone()))]
    Invalid(Vec<Violation>),
    #[error("{key} is referred to by {}", list(.by))]
    Referred { key: Key, by: Vec<Key> },
    #[error(
        "{lost} of {before} {what} would be removed ({}); if that is meant, delete or apply with --allow-mass-removal (allow_mass_removal)",
        list(.names)
    )]
    MassRemoval { what: String, lost: usize, before: usize, names: Vec<Key> },
    #[error("{}to take them over into {set}, apply with take_over", owned(.conflicts))]
    OtherSets { conflicts: Vec<(Key, String)>, set: String },
    #[error("{0}")]
    Precondition(String),
}

impl Refusal {
    pub(crate) fn invalid(path: &str, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { path: path.into(), message: message.into() }])
    }
}

/// Whose the first few are, and how many more there are.
fn owned(conflicts: &[(Key, String)]) -> String {
    const SHOWN: usize = 5;
    let mut text: String = conflicts
        .iter()
        .take(SHOWN)
        .map(|(key, owner)| format!("{key} belongs to the set {owner}; "))
        .collect();
    if conflicts.len() > SHOWN {
        text.push_str(&format!("and {} more; ", conflicts.len() - SHOWN));
    }
    text
}

/// The first few, and how many more.
fn list(keys: &[Key]) -> String {
    const SHOWN: usize = 5;
    let mut text = keys.iter().take(SHOWN).map(Key::to_string).collect::<Vec<_>>().join(", ");
    if keys.len() > SHOWN {
        text.push_str(&format!(" and {} more", keys.len() - SHOWN));
    }
    text
}
