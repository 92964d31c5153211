//! What this gateway knows of a backend beyond its configuration: health, requests in flight, counts.
//!
//! Each lock is held for the few operations of one decision and never across an await.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::Instant;
use weir_proto::latency;
use weir_proto::resource::Name;
use weir_proto::v1::HealthState;

use super::balance::{RAMP, health_factor};
use super::log_throttle::LogThrottle;
use super::own_probes::OwnProbes;

/// How exactly it is known when an answer's last bytes came.
const ANSWERED_STEP_MS: u64 = 100;

/// Stands for a count that is not known.
const UNKNOWN: u32 = u32::MAX;

/// The state of one backend: own measurements and received values.
#[derive(Debug)]
pub struct BackendState {
    in_flight: AtomicU32,
    /// The part of them in the last report.
    reported: AtomicU32,
    /// Requests in flight of other gateways, as last received; [`UNKNOWN`] without a report stream.
    elsewhere: AtomicU32,
    health: AtomicU8,
    health_changed: Notify,
    own_probes: OwnProbes,
    recovering: Mutex<Option<Recovery>>,
    successes: AtomicU64,
    connect_failures: AtomicU64,
    server_errors: AtomicU64,
    timeouts: AtomicU64,
    busy: AtomicU64,
    suspected: AtomicU64,
    totals: TotalCounts,
    first_bytes: AtomicU64,
    first_byte_us: AtomicU64,
    first_byte_counts: [AtomicU32; latency::INTERVALS],
    decoded_tokens: AtomicU64,
    decoded_us: AtomicU64,
    decoded_answers: AtomicU64,
    /// The results of all gateways' requests; `None` without a report stream.
    fleet_totals: Mutex<Option<Totals>>,
    /// The start of [`Self::answered`].
    created: Instant,
    /// When bytes of an answer last came, milliseconds since `created`; zero: none came.
    answered: AtomicU64,
    /// The value of it in the last report.
    answered_reported: AtomicU64,
    /// When another gateway's request was last known to have succeeded, likewise.
    answered_elsewhere: AtomicU64,
    /// When the first request came to the idle backend, as far as is known here, likewise.
    busy_since: AtomicU64,
    /// The last attempt that failed, for whoever asks why.
    last_failure: Mutex<Option<LastFailure>>,
    /// Models at which the backend refused the `stream_options` that Weir adds.
    refused_additions: Mutex<BTreeSet<Name>>,
    /// Lines about attempts that failed.
    pub(crate) failure_lines: LogThrottle,
    /// Lines about counts of its that cannot be true.
    pub(crate) implausible_lines: LogThrottle,
    /// Lines about addresses of its that must not be connected to.
    pub(crate) address_lines: LogThrottle,
}

/// What was known of a backend's health at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownHealth {
    /// The cluster held it for unhealthy.
    is_unhealthy: bool,
    /// How often this gateway's own probes had found it unreachable.
    findings: u32,
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
    successes: AtomicU64,
    failures: AtomicU64,
    timed_answers: AtomicU64,
    tokens: AtomicU64,
    decode_us: AtomicU64,
}

/// The outcome of an attempt, as far as the backend caused it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttemptOutcome {
    /// It answered.
    Success,
    /// Refused, reset, or no connection in time.
    ConnectFailure,
    /// 5xx, or a page of a proxy in between.
    ServerError,
    /// A success that is no answer: a page, a body that is cut, an error under 200.
    InvalidAnswer,
    /// It refuses the gateway's credential.
    CredentialRefused,
    /// The account there has no money or quota left.
    QuotaUsedUp,
    /// It does not have the model.
    NoModel,
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
            Self::InvalidAnswer => "invalid_answer",
            Self::CredentialRefused => "credential_refused",
            Self::QuotaUsedUp => "quota_used_up",
            Self::NoModel => "no_model",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Overtaken => "overtaken",
        }
    }
}

/// An attempt that failed, as operators are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastFailure {
    /// When, by the wall clock.
    pub at: SystemTime,
    /// What it came to.
    pub outcome: AttemptOutcome,
    /// The model that was asked for.
    pub model: String,
    /// The status of the answer, if there was one.
    pub status: Option<u16>,
    /// What was seen: the provider's own text, redacted and cut.
    pub seen: String,
}

/// The results of requests to a backend since the gateway started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Successful requests.
    pub successes: u64,
    /// Requests that failed because of the backend.
    pub failures: u64,
    /// Successful streams whose speed was measured.
    pub timed_answers: u64,
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
    /// See [`BackendState::count_suspected`].
    pub suspected: u64,
}

impl Default for BackendState {
    fn default() -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            reported: AtomicU32::new(0),
            elsewhere: AtomicU32::new(UNKNOWN),
            health: AtomicU8::new(0),
            health_changed: Notify::new(),
            own_probes: OwnProbes::default(),
            recovering: Mutex::new(None),
            successes: AtomicU64::new(0),
            connect_failures: AtomicU64::new(0),
            server_errors: AtomicU64::new(0),
            timeouts: AtomicU64::new(0),
            busy: AtomicU64::new(0),
            suspected: AtomicU64::new(0),
            totals: TotalCounts::default(),
            first_bytes: AtomicU64::new(0),
            first_byte_us: AtomicU64::new(0),
            first_byte_counts: std::array::from_fn(|_| AtomicU32::new(0)),
            decoded_tokens: AtomicU64::new(0),
            decoded_us: AtomicU64::new(0),
            decoded_answers: AtomicU64::new(0),
            fleet_totals: Mutex::new(None),
            created: Instant::now(),
            answered: AtomicU64::new(0),
            answered_reported: AtomicU64::new(0),
            answered_elsewhere: AtomicU64::new(0),
            busy_since: AtomicU64::new(0),
            last_failure: Mutex::new(None),
            refused_additions: Mutex::new(BTreeSet::new()),
            failure_lines: LogThrottle::default(),
            implausible_lines: LogThrottle::default(),
            address_lines: LogThrottle::default(),
        }
    }
}

impl BackendState {
    /// Keeps the failure until the next one.
    pub fn note_failure(&self, failure: LastFailure) {
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    /// The last attempt that failed.
    pub fn last_failure(&self) -> Option<LastFailure> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the backend refused `stream_options` for the model. Forgotten with the gateway's process.
    pub fn refuses_addition(&self, model: &Name) -> bool {
        self.refused_additions.lock().unwrap_or_else(PoisonError::into_inner).contains(model)
    }

    /// Notes whether the backend refuses it. Says whether that is news. Bounded by the models of the configuration.
    pub fn set_refuses_addition(&self, model: &Name, refuses: bool) -> bool {
        let mut refused = self.refused_additions.lock().unwrap_or_else(PoisonError::into_inner);
        if refuses { refused.insert(model.clone()) } else { refused.remove(model) }
    }

    /// Counts one attempt that bears on the backend's standing.
    pub fn count(&self, outcome: AttemptOutcome) {
        let counter = match outcome {
            AttemptOutcome::Success => &self.successes,
            AttemptOutcome::ConnectFailure => &self.connect_failures,
            AttemptOutcome::ServerError | AttemptOutcome::InvalidAnswer | AttemptOutcome::NoModel => {
                &self.server_errors
            }
            // The operator's to mend: the server itself is well.
            AttemptOutcome::CredentialRefused | AttemptOutcome::QuotaUsedUp => &self.busy,
            AttemptOutcome::Timeout | AttemptOutcome::Overtaken => &self.timeouts,
            AttemptOutcome::Busy => &self.busy,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        match outcome {
            AttemptOutcome::Success => {
                self.note_answered(Instant::now());
                self.totals.successes.fetch_add(1, Ordering::Relaxed)
            }
            _ => self.totals.failures.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// Counts a failure that the request may have caused, whatever is found out about it later.
    pub fn count_suspected(&self) {
        self.suspected.fetch_add(1, Ordering::Relaxed);
    }

    /// Bytes of an answer came now. Written ten times a second at most, since every chunk of every stream comes here.
    pub fn note_answered(&self, now: Instant) {
        let since = self.age_ms(now);
        if since >= self.answered.load(Ordering::Relaxed).saturating_add(ANSWERED_STEP_MS) {
            self.answered.store(since, Ordering::Relaxed);
        }
    }

    /// Whether bytes of an answer came within this time.
    pub fn answered_within(&self, time: Duration) -> bool {
        self.is_within(self.answered.load(Ordering::Relaxed), time)
    }

    /// Whether any gateway's request was answered within this time, or the first one came to the idle backend, as far as is
    /// known here.
    pub fn is_at_work_within(&self, time: Duration) -> bool {
        let signs = [&self.answered, &self.answered_elsewhere, &self.busy_since];
        signs.into_iter().any(|at| self.is_within(at.load(Ordering::Relaxed), time))
    }

    /// A request comes here, or is heard of elsewhere, where there was none.
    fn note_busy(&self) {
        self.busy_since.store(self.age_ms(Instant::now()), Ordering::Relaxed);
    }

    fn is_within(&self, at_ms: u64, time: Duration) -> bool {
        let since = self.age_ms(Instant::now()).saturating_sub(at_ms);
        at_ms > 0 && Duration::from_millis(since) <= time + Duration::from_millis(ANSWERED_STEP_MS)
    }

    /// Milliseconds since `created`; never zero.
    fn age_ms(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.created).as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// Whether bytes of answers came since the last call.
    pub fn take_answering(&self) -> bool {
        let answered = self.answered.load(Ordering::Relaxed);
        self.answered_reported.swap(answered, Ordering::Relaxed) != answered
    }

    /// The first byte of an answer came after so long.
    pub fn note_first_byte(&self, took: Duration) {
        self.first_bytes.fetch_add(1, Ordering::Relaxed);
        self.first_byte_us.fetch_add(micros(took), Ordering::Relaxed);
        self.first_byte_counts[latency::interval(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// A stream ended well: so many tokens, so long after its first byte.
    pub fn note_decode(&self, tokens: u64, took: Duration) {
        self.totals.timed_answers.fetch_add(1, Ordering::Relaxed);
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

    /// Sets the results of all gateways' requests; `None` after the report stream is lost.
    pub fn set_fleet_totals(&self, totals: Option<Totals>) {
        let mut known = self.fleet_totals.lock().unwrap_or_else(PoisonError::into_inner);
        let successes = |totals: Option<Totals>| totals.map_or(u64::MAX, |totals| totals.successes);
        if totals.is_some() && successes(totals) > successes(*known) {
            self.answered_elsewhere.store(self.age_ms(Instant::now()), Ordering::Relaxed);
        }
        *known = totals;
    }

    /// See [`Self::set_fleet_totals`].
    pub fn fleet_totals(&self) -> Option<Totals> {
        *self.fleet_totals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The results of this gateway's requests since its start.
    pub fn totals(&self) -> Totals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Totals {
            successes: read(&self.totals.successes),
            failures: read(&self.totals.failures),
            timed_answers: read(&self.totals.timed_answers),
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
            suspected: self.suspected.swap(0, Ordering::Relaxed),
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
            self.health_changed.notify_waiters();
        }
    }

    /// What this gateway's own liveness probes say.
    pub fn own_probes(&self) -> &OwnProbes {
        &self.own_probes
    }

    /// Records whether there was an answer to a liveness probe of this gateway, which makes them at this interval.
    pub fn record_own_probe(&self, answered: bool, interval: Duration) {
        if self.own_probes.record(answered, interval) {
            self.health_changed.notify_waiters();
        }
    }

    /// What is known of its health now: what comes after is news to [`Self::becomes_unhealthy`].
    pub fn known_health(&self) -> KnownHealth {
        KnownHealth {
            is_unhealthy: self.health() == HealthState::Unhealthy,
            findings: self.own_probes.findings(),
        }
    }

    /// Waits until the cluster holds it for unhealthy, or this gateway's own probes find it unreachable, and that is news to
    /// who knew `before`. This may be for ever. Cancel-safe.
    pub async fn becomes_unhealthy(&self, before: KnownHealth) {
        loop {
            let mut changed = std::pin::pin!(self.health_changed.notified());
            // Before the look, or a verdict between the two would be missed.
            changed.as_mut().enable();
            let now = self.known_health();
            if now.is_unhealthy && !before.is_unhealthy || now.findings != before.findings {
                return;
            }
            changed.await;
        }
    }

    /// Requests of this gateway in flight, recorded as the value of the next report.
    pub fn report_in_flight(&self) -> u32 {
        let now = self.in_flight();
        self.reported.store(now, Ordering::Relaxed);
        now
    }

    /// Sets the requests in flight over all gateways, including the last report of this gateway. `None` after the report stream
    /// is lost.
    pub fn set_fleet(&self, in_flight: Option<u32>) {
        let reported = self.reported.load(Ordering::Relaxed);
        let elsewhere = in_flight.map_or(UNKNOWN, |all| all.saturating_sub(reported).min(UNKNOWN - 1));
        let before = self.elsewhere.swap(elsewhere, Ordering::Relaxed);
        if before == 0 && !matches!(elsewhere, 0 | UNKNOWN) && self.in_flight() == 0 {
            self.note_busy();
        }
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
        let here = backend.in_flight.fetch_add(1, Ordering::Relaxed);
        if here == 0 && matches!(backend.elsewhere.load(Ordering::Relaxed), 0 | UNKNOWN) {
            backend.note_busy();
        }
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
    async fn when_bytes_last_came_is_known_here_and_of_others() {
        let backend = BackendState::default();
        let second = Duration::from_secs(1);
        tokio::time::advance(second).await;
        assert!(!backend.is_at_work_within(second * 60) && !backend.take_answering());
        backend.note_answered(Instant::now());
        assert!(backend.answered_within(second) && backend.take_answering() && !backend.take_answering());
        tokio::time::advance(second * 2).await;
        assert!(!backend.answered_within(second) && backend.answered_within(second * 2));
        let totals = |successes| Some(Totals { successes, ..Totals::default() });
        backend.set_fleet_totals(totals(7));
        backend.set_fleet_totals(totals(7));
        assert!(!backend.is_at_work_within(second), "what was before this gateway heard of it is not now");
        backend.set_fleet_totals(totals(8));
        assert!(backend.is_at_work_within(second) && !backend.answered_within(second));
        assert!(!backend.take_answering(), "others report their own");
    }

    #[tokio::test(start_paused = true)]
    async fn since_when_there_is_a_request_is_known() {
        let (backend, second) = (Arc::new(BackendState::default()), Duration::from_secs(1));
        tokio::time::advance(second).await;
        let first = InFlight::enter(&backend);
        tokio::time::advance(second * 5).await;
        let more = InFlight::enter(&backend);
        assert!(backend.is_at_work_within(second * 5) && !backend.is_at_work_within(second * 4));
        drop((first, more));
        backend.set_fleet(Some(0));
        backend.set_fleet(Some(3));
        assert!(backend.is_at_work_within(second));
        tokio::time::advance(second * 5).await;
        backend.set_fleet(Some(4));
        drop(InFlight::enter(&backend));
        assert!(!backend.is_at_work_within(second), "others were there before");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_verdict_hears_of_it_and_of_no_other() {
        let backend = Arc::new(BackendState::default());
        let waiting = tokio::spawn({
            let backend = backend.clone();
            let before = backend.known_health();
            async move { backend.becomes_unhealthy(before).await }
        });
        for state in [HealthState::Healthy, HealthState::Degraded, HealthState::Recovering] {
            backend.set_health(state);
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished(), "{state:?}");
        }
        backend.set_health(HealthState::Unhealthy);
        waiting.await.expect("ends");
        backend.becomes_unhealthy(BackendState::default().known_health()).await;
        let told = backend.known_health();
        let again = tokio::time::timeout(Duration::from_millis(20), backend.becomes_unhealthy(told)).await;
        assert!(again.is_err(), "it was known before");
    }

    #[tokio::test(start_paused = true)]
    async fn what_own_probes_find_after_a_request_was_sent_is_news_whatever_they_found_before() {
        let (backend, interval) = (Arc::new(BackendState::default()), Duration::from_secs(5));
        let mut waiting = Vec::new();
        for passed in [false, false, true, false, false] {
            let (known, backend) = (backend.known_health(), backend.clone());
            backend.record_own_probe(passed, interval);
            waiting.push(tokio::spawn(async move { backend.becomes_unhealthy(known).await }));
        }
        waiting.push(tokio::spawn({
            let (known, backend) = (backend.known_health(), backend.clone());
            async move { backend.becomes_unhealthy(known).await }
        }));
        let last = waiting.pop().expect("six");
        for task in waiting {
            task.await.expect("a finding came after it");
        }
        assert!(!last.is_finished() && backend.own_probes().is_unreachable());
        backend.record_own_probe(false, interval);
        last.await.expect("ends");
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
