//! The configuration in force in its encoded form, and its copy on disk.
//!
//! With the copy, a process that restarts without a control plane serves its last configuration. Two generations are kept.
//! Each is written to a temporary file, synced and renamed, and only its owner can read it, because it contains digests of
//! keys. A file starts with a SHA-256 of the rest: a damaged file is refused and the older generation is used.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};
use weir_proto::resource::Resource;
use weir_proto::v1::{self, ResourceKind};

/// The first bytes of the file: its type and the version of its format.
const MAGIC: &[u8; 8] = b"WEIRCFG1";
/// Largest copy that is read back.
const MAX_BYTES: u64 = 256 << 20;

/// Resources by kind and name, each with its version and encoded body.
#[derive(Debug, Clone, Default)]
pub struct ConfigState {
    /// The store epoch; empty without a configuration.
    pub epoch: String,
    /// The applied revision; zero without a configuration.
    pub revision: u64,
    /// The applied resources.
    pub resources: BTreeMap<(i32, String), (String, Bytes)>,
}

/// A refused resource. The rest of the configuration is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The kind of the resource.
    pub kind: ResourceKind,
    /// The name of the resource.
    pub name: String,
    /// The reason.
    pub message: String,
}

/// Why an entire delta was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// The delta is older than the applied revision: a lagging control plane must not take a gateway back.
    #[error("revision {offered} is older than the applied revision {held} of the same store")]
    Backwards {
        /// The revision of the delta.
        offered: u64,
        /// The applied revision.
        held: u64,
    },
    /// The delta removes more than half of a pool's backends, or of all models, tenants or keys for those of another store, and
    /// the operator has not allowed that.
    #[error(
        "it removes {removed} of {had} {what} ({}) without allow_mass_removal; if that is meant: weir apply --allow-mass-removal",
        listed(.names, *.removed)
    )]
    MassRemoval {
        /// What is removed, such as "backends of pool chat" or "API keys".
        what: String,
        /// How many are removed.
        removed: usize,
        /// How many there were.
        had: usize,
        /// The names of the first few that are removed.
        names: Vec<String>,
    },
}

/// Names in an error.
const NAMES_SHOWN: usize = 5;

fn listed(names: &[String], all: usize) -> String {
    let more = all.saturating_sub(names.len());
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{rest}", names.join(", "))
}

impl ConfigState {
    /// The version of every applied resource, for Hello.
    pub fn versions(&self) -> Vec<v1::ResourceVersion> {
        let held = self.resources.iter();
        held.map(|((kind, name), (version, _))| v1::ResourceVersion {
            kind: *kind,
            name: name.clone(),
            version: version.clone(),
        })
        .collect()
    }

    /// The configuration after a delta. With an error nothing changes.
    pub fn after(&self, delta: &v1::Delta) -> Result<Self, DeltaError> {
        if delta.store_epoch == self.epoch && delta.store_revision < self.revision {
            return Err(DeltaError::Backwards { offered: delta.store_revision, held: self.revision });
        }
        let mut next = self.clone();
        for removal in &delta.removals {
            next.resources.remove(&(removal.kind, removal.name.clone()));
        }
        for upsert in &delta.upserts {
            let body = (upsert.version.clone(), upsert.body.clone());
            next.resources.insert((upsert.kind, upsert.name.clone()), body);
        }
        if !delta.allow_mass_removal {
            // Within a store the control plane has checked removals, and a revoked key must go at once. Of another store, or until
            // all of it is held, nothing is known of why something is missing.
            let is_other_store = delta.store_epoch != self.epoch || self.revision == 0;
            self.check_mass_removal(&next, is_other_store)?;
        }
        next.epoch.clone_from(&delta.store_epoch);
        next.revision = delta.store_revision;
        Ok(next)
    }

    /// Restores the refused resources of a delta to their version before it. Returns whether there were any.
    pub fn keep(&mut self, before: &Self, delta: &v1::Delta, refused: &[Refused]) -> bool {
        let mut any = false;
        for upsert in &delta.upserts {
            if !refused.iter().any(|r| r.kind == upsert.kind() && r.name == upsert.name) {
                continue;
            }
            any = true;
            let key = (upsert.kind, upsert.name.clone());
            match before.resources.get(&key) {
                Some(old) => self.resources.insert(key, old.clone()),
                None => self.resources.remove(&key),
            };
        }
        any
    }

    fn check_mass_removal(&self, next: &Self, is_other_store: bool) -> Result<(), DeltaError> {
        let (before, after) = (self.guarded(is_other_store), next.guarded(is_other_store));
        for (what, had) in before {
            let stay = after.get(&what).cloned().unwrap_or_default();
            let gone: Vec<&String> = had.iter().filter(|name| !stay.contains(*name)).collect();
            // The control plane marks removals that it accepted. Without the mark even the only backend of a pool stays.
            let removed = had.len().saturating_sub(stay.len());
            if removed * 2 > had.len() {
                let names = gone.into_iter().take(NAMES_SHOWN).cloned().collect();
                return Err(DeltaError::MassRemoval { what, removed, had: had.len(), names });
            }
        }
        Ok(())
    }

    /// What must not disappear in bulk, by what it is: the names of the backends of each pool, and for another store those of
    /// models, tenants and keys.
    fn guarded(&self, is_other_store: bool) -> BTreeMap<String, BTreeSet<String>> {
        let mut guarded: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for ((kind, name), (_, body)) in &self.resources {
            let what = match ResourceKind::try_from(*kind) {
                Ok(ResourceKind::Backend) => {
                    let spec = v1::Resource::decode(body.clone()).ok().and_then(|r| r.spec);
                    let Some(v1::resource::Spec::Backend(backend)) = spec else { continue };
                    format!("backends of pool {}", backend.pool)
                }
                Ok(ResourceKind::Model) if is_other_store => "models".to_owned(),
                Ok(ResourceKind::Tenant) if is_other_store => "tenants".to_owned(),
                Ok(ResourceKind::ApiKey) if is_other_store => "API keys".to_owned(),
                _ => continue,
            };
            guarded.entry(what).or_default().insert(name.clone());
        }
        guarded
    }

    /// The decoded and validated resources, and the ones that are refused.
    pub fn checked(&self) -> (Vec<Resource>, Vec<Refused>) {
        let (mut good, mut refused) = (Vec::new(), Vec::new());
        for ((kind, name), (_, body)) in &self.resources {
            let checked = v1::Resource::decode(body.clone())
                .map_err(|e| e.to_string())
                .and_then(|wire| Resource::try_from(&wire).map_err(|e| e.to_string()));
            match checked {
                Ok(resource) => good.push(resource),
                Err(message) => {
                    let kind = ResourceKind::try_from(*kind).unwrap_or_default();
                    refused.push(Refused { kind, name: name.clone(), message });
                }
            }
        }
        (good, refused)
    }

    /// The file of a copy.
    #[doc(hidden)]
    pub fn encode(&self) -> Vec<u8> {
        let upserts = self.resources.iter().map(|((kind, name), (version, body))| v1::VersionedResource {
            kind: *kind,
            name: name.clone(),
            version: version.clone(),
            body: body.clone(),
        });
        let delta = v1::Delta {
            store_epoch: self.epoch.clone(),
            store_revision: self.revision,
            upserts: upserts.collect(),
            ..v1::Delta::default()
        };
        let body = delta.encode_to_vec();
        let mut file = Vec::with_capacity(MAGIC.len() + 32 + body.len());
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&Sha256::digest(&body));
        file.extend_from_slice(&body);
        file
    }

    /// Parses a file; the error is the reason if it is damaged.
    #[doc(hidden)]
    pub fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let rest = file.strip_prefix(MAGIC).ok_or("it is not a configuration copy of this version")?;
        let (digest, body) = rest.split_at_checked(32).ok_or("it is cut short")?;
        if Sha256::digest(body).as_slice() != digest {
            return Err("its checksum does not match");
        }
        let delta = v1::Delta::decode(body).map_err(|_| "it cannot be decoded")?;
        Self::default().after(&delta).map_err(|_| "it contradicts itself")
    }
}

/// The directory of the copies.
#[derive(Debug, Clone)]
pub struct Disk {
    directory: PathBuf,
}

impl Disk {
    /// Keeps copies in this directory, which is created if missing.
    pub fn new(directory: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    fn newest(&self) -> PathBuf {
        self.directory.join("config.current")
    }

    fn previous(&self) -> PathBuf {
        self.directory.join("config.previous")
    }

    /// Writes a copy durably; blocks. The last copy becomes the older generation.
    pub fn save(&self, held: &ConfigState) -> std::io::Result<()> {
        let temporary = self.directory.join("config.writing");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(&held.encode())?;
        file.sync_all()?;
        match std::fs::rename(self.newest(), self.previous()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => std::fs::rename(&temporary, self.newest())?,
        }
        std::fs::File::open(&self.directory)?.sync_all()
    }

    /// The newest valid copy; `None` without one. Blocks.
    pub fn load(&self) -> Option<ConfigState> {
        [self.newest(), self.previous()].into_iter().find_map(|path| match load(&path) {
            Ok(held) => held,
            Err(reason) => {
                tracing::error!(path = %path.display(), reason, "configuration copy refused");
                None
            }
        })
    }
}

fn load(path: &Path) -> Result<Option<ConfigState>, String> {
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
        Ok(m) if m.len() > MAX_BYTES => return Err(format!("it is larger than {MAX_BYTES} bytes")),
        Ok(_) => {}
    }
    let file = std::fs::read(path).map_err(|e| e.to_string())?;
    ConfigState::decode(&file).map(Some).map_err(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(name: &str, revision: u64) -> v1::VersionedResource {
        let spec = v1::BackendSpec { pool: "chat".into(), url: "http://h".into(), ..Default::default() };
        let body = v1::Resource {
            name: name.into(),
            spec: Some(v1::resource::Spec::Backend(spec)),
            ..Default::default()
        };
        v1::VersionedResource {
            kind: ResourceKind::Backend as i32,
            name: name.into(),
            version: revision.to_string(),
            body: body.encode_to_vec().into(),
        }
    }

    fn held(names: &[&str], revision: u64) -> ConfigState {
        let upserts = names.iter().map(|n| backend(n, revision)).collect();
        let delta =
            v1::Delta { store_epoch: "e".into(), store_revision: revision, upserts, ..Default::default() };
        ConfigState::default().after(&delta).expect("applies")
    }

    #[test]
    fn a_lagging_control_plane_cannot_take_a_gateway_back() {
        let delta = v1::Delta { store_epoch: "e".into(), store_revision: 4, ..Default::default() };
        let error = held(&["a"], 5).after(&delta).expect_err("refused");
        assert_eq!(error, DeltaError::Backwards { offered: 4, held: 5 });
    }

    #[test]
    fn losing_most_of_a_pool_takes_the_operators_word() {
        let held = held(&["a", "b", "c", "d"], 5);
        let removals = ["a", "b", "c"]
            .map(|n| v1::ResourceRef { kind: ResourceKind::Backend as i32, name: n.into() })
            .to_vec();
        let mut delta =
            v1::Delta { store_epoch: "e".into(), store_revision: 6, removals, ..Default::default() };
        assert!(matches!(held.after(&delta), Err(DeltaError::MassRemoval { removed: 3, had: 4, .. })));
        delta.allow_mass_removal = true;
        assert_eq!(held.after(&delta).expect("meant").resources.len(), 1);
    }

    #[test]
    fn an_empty_store_of_another_epoch_takes_nothing_away_not_even_the_only_backend() {
        for names in [&["a", "b", "c"][..], &["a", "b"], &["a"]] {
            let removal =
                |n: &&str| v1::ResourceRef { kind: ResourceKind::Backend as i32, name: (*n).into() };
            let removals = names.iter().map(removal).collect();
            let delta =
                v1::Delta { store_epoch: "other".into(), store_revision: 1, removals, ..Default::default() };
            assert!(held(names, 5).after(&delta).is_err(), "{names:?}");
        }
    }

    #[test]
    fn another_store_takes_no_keys_tenants_or_models_in_bulk_and_the_own_one_does() {
        let of = |kind: ResourceKind, name: &str| v1::VersionedResource {
            kind: kind as i32,
            name: name.into(),
            version: "1".into(),
            body: Bytes::new(),
        };
        for kind in [ResourceKind::ApiKey, ResourceKind::Tenant, ResourceKind::Model] {
            let upserts = ["a", "b", "c"].map(|name| of(kind, name)).to_vec();
            let first =
                v1::Delta { store_epoch: "e".into(), store_revision: 1, upserts, ..Default::default() };
            let held = ConfigState::default().after(&first).expect("applies");
            let removals = |names: &[&str]| {
                names.iter().map(|name| v1::ResourceRef { kind: kind as i32, name: (*name).into() }).collect()
            };
            let delta = |epoch: &str, names: &[&str]| v1::Delta {
                store_epoch: epoch.into(),
                store_revision: 2,
                removals: removals(names),
                ..Default::default()
            };
            let error = held.after(&delta("other", &["a", "b"])).expect_err("nobody has said so").to_string();
            assert!(error.contains("2 of 3 ") && error.contains("(a, b)"), "{error}");
            held.after(&delta("other", &["a"])).expect("a few may go");
            held.after(&v1::Delta { allow_mass_removal: true, ..delta("other", &["a", "b", "c"]) })
                .expect("meant");
            held.after(&delta("e", &["a", "b", "c"])).expect("revoked is revoked");
        }
    }

    #[test]
    fn of_a_refused_change_the_version_held_stays_and_a_refused_new_one_is_not_held() {
        let before = held(&["a", "b"], 5);
        let upserts = vec![backend("a", 6), backend("new", 6), backend("b", 6)];
        let delta = v1::Delta { store_epoch: "e".into(), store_revision: 6, upserts, ..Default::default() };
        let mut next = before.after(&delta).expect("applies");
        let refused =
            |name: &str| Refused { kind: ResourceKind::Backend, name: name.into(), message: "no".into() };
        assert!(!next.keep(&before, &delta, &[refused("other")]));
        assert!(next.keep(&before, &delta, &[refused("a"), refused("new")]));
        let versions: Vec<_> = next.versions().into_iter().map(|h| (h.name, h.version)).collect();
        assert_eq!(versions, [("a".to_owned(), "5".to_owned()), ("b".to_owned(), "6".to_owned())]);
    }

    #[test]
    fn a_copy_cut_or_flipped_at_any_byte_gives_the_previous_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let disk = Disk::new(directory.path()).expect("made");
        disk.save(&held(&["a"], 1)).expect("saved");
        disk.save(&held(&["a", "b"], 2)).expect("saved");
        assert_eq!(disk.load().expect("whole").revision, 2);
        let whole = std::fs::read(disk.newest()).expect("read");
        for at in 0..whole.len() {
            std::fs::write(disk.newest(), &whole[..at]).expect("cut");
            assert_eq!(disk.load().expect("previous").revision, 1, "cut at {at}");
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            std::fs::write(disk.newest(), &flipped).expect("flipped");
            assert_eq!(disk.load().expect("previous").revision, 1, "flipped at {at}");
        }
    }

    #[test]
    fn the_copy_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("a directory");
        let disk = Disk::new(directory.path()).expect("made");
        disk.save(&held(&["a"], 1)).expect("saved");
        let mode = std::fs::metadata(disk.newest()).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
