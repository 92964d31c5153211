//! Limits in a Redis that only speaks TLS.

use std::process::Stdio;

use http::Method;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use weir_tests::client::Client;
use weir_tests::eventually;
use weir_tests::process::Process;

/// The certificate of an authority, and one of `localhost` that it signed, with its key; in files.
fn certificates(directory: &std::path::Path) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("signed");
    let key = KeyPair::generate().expect("a key");
    let own = CertificateParams::new(["localhost".to_owned()]).expect("parameters");
    let own = own.signed_by(&key, &authority).expect("signed");
    let files = [("ca.pem", authority.pem()), ("cert.pem", own.pem()), ("key.pem", key.serialize_pem())];
    for (name, text) in files {
        std::fs::write(directory.join(name), text).expect("written");
    }
}

#[tokio::test]
async fn limits_live_in_a_redis_over_tls_whose_certificate_is_checked() {
    let directory = tempfile::tempdir().expect("a directory");
    certificates(directory.path());
    let file = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = free.local_addr().expect("bound").port();
    drop(free);
    let _redis = Command::new("redis-server")
        .args([
            "--port",
            "0",
            "--tls-port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--tls-auth-clients",
            "no",
        ])
        .args(["--tls-cert-file", &file("cert.pem"), "--tls-key-file", &file("key.pem")])
        .args(["--tls-ca-cert-file", &file("ca.pem"), "--save", "", "--appendonly", "no"])
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("redis-server is needed: run `make tools`, or apt-get install redis-server");
    eventually("redis-server listens", || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() })
        .await;
    let url = format!("rediss://localhost:{port}");
    let args = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--redis", &url];
    let trusted = file("ca.pem");
    let service =
        Process::start_with("weir-ratelimit", &args, &[("SSL_CERT_FILE", &trusted)], "serving").await;
    let stranger = Process::start("weir-ratelimit", &args, "serving").await;
    let page = async |process: &Process| {
        let ops = Client::new(process.text("ops").parse().expect("an address"), "");
        ops.ask(Method::GET, "/readyz", "").await
    };
    eventually("its scripts run", || async { page(&service).await.status.is_success() }).await;
    eventually("who does not know the authority says that it does not speak to its server", || async {
        let refused = page(&stranger).await;
        assert!(!refused.status.is_success(), "it does: {}", refused.text());
        refused.text().contains("--redis")
    })
    .await;
}
