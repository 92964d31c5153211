//! Backends at addresses that no backend may have.

use std::time::Duration;

use http::StatusCode;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::resource::Spec;
use weir_tests::cluster::{Resources, gateway, gateway_with};
use weir_tests::scripted::{Scripted, json_answer};

use super::CHAT;

fn at(url: &str) -> Resources {
    let mut resources = Resources::at(&[([127, 0, 0, 1], 9).into()]);
    resources.rebuild("b0", |spec| {
        if let Spec::Backend(backend) = spec {
            backend.url = url.to_owned();
        }
    });
    resources
}

#[tokio::test]
async fn backends_at_metadata_link_local_and_unspecified_addresses_are_not_connected_to() {
    let end = CancellationToken::new();
    let backend = Scripted::raw(&end, json_answer("reached", "")).await;
    let port = backend.address.port();
    // The unspecified addresses lead to this machine, so that a connection would be seen.
    for url in [
        format!("http://0.0.0.0:{port}"),
        format!("http://0:{port}"),
        format!("http://0x0.0:{port}"),
        format!("http://[::ffff:0.0.0.0]:{port}"),
        format!("http://[::]:{port}"),
        "http://169.254.169.254/latest/meta-data".to_owned(),
        "http://2852039166".to_owned(),
        "http://0xa9fea9fe".to_owned(),
        "http://[::ffff:169.254.169.254]".to_owned(),
        "http://[fe80::1]".to_owned(),
        "http://[fd00:ec2::254]".to_owned(),
        "http://100.100.100.200".to_owned(),
        "https://169.254.169.254".to_owned(),
    ] {
        let began = Instant::now();
        let gateway = gateway(&at(&url), None).await;
        let answer = gateway.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{url}");
        assert!(
            !answer.text().contains("169.254") && !answer.text().contains("0.0.0.0"),
            "{}",
            answer.text()
        );
        assert!(began.elapsed() < Duration::from_secs(20), "{url} was tried: {:?}", began.elapsed());
    }
    assert_eq!(backend.requests(), 0);
}

#[tokio::test]
async fn an_operator_can_allow_such_an_address_and_loopback_needs_no_leave() {
    let end = CancellationToken::new();
    let backend = Scripted::raw(&end, json_answer("reached", "")).await;
    let resources = at(&format!("http://0.0.0.0:{}", backend.address.port()));
    let allowing = gateway_with(&resources, |config| {
        config.common.allow_backend_cidr = vec!["0.0.0.0/32".parse().expect("a network")];
    })
    .await;
    assert_eq!(allowing.client.chat(CHAT).await.status, StatusCode::OK);
    for host in ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f.1"] {
        let gateway = gateway(&at(&format!("http://{host}:{}", backend.address.port())), None).await;
        assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK, "{host}");
    }
}
