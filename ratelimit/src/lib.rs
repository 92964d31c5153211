//! Limits that hold for the whole cluster.
//!
//! This crate knows keys and budgets; it does not know HTTP, nor gRPC: the crate `weir-ratelimit-service` serves it. One [`Limiter::acquire`] decides every limit a
//! request is under and takes a concurrency slot at the first candidate backend that has one, atomically.
//!
//! # The contract
//!
//! * **A bucket is a bucket state**: `level` is what was used and has not yet drained, in micro-units. Capacity and
//!   rate come with every call and are never stored, so a limit can change while its bucket lives and what was
//!   consumed is kept. An absent record is an empty bucket state; `level > capacity` is debt.
//! * **Check all, then write all.** A refusal writes nothing, for any scope.
//! * **Reserve, then settle.** `acquire` charges an estimate, [`Limiter::settle`] applies `actual - reserved`
//!   once per reservation id, however often it is called. A reservation nobody settles stands.
//! * **Concurrency is leases**: a member per request with an expiry, renewed while the request lives and
//!   removed by id. A crashed holder frees its slots within the lease time; a late release frees nobody else's.
//! * **Time** is the store's own (Redis `TIME`, tokio's clock in memory) and never runs backwards per record.
//! * **Usage**: a settlement may say what its request used; it is added to the account of a tenant, model and day
//!   exactly when the settlement applies ([`usage`]).
//! * Waits are rounded up, what remains is rounded down.
//!
//! [`Fallback`] goes around a limiter whose store can fail: it decides by each scope's [`WithoutStore`] while the
//! store is away, and charges what it admitted when the store is back.
//!
//! [`memory::MemoryLimiter`] and [`redis::RedisLimiter`] keep the same contract; one suite proves both.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod layers;
pub mod membership;
mod model;
pub mod reservation;
pub mod stack;
mod store;

pub use layers::fallback::Fallback;
pub use layers::{deny_cache, fallback, quota_prefetch, waiting};
pub use model::call::{
    Acquire, Bound, Candidate, Charge, ChargeRule, Decision, MAX_CANDIDATES, MAX_CHARGES, ORPHAN_SETS_MAX,
    Outcome, Renewal, Settle, Settled,
};
pub use model::cost::Cost;
pub use model::error::{Error, Fault, Trouble};
pub use model::id::{OwnerId, ReservationId};
pub use model::key::{Key, KeyMap, Scope, limit_keys, scope_keys};
pub use model::kind::{Bucket, Kind};
pub use model::leaky_bucket::FOREVER;
pub use model::limiter::Limiter;
pub use model::limits::{LimitState, MAX_SCOPES, Mode, ScopeLimits, Scopes, Verdict, What, WithoutStore};
pub use model::rates::{Declared, DeclaredLimits, max_wait, scope_limits};
pub use model::usage::{Tally, Usage, UsageLines};
pub use model::{data_set, leaky_bucket, rates, usage};
pub use stack::{LimitStack, ServiceStack};
pub use store::any::AnyLimiter;
pub use store::{memory, redis};
