//! The constants of verdicts that are not settings of a pool, each with its reason.

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

/// The number of observers that eject a backend together, or clear it together: a single observer may be wrong.
pub(crate) const QUORUM: usize = 2;
/// Observers that are told to confirm a failure, the assigned ones first. If these share a broken network path, the others
/// clear the backend. More observers would add cost without more certainty.
pub(crate) const CONFIRMERS: usize = 8;
/// Added to the probe timeout for a confirmation: half a second between the two probes, the rest for the network.
pub(crate) const CONFIRM_SLACK: Duration = Duration::from_millis(1500);
/// How long an outvoted observer cannot make the backend suspect again.
pub(crate) const CLEARED_FOR: Duration = Duration::from_secs(30);
/// The silence of a backend with requests in flight that is always waited for: shorter ones are unremarkable. A completion takes
/// longer than a look at the server, and a model that hangs is to be found within a minute.
pub(crate) const fn silence_min(tier: Tier) -> Duration {
    match tier {
        Tier::Liveness => Duration::from_secs(4),
        Tier::Readiness | Tier::Deep => Duration::from_secs(30),
    }
}
/// Votes kept per backend, more than the assigned and asked observers can have.
pub(crate) const VOTES_MAX: usize = 64;
/// Longest detail of a vote or a rule, bytes.
pub(crate) const DETAIL_MAX_BYTES: usize = 200;

/// The hold-down time after the second ejection; each further ejection doubles it.
pub(crate) const HOLD_FIRST: Duration = Duration::from_secs(10);
/// The longest hold-down time.
pub(crate) const HOLD_MAX: Duration = Duration::from_secs(300);
/// The time in use after which one step of damping is removed.
pub(crate) const HOLD_DECAY: Duration = Duration::from_secs(300);
/// The shortest interval between two extra probes of an unhealthy backend that passed for one observer.
pub(crate) const RECHECK: Duration = Duration::from_secs(5);
/// The share of the weight at the start of a slow start. With less, a small pool would have too few requests to judge by.
pub(crate) const RAMP_FLOOR: f64 = 0.1;
/// The share of its weight that a degraded backend keeps.
pub(crate) const DEGRADED_FACTOR: f64 = 0.5;

/// How long a busy answer degrades a backend. Two readiness intervals would be too long for a short queue.
pub(crate) const BUSY_FOR: Duration = Duration::from_secs(10);
/// The requests in the error window below which the rate is ignored.
pub(crate) const ERRORS_MIN_REQUESTS: u64 = 50;
/// The rate of failed requests that degrades a backend. [`ERRORS_SUSPECT`] makes the backend suspect.
pub(crate) const ERRORS_DEGRADE: f64 = 0.05;
/// See [`ERRORS_DEGRADE`].
pub(crate) const ERRORS_SUSPECT: f64 = 0.5;
/// Half of the error window, which consists of two halves.
pub(crate) const ERRORS_HALF_WINDOW: Duration = Duration::from_secs(15);
/// Failed requests of one gateway without a success that make a backend suspect.
pub(crate) const PASSIVE_FAILURES: u64 = 3;
/// How long requests that failed or succeeded speak for what the backend does now.
pub(crate) const REQUESTS_WINDOW: Duration = Duration::from_secs(30);
/// Failed requests without a success before requests that nobody else answered either degrade a backend: they may be bad requests.
pub(crate) const UNPROVEN_MIN: u64 = 10;
/// The hold-down time after an ejection because of requests; each further ejection doubles it. Probes passed all the while, so they
/// cannot end it sooner, and gateways have ended their own first ejections by then.
pub(crate) const HOLD_REQUESTS: Duration = Duration::from_secs(30);
/// A gateway that does not say any more how many requests it has in flight has none.
pub(crate) const IN_FLIGHT_FOR: Duration = Duration::from_secs(5);
/// A backend is silent for at most this multiple of the longest silence between two of its answers...
pub(crate) const SILENCE_RATIO: f64 = 2.0;
/// ...which is taken to be this before one was seen: requests that take ten seconds are usual.
pub(crate) const SILENCE_UNKNOWN: Duration = Duration::from_secs(15);
/// Longer silences are forgotten by half within this time.
pub(crate) const SILENCE_HALF_LIFE: Duration = Duration::from_secs(600);
/// No silence is waited for longer.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(300);
/// Consecutive readings before a slow or full backend is degraded: one may be an outlier.
pub(crate) const READINGS: u32 = 2;
/// A readiness probe is slow if it takes this multiple of the usual time...
pub(crate) const SLOW_RATIO: f64 = 3.0;
/// ...and longer than this.
pub(crate) const SLOW_FLOOR: Duration = Duration::from_secs(1);
/// A backend is slow below this share of its usual tokens per second.
pub(crate) const TOKENS_RATIO: f64 = 0.5;
/// The used part from which the KV cache counts as full.
pub(crate) const CACHE_FULL: f64 = 0.95;
/// The time constant of the baselines, which define "usual".
pub(crate) const BASELINE_TAU: Duration = Duration::from_secs(3600);

/// Gateways report a pass with their next regular report, a second after the probe at most; as long again for the way.
pub(crate) const PASS_REPORTED_WITHIN: Duration = Duration::from_secs(2);
/// What an observer saw in this window is compared with the others.
pub(crate) const OBSERVER_WINDOW: Duration = Duration::from_secs(10);
/// Backends it must have probed before "most" means something.
pub(crate) const OBSERVER_MIN_BACKENDS: usize = 4;
/// An observer that alone sees most backends fail has no vote for so long.
pub(crate) const ISOLATION: Duration = Duration::from_secs(60);

/// The window in which ejections count together.
pub(crate) const FLIP_WINDOW: Duration = Duration::from_secs(30);
/// The share of a pool whose ejection within the window raises an alarm, because a shared dependency is the likely cause.
pub(crate) const FLIP_POOL_SHARE: f64 = 0.5;
/// The same for the share of all backends.
pub(crate) const FLIP_ALL_SHARE: f64 = 0.3;
/// The ejections below which the shares are ignored.
pub(crate) const FLIP_MIN: usize = 2;

/// Events kept.
pub(crate) const EVENTS_MAX: usize = 1024;
/// An event that is the same as one from within this time is counted with it.
pub(crate) const FOLDED_WITHIN: Duration = Duration::from_secs(600);
