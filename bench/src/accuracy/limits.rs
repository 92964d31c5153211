//! The limits of `accuracy`, who asks under them, and the resources that say so to the gateways.

use std::fmt;
use std::net::SocketAddr;

use prost_types::Duration as Wire;
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::{Bucket, Key, Kind, Mode, ScopeLimits, WithoutStore, scope_keys};

use super::driver::{Caller, End, Record, key};
use super::oracle::Envelope;
use crate::resources::{Resources, backend};

/// Gateways of a scene.
pub(crate) const GATEWAYS: usize = 4;
/// Tenant `c` alone uses `m3`, so that the server's count of requests at the same time is its own.
pub(crate) const MODELS: [&str; 3] = ["m1", "m2", CROWD_MODEL];
pub(crate) const CROWD_MODEL: &str = "m3";
/// A model whose answers take no time, for a tenant that is under limits and never reaches them.
pub(crate) const FREE: &str = "free";
/// Slots of every backend: fewer than the first burst wants.
pub(crate) const SLOTS: u32 = 8;
/// More than any load of a bench.
const PLENTY: u64 = 1_000_000;

/// Who is under limits.
const TENANTS: [&str; 3] = ["a", "b", "c"];

/// Who asks.
pub(crate) const CALLERS: [Caller; 3] = [
    Caller { tenant: "a", percent: 36, tokens: (10, 40), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "b", percent: 34, tokens: (10, 60), streams: 30, models: &["m1", "m2"] },
    Caller { tenant: "c", percent: 30, tokens: (300, 600), streams: 100, models: &[CROWD_MODEL] },
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

impl Scope {
    fn is_model(self, name: &str) -> bool {
        matches!(self, Self::Model(model) if model == name)
    }
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
    pub(crate) counted: Counted,
    /// Per minute, and the capacity too; at once for what is in flight.
    pub(crate) most: u64,
}

pub(crate) const fn limit(scope: Scope, counted: Counted, most: u64) -> Limit {
    Limit { scope, counted, most }
}

/// Each is far exceeded by its own load, and that of everything by what the others let through.
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

    /// Where it is kept: its record and its leases.
    pub(crate) fn keys(&self) -> (Key, Key) {
        match self.scope {
            Scope::Global => scope_keys(weir_ratelimit::Scope::Global),
            Scope::Tenant(name) => scope_keys(weir_ratelimit::Scope::Tenant(name)),
            Scope::Model(name) => scope_keys(weir_ratelimit::Scope::Model(name)),
            // Slots have no record; a look at them wants one that lives where they do.
            Scope::Backend(name) => {
                let slots = Key::backend_slots(name);
                (Key::budget(&slots, "none"), slots)
            }
        }
    }

    /// What to look at to see how many leases it has: as if a million were allowed.
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

/// More leases than any run has.
pub(crate) const LEASES_MAX: u32 = 1_000_000;

/// Every place one of these limits is kept in.
pub(crate) fn places(limits: &[Limit]) -> Vec<Key> {
    limits
        .iter()
        .map(|limit| {
            let (record, leases) = limit.keys();
            if limit.envelope().is_some() { record } else { leases }
        })
        .collect()
}

/// The scene as a configuration: a model, a pool and a backend for each of these servers, which are called after the
/// model and have so many slots, and the tenants.
pub(crate) fn resources(mocks: &[(&str, SocketAddr)], limits: &[Limit], slots: u32) -> Resources {
    let mut resources = Resources::default();
    let rates = |scope: Scope| limits.iter().find(|l| l.scope == scope).map(Limit::rates);
    for (model, address) in mocks {
        let queue = Some(v1::Queue { max_wait: Some(Wire::default()), ..Default::default() });
        // Probes ask for tokens too, and would be counted with the requests of tenants.
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
        resources.put("everything", Spec::Limit(v1::LimitSpec { selector: None, rates: Some(rates) }));
    }
    resources
}
