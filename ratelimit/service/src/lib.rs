//! The limits for programs other than the gateway, by gRPC, over the gateway's buckets.
//!
//! * `native`: `weir.v1.LimitService`; the caller brings the limits with the request.
//! * `envoy`: `envoy.service.ratelimit.v3.RateLimitService`; the caller brings descriptors, `rules` says which limits
//!   they consume.
//! * `config`: what the process is told; `run`: putting it together.
//!
//! A process without its store runs and is not ready: it comes back by itself, and meanwhile answers UNAVAILABLE at
//! once, so that a caller's own policy decides (Envoy's `failure_mode_deny`).

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod answer;
mod auth;
mod charges;
pub mod config;
mod configuration;
mod envoy;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
pub mod metrics;
mod native;
mod rules;
mod run;
mod store;
mod wire;

pub use config::Config;
pub use error::StartError;
pub use run::{Running, start};
