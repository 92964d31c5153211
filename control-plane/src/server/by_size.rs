//! One service with two bounds on what a call may send: a whole configuration for the call that applies one.

use std::task::{Context, Poll};

use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;

/// The call that sends a whole configuration.
const APPLY: &str = "/weir.v1.AdminService/Apply";

/// The same service twice.
#[derive(Debug, Clone)]
pub(super) struct BySize<S> {
    pub(super) apply: S,
    pub(super) other: S,
}

impl<S: Service<http::Request<Body>>> Service<http::Request<Body>> for BySize<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        match self.apply.poll_ready(context) {
            Poll::Ready(Ok(())) => self.other.poll_ready(context),
            other => other,
        }
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        let service = if request.uri().path() == APPLY { &mut self.apply } else { &mut self.other };
        service.call(request)
    }
}

impl<S: NamedService> NamedService for BySize<S> {
    const NAME: &'static str = S::NAME;
}
