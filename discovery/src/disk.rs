//! The copy of the configuration on disk, with which a process that restarts without a control plane serves its last
//! configuration.
//!
//! A copy is a base file with the whole configuration and a log of the changes since. A change is appended to the log, so that it
//! costs what it changes. When the log has grown as large as its base, a new base is written to a temporary file, synced and
//! renamed, and starts a log of its own; the last base and its log remain as the older generation. Only their owner can read the
//! files, because they contain digests of keys.
//!
//! A base starts with a SHA-256 of the rest: a damaged one is refused and the older generation is used. Every record of a log has
//! a SHA-256 over itself and the one before, the first over that of the base: a log is read up to the first record that is not
//! whole, so that a crash at any byte leaves the configuration before or after the change.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use weir_proto::v1;

use crate::config_state::ConfigState;

/// The first bytes of a base: its type and the version of its format.
const MAGIC: &[u8; 8] = b"WEIRCFG1";
/// The first bytes of a log.
const LOG_MAGIC: &[u8; 8] = b"WEIRLOG1";
const DIGEST_BYTES: usize = 32;
/// Largest base and largest log that are read back.
const MAX_BYTES: u64 = 2 << 30;
/// A log may become as large as its base, and this large beside a small one.
const LOG_MIN_BYTES: u64 = 1 << 20;

type Chain = [u8; DIGEST_BYTES];

/// The directory of the copies. Its clones share what they know of the files.
#[derive(Debug, Clone)]
pub struct Disk {
    directory: PathBuf,
    /// What the files hold; `None` until they are read or written.
    written: Arc<Mutex<Option<Written>>>,
}

/// What the newest base and its log hold.
#[derive(Debug)]
struct Written {
    config: ConfigState,
    /// The digest of the base, by which its log is named.
    base: Chain,
    base_bytes: u64,
    /// The digest of the last record, or of the base.
    last: Chain,
    /// The bytes of the log up to the end of the last record; zero without a log.
    log_bytes: u64,
}

impl Disk {
    /// Keeps copies in this directory, which is created if missing.
    pub fn new(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self { directory: directory.to_owned(), written: Arc::default() })
    }

    fn newest(&self) -> PathBuf {
        self.directory.join("config.current")
    }

    fn previous(&self) -> PathBuf {
        self.directory.join("config.previous")
    }

    fn log(&self, base: &Chain) -> PathBuf {
        self.directory.join(log_name(base))
    }

    /// Writes a copy durably; blocks.
    pub fn save(&self, held: &ConfigState) -> std::io::Result<()> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        // After an error nothing is known of the files, and a new base is written.
        let appended = match written.take() {
            Some(known) if known.has_room() => self.append(known, held).map_err(|error| {
                tracing::warn!(%error, "change not appended to the configuration copy; the copy is written anew");
            }),
            _ => Err(()),
        };
        *written = Some(match appended {
            Ok(known) => known,
            Err(()) => self.replace(held)?,
        });
        Ok(())
    }

    /// Appends what differs from what is written.
    fn append(&self, mut known: Written, held: &ConfigState) -> std::io::Result<Written> {
        let delta = difference(&known.config, held);
        let body = delta.encode_to_vec();
        let digest = chained(&known.last, &body);
        let path = self.log(&known.base);
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        let mut record = Vec::with_capacity(LOG_MAGIC.len() + 4 + DIGEST_BYTES + body.len());
        if known.log_bytes == 0 {
            record.extend_from_slice(LOG_MAGIC);
        }
        let length = u32::try_from(body.len()).map_err(std::io::Error::other)?;
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&digest);
        record.extend_from_slice(&body);
        // What a crash left behind the last whole record is cut off.
        file.set_len(known.log_bytes)?;
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(known.log_bytes))?;
        file.write_all(&record)?;
        file.sync_all()?;
        if known.log_bytes == 0 {
            File::open(&self.directory)?.sync_all()?;
        }
        known.log_bytes += record.len() as u64;
        known.last = digest;
        known.config = held.clone();
        Ok(known)
    }

    /// Writes a new base. The last one becomes the older generation.
    fn replace(&self, held: &ConfigState) -> std::io::Result<Written> {
        let temporary = self.directory.join("config.writing");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        let bytes = held.encode();
        let base = digest_of(&bytes);
        // A log of this name would be of an equal base, so what is in it is older.
        match std::fs::remove_file(self.log(&base)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        file.write_all(&bytes)?;
        file.sync_all()?;
        match std::fs::rename(self.newest(), self.previous()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => std::fs::rename(&temporary, self.newest())?,
        }
        File::open(&self.directory)?.sync_all()?;
        self.remove_old_logs(&base);
        Ok(Written { config: held.clone(), base, base_bytes: bytes.len() as u64, last: base, log_bytes: 0 })
    }

    /// Removes the logs of bases that are gone. One that stays is only a waste of room.
    fn remove_old_logs(&self, newest: &Chain) {
        let previous = base_digest(&self.previous());
        let kept = [Some(log_name(newest)), previous.map(|base| log_name(&base))];
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("config.") && name.ends_with(".log") && !kept.contains(&Some(name)) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// The newest valid copy; `None` without one. Blocks.
    pub fn load(&self) -> Option<ConfigState> {
        let newest = self.newest();
        let found = [newest.clone(), self.previous()].into_iter().find_map(|path| match self.read(&path) {
            Ok(found) => found.map(|found| (path, found)),
            Err(reason) => {
                tracing::error!(path = %path.display(), reason, "configuration copy refused");
                None
            }
        });
        let (path, found) = found?;
        let config = found.config.clone();
        // Where the newest base cannot be used, the next change writes another one.
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = (path == newest).then_some(found);
        Some(config)
    }

    /// A base and what its log adds.
    fn read(&self, path: &Path) -> Result<Option<Written>, String> {
        let Some(bytes) = read_bounded(path)? else { return Ok(None) };
        let config = ConfigState::decode(&bytes)?;
        let base = digest_of(&bytes);
        let mut written = Written { config, base, base_bytes: bytes.len() as u64, last: base, log_bytes: 0 };
        drop(bytes);
        if let Some(log) = read_bounded(&self.log(&base))? {
            written.replay(&log);
        }
        Ok(Some(written))
    }
}

impl Written {
    fn has_room(&self) -> bool {
        self.log_bytes < self.base_bytes.max(LOG_MIN_BYTES)
    }

    /// Applies the whole records of a log.
    fn replay(&mut self, log: &[u8]) {
        let Some(mut rest) = log.strip_prefix(LOG_MAGIC) else { return };
        while let Some((digest, body, after)) = record(rest) {
            if chained(&self.last, body) != digest {
                return;
            }
            let Ok(delta) = v1::Delta::decode(body) else { return };
            let Ok(next) = self.config.after(&delta) else { return };
            self.config = next;
            self.last = digest;
            rest = after;
            self.log_bytes = (log.len() - rest.len()) as u64;
        }
    }
}

/// Digest and body of the first record, and what follows it.
fn record(log: &[u8]) -> Option<(Chain, &[u8], &[u8])> {
    let (length, rest) = log.split_first_chunk::<4>()?;
    let (digest, rest) = rest.split_first_chunk::<DIGEST_BYTES>()?;
    let (body, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    Some((*digest, body, rest))
}

fn chained(last: &Chain, body: &[u8]) -> Chain {
    Sha256::new().chain_update(last).chain_update(body).finalize().into()
}

fn log_name(base: &Chain) -> String {
    let hex: String = base.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("config.{hex}.log")
}

/// The digest that a base file starts with.
fn digest_of(file: &[u8]) -> Chain {
    let digest = file.get(MAGIC.len()..MAGIC.len() + DIGEST_BYTES);
    digest.and_then(|digest| digest.try_into().ok()).unwrap_or_default()
}

fn base_digest(path: &Path) -> Option<Chain> {
    let mut start = [0; MAGIC.len() + DIGEST_BYTES];
    File::open(path).ok()?.read_exact(&mut start).ok()?;
    Some(digest_of(&start))
}

fn read_bounded(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
        Ok(m) if m.len() > MAX_BYTES => return Err(format!("it is larger than {MAX_BYTES} bytes")),
        Ok(_) => {}
    }
    std::fs::read(path).map(Some).map_err(|e| e.to_string())
}

/// The delta from one configuration to another one. What it removes was accepted before.
fn difference(from: &ConfigState, to: &ConfigState) -> v1::Delta {
    let mut delta = v1::Delta {
        store_epoch: to.epoch.clone(),
        store_revision: to.revision,
        allow_mass_removal: true,
        ..v1::Delta::default()
    };
    for ((kind, name), old, new) in from.resources.changes(&to.resources) {
        match new {
            None => delta.removals.push(v1::ResourceRef { kind: *kind, name: name.to_string() }),
            Some(new) if old == Some(new) => {}
            Some(new) => delta.upserts.push(v1::VersionedResource {
                kind: *kind,
                name: name.to_string(),
                version: new.version().to_owned(),
                body: bytes::Bytes::copy_from_slice(new.body()),
            }),
        }
    }
    delta
}

impl ConfigState {
    /// The file of a base.
    #[doc(hidden)]
    pub fn encode(&self) -> Vec<u8> {
        let body = difference(&Self::default(), self);
        let body = v1::Delta { allow_mass_removal: false, ..body }.encode_to_vec();
        let mut file = Vec::with_capacity(MAGIC.len() + DIGEST_BYTES + body.len());
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&Sha256::digest(&body));
        file.extend_from_slice(&body);
        file
    }

    /// Parses a base file; the error is the reason if it is damaged.
    #[doc(hidden)]
    pub fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let rest = file.strip_prefix(MAGIC).ok_or("it is not a configuration copy of this version")?;
        let (digest, body) = rest.split_at_checked(DIGEST_BYTES).ok_or("it is cut short")?;
        if Sha256::digest(body).as_slice() != digest {
            return Err("its checksum does not match");
        }
        let delta = v1::Delta::decode(body).map_err(|_| "it cannot be decoded")?;
        Self::default().after(&delta).map_err(|_| "it contradicts itself")
    }
}

#[cfg(test)]
mod tests;
