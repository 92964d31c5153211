//! The resources as a reference for people who write YAML: every kind, field and value with its comment, read from the
//! descriptors, so that it cannot differ from the contract.
//!
//! The comment of a field ends with [`Facts`], each a sentence of its own: a bound (`1 to 16.`, `At most 24h.`,
//! `At least 1s, at most 24h.`), and `Required.`, `Default 30s.`, or in words what the absence of a field means
//! (`Absent: the input price.`, `Empty: all.`). They are written as YAML takes them, and `proto/tests/reference.rs` asks
//! the judge of resources whether each of them is so.

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};

use crate::resource::{KINDS, kind_name};

// Field numbers of descriptor.proto: the steps of a path into a file's source information.
const FILE_MESSAGE: i32 = 4;
const FILE_ENUM: i32 = 5;
const MESSAGE_FIELD: i32 = 2;
const ENUM_VALUE: i32 = 2;

/// The descriptors cannot be read; never so in a build that passes its tests.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// They are no descriptors.
    #[error("the contract cannot be read: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A message or enum is not in them.
    #[error("the contract has no {0}")]
    Missing(String),
}

/// A kind of resources.
#[derive(Debug, Clone)]
pub struct Kind {
    /// Its name in YAML.
    pub name: &'static str,
    /// Its spec, with what the kind is for as comment.
    pub spec: Message,
}

/// A group of fields: the spec of a kind or a part of one.
#[derive(Debug, Clone)]
pub struct Message {
    /// Its name in the contract.
    pub name: String,
    /// What it is for.
    pub comment: String,
    /// Its fields, in the order of the contract.
    pub fields: Vec<Field>,
}

/// A field.
#[derive(Debug, Clone)]
pub struct Field {
    /// Its name in YAML.
    pub name: String,
    /// The whole comment, in the lines of the contract.
    pub comment: String,
    /// The comment without the facts, in one line.
    pub meaning: String,
    /// What the comment says of bounds and absence.
    pub facts: Facts,
    /// Whether it holds a list of such values.
    pub list: bool,
    /// Its values.
    pub value: Value,
}

/// Bounds of a field and the meaning of its absence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// It must be set.
    pub required: bool,
    /// What its absence means: a value, or words.
    pub default: Option<String>,
    /// Its bounds, such as `1 to 16` or `at most 24h`.
    pub bounds: Option<String>,
}

/// The values of a field.
#[derive(Debug, Clone)]
pub enum Value {
    /// Text.
    Text,
    /// `true` or `false`.
    Boolean,
    /// A number without a fraction.
    WholeNumber,
    /// A number.
    Number,
    /// A duration with a unit.
    Duration,
    /// A point in time.
    Time,
    /// Bytes as hexadecimal digits.
    Hex,
    /// Names with a text each.
    Map,
    /// One of some words.
    Enumeration(Enumeration),
    /// Fields of its own.
    Message(Message),
}

/// A set of words.
#[derive(Debug, Clone)]
pub struct Enumeration {
    /// Its name in the contract.
    pub name: String,
    /// What is chosen.
    pub comment: String,
    /// The words that YAML takes, with their comments.
    pub values: Vec<(String, String)>,
}

/// Every kind, in the order in which they are applied.
///
/// # Errors
/// When the descriptors of this build are broken.
pub fn kinds() -> Result<Vec<Kind>, Unreadable> {
    let files = Files(FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET)?);
    let kind = |kind| {
        let name = kind_name(kind);
        let camel: String = name.split('_').map(capital).collect();
        Ok(Kind { name, spec: files.message(&format!(".weir.v1.{camel}Spec"))? })
    };
    KINDS.into_iter().map(kind).collect()
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + chars.as_str())
}

/// The files of the contract.
struct Files(FileDescriptorSet);

impl Files {
    /// A message of the top level of a file, by its full name.
    fn message(&self, name: &str) -> Result<Message, Unreadable> {
        let (file, i, message) = self.find(name, |file| &file.message_type, |message| message.name())?;
        let path = [FILE_MESSAGE, i];
        let fields = message.field.iter().zip(0..);
        let fields = fields.map(|(field, k)| {
            let comment = comment(file, &[path[0], path[1], MESSAGE_FIELD, k]);
            self.field(message, field, comment)
        });
        Ok(Message {
            name: message.name().to_owned(),
            comment: comment(file, &path),
            fields: fields.collect::<Result<_, _>>()?,
        })
    }

    fn enumeration(&self, name: &str) -> Result<Enumeration, Unreadable> {
        let (file, i, found) = self.find(name, |file| &file.enum_type, |found| found.name())?;
        let values = found.value.iter().zip(0..).filter(|(value, _)| value.number() != 0);
        // The rules of the contract: every value begins with the name of its enum, and zero is no value of YAML.
        let prefix = found.value.iter().find(|value| value.number() == 0).map(|zero| zero.name());
        let prefix = prefix.and_then(|zero| zero.strip_suffix("UNSPECIFIED")).unwrap_or_default();
        let values = values.map(|(value, k)| {
            let word = value.name().strip_prefix(prefix).unwrap_or(value.name()).to_ascii_lowercase();
            (word, comment(file, &[FILE_ENUM, i, ENUM_VALUE, k]))
        });
        Ok(Enumeration {
            name: found.name().to_owned(),
            comment: comment(file, &[FILE_ENUM, i]),
            values: values.collect(),
        })
    }

    /// What has this full name in one of the lists of a file, and its index there.
    fn find<T: 'static>(
        &self,
        name: &str,
        list: impl Fn(&FileDescriptorProto) -> &Vec<T>,
        name_of: impl Fn(&T) -> &str,
    ) -> Result<(&FileDescriptorProto, i32, &T), Unreadable> {
        let found = self.0.file.iter().find_map(|file| {
            let local = name.strip_prefix('.')?.strip_prefix(file.package())?.strip_prefix('.')?;
            let (i, found) = (0..).zip(list(file)).find(|(_, one)| name_of(one) == local)?;
            Some((file, i, found))
        });
        found.ok_or_else(|| Unreadable::Missing(name.to_owned()))
    }

    fn field(
        &self,
        of: &DescriptorProto,
        field: &FieldDescriptorProto,
        comment: String,
    ) -> Result<Field, Unreadable> {
        let (meaning, mut facts) = split(&comment);
        let value = self.value(of, field)?;
        if matches!(value, Value::Boolean) && facts.default.is_none() {
            facts.default = Some("false".to_owned());
        }
        let list = field.label() == Label::Repeated && !matches!(value, Value::Map);
        Ok(Field { name: field.name().to_owned(), comment, meaning, facts, list, value })
    }

    fn value(&self, of: &DescriptorProto, field: &FieldDescriptorProto) -> Result<Value, Unreadable> {
        let name = field.type_name();
        Ok(match field.r#type() {
            Type::Message if name == ".google.protobuf.Duration" => Value::Duration,
            Type::Message if name == ".google.protobuf.Timestamp" => Value::Time,
            Type::Message if is_entry_of_a_map(of, name) => Value::Map,
            Type::Message => Value::Message(self.message(name)?),
            Type::Enum => Value::Enumeration(self.enumeration(name)?),
            Type::Bool => Value::Boolean,
            Type::String => Value::Text,
            Type::Bytes => Value::Hex,
            Type::Double | Type::Float => Value::Number,
            _ => Value::WholeNumber,
        })
    }
}

/// Whether a type is what the compiler makes of a `map` inside a message.
fn is_entry_of_a_map(message: &DescriptorProto, name: &str) -> bool {
    let local = name.rsplit('.').next();
    let mut entries =
        message.nested_type.iter().filter(|nested| nested.options.as_ref().is_some_and(|o| o.map_entry()));
    entries.any(|nested| Some(nested.name()) == local)
}

/// The comment above something, by its path in the file, without the marks of comments.
fn comment(file: &FileDescriptorProto, path: &[i32]) -> String {
    let info = file.source_code_info.as_ref();
    let location = info.and_then(|info| info.location.iter().find(|location| location.path == path));
    let text = location.map(|location| location.leading_comments().trim()).unwrap_or_default();
    text.lines().map(str::trim).collect::<Vec<_>>().join("\n")
}

/// Separates the meaning of a field from the facts.
fn split(comment: &str) -> (String, Facts) {
    let line = comment.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut facts = Facts::default();
    let mut meaning = Vec::new();
    for sentence in line.split_inclusive(". ") {
        let said = sentence.trim_end().trim_end_matches('.');
        match said.split_once(' ') {
            None if said == "Required" => facts.required = true,
            Some(("Default" | "Absent:" | "Empty:", value)) => facts.default = Some(value.to_owned()),
            Some(_) if is_bound(said) => {
                facts.bounds = Some(said.replacen("At ", "at ", 1));
            }
            _ => meaning.push(sentence.trim_end()),
        }
    }
    (meaning.join(" "), facts)
}

/// Whether a sentence is a bound: `1 to 16`, `1 to 128 bytes`, `At most 24h`, `At least 1s, at most 24h`.
fn is_bound(sentence: &str) -> bool {
    let number = |word: &str| word.starts_with(|c: char| c.is_ascii_digit());
    match sentence.split(' ').collect::<Vec<_>>().as_slice() {
        [low, "to", high] | [low, "to", high, "bytes"] => number(low) && number(high),
        ["At", "most" | "least", bound] | ["At", "most", bound, "bytes"] => number(bound),
        ["At", "least", low, "at", "most", high] => number(low) && number(high),
        _ => false,
    }
}

impl Field {
    /// The field of a message by its name.
    pub fn of<'a>(message: &'a Message, name: &str) -> Option<&'a Self> {
        message.fields.iter().find(|field| field.name == name)
    }

    /// What may be written here, in few words.
    pub fn type_name(&self) -> String {
        let name = match &self.value {
            Value::Text => "text",
            Value::Boolean => "true or false",
            Value::WholeNumber => "whole number",
            Value::Number => "number",
            Value::Duration => "duration, such as 250ms or 30s",
            Value::Time => "time, RFC 3339",
            Value::Hex => "hex digits",
            Value::Map => "map",
            Value::Enumeration(enumeration) => return one_of(enumeration),
            Value::Message(message) => &message.name,
        };
        if self.list { format!("list of {name}") } else { name.to_owned() }
    }
}

fn one_of(enumeration: &Enumeration) -> String {
    let words: Vec<&str> = enumeration.values.iter().map(|(word, _)| word.as_str()).collect();
    format!("one of {}", words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_the_sentences_that_say_nothing_else() {
        let facts = |required, default: &str, bounds: &str| Facts {
            required,
            default: Some(default.to_owned()).filter(|text| !text.is_empty()),
            bounds: Some(bounds.to_owned()).filter(|text| !text.is_empty()),
        };
        for (comment, meaning, expected) in [
            ("A weight. 0 to 10.\nDefault 5.", "A weight.", facts(false, "5", "0 to 10")),
            ("A name. 1 to 128 bytes. Required.", "A name.", facts(true, "", "1 to 128 bytes")),
            (
                "A time. At least 1s, at most 24h. Absent: none, or all.",
                "A time.",
                facts(false, "none, or all", "at least 1s, at most 24h"),
            ),
            ("A path. At most 256 bytes. Default /v1.", "A path.", facts(false, "/v1", "at most 256 bytes")),
            (
                "Zero: never. At most a few of them.",
                "Zero: never. At most a few of them.",
                facts(false, "", ""),
            ),
        ] {
            assert_eq!(split(comment), (meaning.to_owned(), expected), "{comment}");
        }
    }

    #[test]
    fn kinds_fields_and_values_have_the_names_that_yaml_takes() {
        let kinds = kinds().expect("readable");
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name).collect();
        assert_eq!(names, ["pool", "backend", "model", "tenant", "api_key", "limit", "descriptor_rule"]);
        let field = Field::of(&kinds[0].spec, "balancing_policy").expect("there");
        let Value::Enumeration(policy) = &field.value else { panic!("{field:?}") };
        assert_eq!((policy.values.len(), policy.values[4].0.as_str()), (6, "prefix_affinity"));
        assert!(policy.values.iter().all(|(_, comment)| !comment.is_empty()));
        let models = Field::of(&kinds[1].spec, "models").expect("there");
        assert_eq!((models.type_name().as_str(), models.list), ("map", false));
    }
}
