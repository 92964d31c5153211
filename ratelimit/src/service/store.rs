//! Whether the store answers, asked once a second, and what follows from it for readiness and health.

use std::time::Duration;

use prometheus_client::metrics::gauge::Gauge;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use weir_runtime::Readiness;

use weir_proto::resource::Rates;

use crate::{AnyLimiter, Limiter, Scope, ScopeLimits, scope_limits};

/// Between two questions.
const INTERVAL: Duration = Duration::from_secs(1);
/// A store that has not answered for so long is away. Several questions, since one may be lost to a slow moment.
const AWAY_AFTER: Duration = Duration::from_secs(3);
/// The names under which health is told: the whole, and each service.
pub(super) const HEALTH_NAMES: [&str; 2] = ["", "weir.v1.LimitService"];

/// What the watcher keeps true.
pub(super) struct Watcher {
    pub(super) limiter: AnyLimiter,
    pub(super) readiness: Readiness,
    pub(super) health: HealthReporter,
    pub(super) store_up: Gauge,
}

impl Watcher {
    /// Watches until `shutdown`, and then says that the process is leaving.
    pub(super) async fn run(self, shutdown: CancellationToken) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut answered: Option<Instant> = None;
        let mut said = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = shutdown.cancelled() => break,
            }
            let question = self.limiter.peek(&[nothing()]).await;
            if question.is_ok() {
                answered = Some(Instant::now());
            }
            let up = answered.is_some_and(|at| at.elapsed() < AWAY_AFTER);
            if said != Some(up) {
                match &question {
                    Err(error) if !up => tracing::error!(
                        %error,
                        "the limit store is away: calls are UNAVAILABLE until it answers; see --redis"
                    ),
                    _ => tracing::info!("the limit store answers"),
                }
                self.say(up.then_some(()).ok_or("the limit store does not answer; see --redis")).await;
                said = Some(up);
            }
        }
        self.say(Err("draining")).await;
    }

    async fn say(&self, state: Result<(), &str>) {
        self.store_up.set(i64::from(state.is_ok()));
        let status = if state.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.readiness.set(state.map_err(str::to_owned));
        for name in HEALTH_NAMES {
            self.health.set_service_status(name, status).await;
        }
    }
}

/// A scope without limits: asks whether scripts run, and reads nothing.
fn nothing() -> ScopeLimits {
    scope_limits(Scope::Global, &Rates::default())
}
