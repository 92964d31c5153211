//! Publishes snapshots of the state, debounced, and computes the difference to a gateway's configuration.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_proto::v1;
use weir_runtime::beside;

use crate::model::{Key, State, Versions};

/// A change after this time without changes is published at once. Other changes wait until no change came for this time...
const QUIET: Duration = Duration::from_millis(100);
/// ...but at most this long.
const LONGEST: Duration = Duration::from_secs(1);

/// A snapshot: an immutable state in which every resource is encoded once.
pub(crate) type Snapshot = Arc<State>;

/// Publishes states and merges changes that follow quickly.
pub(crate) async fn publish(
    mut state: watch::Receiver<Snapshot>,
    out: watch::Sender<Snapshot>,
    stop: CancellationToken,
) {
    let mut last = Instant::now() - QUIET;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
        }
        let first = Instant::now();
        let mut quiet = if first - last >= QUIET { first } else { first + QUIET };
        while quiet > Instant::now() && quiet < first + LONGEST {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep_until(quiet) => break,
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    quiet = Instant::now() + QUIET;
                }
            }
        }
        out.send_replace(Arc::clone(&state.borrow_and_update()));
        last = Instant::now();
    }
}

/// The configuration a gateway holds, as far as it has reported. Gateways in sync share one map.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ConfigState {
    pub(crate) epoch: Arc<str>,
    pub(crate) revision: u64,
    pub(crate) versions: Versions,
    /// The role of the subscriber, which decides the kinds of its resources.
    pub(crate) role: v1::SubscriberRole,
}

/// The resource versions of subscribers of a role that are in sync with a snapshot.
pub(crate) fn versions(snapshot: &State, role: v1::SubscriberRole) -> &Versions {
    snapshot.resources.versions(role)
}

impl ConfigState {
    /// From the hello of a gateway.
    pub(crate) fn of(hello: &v1::Hello) -> Self {
        let versions = hello
            .resource_versions
            .iter()
            .map(|h| (Key::new(h.kind(), &h.name), h.version.as_str().into()))
            .collect();
        let epoch = hello.store_epoch.as_str().into();
        Self { epoch, revision: hello.store_revision, versions, role: hello.role() }
    }

    /// Whether epoch and revision are those of the snapshot.
    pub(crate) fn is(&self, snapshot: &State) -> bool {
        self.epoch == snapshot.epoch && self.revision == snapshot.revision
    }

    /// Applies a delta except for the refused resources.
    pub(crate) fn apply(&mut self, delta: &v1::Delta, refused: &[Key]) {
        if !delta.upserts.is_empty() || !delta.removals.is_empty() {
            let versions = &mut self.versions;
            for upsert in &delta.upserts {
                let key = Key::new(upsert.kind(), &upsert.name);
                if !refused.contains(&key) {
                    versions.insert(key, upsert.version.as_str().into());
                }
            }
            let removals = delta.removals.iter().filter_map(Key::of_ref);
            for key in removals.filter(|key| !refused.contains(key)) {
                versions.remove(&key);
            }
        }
        // The revision changes only without refusals.
        if refused.is_empty() {
            if *self.epoch != *delta.store_epoch {
                self.epoch = delta.store_epoch.as_str().into();
            }
            self.revision = delta.store_revision;
        }
    }

    /// Replaces the map by that of the snapshot if both are equal, so that it is shared.
    pub(crate) fn share(&mut self, snapshot: &State) {
        let shared = versions(snapshot, self.role);
        if !shared.is_same(&self.versions) && *shared == self.versions {
            self.versions = shared.clone();
        }
    }
}

/// The bodies in one delta. A larger difference is sent in several deltas, the last of which has its revision.
const DELTA_BYTES_MAX: usize = 8 << 20;
/// The resources in one delta.
pub(crate) const DELTA_RESOURCES_MAX: usize = 20_000;

/// The difference between a gateway's configuration and a snapshot, or the first part of one that is too large for a delta.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Difference {
    /// New and changed resources; a resource comes before the ones that refer to it.
    pub(crate) upserts: Vec<v1::VersionedResource>,
    /// Deleted resources; a resource comes after the ones that refer to it.
    pub(crate) removals: Vec<Key>,
    /// There are more new and changed resources than these; deletions are not known before the last part.
    pub(crate) more: bool,
}

impl Difference {
    pub(crate) fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removals.is_empty()
    }

    fn between(held: &ConfigState, snapshot: &State) -> Self {
        let (mut upserts, mut removals, mut bytes) = (Vec::new(), Vec::new(), 0);
        for (key, held, desired) in held.versions.changes(versions(snapshot, held.role)) {
            match desired {
                None => removals.push(key.clone()),
                Some(_) if held == desired => {}
                Some(_) if bytes >= DELTA_BYTES_MAX || upserts.len() >= DELTA_RESOURCES_MAX => {
                    return Self { upserts, removals: Vec::new(), more: true };
                }
                Some(_) => {
                    let upsert = snapshot.get(key).map(|stored| stored.published.clone());
                    bytes += upsert.as_ref().map_or(0, |upsert| upsert.body.len());
                    upserts.extend(upsert);
                }
            }
        }
        removals.reverse();
        Self { upserts, removals, more: false }
    }
}

/// Cached differences: gateways with the same configuration share one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Differences(Arc<Mutex<VecDeque<KnownDifference>>>);

#[derive(Debug)]
struct KnownDifference {
    role: v1::SubscriberRole,
    held: Versions,
    snapshot: Snapshot,
    difference: Arc<Difference>,
}

/// Cached differences; connected gateways are at most a few revisions apart.
const REMEMBERED: usize = 8;

impl Differences {
    pub(crate) fn between(&self, held: &ConfigState, snapshot: &Snapshot) -> Arc<Difference> {
        let is = |known: &&KnownDifference| {
            known.role == held.role
                && known.held.is_same(&held.versions)
                && Arc::ptr_eq(&known.snapshot, snapshot)
        };
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().iter().find(is) {
            return Arc::clone(&known.difference);
        }
        let differ = held.versions.len().abs_diff(versions(snapshot, held.role).len());
        let difference = Arc::new(beside(differ, || Difference::between(held, snapshot)));
        // The map is kept alive, so that no other map can have the same address.
        let known = KnownDifference {
            role: held.role,
            held: held.versions.clone(),
            snapshot: Arc::clone(snapshot),
            difference: Arc::clone(&difference),
        };
        let mut all = lock();
        all.push_back(known);
        if all.len() > REMEMBERED {
            all.pop_front();
        }
        difference
    }
}

/// Whether a delta may carry `allow_mass_removal`. Within an epoch every removal was checked when it was applied; several
/// of them merged into one delta may look like a mass removal to a gateway, and are allowed. After a change of the epoch
/// only the operator's permission counts, until the gateway holds all of the new epoch: a new store deletes nothing from
/// gateways that it does not know.
pub(crate) fn mass_removal_is_meant(snapshot: &State, held: &ConfigState) -> bool {
    // It has revision zero until it holds all of the epoch.
    if held.epoch == snapshot.epoch && held.revision > 0 {
        snapshot.removal > held.revision || snapshot.allowed > held.revision
    } else {
        snapshot.allowed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Stored;
    use crate::model::tests::{backend, cluster};

    fn state(revision: u64, backends: usize) -> State {
        let mut state = State { epoch: "e".into(), revision, ..State::default() };
        for wire in cluster(backends) {
            let stored = Stored::new(wire).unwrap();
            state.resources.insert(stored.key(), Arc::new(stored));
        }
        state
    }

    fn synced(state: &State) -> ConfigState {
        ConfigState {
            epoch: state.epoch.clone(),
            revision: state.revision,
            versions: versions(state, v1::SubscriberRole::Gateway).clone(),
            ..ConfigState::default()
        }
    }

    #[test]
    fn only_what_differs_is_sent_and_found_once_for_all_who_hold_the_same() {
        let held = synced(&state(1, 2));
        let mut new = state(2, 1);
        let changed = Stored::new(backend("b0", "p", "m", "http://127.0.0.1:2")).unwrap();
        new.resources.insert(changed.key(), Arc::new(changed));
        let (new, known) = (Arc::new(new), Differences::default());
        let difference = known.between(&held, &new);
        assert_eq!(difference.upserts.iter().map(|u| u.name.as_str()).collect::<Vec<_>>(), ["b0"]);
        assert_eq!(difference.removals, [Key::new(v1::ResourceKind::Backend, "b1")]);
        assert!(Arc::ptr_eq(&difference, &known.between(&held, &new)));
        let own = ConfigState {
            versions: held.versions.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
            ..held
        };
        assert!(!Arc::ptr_eq(&difference, &known.between(&own, &new)));
    }

    #[test]
    fn who_is_in_sync_shares_the_map_of_the_snapshot() {
        let state = state(1, 2);
        let wanted = versions(&state, v1::SubscriberRole::Gateway);
        let mut held = ConfigState {
            versions: wanted.iter().map(|(key, version)| (key.clone(), version.clone())).collect(),
            ..ConfigState::default()
        };
        held.share(&state);
        assert!(held.versions.is_same(wanted));
    }

    #[test]
    fn an_empty_new_store_is_not_a_mass_removal_that_is_meant() {
        let held = synced(&state(5, 3));
        let mut new = State { epoch: "f".into(), revision: 9, removal: 8, ..State::default() };
        assert!(!mass_removal_is_meant(&new, &held));
        // It has taken a part of the new epoch, and an operator has deleted something there.
        let partly = ConfigState { epoch: "f".into(), revision: 0, ..held.clone() };
        assert!(!mass_removal_is_meant(&new, &partly));
        new.allowed = 9;
        assert!(mass_removal_is_meant(&new, &held) && mass_removal_is_meant(&new, &partly));
    }

    #[test]
    fn removals_accepted_one_by_one_are_meant_when_merged() {
        let held = synced(&state(5, 3));
        let new = State { removal: 7, ..state(7, 1) };
        assert!(mass_removal_is_meant(&new, &held));
        assert!(!mass_removal_is_meant(&State { removal: 4, ..state(7, 1) }, &held));
    }

    #[tokio::test(start_paused = true)]
    async fn quick_changes_are_merged_and_the_first_is_not_held_up() {
        let input = watch::Sender::new(Arc::new(state(1, 0)));
        let output = watch::Sender::new(input.borrow().clone());
        let mut seen = output.subscribe();
        let stop = CancellationToken::new();
        let task = tokio::spawn(publish(input.subscribe(), output, stop.clone()));
        let start = Instant::now();
        input.send_replace(Arc::new(state(2, 0)));
        seen.changed().await.unwrap();
        assert_eq!((seen.borrow_and_update().revision, start.elapsed()), (2, Duration::ZERO));
        for revision in 3..=40 {
            input.send_replace(Arc::new(state(revision, 0)));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let elapsed = start.elapsed();
        assert!(elapsed > LONGEST, "{elapsed:?}");
        assert!(seen.has_changed().unwrap(), "a stream of changes does not hold publishing up for ever");
        seen.wait_for(|state| state.revision == 40).await.unwrap();
        stop.cancel();
        task.await.unwrap();
    }
}
