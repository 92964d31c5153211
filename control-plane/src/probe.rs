//! The control plane as an observer: makes liveness probes if there are too few gateways, and to confirm a failure. It has
//! no credentials and makes no readiness probes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use weir_probe::{Answer, End, Finding, InFlight, Now, Schedule, no_answer};
use weir_proto::resource::{AdminState, HealthProfile, Spec};
use weir_proto::v1::{ProbeOutcome, ProbeTier, ResourceKind};
use weir_runtime::{EgressConnector, EgressPolicy};

use crate::health::{Cause, Observation, Observer, Outcome, Reading, Tier};
use crate::model::{Key, State};
use crate::verdicts::{Duties, Verdicts, view};

/// The maximum of concurrent probes.
const AT_ONCE: usize = 32;
/// Bytes read of an unavailable answer, to find out whether the backend is loading.
const ANSWER_MAX_BYTES: usize = 4096;

type Http = Client<HttpsConnector<EgressConnector>, Empty<Bytes>>;

/// A backend that is probed.
struct Target {
    uri: Uri,
    profile: HealthProfile,
}

/// The backend of a probe: its name and URL.
type Probed = (String, Uri);

/// Probes until `stop`.
pub(crate) struct Prober {
    http: Http,
    verdicts: Verdicts,
    targets: BTreeMap<String, Target>,
    /// Liveness only.
    schedule: Schedule,
    /// The serial of the last order that was taken.
    serial: u64,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("targets", &self.targets.len()).finish_non_exhaustive()
    }
}

impl Prober {
    pub(crate) fn new(verdicts: Verdicts, egress: EgressPolicy) -> Self {
        // Each probe uses a new connection, because it tests whether one can be opened.
        let http = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector(egress));
        Self { http, verdicts, targets: BTreeMap::new(), schedule: Schedule::default(), serial: 0 }
    }

    pub(crate) async fn run(mut self, mut state: watch::Receiver<Arc<State>>, stop: CancellationToken) {
        let mut probes = InFlight::default();
        let mut duties = self.verdicts.duties();
        self.follow(&state.borrow_and_update().clone());
        self.take(&duties.borrow_and_update().clone());
        loop {
            self.start_due(&mut probes);
            // With all permits taken, the loop waits for the end of a probe.
            let next = self.schedule.next().filter(|_| probes.len() < AT_ONCE);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = state.borrow_and_update().clone();
                    self.follow(&now);
                    self.take(&duties.borrow_and_update().clone());
                }
                changed = duties.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = duties.borrow_and_update().clone();
                    self.take(&now);
                }
                (of, observation) = probes.next() => self.finished(&of, observation.as_ref()),
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    /// Applies the configured backends. A backend with a new URL is probed again.
    fn follow(&mut self, state: &State) {
        let mut targets = BTreeMap::new();
        for stored in state.of_kind(ResourceKind::Backend) {
            let Spec::Backend(backend) = &stored.checked.spec else { continue };
            if backend.admin_state == AdminState::Disabled {
                continue;
            }
            let pool = state.get(&Key::new(ResourceKind::Pool, backend.pool.as_str()));
            let Some(Spec::Pool(pool)) = pool.map(|pool| &pool.checked.spec) else { continue };
            let Some(uri) = join(&backend.url, &backend.health_path) else { continue };
            let name = stored.wire.name.clone();
            if self.targets.get(&name).is_some_and(|known| known.uri != uri) {
                self.schedule.forget(&name);
            }
            targets.insert(name, Target { uri, profile: pool.health });
        }
        self.schedule.retain(&targets.keys().cloned().collect::<BTreeSet<_>>());
        self.targets = targets;
    }

    /// Applies assignments and orders.
    fn take(&mut self, duties: &Duties) {
        let now = Now::read();
        let own = duties.assignments.get(&Observer::ControlPlane);
        let assigned: BTreeMap<weir_probe::Key, (u32, u32)> = own
            .iter()
            .flat_map(|own| &own.assignments)
            .filter(|assignment| assignment.tier() == ProbeTier::Liveness)
            .filter(|assignment| self.targets.contains_key(&assignment.backend))
            .map(|a| ((a.backend.clone(), ProbeTier::Liveness), (a.prober_index, a.prober_count)))
            .collect();
        let interval = |key: &weir_probe::Key| self.targets[&key.0].profile.liveness_interval;
        self.schedule.assign(&assigned, interval, now);
        for order in duties.orders_after(self.serial, &Observer::ControlPlane) {
            if order.tier == Tier::Liveness && self.targets.contains_key(&order.backend) {
                self.schedule.order((order.backend.clone(), ProbeTier::Liveness), now.instant);
            }
        }
        self.serial = self.serial.max(duties.serial());
    }

    fn start_due(&mut self, probes: &mut InFlight<Probed, Observation>) {
        let most = AT_ONCE.saturating_sub(probes.len());
        for (name, _) in self.schedule.take_due(Instant::now(), most) {
            // The schedule contains targets only.
            let Some(target) = self.targets.get(&name) else { continue };
            let (http, uri, limit) = (self.http.clone(), target.uri.clone(), target.profile.timeout);
            probes.spawn((name, uri.clone()), async move { probe(&http, &uri, limit).await });
        }
    }

    /// Records the end of a probe. `None` if it panicked; the probe is repeated after a second.
    fn finished(&mut self, (backend, uri): &Probed, observation: Option<&Observation>) {
        // The result is ignored if the backend was deleted or has a new URL.
        let Some(target) = self.targets.get(backend).filter(|target| target.uri == *uri) else { return };
        let end = observation.map_or(End::NotMade, |observation| match observation.outcome {
            Outcome::Pass | Outcome::Busy => End::Good,
            Outcome::Loading => End::Loading,
            Outcome::Failed(_) => End::Bad,
        });
        let key = (backend.clone(), ProbeTier::Liveness);
        self.schedule.finished(&key, end, &target.profile, Now::read(), weir_runtime::random_unit());
        if let Some(observation) = observation {
            self.verdicts.observe(&Observer::ControlPlane, backend, observation);
        }
    }
}

/// Probes the liveness of a backend.
async fn probe(http: &Http, uri: &Uri, limit: Duration) -> Observation {
    let (found, latency) = weir_probe::liveness(|method| ask(http, uri, method), limit).await;
    let outcome = view::outcome_of(found.outcome).unwrap_or(Outcome::Failed(Cause::Broken));
    Observation { tier: Tier::Liveness, outcome, detail: found.detail, latency, reading: Reading::default() }
}

async fn ask(http: &Http, uri: &Uri, method: Method) -> Result<Answer, Finding> {
    let request = Request::builder().method(method).uri(uri.clone()).header(header::USER_AGENT, "weir-probe");
    let request = request.body(Empty::new());
    let request = request.map_err(|_| Finding::new(ProbeOutcome::Broken, "the address is not valid"))?;
    let answer = http.request(request).await.map_err(|error| no_answer(&error, error.is_connect()))?;
    let (head, body) = answer.into_parts();
    // The body is read only if the status says unavailable.
    let body = match head.status {
        StatusCode::SERVICE_UNAVAILABLE => Limited::new(body, ANSWER_MAX_BYTES).collect().await.ok(),
        _ => None,
    };
    Ok(Answer {
        status: head.status,
        retry_after: head.headers.contains_key(header::RETRY_AFTER),
        body: body.map(|body| body.to_bytes()).unwrap_or_default(),
        with_credential: false,
    })
}

/// The health path below the path prefix of the backend.
fn join(url: &Uri, path: &str) -> Option<Uri> {
    let prefix = url.path().trim_end_matches('/');
    let mut parts = url.clone().into_parts();
    parts.path_and_query = Some(format!("{prefix}{path}").parse().ok()?);
    Uri::from_parts(parts).ok()
}

fn connector(egress: EgressPolicy) -> HttpsConnector<EgressConnector> {
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let builder = hyper_rustls::HttpsConnectorBuilder::new();
    let builder = match builder.with_provider_and_native_roots(provider()) {
        Ok(builder) => builder,
        Err(error) => {
            // Probes over http still work; every https probe fails to connect.
            tracing::warn!(%error, "no root certificates: https backends cannot be probed");
            let config = rustls::ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .expect("ring supports the default versions")
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config)
        }
    };
    builder.https_or_http().enable_http1().wrap_connector(EgressConnector::new(egress, |_| {}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_refused_is_named_with_the_flag_that_allows_it() {
        let http = Client::builder(TokioExecutor::new()).build(connector(EgressPolicy::default()));
        for url in ["http://169.254.169.254/latest", "http://0.0.0.0:1/health", "https://[fe80::1]/health"] {
            let seen = probe(&http, &url.parse().expect("a URL"), Duration::from_secs(10)).await;
            assert_eq!(seen.outcome, Outcome::Failed(Cause::Refused), "{url}");
            assert!(seen.detail.contains("--allow-backend-cidr"), "{url}: {}", seen.detail);
        }
    }

    #[test]
    fn the_health_path_is_below_the_prefix() {
        let joined = |url: &str| join(&url.parse().unwrap(), "/health").unwrap().to_string();
        assert_eq!(joined("http://h:1"), "http://h:1/health");
        assert_eq!(joined("https://h/a/b"), "https://h/a/b/health");
    }
}
