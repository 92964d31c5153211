//! Every dependency of a crate is used by its source, and comes from where and in as many versions as it may.

use std::collections::BTreeSet;

use crate::source::{blank_comments_and_literals, is_word};
use crate::{crates, files_below, read, root};

/// Dependencies that no source names: crate, dependency, and the reason why it is there.
const NOT_NAMED: [(&str, &str, &str); 1] = [("proto", "tonic-prost", "generated code uses it")];
/// Libraries with another name than their package.
const NAMES: [(&str, &str); 1] = [("rustls-webpki", "webpki")];

/// The names below `[dependencies]` and its kind, as source spells them.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let mut inside = false;
    let mut found = BTreeSet::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
        } else if inside
            && let Some((name, _)) = line.split_once([' ', '=', '.'])
            && !name.starts_with('#')
        {
            found.insert(name.to_owned());
        }
    }
    found
}

#[test]
fn every_dependency_is_used() {
    let mut unused = Vec::new();
    for directory in crates() {
        let manifest = read(&directory.join("Cargo.toml"));
        let sources = files_below(&directory, ".rs");
        let code: String = sources.iter().map(|file| blank_comments_and_literals(&read(file))).collect();
        let words: BTreeSet<&str> = code.split(|c: char| !is_word(c)).collect();
        let package = directory.strip_prefix(root()).expect("a crate of the workspace").display().to_string();
        for name in dependencies(&manifest) {
            let excused = NOT_NAMED.iter().any(|(of, dependency, _)| *of == package && *dependency == name);
            let library =
                NAMES.iter().find(|(of, _)| *of == name).map_or(name.as_str(), |(_, library)| library);
            if !excused && !words.contains(library.replace('-', "_").as_str()) {
                unused.push(format!("{package}: {name}"));
            }
        }
    }
    assert!(unused.is_empty(), "dependencies that no source names:\n  {}", unused.join("\n  "));
}

#[test]
fn every_version_of_the_workspace_is_used_by_a_crate() {
    let table = dependencies(&read(&root().join("Cargo.toml")));
    let used: BTreeSet<String> =
        crates().iter().flat_map(|directory| dependencies(&read(&directory.join("Cargo.toml")))).collect();
    let unused: Vec<&String> = table.difference(&used).collect();
    assert!(
        table.len() > 50 && unused.is_empty(),
        "versions of the workspace's table that no crate uses: {unused:?}"
    );
}

/// A package of `Cargo.lock`: name, version, and where it comes from unless it is in this tree.
fn locked(lock: &str) -> Vec<(&str, &str, Option<&str>)> {
    let packages = lock.split("[[package]]").skip(1);
    packages
        .map(|package| {
            let value = |key: &str| {
                let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
                line.map(|text| text.trim_matches('"'))
            };
            (value("name").expect("a name"), value("version").expect("a version"), value("source"))
        })
        .collect()
}

#[test]
fn dependencies_come_from_the_registry_and_some_in_one_version_only() {
    let lock = read(&root().join("Cargo.lock"));
    let packages = locked(&lock);
    assert!(packages.len() > 200, "{} packages", packages.len());
    for (name, _, source) in &packages {
        assert!(source.is_none_or(|source| source.starts_with("registry+")), "{name} comes from {source:?}");
    }
    let deny = read(&root().join("deny.toml"));
    let once = deny.lines().filter(|line| line.contains("deny-multiple-versions"));
    let once: Vec<&str> = once.filter_map(|line| line.split('"').nth(1)).collect();
    assert!(once.contains(&"hyper"), "{once:?}");
    for wanted in once {
        let versions: Vec<&str> =
            packages.iter().filter(|(name, ..)| *name == wanted).map(|(_, version, _)| *version).collect();
        assert_eq!(versions.len(), 1, "{wanted}: {versions:?}");
    }
}

#[test]
fn dependencies_of_all_kinds_are_read() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\na-b = { workspace = true }\n# c = 1\n[dev-dependencies]\nd.workspace = true\n[features]\ne = []\n";
    assert_eq!(dependencies(manifest), ["a-b".to_owned(), "d".to_owned()].into());
}
