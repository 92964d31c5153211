//! Field masks: which fields of a message an update changes.

use super::{Field, Kind, Tree, Value, fields_of, json::is_well_known};

/// A path that is not a field.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnknownPath {
    /// As given.
    pub(crate) path: String,
    /// The longest part of it that is right.
    pub(crate) below: String,
    /// The fields that could follow.
    pub(crate) valid: Vec<String>,
}

/// Every path of the fields that are set, down to values, lists and maps.
pub(crate) fn populated(message: &str, tree: &Tree) -> Vec<String> {
    let mut out = Vec::new();
    for field in fields_of(message) {
        match (inner(field), tree.0.get(&field.number)) {
            (Some(target), Some(Value::Message(tree))) if !tree.0.is_empty() => {
                out.extend(populated(target, tree).into_iter().map(|path| format!("{}.{path}", field.name)));
            }
            (_, Some(_)) => out.push(field.name.clone()),
            (_, None) => {}
        }
    }
    out
}

/// Sets the field at a path of `target` to what `source` has there; nothing there clears it.
pub(crate) fn assign(message: &str, target: &mut Tree, source: &Tree, path: &str) -> Result<(), UnknownPath> {
    let steps: Vec<&str> = path.split('.').collect();
    step(message, Some(target), Some(source), &steps, 0)
}

fn step(
    message: &str,
    target: Option<&mut Tree>,
    source: Option<&Tree>,
    steps: &[&str],
    at: usize,
) -> Result<(), UnknownPath> {
    let unknown = || UnknownPath {
        path: steps.join("."),
        below: steps[..at].join("."),
        valid: fields_of(message).iter().map(|field| field.name.clone()).collect(),
    };
    let field = fields_of(message).iter().find(|field| field.name == steps[at]).ok_or_else(unknown)?;
    let value = source.and_then(|tree| tree.0.get(&field.number));
    let Some(target) = target else { return Ok(()) };
    if at + 1 == steps.len() {
        match value {
            Some(value) => target.0.insert(field.number, value.clone()),
            None => target.0.remove(&field.number),
        };
        return Ok(());
    }
    let Some(inner) = inner(field) else {
        return Err(UnknownPath { path: steps.join("."), below: steps[..=at].join("."), valid: Vec::new() });
    };
    let source = match value {
        Some(Value::Message(tree)) => Some(tree),
        _ => None,
    };
    let slot = target.0.entry(field.number).or_insert_with(|| Value::Message(Tree::default()));
    let below = match slot {
        Value::Message(tree) => Some(tree),
        _ => None,
    };
    step(inner, below, source, steps, at + 1)?;
    // Clearing a field of a message that was not there must not leave an empty one behind.
    if source.is_none() && matches!(slot, Value::Message(tree) if tree.0.is_empty()) {
        target.0.remove(&field.number);
    }
    Ok(())
}

/// The message type below a field, where a path may go on.
fn inner(field: &Field) -> Option<&str> {
    match &field.kind {
        Kind::Message(target) if !field.repeated && !is_well_known(target) => Some(target),
        _ => None,
    }
}
