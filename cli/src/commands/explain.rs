//! `explain`: the fields of a kind with their meaning, taken from the contract itself.

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use weir_proto::resource::kind_name;

use crate::args::Kind;
use crate::error::Error;
use crate::output::Io;

// Field numbers of descriptor.proto: the steps of a path into a file's source information.
const FILE_MESSAGE: i32 = 4;
const MESSAGE_FIELD: i32 = 2;
const MESSAGE_NESTED: i32 = 3;

/// A message type and where it is.
#[derive(Clone)]
struct Found<'a> {
    file: &'a FileDescriptorProto,
    message: &'a DescriptorProto,
    path: Vec<i32>,
}

/// Explains a kind, or the field at a path below its spec.
pub(super) fn explain(io: &mut Io<'_>, what: &str) -> Result<(), Error> {
    let (kind, path) = what.split_once('.').unwrap_or((what, ""));
    let Kind(kind) = kind.parse().map_err(Error::Setting)?;
    let files = FileDescriptorSet::decode(weir_proto::FILE_DESCRIPTOR_SET)
        .map_err(|e| Error::Setting(format!("the contract cannot be read: {e}")))?;
    let camel: String = kind_name(kind).split('_').map(capital).collect();
    let unknown = |at: &str, found: &Found<'_>| {
        let fields: Vec<&str> = found.message.field.iter().map(|f| f.name()).collect();
        Error::Setting(format!("'{at}' is not a field; there are {}", fields.join(", ")))
    };
    let missing = || Error::Setting(format!("the contract has no {what}"));
    let mut found = message(&files, &format!(".weir.v1.{camel}Spec")).ok_or_else(missing)?;
    let mut text = format!("{}\n{}\n", kind_name(kind), comment(&found.clone(), None, "  "));
    let mut at = String::new();
    for step in path.split('.').filter(|step| !step.is_empty()) {
        let (i, field) = found
            .message
            .field
            .iter()
            .enumerate()
            .find(|(_, f)| f.name() == step)
            .ok_or_else(|| unknown(step, &found))?;
        at = format!("{at}.{step}");
        text =
            format!("{}{at}  <{}>\n{}\n", kind_name(kind), type_name(field), comment(&found, Some(i), "  "));
        match message(&files, field.type_name()) {
            Some(inner) => found = inner,
            None => {
                io.out.write_all(text.as_bytes())?;
                return Ok(());
            }
        }
    }
    if !found.message.options.as_ref().is_some_and(|o| o.map_entry()) {
        text.push_str("\nFields:\n");
        for (i, field) in found.message.field.iter().enumerate() {
            text.push_str(&format!("  {}  <{}>\n", field.name(), type_name(field)));
            text.push_str(&format!("{}\n", comment(&found, Some(i), "      ")));
        }
    }
    Ok(io.out.write_all(text.as_bytes())?)
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + chars.as_str())
}

fn message<'a>(files: &'a FileDescriptorSet, name: &str) -> Option<Found<'a>> {
    // Durations and times are values for people.
    if name.starts_with(".google.") {
        return None;
    }
    files.file.iter().find_map(|file| {
        let scope = format!(".{}", file.package());
        file.message_type.iter().enumerate().find_map(|(i, message)| {
            let path = vec![FILE_MESSAGE, i32::try_from(i).ok()?];
            within(Found { file, message, path }, &scope, name)
        })
    })
}

fn within<'a>(found: Found<'a>, scope: &str, name: &str) -> Option<Found<'a>> {
    let full = format!("{scope}.{}", found.message.name());
    if full == name {
        return Some(found);
    }
    found.message.nested_type.iter().enumerate().find_map(|(i, message)| {
        let mut path = found.path.clone();
        path.extend([MESSAGE_NESTED, i32::try_from(i).ok()?]);
        within(Found { file: found.file, message, path }, &full, name)
    })
}

/// The comment above a message or one of its fields, indented.
fn comment(found: &Found<'_>, field: Option<usize>, indent: &str) -> String {
    let mut path = found.path.clone();
    if let Some(i) = field {
        path.extend([MESSAGE_FIELD, i32::try_from(i).unwrap_or(i32::MAX)]);
    }
    let info = found.file.source_code_info.as_ref();
    let location = info.and_then(|info| info.location.iter().find(|location| location.path == path));
    let text = location.map(|location| location.leading_comments().trim().to_owned()).unwrap_or_default();
    let lines = text.lines().map(|line| format!("{indent}{}", line.trim()));
    lines.collect::<Vec<_>>().join("\n")
}

fn type_name(field: &FieldDescriptorProto) -> String {
    let name = match field.r#type() {
        Type::Message | Type::Enum => match field.type_name() {
            ".google.protobuf.Duration" => "duration, such as 250ms or 30s".to_owned(),
            ".google.protobuf.Timestamp" => "time, RFC 3339".to_owned(),
            other => other.rsplit('.').next().unwrap_or_default().to_owned(),
        },
        Type::Bool => "true or false".to_owned(),
        Type::String => "text".to_owned(),
        Type::Bytes => "hex digits".to_owned(),
        Type::Double | Type::Float => "number".to_owned(),
        _ => "whole number".to_owned(),
    };
    if field.label() != Label::Repeated {
        return name;
    }
    if name.ends_with("Entry") { "map".to_owned() } else { format!("list of {name}") }
}
