//! What a model keeps for the choice among its backends. It is part of the compiled model: with another configuration it
//! starts anew.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use weir_proto::resource::AdminState;
use weir_ratelimit::waiting::Places;

use super::backend::ModelBackend;
use super::balance::Views;

/// What is kept for the choice among a model's backends.
#[derive(Debug, Default)]
pub struct Roster {
    active: OnceLock<Vec<usize>>,
    places: OnceLock<Arc<Places>>,
    views: Mutex<Views>,
}

impl Roster {
    /// The indices of the backends that the operator left active.
    pub fn active(&self, backends: &[ModelBackend]) -> &[usize] {
        self.active.get_or_init(|| {
            let active = |index: &usize| backends[*index].entry.spec.admin_state == AdminState::Active;
            (0..backends.len()).filter(active).collect()
        })
    }

    /// The lease sets of these backends and their slots, for who waits for one of them.
    pub fn places(&self, backends: &[ModelBackend]) -> Arc<Places> {
        let places = self.places.get_or_init(|| {
            let entries = self.active(backends).iter().map(|index| &backends[*index].entry);
            Arc::new(entries.map(|entry| (entry.slots.clone(), entry.spec.max_concurrency)).collect())
        });
        places.clone()
    }

    /// The views of these backends, in this order. Locked under the pool's lock only.
    pub(super) fn views(&self) -> MutexGuard<'_, Views> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
