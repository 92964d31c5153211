//! From keys to lines and back, for messages only: the text is read a second time as a tree that keeps its places.

use std::fmt;

use serde::de::{self, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::Spanned;

use super::document::KIND_FIRST;

/// Line and column, from 1.
type Place = (u64, u64);

/// The documents of an input with the places of their keys and values; empty when the text is no YAML at all.
pub(super) struct Tree(Vec<Spanned<Node>>);

enum Node {
    Scalar,
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl Tree {
    pub(super) fn read(text: &str) -> Self {
        let entries = serde_saphyr::from_multiple_with_options::<Spanned<Node>>(text, super::options())
            .unwrap_or_default();
        Self(
            entries
                .into_iter()
                .flat_map(|entry| match entry.value {
                    Node::List(documents) => documents,
                    Node::Scalar | Node::Map(_) => vec![entry],
                })
                .collect(),
        )
    }

    /// The line of a key in the document at `index`, or of the nearest key above it that is there.
    pub(super) fn line_of(&self, index: usize, path: &str) -> Option<u64> {
        let mut node = self.0.get(index)?;
        let mut line = node.referenced.line();
        for segment in segments(path) {
            let next = match &node.value {
                Node::Scalar => None,
                Node::List(items) => {
                    let item = segment.parse().ok().and_then(|i: usize| items.get(i));
                    item.map(|item| (item.referenced.line(), item))
                }
                Node::Map(fields) => fields
                    .iter()
                    .find(|(key, _)| key.value == segment)
                    .map(|(key, value)| (key.referenced.line(), value)),
            };
            let Some((at, child)) = next else { break };
            (line, node) = (at, child);
        }
        Some(line)
    }

    /// The path of the last key or item that starts at or before a place.
    pub(super) fn path_at(&self, at: Place) -> Option<String> {
        let document = self.0.iter().rev().find(|d| place(d) <= at)?;
        let mut path = String::new();
        let mut node = document;
        loop {
            let next = match &node.value {
                Node::Scalar => None,
                Node::List(items) => {
                    let found = items.iter().enumerate().rev().find(|(_, item)| place(item) <= at);
                    found.map(|(i, item)| (format!("[{i}]"), item))
                }
                Node::Map(fields) => {
                    let found = fields.iter().rev().find(|(key, _)| place(key) <= at);
                    found.map(|(key, value)| (key_segment(&path, &key.value), value))
                }
            };
            let Some((segment, child)) = next else { break };
            path.push_str(&segment);
            node = child;
        }
        (!path.is_empty()).then_some(path)
    }
}

/// A key as a part of a path: with a dot of its own it goes into brackets, as the judge writes it.
fn key_segment(path: &str, key: &str) -> String {
    if key.contains(['.', '[']) {
        format!("[{key}]")
    } else if path.is_empty() {
        key.to_owned()
    } else {
        format!(".{key}")
    }
}

/// The parts of a path such as `spec.models[gpt-4.1]`.
fn segments(path: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = path;
    while !rest.is_empty() {
        if let Some(inner) = rest.strip_prefix('[') {
            let end = inner.find(']').unwrap_or(inner.len());
            out.push(&inner[..end]);
            rest = inner.get(end + 1..).unwrap_or_default();
        } else {
            let inner = rest.strip_prefix('.').unwrap_or(rest);
            let end = inner.find(['.', '[']).unwrap_or(inner.len());
            out.push(&inner[..end]);
            rest = &inner[end..];
        }
    }
    out
}

fn place<T>(spanned: &Spanned<T>) -> Place {
    (spanned.referenced.line(), spanned.referenced.column())
}

/// What stopped the reader. The whole document is meant when a key is missing: there is no place to point at.
pub(super) fn fault_of(error: &serde_saphyr::Error) -> super::Fault {
    use serde_saphyr::Error as E;
    let error = error.without_snippet();
    let message = match error {
        E::InvalidScalar { ty: "u32" | "u64", .. } => "must be a whole number, zero or above".to_owned(),
        E::InvalidScalar { ty: "f64", .. } => "must be a number".to_owned(),
        E::InvalidBooleanStrict { .. } => "must be true or false".to_owned(),
        E::SerdeMissingField { field, .. } => format!("{field} is missing"),
        E::SerdeUnknownField { expected, .. } => {
            format!("is not a known key; there are {}", expected.join(", "))
        }
        E::DuplicateMappingKey { key, .. } => {
            format!("{} is there twice", key.as_deref().unwrap_or("a key"))
        }
        E::Budget { breach: serde_saphyr::budget::BudgetBreach::Documents { .. }, .. } => {
            super::too_many_documents()
        }
        other => without_place(other.to_string()),
    };
    super::Fault {
        at: error.location().map(|l| (l.line(), l.column())),
        keyed: !matches!(error, E::SerdeMissingField { .. } | E::Budget { .. }) && message != KIND_FIRST,
        message,
    }
}

/// The reader ends its messages with the place, which is said elsewhere.
fn without_place(message: String) -> String {
    let digits = |place: &str| place.bytes().all(|b| b.is_ascii_digit() || b" ,column".contains(&b));
    match message.rsplit_once(" at line ") {
        Some((text, place)) if digits(place) => text.to_owned(),
        _ => message,
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_i128<E: de::Error>(self, _: i128) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_u128<E: de::Error>(self, _: u128) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_bytes<E: de::Error>(self, _: &[u8]) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_none<E: de::Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Node::Map(fields))
    }
}
