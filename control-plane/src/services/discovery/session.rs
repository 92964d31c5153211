//! The session of one gateway: computes the next delta and evaluates the answers. Pure; time is an argument.
//!
//! One delta is in flight at a time. Changes are not queued: after each answer the remaining difference is sent. New and
//! changed resources are sent first; deletions follow once these are applied (make before break). Backends, pools and
//! models are not deleted while one of these kinds is refused. A refused resource is sent again with a newer snapshot,
//! which may contain what it needs, and when the gateway asks for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::v1::{self, ResourceKind};

use crate::model::Key;
use crate::publish::{ConfigState, Differences, Snapshot, mass_removal_is_meant};

/// A gateway is stale after this time without an answer to a delta.
pub(super) const STALE_AFTER: Duration = Duration::from_secs(30);
/// The stream is closed after this time without an answer; a new stream starts from the versions that are really applied.
pub(super) const CLOSED_AFTER: Duration = Duration::from_secs(120);

/// The applied configuration of one gateway, the delta in flight, and the refusals.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) config: ConfigState,
    /// The epoch and revision that the gateway assumes. After a refusal they are newer than the applied revision, because the
    /// rest of the delta is applied. The gateway refuses an older revision.
    at: (Arc<str>, u64),
    differences: Differences,
    waiting: Option<Waiting>,
    /// Deletions that follow the applied resources of the same change.
    due: Vec<Key>,
    refused: Option<Refused>,
    /// The current refusals with reasons.
    refusals: BTreeMap<Key, v1::ResourceError>,
    /// The gateway asks for its refused resources again.
    retry: bool,
    nonce: u64,
}

#[derive(Debug)]
struct Waiting {
    delta: v1::Delta,
    snapshot: Snapshot,
    since: Instant,
    stale: bool,
}

/// A refusal of a part of a snapshot.
#[derive(Debug, Clone, Copy)]
struct Refused {
    revision: u64,
    /// The entire delta was refused: nothing more of this snapshot is sent.
    whole: bool,
    /// A pool, backend or model was refused.
    serving: bool,
}

/// The meaning of an answer.
#[derive(Debug, PartialEq)]
pub(super) enum Answered {
    /// The answer is not about the delta in flight.
    Late,
    /// Everything is applied up to this revision.
    Applied(u64),
    /// The delta is applied, and earlier refusals remain; the revision that is answered with it.
    Still { errors: Vec<v1::ResourceError>, revision: u64 },
    /// The delta is applied except for these resources; the revision that is answered with it.
    Refused { errors: Vec<v1::ResourceError>, revision: u64, whole: bool },
}

/// How late the answer to a delta is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Lateness {
    InTime,
    Stale,
    Dead,
}

const fn is_serving(kind: ResourceKind) -> bool {
    matches!(kind, ResourceKind::Pool | ResourceKind::Backend | ResourceKind::Model)
}

/// The resource of an error; `None` when it names none.
fn named(error: &v1::ResourceError) -> Option<Key> {
    error.resource.as_ref().filter(|reference| !reference.name.is_empty()).and_then(Key::of_ref)
}

impl Session {
    pub(super) fn new(config: ConfigState, differences: Differences) -> Self {
        let at = (Arc::clone(&config.epoch), config.revision);
        let refusals = BTreeMap::new();
        Self {
            config,
            at,
            differences,
            waiting: None,
            due: Vec::new(),
            refused: None,
            refusals,
            retry: false,
            nonce: 0,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Whether the delta contains bodies.
    pub(super) fn lacks(&self, snapshot: &Snapshot) -> bool {
        !self.differences.between(&self.config, snapshot).upserts.is_empty()
    }

    /// Whether anything differs at all.
    pub(super) fn differs(&self, snapshot: &Snapshot) -> bool {
        !self.differences.between(&self.config, snapshot).is_empty()
    }

    /// Sends refused resources again without a newer snapshot.
    pub(super) fn retry(&mut self) {
        self.refused = None;
        self.retry = !self.refusals.is_empty();
    }

    /// The next delta; `None` while an answer is pending, without a difference, or if exactly this delta was refused.
    pub(super) fn next(&mut self, snapshot: &Snapshot, now: Instant) -> Option<v1::Delta> {
        if self.waiting.is_some() {
            return None;
        }
        self.config.share(snapshot);
        let difference = self.differences.between(&self.config, snapshot);
        let refused = self.refused.filter(|refused| refused.revision == snapshot.revision);
        if refused.is_some_and(|refused| refused.whole) {
            return None;
        }
        let may_go = |key: &Key| self.may_go(key);
        // Pending deletions are sent even if there are new resources to send. Otherwise, with constant changes, deletions
        // would never be sent.
        let due = |key: &&Key| self.due.contains(key) && may_go(key);
        let due: Vec<Key> = difference.removals.iter().filter(due).cloned().collect();
        let (upserts, removals) = if !due.is_empty() {
            (Vec::new(), due)
        } else if refused.is_some() {
            // What is refused is not sent again, but what has not been sent yet is.
            let is_refused = |upsert: &&v1::VersionedResource| {
                self.refusals.contains_key(&Key::new(upsert.kind(), &upsert.name))
            };
            let left: Vec<_> = difference.upserts.iter().filter(|u| !is_refused(u)).cloned().collect();
            if left.is_empty() {
                let removals: Vec<Key> =
                    difference.removals.iter().filter(|key| may_go(key)).cloned().collect();
                if removals.is_empty() {
                    return None;
                }
                (Vec::new(), removals)
            } else {
                (left, Vec::new())
            }
        } else if difference.upserts.is_empty() {
            // Resources that the gateway has but does not use need no body; it is only asked for their state.
            if difference.removals.is_empty() && self.config.is(snapshot) && !self.retry {
                return None;
            }
            (Vec::new(), difference.removals.clone())
        } else {
            (difference.upserts.clone(), Vec::new())
        };
        let complete = !difference.more
            && upserts.len() == difference.upserts.len()
            && removals.len() == difference.removals.len();
        // The revision changes with the last delta of a snapshot only.
        let (epoch, revision) = &self.at;
        let store_revision = match complete {
            true => snapshot.revision,
            false if *epoch == snapshot.epoch => *revision,
            false => 0,
        };
        self.retry = false;
        self.nonce += 1;
        let delta = v1::Delta {
            nonce: self.nonce,
            store_epoch: snapshot.epoch.to_string(),
            store_revision,
            allow_mass_removal: mass_removal_is_meant(snapshot, &self.config),
            upserts,
            removals: removals.iter().map(Key::to_ref).collect(),
            target_revision: snapshot.revision,
        };
        // Bodies are not needed after sending.
        let bare = |u: &v1::VersionedResource| v1::VersionedResource { body: Vec::new().into(), ..u.clone() };
        let kept = v1::Delta { upserts: delta.upserts.iter().map(bare).collect(), ..delta.clone() };
        self.waiting = Some(Waiting { delta: kept, snapshot: snapshot.clone(), since: now, stale: false });
        Some(delta)
    }

    /// Whether a resource that is gone may be deleted now: what serves stays while its replacement is refused.
    fn may_go(&self, key: &Key) -> bool {
        !is_serving(key.kind) || !self.refused.is_some_and(|refused| refused.serving)
    }

    /// The revision that a gateway has answered which refuses a part of it: not this one while a part of it is to be sent.
    fn answered_revision(&self, snapshot: &Snapshot) -> u64 {
        let difference = self.differences.between(&self.config, snapshot);
        match difference.more || difference.removals.iter().any(|key| self.may_go(key)) {
            true => self.at.1,
            false => snapshot.revision,
        }
    }

    /// Evaluates an answer; without errors everything was applied.
    pub(super) fn answered(&mut self, nonce: u64, errors: Vec<v1::ResourceError>) -> Answered {
        // The answer to an older delta is ignored.
        let Some(Waiting { delta, snapshot, .. }) = self.waiting.take_if(|w| w.delta.nonce == nonce) else {
            return Answered::Late;
        };
        let revision = snapshot.revision;
        // An error without a name refuses the entire delta: nothing of it was applied.
        let keys = errors.iter().map(named).collect::<Option<Vec<_>>>();
        if let Some(keys) = &keys {
            self.at = (Arc::clone(&snapshot.epoch), delta.store_revision);
            // Refused resources are sent again with the next change; deletions are sent without them.
            if !delta.upserts.is_empty() || delta.store_revision == delta.target_revision {
                self.refusals.clear();
            }
            self.refusals.extend(keys.iter().cloned().zip(errors.iter().cloned()));
        }
        if errors.is_empty() {
            let refused: Vec<Key> = self.refusals.keys().cloned().collect();
            self.config.apply(&delta, &refused);
            if !refused.is_empty() {
                let revision = self.answered_revision(&snapshot);
                return Answered::Still { errors: self.refusals.values().cloned().collect(), revision };
            }
            self.config.share(&snapshot);
            self.due.retain(|key| self.config.versions.contains_key(key));
            if !delta.upserts.is_empty() {
                self.refused = None;
                let left = self.differences.between(&self.config, &snapshot);
                // Deletions follow the last part of what is new.
                if left.upserts.is_empty() {
                    self.due = left.removals.clone();
                }
            }
            return Answered::Applied(self.config.revision);
        }
        let whole = keys.is_none();
        let serving = match keys {
            Some(keys) => {
                self.config.apply(&delta, &keys);
                keys.iter().any(|key| is_serving(key.kind))
            }
            None => true,
        };
        self.due.clear();
        let serving = serving || self.refused.is_some_and(|r| r.revision == revision && r.serving);
        self.refused = Some(Refused { revision, whole, serving });
        let revision = if whole { revision } else { self.answered_revision(&snapshot) };
        Answered::Refused { errors, revision, whole }
    }

    /// When the lateness changes next; `None` while no answer is pending.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let waiting = self.waiting.as_ref()?;
        Some(waiting.since + if waiting.stale { CLOSED_AFTER } else { STALE_AFTER })
    }

    /// How late the answer is.
    pub(super) fn lateness(&mut self, now: Instant) -> Lateness {
        match &mut self.waiting {
            Some(waiting) if now >= waiting.since + CLOSED_AFTER => Lateness::Dead,
            Some(waiting) if now >= waiting.since + STALE_AFTER && !waiting.stale => {
                waiting.stale = true;
                Lateness::Stale
            }
            _ => Lateness::InTime,
        }
    }
}

#[cfg(test)]
mod tests;
