//! The specs, each with its defaults and bounds beside its fields.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::Name;
use super::check::Check;
use super::demand::{self, Budget, Priority, Queue};
use crate::v1;

/// The longest duration any field takes: a day.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Most models one backend serves, and most names in any list.
const MAX_LIST: usize = 1000;

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// How a pool picks among its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BalancingPolicy {
    /// Smooth weighted round-robin over effective weights.
    #[default]
    WeightedRoundRobin,
    /// In turn, ignoring weights.
    RoundRobin,
    /// By chance, ignoring weights.
    Random,
    /// The less loaded of two by chance.
    LeastRequest,
    /// By the beginning of the prompt.
    PrefixAffinity,
    /// By the backends' priority.
    Priority,
}

/// What prefix affinity goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Affinity {
    /// Bytes of the prompt that make the prefix: 256.
    pub prefix_bytes: u32,
    /// The most requests a backend may have for its prefixes, of the mean: 125 percent.
    pub load_percent: u32,
}

/// When a silent backend is not waited for alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hedging {
    /// Whether another backend is tried as well.
    pub enabled: bool,
    /// How long to wait while nothing is known: 5 s.
    pub initial: Duration,
    /// The shortest wait: 250 ms.
    pub floor: Duration,
}

/// The clocks of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// To open a connection: 10 s.
    pub connect: Duration,
    /// From sending to the first byte of the answer: 30 s.
    pub first_byte: Duration,
    /// Between two chunks: 30 s.
    pub idle: Duration,
    /// The whole request: 60 s.
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect: secs(10), first_byte: secs(30), idle: secs(30), total: secs(60) }
    }
}

/// The clocks a model sets for itself; `None` is the pool's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TimeoutOverrides {
    /// See [`Timeouts::connect`].
    pub connect: Option<Duration>,
    /// See [`Timeouts::first_byte`].
    pub first_byte: Option<Duration>,
    /// See [`Timeouts::idle`].
    pub idle: Option<Duration>,
    /// See [`Timeouts::total`].
    pub total: Option<Duration>,
}

impl TimeoutOverrides {
    fn judge(wire: Option<&v1::Timeouts>, check: &mut Check) -> Self {
        let Some(w) = wire else { return Self::default() };
        Self {
            connect: check.duration_opt("timeouts.connect", w.connect.as_ref(), secs(300)),
            first_byte: check.duration_opt("timeouts.first_byte", w.first_byte.as_ref(), DAY),
            idle: check.duration_opt("timeouts.idle", w.idle.as_ref(), DAY),
            total: check.duration_opt("timeouts.total", w.total.as_ref(), DAY),
        }
    }

    /// These where they are set, else those of `base`.
    pub fn over(&self, base: &Timeouts) -> Timeouts {
        Timeouts {
            connect: self.connect.unwrap_or(base.connect),
            first_byte: self.first_byte.unwrap_or(base.first_byte),
            idle: self.idle.unwrap_or(base.idle),
            total: self.total.unwrap_or(base.total),
        }
    }
}

/// Local, passive ejection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ejection {
    /// Failures in a row that eject: 3.
    pub consecutive_failures: u32,
    /// The first ejection: 5 s, doubled by each further one.
    pub base_duration: Duration,
    /// The longest ejection: 300 s.
    pub max_duration: Duration,
    /// The most of a pool that may be ejected: 50 percent.
    pub max_ejected_percent: u32,
    /// The share of failures within 10 s that ejects: 50 percent.
    pub failure_percent: u32,
    /// Requests below which that share says nothing: 10.
    pub failure_min_requests: u32,
}

/// A bound on retries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryBudget {
    /// Retries per hundred requests: 10.
    pub percent: u32,
    /// Retries always allowed per second: 3.
    pub min_per_second: u32,
    /// Attempts per request, the first included: 3.
    pub max_attempts: u32,
}

/// How backends of a pool are probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HealthProfile {
    /// Between two liveness probes: 5 s.
    pub liveness_interval: Duration,
    /// One probe: 2 s.
    pub timeout: Duration,
    /// Failures in a row that make a backend unhealthy where it is seen from one place only: 3.
    pub unhealthy_threshold: u32,
    /// Successes in a row that make it healthy: 2.
    pub healthy_threshold: u32,
    /// Between two readiness probes: 30 s.
    pub readiness_interval: Duration,
    /// Between two deep probes: 5 min.
    pub deep_interval: Duration,
    /// How long a slow start takes: 60 s.
    pub slow_start: Duration,
    /// How long a backend may say that it is loading: 20 min.
    pub loading_patience: Duration,
    /// Below so much usable weight all active backends are used, percent: 50; 0 is never.
    pub panic_percent: u32,
    /// Requests for tokens that a gateway may spend on probing a backend in an hour: 240.
    pub paid_probes_per_hour: u32,
}

impl Default for HealthProfile {
    fn default() -> Self {
        Self {
            liveness_interval: secs(5),
            timeout: secs(2),
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            readiness_interval: secs(30),
            deep_interval: secs(300),
            slow_start: secs(60),
            loading_patience: secs(1200),
            panic_percent: 50,
            paid_probes_per_hour: 240,
        }
    }
}

impl HealthProfile {
    fn judge(wire: Option<&v1::HealthProfile>, check: &mut Check) -> Self {
        let (h, d) = (wire.copied().unwrap_or_default(), Self::default());
        let mut duration = |name: &str, value: Option<&prost_types::Duration>, default| {
            check.duration(&format!("health.{name}"), value, default, DAY)
        };
        let (liveness_interval, timeout, readiness_interval, deep_interval, slow_start, loading_patience) = (
            duration("liveness_interval", h.liveness_interval.as_ref(), d.liveness_interval),
            duration("timeout", h.timeout.as_ref(), d.timeout),
            duration("readiness_interval", h.readiness_interval.as_ref(), d.readiness_interval),
            duration("deep_interval", h.deep_interval.as_ref(), d.deep_interval),
            duration("slow_start", h.slow_start.as_ref(), d.slow_start),
            duration("loading_patience", h.loading_patience.as_ref(), d.loading_patience),
        );
        let mut range =
            |name: &str, value: u32, low, high| check.range(&format!("health.{name}"), value, low, high);
        Self {
            liveness_interval,
            timeout,
            unhealthy_threshold: range(
                "unhealthy_threshold",
                or(h.unhealthy_threshold, d.unhealthy_threshold),
                1,
                100,
            ),
            healthy_threshold: range(
                "healthy_threshold",
                or(h.healthy_threshold, d.healthy_threshold),
                1,
                100,
            ),
            readiness_interval,
            deep_interval,
            slow_start,
            loading_patience,
            panic_percent: range("panic_percent", h.panic_percent.unwrap_or(d.panic_percent), 0, 100),
            paid_probes_per_hour: range(
                "paid_probes_per_hour",
                h.paid_probes_per_hour.unwrap_or(d.paid_probes_per_hour),
                0,
                100_000,
            ),
        }
    }
}

/// Backends that can stand in for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// How to pick.
    pub balancing_policy: BalancingPolicy,
    /// Regions in order of preference; the rest comes last. Empty: all alike.
    pub regions: Vec<String>,
    /// The clocks of a request.
    pub timeouts: Timeouts,
    /// When a gateway stops using a backend on its own evidence.
    pub ejection: Ejection,
    /// How much may be tried again.
    pub retry_budget: RetryBudget,
    /// How backends are probed.
    pub health: HealthProfile,
    /// For prefix affinity.
    pub affinity: Affinity,
    /// When a silent backend is not waited for alone.
    pub hedging: Hedging,
    /// Where requests wait for a slot.
    pub queue: Queue,
}

fn or(value: u32, default: u32) -> u32 {
    if value == 0 { default } else { value }
}

impl Pool {
    pub(super) fn judge(w: &v1::PoolSpec, check: &mut Check) -> Self {
        let balancing_policy = match v1::BalancingPolicy::try_from(w.balancing_policy) {
            Ok(v1::BalancingPolicy::Unspecified | v1::BalancingPolicy::WeightedRoundRobin) => {
                BalancingPolicy::WeightedRoundRobin
            }
            Ok(v1::BalancingPolicy::RoundRobin) => BalancingPolicy::RoundRobin,
            Ok(v1::BalancingPolicy::Random) => BalancingPolicy::Random,
            Ok(v1::BalancingPolicy::LeastRequest) => BalancingPolicy::LeastRequest,
            Ok(v1::BalancingPolicy::PrefixAffinity) => BalancingPolicy::PrefixAffinity,
            Ok(v1::BalancingPolicy::Priority) => BalancingPolicy::Priority,
            Err(_) => {
                check.violation("balancing_policy", "is not a policy this version knows");
                BalancingPolicy::default()
            }
        };
        if w.regions.len() > MAX_LIST {
            check.violation("regions", "must be at most 1000");
        }
        for (i, region) in w.regions.iter().enumerate() {
            check.text(&format!("regions[{i}]"), region, Name::MAX_BYTES);
        }
        let e = w.ejection.unwrap_or_default();
        let r = w.retry_budget.unwrap_or_default();
        let a = w.affinity.unwrap_or_default();
        let hedging = w.hedging.unwrap_or_default();
        Self {
            queue: Queue::judge(w.queue.as_ref(), check),
            balancing_policy,
            regions: w.regions.clone(),
            timeouts: TimeoutOverrides::judge(w.timeouts.as_ref(), check).over(&Timeouts::default()),
            ejection: Ejection {
                consecutive_failures: check.range(
                    "ejection.consecutive_failures",
                    or(e.consecutive_failures, 3),
                    1,
                    1000,
                ),
                base_duration: check.duration(
                    "ejection.base_duration",
                    e.base_duration.as_ref(),
                    secs(5),
                    DAY,
                ),
                max_duration: check.duration(
                    "ejection.max_duration",
                    e.max_duration.as_ref(),
                    secs(300),
                    DAY,
                ),
                max_ejected_percent: check.range(
                    "ejection.max_ejected_percent",
                    or(e.max_ejected_percent, 50),
                    1,
                    100,
                ),
                failure_percent: check.range("ejection.failure_percent", or(e.failure_percent, 50), 1, 100),
                failure_min_requests: check.range(
                    "ejection.failure_min_requests",
                    or(e.failure_min_requests, 10),
                    1,
                    100_000,
                ),
            },
            retry_budget: RetryBudget {
                percent: check.range("retry_budget.percent", or(r.percent, 10), 1, 100),
                min_per_second: check.range(
                    "retry_budget.min_per_second",
                    or(r.min_per_second, 3),
                    1,
                    10_000,
                ),
                max_attempts: check.range("retry_budget.max_attempts", or(r.max_attempts, 3), 1, 10),
            },
            health: HealthProfile::judge(w.health.as_ref(), check),
            affinity: Affinity {
                prefix_bytes: check.range("affinity.prefix_bytes", or(a.prefix_bytes, 256), 1, 65_536),
                load_percent: check.range("affinity.load_percent", or(a.load_percent, 125), 100, 1000),
            },
            hedging: Hedging {
                enabled: !hedging.disabled,
                initial: check.duration("hedging.initial", hedging.initial.as_ref(), secs(5), DAY),
                floor: check.duration(
                    "hedging.floor",
                    hedging.floor.as_ref(),
                    Duration::from_millis(250),
                    DAY,
                ),
            },
        }
    }
}

/// What the operator wants of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdminState {
    /// In use.
    #[default]
    Active,
    /// No new requests.
    Draining,
    /// Not used, not probed.
    Disabled,
}

/// Where a secret is found; the secret itself is never in a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialRef {
    /// An environment variable of the gateway.
    Env(String),
    /// A file on the gateway's machine.
    File(String),
}

/// One upstream server or account.
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    /// The pool it belongs to.
    pub pool: Name,
    /// Scheme, authority and path prefix without a trailing slash.
    pub url: http::Uri,
    /// Where it is; empty when not said.
    pub region: String,
    /// Its share: 100.
    pub weight: u32,
    /// The most requests the cluster may have in flight there: 50.
    pub max_concurrency: u32,
    /// The models it serves -> the name it knows each by (empty: the client's name).
    pub models: BTreeMap<Name, String>,
    /// Where its credential is found.
    pub credential: Option<CredentialRef>,
    /// What the operator wants of it.
    pub admin_state: AdminState,
    /// Idle connections each gateway keeps: 32.
    pub max_idle: u32,
    /// How long an idle connection is kept: 60 s.
    pub idle_timeout: Duration,
    /// The path that answers when the server lives: "/health".
    pub health_path: String,
    /// For the priority policy; the lowest comes first.
    pub priority: u32,
}

impl Backend {
    pub(super) fn judge(w: &v1::BackendSpec, check: &mut Check) -> Option<Self> {
        let pool = check.name("pool", &w.pool);
        let url = judge_url(&w.url, check);
        check.text("region", &w.region, Name::MAX_BYTES);
        let mut models = BTreeMap::new();
        if w.models.len() > MAX_LIST {
            check.violation("models", "must be at most 1000");
        } else if w.models.is_empty() {
            check.violation("models", "must name at least one model");
        }
        for (model, upstream) in &w.models {
            check.text(&format!("models[{model}]"), upstream, 256);
            if let Some(name) = check.name("models", model) {
                models.insert(name, upstream.clone());
            }
        }
        let admin_state = match v1::AdminState::try_from(w.admin_state) {
            Ok(v1::AdminState::Unspecified | v1::AdminState::Active) => AdminState::Active,
            Ok(v1::AdminState::Draining) => AdminState::Draining,
            Ok(v1::AdminState::Disabled) => AdminState::Disabled,
            Err(_) => {
                check.violation("admin_state", "is not a state this version knows");
                AdminState::default()
            }
        };
        let c = w.connection.clone().unwrap_or_default();
        let health_path = if c.health_path.is_empty() { "/health".to_owned() } else { c.health_path };
        if !health_path.starts_with('/') || http::uri::PathAndQuery::try_from(health_path.as_str()).is_err() {
            check.violation("connection.health_path", "must be a path that starts with '/'");
        }
        let backend = Self {
            pool: pool?,
            url: url?,
            region: w.region.clone(),
            weight: check.range("weight", w.weight.unwrap_or(100), 0, 10_000),
            max_concurrency: check.range("max_concurrency", w.max_concurrency.unwrap_or(50), 1, 100_000),
            models,
            credential: judge_credential(&w.credential, check),
            admin_state,
            max_idle: check.range("connection.max_idle", or(c.max_idle, 32), 1, 10_000),
            idle_timeout: check.duration("connection.idle_timeout", c.idle_timeout.as_ref(), secs(60), DAY),
            health_path,
            priority: check.range("priority", w.priority, 0, 100),
        };
        Some(backend)
    }
}

fn judge_url(text: &str, check: &mut Check) -> Option<http::Uri> {
    let mut bad = |m: &str| {
        check.violation("url", m);
        None
    };
    let Ok(uri) = text.trim_end_matches('/').parse::<http::Uri>() else {
        return bad("is not a URL, such as http://host:8000");
    };
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(authority)) if authority.as_str().contains('@') => {
            bad("must not hold credentials; use the field credential")
        }
        (Some("http" | "https"), Some(_)) if uri.query().is_some() => bad("must not have a query"),
        (Some("http" | "https"), Some(_)) => Some(uri),
        _ => bad("must start with http:// or https:// and name a host"),
    }
}

fn judge_credential(text: &str, check: &mut Check) -> Option<CredentialRef> {
    match text.split_once(':') {
        None if text.is_empty() => None,
        Some(("env", name))
            if !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') =>
        {
            Some(CredentialRef::Env(name.to_owned()))
        }
        Some(("file", path)) if path.starts_with('/') => Some(CredentialRef::File(path.to_owned())),
        _ => {
            // The text may be a secret put there by mistake, so it is not repeated.
            check.violation("credential", "must be env:NAME or file:/absolute/path, never the secret itself");
            None
        }
    }
}

/// A name clients may ask for.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The pool that serves it.
    pub pool: Name,
    /// The name in requests and answers.
    pub client_name: String,
    /// Models to try when none of this one's backends is usable.
    pub fallbacks: Vec<Name>,
    /// Micro-dollars per million prompt tokens.
    pub input_price_micro_dollars: u64,
    /// Micro-dollars per million completion tokens.
    pub output_price_micro_dollars: u64,
    /// Overrides of the pool's clocks.
    pub timeouts: TimeoutOverrides,
    /// The timeout of a probe; `None` is the pool's.
    pub health_timeout: Option<Duration>,
    /// Limits for everybody together.
    pub limits: Option<Rates>,
}

impl Model {
    /// Longest client-facing name, bytes.
    pub const CLIENT_NAME_MAX_BYTES: usize = 256;

    pub(super) fn judge(w: &v1::ModelSpec, resource_name: &str, check: &mut Check) -> Option<Self> {
        let pool = check.name("pool", &w.pool);
        check.text("client_name", &w.client_name, Self::CLIENT_NAME_MAX_BYTES);
        if w.fallbacks.len() > 8 {
            check.violation("fallbacks", "must be at most 8");
        }
        let fallbacks = check.names("fallbacks", &w.fallbacks);
        if fallbacks.iter().any(|f| f.as_str() == resource_name) {
            check.violation("fallbacks", "must not name the model itself");
        }
        let model = Self {
            pool: pool?,
            client_name: if w.client_name.is_empty() {
                resource_name.to_owned()
            } else {
                w.client_name.clone()
            },
            fallbacks,
            input_price_micro_dollars: check.range(
                "input_price_micro_dollars",
                w.input_price_micro_dollars,
                0,
                1 << 40,
            ),
            output_price_micro_dollars: check.range(
                "output_price_micro_dollars",
                w.output_price_micro_dollars,
                0,
                1 << 40,
            ),
            timeouts: TimeoutOverrides::judge(w.timeouts.as_ref(), check),
            health_timeout: check.duration_opt("health_timeout", w.health_timeout.as_ref(), secs(600)),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
        };
        Some(model)
    }
}

/// Who is asking.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    /// A name for people.
    pub display_name: String,
    /// The models it may use; empty is all.
    pub allowed_models: Vec<Name>,
    /// Limits over all its keys and models.
    pub limits: Option<Rates>,
    /// Who goes first when several wait.
    pub priority: Priority,
}

impl Tenant {
    pub(super) fn judge(w: &v1::TenantSpec, check: &mut Check) -> Self {
        check.text("display_name", &w.display_name, 256);
        Self {
            display_name: w.display_name.clone(),
            allowed_models: check.names("allowed_models", &w.allowed_models),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
            priority: Priority::judge(w.priority, check),
        }
    }
}

/// A digest of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyDigest {
    /// SHA-256 of the key.
    pub sha256: [u8; 32],
    /// The first characters, for people.
    pub prefix: String,
    /// Refused from then on.
    pub expires: Option<SystemTime>,
}

/// A tenant's credential.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiKey {
    /// Whose it is.
    pub tenant: Name,
    /// The keys it accepts.
    pub digests: Vec<KeyDigest>,
    /// Refused from now on.
    pub revoked: bool,
    /// The models it may use; empty is all the tenant may.
    pub allowed_models: Vec<Name>,
    /// Limits of this key.
    pub limits: Option<Rates>,
}

impl ApiKey {
    /// Most digests at once: the present key and the one it replaces.
    pub const MAX_DIGESTS: usize = 2;

    pub(super) fn judge(w: &v1::ApiKeySpec, check: &mut Check) -> Option<Self> {
        let tenant = check.name("tenant", &w.tenant);
        if w.digests.len() > Self::MAX_DIGESTS {
            check.violation("digests", "must be at most 2: the present key and the one it replaces");
        }
        let mut digests = Vec::new();
        for (i, d) in w.digests.iter().enumerate() {
            check.text(&format!("digests[{i}].prefix"), &d.prefix, 16);
            let expires = d.expire_time.as_ref().and_then(|t| match SystemTime::try_from(*t) {
                Ok(t) => Some(t),
                Err(_) => {
                    check.violation(&format!("digests[{i}].expire_time"), "is out of range");
                    None
                }
            });
            match <[u8; 32]>::try_from(d.sha256.as_slice()) {
                Ok(sha256) => digests.push(KeyDigest { sha256, prefix: d.prefix.clone(), expires }),
                Err(_) => {
                    check.violation(&format!("digests[{i}].sha256"), "must be the 32 bytes of a SHA-256")
                }
            }
        }
        let key = Self {
            tenant: tenant?,
            digests,
            revoked: w.revoked,
            allowed_models: check.names("allowed_models", &w.allowed_models),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
        };
        Some(key)
    }
}

/// A limit over everything or a product of scopes.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// Requests of this tenant.
    pub tenant: Option<Name>,
    /// Requests for this model.
    pub model: Option<Name>,
    /// Requests with this API key.
    pub api_key: Option<Name>,
    /// How much.
    pub rates: Rates,
}

impl Limit {
    pub(super) fn judge(w: &v1::LimitSpec, check: &mut Check) -> Self {
        let selector = w.selector.clone().unwrap_or_default();
        let mut name = |path: &str, text: &str| {
            if text.is_empty() { None } else { check.name(path, text) }
        };
        let (tenant, model, api_key) = (
            name("selector.tenant", &selector.tenant),
            name("selector.model", &selector.model),
            name("selector.api_key", &selector.api_key),
        );
        let rates = Rates::judge("rates", w.rates.as_ref(), check);
        if rates.is_none() {
            check.violation("rates", "must be set");
        }
        Self { tenant, model, api_key, rates: rates.unwrap_or_default() }
    }
}

/// What happens to a limit when its store cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WithoutStore {
    /// Each gateway enforces its share.
    #[default]
    LocalShare,
    /// Requests pass.
    Open,
    /// Requests are refused with 503.
    Closed,
}

/// Rates and concurrency of one scope; `None` is not limited.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    /// Requests per minute.
    pub requests_per_minute: Option<u64>,
    /// Prompt and completion tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Prompt tokens per minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Completion tokens per minute.
    pub output_tokens_per_minute: Option<u64>,
    /// Requests in flight.
    pub concurrency: Option<u32>,
    /// Minutes' worth that may be used at once: 5.
    pub burst_multiplier: f64,
    /// How long a request may wait, zero for not at all; `None` is the default of what is limited.
    pub max_wait: Option<Duration>,
    /// What happens without the limit store.
    pub without_store: WithoutStore,
    /// Count only.
    pub shadow: bool,
    /// Money per period.
    pub budget: Option<Budget>,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            requests_per_minute: None,
            tokens_per_minute: None,
            input_tokens_per_minute: None,
            output_tokens_per_minute: None,
            concurrency: None,
            burst_multiplier: Self::BURST_MULTIPLIER,
            max_wait: None,
            without_store: WithoutStore::default(),
            shadow: false,
            budget: None,
        }
    }
}

impl Rates {
    /// The default of [`Rates::burst_multiplier`].
    pub const BURST_MULTIPLIER: f64 = 5.0;
    /// The largest rate and capacity, units: what a script's double holds exactly in micro-units (2^53).
    pub const MAX_UNITS: u64 = 9_000_000_000;

    /// Checks rates that are no part of a resource. Violations start with `path`.
    pub fn checked(path: &str, wire: &v1::Rates) -> Result<Self, super::Violations> {
        let mut check = Check::new("");
        let rates = Self::judge(path, Some(wire), &mut check);
        check.finish()?;
        Ok(rates.unwrap_or_default())
    }

    fn judge(path: &str, wire: Option<&v1::Rates>, check: &mut Check) -> Option<Self> {
        let w = wire?;
        let burst = w.burst_multiplier.unwrap_or(Self::BURST_MULTIPLIER);
        let burst = check.range(&format!("{path}.burst_multiplier"), burst, 1.0, 1000.0);
        let mut rate = |field: &str, value: Option<u64>| {
            let value = value?;
            let path = format!("{path}.{field}");
            if check.range(&path, value, 0, Self::MAX_UNITS) as f64 * burst > Self::MAX_UNITS as f64 {
                check.violation(&path, format!("times burst_multiplier must be at most {}", Self::MAX_UNITS));
            }
            Some(value)
        };
        let (rpm, tpm, itpm, otpm) = (
            rate("requests_per_minute", w.requests_per_minute),
            rate("tokens_per_minute", w.tokens_per_minute),
            rate("input_tokens_per_minute", w.input_tokens_per_minute),
            rate("output_tokens_per_minute", w.output_tokens_per_minute),
        );
        let without_store = match v1::WithoutStore::try_from(w.without_store) {
            Ok(v1::WithoutStore::Unspecified | v1::WithoutStore::LocalShare) => WithoutStore::LocalShare,
            Ok(v1::WithoutStore::Open) => WithoutStore::Open,
            Ok(v1::WithoutStore::Closed) => WithoutStore::Closed,
            Err(_) => {
                check.violation(&format!("{path}.without_store"), "is not a policy this version knows");
                WithoutStore::default()
            }
        };
        Some(Self {
            requests_per_minute: rpm,
            tokens_per_minute: tpm,
            input_tokens_per_minute: itpm,
            output_tokens_per_minute: otpm,
            concurrency: w.concurrency,
            burst_multiplier: burst,
            max_wait: demand::wait(&format!("{path}.max_wait"), w.max_wait.as_ref(), check),
            budget: Budget::judge(&format!("{path}.budget"), w.budget.as_ref(), check),
            without_store,
            shadow: w.shadow,
        })
    }
}
