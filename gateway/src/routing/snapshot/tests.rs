//! What is declared and what is enforced.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use weir_proto::resource::Limit;
use weir_proto::v1::{self, resource::Spec as Wire};
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::{Acquire, Cost, Decision, Limiter, Outcome, ReservationId};

mod oracle;

use super::*;

const TENANTS: [&str; 2] = ["acme", "beta"];
const MODELS: [&str; 2] = ["large", "small"];
/// Two keys of the first tenant and one of the second.
const KEYS: [(&str, &str); 3] = [("acme-a", "acme"), ("acme-b", "acme"), ("beta-a", "beta")];

/// A limit of requests that is never refilled while the clock stands.
#[derive(Debug, Clone, Copy)]
struct Rate {
    most: u64,
    shadow: bool,
}

impl Rate {
    fn wire(self) -> v1::Rates {
        v1::Rates {
            requests_per_minute: Some(self.most),
            burst_multiplier: Some(1.0),
            shadow: self.shadow,
            ..Default::default()
        }
    }
}

/// What a limit is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Over {
    Everything,
    Tenant(usize),
    Model(usize),
    Key(usize),
    TenantModel(usize, usize),
}

impl Over {
    fn covers(self, key: usize, model: usize) -> bool {
        let tenant = KEYS[key].1;
        match self {
            Self::Everything => true,
            Self::Tenant(t) => TENANTS[t] == tenant,
            Self::Model(m) => m == model,
            Self::Key(k) => k == key,
            Self::TenantModel(t, m) => TENANTS[t] == tenant && m == model,
        }
    }

    fn selector(self) -> v1::LimitSelector {
        let mut selector = v1::LimitSelector::default();
        match self {
            Self::Everything => {}
            Self::Tenant(t) => selector.tenant = TENANTS[t].into(),
            Self::Model(m) => selector.model = MODELS[m].into(),
            Self::Key(k) => selector.api_key = KEYS[k].0.into(),
            Self::TenantModel(t, m) => {
                (selector.tenant, selector.model) = (TENANTS[t].into(), MODELS[m].into());
            }
        }
        selector
    }
}

#[derive(Debug, Clone)]
struct Declaration {
    limits: Vec<(Over, Rate)>,
    /// Limits that are part of the tenants, models and keys.
    own: BTreeMap<Over, Rate>,
}

fn over() -> impl Strategy<Value = Over> {
    prop_oneof![
        Just(Over::Everything),
        (0..TENANTS.len()).prop_map(Over::Tenant),
        (0..MODELS.len()).prop_map(Over::Model),
        (0..KEYS.len()).prop_map(Over::Key),
        (0..TENANTS.len(), 0..MODELS.len()).prop_map(|(t, m)| Over::TenantModel(t, m)),
    ]
}

fn declaration() -> impl Strategy<Value = Declaration> {
    let rate = || (0..30_u64, any::<bool>()).prop_map(|(most, shadow)| Rate { most, shadow });
    let own = over()
        .prop_filter("is a resource", |over| matches!(over, Over::Tenant(_) | Over::Model(_) | Over::Key(_)));
    let limits = prop::collection::vec((over(), rate()), 0..12);
    (limits, prop::collection::btree_map(own, rate(), 0..4))
        .prop_map(|(limits, own)| Declaration { limits, own })
}

fn resource(name: &str, spec: Wire) -> Resource {
    let wire = v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
    Resource::try_from(&wire).expect("valid")
}

impl Declaration {
    fn resources(&self) -> Vec<Resource> {
        let own = |over| self.own.get(&over).map(|rate| rate.wire());
        let mut resources = vec![resource("pool", Wire::Pool(v1::PoolSpec::default()))];
        for (t, name) in TENANTS.iter().enumerate() {
            let spec = v1::TenantSpec { limits: own(Over::Tenant(t)), ..Default::default() };
            resources.push(resource(name, Wire::Tenant(spec)));
        }
        for (m, name) in MODELS.iter().enumerate() {
            let spec =
                v1::ModelSpec { pool: "pool".into(), limits: own(Over::Model(m)), ..Default::default() };
            resources.push(resource(name, Wire::Model(spec)));
        }
        for (k, (name, tenant)) in KEYS.iter().enumerate() {
            let digest = v1::KeyDigest { sha256: vec![k as u8; 32], ..Default::default() };
            let spec = v1::ApiKeySpec {
                tenant: (*tenant).into(),
                digests: vec![digest],
                limits: own(Over::Key(k)),
                ..Default::default()
            };
            resources.push(resource(name, Wire::ApiKey(spec)));
        }
        for (n, (over, rate)) in self.limits.iter().enumerate() {
            let spec = v1::LimitSpec { selector: Some(over.selector()), rates: Some(rate.wire()) };
            resources.push(resource(&format!("l{n:02}"), Wire::Limit(spec)));
        }
        resources
    }

    /// The limits that are in force: of each selector the first ones by name.
    fn in_force(&self) -> Vec<(Over, Rate)> {
        let mut kept: Vec<(Over, Rate)> = Vec::new();
        for limit in &self.limits {
            if kept.iter().filter(|(over, _)| *over == limit.0).count() < Limit::PER_SELECTOR_MAX {
                kept.push(*limit);
            }
        }
        kept.extend(self.own.iter().map(|(over, rate)| (*over, *rate)));
        kept
    }
}

fn granted(decision: &Decision) -> bool {
    matches!(decision.outcome, Outcome::Granted { .. })
}

proptest! {
    #[test]
    fn every_declared_limit_holds_by_itself_and_nothing_else_does(
        declaration in declaration(),
        asked in prop::collection::vec((0..KEYS.len(), 0..MODELS.len()), 0..120)
    ) {
        let resources = declaration.resources();
        let (snapshot, refused) =
            Snapshot::compile("e", 1, &resources, &Snapshot::default(), &|_| Ok(None));
        let in_force = declaration.in_force();
        prop_assert_eq!(refused.len(), declaration.limits.len() + declaration.own.len() - in_force.len());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let limiter = MemoryLimiter::new();
            let mut used = vec![0_u64; in_force.len()];
            for (key, model) in asked {
                let covers: Vec<usize> =
                    (0..in_force.len()).filter(|at| in_force[*at].0.covers(key, model)).collect();
                let allowed =
                    covers.iter().all(|at| in_force[*at].1.shadow || used[*at] < in_force[*at].1.most);
                let entry = snapshot.keys.get(&[key as u8; 32]).expect("a key");
                let scopes = snapshot.scopes(entry, &Name::parse(MODELS[model]).expect("a name"));
                prop_assert_eq!(scopes.len(), covers.len());
                let mut names: Vec<_> = scopes.iter().map(|scope| (scope.kind, &scope.name)).collect();
                names.sort_unstable();
                names.dedup();
                prop_assert_eq!(names.len(), covers.len(), "each has a name of its own");
                let call = Acquire {
                    id: ReservationId::now_v7(),
                    cost: Cost::of_request(1, 1, 0),
                    estimated: false,
                    scopes: scopes.iter().map(|scope| scope.limits.clone()).collect(),
                    candidates: Vec::new(),
                    lease_ttl: Duration::from_secs(15),
                };
                let decided = limiter.acquire(&call).await.expect("decided");
                prop_assert_eq!(granted(&decided), allowed, "{:?}", &decided);
                if allowed {
                    covers.iter().for_each(|at| used[*at] += 1);
                }
            }
            Ok(())
        })?;
    }
}

/// Backends in a pool, the credential of the first one.
fn served(credential: &str, backends: &[&str]) -> Vec<Resource> {
    let mut resources = vec![resource("pool", Wire::Pool(v1::PoolSpec::default()))];
    for name in backends {
        let spec = v1::BackendSpec {
            pool: "pool".into(),
            url: "http://127.0.0.1:1".into(),
            models: [("large".to_owned(), String::new())].into(),
            credential: if *name == "a" { credential.to_owned() } else { String::new() },
            ..Default::default()
        };
        resources.push(resource(name, Wire::Backend(spec)));
    }
    resources
}

/// A compiled configuration that is not put in force, and what it left of the local ejection of `a`.
#[test]
fn a_configuration_that_is_only_tried_changes_nothing_and_one_that_mends_a_backend_forgets_its_failures() {
    let authorize = |spec: &weir_proto::resource::Backend| match &spec.credential {
        Some(weir_proto::resource::CredentialRef::Env(name)) if name == "MISSING" => {
            Err("not set".to_owned())
        }
        Some(_) => Ok(Some(http::HeaderValue::from_static("Bearer other"))),
        None => Ok(None),
    };
    let compile =
        |resources: &[Resource], before: &Snapshot| Snapshot::compile("e", 1, resources, before, &authorize);
    let (live, refused) = compile(&served("", &["a", "b", "c"]), &Snapshot::default());
    assert_eq!(refused, []);
    live.take_effect(&Snapshot::default());
    let (pool, a) = (live.pools["pool"].state.clone(), live.backends["a"].name.clone());
    (0..3).for_each(|_| pool.probe_failed(&a));
    assert!(pool.is_ejected(&a));
    let (_, refused) = compile(&served("env:MISSING", &["a", "b", "c"]), &live);
    assert_eq!(refused.len(), 1);
    compile(&served("", &["b"]), &live);
    compile(&served("env:OTHER", &["a", "b", "c"]), &live);
    assert!(pool.is_ejected(&a), "what is tried leaves it as it is");
    let (same, _) = compile(&served("", &["a", "b", "c", "d"]), &live);
    same.take_effect(&live);
    assert!(pool.is_ejected(&a), "nothing of it has changed");
    let (mended, _) = compile(&served("env:OTHER", &["a", "b", "c", "d"]), &same);
    mended.take_effect(&same);
    assert!(!pool.is_ejected(&a), "it is asked with another credential");
}

#[test]
fn a_use_of_a_model_is_made_once_a_day_and_its_budgets_are_those_of_the_day() {
    let budget = v1::Budget { micro_dollars: 5_000_000, period: v1::BudgetPeriod::Day as i32 };
    let tenant = v1::Rates { requests_per_minute: Some(60), budget: Some(budget), ..Default::default() };
    let digest = v1::KeyDigest { sha256: vec![7; 32], prefix: "weir_0123".into(), expire_time: None };
    let resources = [
        resource("pool", Wire::Pool(v1::PoolSpec::default())),
        resource("large", Wire::Model(v1::ModelSpec { pool: "pool".into(), ..Default::default() })),
        resource("acme", Wire::Tenant(v1::TenantSpec { limits: Some(tenant), ..Default::default() })),
        resource(
            "key",
            Wire::ApiKey(v1::ApiKeySpec {
                tenant: "acme".into(),
                digests: vec![digest],
                ..Default::default()
            }),
        ),
    ];
    let (snapshot, refused) = Snapshot::compile("e", 1, &resources, &Snapshot::default(), &|_| Ok(None));
    assert_eq!(refused, []);
    let (key, model) = (snapshot.keys.get(&[7; 32]).expect("a key"), &snapshot.models["large"]);
    let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(20_780 * 86_400 + 43_200);
    let at = |after: u64| snapshot.model_use(key, model, noon + Duration::from_secs(after));
    let (first, evening, tomorrow) = (at(0), at(43_199), at(43_200));
    assert!(Arc::ptr_eq(&first, &evening) && !Arc::ptr_eq(&first, &tomorrow));
    assert!(Arc::ptr_eq(&tomorrow, &at(43_201)), "kept from then on");
    assert_ne!(first.record, tomorrow.record);
    let records = |of: &super::super::model_use::ModelUse| -> Vec<weir_ratelimit::Key> {
        assert_eq!(of.entries.len(), of.scopes.len());
        of.scopes.iter().map(|scope| scope.record.clone()).collect()
    };
    let (first, tomorrow) = (records(&first), records(&tomorrow));
    assert_eq!((first.len(), first[0] == tomorrow[0], first[1] == tomorrow[1]), (2, true, false));
}
