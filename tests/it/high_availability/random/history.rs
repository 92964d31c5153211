//! The answers to all writers, against a sequential model.
//!
//! The audit log gives the order. Every acknowledged write is in it once, at the revision of its answer, with the
//! effect that it has in the model. Writes without a change, refusals and reads must be answers of the model at some
//! revision between the last write that had ended before and the first that began afterwards. Together: the history
//! is linearizable, and reads are those of one control plane.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::time::Instant;
use weir_proto::v1::{AuditEntry, ChangeAction, ResourceKind};

/// The apply set of everything that is applied.
pub(super) const SET: &str = "random";

/// A tenant: its word, and whether it belongs to the set.
pub(super) type Tenant = (String, bool);

/// The resources that writers change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct State {
    pub(super) tenants: BTreeMap<String, Tenant>,
    /// The words of backends; those without one are not here.
    pub(super) weights: BTreeMap<String, u32>,
}

/// The call of a writer.
#[derive(Debug, Clone)]
pub(super) enum Ask {
    Create {
        name: String,
        word: String,
    },
    /// `expected`: only if its word is this one, by its etag.
    Update {
        name: String,
        word: String,
        expected: Option<String>,
    },
    Delete {
        name: String,
        expected: Option<String>,
    },
    Apply {
        words: BTreeMap<String, String>,
        prune: bool,
    },
    Rollback {
        revision: u64,
        names: BTreeSet<String>,
    },
    Weight {
        backend: String,
        weight: u32,
    },
    Read {
        name: String,
    },
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Told {
    /// Done, at this revision if the answer has one.
    Done(Option<u64>),
    /// The data that was read.
    Found(String),
    /// Refused for this reason.
    Refused(String),
    /// Too many calls at once: not done.
    Contended,
}

/// One call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) ask: Ask,
    pub(super) request_id: String,
    /// The control plane that answered.
    pub(super) plane: usize,
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) told: Told,
    /// Whether an earlier attempt of the request ended without an answer: it may have been done in spite of a
    /// refusal.
    pub(super) unsure: bool,
}

/// The state at each revision, from the one at which the writers began.
struct Past {
    first: u64,
    states: Vec<Arc<State>>,
}

impl Past {
    fn newest(&self) -> u64 {
        self.first + self.states.len() as u64 - 1
    }

    fn at(&self, revision: u64) -> &Arc<State> {
        &self.states[usize::try_from(revision - self.first).expect("fits")]
    }
}

/// The effect of a call on a state, or why it is refused.
fn step(past: &Past, state: &State, ask: &Ask) -> Result<State, &'static str> {
    let mut next = state.clone();
    let present = |name: &str, expected: &Option<String>| match (state.tenants.get(name), expected) {
        (None, _) => Err("NOT_FOUND"),
        (Some((word, _)), Some(expected)) if word != expected => Err("ETAG_MISMATCH"),
        (Some(tenant), _) => Ok(tenant.clone()),
    };
    match ask {
        Ask::Create { name, word } => {
            if next.tenants.insert(name.clone(), (word.clone(), false)).is_some() {
                return Err("ALREADY_EXISTS");
            }
        }
        Ask::Update { name, word, expected } => {
            let (_, set) = present(name, expected)?;
            next.tenants.insert(name.clone(), (word.clone(), set));
        }
        Ask::Delete { name, expected } => {
            present(name, expected)?;
            next.tenants.remove(name);
        }
        Ask::Apply { words, prune } => {
            if *prune {
                next.tenants.retain(|_, (_, set)| !*set);
            }
            next.tenants.extend(words.iter().map(|(name, word)| (name.clone(), (word.clone(), true))));
        }
        Ask::Rollback { revision, names } => {
            for name in names {
                match past.at(*revision).tenants.get(name) {
                    Some(then) => next.tenants.insert(name.clone(), then.clone()),
                    None => next.tenants.remove(name),
                };
            }
        }
        Ask::Weight { backend, weight } => {
            next.weights.insert(backend.clone(), *weight);
        }
        Ask::Read { name } => {
            present(name, &None)?;
        }
    }
    Ok(next)
}

/// The audit entry of that step.
fn effects(before: &State, after: &State) -> BTreeSet<(ResourceKind, String, ChangeAction)> {
    let action = |before: bool, after: bool| match (before, after) {
        (false, _) => ChangeAction::Create,
        (_, false) => ChangeAction::Delete,
        _ => ChangeAction::Update,
    };
    let names: BTreeSet<&String> = before.tenants.keys().chain(after.tenants.keys()).collect();
    let tenants = names.into_iter().filter_map(|name| {
        let (old, new) = (before.tenants.get(name), after.tenants.get(name));
        (old != new).then(|| (ResourceKind::Tenant, name.clone(), action(old.is_some(), new.is_some())))
    });
    let moved = after.weights.iter().filter(|(name, weight)| before.weights.get(*name) != Some(*weight));
    let weights = moved.map(|(name, _)| (ResourceKind::Backend, name.clone(), ChangeAction::Update));
    tenants.chain(weights).collect()
}

fn said(entry: &AuditEntry) -> BTreeSet<(ResourceKind, String, ChangeAction)> {
    let row = |change: &weir_proto::v1::AuditChange| {
        let reference = change.r#ref.clone().unwrap_or_default();
        (reference.kind(), reference.name, change.action())
    };
    entry.changes.iter().map(row).collect()
}

/// A summary for people.
#[derive(Debug, Default)]
pub(super) struct Summary {
    pub(super) writes: usize,
    pub(super) refused: usize,
    pub(super) unchanged: usize,
    pub(super) reads: usize,
}

/// Checks everything. Returns the state at every revision and a summary, or the error. `log` are the entries after
/// `first`, the oldest first.
pub(super) fn check(
    first: u64,
    begin: State,
    calls: &[Call],
    log: &[AuditEntry],
) -> Result<(Vec<Arc<State>>, Summary), String> {
    let by_id: BTreeMap<&str, &Call> = calls.iter().map(|call| (call.request_id.as_str(), call)).collect();
    if by_id.len() != calls.len() {
        return Err("two calls have one request id".into());
    }
    let mut past = Past { first, states: vec![Arc::new(begin)] };
    // Request id -> revision.
    let mut done: BTreeMap<&str, u64> = BTreeMap::new();
    for entry in log {
        if entry.revision != past.newest() + 1 {
            return Err(format!("revision {} follows {}", entry.revision, past.newest()));
        }
        let id = entry.request_id.as_str();
        let call = by_id.get(id).ok_or_else(|| format!("nobody asked for {entry:?}"))?;
        if done.insert(id, entry.revision).is_some() {
            return Err(format!("{call:?} was done twice, again at {}", entry.revision));
        }
        let sure = match &call.told {
            Told::Done(Some(revision)) => *revision == entry.revision,
            Told::Done(None) => true,
            Told::Refused(_) | Told::Contended => call.unsure,
            Told::Found(_) => false,
        };
        if !sure {
            return Err(format!("{call:?} was done at {}", entry.revision));
        }
        let before = Arc::clone(past.at(past.newest()));
        let after = step(&past, &before, &call.ask)
            .map_err(|reason| format!("{call:?} was done at {}, where it is {reason}", entry.revision))?;
        if effects(&before, &after) != said(entry) {
            return Err(format!("{call:?} did {:?} instead of {:?}", said(entry), effects(&before, &after)));
        }
        past.states.push(Arc::new(after));
    }
    in_order(calls, &done)?;
    let summary = moments(&past, calls, &done)?;
    Ok((past.states, summary))
}

/// A call that began after another one had ended has a later revision.
fn in_order(calls: &[Call], done: &BTreeMap<&str, u64>) -> Result<(), String> {
    let mut writes: Vec<(u64, &Call)> =
        calls.iter().filter_map(|call| Some((*done.get(call.request_id.as_str())?, call))).collect();
    writes.sort_by_key(|(revision, _)| *revision);
    // The latest start of all earlier entries: no later entry may have ended before it.
    let mut latest: Option<&Call> = None;
    for (revision, call) in writes {
        if let Some(before) = latest.filter(|before| !call.unsure && call.ended < before.began) {
            return Err(format!(
                "{call:?} was over before {before:?} began, and comes after it, at {revision}"
            ));
        }
        if latest.is_none_or(|before| before.began < call.began) {
            latest = Some(call);
        }
    }
    Ok(())
}

/// Finds for every call without an effect a revision at which the model gives the same answer, in the order of these
/// calls.
fn moments(past: &Past, calls: &[Call], done: &BTreeMap<&str, u64>) -> Result<Summary, String> {
    let mut summary = Summary::default();
    // By the end of each call: the highest revision that was answered by then, by any and by each control plane.
    let mut ends: Vec<(Instant, usize, u64)> = Vec::new();
    // By the start of each write: the lowest revision of the writes that started then or later.
    let mut begins: Vec<(Instant, u64)> = Vec::new();
    for call in calls {
        if let Some(revision) = done.get(call.request_id.as_str()) {
            summary.writes += 1;
            begins.push((call.began, *revision));
            if !call.unsure {
                ends.push((call.ended, call.plane, *revision));
            }
        }
    }
    begins.sort_unstable();
    for at in (1..begins.len()).rev() {
        begins[at - 1].1 = begins[at - 1].1.min(begins[at].1);
    }
    ends.sort_unstable();
    let mut rest: Vec<&Call> =
        calls.iter().filter(|call| !done.contains_key(call.request_id.as_str())).collect();
    rest.sort_by_key(|call| call.ended);
    // The call that ends first is placed first, as early as possible: that leaves the most room for the others.
    for call in rest {
        let is_read = matches!(call.ask, Ask::Read { .. });
        let counts = |(ended, plane, _): &&(Instant, usize, u64)| {
            *ended < call.began && (!is_read || *plane == call.plane)
        };
        let lowest = ends.iter().filter(counts).map(|(_, _, revision)| *revision).max();
        let lowest = lowest.unwrap_or(past.first);
        let after = begins.partition_point(|(began, _)| *began <= call.ended);
        let highest = begins.get(after).map_or(past.newest(), |(_, revision)| revision - 1);
        let agrees = |revision: &u64| {
            let state = past.at(*revision);
            match (step(past, state, &call.ask), &call.told) {
                (_, Told::Contended) => true,
                (Ok(next), Told::Done(_)) => next == **state,
                (Ok(_), Told::Found(word)) => match &call.ask {
                    Ask::Read { name } => state.tenants[name].0 == *word,
                    _ => false,
                },
                (Err(reason), Told::Refused(told)) => reason == told,
                _ => false,
            }
        };
        let moment = (lowest..=highest).find(agrees).ok_or_else(|| {
            format!("{call:?} is not in the log, and no revision from {lowest} to {highest} answers that")
        })?;
        if is_read {
            summary.reads += 1;
        } else {
            match call.told {
                Told::Done(_) => summary.unchanged += 1,
                _ => summary.refused += 1,
            }
            // A call that starts after the end of this one sees at least what it saw.
            ends.push((call.ended, call.plane, moment));
        }
    }
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weir_proto::v1::{AuditChange, ResourceRef};

    use super::*;

    /// A call with its times in milliseconds.
    fn call(id: &str, (began, ended): (u64, u64), ask: Ask, told: Told) -> Call {
        let start = *START.get_or_init(Instant::now);
        let at = |ms| start + Duration::from_millis(ms);
        let (began, ended) = (at(began), at(ended));
        Call { ask, request_id: id.into(), plane: 0, began, ended, told, unsure: false }
    }

    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();

    fn create(id: &str, times: (u64, u64), revision: u64) -> Call {
        let ask = Ask::Create { name: "t".into(), word: id.into() };
        call(id, times, ask, Told::Done(Some(revision)))
    }

    fn update(id: &str, times: (u64, u64), expected: Option<&str>, told: Told) -> Call {
        let expected = expected.map(str::to_owned);
        call(id, times, Ask::Update { name: "t".into(), word: id.into(), expected }, told)
    }

    fn read(times: (u64, u64), told: Told) -> Call {
        call("read", times, Ask::Read { name: "t".into() }, told)
    }

    fn entry(id: &str, revision: u64, action: ChangeAction) -> AuditEntry {
        let r#ref = Some(ResourceRef { kind: ResourceKind::Tenant.into(), name: "t".into() });
        let change = AuditChange { r#ref, action: action.into(), ..AuditChange::default() };
        AuditEntry { revision, request_id: id.into(), changes: vec![change], ..AuditEntry::default() }
    }

    fn wrong(calls: &[Call], log: &[AuditEntry]) -> String {
        check(0, State::default(), calls, log)
            .map(|(_, summary)| format!("{summary:?}"))
            .expect_err("is wrong")
    }

    #[test]
    fn what_cannot_have_happened_one_after_the_other_is_found() {
        let refused = |reason: &str| Told::Refused(reason.into());
        let made = [create("a", (0, 10), 1), update("b", (20, 30), None, Told::Done(None))];
        let log = [entry("a", 1, ChangeAction::Create), entry("b", 2, ChangeAction::Update)];
        let with = |more: Call| [&made[..], &[more]].concat();
        check(0, State::default(), &made, &log).expect("is right");
        assert!(wrong(&made, &log[..1]).contains("is not in the log"), "an acknowledged write is lost");
        assert!(wrong(&made[..1], &log).contains("nobody asked"));
        let twice = [&log[..1], &[entry("a", 2, ChangeAction::Update)]].concat();
        assert!(wrong(&made[..1], &twice).contains("twice"));
        let early = [update("b", (20, 30), None, Told::Done(None)), create("a", (40, 50), 1)];
        assert!(wrong(&early, &log).contains("comes after it"), "it was over before");
        assert!(
            wrong(&[create("a", (0, 10), 2)], &log[..1]).contains("done at 1"),
            "another revision was told"
        );

        // Refusals and reads have to fit between what was over and what had not begun.
        for (times, told, fits) in [
            ((1, 2), refused("NOT_FOUND"), true),
            ((11, 12), refused("NOT_FOUND"), false),
            ((11, 12), Told::Found("a".into()), true),
            ((25, 26), Told::Found("b".into()), true),
            ((31, 32), Told::Found("a".into()), false),
            ((11, 12), Told::Found("b".into()), false),
        ] {
            let found = check(0, State::default(), &with(read(times, told.clone())), &log);
            assert_eq!(found.is_ok(), fits, "{times:?} {told:?}");
        }
        let cas = |times, expected| update("c", times, Some(expected), refused("ETAG_MISMATCH"));
        assert!(check(0, State::default(), &with(cas((25, 35), "a")), &log).is_ok());
        assert!(wrong(&with(cas((31, 35), "b")), &log).contains("no revision"));
        let unchanged = |times| {
            call(
                "d",
                times,
                Ask::Update { name: "t".into(), word: "a".into(), expected: None },
                Told::Done(None),
            )
        };
        assert!(check(0, State::default(), &with(unchanged((5, 25))), &log).is_ok());
        assert!(
            wrong(&with(unchanged((31, 35))), &log).contains("no revision"),
            "it would have changed something"
        );
    }
}
