use weir_proto::resource::{Name, Resource};
use weir_proto::v1::{self, resource::Spec};
use weir_ratelimit::{Bound, Candidate, Cost, Key, Kind, ReservationId};

use super::*;
use crate::routing::balance;
use crate::routing::snapshot::Snapshot;

const MODEL: &str = "m";

/// A model of backends under these accounts, in order; the named ones are limited.
fn snapshot(accounts: &[&str], limited: &[&str]) -> Snapshot {
    let put = |name: &str, spec| {
        let wire = v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
        Resource::try_from(&wire).expect("valid")
    };
    let mut resources = vec![
        put("chat", Spec::Pool(v1::PoolSpec::default())),
        put(MODEL, Spec::Model(v1::ModelSpec { pool: "chat".into(), ..Default::default() })),
    ];
    for (i, account) in accounts.iter().enumerate() {
        let backend = v1::BackendSpec {
            pool: "chat".into(),
            url: "http://127.0.0.1:9".into(),
            models: [(MODEL.to_owned(), String::new())].into(),
            account: (*account).into(),
            ..Default::default()
        };
        resources.push(put(&format!("b{i}"), Spec::Backend(backend)));
    }
    for account in limited {
        let selector = v1::LimitSelector { account: (*account).into(), ..Default::default() };
        let rates = v1::Rates { requests_per_minute: Some(60), ..Default::default() };
        let limit = v1::LimitSpec { selector: Some(selector), rates: Some(rates) };
        resources.push(put(account, Spec::Limit(limit)));
    }
    let (snapshot, refused) = Snapshot::compile("e", 1, &resources, &Snapshot::default(), &|_| Ok(None));
    assert!(refused.is_empty(), "{refused:?}");
    snapshot
}

fn accounts(snapshot: &Snapshot) -> &Accounts {
    &snapshot.models_by_name[&Name::parse(MODEL).expect("a name")].accounts
}

fn candidates(indices: &[usize]) -> Vec<balance::Candidate> {
    indices.iter().map(|index| balance::Candidate { index: *index, slots: 9, bound: None }).collect()
}

/// The record of the limit of an account, which is named after it.
fn record(account: &str) -> Key {
    weir_ratelimit::limit_keys(weir_ratelimit::Scope::Account(account), account).0
}

fn own() -> ScopeLimits {
    weir_ratelimit::scope_limits(weir_ratelimit::Scope::Tenant("t"), None, &Default::default())
}

/// A call with one scope of its own.
fn full_call(groups: &CandidateGroups, accounts: &Accounts, candidates: &[balance::Candidate]) -> Acquire {
    let scopes = std::iter::once(own()).chain(groups.entries(accounts).map(|entry| entry.limits.clone()));
    let candidate = |candidate: &balance::Candidate| Candidate {
        leases: Key::backend_slots(&format!("b{}", candidate.index)),
        max_concurrency: candidate.slots,
        bound: Some(Bound { millionths: 500_000, elsewhere: 0, estimate: 3 }),
    };
    Acquire {
        id: ReservationId::nil(),
        cost: Cost::of_request(1, 1, 0),
        estimated: true,
        scopes: scopes.collect(),
        candidates: candidates.iter().map(candidate).collect(),
        lease_ttl: Duration::from_secs(15),
    }
}

fn limit(scope: Key, wait: Option<u64>) -> LimitState {
    let verdict = wait.map_or(Verdict::Fits, |s| Verdict::Wait(Duration::from_secs(s)));
    let what = What::Bucket(Kind::Requests);
    LimitState { scope, what, verdict, limit: 60, remaining: 0, reset: Duration::ZERO }
}

/// What the limiter says to the call of a group under that account.
fn refused(account: &str, of_own: Option<u64>, of_account: Option<u64>) -> Decision {
    let wait = of_own.max(of_account).map(Duration::from_secs);
    let limits = vec![limit(own().record, of_own), limit(record(account), of_account)];
    Decision { outcome: Outcome::Limited { wait }, limits, now_us: 0, degraded: false }
}

fn no_slot(account: &str, wait: u64) -> Decision {
    let outcome = Outcome::NoSlot { wait: Duration::from_secs(wait) };
    Decision {
        outcome,
        limits: vec![limit(own().record, None), limit(record(account), None)],
        now_us: 0,
        degraded: false,
    }
}

fn granted(slot: usize) -> Decision {
    Decision {
        outcome: Outcome::Granted { slot: Some(slot) },
        limits: vec![limit(own().record, None)],
        now_us: 0,
        degraded: false,
    }
}

#[test]
fn runs_keep_the_order_of_preference() {
    let snapshot = snapshot(&["x", "x", "y", "", "z"], &["x", "y"]);
    let accounts = accounts(&snapshot);
    let of = |indices: &[usize]| {
        let groups = CandidateGroups::of(accounts, &candidates(indices), 1, |_| true);
        groups.groups.iter().map(|group| (group.candidates.clone(), group.account)).collect::<Vec<_>>()
    };
    assert_eq!(of(&[0, 1, 2]), [(0..2, Some(0)), (2..3, Some(1))]);
    assert_eq!(of(&[1, 2, 0]), [(0..1, Some(0)), (1..2, Some(1)), (2..3, Some(0))]);
    assert_eq!(of(&[3, 4, 0]), [(0..2, None), (2..3, Some(0))], "an account without limits is none");
    let groups = CandidateGroups::of(accounts, &candidates(&[1, 2, 0]), 1, |account| account != 1);
    assert_eq!(groups.groups.len(), 2, "what is left out separates: no call names its candidates");
    assert!(groups.alternatives().is_empty(), "one account cannot stand in for itself");
}

#[test]
fn the_first_run_is_one_call_with_its_accounts_scopes_only() {
    let snapshot = snapshot(&["x", "y", ""], &["x", "y"]);
    let (accounts, candidates) = (accounts(&snapshot), candidates(&[1, 0, 2]));
    let groups = CandidateGroups::of(accounts, &candidates, 1, |_| true);
    let full = full_call(&groups, accounts, &candidates);
    assert_eq!(groups.alternatives().as_slice(), [1..2, 2..3, 1..1]);
    let mut round = groups.round(&full, |_| false);
    let (group, call) = round.next().expect("a group");
    let records: Vec<&str> = call.scopes.iter().map(|scope| scope.record.as_str()).collect();
    assert_eq!(records, ["weir:{t:t}:s", "weir:{a:y}:s:l:y"]);
    assert_eq!(call.candidates.len(), 1);
    assert_eq!((call.candidates[0].max_concurrency, call.candidates[0].bound), (3, None), "no call sees all");
    let decision = round.decided(&group, granted(0)).expect("done");
    assert_eq!(decision.outcome, Outcome::Granted { slot: Some(0) });
}

#[test]
fn a_full_account_is_passed_by_and_not_asked_again() {
    let snapshot = snapshot(&["x", "y", "x", ""], &["x", "y"]);
    let (accounts, candidates) = (accounts(&snapshot), candidates(&[0, 1, 2, 3]));
    let groups = CandidateGroups::of(accounts, &candidates, 1, |_| true);
    let full = full_call(&groups, accounts, &candidates);
    let mut round = groups.round(&full, |_| false);
    let (group, _) = round.next().expect("x");
    assert!(round.decided(&group, refused("x", None, Some(5))).is_none());
    let (group, call) = round.next().expect("y");
    assert_eq!((group.account, call.scopes[1].record.as_str()), (Some(1), "weir:{a:y}:s:l:y"));
    assert!(round.decided(&group, no_slot("y", 2)).is_none());
    let (group, call) = round.next().expect("the free one, past the second of x");
    assert_eq!((group.account, call.scopes.len()), (None, 1));
    let decision = round.decided(&group, granted(0)).expect("done");
    assert_eq!(decision.outcome, Outcome::Granted { slot: Some(3) }, "among all candidates");
    assert_eq!(round.refused().len(), 1);
}

#[test]
fn the_callers_own_limit_stands_at_once_and_alone() {
    let snapshot = snapshot(&["x", "y"], &["x", "y"]);
    let (accounts, candidates) = (accounts(&snapshot), candidates(&[0, 1]));
    let groups = CandidateGroups::of(accounts, &candidates, 1, |_| true);
    let full = full_call(&groups, accounts, &candidates);
    let mut round = groups.round(&full, |_| false);
    let (group, _) = round.next().expect("x");
    let decision = round.decided(&group, refused("x", Some(2), Some(60))).expect("done");
    assert_eq!(decision.outcome, Outcome::Limited { wait: Some(Duration::from_secs(2)) });
    assert!(decision.limits.iter().all(|limit| limit.scope == own().record), "{:?}", decision.limits);
}

#[test]
fn when_all_refuse_the_soonest_account_is_waited_for_or_a_slot() {
    let snapshot = snapshot(&["x", "y"], &["x", "y"]);
    let (accounts, candidates) = (accounts(&snapshot), candidates(&[0, 1]));
    let groups = CandidateGroups::of(accounts, &candidates, 1, |_| true);
    let full = full_call(&groups, accounts, &candidates);
    let after = |answers: [Decision; 2], max_wait: [u64; 3]| {
        let mut round = groups.round(&full, |_| false);
        for answer in answers {
            let (group, _) = round.next().expect("a group");
            assert!(round.decided(&group, answer).is_none());
        }
        assert!(round.next().is_none());
        round.refusal(|scope| Duration::from_secs(max_wait[scope]))
    };
    let scopes = |decision: &Decision| {
        decision.limits.iter().filter_map(|limit| limit.position_in(&full.scopes)).collect::<Vec<_>>()
    };
    let limited = |s| Outcome::Limited { wait: Some(Duration::from_secs(s)) };
    let both = after([refused("x", None, Some(7)), refused("y", None, Some(3))], [0, 10, 10]);
    assert_eq!((both.outcome, scopes(&both)), (limited(3), vec![0, 2]), "the second is full for less long");
    let patient = after([refused("x", None, Some(7)), refused("y", None, Some(3))], [0, 10, 0]);
    assert_eq!((patient.outcome, scopes(&patient)), (limited(7), vec![0, 1]), "which may be waited for");
    let mixed = after([refused("x", None, Some(7)), no_slot("y", 9)], [0, 10, 10]);
    assert_eq!((mixed.outcome, scopes(&mixed)), (Outcome::NoSlot { wait: Duration::from_secs(7) }, vec![0]));
}

#[test]
fn accounts_that_others_wait_for_are_passed_over_unless_nobody_is_left() {
    let snapshot = snapshot(&["x", "y"], &["x", "y"]);
    let (accounts, candidates) = (accounts(&snapshot), candidates(&[0, 1]));
    let groups = CandidateGroups::of(accounts, &candidates, 1, |_| true);
    let full = full_call(&groups, accounts, &candidates);
    let is_x = |scopes: &[ScopeLimits]| scopes[0].record.as_str() == "weir:{a:x}:s:l:x";
    let mut round = groups.round(&full, is_x);
    assert_eq!(round.next().map(|(group, _)| group.account), Some(Some(1)));
    assert!(round.next().is_none());
    let mut round = groups.round(&full, |_| true);
    assert_eq!(round.next().map(|(group, _)| group.account), Some(Some(0)));
}

#[test]
fn many_backends_under_one_account_are_asked_for_in_calls_that_the_limiter_takes() {
    let most = weir_ratelimit::MAX_CANDIDATES;
    let names = vec!["one"; 2 * most + 7];
    let snapshot = snapshot(&names, &["one"]);
    let candidates = candidates(&(0..names.len()).collect::<Vec<_>>());
    let groups = CandidateGroups::of(accounts(&snapshot), &candidates, 1, |_| true);
    let full = full_call(&groups, accounts(&snapshot), &candidates);
    let mut round = groups.round(&full, |_| false);
    let mut asked = Vec::new();
    while let Some((group, acquire)) = round.next() {
        assert!(acquire.candidates.len() <= most && acquire.candidates.iter().all(|c| c.bound.is_none()));
        asked.push(group.candidates.clone());
        if asked.len() == 3 {
            let decision = round.decided(&group, granted(6)).expect("granted");
            assert_eq!(decision.outcome, Outcome::Granted { slot: Some(2 * most + 6) });
            break;
        }
        assert!(round.decided(&group, no_slot("one", 5)).is_none());
    }
    assert_eq!(asked, [0..most, most..2 * most, 2 * most..2 * most + 7]);
}
