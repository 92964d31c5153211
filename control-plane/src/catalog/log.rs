//! Reading the audit log: the newest records from memory, older ones from the store, a chunk at a time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use super::{Catalog, Error};
use crate::model::State;
use crate::model::audit::{AUDIT_MAX, CHUNK, Logged, chunk_prefix, verify};
use crate::store::{self, Store};

/// Records kept in memory: watches and pages that are no further behind cost no read of the store.
const RECENT_MAX: usize = 4096;

/// The newest records, the oldest first, without gaps.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<VecDeque<Arc<Logged>>>);

impl Recent {
    fn records(&self) -> MutexGuard<'_, VecDeque<Arc<Logged>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The records of the last chunks of the log, up to the newest of the state that was read: those that came after it
    /// come with the batches that follow.
    pub(super) async fn load(store: &dyn Store, newest: u64) -> Result<Self, store::Error> {
        let recent = Self::default();
        let from = (newest / CHUNK).saturating_sub(RECENT_MAX as u64 / CHUNK);
        for chunk in from..=newest / CHUNK {
            for logged in read_chunk(store, chunk * CHUNK).await? {
                if logged.record.sequence <= newest {
                    recent.push_shared(logged);
                }
            }
        }
        Ok(recent)
    }

    pub(super) fn replace(&self, other: Self) {
        *self.records() = std::mem::take(&mut *other.records());
    }

    pub(super) fn push(&self, logged: Logged) {
        self.push_shared(Arc::new(logged));
    }

    fn push_shared(&self, logged: Arc<Logged>) {
        let mut records = self.records();
        records.push_back(logged);
        if records.len() > RECENT_MAX {
            records.pop_front();
        }
    }

    /// The records after a sequence, the oldest first; `None` when some of them are not here.
    fn after(&self, sequence: u64, limit: usize) -> Option<Vec<Arc<Logged>>> {
        let records = self.records();
        let first = records.front()?.record.sequence;
        let skip = usize::try_from((sequence + 1).checked_sub(first)?).ok()?;
        Some(records.iter().skip(skip).take(limit).cloned().collect())
    }

    /// The records before a sequence, the newest first; `None` when the newest of them is not here.
    fn before(&self, sequence: u64, limit: usize) -> Option<Vec<Arc<Logged>>> {
        let records = self.records();
        let found: Vec<_> = records
            .iter()
            .rev()
            .skip_while(|logged| logged.record.sequence >= sequence)
            .take(limit)
            .cloned()
            .collect();
        (!found.is_empty()).then_some(found)
    }
}

/// The chunk that a sequence is in, the oldest record first.
async fn read_chunk(store: &dyn Store, sequence: u64) -> Result<Vec<Arc<Logged>>, store::Error> {
    let range = store.range(&chunk_prefix(sequence)).await?;
    let read = |entry: &store::Entry| {
        let logged = Logged::decode(&entry.key, &entry.value, entry.revision);
        logged.map(Arc::new).map_err(|e| store::Error::Failed(e.to_string()))
    };
    range.entries.iter().map(read).collect()
}

/// What a check of the whole log found.
#[derive(Debug, Default)]
pub(crate) struct Verified {
    pub(crate) count: u64,
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) last_hash: Bytes,
    pub(crate) problem: Option<String>,
}

impl Catalog {
    /// The oldest record kept.
    pub(crate) fn oldest_sequence(&self) -> u64 {
        self.state().audit.sequence.saturating_sub(AUDIT_MAX) + 1
    }

    /// Some of the records after a sequence, the oldest first; none when there is no newer one.
    /// [`Error::Forgotten`] when the next one is deleted already.
    pub(crate) async fn records_after(&self, sequence: u64, limit: usize) -> Result<Vec<Arc<Logged>>, Error> {
        if sequence >= self.state().audit.sequence {
            return Ok(Vec::new());
        }
        if let Some(found) = self.recent.after(sequence, limit) {
            return Ok(found);
        }
        let chunk = read_chunk(&*self.store, sequence + 1).await?;
        let mut found: Vec<_> = chunk.into_iter().filter(|l| l.record.sequence > sequence).collect();
        if found.first().is_none_or(|first| first.record.sequence != sequence + 1) {
            let oldest = found.first().map_or_else(|| self.state().head, |first| first.record.base);
            return Err(Error::Forgotten { asked: 0, oldest });
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Some of the records before a sequence, the newest first; none when there is no older one.
    pub(crate) async fn records_before(
        &self,
        sequence: u64,
        limit: usize,
    ) -> Result<Vec<Arc<Logged>>, Error> {
        let sequence = sequence.min(self.state().audit.sequence + 1);
        if let Some(found) = self.recent.before(sequence, limit) {
            return Ok(found);
        }
        if sequence <= self.oldest_sequence() {
            return Ok(Vec::new());
        }
        let chunk = read_chunk(&*self.store, sequence - 1).await?;
        let older = chunk.into_iter().filter(|l| l.record.sequence < sequence).rev();
        Ok(older.take(limit).collect())
    }

    /// The newest record at or before a revision.
    pub(crate) async fn sequence_at(&self, revision: u64) -> Result<u64, Error> {
        let state = self.state_at(revision).await?;
        let (mut before, mut oldest) = (state.audit.sequence + 1, state.head);
        loop {
            let records = self.records_before(before, CHUNK as usize).await?;
            for logged in &records {
                if logged.revision <= revision {
                    return Ok(logged.record.sequence);
                }
                oldest = logged.record.base;
            }
            match records.last() {
                Some(last) if last.record.sequence > 1 => before = last.record.sequence,
                // Before the very first record there was nothing.
                Some(_) => return Ok(0),
                None if before <= 1 => return Ok(0),
                None if oldest <= revision => return Ok(before - 1),
                None => return Err(Error::Forgotten { asked: revision, oldest }),
            }
        }
    }

    /// The resources as they were at a revision: the present ones with later records undone.
    pub(crate) async fn at(&self, revision: u64) -> Result<Arc<State>, Error> {
        let now = self.state_at(revision).await?;
        if revision >= now.head {
            return Ok(now);
        }
        let mut state = State::clone(&now);
        let mut before = now.audit.sequence + 1;
        loop {
            let records = self.records_before(before, CHUNK as usize).await?;
            for logged in &records {
                if logged.revision <= revision {
                    state.revision = revision;
                    return Ok(Arc::new(state));
                }
                state.undo(logged).map_err(|e| store::Error::Failed(e.to_string()))?;
            }
            match records.last() {
                Some(last) if last.record.sequence > 1 => before = last.record.sequence,
                _ if state.revision <= revision => {
                    state.revision = revision;
                    return Ok(Arc::new(state));
                }
                _ => return Err(Error::Forgotten { asked: revision, oldest: state.revision }),
            }
        }
    }

    /// Recomputes the whole chain from the store.
    pub(crate) async fn verify(&self) -> Result<Verified, Error> {
        let state = self.state();
        let end = state.audit.clone();
        let mut out = Verified { first: 0, last: end.sequence, ..Verified::default() };
        let mut previous = None;
        for chunk in self.oldest_sequence() / CHUNK..=end.sequence / CHUNK {
            let mut records = read_chunk(&*self.store, chunk * CHUNK).await?;
            records.retain(|logged| logged.record.sequence <= end.sequence);
            let Some(last) = records.last() else { continue };
            let last = last.record.sequence;
            if out.first == 0 {
                out.first = records[0].record.sequence;
            }
            match verify(&records, previous) {
                Ok((count, hash)) => {
                    out.count += count;
                    out.last_hash = hash.clone();
                    previous = Some((last, hash));
                }
                Err(problem) => return Ok(Verified { problem: Some(problem), ..out }),
            }
        }
        if previous.as_ref().map_or(0, |(last, _)| *last) != end.sequence {
            out.problem = Some(format!("the log ends before entry {}", end.sequence));
        } else if out.last_hash != end.hash {
            out.problem = Some("the newest entry is not the one that the store's head names".into());
        }
        Ok(out)
    }

    /// One record; `None` when it is not kept.
    pub(crate) async fn record(&self, sequence: u64) -> Result<Option<Arc<Logged>>, Error> {
        let found = self.records_before(sequence.saturating_add(1), 1).await?;
        Ok(found.into_iter().find(|logged| logged.record.sequence == sequence))
    }

    /// The whole store, for a backup.
    pub(crate) async fn everything(&self) -> Result<store::Range, Error> {
        // One read: everything is of one revision.
        Ok(self.store.range("").await?)
    }
}
