//! The credentials of backends. Files are read in the background and never delay the configuration.
//!
//! [`Credentials::of`] returns at once what has been read. Files are read by threads of this module instead of tokio's
//! blocking pool: a file system that hangs blocks its thread for ever, and tokio could not shut down. The number of threads
//! per allowed directory is bounded, a file is never read twice at the same time, and nothing waits longer than
//! `READ_TIMEOUT` for a read. Files are read again every `READ_EVERY`, so a rotated secret is used without a change of the
//! configuration. If the new secret cannot be used, the old one stays in use.

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

/// A read that takes longer counts as hanging.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the acknowledgement of a change waits for new files. The change is in force before.
const SETTLE_MAX: Duration = Duration::from_millis(250);
/// The interval between two reads of a file, after which a rotated secret is used.
const READ_EVERY: Duration = Duration::from_secs(2);
/// The interval of checks for hanging reads.
const TICK: Duration = Duration::from_millis(250);
/// Concurrent reads per directory.
const READERS: usize = 4;
/// Hanging reads per directory; at this number no further read starts there until one of them ends.
const HANGING_MAX: usize = 8;

/// Reads a file of an allowed directory; blocks. Tests replace it by a function that hangs.
type ReadFile = fn(&AllowedDirs, usize, &Path) -> Result<Found, FileError>;

/// The credentials of one gateway.
#[derive(Debug)]
pub struct Credentials {
    policy: Policy,
    read_file: ReadFile,
    state: Mutex<State>,
    /// Counts reads that ended or timed out.
    progress: watch::Sender<u64>,
    /// Counts changes of the answers of [`Credentials::of`].
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    files: HashMap<PathBuf, Entry>,
    /// One per allowed directory.
    directories: Vec<Directory>,
    /// A caller was told that a file is not read yet, or requested another read, since the last [`Credentials::settle`]. The
    /// read may have ended meanwhile.
    asked: bool,
}

/// The reads of one allowed directory.
#[derive(Debug, Default)]
struct Directory {
    queue: VecDeque<PathBuf>,
    readers: usize,
    hanging: usize,
}

/// A credential file that a backend refers to.
#[derive(Debug)]
struct Entry {
    directory: usize,
    below: PathBuf,
    /// The content of the last successful read.
    content: Option<Found>,
    /// Why the newest read failed.
    failure: Option<String>,
    read: Read,
    /// The last read failed, and another one was requested by a change of the configuration.
    again: bool,
    /// An acknowledgement has waited for this file once; no other one waits for it.
    waited: bool,
    /// Whether a backend refers to the file. Without one the entry is removed when its read has ended.
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
    /// Whether the file has no result yet and an acknowledgement may wait for it.
    fn is_unsettled(&self) -> bool {
        self.wanted && !self.waited && self.content.is_none() && (self.again || self.failure.is_none())
    }
}

impl Credentials {
    /// Credentials from these sources. `never` are files and directories of Weir itself, such as its tokens; they are refused
    /// like files outside the allowed directories. An error names the invalid flag.
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

    /// The Authorization header for a backend; `None` without a credential. A new file is queued for reading and not waited
    /// for. An error gives the reason and never contains a secret.
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
            content: None,
            failure: None,
            read: Read::Idle,
            again: false,
            waited: false,
            wanted: true,
        });
        entry.wanted = true;
        let answer = match (&entry.content, &entry.failure) {
            (Some(found), _) if is_for(&found.hosts, url) => Ok(found.secret.clone()),
            (Some(found), _) => Err(format!(
                "credential: file {}: it lies in a directory for {}, which is not the host of this backend's url",
                path.display(),
                found.hosts.join(", ")
            )),
            (None, Some(failure)) => Err(failure.clone()),
            (None, None) => {
                *asked = true;
                Err(format!(
                    "credential: file {}: not read yet; the backend is used once the file is read",
                    path.display()
                ))
            }
        };
        if entry.read == Read::Idle && entry.content.is_none() && entry.failure.is_none() {
            entry.read = Read::Queued;
            directories[directory].queue.push_back(path);
            self.start_readers(&mut state, directory);
        }
        answer
    }

    /// Reads files again whose last read failed, because the operator who changes a backend may have corrected its file.
    pub fn read_again(self: &Arc<Self>) {
        let mut state = self.state();
        let State { files, directories, asked } = &mut *state;
        let failed =
            |entry: &Entry| entry.read == Read::Idle && entry.content.is_none() && entry.failure.is_some();
        for (path, entry) in files.iter_mut().filter(|(_, entry)| failed(entry)) {
            (entry.read, entry.again, entry.waited, *asked) = (Read::Queued, true, false, true);
            directories[entry.directory].queue.push_back(path.clone());
        }
        for directory in 0..state.directories.len() {
            self.start_readers(&mut state, directory);
        }
    }

    /// Removes files that no backend refers to.
    pub fn retain(&self, named: &BTreeSet<PathBuf>) {
        let named: BTreeSet<PathBuf> = named.iter().map(|path| normal(path)).collect();
        let mut state = self.state();
        state.files.retain(|path, entry| {
            entry.wanted = named.contains(path);
            // An entry stays while its file is being read. Otherwise a file that hangs would be read by another thread each
            // time a backend refers to it again.
            entry.wanted || matches!(entry.read, Read::Running(_) | Read::Hanging)
        });
    }

    /// Waits at most 250 ms for the files that were requested since the last call. Returns whether there were any; if so,
    /// [`Credentials::of`] may return something else.
    pub async fn settle(&self) -> bool {
        if !std::mem::take(&mut self.state().asked) {
            return false;
        }
        let mut progress = self.progress.subscribe();
        // A file that is read later is used as soon as it is read.
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

    /// The number of files of backends whose last read failed.
    pub fn unreadable(&self) -> usize {
        self.state().files.values().filter(|entry| entry.wanted && entry.failure.is_some()).count()
    }

    /// Until `shutdown`: reads files again, times out hanging reads, and updates the gauge of unreadable files.
    pub async fn run(self: Arc<Self>, unreadable: Gauge, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next_read = Instant::now() + READ_EVERY;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = shutdown.cancelled() => return,
            }
            let now = Instant::now();
            self.time_out_reads(now);
            unreadable.set(self.unreadable().try_into().unwrap_or(i64::MAX));
            if now >= next_read {
                next_read = now + READ_EVERY;
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

    /// Queues every file that is not being read.
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

    /// Marks reads that took too long as hanging, and starts other reads in their place.
    fn time_out_reads(self: &Arc<Self>, now: Instant) {
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
                differs |= entry.failed(path, &format!("not read within {READ_TIMEOUT:?}"));
            }
            for directory in 0..state.directories.len() {
                self.start_readers(&mut state, directory);
                let State { files, directories, .. } = &mut *state;
                if directories[directory].hanging < HANGING_MAX {
                    continue;
                }
                for path in &directories[directory].queue {
                    if let Some(entry) = files.get_mut(path).filter(|entry| entry.failure.is_none()) {
                        differs |= entry.failed(path, "too many reads in this directory hang");
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
                // The next tick tries again.
                tracing::error!(%error, "thread for credential files not started");
                return;
            }
            of.readers += 1;
            lacking -= 1;
        }
    }

    /// The work of a reader thread: reads queued files until the queue is empty.
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

    /// Records the end of a read. Returns whether it had timed out, in which case another thread has replaced this one.
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
                Err(error) => entry.failed(path, &error.to_string()),
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
    /// Records a successful read. Returns whether the content changed.
    fn found(&mut self, path: &Path, found: Found) -> bool {
        let recovered = self.failure.take().is_some();
        let new = self.content.as_ref() != Some(&found);
        if new && self.content.is_some() {
            tracing::info!(file = %path.display(), "credential rotated; the new one is in use");
        } else if recovered {
            tracing::info!(file = %path.display(), "credential file readable again");
        }
        self.content = Some(found);
        new
    }

    fn failed(&mut self, path: &Path, reason: &str) -> bool {
        self.refused(path, format!("credential: file {}: {reason}", path.display()))
    }

    /// Records a failed read. Returns whether the answers for backends change.
    fn refused(&mut self, path: &Path, failure: String) -> bool {
        let new = self.failure.as_ref() != Some(&failure);
        if new && self.content.is_some() {
            tracing::warn!(file = %path.display(), reason = failure, "credential file not readable; the last credential stays in use");
        }
        let changes = new && self.content.is_none();
        self.failure = Some(failure);
        changes
    }
}
