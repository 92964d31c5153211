//! Who may call the limit service: the rule behind the gate of its listener.

use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use tonic::body::Body;
use weir_runtime::grpc::{Admitted, Bound, Gated, Gatekeeper, HEALTH_CHECK, Permits, standard_bound};

use crate::auth::Guard;

/// Above the longest wait that a call may ask for, 60 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(90);

/// Everybody who has the token. Health checks need none, because container probes have none.
#[derive(Debug, Clone)]
pub(super) struct TokenHolders(Guard);

/// Puts a service behind the gate.
pub(super) const fn gated<S>(inner: S, guard: Guard, permits: Permits) -> Gated<S, TokenHolders> {
    Gated::new(inner, TokenHolders(guard), permits)
}

impl Gatekeeper for TokenHolders {
    fn admit(&self, request: &mut http::Request<Body>) -> Result<Admitted, Status> {
        let path = request.uri().path();
        let identified = path != HEALTH_CHECK;
        if identified {
            self.0.check(request.headers())?;
        }
        // All callers have one token, so none of them has a share of its own.
        let bound = standard_bound(path, usize::MAX).unwrap_or(Bound::Unary(CALL_TIMEOUT));
        Ok(Admitted { caller: Arc::from("callers"), bound, identified })
    }
}
