use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::*;
use v1::Role;

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Issuer {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate and its key, as PEM.
fn signed(issuer: &Issuer, names: &[&str], uri: Option<&str>) -> (String, String) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.subject_alt_names.extend(uri.map(|uri| SanType::URI(uri.try_into().unwrap())));
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap().pem(), key.serialize_pem())
}

fn write(directory: &Path, (cert, key): &(String, String)) {
    std::fs::write(directory.join("key.pem"), key).unwrap();
    std::fs::write(directory.join("cert.pem"), cert).unwrap();
}

async fn plane(directory: &Path, ca: &Issuer) -> Plane {
    write(directory, &signed(ca, &["localhost"], None));
    std::fs::write(directory.join("ca.pem"), ca.pem()).unwrap();
    let tls = TlsConfig {
        cert: directory.join("cert.pem"),
        key: directory.join("key.pem"),
        client_ca: Some(directory.join("ca.pem")),
    };
    Plane::with(Config {
        listen: ([127, 0, 0, 1], 0).into(),
        http_listen: ([127, 0, 0, 1], 0).into(),
        bootstrap: cluster(1),
        admin_token: Some(Secret::new(ADMIN.into())),
        gateway_token: Some(Secret::new(GATEWAY.into())),
        gateway_tokens: None,
        ops_allowed_hosts: Vec::new(),
        tls: Some(tls),
        ..Config::default()
    })
    .await
}

/// A channel that trusts this root and shows this certificate.
async fn channel(
    plane: &Plane,
    root: &str,
    own: Option<&(String, String)>,
) -> Result<Channel, tonic::transport::Error> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(root)).domain_name("localhost");
    if let Some((cert, key)) = own {
        tls = tls.identity(Identity::from_pem(cert, key));
    }
    let uri = format!("https://{}", plane.running.grpc_addr);
    Channel::from_shared(uri).unwrap().tls_config(tls).unwrap().connect().await
}

async fn who(channel: Channel) -> Result<(String, Role), Code> {
    let answer = AdminServiceClient::new(channel).who_am_i(v1::WhoAmIRequest {}).await;
    let answer = answer.map_err(|status| status.code())?.into_inner();
    Ok((answer.name.clone(), answer.role()))
}

#[tokio::test]
async fn a_certificate_says_who_calls_and_one_gateway_cannot_be_another() {
    let (directory, ca) = (tempfile::tempdir().unwrap(), authority());
    let plane = plane(directory.path(), &ca).await;
    let ops = signed(&ca, &[], Some("weir://operator/ops"));
    let found = who(channel(&plane, &ca.pem(), Some(&ops)).await.unwrap()).await;
    assert_eq!(found, Ok(("ops".to_owned(), Role::Operator)));
    // A token beside a certificate counts alone; without either nobody is let in.
    let bare = channel(&plane, &ca.pem(), None).await.unwrap();
    assert_eq!(who(bare.clone()).await, Err(Code::Unauthenticated));
    let mut admin = AdminServiceClient::with_interceptor(bare, Bearer(ADMIN));
    assert_eq!(admin.who_am_i(v1::WhoAmIRequest {}).await.unwrap().into_inner().role(), Role::Admin);
    let nameless = signed(&ca, &[], None);
    let nameless = who(channel(&plane, &ca.pem(), Some(&nameless)).await.unwrap()).await;
    assert_eq!(nameless, Err(Code::Unauthenticated), "signed, but nobody of ours");
    // A certificate that somebody else signed does not get as far as a call.
    let forged = signed(&authority(), &[], Some("weir://admin/root"));
    match channel(&plane, &ca.pem(), Some(&forged)).await {
        Err(_) => {}
        Ok(channel) => assert!(matches!(who(channel).await, Err(Code::Unavailable | Code::Unknown))),
    }

    let gateway = signed(&ca, &[], Some("weir://gateway/a"));
    let open = async |id: &str| {
        let (said, requests) = mpsc::channel(4);
        let channel = channel(&plane, &ca.pem(), Some(&gateway)).await.unwrap();
        let heard = DiscoveryServiceClient::new(channel).stream_config(ReceiverStream::new(requests)).await;
        let gateway = Gateway { said, heard: heard.unwrap().into_inner() };
        gateway.say(v1::stream_config_request::Message::Hello(hello(id))).await;
        gateway
    };
    open("a").await.delta().await;
    assert_eq!(open("b").await.end().await, Code::PermissionDenied);
    let admin = who(channel(&plane, &ca.pem(), Some(&gateway)).await.unwrap()).await;
    assert_eq!(admin, Err(Code::PermissionDenied), "a gateway's certificate cannot call admin");
    plane.stop().await;
}

#[tokio::test]
async fn a_renewed_certificate_drops_no_stream_and_the_old_one_is_not_shown_any_more() {
    let (directory, ca) = (tempfile::tempdir().unwrap(), authority());
    let plane = plane(directory.path(), &ca).await;
    let own = signed(&ca, &[], Some("weir://gateway/a"));
    let (said, requests) = mpsc::channel(4);
    let connected = channel(&plane, &ca.pem(), Some(&own)).await.unwrap();
    let heard = DiscoveryServiceClient::new(connected).stream_config(ReceiverStream::new(requests)).await;
    let mut stream = Gateway { said, heard: heard.unwrap().into_inner() };
    stream.say(v1::stream_config_request::Message::Hello(hello("a"))).await;
    let first = stream.delta().await;
    stream.ack(&first).await;

    // Another root signs from now on, for the server and for clients.
    let next = authority();
    write(directory.path(), &signed(&next, &["localhost"], None));
    std::fs::write(directory.path().join("ca.pem"), next.pem()).unwrap();
    let ops = signed(&next, &[], Some("weir://editor/ops"));
    let renewed = soon(async {
        loop {
            if let Ok(channel) = channel(&plane, &next.pem(), Some(&ops)).await {
                break channel;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert!(channel(&plane, &ca.pem(), None).await.is_err(), "the old certificate is gone");
    let mut editor = AdminServiceClient::new(renewed);
    editor.create_resource(create(tenant("t"))).await.unwrap();
    assert_eq!(names(&stream.delta().await), ["t"], "the stream that was open goes on");
    plane.stop().await;
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_said_with_their_file() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("no.pem");
    let tls = Some(TlsConfig { cert: missing.clone(), key: missing, client_ca: None });
    let listen = ([127, 0, 0, 1], 0).into();
    let config = Config { listen, http_listen: listen, tls, ..Config::default() };
    let error = ControlPlane::start(config, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.exit_code(), 64);
    assert!(error.to_string().contains("no.pem"), "{error}");
}

/// The page is plain HTTP, whatever the services speak. Its data and its changes go by another port.
#[tokio::test]
async fn beside_services_over_tls_the_page_shows_and_changes_the_same() {
    let (directory, ca) = (tempfile::tempdir().unwrap(), authority());
    let plane = plane(directory.path(), &ca).await;
    let mut seen = page::events(
        soon(page::send(&plane, http::Method::GET, "/page/stream", Some(ADMIN), "")).await.unwrap(),
    );
    let state = seen.wanted("state", |_| true).await;
    assert_eq!(state["backends"][0]["name"], "b0");
    let body = r#"{"action":"weight","weight":7}"#;
    let changed = page::send(&plane, http::Method::POST, "/page/backends/b0", Some(ADMIN), body);
    assert_eq!(soon(changed).await.unwrap().status(), http::StatusCode::OK);
    seen.wanted("state", |state| state["backends"][0]["weight"] == 7).await;
    plane.stop().await;
}
