//! Deciding without the store, and telling it afterwards.
//!
//! Goes around a limiter whose store can fail. While the store does not serve, each scope does what its
//! [`WithoutStore`](crate::model::limits::WithoutStore) says; a gateway's share starts where the cluster's bucket states were last seen, and the leases it
//! already holds count against its share of slots.
//!
//! **No double burst.** What was admitted here is reported to the store when it is back, before requests go there again:
//! settlements that had to wait, open grants (taken over under their own ids, so that they settle like any other),
//! leases, and the rest of each local bucket state as one charge. A gateway's bucket state drains at its share of the rate from its
//! share of the level, so the shares' bucket states together are never below the bucket state one store would have had. Gateways go
//! back to the store one after the other, each at first within its share; see `join`.
//!
//! **A store that forgot is an outage.** One that comes back empty within milliseconds has lost every lease. Until the
//! gateways have counted theirs again, the grace of any return, each decides alone.
//!
//! **Nobody waits for a dead store.** Once the circuit breaker (`breaker.rs`) is open, only the background asks.

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
