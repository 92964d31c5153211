//! Every number of the verdict that is not a pool's to choose, with its reason.

use std::time::Duration;

use super::tier::Tier;

/// Observers per backend. Three see a liveness failure within a third of the interval and can outvote one of
/// them; readiness costs tokens, so two; deep only ever degrades, so one.
pub(crate) const fn observers_wanted(tier: Tier) -> usize {
    match tier {
        Tier::Liveness => 3,
        Tier::Readiness => 2,
        Tier::Deep => 1,
    }
}

/// Observers that must see failures before a backend is ejected, and that together can clear it: one may be wrong.
pub(crate) const QUORUM: usize = 2;
/// Failures in a row before the vote of an observer is against a backend: one may be a lost packet.
pub(crate) const FAILURES_IN_A_ROW: u32 = 2;
/// Observers that are asked to confirm, the assigned ones first: when those share a broken path, others can
/// clear the backend. More of them would cost more than they could tell.
pub(crate) const CONFIRMERS: usize = 8;
/// Beyond the probe's own timeout: half a second between its two probes, the rest for the way there and back.
pub(crate) const CONFIRM_SLACK: Duration = Duration::from_millis(1500);
/// How long an observer that was outvoted makes no backend suspect on its own.
pub(crate) const CLEARED_FOR: Duration = Duration::from_secs(30);
/// A vote counts for so many intervals of its tier: two probes may be lost.
pub(crate) const EXPIRY_INTERVALS: u32 = 3;
/// And never for less than this: a vote must outlive the probes that confirm it.
pub(crate) const EXPIRY_MIN: Duration = Duration::from_secs(15);
/// Votes kept per backend; beyond what is assigned and asked, only expired ones would be.
pub(crate) const VOTES_MAX: usize = 64;
/// Longest detail of a vote or a rule, bytes.
pub(crate) const DETAIL_MAX_BYTES: usize = 200;

/// The second ejection holds so long before recovery may begin, each further one twice as long.
pub(crate) const HOLD_FIRST: Duration = Duration::from_secs(10);
/// The longest hold-down.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(300);
/// One step of damping is taken back for so long in use.
pub(crate) const HOLD_DECAY: Duration = Duration::from_secs(300);
/// A backend that answers only now and then is probed by other observers at most so often.
pub(crate) const RECHECK: Duration = Duration::from_secs(5);
/// The weight with which a slow start begins; less would leave small pools without evidence.
pub(crate) const RAMP_FLOOR: f64 = 0.1;
/// What is left of a degraded backend's weight.
pub(crate) const DEGRADED_FACTOR: f64 = 0.5;

/// A sign of being busy holds so long: two readiness rounds would be too long for a short queue.
pub(crate) const BUSY_FOR: Duration = Duration::from_secs(10);
/// Requests within the error window before its rate means something.
pub(crate) const ERRORS_MIN_REQUESTS: u64 = 50;
/// From here on failing requests degrade; from [`ERRORS_SUSPECT`] on they make suspicious.
pub(crate) const ERRORS_DEGRADE: f64 = 0.05;
/// See [`ERRORS_DEGRADE`].
pub(crate) const ERRORS_SUSPECT: f64 = 0.5;
/// Half of the error window: it is kept in two halves.
pub(crate) const ERRORS_HALF_WINDOW: Duration = Duration::from_secs(15);
/// Failures of one gateway, none succeeding between, that make suspicious.
pub(crate) const PASSIVE_FAILURES: u64 = 3;
/// Readings in a row before a slow, exhausted or full backend is degraded: one may be a coincidence.
pub(crate) const READINGS: u32 = 2;
/// A readiness probe this many times slower than usual is slow...
pub(crate) const SLOW_RATIO: f64 = 3.0;
/// ...unless it is faster than this: nobody minds.
pub(crate) const SLOW_FLOOR: Duration = Duration::from_secs(1);
/// Below this share of its usual tokens per second a backend is slow.
pub(crate) const TOKENS_RATIO: f64 = 0.5;
/// From here on the KV cache is full.
pub(crate) const CACHE_FULL: f64 = 0.95;
/// What "usual" means: the time constant of the baselines.
pub(crate) const BASELINE_TAU: Duration = Duration::from_secs(3600);

/// What an observer saw in this window is compared with the others.
pub(crate) const OBSERVER_WINDOW: Duration = Duration::from_secs(10);
/// Backends it must have probed before "most" means something.
pub(crate) const OBSERVER_MIN_BACKENDS: usize = 4;
/// An observer that alone sees most backends fail has no vote for so long.
pub(crate) const ISOLATION: Duration = Duration::from_secs(60);

/// Ejections within this window are counted together...
pub(crate) const FLIP_WINDOW: Duration = Duration::from_secs(30);
/// ...and more than this share of a pool at once is rather the probers', DNS's or a shared dependency's fault...
pub(crate) const FLIP_POOL_SHARE: f64 = 0.5;
/// ...as is more than this share of all backends.
pub(crate) const FLIP_ALL_SHARE: f64 = 0.3;
/// Ejections before a share means anything.
pub(crate) const FLIP_MIN: usize = 2;

/// Events remembered.
pub(crate) const EVENTS_MAX: usize = 1024;
