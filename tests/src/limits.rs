//! Clients of limit services.

use tonic::Status;
use tonic::transport::Channel;
use weir_proto::envoy::extensions::common::ratelimit::v3::RateLimitDescriptor;
use weir_proto::envoy::extensions::common::ratelimit::v3::rate_limit_descriptor::Entry;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_response::Code;
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_client::RateLimitServiceClient;
use weir_proto::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};

/// A client of one limit service, which asks as a proxy does.
#[derive(Debug, Clone)]
pub struct Limits {
    client: RateLimitServiceClient<Channel>,
    token: Option<String>,
}

impl Limits {
    /// A client of the service at this address.
    pub fn new(address: &str) -> Self {
        let endpoint = Channel::from_shared(format!("http://{address}")).expect("an address");
        Self { client: RateLimitServiceClient::new(endpoint.connect_lazy()), token: None }
    }

    /// A client of a service that needs this token.
    pub fn with_token(address: &str, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..Self::new(address) }
    }

    /// Asks with one descriptor of the domain `edge`.
    pub async fn ask(&self, entries: &[(&str, &str)], hits: u64) -> RateLimitResponse {
        let entries = entries.iter().map(|(key, value)| Entry { key: (*key).into(), value: (*value).into() });
        let descriptor = RateLimitDescriptor {
            entries: entries.collect(),
            hits_addend: Some(hits),
            ..RateLimitDescriptor::default()
        };
        let request =
            RateLimitRequest { domain: "edge".into(), descriptors: vec![descriptor], hits_addend: 0 };
        self.try_ask(request).await.expect("an answer")
    }

    /// Sends any request, which may be refused.
    pub async fn try_ask(&self, request: RateLimitRequest) -> Result<RateLimitResponse, Status> {
        let mut request = tonic::Request::new(request);
        if let Some(token) = &self.token {
            let value = format!("Bearer {token}").parse().expect("a header value");
            request.metadata_mut().insert("authorization", value);
        }
        self.client.clone().should_rate_limit(request).await.map(tonic::Response::into_inner)
    }

    /// Whether one hit of the tenant is admitted.
    pub async fn passes(&self, tenant: &str) -> bool {
        self.ask(&[("tenant", tenant)], 1).await.overall_code() == Code::Ok
    }
}
