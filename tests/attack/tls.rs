//! TLS towards clients: no old version, no plain text.

use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;
use weir_tests::cluster::KEY;

use crate::lab::Lab;
use crate::lab::http1::{End, exchange, models};

/// A certificate of the name `localhost`, written to this directory with its key.
pub(crate) fn certificate(directory: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(directory.join("key.pem"), signing_key.serialize_pem()).expect("written");
    std::fs::write(directory.join("cert.pem"), cert.pem()).expect("written");
    cert.der().clone()
}

/// The flags by which a process serves it.
pub(crate) fn flags(directory: &Path) -> [String; 4] {
    let path = |name: &str| directory.join(name).to_str().expect("UTF-8").to_owned();
    ["--tls-cert".into(), path("cert.pem"), "--tls-key".into(), path("key.pem")]
}

/// A client that trusts this certificate alone.
pub(crate) fn trusting(certificate: &CertificateDer<'static>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_of_tls_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    certificate(directory.path());
    let secured = flags(directory.path());
    let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
    let gateway = Lab::process(&secured).await;
    for (name, minor) in [("SSL 3", 0), ("TLS 1.0", 1), ("TLS 1.1", 2)] {
        // A hello of that version: random bytes, no session, two suites of its time, no compression, no extension.
        let suites = [0, 0x2f, 0, 0x35];
        let body = [&[3, minor][..], &[7; 32], &[0], &[0, 4], &suites, &[1, 0]].concat();
        let length = |n: usize| u16::try_from(n).expect("short").to_be_bytes();
        let hello = [&[1, 0][..], &length(body.len()), &body].concat();
        let record = [&[22, 3, minor][..], &length(hello.len()), &hello].concat();
        let heard = exchange(gateway.clients, record).await;
        // An alert or nothing, but never a hello in return.
        assert!(heard.bytes.is_empty() || heard.bytes[0] == 21, "{name}: {heard:?}");
        assert_ne!(heard.end, End::Open, "{name}: {heard:?}");
    }
    let plain = exchange(gateway.clients, models("")).await;
    let text = String::from_utf8_lossy(&plain.bytes);
    assert!(!text.contains("HTTP/1.1 200") && !text.contains(KEY), "{plain:?}");
}
