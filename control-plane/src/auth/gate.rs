//! In front of a service: finds out who calls, and lets the call pass or refuses it.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures_util::future::Either;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;

use super::{Authority, Caller};
use weir_runtime::edge::GrpcPeer;

use crate::tls;

/// Who can reach a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Whoever has the role that the method asks for.
    Authorised,
    /// Everybody: only where nobody else can connect.
    Everybody,
}

/// A service behind the gate. Calls that pass carry their [`Caller`].
#[derive(Debug, Clone)]
pub(crate) struct Gated<S> {
    inner: S,
    authority: Authority,
    reach: Reach,
}

impl<S> Gated<S> {
    pub(crate) const fn new(inner: S, authority: Authority, reach: Reach) -> Self {
        Self { inner, authority, reach }
    }

    fn admit(&self, request: &http::Request<Body>) -> Result<Option<Caller>, Status> {
        if self.reach == Reach::Everybody {
            return Ok(None);
        }
        let metadata = MetadataMap::from_headers(request.headers().clone());
        let peer = request.extensions().get::<GrpcPeer>();
        let identity = peer.and_then(|peer| peer.certificate.as_ref()).and_then(tls::identity);
        let caller = self.authority.authorise(&metadata, identity.as_ref(), request.uri().path())?;
        if let Some(peer) = peer {
            peer.connection.trust();
        }
        Ok(Some(caller))
    }
}

impl<S> Service<http::Request<Body>> for Gated<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Either<Ready<Result<Self::Response, Infallible>>, S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        match self.admit(&request) {
            Ok(caller) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                Either::Right(self.inner.call(request))
            }
            Err(status) => Either::Left(ready(Ok(status.into_http()))),
        }
    }
}

impl<S: NamedService> NamedService for Gated<S> {
    const NAME: &'static str = S::NAME;
}
