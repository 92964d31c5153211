//! Writes copies of the configuration in the background, so that a disk that hangs does not delay the next change.
//!
//! A separate thread writes one copy at a time; only the newest waiting copy is kept. It is not a thread of tokio's
//! blocking pool, because a disk that hangs would block that pool and the shutdown, which waits for the pool.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::config_state::ConfigState;
use crate::disk::Disk;

/// How long the acknowledgement of a change waits for its copy, which normally takes milliseconds.
const SAVED_WITHIN: Duration = Duration::from_millis(250);

/// Writes to one [`Disk`].
#[derive(Debug)]
pub(crate) struct Saver {
    shared: Arc<Shared>,
    /// The number of the last copy that was handed over.
    asked: u64,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    next: Mutex<Next>,
    /// The number of the last copy that was written or failed.
    done: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Next {
    copy: Option<(u64, ConfigState)>,
    writing: bool,
}

impl Saver {
    pub(crate) fn new(disk: Disk) -> Self {
        let shared = Shared { disk, next: Mutex::default(), done: watch::Sender::new(0) };
        Self { shared: Arc::new(shared), asked: 0 }
    }

    /// Queues this copy instead of a waiting one.
    pub(crate) fn save(&mut self, held: &ConfigState) {
        self.asked += 1;
        let mut next = self.shared.next();
        next.copy = Some((self.asked, held.clone()));
        if next.writing {
            return;
        }
        let shared = Arc::clone(&self.shared);
        match std::thread::Builder::new().name("configuration".into()).spawn(move || shared.write()) {
            Ok(_) => next.writing = true,
            Err(error) => tracing::error!(%error, "thread for the configuration copy not started"),
        }
    }

    /// Waits at most 250 ms until the copy is written; a slower copy is written later.
    pub(crate) async fn saved(&self) {
        let mut done = self.shared.done.subscribe();
        let written = done.wait_for(|done| *done >= self.asked);
        if tokio::time::timeout(SAVED_WITHIN, written).await.is_err() {
            tracing::warn!(
                "configuration copy not written yet; a restart without the control plane would serve an older one"
            );
        }
    }
}

impl Shared {
    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The work of the thread: writes waiting copies until there is none.
    fn write(&self) {
        loop {
            let (number, held) = {
                let mut next = self.next();
                let Some(copy) = next.copy.take() else {
                    next.writing = false;
                    return;
                };
                copy
            };
            if let Err(error) = self.disk.save(&held) {
                tracing::error!(%error, "configuration copy not written; a restart without the control plane would serve an older one");
            }
            self.done.send_replace(number);
        }
    }
}
