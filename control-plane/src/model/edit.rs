//! From requests to edits: masks, apply sets, pruning.

use prost_reflect::{DynamicMessage, Kind, Value};
use weir_proto::resource::{Violation, kind_name, kind_of};
use weir_proto::v1;

use super::{Edit, Key, Refusal, State};
use crate::reflect::mask::{assign, populated};
use crate::reflect::{descriptor, reflect};

/// The message types of the specs are the types of the fields of `Resource`.
const RESOURCE: &str = "weir.v1.Resource";

/// The edit of an update: the present resource with the fields in the mask as given.
pub(crate) fn update_edit(
    state: &State,
    given: &v1::Resource,
    paths: Option<&[String]>,
) -> Result<Edit, Refusal> {
    let kind = kind_of(given);
    if kind == v1::ResourceKind::Unspecified {
        return Err(Refusal::invalid("resource", "one of the specs must be set: it says the kind"));
    }
    let key = Key::new(kind, &given.name);
    let present = state.get(&key).ok_or_else(|| Refusal::NotFound(key.clone()))?;
    if !given.etag.is_empty() && given.etag != present.wire.etag {
        let (found, sent) = (present.wire.etag.clone(), given.etag.clone());
        return Err(Refusal::EtagMismatch { key, found, sent });
    }
    let spec = if paths.is_some_and(|paths| paths.iter().any(|path| path == "*")) {
        given.spec.clone()
    } else {
        masked(&present.wire, given, paths)?
    };
    Ok(Edit::Put(Box::new(v1::Resource { spec, ..present.wire.clone() })))
}

fn masked(
    present: &v1::Resource,
    given: &v1::Resource,
    paths: Option<&[String]>,
) -> Result<Option<v1::resource::Spec>, Refusal> {
    let unreadable = |e: &dyn std::fmt::Display| Refusal::invalid("resource", e.to_string());
    let resource = descriptor(RESOURCE);
    let field = resource.get_field_by_name(kind_name(kind_of(given)));
    let Some((field, Kind::Message(message))) = field.map(|field| (field.clone(), field.kind())) else {
        return Err(Refusal::invalid("resource", "one of the specs must be set: it says the kind"));
    };
    let spec = |wire: &v1::Resource| match reflect(RESOURCE, wire) {
        Ok(resource) => match resource.get_field(&field).as_message() {
            Some(spec) => Ok(spec.clone()),
            None => Ok(DynamicMessage::new(message.clone())),
        },
        Err(e) => Err(unreadable(&e)),
    };
    let (mut target, source) = (spec(present)?, spec(given)?);
    let implied;
    let paths = match paths {
        Some(paths) => paths,
        None => {
            implied = populated(&source);
            &implied
        }
    };
    let mut violations = Vec::new();
    for path in paths {
        if let Err(unknown) = assign(&mut target, &source, path) {
            let below = if unknown.below.is_empty() { kind_name(kind_of(given)) } else { &unknown.below };
            let valid = match unknown.valid.as_slice() {
                [] => format!("{below} has no fields of its own"),
                names => format!("{below} has {}", names.join(", ")),
            };
            let message = format!("'{}' is not a field: {valid}", unknown.path);
            violations.push(Violation { path: "update_mask".into(), message });
        }
    }
    if !violations.is_empty() {
        return Err(Refusal::Invalid(violations));
    }
    let mut whole = DynamicMessage::new(resource);
    whole.set_field(&field, Value::Message(target));
    whole.transcode_to::<v1::Resource>().map(|resource| resource.spec).map_err(|e| unreadable(&e))
}

/// The apply set of the resources that a store started with. The first apply of such a resource takes it over.
pub(crate) const BOOTSTRAP_SET: &str = "bootstrap";

/// The edits of an apply: every resource given, marked with its set, and the deletion of what the set had besides. What
/// belongs to another set is refused unless it is to be taken over: two sets would overwrite each other in turn.
pub(crate) fn apply_edits(
    state: &State,
    given: &[v1::Resource],
    set: &str,
    prune: bool,
    take_over: bool,
) -> Result<Vec<Edit>, Refusal> {
    let keys: std::collections::BTreeSet<Key> =
        given.iter().map(|resource| Key::new(kind_of(resource), &resource.name)).collect();
    if !take_over {
        let owner = |key: &Key| state.get(key).map_or("", |stored| stored.wire.apply_set.as_str());
        let owned = keys.iter().map(|key| (key, owner(key)));
        let others = owned.filter(|(_, owner)| !["", set, BOOTSTRAP_SET].contains(owner));
        let conflicts: Vec<(Key, String)> =
            others.map(|(key, owner)| (key.clone(), owner.to_owned())).collect();
        if !conflicts.is_empty() {
            return Err(Refusal::OtherSets { conflicts, set: set.to_owned() });
        }
    }
    let put = |resource: &v1::Resource| {
        Edit::Put(Box::new(v1::Resource { apply_set: set.to_owned(), ..resource.clone() }))
    };
    let mut edits: Vec<Edit> = given.iter().map(put).collect();
    if prune {
        let gone = state
            .resources
            .iter()
            .filter(|(key, stored)| stored.wire.apply_set == set && !keys.contains(*key))
            .map(|(key, _)| Edit::Delete(key.clone()));
        edits.extend(gone);
    }
    Ok(edits)
}
