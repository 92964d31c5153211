//! The data plane of Weir: a stateless gateway that speaks OpenAI's API.
//!
//! - [`http`]: the way of a request, with its [pipeline](self::http::pipeline)
//! - [`api`]: what requests ask for and answers say, as bytes
//! - [`routing`]: the configuration compiled for requests, the state of backends, and the choice between them
//! - [`limits`]: what a request costs, reserved before and settled after it
//! - [`control`]: the control plane's side: configuration, credentials, reports
//! - [`probe`]: health checks of backends
//! - [`ops`]: pages and metrics of the operations port
//!
//! Rooms import downwards only: `http`, `ops` and `probe` use `limits`, which uses `control`, which uses `routing`; `api`
//! uses none of them.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

pub mod api;
pub mod config;
pub mod control;
pub mod error;
pub mod http;
pub mod limits;
pub mod metrics;
pub mod ops;
pub mod probe;
pub mod routing;

mod bootstrap;

pub use bootstrap::{Handle, StartError, Starting, start, start_resolving};
