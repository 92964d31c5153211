//! The page `docs/resources.md`.

use std::collections::BTreeMap;

use weir_proto::reference::{Enumeration, Field, Kind, Message, Value};

use super::{enumeration, example, first_sentence, inner};

/// How the page comes about; a test compares it with the contract.
const HEAD: &str = "\
# Resources

<!-- Written by `cargo run -p weir -- explain --markdown > docs/resources.md` from proto/weir/v1/resources.proto. -->

What you declare to Weir: every kind of resource, every field and every value that YAML takes. `weir explain` prints the same for
the version that you run, such as `weir explain pool.timeouts`. At the end is [a complete configuration](#a-complete-configuration).

A file is a stream of YAML documents (or JSON), each with `kind`, `name` and `spec`, in this order. Unknown keys are errors;
`weir apply -f FILE --dry-run` says file, line and key of every mistake and what would change. `weir diff -f FILE` shows the
differences.

- **Names** are 1 to 63 bytes: lower-case letters, digits, `-` and `.`, with a letter or digit first and last. A resource is named by
  its kind and its name.
- **Durations** are whole numbers with units (`d`, `h`, `m`, `s`, `ms`, `us`, `ns`), such as `250ms`, `30s` or `1h30m`.
- **Times** are RFC 3339, such as `2027-01-31T12:00:00Z`. **Money** is in micro-dollars: 1000000 are a dollar.
- **Zero** in a field whose bounds begin at 1 means that it is left out.
";

/// The page.
pub(super) fn document(kinds: &[Kind]) -> String {
    let mut parts = Parts::default();
    for kind in kinds {
        parts.note(&kind.spec, kind.name);
    }
    let overview = |kind: &Kind| {
        format!("| [{0}](#{0}) | {1} |\n", kind.name, cell(&first_sentence(&kind.spec.comment)))
    };
    let section = |kind: &Kind| {
        let example = example::of(kind.name);
        let head = format!(
            "\n## {}\n\n{}\n\n```yaml\n{example}\n```\n\n",
            kind.name,
            paragraphs(&kind.spec.comment)
        );
        head + &table(&kind.spec)
    };
    let part = |(name, (message, used)): (&String, &(&Message, Vec<String>))| {
        format!("\n### {name}\n\n{}\n\nUsed in {}.\n\n", paragraphs(&message.comment), used.join(", "))
            + &table(message)
    };
    let choice = |(name, (enumeration, used)): (&String, &(&Enumeration, Vec<String>))| {
        format!("\n### {name}\n\n{}\n\nUsed in {}.\n\n", paragraphs(&enumeration.comment), used.join(", "))
            + &values(enumeration)
    };
    let mut text = format!("{HEAD}\n| kind | what |\n|---|---|\n");
    text.extend(kinds.iter().map(overview));
    text.extend(kinds.iter().map(section));
    text.push_str("\n## Parts of several fields\n");
    text.extend(parts.messages.iter().map(part));
    text.push_str("\n## Values of one word\n");
    text.extend(parts.enumerations.iter().map(choice));
    text + &format!(
        "\n## A complete configuration\n\n[deploy/examples/complete.yaml](../deploy/examples/complete.yaml), which a test applies.\n\n\
         ```yaml\n{}\n```\n",
        example::COMPLETE.trim_end()
    )
}

/// The messages and enums below the kinds, each once, with the paths where they are used.
#[derive(Default)]
struct Parts<'a> {
    messages: BTreeMap<String, (&'a Message, Vec<String>)>,
    enumerations: BTreeMap<String, (&'a Enumeration, Vec<String>)>,
}

impl<'a> Parts<'a> {
    fn note(&mut self, message: &'a Message, at: &str) {
        for field in &message.fields {
            let path = format!("{at}.{}", field.name);
            if let Some(message) = inner(field) {
                let known = self.messages.contains_key(&message.name);
                let (_, used) = self.messages.entry(message.name.clone()).or_insert((message, Vec::new()));
                used.push(format!("`{path}`"));
                // What is inside it is said by the place where it is described.
                if !known {
                    self.note(message, &message.name);
                }
            }
            if let Some(enumeration) = enumeration(field) {
                let (_, used) =
                    self.enumerations.entry(enumeration.name.clone()).or_insert((enumeration, Vec::new()));
                used.push(format!("`{path}`"));
            }
        }
    }
}

fn table(message: &Message) -> String {
    let row = |field: &Field| {
        let absent = match (&field.facts.default, field.facts.required) {
            (_, true) => "**required**".to_owned(),
            (Some(value), false) => default(field, value),
            (None, false) => "its defaults".to_owned(),
        };
        let bounds = field.facts.bounds.clone().unwrap_or_default();
        format!(
            "| `{}` | {} | {absent} | {bounds} | {} |\n",
            field.name,
            kind_of_value(field),
            cell(&field.meaning)
        )
    };
    let rows: String = message.fields.iter().map(row).collect();
    format!("| field | type | if left out | bounds | meaning |\n|---|---|---|---|---|\n{rows}")
}

/// What the absence of a field means: a value of YAML, or words.
fn default(field: &Field, text: &str) -> String {
    let is_value = !text.contains(' ')
        && match &field.value {
            Value::Enumeration(enumeration) => enumeration.values.iter().any(|(word, _)| word == text),
            Value::Text => text.starts_with('/'),
            Value::Boolean => true,
            Value::WholeNumber | Value::Number | Value::Duration => {
                text.starts_with(|c: char| c.is_ascii_digit())
            }
            Value::Time | Value::Hex | Value::Map | Value::Message(_) => false,
        };
    if is_value { format!("`{text}`") } else { cell(text) }
}

fn kind_of_value(field: &Field) -> String {
    let list = if field.list { "list of " } else { "" };
    let linked = |name: &str| format!("[{name}](#{})", name.to_lowercase());
    let name = match &field.value {
        Value::Text => "text".to_owned(),
        Value::Boolean => "`true` or `false`".to_owned(),
        Value::WholeNumber => "whole number".to_owned(),
        Value::Number => "number".to_owned(),
        Value::Duration => "duration".to_owned(),
        Value::Time => "time".to_owned(),
        Value::Hex => "hex digits".to_owned(),
        Value::Map => "map of texts".to_owned(),
        Value::Enumeration(enumeration) => linked(&enumeration.name),
        Value::Message(message) => linked(&message.name),
    };
    format!("{list}{name}")
}

fn values(enumeration: &Enumeration) -> String {
    let row = |(word, comment): &(String, String)| format!("| `{word}` | {} |\n", line(comment));
    let rows: String = enumeration.values.iter().map(row).collect();
    format!("| value | meaning |\n|---|---|\n{rows}")
}

/// A comment in one line of a table.
fn line(comment: &str) -> String {
    cell(&comment.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// A text in a table, where a bar would end the cell and stars would be marks.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('*', "\\*")
}

/// A comment as text of the page, paragraph by paragraph.
fn paragraphs(comment: &str) -> String {
    comment.split("\n\n").map(line).collect::<Vec<_>>().join("\n\n")
}
