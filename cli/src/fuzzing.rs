//! What is private here and reads files of strangers, for the fuzz targets alone.

use weir_proto::v1;

/// The resources, and the place and text of each note.
pub type Imported = (Vec<v1::Resource>, Vec<(String, String)>);

/// The resources of a LiteLLM configuration, and what was noted: the place and the text.
pub fn litellm(text: &str) -> Result<Imported, String> {
    let import = crate::import::litellm::import(text, "config.yaml").map_err(|error| error.to_string())?;
    Ok(imported(import))
}

/// The rules of a file of envoyproxy/ratelimit, and what was noted: the place and the text.
///
/// # Errors
/// When it is no such file.
pub fn ratelimit(text: &str) -> Result<Imported, String> {
    let import = crate::import::ratelimit::import(text, "rules.yaml").map_err(|error| error.to_string())?;
    Ok(imported(import))
}

fn imported(import: crate::import::Import) -> Imported {
    (import.resources, import.notes.into_iter().map(|note| (note.path, note.text)).collect())
}
