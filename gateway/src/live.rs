//! The live handles: the snapshot in force and how the gateway stands with its control plane.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::snapshot::Snapshot;

/// Shared by every task of a gateway. Reads never block.
#[derive(Debug)]
pub struct Live {
    snapshot: ArcSwap<Snapshot>,
    revision: watch::Sender<u64>,
    connected: AtomicBool,
    live_gateways: AtomicU32,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(Snapshot::default()),
            revision: watch::Sender::new(0),
            connected: AtomicBool::new(false),
            live_gateways: AtomicU32::new(1),
        }
    }
}

impl Live {
    /// The picture in force.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Puts a picture in force.
    pub fn publish(&self, snapshot: Snapshot) {
        let revision = snapshot.revision;
        self.snapshot.store(Arc::new(snapshot));
        self.revision.send_replace(revision);
    }

    /// The revision in force, to wait for.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// Whether a configuration is in force: without one every request would be refused.
    pub fn is_configured(&self) -> bool {
        !self.snapshot.load().epoch.is_empty()
    }

    /// Whether the control plane is heard.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }

    /// Says whether the control plane is heard.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
    }

    /// How many gateways there are, this one included.
    pub fn live_gateways(&self) -> u32 {
        self.live_gateways.load(Ordering::Relaxed)
    }

    /// Says how many there are.
    pub fn set_live_gateways(&self, count: u32) {
        self.live_gateways.store(count.max(1), Ordering::Relaxed);
    }
}
