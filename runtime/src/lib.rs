//! What all Weir processes share: listeners, logs, the operations port, egress, gRPC bounds, and small pieces of
//! state.

// These macros panic if the stream is gone and hang if nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::sync::LazyLock;
use std::time::SystemTime;

mod backoff;
mod beside;
pub mod edge;
mod egress;
pub mod grpc;
mod logs;
mod metrics;
mod ops;
mod persistent_map;
mod recent_map;
mod secret;
mod signals;
mod tls;

pub use backoff::Backoff;
pub use beside::beside;
pub use egress::{Cidr, CidrError, EgressConnector, EgressPolicy, PolicyResolver, RefusedAddress};
pub use logs::{FlushLogs, flush_logs_at_end, init_logs, register, say};
pub use ops::{
    AllowedHost, AllowedHosts, Head, OpsRefusal, OpsToken, Readiness, Refusal, guard_ops_page, read_token,
    serve_ops, serve_ops_with,
};
pub use persistent_map::{Changes, PersistentMap};
pub use recent_map::RecentMap;
pub use secret::Secret;
pub use signals::shutdown_on_signals;
pub use tls::{ServerTls, TlsError};

/// Of every process that links this crate. Beside the C library's allocator a request costs a fifth less, and the memory of slow
/// streams does not fragment: see docs/benchmarks.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The commit of the build from `WEIR_COMMIT`, else of the git clone in a release build; "unknown" without either.
pub const COMMIT: &str = match option_env!("WEIR_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Version and commit, as `--version` and the control plane show them.
pub fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| format!("{} ({COMMIT})", env!("CARGO_PKG_VERSION")));
    &VERSION
}

/// A random number from 0 to 1, from the system.
pub fn random_unit() -> f64 {
    // Without randomness a backoff or a phase is not spread, which is no error.
    getrandom::u32().map_or(0.5, |n| f64::from(n) / f64::from(u32::MAX))
}

/// The wall clock: for expiry, calendars and people. Measured times and waits use tokio's clock.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the time of day")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The exit codes of every process.
pub mod exit {
    /// Success.
    pub const DONE: u8 = 0;
    /// Failure.
    pub const FAILED: u8 = 1;
    /// Wrong usage, as clap reports it.
    pub const USAGE: u8 = 2;
    /// A bad configuration; the message names the key.
    pub const CONFIG: u8 = 64;
    /// A missing service; the message names it and the remedy.
    pub const UNAVAILABLE: u8 = 69;
}
