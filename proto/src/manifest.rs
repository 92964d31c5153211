//! The YAML that operators write: a stream of documents, each with `kind`, `name` and `spec`.
//!
//! ```yaml
//! kind: backend
//! name: sgp-1
//! spec:
//!   pool: chat
//!   url: http://10.0.0.5:8000
//!   weight: 100
//!   models: {gpt-4.1: ""}
//! ---
//! kind: limit
//! name: everything
//! spec: {rates: {requests_per_minute: 2000, max_wait: 30s}}
//! ```
//!
//! Field names are those of the contract; durations carry units (`250ms`, `30s`, `1h30m`), enums are lower snake case,
//! digests are hex, points in time are RFC 3339. `kind` comes before `spec`, unknown keys are errors, and `status` is
//! what the system says: printed when asked for, ignored when read. JSON is read too, since YAML includes it, and a
//! document may be a list of such documents.
//!
//! [`parse`] judges as [`crate::resource::Resource::try_from`] does and says file, line and key of every mistake.

mod document;
mod locate;
mod mirror;
mod scalar;
mod spec;

use std::collections::HashMap;
use std::fmt;

pub use scalar::{DurationError, format_duration, parse_duration};

use crate::resource::{Resource, kind_name, kind_of};
use crate::v1;
use document::{Document, Entry};
use locate::Tree;

/// Largest input, bytes.
pub const MAX_BYTES: usize = 8 << 20;
/// Most documents in one input.
pub const MAX_DOCUMENTS: usize = 10_000;
/// Most problems one error lists; more help nobody.
const MAX_PROBLEMS: usize = 100;

/// One mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the text came from, as given to [`parse`].
    pub source_name: String,
    /// The line, from 1; `None` when it is the whole input's.
    pub line: Option<u64>,
    /// The key, such as `spec.timeouts.total`; empty when it is no key's.
    pub path: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.source_name)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Everything that is wrong with an input; never empty. Shown one problem a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub Vec<Problem>);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Reads resources. `source_name` is what errors call the text, usually the file's name.
///
/// ```
/// let text = "kind: tenant\nname: team-a\nspec: {display_name: Team A}\n";
/// let resources = weir_proto::manifest::parse(text, "weir.yaml")?;
/// assert_eq!(resources[0].name, "team-a");
/// let error = weir_proto::manifest::parse("kind: tenant\nname: A\nspec: {}\n", "weir.yaml").unwrap_err();
/// assert!(error.to_string().starts_with("weir.yaml:2: name: "));
/// # Ok::<(), weir_proto::manifest::Error>(())
/// ```
pub fn parse(text: &str, source_name: &str) -> Result<Vec<v1::Resource>, Error> {
    let problem = |line, path: &str, message: String| Problem {
        source_name: source_name.to_owned(),
        line,
        path: path.to_owned(),
        message,
    };
    if text.len() > MAX_BYTES {
        return Err(Error(vec![problem(None, "", format!("is larger than {} MiB", MAX_BYTES >> 20))]));
    }
    let documents = read(text).map_err(|fault| {
        let tree = Tree::read(text);
        let path = fault.at.filter(|_| fault.keyed).and_then(|at| tree.path_at(at)).unwrap_or_default();
        Error(vec![problem(fault.at.map(|at| at.0), &path, fault.message)])
    })?;
    if documents.len() > MAX_DOCUMENTS {
        return Err(Error(vec![problem(None, "", too_many_documents())]));
    }
    let mut problems = Vec::new();
    let mut seen = HashMap::with_capacity(documents.len());
    let mut resources = Vec::with_capacity(documents.len());
    // Lines of keys are looked up only when something is wrong: it means reading the text again.
    let mut tree = None;
    for (index, (line, document)) in documents.into_iter().enumerate() {
        let resource = v1::Resource::from(document);
        let kind = kind_of(&resource);
        if let Err(violations) = Resource::try_from(&resource) {
            let tree = tree.get_or_insert_with(|| Tree::read(text));
            for violation in violations.0 {
                let path = file_path(kind, &violation.path);
                let line = tree.line_of(index, &path).unwrap_or(line);
                problems.push(problem(Some(line), &path, violation.message));
            }
        }
        if let Some(first) = seen.insert((kind, resource.name.clone()), line) {
            let message = format!("{} {} is there already, at line {first}", kind_name(kind), resource.name);
            problems.push(problem(Some(line), "name", message));
        }
        resources.push(resource);
        if problems.len() >= MAX_PROBLEMS {
            break;
        }
    }
    if problems.is_empty() { Ok(resources) } else { Err(Error(problems)) }
}

/// The resources as YAML, one document each; what the system says of them is left out. [`parse`] reads it back to
/// the same specs.
pub fn to_yaml(resources: &[v1::Resource]) -> String {
    yaml(resources.iter().map(Document::of).collect())
}

/// As [`to_yaml`], with what the system says of each under `status`.
pub fn to_yaml_with_status(resources: &[v1::Resource]) -> String {
    yaml(resources.iter().map(Document::with_status).collect())
}

/// The resources as a JSON array of the same documents; what the system says of them is left out.
pub fn to_json(resources: &[v1::Resource]) -> String {
    json(resources.iter().map(Document::of).collect())
}

/// As [`to_json`], with what the system says of each under `status`.
pub fn to_json_with_status(resources: &[v1::Resource]) -> String {
    json(resources.iter().map(Document::with_status).collect())
}

fn yaml(documents: Vec<Document>) -> String {
    // Folding would break long lines for the eye only.
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    serde_saphyr::to_string_multiple_with_options(&documents, options)
        .expect("a document holds nothing but text, numbers, lists and maps with text keys")
}

fn json(documents: Vec<Document>) -> String {
    serde_json::to_string_pretty(&documents).expect("a document holds maps with text keys only") + "\n"
}

/// What stopped the reader: the message, and line and column when known.
struct Fault {
    at: Option<(u64, u64)>,
    /// The key at that place is the one that is wrong.
    keyed: bool,
    message: String,
}

/// Every document with the line it starts at.
fn read(text: &str) -> Result<Vec<(u64, Document)>, Fault> {
    let entries = serde_saphyr::from_multiple_with_options::<Entry>(text, options())
        .map_err(|error| locate::fault_of(&error))?;
    Ok(entries.into_iter().flat_map(Entry::into_documents).collect())
}

fn too_many_documents() -> String {
    format!("has more than {MAX_DOCUMENTS} documents")
}

/// No snippets, since they would repeat what stands around a mistake. The budget fits the largest input of ordinary
/// documents; what aliases may expand to has the library's bounds.
fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        budget: serde_saphyr::budget! {
            // One more, for the empty one after a last `---`.
            max_documents: MAX_DOCUMENTS + 1,
            max_events: 4_000_000,
            max_nodes: 2_000_000,
        },
    }
}

/// The path in a file of a field the judge names: `backend.weight` is `spec.weight` there.
fn file_path(kind: v1::ResourceKind, path: &str) -> String {
    match path.strip_prefix(kind_name(kind)) {
        Some(rest) if rest.starts_with('.') => format!("spec{rest}"),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests;
