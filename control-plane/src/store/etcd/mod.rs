//! The store of several control planes, in etcd, with a client of its own.
//!
//! - `config`: where it is. `layout`: what is where in it. `client`: calls to whichever member answers.
//! - `commit`: transactions. `follow`: the watch. `lease`: leases.
//!
//! Everything that is acknowledged was acknowledged by a majority of the members. Reads are linearizable.

mod client;
mod commit;
mod config;
mod follow;
pub mod fuzzing;
mod layout;
mod lease;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};
use weir_proto::etcd::{KeyValue, RangeRequest, RangeResponse, ResponseOp, TxnRequest, response_op};

use self::client::Client;
use self::layout::{Layout, Tip};
use super::log::Log;
use super::{Answer, Entry, Error, Lease, Range, Store, Transaction, Watch, backup};
pub use config::EtcdConfig;

/// Keys read at once.
const PAGE: i64 = 1000;
/// Reads of a range begun anew because its revision was compacted meanwhile.
const READS: usize = 3;
/// Of a restore, keys written at once, and their bytes.
const RESTORED_KEYS: usize = 100;
const RESTORED_BYTES: usize = 1 << 20;

/// Keeps everything in etcd. Must be opened inside a tokio runtime; its task ends with the last clone.
#[derive(Debug, Clone)]
pub struct EtcdStore {
    inner: Arc<Inner>,
    _follower: Arc<DropGuard>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    layout: Layout,
    log: Log,
    /// What the last transaction left; held over a commit, so that writers of one process do not meet in etcd.
    known: Mutex<Option<commit::LastTip>>,
    leases: Mutex<lease::Leases>,
}

/// What the head of a store says.
struct Head {
    tip: Tip,
    /// The tip was last changed at this revision of etcd's.
    modified: i64,
    epoch: String,
}

impl EtcdStore {
    /// Opens a store, or makes it.
    pub async fn open(config: EtcdConfig) -> Result<Self, Error> {
        let layout = Layout::new(&config.prefix);
        let client = Client::new(config)?;
        client.log_in().await?;
        let head = match head(&client, &layout).await? {
            Some(head) => head,
            None => make(&client, &layout).await?,
        };
        let inner = Arc::new(Inner {
            client,
            layout,
            log: Log::new(head.tip.revision),
            known: Mutex::default(),
            leases: Mutex::default(),
        });
        let stop = CancellationToken::new();
        // Ends with the store; what it follows is in etcd.
        tokio::spawn({
            let (inner, stop) = (Arc::clone(&inner), stop.clone());
            async move {
                stop.run_until_cancelled(follow::run(&inner, head.tip.revision, head.modified)).await;
            }
        });
        Ok(Self { inner, _follower: Arc::new(stop.drop_guard()) })
    }

    /// Makes a new store, with an epoch of its own, from a backup. Refused when there is a store under the prefix.
    /// Returns its revision.
    pub async fn restore(config: EtcdConfig, from: &Path) -> Result<u64, Error> {
        let refused = |reason: String| Error::Restore { path: from.to_owned(), reason };
        let file = std::fs::read(from).map_err(|e| refused(e.to_string()))?;
        let copy = backup::decode(&file).map_err(|reason| refused(reason.to_owned()))?;
        let layout = Layout::new(&config.prefix);
        let client = Client::new(config)?;
        client.log_in().await?;
        let there =
            || refused(format!("etcd holds a store under {} already; name another prefix", layout.prefix()));
        if head(&client, &layout).await?.is_some() {
            return Err(there());
        }
        // What a restore that did not end has left; there is no store without its meta key, which is written last.
        let (begin, end) = layout.written();
        let clean = vec![layout::delete(begin, end)];
        client.txn(TxnRequest { success: clean, ..TxnRequest::default() }).await?;
        let mut ops = Vec::new();
        let mut bytes = 0;
        for entry in &copy.entries {
            if ops.len() == RESTORED_KEYS || bytes + entry.value.len() > RESTORED_BYTES {
                let success = std::mem::take(&mut ops);
                bytes = 0;
                client.txn(TxnRequest { success, ..TxnRequest::default() }).await?;
            }
            bytes += entry.value.len();
            let value = layout::kept(entry.revision, &entry.value);
            ops.push(layout::put(layout.key(&entry.key), value, 0));
        }
        client.txn(TxnRequest { success: ops, ..TxnRequest::default() }).await?;
        match found(&client, &layout, copy.revision).await? {
            true => Ok(copy.revision),
            false => Err(there()),
        }
    }
}

/// The head of a store; `None` when there is none.
async fn head(client: &Client, layout: &Layout) -> Result<Option<Head>, Error> {
    let success = vec![layout::get(layout.meta()), layout::get(layout.tip())];
    let answer = client.txn(TxnRequest { success, ..TxnRequest::default() }).await?.answer;
    let mut found = answer.responses.into_iter().map(one);
    read_head(layout, found.next().flatten(), found.next().flatten())
}

fn read_head(layout: &Layout, meta: Option<KeyValue>, tip: Option<KeyValue>) -> Result<Option<Head>, Error> {
    let Some(meta) = meta else { return Ok(None) };
    let foreign = || {
        Error::Failed(format!(
            "what etcd holds under {} is not a store that this version can read; name another prefix",
            layout.prefix()
        ))
    };
    let epoch = layout::epoch(&meta.value).ok_or_else(foreign)?;
    let entry = tip.ok_or_else(foreign)?;
    let tip = Tip::read(&entry.value).ok_or_else(foreign)?;
    Ok(Some(Head { tip, modified: entry.mod_revision, epoch }))
}

/// Creates an empty store, or opens the one that another process just created.
async fn make(client: &Client, layout: &Layout) -> Result<Head, Error> {
    found(client, layout, 0).await?;
    let made = head(client, layout).await?;
    made.ok_or_else(|| Error::Failed(format!("the store under {} is gone again", layout.prefix())))
}

/// Writes the head of a new store; false when there is one.
async fn found(client: &Client, layout: &Layout, revision: u64) -> Result<bool, Error> {
    let epoch = uuid::Uuid::now_v7().to_string();
    let tip = Tip { revision, transaction: "made".into() };
    let compare = vec![layout::created_at(layout.meta(), 0)];
    let meta = layout::put(layout.meta(), layout::meta_value(&epoch), 0);
    let success = vec![meta, layout::put(layout.tip(), tip.value(), 0)];
    let done = client.txn(TxnRequest { compare, success, failure: Vec::new() }).await?;
    if done.answer.succeeded {
        return Ok(true);
    }
    // An earlier try of ours may have made it.
    Ok(head(client, layout).await?.is_some_and(|head| head.epoch == epoch))
}

/// The one key of an answer to a get.
fn one(answer: ResponseOp) -> Option<KeyValue> {
    ranged(answer).kvs.into_iter().next()
}

fn ranged(answer: ResponseOp) -> RangeResponse {
    match answer.response {
        Some(response_op::Response::ResponseRange(range)) => range,
        _ => RangeResponse::default(),
    }
}

impl Inner {
    async fn range(&self, prefix: &str) -> Result<Range, Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.read(prefix).await {
                Err(Error::Failed(reason)) if reason.contains("compacted") && tries < READS => {}
                read => return read,
            }
        }
    }

    /// Reads page by page, all at the revision of the first.
    async fn read(&self, prefix: &str) -> Result<Range, Error> {
        let layout = &self.layout;
        let (begin, range_end) = (layout.key(prefix), layout::after(&layout.key(prefix)));
        let page = |key, revision| RangeRequest { key, range_end: range_end.clone(), limit: PAGE, revision };
        let first = layout::op(weir_proto::etcd::request_op::Request::RequestRange(page(begin, 0)));
        let success = vec![layout::get(layout.meta()), layout::get(layout.tip()), first];
        let answer = self.client.txn(TxnRequest { success, ..TxnRequest::default() }).await?.answer;
        let at = answer.header.map_or(0, |header| header.revision);
        let mut parts = answer.responses.into_iter();
        let (meta, tip) = (parts.next().and_then(one), parts.next().and_then(one));
        let head = read_head(layout, meta, tip)?
            .ok_or_else(|| Error::Failed(format!("the store under {} is gone", layout.prefix())))?;
        let mut range = parts.next().map(ranged).unwrap_or_default();
        let mut entries = Vec::new();
        loop {
            let last = range.kvs.last().map(|entry| entry.key.clone());
            for entry in &range.kvs {
                let unreadable = || {
                    Error::Failed(format!("the key {} is none of ours", String::from_utf8_lossy(&entry.key)))
                };
                let key = layout.store_key(&entry.key).ok_or_else(unreadable)?;
                let (revision, value) = layout::unkept(entry).ok_or_else(unreadable)?;
                entries.push(Entry { key, value, revision });
            }
            let Some(last) = last.filter(|_| range.more) else { break };
            let next = [&last[..], &[0]].concat().into();
            range = self.client.range(page(next, at)).await?;
        }
        Ok(Range { entries, revision: head.tip.revision, epoch: head.epoch })
    }
}

impl Store for EtcdStore {
    fn transact(&self, transaction: Transaction) -> Answer<'_, u64> {
        async move { self.inner.commit(transaction).await }.boxed()
    }

    fn range(&self, prefix: &str) -> Answer<'_, Range> {
        let prefix = prefix.to_owned();
        async move { self.inner.range(&prefix).await }.boxed()
    }

    fn watch(&self, from: u64) -> Result<Watch, Error> {
        self.inner.log.watch(from)
    }

    fn lease(&self, name: &str, holder: &str, ttl: Duration) -> Answer<'_, Lease> {
        let (name, holder) = (name.to_owned(), holder.to_owned());
        async move { self.inner.lease(&name, &holder, ttl).await }.boxed()
    }

    fn release(&self, name: &str, holder: &str) -> Answer<'_, ()> {
        let (name, holder) = (name.to_owned(), holder.to_owned());
        async move { self.inner.release(&name, &holder).await }.boxed()
    }
}
