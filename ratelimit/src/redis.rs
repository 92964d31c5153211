//! The limiter in Redis: each call is one script, run where the data is.
//!
//! A call goes to one of a few multiplexed connections (a lane each); whatever waits on a connection travels
//! together, so callers pipeline each other without knowing. Scripts go by hash; a server that forgot them
//! (restart, failover, flush) is sent the text once, by the call that noticed. Admissions, and settlements, under the
//! same limits are merged into one call where they would queue up. Every call has a deadline, after
//! which its outcome is unknown; ids make a retry harmless.
//!
//! Needs Redis 7: scripts that free or credit are flagged to run even when memory is full.

mod calls;
#[doc(hidden)]
pub mod fuzzing;
mod lane;
mod merge;
mod refused;
mod reply;
mod script;
mod split;
mod topology;
mod touched;

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::calls::{Ask, End};
use self::lane::Lane;
use self::merge::Merge;
use self::refused::Refused;
use self::reply::Reader;
use self::script::Script;
use self::topology::{Shared, Source};
use self::touched::Touched;
use crate::call::{self, RESERVATION_LIFE, TOMBSTONE_LIFE};
use crate::data_set::{DataSet, DataSetsLost};
use crate::lag::Lag;
use crate::{
    Acquire, Candidate, Charge, Decision, Error, Fault, Holder, Key, LimitState, Limiter, Renewal,
    ReservationId, ScopeLimits, Settle, Settled, UsageLines,
};

/// Time for a new connection, apart from any call's deadline: a handshake may take longer than a decision.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest a call waits past its deadline because this process is starved.
const STARVED_MAX: Duration = Duration::from_secs(10);

/// How to use a Redis server.
#[derive(Debug, Clone, Copy)]
pub struct RedisOptions {
    /// The longest a call may take, a wait for a connection included.
    pub deadline: Duration,
    /// Connections, each shared by any number of calls; to every node of a Cluster.
    pub lanes: usize,
    /// What a meter that is not there means.
    pub cold_start: ColdStart,
    /// Whether calls under the same limits travel as one where they would queue up. Off only to measure.
    pub merge: bool,
}

/// What a meter that is not there means: never used, or lost with the data set it was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ColdStart {
    /// It is empty. A store that lost its data grants every limit's burst once more.
    #[default]
    Burst,
    /// It was full when the data set was born, and has drained since: a store that lost its data grants no burst, and
    /// neither does a new one. Meters that do not drain start empty. The birth is read with each connection; of a
    /// Cluster it is that of the shard of the key `weir:{g}:birth`.
    Strict,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_millis(50), lanes: 2, cold_start: ColdStart::default(), merge: true }
    }
}

/// Limits shared through Redis: one server, a primary that Sentinels know, or a Cluster.
pub struct RedisLimiter {
    inner: Arc<Inner>,
    acquires: Arc<Merge<Ask<'static>>>,
    settles: Arc<Merge<End<'static>>>,
    merge: bool,
    refused: Refused,
    monitor: JoinHandle<()>,
}

/// What sends calls.
struct Inner {
    lanes: Vec<Lane>,
    /// Whether keys of different tags are on different servers.
    is_cluster: bool,
    next: AtomicUsize,
    deadline: Duration,
    lag: Arc<Lag>,
    touched: Touched,
    data_set: Arc<DataSet>,
}

impl RedisLimiter {
    /// Connects and checks that the server answers.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let limiter = Self::open(url, options)?;
        tokio::time::timeout(CONNECT_TIMEOUT, limiter.inner.lanes[0].connected())
            .await
            .map_err(|_| Error::Timeout(CONNECT_TIMEOUT))??;
        Ok(limiter)
    }

    /// Starts connecting in the background; calls fail until a connection is there. Needs a tokio runtime.
    ///
    /// Addresses: `redis://[user:password@]host[:port][/db]`,
    /// `redis+sentinel://[user:password@]host[:port],.../service[/db]`,
    /// `redis+cluster://[user:password@]host[:port],...`; the same with `rediss` for TLS.
    pub fn open(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let lanes = options.lanes.max(1);
        let source = Source::parse(url, lanes, CONNECT_TIMEOUT)?;
        let lag = Arc::new(Lag::default());
        let monitor = tokio::spawn({
            let lag = lag.clone();
            async move { lag.run().await }
        });
        let data_set = Arc::new(DataSet::default());
        let lane = |_| Lane::start(source.clone(), options.cold_start, data_set.clone());
        let inner = Arc::new(Inner {
            lag,
            is_cluster: source.is_cluster(),
            lanes: (0..lanes).map(lane).collect(),
            data_set: data_set.clone(),
            next: AtomicUsize::new(0),
            deadline: options.deadline,
            touched: Touched::default(),
        });
        let (acquires, settles) = (Ask::merge(&inner), End::merge(&inner));
        Ok(Self { inner, acquires, settles, merge: options.merge, refused: Refused::default(), monitor })
    }

    /// Admissions and settlements so far that travelled with another one under the same limits.
    pub fn merged_calls(&self) -> u64 {
        self.acquires.merged() + self.settles.merged()
    }
}

impl Inner {
    /// The next lane in turn that is not known to be down, or the next one at all.
    fn lane(&self) -> &Lane {
        let (before, from) =
            self.lanes.split_at(self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len());
        from.iter().chain(before).find(|lane| !lane.is_down()).unwrap_or(&from[0])
    }

    /// Runs a script. Dropping the future leaves the outcome unknown, like a timeout.
    async fn run(&self, script: &Script, keys: &[&Key], args: &script::Args) -> Result<Vec<i64>, Error> {
        if self.is_cluster && !split::is_whole(keys.iter().copied()) {
            return Err(Error::Invalid("keys of several slots in one call"));
        }
        let lane = self.lane();
        let answer = self.in_time(run_on(lane, script, keys, args)).await;
        answer.unwrap_or_else(|| {
            lane.timed_out();
            Err(Error::Timeout(self.deadline))
        })
    }

    /// What comes within the deadline. While it is this process that is slow, an answer may lie unread in its socket
    /// and is waited for.
    async fn in_time<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
        let asked = Instant::now();
        let mut answer = pin!(answer);
        loop {
            match tokio::time::timeout(self.deadline, &mut answer).await {
                Ok(answer) => return Some(answer),
                Err(_) if self.lag.starved() && asked.elapsed() < STARVED_MAX => {}
                Err(_) => return None,
            }
        }
    }
}

impl Drop for RedisLimiter {
    fn drop(&mut self) {
        self.monitor.abort();
    }
}

async fn run_on(lane: &Lane, script: &Script, keys: &[&Key], args: &script::Args) -> Result<Vec<i64>, Error> {
    let mut connection = lane.connected().await?;
    match eval(&mut connection.link, connection.birth, script, keys, args).await {
        Ok(reply) => {
            lane.answered();
            Ok(reply)
        }
        Err(error) => {
            if replaces_connection(&error) {
                lane.broken(connection.generation);
            }
            Err(classify(&error))
        }
    }
}

/// One script call, by hash; with its text when the server does not know it.
async fn eval(
    link: &mut Shared,
    birth: u64,
    script: &Script,
    keys: &[&Key],
    args: &script::Args,
) -> Result<Vec<i64>, RedisError> {
    let command = |name: &str, body: &str| {
        let mut command =
            Cmd::with_capacity(4 + keys.len() + args.len(), 64 * (3 + keys.len()) + args.bytes());
        command.arg(name).arg(body).arg(keys.len());
        for key in keys {
            command.arg(key.as_str());
        }
        for arg in args.parts() {
            command.arg(arg);
        }
        command.arg(birth);
        command
    };
    let mut result = command("EVALSHA", script.hash()).query_async::<Value>(link).await;
    if matches!(&result, Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)) {
        result = command("EVAL", script.text()).query_async(link).await;
    }
    reply::numbers(result?)
}

/// When the data set behind a connection was born; of a Cluster, that of the shard of one key.
async fn birth(link: &mut Shared) -> Result<u64, Error> {
    let key = Key::birth();
    let keys = [&key];
    let none = script::Args::default();
    let asked = eval(link, 0, &script::BIRTH, &keys, &none);
    let reply =
        tokio::time::timeout(CONNECT_TIMEOUT, asked).await.map_err(|_| Error::Timeout(CONNECT_TIMEOUT))?;
    let reply = reply.map_err(|error| classify_connect(&error))?;
    reply.first().and_then(|us| u64::try_from(*us).ok()).ok_or_else(reply::malformed)
}

/// A lost connection, or one to a server that no longer is the primary.
fn replaces_connection(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly | ServerErrorKind::MasterDown))
}

/// Of a call that was sent. Never quotes an address.
fn classify(error: &RedisError) -> Error {
    if let Some(fault) = fault_of(error) {
        let code = error.code().unwrap_or("NOAUTH");
        let detail = match error.detail() {
            Some(detail) => format!("{code} {}", detail.chars().take(200).collect::<String>()),
            None => code.to_owned(),
        };
        return Error::Refused { fault, detail };
    }
    match error.kind() {
        ErrorKind::Parse | ErrorKind::UnexpectedReturnType => reply::malformed(),
        // A Cluster without a node to ask has not sent anything.
        ErrorKind::ClusterConnectionNotFound => Error::Unreachable("no node of the cluster answers".into()),
        _ => Error::Lost,
    }
}

/// Of an attempt to connect: nothing was asked yet.
fn classify_connect(error: &RedisError) -> Error {
    match classify(error) {
        Error::Lost if error.is_connection_refusal() => Error::Unreachable("connection refused".into()),
        Error::Lost if error.is_timeout() => Error::Unreachable("connection timed out".into()),
        Error::Lost if error.is_io_error() || error.is_connection_dropped() => {
            Error::Unreachable("connection lost".into())
        }
        Error::Lost => Error::Unreachable(error.category().to_owned()),
        refused => refused,
    }
}

fn fault_of(error: &RedisError) -> Option<Fault> {
    match error.kind() {
        ErrorKind::AuthenticationFailed => Some(Fault::Denied),
        ErrorKind::Server(_) | ErrorKind::Extension => Some(Fault::of_code(error.code().unwrap_or_default())),
        _ => None,
    }
}

impl fmt::Debug for RedisLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLimiter")
            .field("lanes", &self.inner.lanes.len())
            .field("deadline", &self.inner.deadline)
            .finish_non_exhaustive()
    }
}

impl Limiter for RedisLimiter {
    fn data_sets_lost(&self) -> Option<DataSetsLost> {
        Some(self.inner.data_set.lost())
    }

    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        call::check_acquire(call)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let scopes = call.scopes.iter().map(|scope| &scope.record);
        let candidates = call.candidates.iter().map(|candidate| &candidate.leases);
        if self.splits(std::iter::once(&reservation).chain(scopes).chain(candidates)) {
            return self.acquire_split(call).await;
        }
        let reply = self.acquire_raw(call, &reservation, RESERVATION_LIFE).await?;
        Reader::new(&reply).decision(&call.scopes)
    }

    async fn move_slot(
        &self,
        id: ReservationId,
        from: Option<&Key>,
        candidates: &[Candidate],
        lease_ttl: Duration,
    ) -> Result<Option<usize>, Error> {
        call::check_candidates(candidates)?;
        call::check_lease(lease_ttl)?;
        if self.splits(candidates.iter().map(|candidate| &candidate.leases).chain(from)) {
            return self.move_split(id, from, candidates, lease_ttl).await;
        }
        self.move_whole(id, from, candidates, lease_ttl).await
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        call::check_scopes(&call.scopes)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let scopes = call.scopes.iter().map(|scope| &scope.record);
        let usage = call.usage.as_ref().map(|usage| &usage.record);
        if self.splits(std::iter::once(&reservation).chain(scopes).chain(&call.slot).chain(usage)) {
            return self.settle_split(call).await;
        }
        self.settle_whole(call, &reservation, TOMBSTONE_LIFE).await
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        call::check_lease(lease_ttl)?;
        if self.splits(renewals.iter().flat_map(|renewal| &renewal.leases)) {
            return self.renew_split(renewals, lease_ttl).await;
        }
        self.renew_whole(renewals, lease_ttl).await
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        if leases.is_empty() {
            return Ok(());
        }
        if self.splits(leases.iter()) {
            return self.release_split(id, leases).await;
        }
        self.release_whole(id, leases).await
    }

    async fn reap(&self, holder: Holder, leases: &[Key]) -> Result<Option<u64>, Error> {
        call::check_reap(leases)?;
        let roll = Key::roll();
        if self.splits(std::iter::once(&roll).chain(leases)) {
            return self.reap_split(holder, &roll, leases).await;
        }
        self.reap_whole(holder, Some(&roll), leases).await
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        call::check_charges(charges)?;
        if self.splits(charges.iter().map(|charge| &charge.record)) {
            return self.charge_split(charges).await;
        }
        self.charge_whole(charges).await
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        call::check_scopes(scopes)?;
        if self.splits(scopes.iter().map(|scope| &scope.record)) {
            return self.peek_split(scopes).await;
        }
        self.peek_whole(scopes).await
    }

    async fn usage(&self, records: &[Key]) -> Result<Vec<UsageLines>, Error> {
        call::check_usage(records)?;
        if self.splits(records.iter()) {
            return self.usage_split(records).await;
        }
        self.usage_whole(records).await
    }
}
