//! The event in the middle of a run, and what design section 5 allows because of it.

use std::time::Duration;

use crate::store::Topology;

/// The time by which a replica may lag behind its primary: they compare once a second.
const REPLICATION: Duration = Duration::from_secs(1);

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Quiet,
    GatewayKilled,
    ScriptFlush,
    SlotMigration,
    RedisPaused,
    RedisRestartedEmpty,
    RedisRestartedEmptyStrict,
    Failover,
}

/// The allowed excess over the envelope, because the store was away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Bound {
    /// Each capacity once more: its bucket was lost and counts as empty.
    pub(crate) burst: bool,
    /// Admissions in this time before the event: they had not reached the replica.
    pub(crate) unreplicated: Duration,
}

impl Event {
    pub(crate) const ALL: [Self; 8] = [
        Self::Quiet,
        Self::GatewayKilled,
        Self::ScriptFlush,
        Self::SlotMigration,
        Self::RedisPaused,
        Self::RedisRestartedEmpty,
        Self::RedisRestartedEmptyStrict,
        Self::Failover,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::GatewayKilled => "gateway_killed",
            Self::ScriptFlush => "script_flush",
            Self::SlotMigration => "slot_migration",
            Self::RedisPaused => "redis_paused_2s",
            Self::RedisRestartedEmpty => "redis_restarted_empty",
            Self::RedisRestartedEmptyStrict => "redis_restarted_empty_strict",
            Self::Failover => "failover_to_replica",
        }
    }

    pub(crate) const fn topology(self) -> Topology {
        match self {
            Self::Failover => Topology::Sentinel,
            Self::SlotMigration => Topology::Cluster,
            _ => Topology::One,
        }
    }

    /// Whether a missing bucket counts as full when the data set was created.
    pub(crate) const fn is_strict(self) -> bool {
        matches!(self, Self::RedisRestartedEmptyStrict)
    }

    /// `None` while Redis lives: no excess over the envelope is allowed.
    pub(crate) const fn bound(self) -> Option<Bound> {
        let alone = Bound { burst: false, unreplicated: Duration::ZERO };
        match self {
            Self::Quiet | Self::GatewayKilled | Self::ScriptFlush | Self::SlotMigration => None,
            Self::RedisPaused | Self::RedisRestartedEmptyStrict => Some(alone),
            Self::RedisRestartedEmpty => Some(Bound { burst: true, ..alone }),
            Self::Failover => Some(Bound { unreplicated: REPLICATION, ..alone }),
        }
    }
}
