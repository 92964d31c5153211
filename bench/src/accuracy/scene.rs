//! The processes of `accuracy` and the faults that they get.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use weir_ratelimit::Limiter as _;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};

use super::books::Books;
use super::driver::Record;
use super::event::Event;
use super::judge::Outage;
use super::limits::{CROWD_MODEL, FREE, GATEWAYS, LEASES_MAX, Limit, MODELS, Scope, places, resources};
use crate::fleet::ControlPlane;
use crate::load::micros;
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};
use crate::store::{Store, Topology};

/// Tokens per second of an answer: a stream lasts from some tenths of a second to some seconds.
const TOKENS_PER_S: f64 = 150.0;
/// The time for which Redis is stopped.
const PAUSE: Duration = Duration::from_secs(2);
/// The interval of checks of gateways that decide alone, and the time without local decisions after which the outage
/// is over.
const LOOK: Duration = Duration::from_millis(200);
const QUIET: Duration = Duration::from_secs(2);
/// The data set of a strict scene is older than the time in which any of its buckets drains.
const AGE_S: u64 = 3600;
const BIRTH: &str = "weir:{g}:birth";

/// The scene to run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) topology: Topology,
    /// Whether a missing bucket counts as full when the data set was created.
    pub(crate) strict: bool,
    pub(crate) limits: &'static [Limit],
    /// The slots of every backend.
    pub(crate) slots: u32,
}

/// The processes of one scenario.
pub(crate) struct Scene {
    pub(crate) gateways: Vec<Gateway>,
    pub(crate) store: Store,
    mocks: Vec<(&'static str, Mock)>,
    control_plane: ControlPlane,
    directory: PathBuf,
    setup: Setup,
}

impl Scene {
    pub(crate) async fn start(directory: &Path, setup: Setup) -> anyhow::Result<Self> {
        let store = Store::start(setup.topology, directory).await?;
        if setup.strict {
            let birth = redis_now_us(&store).await?.saturating_sub(AGE_S * 1_000_000);
            store.first().tell(&["SET", BIRTH, &birth.to_string()]).await?;
        }
        let mut mocks = Vec::new();
        for model in MODELS.into_iter().chain([FREE]) {
            let decode_tokens_per_s = if model == FREE { 0.0 } else { TOKENS_PER_S };
            let args =
                MockArgs { model: model.into(), slots: 10_000, decode_tokens_per_s, ..MockArgs::default() };
            mocks.push((model, Mock::start(&format!("mock-{model}"), &args, directory).await?));
        }
        let addresses: Vec<_> = mocks.iter().map(|(model, mock)| (*model, mock.address)).collect();
        let resources = resources(&addresses, setup.limits, setup.slots);
        let control_plane = ControlPlane::start(&resources).await?;
        let mut gateways = Vec::new();
        for k in 0..GATEWAYS {
            let args = GatewayArgs {
                id: format!("gateway-{k}"),
                redis: Some(store.url()),
                control_plane: Some(control_plane.access()),
                strict: setup.strict,
                ..GatewayArgs::default()
            };
            gateways.push(Gateway::start(&args, &resources, directory).await?);
        }
        // The control plane tells every gateway the number of gateways within its report interval.
        sleep(Duration::from_secs(2)).await;
        Ok(Self { gateways, store, mocks, control_plane, directory: directory.to_owned(), setup })
    }

    /// The addresses of the gateways for clients.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.gateways.iter().map(|gateway| gateway.address).collect()
    }

    /// The server of a model.
    pub(crate) fn mock(&self, model: &str) -> anyhow::Result<&Mock> {
        let found = self.mocks.iter().find(|(of, _)| *of == model);
        found.map(|(_, mock)| mock).with_context(|| format!("no server of {model}"))
    }

    /// The tokens of the prompt, as the servers count them.
    pub(crate) async fn prompt_tokens(&self) -> anyhow::Result<u64> {
        let request = crate::load::chat("none", FREE, 1, false);
        let mut connection = crate::load::Connection::open(self.mock(FREE)?.address).await?;
        let (_, body) = connection.call_for_body(&request).await?;
        let body: serde_json::Value = serde_json::from_str(&body)?;
        body["usage"]["prompt_tokens"].as_u64().with_context(|| format!("no usage in {body}"))
    }

    /// Makes the event happen after this time. Returns the outage of the store, if there was one. Times count from
    /// `started`.
    pub(crate) async fn happen(
        &mut self,
        event: Event,
        after: Duration,
        started: Instant,
    ) -> anyhow::Result<Option<Outage>> {
        sleep(after).await;
        let began_us = micros(started.elapsed());
        match event {
            Event::Quiet => return Ok(None),
            Event::GatewayKilled => {
                self.gateways[0].process.kill().await?;
                return Ok(None);
            }
            Event::ScriptFlush => {
                self.store.first().tell(&["SCRIPT", "FLUSH"]).await?;
                return Ok(None);
            }
            Event::SlotMigration => {
                for key in places(self.setup.limits) {
                    self.store.migrate(&key).await?;
                }
                return Ok(None);
            }
            Event::RedisRestartedEmpty | Event::RedisRestartedEmptyStrict => {
                self.store.crash().await?;
                self.start_again().await?;
            }
            Event::RedisPaused => self.pause(PAUSE).await?,
            Event::Failover => {
                self.store.crash().await?;
                self.store.failed_over().await?;
            }
        }
        let back_us = micros(started.elapsed());
        Ok(Some(Outage { began_us, back_us, over_us: self.decided_together(started).await }))
    }

    /// Starts the one server of the store again.
    pub(crate) async fn start_again(&mut self) -> anyhow::Result<()> {
        self.store.restart(self.setup.topology, &self.directory).await
    }

    /// Stops the store for a time. It keeps its connections and does not answer.
    pub(crate) async fn pause(&self, length: Duration) -> anyhow::Result<()> {
        self.store.first().process.signal(Signal::STOP)?;
        sleep(length).await;
        self.store.first().process.signal(Signal::CONT)
    }

    /// Returns when no gateway decides alone any more, and the time of the last local decision.
    pub(crate) async fn decided_together(&self, started: Instant) -> u64 {
        let (mut sum, mut last) = (self.decided_alone().await, Instant::now());
        while last.elapsed() < QUIET {
            sleep(LOOK).await;
            let now = self.decided_alone().await;
            if now != sum {
                (sum, last) = (now, Instant::now());
            }
        }
        micros(last.saturating_duration_since(started))
    }

    /// The number of local decisions.
    pub(crate) async fn decided_alone(&self) -> u64 {
        let mut sum = 0;
        for gateway in &self.gateways {
            // A killed gateway does not answer.
            let page = crate::roles::fetch(gateway.ops, "/metrics").await.unwrap_or_default();
            let alone = page
                .lines()
                .filter(|l| l.starts_with("weir_limiter_calls_total") && l.contains("by=\"local\""));
            sum += alone.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>();
        }
        sum
    }

    /// The creation of the current data set, in the time of the records; `None` if it was before their start.
    pub(crate) async fn born_us(&self, started: Instant) -> anyhow::Result<Option<u64>> {
        let born: u64 = self.store.first().ask(&["GET", BIRTH]).await?;
        let age = redis_now_us(&self.store).await?.saturating_sub(born);
        Ok(micros(started.elapsed()).checked_sub(age))
    }

    /// The maximum of concurrent requests of the model's server.
    pub(crate) async fn most_in_flight(&self, limit: &Limit) -> anyhow::Result<u64> {
        let model = match limit.scope {
            Scope::Backend(model) | Scope::Model(model) => model,
            Scope::Tenant(_) | Scope::Global => CROWD_MODEL,
        };
        self.mock(model)?.stats().await?["max_in_flight"].as_u64().context("a counter of the mock")
    }

    /// The usage records as `weir usage` shows them, and what the servers billed. Settlements are asynchronous, so
    /// both are read until they agree, or until `patience` is over.
    pub(crate) async fn books(&self, records: &[Record], patience: Duration) -> anyhow::Result<Books> {
        let deadline = Instant::now() + patience;
        let mut billed = Vec::new();
        for model in MODELS {
            let stats = self.mock(model)?.stats().await?;
            let count = |name: &str| stats[name].as_u64().with_context(|| format!("{name} of a server"));
            billed.push((model, count("prompt_tokens")? + count("generation_tokens")?));
        }
        // The first gateway may have been killed.
        let gateway = self.gateways.last().context("a gateway")?;
        loop {
            let page = crate::roles::fetch(gateway.ops, "/usage?by=tenant,model").await;
            let books = Books::read(&page.unwrap_or_default(), billed.clone(), records);
            if books.agree(self.setup.limits) || Instant::now() >= deadline {
                return Ok(books);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Leases that still count although no request runs, after at most `patience`.
    pub(crate) async fn leaked_leases(&self, patience: Duration) -> anyhow::Result<Vec<(Scope, u64)>> {
        let options = RedisOptions::default();
        let limiter = RedisLimiter::connect(&self.store.url(), options).await?;
        let deadline = Instant::now() + patience;
        loop {
            let mut leaked = Vec::new();
            for limit in self.setup.limits {
                let Some(scope) = limit.leases() else { continue };
                let states = limiter.peek(std::slice::from_ref(&scope)).await?;
                let left = states.first().context("a limit was asked for")?.remaining;
                let held = u64::from(LEASES_MAX).saturating_sub(left);
                if held > 0 {
                    leaked.push((limit.scope, held));
                }
            }
            if leaked.is_empty() || Instant::now() >= deadline {
                return Ok(leaked);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    pub(crate) async fn end(self) -> anyhow::Result<()> {
        drop(self.gateways);
        self.control_plane.end().await
    }
}

async fn redis_now_us(store: &Store) -> anyhow::Result<u64> {
    let (seconds, micros): (u64, u64) = store.first().ask(&["TIME"]).await?;
    Ok(seconds * 1_000_000 + micros)
}
