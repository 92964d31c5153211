//! The files of TLS, and the identity in a client certificate.
//!
//! New connections use a renewed certificate. Open connections continue, so that a rotation ends no stream.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use weir_proto::v1::Role;
use weir_runtime::{ServerTls, TlsError};

/// What a client certificate's URI name begins with: `weir://gateway/ID`, or `weir://ROLE/NAME`.
const SCHEME: &str = "weir://";
/// Longest name in a certificate; the same as of a gateway.
const NAME_MAX_BYTES: usize = 63;

/// The files of the control plane's TLS, all PEM; read again when they change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Its certificate, with the chain below the root.
    pub cert: PathBuf,
    /// The key of that.
    pub key: PathBuf,
    /// The CA certificate of client certificates. `None`: clients use tokens only.
    pub client_ca: Option<PathBuf>,
}

impl TlsConfig {
    /// Reads the files and follows them.
    pub(crate) fn open(&self) -> Result<ServerTls, TlsError> {
        ServerTls::open_for(&self.cert, &self.key, self.client_ca.as_deref(), &[b"h2"])
    }
}

/// The identity in a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) role: Role,
    /// Of a gateway its id, else the operator's name.
    pub(crate) name: Arc<str>,
}

/// The identity in a verified client certificate: its first URI name with Weir's scheme.
pub(crate) fn identity(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    parsed.valid_uri_names().find_map(named)
}

pub(crate) fn named(uri: &str) -> Option<Identity> {
    let (role, name) = uri.strip_prefix(SCHEME)?.split_once('/')?;
    let role = match role {
        "viewer" => Role::Viewer,
        "operator" => Role::Operator,
        "editor" => Role::Editor,
        "admin" => Role::Admin,
        "gateway" => Role::Gateway,
        _ => return None,
    };
    // It stands in logs and in the audit log: nothing there may look like something else.
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic());
    let fits = !name.is_empty() && name.len() <= NAME_MAX_BYTES && plain;
    fits.then(|| Identity { role, name: name.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_names_a_role_and_a_holder() {
        let found = named("weir://gateway/gw-1").unwrap();
        assert_eq!((found.role, &*found.name), (Role::Gateway, "gw-1"));
        assert_eq!(named("weir://operator/ops").unwrap().role, Role::Operator);
        for other in [
            "weir://root/x",
            "weir://gateway/",
            "https://gateway/x",
            "weir://gateway",
            "weir://admin/a\nb",
            "weir://admin/é",
        ] {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
