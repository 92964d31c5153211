//! The state that all connections share, and the handle for the process that runs the server.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::config::Config;
use crate::faults::{Faults, HangAt, InvalidFaults};
use crate::metrics::Metrics;
use crate::oddities::StreamTail;

/// The maximum of remembered request ids; the oldest is forgotten first.
const REQUEST_IDS_MAX: usize = 65_536;
/// The longest remembered request id; a longer one is echoed but not remembered.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Shared by all connections of one server.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) metrics: Metrics,
    pub(crate) faults: watch::Sender<Arc<Faults>>,
    pub(crate) slots: Arc<Semaphore>,
    ready_at: Instant,
    request_ids: Mutex<RequestIds>,
}

impl Shared {
    /// Expects a validated configuration.
    pub(crate) fn new(config: Config) -> Self {
        Self {
            metrics: Metrics::new(&config),
            faults: watch::Sender::new(Arc::new(config.faults.clone())),
            slots: Arc::new(Semaphore::new(config.slots)),
            ready_at: Instant::now() + config.cold_start,
            request_ids: Mutex::default(),
            config,
        }
    }

    pub(crate) fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.faults.borrow())
    }

    pub(crate) fn is_loading(&self) -> bool {
        // The clock is only read during the cold start; most configurations have none.
        self.faults.borrow().loading || (!self.config.cold_start.is_zero() && Instant::now() < self.ready_at)
    }

    /// Resolves when the fault that made a request hang is switched off or changed. Cancel-safe.
    pub(crate) fn hang_released(&self, at: HangAt) -> impl Future<Output = ()> + Send + use<> {
        let mut faults = self.faults.subscribe();
        async move {
            let hangs = |faults: &Arc<Faults>| faults.hang.as_ref().is_some_and(|hang| hang.at == at);
            // An error means that the server is gone, which ends the hang as well.
            let _ = faults.wait_for(|faults| !hangs(faults)).await;
        }
    }

    /// Resolves when streams do not hang after their end any more.
    pub(crate) fn tail_released(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut faults = self.faults.subscribe();
        async move {
            let _ = faults.wait_for(|faults| faults.stream_tail != Some(StreamTail::Hang)).await;
        }
    }

    pub(crate) fn count_request_id(&self, id: &str) {
        self.metrics.with_request_id.fetch_add(1, Relaxed);
        if id.len() <= REQUEST_ID_BYTES_MAX {
            self.request_ids.lock().unwrap_or_else(PoisonError::into_inner).count(id);
        }
    }
}

/// How often each of the last ids arrived.
#[derive(Debug, Default)]
struct RequestIds {
    seen: HashMap<Arc<str>, u64>,
    order: VecDeque<Arc<str>>,
}

impl RequestIds {
    fn count(&mut self, id: &str) {
        if let Some(count) = self.seen.get_mut(id) {
            *count += 1;
            return;
        }
        if self.order.len() >= REQUEST_IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        let id: Arc<str> = id.into();
        self.order.push_back(Arc::clone(&id));
        self.seen.insert(id, 1);
    }
}

/// A handle of a running [`Server`](crate::Server); cheap to clone, valid after the server has ended.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
}

impl Handle {
    /// The faults switched on now.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.shared.faults().as_ref().clone()
    }

    /// Replaces all faults. Requests already started keep what was drawn for them, except that a hang ends when the
    /// new faults have no hang at the same place.
    ///
    /// # Errors
    /// A value outside its bound; nothing changes then.
    pub fn set_faults(&self, faults: Faults) -> Result<(), InvalidFaults> {
        faults.validate()?;
        self.shared.faults.send_replace(Arc::new(faults));
        Ok(())
    }

    /// Switches all faults off.
    pub fn clear_faults(&self) {
        self.shared.faults.send_replace(Arc::default());
    }

    /// Reads all counters, one after the other.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let metrics = &self.shared.metrics;
        Counters {
            requests: metrics.requests.load(Relaxed),
            with_request_id: metrics.with_request_id.load(Relaxed),
            in_flight: metrics.in_flight.load(Relaxed),
            max_in_flight: metrics.max_in_flight.load(Relaxed),
            waiting: metrics.waiting.load(Relaxed),
            rejected: metrics.rejected.load(Relaxed),
            completed: metrics.completed.load(Relaxed),
            cancelled: metrics.cancelled.load(Relaxed),
            cut: metrics.cut.load(Relaxed),
            connections: metrics.connections.load(Relaxed),
            prompt_tokens: metrics.prompt_tokens(),
            generation_tokens: metrics.generation_tokens(),
        }
    }

    /// How often a request with this `x-request-id` arrived, among the last 65 536 different ids of at most 128 bytes.
    #[must_use]
    pub fn request_id_count(&self, id: &str) -> u64 {
        let ids = self.shared.request_ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.seen.get(id).copied().unwrap_or(0)
    }
}

/// Counters since the server was bound; also the body of `GET /admin/stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Requests to the four generating endpoints, whatever became of them.
    pub requests: u64,
    /// Those of them that carried `x-request-id`.
    pub with_request_id: u64,
    /// Requests holding a slot now.
    pub in_flight: usize,
    /// Most requests that held a slot at the same time; never above `slots`.
    pub max_in_flight: usize,
    /// Requests waiting for a slot now.
    pub waiting: usize,
    /// Requests answered 429 because the queue was full.
    pub rejected: u64,
    /// Answers handed to the connection to their end.
    pub completed: u64,
    /// Requests whose client left (or whose connection broke) while they waited or before their answer ended.
    pub cancelled: u64,
    /// Answers ended early by a fault of this server.
    pub cut: u64,
    /// TCP connections accepted.
    pub connections: u64,
    /// Prompt tokens of requests that got a slot.
    pub prompt_tokens: u64,
    /// Tokens sent.
    pub generation_tokens: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembered_request_ids_are_bounded() {
        let mut ids = RequestIds::default();
        for n in 0..REQUEST_IDS_MAX + 10 {
            ids.count(&n.to_string());
        }
        ids.count("10");
        assert_eq!((ids.seen.len(), ids.order.len()), (REQUEST_IDS_MAX, REQUEST_IDS_MAX));
        assert_eq!((ids.seen.get("9"), ids.seen.get("10")), (None, Some(&2)));
    }
}
