//! A control plane, gateways in this process, and traffic that counts the result of every request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, StatusCode};
use mock_llm::Config as MockConfig;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_gateway::config::Config;
use weir_proto::v1;
use weir_runtime::Secret;
use weir_tests::client::Client;
use weir_tests::cluster::{KEY, Resources, gateway_config};
use weir_tests::eventually;
use weir_tests::plane::{self, ADMIN_TOKEN, Admin, Plane};

pub(crate) const CHAT: &str =
    r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;

/// Whether the long versions run: twenty restarts of each gateway under 500 requests per second and 200 streams,
/// sixty kills, two thousand clients. On a quiet machine: WEIR_TEST_WHOLE=1 cargo test -p weir-tests --test attack.
pub(crate) fn is_whole() -> bool {
    std::env::var_os("WEIR_TEST_WHOLE").is_some()
}

/// A backend with slots for all.
pub(crate) fn roomy() -> MockConfig {
    MockConfig { models: vec!["gpt-4.1".into()], slots: 4096, ..MockConfig::default() }
}

/// A limit of this number of requests, which hardly drains.
pub(crate) fn requests(count: u32) -> v1::Rates {
    v1::Rates { requests_per_minute: Some(1), burst_multiplier: Some(f64::from(count)), ..Default::default() }
}

/// Above the requests of any test.
pub(crate) fn plenty() -> v1::Rates {
    v1::Rates { requests_per_minute: Some(10_000_000), concurrency: Some(10_000), ..Default::default() }
}

/// One gateway.
pub(crate) struct Member {
    pub(crate) client: Client,
    pub(crate) ops: Client,
    pub(crate) running: weir_gateway::Handle,
    pub(crate) shutdown: CancellationToken,
}

impl Member {
    pub(crate) async fn start(config: Config) -> Self {
        let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
        let running = weir_gateway::start(config, None, shutdown.clone(), force).await.expect("starts");
        running.serving().await;
        let (client, ops) = (Client::new(running.address, KEY), Client::new(running.ops_address, ""));
        Self { client, ops, running, shutdown }
    }

    /// The sum of a metric over its labels that contain `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> f64 {
        metric(&self.ops, name, label).await
    }
}

/// The sum of a metric over its labels that contain `label`, on an operations page.
pub(crate) async fn metric(ops: &Client, name: &str, label: &str) -> f64 {
    let page = ops.ask(Method::GET, "/metrics", "").await;
    let is_it = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
    };
    page.text().lines().filter(is_it).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

/// A control plane and its gateways.
pub(crate) struct Fleet {
    pub(crate) plane: Plane,
    pub(crate) admin: Admin,
    pub(crate) gateways: Vec<Member>,
    pub(crate) data: TempDir,
}

impl Fleet {
    /// Starts it; `change` sets the particular settings of each gateway. Returns when each holds the configuration
    /// and knows of the others.
    pub(crate) async fn start(
        count: usize,
        resources: &Resources,
        change: impl Fn(usize, &mut Config),
    ) -> Self {
        let data = tempfile::tempdir().expect("a directory");
        let plane = plane::start("127.0.0.1:0", &data.path().join("plane"), None).await;
        let mut admin = plane.admin().await;
        let apply = v1::ApplyRequest { resources: resources.all(), ..Default::default() };
        admin.apply(apply).await.expect("applied");
        let mut fleet = Self { plane, admin, gateways: Vec::new(), data };
        fleet.join(count, change).await;
        fleet
    }

    /// Starts more gateways. Returns when each knows of all.
    pub(crate) async fn join(&mut self, more: usize, change: impl Fn(usize, &mut Config)) {
        let before = self.gateways.len();
        for k in before..before + more {
            let mut config = self.config(k);
            change(k, &mut config);
            self.gateways.push(Member::start(config).await);
        }
        eventually("each gateway knows of all", || async {
            self.gateways.iter().all(|one| one.running.live.live_gateways() as usize == before + more)
        })
        .await;
    }

    fn config(&self, k: usize) -> Config {
        Config {
            control_plane: self.plane.url.clone(),
            gateway_token: Some(Secret::new(ADMIN_TOKEN.into())),
            id: Some(format!("g{k}")),
            ..gateway_config(&self.data.path().join(format!("g{k}")))
        }
    }

    pub(crate) fn clients(&self) -> Vec<Client> {
        self.gateways.iter().map(|one| one.client.clone()).collect()
    }

    /// Returns when every gateway uses Redis.
    pub(crate) async fn uses_redis(&self) {
        for one in &self.gateways {
            eventually("Redis decides", || async {
                // A gateway without requests detects a change within a second; one with requests, at once.
                one.metric("weir_limit_store_unavailable", "").await == 0.0
            })
            .await;
        }
    }

    /// The number of Redis outages of each gateway.
    pub(crate) async fn outages(&self) -> Vec<f64> {
        let mut all = Vec::new();
        for one in &self.gateways {
            all.push(one.metric("weir_limit_store_outages_total", "").await);
        }
        all
    }

    /// Returns when these gateways have had one more outage and use Redis again.
    pub(crate) async fn was_away(&self, before: &[f64], gateways: std::ops::Range<usize>) {
        for k in gateways {
            eventually("the outage is noticed", || async {
                self.gateways[k].metric("weir_limit_store_outages_total", "").await > before[k]
            })
            .await;
        }
        self.uses_redis().await;
    }

    /// Changes a tenant. Returns the revision.
    pub(crate) async fn touch(&mut self, word: &str) -> u64 {
        let spec = v1::TenantSpec { display_name: word.into(), ..Default::default() };
        let spec = Some(v1::resource::Spec::Tenant(spec));
        let resource = v1::Resource { name: "touched".into(), spec, ..Default::default() };
        let apply =
            v1::ApplyRequest { resources: vec![resource], apply_set: "t".into(), ..Default::default() };
        self.admin.apply(apply).await.expect("applied").into_inner().revision
    }
}

/// The results of requests.
#[derive(Debug, Default, Clone)]
pub(crate) struct Counts {
    /// By status.
    pub(crate) statuses: BTreeMap<u16, u64>,
    /// The reasons of requests without a complete answer; the first few.
    pub(crate) broken: Vec<String>,
    /// Bodies of answers other than 200 and 429; the first few.
    pub(crate) odd: Vec<String>,
    pub(crate) slowest: Duration,
    pub(crate) total: u64,
}

/// The number of failures that are kept to be shown.
const SHOWN: usize = 5;

impl Counts {
    pub(crate) fn of(&self, status: u16) -> u64 {
        self.statuses.get(&status).copied().unwrap_or_default()
    }

    /// Fails unless every request got one of these statuses.
    pub(crate) fn only(&self, statuses: &[u16], what: &str) {
        assert!(self.broken.is_empty(), "{what}: {self:?}");
        assert!(self.statuses.keys().all(|status| statuses.contains(status)), "{what}: {self:?}");
        assert!(self.total > 0, "{what}: no traffic");
    }
}

/// Clients that send one request after the other until they are stopped.
pub(crate) struct Traffic {
    counts: Arc<Mutex<Counts>>,
    stop: CancellationToken,
    workers: JoinSet<()>,
}

impl Traffic {
    /// A number of workers, each with one of the clients, with a pause after each answer.
    pub(crate) fn start(clients: &[Client], workers: usize, pause: Duration) -> Self {
        let traffic =
            Self { counts: Arc::default(), stop: CancellationToken::new(), workers: JoinSet::new() };
        let mut traffic = traffic;
        for worker in 0..workers {
            let client = clients[worker % clients.len()].clone();
            let (counts, stop) = (traffic.counts.clone(), traffic.stop.clone());
            traffic.workers.spawn(async move {
                while !stop.is_cancelled() {
                    ask(&client, CHAT, &counts).await;
                    tokio::time::sleep(pause).await;
                }
            });
        }
        traffic
    }

    /// The results so far.
    pub(crate) fn counts(&self) -> Counts {
        self.counts.lock().expect("whole").clone()
    }

    /// Returns when this number of further requests have ended.
    pub(crate) async fn more(&self, requests: u64) {
        let before = self.counts().total;
        eventually("traffic goes on", || async { self.counts().total >= before + requests }).await;
    }

    /// Stops. Returns the results of all requests.
    pub(crate) async fn end(mut self) -> Counts {
        self.stop.cancel();
        while let Some(ended) = self.workers.join_next().await {
            ended.expect("no panic");
        }
        self.counts()
    }
}

/// Sends and counts one request.
pub(crate) async fn ask(client: &Client, body: &str, counts: &Mutex<Counts>) {
    let asked = Instant::now();
    let answer = client.try_chat(body).await;
    let mut counts = counts.lock().expect("whole");
    counts.total += 1;
    counts.slowest = counts.slowest.max(asked.elapsed());
    match answer {
        Ok(answer) => {
            *counts.statuses.entry(answer.status.as_u16()).or_default() += 1;
            let is_odd = !matches!(answer.status, StatusCode::OK | StatusCode::TOO_MANY_REQUESTS);
            if is_odd && counts.odd.len() < SHOWN {
                counts.odd.push(format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)));
            }
        }
        Err(broken) if counts.broken.len() < SHOWN => counts.broken.push(broken.why),
        Err(_) => {}
    }
}
