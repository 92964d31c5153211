//! A simulated engine: slots, a shared speed, a queue beyond the slots, a cache of prefixes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

/// Slots of each engine.
pub(super) const SLOTS: usize = 32;
/// This number of concurrent requests halves the speed of each, because batching has a cost.
const HALF_SPEED_AT: f64 = 16.0;
/// Prefixes an engine remembers.
const CACHED_PREFIXES: usize = 40;

/// A time or an amount of work in reverse order, so that a heap returns the smallest first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Soonest(pub(super) f64);

impl Eq for Soonest {}

impl Ord for Soonest {
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.total_cmp(&self.0)
    }
}

impl PartialOrd for Soonest {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The speed of one of this number of requests at an engine of speed 1.
pub(super) fn share(requests: usize) -> f64 {
    1.0 / (1.0 + requests as f64 / HALF_SPEED_AT)
}

/// Work per second of an engine of speed 1 with every slot taken.
pub(super) fn full_rate() -> f64 {
    SLOTS as f64 * share(SLOTS)
}

/// One engine.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) speed: f64,
    /// Running requests, by the [`Self::done`] at which they end.
    active: BinaryHeap<(Soonest, usize)>,
    /// Requests without a slot.
    pub(super) queue: VecDeque<usize>,
    /// The work done for each request that has been running all the time.
    done: f64,
    at: f64,
    /// The latest prefixes, newest first.
    cache: VecDeque<u64>,
    /// Changes whenever the time of the next end changes.
    pub(super) version: u64,
}

impl Engine {
    pub(super) fn new(speed: f64) -> Self {
        Self {
            speed,
            active: BinaryHeap::new(),
            queue: VecDeque::new(),
            done: 0.0,
            at: 0.0,
            cache: VecDeque::new(),
            version: 0,
        }
    }

    /// The number of running requests.
    pub(super) fn busy(&self) -> usize {
        self.active.len()
    }

    /// The number of requests at the engine.
    pub(super) fn present(&self) -> usize {
        self.active.len() + self.queue.len()
    }

    fn rate(&self) -> f64 {
        self.speed * share(self.active.len())
    }

    fn advance(&mut self, now: f64) {
        self.done += (now - self.at) * self.rate();
        self.at = now;
        self.version += 1;
    }

    /// Begins to work on a request.
    pub(super) fn start(&mut self, request: usize, work: f64, now: f64) {
        self.advance(now);
        self.active.push((Soonest(self.done + work), request));
    }

    /// When the next request ends if nothing changes.
    pub(super) fn next_end(&self) -> Option<f64> {
        let (Soonest(end), _) = self.active.peek()?;
        Some(self.at + (end - self.done).max(0.0) / self.rate())
    }

    /// Ends the request that is due.
    pub(super) fn finish(&mut self, now: f64) -> Option<usize> {
        self.advance(now);
        self.active.pop().map(|(_, request)| request)
    }

    /// Whether the prefix is in the cache. It is from now on.
    pub(super) fn recall(&mut self, prefix: u64) -> bool {
        let known = self.cache.iter().position(|p| *p == prefix);
        if let Some(at) = known {
            self.cache.remove(at);
        }
        self.cache.push_front(prefix);
        self.cache.truncate(CACHED_PREFIXES);
        known.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_share_the_speed() {
        let mut engine = Engine::new(2.0);
        engine.start(7, 1.0, 0.0);
        assert!((engine.next_end().unwrap() - 17.0 / 32.0).abs() < 1e-9);
        engine.start(8, 1.0, 0.0);
        assert!((engine.next_end().unwrap() - 18.0 / 32.0).abs() < 1e-9);
        let mut ended = [(); 2].map(|()| engine.finish(18.0 / 32.0).unwrap());
        ended.sort_unstable();
        assert_eq!((ended, engine.busy()), ([7, 8], 0));
        assert_eq!(engine.next_end(), None);
    }

    #[test]
    fn the_cache_forgets_what_was_not_used_for_longest() {
        let mut engine = Engine::new(1.0);
        assert!(!engine.recall(0));
        for prefix in 1..CACHED_PREFIXES as u64 {
            engine.recall(prefix);
        }
        assert!(engine.recall(0));
        engine.recall(1000);
        assert!(!engine.recall(1), "the oldest");
    }
}
