//! A connection that is replaced when it breaks, by one task and not by every caller.
//!
//! The task publishes the state of its connection; callers read it. While the first attempt of a connection is under
//! way callers wait (up to their deadline); once an attempt has failed they fail at once until the next one
//! succeeds. Attempts back off, so a server that is down sees a few per second, whatever the load.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::eval::birth;
use super::options::ColdStart;
use super::topology::{Shared, Source};
use crate::model::data_set::DataSet;
use crate::model::error::Error;

/// Calls in a row without an answer after which a connection is taken for dead.
const TIMEOUTS_MAX: u32 = 8;
/// And for how long there must have been none: in a starved process hundreds of calls time out at once while their
/// answers lie unread in the socket, and a new connection would lose those.
const SILENT_AFTER: Duration = Duration::from_secs(3);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A connection that lasted this long counts as good: the next failure starts with no backoff.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// How often a connection is looked at that nobody may use just now: whether it lives, and to which data set. Shorter
/// than the grace in which gateways count their leases again after a loss; see `layers/fallback/breaker.rs`.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// An established connection.
#[derive(Clone)]
pub(crate) struct Link {
    pub(crate) shared: Shared,
    /// The birth of its data set for the scripts, microseconds; zero when missing bucket states are empty.
    pub(crate) birth: u64,
    /// Which of the connections in turn it is, so that a late complaint does not hit its successor.
    pub(crate) generation: u64,
}

#[derive(Clone)]
enum State {
    Connecting,
    Ready(Link),
    Down(Error),
}

/// A connection and the task that keeps it. Dropping it stops the task.
pub(crate) struct Connection {
    state: watch::Receiver<State>,
    complaints: mpsc::Sender<u64>,
    timeouts: AtomicU32,
    /// Milliseconds after `born` of the first of those timeouts.
    silent_since: AtomicU64,
    born: Instant,
    keeper: JoinHandle<()>,
}

impl Connection {
    pub(super) fn start(source: Source, cold_start: ColdStart, data_set: Arc<DataSet>) -> Self {
        let (publish, state) = watch::channel(State::Connecting);
        let (complaints, complained) = mpsc::channel(4);
        let connector = Connector { source, cold_start, data_set };
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

    /// The connection. Cancel-safe.
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

    /// The connection of this generation is of no more use.
    pub(crate) fn broken(&self, generation: u64) {
        // A full queue already holds a complaint.
        let _ = self.complaints.try_send(generation);
    }

    pub(crate) fn answered(&self) {
        if self.timeouts.load(Ordering::Relaxed) != 0 {
            self.timeouts.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn timed_out(&self) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        let before = self.timeouts.fetch_add(1, Ordering::Relaxed);
        if before == 0 {
            self.silent_since.store(now, Ordering::Relaxed);
        }
        let silent = now.saturating_sub(self.silent_since.load(Ordering::Relaxed));
        if before + 1 < TIMEOUTS_MAX || u128::from(silent) < SILENT_AFTER.as_millis() {
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

/// Establishes a connection, again and again.
struct Connector {
    source: Source,
    cold_start: ColdStart,
    data_set: Arc<DataSet>,
}

impl Connector {
    async fn connect(&self, generation: u64) -> Result<Link, Error> {
        let mut shared = self.source.connect().await?;
        let birth = match birth(&mut shared).await {
            Ok(birth) => birth,
            // It says so to whoever asks for a decision; of a Cluster, the other shards may serve.
            Err(error) if self.cold_start == ColdStart::Burst && self.is_usable(&error) => 0,
            Err(error) => return Err(error),
        };
        // Before anybody can use the connection: who asks for a decision must know that leases are lost.
        self.data_set.found(birth);
        Ok(Link { shared, birth: self.birth_for_scripts(birth), generation })
    }

    /// Whether a connection may be of use although this happened on it.
    fn is_usable(&self, error: &Error) -> bool {
        self.source.is_cluster() || !matches!(error, Error::Unreachable(_) | Error::Lost)
    }

    fn birth_for_scripts(&self, birth: u64) -> u64 {
        if self.cold_start == ColdStart::Strict { birth } else { 0 }
    }

    /// Until the connection is of no more use, or nobody wants it.
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
                    // Where it is slow or does not serve, calls say so.
                    Err(error) if self.is_usable(&error) => {}
                    Err(_) => return,
                },
            }
        }
    }
}

/// Between three quarters and all of it, so that gateways do not come back in step.
fn jittered(backoff: Duration, generation: u64) -> Duration {
    let seed = uuid::Uuid::new_v4().as_u128() as u64 ^ generation;
    backoff.mul_f64(0.75 + (seed % 256) as f64 / 1024.0)
}
