//! The credentials of backends, read beside the configuration and never in its way.
//!
//! [`Credentials::of`] answers at once with what is known. A file that is new is read by a thread of this module, not by
//! tokio's: a file system that hangs keeps its thread for ever, and would keep tokio from ending too. Threads are few
//! per allowed directory, one file is never read twice at once, and a read that takes longer than `READ_TIMEOUT` is
//! given up by all who wait for it. Files are read again every `READ_EVERY`, so a secret that was exchanged is in use
//! without a change of the configuration; while the new one cannot be used the old one stays.

mod file;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderValue, Uri};
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use weir_proto::resource::{Backend, CredentialRef};

use self::file::{AllowedDirs, FileError, Found};
pub use self::policy::CredentialSources;
use self::policy::{Policy, is_for, normal};

/// A read that takes longer is taken for one that hangs.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the answer to a change waits for files that are new. The change itself is in force before.
const SETTLE_MAX: Duration = Duration::from_millis(250);
/// Between two reads of a file: how soon a secret that was exchanged is used.
const READ_EVERY: Duration = Duration::from_secs(2);
/// How often reads that hang are looked for.
const TICK: Duration = Duration::from_millis(250);
/// Files of one directory that are read at once.
const READERS: usize = 4;
/// Reads of one directory that may hang; then none is begun there until one of them ends.
const HANGING_MAX: usize = 8;

/// Reads a file of an allowed directory, and blocks; tests bring one that hangs.
type ReadFile = fn(&AllowedDirs, usize, &Path) -> Result<Found, FileError>;

/// The credentials of one gateway.
#[derive(Debug)]
pub struct Credentials {
    policy: Policy,
    read_file: ReadFile,
    state: Mutex<State>,
    /// Counts reads that ended or were given up.
    progress: watch::Sender<u64>,
    /// Counts what [`Credentials::of`] would answer differently.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<PathBuf, Entry>,
    /// One per allowed directory.
    directories: Vec<Directory>,
    /// Somebody was told that a file is not read yet, or had one read again. The read may have ended meanwhile.
    asked: bool,
}

/// The reads of one allowed directory.
#[derive(Debug, Default)]
struct Directory {
    queue: VecDeque<PathBuf>,
    readers: usize,
    hanging: usize,
}

/// A file that a backend names.
#[derive(Debug)]
struct Entry {
    directory: usize,
    below: PathBuf,
    /// What was read last that could be used.
    good: Option<Found>,
    /// Why the newest read was of no use.
    trouble: Option<String>,
    read: Read,
    /// It was of no use, and is read once more since it was named once more.
    again: bool,
    /// The answer to a change has waited for it once; no other one does.
    waited: bool,
    /// False when no backend names it any more; it goes when its read has ended.
    wanted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    Idle,
    Queued,
    Running(Instant),
    Hanging,
}

impl std::fmt::Debug for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

impl Entry {
    /// Whether nothing is known of it yet, and somebody may wait for that.
    fn is_unsettled(&self) -> bool {
        self.wanted && !self.waited && self.good.is_none() && (self.again || self.trouble.is_none())
    }
}

impl Credentials {
    /// Credentials from these sources; the error names the flag that is wrong. `never` are files and directories of Weir
    /// itself, such as its tokens: they are refused like any file outside.
    pub fn new(sources: &CredentialSources, never: Vec<PathBuf>) -> Result<Arc<Self>, String> {
        Self::reading(sources, never, file::read)
    }

    fn reading(
        sources: &CredentialSources,
        never: Vec<PathBuf>,
        read_file: ReadFile,
    ) -> Result<Arc<Self>, String> {
        let policy = Policy::new(sources, never)?;
        let directories = policy.dirs.allowed.iter().map(|_| Directory::default()).collect();
        let state = Mutex::new(State { files: HashMap::new(), directories, asked: false });
        let (progress, changes) = (watch::Sender::new(0), watch::Sender::new(0));
        Ok(Arc::new(Self { policy, read_file, state, progress, changes }))
    }

    /// The Authorization header for a backend, as far as it is known: a file that is new is asked for and not waited for.
    /// The error says why there is none; it never holds a secret.
    pub fn of(self: &Arc<Self>, backend: &Backend) -> Result<Option<HeaderValue>, String> {
        let Some(reference) = &backend.credential else { return Ok(None) };
        let secret = match reference {
            CredentialRef::Env(name) => self.policy.variable(name, |name| std::env::var_os(name))?,
            CredentialRef::File(path) => self.file(reference, Path::new(path), &backend.url)?,
        };
        let value = HeaderValue::try_from(format!("Bearer {secret}"));
        let mut value = value.map_err(|_| "credential: is not a valid header value".to_owned())?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn file(self: &Arc<Self>, reference: &CredentialRef, path: &Path, url: &Uri) -> Result<String, String> {
        if let Some(objection) = reference.objection() {
            return Err(format!("credential: {objection}"));
        }
        let path = normal(path);
        let Some((directory, below)) = self.policy.dirs.locate(&path) else {
            return Err(self.policy.outside());
        };
        let mut state = self.state();
        let State { files, directories, asked } = &mut *state;
        let entry = files.entry(path.clone()).or_insert_with(|| Entry {
            directory,
            below: below.to_owned(),
            good: None,
            trouble: None,
            read: Read::Idle,
            again: false,
            waited: false,
            wanted: true,
        });
        entry.wanted = true;
        let answer = match (&entry.good, &entry.trouble) {
            (Some(found), _) if is_for(&found.hosts, url) => Ok(found.secret.clone()),
            (Some(found), _) => Err(format!(
                "credential: file {}: it lies in a directory for {}, which is not the host of this backend's url",
                path.display(),
                found.hosts.join(", ")
            )),
            (None, Some(trouble)) => Err(trouble.clone()),
            (None, None) => {
                *asked = true;
                Err(format!("credential: file {}: not read yet; it is used once it is", path.display()))
            }
        };
        if entry.read == Read::Idle && entry.good.is_none() && entry.trouble.is_none() {
            entry.read = Read::Queued;
            directories[directory].queue.push_back(path);
            self.start_readers(&mut state, directory);
        }
        answer
    }

    /// Has files read at once that were of no use: somebody may have put one right, and declares a backend now.
    pub fn read_again(self: &Arc<Self>) {
        let mut state = self.state();
        let State { files, directories, asked } = &mut *state;
        let useless =
            |entry: &Entry| entry.read == Read::Idle && entry.good.is_none() && entry.trouble.is_some();
        for (path, entry) in files.iter_mut().filter(|(_, entry)| useless(entry)) {
            (entry.read, entry.again, entry.waited, *asked) = (Read::Queued, true, false, true);
            directories[entry.directory].queue.push_back(path.clone());
        }
        for directory in 0..state.directories.len() {
            self.start_readers(&mut state, directory);
        }
    }

    /// Forgets files that no backend names any more.
    pub fn retain(&self, named: &BTreeSet<PathBuf>) {
        let named: BTreeSet<PathBuf> = named.iter().map(|path| normal(path)).collect();
        let mut state = self.state();
        state.files.retain(|path, entry| {
            entry.wanted = named.contains(path);
            // One that is being read stays until that ends: else a file that hangs would be read once more each time
            // somebody names it again.
            entry.wanted || matches!(entry.read, Read::Running(_) | Read::Hanging)
        });
    }

    /// Waits a moment for the files that were asked for since the last call. Returns whether there were any: then
    /// [`Credentials::of`] may have another answer.
    pub async fn settle(&self) -> bool {
        if !std::mem::take(&mut self.state().asked) {
            return false;
        }
        let mut progress = self.progress.subscribe();
        // What is still not there by then is used when it comes.
        let _ = tokio::time::timeout(SETTLE_MAX, progress.wait_for(|_| !self.is_unsettled())).await;
        for entry in self.state().files.values_mut() {
            entry.waited = true;
        }
        true
    }

    /// Counts changes of what [`Credentials::of`] answers.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// How many files that are in use or wanted could not be read last.
    pub fn unreadable(&self) -> usize {
        self.state().files.values().filter(|entry| entry.wanted && entry.trouble.is_some()).count()
    }

    /// Reads files again, gives up reads that hang, and keeps the gauge of unreadable files true, until `shutdown`.
    pub async fn run(self: Arc<Self>, unreadable: Gauge, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next_look = Instant::now() + READ_EVERY;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let now = Instant::now();
            self.give_up(now);
            unreadable.set(self.unreadable().try_into().unwrap_or(i64::MAX));
            if now >= next_look {
                next_look = now + READ_EVERY;
                self.read_due();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_unsettled(&self) -> bool {
        self.state().files.values().any(Entry::is_unsettled)
    }

    /// Has every file read again that is not being read.
    fn read_due(self: &Arc<Self>) {
        let mut state = self.state();
        let State { files, directories, .. } = &mut *state;
        for (path, entry) in files.iter_mut().filter(|(_, entry)| entry.read == Read::Idle) {
            entry.read = Read::Queued;
            directories[entry.directory].queue.push_back(path.clone());
        }
        for directory in 0..state.directories.len() {
            self.start_readers(&mut state, directory);
        }
    }

    /// Gives up reads that have taken too long; others begin in their place.
    fn give_up(self: &Arc<Self>, now: Instant) {
        let mut differs = false;
        {
            let mut state = self.state();
            let State { files, directories, .. } = &mut *state;
            for (path, entry) in files.iter_mut() {
                if !matches!(entry.read, Read::Running(since) if now >= since + READ_TIMEOUT) {
                    continue;
                }
                entry.read = Read::Hanging;
                directories[entry.directory].readers -= 1;
                directories[entry.directory].hanging += 1;
                differs |= entry.trouble(path, &format!("it was not read within {READ_TIMEOUT:?}"));
            }
            for directory in 0..state.directories.len() {
                self.start_readers(&mut state, directory);
                let State { files, directories, .. } = &mut *state;
                if directories[directory].hanging < HANGING_MAX {
                    continue;
                }
                for path in &directories[directory].queue {
                    if let Some(entry) = files.get_mut(path).filter(|entry| entry.trouble.is_none()) {
                        differs |= entry.trouble(path, "too many reads in its directory hang");
                    }
                }
            }
        }
        self.tell(differs);
    }

    fn start_readers(self: &Arc<Self>, state: &mut State, directory: usize) {
        let of = &mut state.directories[directory];
        let mut lacking = of.queue.len();
        while lacking > 0 && of.readers < READERS && of.hanging < HANGING_MAX {
            let credentials = Arc::clone(self);
            let thread = std::thread::Builder::new().name("credentials".into());
            if let Err(error) = thread.spawn(move || credentials.read_queued(directory)) {
                // Tried again with the next tick.
                tracing::error!(%error, "no thread to read credentials");
                return;
            }
            of.readers += 1;
            lacking -= 1;
        }
    }

    /// What a reading thread does: reads what is queued, and ends.
    fn read_queued(&self, directory: usize) {
        loop {
            let (path, below) = {
                let mut state = self.state();
                let State { files, directories, .. } = &mut *state;
                let Some(path) = directories[directory].queue.pop_front() else {
                    directories[directory].readers -= 1;
                    return;
                };
                // Forgotten while it waited, or forgotten and named again and with another thread by now.
                let Some(entry) = files.get_mut(&path).filter(|entry| entry.read == Read::Queued) else {
                    continue;
                };
                entry.read = Read::Running(Instant::now());
                (path, entry.below.clone())
            };
            let read = (self.read_file)(&self.policy.dirs, directory, &below);
            if self.ended(&path, directory, read) {
                return;
            }
        }
    }

    /// A read ended. Returns whether it had been given up: then another thread has the place of this one.
    fn ended(&self, path: &Path, directory: usize, read: Result<Found, FileError>) -> bool {
        let (late, differs) = {
            let mut state = self.state();
            let State { files, directories, .. } = &mut *state;
            let Some(entry) = files.get_mut(path) else { return false };
            let late = entry.read == Read::Hanging;
            (entry.read, entry.again) = (Read::Idle, false);
            if late {
                directories[directory].hanging -= 1;
            }
            let differs = match read {
                Ok(found) => entry.found(path, found),
                Err(FileError::Outside) => {
                    let outside = self.policy.outside();
                    entry.refused(path, outside)
                }
                Err(error) => entry.trouble(path, &error.to_string()),
            };
            if !entry.wanted {
                files.remove(path);
            }
            (late, differs)
        };
        self.tell(differs);
        late
    }

    fn tell(&self, differs: bool) {
        self.progress.send_modify(|count| *count += 1);
        if differs {
            self.changes.send_modify(|count| *count += 1);
        }
    }
}

impl Entry {
    /// Takes over what was read. Returns whether that is new.
    fn found(&mut self, path: &Path, found: Found) -> bool {
        let recovered = self.trouble.take().is_some();
        let new = self.good.as_ref() != Some(&found);
        if new && self.good.is_some() {
            tracing::info!(file = %path.display(), "a credential was exchanged; the new one is in use");
        } else if recovered {
            tracing::info!(file = %path.display(), "a credential can be read again");
        }
        self.good = Some(found);
        new
    }

    fn trouble(&mut self, path: &Path, reason: &str) -> bool {
        self.refused(path, format!("credential: file {}: {reason}", path.display()))
    }

    /// Takes over why it cannot be used. Returns whether that changes anything for backends.
    fn refused(&mut self, path: &Path, trouble: String) -> bool {
        let new = self.trouble.as_ref() != Some(&trouble);
        if new && self.good.is_some() {
            tracing::warn!(file = %path.display(), reason = trouble, "a credential cannot be read; the last one stays");
        }
        let changes = new && self.good.is_none();
        self.trouble = Some(trouble);
        changes
    }
}
