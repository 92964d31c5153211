//! The right of one request to try a backend that was ejected.

use std::sync::Arc;

use weir_proto::resource::Name;

use super::pool_state::PoolState;

/// The probe of a backend on probation. Dropped, it goes to the next request: the one that had it was refused, went
/// elsewhere, or its client left.
#[derive(Debug)]
pub struct Probation {
    pool: Arc<PoolState>,
    backend: Name,
    index: usize,
    /// `None` once the backend has shown what it is worth.
    number: Option<u64>,
}

impl Probation {
    /// The probe of this number, of the backend at `index` of a model.
    pub const fn new(pool: Arc<PoolState>, backend: Name, index: usize, number: u64) -> Self {
        Self { pool, backend, index, number: Some(number) }
    }

    /// Which of the model's backends it is for.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// The backend answers: what comes of it is told when the answer ends.
    pub fn answered(mut self) {
        self.number = None;
    }
}

impl Drop for Probation {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.pool.abandon_probe(&self.backend, number);
        }
    }
}
