//! Options for the use of a Redis server.

use std::time::Duration;

/// The timeout of connecting.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Options for the use of a Redis server.
#[derive(Debug, Clone, Copy)]
pub struct RedisOptions {
    /// How long the server may say nothing at all while calls wait, before they fail. One late answer among others is
    /// waited for longer, and so is every answer while this process gets too little CPU.
    pub silence: Duration,
    /// The number of connections, each shared by any number of calls. A Cluster gets as many per node.
    pub connections: usize,
    /// The meaning of a missing bucket state.
    pub cold_start: ColdStart,
    /// Whether calls under the same limits are coalesced where they would queue up. Measurements turn it off.
    pub coalesce: bool,
}

/// The meaning of a missing bucket state: it was never used, or was lost with its data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ColdStart {
    /// The bucket is empty. A store that lost its data grants the burst of every limit again.
    #[default]
    Burst,
    /// The bucket was full when the data set was created, and has drained since. So a store that lost its data grants
    /// no burst, and neither does a new store. Buckets that do not drain start empty. The creation time is read with
    /// each connection; in a Cluster it is that of the shard of the key `weir:{g}:birth`.
    Strict,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(1),
            connections: 2,
            cold_start: ColdStart::default(),
            coalesce: true,
        }
    }
}
