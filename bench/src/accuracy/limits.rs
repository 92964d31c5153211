//! The limits of `accuracy`, its tenants, and the resources with which gateways are configured.

use std::fmt;
use std::net::SocketAddr;

use prost_types::Duration as Wire;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::{Bucket, Key, Kind, Mode, ScopeLimits, WithoutStore, limit_keys, scope_keys};

use super::driver::{Caller, End, Record, key};
use super::oracle::Envelope;
use crate::resources::{Resources, backend};

/// Gateways of a scene.
pub(crate) const GATEWAYS: usize = 4;
/// Only tenant `c` uses `m3`, so that the server's count of concurrent requests is that of the tenant.
pub(crate) const MODELS: [&str; 3] = ["m1", "m2", CROWD_MODEL];
pub(crate) const CROWD_MODEL: &str = "m3";
/// A model whose answers take no time, for a tenant that never reaches its limits.
pub(crate) const FREE: &str = "free";
/// The slots of every backend: fewer than the first burst needs.
pub(crate) const SLOTS: u32 = 8;
/// Above the load of any bench.
/// The name of the limit of everything.
const EVERYTHING: &str = "everything";
const PLENTY: u64 = 1_000_000;

/// The scope of a limit.
const TENANTS: [&str; 3] = ["a", "b", "c"];

/// The tenants.
pub(crate) const CALLERS: [Caller; 3] = [
    Caller { tenant: "a", percent: 36, tokens: (10, 40), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "b", percent: 34, tokens: (10, 60), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "c", percent: 30, tokens: (300, 600), streams: 100, models: &[CROWD_MODEL] },
];

/// The limited quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    Global,
    Tenant(&'static str),
    Model(&'static str),
    /// The slots of a backend, which has the name of its model.
    Backend(&'static str),
}

impl Scope {
    fn is_model(self, name: &str) -> bool {
        matches!(self, Self::Model(model) if model == name)
    }
}

/// The kind of its units.
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
    pub(crate) counted: Counted,
    /// The rate per minute, which is also the capacity; the maximum for requests in flight.
    pub(crate) most: u64,
}

pub(crate) const fn limit(scope: Scope, counted: Counted, most: u64) -> Limit {
    Limit { scope, counted, most }
}

/// The load far exceeds each limit, and the admitted requests of others exceed the global one.
pub(crate) const LIMITS: [Limit; 7] = [
    limit(Scope::Tenant("a"), Counted::Requests, 120),
    limit(Scope::Tenant("b"), Counted::Tokens, 6000),
    limit(Scope::Model("m2"), Counted::Requests, 90),
    limit(Scope::Global, Counted::Requests, 250),
    limit(Scope::Tenant("c"), Counted::InFlight, 6),
    limit(Scope::Backend("m1"), Counted::InFlight, SLOTS as u64),
    limit(Scope::Backend("m2"), Counted::InFlight, SLOTS as u64),
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
    /// Capacity and rate; `None` for requests in flight.
    pub(crate) fn envelope(&self) -> Option<Envelope> {
        let envelope = Envelope { capacity: self.most, per_minute: self.most };
        (self.counted != Counted::InFlight).then_some(envelope)
    }

    pub(crate) fn counts_tokens(&self) -> bool {
        self.counted == Counted::Tokens
    }

    /// Whether a request is under the limit.
    pub(crate) fn covers(&self, record: &Record) -> bool {
        match self.scope {
            Scope::Global => true,
            Scope::Tenant(name) => record.tenant == name,
            Scope::Model(name) | Scope::Backend(name) => record.model == name,
        }
    }

    /// The cost of a request under the limit.
    pub(crate) fn cost(&self, record: &Record) -> u64 {
        match self.counted {
            Counted::Requests | Counted::InFlight => 1,
            Counted::Tokens => record.prompt_tokens + record.tokens,
        }
    }

    /// Whether a request was refused by this limit.
    pub(crate) fn refused(&self, record: &Record) -> bool {
        if let Scope::Backend(model) = self.scope {
            return record.end == End::NoSlot && record.model == model;
        }
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

    /// The keys of the limit: its record and its leases.
    pub(crate) fn keys(&self) -> (Key, Key) {
        match self.scope {
            Scope::Global => limit_keys(weir_ratelimit::Scope::Global, EVERYTHING),
            Scope::Tenant(name) => scope_keys(weir_ratelimit::Scope::Tenant(name)),
            Scope::Model(name) => scope_keys(weir_ratelimit::Scope::Model(name)),
            // Slots have no record; reading them needs a record with the same hash slot.
            Scope::Backend(name) => {
                let slots = Key::backend_slots(name);
                (Key::budget(&slots, "none"), slots)
            }
        }
    }

    /// The scope to read for the number of its leases, with a limit of a million.
    pub(crate) fn leases(&self) -> Option<ScopeLimits> {
        let (record, leases) = self.keys();
        (self.counted == Counted::InFlight).then_some(ScopeLimits {
            record,
            leases,
            buckets: [None::<Bucket>; Kind::COUNT],
            concurrency: Some(LEASES_MAX),
            mode: Mode::Enforce,
            without_store: WithoutStore::LocalShare,
            prefetch: Default::default(),
        })
    }

    fn rates(&self) -> v1::Rates {
        let most = Some(self.most);
        // Refused at once: waiting requests are decided later, and the oracle knows less about the time.
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

/// Above the leases of any run.
pub(crate) const LEASES_MAX: u32 = 1_000_000;

/// Every key of these limits.
pub(crate) fn places(limits: &[Limit]) -> Vec<Key> {
    limits
        .iter()
        .map(|limit| {
            let (record, leases) = limit.keys();
            if limit.envelope().is_some() { record } else { leases }
        })
        .collect()
}

/// The configuration: for each server a model, a pool and a backend with the model's name and this number of slots,
/// and the tenants.
pub(crate) fn resources(mocks: &[(&str, SocketAddr)], limits: &[Limit], slots: u32) -> Resources {
    let mut resources = Resources::default();
    let rates = |scope: Scope| limits.iter().find(|l| l.scope == scope).map(Limit::rates);
    for (model, address) in mocks {
        let queue = Some(v1::Queue { max_wait: Some(Wire::default()), ..Default::default() });
        // No probes for tokens, which would be counted with the tenants' requests.
        let health = Some(v1::HealthProfile { paid_probes_per_hour: Some(0), ..Default::default() });
        resources.put(model, Spec::Pool(v1::PoolSpec { queue, health, ..Default::default() }));
        resources.put(model, Spec::Backend(backend(model, model, *address, slots)));
        let limits = limits.iter().find(|l| l.scope.is_model(model)).map(Limit::rates);
        resources
            .put(model, Spec::Model(v1::ModelSpec { pool: (*model).into(), limits, ..Default::default() }));
    }
    for tenant in TENANTS {
        resources.tenant(tenant, &key(tenant), rates(Scope::Tenant(tenant)));
    }
    let never_reached = v1::Rates {
        requests_per_minute: Some(PLENTY),
        tokens_per_minute: Some(PLENTY),
        concurrency: Some(PLENTY as u32),
        ..Default::default()
    };
    resources.tenant(FREE, &key(FREE), Some(never_reached));
    if let Some(rates) = rates(Scope::Global) {
        resources.put(EVERYTHING, Spec::Limit(v1::LimitSpec { selector: None, rates: Some(rates) }));
    }
    resources
}
