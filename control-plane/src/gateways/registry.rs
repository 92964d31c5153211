//! The registry of subscribers (gateways and limit services): connections, acknowledged revisions and refusals.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, SyncState};

use crate::auth::Caller;
use crate::publish::ConfigState;

/// How long a disconnected gateway is listed.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);
/// Acknowledgements kept per gateway with their times, to know since when a revision is applied.
const ANSWERS_KEPT: usize = 64;

/// The maximum of ids. A token may use many ids; the gateway that disconnected first is removed first.
const IDS_MAX: usize = 20_000;

/// How the token of a stream proves its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// The token or certificate is bound to this gateway.
    Own,
    /// Several gateways share the token: an id belongs to the process that connected first, while it is connected.
    Shared,
}

impl Claim {
    /// The claim of a caller that [may speak](crate::auth::Authority::speaks_for) for the gateway.
    pub(crate) const fn of(caller: &Caller) -> Self {
        if caller.gateway_id.is_some() { Self::Own } else { Self::Shared }
    }

    /// Whether a stream may replace the stream of a process that is still connected.
    pub(crate) fn may_replace(self, there: &str, comes: &str) -> bool {
        self == Self::Own || there == comes
    }
}

/// Why a stream is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Taken {
    /// The same process has a configuration stream here, so a status-only stream is not needed.
    #[error("another stream of this gateway is here")]
    ByItself,
    /// Another process with this id is connected, and the token does not prove which of them is the gateway.
    #[error(
        "another process is here as gateway {0}: end it, give this one another id, or give the gateway a token of its own"
    )]
    ByAnother(String),
}

/// All gateways. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    gateways: Arc<Mutex<Gateways>>,
    /// Counts changes, for tasks that wait for one.
    changes: watch::Sender<u64>,
}

/// Whether the subscriber is a limit service, and its name; a gateway and a limit service may have the same name.
type Id = (bool, String);

#[derive(Debug, Default)]
struct Gateways {
    /// Beyond [`IDS_MAX`] the gateway that disconnected first is removed; connected ones never are.
    by_id: BTreeMap<Id, Entry>,
    streams: u64,
}

#[derive(Debug)]
struct Entry {
    gateway: v1::Gateway,
    held: Arc<ConfigState>,
    /// The newest revision that was acknowledged or refused.
    answered: u64,
    /// Revision and time of the last acknowledgements, oldest first.
    answers: VecDeque<(u64, Instant)>,
    stale: bool,
    stream: u64,
    /// The gateway follows another control plane and reports its status here.
    status_only: bool,
    /// Cancelled when another stream of the same gateway replaces this one.
    replaced: CancellationToken,
    left: Option<Instant>,
}

/// A gateway's open stream; dropping it marks the gateway as disconnected.
#[derive(Debug)]
pub(crate) struct Connection {
    registry: Registry,
    id: Id,
    stream: u64,
    /// Cancelled when a newer stream of the same gateway replaces this one.
    pub(crate) replaced: CancellationToken,
}

impl Registry {
    fn gateways(&self) -> MutexGuard<'_, Gateways> {
        self.gateways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Registers the stream of a gateway. The newest stream of a process replaces an older one, whose connection broke
    /// unnoticed. Another process with the same id replaces the stream only with a token that is bound to this gateway. A
    /// status-only stream never replaces a configuration stream of the same process.
    pub(crate) fn connect(
        &self,
        hello: &v1::Hello,
        held: &ConfigState,
        applied_revision: u64,
        claim: Claim,
    ) -> Result<Connection, Taken> {
        let replaced = CancellationToken::new();
        let mut gateways = self.gateways();
        gateways.streams += 1;
        let stream = gateways.streams;
        gateways.by_id.retain(|_, entry| entry.left.is_none_or(|left| left.elapsed() < REMEMBERED));
        // An unspecified role is a gateway.
        let role = match hello.role() {
            v1::SubscriberRole::Unspecified | v1::SubscriberRole::Gateway => v1::SubscriberRole::Gateway,
            v1::SubscriberRole::LimitService => v1::SubscriberRole::LimitService,
        };
        let id = (role == v1::SubscriberRole::LimitService, hello.gateway_id.clone());
        let follows = |entry: &Entry| {
            !entry.status_only && entry.left.is_none() && entry.gateway.incarnation == hello.incarnation
        };
        if hello.status_only && gateways.by_id.get(&id).is_some_and(follows) {
            return Err(Taken::ByItself);
        }
        let there = gateways.by_id.get(&id).filter(|entry| entry.left.is_none());
        if there.is_some_and(|entry| !claim.may_replace(&entry.gateway.incarnation, &hello.incarnation)) {
            return Err(Taken::ByAnother(hello.gateway_id.clone()));
        }
        if gateways.by_id.len() >= IDS_MAX && !gateways.by_id.contains_key(&id) {
            let left = gateways.by_id.iter().filter_map(|(id, entry)| Some((entry.left?, id)));
            if let Some((_, oldest)) = left.min().map(|(left, id)| (left, id.clone())) {
                gateways.by_id.remove(&oldest);
            }
        }
        let gateway = v1::Gateway {
            id: hello.gateway_id.clone(),
            incarnation: hello.incarnation.clone(),
            region: hello.region.clone(),
            build: hello.build.clone(),
            connected: true,
            applied_revision,
            last_seen_time: Some(weir_runtime::wall_clock().into()),
            errors: Vec::new(),
            role: role.into(),
            sync: SyncState::Unspecified.into(),
            unanswered_since: None,
        };
        let entry = Entry {
            gateway,
            held: Arc::new(held.clone()),
            answered: applied_revision,
            answers: VecDeque::from([(applied_revision, Instant::now())]),
            stale: false,
            stream,
            status_only: hello.status_only,
            replaced: replaced.clone(),
            left: None,
        };
        if let Some(old) = gateways.by_id.insert(id.clone(), entry) {
            old.replaced.cancel();
        }
        drop(gateways);
        self.changed();
        Ok(Connection { registry: self.clone(), id, stream, replaced })
    }

    /// Every gateway that is or was connected within the last hour, by id, compared with the newest revision.
    pub(crate) fn list(&self, revision: u64) -> Vec<v1::Gateway> {
        let gateways = self.gateways();
        let shown = |entry: &&Entry| entry.left.is_none_or(|left| left.elapsed() < REMEMBERED);
        let row = |entry: &Entry| v1::Gateway { sync: entry.sync(revision).into(), ..entry.gateway.clone() };
        gateways.by_id.values().filter(shown).map(row).collect()
    }

    /// The applied configuration of a gateway and its refusals; `None` for an unknown gateway.
    pub(crate) fn held(&self, id: &str) -> Option<(Arc<ConfigState>, Vec<v1::gateway::ResourceError>)> {
        let gateways = self.gateways();
        let own = |limit_service: bool| gateways.by_id.get(&(limit_service, id.to_owned()));
        let entry = own(false).or_else(|| own(true))?;
        Some((Arc::clone(&entry.held), entry.gateway.errors.clone()))
    }

    /// The connected gateways, each with the time at which it applied a revision.
    pub(crate) fn applied_since(&self, revision: u64) -> Vec<(String, Option<Instant>)> {
        let gateways = self.gateways();
        let since =
            |entry: &Entry| entry.answers.iter().find(|(at, _)| *at >= revision).map(|(_, since)| *since);
        let connected =
            gateways.by_id.iter().filter(|((limit_service, _), e)| !limit_service && e.gateway.connected);
        connected.map(|(_, entry)| (entry.gateway.id.clone(), since(entry))).collect()
    }

    /// Whether a gateway is connected.
    pub(crate) fn is_connected(&self, gateway: &str) -> bool {
        let gateways = self.gateways();
        gateways.by_id.get(&(false, gateway.to_owned())).is_some_and(|entry| entry.gateway.connected)
    }

    /// The number of connected gateways, and the oldest applied revision of the connected subscribers.
    pub(crate) fn connected(&self) -> (usize, Option<u64>) {
        let gateways = self.gateways();
        let connected = || gateways.by_id.iter().filter(|(_, entry)| entry.gateway.connected);
        let gateway_count = connected().filter(|((limit_service, _), _)| !limit_service).count();
        (gateway_count, connected().map(|(_, entry)| entry.gateway.applied_revision).min())
    }

    /// Whether a connected subscriber has not answered a revision yet.
    pub(crate) fn is_pending(&self, revision: u64) -> bool {
        let gateways = self.gateways();
        gateways.by_id.values().any(|entry| entry.gateway.connected && entry.is_pending(revision))
    }

    /// The connected subscribers that have applied a revision, have not answered yet, or refused a part of it.
    pub(crate) fn applied(&self, revision: u64) -> v1::WaitAppliedResponse {
        let gateways = self.gateways();
        let mut out = v1::WaitAppliedResponse::default();
        for ((limit_service, _), entry) in gateways.by_id.iter().filter(|(_, entry)| entry.gateway.connected)
        {
            let (applied, connected) = if *limit_service {
                (&mut out.limit_services_applied, &mut out.limit_services_connected)
            } else {
                (&mut out.applied, &mut out.connected)
            };
            *connected += 1;
            let gateway_id = entry.gateway.id.clone();
            if entry.gateway.applied_revision >= revision {
                *applied += 1;
            } else if entry.is_pending(revision) {
                out.pending.push(gateway_id);
            } else {
                out.refused.push(v1::GatewayRefusal { gateway_id, errors: entry.gateway.errors.clone() });
            }
        }
        out
    }

    /// Notifies of every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl Entry {
    /// Whether the revision is neither applied nor refused.
    fn is_pending(&self, revision: u64) -> bool {
        let refused = self.answered >= revision && !self.gateway.errors.is_empty();
        self.gateway.applied_revision < revision && !refused
    }

    fn sync(&self, revision: u64) -> SyncState {
        match () {
            () if !self.gateway.connected => SyncState::Disconnected,
            () if self.stale => SyncState::Stale,
            () if !self.gateway.errors.is_empty() => SyncState::Error,
            () if self.gateway.applied_revision >= revision => SyncState::Synced,
            () => SyncState::Pending,
        }
    }

    fn answered(&mut self, revision: u64, held: &ConfigState) {
        self.gateway.unanswered_since = None;
        self.stale = false;
        self.answered = self.answered.max(revision);
        self.held = Arc::new(held.clone());
    }
}

impl Connection {
    fn update(&self, change: impl FnOnce(&mut Entry)) {
        let mut gateways = self.registry.gateways();
        if let Some(entry) = gateways.by_id.get_mut(&self.id).filter(|entry| entry.stream == self.stream) {
            change(entry);
        }
        drop(gateways);
        self.registry.changed();
    }

    /// Records that a delta is on its way.
    pub(crate) fn sent(&self) {
        self.update(|entry| entry.gateway.unanswered_since = Some(weir_runtime::wall_clock().into()));
    }

    /// Records that the answer to a delta is overdue.
    pub(crate) fn stale(&self) {
        self.update(|entry| entry.stale = true);
    }

    /// Records that everything up to a revision is applied.
    pub(crate) fn acknowledged(&self, revision: u64, held: &ConfigState) {
        self.update(|entry| {
            entry.gateway.last_seen_time = Some(weir_runtime::wall_clock().into());
            entry.gateway.applied_revision = revision;
            entry.gateway.errors.clear();
            entry.answered(revision, held);
            entry.answers.push_back((revision, Instant::now()));
            if entry.answers.len() > ANSWERS_KEPT {
                entry.answers.pop_front();
            }
        });
    }

    /// Sets the applied configuration, which is known now.
    pub(crate) fn holds(&self, held: &ConfigState) {
        self.update(|entry| entry.held = Arc::new(held.clone()));
    }

    /// Records that a part of a revision was refused; the applied revision stays.
    pub(crate) fn refused(&self, errors: &[v1::ResourceError], revision: u64, held: &ConfigState) {
        let errors = errors
            .iter()
            .map(|e| v1::gateway::ResourceError { r#ref: e.resource.clone(), message: e.message.clone() });
        self.update(|entry| {
            entry.gateway.last_seen_time = Some(weir_runtime::wall_clock().into());
            entry.gateway.errors = errors.collect();
            entry.answered(revision, held);
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.update(|entry| entry.gateway.connected = false);
        let mut gateways = self.registry.gateways();
        if let Some(entry) = gateways.by_id.get_mut(&self.id).filter(|entry| entry.stream == self.stream) {
            entry.left = Some(Instant::now());
            tracing::info!(gateway = self.id.1, "subscriber left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(incarnation: &str) -> v1::Hello {
        v1::Hello { gateway_id: "g".into(), incarnation: incarnation.into(), ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_stream_wins_and_who_left_is_forgotten_after_an_hour() {
        let registry = Registry::default();
        let held = ConfigState::default();
        let first = registry.connect(&hello("1"), &held, 3, Claim::Own).unwrap();
        let second = registry.connect(&hello("2"), &held, 4, Claim::Own).unwrap();
        assert!(first.replaced.is_cancelled() && !second.replaced.is_cancelled());
        first.acknowledged(9, &held);
        drop(first);
        let applied = registry.applied(5);
        assert_eq!((applied.applied, applied.connected), (0, 1), "the old stream has no say any more");
        assert_eq!(applied.pending, ["g"]);
        second.acknowledged(5, &held);
        assert_eq!(registry.applied(5).applied, 1);
        assert_eq!(registry.list(5)[0].sync(), SyncState::Synced);
        assert_eq!(registry.list(6)[0].sync(), SyncState::Pending);
        second.stale();
        assert_eq!(registry.list(6)[0].sync(), SyncState::Stale);
        second.refused(&[v1::ResourceError::default()], 6, &held);
        assert_eq!(registry.list(6)[0].sync(), SyncState::Error);
        let applied = registry.applied(6);
        assert_eq!((applied.refused.len(), applied.pending.len()), (1, 0), "it has said its word");
        drop(second);
        assert_eq!(registry.list(6)[0].sync(), SyncState::Disconnected);
        tokio::time::advance(REMEMBERED).await;
        assert!(registry.list(6).is_empty());
    }

    #[test]
    fn with_a_shared_token_no_other_process_takes_the_id_of_one_that_is_here() {
        let registry = Registry::default();
        let held = ConfigState::default();
        let first = registry.connect(&hello("1"), &held, 3, Claim::Shared).unwrap();
        let rogue = registry.connect(&hello("2"), &held, 3, Claim::Shared);
        assert_eq!(rogue.err(), Some(Taken::ByAnother("g".into())));
        let status_only = v1::Hello { status_only: true, ..hello("2") };
        assert!(
            registry.connect(&status_only, &held, 3, Claim::Shared).is_err(),
            "nor does a status-only stream"
        );
        assert!(!first.replaced.is_cancelled());
        let again = registry.connect(&hello("1"), &held, 3, Claim::Shared).unwrap();
        assert!(first.replaced.is_cancelled(), "the same process comes back before its old stream has ended");
        let proven = registry.connect(&hello("3"), &held, 3, Claim::Own).unwrap();
        assert!(again.replaced.is_cancelled(), "the token of the gateway alone proves which one it is");
        drop((first, again, proven));
        assert!(registry.connect(&hello("2"), &held, 3, Claim::Shared).is_ok(), "it has left");
    }

    #[test]
    fn who_follows_another_control_plane_is_counted_once_and_gives_way_to_its_own_stream() {
        let registry = Registry::default();
        let held = ConfigState::default();
        let status_only = v1::Hello { status_only: true, ..hello("1") };
        let reporting = registry.connect(&status_only, &held, 3, Claim::Own).unwrap();
        reporting.acknowledged(4, &held);
        assert_eq!((registry.applied(4).applied, registry.applied(4).connected), (1, 1));
        let following = registry.connect(&hello("1"), &held, 4, Claim::Own).unwrap();
        assert!(reporting.replaced.is_cancelled());
        assert_eq!(registry.connect(&status_only, &held, 4, Claim::Own).err(), Some(Taken::ByItself));
        assert_eq!(registry.applied(4).connected, 1);
        drop(following);
        assert!(registry.connect(&status_only, &held, 4, Claim::Own).is_ok(), "it moved on");
    }

    #[test]
    fn limit_services_are_counted_apart_from_gateways_of_the_same_name() {
        let registry = Registry::default();
        let held = ConfigState::default();
        let gateway = registry.connect(&hello("1"), &held, 3, Claim::Own).unwrap();
        let role = v1::SubscriberRole::LimitService.into();
        let service = registry.connect(&v1::Hello { role, ..hello("2") }, &held, 2, Claim::Own).unwrap();
        assert!(!gateway.replaced.is_cancelled());
        assert_eq!(registry.connected(), (1, Some(2)), "a limit service is not counted as a gateway");
        let applied = registry.applied(3);
        assert_eq!((applied.applied, applied.connected), (1, 1));
        assert_eq!((applied.limit_services_applied, applied.limit_services_connected), (0, 1));
        assert_eq!(applied.pending, ["g"], "a change is waited for on both");
        service.acknowledged(3, &held);
        assert_eq!(registry.applied(3).limit_services_applied, 1);
        drop(gateway);
        assert_eq!(registry.applied(3).connected, 0);
    }
}
