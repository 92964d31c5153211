//! Tokens that are bound to one gateway each, from a directory: the name of a file is the gateway's id, its content the
//! token.
//!
//! So an operator can bind every gateway before it starts, and no gateway has a token that could impersonate another one.
//! The directory is read again while the process runs, for new and removed gateways.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::is_gateway_id;
use super::{TOKEN_MIN_CHARS, equal};
use crate::encoding::sha256;

/// The maximum of files in the directory.
const TOKENS_MAX: usize = 4096;
/// The interval between two reads of the directory; mounted secrets of containers change within a minute.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The digest of each gateway's token, by its id.
type Digests = BTreeMap<Arc<str>, [u8; 32]>;

/// The tokens. Cheap to clone.
#[derive(Clone)]
pub(crate) struct GatewayTokens(watch::Sender<Arc<Digests>>);

impl std::fmt::Debug for GatewayTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.borrow().keys()).finish()
    }
}

impl GatewayTokens {
    /// The tokens of a directory; none without a directory.
    pub(crate) fn open(directory: Option<&Path>) -> Result<Self, String> {
        let digests = directory.map(read).transpose()?.unwrap_or_default();
        Ok(Self(watch::Sender::new(Arc::new(digests))))
    }

    /// Reads the directory again until `stop`. If it cannot be read, the last tokens stay valid.
    pub(crate) async fn follow(self, directory: PathBuf, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = stop.cancelled() => return,
            }
            let path = directory.clone();
            let found = tokio::task::spawn_blocking(move || read(&path)).await;
            match found {
                Ok(Ok(digests)) => {
                    self.0.send_if_modified(|known| {
                        let changed = **known != digests;
                        if changed {
                            tracing::info!(gateways = digests.len(), "gateway tokens changed");
                            *known = Arc::new(digests);
                        }
                        changed
                    });
                }
                Ok(Err(error)) => {
                    tracing::warn!(error, "gateway tokens not readable; the last ones stay valid")
                }
                Err(_) => return,
            }
        }
    }

    /// The gateway with this token.
    pub(super) fn holder(&self, digest: &[u8; 32]) -> Option<Arc<str>> {
        let all = self.0.borrow();
        all.iter().find(|(_, known)| equal(digest, known)).map(|(id, _)| Arc::clone(id))
    }

    /// Whether a token is bound to the gateway.
    pub(super) fn has(&self, gateway_id: &str) -> bool {
        self.0.borrow().contains_key(gateway_id)
    }
}

fn read(directory: &Path) -> Result<Digests, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", directory.display());
    let mut digests = Digests::new();
    for entry in std::fs::read_dir(directory).map_err(|e| failed(&e))? {
        let name = entry.map_err(|e| failed(&e))?.file_name();
        // Links of Kubernetes and files of editors start with a dot and are skipped.
        let Some(id) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        let path = directory.join(id);
        if !is_gateway_id(id) {
            return Err(failed(&format_args!("'{}' is not the id of a gateway", id.escape_debug())));
        }
        let token = weir_runtime::read_token(&path)?;
        if token.expose().chars().count() < TOKEN_MIN_CHARS {
            return Err(format!("{}: must be at least {TOKEN_MIN_CHARS} characters", path.display()));
        }
        let digest = sha256(token.expose().as_bytes());
        if digests.values().any(|known| equal(known, &digest)) {
            return Err(format!("{}: another gateway has the same token", path.display()));
        }
        if digests.len() >= TOKENS_MAX {
            return Err(failed(&format_args!("more than {TOKENS_MAX} tokens")));
        }
        digests.insert(id.into(), digest);
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_binds_its_token_to_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        write("gw-1", "0123456789abcdef-1\n");
        write("gw-2", "0123456789abcdef-2\n");
        write(".hidden", "x");
        let tokens = GatewayTokens::open(Some(directory.path())).unwrap();
        let holder = |text: &str| tokens.holder(&sha256(text.as_bytes())).map(|id| id.to_string());
        assert_eq!(holder("0123456789abcdef-1").as_deref(), Some("gw-1"));
        assert_eq!(holder("0123456789abcdef-3"), None);
        assert!(tokens.has("gw-2") && !tokens.has("gw-3"));
        assert!(!format!("{tokens:?}").contains("0123"));
        for (name, text, why) in [
            ("gw-3", "short", "16 characters"),
            ("gw-3", "0123456789abcdef-1", "the same token"),
            ("gw 3", "0123456789abcdef-3", "not the id"),
        ] {
            write(name, text);
            let error = GatewayTokens::open(Some(directory.path())).unwrap_err();
            assert!(error.contains(why), "{error}");
            std::fs::remove_file(directory.path().join(name)).unwrap();
        }
        assert!(GatewayTokens::open(Some(&directory.path().join("nowhere"))).is_err());
    }
}
