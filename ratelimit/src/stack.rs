//! The layers of a limit decision, put together in one place.
//!
//! From the outermost to the store:
//!
//! 1. **Queue** ([`Waiting`]). Outermost: only the head of a queue asks the layers below, and a newcomer joins the
//!    queue instead of overtaking those who wait.
//! 2. **Deny cache** ([`DenyCache`]). Before any call, because it must save calls. Inside the queue, so that a head
//!    with its turn decides by the same rules as a first call.
//! 3. **Store outage** ([`Fallback`]). Around everything that can fail with the store: it sees every failure and
//!    notes every grant, so that it can decide by the local share when the store is away.
//! 4. **Quota prefetch** ([`QuotaPrefetch`]). Inside the outage layer, because prefetched quota is the store's grant.
//!    In front of the store, because admissions from quota need no call.
//! 5. **Coalescing**, inside [`RedisLimiter`](crate::redis::RedisLimiter). Last before the wire, so that calls under
//!    the same limits that would queue for a connection become one, whichever layer made them.
//! 6. **Store** ([`AnyLimiter`]): decides and writes.

use crate::layers::deny_cache::DenyCache;
use crate::layers::fallback::{Fallback, LiveGateways};
use crate::layers::quota_prefetch::QuotaPrefetch;
use crate::layers::waiting::Waiting;
use crate::store::any::AnyLimiter;

/// The layers of a gateway.
#[derive(Debug)]
pub struct LimitStack {
    /// The queues.
    pub waiting: Waiting,
    /// Refusals that are answered from memory.
    pub deny_cache: DenyCache,
    /// Decides for the cluster, and by the local share during a store outage.
    pub limiter: Fallback<QuotaPrefetch<AnyLimiter>>,
}

/// The layers of the limit service. It leaves store outages to its callers, which have a policy of their own for
/// failed calls.
#[derive(Debug)]
pub struct ServiceStack {
    /// The queues.
    pub waiting: Waiting,
    /// Decides for the cluster.
    pub limiter: QuotaPrefetch<AnyLimiter>,
}

impl LimitStack {
    /// Puts all layers around a store. `live_gateways` returns the number of gateways that share the limits. Needs a
    /// tokio runtime.
    pub fn new(store: AnyLimiter, live_gateways: LiveGateways) -> Self {
        let ServiceStack { waiting, limiter } = ServiceStack::new(store);
        Self { waiting, deny_cache: DenyCache::default(), limiter: Fallback::new(limiter, live_gateways) }
    }
}

impl ServiceStack {
    /// Puts the queue and quota prefetch around a store. Needs a tokio runtime.
    pub fn new(store: AnyLimiter) -> Self {
        let limiter = match store {
            // A decision in memory costs less than prefetching quota for it.
            AnyLimiter::Memory(_) => QuotaPrefetch::off(store),
            AnyLimiter::Redis(_) => QuotaPrefetch::new(store),
        };
        Self { waiting: Waiting::default(), limiter }
    }
}
