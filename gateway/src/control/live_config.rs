//! The live handles: the snapshot in force and how the gateway stands with its control plane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;
use tokio::time::Instant;
use weir_runtime::EgressPolicy;

use crate::routing::snapshot::Snapshot;
use crate::routing::upstream::Resolver;

/// Shared by every task of a gateway. Reads never block.
#[derive(Debug)]
pub struct LiveConfig {
    snapshot: ArcSwap<Snapshot>,
    revision: watch::Sender<u64>,
    published: ArcSwap<Instant>,
    connected: AtomicBool,
    problem: ArcSwapOption<String>,
    live_gateways: AtomicU32,
    config_refused: AtomicUsize,
}

impl Default for LiveConfig {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            revision: watch::Sender::new(0),
            published: ArcSwap::from_pointee(Instant::now()),
            connected: AtomicBool::new(false),
            problem: ArcSwapOption::empty(),
            live_gateways: AtomicU32::new(1),
            config_refused: AtomicUsize::new(0),
        }
    }
}

impl LiveConfig {
    /// Without a configuration yet; backends may be where the policy allows, and their hosts are looked up by `resolver`.
    pub fn new(egress: EgressPolicy, resolver: Resolver) -> Self {
        let first = Snapshot::without_resources(egress, resolver);
        Self { snapshot: ArcSwap::from_pointee(first), ..Self::default() }
    }

    /// The picture in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Puts a picture in force.
    pub fn publish(&self, snapshot: Snapshot) {
        let revision = snapshot.revision;
        self.snapshot.store(Arc::new(snapshot));
        self.published.store(Arc::new(Instant::now()));
        self.revision.send_replace(revision);
    }

    /// For how long the picture has been in force.
    pub fn published_for(&self) -> Duration {
        self.published.load().elapsed()
    }

    /// The revision in force, to wait for.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Whether a configuration is in force: without one every request would be refused.
    pub fn is_configured(&self) -> bool {
        !self.snapshot.load().epoch.is_empty()
    }

    /// Returns once a configuration is in force.
    pub async fn configured(&self) {
        // The sender is our own, so the wait cannot fail.
        let _ = self.revisions().wait_for(|_| self.is_configured()).await;
    }

    /// Whether a control plane is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Sets whether a control plane is connected.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// Why no control plane is followed, with a remedy.
    pub fn problem(&self) -> Option<Arc<String>> {
        self.problem.load_full()
    }

    /// Sets why no control plane is followed.
    pub fn set_problem(&self, problem: Option<String>) {
        self.problem.store(problem.map(Arc::new));
    }

    /// How many resources of the last delta this gateway refuses; a delta refused whole counts as one.
    pub fn config_refused(&self) -> usize {
        self.config_refused.load(Ordering::Relaxed)
    }

    /// Sets the number of refused resources.
    pub fn set_config_refused(&self, count: usize) {
        self.config_refused.store(count, Ordering::Relaxed);
    }

    /// How many gateways there are, this one included.
    pub fn live_gateways(&self) -> u32 {
        self.live_gateways.load(Ordering::Relaxed)
    }

    /// Sets the number of connected gateways.
    pub fn set_live_gateways(&self, count: u32) {
        self.live_gateways.store(count.max(1), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_first_configuration_is_waited_for_and_later_ones_are_there_at_once() {
        let live = LiveConfig::default();
        let publish = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            let mut snapshot = Snapshot::default();
            (snapshot.epoch, snapshot.revision) = ("e".into(), 7);
            live.publish(snapshot);
        };
        let ((), ()) = tokio::join!(live.configured(), publish);
        assert_eq!(live.snapshot().revision, 7);
        live.configured().await;
    }
}
