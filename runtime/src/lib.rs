//! What every Weir process shares and nothing else: its log, its operations port, its end.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::sync::LazyLock;
use std::time::SystemTime;

mod backoff;
pub mod edge;
mod egress;
pub mod grpc;
mod logs;
mod ops;
mod secret;
mod signals;
mod tls;

pub use backoff::Backoff;
pub use egress::{Cidr, CidrError, EgressConnector, EgressPolicy, PolicyResolver, RefusedAddress};
pub use logs::{FlushLogs, flush_logs_at_end, init_logs, register, say};
pub use ops::{
    AllowedHost, AllowedHosts, Head, OpsRefusal, OpsToken, Readiness, Refusal, guard_ops_page, read_token,
    serve_ops, serve_ops_with,
};
pub use secret::Secret;
pub use signals::shutdown_on_signals;
pub use tls::{ServerTls, TlsError};

/// The commit the build was told in `WEIR_COMMIT`; "unknown" otherwise.
pub const COMMIT: &str = match option_env!("WEIR_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Version and commit, as `--version` and the control plane show them.
pub fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| format!("{} ({COMMIT})", env!("CARGO_PKG_VERSION")));
    &VERSION
}

/// A number from 0 to 1, from the system's own randomness.
pub fn random_unit() -> f64 {
    // Without randomness a backoff or a phase is merely not spread.
    getrandom::u32().map_or(0.5, |n| f64::from(n) / f64::from(u32::MAX))
}

/// The time of day: for expiry, calendars, turns and people. What is measured or waited for uses tokio's clock.
#[expect(clippy::disallowed_methods, reason = "the one place that reads the time of day")]
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// The exit codes of every process.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed.
    pub const FAILED: u8 = 1;
    /// Wrong usage; clap's own.
    pub const USAGE: u8 = 2;
    /// The configuration is bad; the message names the key.
    pub const CONFIG: u8 = 64;
    /// A needed service is not there; the message names it and the remedy.
    pub const UNAVAILABLE: u8 = 69;
}
