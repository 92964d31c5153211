//! Values as JSON and the differences of two trees, for people to read.

use std::collections::BTreeSet;

use serde_json::{Map, Value as Json};

use super::{Field, Kind, Tree, Value, enum_name, fields_of};

/// One field that differs: its path, the JSON before and the JSON after; empty where there is none.
pub(crate) type Difference = (String, String, String);

/// Every leaf that differs between two messages of a type.
pub(crate) fn differences(message: &str, before: &Tree, after: &Tree) -> Vec<Difference> {
    let mut out = Vec::new();
    walk(message, "", before, after, &mut out);
    out
}

fn walk(message: &str, prefix: &str, before: &Tree, after: &Tree, out: &mut Vec<Difference>) {
    let empty = Tree::default();
    for field in fields_of(message) {
        let (old, new) = (before.0.get(&field.number), after.0.get(&field.number));
        if old == new {
            continue;
        }
        let path = format!("{prefix}{}", field.name);
        match (&field.kind, old, new) {
            (_, Some(Value::Map(_)), _) | (_, _, Some(Value::Map(_))) => entries(&path, field, old, new, out),
            (Kind::Message(target), _, _) if !field.repeated && !is_well_known(target) => {
                let tree = |value: Option<&Value>| match value {
                    Some(Value::Message(tree)) => tree.clone(),
                    _ => empty.clone(),
                };
                walk(target, &format!("{path}."), &tree(old), &tree(new), out);
            }
            _ => out.push((path, text(field, old), text(field, new))),
        }
    }
}

/// Each entry of a map by itself.
fn entries(path: &str, field: &Field, old: Option<&Value>, new: Option<&Value>, out: &mut Vec<Difference>) {
    let Kind::Message(entry_type) = &field.kind else { return };
    let Some(value_field) = fields_of(entry_type).iter().find(|f| f.number == 2) else { return };
    let keys = [old, new].into_iter().flatten().filter_map(|value| match value {
        Value::Map(map) => Some(map.keys()),
        _ => None,
    });
    let keys: BTreeSet<&Vec<u8>> = keys.flatten().collect();
    for key in keys {
        let side = |value: Option<&Value>| match value {
            Some(Value::Map(map)) => map.get(key).map(|entry| match entry.0.get(&2) {
                Some(value) => to_json(value_field, value).to_string(),
                None => default_json(&value_field.kind).to_string(),
            }),
            _ => None,
        };
        let (old, new) = (side(old), side(new));
        if old != new {
            let path = format!("{path}[{}]", String::from_utf8_lossy(key));
            out.push((path, old.unwrap_or_default(), new.unwrap_or_default()));
        }
    }
}

fn text(field: &Field, value: Option<&Value>) -> String {
    value.map(|value| to_json(field, value).to_string()).unwrap_or_default()
}

/// Durations and times are leaves for masks and differences.
pub(super) fn is_well_known(message: &str) -> bool {
    message.starts_with("google.protobuf.")
}

fn default_json(kind: &Kind) -> Json {
    match kind {
        Kind::Text | Kind::Bytes => Json::from(""),
        Kind::Bool => Json::from(false),
        Kind::Message(_) => Json::Object(Map::new()),
        Kind::Unsigned | Kind::Signed | Kind::Double | Kind::Enum(_) => Json::from(0),
    }
}

fn to_json(field: &Field, value: &Value) -> Json {
    match (value, &field.kind) {
        (Value::List(items), _) => Json::Array(items.iter().map(|item| to_json(field, item)).collect()),
        (Value::Map(map), Kind::Message(entry_type)) => {
            let value_field = fields_of(entry_type).iter().find(|f| f.number == 2);
            let entry = |tree: &Tree| match (value_field, tree.0.get(&2)) {
                (Some(field), Some(value)) => to_json(field, value),
                (Some(field), None) => default_json(&field.kind),
                (None, _) => Json::Null,
            };
            Json::Object(
                map.iter().map(|(k, v)| (String::from_utf8_lossy(k).into_owned(), entry(v))).collect(),
            )
        }
        (Value::Message(tree), Kind::Message(target)) => message_json(target, tree),
        (Value::Varint(number), Kind::Bool) => Json::from(*number != 0),
        (Value::Varint(number), Kind::Signed) => Json::from(number.cast_signed()),
        (Value::Varint(number), Kind::Enum(target)) => {
            let number = i32::try_from(*number).unwrap_or_default();
            enum_name(target, number).map_or_else(|| Json::from(number), Json::from)
        }
        (Value::Varint(number), _) => Json::from(*number),
        (Value::Fixed64(bits), _) => Json::from(f64::from_bits(*bits)),
        (Value::Fixed32(bits), _) => Json::from(*bits),
        (Value::Bytes(bytes), Kind::Bytes) => Json::from(crate::encoding::hex(bytes)),
        (Value::Bytes(bytes), _) => Json::from(String::from_utf8_lossy(bytes)),
        (Value::Map(_) | Value::Message(_), _) => Json::Null,
    }
}

fn message_json(message: &str, tree: &Tree) -> Json {
    let signed = |number: u32| match tree.0.get(&number) {
        Some(Value::Varint(value)) => value.cast_signed(),
        _ => 0,
    };
    match message {
        "google.protobuf.Duration" => {
            let nanos = signed(2).unsigned_abs();
            let fraction = if nanos == 0 { String::new() } else { format!(".{nanos:09}") };
            Json::from(format!("{}{}s", signed(1), fraction.trim_end_matches('0')))
        }
        "google.protobuf.Timestamp" => {
            let nanos = i32::try_from(signed(2)).unwrap_or_default();
            jiff::Timestamp::new(signed(1), nanos).map_or(Json::Null, |time| Json::from(time.to_string()))
        }
        _ => {
            let fields = fields_of(message)
                .iter()
                .filter_map(|field| Some((field.name.clone(), to_json(field, tree.0.get(&field.number)?))));
            Json::Object(fields.collect())
        }
    }
}
