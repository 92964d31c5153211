use std::collections::HashMap;

use super::*;

pub(crate) fn resource(name: &str, spec: v1::resource::Spec) -> v1::Resource {
    v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() }
}

pub(crate) fn pool(name: &str) -> v1::Resource {
    resource(name, v1::resource::Spec::Pool(v1::PoolSpec::default()))
}

pub(crate) fn model(name: &str, pool: &str) -> v1::Resource {
    let spec = v1::ModelSpec { pool: pool.into(), ..Default::default() };
    resource(name, v1::resource::Spec::Model(spec))
}

pub(crate) fn backend(name: &str, pool: &str, model: &str, url: &str) -> v1::Resource {
    let spec = v1::BackendSpec {
        pool: pool.into(),
        url: url.into(),
        models: HashMap::from([(model.to_owned(), String::new())]),
        ..Default::default()
    };
    resource(name, v1::resource::Spec::Backend(spec))
}

pub(crate) fn tenant(name: &str) -> v1::Resource {
    resource(name, v1::resource::Spec::Tenant(v1::TenantSpec::default()))
}

/// A pool, a model and so many backends.
pub(crate) fn cluster(backends: usize) -> Vec<v1::Resource> {
    let mut all = vec![pool("p"), model("m", "p")];
    all.extend((0..backends).map(|i| backend(&format!("b{i}"), "p", "m", "http://127.0.0.1:1")));
    all
}

fn key(kind: v1::ResourceKind, name: &str) -> Key {
    Key::new(kind, name)
}

fn state(resources: &[v1::Resource]) -> State {
    let mut state = State { epoch: "e".into(), revision: 1, ..State::default() };
    for wire in resources {
        let stored = Stored::new(wire.clone()).unwrap();
        state.resources.insert(stored.key(), Arc::new(stored));
    }
    state
}

fn put(wire: v1::Resource) -> Edit {
    Edit::Put(Box::new(wire))
}

fn refusal(state: &State, edits: Vec<Edit>) -> String {
    plan(state, edits, Options::default()).unwrap_err().to_string()
}

#[test]
fn references_must_exist_and_the_violation_names_the_field() {
    let error = refusal(&state(&[]), vec![put(backend("b", "p", "m", "http://h"))]);
    assert_eq!(error, "backend.pool: there is no pool p; backend.models[m]: there is no model m");
    let edits = cluster(1).into_iter().map(put).collect();
    let plan = plan(&state(&[]), edits, Options::default()).unwrap();
    let kinds: Vec<_> = plan.steps.iter().map(|step| step.key.kind).collect();
    assert_eq!(kinds, [v1::ResourceKind::Pool, v1::ResourceKind::Backend, v1::ResourceKind::Model]);
}

fn limit(name: &str, selector: v1::LimitSelector) -> v1::Resource {
    let rates = v1::Rates { requests_per_minute: Some(1), ..Default::default() };
    let spec = v1::LimitSpec { selector: Some(selector), rates: Some(rates) };
    resource(name, v1::resource::Spec::Limit(spec))
}

#[test]
fn a_limit_or_rule_over_what_does_not_exist_is_refused() {
    let selector = |tenant: &str, model: &str, api_key: &str| v1::LimitSelector {
        tenant: tenant.into(),
        model: model.into(),
        api_key: api_key.into(),
        ..Default::default()
    };
    let all = state(&[vec![tenant("t")], cluster(0)].concat());
    for (selector, error) in [
        (selector("nobody", "m", ""), "limit.selector.tenant: there is no tenant nobody"),
        (selector("t", "gpt-9", ""), "limit.selector.model: there is no model gpt-9"),
        (selector("", "", "k"), "limit.selector.api_key: there is no api_key k"),
    ] {
        assert_eq!(refusal(&all, vec![put(limit("l", selector.clone()))]), error);
        if selector.model == "m" {
            continue;
        }
        let spec = v1::DescriptorRuleSpec {
            domain: "d".into(),
            entries: vec![v1::DescriptorEntry { key: "k".into(), ..Default::default() }],
            consumes: vec![v1::LimitSelector { tenant: "t".into(), ..selector }],
            ..Default::default()
        };
        let rule = resource("r", v1::resource::Spec::DescriptorRule(spec));
        let error = error.replace("limit.selector", "descriptor_rule.consumes[0]");
        assert_eq!(refusal(&all, vec![put(rule)]), error);
    }
    plan(&all, vec![put(limit("l", selector("t", "m", "")))], Options::default()).unwrap();
    let limited = state(&[vec![tenant("t"), limit("l", selector("t", "", ""))], cluster(0)].concat());
    let error = refusal(&limited, vec![Edit::Delete(key(v1::ResourceKind::Tenant, "t"))]);
    assert_eq!(error, "tenant t is referred to by limit l");
}

#[test]
fn so_many_limits_have_one_selector_and_no_more() {
    let of = |tenant: &str| v1::LimitSelector { tenant: tenant.into(), ..Default::default() };
    let four = (0..4).map(|n| limit(&format!("l{n}"), of("t")));
    let full = state(&[tenant("t"), tenant("u")].into_iter().chain(four).collect::<Vec<_>>());
    let error = "limit.selector: 5 limits would have this selector; at most 4 may";
    assert_eq!(refusal(&full, vec![put(limit("l4", of("t")))]), error);
    for edits in [
        vec![put(limit("l4", of("u")))],
        vec![put(limit("l3", of("t")))],
        vec![put(limit("l4", of("t"))), Edit::Delete(key(v1::ResourceKind::Limit, "l0"))],
    ] {
        plan(&full, edits, Options::default()).unwrap();
    }
}

#[test]
fn what_is_referred_to_stays() {
    let error = refusal(&state(&cluster(1)), vec![Edit::Delete(key(v1::ResourceKind::Pool, "p"))]);
    assert_eq!(error, "pool p is referred to by backend b0, model m");
}

#[test]
fn two_of_the_same_are_refused() {
    let mut twin = model("m2", "p");
    if let Some(v1::resource::Spec::Model(spec)) = &mut twin.spec {
        spec.client_name = "m".into();
    }
    assert!(refusal(&state(&cluster(0)), vec![put(twin)]).contains("the same client name m"));

    let digest = v1::KeyDigest { sha256: vec![1; 32], prefix: "weir_x".into(), expire_time: None };
    let spec = v1::ApiKeySpec { tenant: "t".into(), digests: vec![digest], ..Default::default() };
    let api_key = |name: &str| resource(name, v1::resource::Spec::ApiKey(spec.clone()));
    let state_with = state(&[tenant("t"), api_key("k1")]);
    assert!(refusal(&state_with, vec![put(api_key("k2"))]).contains("the same digest"));
    let twice = refusal(&state(&[]), vec![put(pool("p")), put(pool("p"))]);
    assert_eq!(twice, "name: pool p is given twice");
}

#[test]
fn a_pool_does_not_lose_more_than_half_by_accident() {
    let state = state(&cluster(4));
    let delete = |i: usize| Edit::Delete(key(v1::ResourceKind::Backend, &format!("b{i}")));
    assert!(plan(&state, vec![delete(0), delete(1)], Options::default()).unwrap().removes_backends);
    let edits = || vec![delete(0), delete(1), delete(2)];
    let error = plan(&state, edits(), Options::default()).unwrap_err();
    let names = (0..3).map(|i| key(v1::ResourceKind::Backend, &format!("b{i}"))).collect();
    assert_eq!(error, Refusal::MassRemoval { what: "backends of pool p".into(), lost: 3, before: 4, names });
    plan(&state, edits(), Options { allow_mass_removal: true, ..Options::default() }).unwrap();
}

#[test]
fn moving_a_backend_away_counts_as_losing_it() {
    let mut all = cluster(1);
    all.push(pool("q"));
    let moved = backend("b0", "q", "m", "http://127.0.0.1:1");
    let error = plan(&state(&all), vec![put(moved)], Options::default()).unwrap_err();
    assert!(
        error.to_string().starts_with("1 of 1 backends of pool p would be removed (backend b0)"),
        "{error}"
    );
}

#[test]
fn most_keys_tenants_or_models_are_not_removed_by_accident_and_a_few_always_are() {
    let digest = |n: u8| v1::KeyDigest { sha256: vec![n; 32], prefix: "weir_x".into(), expire_time: None };
    let api_key = |n: u8| {
        let spec = v1::ApiKeySpec { tenant: "t".into(), digests: vec![digest(n)], ..Default::default() };
        resource(&format!("k{n}"), v1::resource::Spec::ApiKey(spec))
    };
    let all: Vec<_> = std::iter::once(tenant("t")).chain((0..5).map(api_key)).collect();
    let delete = |n: u8| Edit::Delete(key(v1::ResourceKind::ApiKey, &format!("k{n}")));
    let error = plan(&state(&all), (0..3).map(delete).collect(), Options::default()).unwrap_err().to_string();
    assert!(error.starts_with("3 of 5 API keys would be removed (api_key k0, "), "{error}");
    assert!(error.contains("--allow-mass-removal"), "{error}");
    plan(&state(&all), (0..2).map(delete).collect(), Options::default()).unwrap();
    plan(&state(&all[..3]), (0..2).map(delete).collect(), Options::default()).unwrap();
    let meant = Options { allow_mass_removal: true, ..Options::default() };
    plan(&state(&all), (0..5).map(delete).collect(), meant).unwrap();
}

#[test]
fn an_update_changes_what_the_mask_names() {
    let state = state(&cluster(1));
    let mut given = backend("b0", "ignored", "ignored", "http://other:1");
    if let Some(v1::resource::Spec::Backend(spec)) = &mut given.spec {
        spec.weight = Some(7);
    }
    let edit = update_edit(&state, &given, Some(&["weight".to_owned()])).unwrap();
    let plan = plan(&state, vec![edit], Options::default()).unwrap();
    assert_eq!(plan.steps[0].fields, [("weight".to_owned(), String::new(), "7".to_owned())]);

    let error = update_edit(&state, &given, Some(&["wieght".to_owned()])).unwrap_err().to_string();
    assert!(error.contains("'wieght' is not a field: backend has pool, url, region, weight"), "{error}");
    given.etag = "other".into();
    assert!(matches!(update_edit(&state, &given, None), Err(Refusal::EtagMismatch { .. })));
}

#[test]
fn pruning_takes_only_what_is_of_the_set() {
    let mut mine = pool("mine");
    mine.apply_set = "s".into();
    let state = state(&[mine, pool("single"), v1::Resource { apply_set: "t".into(), ..pool("theirs") }]);
    let edits = apply_edits(&state, &[pool("new")], "s", true, false).unwrap();
    let plan = plan(&state, edits, Options::default()).unwrap();
    let steps: Vec<_> = plan.steps.iter().map(|s| (&*s.key.name, s.action)).collect();
    assert_eq!(steps, [("new", v1::ChangeAction::Create), ("mine", v1::ChangeAction::Delete)]);
}

#[test]
fn what_is_of_another_set_is_taken_over_only_when_that_is_meant() {
    let of = |set: &str, name: &str| v1::Resource { apply_set: set.into(), ..pool(name) };
    let state = state(&[of("theirs", "a"), of("", "b"), of("bootstrap", "c"), of("mine", "d")]);
    let free = ["b", "c", "d", "new"].map(pool);
    assert_eq!(apply_edits(&state, &free, "mine", true, false).unwrap().len(), 4);
    let all = ["a", "b"].map(pool);
    let refused = apply_edits(&state, &all, "mine", false, false).unwrap_err().to_string();
    let said = "pool a belongs to the set theirs; to take them over into mine, apply with take_over";
    assert_eq!(refused, said);
    assert_eq!(apply_edits(&state, &all, "mine", false, true).unwrap().len(), 2);
}

#[test]
fn the_examples_can_be_applied() {
    for example in [
        include_str!("../../../deploy/examples/two-backends.yaml"),
        include_str!("../../../deploy/examples/complete.yaml"),
    ] {
        let resources = weir_proto::manifest::parse(example, "example.yaml").unwrap();
        let empty = state(&[]);
        let edits = apply_edits(&empty, &resources, "default", false, false).unwrap();
        let plan = plan(&empty, edits, Options::default()).unwrap();
        assert_eq!(plan.steps.len(), resources.len());
        assert!(plan.steps.iter().all(|step| step.action == v1::ChangeAction::Create));
    }
}

#[test]
fn content_decides_version_and_etag() {
    let bare = Stored::new(pool("p")).unwrap();
    let times = Some(prost_types::Timestamp { seconds: 9, nanos: 0 });
    let dated = v1::Resource { update_time: times, apply_set: "s".into(), etag: "x".into(), ..pool("p") };
    let dated = Stored::new(dated).unwrap();
    assert_eq!(bare.published, dated.published);
    assert_eq!(bare.wire.etag, dated.wire.etag);
    assert_eq!(bare.wire.etag, Stored::new(pool("q")).unwrap().wire.etag, "the etag is of the spec");
    assert_ne!(bare.published.version, Stored::new(pool("q")).unwrap().published.version);
}

#[test]
fn a_credential_that_no_gateway_may_read_is_not_declared_and_one_that_is_stored_stays() {
    let with = |credential: &str, weight: u32| {
        let mut wire = backend("b0", "p", "m", "http://127.0.0.1:1");
        if let Some(v1::resource::Spec::Backend(spec)) = &mut wire.spec {
            credential.clone_into(&mut spec.credential);
            spec.weight = Some(weight);
        }
        wire
    };
    let state_of = |wire: v1::Resource| state(&[pool("p"), model("m", "p"), wire]);
    for (credential, said) in [
        ("env:WEIR_GATEWAY_TOKEN", "begin with WEIR_"),
        ("env:weir_gateway_token", "begin with WEIR_"),
        ("file:/etc/weir/credentials/../gateway-token/token", "must not have .."),
        ("file:/etc/weir/credentials/a\nb", "control characters"),
    ] {
        let found = refusal(&state_of(with("env:OPENAI_API_KEY", 1)), vec![put(with(credential, 1))]);
        assert!(found.contains("backend.credential") && found.contains(said), "{found}");
        // Stored by an older version, it keeps nobody from changing the rest.
        plan(&state_of(with(credential, 1)), vec![put(with(credential, 2))], Options::default()).unwrap();
    }
    for credential in ["", "env:WEIRD_API_KEY", "file:/etc/weir/credentials/..data/token"] {
        plan(&state_of(with("", 1)), vec![put(with(credential, 1))], Options::default()).unwrap();
    }
}
