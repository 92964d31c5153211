//! Clocks of connections and requests: milliseconds in atomics, so that a sweep reads them without a lock.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Context;
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::time::Instant;

/// No time at all.
pub(super) const NEVER: u64 = u64::MAX;

static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since the process began to count.
pub(super) fn now_ms() -> u64 {
    millis(Instant::now().saturating_duration_since(*EPOCH))
}

fn ms_of(at: Instant) -> u64 {
    millis(at.saturating_duration_since(*EPOCH))
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(NEVER)
}

/// The clock of one request, which runs whether or not anybody polls its body: a client that takes nothing of an HTTP/2
/// stream keeps hyper from polling.
#[derive(Debug)]
pub struct RequestClock {
    /// When the request is cut.
    cut_at: AtomicU64,
    cut: AtomicBool,
    /// Set at the end of a drain: the body may still say a last word.
    ending: AtomicBool,
    /// Who drives the request.
    driver: AtomicWaker,
    /// Who produces its answer.
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
    /// Cuts the request at this time, unless it is moved before: everything the request holds is dropped.
    pub fn cut_at(&self, at: Instant) {
        // Relaxed: the sweep needs no other write to be visible with it.
        self.cut_at.store(ms_of(at), Ordering::Relaxed);
    }

    /// No time limit any more.
    pub fn stop(&self) {
        self.cut_at.store(NEVER, Ordering::Relaxed);
    }

    /// Whether the process ends and the answer must end now, with a last word. Wakes the caller when that becomes so.
    pub fn poll_ending(&self, cx: &Context<'_>) -> bool {
        self.producer.register(cx.waker());
        self.ending.load(Ordering::Acquire)
    }

    pub(super) fn was_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

    /// Whether it was cut. Wakes the caller when that becomes so.
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
