//! Hedges: why another attempt starts beside one under way, who pays for it, and what it is known to cost.

use std::pin::pin;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use weir_ratelimit::{Cost, Kind};

use super::attempt::Target;
use crate::metrics::{HedgeLabels, ModelLabels, add};
use crate::routing::backend_state::{BackendState, KnownHealth};

/// A request whose backend was found unhealthy looks again after so long when there was no budget or no slot elsewhere.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The shortest time between two probes that a silent request asks for.
const PROBE_EVERY_MIN: Duration = Duration::from_millis(100);

/// Why another backend is tried as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// It is silent for longer than it ever needs. It may still answer, so only the share that requests have earned pays.
    Silent,
    /// The cluster found it unhealthy while it was silent, or this gateway's own probes do not reach it. Most likely it never
    /// answers: as good as a retry.
    Unhealthy,
}

impl Cause {
    const fn label(self) -> &'static str {
        match self {
            Self::Silent => "silent",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// When to try another backend beside one that is silent.
#[derive(Debug)]
pub(super) struct HedgeClock {
    /// `None`: not for its silence alone.
    at: Option<Instant>,
    cause: Cause,
    /// What was known of the backend when it was sent: that is no news.
    known: KnownHealth,
    sent: Instant,
    /// How often it has this gateway probe the backend while it is silent.
    probe_every: Duration,
}

impl HedgeClock {
    /// For an attempt that is sent now.
    pub(super) fn of(target: &Target) -> Self {
        Self {
            at: target.hedge_delay().map(|delay| target.sent + delay),
            cause: Cause::Silent,
            known: target.backend.state.known_health(),
            sent: target.sent,
            probe_every: target.model.pool.spec.health.liveness_interval,
        }
    }

    /// Waits until another backend is to be tried, which may be for ever. Meanwhile it calls `probe` when this gateway is to
    /// probe the backend: no other one sees trouble that this one alone has there. Unless `silence` is a reason, only what is
    /// found of the backend is. Cancel-safe.
    pub(super) async fn due(&self, backend: &BackendState, silence: bool, probe: impl Fn()) -> Cause {
        let is_found = self.cause == Cause::Unhealthy;
        let mut unhealthy = pin!(backend.becomes_unhealthy(self.known));
        let at = self.at.filter(|_| is_found || silence);
        loop {
            let probe_at = self.next_probe(Instant::now());
            tokio::select! {
                biased;
                () = &mut unhealthy, if !is_found => return Cause::Unhealthy,
                () = sleep_until(at.map_or(probe_at, |at| at.min(probe_at))) => {}
            }
            if at.is_some_and(|at| at <= Instant::now()) {
                return self.cause;
            }
            if backend.own_probes().is_due(self.probe_every) {
                probe();
            }
        }
    }

    /// When it asks for the next probe.
    fn next_probe(&self, now: Instant) -> Instant {
        let every = self.probe_every.max(PROBE_EVERY_MIN);
        let passed = now.saturating_duration_since(self.sent).as_millis() / every.as_millis();
        self.sent + every.saturating_mul(u32::try_from(passed).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// No other could be tried now; there may be a way later.
    pub(super) fn postpone(&mut self, target: &Target, cause: Cause) {
        self.cause = cause;
        self.at = match cause {
            Cause::Silent => target.hedge_delay().map(|delay| Instant::now() + delay),
            Cause::Unhealthy => Some(Instant::now() + LOOK_AGAIN),
        };
    }
}

/// Counts that a hedge was started.
pub(super) fn count_started(target: &Target, cause: Cause) {
    count(target, cause, "started");
}

/// Counts that a hedge answered first.
pub(super) fn count_won(target: &Target, cause: Cause) {
    count(target, cause, "won");
}

fn count(target: &Target, cause: Cause, event: &'static str) {
    let labels = HedgeLabels { model: target.model.name.to_string(), cause: cause.label(), event };
    target.metrics.hedges.get_or_create(&labels).inc();
}

/// Counts what a call is taken to have used that was given up because another answered first.
pub(super) fn count_lost(target: &Target, used: &Cost) {
    let model = || ModelLabels { model: target.model.name.to_string() };
    add(&target.metrics.hedge_tokens.get_or_create(&model()), used.get(Kind::Tokens));
    add(&target.metrics.hedge_micro_dollars.get_or_create(&model()), used.get(Kind::Spend));
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use tokio::time::{advance, timeout};
    use weir_proto::v1::HealthState;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);
    const HOUR: Duration = Duration::from_secs(3600);

    fn clock(backend: &BackendState) -> HedgeClock {
        let (known, sent) = (backend.known_health(), Instant::now());
        HedgeClock { at: None, cause: Cause::Silent, known, sent, probe_every: INTERVAL }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_request_has_its_backend_probed_once_an_interval_with_all_others_there() {
        let backend = BackendState::default();
        let (clocks, probes) = ([clock(&backend), clock(&backend)], Cell::new(0));
        let probe = || probes.set(probes.get() + 1);
        let both = async {
            tokio::join!(clocks[0].due(&backend, true, probe), clocks[1].due(&backend, true, probe))
        };
        assert!(timeout(INTERVAL * 10 + INTERVAL / 2, both).await.is_err(), "it is slow, and that is all");
        assert_eq!(probes.get(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_this_gateway_alone_finds_ends_the_wait_within_seconds() {
        for found_before in [0, 2, 5] {
            let backend = Arc::new(BackendState::default());
            (0..found_before).for_each(|_| backend.record_own_probe(false, INTERVAL));
            let (clock, sent) = (clock(&backend), Instant::now());
            // As the prober does: one probe, and its confirmation half a second later.
            let probe = || {
                let backend = backend.clone();
                tokio::spawn(async move {
                    for _ in 0..2 {
                        tokio::time::sleep(Duration::from_secs(2)).await;
                        backend.record_own_probe(false, INTERVAL);
                        tokio::time::sleep(Duration::from_millis(500)).await;
                    }
                });
            };
            // Silence is a reason of its own only where the pool hedges.
            for silence in [true, false] {
                let cause = timeout(HOUR, clock.due(&backend, silence, probe)).await.expect("due");
                assert_eq!(cause, Cause::Unhealthy);
                assert!(sent.elapsed() <= Duration::from_secs(10), "{:?}", sent.elapsed());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn probes_that_pass_end_no_wait_and_a_verdict_does_if_it_is_news() {
        let backend = Arc::new(BackendState::default());
        let long = clock(&backend);
        let passing = || backend.record_own_probe(true, INTERVAL);
        assert!(timeout(HOUR, long.due(&backend, true, passing)).await.is_err());
        backend.set_health(HealthState::Unhealthy);
        assert_eq!(long.due(&backend, true, passing).await, Cause::Unhealthy);
        let later = clock(&backend);
        assert!(timeout(HOUR, later.due(&backend, true, passing)).await.is_err(), "it was sent all the same");
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_reason_when_its_time_has_come() {
        let backend = BackendState::default();
        let clock = HedgeClock { at: Some(Instant::now() + Duration::from_secs(7)), ..clock(&backend) };
        assert!(timeout(HOUR, clock.due(&backend, false, || ())).await.is_err());
        let clock = HedgeClock { at: Some(Instant::now() + Duration::from_secs(7)), ..clock };
        let began = Instant::now();
        assert_eq!(clock.due(&backend, true, || ()).await, Cause::Silent);
        assert_eq!(began.elapsed().as_secs(), 7);
        advance(HOUR).await;
        assert_eq!(clock.due(&backend, true, || ()).await, Cause::Silent, "also when it is over");
    }
}
