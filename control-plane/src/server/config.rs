//! The settings of a control plane, and their validation before anything is opened.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use weir_proto::v1;
use weir_runtime::{AllowedHost, Cidr, Secret, exit};

use crate::auth::TOKEN_MIN_CHARS;
use crate::encoding::base64url;
use crate::store::{self, EtcdConfig};
use crate::tls::TlsConfig;

/// The kind of store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// Nowhere: they go with the process.
    Memory,
    /// In one file; its directory is the data directory.
    File(PathBuf),
    /// In etcd, shared with other control planes.
    Etcd {
        /// Where.
        etcd: EtcdConfig,
        /// What this process keeps for itself.
        data_dir: PathBuf,
    },
}

impl StoreConfig {
    /// A file beside the store; none where nothing is kept.
    pub(super) fn beside(&self, name: &str) -> Option<PathBuf> {
        match self {
            Self::Memory => None,
            Self::File(path) => Some(path.with_file_name(name)),
            Self::Etcd { data_dir, .. } => Some(data_dir.join(name)),
        }
    }
}

/// The settings of a control plane.
#[derive(Debug)]
pub struct Config {
    /// Where the gRPC services listen: 127.0.0.1:7070.
    pub listen: SocketAddr,
    /// Where the live page and the operations pages listen: 127.0.0.1:7080.
    pub http_listen: SocketAddr,
    /// Names under which that may be asked for, besides addresses and names that no public site can have.
    pub ops_allowed_hosts: Vec<AllowedHost>,
    /// Where resources are kept.
    pub store: StoreConfig,
    /// Put into a store that has never held anything.
    pub bootstrap: Vec<v1::Resource>,
    /// Opens everything. `None`, on loopback only: one is made, and kept as `admin.token` beside a file store.
    pub admin_token: Option<Secret>,
    /// Opens discovery and reports. `None`: gateways use the admin token.
    pub gateway_token: Option<Secret>,
    /// Tokens of single gateways: each file of this directory is named by a gateway's id and holds its token. Such an id
    /// is nobody else's. Read again while the process runs.
    pub gateway_tokens: Option<PathBuf>,
    /// Serve gRPC over TLS. `None`: in plain, for loopback or behind something that does TLS.
    pub tls: Option<TlsConfig>,
    /// Networks that backends may be in, to be probed there, although such addresses are refused. None.
    pub allow_backend_cidr: Vec<Cidr>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 7070).into(),
            http_listen: (Ipv4Addr::LOCALHOST, 7080).into(),
            ops_allowed_hosts: Vec::new(),
            store: StoreConfig::Memory,
            bootstrap: Vec::new(),
            admin_token: None,
            gateway_token: None,
            gateway_tokens: None,
            tls: None,
            allow_backend_cidr: Vec::new(),
        }
    }
}

/// Why the control plane does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is bad; the text names the key.
    #[error("{0}")]
    Config(String),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// An address cannot be listened on.
    #[error("{name}: cannot listen on {addr}: {reason}; choose another address or stop what uses it")]
    Bind {
        /// The setting.
        name: &'static str,
        /// The address.
        addr: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// It stopped working.
    #[error("{0}")]
    Failed(String),
}

impl Error {
    pub(super) fn bind(name: &'static str, addr: SocketAddr) -> impl FnOnce(std::io::Error) -> Self {
        move |e| Self::Bind { name, addr, reason: e.to_string() }
    }

    /// The exit code of a process that ends with this error.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Store(store::Error::Open { .. } | store::Error::Restore { .. }) => {
                exit::CONFIG
            }
            Self::Bind { .. } | Self::Store(store::Error::Locked(_) | store::Error::Away { .. }) => {
                exit::UNAVAILABLE
            }
            Self::Store(_) | Self::Failed(_) => exit::FAILED,
        }
    }
}

impl Config {
    /// Refuses what is unsafe, and returns the admin token.
    pub(super) fn check(&self) -> Result<Secret, Error> {
        for (name, token) in [("admin-token", &self.admin_token), ("gateway-token", &self.gateway_token)] {
            if token.as_ref().is_some_and(|token| token.expose().chars().count() < TOKEN_MIN_CHARS) {
                return Err(Error::Config(format!("{name}: must be at least {TOKEN_MIN_CHARS} characters")));
            }
        }
        if let Some(token) = &self.admin_token {
            return Ok(Secret::new(token.expose().to_owned()));
        }
        for (name, addr) in [("listen", self.listen), ("http-listen", self.http_listen)] {
            if !addr.ip().is_loopback() {
                let message = format!("{name}: {addr} is not loopback, so admin-token must be set");
                return Err(Error::Config(message));
            }
        }
        match &self.store {
            StoreConfig::Etcd { .. } => Err(Error::Config(
                "admin-token: must be set where the store is etcd: every control plane needs the same one"
                    .into(),
            )),
            StoreConfig::Memory => new_token(),
            StoreConfig::File(path) => kept_token(&path.with_file_name("admin.token")),
        }
    }
}

fn new_token() -> Result<Secret, Error> {
    let mut random = [0_u8; 32];
    getrandom::fill(&mut random).map_err(|e| Error::Failed(format!("no randomness: {e}")))?;
    Ok(Secret::new(base64url(&random)))
}

/// The token in a file that only its owner reads; made on first use.
fn kept_token(path: &Path) -> Result<Secret, Error> {
    let failed = |e: std::io::Error| Error::Config(format!("admin token file {}: {e}", path.display()));
    let mut file = store::create_private(path).map_err(failed)?;
    let text = std::io::read_to_string(&file).map_err(failed)?;
    let text = text.trim();
    if text.chars().count() >= TOKEN_MIN_CHARS {
        tracing::info!(path = %path.display(), "the admin token is in this file");
        return Ok(Secret::new(text.to_owned()));
    }
    if !text.is_empty() {
        return Err(failed(std::io::Error::other("its token is too short")));
    }
    let token = new_token()?;
    file.write_all(format!("{}\n", token.expose()).as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    tracing::info!(path = %path.display(), "made an admin token and wrote it to this file");
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Option<Secret> {
        Some(Secret::new(text.into()))
    }

    #[test]
    fn what_is_unsafe_is_refused() {
        let short = Config { gateway_token: secret("short"), ..Config::default() };
        assert_eq!(short.check().unwrap_err().to_string(), "gateway-token: must be at least 16 characters");
        let open = Config { listen: ([0, 0, 0, 0], 7070).into(), ..Config::default() };
        let error = open.check().unwrap_err();
        assert!(error.to_string().contains("admin-token must be set"));
        assert_eq!(error.exit_code(), 64);
        let guarded = Config { admin_token: secret("0123456789abcdef"), ..open };
        assert_eq!(guarded.check().unwrap().expose(), "0123456789abcdef");
        assert!(!format!("{guarded:?}").contains("0123456789"));
    }

    #[test]
    fn a_made_token_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let store = StoreConfig::File(directory.path().join("data/weir.redb"));
        let config = Config { store, ..Config::default() };
        let first = config.check().unwrap();
        assert_eq!(first.expose().len(), 43);
        assert_eq!(config.check().unwrap().expose(), first.expose());
    }
}
