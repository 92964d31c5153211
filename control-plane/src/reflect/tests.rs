use std::collections::HashMap;

use weir_proto::v1;

use super::*;

const BACKEND: &str = "weir.v1.BackendSpec";
const POOL: &str = "weir.v1.PoolSpec";

fn backend(models: &[(&str, &str)]) -> v1::BackendSpec {
    v1::BackendSpec {
        pool: "p".into(),
        models: models.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<HashMap<_, _>>(),
        ..Default::default()
    }
}

fn pool(total: Option<i64>, connect: Option<i64>) -> v1::PoolSpec {
    let seconds = |s: Option<i64>| s.map(|seconds| prost_types::Duration { seconds, nanos: 0 });
    let timeouts = v1::Timeouts { total: seconds(total), connect: seconds(connect), ..Default::default() };
    v1::PoolSpec { timeouts: Some(timeouts), ..Default::default() }
}

#[test]
fn map_order_does_not_show_in_the_canonical_encoding() {
    let names: Vec<String> = (0..50).map(|i| format!("m{i}")).collect();
    let forward: Vec<_> = names.iter().map(|n| (n.as_str(), "x")).collect();
    let backward: Vec<_> = forward.iter().rev().copied().collect();
    let (a, b) = (backend(&forward), backend(&backward));
    let bytes = canonical(BACKEND, &a).unwrap();
    assert_eq!(bytes, canonical(BACKEND, &b).unwrap());
    assert_eq!(v1::BackendSpec::decode(&*bytes).unwrap(), a);
}

#[test]
fn differences_name_leaves_and_map_entries() {
    let before = reflect(BACKEND, &backend(&[("a", "1"), ("b", "")])).unwrap();
    let after = reflect(BACKEND, &backend(&[("b", "2"), ("c", "3")])).unwrap();
    assert_eq!(
        diff::differences(&before, &after),
        [
            ("models[a]".into(), "\"1\"".into(), String::new()),
            ("models[b]".into(), "\"\"".into(), "\"2\"".into()),
            ("models[c]".into(), String::new(), "\"3\"".into()),
        ]
    );
    let (before, after) = (reflect(POOL, &pool(None, Some(1))), reflect(POOL, &pool(Some(90), Some(1))));
    assert_eq!(
        diff::differences(&before.unwrap(), &after.unwrap()),
        [("timeouts.total".to_owned(), String::new(), "\"90s\"".to_owned())]
    );
}

#[test]
fn an_enum_is_shown_by_the_name_that_yaml_has() {
    let of = |state: v1::AdminState| {
        reflect(BACKEND, &v1::BackendSpec { admin_state: state.into(), ..backend(&[]) }).unwrap()
    };
    assert_eq!(
        diff::differences(&of(v1::AdminState::Active), &of(v1::AdminState::Draining)),
        [("admin_state".to_owned(), "\"active\"".to_owned(), "\"draining\"".to_owned())]
    );
}

#[test]
fn a_mask_changes_what_it_names_and_nothing_else() {
    let mut target = reflect(POOL, &pool(Some(60), Some(5))).unwrap();
    let source = reflect(POOL, &pool(Some(90), None)).unwrap();
    assert_eq!(mask::populated(&source), ["timeouts.total"]);
    mask::assign(&mut target, &source, "timeouts.total").unwrap();
    assert_eq!(target, reflect(POOL, &pool(Some(90), Some(5))).unwrap());
    mask::assign(&mut target, &source, "timeouts.connect").unwrap();
    assert_eq!(target, source, "a path that the source lacks is cleared");
    let unknown = mask::assign(&mut target, &source, "timeouts.totl").unwrap_err();
    assert_eq!(unknown.valid, ["connect", "first_byte", "idle", "total", "keep_alive"]);
    assert!(mask::assign(&mut target, &source, "regions.x").is_err());
    let bare = target.clone();
    mask::assign(&mut target, &source, "ejection.base_duration").unwrap();
    assert_eq!(target, bare, "clearing below an absent message adds nothing");
}

#[test]
fn rubbish_is_refused_without_a_panic() {
    for bytes in [&[0xff_u8; 12][..], &[0x0a, 0x7f], &[0x0b]] {
        assert!(decode(POOL, bytes).is_err());
    }
}
