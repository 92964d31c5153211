//! The data plane of Weir: a stateless gateway that speaks OpenAI's API.
//!
//! A request's path, in order: [`server`] accepts, [`stack`] identifies, reads, chooses, admits and sends
//! ([`api`], [`routing`], [`limits`], [`send`]), [`body`] streams and gives everything back.
//!
//! Beside it: [`control`] keeps the configuration fresh and exchanges what gateways see.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

pub mod api;
pub mod authentication;
pub mod body;
pub mod config;
pub mod context;
pub mod control;
pub mod error;
pub mod headers;
pub mod intake;
pub mod limits;
pub mod metrics;
pub mod ops;
pub mod probe;
pub mod refusal;
pub mod routing;
pub mod send;
pub mod server;
pub mod stack;

mod run;
mod tries;

pub use run::{Running, StartError, start, start_resolving};
