//! Open loop: requests arrive at a fixed rate. Latency counts from the time at which a request was due, so a stalled
//! server is charged for every request that would have waited.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Connection, Outcome, Pacer, call};

/// The maximum of connections. Requests without a free one wait, and their latency runs.
const CONNECTIONS_MAX: usize = 256;

/// A connection that was idle for this time is not used again: the server may be closing it, and a failure for that
/// reason says nothing about the server.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// The state that the requests of one load share.
struct Shared {
    address: SocketAddr,
    request: Bytes,
    state: Mutex<State>,
}

struct State {
    /// With the time of their last use.
    idle: Vec<(Connection, Instant)>,
    busy: usize,
    waiting: VecDeque<Instant>,
    outcome: Outcome,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Loads `address` with `per_second` requests for `duration`, and waits for the last answer.
pub(crate) async fn open(
    address: SocketAddr,
    request: &Bytes,
    per_second: f64,
    duration: Duration,
) -> std::io::Result<Outcome> {
    open_until(address, request, per_second, duration, &CancellationToken::new()).await
}

/// The same until a caller ends it.
pub(crate) async fn open_until(
    address: SocketAddr,
    request: &Bytes,
    per_second: f64,
    duration: Duration,
    enough: &CancellationToken,
) -> std::io::Result<Outcome> {
    let state = State { idle: Vec::new(), busy: 0, waiting: VecDeque::new(), outcome: Outcome::new() };
    let shared = Arc::new(Shared { address, request: request.clone(), state: Mutex::new(state) });
    let mut tasks = JoinSet::new();
    let mut pacer = Pacer::start(per_second)?;
    let started = Instant::now();
    loop {
        let due = pacer.next().await?;
        if due > started + duration || enough.is_cancelled() {
            break;
        }
        while tasks.try_join_next().is_some() {}
        let connection = {
            let mut state = shared.state();
            if state.busy >= CONNECTIONS_MAX {
                state.waiting.push_back(due);
                continue;
            }
            state.busy += 1;
            // The connection that was used last: its caches are warm, and the number of connections stays small.
            let last = state.idle.pop();
            if last.as_ref().is_some_and(|(_, used)| used.elapsed() > IDLE_MAX) {
                // All connections below it are older.
                state.idle.clear();
            }
            last.filter(|(_, used)| used.elapsed() <= IDLE_MAX).map(|(connection, _)| connection)
        };
        tasks.spawn(serve(shared.clone(), connection, due));
    }
    while tasks.join_next().await.is_some() {}
    let mut outcome = std::mem::replace(&mut shared.state().outcome, Outcome::new());
    outcome.elapsed = started.elapsed();
    Ok(outcome)
}

/// Serves the request that was due then, and those that wait.
async fn serve(shared: Arc<Shared>, mut connection: Option<Connection>, mut due: Instant) {
    loop {
        let result = call(&mut connection, shared.address, &shared.request).await;
        let mut state = shared.state();
        state.outcome.count(due.elapsed(), &result);
        match state.waiting.pop_front() {
            Some(next) => due = next,
            None => {
                state.busy -= 1;
                state.idle.extend(connection.map(|connection| (connection, Instant::now())));
                return;
            }
        }
    }
}
