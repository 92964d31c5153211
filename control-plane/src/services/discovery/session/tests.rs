use std::sync::Arc;

use super::*;
use crate::model::tests::{backend, model, pool, tenant};
use crate::model::{State, Stored};
use crate::publish::DELTA_RESOURCES_MAX;

fn snapshot(revision: u64, resources: Vec<v1::Resource>) -> Snapshot {
    let mut state = State { epoch: "e".into(), revision, removal: revision, ..State::default() };
    for wire in resources {
        let stored = Stored::new(wire).unwrap();
        state.resources.insert(stored.key(), Arc::new(stored));
    }
    Arc::new(state)
}

fn cluster(backends: &[&str]) -> Vec<v1::Resource> {
    let mut all = vec![pool("p"), model("m", "p")];
    all.extend(backends.iter().map(|name| backend(name, "p", "m", "http://127.0.0.1:1")));
    all
}

fn session() -> Session {
    Session::new(ConfigState::default(), Differences::default())
}

/// A session that has applied a snapshot.
fn synced(snapshot: &Snapshot) -> Session {
    let mut session = session();
    while let Some(delta) = session.next(snapshot, Instant::now()) {
        session.answered(delta.nonce, vec![]);
    }
    assert!(session.config.is(snapshot));
    session
}

fn upserts(delta: &v1::Delta) -> Vec<&str> {
    delta.upserts.iter().map(|u| u.name.as_str()).collect()
}

fn removals(delta: &v1::Delta) -> Vec<&str> {
    delta.removals.iter().map(|r| r.name.as_str()).collect()
}

fn error(kind: ResourceKind, name: &str) -> v1::ResourceError {
    let resource = Some(v1::ResourceRef { kind: kind.into(), name: name.into() });
    v1::ResourceError { resource, message: "no".into() }
}

#[tokio::test(start_paused = true)]
async fn what_is_new_comes_before_what_is_gone_goes() {
    let mut session = synced(&snapshot(1, cluster(&["a", "b"])));
    let new = snapshot(2, cluster(&["b", "c"]));
    let first = session.next(&new, Instant::now()).unwrap();
    assert_eq!((upserts(&first), removals(&first), first.store_revision), (vec!["c"], vec![], 1));
    assert_eq!(session.next(&new, Instant::now()), None, "one at a time");
    assert_eq!(session.answered(first.nonce, vec![]), Answered::Applied(1));
    let second = session.next(&new, Instant::now()).unwrap();
    assert_eq!((upserts(&second), removals(&second), second.store_revision), (vec![], vec!["a"], 2));
    assert!(second.allow_mass_removal);
    assert_eq!(session.answered(second.nonce, vec![]), Answered::Applied(2));
    assert_eq!(session.next(&new, Instant::now()), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_goes_even_when_something_new_comes_with_every_answer() {
    let mut session = synced(&snapshot(1, cluster(&["a", "b"])));
    let mut names = vec!["b".to_owned()];
    let mut gone = false;
    for revision in 2..6 {
        names.push(format!("n{revision}"));
        let new = snapshot(revision, cluster(&names.iter().map(String::as_str).collect::<Vec<_>>()));
        let delta = session.next(&new, Instant::now()).unwrap();
        gone |= removals(&delta) == ["a"];
        session.answered(delta.nonce, vec![]);
    }
    assert!(gone);
}

#[tokio::test(start_paused = true)]
async fn a_refused_backend_keeps_the_one_it_replaces_but_a_deleted_key_goes() {
    let mut all = cluster(&["a", "b"]);
    all.push(tenant("t"));
    let mut session = synced(&snapshot(1, all));
    let new = snapshot(2, cluster(&["b", "c"]));
    let first = session.next(&new, Instant::now()).unwrap();
    let refused = session.answered(first.nonce, vec![error(ResourceKind::Backend, "c")]);
    assert!(
        matches!(refused, Answered::Refused { whole: false, revision: 1, .. }),
        "the key is to be deleted yet"
    );
    let second = session.next(&new, Instant::now()).unwrap();
    assert_eq!((upserts(&second), removals(&second), second.store_revision), (vec![], vec!["t"], 1));
    let last = session.answered(second.nonce, vec![]);
    assert!(matches!(last, Answered::Still { revision: 2, .. }), "{last:?}");
    assert_eq!(session.next(&new, Instant::now()), None, "nothing more until something changes");

    let fixed = snapshot(3, cluster(&["b", "c"]));
    let third = session.next(&fixed, Instant::now()).unwrap();
    assert_eq!(upserts(&third), ["c"], "what was refused comes again with the next revision");
    session.answered(third.nonce, vec![]);
    let fourth = session.next(&fixed, Instant::now()).unwrap();
    assert_eq!((removals(&fourth), fourth.store_revision), (vec!["a"], 3));
}

/// A gateway that refused a resource is at the revision of the other resources. The next delta must not look older to
/// it.
#[tokio::test(start_paused = true)]
async fn after_a_refusal_what_is_gone_goes_at_the_revision_of_the_rest() {
    let with = |names: &[&str]| {
        let mut all = cluster(&["a"]);
        all.extend(names.iter().map(|name| tenant(name)));
        all
    };
    for epoch in ["e", "f"] {
        let mut session = synced(&snapshot(1, with(&["t", "u"])));
        let of = |revision, names: &[&str]| {
            let state = State::clone(&snapshot(revision, with(names)));
            Arc::new(State { epoch: epoch.into(), ..state })
        };
        let new = of(5, &["t", "u", "refused"]);
        let first = session.next(&new, Instant::now()).unwrap();
        assert_eq!(first.store_revision, 5);
        session.answered(first.nonce, vec![error(ResourceKind::Tenant, "refused")]);
        let next = of(6, &["u", "refused", "v"]);
        let second = session.next(&next, Instant::now()).unwrap();
        assert_eq!((upserts(&second), second.store_revision), (vec!["refused", "v"], 5), "{epoch}");
        session.answered(second.nonce, vec![error(ResourceKind::Tenant, "refused")]);
        let third = session.next(&next, Instant::now()).unwrap();
        assert_eq!((removals(&third), third.store_revision), (vec!["t"], 5), "{epoch}");
        let still = session.answered(third.nonce, vec![]);
        let errors = vec![error(ResourceKind::Tenant, "refused")];
        assert_eq!(still, Answered::Still { errors, revision: 6 }, "it is shown until it is put right");
        assert!(!session.config.is(&next), "{epoch}");
        let right = of(7, &["u", "v"]);
        let last = session.next(&right, Instant::now()).unwrap();
        assert_eq!((removals(&last), last.store_revision), (vec![], 7), "{epoch}");
        assert_eq!(session.answered(last.nonce, vec![]), Answered::Applied(7));
    }
}

#[tokio::test(start_paused = true)]
async fn an_entirely_refused_delta_is_not_sent_again_and_applies_nothing() {
    let old = snapshot(1, cluster(&["a", "b", "c"]));
    let mut session = synced(&old);
    let empty = Arc::new(State { epoch: "f".into(), revision: 9, ..State::default() });
    let delta = session.next(&empty, Instant::now()).unwrap();
    assert_eq!((delta.removals.len(), delta.allow_mass_removal), (5, false));
    let whole = v1::ResourceError { resource: None, message: "mass removal".into() };
    assert!(matches!(session.answered(delta.nonce, vec![whole]), Answered::Refused { whole: true, .. }));
    assert_eq!(session.config.versions, *crate::publish::versions(&old, v1::SubscriberRole::Gateway));
    assert_eq!(session.next(&empty, Instant::now()), None);
    let allowed = Arc::new(State { revision: 10, allowed: 10, ..State::clone(&empty) });
    assert!(session.next(&allowed, Instant::now()).unwrap().allow_mass_removal);
}

#[tokio::test(start_paused = true)]
async fn what_changes_meanwhile_is_merged_and_late_answers_say_nothing() {
    let mut session = session();
    let first = session.next(&snapshot(1, cluster(&["a"])), Instant::now()).unwrap();
    for revision in 2..50 {
        assert_eq!(session.next(&snapshot(revision, cluster(&["a", "b"])), Instant::now()), None);
    }
    assert_eq!(session.answered(first.nonce + 7, vec![]), Answered::Late);
    session.answered(first.nonce, vec![]);
    let merged = session.next(&snapshot(50, cluster(&["a", "b"])), Instant::now()).unwrap();
    assert_eq!((upserts(&merged), merged.store_revision), (vec!["b"], 50));
}

#[tokio::test(start_paused = true)]
async fn no_answer_is_stale_after_30_s_and_dead_after_120_s() {
    let mut session = session();
    assert_eq!((session.deadline(), session.lateness(Instant::now())), (None, Lateness::InTime));
    session.next(&snapshot(1, cluster(&["a"])), Instant::now()).unwrap();
    let start = Instant::now();
    assert_eq!(session.deadline(), Some(start + Duration::from_secs(30)));
    tokio::time::advance(Duration::from_secs(29)).await;
    assert_eq!(session.lateness(Instant::now()), Lateness::InTime);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(session.lateness(Instant::now()), Lateness::Stale);
    assert_eq!(session.deadline(), Some(start + Duration::from_secs(120)));
    tokio::time::advance(Duration::from_secs(90)).await;
    assert_eq!(session.lateness(Instant::now()), Lateness::Dead);
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_asks_is_sent_what_it_refused_although_nothing_has_changed() {
    let mut session = synced(&snapshot(1, cluster(&["a"])));
    session.retry();
    assert_eq!(session.next(&snapshot(1, cluster(&["a"])), Instant::now()), None, "it refused nothing");
    let new = snapshot(2, cluster(&["a", "b"]));
    let first = session.next(&new, Instant::now()).unwrap();
    session.answered(first.nonce, vec![error(ResourceKind::Backend, "b")]);
    assert_eq!(session.next(&new, Instant::now()), None);
    session.retry();
    let second = session.next(&new, Instant::now()).unwrap();
    assert_eq!((upserts(&second), second.store_revision), (vec!["b"], 2));
    session.retry();
    assert_eq!(session.next(&new, Instant::now()), None, "one at a time");
    // Refused once more, it is not sent again until the gateway asks once more.
    session.answered(second.nonce, vec![error(ResourceKind::Backend, "b")]);
    assert_eq!(session.next(&new, Instant::now()), None);
    session.retry();
    let third = session.next(&new, Instant::now()).unwrap();
    assert_eq!(session.answered(third.nonce, vec![]), Answered::Applied(2));
    assert_eq!(session.next(&new, Instant::now()), None);
}

/// Resources that the gateway holds and cannot use, as after a start without a file, are not sent again; the gateway
/// is asked for its status.
#[tokio::test(start_paused = true)]
async fn a_refusal_of_what_is_held_is_taken_back_when_the_gateway_asks() {
    let mut session = synced(&snapshot(1, cluster(&["a"])));
    let new = snapshot(2, [cluster(&["a"]), vec![tenant("t")]].concat());
    let first = session.next(&new, Instant::now()).unwrap();
    assert_eq!(upserts(&first), ["t"]);
    session.answered(first.nonce, vec![error(ResourceKind::Backend, "a")]);
    assert_eq!(session.next(&new, Instant::now()), None);
    session.retry();
    let asked = session.next(&new, Instant::now()).unwrap();
    assert_eq!((upserts(&asked), removals(&asked), asked.store_revision), (vec![], vec![], 2));
    assert_eq!(session.answered(asked.nonce, vec![]), Answered::Applied(2));
    assert_eq!(session.next(&new, Instant::now()), None);
}

#[tokio::test(start_paused = true)]
async fn a_large_difference_is_sent_in_parts_and_what_is_gone_goes_after_the_last() {
    let tenants =
        |from: usize, to: usize| (from..to).map(|n| tenant(&format!("t{n:05}"))).collect::<Vec<_>>();
    let mut session = synced(&snapshot(1, tenants(0, 10)));
    let new = snapshot(2, tenants(5, 2 * DELTA_RESOURCES_MAX + 10));
    let mut parts = Vec::new();
    while let Some(delta) = session.next(&new, Instant::now()) {
        parts.push((delta.upserts.len(), delta.removals.len(), delta.store_revision));
        // One of the first part is refused, and offered again at the end, since then something else has changed.
        let errors =
            if parts.len() == 1 { vec![error(ResourceKind::Tenant, &delta.upserts[3].name)] } else { vec![] };
        session.answered(delta.nonce, errors);
        assert!(parts.len() < 10);
    }
    let most = DELTA_RESOURCES_MAX;
    assert_eq!(parts[..2], [(most, 0, 1), (most - 1, 0, 1)]);
    assert_eq!(parts.last().map(|(upserts, _, revision)| (*upserts, *revision)), Some((0, 2)));
    assert_eq!(parts.iter().map(|(_, removals, _)| removals).sum::<usize>(), 5);
    assert!(session.config.is(&new) && !session.differs(&new));
}
