//! `import`: other gateways' configuration as resources, to be looked at and applied.

use std::path::Path;

use serde_json::{Value, json};
use weir_proto::manifest;

use super::apply::read_text;
use crate::error::Error;
use crate::import::{Import, litellm, ratelimit};
use crate::output::Io;

pub(super) fn litellm(io: &mut Io<'_>, path: &Path) -> Result<(), Error> {
    made(io, path, |text, name| litellm::import(text, name).map_err(|e| Error::Import(e.to_string())))
}

pub(super) fn ratelimit(io: &mut Io<'_>, path: &Path) -> Result<(), Error> {
    made(io, path, |text, name| ratelimit::import(text, name).map_err(|e| Error::Import(e.to_string())))
}

/// Prints what a file comes to, and what did not come along.
fn made(
    io: &mut Io<'_>,
    path: &Path,
    import: impl FnOnce(&str, &str) -> Result<Import, Error>,
) -> Result<(), Error> {
    let name = path.display().to_string();
    let text = read_text(path).map_err(|source| Error::File { path: name.clone(), source })?;
    let import = import(&text, &name)?;
    let said = format!("resources made of {name}; look at them, then: weir apply -f FILE");
    io.result(|| manifest::to_yaml(&import.resources), || value(&import))?;
    io.note(&format!("{} {said}", import.resources.len()))?;
    for note in &import.notes {
        io.note(&format!("{}: {}", note.path, note.text))?;
    }
    Ok(())
}

fn value(import: &Import) -> Value {
    let resources = serde_json::from_str(&manifest::to_json(&import.resources)).unwrap_or(Value::Null);
    let notes = import.notes.iter().map(|note| json!({"path": note.path, "text": note.text}));
    json!({"resources": resources, "notes": notes.collect::<Vec<_>>()})
}
