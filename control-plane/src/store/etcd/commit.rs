//! Transactions. Each one compares and rewrites the tip, so that reads before it are still valid, and the order of all
//! transactions is the order of the tip's revisions.
//!
//! A transaction of the store fits into one of etcd's, however many keys it writes: etcd bounds the operations of one level
//! (128 by default, all levels on a path together), so they are put into transactions within transactions. Its size is
//! bounded too (1.5 MiB by default); beyond that the change is refused with what can be done about it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use weir_proto::etcd::{RequestOp, TxnRequest, request_op};
use weir_runtime::Backoff;

use super::layout::{self, Tip};
use super::{Inner, one};
use crate::store::{Compare, Error, Transaction, Write};

/// Tries against other writers.
const TRIES: u32 = 64;
/// First and longest pause between two of them; each is drawn.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// Operations of one level: three levels stay below etcd's bound.
const WIDTH: usize = 40;
/// Most operations of a transaction.
const OPS_MAX: usize = WIDTH * WIDTH * WIDTH;
/// Most comparisons of a transaction.
const COMPARES_MAX: usize = 100;
/// Transactions of others that are looked through to find out whether one of ours was made.
const LOOK_BACK: usize = 64;

/// The tip of the store as it was last read or written.
#[derive(Debug)]
pub(super) struct LastTip {
    revision: u64,
    /// etcd's revision of the tip.
    modified: i64,
    /// The revisions of keys that were compared; zero: not there.
    of: BTreeMap<String, u64>,
}

impl LastTip {
    fn fits(&self, compares: &[Compare]) -> bool {
        compares.iter().all(|compare| self.of.get(&compare.key) == Some(&compare.revision))
    }
}

impl Inner {
    pub(super) async fn commit(&self, transaction: Transaction) -> Result<u64, Error> {
        let Transaction { compares, writes } = transaction;
        let writes = last_of_each(writes);
        if writes.len() >= OPS_MAX || compares.len() > COMPARES_MAX {
            return Err(Error::TooLarge);
        }
        let mut slot = self.known.lock().await;
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        for _ in 0..TRIES {
            // What is remembered can be behind, so that only what is read now says that there is a conflict.
            let before = match slot.take().filter(|known| known.fits(&compares)) {
                Some(known) => known,
                None => self.look(&compares).await?,
            };
            let wrong =
                compares.iter().find(|compare| before.of.get(&compare.key) != Some(&compare.revision));
            if let Some(wrong) = wrong {
                return Err(Error::Conflict(wrong.key.clone()));
            }
            let revision = before.revision + 1;
            let id = uuid::Uuid::now_v7().to_string();
            let request = self.request(&before, &writes, revision, &id);
            let done = match self.client.txn(request).await {
                // The write that goes over the quota is refused or carried out, and answered like this either way.
                Err(full @ Error::Full(_)) => {
                    return if self.was_made(revision, &id).await? { Ok(revision) } else { Err(full) };
                }
                done => done?,
            };
            if done.answer.succeeded {
                let modified = done.answer.header.map_or(0, |header| header.revision);
                *slot = Some(after(before, &writes, revision, modified));
                return Ok(revision);
            }
            // Another transaction was first, or an earlier attempt of this transaction succeeded.
            if done.unsure && self.was_made(revision, &id).await? {
                return Ok(revision);
            }
            tokio::time::sleep(backoff.next_pause()).await;
        }
        Err(Error::Failed("too many others write at once; try again".into()))
    }

    /// Reads the tip and the keys compared, all of one revision.
    async fn look(&self, compares: &[Compare]) -> Result<LastTip, Error> {
        let keys = compares.iter().map(|compare| layout::get(self.layout.key(&compare.key)));
        let success = std::iter::once(layout::get(self.layout.tip())).chain(keys).collect();
        let answer = self.client.txn(TxnRequest { success, ..TxnRequest::default() }).await?.answer;
        let mut found = answer.responses.into_iter().map(one);
        let gone = || Error::Failed(format!("the store under {} is gone", self.layout.prefix()));
        let entry = found.next().flatten().ok_or_else(gone)?;
        let tip = Tip::read(&entry.value).ok_or_else(gone)?;
        let revision = |entry| layout::unkept(&entry).map_or(0, |(revision, _)| revision);
        let of = compares.iter().zip(found).map(|(c, found)| (c.key.clone(), found.map_or(0, revision)));
        Ok(LastTip { revision: tip.revision, modified: entry.mod_revision, of: of.collect() })
    }

    fn request(&self, before: &LastTip, writes: &[Write], revision: u64, id: &str) -> TxnRequest {
        let ops = writes.iter().map(|write| match write {
            Write::Put(key, value) => layout::put(self.layout.key(key), layout::kept(revision, value), 0),
            Write::Delete(key) => layout::delete(self.layout.key(key), bytes::Bytes::new()),
        });
        // The tip is the last write, so that a watcher knows when the transaction is complete.
        let tip = Tip { revision, transaction: id.to_owned() };
        let mut success = nested(ops.collect());
        success.push(layout::put(self.layout.tip(), tip.value(), 0));
        let compare = vec![layout::modified_at(self.layout.tip(), before.modified)];
        TxnRequest { compare, success, failure: Vec::new() }
    }

    /// Whether the transaction that made this revision is this one.
    async fn was_made(&self, revision: u64, id: &str) -> Result<bool, Error> {
        let mut at = 0;
        for _ in 0..LOOK_BACK {
            let request = weir_proto::etcd::RangeRequest { revision: at, ..layout::range(self.layout.tip()) };
            let Some(entry) = self.client.range(request).await?.kvs.into_iter().next() else { break };
            let Some(tip) = Tip::read(&entry.value) else { break };
            if tip.revision <= revision {
                return Ok(tip.revision == revision && tip.transaction == id);
            }
            at = entry.mod_revision - 1;
        }
        Err(Error::Failed("etcd did not answer in time; it is not known whether the change was made".into()))
    }
}

/// Etcd takes a key once in a transaction; here the last write of a key counts.
fn last_of_each(writes: Vec<Write>) -> Vec<Write> {
    let mut seen = BTreeSet::new();
    let mut kept: Vec<Write> =
        writes.into_iter().rev().filter(|write| seen.insert(write.key().to_owned())).collect();
    kept.reverse();
    kept
}

/// What is known after a transaction.
fn after(before: LastTip, writes: &[Write], revision: u64, modified: i64) -> LastTip {
    let mut of = before.of;
    for write in writes {
        if let Some(known) = of.get_mut(write.key()) {
            *known = if matches!(write, Write::Put(..)) { revision } else { 0 };
        }
    }
    LastTip { revision, modified, of }
}

/// The same operations, in transactions within transactions when there are many.
fn nested(ops: Vec<RequestOp>) -> Vec<RequestOp> {
    if ops.len() <= WIDTH {
        return ops;
    }
    let mut size = WIDTH;
    while size * WIDTH < ops.len() {
        size *= WIDTH;
    }
    let mut rest = ops.into_iter().peekable();
    let mut out = Vec::new();
    while rest.peek().is_some() {
        let success = nested(rest.by_ref().take(size).collect());
        let inner = TxnRequest { success, ..TxnRequest::default() };
        out.push(layout::op(request_op::Request::RequestTxn(inner)));
    }
    out
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// How many operations there are, and the most that lie on a path, as etcd counts them.
    fn measure(ops: &[RequestOp]) -> (usize, usize) {
        let mut sum = (0, 0);
        for op in ops {
            let (count, path) = match &op.request {
                Some(request_op::Request::RequestTxn(inner)) => measure(&inner.success),
                _ => (1, 0),
            };
            sum = (sum.0 + count, sum.1.max(path));
        }
        (sum.0, sum.1 + ops.len())
    }

    #[test]
    fn many_operations_stay_below_the_bound_of_etcd() {
        for count in [0, 1, WIDTH, WIDTH + 1, 1600, 1601, 5000, OPS_MAX - 1] {
            let ops = vec![layout::get(Bytes::new()); count];
            let (found, path) = measure(&nested(ops));
            // One more is the tip.
            assert!(found == count && path < 128, "{count}: {found}, {path}");
        }
    }

    #[test]
    fn of_several_writes_of_a_key_the_last_counts() {
        let put =
            |key: &str, value: &'static str| Write::Put(key.into(), Bytes::from_static(value.as_bytes()));
        let writes = vec![Write::Delete("a".into()), put("b", "1"), put("a", "2"), put("b", "3")];
        assert_eq!(last_of_each(writes), [put("a", "2"), put("b", "3")]);
    }
}
