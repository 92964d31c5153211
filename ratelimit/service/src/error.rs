//! Why a limit service does not start.

use std::net::SocketAddr;

use weir_runtime::exit;

/// Why a limit service could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong; says which.
    #[error("{0}")]
    Config(String),
    /// An address cannot be used.
    #[error("cannot listen on {address}: {source}; stop what uses it or choose another with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl StartError {
    /// The exit code of a process that ends with this error.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) => exit::CONFIG,
            Self::Listen { .. } => exit::UNAVAILABLE,
        }
    }
}
