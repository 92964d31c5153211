//! The data plane of Weir: a stateless gateway that speaks OpenAI's API.
//!
//! A request's path, in order: [`server`] accepts, [`stack`] identifies, reads, chooses, admits and sends
//! ([`read`], [`balance`], [`account`], [`send`]), [`body`] streams and gives everything back.
//!
//! Beside it: [`subscribe`] keeps the [`snapshot`] fresh ([`held`] is its copy on disk, [`live`] its handle),
//! [`report`] exchanges what gateways see.

pub mod account;
pub mod balance;
pub mod body;
pub mod config;
pub mod context;
pub mod error;
pub mod estimate;
pub mod headers;
pub mod held;
pub mod intake;
pub mod live;
pub mod metrics;
pub mod read;
pub mod refusal;
pub mod report;
pub mod runtime_state;
pub mod send;
pub mod server;
pub mod snapshot;
pub mod stack;
pub mod stream;
pub mod subscribe;
pub mod upstream;

mod run;
mod tries;

pub use run::{Running, StartError, start};

/// A number from 0 to 1, from the system's own randomness.
pub(crate) fn random_unit() -> f64 {
    // Without randomness a backoff or a phase is merely not spread.
    getrandom::u32().map_or(0.5, |n| f64::from(n) / f64::from(u32::MAX))
}
