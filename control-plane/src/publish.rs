//! From the state to what a gateway is sent: debounced, and only what differs from what it holds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_proto::v1;

use crate::model::{Key, State};

/// A change after so long a silence is sent at once; others wait for as long a silence.
const QUIET: Duration = Duration::from_millis(100);
/// But never longer than that.
const LONGEST: Duration = Duration::from_secs(1);

/// What gateways are to hold: an immutable state with every resource encoded once.
pub(crate) type Snapshot = Arc<State>;

/// Passes states on, merged when they come quickly.
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

/// What a gateway holds, as far as it has said.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Held {
    pub(crate) epoch: String,
    pub(crate) revision: u64,
    /// Resource -> version.
    pub(crate) versions: BTreeMap<Key, String>,
    /// What it is, and so which kinds it is to hold.
    pub(crate) role: v1::SubscriberRole,
}

/// Whether subscribers of a role get resources of a kind. Gateways of before the kind was would refuse it, and a limit
/// service has no use for backends.
const fn wanted(role: v1::SubscriberRole, kind: v1::ResourceKind) -> bool {
    use v1::ResourceKind as Kind;
    match role {
        v1::SubscriberRole::Unspecified | v1::SubscriberRole::Gateway => {
            !matches!(kind, Kind::DescriptorRule)
        }
        v1::SubscriberRole::LimitService => {
            matches!(kind, Kind::Model | Kind::Tenant | Kind::ApiKey | Kind::Limit | Kind::DescriptorRule)
        }
    }
}

impl Held {
    /// From what a gateway says on connecting.
    pub(crate) fn of(hello: &v1::Hello) -> Self {
        let versions = hello.held.iter().map(|h| (Key::new(h.kind(), &h.name), h.version.clone())).collect();
        Self {
            epoch: hello.store_epoch.clone(),
            revision: hello.store_revision,
            versions,
            role: hello.role(),
        }
    }

    /// It holds exactly this.
    pub(crate) fn is(&self, snapshot: &State) -> bool {
        self.epoch == *snapshot.epoch && self.revision == snapshot.revision
    }

    /// It applied a delta but for what it refused. It is at the delta's revision only when it refused nothing.
    pub(crate) fn apply(&mut self, delta: &v1::Delta, refused: &[Key]) {
        for upsert in &delta.upserts {
            let key = Key::new(upsert.kind(), &upsert.name);
            if !refused.contains(&key) {
                self.versions.insert(key, upsert.version.clone());
            }
        }
        for key in delta.removals.iter().filter_map(Key::of_ref).filter(|key| !refused.contains(key)) {
            self.versions.remove(&key);
        }
        if refused.is_empty() {
            self.epoch.clone_from(&delta.store_epoch);
            self.revision = delta.store_revision;
        }
    }
}

/// What has to be sent so that a gateway holds the snapshot. Empty lists say that only the revision moved.
pub(crate) fn delta(snapshot: &State, held: &Held, nonce: u64) -> v1::Delta {
    let differs = |key: &Key, version: &str| held.versions.get(key).is_none_or(|held| held != version);
    let upserts = snapshot
        .resources
        .iter()
        .filter(|(key, stored)| wanted(held.role, key.kind) && differs(key, &stored.published.version))
        .map(|(_, stored)| stored.published.clone())
        .collect();
    // In reverse order of kind: what refers goes before what it refers to.
    let removals = held
        .versions
        .keys()
        .rev()
        .filter(|key| !snapshot.resources.contains_key(*key) || !wanted(held.role, key.kind))
        .map(Key::to_ref)
        .collect();
    v1::Delta {
        nonce,
        store_epoch: snapshot.epoch.to_string(),
        store_revision: snapshot.revision,
        upserts,
        removals,
        allow_mass_removal: mass_removal_is_meant(snapshot, held),
    }
}

/// Within an epoch, every removal has passed the guard here, one change at a time; several merged into one delta
/// may look like a mass removal to a gateway, and are meant. Another epoch is another history: there, only the
/// operator's word counts, so that an empty new store takes nothing away from anybody.
fn mass_removal_is_meant(snapshot: &State, held: &Held) -> bool {
    if held.epoch == *snapshot.epoch {
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

    fn synced(state: &State) -> Held {
        let mut held = Held::default();
        held.apply(&delta(state, &Held::default(), 1), &[]);
        held
    }

    #[test]
    fn only_what_differs_is_sent() {
        let old = state(1, 2);
        let mut held = synced(&old);
        assert!(held.is(&old));
        let mut new = state(2, 1);
        let changed = Stored::new(backend("b0", "p", "m", "http://127.0.0.1:2")).unwrap();
        new.resources.insert(changed.key(), Arc::new(changed));
        let delta = delta(&new, &held, 2);
        let names = |d: &v1::Delta| d.upserts.iter().map(|u| u.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&delta), ["b0"]);
        assert_eq!(delta.removals.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["b1"]);
        assert!(!delta.allow_mass_removal);

        let refused = Key::new(v1::ResourceKind::Backend, "b0");
        held.apply(&delta, std::slice::from_ref(&refused));
        assert_eq!(held.revision, 1, "with something refused it is not at the revision");
        assert_eq!(names(&super::delta(&new, &held, 3)), ["b0"]);
    }

    #[test]
    fn an_empty_new_store_is_not_a_mass_removal_that_is_meant() {
        let held = synced(&state(5, 3));
        let mut new = State { epoch: "f".into(), revision: 9, removal: 8, ..State::default() };
        assert!(!delta(&new, &held, 1).allow_mass_removal);
        new.allowed = 9;
        assert!(delta(&new, &held, 1).allow_mass_removal);
    }

    #[test]
    fn removals_accepted_one_by_one_are_meant_when_merged() {
        let held = synced(&state(5, 3));
        let new = State { removal: 7, ..state(7, 1) };
        assert!(delta(&new, &held, 1).allow_mass_removal);
        assert!(!delta(&State { removal: 4, ..state(7, 1) }, &held, 1).allow_mass_removal);
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
