//! Whether a store still is what it was.
//!
//! A store that was restarted empty or flushed answers like any other, but has forgotten every lease: whoever holds one
//! must count it again before anybody is let in beside it. Stores that can tell keep the time of their data set's birth.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

/// Tells when another data set is found than before.
#[derive(Debug)]
pub struct DataSet {
    /// The birth of the last one found; zero before the first.
    birth: AtomicU64,
    lost: watch::Sender<u64>,
}

/// How many data sets were lost so far.
pub type DataSetsLost = watch::Receiver<u64>;

impl Default for DataSet {
    fn default() -> Self {
        Self { birth: AtomicU64::new(0), lost: watch::Sender::new(0) }
    }
}

impl DataSet {
    /// The store was found with the data set of this birth; zero when that is not known.
    pub fn found(&self, birth: u64) {
        if birth == 0 {
            return;
        }
        let before = self.birth.swap(birth, Ordering::Relaxed);
        if before != 0 && before != birth {
            self.lost.send_modify(|lost| *lost += 1);
        }
    }

    /// Tells of losses.
    pub fn lost(&self) -> DataSetsLost {
        self.lost.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_data_set_than_before_is_a_loss() {
        let data_set = DataSet::default();
        let lost = data_set.lost();
        for (birth, losses) in [(0, 0), (7, 0), (7, 0), (0, 0), (9, 1), (9, 1), (7, 2)] {
            data_set.found(birth);
            assert_eq!(*lost.borrow(), losses, "after {birth}");
        }
    }
}
