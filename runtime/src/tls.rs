//! A server's certificate, which is read again when its files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

/// The interval at which the files are checked. Certificates are renewed days before they expire, so a few seconds
/// are soon enough.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or is not PEM.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: rustls::pki_types::pem::Error,
    },
    /// The file holds no certificate.
    #[error("{}: no certificate in this file", .0.display())]
    Empty(PathBuf),
    /// The certificate of the authority that signs client certificates is not usable.
    #[error("{}: {reason}", path.display())]
    Clients {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key do not belong together.
    #[error("{}: {source}", path.display())]
    Pair {
        /// The key's file.
        path: PathBuf,
        /// What rustls says of it.
        source: rustls::Error,
    },
}

/// The TLS side of a listener; cheap to clone.
#[derive(Clone)]
pub struct ServerTls(watch::Receiver<TlsAcceptor>);

impl std::fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    /// Reads a certificate chain and its key, both PEM, and offers these protocols. Changed files are read again for
    /// later connections; if they cannot be used, the old ones stay in force and the log has an error. Must be called
    /// inside a tokio runtime; the checks end with the last clone.
    pub fn open(certificate: &Path, key: &Path, alpn: &'static [&'static [u8]]) -> Result<Self, TlsError> {
        Self::open_for(certificate, key, None, alpn)
    }

    /// Like [`open`](Self::open), and clients may show a certificate that `client_ca` signs. A certificate of another authority
    /// ends the handshake. The caller decides what clients without one may do.
    pub fn open_for(
        certificate: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        alpn: &'static [&'static [u8]],
    ) -> Result<Self, TlsError> {
        let (certificate, key) = (certificate.to_owned(), key.to_owned());
        let files = Files { certificate, key, client_ca: client_ca.map(Path::to_owned), alpn };
        let mut seen = files.changed_at();
        let (current, acceptor) = watch::channel(files.load()?);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                    () = current.closed() => return,
                }
                let now = files.changed_at();
                if now == seen {
                    continue;
                }
                match files.load() {
                    Ok(acceptor) => {
                        current.send_replace(acceptor);
                        seen = now;
                        tracing::info!(certificate = %files.certificate.display(), "a new certificate is in force");
                    }
                    // One file may be written and the other not yet, so the files are checked again next time.
                    Err(error) => {
                        tracing::error!(%error, "the new certificate cannot be used; the old one stays")
                    }
                }
            }
        });
        Ok(Self(acceptor))
    }

    /// The acceptor of new connections.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.0.borrow().clone()
    }
}

struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    alpn: &'static [&'static [u8]],
}

impl Files {
    fn changed_at(&self) -> [Option<SystemTime>; 3] {
        let changed = |path: &PathBuf| std::fs::metadata(path).and_then(|m| m.modified()).ok();
        [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()].map(|path| path.and_then(changed))
    }

    fn load(&self) -> Result<TlsAcceptor, TlsError> {
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::File { path, source }
        };
        let all = |path: &Path| {
            let read = CertificateDer::pem_file_iter(path).map_err(file(path))?;
            let all = read.collect::<Result<Vec<_>, _>>().map_err(file(path))?;
            if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
        };
        let chain = all(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(file(&self.key))?;
        let pair = |source| TlsError::Pair { path: self.key.clone(), source };
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(pair)?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let unusable = |e: &dyn std::fmt::Display| TlsError::Clients {
                    path: path.clone(),
                    reason: e.to_string(),
                };
                let mut roots = RootCertStore::empty();
                for root in all(path)? {
                    roots.add(root).map_err(|e| unusable(&e))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(
                    verifier.allow_unauthenticated().build().map_err(|e| unusable(&e))?,
                )
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}
