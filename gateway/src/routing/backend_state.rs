//! What this gateway knows of a backend beyond its configuration: health, requests in flight, counts.
//!
//! Each lock is held for the few operations of one decision and never across an await.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use weir_proto::latency;
use weir_proto::v1::HealthState;

use super::balance::{RAMP, health_factor};
use super::log_throttle::LogThrottle;

/// Stands for a count that is not known.
const UNKNOWN: u32 = u32::MAX;

/// What this gateway sees of one backend and is told about it.
#[derive(Debug)]
pub struct BackendState {
    in_flight: AtomicU32,
    /// Of these the last report told the control plane.
    reported: AtomicU32,
    /// In flight from other gateways, as the fleet was last told; [`UNKNOWN`] without a report stream.
    elsewhere: AtomicU32,
    health: AtomicU8,
    recovering: Mutex<Option<Recovery>>,
    successes: AtomicU64,
    connect_failures: AtomicU64,
    server_errors: AtomicU64,
    timeouts: AtomicU64,
    busy: AtomicU64,
    totals: TotalCounts,
    first_bytes: AtomicU64,
    first_byte_us: AtomicU64,
    first_byte_counts: [AtomicU32; latency::INTERVALS],
    decoded_tokens: AtomicU64,
    decoded_us: AtomicU64,
    decoded_answers: AtomicU64,
    /// What requests of the whole fleet came to, while a report stream brings it.
    fleet_totals: Mutex<Option<Totals>>,
    /// Lines about answers of its that make no sense.
    pub(crate) invalid_lines: LogThrottle,
    /// Lines about counts of its that cannot be true.
    pub(crate) implausible_lines: LogThrottle,
    /// Lines about addresses of its that must not be connected to.
    pub(crate) address_lines: LogThrottle,
}

/// A slow start: when it began, and how long it takes.
#[derive(Debug, Clone, Copy)]
struct Recovery {
    since: Instant,
    takes: Duration,
}

/// Since the start, for the prober.
#[derive(Debug, Default)]
struct TotalCounts {
    good: AtomicU64,
    bad: AtomicU64,
    answers: AtomicU64,
    tokens: AtomicU64,
    decode_us: AtomicU64,
}

/// What an attempt came to, as far as the backend is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// It answered.
    Success,
    /// Refused, reset, or no connection in time.
    ConnectFailure,
    /// 5xx, or an answer that is no answer.
    ServerError,
    /// No first byte, or silence in a stream.
    Timeout,
    /// 429 or 503 with Retry-After: busy, not broken.
    Busy,
    /// Silent for longer than it ever needs, while another backend answered the same request.
    Overtaken,
}

impl AttemptOutcome {
    /// The metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Success => "ok",
            Self::ConnectFailure => "connect_failure",
            Self::ServerError => "server_error",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Overtaken => "overtaken",
        }
    }
}

/// What requests to a backend came to since the gateway started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Those that ended well.
    pub good: u64,
    /// Those that failed by the backend's fault.
    pub bad: u64,
    /// Streams that ended well and were timed.
    pub answers: u64,
    /// Their output tokens.
    pub tokens: u64,
    /// The time from their first byte to their last, summed, microseconds.
    pub decode_us: u64,
}

/// Counts since the last report.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// See [`AttemptOutcome::Success`].
    pub successes: u64,
    /// See [`AttemptOutcome::ConnectFailure`].
    pub connect_failures: u64,
    /// See [`AttemptOutcome::ServerError`].
    pub server_errors: u64,
    /// See [`AttemptOutcome::Timeout`] and [`AttemptOutcome::Overtaken`].
    pub timeouts: u64,
    /// See [`AttemptOutcome::Busy`].
    pub busy: u64,
}

impl Default for BackendState {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            reported: AtomicU32::new(0),
            elsewhere: AtomicU32::new(UNKNOWN),
            health: AtomicU8::new(0),
            recovering: Mutex::new(None),
            successes: AtomicU64::new(0),
            connect_failures: AtomicU64::new(0),
            server_errors: AtomicU64::new(0),
            timeouts: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            totals: TotalCounts::default(),
            first_bytes: AtomicU64::new(0),
            first_byte_us: AtomicU64::new(0),
            first_byte_counts: std::array::from_fn(|_| AtomicU32::new(0)),
            decoded_tokens: AtomicU64::new(0),
            decoded_us: AtomicU64::new(0),
            decoded_answers: AtomicU64::new(0),
            fleet_totals: Mutex::new(None),
            invalid_lines: LogThrottle::default(),
            implausible_lines: LogThrottle::default(),
            address_lines: LogThrottle::default(),
        }
    }
}

impl BackendState {
    /// Counts one attempt.
    pub fn count(&self, outcome: AttemptOutcome) {
        let counter = match outcome {
            AttemptOutcome::Success => &self.successes,
            AttemptOutcome::ConnectFailure => &self.connect_failures,
            AttemptOutcome::ServerError => &self.server_errors,
            AttemptOutcome::Timeout | AttemptOutcome::Overtaken => &self.timeouts,
            AttemptOutcome::Busy => &self.busy,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match outcome {
            AttemptOutcome::Success => self.totals.good.fetch_add(1, Ordering::Relaxed),
            _ => self.totals.bad.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// The first byte of an answer came after so long.
    pub fn note_first_byte(&self, took: Duration) {
        self.first_bytes.fetch_add(1, Ordering::Relaxed);
        self.first_byte_us.fetch_add(micros(took), Ordering::Relaxed);
        self.first_byte_counts[latency::interval(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// A stream ended well: so many tokens, so long after its first byte.
    pub fn note_decode(&self, tokens: u64, took: Duration) {
        self.totals.answers.fetch_add(1, Ordering::Relaxed);
        // What one answer can have used is bounded, so that no sum of them wraps (see [`crate::api::usage`]).
        self.totals.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.totals.decode_us.fetch_add(micros(took), Ordering::Relaxed);
        self.decoded_tokens.fetch_add(tokens, Ordering::Relaxed);
        self.decoded_us.fetch_add(micros(took), Ordering::Relaxed);
        self.decoded_answers.fetch_add(1, Ordering::Relaxed);
    }

    /// The mean time to the first byte since the last call; `None` without any.
    pub fn take_first_byte_mean(&self) -> Option<Duration> {
        let count = self.first_bytes.swap(0, Ordering::Relaxed);
        let sum = self.first_byte_us.swap(0, Ordering::Relaxed);
        sum.checked_div(count).map(Duration::from_micros)
    }

    /// How many first bytes came within each of [`latency`]'s intervals since the last call, without trailing zeros.
    pub fn take_first_byte_counts(&self) -> Vec<u32> {
        let mut counts: Vec<u32> =
            self.first_byte_counts.iter().map(|count| count.swap(0, Ordering::Relaxed)).collect();
        counts.truncate(counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1));
        counts
    }

    /// Streams that ended since the last call, their output tokens, and how long they took from their first bytes on.
    pub fn take_decoded(&self) -> (u64, u64, Duration) {
        let answers = self.decoded_answers.swap(0, Ordering::Relaxed);
        let tokens = self.decoded_tokens.swap(0, Ordering::Relaxed);
        (answers, tokens, Duration::from_micros(self.decoded_us.swap(0, Ordering::Relaxed)))
    }

    /// Takes over what requests of the whole fleet came to; `None` after the report stream is lost.
    pub fn set_fleet_totals(&self, totals: Option<Totals>) {
        *self.fleet_totals.lock().unwrap_or_else(PoisonError::into_inner) = totals;
    }

    /// See [`Self::set_fleet_totals`].
    pub fn fleet_totals(&self) -> Option<Totals> {
        *self.fleet_totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What requests came to since the start.
    pub fn totals(&self) -> Totals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            good: read(&self.totals.good),
            bad: read(&self.totals.bad),
            answers: read(&self.totals.answers),
            tokens: read(&self.totals.tokens),
            decode_us: read(&self.totals.decode_us),
        }
    }

    /// Takes the counts since the last call.
    pub fn take_counts(&self) -> Counts {
        Counts {
            successes: self.successes.swap(0, Ordering::Relaxed),
            connect_failures: self.connect_failures.swap(0, Ordering::Relaxed),
            server_errors: self.server_errors.swap(0, Ordering::Relaxed),
            timeouts: self.timeouts.swap(0, Ordering::Relaxed),
            busy: self.busy.swap(0, Ordering::Relaxed),
        }
    }

    /// Requests of this gateway there now.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The cluster's verdict.
    pub fn health(&self) -> HealthState {
        HealthState::try_from(i32::from(self.health.load(Ordering::Relaxed))).unwrap_or_default()
    }

    /// Takes over the cluster's verdict.
    pub fn set_health(&self, state: HealthState) {
        self.set_health_since(state, Duration::ZERO, RAMP);
    }

    /// The same of a backend whose slow start is under way: how much of it is over, and how long it takes.
    pub fn set_health_since(&self, state: HealthState, elapsed: Duration, takes: Duration) {
        let before = self.health();
        self.health.store(state as i32 as u8, Ordering::Relaxed);
        if before != state {
            let now = Instant::now();
            let since = now.checked_sub(elapsed).unwrap_or(now);
            let recovery = (state == HealthState::Recovering).then_some(Recovery { since, takes });
            *self.recovering.lock().unwrap_or_else(PoisonError::into_inner) = recovery;
        }
    }

    /// Requests of this gateway there now, remembered as what the fleet is told next.
    pub fn report_in_flight(&self) -> u32 {
        let now = self.in_flight();
        self.reported.store(now, Ordering::Relaxed);
        now
    }

    /// The fleet has so many there, those that this gateway last reported being among them. `None` after the report stream is lost.
    pub fn set_fleet(&self, in_flight: Option<u32>) {
        let reported = self.reported.load(Ordering::Relaxed);
        let elsewhere = in_flight.map_or(UNKNOWN, |all| all.saturating_sub(reported).min(UNKNOWN - 1));
        self.elsewhere.store(elsewhere, Ordering::Relaxed);
    }

    /// Whether it is known what others have there.
    pub fn knows_fleet(&self) -> bool {
        self.elsewhere.load(Ordering::Relaxed) != UNKNOWN
    }

    /// What the cluster has there: what others have, as last told, and what this gateway has now. Without a report
    /// stream every gateway is taken to have as much as this one.
    pub fn fleet_in_flight(&self, gateways: u32) -> f64 {
        let local = f64::from(self.in_flight());
        match self.elsewhere.load(Ordering::Relaxed) {
            UNKNOWN => local * f64::from(gateways.max(1)),
            elsewhere => local + f64::from(elsewhere),
        }
    }

    /// The health part of the effective weight.
    pub fn health_factor(&self, now: Instant) -> f64 {
        let state = self.health();
        let recovery = match state {
            HealthState::Recovering => *self.recovering.lock().unwrap_or_else(PoisonError::into_inner),
            _ => None,
        };
        // A ramp of another length is walked through at another pace.
        let ramp = recovery.map(|recovery| {
            let elapsed = now.saturating_duration_since(recovery.since);
            RAMP.mul_f64((elapsed.as_secs_f64() / recovery.takes.as_secs_f64().max(0.001)).min(1.0))
        });
        health_factor(state == HealthState::Degraded, ramp)
    }
}

fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

/// Counts a request at a backend for as long as it lives.
#[derive(Debug)]
pub struct InFlight(Arc<BackendState>);

impl InFlight {
    /// One more.
    pub fn enter(backend: &Arc<BackendState>) -> Self {
        backend.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(backend.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fleet_is_what_others_have_and_what_is_here_now() {
        let backend = Arc::new(BackendState::default());
        let held: Vec<InFlight> = (0..3).map(|_| InFlight::enter(&backend)).collect();
        assert_eq!(backend.fleet_in_flight(4), 12.0, "nothing is known of others: they are like this one");
        assert_eq!(backend.report_in_flight(), 3);
        backend.set_fleet(Some(10));
        assert_eq!(backend.fleet_in_flight(4), 10.0);
        let more = InFlight::enter(&backend);
        assert_eq!(backend.fleet_in_flight(4), 11.0, "what came since counts at once");
        drop((held, more));
        assert_eq!(backend.fleet_in_flight(4), 7.0);
        backend.set_fleet(Some(1));
        assert_eq!(backend.fleet_in_flight(4), 0.0, "a picture that is older than ours");
        backend.set_fleet(None);
        assert_eq!(backend.fleet_in_flight(4), 0.0);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_recovers_is_ramped_from_the_verdict_on() {
        let backend = BackendState::default();
        backend.set_health(HealthState::Recovering);
        tokio::time::advance(std::time::Duration::from_secs(30)).await;
        backend.set_health(HealthState::Recovering);
        assert_eq!(backend.health_factor(Instant::now()), 0.5, "told twice, still the same return");
        backend.set_health(HealthState::Healthy);
        assert_eq!(backend.health_factor(Instant::now()), 1.0);
    }
}
