//! The indexes against what a look at all resources finds.

use std::collections::BTreeSet;

use proptest::prelude::*;
use weir_proto::v1::{self, resource::Spec as Wire};

use super::super::tests::{backend, model, pool, resource, tenant};
use super::*;

/// A resource to add or replace, or the key of one to remove.
#[derive(Debug, Clone)]
enum Step {
    Put(Box<v1::Resource>),
    Remove(ResourceKind, String),
}

fn key(name: u8, tenant: u8, digests: &[u8]) -> v1::Resource {
    let digest = |d: &u8| v1::KeyDigest { sha256: vec![*d; 32], ..Default::default() };
    let spec = v1::ApiKeySpec {
        tenant: format!("t{tenant}"),
        digests: digests.iter().map(digest).collect(),
        ..Default::default()
    };
    resource(&format!("k{name}"), Wire::ApiKey(spec))
}

fn limit(name: u8, tenant: u8) -> v1::Resource {
    let selector = Some(v1::LimitSelector { tenant: format!("t{tenant}"), ..Default::default() });
    let rates = Some(v1::Rates { requests_per_minute: Some(1), ..Default::default() });
    resource(&format!("l{name}"), Wire::Limit(v1::LimitSpec { selector, rates }))
}

fn step() -> impl Strategy<Value = Step> {
    let put = |wire| Step::Put(Box::new(wire));
    let removed = prop_oneof![
        Just((ResourceKind::ApiKey, "k")),
        Just((ResourceKind::Limit, "l")),
        Just((ResourceKind::Tenant, "t")),
        Just((ResourceKind::Backend, "b")),
    ];
    prop_oneof![
        3 => (0..6_u8, 0..3_u8, prop::collection::vec(0..6_u8, 0..2))
            .prop_map(move |(name, tenant, digests)| put(key(name, tenant, &digests))),
        2 => (0..6_u8, 0..3_u8).prop_map(move |(name, tenant)| put(limit(name, tenant))),
        1 => (0..3_u8).prop_map(move |name| put(tenant(&format!("t{name}")))),
        1 => (0..2_u8).prop_map(move |name| put(pool(&format!("p{name}")))),
        1 => (0..2_u8).prop_map(move |name| put(model(&format!("m{name}"), "p0"))),
        1 => (0..3_u8, 0..2_u8).prop_map(move |(name, pool)| {
            put(backend(&format!("b{name}"), &format!("p{pool}"), "m0", "http://127.0.0.1:1"))
        }),
        3 => (removed, 0..6_u8).prop_map(|((kind, letter), name)| Step::Remove(kind, format!("{letter}{name}"))),
    ]
}

proptest! {
    #[test]
    fn every_index_says_what_a_look_at_all_resources_finds(steps in prop::collection::vec(step(), 0..60)) {
        let mut resources = Resources::default();
        for step in steps {
            match step {
                Step::Remove(kind, name) => resources.remove(&Key::new(kind, &name)),
                Step::Put(wire) => {
                    let stored = Stored::new(*wire).unwrap();
                    // A plan lets no two keys have one digest.
                    let is_free = |digest| resources.owner(&digest).is_none_or(|owner| *owner == stored.key());
                    if stored.digests().all(is_free) {
                        resources.insert(stored.key(), Arc::new(stored));
                    }
                }
            }
        }
        let all: Vec<&Arc<Stored>> = resources.values().collect();
        for role in ROLES {
            let desired = all.iter().filter(|s| wanted(role, s.checked.kind()));
            let desired: Vec<_> = desired.map(|s| (s.key(), s.published.version.clone())).collect();
            let found = resources.versions(role).iter().map(|(key, version)| (key.clone(), version.to_string()));
            prop_assert_eq!(found.collect::<Vec<_>>(), desired);
        }
        for kind in weir_proto::resource::KINDS {
            let of_kind: Vec<Key> = all.iter().map(|s| s.key()).filter(|key| key.kind == kind).collect();
            prop_assert_eq!(resources.count(kind), of_kind.len());
            prop_assert_eq!(resources.of_kind(kind).map(|s| s.key()).collect::<Vec<_>>(), of_kind);
        }
        for digest in (0..6).map(|d| [d; 32]) {
            let owner = all.iter().find(|s| s.digests().any(|d| d == digest)).map(|s| s.key());
            prop_assert_eq!(resources.owner(&digest).cloned(), owner);
        }
        let targets: BTreeSet<Key> = all.iter().flat_map(|s| s.targets()).collect();
        for target in targets {
            let by = all.iter().filter(|s| s.targets().any(|t| t == target)).map(|s| s.key());
            prop_assert_eq!(resources.referrers(&target).cloned().collect::<Vec<_>>(), by.collect::<Vec<_>>());
        }
        for selector in all.iter().filter_map(|s| s.selector()) {
            let count = all.iter().filter(|s| s.selector().as_ref() == Some(&selector)).count();
            prop_assert_eq!(resources.limits(&selector), count);
        }
    }
}
