//! What one gateway is sent next, and what its answers mean. Pure but for the time it is given.
//!
//! One delta is on its way at a time. What changes meanwhile is not queued: when the answer comes, what then differs is
//! sent. New and changed resources go first; what is gone is taken away only once they are applied (make before break),
//! and backends, pools and models stay while one of theirs was refused. A refused resource is sent again when there
//! is a newer snapshot, since what it needed may be there then, and when the gateway
//! says that it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::v1::{self, ResourceKind};

use crate::model::Key;
use crate::publish::{ConfigState, Differences, Snapshot, mass_removal_is_meant};

/// Without an answer to a delta for so long, a gateway is stale.
pub(super) const STALE_AFTER: Duration = Duration::from_secs(30);
/// And for so long, its stream is closed: it is stuck, and a new stream begins from what it really holds.
pub(super) const CLOSED_AFTER: Duration = Duration::from_secs(120);

/// What one gateway holds, what is in flight to it, and what it refused.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) config: ConfigState,
    /// The epoch and revision that the gateway takes itself to be at. Ahead of what is held after a refusal, since it took
    /// the rest; it refuses whatever is older.
    at: (Arc<str>, u64),
    differences: Differences,
    waiting: Option<Waiting>,
    /// What is to be taken away now that what came with it is applied.
    due: Vec<Key>,
    refused: Option<Refused>,
    /// What it refuses by now, with its reasons.
    refusals: BTreeMap<Key, v1::ResourceError>,
    /// It asks for what it refused.
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

/// Something of a snapshot was refused.
#[derive(Debug, Clone, Copy)]
struct Refused {
    revision: u64,
    /// The delta as a whole: nothing more of this snapshot is sent.
    whole: bool,
    /// A pool, backend or model was.
    serving: bool,
}

/// The meaning of an answer.
#[derive(Debug, PartialEq)]
pub(super) enum Answered {
    /// It was not of the delta on its way.
    Late,
    /// All of it is applied; the gateway is at this revision.
    Applied(u64),
    /// All of it is applied, and what was refused before still is; the revision is this.
    Still { errors: Vec<v1::ResourceError>, revision: u64 },
    /// It is applied but for these; the revision was this.
    Refused { errors: Vec<v1::ResourceError>, revision: u64, whole: bool },
}

/// What has happened to a delta that is not answered.
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

    /// Whether bodies are to be sent.
    pub(super) fn lacks(&self, snapshot: &Snapshot) -> bool {
        !self.differences.between(&self.config, snapshot).upserts.is_empty()
    }

    /// Whether anything differs at all.
    pub(super) fn differs(&self, snapshot: &Snapshot) -> bool {
        !self.differences.between(&self.config, snapshot).is_empty()
    }

    /// What was refused is sent again, although there is no newer snapshot.
    pub(super) fn retry(&mut self) {
        self.refused = None;
        self.retry = !self.refusals.is_empty();
    }

    /// The next delta; `None` while an answer is due, nothing differs, or just this was refused.
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
        let stays = |key: &Key| !is_serving(key.kind) || !self.refused.is_some_and(|r| r.serving);
        // What became due stays due, even when there is something new to send by now: else a gateway that is always
        // sent something would never be told what is gone.
        let due = |key: &&Key| self.due.contains(key) && stays(key);
        let due: Vec<Key> = difference.removals.iter().filter(due).cloned().collect();
        let (upserts, removals) = if !due.is_empty() {
            (Vec::new(), due)
        } else if refused.is_some() {
            let removals: Vec<Key> = difference.removals.iter().filter(|key| stays(key)).cloned().collect();
            if removals.is_empty() {
                return None;
            }
            (Vec::new(), removals)
        } else if difference.upserts.is_empty() {
            // Of what it holds and does not use nothing is to be sent: it is asked what it says of that now.
            if difference.removals.is_empty() && self.config.is(snapshot) && !self.retry {
                return None;
            }
            (Vec::new(), difference.removals.clone())
        } else {
            (difference.upserts.clone(), Vec::new())
        };
        let complete =
            upserts.len() == difference.upserts.len() && removals.len() == difference.removals.len();
        // On the way to a snapshot a gateway stays at the revision it comes from.
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
        // Bodies need not be kept until the answer.
        let bare = |u: &v1::VersionedResource| v1::VersionedResource { body: Vec::new().into(), ..u.clone() };
        let kept = v1::Delta { upserts: delta.upserts.iter().map(bare).collect(), ..delta.clone() };
        self.waiting = Some(Waiting { delta: kept, snapshot: snapshot.clone(), since: now, stale: false });
        Some(delta)
    }

    /// Takes an answer: no errors say that all was applied.
    pub(super) fn answered(&mut self, nonce: u64, errors: Vec<v1::ResourceError>) -> Answered {
        // The answer to an older delta says nothing about this one.
        let Some(Waiting { delta, snapshot, .. }) = self.waiting.take_if(|w| w.delta.nonce == nonce) else {
            return Answered::Late;
        };
        let revision = snapshot.revision;
        // An error without a name is about the whole delta: nothing of it was applied.
        let keys = errors.iter().map(named).collect::<Option<Vec<_>>>();
        if let Some(keys) = &keys {
            self.at = (Arc::clone(&snapshot.epoch), delta.store_revision);
            // What is refused is offered again with whatever is new; only what is gone goes without it.
            if !delta.upserts.is_empty() || delta.store_revision == delta.target_revision {
                self.refusals.clear();
            }
            self.refusals.extend(keys.iter().cloned().zip(errors.iter().cloned()));
        }
        if errors.is_empty() {
            let refused: Vec<Key> = self.refusals.keys().cloned().collect();
            self.config.apply(&delta, &refused);
            if !refused.is_empty() {
                return Answered::Still { errors: self.refusals.values().cloned().collect(), revision };
            }
            self.config.share(&snapshot);
            self.due.retain(|key| self.config.versions.contains_key(key));
            if !delta.upserts.is_empty() {
                self.refused = None;
                self.due = self.differences.between(&self.config, &snapshot).removals.clone();
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
        Answered::Refused { errors, revision, whole }
    }

    /// When there is something to say about lateness; `None` while no answer is due.
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
