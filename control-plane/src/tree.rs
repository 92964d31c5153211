//! Messages as trees of fields, read from their wire form with the compiled descriptors.
//!
//! One mechanism serves field masks, diffs and the canonical encoding, for every kind of resource and every field
//! to come: fields in order of number, map entries in order of key. (A generated struct keeps a map in a hash map,
//! whose encoding differs from one process to the next.)

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use bytes::Buf;
use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorSet};

pub(crate) mod json;
pub(crate) mod mask;

/// Nested deeper than that is not one of ours.
const DEPTH_MAX: usize = 16;

/// A field of a message.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) number: u32,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) repeated: bool,
    /// Repeated entries of key and value.
    pub(crate) map: bool,
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Kind {
    Bool,
    Unsigned,
    Signed,
    Double,
    Text,
    Bytes,
    Enum(String),
    Message(String),
}

/// The fields of one message type, by name of the type without the leading dot.
type Messages = HashMap<String, Vec<Field>>;
/// The values of one enum type.
type Enums = HashMap<String, HashMap<i32, String>>;

#[derive(Debug, Default)]
struct Schema {
    messages: Messages,
    enums: Enums,
}

static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let files = FileDescriptorSet::decode(weir_proto::FILE_DESCRIPTOR_SET)
        .expect("the descriptors were encoded by the build of weir-proto");
    let mut schema = Schema::default();
    for file in &files.file {
        for message in &file.message_type {
            schema.add(file.package(), message);
        }
        for kind in &file.enum_type {
            schema.add_enum(file.package(), kind);
        }
    }
    schema
});

impl Schema {
    fn add(&mut self, scope: &str, message: &DescriptorProto) {
        let name = format!("{scope}.{}", message.name());
        for nested in &message.nested_type {
            self.add(&name, nested);
        }
        for kind in &message.enum_type {
            self.add_enum(&name, kind);
        }
        let entries: Vec<String> = message
            .nested_type
            .iter()
            .filter(|nested| nested.options.as_ref().is_some_and(|options| options.map_entry()))
            .map(|nested| format!(".{name}.{}", nested.name()))
            .collect();
        let fields = message.field.iter().map(|field| {
            let target = field.type_name().trim_start_matches('.').to_owned();
            let kind = match field.r#type() {
                Type::Bool => Kind::Bool,
                Type::Double => Kind::Double,
                Type::String => Kind::Text,
                Type::Bytes => Kind::Bytes,
                Type::Message => Kind::Message(target),
                Type::Enum => Kind::Enum(target),
                Type::Int32 | Type::Int64 => Kind::Signed,
                _ => Kind::Unsigned,
            };
            Field {
                number: u32::try_from(field.number()).unwrap_or_default(),
                name: field.name().to_owned(),
                kind,
                repeated: field.label() == Label::Repeated,
                map: entries.iter().any(|entry| entry == field.type_name()),
            }
        });
        let mut fields: Vec<Field> = fields.collect();
        fields.sort_by_key(|field| field.number);
        self.messages.insert(name, fields);
    }

    fn add_enum(&mut self, scope: &str, kind: &prost_types::EnumDescriptorProto) {
        let values = kind.value.iter().map(|value| (value.number(), value.name().to_owned())).collect();
        self.enums.insert(format!("{scope}.{}", kind.name()), values);
    }
}

/// The fields of a message type.
pub(crate) fn fields_of(message: &str) -> &'static [Field] {
    SCHEMA.messages.get(message).map_or(&[], Vec::as_slice)
}

/// The name of an enum value.
fn enum_name(kind: &str, number: i32) -> Option<&'static str> {
    SCHEMA.enums.get(kind)?.get(&number).map(String::as_str)
}

/// A message: its fields that are there, by number.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Tree(pub(crate) BTreeMap<u32, Value>);

/// The value of a field.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(Vec<u8>),
    Message(Tree),
    List(Vec<Value>),
    /// By the encoded key.
    Map(BTreeMap<Vec<u8>, Tree>),
}

/// The bytes are not a message of that type.
#[derive(Debug, thiserror::Error)]
#[error("a message of type {0} cannot be read")]
pub(crate) struct Malformed(String);

impl Tree {
    /// Reads the wire form of a message type. Unknown fields are left out.
    pub(crate) fn decode(message: &str, bytes: &[u8]) -> Result<Self, Malformed> {
        Self::read(message, bytes, 0).ok_or_else(|| Malformed(message.to_owned()))
    }

    /// The tree of a generated message.
    pub(crate) fn of(message: &str, value: &impl prost::Message) -> Result<Self, Malformed> {
        Self::decode(message, &value.encode_to_vec())
    }

    fn read(message: &str, mut bytes: &[u8], depth: usize) -> Option<Self> {
        if depth > DEPTH_MAX {
            return None;
        }
        let fields = fields_of(message);
        let mut tree = BTreeMap::new();
        while bytes.has_remaining() {
            let (number, wire) = decode_key(&mut bytes).ok()?;
            let raw = read_raw(wire, &mut bytes)?;
            let Some(field) = fields.iter().find(|field| field.number == number) else { continue };
            let value = match (&field.kind, raw) {
                (Kind::Message(target), Value::Bytes(body)) => {
                    Value::Message(Self::read(target, &body, depth + 1)?)
                }
                (_, raw) => raw,
            };
            if field.map {
                let Value::Message(entry) = value else { return None };
                let key = match entry.0.get(&1) {
                    Some(Value::Bytes(key)) => key.clone(),
                    _ => Vec::new(),
                };
                let map = tree.entry(number).or_insert_with(|| Value::Map(BTreeMap::new()));
                if let Value::Map(map) = map {
                    map.insert(key, entry);
                }
            } else if field.repeated {
                let list = tree.entry(number).or_insert_with(|| Value::List(Vec::new()));
                if let Value::List(list) = list {
                    list.push(value);
                }
            } else {
                tree.insert(number, value);
            }
        }
        Some(Self(tree))
    }

    /// The canonical wire form: equal trees give equal bytes, on every machine.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, value) in &self.0 {
            match value {
                Value::List(items) => items.iter().for_each(|item| item.write(*number, &mut out)),
                Value::Map(map) => {
                    map.values().for_each(|entry| write_bytes(*number, &entry.encode(), &mut out));
                }
                single => single.write(*number, &mut out),
            }
        }
        out
    }
}

impl Value {
    fn write(&self, number: u32, out: &mut Vec<u8>) {
        match self {
            Self::Varint(value) => {
                encode_key(number, WireType::Varint, out);
                encode_varint(*value, out);
            }
            Self::Fixed64(value) => {
                encode_key(number, WireType::SixtyFourBit, out);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::Fixed32(value) => {
                encode_key(number, WireType::ThirtyTwoBit, out);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::Bytes(bytes) => write_bytes(number, bytes, out),
            Self::Message(tree) => write_bytes(number, &tree.encode(), out),
            // Neither is ever inside a list.
            Self::List(_) | Self::Map(_) => {}
        }
    }
}

fn write_bytes(number: u32, bytes: &[u8], out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

fn read_raw(wire: WireType, bytes: &mut &[u8]) -> Option<Value> {
    Some(match wire {
        WireType::Varint => Value::Varint(decode_varint(bytes).ok()?),
        WireType::SixtyFourBit => Value::Fixed64(bytes.try_get_u64_le().ok()?),
        WireType::ThirtyTwoBit => Value::Fixed32(bytes.try_get_u32_le().ok()?),
        WireType::LengthDelimited => {
            let length = usize::try_from(decode_varint(bytes).ok()?).ok()?;
            let (body, rest) = bytes.split_at_checked(length)?;
            *bytes = rest;
            Value::Bytes(body.to_vec())
        }
        WireType::StartGroup | WireType::EndGroup => return None,
    })
}

/// The canonical encoding of any message: of the same content the same bytes.
pub(crate) fn canonical(message: &str, value: &impl prost::Message) -> Result<Vec<u8>, Malformed> {
    Tree::of(message, value).map(|tree| tree.encode())
}

#[cfg(test)]
mod tests;
