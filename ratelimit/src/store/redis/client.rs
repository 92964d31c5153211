//! Sends scripts over a few connections, and waits for answers until the server has been silent for too long.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::connection::Connection;
use super::eval::eval;
use super::failures::{classify, replaces_connection};
use super::options::CONNECT_TIMEOUT;
use super::prolonged::ProlongedSets;
use super::script::{self, Script};
use super::silence::Silence;
use super::topology::Source;
use crate::model::data_set::DataSet;
use crate::model::error::Error;
use crate::model::key::Key;

/// The connections and what calls need to use them.
pub(super) struct Client {
    pub(super) connections: Vec<Connection>,
    pub(super) source: Source,
    /// Whether keys with different hash tags may be on different servers.
    pub(super) is_cluster: bool,
    pub(super) next: AtomicUsize,
    pub(super) silence: Arc<Silence>,
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
        let answer = self.silence.within(run_on(connection, script, keys, args)).await;
        answer.unwrap_or_else(|| {
            let late = self.late();
            // One server answers on other connections, so this connection is dead.
            connection.timed_out(late == Error::Late);
            Err(late)
        })
    }

    /// Runs a script that reads a report, on a pooled connection where there is a pool. Connecting has a timeout of
    /// its own, so that a report does not fail because its connection is new.
    pub(super) async fn report(&self, script: &Script, keys: &[&Key]) -> Result<Vec<i64>, Error> {
        let (args, late) = (script::Args::default(), || self.late());
        // Fails at once if the server is known to be down.
        self.silence.within(self.connection().connected()).await.ok_or_else(late)??;
        let pooled = tokio::time::timeout(CONNECT_TIMEOUT, self.source.report_connection()).await;
        let Some(mut pooled) = pooled.map_err(|_| Error::Timeout(CONNECT_TIMEOUT))?? else {
            return self.run(script, keys, &args).await;
        };
        // A report does not get the birth of the data set, because missing buckets do not matter to it.
        let reply = self.silence.within(eval(&mut pooled, 0, script, keys, &args)).await.ok_or_else(late)?;
        reply.map_err(|error| classify(&error))
    }

    /// The error of a call that was not answered in time. What other shards of a Cluster answer says nothing about it.
    pub(super) fn late(&self) -> Error {
        match self.is_cluster || self.silence.is_over() {
            true => Error::Timeout(self.silence.longest()),
            false => Error::Late,
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
