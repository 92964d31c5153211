//! Writes copies of the configuration beside it: a disk that hangs must not keep the next change waiting.
//!
//! A thread of its own writes, one copy at a time; of those that wait only the newest is kept. It is not one of tokio's,
//! which a hanging disk would use up, and which the process waits for when it ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::config_state::{ConfigState, Disk};

/// How long the answer to a change waits for its copy; on a disk that is well it takes milliseconds.
const SAVED_WITHIN: Duration = Duration::from_millis(250);

/// Writes to one [`Disk`].
#[derive(Debug)]
pub(crate) struct Saver {
    shared: Arc<Shared>,
    /// The copy that was handed over last.
    asked: u64,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    next: Mutex<Next>,
    /// The copy that was written last, or could not be.
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

    /// Has this written, instead of what waits to be.
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
            Err(error) => tracing::error!(%error, "no thread to write the configuration's copy"),
        }
    }

    /// Waits a moment until all is written; what takes longer is written later.
    pub(crate) async fn saved(&self) {
        let mut done = self.shared.done.subscribe();
        let written = done.wait_for(|done| *done >= self.asked);
        if tokio::time::timeout(SAVED_WITHIN, written).await.is_err() {
            tracing::warn!(
                "the configuration's copy is not written yet: a restart without the control plane would serve an older one"
            );
        }
    }
}

impl Shared {
    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the thread does: writes what waits, and ends.
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
                tracing::error!(%error, "the configuration could not be kept on disk: a restart without the control plane would serve an older one");
            }
            self.done.send_replace(number);
        }
    }
}
