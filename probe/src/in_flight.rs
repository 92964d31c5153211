//! Probes in progress.

use std::collections::HashMap;
use std::future;

use tokio::task::{self, JoinSet};

/// Probes in progress, each in a task, by key. Dropping this cancels all of them.
#[derive(Debug)]
pub struct InFlight<K, T> {
    tasks: JoinSet<T>,
    keys: HashMap<task::Id, K>,
}

impl<K, T> Default for InFlight<K, T> {
    fn default() -> Self {
        Self { tasks: JoinSet::new(), keys: HashMap::new() }
    }
}

impl<K, T: Send + 'static> InFlight<K, T> {
    /// The number of probes in progress.
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether no probe is in progress.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Starts a probe of `key`.
    pub fn spawn(&mut self, key: K, probe: impl Future<Output = T> + Send + 'static) {
        let id = self.tasks.spawn(probe).id();
        self.keys.insert(id, key);
    }

    /// The next probe that ends, with its key; `None` instead of a result if it panicked. Waits without a probe in progress.
    /// Cancel-safe.
    pub async fn next(&mut self) -> (K, Option<T>) {
        let Some(ended) = self.tasks.join_next_with_id().await else { return future::pending().await };
        let (id, result) = match ended {
            Ok((id, result)) => (id, Some(result)),
            Err(error) => (error.id(), None),
        };
        (self.keys.remove(&id).expect("spawn keeps a key for each task"), result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_probe_that_panics_is_still_known_by_its_key() {
        let mut probes: InFlight<&str, u32> = InFlight::default();
        probes.spawn("bad", async { panic!("a bug") });
        assert_eq!(probes.next().await, ("bad", None));
        probes.spawn("good", async { 7 });
        assert_eq!(probes.next().await, ("good", Some(7)));
        assert!(probes.is_empty() && probes.keys.is_empty());
    }
}
