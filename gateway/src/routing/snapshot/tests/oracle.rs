//! Snapshots made change by change against a compile of all resources at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::SystemTime;

use proptest::prelude::*;
use prost::Message as _;
use weir_discovery::{ConfigState, with_update_between};
use weir_proto::resource::{Resource, Spec};
use weir_proto::v1::{self, resource::Spec as Wire};
use weir_ratelimit::{DeclaredLimits, Scope};

use super::*;

const TENANTS: [&str; 3] = ["acme", "beta", "core"];
const MODELS: [&str; 2] = ["large", "small"];
const KEYS: usize = 5;
const DIGESTS: u8 = 6;

/// A change of one resource.
#[derive(Debug, Clone)]
enum Edit {
    Tenant {
        tenant: usize,
        limited: bool,
        allowed: bool,
    },
    /// The second digest may be the first one.
    Key {
        key: usize,
        tenant: usize,
        digests: Vec<u8>,
        revoked: bool,
        limited: bool,
    },
    Limit {
        limit: usize,
        selector: v1::LimitSelector,
    },
    Model {
        model: usize,
        limited: bool,
    },
    Backend {
        backend: usize,
        pool: bool,
    },
    Remove {
        kind: v1::ResourceKind,
        name: String,
    },
}

fn key_name(key: usize) -> String {
    format!("key-{key}")
}

fn limit_name(limit: usize) -> String {
    format!("limit-{limit:02}")
}

fn selector() -> impl Strategy<Value = v1::LimitSelector> {
    let tenant = 0..TENANTS.len();
    prop_oneof![
        Just(v1::LimitSelector::default()),
        tenant.clone().prop_map(|t| v1::LimitSelector { tenant: TENANTS[t].into(), ..Default::default() }),
        (0..MODELS.len()).prop_map(|m| v1::LimitSelector { model: MODELS[m].into(), ..Default::default() }),
        (0..KEYS).prop_map(|k| v1::LimitSelector { api_key: key_name(k), ..Default::default() }),
        (tenant, 0..MODELS.len()).prop_map(|(t, m)| v1::LimitSelector {
            tenant: TENANTS[t].into(),
            model: MODELS[m].into(),
            ..Default::default()
        }),
        Just(v1::LimitSelector { account: "account".into(), ..Default::default() }),
    ]
}

fn edit() -> impl Strategy<Value = Edit> {
    use v1::ResourceKind as Kind;
    let removed = prop_oneof![
        (0..TENANTS.len()).prop_map(|t| (Kind::Tenant, TENANTS[t].to_owned())),
        (0..KEYS).prop_map(|k| (Kind::ApiKey, key_name(k))),
        (0..12_usize).prop_map(|l| (Kind::Limit, limit_name(l))),
        (0..MODELS.len()).prop_map(|m| (Kind::Model, MODELS[m].to_owned())),
        (0..3_usize).prop_map(|b| (Kind::Backend, format!("backend-{b}"))),
        Just((Kind::Pool, "pool".to_owned())),
    ];
    prop_oneof![
        2 => (0..TENANTS.len(), any::<bool>(), any::<bool>())
            .prop_map(|(tenant, limited, allowed)| Edit::Tenant { tenant, limited, allowed }),
        4 => (
            0..KEYS,
            0..TENANTS.len(),
            prop::collection::vec(0..DIGESTS, 0..3),
            prop::bool::weighted(0.1),
            any::<bool>()
        )
            .prop_map(|(key, tenant, digests, revoked, limited)| Edit::Key {
                key,
                tenant,
                digests,
                revoked,
                limited
            }),
        4 => (0..12_usize, selector()).prop_map(|(limit, selector)| Edit::Limit { limit, selector }),
        1 => (0..MODELS.len(), any::<bool>()).prop_map(|(model, limited)| Edit::Model { model, limited }),
        1 => (0..3_usize, any::<bool>()).prop_map(|(backend, pool)| Edit::Backend { backend, pool }),
        3 => removed.prop_map(|(kind, name)| Edit::Remove { kind, name }),
    ]
}

fn rates(limited: bool) -> Option<v1::Rates> {
    limited.then(|| v1::Rates { requests_per_minute: Some(7), ..Default::default() })
}

impl Edit {
    fn apply(&self, config: &mut BTreeMap<(i32, String), v1::Resource>) {
        let (name, spec) = match self.clone() {
            Self::Remove { kind, name } => {
                config.remove(&(kind.into(), name));
                return;
            }
            Self::Tenant { tenant, limited, allowed } => {
                let allowed_models = if allowed { vec![MODELS[0].to_owned()] } else { Vec::new() };
                let spec = v1::TenantSpec { limits: rates(limited), allowed_models, ..Default::default() };
                (TENANTS[tenant].to_owned(), Wire::Tenant(spec))
            }
            Self::Key { key, tenant, digests, revoked, limited } => {
                let digest = |(n, d): (usize, u8)| v1::KeyDigest {
                    sha256: vec![d; 32],
                    expire_time: Some(prost_types::Timestamp { seconds: n as i64, nanos: 0 }),
                    ..Default::default()
                };
                let spec = v1::ApiKeySpec {
                    tenant: TENANTS[tenant].into(),
                    digests: digests.into_iter().enumerate().map(digest).collect(),
                    revoked,
                    limits: rates(limited),
                    ..Default::default()
                };
                (key_name(key), Wire::ApiKey(spec))
            }
            Self::Limit { limit, selector } => {
                let spec = v1::LimitSpec { selector: Some(selector), rates: rates(true) };
                (limit_name(limit), Wire::Limit(spec))
            }
            Self::Model { model, limited } => {
                let spec =
                    v1::ModelSpec { pool: "pool".into(), limits: rates(limited), ..Default::default() };
                (MODELS[model].to_owned(), Wire::Model(spec))
            }
            Self::Backend { backend, pool } => {
                let spec = v1::BackendSpec {
                    pool: if pool { "pool" } else { "nowhere" }.into(),
                    url: "http://127.0.0.1:1".into(),
                    models: [(MODELS[0].to_owned(), String::new())].into(),
                    account: "account".into(),
                    ..Default::default()
                };
                (format!("backend-{backend}"), Wire::Backend(spec))
            }
        };
        let wire = v1::Resource { name: name.clone(), spec: Some(spec), ..Default::default() };
        if Resource::try_from(&wire).is_ok() {
            config.insert((weir_proto::resource::kind_of(&wire).into(), name), wire);
        }
    }
}

fn encoded(revision: u64, config: &BTreeMap<(i32, String), v1::Resource>) -> ConfigState {
    let mut state = ConfigState::new("e", revision);
    for ((kind, name), wire) in config {
        let body = wire.encode_to_vec();
        state.insert(*kind, name, &format!("{body:?}"), &body);
    }
    state
}

/// What a request with a digest meets.
#[derive(Debug, PartialEq)]
struct Met {
    key: String,
    tenant: String,
    allowed: (Vec<Name>, Vec<Name>),
    expires: Option<SystemTime>,
    /// For each model.
    limits: Vec<String>,
}

fn shown(scopes: &[&ScopeEntry]) -> String {
    format!("{scopes:?}")
}

/// What is in a snapshot: keys by digest, tenants, and what it leaves out.
type Picture = (BTreeMap<[u8; 32], Met>, BTreeSet<String>, BTreeSet<(v1::ResourceKind, String)>);

fn picture(snapshot: &Snapshot, refused: &[Refused]) -> Picture {
    let met = |digest: [u8; 32]| {
        let key = snapshot.keys.get(&digest)?;
        let models = MODELS.iter().map(|model| Name::parse(model).expect("a name"));
        let met = Met {
            key: key.name.to_string(),
            tenant: key.tenant.name.to_string(),
            allowed: (key.allowed_models.to_vec(), key.tenant.allowed_models.clone()),
            expires: key.expires,
            limits: models.map(|model| shown(&snapshot.scopes(key, &model))).collect(),
        };
        Some((digest, met))
    };
    let keys = (0..DIGESTS).filter_map(|d| met([d; 32])).collect();
    let tenants = snapshot.tenants.keys().map(ToString::to_string).collect();
    (keys, tenants, refused.iter().map(|r| (r.kind, r.name.clone())).collect())
}

/// The same of all resources at once, with the plainest code: the oracle.
fn expected(resources: &[Resource]) -> Picture {
    let limits = DeclaredLimits::of(resources);
    let tenants: HashMap<&Name, &weir_proto::resource::Tenant> = resources
        .iter()
        .filter_map(|r| match &r.spec {
            Spec::Tenant(tenant) => Some((&r.name, tenant)),
            _ => None,
        })
        .collect();
    let pools: BTreeSet<&Name> =
        resources.iter().filter(|r| matches!(r.spec, Spec::Pool(_))).map(|r| &r.name).collect();
    let mut refused: BTreeSet<(v1::ResourceKind, String)> =
        limits.surplus().iter().map(|name| (v1::ResourceKind::Limit, name.to_string())).collect();
    let mut keys = BTreeMap::new();
    for resource in resources {
        let key = match &resource.spec {
            Spec::ApiKey(key) => key,
            Spec::Model(v) if !pools.contains(&v.pool) => {
                refused.insert((resource.kind(), resource.name.to_string()));
                continue;
            }
            Spec::Backend(v) if !pools.contains(&v.pool) => {
                refused.insert((resource.kind(), resource.name.to_string()));
                continue;
            }
            _ => continue,
        };
        let Some(tenant) = tenants.get(&key.tenant) else {
            refused.insert((resource.kind(), resource.name.to_string()));
            continue;
        };
        for digest in key.digests.iter().filter(|_| !key.revoked) {
            let (own, of) = (resource.name.as_str(), key.tenant.as_str());
            let limits = MODELS.iter().map(|model| {
                let served = |r: &&Resource| matches!(&r.spec, Spec::Model(m) if pools.contains(&m.pool));
                let exists = resources.iter().filter(served).any(|r| r.name.as_str() == *model);
                let mut scopes = ScopeEntry::all(Scope::ApiKey { tenant: of, key: own }, &limits);
                scopes.extend(ScopeEntry::all(Scope::Tenant(of), &limits));
                scopes.extend(ScopeEntry::all(Scope::TenantModel { tenant: of, model }, &limits));
                if exists {
                    scopes.extend(ScopeEntry::all(Scope::Model(model), &limits));
                }
                scopes.extend(ScopeEntry::all(Scope::Global, &limits));
                shown(&scopes.iter().collect::<Vec<_>>())
            });
            let met = Met {
                key: own.to_owned(),
                tenant: of.to_owned(),
                allowed: (key.allowed_models.clone(), tenant.allowed_models.clone()),
                expires: digest.expires,
                limits: limits.collect(),
            };
            keys.insert(digest.sha256, met);
        }
    }
    (keys, tenants.keys().map(ToString::to_string).collect(), refused)
}

proptest! {
    #[test]
    fn a_snapshot_made_by_changes_is_the_one_compiled_at_once(
        deltas in prop::collection::vec(prop::collection::vec(edit(), 1..8), 1..12)
    ) {
        let mut wire = BTreeMap::new();
        let pool = v1::Resource { name: "pool".into(), spec: Some(Wire::Pool(v1::PoolSpec::default())), ..Default::default() };
        wire.insert((v1::ResourceKind::Pool.into(), "pool".to_owned()), pool);
        let (mut snapshot, mut config) = (Snapshot::default(), ConfigState::default());
        for (revision, edits) in deltas.iter().enumerate() {
            edits.iter().for_each(|edit| edit.apply(&mut wire));
            let next = encoded(revision as u64 + 1, &wire);
            let (made, refused) =
                with_update_between(&config, &next, |update| snapshot.updated(update, &|_| Ok(None)));
            let resources = next.checked().0;
            let (mut found, wanted) = (picture(&made, &refused), expected(&resources));
            // A limit over a key that does not exist is over nothing, so the oracle counts no surplus of it.
            let of_missing_key = |name: &str| resources.iter().any(|r| match &r.spec {
                Spec::Limit(limit) => r.name.as_str() == name && limit.api_key.as_ref().is_some_and(|key| {
                    !resources.iter().any(|r| matches!(r.spec, Spec::ApiKey(_)) && r.name == *key)
                }),
                _ => false,
            });
            found.2.retain(|(kind, name)| *kind != v1::ResourceKind::Limit || !of_missing_key(name));
            prop_assert_eq!(found, wanted);
            let once = Snapshot::compile("e", 1, &resources, &Snapshot::default(), &|_| Ok(None));
            prop_assert_eq!(made.keys.len(), once.0.keys.len());
            prop_assert_eq!(made.keys.values().count(), made.keys.len());
            (snapshot, config) = (made, next);
        }
    }
}

/// Digests as they are in reality.
fn digest(n: u32) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(n.to_be_bytes()).into()
}

#[test]
fn every_key_of_a_large_table_is_found_and_a_change_leaves_the_version_before_as_it_was() {
    let tenant = Arc::new(TenantEntry {
        name: Name::parse("acme").expect("a name"),
        allowed_models: Vec::new(),
        scopes: Box::default(),
        model_scopes: Box::default(),
        queue: "acme".into(),
        priority: Default::default(),
    });
    let entry = |n: u32| {
        Arc::new(KeyEntry {
            digest: digest(n),
            name: Name::parse(&format!("key-{n}")).expect("a name"),
            tenant: tenant.clone(),
            allowed_models: Box::default(),
            expires: None,
            scopes: Box::default(),
        })
    };
    let mut table = KeyTable::default();
    (0..20_000).for_each(|n| table.insert(entry(n)));
    let before = table.clone();
    (0..10_000).for_each(|n| table.remove(&entry(n)));
    (20_000..40_000).for_each(|n| table.insert(entry(n)));
    assert_eq!((before.len(), table.len()), (20_000, 30_000));
    for n in 0..40_000 {
        let name = format!("key-{n}");
        let found = |table: &KeyTable| table.get(&digest(n)).map(|entry| entry.name.to_string());
        assert_eq!(found(&before), (n < 20_000).then(|| name.clone()));
        assert_eq!(found(&table), (n >= 10_000).then_some(name));
    }
}
