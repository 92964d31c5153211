//! No circle of imports between the modules of a crate.
//!
//! A module and the modules inside it are one thing to their neighbours: a child may use what its parent declares, and
//! a parent its children. A name that a module re-exports counts as an import of the module that declares it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use crate::source::{blank_comments_and_literals, is_word, without_tests};
use crate::{crates, files_below, read, root};

/// Names from the crate's root down.
type Names = Vec<String>;

/// One file.
#[derive(Default)]
struct Module {
    code: String,
    /// What a `use` brings in: its name here, and its names from the root.
    imported: BTreeMap<String, Names>,
    /// Modules of which a `use` brings in everything.
    globs: Vec<Names>,
    /// Every path to something of this crate.
    used: BTreeSet<Names>,
}

/// From each module to those it imports from, with one such import.
type Arrows = BTreeMap<Names, BTreeMap<Names, String>>;

/// What an arrow is between.
#[derive(Clone, Copy)]
enum What {
    /// Two files.
    Files,
    /// Two neighbours in a folder, each with all that is inside it.
    Folders,
}

/// The modules of one crate.
struct Tree {
    modules: BTreeMap<Names, Module>,
}

impl Tree {
    fn read(source: &Path) -> Self {
        let main = if source.join("lib.rs").exists() { "lib.rs" } else { "main.rs" };
        let mut modules = BTreeMap::new();
        let mut tests: Vec<Names> = Vec::new();
        for file in files_below(source, ".rs") {
            let relative = file.strip_prefix(source).expect("a file below its directory").with_extension("");
            let mut names: Names = relative.iter().map(|name| name.to_string_lossy().into_owned()).collect();
            if names == ["lib"] || names == ["main"] || names[0] == "bin" {
                if names[0] == "bin" || file != source.join(main) {
                    continue;
                }
                names.clear();
            }
            names.pop_if(|last| last == "mod");
            let (code, own_tests) = without_tests(&blank_comments_and_literals(&read(&file)));
            tests.extend(own_tests.into_iter().map(|name| [names.as_slice(), &[name]].concat()));
            modules.insert(names, Module { code, ..Module::default() });
        }
        modules.retain(|names, _| !tests.iter().any(|test| names.starts_with(test)));
        let mut tree = Self { modules };
        tree.find_paths();
        tree
    }

    fn find_paths(&mut self) {
        let all: BTreeSet<Names> = self.modules.keys().cloned().collect();
        for (names, module) in &mut self.modules {
            let code = std::mem::take(&mut module.code);
            for (path, name) in imports(&code) {
                let Some(path) = from_root(names, &path, &all) else { continue };
                match name.as_str() {
                    "*" => module.globs.push(path.clone()),
                    _ => drop(module.imported.insert(name, path.clone())),
                }
                module.used.insert(path);
            }
            module.used.extend(inline_paths(&code).iter().filter_map(|path| from_root(names, path, &all)));
            module.code = code;
        }
    }

    /// The module that declares what a path names.
    fn declaring(&self, path: &[String], hops: usize) -> Names {
        let mut length = 0;
        while length < path.len() && self.modules.contains_key(&path[..=length]) {
            length += 1;
        }
        let (at, rest) = path.split_at(length);
        let (Some(module), Some((name, deeper)), 1..) = (self.modules.get(at), rest.split_first(), hops)
        else {
            return at.to_vec();
        };
        if let Some(imported) = module.imported.get(name) {
            return self.declaring(&[imported.as_slice(), deeper].concat(), hops - 1);
        }
        let from_glob = module.globs.iter().find(|glob| {
            self.modules
                .get(*glob)
                .is_some_and(|other| other.imported.contains_key(name) || declares(&other.code, name))
        });
        match from_glob {
            Some(glob) => self.declaring(&[glob.as_slice(), rest].concat(), hops - 1),
            None => at.to_vec(),
        }
    }

    /// Which modules import from which, and for each the import that says so.
    fn arrows(&self, what: What) -> Arrows {
        let mut arrows = Arrows::new();
        for (from, module) in &self.modules {
            for path in &module.used {
                let to = self.declaring(path, 8);
                if to.starts_with(from) || from.starts_with(&to) {
                    continue;
                }
                let import = format!("{} uses crate::{}", from.join("::"), path.join("::"));
                let length = match what {
                    What::Files => usize::MAX,
                    What::Folders => 1 + from.iter().zip(&to).take_while(|(a, b)| a == b).count(),
                };
                let cut = |names: &Names| names[..length.min(names.len())].to_vec();
                arrows.entry(cut(from)).or_default().entry(cut(&to)).or_insert(import);
            }
        }
        arrows
    }
}

/// Whether a module has an item of this name.
fn declares(code: &str, name: &str) -> bool {
    let words: Vec<&str> = code.split(|c: char| !is_word(c)).filter(|word| !word.is_empty()).collect();
    let kinds = ["fn", "struct", "enum", "union", "trait", "type", "const", "static", "mod", "macro_rules"];
    words.windows(2).any(|pair| kinds.contains(&pair[0]) && pair[1] == name)
}

/// Every path that a `use` brings in, and the name it has afterwards.
fn imports(code: &str) -> Vec<(Names, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use") {
        let starts = !code[..at].ends_with(|c: char| is_word(c) || c == '#');
        let rest = &code[at + 3..];
        if starts
            && rest.starts_with(char::is_whitespace)
            && let Some((tree, _)) = rest.split_once(';')
        {
            expand(tree, &[], &mut found);
        }
    }
    found
}

/// `a::{b, c as d}` is `a::b` and `a::c`.
fn expand(tree: &str, before: &[String], found: &mut Vec<(Names, String)>) {
    let segments = |text: &str| -> Names {
        text.split("::").map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    };
    if let Some((head, inner)) = tree.split_once('{') {
        let before = [before, &segments(head)].concat();
        let inner = inner.rsplit_once('}').map_or(inner, |(inner, _)| inner);
        let (mut depth, mut from) = (0, 0);
        for (at, c) in inner.char_indices().chain([(inner.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    if !inner[from..at].trim().is_empty() {
                        expand(&inner[from..at], &before, found);
                    }
                    from = at + 1;
                }
                _ => {}
            }
        }
        return;
    }
    let (path, renamed) = match tree.split_once(" as ") {
        Some((path, renamed)) => (path, Some(renamed.trim().to_owned())),
        None => (tree, None),
    };
    let mut path = [before, &segments(path)].concat();
    if path.len() > 1 {
        path.pop_if(|last| last == "self");
    }
    let Some(last) = path.last().cloned() else { return };
    path.pop_if(|last| last == "*");
    found.push((path, renamed.unwrap_or(last)));
}

/// Paths in the code that begin at the root, here, or above.
fn inline_paths(code: &str) -> Vec<Names> {
    let mut found = Vec::new();
    for first in ["crate", "super", "self"] {
        for (at, _) in code.match_indices(first) {
            let starts = !code[..at].ends_with(|c: char| is_word(c) || c == ':');
            if !starts || !code[at + first.len()..].starts_with("::") {
                continue;
            }
            let end = code[at..].find(|c: char| !is_word(c) && c != ':').map_or(code.len(), |end| at + end);
            let path = code[at..end].split("::").map(str::to_owned);
            found.push(path.filter(|name| !name.is_empty()).collect());
        }
    }
    found
}

/// A path in a module as names from the root; `None` for what is not of this crate.
fn from_root(module: &[String], path: &[String], modules: &BTreeSet<Names>) -> Option<Names> {
    let (mut at, mut rest) = (module.to_vec(), path);
    match path.first()?.as_str() {
        "crate" => (at, rest) = (Names::new(), &path[1..]),
        "self" => rest = &path[1..],
        "super" => {}
        child => {
            at.push(child.to_owned());
            return modules.contains(&at).then(|| [module, path].concat());
        }
    }
    while rest.first().is_some_and(|name| name == "super") {
        (rest, _) = (&rest[1..], at.pop());
    }
    Some([at.as_slice(), rest].concat())
}

/// Circles, each in the order of its imports, until every module that is on one has been shown.
fn circles(arrows: &Arrows) -> Vec<Vec<&Names>> {
    let mut known = BTreeSet::new();
    let mut found = Vec::new();
    for start in arrows.keys() {
        let Some(circle) = shortest_way_back(start, arrows).filter(|_| !known.contains(start)) else {
            continue;
        };
        known.extend(circle.iter().copied());
        found.push(circle);
    }
    found
}

fn shortest_way_back<'a>(start: &'a Names, arrows: &'a Arrows) -> Option<Vec<&'a Names>> {
    let mut came_from: BTreeMap<&Names, &Names> = BTreeMap::new();
    let mut front = VecDeque::from([start]);
    while let Some(at) = front.pop_front() {
        for next in arrows.get(at).into_iter().flat_map(BTreeMap::keys) {
            if next == start {
                let mut way = vec![start, at];
                while way[way.len() - 1] != start {
                    way.push(came_from[way[way.len() - 1]]);
                }
                way.reverse();
                return Some(way);
            }
            if !came_from.contains_key(next) {
                came_from.insert(next, at);
                front.push_back(next);
            }
        }
    }
    None
}

/// Fails if a crate of the workspace has a circle, and prints it with its imports.
fn assert_no_circles(what: What) {
    let mut broken = String::new();
    let mut modules = 0;
    for directory in crates() {
        let source = directory.join("src");
        if !source.exists() {
            continue;
        }
        let tree = Tree::read(&source);
        modules += tree.modules.len();
        let arrows = tree.arrows(what);
        let package = directory.strip_prefix(root()).expect("a crate of the workspace").display().to_string();
        for circle in circles(&arrows) {
            let names: Vec<String> = circle.iter().map(|names| names.join("::")).collect();
            broken += &format!("\n{package}: {}", names.join(" -> "));
            let ties = circle.windows(2).map(|pair| format!("\n    {}", arrows[pair[0]][pair[1]]));
            broken.extend(ties);
        }
    }
    assert!(modules > 200, "the source was not found: {modules} modules");
    assert!(broken.is_empty(), "circles of imports:{broken}");
}

#[test]
fn files_of_a_crate_import_each_other_in_one_direction() {
    assert_no_circles(What::Files);
}

#[test]
fn folders_of_a_crate_import_each_other_in_one_direction() {
    assert_no_circles(What::Folders);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &str) -> Names {
        path.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    fn tree(files: &[(&str, &str)]) -> Tree {
        let modules = files
            .iter()
            .map(|(path, code)| (names(path), Module { code: (*code).to_owned(), ..Module::default() }));
        let mut tree = Tree { modules: modules.collect() };
        tree.find_paths();
        tree
    }

    #[test]
    fn a_circle_is_found_through_reexports_globs_and_inline_paths() {
        let tree = tree(&[
            ("", "mod a; mod b; mod c; mod d; pub use a::{Thing, inner::*};"),
            ("a", "pub mod inner; pub struct Thing; use crate::b::other as another;"),
            ("a::inner", "pub struct Deep; fn f() { super::g() }"),
            ("b", "pub fn other() -> crate::c::What { }"),
            ("c", "use crate::{Thing, d};"),
            ("d", "use super::Deep; use std::fmt;"),
        ]);
        let arrows = tree.arrows(What::Files);
        let to: Vec<String> = arrows[&names("d")].keys().map(|names| names.join("::")).collect();
        assert_eq!(to, ["a::inner"]);
        assert_eq!(circles(&arrows), [[&names("a"), &names("b"), &names("c"), &names("a")]]);
    }

    #[test]
    fn a_module_and_those_inside_it_are_no_circle() {
        let tree = tree(&[
            ("", "mod a; use a::b::X;"),
            ("a", "mod b; mod c; pub use self::b::X; struct Y;"),
            ("a::b", "use super::Y; use super::c::Z; pub struct X;"),
            ("a::c", "pub struct Z;"),
        ]);
        let arrows = tree.arrows(What::Files);
        let inside = [(names("a::c"), "a::b uses crate::a::c::Z".to_owned())];
        assert_eq!(arrows, [(names("a::b"), inside.into())].into());
        assert!(circles(&arrows).is_empty());
    }

    #[test]
    fn two_folders_that_import_from_each_other_are_a_circle_though_no_two_files_are() {
        let tree = tree(&[
            ("a", "mod x; mod y;"),
            ("b", "mod x; mod y;"),
            ("a::x", "use crate::b::x::X;"),
            ("a::y", "pub struct Y;"),
            ("b::x", "pub struct X;"),
            ("b::y", "use crate::a::y::Y;"),
        ]);
        assert!(circles(&tree.arrows(What::Files)).is_empty());
        let arrows = tree.arrows(What::Folders);
        assert_eq!(circles(&arrows), [[&names("a"), &names("b"), &names("a")]]);
    }
}
