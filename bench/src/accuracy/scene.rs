//! What `accuracy` runs: the limits, the processes under them, and what happens to those.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use prost_types::Duration as Wire;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::{Key, scope_keys};

use super::driver::{Caller, End, Record, key};
use super::oracle::Envelope;
use crate::fleet::ControlPlane;
use crate::redis_server::Redis;
use crate::resources::{Resources, backend};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};

const GATEWAYS: usize = 4;
/// Tokens per second of an answer: a stream lasts some tenths of a second.
const TOKENS_PER_S: f64 = 150.0;

/// Tenant `c` alone uses `m3`, so that the server's count of requests at the same time is its own.
const MODELS: [&str; 3] = ["m1", "m2", CROWD_MODEL];
const CROWD_MODEL: &str = "m3";
/// Slots of every backend.
const SLOTS: u32 = 40;

/// Who asks.
pub(crate) const CALLERS: [Caller; 3] = [
    Caller { tenant: "a", percent: 45, tokens: (10, 40), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "b", percent: 40, tokens: (10, 60), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "c", percent: 15, tokens: (40, 120), streams: 100, models: &[CROWD_MODEL] },
];

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Global,
    Tenant(&'static str),
    Model(&'static str),
    /// The slots of a backend, which is called after its model.
    Backend(&'static str),
}

/// How it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    Requests,
    Tokens,
    InFlight,
}

/// One limit of the scene.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub(crate) scope: Scope,
    counted: Counted,
    /// Per minute, and the capacity too; at once for what is in flight.
    pub(crate) most: u64,
}

/// Each is far exceeded by the load.
pub(crate) const LIMITS: [Limit; 7] = [
    Limit { scope: Scope::Tenant("a"), counted: Counted::Requests, most: 240 },
    Limit { scope: Scope::Tenant("b"), counted: Counted::Tokens, most: 9000 },
    Limit { scope: Scope::Model("m2"), counted: Counted::Requests, most: 180 },
    Limit { scope: Scope::Global, counted: Counted::Requests, most: 480 },
    Limit { scope: Scope::Tenant("c"), counted: Counted::InFlight, most: 6 },
    Limit { scope: Scope::Backend("m1"), counted: Counted::InFlight, most: SLOTS as u64 },
    Limit { scope: Scope::Backend("m2"), counted: Counted::InFlight, most: SLOTS as u64 },
];

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scope {
            Scope::Global => f.write_str("global")?,
            Scope::Tenant(name) => write!(f, "tenant {name}")?,
            Scope::Model(name) => write!(f, "model {name}")?,
            Scope::Backend(name) => write!(f, "backend {name}")?,
        }
        f.write_str(match self.counted {
            Counted::Requests => " requests",
            Counted::Tokens => " tokens",
            Counted::InFlight => " in flight",
        })
    }
}

impl Limit {
    /// Capacity and rate; `None` for what is in flight.
    pub(crate) fn envelope(&self) -> Option<Envelope> {
        let envelope = Envelope { capacity: self.most, per_minute: self.most };
        (self.counted != Counted::InFlight).then_some(envelope)
    }

    pub(crate) fn counts_tokens(&self) -> bool {
        self.counted == Counted::Tokens
    }

    /// Whether a request is under it.
    pub(crate) fn covers(&self, record: &Record) -> bool {
        match self.scope {
            Scope::Global => true,
            Scope::Tenant(name) => record.tenant == name,
            Scope::Model(name) | Scope::Backend(name) => record.model == name,
        }
    }

    /// What a request costs it.
    pub(crate) fn cost(&self, record: &Record) -> u64 {
        match self.counted {
            Counted::Requests | Counted::InFlight => 1,
            Counted::Tokens => record.prompt_tokens + record.tokens,
        }
    }

    /// Whether it is the limit that a request was refused by.
    pub(crate) fn refused(&self, record: &Record) -> bool {
        let End::Limited(scope, name, what) = &record.end else { return false };
        let counted = match self.counted {
            Counted::Requests => "requests",
            Counted::Tokens => "tokens",
            Counted::InFlight => "concurrency",
        };
        let same = match self.scope {
            Scope::Global => scope == "global",
            Scope::Tenant(tenant) => scope == "tenant" && name == tenant,
            Scope::Model(model) => scope == "model" && name == model,
            Scope::Backend(_) => false,
        };
        same && what == counted
    }

    /// Where its leases are.
    fn leases(&self) -> Option<Key> {
        match self.scope {
            _ if self.counted != Counted::InFlight => None,
            Scope::Global => Some(scope_keys(weir_ratelimit::Scope::Global).1),
            Scope::Tenant(name) => Some(scope_keys(weir_ratelimit::Scope::Tenant(name)).1),
            Scope::Model(name) => Some(scope_keys(weir_ratelimit::Scope::Model(name)).1),
            Scope::Backend(name) => Some(Key::backend_slots(name)),
        }
    }

    fn rates(&self) -> v1::Rates {
        let most = Some(self.most);
        // Refused at once: who waits is decided later, and the oracle knows less about when.
        let mut rates =
            v1::Rates { burst_multiplier: Some(1.0), max_wait: Some(Wire::default()), ..Default::default() };
        match self.counted {
            Counted::Requests => rates.requests_per_minute = most,
            Counted::Tokens => rates.tokens_per_minute = most,
            Counted::InFlight => rates.concurrency = u32::try_from(self.most).ok(),
        }
        rates
    }
}

/// What happens in the middle of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Quiet,
    GatewayKilled,
    ScriptFlush,
    RedisRestartedEmpty,
    RedisPaused,
}

impl Event {
    pub(crate) const ALL: [Self; 5] =
        [Self::Quiet, Self::GatewayKilled, Self::ScriptFlush, Self::RedisRestartedEmpty, Self::RedisPaused];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::GatewayKilled => "gateway_killed",
            Self::ScriptFlush => "script_flush",
            Self::RedisRestartedEmpty => "redis_restarted_empty",
            Self::RedisPaused => "redis_paused_2s",
        }
    }

    /// Whether Redis is away for a while.
    pub(crate) const fn is_outage(self) -> bool {
        matches!(self, Self::RedisRestartedEmpty | Self::RedisPaused)
    }
}

/// Everything that runs in one scenario.
pub(crate) struct Scene {
    pub(crate) gateways: Vec<Gateway>,
    mocks: Vec<Mock>,
    redis: Redis,
    control_plane: ControlPlane,
    directory: PathBuf,
}

impl Scene {
    pub(crate) async fn start(directory: &Path) -> anyhow::Result<Self> {
        let redis = Redis::start(directory).await?;
        let mut mocks = Vec::new();
        for model in MODELS {
            let args = MockArgs {
                model: model.into(),
                slots: 10_000,
                decode_tokens_per_s: TOKENS_PER_S,
                ..MockArgs::default()
            };
            mocks.push(Mock::start(&format!("mock-{model}"), &args, directory).await?);
        }
        let resources = resources(&mocks);
        let control_plane = ControlPlane::start(&resources).await?;
        let mut gateways = Vec::new();
        for k in 0..GATEWAYS {
            let args = GatewayArgs {
                id: format!("gateway-{k}"),
                redis: Some(redis.url()),
                control_plane: Some(control_plane.access()),
            };
            gateways.push(Gateway::start(&args, &resources, directory).await?);
        }
        // The control plane tells every gateway how many there are, within its report interval.
        sleep(Duration::from_secs(2)).await;
        Ok(Self { gateways, mocks, redis, control_plane, directory: directory.to_owned() })
    }

    /// Tokens of the prompt as the servers count them.
    pub(crate) async fn prompt_tokens(&self) -> anyhow::Result<u64> {
        let request = crate::load::chat("none", MODELS[0], 1, false);
        let mut connection = crate::load::Connection::open(self.mocks[0].address).await?;
        let (_, body) = connection.call_for_body(&request).await?;
        let body: serde_json::Value = serde_json::from_str(&body)?;
        body["usage"]["prompt_tokens"].as_u64().with_context(|| format!("no usage in {body}"))
    }

    /// Lets it happen `after` so long; says for how long Redis was away.
    pub(crate) async fn happen(&mut self, event: Event, after: Duration) -> anyhow::Result<Duration> {
        sleep(after).await;
        let began = Instant::now();
        match event {
            Event::Quiet => return Ok(Duration::ZERO),
            Event::GatewayKilled => {
                self.gateways[0].process.kill().await?;
                return Ok(Duration::ZERO);
            }
            Event::ScriptFlush => {
                self.redis.command(&["SCRIPT", "FLUSH"]).await?;
                return Ok(Duration::ZERO);
            }
            Event::RedisRestartedEmpty => {
                self.redis.process.kill().await?;
                self.redis = Redis::start_on(self.redis.port, &self.directory).await?;
            }
            Event::RedisPaused => {
                self.redis.process.signal(Signal::STOP)?;
                sleep(Duration::from_secs(2)).await;
                self.redis.process.signal(Signal::CONT)?;
            }
        }
        Ok(began.elapsed())
    }

    /// Decisions that gateways made without Redis, on their share of the limits.
    pub(crate) async fn decided_alone(&self) -> u64 {
        let mut sum = 0;
        for gateway in &self.gateways {
            // One that was killed tells nothing.
            let page = crate::roles::fetch(gateway.ops, "/metrics").await.unwrap_or_default();
            let errors = page
                .lines()
                .filter(|l| l.starts_with("weir_limiter_calls_total") && l.contains("by=\"local\""));
            sum += errors.filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>();
        }
        sum
    }

    /// The most requests its server ever had at the same time.
    pub(crate) async fn most_in_flight(&self, limit: &Limit) -> anyhow::Result<u64> {
        let model = match limit.scope {
            Scope::Backend(model) | Scope::Model(model) => model,
            Scope::Tenant(_) | Scope::Global => CROWD_MODEL,
        };
        let at = MODELS.iter().position(|m| *m == model).context("a model of the scene")?;
        self.mocks[at].stats().await?["max_in_flight"].as_u64().context("a counter of the mock")
    }

    /// Leases that are still counted when none is held any more, after at most `patience`.
    pub(crate) async fn leaked_leases(&mut self, patience: Duration) -> anyhow::Result<Vec<(Scope, u64)>> {
        const LIVE: &str = "local t = redis.call('TIME'); \
                            return redis.call('ZCOUNT', KEYS[1], t[1] * 1000000 + t[2], '+inf')";
        let deadline = Instant::now() + patience;
        loop {
            let mut leaked = Vec::new();
            for limit in &LIMITS {
                let Some(key) = limit.leases() else { continue };
                let live = self.redis.command(&["EVAL", LIVE, "1", key.as_str()]).await?;
                let live: u64 = live.parse().with_context(|| format!("ZCOUNT answered {live}"))?;
                if live > 0 {
                    leaked.push((limit.scope, live));
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

fn resources(mocks: &[Mock]) -> Resources {
    let mut resources = Resources::default();
    let rates = |scope: Scope| LIMITS.iter().find(|l| l.scope == scope).map(Limit::rates);
    for (model, mock) in MODELS.iter().zip(mocks) {
        let queue = Some(v1::Queue { max_wait: Some(Wire::default()), ..Default::default() });
        resources.put(model, Spec::Pool(v1::PoolSpec { queue, ..Default::default() }));
        resources.put(model, Spec::Backend(backend(model, model, mock.address, SLOTS)));
        let limits = rates(Scope::Model(model));
        resources
            .put(model, Spec::Model(v1::ModelSpec { pool: (*model).into(), limits, ..Default::default() }));
    }
    for caller in CALLERS {
        resources.tenant(caller.tenant, &key(caller.tenant), rates(Scope::Tenant(caller.tenant)));
    }
    let rates = rates(Scope::Global);
    resources.put("everything", Spec::Limit(v1::LimitSpec { selector: None, rates }));
    resources
}
