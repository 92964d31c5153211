//! A store in memory, for tests and temporary clusters.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;

use super::lease::Leases;
use super::log::Log;
use super::{Answer, Batch, Entry, Error, Lease, Range, Store, Transaction, Watch, Write};

/// Keeps everything in memory.
#[derive(Debug)]
pub struct MemoryStore {
    state: Mutex<State>,
    log: Log,
    leases: Leases,
    epoch: String,
}

#[derive(Debug, Default)]
struct State {
    entries: BTreeMap<String, (Bytes, u64)>,
    revision: u64,
    fencing_token: u64,
}

impl Default for MemoryStore {
    fn default() -> Self {
        let epoch = uuid::Uuid::now_v7().to_string();
        Self { state: Mutex::default(), log: Log::new(0), leases: Leases::default(), epoch }
    }
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, transaction: Transaction) -> Result<u64, Error> {
        let mut state = self.state();
        for compare in &transaction.compares {
            let found = state.entries.get(&compare.key).map_or(0, |(_, revision)| *revision);
            if found != compare.revision {
                return Err(Error::Conflict(compare.key.clone()));
            }
        }
        let revision = state.revision + 1;
        state.revision = revision;
        for write in &transaction.writes {
            match write {
                Write::Put(key, value) => {
                    state.entries.insert(key.clone(), (value.clone(), revision));
                }
                Write::Delete(key) => {
                    state.entries.remove(key);
                }
            }
        }
        // Under the lock, so that the log has the order of the store.
        self.log.push(Batch { revision, writes: transaction.writes });
        Ok(revision)
    }
}

impl Store for MemoryStore {
    fn transact(&self, transaction: Transaction) -> Answer<'_, u64> {
        async move { self.apply(transaction) }.boxed()
    }

    fn range(&self, prefix: &str) -> Answer<'_, Range> {
        let prefix = prefix.to_owned();
        async move {
            let state = self.state();
            let entries = state
                .entries
                .range(prefix.clone()..)
                .take_while(|(key, _)| key.starts_with(&prefix))
                .map(|(key, (value, revision))| Entry {
                    key: key.clone(),
                    value: value.clone(),
                    revision: *revision,
                })
                .collect();
            Ok(Range { entries, revision: state.revision, epoch: self.epoch.clone() })
        }
        .boxed()
    }

    fn watch(&self, from: u64) -> Result<Watch, Error> {
        self.log.watch(from)
    }

    fn lease(&self, name: &str, holder: &str, ttl: Duration) -> Answer<'_, Lease> {
        let (name, holder) = (name.to_owned(), holder.to_owned());
        async move {
            if let Some(fencing_token) = self.leases.renew(&name, &holder, ttl)? {
                return Ok(Lease { fencing_token });
            }
            let next = {
                let mut state = self.state();
                state.fencing_token += 1;
                state.fencing_token
            };
            Ok(Lease { fencing_token: self.leases.grant(&name, &holder, ttl, next)? })
        }
        .boxed()
    }

    fn release(&self, name: &str, holder: &str) -> Answer<'_, ()> {
        self.leases.release(name, holder);
        std::future::ready(Ok(())).boxed()
    }
}
