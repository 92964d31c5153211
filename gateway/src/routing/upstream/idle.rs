//! Connections that wait for their next request.
//!
//! A server may close an idle connection at any moment. One that is closed is found out when it is taken, and, so that it does
//! not hold a descriptor until then, by a look at all of them each second.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The idle connections of one backend.
#[derive(Debug)]
pub(super) struct Idle {
    kept: Mutex<Kept>,
    /// The most that are kept.
    max: usize,
    /// What is idle for longer is closed.
    timeout: Duration,
}

#[derive(Debug, Default)]
struct Kept {
    /// The one that waits longest is in front.
    waiting: VecDeque<(Instant, Box<Connection>)>,
    /// Somebody looks at them.
    looked_at: bool,
}

impl Idle {
    pub(super) fn new(max: u32, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { kept: Mutex::default(), max: max as usize, timeout })
    }

    /// The one that was used last, so that the others can be closed when there is less to do.
    pub(super) fn take(&self) -> Option<Box<Connection>> {
        loop {
            let (since, mut connection) = self.kept().waiting.pop_back()?;
            if since.elapsed() < self.timeout && connection.is_free() {
                return Some(connection);
            }
        }
    }

    /// Keeps a connection whose answer has been read, unless it has ended or there are enough.
    pub(super) fn put(self: &Arc<Self>, mut connection: Box<Connection>) {
        if self.max == 0 || !connection.is_free() {
            return;
        }
        let mut kept = self.kept();
        let too_many = if kept.waiting.len() < self.max { None } else { kept.waiting.pop_front() };
        kept.waiting.push_back((Instant::now(), connection));
        let is_first = !std::mem::replace(&mut kept.looked_at, true);
        drop(kept);
        drop(too_many);
        if is_first {
            tokio::spawn(look(Arc::downgrade(self)));
        }
    }

    /// Closes what has waited for too long, and what has been closed by the server. Returns whether any is left.
    fn tidy(&self) -> bool {
        let mut closed = Vec::new();
        let mut kept = self.kept();
        for _ in 0..kept.waiting.len() {
            let Some((since, mut connection)) = kept.waiting.pop_front() else { break };
            match since.elapsed() < self.timeout && connection.is_free() {
                true => kept.waiting.push_back((since, connection)),
                false => closed.push(connection),
            }
        }
        kept.looked_at = !kept.waiting.is_empty();
        kept.looked_at
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn look(at: Weak<Idle>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        match at.upgrade() {
            Some(idle) if idle.tidy() => {}
            _ => return,
        }
    }
}
