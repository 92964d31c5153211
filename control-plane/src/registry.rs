//! The subscribers, gateways and limit services: who is connected, what each has acknowledged and what it refuses.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1;

/// How long a gateway that left is shown.
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

/// All gateways. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    gateways: Arc<Mutex<Gateways>>,
    /// Counts changes, for those who wait for one.
    changes: watch::Sender<u64>,
}

/// Whether it is a limit service, and its name: a gateway and a limit service may have the same.
type Id = (bool, String);

/// Subscribers at a revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Gateways at it, and all connected ones.
    pub(crate) gateways: (u32, u32),
    /// Limit services at it, and all connected ones.
    pub(crate) limit_services: (u32, u32),
    /// The names of those that are not there yet.
    pub(crate) pending: Vec<String>,
}

#[derive(Debug, Default)]
struct Gateways {
    by_id: BTreeMap<Id, Entry>,
    streams: u64,
}

#[derive(Debug)]
struct Entry {
    gateway: v1::Gateway,
    stream: u64,
    /// Ends the stream when another one of the same gateway takes over.
    replaced: CancellationToken,
    left: Option<Instant>,
}

/// A gateway's open stream; dropping it marks the gateway as gone.
#[derive(Debug)]
pub(crate) struct Connection {
    registry: Registry,
    id: Id,
    stream: u64,
    /// Cancelled when a newer stream of the same gateway has taken over.
    pub(crate) replaced: CancellationToken,
}

impl Registry {
    fn gateways(&self) -> MutexGuard<'_, Gateways> {
        self.gateways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// A gateway opened a stream. The newest stream of an id wins: an older one is a process that is gone, or a
    /// connection whose end nobody noticed yet.
    pub(crate) fn connect(&self, hello: &v1::Hello, applied_revision: u64) -> Connection {
        let replaced = CancellationToken::new();
        let mut gateways = self.gateways();
        gateways.streams += 1;
        let stream = gateways.streams;
        gateways.by_id.retain(|_, entry| entry.left.is_none_or(|left| left.elapsed() < REMEMBERED));
        // Who does not say is a gateway of a version before there were others.
        let role = match hello.role() {
            v1::SubscriberRole::Unspecified | v1::SubscriberRole::Gateway => v1::SubscriberRole::Gateway,
            v1::SubscriberRole::LimitService => v1::SubscriberRole::LimitService,
        };
        let id = (role == v1::SubscriberRole::LimitService, hello.gateway_id.clone());
        let gateway = v1::Gateway {
            id: hello.gateway_id.clone(),
            incarnation: hello.incarnation.clone(),
            region: hello.region.clone(),
            build: hello.build.clone(),
            connected: true,
            applied_revision,
            last_seen_time: Some(SystemTime::now().into()),
            errors: Vec::new(),
            role: role.into(),
        };
        let entry = Entry { gateway, stream, replaced: replaced.clone(), left: None };
        if let Some(old) = gateways.by_id.insert(id.clone(), entry) {
            old.replaced.cancel();
        }
        drop(gateways);
        self.changed();
        Connection { registry: self.clone(), id, stream, replaced }
    }

    /// Every gateway connected now or within the last hour, by id.
    pub(crate) fn list(&self) -> Vec<v1::Gateway> {
        let gateways = self.gateways();
        let shown = |entry: &&Entry| entry.left.is_none_or(|left| left.elapsed() < REMEMBERED);
        gateways.by_id.values().filter(shown).map(|entry| entry.gateway.clone()).collect()
    }

    /// The ids of the gateways connected.
    pub(crate) fn connected(&self) -> Vec<String> {
        let gateways = self.gateways();
        let connected =
            gateways.by_id.iter().filter(|((limit_service, _), e)| !limit_service && e.gateway.connected);
        connected.map(|(_, entry)| entry.gateway.id.clone()).collect()
    }

    /// Who of those connected is at a revision.
    pub(crate) fn applied(&self, revision: u64) -> Applied {
        let gateways = self.gateways();
        let mut out = Applied::default();
        for ((limit_service, _), entry) in gateways.by_id.iter().filter(|(_, entry)| entry.gateway.connected)
        {
            let (applied, connected) =
                if *limit_service { &mut out.limit_services } else { &mut out.gateways };
            *connected += 1;
            if entry.gateway.applied_revision >= revision {
                *applied += 1;
            } else {
                out.pending.push(entry.gateway.id.clone());
            }
        }
        out
    }

    /// Tells of every change.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

impl Connection {
    fn update(&self, change: impl FnOnce(&mut v1::Gateway)) {
        let mut gateways = self.registry.gateways();
        if let Some(entry) = gateways.by_id.get_mut(&self.id).filter(|entry| entry.stream == self.stream) {
            entry.gateway.last_seen_time = Some(SystemTime::now().into());
            change(&mut entry.gateway);
        }
        drop(gateways);
        self.registry.changed();
    }

    /// It applied everything up to a revision.
    pub(crate) fn acknowledged(&self, revision: u64) {
        self.update(|gateway| {
            gateway.applied_revision = revision;
            gateway.errors.clear();
        });
    }

    /// It refused something; the revision stays where it was.
    pub(crate) fn refused(&self, errors: &[v1::ResourceError]) {
        let errors = errors
            .iter()
            .map(|e| v1::gateway::ResourceError { r#ref: e.resource.clone(), message: e.message.clone() });
        self.update(|gateway| gateway.errors = errors.collect());
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.update(|gateway| gateway.connected = false);
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
        let first = registry.connect(&hello("1"), 3);
        let second = registry.connect(&hello("2"), 4);
        assert!(first.replaced.is_cancelled() && !second.replaced.is_cancelled());
        first.acknowledged(9);
        drop(first);
        let applied = registry.applied(5);
        assert_eq!(
            (applied.gateways, applied.pending),
            ((0, 1), vec!["g".to_owned()]),
            "the old stream has no say any more"
        );
        second.acknowledged(5);
        assert_eq!(registry.applied(5).gateways, (1, 1));
        drop(second);
        assert!(!registry.list()[0].connected);
        tokio::time::advance(REMEMBERED).await;
        assert!(registry.list().is_empty());
    }

    #[test]
    fn limit_services_are_counted_apart_from_gateways_of_the_same_name() {
        let registry = Registry::default();
        let gateway = registry.connect(&hello("1"), 3);
        let role = v1::SubscriberRole::LimitService.into();
        let service = registry.connect(&v1::Hello { role, ..hello("2") }, 2);
        assert!(!gateway.replaced.is_cancelled());
        assert_eq!(registry.connected(), ["g"], "a limit service takes no share of a gateway");
        let applied = registry.applied(3);
        assert_eq!((applied.gateways, applied.limit_services), ((1, 1), (0, 1)));
        assert_eq!(applied.pending, ["g"], "a change is waited for on both");
        service.acknowledged(3);
        assert_eq!(registry.applied(3).limit_services, (1, 1));
        drop(gateway);
        assert_eq!(registry.applied(3).gateways, (0, 0));
    }
}
