//! One document: kind, name, spec and, when printed on request, status.

use std::fmt;

use serde::de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_saphyr::Spanned;

use super::mirror::Mirror;
use super::scalar::Timestamp;
use super::spec::{ApiKey, Backend, DescriptorRule, Limit, Model, Pool, Tenant};
use crate::resource::{KINDS, kind_name};
use crate::v1;

/// What stands between two `---`: a document or a list of them.
pub(super) enum Entry {
    One(u64, Box<Document>),
    Many(Vec<(u64, Document)>),
}

impl Entry {
    pub(super) fn into_documents(self) -> Vec<(u64, Document)> {
        match self {
            Self::One(line, document) => vec![(line, *document)],
            Self::Many(documents) => documents,
        }
    }
}

/// A document as it is read and written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Document {
    kind: &'static str,
    name: String,
    spec: Spec,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    /// The line of the name, from 1; zero when it was not read.
    #[serde(skip)]
    line: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
enum Spec {
    // A resource without a spec has no place in a file; written as an empty one of no kind.
    None {},
    Pool(Pool),
    Backend(Backend),
    Model(Model),
    Tenant(Tenant),
    ApiKey(ApiKey),
    Limit(Limit),
    DescriptorRule(DescriptorRule),
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Status {
    etag: String,
    revision: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    apply_set: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    create_time: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    update_time: Option<Timestamp>,
}

impl Document {
    pub(super) fn of(resource: &v1::Resource) -> Self {
        use v1::resource::Spec as Wire;
        let spec = match &resource.spec {
            None => Spec::None {},
            Some(Wire::Pool(s)) => Spec::Pool(Mirror::from_wire(s)),
            Some(Wire::Backend(s)) => Spec::Backend(Mirror::from_wire(s)),
            Some(Wire::Model(s)) => Spec::Model(Mirror::from_wire(s)),
            Some(Wire::Tenant(s)) => Spec::Tenant(Mirror::from_wire(s)),
            Some(Wire::ApiKey(s)) => Spec::ApiKey(Mirror::from_wire(s)),
            Some(Wire::Limit(s)) => Spec::Limit(Mirror::from_wire(s)),
            Some(Wire::DescriptorRule(s)) => Spec::DescriptorRule(Mirror::from_wire(s)),
        };
        let kind = kind_name(crate::resource::kind_of(resource));
        Self { kind, name: resource.name.clone(), spec, status: None, line: 0 }
    }

    pub(super) fn with_status(resource: &v1::Resource) -> Self {
        let status = Status {
            etag: resource.etag.clone(),
            revision: resource.revision,
            apply_set: resource.apply_set.clone(),
            create_time: Mirror::from_wire(&resource.create_time),
            update_time: Mirror::from_wire(&resource.update_time),
        };
        Self { status: Some(status), ..Self::of(resource) }
    }
}

impl From<Document> for v1::Resource {
    fn from(document: Document) -> Self {
        use v1::resource::Spec as Wire;
        let spec = match document.spec {
            Spec::None {} => None,
            Spec::Pool(s) => Some(Wire::Pool(s.into_wire())),
            Spec::Backend(s) => Some(Wire::Backend(s.into_wire())),
            Spec::Model(s) => Some(Wire::Model(s.into_wire())),
            Spec::Tenant(s) => Some(Wire::Tenant(s.into_wire())),
            Spec::ApiKey(s) => Some(Wire::ApiKey(s.into_wire())),
            Spec::Limit(s) => Some(Wire::Limit(s.into_wire())),
            Spec::DescriptorRule(s) => Some(Wire::DescriptorRule(s.into_wire())),
        };
        Self { name: document.name, spec, ..Default::default() }
    }
}

/// The kind of a document, as a key's value.
#[derive(Clone, Copy)]
struct Kind(v1::ResourceKind);

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        KINDS.into_iter().find(|kind| kind_name(*kind) == text).map(Self).ok_or_else(|| {
            de::Error::custom("must be one of pool, backend, model, tenant, api_key, limit, descriptor_rule")
        })
    }
}

/// What is said of a spec before its kind.
pub(super) const KIND_FIRST: &str = "kind must come before spec";

/// A spec before its kind; never a value, always an error with a place.
struct TooEarly;

impl<'de> Deserialize<'de> for TooEarly {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A seed that fails while a value is read gets the value's place from the reader.
        let _ = Spanned::<IgnoredAny>::deserialize(deserializer)?;
        Err(de::Error::custom(KIND_FIRST))
    }
}

const FIELDS: &[&str] = &["kind", "name", "spec", "status"];

/// The keys of a document; an own type, so that an unknown one is reported at its own place.
#[derive(Deserialize)]
#[serde(field_identifier, rename_all = "lowercase")]
enum Field {
    Kind,
    Name,
    Spec,
    Status,
}

/// Reads the rest of a document from a map. The kind says how the spec is read, so it has to be there before.
fn document<'de, A: MapAccess<'de>>(mut map: A) -> Result<Document, A::Error> {
    let (mut kind, mut name, mut spec) = (None, None, None);
    let mut line = 0;
    while let Some(field) = map.next_key::<Field>()? {
        match (field, kind) {
            (Field::Kind, None) => {
                let value = map.next_value::<Spanned<Kind>>()?;
                line = value.referenced.line();
                kind = Some(value.value.0);
            }
            (Field::Name, _) if name.is_none() => {
                name = Some(map.next_value::<String>()?);
            }
            (Field::Spec, Some(kind)) if spec.is_none() => spec = Some(read_spec(&mut map, kind)?),
            (Field::Spec, None) => {
                map.next_value::<TooEarly>()?;
            }
            (Field::Status, _) => {
                map.next_value::<IgnoredAny>()?;
            }
            (Field::Kind, _) => return Err(de::Error::duplicate_field("kind")),
            (Field::Name, _) => return Err(de::Error::duplicate_field("name")),
            (Field::Spec, _) => return Err(de::Error::duplicate_field("spec")),
        }
    }
    Ok(Document {
        kind: kind_name(kind.ok_or_else(|| de::Error::missing_field("kind"))?),
        name: name.ok_or_else(|| de::Error::missing_field("name"))?,
        spec: spec.ok_or_else(|| de::Error::missing_field("spec"))?,
        status: None,
        line,
    })
}

fn read_spec<'de, A: MapAccess<'de>>(map: &mut A, kind: v1::ResourceKind) -> Result<Spec, A::Error> {
    Ok(match kind {
        v1::ResourceKind::Unspecified => Spec::None {},
        v1::ResourceKind::Pool => Spec::Pool(map.next_value()?),
        v1::ResourceKind::Backend => Spec::Backend(map.next_value()?),
        v1::ResourceKind::Model => Spec::Model(map.next_value()?),
        v1::ResourceKind::Tenant => Spec::Tenant(map.next_value()?),
        v1::ResourceKind::ApiKey => Spec::ApiKey(map.next_value()?),
        v1::ResourceKind::Limit => Spec::Limit(map.next_value()?),
        v1::ResourceKind::DescriptorRule => Spec::DescriptorRule(map.next_value()?),
    })
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DocumentVisitor;
        impl<'de> Visitor<'de> for DocumentVisitor {
            type Value = Document;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a document with kind, name and spec")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Document, A::Error> {
                document(map)
            }
        }
        deserializer.deserialize_struct("Document", FIELDS, DocumentVisitor)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a document with kind, name and spec, or a list of them")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                let document = document(map)?;
                Ok(Entry::One(document.line, Box::new(document)))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Entry, A::Error> {
                let mut documents = Vec::new();
                while let Some(document) = seq.next_element::<Document>()? {
                    documents.push((document.line, document));
                }
                Ok(Entry::Many(documents))
            }
        }
        deserializer.deserialize_any(EntryVisitor)
    }
}
