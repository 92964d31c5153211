//! `explain`: kinds of resources, their fields and values, taken from the contract itself: for a terminal, and all of them as
//! the page `docs/resources.md`.

mod document;
mod example;

use weir_proto::reference::{self, Enumeration, Field, Kind, Message, Value};
use weir_proto::resource::kind_name;

use crate::args;
use crate::error::Error;
use crate::output::Io;

/// Explains a kind, or the field at a path below its spec; without either lists the kinds.
pub(super) fn explain(io: &mut Io<'_>, what: Option<&str>, markdown: bool) -> Result<(), Error> {
    let kinds = reference::kinds().map_err(|error| Error::Setting(error.to_string()))?;
    let text = match (what, markdown) {
        (_, true) => document::document(&kinds),
        (None, false) => list(&kinds),
        (Some(what), false) => one(&kinds, what)?,
    };
    Ok(io.out.write_all(text.as_bytes())?)
}

/// The kinds, and how to go on.
fn list(kinds: &[Kind]) -> String {
    let width = kinds.iter().map(|kind| kind.name.len()).max().unwrap_or_default();
    let line = |kind: &Kind| format!("  {:width$}  {}\n", kind.name, first_sentence(&kind.spec.comment));
    let lines: String = kinds.iter().map(line).collect();
    format!(
        "The kinds of resources, in the order in which they are applied:\n{lines}\n\
         weir explain KIND         the fields of a kind, and an example\n\
         weir explain KIND.FIELD   one field and its values, such as pool.timeouts or pool.balancing_policy\n\
         weir explain --markdown   all of it as one page, with a complete configuration\n"
    )
}

fn first_sentence(comment: &str) -> String {
    let line = comment.split_whitespace().collect::<Vec<_>>().join(" ");
    line.split_once(". ").map_or(line.clone(), |(first, _)| format!("{first}."))
}

fn one(kinds: &[Kind], what: &str) -> Result<String, Error> {
    let (kind, path) = what.split_once('.').unwrap_or((what, ""));
    let args::Kind(kind) = kind.parse().map_err(Error::Setting)?;
    let missing = || Error::Setting(format!("the contract has no {}", kind_name(kind)));
    let kind = kinds.iter().find(|known| known.name == kind_name(kind)).ok_or_else(missing)?;
    let mut at = kind.name.to_owned();
    let mut message = Some(&kind.spec);
    let mut field = None;
    for step in path.split('.').filter(|step| !step.is_empty()) {
        let inside = message.ok_or_else(|| Error::Setting(format!("{at} has no fields")))?;
        let found = Field::of(inside, step).ok_or_else(|| unknown(&at, step, inside))?;
        at = format!("{at}.{step}");
        message = inner(found);
        field = Some(found);
    }
    Ok(match field {
        None => {
            let example = indented(&example::of(kind.name), "  ");
            format!(
                "{at}\n{}\n{}\nExample:\n{example}\n",
                indented(&kind.spec.comment, "  "),
                fields(&kind.spec)
            )
        }
        Some(field) => format!(
            "{at}  <{}>\n{}\n{}",
            field.type_name(),
            indented(&field.comment, "  "),
            message.map(fields).or(values(field)).unwrap_or_default()
        ),
    })
}

fn unknown(at: &str, step: &str, inside: &Message) -> Error {
    let names: Vec<&str> = inside.fields.iter().map(|field| field.name.as_str()).collect();
    Error::Setting(format!("'{step}' is not a field of {at}; there are {}", names.join(", ")))
}

/// The message of a field, if it has fields of its own.
fn inner(field: &Field) -> Option<&Message> {
    match &field.value {
        Value::Message(message) => Some(message),
        _ => None,
    }
}

/// The enumeration of a field, if its values are words.
fn enumeration(field: &Field) -> Option<&Enumeration> {
    match &field.value {
        Value::Enumeration(enumeration) => Some(enumeration),
        _ => None,
    }
}

fn fields(message: &Message) -> String {
    let field = |field: &Field| {
        format!("  {}  <{}>\n{}\n", field.name, field.type_name(), indented(&field.comment, "      "))
    };
    format!("\nFields:\n{}", message.fields.iter().map(field).collect::<String>())
}

/// The words that a field takes.
fn values(field: &Field) -> Option<String> {
    let value = |(word, comment): &(String, String)| format!("  {word}\n{}\n", indented(comment, "      "));
    let values = enumeration(field)?.values.iter().map(value).collect::<String>();
    Some(format!("\nValues:\n{values}"))
}

fn indented(text: &str, indent: &str) -> String {
    let line = |line: &str| if line.is_empty() { String::new() } else { format!("{indent}{line}") };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
