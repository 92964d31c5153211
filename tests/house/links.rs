//! Documents name files, headings and tests that exist.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::{crates, files_below, read, root};

/// A document without its code blocks; lines stay where they are.
fn without_code_blocks(text: &str) -> String {
    let mut inside = false;
    let line = |line: &str| {
        let fence = line.trim_start().starts_with("```");
        let kept = if inside || fence { "" } else { line };
        inside ^= fence;
        format!("{kept}\n")
    };
    text.lines().map(line).collect()
}

/// What is in backticks, with the line it begins on.
fn quoted(text: &str) -> Vec<(usize, String)> {
    let text = without_code_blocks(text);
    let parts: Vec<&str> = text.split('`').collect();
    let mut line = 1;
    let mut found = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        if i % 2 == 1 {
            found.push((line, part.split_whitespace().collect::<Vec<_>>().join(" ")));
        }
        line += part.matches('\n').count();
    }
    found
}

/// Targets of links, with the line.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (number, line) in without_code_blocks(text).lines().enumerate() {
        // Code in backticks may hold brackets.
        let line: String =
            line.split('`').enumerate().map(|(i, part)| if i % 2 == 0 { part } else { "" }).collect();
        for (at, _) in line.match_indices("](") {
            if let Some((target, _)) = line[at + 2..].split_once(')') {
                found.push((number + 1, target.to_owned()));
            }
        }
    }
    found
}

/// A heading as a link names it.
fn anchor(heading: &str) -> String {
    let letters = heading.trim().to_lowercase();
    let kept = letters.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn has_anchor(document: &Path, wanted: &str) -> bool {
    let text = without_code_blocks(&read(document));
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    text.lines().filter(|line| line.starts_with('#')).any(|line| {
        let anchor = anchor(line.trim_start_matches('#'));
        let before = seen.entry(anchor.clone()).or_default();
        *before += 1;
        wanted == if *before == 1 { anchor } else { format!("{anchor}-{}", *before - 1) }
    })
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

#[test]
fn every_relative_link_of_a_document_leads_somewhere() {
    let mut broken = Vec::new();
    let documents = files_below(&root(), ".md");
    for document in &documents {
        for (line, target) in links(&read(document)) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (path, fragment) = match target.split_once('#') {
                Some((path, fragment)) => (path, Some(fragment)),
                None => (target.as_str(), None),
            };
            let directory = document.parent().expect("a directory");
            let leads_to = if path.is_empty() { document.clone() } else { directory.join(path) };
            let is_document = leads_to.extension().is_some_and(|ending| ending == "md");
            let leads =
                leads_to.exists() && (!is_document || fragment.is_none_or(|f| has_anchor(&leads_to, f)));
            if !leads {
                broken.push(format!("{}:{line}: {target}", shown(document)));
            }
        }
    }
    assert!(documents.len() > 50, "the documents were not found: {}", documents.len());
    assert!(broken.is_empty(), "links that lead nowhere:\n  {}", broken.join("\n  "));
}

/// Documents whose backticks are checked: those that say where things are in the source.
fn maps() -> Vec<PathBuf> {
    let mut documents = files_below(&root().join("docs/decisions"), ".md");
    documents.push(root().join("ARCHITECTURE.md"));
    documents
}

/// Whether it looks like a path of this tree: one word with a slash, whose first part is a directory at the top.
fn is_path(quoted: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let first = quoted.split_once('/').map(|(first, _)| first);
    quoted.chars().all(plain) && first.is_some_and(|first| !first.is_empty() && root().join(first).is_dir())
}

#[test]
fn every_path_that_a_map_of_the_source_names_exists() {
    let mut broken = Vec::new();
    let mut checked = 0;
    for document in maps() {
        for (line, path) in quoted(&read(&document)).into_iter().filter(|(_, quoted)| is_path(quoted)) {
            checked += 1;
            if !root().join(&path).exists() {
                broken.push(format!("{}:{line}: {path}", shown(&document)));
            }
        }
    }
    assert!(checked > 20, "the paths were not found: {checked}");
    assert!(broken.is_empty(), "paths that do not exist:\n  {}", broken.join("\n  "));
}

/// The package and the test's name of `cargo test -p PACKAGE ... NAME`.
fn test_command(quoted: &str) -> Option<(&str, &str)> {
    let words: Vec<&str> = quoted.split(' ').collect();
    let start = words.windows(2).position(|pair| pair == ["cargo", "test"])?;
    let words: Vec<&str> = words[start..].iter().copied().take_while(|word| *word != "--").collect();
    let after = |option: &str| words.iter().position(|word| *word == option).and_then(|at| words.get(at + 1));
    let package = after("-p")?;
    let name = words.last()?;
    let is_name = words.len() > 4
        && !name.starts_with('-')
        && Some(name) != after("--test")
        && Some(name) != after("-p");
    is_name.then_some((*package, *name))
}

#[test]
fn every_test_that_a_decision_names_exists() {
    let mut sources = BTreeMap::new();
    for directory in crates() {
        let manifest = read(&directory.join("Cargo.toml"));
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = "));
        let name = name.expect("a name").trim_matches('"').to_owned();
        let text: String = files_below(&directory, ".rs")
            .iter()
            .map(|file| format!("mod {}\n{}", shown(file), read(file)))
            .collect();
        sources.insert(name, text);
    }
    let mut broken = Vec::new();
    let mut checked = 0;
    for document in maps() {
        for (line, quoted) in quoted(&read(&document)) {
            let Some((package, name)) = test_command(&quoted) else { continue };
            checked += 1;
            let exists = sources.get(package).is_some_and(|source| {
                let mut parts = name.split("::").filter(|part| !part.is_empty());
                parts.all(|part| source.contains(part))
            });
            if !exists {
                broken.push(format!("{}:{line}: {quoted}", shown(&document)));
            }
        }
    }
    assert!(checked > 20, "the commands were not found: {checked}");
    assert!(broken.is_empty(), "tests that do not exist:\n  {}", broken.join("\n  "));
}

#[test]
fn every_alert_has_its_place_in_the_runbook_and_the_reverse() {
    let rules = read(&root().join("deploy/prometheus/rules.yml"));
    let after = |prefix: &str| -> Vec<String> {
        rules.lines().filter_map(|line| Some(line.trim().strip_prefix(prefix)?.to_owned())).collect()
    };
    let alerts = after("- alert: ");
    let places: Vec<String> =
        alerts.iter().map(|name| format!("docs/alerts.md#{}", name.to_lowercase())).collect();
    assert_eq!(after("runbook: "), places);
    let document = read(&root().join("docs/alerts.md"));
    let mut told: Vec<&str> = document.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let mut alerts: Vec<&str> = alerts.iter().map(String::as_str).collect();
    told.sort_unstable();
    alerts.sort_unstable();
    assert_eq!(told, alerts);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_anchors_and_quotes_are_read_as_a_reader_reads_them() {
        let text =
            "# A title: `x` & more\nsee [a](b.md#c), `[no](d)`, `two\nwords`\n```\n[e](f)\n```\n[g](#h)\n";
        assert_eq!(links(text), [(2, "b.md#c".to_owned()), (7, "#h".to_owned())]);
        assert_eq!(anchor(" A title: `x` & more"), "a-title-x--more");
        assert_eq!(quoted(text)[2], (2, "two words".to_owned()));
        assert_eq!(test_command("cargo test -p a --lib b::c"), Some(("a", "b::c")));
        assert_eq!(test_command("cargo test -p a --test it d -- --nocapture"), Some(("a", "d")));
        assert_eq!(test_command("cargo test -p a --test it"), None);
    }
}
