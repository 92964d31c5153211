//! Clocks of connections and requests: milliseconds in atomics, so that a sweep reads them without a lock.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Context;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

/// A time that never comes.
pub(super) const NEVER: u64 = u64::MAX;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since the first use.
pub(super) fn now_ms() -> u64 {
    millis(Instant::now().saturating_duration_since(*EPOCH))
}

fn ms_of(at: Instant) -> u64 {
    millis(at.saturating_duration_since(*EPOCH))
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(NEVER)
}

/// The clock of one request. It runs whether or not the body is polled: a client that takes nothing of an HTTP/2
/// stream keeps hyper from polling.
#[derive(Debug)]
pub struct RequestClock {
    /// The time at which the request is cut.
    cut_at: AtomicU64,
    cut: AtomicBool,
    /// Set at the end of a drain: the body may still write its last event.
    ending: AtomicBool,
    /// The task that drives the request.
    driver: AtomicWaker,
    /// The task that produces the answer.
    producer: AtomicWaker,
}

impl Default for RequestClock {
    fn default() -> Self {
        Self {
            cut_at: AtomicU64::new(NEVER),
            cut: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            driver: AtomicWaker::new(),
            producer: AtomicWaker::new(),
        }
    }
}

impl RequestClock {
    /// Cuts the request at this time unless the time is changed before. Everything that the request holds is dropped.
    pub fn cut_at(&self, at: Instant) {
        // Relaxed: the sweep does not need to see other writes with this one.
        self.cut_at.store(ms_of(at), Ordering::Relaxed);
    }

    /// Removes the time limit.
    pub fn stop(&self) {
        self.cut_at.store(NEVER, Ordering::Relaxed);
    }

    /// Whether the process ends and the answer must end now, with its last event. Wakes the caller when that changes.
    pub fn poll_ending(&self, cx: &Context<'_>) -> bool {
        self.producer.register(cx.waker());
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Whether the request was cut. Wakes the caller when that changes.
    pub(super) fn poll_cut(&self, cx: &Context<'_>) -> bool {
        self.driver.register(cx.waker());
        self.cut.load(Ordering::Acquire)
    }

    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.driver.wake();
    }

    pub(super) fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.producer.wake();
    }

    /// Cuts the request if its time is over. Returns whether it did.
    pub(super) fn sweep(&self, now: u64) -> bool {
        let due = self.cut_at.load(Ordering::Relaxed) <= now;
        if due && !self.cut.load(Ordering::Relaxed) {
            self.cut();
            return true;
        }
        false
    }
}
