//! Messages read by their descriptors: one mechanism serves field masks, differences and the canonical encoding, for
//! every kind of resource and every field to come.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value};

pub(crate) mod diff;
pub(crate) mod mask;

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(weir_proto::FILE_DESCRIPTOR_SET)
        .expect("the descriptors were encoded by the build of weir-proto")
});

/// The bytes are not a message of that type.
#[derive(Debug, thiserror::Error)]
#[error("a message of type {0} cannot be read")]
pub(crate) struct Malformed(String);

/// The type of a message of weir-proto, by its full name.
pub(crate) fn descriptor(message: &str) -> MessageDescriptor {
    POOL.get_message_by_name(message).expect("callers name messages of weir-proto")
}

/// Reads the wire form of a message type.
pub(crate) fn decode(message: &str, bytes: &[u8]) -> Result<DynamicMessage, Malformed> {
    DynamicMessage::decode(descriptor(message), bytes).map_err(|_| Malformed(message.to_owned()))
}

/// The fields of a generated message.
pub(crate) fn reflect(message: &str, value: &impl prost::Message) -> Result<DynamicMessage, Malformed> {
    decode(message, &value.encode_to_vec())
}

/// The fields of a message type in the order of their numbers.
fn fields_of(message: &MessageDescriptor) -> Vec<FieldDescriptor> {
    let mut fields: Vec<FieldDescriptor> = message.fields().collect();
    fields.sort_unstable_by_key(FieldDescriptor::number);
    fields
}

/// The message type below a field, where a path may go on. Durations and times are leaves.
fn inner(field: &FieldDescriptor) -> Option<MessageDescriptor> {
    match field.kind() {
        Kind::Message(inner) if !field.is_list() && !field.is_map() && !is_well_known(&inner) => Some(inner),
        _ => None,
    }
}

fn is_well_known(message: &MessageDescriptor) -> bool {
    message.full_name().starts_with("google.protobuf.")
}

/// The canonical encoding of any message: the same content gives the same bytes on every machine. Map entries are in the
/// order of their keys; a generated message has them in the order of a hash map, which differs between processes.
pub(crate) fn canonical(message: &str, value: &impl prost::Message) -> Result<Vec<u8>, Malformed> {
    let mut out = Vec::new();
    encode(&reflect(message, value)?, &mut out);
    Ok(out)
}

fn encode(message: &DynamicMessage, out: &mut Vec<u8>) {
    for (field, value) in message.fields() {
        match value {
            Value::Message(inner) => encode_inner(field.number(), inner, out),
            Value::List(items) if matches!(field.kind(), Kind::Message(_)) => {
                items.iter().filter_map(Value::as_message).for_each(|item| {
                    encode_inner(field.number(), item, out);
                });
            }
            Value::Map(entries) => {
                let Kind::Message(entry) = field.kind() else { continue };
                let sorted: BTreeMap<_, _> = entries.iter().collect();
                for (key, value) in sorted {
                    let mut pair = DynamicMessage::new(entry.clone());
                    pair.set_field(&entry.map_entry_key_field(), key.clone().into());
                    pair.set_field(&entry.map_entry_value_field(), value.clone());
                    encode_inner(field.number(), &pair, out);
                }
            }
            leaf => {
                let mut alone = DynamicMessage::new(field.parent_message().clone());
                alone.set_field(&field, leaf.clone());
                out.extend(alone.encode_to_vec());
            }
        }
    }
}

fn encode_inner(number: u32, message: &DynamicMessage, out: &mut Vec<u8>) {
    let mut body = Vec::new();
    encode(message, &mut body);
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(body.len() as u64, out);
    out.extend(body);
}

#[cfg(test)]
mod tests;
