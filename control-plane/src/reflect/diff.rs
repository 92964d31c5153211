//! The differences of two messages and their values as JSON, for people to read.

use std::collections::{BTreeSet, HashMap};

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value};
use serde_json::{Map, Value as Json};

use super::{fields_of, inner};

/// One field that differs: its path, the JSON before and the JSON after; empty where there is none.
pub(crate) type Difference = (String, String, String);

/// Every leaf that differs between two messages of one type.
pub(crate) fn differences(before: &DynamicMessage, after: &DynamicMessage) -> Vec<Difference> {
    let mut out = Vec::new();
    collect("", before, after, &mut out);
    out
}

fn collect(prefix: &str, before: &DynamicMessage, after: &DynamicMessage, out: &mut Vec<Difference>) {
    for field in fields_of(&before.descriptor()) {
        let of = |message: &DynamicMessage| {
            message.has_field(&field).then(|| message.get_field(&field).into_owned())
        };
        let (old, new) = (of(before), of(after));
        if old == new {
            continue;
        }
        let path = format!("{prefix}{}", field.name());
        if field.is_map() {
            collect_entries(&path, &field, old.as_ref(), new.as_ref(), out);
        } else if let Some(inner) = inner(&field) {
            let below = |value: Option<Value>| match value {
                Some(Value::Message(message)) => message,
                _ => DynamicMessage::new(inner.clone()),
            };
            collect(&format!("{path}."), &below(old), &below(new), out);
        } else {
            let text = |value: Option<Value>| {
                value.map(|value| to_json(&value, &field.kind()).to_string()).unwrap_or_default()
            };
            out.push((path, text(old), text(new)));
        }
    }
}

/// Each entry of a map by itself.
fn collect_entries(
    path: &str,
    field: &FieldDescriptor,
    old: Option<&Value>,
    new: Option<&Value>,
    out: &mut Vec<Difference>,
) {
    let Kind::Message(entry) = field.kind() else { return };
    let kind = entry.map_entry_value_field().kind();
    let (old, new) = (old.and_then(Value::as_map), new.and_then(Value::as_map));
    let keys: BTreeSet<&MapKey> = [old, new].into_iter().flatten().flat_map(HashMap::keys).collect();
    for key in keys {
        let text = |map: Option<&HashMap<MapKey, Value>>| {
            map.and_then(|map| map.get(key)).map(|value| to_json(value, &kind).to_string())
        };
        let (old, new) = (text(old), text(new));
        if old != new {
            let path = format!("{path}[{}]", key_text(key));
            out.push((path, old.unwrap_or_default(), new.unwrap_or_default()));
        }
    }
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// Not the canonical JSON of protobuf: names as in the contract, 64-bit numbers as numbers, bytes as hex digits.
fn to_json(value: &Value, kind: &Kind) -> Json {
    match value {
        Value::Bool(value) => Json::from(*value),
        Value::I32(value) => Json::from(*value),
        Value::I64(value) => Json::from(*value),
        Value::U32(value) => Json::from(*value),
        Value::U64(value) => Json::from(*value),
        Value::F32(value) => Json::from(*value),
        Value::F64(value) => Json::from(*value),
        Value::String(text) => Json::from(text.as_str()),
        Value::Bytes(bytes) => Json::from(crate::encoding::hex(bytes)),
        Value::EnumNumber(number) => {
            let name = kind.as_enum().and_then(|kind| kind.get_value(*number));
            name.map_or_else(|| Json::from(*number), |value| Json::from(in_yaml(value.name(), kind)))
        }
        Value::Message(message) => message_json(message),
        Value::List(items) => Json::Array(items.iter().map(|item| to_json(item, kind)).collect()),
        Value::Map(map) => {
            let entry = kind.as_message().map(|entry| entry.map_entry_value_field().kind());
            let value = |value| entry.as_ref().map_or(Json::Null, |kind| to_json(value, kind));
            Json::Object(map.iter().map(|(key, of)| (key_text(key), value(of))).collect())
        }
    }
}

/// The name of an enum's value as in YAML: without the name of the enum, in lower case.
fn in_yaml(name: &str, kind: &Kind) -> String {
    let of = kind.as_enum().map(|of| of.name().to_owned()).unwrap_or_default();
    let mut prefix = String::new();
    for c in of.chars() {
        if c.is_ascii_uppercase() && !prefix.is_empty() {
            prefix.push('_');
        }
        prefix.push(c.to_ascii_uppercase());
    }
    let short = name.strip_prefix(&prefix).and_then(|rest| rest.strip_prefix('_'));
    short.unwrap_or(name).to_ascii_lowercase()
}

fn message_json(message: &DynamicMessage) -> Json {
    let seconds =
        || message.get_field_by_name("seconds").and_then(|value| value.as_i64()).unwrap_or_default();
    let nanos = || message.get_field_by_name("nanos").and_then(|value| value.as_i32()).unwrap_or_default();
    match message.descriptor().full_name() {
        "google.protobuf.Duration" => {
            let nanos = nanos().unsigned_abs();
            let fraction = if nanos == 0 { String::new() } else { format!(".{nanos:09}") };
            Json::from(format!("{}{}s", seconds(), fraction.trim_end_matches('0')))
        }
        "google.protobuf.Timestamp" => {
            let time = jiff::Timestamp::new(seconds(), nanos());
            time.map_or(Json::Null, |time| Json::from(time.to_string()))
        }
        _ => {
            let fields = message.fields();
            Json::Object(
                fields
                    .map(|(f, value)| (f.name().to_owned(), to_json(value, &f.kind())))
                    .collect::<Map<_, _>>(),
            )
        }
    }
}
