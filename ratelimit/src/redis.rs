//! The limiter in Redis: each call is one script, run where the data is.
//!
//! A call goes to one of a few multiplexed connections (a lane each); whatever waits on a connection travels
//! together, so callers pipeline each other without knowing. Scripts go by hash; a server that forgot them
//! (restart, failover, flush) is sent the text once, by the call that noticed. Every call has a deadline, after
//! which its outcome is unknown; ids make a retry harmless.
//!
//! Needs Redis 7: scripts that free or credit are flagged to run even when memory is full.

mod lane;
mod reply;
mod script;

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::redis::{Cmd, ErrorKind, RedisError, ServerErrorKind};
use deadpool_redis::{Manager, Pool};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use self::lane::Lane;
use self::reply::Reader;
use self::script::Script;
use crate::call::{self, RESERVATION_LIFE, TOMBSTONE_LIFE};
use crate::lag::Lag;
use crate::{
    Acquire, Candidate, Charge, Decision, Error, Fault, Key, LimitState, Limiter, Renewal, ReservationId,
    ScopeLimits, Settle, Settled,
};

/// Renewals in one script call; a longer list is cut so that no call holds the server for long.
const RENEWALS_PER_CALL: usize = 256;
/// Time for a new connection, apart from any call's deadline: a handshake may take longer than a decision.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest a call waits past its deadline because this process is starved.
const STARVED_MAX: Duration = Duration::from_secs(10);

/// How to use a Redis server.
#[derive(Debug, Clone, Copy)]
pub struct RedisOptions {
    /// The longest a call may take, a wait for a connection included.
    pub deadline: Duration,
    /// Connections, each shared by any number of calls.
    pub lanes: usize,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_millis(50), lanes: 2 }
    }
}

/// Limits shared through one Redis server.
pub struct RedisLimiter {
    lanes: Vec<Lane>,
    next: AtomicUsize,
    deadline: Duration,
    lag: Arc<Lag>,
    monitor: JoinHandle<()>,
}

impl RedisLimiter {
    /// Connects and checks that the server answers.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let limiter = Self::open(url, options)?;
        tokio::time::timeout(CONNECT_TIMEOUT, limiter.lanes[0].connected())
            .await
            .map_err(|_| Error::Timeout(CONNECT_TIMEOUT))??;
        Ok(limiter)
    }

    /// Starts connecting in the background; calls fail until a connection is there. Needs a tokio runtime.
    pub fn open(url: &str, options: RedisOptions) -> Result<Self, Error> {
        let config = ::redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(None);
        // The library's message may quote the address, password included.
        let manager =
            Manager::new_with_config(url, config).map_err(|_| Error::Invalid("not a Redis address"))?;
        let lanes = options.lanes.max(1);
        let pool =
            Pool::builder(manager).max_size(lanes).build().map_err(|_| Error::Invalid("not a Redis pool"))?;
        let lag = Arc::new(Lag::default());
        let monitor = tokio::spawn({
            let lag = lag.clone();
            async move { lag.run().await }
        });
        Ok(Self {
            lag,
            monitor,
            lanes: (0..lanes).map(|_| Lane::start(pool.clone())).collect(),
            next: AtomicUsize::new(0),
            deadline: options.deadline,
        })
    }

    /// The next lane in turn that is not known to be down, or the next one at all.
    fn lane(&self) -> &Lane {
        let (before, from) =
            self.lanes.split_at(self.next.fetch_add(1, Ordering::Relaxed) % self.lanes.len());
        from.iter().chain(before).find(|lane| !lane.is_down()).unwrap_or(&from[0])
    }

    /// Runs a script. Dropping the future leaves the outcome unknown, like a timeout.
    async fn run(&self, script: &Script, keys: &[&Key], args: &[Vec<u8>]) -> Result<Vec<i64>, Error> {
        let lane = self.lane();
        let asked = Instant::now();
        let mut call = pin!(run_on(lane, script, keys, args));
        loop {
            match tokio::time::timeout(self.deadline, &mut call).await {
                Ok(result) => return result,
                // It is this process that is slow: the answer may lie unread in its socket.
                Err(_) if self.lag.starved() && asked.elapsed() < STARVED_MAX => {}
                Err(_) => {
                    lane.timed_out();
                    return Err(Error::Timeout(self.deadline));
                }
            }
        }
    }
}

impl Drop for RedisLimiter {
    fn drop(&mut self) {
        self.monitor.abort();
    }
}

async fn run_on(lane: &Lane, script: &Script, keys: &[&Key], args: &[Vec<u8>]) -> Result<Vec<i64>, Error> {
    let mut connection = lane.connected().await?;
    let command = |name: &str, body: &str| {
        let mut command = Cmd::with_capacity(3 + keys.len() + args.len(), 64 * (3 + keys.len()));
        command.arg(name).arg(body).arg(keys.len());
        for key in keys {
            command.arg(key.as_str());
        }
        for arg in args {
            command.arg(arg.as_slice());
        }
        command
    };
    let mut result = command("EVALSHA", script.hash()).query_async(&mut connection.link).await;
    if matches!(&result, Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)) {
        result = command("EVAL", script.text()).query_async(&mut connection.link).await;
    }
    match result {
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
            .field("lanes", &self.lanes.len())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Limiter for RedisLimiter {
    async fn acquire(&self, call: &Acquire) -> Result<Decision, Error> {
        call::check_acquire(call)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let mut keys = vec![&reservation];
        keys.extend(call.scopes.iter().map(|scope| &scope.record));
        keys.extend(call.scopes.iter().map(|scope| &scope.leases));
        keys.extend(call.candidates.iter().map(|candidate| &candidate.leases));
        let mut args = script::Args::default();
        args.id(call.id).int(us(call.lease_ttl)).int(ms(RESERVATION_LIFE));
        args.int(call.scopes.len() as u64).int(call.candidates.len() as u64);
        for scope in &call.scopes {
            args.int(u64::from(scope.mode == crate::Mode::Shadow)).scope(scope, call::reserved(call));
        }
        for candidate in &call.candidates {
            args.int(u64::from(candidate.max_concurrency));
        }
        let reply = self.run(&script::ACQUIRE, &keys, &args.0).await?;
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
        let keys: Vec<&Key> = candidates.iter().map(|candidate| &candidate.leases).chain(from).collect();
        if keys.is_empty() {
            return Ok(None);
        }
        let mut args = script::Args::default();
        args.id(id).int(us(lease_ttl)).int(candidates.len() as u64);
        for candidate in candidates {
            args.int(u64::from(candidate.max_concurrency));
        }
        let reply = self.run(&script::MOVE_SLOT, &keys, &args.0).await?;
        Reader::new(&reply).index(candidates.len())
    }

    async fn settle(&self, call: &Settle) -> Result<Settled, Error> {
        call::check_scopes(&call.scopes)?;
        let reservation = Key::reservation_of(&call.scopes, call.id);
        let mut keys = vec![&reservation];
        keys.extend(call.scopes.iter().map(|scope| &scope.record));
        keys.extend(call.scopes.iter().map(|scope| &scope.leases));
        keys.extend(&call.slot);
        let mut args = script::Args::default();
        args.id(call.id).int(ms(TOMBSTONE_LIFE)).int(call.scopes.len() as u64);
        args.int(u64::from(call.slot.is_some()));
        for scope in &call.scopes {
            args.scope(scope, call::spent(&call.actual));
        }
        let reply = self.run(&script::SETTLE, &keys, &args.0).await?;
        Reader::new(&reply).settled(&call.scopes)
    }

    async fn renew(&self, renewals: &[Renewal], lease_ttl: Duration) -> Result<Vec<ReservationId>, Error> {
        call::check_lease(lease_ttl)?;
        let mut lost = Vec::new();
        for batch in renewals.chunks(RENEWALS_PER_CALL) {
            let records: Vec<_> =
                batch.iter().map(|renewal| Key::reservations_near(&renewal.leases, renewal.id)).collect();
            let mut keys = Vec::new();
            let mut args = script::Args::default();
            args.int(us(lease_ttl)).int(ms(RESERVATION_LIFE)).int(batch.len() as u64);
            for (renewal, records) in batch.iter().zip(&records) {
                keys.extend(renewal.leases.iter().chain(records));
                args.id(renewal.id).int(renewal.leases.len() as u64).int(records.len() as u64);
            }
            let reply = self.run(&script::RENEW, &keys, &args.0).await?;
            lost.extend(
                batch.iter().zip(reply).filter(|(_, gone)| *gone != 0).map(|(renewal, _)| renewal.id),
            );
        }
        Ok(lost)
    }

    async fn release(&self, id: ReservationId, leases: &[Key]) -> Result<(), Error> {
        if leases.is_empty() {
            return Ok(());
        }
        let keys: Vec<&Key> = leases.iter().collect();
        let mut args = script::Args::default();
        args.id(id);
        self.run(&script::RELEASE, &keys, &args.0).await.map(drop)
    }

    async fn charge(&self, charges: &[Charge]) -> Result<Decision, Error> {
        call::check_charges(charges)?;
        let keys: Vec<&Key> = charges.iter().map(|charge| &charge.record).collect();
        let mut args = script::Args::default();
        args.int(charges.len() as u64);
        for charge in charges {
            args.charge(charge);
        }
        let reply = self.run(&script::CHARGE, &keys, &args.0).await?;
        Reader::new(&reply).charged(charges)
    }

    async fn peek(&self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        call::check_scopes(scopes)?;
        let keys: Vec<&Key> =
            scopes.iter().map(|s| &s.record).chain(scopes.iter().map(|s| &s.leases)).collect();
        let mut args = script::Args::default();
        args.int(scopes.len() as u64);
        for scope in scopes {
            args.scope(scope, |_, _| 0.0);
        }
        let reply = self.run(&script::PEEK, &keys, &args.0).await?;
        Reader::new(&reply).peeked(scopes)
    }
}

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
