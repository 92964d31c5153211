//! The outage layer and its background task.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::breaker::Phase;
use super::inner::{Inner, LiveGateways, lock};
use super::recovery;
use crate::model::limiter::Limiter;

/// A limiter that also decides during a store outage. Dropping it stops its background task.
pub struct Fallback<L> {
    pub(super) inner: Arc<Inner<L>>,
    worker: JoinHandle<()>,
}

/// The status of a [`Fallback`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Whether requests ask the store.
    pub phase: Phase,
    /// Times the breaker opened.
    pub opened: u64,
    /// Decisions made locally.
    pub local_decisions: u64,
    /// Settlements, releases and usage records that wait for the store.
    pub pending: usize,
    /// Settlements and releases that are lost: the queue had no room, or the store refused them permanently.
    pub lost: u64,
}

impl<L: Limiter + 'static> Fallback<L> {
    /// Starts the background task; needs a tokio runtime.
    pub fn new(store: L, gateways: LiveGateways) -> Self {
        let inner = Arc::new(Inner::new(store, gateways));
        let worker = tokio::spawn(recovery::run(inner.clone()));
        Self { inner, worker }
    }

    /// The limiter inside this layer.
    pub fn store(&self) -> &L {
        &self.inner.store
    }

    /// The number of gateways that share the limits, this one included.
    pub fn gateways(&self) -> u32 {
        self.inner.gateways()
    }

    /// The status.
    pub fn status(&self) -> Status {
        Status {
            phase: lock(&self.inner.breaker).phase(),
            opened: self.inner.opened.load(Ordering::Relaxed),
            local_decisions: self.inner.local_decisions.load(Ordering::Relaxed),
            pending: lock(&self.inner.local).waiting(),
            lost: self.inner.lost.load(Ordering::Relaxed),
        }
    }

    /// Reports local decisions to the store before the process ends, for at most `limit`. Returns how many were not reported.
    pub async fn flush(&self, most: Duration) -> usize {
        if self.inner.engaged.load(Ordering::Relaxed) {
            let reported = tokio::time::timeout(most, recovery::report(&self.inner)).await;
            if !matches!(reported, Ok(Ok(()))) {
                tracing::warn!("local decisions not reported to the limit store completely");
            }
        }
        lock(&self.inner.local).waiting()
    }
}

impl<L> Drop for Fallback<L> {
    fn drop(&mut self) {
        self.worker.abort();
    }
}

impl<L> fmt::Debug for Fallback<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fallback").field("phase", &lock(&self.inner.breaker).phase()).finish_non_exhaustive()
    }
}
