//! The layers of a limit decision, put together in one place.
//!
//! From the outermost to the store:
//!
//! 1. **Queue** ([`Waiting`]). Outermost, so that only the head of a queue asks what is below, and a newcomer stands
//!    behind those who wait instead of overtaking them.
//! 2. **Deny cache** ([`DenyCache`]). Before any call, since it is there to save calls; inside the queue, so that a head
//!    whose turn has come decides by the same rules as a first call.
//! 3. **Outage** ([`Fallback`]). Around everything that can fail with the store: it sees every failure and notes every
//!    grant, so that it can decide by the local share when the store is away.
//! 4. **Quota prefetch** ([`QuotaPrefetch`]). Inside the outage layer, because quota taken ahead is the store's grant; in
//!    front of the store, because what it holds needs no call.
//! 5. **Coalescing**, inside [`RedisLimiter`](crate::redis::RedisLimiter). Last before the wire, so that calls under the
//!    same limits that would queue for a connection travel as one, whichever layer made them.
//! 6. **Store** ([`AnyLimiter`]): decides and writes.

use crate::layers::deny_cache::DenyCache;
use crate::layers::fallback::{Fallback, LiveGateways};
use crate::layers::quota_prefetch::QuotaPrefetch;
use crate::layers::waiting::Waiting;
use crate::store::any::AnyLimiter;

/// The layers of a gateway.
#[derive(Debug)]
pub struct LimitStack {
    /// Who waits.
    pub waiting: Waiting,
    /// Refusals that need not be asked for again.
    pub deny_cache: DenyCache,
    /// Decides for the cluster, and by this gateway's share of it while the store is away.
    pub limiter: Fallback<QuotaPrefetch<AnyLimiter>>,
}

/// The layers of a process that leaves outages to its callers: the limit service, whose callers have a policy of their
/// own for a call that fails.
#[derive(Debug)]
pub struct ServiceStack {
    /// Who waits.
    pub waiting: Waiting,
    /// Decides for the cluster.
    pub limiter: QuotaPrefetch<AnyLimiter>,
}

impl LimitStack {
    /// All layers around a store, for one of `live_gateways`. Needs a tokio runtime.
    pub fn new(store: AnyLimiter, live_gateways: LiveGateways) -> Self {
        let ServiceStack { waiting, limiter } = ServiceStack::new(store);
        Self { waiting, deny_cache: DenyCache::default(), limiter: Fallback::new(limiter, live_gateways) }
    }
}

impl ServiceStack {
    /// The queue, quota prefetch and what is inside the store. Needs a tokio runtime.
    pub fn new(store: AnyLimiter) -> Self {
        let limiter = match store {
            // A decision in memory costs less than the prefetch would.
            AnyLimiter::Memory(_) => QuotaPrefetch::off(store),
            AnyLimiter::Redis(_) => QuotaPrefetch::new(store),
        };
        Self { waiting: Waiting::default(), limiter }
    }
}
