//! The gate in front of a service: identifies the caller, admits or refuses the call, and keeps it within its bound.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use weir_proto::v1;
use weir_runtime::edge::GrpcPeer;
use weir_runtime::grpc::{Bound, HEALTH_CHECK, Permits, bounded};

use super::{Authority, Caller, bound, needs};
use crate::tls;

/// Who can reach a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Whoever has the role that the method asks for.
    Authorised,
    /// One check by everybody, since probes of containers have no token; all else by known callers.
    Probes,
    /// Everybody: only where nobody else can connect.
    Everybody,
}

/// A service behind the gate. Calls that pass carry their [`Caller`].
#[derive(Debug, Clone)]
pub(crate) struct Gated<S> {
    inner: S,
    authority: Authority,
    reach: Reach,
    permits: Permits,
}

impl<S> Gated<S> {
    pub(crate) const fn new(inner: S, authority: Authority, reach: Reach, permits: Permits) -> Self {
        Self { inner, authority, reach, permits }
    }

    /// Decided by the head alone: nothing of the message of a call that is refused is read.
    fn admit(&self, request: &http::Request<Body>) -> Result<Option<Caller>, Status> {
        let path = request.uri().path();
        let metadata = || MetadataMap::from_headers(request.headers().clone());
        let peer = request.extensions().get::<GrpcPeer>();
        let shown = || peer.and_then(|peer| peer.certificate.as_ref()).and_then(tls::identity);
        let caller = match self.reach {
            Reach::Everybody => return Ok(None),
            Reach::Probes if path == HEALTH_CHECK => return Ok(None),
            Reach::Probes => self.authority.identify(&metadata(), shown().as_ref())?,
            Reach::Authorised => self.authority.authorise(&metadata(), shown().as_ref(), path)?,
        };
        if let Some(peer) = peer {
            peer.connection.trust();
        }
        Ok(Some(caller))
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

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        match self.admit(&request) {
            Ok(caller) => {
                let mut bound = bound(request.uri().path());
                let name = caller.as_ref().map_or_else(|| Arc::from("anybody"), |c| Arc::clone(&c.name));
                // A token of one gateway has the streams of one; one that all share, the admin's too, those of all.
                if let (Bound::Stream(stream), Some(Caller { gateway_id: None, .. })) = (&mut bound, &caller)
                    && needs(request.uri().path()) == Some(v1::Role::Gateway)
                {
                    stream.most_per_caller = stream.most;
                }
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                bounded(bound, self.permits.clone(), name, self.inner.call(request)).boxed()
            }
            Err(status) => ready(Ok(status.into_http())).boxed(),
        }
    }
}

impl<S: NamedService> NamedService for Gated<S> {
    const NAME: &'static str = S::NAME;
}
