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
use weir_runtime::grpc::{Bound, Permits, StreamBound, bounded};

use crate::auth::Guard;

/// The one method that everybody may call: kubelets and proxies ask for health and have no token.
const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
/// A check is a few bytes each way.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// Above the longest wait that a call may ask for, 60 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(90);
/// Streams of those who watch health: one for each proxy, and room to spare.
const HEALTH_WATCHES_MAX: usize = 256;
/// After this a stream is opened anew, and with it its token is looked at again.
const HEALTH_WATCH_AGE: Duration = Duration::from_secs(10 * 60);
/// Streams of reflection: people who look around.
const REFLECTIONS_MAX: usize = 64;
/// A look around takes a second.
const REFLECTION_AGE: Duration = Duration::from_secs(30);

fn bound(path: &str) -> Bound {
    // All callers have one token, so none of them has a share of its own.
    let stream =
        |kind, most, age| Bound::Stream(StreamBound { kind, most, most_per_caller: most, age: Some(age) });
    match path {
        HEALTH_CHECK => Bound::Unary(CHECK_TIMEOUT),
        "/grpc.health.v1.Health/Watch" => stream("health watches", HEALTH_WATCHES_MAX, HEALTH_WATCH_AGE),
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo" => {
            stream("reflection streams", REFLECTIONS_MAX, REFLECTION_AGE)
        }
        _ => Bound::Unary(CALL_TIMEOUT),
    }
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
