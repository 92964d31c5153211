//! Pools: how requests are spread, and what is asked of a pool's backends.

use std::time::Duration;

use super::{DAY, MAX_LIST, or, secs};
use crate::resource::Name;
use crate::resource::check::Check;
use crate::resource::demand::Queue;
use crate::v1;

/// How a pool picks among its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BalancingPolicy {
    /// Smooth weighted round-robin over effective weights.
    #[default]
    WeightedRoundRobin,
    /// In turn, ignoring weights.
    RoundRobin,
    /// By chance, ignoring weights.
    Random,
    /// The less loaded of two by chance.
    LeastRequest,
    /// By the beginning of the prompt.
    PrefixAffinity,
    /// By the backends' priority.
    Priority,
}

/// What prefix affinity goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affinity {
    /// Bytes of the prompt that make the prefix: 256.
    pub prefix_bytes: u32,
    /// The most requests a backend may have for its prefixes, of the mean: 125 percent.
    pub load_percent: u32,
}

/// When a silent backend is not waited for alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hedging {
    /// Whether a stream is asked for at another backend as well.
    pub enabled: bool,
    /// The shortest wait: 250 ms.
    pub floor: Duration,
    /// Whether that goes for answers that are not streamed too: no.
    pub unary: bool,
}

/// The clocks of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To open a connection: 10 s.
    pub connect: Duration,
    /// From sending to the first byte of a stream: 5 min.
    pub first_byte: Duration,
    /// Between two chunks of a stream: 5 min.
    pub idle: Duration,
    /// The whole request: 60 min.
    pub total: Duration,
    /// Between two comments to a client whose stream has not begun: none.
    pub keep_alive: Option<Duration>,
}

/// The reasons are in the table of `docs/health.md`, section "Clocks".
impl Default for Timeouts {
    fn default() -> Self {
        let (connect, silence, total) = (secs(10), secs(5 * 60), secs(60 * 60));
        Self { connect, first_byte: silence, idle: silence, total, keep_alive: None }
    }
}

/// The shortest time between two comments: each is a packet to every client that waits.
const KEEP_ALIVE_MIN: Duration = secs(1);

/// The clocks a model sets for itself; `None` is the pool's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TimeoutOverrides {
    /// See [`Timeouts::connect`].
    pub connect: Option<Duration>,
    /// See [`Timeouts::first_byte`].
    pub first_byte: Option<Duration>,
    /// See [`Timeouts::idle`].
    pub idle: Option<Duration>,
    /// See [`Timeouts::total`].
    pub total: Option<Duration>,
    /// See [`Timeouts::keep_alive`].
    pub keep_alive: Option<Duration>,
}

impl TimeoutOverrides {
    pub(in crate::resource) fn judge(wire: Option<&v1::Timeouts>, check: &mut Check) -> Self {
        let Some(w) = wire else { return Self::default() };
        let keep_alive = check.duration_opt("timeouts.keep_alive", w.keep_alive.as_ref(), DAY);
        if let Some(time) = keep_alive.filter(|time| *time < KEEP_ALIVE_MIN) {
            check.violation(
                "timeouts.keep_alive",
                format!("must be at least {KEEP_ALIVE_MIN:?}, is {time:?}"),
            );
        }
        Self {
            keep_alive,
            connect: check.duration_opt("timeouts.connect", w.connect.as_ref(), secs(300)),
            first_byte: check.duration_opt("timeouts.first_byte", w.first_byte.as_ref(), DAY),
            idle: check.duration_opt("timeouts.idle", w.idle.as_ref(), DAY),
            total: check.duration_opt("timeouts.total", w.total.as_ref(), DAY),
        }
    }

    /// These where they are set, else those of `base`.
    pub fn over(&self, base: &Timeouts) -> Timeouts {
        Timeouts {
            connect: self.connect.unwrap_or(base.connect),
            first_byte: self.first_byte.unwrap_or(base.first_byte),
            idle: self.idle.unwrap_or(base.idle),
            total: self.total.unwrap_or(base.total),
            keep_alive: self.keep_alive.or(base.keep_alive),
        }
    }
}

/// Local, passive ejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// Failures in a row that eject: 3.
    pub consecutive_failures: u32,
    /// The first ejection: 5 s, doubled by each further one.
    pub base_duration: Duration,
    /// The longest ejection: 300 s.
    pub max_duration: Duration,
    /// The most of a pool that may be ejected: 50 percent.
    pub max_ejected_percent: u32,
    /// The share of failures within 10 s that ejects: 50 percent.
    pub failure_percent: u32,
    /// Requests below which that share says nothing: 10.
    pub failure_min_requests: u32,
}

/// A bound on retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Retries per hundred requests: 10.
    pub percent: u32,
    /// Retries always allowed per second: 3.
    pub min_per_second: u32,
    /// Attempts per request, the first included: 3.
    pub max_attempts: u32,
}

/// How backends of a pool are probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthProfile {
    /// Between two liveness probes: 5 s.
    pub liveness_interval: Duration,
    /// One probe: 2 s.
    pub timeout: Duration,
    /// Failures in a row that make a backend unhealthy where it is seen from one place only: 3.
    pub unhealthy_threshold: u32,
    /// Successes in a row that make it healthy: 2.
    pub healthy_threshold: u32,
    /// Between two readiness probes: 30 s.
    pub readiness_interval: Duration,
    /// Between two deep probes: 5 min.
    pub deep_interval: Duration,
    /// How long a slow start takes: 60 s.
    pub slow_start: Duration,
    /// How long a backend may say that it is loading: 20 min.
    pub loading_timeout: Duration,
    /// Below so much usable weight all active backends are used, percent: 50; 0 is never.
    pub panic_percent: u32,
    /// Requests for tokens that a gateway may spend on probing a backend in an hour: 240.
    pub paid_probes_per_hour: u32,
}

impl Default for HealthProfile {
    fn default() -> Self {
        Self {
            liveness_interval: secs(5),
            timeout: secs(2),
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            readiness_interval: secs(30),
            deep_interval: secs(300),
            slow_start: secs(60),
            loading_timeout: secs(1200),
            panic_percent: 50,
            paid_probes_per_hour: 240,
        }
    }
}

impl HealthProfile {
    pub(in crate::resource) fn judge(wire: Option<&v1::HealthProfile>, check: &mut Check) -> Self {
        let (h, d) = (wire.copied().unwrap_or_default(), Self::default());
        let mut duration = |name: &str, value: Option<&prost_types::Duration>, default| {
            check.duration(&format!("health.{name}"), value, default, DAY)
        };
        let (liveness_interval, timeout, readiness_interval, deep_interval, slow_start, loading_timeout) = (
            duration("liveness_interval", h.liveness_interval.as_ref(), d.liveness_interval),
            duration("timeout", h.timeout.as_ref(), d.timeout),
            duration("readiness_interval", h.readiness_interval.as_ref(), d.readiness_interval),
            duration("deep_interval", h.deep_interval.as_ref(), d.deep_interval),
            duration("slow_start", h.slow_start.as_ref(), d.slow_start),
            duration("loading_timeout", h.loading_timeout.as_ref(), d.loading_timeout),
        );
        let mut range =
            |name: &str, value: u32, low, high| check.range(&format!("health.{name}"), value, low, high);
        Self {
            liveness_interval,
            timeout,
            unhealthy_threshold: range(
                "unhealthy_threshold",
                or(h.unhealthy_threshold, d.unhealthy_threshold),
                1,
                100,
            ),
            healthy_threshold: range(
                "healthy_threshold",
                or(h.healthy_threshold, d.healthy_threshold),
                1,
                100,
            ),
            readiness_interval,
            deep_interval,
            slow_start,
            loading_timeout,
            panic_percent: range("panic_percent", h.panic_percent.unwrap_or(d.panic_percent), 0, 100),
            paid_probes_per_hour: range(
                "paid_probes_per_hour",
                h.paid_probes_per_hour.unwrap_or(d.paid_probes_per_hour),
                0,
                100_000,
            ),
        }
    }
}

impl Ejection {
    fn judge(wire: Option<&v1::Ejection>, check: &mut Check) -> Self {
        let e = wire.copied().unwrap_or_default();
        Self {
            consecutive_failures: check.range(
                "ejection.consecutive_failures",
                or(e.consecutive_failures, 3),
                1,
                1000,
            ),
            base_duration: check.duration("ejection.base_duration", e.base_duration.as_ref(), secs(5), DAY),
            max_duration: check.duration("ejection.max_duration", e.max_duration.as_ref(), secs(300), DAY),
            max_ejected_percent: check.range(
                "ejection.max_ejected_percent",
                or(e.max_ejected_percent, 50),
                1,
                100,
            ),
            failure_percent: check.range("ejection.failure_percent", or(e.failure_percent, 50), 1, 100),
            failure_min_requests: check.range(
                "ejection.failure_min_requests",
                or(e.failure_min_requests, 10),
                1,
                100_000,
            ),
        }
    }
}

impl RetryBudget {
    fn judge(wire: Option<&v1::RetryBudget>, check: &mut Check) -> Self {
        let r = wire.copied().unwrap_or_default();
        Self {
            percent: check.range("retry_budget.percent", or(r.percent, 10), 1, 100),
            min_per_second: check.range("retry_budget.min_per_second", or(r.min_per_second, 3), 1, 10_000),
            max_attempts: check.range("retry_budget.max_attempts", or(r.max_attempts, 3), 1, 10),
        }
    }
}

impl Affinity {
    fn judge(wire: Option<&v1::Affinity>, check: &mut Check) -> Self {
        let a = wire.copied().unwrap_or_default();
        Self {
            prefix_bytes: check.range("affinity.prefix_bytes", or(a.prefix_bytes, 256), 1, 65_536),
            load_percent: check.range("affinity.load_percent", or(a.load_percent, 125), 100, 1000),
        }
    }
}

impl Hedging {
    fn judge(wire: Option<&v1::Hedging>, check: &mut Check) -> Self {
        let hedging = wire.copied().unwrap_or_default();
        Self {
            enabled: !hedging.disabled,
            floor: check.duration("hedging.floor", hedging.floor.as_ref(), Duration::from_millis(250), DAY),
            unary: hedging.unary,
        }
    }
}

/// Backends that can stand in for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// How to pick.
    pub balancing_policy: BalancingPolicy,
    /// Regions in order of preference; the rest comes last. Empty: all alike.
    pub regions: Vec<String>,
    /// The clocks of a request.
    pub timeouts: Timeouts,
    /// When a gateway stops using a backend on its own evidence.
    pub ejection: Ejection,
    /// How much may be tried again.
    pub retry_budget: RetryBudget,
    /// How backends are probed.
    pub health: HealthProfile,
    /// For prefix affinity.
    pub affinity: Affinity,
    /// When a silent backend is not waited for alone.
    pub hedging: Hedging,
    /// Where requests wait for a slot.
    pub queue: Queue,
}

impl Pool {
    pub(in crate::resource) fn judge(w: &v1::PoolSpec, check: &mut Check) -> Self {
        let balancing_policy = match v1::BalancingPolicy::try_from(w.balancing_policy) {
            Ok(v1::BalancingPolicy::Unspecified | v1::BalancingPolicy::WeightedRoundRobin) => {
                BalancingPolicy::WeightedRoundRobin
            }
            Ok(v1::BalancingPolicy::RoundRobin) => BalancingPolicy::RoundRobin,
            Ok(v1::BalancingPolicy::Random) => BalancingPolicy::Random,
            Ok(v1::BalancingPolicy::LeastRequest) => BalancingPolicy::LeastRequest,
            Ok(v1::BalancingPolicy::PrefixAffinity) => BalancingPolicy::PrefixAffinity,
            Ok(v1::BalancingPolicy::Priority) => BalancingPolicy::Priority,
            Err(_) => {
                check.violation("balancing_policy", "is not a policy this version knows");
                BalancingPolicy::default()
            }
        };
        if w.regions.len() > MAX_LIST {
            check.violation("regions", "must be at most 1000");
        }
        for (i, region) in w.regions.iter().enumerate() {
            check.text(&format!("regions[{i}]"), region, Name::MAX_BYTES);
        }
        Self {
            queue: Queue::judge(w.queue.as_ref(), check),
            balancing_policy,
            regions: w.regions.clone(),
            timeouts: TimeoutOverrides::judge(w.timeouts.as_ref(), check).over(&Timeouts::default()),
            ejection: Ejection::judge(w.ejection.as_ref(), check),
            retry_budget: RetryBudget::judge(w.retry_budget.as_ref(), check),
            health: HealthProfile::judge(w.health.as_ref(), check),
            affinity: Affinity::judge(w.affinity.as_ref(), check),
            hedging: Hedging::judge(w.hedging.as_ref(), check),
        }
    }
}
