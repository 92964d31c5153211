//! A connection that one task replaces when it breaks, so that callers do not.
//!
//! The task publishes the state of its connection, and callers read it. During the first attempt to connect, callers
//! wait. After a failed attempt they fail at once until one succeeds. Attempts back off, so a
//! server that is down gets a few per second, whatever the load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::eval::birth;
use super::options::ColdStart;
use super::silence::Silence;
use super::topology::{Shared, Source};
use crate::model::data_set::DataSet;
use crate::model::error::Error;

/// Consecutive timeouts after which a connection counts as dead.
const TIMEOUTS_MAX: u32 = 8;
/// The time without any answer that is needed as well. In a starved process hundreds of calls time out at once while
/// their answers lie unread in the socket; a new connection would lose these answers.
const SILENT_AFTER: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A connection that lasted this long was good, so the next failure starts without backoff.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// The interval of the checks of an idle connection: whether it works, and which data set it leads to. Shorter than
/// the grace time in which gateways count their leases again after a data loss (`layers/fallback/breaker.rs`).
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// An established connection.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) shared: Shared,
    /// The birth of its data set, which scripts receive, in microseconds; zero if missing buckets are empty.
    pub(crate) birth: u64,
    /// Counts connections, so that a late complaint does not end the next connection.
    pub(crate) generation: u64,
}

#[derive(Clone)]
enum State {
    Connecting,
    Ready(Link),
    Down(Error),
}

/// A connection and the task that maintains it. Dropping it stops the task.
pub(crate) struct Connection {
    state: watch::Receiver<State>,
    complaints: mpsc::Sender<u64>,
    timeouts: AtomicU32,
    /// When the first of these timeouts was, in milliseconds after `born`.
    silent_since: AtomicU64,
    born: Instant,
    keeper: JoinHandle<()>,
}

impl Connection {
    pub(super) fn start(
        source: Source,
        cold_start: ColdStart,
        data_set: Arc<DataSet>,
        silence: Arc<Silence>,
    ) -> Self {
        let (publish, state) = watch::channel(State::Connecting);
        let (complaints, complained) = mpsc::channel(4);
        let connector = Connector { source, cold_start, data_set, silence };
        let keeper = tokio::spawn(keep(connector, publish, complained));
        Self {
            state,
            complaints,
            timeouts: AtomicU32::new(0),
            silent_since: AtomicU64::new(0),
            born: Instant::now(),
            keeper,
        }
    }

    /// Returns the connection when there is one. Cancel-safe.
    pub(crate) async fn connected(&self) -> Result<Link, Error> {
        let fast = self.state.borrow().answer();
        if let Some(answer) = fast {
            return answer;
        }
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| !matches!(state, State::Connecting)).await;
        let answer = settled.ok().and_then(|state| state.answer());
        answer.unwrap_or_else(|| Err(Error::Unreachable("limiter is shut down".into())))
    }

    pub(crate) fn is_down(&self) -> bool {
        matches!(&*self.state.borrow(), State::Down(_))
    }

    /// Reports that the connection of this generation is broken.
    pub(crate) fn broken(&self, generation: u64) {
        // If the queue is full, it holds a complaint already.
        let _ = self.complaints.try_send(generation);
    }

    pub(crate) fn answered(&self) {
        if self.timeouts.load(Ordering::Relaxed) != 0 {
            self.timeouts.store(0, Ordering::Relaxed);
        }
    }

    /// Records a call without an answer. `alone`: other connections to the same server are answered meanwhile.
    pub(crate) fn timed_out(&self, alone: bool) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        let before = self.timeouts.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            self.silent_since.store(now, Ordering::Relaxed);
        }
        let silent = now.saturating_sub(self.silent_since.load(Ordering::Relaxed));
        if !alone && (before + 1 < TIMEOUTS_MAX || u128::from(silent) < SILENT_AFTER.as_millis()) {
            return;
        }
        self.timeouts.store(0, Ordering::Relaxed);
        if let State::Ready(link) = &*self.state.borrow() {
            self.broken(link.generation);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl State {
    fn answer(&self) -> Option<Result<Link, Error>> {
        match self {
            State::Connecting => None,
            State::Ready(link) => Some(Ok(link.clone())),
            State::Down(error) => Some(Err(error.clone())),
        }
    }
}

/// Runs until the connection is dropped.
async fn keep(connector: Connector, publish: watch::Sender<State>, mut complained: mpsc::Receiver<u64>) {
    let mut backoff = Duration::ZERO;
    for generation in 0.. {
        let since = Instant::now();
        match connector.connect(generation).await {
            Ok(link) => {
                publish.send_replace(State::Ready(link.clone()));
                connector.watch(link, &publish, &mut complained).await;
                tracing::warn!("connection to the limit store lost");
                if since.elapsed() > SETTLED_AFTER {
                    backoff = Duration::ZERO;
                }
                if backoff.is_zero() {
                    publish.send_replace(State::Connecting);
                } else {
                    publish.send_replace(State::Down(Error::Unreachable("connection lost".into())));
                }
            }
            Err(error) => {
                if !matches!(&*publish.borrow(), State::Down(_)) {
                    tracing::warn!(%error, "cannot connect to the limit store");
                }
                publish.send_replace(State::Down(error));
                backoff = backoff.max(BACKOFF_MIN);
            }
        }
        tokio::time::sleep(jittered(backoff, generation)).await;
        backoff = (backoff * 2).clamp(BACKOFF_MIN, BACKOFF_MAX);
    }
}

/// Connects, as often as needed.
struct Connector {
    source: Source,
    cold_start: ColdStart,
    data_set: Arc<DataSet>,
    silence: Arc<Silence>,
}

impl Connector {
    async fn connect(&self, generation: u64) -> Result<Link, Error> {
        let mut shared = self.source.connect().await?;
        let birth = match birth(&mut shared).await {
            Ok(birth) => birth,
            // The server says the same to every call that asks for a decision; in a Cluster, the other shards may
            // answer.
            Err(error) if self.cold_start == ColdStart::Burst && self.is_usable(&error) => 0,
            Err(error) => return Err(error),
        };
        // Callers must know of lost leases before they can use the connection.
        self.data_set.found(birth);
        self.silence.heard();
        Ok(Link { shared, birth: self.birth_for_scripts(birth), generation })
    }

    /// Whether a connection may be usable in spite of this error.
    fn is_usable(&self, error: &Error) -> bool {
        self.source.is_cluster() || !matches!(error, Error::Unreachable(_) | Error::Lost)
    }

    fn birth_for_scripts(&self, birth: u64) -> u64 {
        if self.cold_start == ColdStart::Strict { birth } else { 0 }
    }

    /// Returns when the connection is broken or no longer needed.
    async fn watch(
        &self,
        mut link: Link,
        publish: &watch::Sender<State>,
        complained: &mut mpsc::Receiver<u64>,
    ) {
        loop {
            let mut connection = link.shared.clone();
            let look = async {
                tokio::time::sleep(LOOK_EVERY).await;
                birth(&mut connection).await
            };
            tokio::select! {
                complaint = complained.recv() => match complaint {
                    Some(about) if about != link.generation => {}
                    _ => return,
                },
                looked = look => match looked {
                    Ok(birth) => {
                        self.data_set.found(birth);
                        let birth = self.birth_for_scripts(birth);
                        if birth != link.birth {
                            link.birth = birth;
                            publish.send_replace(State::Ready(link.clone()));
                        }
                    }
                    // If the server is slow or refuses to serve, the calls themselves report it.
                    Err(error) if self.is_usable(&error) => {}
                    Err(_) => return,
                },
            }
        }
    }
}

/// A random part of the backoff, from three quarters to all of it, so that gateways do not reconnect at the same
/// time.
fn jittered(backoff: Duration, generation: u64) -> Duration {
    let seed = uuid::Uuid::new_v4().as_u128() as u64 ^ generation;
    backoff.mul_f64(0.75 + (seed % 256) as f64 / 1024.0)
}
