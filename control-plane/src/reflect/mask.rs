//! Field masks: which fields of a message an update changes.

use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::{fields_of, inner};

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
pub(crate) fn populated(message: &DynamicMessage) -> Vec<String> {
    let mut out = Vec::new();
    for (field, value) in message.fields() {
        match value {
            Value::Message(below) if inner(&field).is_some() && !is_empty(below) => {
                out.extend(populated(below).into_iter().map(|path| format!("{}.{path}", field.name())));
            }
            _ => out.push(field.name().to_owned()),
        }
    }
    out
}

/// Sets the field at a path of `target` to what `source` has there; nothing there clears it.
pub(crate) fn assign(
    target: &mut DynamicMessage,
    source: &DynamicMessage,
    path: &str,
) -> Result<(), UnknownPath> {
    let steps: Vec<&str> = path.split('.').collect();
    assign_step(target, Some(source), &steps, 0)
}

fn assign_step(
    target: &mut DynamicMessage,
    source: Option<&DynamicMessage>,
    steps: &[&str],
    at: usize,
) -> Result<(), UnknownPath> {
    let message = target.descriptor();
    let unknown =
        |below: &[&str], valid| UnknownPath { path: steps.join("."), below: below.join("."), valid };
    let field = message.get_field_by_name(steps[at]).ok_or_else(|| {
        unknown(&steps[..at], fields_of(&message).iter().map(|field| field.name().to_owned()).collect())
    })?;
    let value = source.filter(|source| source.has_field(&field)).map(|source| source.get_field(&field));
    if at + 1 == steps.len() {
        match value {
            Some(value) => target.set_field(&field, value.into_owned()),
            None => target.clear_field(&field),
        }
        return Ok(());
    }
    if inner(&field).is_none() {
        return Err(unknown(&steps[..=at], Vec::new()));
    }
    let source = value.as_deref().and_then(Value::as_message);
    if let Some(below) = target.get_field_mut(&field).as_message_mut() {
        assign_step(below, source, steps, at + 1)?;
        // Clearing a field of a message that was not there must not leave an empty one behind.
        if source.is_none() && is_empty(below) {
            target.clear_field(&field);
        }
    }
    Ok(())
}

fn is_empty(message: &DynamicMessage) -> bool {
    message.fields().next().is_none()
}
