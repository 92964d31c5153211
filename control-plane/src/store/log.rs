//! The recent transactions, in memory for watchers. Each watcher has its own cursor, so a slow watcher delays no other. A
//! watcher that is too far behind reads the store again.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::{Batch, Error};

/// Transactions kept. A watcher that is further behind reads everything again, which is cheaper than that many
/// steps.
const KEPT: usize = 4096;

#[derive(Debug)]
struct Kept {
    /// The revision before the oldest batch.
    base: u64,
    batches: VecDeque<Arc<Batch>>,
    /// Rises when all batches are removed. A separate count, because revisions may go back.
    generation: u64,
}

#[derive(Debug, Clone)]
pub(super) struct Log {
    kept: Arc<Mutex<Kept>>,
    newest: watch::Sender<u64>,
}

impl Log {
    pub(super) fn new(revision: u64) -> Self {
        let kept = Kept { base: revision, batches: VecDeque::new(), generation: 0 };
        Self { kept: Arc::new(Mutex::new(kept)), newest: watch::Sender::new(revision) }
    }

    /// Adds the next batch. The caller sees to it that revisions come in order.
    pub(super) fn push(&self, batch: Batch) {
        let revision = batch.revision;
        let mut kept = lock(&self.kept);
        kept.batches.push_back(Arc::new(batch));
        if kept.batches.len() > KEPT
            && let Some(dropped) = kept.batches.pop_front()
        {
            kept.base = dropped.revision;
        }
        drop(kept);
        self.newest.send_replace(revision);
    }

    /// Removes all batches, so that watchers read the store again.
    pub(super) fn reset(&self, revision: u64) {
        let mut kept = lock(&self.kept);
        kept.batches.clear();
        kept.base = revision;
        kept.generation += 1;
        drop(kept);
        self.newest.send_replace(revision);
    }

    pub(super) fn watch(&self, from: u64) -> Result<Watch, Error> {
        let newest = self.newest.subscribe();
        let kept = lock(&self.kept);
        let (base, generation) = (kept.base, kept.generation);
        drop(kept);
        // It may be ahead: what was read from the store is newer than what has come in here.
        if from < base {
            return Err(Error::Compacted { from, oldest: base });
        }
        Ok(Watch { cursor: from, generation, newest, log: Arc::clone(&self.kept) })
    }
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Follows a store from a revision on.
#[derive(Debug)]
pub struct Watch {
    cursor: u64,
    generation: u64,
    newest: watch::Receiver<u64>,
    log: Arc<Mutex<Kept>>,
}

impl Watch {
    /// The next transaction; waits for it. Cancel-safe. [`Error::Compacted`] when it fell too far behind.
    pub async fn next(&mut self) -> Result<Arc<Batch>, Error> {
        loop {
            self.newest.borrow_and_update();
            {
                let kept = lock(&self.log);
                if self.cursor < kept.base || self.generation != kept.generation {
                    return Err(Error::Compacted { from: self.cursor, oldest: kept.base });
                }
                // Revisions are consecutive, so the position follows from the number.
                let index = usize::try_from(self.cursor - kept.base).unwrap_or(usize::MAX);
                if let Some(batch) = kept.batches.get(index) {
                    self.cursor = batch.revision;
                    return Ok(Arc::clone(batch));
                }
            }
            if self.newest.changed().await.is_err() {
                return Err(Error::Failed("the store is closed".into()));
            }
        }
    }
}
