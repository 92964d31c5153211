//! What a client may take of a connection.

use std::time::Duration;

use weir_runtime::edge::framing::HeadBounds;
use weir_runtime::edge::{self, HttpBounds};

/// What a connection may cost.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections and their clocks.
    pub edge: edge::Bounds,
    /// Requests of a connection.
    pub http: HttpBounds,
    /// To end in time once told to: after readiness is withdrawn, so long are new connections still taken: 2 s.
    pub pre_stop: Duration,
    /// And so long may streams run: 600 s.
    pub drain: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            edge: edge::Bounds {
                connections: 10_000,
                // As many as in all, since behind an edge all come from one.
                connections_per_address: 10_000,
                head: Duration::from_secs(10),
                // nginx's keepalive_timeout: longer than the pools of most clients keep an idle connection.
                idle: Duration::from_secs(75),
                stranger_idle: Duration::from_secs(10),
                write_stall: WRITE_STALL,
            },
            http: HTTP,
            pre_stop: Duration::from_secs(2),
            drain: Duration::from_secs(600),
        }
    }
}

/// A client that takes nothing for so long is cut, as by nginx's send_timeout: 60 s.
pub(crate) const WRITE_STALL: Duration = Duration::from_secs(60);
/// Heads of 64 KiB and 100 fields, request lines of 16 KiB, 250 HTTP/2 streams on a connection.
pub(crate) const HTTP: HttpBounds =
    HttpBounds { head: HeadBounds { bytes: 64 << 10, fields: 100, target_bytes: 16 << 10 }, streams: 250 };
