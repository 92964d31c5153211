//! The control plane of Weir: keeps what operators declare, hands it to gateways, and gathers what they see.
//!
//! * [`ControlPlane::start`] runs all of it in the calling process: the binary, `weir up` and tests use it alike.
//! * [`store`] is where resources are kept.
//!
//! A change goes from the admin service through a plan (pure) and a transaction into the store; the catalog follows
//! the store; gateways follow debounced snapshots of the catalog.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod auth;
mod catalog;
mod encoding;
#[doc(hidden)]
pub mod fuzzing;
mod gateways;
mod health;
mod leader;
mod metrics;
mod model;
mod page;
mod probe;
mod publish;
mod reflect;
mod server;
mod services;
pub mod store;
mod tls;
mod verdicts;

pub use server::{Config, ControlPlane, Error, Handle, StoreConfig};
pub use tls::TlsConfig;
