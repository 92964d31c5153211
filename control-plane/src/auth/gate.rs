//! Who may call which service of a control plane: the rule behind the gate of each of its listeners.

use std::sync::Arc;

use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use weir_proto::v1;
use weir_runtime::edge::GrpcPeer;
use weir_runtime::grpc::{Admitted, Bound, Gated, Gatekeeper, HEALTH_CHECK, Permits};

use super::{Authority, Caller, bound, needs};
use crate::tls;

/// The access rule of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Callers with the role that the method requires.
    Authorised,
    /// The health check without a token, because container probes have none; everything else with a token.
    Probes,
    /// Everyone; only on a listener that only this machine can reach.
    Everybody,
}

/// Identifies callers and checks their roles. Calls that pass carry their [`Caller`].
#[derive(Debug, Clone)]
pub(crate) struct Access {
    authority: Authority,
    reach: Reach,
}

/// Puts a service behind the gate.
pub(crate) const fn gated<S>(
    inner: S,
    authority: Authority,
    reach: Reach,
    permits: Permits,
) -> Gated<S, Access> {
    Gated::new(inner, Access { authority, reach }, permits)
}

impl Access {
    /// The caller; `None` where the call needs none.
    fn identify(&self, request: &http::Request<Body>) -> Result<Option<Caller>, Status> {
        let path = request.uri().path();
        let metadata = || MetadataMap::from_headers(request.headers().clone());
        let peer = request.extensions().get::<GrpcPeer>();
        let shown = || peer.and_then(|peer| peer.certificate.as_ref()).and_then(tls::identity);
        match self.reach {
            Reach::Everybody => Ok(None),
            Reach::Probes if path == HEALTH_CHECK => Ok(None),
            Reach::Probes => self.authority.identify(&metadata(), shown().as_ref()).map(Some),
            Reach::Authorised => self.authority.authorise(&metadata(), shown().as_ref(), path).map(Some),
        }
    }
}

impl Gatekeeper for Access {
    fn admit(&self, request: &mut http::Request<Body>) -> Result<Admitted, Status> {
        let caller = self.identify(request)?;
        let path = request.uri().path();
        let mut bound = bound(path);
        // A token bound to one gateway has the bound of one gateway, a shared token that of all gateways.
        if let (Bound::Stream(stream), Some(Caller { gateway_id: None, .. })) = (&mut bound, &caller)
            && needs(path) == Some(v1::Role::Gateway)
        {
            stream.most_per_caller = stream.most;
        }
        let Some(caller) = caller else {
            return Ok(Admitted { caller: Arc::from("anybody"), bound, identified: false });
        };
        let name = Arc::clone(&caller.name);
        request.extensions_mut().insert(caller);
        Ok(Admitted { caller: name, bound, identified: true })
    }
}
