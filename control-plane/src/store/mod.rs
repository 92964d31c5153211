//! The store of resources: a trait of a few operations that any consistent store can implement.
//!
//! * [`Store::transact`] compares key revisions, then writes; all of it or nothing. Acknowledged means durable.
//! * [`Store::range`] reads a prefix at the current revision.
//! * [`Store::watch`] follows the revisions after a given one, each once and in order.
//! * [`Store::lease`] elects a holder, until [`Store::release`]; its fencing token rises with every grant.
//!
//! The revision is one counter for the whole store and rises by one with every transaction. The epoch is made with
//! the store: another epoch means another history.

pub(crate) mod backup;
mod etcd;
mod lease;
mod log;
mod memory;
mod redb;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

#[doc(hidden)]
pub use etcd::fuzzing;
pub use etcd::{EtcdConfig, EtcdStore};
pub use log::Watch;
pub use memory::MemoryStore;
pub use redb::FileStore;
pub(crate) use redb::create_private;

/// What must hold for a transaction to be applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// Of which key.
    pub key: String,
    /// The revision of its last change; zero: it does not exist.
    pub revision: u64,
}

/// One write of a transaction.
#[derive(Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put(String, Bytes),
    /// Removes a key; nothing when there is none.
    Delete(String),
}

impl Write {
    /// The key written.
    pub fn key(&self) -> &str {
        match self {
            Self::Put(key, _) | Self::Delete(key) => key,
        }
    }
}

impl fmt::Debug for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(key, value) => write!(f, "Put({key}, {} bytes)", value.len()),
            Self::Delete(key) => write!(f, "Delete({key})"),
        }
    }
}

/// Comparisons and writes that happen together.
#[derive(Debug, Clone, Default)]
pub struct Transaction {
    /// All must hold.
    pub compares: Vec<Compare>,
    /// Applied in order.
    pub writes: Vec<Write>,
}

/// One key as it was read.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: Bytes,
    /// The revision of its last change.
    pub revision: u64,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{} ({} bytes)", self.key, self.revision, self.value.len())
    }
}

/// A prefix as it was at one revision.
#[derive(Debug, Clone)]
pub struct Range {
    /// By key.
    pub entries: Vec<Entry>,
    /// The store revision that was read.
    pub revision: u64,
    /// The store's epoch.
    pub epoch: String,
}

/// What one transaction wrote.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The revision it made.
    pub revision: u64,
    /// In order.
    pub writes: Vec<Write>,
}

/// A granted lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Higher than that of every earlier grant of the same name.
    pub fencing_token: u64,
}

/// An error of a store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A comparison did not hold; nothing was written.
    #[error("key {0} was changed by somebody else")]
    Conflict(String),
    /// The requested revisions are compacted: read the range again.
    #[error("the revisions after {from} are compacted, the oldest known is {oldest}")]
    Compacted {
        /// The revision asked for.
        from: u64,
        /// The first that can still be watched.
        oldest: u64,
    },
    /// Another holder has the lease.
    #[error("the lease is held by {0}")]
    Held(String),
    /// Another process has it open.
    #[error("the store {0} is in use by another process; stop it or choose another store path")]
    Locked(PathBuf),
    /// It cannot be opened.
    #[error("cannot open the store {path}: {reason}")]
    Open {
        /// Where it is.
        path: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// There is no space for the change; nothing was written and reads work. The text names the remedy.
    #[error("{0}, and changes work again; until then the store can only be read")]
    Full(&'static str),
    /// The change is larger than the store takes at once; nothing was written.
    #[error(
        "the change is larger than etcd takes at once (1.5 MiB by default, with what the audit log keeps of it): make \
         it in parts, or raise etcd's --max-request-bytes"
    )]
    TooLarge,
    /// It cannot be reached.
    #[error(
        "etcd at {at} does not answer: {reason}; see that a majority of its members run, and that --store names them"
    )]
    Away {
        /// Its endpoints.
        at: String,
        /// What went wrong with the last one asked.
        reason: String,
    },
    /// A backup cannot be restored.
    #[error("cannot restore {path}: {reason}")]
    Restore {
        /// The backup.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Any other failure.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// The answer of a store.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, Error>>;

/// A consistent, durable map with revisions.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Applies all writes when all comparisons hold and returns the new revision.
    fn transact(&self, transaction: Transaction) -> Answer<'_, u64>;
    /// Reads every key with a prefix.
    fn range(&self, prefix: &str) -> Answer<'_, Range>;
    /// Follows the revisions after `from`.
    fn watch(&self, from: u64) -> Result<Watch, Error>;
    /// Requests or renews the lease of a name. The holder keeps its fencing token for another `ttl`; the next holder gets a
    /// higher one. [`Error::Held`] while another holder has it.
    fn lease(&self, name: &str, holder: &str, ttl: Duration) -> Answer<'_, Lease>;
    /// Releases a lease before it expires, so that the next holder need not wait. No effect if `holder` does not have it.
    fn release(&self, name: &str, holder: &str) -> Answer<'_, ()>;
}
