//! The whole control plane over real sockets.

mod access;
mod admin;
mod audit;
mod gateways;
mod page;
mod probing;
mod questions;
mod random;
mod tls;

use std::future::Future;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_proto::v1::discovery_service_client::DiscoveryServiceClient;
use weir_proto::v1::report_service_client::ReportServiceClient;

use super::*;
use crate::model::tests::{backend, cluster, model, pool, tenant};

const ADMIN: &str = "admin-token-of-tests";
const GATEWAY: &str = "gateway-token-of-tests";

#[derive(Clone)]
struct Bearer(&'static str);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let value: MetadataValue<_> = format!("Bearer {}", self.0).parse().unwrap();
        request.metadata_mut().insert("authorization", value);
        Ok(request)
    }
}

type Client = InterceptedService<Channel, Bearer>;

struct Plane {
    running: Handle,
    shutdown: CancellationToken,
}

impl Plane {
    async fn start(store: StoreConfig, bootstrap: Vec<v1::Resource>) -> Self {
        let config = Config {
            listen: ([127, 0, 0, 1], 0).into(),
            http_listen: ([127, 0, 0, 1], 0).into(),
            ops_allowed_hosts: Vec::new(),
            store,
            bootstrap,
            admin_token: Some(Secret::new(ADMIN.into())),
            gateway_token: Some(Secret::new(GATEWAY.into())),
            ..Config::default()
        };
        Self::with(config).await
    }

    async fn with(config: Config) -> Self {
        let shutdown = CancellationToken::new();
        let running = ControlPlane::start(config, shutdown.clone()).await.unwrap();
        Self { running, shutdown }
    }

    async fn memory(bootstrap: Vec<v1::Resource>) -> Self {
        Self::start(StoreConfig::Memory, bootstrap).await
    }

    async fn channel(&self) -> Channel {
        let uri = format!("http://{}", self.running.grpc_addr);
        Channel::from_shared(uri).unwrap().connect().await.unwrap()
    }

    async fn admin(&self) -> AdminServiceClient<Client> {
        AdminServiceClient::with_interceptor(self.channel().await, Bearer(ADMIN))
    }

    async fn gateway(&self, hello: v1::Hello) -> Gateway {
        Gateway::connect(self.channel().await, hello).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.join.await.unwrap().unwrap();
    }
}

/// A gateway's configuration stream, driven by hand.
struct Gateway {
    said: mpsc::Sender<v1::StreamConfigRequest>,
    heard: Streaming<v1::StreamConfigResponse>,
}

impl Gateway {
    async fn connect(channel: Channel, hello: v1::Hello) -> Self {
        let (said, requests) = mpsc::channel(8);
        let mut client = DiscoveryServiceClient::with_interceptor(channel, Bearer(GATEWAY));
        let heard = client.stream_config(ReceiverStream::new(requests)).await.unwrap().into_inner();
        let gateway = Self { said, heard };
        gateway.say(v1::stream_config_request::Message::Hello(hello)).await;
        gateway
    }

    async fn say(&self, message: v1::stream_config_request::Message) {
        self.said.send(v1::StreamConfigRequest { message: Some(message) }).await.unwrap();
    }

    /// The next delta.
    async fn delta(&mut self) -> v1::Delta {
        loop {
            let heard = soon(self.heard.message()).await.unwrap().expect("the stream is open");
            if let Some(v1::stream_config_response::Message::Delta(delta)) = heard.message {
                return delta;
            }
        }
    }

    async fn ack(&self, delta: &v1::Delta) {
        self.say(v1::stream_config_request::Message::Ack(v1::Ack { nonce: delta.nonce })).await;
    }

    async fn nack(&self, delta: &v1::Delta, errors: Vec<v1::ResourceError>) {
        self.say(v1::stream_config_request::Message::Nack(v1::Nack { nonce: delta.nonce, errors })).await;
    }

    /// How the stream ends.
    async fn end(&mut self) -> Code {
        loop {
            match soon(self.heard.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => return Code::Ok,
                Err(status) => return status.code(),
            }
        }
    }
}

fn hello(id: &str) -> v1::Hello {
    v1::Hello { gateway_id: id.into(), incarnation: "1".into(), ..v1::Hello::default() }
}

fn names(delta: &v1::Delta) -> Vec<&str> {
    delta.upserts.iter().map(|upsert| upsert.name.as_str()).collect()
}

fn reference(kind: v1::ResourceKind, name: &str) -> Option<v1::ResourceRef> {
    Some(v1::ResourceRef { kind: kind.into(), name: name.into() })
}

/// Nothing here takes long; what does is stuck.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it takes too long")
}

fn create(resource: v1::Resource) -> v1::CreateResourceRequest {
    v1::CreateResourceRequest { resource: Some(resource), ..Default::default() }
}

fn apply(resources: Vec<v1::Resource>) -> v1::ApplyRequest {
    v1::ApplyRequest { resources, ..Default::default() }
}

#[tokio::test]
async fn services_ask_for_their_token_and_health_for_none() {
    let plane = Plane::memory(vec![]).await;
    let channel = plane.channel().await;
    let list = v1::ListResourcesRequest { kind: v1::ResourceKind::Pool.into(), ..Default::default() };
    let mut anybody = AdminServiceClient::new(channel.clone());
    assert_eq!(anybody.list_resources(list.clone()).await.unwrap_err().code(), Code::Unauthenticated);
    let mut gateway = AdminServiceClient::with_interceptor(channel.clone(), Bearer(GATEWAY));
    assert_eq!(gateway.list_resources(list.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    plane.admin().await.list_resources(list).await.unwrap();
    let mut reports = ReportServiceClient::new(channel.clone());
    let refused = reports.stream_reports(tokio_stream::empty::<v1::StreamReportsRequest>()).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unauthenticated);

    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = tonic_health::pb::HealthCheckRequest { service: String::new() };
    let status = health.check(check).await.unwrap().into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    plane.stop().await;
}

#[tokio::test]
async fn an_address_in_use_is_said() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = taken.local_addr().unwrap();
    let config = Config { listen, http_listen: ([127, 0, 0, 1], 0).into(), ..Config::default() };
    let error = ControlPlane::start(config, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.exit_code(), 69);
    assert!(error.to_string().starts_with(&format!("listen: cannot listen on {listen}")), "{error}");
}

#[tokio::test]
async fn a_bad_bootstrap_is_refused_with_its_path_and_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let store = StoreConfig::File(directory.path().join("store.redb"));
    let listen = ([127, 0, 0, 1], 0).into();
    let bootstrap = vec![pool("p"), model("m", "nowhere")];
    let config = Config { listen, http_listen: listen, store: store.clone(), bootstrap, ..Config::default() };
    let error = ControlPlane::start(config, CancellationToken::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "bootstrap: resources[1].model.pool: there is no pool nowhere");
    assert_eq!(error.exit_code(), 64);
    // The store is let go of, if not at once: then it can be opened, and nothing was written.
    let reopened = soon(async {
        loop {
            match open(&store).await {
                Ok(store) => break store,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    assert_eq!(reopened.await.range("").await.unwrap().revision, 0);
}

#[tokio::test]
async fn changes_made_at_once_are_all_made() {
    let plane = Plane::memory(vec![]).await;
    let admin = plane.admin().await;
    let made = (0..32).map(|i| {
        let mut admin = admin.clone();
        async move {
            let made = admin.create_resource(create(tenant(&format!("t{i}")))).await.unwrap().into_inner();
            made.resource.unwrap().revision
        }
    });
    let mut revisions = futures_util::future::join_all(made).await;
    revisions.sort_unstable();
    assert_eq!(revisions, (1..=32).collect::<Vec<_>>());
    plane.stop().await;
}
