//! The audit log: one sealed record per accepted change, written in the transaction of the change.
//!
//! A record holds every resource it changed before and after, so one log serves audit, history, resumed watches,
//! consistent pages and rollback: the state at an earlier revision is the present one with later records undone.
//! Each record carries the hash of the one before it; a record altered or taken out breaks the chain.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use prost_reflect::DynamicMessage;
use prost_types::Timestamp;
use weir_proto::v1;

use super::fields::fields;
use super::{Key, Plan, State, Stored, Unreadable};
use crate::encoding::sha256;
use crate::reflect::diff::{Difference, differences};
use crate::reflect::{decode, descriptor};

/// Records kept; older ones are deleted as new ones are written.
pub(crate) const AUDIT_MAX: u64 = 100_000;
/// Records under one prefix of the store: what is read at once.
pub(crate) const CHUNK: u64 = 1000;
/// Where records are in the store.
pub(crate) const AUDIT_PREFIX: &str = "a/";

/// One thing a change did.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Recorded {
    /// Unspecified: a token.
    #[prost(enumeration = "v1::ResourceKind", tag = "1")]
    pub(crate) kind: i32,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    /// The value before, as stored; empty: it did not exist.
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) before: Bytes,
    /// The value after; empty: it does not exist any more.
    #[prost(bytes = "bytes", tag = "4")]
    pub(crate) after: Bytes,
    /// The revision of the value before.
    #[prost(uint64, tag = "5")]
    pub(crate) before_revision: u64,
}

/// One accepted change.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Record {
    #[prost(uint64, tag = "1")]
    pub(crate) sequence: u64,
    #[prost(message, optional, tag = "2")]
    pub(crate) time: Option<Timestamp>,
    #[prost(string, tag = "3")]
    pub(crate) actor: String,
    #[prost(enumeration = "v1::Role", tag = "4")]
    pub(crate) role: i32,
    #[prost(string, tag = "5")]
    pub(crate) method: String,
    #[prost(string, tag = "6")]
    pub(crate) request_id: String,
    /// The revision of the change before this one.
    #[prost(uint64, tag = "7")]
    pub(crate) base: u64,
    #[prost(message, repeated, tag = "8")]
    pub(crate) changes: Vec<Recorded>,
    #[prost(bytes = "bytes", tag = "9")]
    pub(crate) previous: Bytes,
}

/// A record as stored: its bytes as they were hashed, and the hash.
#[derive(Clone, PartialEq, prost::Message)]
struct Sealed {
    #[prost(bytes = "bytes", tag = "1")]
    record: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    hash: Bytes,
}

/// The end of the chain; the value of the key that every change compares.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Head {
    #[prost(uint64, tag = "1")]
    pub(crate) sequence: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) hash: Bytes,
}

/// A record as read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Logged {
    /// The revision its change made.
    pub(crate) revision: u64,
    pub(crate) record: Record,
    pub(crate) hash: Bytes,
    /// The hash is that of the bytes.
    pub(crate) sound: bool,
}

/// The author of a change.
#[derive(Debug, Clone)]
pub(crate) struct Actor {
    pub(crate) name: Arc<str>,
    pub(crate) role: v1::Role,
    pub(crate) method: &'static str,
}

/// The key of a record.
pub(crate) fn path(sequence: u64) -> String {
    format!("{}{:03}", chunk_prefix(sequence), sequence % CHUNK)
}

/// The prefix of the chunk that a record is in.
pub(crate) fn chunk_prefix(sequence: u64) -> String {
    format!("{AUDIT_PREFIX}{:016}/", sequence / CHUNK)
}

/// The record of a plan, sealed: its key, its value, and the new end of the chain.
pub(crate) fn seal(
    state: &State,
    plan: &Plan,
    actor: &Actor,
    request_id: &str,
    time: Timestamp,
) -> (String, Bytes, Head) {
    let sequence = state.audit.sequence + 1;
    let record = Record {
        sequence,
        time: Some(time),
        actor: actor.name.to_string(),
        role: actor.role.into(),
        method: actor.method.to_owned(),
        request_id: request_id.to_owned(),
        base: state.head,
        changes: recorded(plan),
        previous: state.audit.hash.clone(),
    };
    let record: Bytes = record.encode_to_vec().into();
    let hash = Bytes::copy_from_slice(&sha256(&record));
    let value = Sealed { record, hash: hash.clone() }.encode_to_vec();
    (path(sequence), value.into(), Head { sequence, hash })
}

fn recorded(plan: &Plan) -> Vec<Recorded> {
    let resources = plan.steps.iter().filter(|s| s.action != v1::ChangeAction::Unchanged).map(|step| {
        let deleted = step.action == v1::ChangeAction::Delete;
        Recorded {
            kind: step.key.kind.into(),
            name: step.key.name.to_string(),
            before: step.before.as_ref().map(|before| before.value()).unwrap_or_default(),
            after: if deleted { Bytes::new() } else { step.resource.value() },
            before_revision: step.before.as_ref().map_or(0, |before| before.wire.revision),
        }
    });
    let bare = |token: &v1::Token| Bytes::from(without_digests(token).encode_to_vec());
    let tokens = plan.tokens.iter().map(|step| Recorded {
        kind: v1::ResourceKind::Unspecified.into(),
        name: step.name.to_string(),
        before: step.before.as_deref().map(bare).unwrap_or_default(),
        after: step.after.as_ref().map(bare).unwrap_or_default(),
        before_revision: 0,
    });
    resources.chain(tokens).collect()
}

/// A token as it may be shown.
pub(crate) fn without_digests(token: &v1::Token) -> v1::Token {
    let mut token = token.clone();
    for secret in &mut token.secrets {
        secret.sha256.clear();
    }
    token
}

impl Logged {
    /// Reads a stored value.
    pub(crate) fn decode(key: &str, value: &Bytes, revision: u64) -> Result<Self, Unreadable> {
        let unreadable = |_| Unreadable(key.to_owned());
        let sealed = Sealed::decode(value.clone()).map_err(unreadable)?;
        let sound = sha256(&sealed.record)[..] == sealed.hash[..];
        let record = Record::decode(sealed.record).map_err(unreadable)?;
        Ok(Self { revision, record, hash: sealed.hash, sound })
    }

    /// As the admin service shows it.
    pub(crate) fn to_wire(&self) -> v1::AuditEntry {
        let record = &self.record;
        v1::AuditEntry {
            sequence: record.sequence,
            revision: self.revision,
            time: record.time,
            actor: record.actor.clone(),
            role: record.role,
            method: record.method.clone(),
            request_id: record.request_id.clone(),
            changes: record.changes.iter().map(Recorded::to_wire).collect(),
            hash: self.hash.to_vec(),
            previous_hash: record.previous.to_vec(),
        }
    }

    /// The changes of resources, for watchers.
    pub(crate) fn events(&self) -> impl Iterator<Item = v1::WatchEvent> {
        self.record.changes.iter().filter(|change| !change.is_token()).map(|change| {
            let (before, after) = change.resources();
            let fields = match (&before, &after) {
                (Some(_), Some(_)) => fields(before.as_ref(), after.as_ref()),
                _ => Vec::new(),
            };
            // As it is now; its etag and revision follow from content and position.
            let revision = if after.is_some() { self.revision } else { change.before_revision };
            let shown = after.or(before).map(|wire| with_etag(v1::Resource { revision, ..wire }));
            v1::WatchEvent {
                revision: self.revision,
                action: change.action().into(),
                resource: shown,
                fields: fields.into_iter().map(field_change).collect(),
                actor: self.record.actor.clone(),
            }
        })
    }

    /// Whether it changed this resource.
    pub(crate) fn touches(&self, key: &Key) -> bool {
        self.record.changes.iter().any(|c| c.kind() == key.kind && *c.name == *key.name)
    }
}

impl Recorded {
    fn is_token(&self) -> bool {
        self.kind() == v1::ResourceKind::Unspecified
    }

    fn action(&self) -> v1::ChangeAction {
        match (self.before.is_empty(), self.after.is_empty()) {
            (true, _) => v1::ChangeAction::Create,
            (false, true) => v1::ChangeAction::Delete,
            (false, false) => v1::ChangeAction::Update,
        }
    }

    fn resources(&self) -> (Option<v1::Resource>, Option<v1::Resource>) {
        let read = |bytes: &Bytes| {
            Some(bytes).filter(|b| !b.is_empty()).and_then(|b| v1::Resource::decode(b.clone()).ok())
        };
        (read(&self.before), read(&self.after))
    }

    fn to_wire(&self) -> v1::AuditChange {
        let action = self.action().into();
        if self.is_token() {
            const TOKEN: &str = "weir.v1.Token";
            let token = |bytes: &Bytes| {
                decode(TOKEN, bytes).unwrap_or_else(|_| DynamicMessage::new(descriptor(TOKEN)))
            };
            let fields = differences(&token(&self.before), &token(&self.after));
            let fields = fields.into_iter().map(field_change).collect();
            return v1::AuditChange { r#ref: None, token: self.name.clone(), action, fields };
        }
        let (before, after) = self.resources();
        let fields = fields(before.as_ref(), after.as_ref()).into_iter().map(field_change).collect();
        let r#ref = Some(v1::ResourceRef { kind: self.kind, name: self.name.clone() });
        v1::AuditChange { r#ref, token: String::new(), action, fields }
    }

    /// Takes it back in a state.
    pub(super) fn undo(&self, state: &mut State) -> Result<(), Unreadable> {
        if self.is_token() {
            return Ok(());
        }
        let key = Key::new(self.kind(), &self.name);
        if self.before.is_empty() {
            state.resources.remove(&key);
        } else {
            let stored = Stored::with_revision(&self.before, self.before_revision)
                .ok_or_else(|| Unreadable(format!("{key} in the audit log")))?;
            state.resources.insert(key, Arc::new(stored));
        }
        Ok(())
    }
}

fn with_etag(wire: v1::Resource) -> v1::Resource {
    match Stored::new(wire.clone()) {
        Ok(stored) => stored.wire,
        Err(_) => wire,
    }
}

pub(crate) fn field_change((path, before, after): Difference) -> v1::FieldChange {
    v1::FieldChange { path, before, after }
}

/// Verifies a part of the log after the given hash (`None`: unknown, the part starts with the log). Returns the problem, the
/// number of verified records, and the hash at the end.
pub(crate) fn verify(
    records: &[Arc<Logged>],
    mut previous: Option<(u64, Bytes)>,
) -> Result<(u64, Bytes), String> {
    let mut count = 0;
    for logged in records {
        let sequence = logged.record.sequence;
        if !logged.sound {
            return Err(format!("entry {sequence} is not what was hashed"));
        }
        if let Some((before, hash)) = &previous {
            if sequence != before + 1 {
                return Err(format!("entry {} is missing", before + 1));
            }
            if *hash != logged.record.previous {
                return Err(format!("entry {sequence} does not follow entry {before}"));
            }
        }
        previous = Some((sequence, logged.hash.clone()));
        count += 1;
    }
    Ok((count, previous.map(|(_, hash)| hash).unwrap_or_default()))
}
