//! Streams and calls of the control plane and the limit service that strangers, or one caller alone, try to occupy.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_stream::StreamExt as _;
use tonic::client::Grpc;
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_prost::ProstCodec;
use weir_proto::v1::{self, Role};
use weir_tests::eventually;
use weir_tests::plane::{self, ADMIN_TOKEN, Plane};
use weir_tests::process::Process;

const LIMIT_TOKEN: &str = "limit-token-of-the-tests";

async fn channel(url: &str) -> Channel {
    Channel::from_shared(url.to_owned()).expect("a URL").connect().await.expect("connects")
}

fn with<T>(token: Option<&str>, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("a value"));
    }
    request
}

async fn watch(channel: &Channel, token: Option<&str>) -> Result<Streaming<HealthCheckResponse>, Code> {
    let request = with(token, HealthCheckRequest::default());
    let answer = HealthClient::new(channel.clone()).watch(request).await;
    answer.map(tonic::Response::into_inner).map_err(|status| status.code())
}

async fn plane() -> (Plane, tempfile::TempDir) {
    let data = tempfile::tempdir().expect("a directory");
    (plane::start("127.0.0.1:0", data.path(), None).await, data)
}

async fn limit_service() -> (Process, String) {
    let args = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"];
    let env = [("WEIR_LIMIT_TOKEN", LIMIT_TOKEN)];
    let service = Process::start_with("weir-ratelimit", &args, &env, "serving").await;
    let url = format!("http://{}", service.text("grpc"));
    (service, url)
}

#[tokio::test]
async fn health_is_checked_by_everybody_and_watched_with_a_token() {
    let (plane, _data) = plane().await;
    let (_service, limits) = limit_service().await;
    for (url, token) in [(&plane.url, ADMIN_TOKEN), (&limits, LIMIT_TOKEN)] {
        let channel = channel(url).await;
        HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.expect("for kubelets");
        assert_eq!(watch(&channel, None).await.err(), Some(Code::Unauthenticated), "{url}");
        assert_eq!(watch(&channel, Some("nobody-has-this-one")).await.err(), Some(Code::Unauthenticated));
        let mut watched = watch(&channel, Some(token)).await.expect("with the token");
        watched.message().await.expect("heard").expect("a status");
    }
}

#[tokio::test]
async fn watches_of_a_stranger_are_refused_and_held_nowhere() {
    let (plane, _data) = plane().await;
    let channel = channel(&plane.url).await;
    // As many as a second allows: each of them must be refused and none held.
    let refused = Arc::new(AtomicUsize::new(0));
    let mut strangers = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (channel, refused) = (channel.clone(), Arc::clone(&refused));
        strangers.spawn(async move {
            for _ in 0..40 {
                if watch(&channel, None).await.err() == Some(Code::Unauthenticated) {
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    strangers.join_all().await;
    assert_eq!(refused.load(Ordering::Relaxed), 2000);
    watch(&channel, Some(ADMIN_TOKEN)).await.expect("room for who is known");
}

#[tokio::test]
async fn watches_are_bounded_for_each_caller_and_places_come_back() {
    let (plane, _data) = plane().await;
    let issue =
        v1::IssueTokenRequest { name: "vera".into(), role: Role::Viewer.into(), ..Default::default() };
    let viewer = plane.admin().await.issue_token(issue).await.expect("issued").into_inner().secret;
    let channel = channel(&plane.url).await;
    let mut held = Vec::new();
    let refused = loop {
        match watch(&channel, Some(&viewer)).await {
            Ok(stream) => held.push(stream),
            Err(code) => break code,
        }
        assert!(held.len() < 1000, "no bound on the watches of one caller");
    };
    assert_eq!((refused, held.len()), (Code::ResourceExhausted, 64));
    watch(&channel, Some(ADMIN_TOKEN)).await.expect("another caller has room");
    held.truncate(10);
    eventually("places come back", || async { watch(&channel, Some(&viewer)).await.is_ok() }).await;
}

#[tokio::test]
async fn a_watch_of_changes_ends_when_its_token_is_revoked() {
    let (plane, _data) = plane().await;
    let mut admin = plane.admin().await;
    let issue =
        v1::IssueTokenRequest { name: "vera".into(), role: Role::Viewer.into(), ..Default::default() };
    let viewer = admin.issue_token(issue).await.expect("issued").into_inner().secret;
    let mut client = weir_proto::v1::admin_service_client::AdminServiceClient::new(channel(&plane.url).await);
    let request = with(Some(&viewer), v1::WatchRequest::default());
    let mut watched = client.watch(request).await.expect("watches").into_inner();
    watched.message().await.expect("heard").expect("the bookmark");
    admin
        .revoke_token(v1::RevokeTokenRequest { name: "vera".into(), ..Default::default() })
        .await
        .expect("done");
    let ended = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            match watched.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Code::Ok,
                Err(status) => return status.code(),
            }
        }
    });
    assert_eq!(ended.await.expect("it ends"), Code::Unauthenticated);
}

#[tokio::test]
async fn reflection_streams_are_bounded() {
    let (plane, _data) = plane().await;
    let channel = channel(&plane.url).await;
    // Both names count as one.
    let paths = ["v1", "v1alpha"]
        .map(|version| format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"));
    let mut held = Vec::new();
    let refused = loop {
        let path = &paths[held.len() % 2];
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.expect("ready");
        let open = Request::new(tokio_stream::pending::<()>());
        let path = path.parse().expect("a path");
        match grpc.streaming(open, path, ProstCodec::<(), ()>::default()).await {
            Ok(stream) => held.push(stream),
            Err(status) => break status.code(),
        }
        assert!(held.len() < 1000, "no bound on reflection");
    };
    assert_eq!((refused, held.len()), (Code::ResourceExhausted, 64));
}

/// The part of reflection that lists services; both versions have the same field numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct ListAsked {
    #[prost(string, tag = "7")]
    list_services: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Listed {
    #[prost(message, optional, tag = "6")]
    list: Option<Services>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Services {
    #[prost(message, repeated, tag = "1")]
    service: Vec<Service>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Service {
    #[prost(string, tag = "1")]
    name: String,
}

#[tokio::test]
async fn reflection_answers_by_both_of_its_names() {
    let (plane, _data) = plane().await;
    let (_service, limits) = limit_service().await;
    for (url, token, service) in [
        (&plane.url, ADMIN_TOKEN, "weir.v1.AdminService"),
        (&limits, LIMIT_TOKEN, "envoy.service.ratelimit.v3.RateLimitService"),
    ] {
        for version in ["v1", "v1alpha"] {
            let mut grpc = Grpc::new(channel(url).await);
            grpc.ready().await.expect("ready");
            let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
            let asked = with(Some(token), tokio_stream::once(ListAsked { list_services: "*".into() }));
            let codec = ProstCodec::<ListAsked, Listed>::default();
            let answer = grpc.streaming(asked, path.parse().expect("a path"), codec).await;
            let mut answers =
                answer.unwrap_or_else(|status| panic!("{url} {version}: {status}")).into_inner();
            let listed =
                answers.message().await.expect("heard").and_then(|answer| answer.list).expect("a list");
            let names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
            assert!(names.contains(&service.to_owned()), "{url} {version}: {names:?}");
        }
    }
}

#[tokio::test]
async fn a_call_whose_message_never_comes_is_ended_by_a_clock() {
    let (plane, _data) = plane().await;
    let (_service, limits) = limit_service().await;
    for url in [&plane.url, &limits] {
        let mut grpc = Grpc::new(channel(url).await);
        grpc.ready().await.expect("ready");
        let never = tokio_stream::once(()).filter(|()| false).chain(tokio_stream::pending());
        let path = "/grpc.health.v1.Health/Check".parse().expect("a path");
        let call = grpc.client_streaming(Request::new(never), path, ProstCodec::<(), ()>::default());
        let ended = tokio::time::timeout(Duration::from_secs(60), call).await.expect("it ends");
        assert_eq!(ended.expect_err("no answer").code(), Code::DeadlineExceeded, "{url}");
    }
}

#[tokio::test]
async fn a_call_without_a_token_is_refused_before_its_message_is_read() {
    let (plane, _data) = plane().await;
    let (_service, limits) = limit_service().await;
    for (url, path) in [
        (&plane.url, "/weir.v1.AdminService/Apply"),
        (&plane.url, "/weir.v1.DiscoveryService/StreamConfig"),
        (&plane.url, "/weir.v1.ReportService/StreamReports"),
        (&plane.url, "/grpc.health.v1.Health/Watch"),
        (&limits, "/weir.v1.LimitService/Acquire"),
        (&limits, "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"),
        (&limits, "/grpc.health.v1.Health/Watch"),
        (&limits, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"),
        (&limits, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"),
    ] {
        let mut grpc = Grpc::new(channel(url).await);
        grpc.ready().await.expect("ready");
        // Only the head: no byte of a message follows.
        let silent = Request::new(tokio_stream::pending::<()>());
        let path_and_query = path.parse().expect("a path");
        let call = grpc.client_streaming(silent, path_and_query, ProstCodec::<(), ()>::default());
        let refused = tokio::time::timeout(Duration::from_secs(30), call).await.expect("at once");
        assert_eq!(refused.expect_err("refused").code(), Code::Unauthenticated, "{path}");
    }
}

#[tokio::test]
async fn only_an_apply_may_be_large() {
    let (plane, _data) = plane().await;
    let large = "x".repeat(5 << 20);
    let mut admin = plane.admin().await;
    let get = v1::GetResourceRequest {
        r#ref: Some(v1::ResourceRef { kind: v1::ResourceKind::Pool.into(), name: large.clone() }),
    };
    let refused = admin.get_resource(get).await.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let update = v1::WatchRequest { from_revision: 0, ..Default::default() };
    admin.watch(update).await.expect("small");
    let apply = v1::ApplyRequest { apply_set: large, ..Default::default() };
    let judged = admin.apply(apply).await.map_or_else(|status| status.code(), |_| Code::Ok);
    assert_ne!(judged, Code::OutOfRange, "a whole configuration is read");
}

/// The first settings of a server, by their number.
async fn settings(address: &str) -> Vec<(u16, u32)> {
    let mut socket = TcpStream::connect(address).await.expect("connects");
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("sent");
    let mut head = [0; 9];
    socket.read_exact(&mut head).await.expect("a frame");
    assert_eq!(head[3], 4, "settings come first");
    let length = usize::from(head[1]) << 8 | usize::from(head[2]);
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await.expect("whole");
    let setting = |bytes: &[u8]| {
        let number = u16::from_be_bytes([bytes[0], bytes[1]]);
        (number, u32::from_be_bytes([bytes[2], bytes[3], bytes[4], bytes[5]]))
    };
    Bytes::from(body).chunks(6).map(setting).collect()
}

#[tokio::test]
async fn every_grpc_port_says_how_many_streams_and_how_large_a_head_it_takes() {
    let (plane, _data) = plane().await;
    let (service, _) = limit_service().await;
    for (address, streams) in [(plane.address(), 256), (service.text("grpc").to_owned(), 1024)] {
        let settings = settings(&address).await;
        let of = |number: u16| settings.iter().find(|(n, _)| *n == number).map(|(_, value)| *value);
        assert_eq!(of(3), Some(streams), "SETTINGS_MAX_CONCURRENT_STREAMS of {address}");
        assert_eq!(of(6), Some(16 << 10), "SETTINGS_MAX_HEADER_LIST_SIZE of {address}");
    }
}
