//! Other gateways' configuration as resources of Weir. Pure: text in, resources and what was left out.

mod fields;
pub(crate) mod litellm;
mod providers;
pub(crate) mod ratelimit;

use weir_proto::resource::{Resource, kind_name, kind_of};
use weir_proto::v1;

/// What became of a file.
#[derive(Debug, Default)]
pub(crate) struct Import {
    /// The resources, in an order that reads well.
    pub(crate) resources: Vec<v1::Resource>,
    /// What a person has to look at.
    pub(crate) notes: Vec<Note>,
}

/// Something that was not carried over, or not as it stood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    /// Where it stands in the file, such as `model_list[2].litellm_params.api_key`.
    pub(crate) path: String,
    /// What became of it, and what to do.
    pub(crate) text: String,
}

impl Import {
    fn note(&mut self, path: impl Into<String>, text: impl Into<String>) {
        self.notes.push(Note { path: path.into(), text: text.into() });
    }

    /// Notes what Weir does not take of the resources. Said now and not only when they are applied: values come from a file
    /// that nobody checked by Weir's rules.
    fn judge(&mut self) {
        for resource in &self.resources {
            let Err(violations) = Resource::try_from(resource) else { continue };
            let name = format!("{} {}", kind_name(kind_of(resource)), resource.name);
            self.notes.extend(violations.0.into_iter().map(|violation| Note {
                path: name.clone(),
                text: format!("has to be corrected by hand: {}: {}", violation.path, violation.message),
            }));
        }
    }

    /// The same, unless this was said of another path before.
    fn note_once(&mut self, path: impl Into<String>, text: String) {
        if !self.notes.iter().any(|note| note.text == text) {
            self.note(path, text);
        }
    }
}

/// The name, or the name with the first number behind it that is free.
fn free_name(base: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(base) {
        return base.to_owned();
    }
    let base = &base[..base.len().min(57)];
    (2..).map(|n| format!("{base}-{n}")).find(|name| !taken(name)).unwrap_or_default()
}

/// A resource name made of any text: lower case, what is not allowed becomes `-`, at most 63 characters.
fn resource_name(text: &str) -> String {
    let mut name = String::with_capacity(text.len().min(63));
    for c in text.chars() {
        let c = c.to_ascii_lowercase();
        match c {
            'a'..='z' | '0'..='9' | '.' => name.push(c),
            _ if !name.is_empty() && !name.ends_with('-') => name.push('-'),
            _ => {}
        }
        if name.len() == 63 {
            break;
        }
    }
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { "unnamed".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_text_becomes_a_valid_name() {
        for (text, name) in [
            ("gpt-4.1", "gpt-4.1"),
            ("meta-llama/Llama 3 (70B)", "meta-llama-llama-3-70b"),
            ("--", "unnamed"),
            (".Ünïcode.", "n-code"),
        ] {
            assert_eq!(resource_name(text), name);
        }
        assert_eq!(resource_name(&"x".repeat(80)).len(), 63);
    }
}
