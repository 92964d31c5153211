//! A gateway that speaks TLS to its clients.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use weir_tests::cluster::{KEY, Resources, gateway_with, mock};
use weir_tests::eventually;

/// A certificate of the name `localhost`, written to both files.
fn certificate(directory: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    std::fs::write(directory.join("key.pem"), signing_key.serialize_pem()).expect("written");
    std::fs::write(directory.join("cert.pem"), cert.pem()).expect("written");
    cert.der().clone()
}

/// Asks for the list of models, trusting only this certificate; `None` if the gateway shows another one.
async fn models(address: SocketAddr, trusted: &CertificateDer<'static>) -> Option<String> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(address).await.expect("listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let mut socket = TlsConnector::from(Arc::new(config)).connect(name, socket).await.ok()?;
    let request = format!(
        "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n\r\n"
    );
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("read to its end");
    Some(answer)
}

#[tokio::test]
async fn clients_are_served_over_tls_and_a_renewed_certificate_comes_into_force() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = certificate(directory.path());
    let mocks = [mock(Default::default(), &Default::default()).await];
    let gateway = gateway_with(&Resources::in_front_of(&mocks), |config| {
        config.tls_cert = Some(directory.path().join("cert.pem"));
        config.tls_key = Some(directory.path().join("key.pem"));
    })
    .await;
    let address = gateway.running.address;
    let answer = models(address, &first).await.expect("trusted");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("gpt-4.1"), "{answer}");

    let second = certificate(directory.path());
    eventually("the new certificate is shown", || async { models(address, &second).await.is_some() }).await;
    assert!(models(address, &first).await.is_none(), "the old one no longer");
}

#[tokio::test]
async fn a_client_without_tls_learns_nothing_and_holds_nobody_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let trusted = certificate(directory.path());
    let gateway = gateway_with(&Resources::in_front_of(&[]), |config| {
        config.tls_cert = Some(directory.path().join("cert.pem"));
        config.tls_key = Some(directory.path().join("key.pem"));
    })
    .await;
    let address = gateway.running.address;
    let _silent = TcpStream::connect(address).await.expect("listens");
    let mut plain = TcpStream::connect(address).await.expect("listens");
    plain.write_all(b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n").await.expect("sent");
    let mut told = Vec::new();
    let _ = plain.read_to_end(&mut told).await;
    assert!(!told.starts_with(b"HTTP/"), "{told:?}");
    assert!(models(address, &trusted).await.is_some());
}
