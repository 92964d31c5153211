//! Looks at every backend that is not disabled, and publishes what [`crate::health`] makes of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::Empty;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use weir_proto::resource::{AdminState, HealthProfile, Spec};
use weir_proto::v1::{self, ResourceKind};

use crate::fleet::Fleet;
use crate::health::{Liveness, Outcome, Vantage};
use crate::metrics::Metrics;
use crate::model::{Key, State};

/// Probes at once: what a large fleet of backends may take of the control plane.
const AT_ONCE: usize = 32;

type Http = Client<HttpsConnector<HttpConnector>, Empty<Bytes>>;

/// What to probe and when.
struct Target {
    uri: Uri,
    profile: HealthProfile,
    liveness: Liveness,
    due: Instant,
    in_flight: bool,
}

/// Probes until told to stop.
pub(crate) struct Prober {
    http: Http,
    fleet: Fleet,
    metrics: Arc<Metrics>,
    targets: BTreeMap<String, Target>,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("targets", &self.targets.len()).finish_non_exhaustive()
    }
}

impl Prober {
    pub(crate) fn new(fleet: Fleet, metrics: Arc<Metrics>) -> Self {
        // A connection of its own for each probe: the point is that a new one can be opened.
        let http = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector());
        Self { http, fleet, metrics, targets: BTreeMap::new() }
    }

    pub(crate) async fn run(mut self, mut state: watch::Receiver<Arc<State>>, stop: CancellationToken) {
        let mut probes = JoinSet::new();
        self.follow(&state.borrow_and_update().clone());
        loop {
            self.start_due(&mut probes);
            let next = self.targets.values().filter(|t| !t.in_flight).map(|t| t.due).min();
            // With all places taken, the next thing to happen is the end of a probe.
            let next = next.filter(|_| probes.len() < AT_ONCE);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = state.borrow_and_update().clone();
                    self.follow(&now);
                }
                Some(done) = probes.join_next() => {
                    if let Ok((backend, uri, outcome)) = done {
                        self.finished(&backend, &uri, &outcome);
                    }
                }
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
        }
    }

    /// Takes up what is declared. A backend that moved is looked at anew.
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
            let target = match self.targets.remove(&name) {
                Some(known) if known.uri == uri => Target { profile: pool.health, ..known },
                _ => {
                    let liveness = Liveness::new(SystemTime::now());
                    self.fleet.judge(liveness.verdict(&name));
                    let due = Instant::now();
                    Target { uri, profile: pool.health, liveness, due, in_flight: false }
                }
            };
            targets.insert(name, target);
        }
        for gone in self.targets.keys().filter(|name| !targets.contains_key(*name)) {
            self.fleet.forget(gone);
            self.metrics.forget_backend(gone);
        }
        self.targets = targets;
    }

    fn start_due(&mut self, probes: &mut JoinSet<(String, Uri, Outcome)>) {
        let now = Instant::now();
        for (name, target) in self.targets.iter_mut().filter(|(_, t)| !t.in_flight && t.due <= now) {
            if probes.len() >= AT_ONCE {
                return;
            }
            target.in_flight = true;
            let (http, name, uri, limit) =
                (self.http.clone(), name.clone(), target.uri.clone(), target.profile.timeout);
            probes.spawn(async move {
                let outcome = look(&http, &uri, limit).await;
                (name, uri, outcome)
            });
        }
    }

    fn finished(&mut self, backend: &str, uri: &Uri, outcome: &Outcome) {
        // Of a backend that moved or went meanwhile the answer says nothing.
        let Some(target) = self.targets.get_mut(backend).filter(|target| target.uri == *uri) else { return };
        target.in_flight = false;
        target.due = Instant::now() + jittered(target.profile.liveness_interval);
        self.metrics.probed(backend, *outcome == Outcome::Alive);
        if target.liveness.vote(Vantage::ControlPlane, outcome, &target.profile, SystemTime::now()) {
            let verdict = target.liveness.verdict(backend);
            tracing::info!(backend, state = verdict.state().as_str_name(), reason = verdict.reason, "health");
            self.fleet.judge(verdict);
        }
    }
}

/// One probe. Whoever answers lives, even with "no such page" or "who are you": many servers have no health page
/// and the probe sends no credential. A 5xx, a refused connection and silence are failures.
async fn look(http: &Http, uri: &Uri, limit: Duration) -> Outcome {
    let request = Request::get(uri.clone()).header("user-agent", "weir-probe").body(Empty::new());
    let Ok(request) = request else { return Outcome::Failed("the address is not usable".into()) };
    match timeout(limit, http.request(request)).await {
        Err(_) => Outcome::Failed(format!("no answer within {} ms", limit.as_millis())),
        Ok(Err(e)) if e.is_connect() => Outcome::Failed("cannot connect".into()),
        Ok(Err(_)) => Outcome::Failed("the connection broke".into()),
        Ok(Ok(answer)) if is_alive(answer.status()) => Outcome::Alive,
        Ok(Ok(answer)) => Outcome::Failed(format!("answered {}", answer.status().as_u16())),
    }
}

fn is_alive(status: StatusCode) -> bool {
    status.is_success()
        || status.is_redirection()
        || matches!(
            status,
            // Busy is not dead either.
            StatusCode::UNAUTHORIZED
                | StatusCode::NOT_FOUND
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::TOO_MANY_REQUESTS
        )
}

/// The health path below the path prefix of the backend.
fn join(url: &Uri, path: &str) -> Option<Uri> {
    let prefix = url.path().trim_end_matches('/');
    let mut parts = url.clone().into_parts();
    parts.path_and_query = Some(format!("{prefix}{path}").parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// Between 90 and 110 percent, so that probes of many backends do not march in step.
fn jittered(interval: Duration) -> Duration {
    let mut byte = [128_u8];
    // Without randomness the interval is exact, which does no harm.
    let _ = getrandom::fill(&mut byte);
    interval.mul_f64(0.9 + 0.2 * f64::from(byte[0]) / 255.0)
}

fn connector() -> HttpsConnector<HttpConnector> {
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let builder = hyper_rustls::HttpsConnectorBuilder::new();
    let builder = match builder.with_provider_and_native_roots(provider()) {
        Ok(builder) => builder,
        Err(error) => {
            // Plain http still works; every https probe will say that it cannot connect.
            tracing::warn!(%error, "no root certificates: https backends cannot be probed");
            let config = rustls::ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .expect("ring supports the default versions")
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
            hyper_rustls::HttpsConnectorBuilder::new().with_tls_config(config)
        }
    };
    builder.https_or_http().enable_http1().build()
}

/// The verdict on a backend that has none yet.
pub(crate) fn unknown(backend: &str) -> v1::BackendHealth {
    v1::BackendHealth {
        backend: backend.to_owned(),
        state: v1::HealthState::Unknown.into(),
        reason: "not probed".into(),
        since: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_health_path_is_below_the_prefix() {
        let joined = |url: &str| join(&url.parse().unwrap(), "/health").unwrap().to_string();
        assert_eq!(joined("http://h:1"), "http://h:1/health");
        assert_eq!(joined("https://h/a/b"), "https://h/a/b/health");
    }

    #[test]
    fn who_answers_lives_unless_it_says_it_is_broken() {
        for code in [200, 204, 302, 401, 404, 405, 429] {
            assert!(is_alive(StatusCode::from_u16(code).unwrap()), "{code}");
        }
        for code in [400, 403, 500, 502, 503] {
            assert!(!is_alive(StatusCode::from_u16(code).unwrap()), "{code}");
        }
    }
}
