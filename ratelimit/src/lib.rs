//! Limits that hold for the whole cluster.
//!
//! This crate knows keys and budgets; it does not know HTTP, nor gRPC: the crate `weir-ratelimit-service` serves it. One [`Limiter::acquire`] decides every limit a
//! request is under and takes a concurrency slot at the first candidate backend that has one, atomically.
//!
//! # The contract
//!
//! * **A bucket is a meter**: `level` is what was used and has not yet drained, in micro-units. Capacity and
//!   rate come with every call and are never stored, so a limit can change while its bucket lives and what was
//!   consumed is kept. An absent record is an empty meter; `level > capacity` is debt.
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

pub mod ahead;
pub mod any;
pub mod breaker;
pub mod budget;
mod call;
pub mod data_set;
pub mod denials;
pub mod error;
pub mod fallback;
pub mod holder;
pub mod key;
pub mod lag;
pub mod memory;
pub mod rates;
pub mod redis;
pub mod types;
pub mod usage;
pub mod waiting;

pub use any::AnyLimiter;
pub use budget::FOREVER;
pub use error::{Error, Fault, Trouble};
pub use fallback::Fallback;
pub use holder::Holder;
pub use key::{Scope, scope_keys};
pub use rates::{max_wait, scope_limits};
pub use types::*;
pub use usage::{Tally, Usage, UsageLines};
