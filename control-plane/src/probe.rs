//! The control plane as a vantage point: looks at the liveness of backends where there are too few gateways, and when
//! it is asked to confirm. It holds no credentials and asks no model for anything.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use weir_proto::resource::{AdminState, HealthProfile, Spec};
use weir_proto::v1::{ProbeTier, ResourceKind};
use weir_runtime::{EgressConnector, EgressPolicy, RefusedAddress};

use crate::health::{Cause, Observation, Outcome, Reading, Tier, Vantage};
use crate::model::{Key, State};
use crate::verdicts::{Duties, Verdicts};

/// Probes at once: what a large fleet of backends may take of the control plane.
const AT_ONCE: usize = 32;
/// Between the looks of a confirmation, and after a failure.
const AGAIN: Duration = Duration::from_millis(500);
/// Looks that an order asks for, and that follow a first failure.
const LOOKS: u32 = 2;
/// What is read of an answer that says unavailable, to see whether it is loading.
const ANSWER_MAX_BYTES: usize = 4096;

type Http = Client<HttpsConnector<EgressConnector>, Empty<Bytes>>;

/// What may be looked at.
struct Target {
    uri: Uri,
    profile: HealthProfile,
    /// Whose turn ours is, if it is ours to look regularly.
    turn: Option<(u32, u32)>,
    /// `None`: nothing to do.
    due: Option<Instant>,
    /// Looks that follow the one that is due, whether it has been answered or not: one that waits for an answer in
    /// vain must not hold up the next.
    extra: u32,
    failing: u32,
    in_flight: u32,
    /// Looks that were ordered and have not ended.
    ordered: u32,
}

impl Target {
    fn new(uri: Uri, profile: HealthProfile) -> Self {
        Self { uri, profile, turn: None, due: None, extra: 0, failing: 0, in_flight: 0, ordered: 0 }
    }

    /// Takes over whose turn ours is.
    fn assign(&mut self, turn: Option<(u32, u32)>, now: Instant) {
        if turn.is_some() && self.turn.is_none() {
            // What is new to us is looked at at once.
            self.due = Some(now);
        } else if turn.is_none() && self.ordered == 0 {
            self.due = None;
        }
        self.turn = turn;
    }

    /// Looks now.
    fn order(&mut self, now: Instant) {
        // One that is under way was begun before it was asked for.
        (self.extra, self.due) = (LOOKS - 1, Some(now));
        self.ordered = self.in_flight + LOOKS;
    }

    /// Whether a look begins.
    fn begins(&mut self, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        self.in_flight += 1;
        self.due = (self.extra > 0).then_some(now + AGAIN);
        self.extra = self.extra.saturating_sub(1);
        true
    }

    /// A look ended; `next_turn` is when our next one is.
    fn ended(&mut self, outcome: Outcome, now: Instant, next_turn: impl Fn((u32, u32)) -> Duration) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.failing = if outcome.is_good() { 0 } else { self.failing.saturating_add(1) };
        let asked = self.ordered > 0;
        self.ordered = self.ordered.saturating_sub(1);
        // After a first failure it looks again at once; one that keeps failing gets its regular turns.
        let again = (1..=LOOKS).contains(&self.failing) && outcome != Outcome::Loading;
        if self.in_flight == 0 && self.due.is_none() {
            self.due = match again && !asked {
                true => Some(now + AGAIN),
                false => self.turn.map(|turn| now + next_turn(turn)),
            };
        }
    }
}

/// Probes until told to stop.
pub(crate) struct Prober {
    http: Http,
    verdicts: Verdicts,
    targets: BTreeMap<String, Target>,
    /// Orders up to this one were taken.
    serial: u64,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("targets", &self.targets.len()).finish_non_exhaustive()
    }
}

impl Prober {
    pub(crate) fn new(verdicts: Verdicts, egress: EgressPolicy) -> Self {
        // A connection of its own for each probe: the point is that a new one can be opened.
        let http = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector(egress));
        Self { http, verdicts, targets: BTreeMap::new(), serial: 0 }
    }

    pub(crate) async fn run(mut self, mut state: watch::Receiver<Arc<State>>, stop: CancellationToken) {
        let mut probes = JoinSet::new();
        let mut duties = self.verdicts.duties();
        self.follow(&state.borrow_and_update().clone());
        self.take(&duties.borrow_and_update().clone());
        loop {
            self.start_due(&mut probes);
            let next = self.targets.values().filter_map(|target| target.due).min();
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
                    self.take(&duties.borrow_and_update().clone());
                }
                changed = duties.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = duties.borrow_and_update().clone();
                    self.take(&now);
                }
                Some(done) = probes.join_next() => {
                    if let Ok((backend, uri, seen)) = done {
                        self.finished(&backend, &uri, &seen);
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
                _ => Target::new(uri, pool.health),
            };
            targets.insert(name, target);
        }
        self.targets = targets;
    }

    /// Takes up what is assigned and ordered.
    fn take(&mut self, duties: &Duties) {
        let now = Instant::now();
        let own = duties.assignments.get(&Vantage::ControlPlane);
        let turns: BTreeMap<&str, (u32, u32)> = own
            .iter()
            .flat_map(|own| &own.assignments)
            .filter(|assignment| assignment.tier() == ProbeTier::Liveness)
            .map(|a| (a.backend.as_str(), (a.turn, a.turns)))
            .collect();
        for (name, target) in &mut self.targets {
            target.assign(turns.get(name.as_str()).copied(), now);
        }
        for order in duties.orders_after(self.serial, &Vantage::ControlPlane) {
            if let Some(target) =
                self.targets.get_mut(&order.backend).filter(|_| order.tier == Tier::Liveness)
            {
                target.order(now);
            }
        }
        self.serial = self.serial.max(duties.serial());
    }

    fn start_due(&mut self, probes: &mut JoinSet<(String, Uri, Observation)>) {
        let now = Instant::now();
        for (name, target) in &mut self.targets {
            if probes.len() >= AT_ONCE {
                return;
            }
            if !target.begins(now) {
                continue;
            }
            let (http, name, uri, limit) =
                (self.http.clone(), name.clone(), target.uri.clone(), target.profile.timeout);
            probes.spawn(async move {
                let seen = look(&http, &uri, limit).await;
                (name, uri, seen)
            });
        }
    }

    fn finished(&mut self, backend: &str, uri: &Uri, seen: &Observation) {
        // Of a backend that moved or went meanwhile the answer says nothing.
        let Some(target) = self.targets.get_mut(backend).filter(|target| target.uri == *uri) else { return };
        let interval = target.profile.liveness_interval;
        target.ended(seen.outcome, Instant::now(), |turn| until_turn(interval, turn));
        self.verdicts.observe(&Vantage::ControlPlane, backend, seen);
    }
}

/// The time to our next turn. Turns are counted in Unix time, so that vantage points that never speak to each other
/// look one after the other. A clock that is wrong makes turns fall together, which costs only evenness.
fn until_turn(interval: Duration, (turn, turns): (u32, u32)) -> Duration {
    let unix = weir_runtime::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (interval, unix) = (interval.as_secs_f64().max(0.001), unix.as_secs_f64());
    let phase = interval * f64::from(turn) / f64::from(turns.max(1));
    let wait = interval - (unix - phase).rem_euclid(interval);
    // Not twice in one turn.
    let wait = if wait < interval * 0.2 { wait + interval } else { wait };
    Duration::from_secs_f64(wait + interval * 0.05 * unit())
}

/// From 0 to 1, by chance, so that probes of many backends do not march in step.
fn unit() -> f64 {
    let mut byte = [128_u8];
    // Without randomness they march, which does no harm.
    let _ = getrandom::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

/// One probe: HEAD, and GET where HEAD is not known.
async fn look(http: &Http, uri: &Uri, limit: Duration) -> Observation {
    let began = Instant::now();
    let (outcome, detail) = match timeout(limit, ask(http, uri)).await {
        Err(_) => (Outcome::Failed(Cause::Timeout), format!("no answer within {} ms", limit.as_millis())),
        Ok(seen) => seen,
    };
    let latency = outcome.is_good().then(|| began.elapsed());
    Observation { tier: Tier::Liveness, outcome, detail, latency, reading: Reading::default() }
}

async fn ask(http: &Http, uri: &Uri) -> (Outcome, String) {
    let mut last = (Outcome::Failed(Cause::Broken), "the address is not usable".to_owned());
    for method in [Method::HEAD, Method::GET] {
        let request = Request::builder().method(method.clone()).uri(uri.clone());
        let request = request.header(header::USER_AGENT, "weir-probe").body(Empty::new());
        let Ok(request) = request else { return last };
        let answer = match http.request(request).await {
            Ok(answer) => answer,
            Err(e) if RefusedAddress::of(&e).is_some() => {
                let refused = RefusedAddress::of(&e).map(ToString::to_string).unwrap_or_default();
                return (Outcome::Failed(Cause::Refused), refused);
            }
            Err(e) if e.is_connect() => return (Outcome::Failed(Cause::Refused), "cannot connect".into()),
            Err(_) => {
                last = (Outcome::Failed(Cause::Broken), "the connection broke".into());
                continue;
            }
        };
        let status = answer.status();
        last = (judge(status), format!("answered {}", status.as_u16()));
        if last.0 == Outcome::Pass {
            return last;
        }
        if status == StatusCode::SERVICE_UNAVAILABLE && method == Method::GET {
            if answer.headers().contains_key(header::RETRY_AFTER) {
                return (Outcome::Busy, "answered 503 with Retry-After".into());
            }
            let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES).collect().await;
            if body.is_ok_and(|body| says_loading(&body.to_bytes())) {
                return (Outcome::Loading, "it says that it is loading".into());
            }
        }
    }
    last
}

fn says_loading(body: &[u8]) -> bool {
    String::from_utf8_lossy(body).to_ascii_lowercase().contains("loading")
}

/// Whoever answers lives, even with "no such page" or "who are you": many servers have no health page, and the probe
/// sends no credential. A 5xx is a failure.
fn judge(status: StatusCode) -> Outcome {
    if is_alive(status) { Outcome::Pass } else { Outcome::Failed(Cause::Status) }
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

fn connector(egress: EgressPolicy) -> HttpsConnector<EgressConnector> {
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
    builder.https_or_http().enable_http1().wrap_connector(EgressConnector::new(egress, |_| {}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target::new(Uri::from_static("http://h"), HealthProfile::default())
    }

    #[test]
    fn both_looks_of_an_order_are_made_while_the_first_is_not_answered_whatever_else_changes() {
        let (mut target, now) = (target(), Instant::now());
        target.order(now);
        assert!(target.begins(now) && !target.begins(now));
        // Orders and assignments of others come in between.
        target.assign(None, now);
        assert!(target.begins(now + AGAIN), "it does not wait for the answer to the first");
        let silent = Outcome::Failed(Cause::Timeout);
        for late in [4, 5] {
            target.ended(silent, now + AGAIN * late, |_| Duration::ZERO);
        }
        assert_eq!(
            (target.due, target.failing, target.in_flight),
            (None, 2, 0),
            "and no more: it has no turn"
        );
    }

    #[test]
    fn a_first_failure_in_its_turn_is_looked_at_again_at_once_and_a_lasting_one_in_its_turn() {
        let (mut target, now) = (target(), Instant::now());
        let turn = Duration::from_secs(5);
        target.assign(Some((0, 3)), now);
        let mut waits = Vec::new();
        for _ in 0..4 {
            let at = target.due.expect("due");
            assert!(target.begins(at));
            target.ended(Outcome::Failed(Cause::Refused), at, |_| turn);
            waits.push(target.due.expect("due") - at);
        }
        assert_eq!(waits, [AGAIN, AGAIN, turn, turn]);
        target.assign(None, now);
        assert_eq!(target.due, None);
    }

    #[tokio::test]
    async fn an_address_that_is_refused_is_named_with_the_flag_that_allows_it() {
        let http = Client::builder(TokioExecutor::new()).build(connector(EgressPolicy::default()));
        for url in ["http://169.254.169.254/latest", "http://0.0.0.0:1/health", "https://[fe80::1]/health"] {
            let seen = look(&http, &url.parse().expect("a URL"), Duration::from_secs(10)).await;
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
