//! Store outages: decides without the store, and reports the decisions afterwards.
//!
//! Wraps a limiter whose store can fail. During an outage each scope does what its
//! [`WithoutStore`](crate::model::limits::WithoutStore) says; a gateway's local share starts at the last seen bucket
//! states of the cluster, and the leases that it holds count against its local share of slots.
//!
//! **No double burst.** What was admitted here is reported to the store when it is back, before requests go there again:
//! settlements that had to wait, open grants (taken over under their own ids, so that they settle like any other),
//! leases, and the rest of each local bucket state as one charge. A gateway's bucket state drains at its share of the rate from its
//! share of the level, so the shares' bucket states together are never below the bucket state one store would have had. Gateways go
//! back to the store one after the other, each at first within its share; see `join`.
//!
//! **Data loss is an outage.** A store that returns empty within milliseconds has lost every lease. Until the gateways have
//! counted their leases again, for the grace time of any return, each gateway decides alone.
//!
//! **No request waits for a dead store.** While the circuit breaker (`breaker.rs`) is open, only a background task asks.

mod breaker;
mod calls;
mod handle;
mod inner;
mod join;
mod last_seen;
mod local;
mod local_share;
mod recovery;
mod store_leases;

pub use self::breaker::Phase;
pub use self::handle::{Fallback, Status};
pub use self::inner::LiveGateways;
