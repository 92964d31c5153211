//! The embedded durable store: one file, held by one process.
//!
//! Every transaction is on disk before it is acknowledged. Blocking work runs on tokio's blocking threads, one
//! writer at a time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use redb::{
    Database, DatabaseError, Durability, ReadableDatabase as _, ReadableTable as _,
    ReadableTableMetadata as _, TableDefinition,
};

use super::backup;
use super::lease::Leases;
use super::log::Log;
use super::{Answer, Batch, Entry, Error, Lease, Range, Store, Transaction, Watch, Write};

/// Key -> (revision of its last change, value).
const ENTRIES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("entries");
/// Counters: the revision and the fencing token.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
/// Texts: the epoch.
const TEXTS: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");

const NO_ROOM: &str = "the disk of the store is full: make room";

/// Keeps everything in one file.
#[derive(Debug, Clone)]
pub struct FileStore {
    inner: Arc<Inner>,
}

struct Inner {
    /// `None` only while it is opened again, or when that failed.
    database: RwLock<Option<Database>>,
    log: Log,
    leases: Leases,
    epoch: String,
    path: PathBuf,
    /// Held over commit and log, so that the log has the order of the file.
    writer: Mutex<()>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("path", &self.path).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

impl FileStore {
    /// Opens a store, or makes it with mode 0600 in a directory of mode 0700. Blocks; call it before serving.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let database = open_database(path)?;
        let (revision, epoch) = initialise(&database)
            .map_err(|e| Error::Open { path: path.to_owned(), reason: e.to_string() })?;
        let inner = Inner {
            database: RwLock::new(Some(database)),
            log: Log::new(revision),
            leases: Leases::default(),
            epoch,
            path: path.to_owned(),
            writer: Mutex::new(()),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes a new store, with an epoch of its own, from a backup. Refused when there is a store that holds anything.
    /// Returns its revision. Blocks.
    pub fn restore(path: &Path, from: &Path) -> Result<u64, Error> {
        let refused = |reason: String| Error::Restore { path: from.to_owned(), reason };
        let file = fs::read(from).map_err(|e| refused(e.to_string()))?;
        let copy = backup::decode(&file).map_err(|reason| refused(reason.to_owned()))?;
        let store = Self::open(path)?;
        let inner = &store.inner;
        let write = |database: &Database| -> Result<(), Failure> {
            let mut tx = database.begin_write()?;
            tx.set_durability(Durability::Immediate)?;
            {
                let mut entries = tx.open_table(ENTRIES)?;
                if !entries.is_empty()? {
                    return Err(Failure::Conflict(String::new()));
                }
                for entry in &copy.entries {
                    entries.insert(entry.key.as_str(), (entry.revision, entry.value.as_ref()))?;
                }
                tx.open_table(COUNTERS)?.insert("revision", copy.revision)?;
            }
            tx.commit()?;
            Ok(())
        };
        match inner.on_database(write) {
            Ok(()) => Ok(copy.revision),
            Err(Failure::Conflict(_)) => Err(refused(format!(
                "the store {} holds something already; move it away first",
                path.display()
            ))),
            Err(Failure::Database(e)) if is_full(&e) => Err(Error::Full(NO_ROOM)),
            Err(Failure::Database(e)) => Err(Error::Failed(e.to_string())),
            Err(Failure::Closed) => Err(refused("the new store cannot be opened".into())),
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Failure::Conflict(key))) => Err(Error::Conflict(key)),
            Ok(Err(Failure::Database(e))) if is_full(&e) => Err(Error::Full(NO_ROOM)),
            Ok(Err(Failure::Database(e))) => Err(Error::Failed(e.to_string())),
            Ok(Err(Failure::Closed)) => Err(Error::Failed("its file cannot be opened".into())),
            Err(e) => Err(Error::Failed(e.to_string())),
        }
    }
}

fn open_database(path: &Path) -> Result<Database, Error> {
    let unopened = |reason: String| Error::Open { path: path.to_owned(), reason };
    let file = create_private(path).map_err(|e| unopened(e.to_string()))?;
    redb::backends::FileBackend::new(file)
        .and_then(|backend| Database::builder().create_with_backend(backend))
        .map_err(|e| match e {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                Error::Locked(path.to_owned())
            }
            other => unopened(other.to_string()),
        })
}

/// The system said that there is no room: none on the disk, in the quota, or in the limit on the size of a file.
fn is_full(error: &redb::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error, redb::Error::Io(e)
        if matches!(e.kind(), Kind::StorageFull | Kind::QuotaExceeded | Kind::FileTooLarge))
}

/// What can go wrong inside a transaction.
enum Failure {
    Conflict(String),
    Database(Box<redb::Error>),
    /// After an I/O error the file could not be opened again.
    Closed,
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

impl Inner {
    /// Works on the open file. After an I/O error nothing works on it any more, so that it is opened again for the next.
    fn on_database<T>(&self, work: impl FnOnce(&Database) -> Result<T, Failure>) -> Result<T, Failure> {
        let done = match &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            Some(database) => work(database),
            None => Err(Failure::Closed),
        };
        let broken = match &done {
            Err(Failure::Database(e)) => matches!(**e, redb::Error::Io(_) | redb::Error::PreviousIo),
            Err(Failure::Closed) => true,
            Ok(_) | Err(Failure::Conflict(_)) => false,
        };
        if broken {
            self.open_again();
        }
        done
    }

    fn open_again(&self) {
        let mut database = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // The old one holds the file's lock.
        *database = None;
        let opened = open_database(&self.path).and_then(|database| {
            let (revision, _) = initialise(&database)
                .map_err(|e| Error::Open { path: self.path.clone(), reason: e.to_string() })?;
            Ok((database, revision))
        });
        match opened {
            Ok((opened, revision)) => {
                // What was being written may be there or not; who watches finds out by reading.
                self.log.reset(revision);
                *database = Some(opened);
            }
            Err(error) => tracing::error!(%error, "the store cannot be opened again"),
        }
    }

    fn transact(&self, transaction: Transaction) -> Result<u64, Failure> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = self.on_database(|database| Self::write(database, transaction))?;
        let revision = batch.revision;
        self.log.push(batch);
        Ok(revision)
    }

    fn write(database: &Database, transaction: Transaction) -> Result<Batch, Failure> {
        let mut tx = database.begin_write()?;
        tx.set_durability(Durability::Immediate)?;
        let revision = {
            let mut entries = tx.open_table(ENTRIES)?;
            for compare in &transaction.compares {
                let found = entries.get(compare.key.as_str())?.map_or(0, |entry| entry.value().0);
                if found != compare.revision {
                    return Err(Failure::Conflict(compare.key.clone()));
                }
            }
            let mut counters = tx.open_table(COUNTERS)?;
            let revision = counters.get("revision")?.map_or(0, |value| value.value()) + 1;
            counters.insert("revision", revision)?;
            for write in &transaction.writes {
                match write {
                    Write::Put(key, value) => {
                        entries.insert(key.as_str(), (revision, value.as_ref()))?;
                    }
                    Write::Delete(key) => {
                        entries.remove(key.as_str())?;
                    }
                }
            }
            revision
        };
        tx.commit()?;
        Ok(Batch { revision, writes: transaction.writes })
    }

    fn range(&self, prefix: &str) -> Result<Range, Failure> {
        self.on_database(|database| self.read(database, prefix))
    }

    fn read(&self, database: &Database, prefix: &str) -> Result<Range, Failure> {
        let tx = database.begin_read()?;
        let table = tx.open_table(ENTRIES)?;
        let mut entries = Vec::new();
        for row in table.range(prefix..)? {
            let (key, value) = row?;
            if !key.value().starts_with(prefix) {
                break;
            }
            let (revision, bytes) = value.value();
            let key = key.value().to_owned();
            entries.push(Entry { key, value: Bytes::copy_from_slice(bytes), revision });
        }
        let revision = tx.open_table(COUNTERS)?.get("revision")?.map_or(0, |value| value.value());
        Ok(Range { entries, revision, epoch: self.epoch.clone() })
    }

    fn lease(&self, name: &str) -> Result<Lease, Failure> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let key = format!("fencing/{name}");
        self.on_database(|database| {
            let tx = database.begin_write()?;
            let fencing_token = {
                let mut counters = tx.open_table(COUNTERS)?;
                let fencing_token = counters.get(key.as_str())?.map_or(0, |value| value.value()) + 1;
                counters.insert(key.as_str(), fencing_token)?;
                fencing_token
            };
            tx.commit()?;
            Ok(Lease { fencing_token })
        })
    }
}

impl Store for FileStore {
    fn transact(&self, transaction: Transaction) -> Answer<'_, u64> {
        self.blocking(move |inner| inner.transact(transaction)).boxed()
    }

    fn range(&self, prefix: &str) -> Answer<'_, Range> {
        let prefix = prefix.to_owned();
        self.blocking(move |inner| inner.range(&prefix)).boxed()
    }

    fn watch(&self, from: u64) -> Result<Watch, Error> {
        self.inner.log.watch(from)
    }

    fn lease(&self, name: &str, holder: &str, ttl: Duration) -> Answer<'_, Lease> {
        // The file has one process at a time; only the number has to outlive it.
        let (name, holder) = (name.to_owned(), holder.to_owned());
        async move {
            if let Some(fencing_token) = self.inner.leases.renew(&name, &holder, ttl)? {
                return Ok(Lease { fencing_token });
            }
            let asked = name.clone();
            let next = self.blocking(move |inner| inner.lease(&asked)).await?.fencing_token;
            Ok(Lease { fencing_token: self.inner.leases.grant(&name, &holder, ttl, next)? })
        }
        .boxed()
    }

    fn release(&self, name: &str, holder: &str) -> Answer<'_, ()> {
        self.inner.leases.release(name, holder);
        std::future::ready(Ok(())).boxed()
    }
}

/// Makes the tables and the epoch on first use; returns the revision and the epoch.
fn initialise(database: &Database) -> Result<(u64, String), Box<redb::Error>> {
    let run = || -> Result<(u64, String), redb::Error> {
        let tx = database.begin_write()?;
        let found = {
            tx.open_table(ENTRIES)?;
            let mut texts = tx.open_table(TEXTS)?;
            let known = texts.get("epoch")?.map(|value| value.value().to_owned());
            let epoch = match known {
                Some(epoch) => epoch,
                None => {
                    let epoch = uuid::Uuid::now_v7().to_string();
                    texts.insert("epoch", epoch.as_str())?;
                    epoch
                }
            };
            let counters = tx.open_table(COUNTERS)?;
            let revision = counters.get("revision")?.map_or(0, |value| value.value());
            (revision, epoch)
        };
        tx.commit()?;
        Ok(found)
    };
    run().map_err(Box::new)
}

/// Opens a file that only its owner can read, and makes its directory likewise.
pub(crate) fn create_private(path: &Path) -> io::Result<fs::File> {
    if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty() && !d.exists()) {
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.recursive(true).create(directory)?;
    }
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
