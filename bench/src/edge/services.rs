//! The requests of good clients to each port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use weir_proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use weir_proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::Entry;
use weir_proto::envoy::service::ratelimit::v3::RateLimitRequest;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_client::RateLimitServiceClient;
use weir_proto::v1::ListResourcesRequest;
use weir_proto::v1::admin_service_client::AdminServiceClient;

use crate::load::Connection;

/// The timeout of a request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// One request of a good client.
#[derive(Debug, Clone)]
pub(super) enum Service {
    /// An HTTP/1 request.
    Http(SocketAddr, Bytes),
    /// The same over TLS; it asks the server to close the connection.
    Tls(SocketAddr, Bytes, Arc<rustls::ClientConfig>),
    /// `ListResources` of a control plane, with its token.
    List(SocketAddr, String),
    /// `ShouldRateLimit` of a limit service.
    Limit(SocketAddr),
}

/// A connection for several requests, where it is useful.
#[derive(Debug, Clone)]
pub(super) enum Open {
    List(AdminServiceClient<Channel>, String),
    Limit(RateLimitServiceClient<Channel>),
}

impl Service {
    /// Opens a connection and asks.
    pub(super) async fn ask(&self) -> Result<(), String> {
        let asked = async {
            match self {
                Self::Http(address, request) => {
                    let answer = Connection::open(*address).await?.call(request).await?;
                    anyhow::ensure!(answer.is_ok(), "{} {}", answer.status, answer.excerpt);
                }
                Self::Tls(address, request, config) => {
                    let socket = TcpStream::connect(address).await?;
                    let name = ServerName::try_from("localhost")?;
                    let mut socket = TlsConnector::from(config.clone()).connect(name, socket).await?;
                    socket.write_all(request).await?;
                    let mut answer = Vec::new();
                    socket.read_to_end(&mut answer).await?;
                    anyhow::ensure!(
                        answer.starts_with(b"HTTP/1.1 200"),
                        "{}",
                        String::from_utf8_lossy(&answer)
                    );
                }
                Self::List(..) | Self::Limit(_) => {
                    let open = self.open().context("a service of gRPC")?;
                    open.ask().await.map_err(anyhow::Error::msg)?;
                }
            }
            anyhow::Ok(())
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, asked).await {
            Ok(asked) => asked.map_err(|error| format!("{error:#}")),
            Err(_) => Err(format!("no answer within {ANSWER_TIMEOUT:?}")),
        }
    }

    /// A connection for many requests of a gRPC service.
    pub(super) fn open(&self) -> Option<Open> {
        let channel = |address: &SocketAddr| {
            Endpoint::from_shared(format!("http://{address}")).ok().map(|endpoint| endpoint.connect_lazy())
        };
        match self {
            Self::List(address, token) => {
                Some(Open::List(AdminServiceClient::new(channel(address)?), token.clone()))
            }
            Self::Limit(address) => Some(Open::Limit(RateLimitServiceClient::new(channel(address)?))),
            Self::Http(..) | Self::Tls(..) => None,
        }
    }
}

impl Open {
    /// Asks once more.
    pub(super) async fn ask(&self) -> Result<(), String> {
        let asked = async {
            match self {
                Self::List(client, token) => {
                    let mut list =
                        tonic::Request::new(ListResourcesRequest { kind: 1, ..Default::default() });
                    let token = format!("Bearer {token}").parse().map_err(|_| "an odd token".to_owned())?;
                    list.metadata_mut().insert("authorization", token);
                    client.clone().list_resources(list).await.map(drop).map_err(|status| status.to_string())
                }
                Self::Limit(client) => {
                    let entry = Entry { key: "tenant".into(), value: "acme".into() };
                    let descriptor = RateLimitDescriptor { entries: vec![entry], ..Default::default() };
                    let request = RateLimitRequest {
                        domain: "edge".into(),
                        descriptors: vec![descriptor],
                        hits_addend: 1,
                    };
                    let asked = client.clone().should_rate_limit(request).await;
                    asked.map(drop).map_err(|status| status.to_string())
                }
            }
        };
        let late = Err(format!("no answer within {ANSWER_TIMEOUT:?}"));
        tokio::time::timeout(ANSWER_TIMEOUT, asked).await.unwrap_or(late)
    }
}
