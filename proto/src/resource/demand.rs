//! Who waits how long and in which order, and how much money may be spent.

use std::time::Duration;

use super::check::Check;
use crate::v1;

/// The longest that anything may wait for a limit.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(600);

/// Where requests wait for a slot at a pool's backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Requests that may wait in each gateway, for each model: 1000.
    pub max_waiting: u32,
    /// How long a request waits before its fallbacks are tried: 5 s. Zero: not at all.
    pub max_wait: Duration,
}

impl Default for Queue {
    fn default() -> Self {
        Self { max_waiting: 1000, max_wait: Duration::from_secs(5) }
    }
}

impl Queue {
    pub(super) fn judge(wire: Option<&v1::Queue>, check: &mut Check) -> Self {
        let defaults = Self::default();
        let Some(w) = wire else { return defaults };
        let max_waiting = if w.max_waiting == 0 { defaults.max_waiting } else { w.max_waiting };
        Self {
            max_waiting: check.range("queue.max_waiting", max_waiting, 1, 100_000),
            max_wait: wait("queue.max_wait", w.max_wait.as_ref(), check).unwrap_or(defaults.max_wait),
        }
    }
}

/// A wait, which unlike other durations may be zero.
pub(super) fn wait(path: &str, wire: Option<&prost_types::Duration>, check: &mut Check) -> Option<Duration> {
    match wire {
        Some(wire) if wire.seconds == 0 && wire.nanos == 0 => Some(Duration::ZERO),
        wire => check.duration_opt(path, wire, WAIT_MAX),
    }
}

/// Who goes first when several wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Before all others.
    High,
    /// The rest.
    #[default]
    Normal,
    /// Only when nobody else waits.
    Low,
}

impl Priority {
    pub(super) fn judge(wire: i32, check: &mut Check) -> Self {
        match v1::Priority::try_from(wire) {
            Ok(v1::Priority::Unspecified | v1::Priority::Normal) => Self::Normal,
            Ok(v1::Priority::High) => Self::High,
            Ok(v1::Priority::Low) => Self::Low,
            Err(_) => {
                check.violation("priority", "is not a priority this version knows");
                Self::default()
            }
        }
    }
}

/// A stretch of the calendar, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Period {
    /// From midnight.
    Day,
    /// From Monday.
    Week,
    /// From the first.
    #[default]
    Month,
}

/// How much money may be spent in a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Micro-dollars, at most [`Budget::MAX_MICRO_DOLLARS`].
    pub micro_dollars: u64,
    /// In what time.
    pub period: Period,
}

impl Budget {
    /// The largest budget: a thousand million dollars, well below what a script's double holds exactly.
    pub const MAX_MICRO_DOLLARS: u64 = 1_000_000_000_000_000;

    pub(super) fn judge(path: &str, wire: Option<&v1::Budget>, check: &mut Check) -> Option<Self> {
        let w = wire?;
        let period = match v1::BudgetPeriod::try_from(w.period) {
            Ok(v1::BudgetPeriod::Unspecified | v1::BudgetPeriod::Month) => Period::Month,
            Ok(v1::BudgetPeriod::Week) => Period::Week,
            Ok(v1::BudgetPeriod::Day) => Period::Day,
            Err(_) => {
                check.violation(&format!("{path}.period"), "is not a period this version knows");
                Period::default()
            }
        };
        let micro_dollars =
            check.range(&format!("{path}.micro_dollars"), w.micro_dollars, 0, Self::MAX_MICRO_DOLLARS);
        Some(Self { micro_dollars, period })
    }
}
