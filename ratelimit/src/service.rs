//! The limits for programs other than the gateway, by gRPC, over the gateway's buckets.
//!
//! * [`native`]: `weir.v1.LimitService`; the caller brings the limits with the request.
//! * [`config`]: what the process is told; [`run`]: putting it together.
//!
//! A process without its store runs and is not ready: it comes back by itself, and meanwhile answers UNAVAILABLE at
//! once, so that a caller's own policy decides (Envoy's `failure_mode_deny`).

mod auth;
pub mod config;
pub mod metrics;
mod native;
mod run;
mod store;
mod wire;

pub use config::Config;
pub use run::{Running, StartError, start};
