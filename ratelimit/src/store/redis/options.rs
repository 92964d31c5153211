//! How a Redis server is used.

use std::time::Duration;

/// Time for a new connection, apart from any call's deadline: a handshake may take longer than a decision.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How to use a Redis server.
#[derive(Debug, Clone, Copy)]
pub struct RedisOptions {
    /// The longest a call may take, a wait for a connection included.
    pub deadline: Duration,
    /// Connections, each shared by any number of calls; to every node of a Cluster.
    pub connections: usize,
    /// What a bucket state that is not there means.
    pub cold_start: ColdStart,
    /// Whether calls under the same limits travel as one where they would queue up. Off only to measure.
    pub merge: bool,
}

/// What a bucket state that is not there means: never used, or lost with the data set it was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum ColdStart {
    /// It is empty. A store that lost its data grants every limit's burst once more.
    #[default]
    Burst,
    /// It was full when the data set was born, and has drained since: a store that lost its data grants no burst, and
    /// neither does a new one. BucketStates that do not drain start empty. The birth is read with each connection; of a
    /// Cluster it is that of the shard of the key `weir:{g}:birth`.
    Strict,
}

impl Default for RedisOptions {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(50),
            connections: 2,
            cold_start: ColdStart::default(),
            merge: true,
        }
    }
}
