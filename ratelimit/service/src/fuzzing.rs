//! The two services without a network, for the fuzz targets alone.

use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus_client::registry::Registry;
use tonic::{Request, Status};
use weir_proto::envoy::service::ratelimit::v3::rate_limit_service_server::RateLimitService as _;
use weir_proto::envoy::service::ratelimit::v3::{RateLimitRequest, RateLimitResponse};
use weir_proto::resource::Resource;
use weir_proto::v1;
use weir_proto::v1::limit_service_server::LimitService as _;
use weir_ratelimit::ServiceStack;
use weir_ratelimit::memory::MemoryLimiter;

use crate::envoy::Envoy;
use crate::metrics::Metrics;
use crate::native::Native;
use crate::rules::Rules;

/// Both services over limits of this process.
#[derive(Debug, Clone)]
pub struct Services {
    envoy: Envoy,
    native: Native,
}

impl Services {
    /// With the rules of these resources.
    pub fn new(resources: &[Resource]) -> Self {
        let stack = Arc::new(ServiceStack::new(MemoryLimiter::new().into()));
        let metrics = Metrics::new(&mut Registry::default());
        let (rules, _) = Rules::compile(resources);
        let envoy = Envoy {
            stack: stack.clone(),
            rules: Arc::new(ArcSwap::from_pointee(rules)),
            metrics: metrics.clone(),
            strict_zero_hits: false,
        };
        Self { envoy, native: Native { stack, metrics } }
    }

    /// A call of Envoy.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn should_rate_limit(&self, request: RateLimitRequest) -> Result<RateLimitResponse, Status> {
        self.envoy.should_rate_limit(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    /// A call of the contract of our own.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn acquire(&self, request: v1::AcquireRequest) -> Result<v1::AcquireResponse, Status> {
        self.native.acquire(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    /// A call of the contract of our own.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn settle(&self, request: v1::SettleRequest) -> Result<v1::SettleResponse, Status> {
        self.native.settle(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    /// A call of the contract of our own.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn renew(&self, request: v1::RenewRequest) -> Result<v1::RenewResponse, Status> {
        self.native.renew(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    /// A call of the contract of our own.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn release(&self, request: v1::ReleaseRequest) -> Result<v1::ReleaseResponse, Status> {
        self.native.release(Request::new(request)).await.map(tonic::Response::into_inner)
    }

    /// A call of the contract of our own.
    ///
    /// # Errors
    /// As the service answers it.
    pub async fn peek(&self, request: v1::PeekRequest) -> Result<v1::PeekResponse, Status> {
        self.native.peek(Request::new(request)).await.map(tonic::Response::into_inner)
    }
}
