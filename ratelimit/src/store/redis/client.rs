//! Sends scripts over a few connections, each call within its deadline.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::Connection;
use super::eval::eval;
use super::failures::{classify, replaces_connection};
use super::lag::Lag;
use super::options::CONNECT_TIMEOUT;
use super::prolonged::ProlongedSets;
use super::script::{self, Script};
use super::topology::Source;
use crate::model::data_set::DataSet;
use crate::model::error::Error;
use crate::model::key::Key;

/// The longest time for which a call waits beyond its deadline because this process gets too little CPU.
const STARVED_MAX: Duration = Duration::from_secs(10);

/// The connections and what calls need to use them.
pub(super) struct Client {
    pub(super) connections: Vec<Connection>,
    pub(super) source: Source,
    /// Whether keys with different hash tags may be on different servers.
    pub(super) is_cluster: bool,
    pub(super) next: AtomicUsize,
    pub(super) deadline: Duration,
    pub(super) lag: Arc<Lag>,
    pub(super) prolonged: ProlongedSets,
    pub(super) data_set: Arc<DataSet>,
}

impl Client {
    /// The next connection in turn that is not known to be down; the next one if all are down.
    fn connection(&self) -> &Connection {
        let (before, from) =
            self.connections.split_at(self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len());
        from.iter().chain(before).find(|connection| !connection.is_down()).unwrap_or(&from[0])
    }

    /// Runs a script. If the future is dropped, the outcome is unknown, as after a timeout.
    pub(super) async fn run(
        &self,
        script: &Script,
        keys: &[&Key],
        args: &script::Args,
    ) -> Result<Vec<i64>, Error> {
        if self.is_cluster && !is_one_slot(keys.iter().copied()) {
            return Err(Error::Invalid("keys of several slots in one call"));
        }
        let connection = self.connection();
        let answer = self.in_time(run_on(connection, script, keys, args)).await;
        answer.unwrap_or_else(|| {
            connection.timed_out();
            Err(Error::Timeout(self.deadline))
        })
    }

    /// Runs a script that reads a report, on a pooled connection where there is a pool. Connecting has a timeout of
    /// its own, so that a report does not fail because its connection is new.
    pub(super) async fn report(&self, script: &Script, keys: &[&Key]) -> Result<Vec<i64>, Error> {
        let (args, late) = (script::Args::default(), || Error::Timeout(self.deadline));
        // Fails at once if the server is known to be down.
        self.in_time(self.connection().connected()).await.ok_or_else(late)??;
        let pooled = tokio::time::timeout(CONNECT_TIMEOUT, self.source.report_connection()).await;
        let Some(mut pooled) = pooled.map_err(|_| Error::Timeout(CONNECT_TIMEOUT))?? else {
            return self.run(script, keys, &args).await;
        };
        // A report does not get the birth of the data set, because missing buckets do not matter to it.
        let reply = self.in_time(eval(&mut pooled, 0, script, keys, &args)).await.ok_or_else(late)?;
        reply.map_err(|error| classify(&error))
    }

    /// Waits for an answer within the deadline. While this process gets too little CPU, the answer may lie unread in
    /// the socket, so the wait is extended.
    pub(super) async fn in_time<T>(&self, answer: impl Future<Output = T>) -> Option<T> {
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

async fn run_on(
    connection: &Connection,
    script: &Script,
    keys: &[&Key],
    args: &script::Args,
) -> Result<Vec<i64>, Error> {
    let mut link = connection.connected().await?;
    match eval(&mut link.shared, link.birth, script, keys, args).await {
        Ok(reply) => {
            connection.answered();
            Ok(reply)
        }
        Err(error) => {
            if replaces_connection(&error) {
                connection.broken(link.generation);
            }
            Err(classify(&error))
        }
    }
}

/// Whether all keys of a call share a hash slot.
pub(super) fn is_one_slot<'a>(mut keys: impl Iterator<Item = &'a Key>) -> bool {
    let Some(first) = keys.next() else { return true };
    keys.all(|key| key.tag() == first.tag())
}
