//! The gate in front of a gRPC service: admits or refuses each call by its head, and keeps it within its bound.
//!
//! Who may call is the process's own rule, a [`Gatekeeper`]; everything else is the same on every gRPC port.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;

use super::{Bound, Permits, bounded};
use crate::edge::GrpcPeer;

/// The rule by which a process admits calls.
pub trait Gatekeeper {
    /// Admits a call or refuses it. It sees the head alone, so that the message of a refused call is not read.
    ///
    /// # Errors
    /// The status that the caller gets.
    fn admit(&self, request: &mut http::Request<Body>) -> Result<Admitted, Status>;
}

/// A call that may proceed.
#[derive(Debug, Clone)]
pub struct Admitted {
    /// Whose streams are counted together.
    pub caller: Arc<str>,
    /// What bounds the call.
    pub bound: Bound,
    /// Whether the caller has shown who it is. Its connection is closed after those of strangers when there is no room.
    pub identified: bool,
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub struct Gated<S, G> {
    inner: S,
    gatekeeper: G,
    permits: Permits,
}

impl<S, G> Gated<S, G> {
    /// Puts a service behind the gate. Services with the same permits share the bounds of their streams.
    pub const fn new(inner: S, gatekeeper: G, permits: Permits) -> Self {
        Self { inner, gatekeeper, permits }
    }
}

impl<S, G> Service<http::Request<Body>> for Gated<S, G>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
    G: Gatekeeper,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let admitted = match self.gatekeeper.admit(&mut request) {
            Ok(admitted) => admitted,
            Err(status) => return ready(Ok(status.into_http())).boxed(),
        };
        if admitted.identified
            && let Some(peer) = request.extensions().get::<GrpcPeer>()
        {
            peer.connection.trust();
        }
        bounded(admitted.bound, self.permits.clone(), admitted.caller, self.inner.call(request)).boxed()
    }
}

impl<S: NamedService, G> NamedService for Gated<S, G> {
    const NAME: &'static str = S::NAME;
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[derive(Clone)]
    struct OnlyPath(&'static str);

    impl Gatekeeper for OnlyPath {
        fn admit(&self, request: &mut http::Request<Body>) -> Result<Admitted, Status> {
            if request.uri().path() != self.0 {
                return Err(Status::permission_denied("another path"));
            }
            request.extensions_mut().insert(7_u8);
            let bound = Bound::Unary(Duration::from_secs(5));
            Ok(Admitted { caller: "a".into(), bound, identified: true })
        }
    }

    /// Answers with what the gatekeeper left in the request, after a pause.
    #[derive(Clone)]
    struct Slow(Duration);

    impl Service<http::Request<Body>> for Slow {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let pause = self.0;
            async move {
                tokio::time::sleep(pause).await;
                let mut answer = http::Response::new(Body::empty());
                answer.extensions_mut().extend(request.extensions().clone());
                Ok(answer)
            }
            .boxed()
        }
    }

    async fn call(path: &str, pause: Duration) -> http::Response<Body> {
        let mut gated = Gated::new(Slow(pause), OnlyPath("/a/b"), Permits::default());
        let request = http::Request::builder().uri(path).body(Body::empty()).expect("a request");
        gated.call(request).await.expect("infallible")
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_call_does_not_reach_the_service_and_an_admitted_one_has_a_bound() {
        assert_eq!(call("/a/c", Duration::ZERO).await.headers()["grpc-status"], "7");
        let answer = call("/a/b", Duration::from_secs(1)).await;
        assert_eq!(answer.extensions().get::<u8>(), Some(&7));
        assert!(!answer.headers().contains_key("grpc-status"));
        assert_eq!(call("/a/b", Duration::from_secs(9)).await.headers()["grpc-status"], "4");
    }
}
