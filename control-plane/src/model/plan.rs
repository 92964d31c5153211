//! Turns edits into a plan of writes, after every rule was checked against the complete result.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use prost_types::Timestamp;
use weir_proto::resource::{EntryPattern, Limit, Resource, Spec, Violation, kind_of};
use weir_proto::v1;

use super::fields::fields;
use super::resources::Selector;
use super::{Key, Refusal, State, Stored};
use crate::reflect::diff::Difference;

/// One thing to do.
#[derive(Debug, Clone)]
pub(crate) enum Edit {
    /// The resource shall be as given; its output-only fields are ignored.
    Put(Box<v1::Resource>),
    /// The resource shall be gone.
    Delete(Key),
}

/// How to plan.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Options {
    /// A pool may lose more than half of its backends.
    pub(crate) allow_mass_removal: bool,
    /// For the times of what changes.
    pub(crate) now: Timestamp,
    /// Violations say which of the edits they are of.
    pub(crate) numbered: bool,
}

/// What happens to one resource.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) key: Key,
    pub(crate) action: v1::ChangeAction,
    /// As it will be; of a deleted one as it was.
    pub(crate) resource: Arc<Stored>,
    /// As it is; `None` when it is new.
    pub(crate) before: Option<Arc<Stored>>,
    pub(crate) fields: Vec<Difference>,
}

/// What happens to one token.
#[derive(Debug, Clone)]
pub(crate) struct TokenStep {
    pub(crate) name: Arc<str>,
    /// As it is; `None` when it is new.
    pub(crate) before: Option<Arc<v1::Token>>,
    /// As it will be; `None` when it is deleted.
    pub(crate) after: Option<v1::Token>,
}

/// What a change would do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    /// In the order of application.
    pub(crate) steps: Vec<Step>,
    /// The tokens made, changed or deleted.
    pub(crate) tokens: Vec<TokenStep>,
    /// Some pool loses a backend.
    pub(crate) removes_backends: bool,
    /// The operator allowed a mass removal.
    pub(crate) allow_mass_removal: bool,
}

impl Plan {
    /// Nothing would be written.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty() && self.steps.iter().all(|step| step.action == v1::ChangeAction::Unchanged)
    }
}

/// The resources as they would be: the present ones under what is put and deleted.
struct Outcome<'a> {
    state: &'a State,
    changed: BTreeMap<Key, Option<Arc<Stored>>>,
}

impl Outcome<'_> {
    fn contains(&self, key: &Key) -> bool {
        self.changed.get(key).map_or_else(|| self.state.resources.contains_key(key), Option::is_some)
    }

    /// The resources of a kind that are left as they are.
    fn kept(&self, kind: v1::ResourceKind) -> impl Iterator<Item = &Arc<Stored>> {
        self.state.of_kind(kind).filter(|stored| !self.changed.contains_key(&stored.key()))
    }
}

/// Checks every rule and returns the plan.
pub(crate) fn plan(state: &State, edits: Vec<Edit>, options: Options) -> Result<Plan, Refusal> {
    let mut result = Outcome { state, changed: BTreeMap::new() };
    let mut violations = Vec::new();
    let mut steps = Vec::new();
    for (i, edit) in edits.into_iter().enumerate() {
        let prefix = if options.numbered { format!("resources[{i}].") } else { String::new() };
        let step = match edit {
            Edit::Put(wire) => match put(state, *wire, options.now) {
                Ok(step) => step,
                Err(found) => {
                    let path = |v: Violation| Violation { path: format!("{prefix}{}", v.path), ..v };
                    violations.extend(found.into_iter().map(path));
                    continue;
                }
            },
            Edit::Delete(key) => delete(state, key)?,
        };
        let after = (step.action != v1::ChangeAction::Delete).then(|| Arc::clone(&step.resource));
        if result.changed.insert(step.key.clone(), after).is_some() {
            violations.push(Violation {
                path: format!("{prefix}name"),
                message: format!("{} is given twice", step.key),
            });
        }
        steps.push((prefix, step));
    }
    for (prefix, step) in &steps {
        if step.action != v1::ChangeAction::Delete {
            missing_references(&result, prefix, step, &mut violations);
        }
    }
    clashes(&result, &steps, &mut violations);
    crowds(&result, &steps, &mut violations);
    if !violations.is_empty() {
        return Err(Refusal::Invalid(violations));
    }
    still_referred(&result, &steps)?;
    let removes_backends = guard_mass_removal(&result, options.allow_mass_removal)?;
    let mut steps: Vec<Step> = steps.into_iter().map(|(_, step)| step).collect();
    steps.sort_by(|a, b| order(a).cmp(&order(b)));
    let tokens = Vec::new();
    Ok(Plan { steps, tokens, removes_backends, allow_mass_removal: options.allow_mass_removal })
}

/// A resource is created before and deleted after the ones that refer to it.
fn order(step: &Step) -> (bool, i32, &str) {
    let kind = i32::from(step.key.kind);
    let deleted = step.action == v1::ChangeAction::Delete;
    (deleted, if deleted { -kind } else { kind }, &step.key.name)
}

fn put(state: &State, wire: v1::Resource, now: Timestamp) -> Result<Step, Vec<Violation>> {
    let key = Key::new(kind_of(&wire), &wire.name);
    let before = state.get(&key);
    let fresh = v1::Resource {
        revision: 0,
        create_time: Some(before.and_then(|b| b.wire.create_time).unwrap_or(now)),
        update_time: Some(now),
        ..wire
    };
    let after = Stored::new(fresh).map_err(|violations| violations.0)?;
    if let Some(violation) = objection(before.map(|b| &b.checked), &after.checked) {
        return Err(vec![violation]);
    }
    let Some(before) = before else {
        let (action, fields) = (v1::ChangeAction::Create, Vec::new());
        return Ok(Step { key, action, resource: Arc::new(after), before: None, fields });
    };
    let fields = fields(Some(&before.wire), Some(&after.wire));
    let kept = Some(Arc::clone(before));
    if fields.is_empty() && before.published.version == after.published.version {
        let action = v1::ChangeAction::Unchanged;
        return Ok(Step { key, action, resource: Arc::clone(before), before: kept, fields });
    }
    Ok(Step { key, action: v1::ChangeAction::Update, resource: Arc::new(after), before: kept, fields })
}

/// What was stored before there was a rule may stay; it is not declared anew.
fn objection(before: Option<&Resource>, after: &Resource) -> Option<Violation> {
    let credential = |resource: &Resource| match &resource.spec {
        Spec::Backend(backend) => backend.credential.clone(),
        _ => None,
    };
    let new = credential(after).filter(|new| before.and_then(credential).as_ref() != Some(new))?;
    let message = new.objection()?.to_owned();
    Some(Violation { path: "backend.credential".into(), message })
}

fn delete(state: &State, key: Key) -> Result<Step, Refusal> {
    let resource = Arc::clone(state.get(&key).ok_or_else(|| Refusal::NotFound(key.clone()))?);
    let before = Some(Arc::clone(&resource));
    Ok(Step { key, action: v1::ChangeAction::Delete, resource, before, fields: Vec::new() })
}

fn missing_references(result: &Outcome<'_>, prefix: &str, step: &Step, out: &mut Vec<Violation>) {
    for reference in step.resource.checked.references() {
        let target = Key::new(reference.kind, reference.name.as_str());
        let deleted = result.changed.get(&target).is_some_and(Option::is_none);
        // A reference to what is being deleted is reported as such.
        if !deleted && !result.contains(&target) {
            out.push(Violation {
                path: format!("{prefix}{}", reference.path),
                message: format!("there is no {target}"),
            });
        }
    }
}

/// A value that only one resource may have.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Unique<'a> {
    Digest([u8; 32]),
    ClientName(&'a str),
    Descriptors(&'a str, &'a [EntryPattern]),
}

impl<'a> Unique<'a> {
    fn of(stored: &'a Stored) -> Vec<Self> {
        match &stored.checked.spec {
            Spec::ApiKey(api_key) => api_key.digests.iter().map(|d| Self::Digest(d.sha256)).collect(),
            Spec::Model(model) => vec![Self::ClientName(&model.client_name)],
            Spec::DescriptorRule(rule) => vec![Self::Descriptors(&rule.domain, &rule.entries)],
            Spec::Pool(_) | Spec::Backend(_) | Spec::Tenant(_) | Spec::Limit(_) => Vec::new(),
        }
    }

    const fn path(self) -> &'static str {
        match self {
            Self::Digest(_) => "api_key.digests",
            Self::ClientName(_) => "model.client_name",
            Self::Descriptors(..) => "descriptor_rule.entries",
        }
    }

    /// What is wrong when two resources have it.
    fn clash(self, other: &Key, key: &Key) -> String {
        match self {
            Self::Digest(_) => format!("{other} and {key} have the same digest"),
            Self::ClientName(name) => format!("{other} and {key} have the same client name {name}"),
            Self::Descriptors(..) => format!("{other} and {key} match the same descriptors"),
        }
    }
}

/// No two keys with one digest, no two models with one client name, no two rules with one pattern.
fn clashes(result: &Outcome<'_>, steps: &[(String, Step)], out: &mut Vec<Violation>) {
    let changed = || result.changed.values().flatten();
    // Of keys there may be a million, of these few; digests have an index.
    let mut kept: HashMap<Unique<'_>, Key> = HashMap::new();
    for kind in [v1::ResourceKind::Model, v1::ResourceKind::DescriptorRule] {
        if changed().any(|stored| stored.checked.kind() == kind) {
            let uniques = result.kept(kind).flat_map(|s| Unique::of(s).into_iter().map(|u| (u, s.key())));
            kept.extend(uniques);
        }
    }
    let mut owners: HashMap<Unique<'_>, Key> = HashMap::new();
    for stored in changed() {
        let key = stored.key();
        for unique in Unique::of(stored) {
            let among_kept = || match unique {
                Unique::Digest(digest) => {
                    let owner = result.state.resources.owner(&digest)?;
                    (!result.changed.contains_key(owner)).then(|| owner.clone())
                }
                Unique::ClientName(_) | Unique::Descriptors(..) => kept.get(&unique).cloned(),
            };
            let Some(other) = owners.insert(unique, key.clone()).or_else(among_kept) else { continue };
            let prefix = steps.iter().find(|(_, step)| step.key == key).map_or("", |(prefix, _)| prefix);
            let (path, message) = (format!("{prefix}{}", unique.path()), unique.clash(&other, &key));
            out.push(Violation { path, message });
        }
    }
}

/// No more limits with one selector than gateways hold.
fn crowds(result: &Outcome<'_>, steps: &[(String, Step)], out: &mut Vec<Violation>) {
    let declared = |step: &Step| matches!(step.action, v1::ChangeAction::Create | v1::ChangeAction::Update);
    let mut change: HashMap<Selector, (usize, usize)> = HashMap::new();
    for (key, after) in &result.changed {
        let before = result.state.get(key).and_then(|stored| stored.selector());
        if let Some(selector) = before {
            change.entry(selector).or_default().0 += 1;
        }
        if let Some(selector) = after.as_ref().and_then(|stored| stored.selector()) {
            change.entry(selector).or_default().1 += 1;
        }
    }
    for (prefix, step) in steps.iter().filter(|(_, step)| declared(step)) {
        let Some(selector) = step.resource.selector() else { continue };
        let (gone, new) = change.get(&selector).copied().unwrap_or_default();
        let count = (result.state.resources.limits(&selector) + new).saturating_sub(gone);
        if count > Limit::PER_SELECTOR_MAX {
            out.push(Violation {
                path: format!("{prefix}limit.selector"),
                message: format!(
                    "{count} limits would have this selector; at most {} may",
                    Limit::PER_SELECTOR_MAX
                ),
            });
        }
    }
}

fn still_referred(result: &Outcome<'_>, steps: &[(String, Step)]) -> Result<(), Refusal> {
    let deleted: BTreeSet<&Key> = steps
        .iter()
        .filter(|(_, step)| step.action == v1::ChangeAction::Delete)
        .map(|(_, step)| &step.key)
        .collect();
    if deleted.is_empty() {
        return Ok(());
    }
    let mut referrers: BTreeMap<Key, Vec<Key>> = BTreeMap::new();
    for target in &deleted {
        let kept = result.state.resources.referrers(target).filter(|by| !result.changed.contains_key(*by));
        let kept: Vec<Key> = kept.cloned().collect();
        if !kept.is_empty() {
            referrers.insert((*target).clone(), kept);
        }
    }
    for stored in result.changed.values().flatten() {
        for target in stored.targets().filter(|target| deleted.contains(target)) {
            let by = referrers.entry(target).or_default();
            let key = stored.key();
            if !by.contains(&key) {
                by.push(key);
            }
        }
    }
    referrers.into_iter().next().map_or(Ok(()), |(key, by)| Err(Refusal::Referred { key, by }))
}

/// Of models, tenants and keys fewer than this may always be removed at once: who has one key deletes it.
const MASS_MIN: usize = 3;

/// Refuses a plan that removes all or more than half of a pool's backends, or of all models, tenants or keys, unless that is
/// allowed. Returns whether any pool loses a backend.
fn guard_mass_removal(result: &Outcome<'_>, allowed: bool) -> Result<bool, Refusal> {
    let mut by_pool: BTreeMap<&str, Vec<Key>> = BTreeMap::new();
    let mut by_kind: BTreeMap<v1::ResourceKind, Vec<Key>> = BTreeMap::new();
    for (key, after) in &result.changed {
        let Some(before) = result.state.get(key) else { continue };
        if let Some(pool) = before.pool()
            && after.as_ref().and_then(|after| after.pool()) != Some(pool)
        {
            by_pool.entry(pool).or_default().push(key.clone());
        }
        if after.is_none() {
            by_kind.entry(key.kind).or_default().push(key.clone());
        }
    }
    let removes_backends = !by_pool.is_empty();
    if allowed {
        return Ok(removes_backends);
    }
    let guard = |what: String, names: Vec<Key>, before: usize| match names.len() {
        lost if lost * 2 > before => Err(Refusal::MassRemoval { what, lost, before, names }),
        _ => Ok(()),
    };
    for (pool, lost) in by_pool {
        let backends = result.state.of_kind(v1::ResourceKind::Backend);
        let before = backends.filter(|stored| stored.pool() == Some(pool)).count();
        guard(format!("backends of pool {pool}"), lost, before)?;
    }
    for (kind, what) in [
        (v1::ResourceKind::Model, "models"),
        (v1::ResourceKind::Tenant, "tenants"),
        (v1::ResourceKind::ApiKey, "API keys"),
    ] {
        let lost = by_kind.remove(&kind).unwrap_or_default();
        if lost.len() >= MASS_MIN {
            guard(what.to_owned(), lost, result.state.resources.count(kind))?;
        }
    }
    Ok(removes_backends)
}
