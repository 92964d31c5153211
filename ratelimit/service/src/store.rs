//! Whether the store answers, asked once a second, and what follows from it for readiness and health.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use weir_discovery::not_configured;
use weir_proto::resource::Rates;
use weir_ratelimit::{Error, Limiter, Scope, ScopeLimits, ServiceStack, scope_limits};
use weir_runtime::Readiness;

/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(1);
/// A store that has not answered for so long is away. Several questions, since one may be lost to a slow moment.
const AWAY_AFTER: Duration = Duration::from_secs(3);
/// The names under which health is told: the whole, and each service.
pub(super) const HEALTH_NAMES: [&str; 3] =
    ["", "weir.v1.LimitService", "envoy.service.ratelimit.v3.RateLimitService"];

/// What the watcher keeps true.
pub(super) struct Watcher {
    pub(super) stack: Arc<ServiceStack>,
    /// Whether a configuration is in force, where one is asked for.
    pub(super) known: watch::Receiver<bool>,
    /// Why no control plane is followed.
    pub(super) problem: watch::Receiver<Option<String>>,
    pub(super) readiness: Readiness,
    pub(super) health: HealthReporter,
    pub(super) store_up: Gauge,
}

impl Watcher {
    /// Watches until `shutdown`, and then says that the process is leaving.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answered: Option<Instant> = None;
        let mut said = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                // Without the other end nothing changes any more, and the tick goes on.
                Ok(()) = self.known.changed() => {}
                Ok(()) = self.problem.changed() => {}
                () = shutdown.cancelled() => break,
            }
            let question = self.stack.limiter.peek(&[nothing()]).await;
            if question.is_ok() {
                answered = Some(Instant::now());
            }
            let up = answered.is_some_and(|at| at.elapsed() < AWAY_AFTER);
            self.store_up.set(i64::from(up));
            let state = readiness_of(up, *self.known.borrow(), self.problem.borrow().clone());
            if said.as_ref() != Some(&state) {
                log_readiness(&state, question.err());
                self.say(state.clone()).await;
                said = Some(state);
            }
        }
        self.say(Err("draining".to_owned())).await;
    }

    async fn say(&self, state: Result<Option<String>, String>) {
        let status = if state.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.readiness.set(state);
        for name in HEALTH_NAMES {
            self.health.set_service_status(name, status).await;
        }
    }
}

/// Whether the process is ready, maybe with a problem, or why not.
fn readiness_of(store_up: bool, configured: bool, problem: Option<String>) -> Result<Option<String>, String> {
    match (store_up, configured) {
        (false, _) => Err("the limit store does not answer; see --redis".to_owned()),
        (true, false) => Err(not_configured(problem.as_deref())),
        (true, true) => Ok(problem),
    }
}

fn log_readiness(state: &Result<Option<String>, String>, failed: Option<Error>) {
    match (failed, state) {
        (Some(error), Err(reason)) => tracing::error!(%error, reason, "not ready"),
        (None, Err(reason)) => tracing::warn!(reason, "not ready"),
        (_, Ok(problem)) => tracing::info!(problem, "ready"),
    }
}

/// A scope without limits: asks whether scripts run, and reads nothing.
fn nothing() -> ScopeLimits {
    scope_limits(Scope::Global, None, &Rates::default())
}
