//! In front of a service: refuses who has no token, and keeps each call within its bound.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;
use weir_runtime::edge::GrpcPeer;
use weir_runtime::grpc::{Bound, HEALTH_CHECK, Permits, bounded, standard_bound};

use crate::auth::Guard;

/// Above the longest wait that a call may ask for, 60 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(90);

fn bound(path: &str) -> Bound {
    // All callers have one token, so none of them has a share of its own.
    standard_bound(path, usize::MAX).unwrap_or(Bound::Unary(CALL_TIMEOUT))
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub(super) struct Gated<S> {
    inner: S,
    guard: Guard,
    permits: Permits,
}

impl<S> Gated<S> {
    pub(super) const fn new(inner: S, guard: Guard, permits: Permits) -> Self {
        Self { inner, guard, permits }
    }
}

impl<S> Service<http::Request<Body>> for Gated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path();
        // By the head alone: nothing of the message of a call that is refused is read.
        if path != HEALTH_CHECK
            && let Err(status) = self.guard.check(request.headers())
        {
            return ready(Ok(status.into_http())).boxed();
        }
        if path != HEALTH_CHECK
            && let Some(peer) = request.extensions().get::<GrpcPeer>()
        {
            peer.connection.trust();
        }
        let bound = bound(path);
        bounded(bound, self.permits.clone(), Arc::from("callers"), self.inner.call(request)).boxed()
    }
}

impl<S: NamedService> NamedService for Gated<S> {
    const NAME: &'static str = S::NAME;
}
