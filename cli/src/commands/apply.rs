//! `apply` and `diff`.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use weir_proto::resource::{kind_name, kind_of};
use weir_proto::status::{FieldViolation, field_violations};
use weir_proto::{manifest, v1};
use weir_runtime::exit;

use super::wait;
use crate::args::{ApplyArgs, Cli, FileArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

pub(super) async fn apply(cli: &Cli, io: &mut Io<'_>, args: &ApplyArgs) -> Result<(), Error> {
    let (request, given) = request(&args.files, args.dry_run)?;
    let client = Client::connect(cli).await?;
    let answer = client.call(Retry::Once, request, |mut c, r| async move { c.apply(r).await }).await;
    let answer = answer.map_err(|error| named(error, &given))?;
    io.result(|| text(&answer.changes, args.dry_run), || value(&answer))?;
    if args.dry_run || !changes(&answer) {
        return Ok(());
    }
    wait::applied(&client, io, &args.wait, answer.revision).await
}

pub(super) async fn diff(cli: &Cli, io: &mut Io<'_>, args: &FileArgs) -> Result<u8, Error> {
    let (request, given) = request(args, true)?;
    let client = Client::connect(cli).await?;
    let answer = client.call(Retry::Once, request, |mut c, r| async move { c.apply(r).await }).await;
    let answer = answer.map_err(|error| named(error, &given))?;
    io.result(|| differences(&answer.changes), || value(&answer))?;
    Ok(if changes(&answer) { exit::FAILED } else { exit::DONE })
}

/// The request, and what each of its resources is called where it was read.
fn request(args: &FileArgs, validate_only: bool) -> Result<(v1::ApplyRequest, Vec<String>), Error> {
    let (resources, given) = read(&args.files)?;
    let request = v1::ApplyRequest {
        resources,
        apply_set: args.set.clone(),
        prune: args.prune,
        validate_only,
        allow_mass_removal: args.allow_mass_removal,
        request_id: request_id(),
        take_over: args.take_over,
    };
    Ok((request, given))
}

/// The control plane speaks of resources by their number and of fields by their contract; people wrote files.
fn named(error: Error, given: &[String]) -> Error {
    let Error::Refused { status, .. } = &error else { return error };
    let name = |violation: &FieldViolation| {
        if violation.field.is_empty() {
            // How many are left out.
            return Some(violation.description.clone());
        }
        let (number, field) = violation.field.strip_prefix("resources[")?.split_once("].")?;
        let resource = given.get(number.parse::<usize>().ok()?)?;
        // The first word is the kind of the resource, which the file calls spec.
        let field = field.split_once('.').map_or_else(String::new, |(_, rest)| format!("spec.{rest}: "));
        Some(format!("{resource}: {field}{}", violation.description))
    };
    match field_violations(status).iter().map(name).collect::<Option<Vec<String>>>() {
        Some(problems) if !problems.is_empty() => Error::NotTaken(problems),
        _ => error,
    }
}

/// The resources of all files, and what each is called. Those of one file are told apart by its reader, those of several
/// here.
fn read(files: &[PathBuf]) -> Result<(Vec<v1::Resource>, Vec<String>), Error> {
    let (mut resources, mut given) = (Vec::new(), Vec::new());
    for path in all(files)? {
        let name = if path == Path::new("-") { "stdin".to_owned() } else { path.display().to_string() };
        let text = read_text(&path).map_err(|source| Error::File { path: name.clone(), source })?;
        let of_file = manifest::parse(&text, &name)?;
        // With --prune it would delete everything of its set.
        if of_file.is_empty() {
            return Err(Error::Empty(name));
        }
        given.extend(of_file.iter().map(|r| format!("{name}: {} {}", kind_name(kind_of(r)), r.name)));
        resources.extend(of_file);
    }
    let mut seen = HashSet::new();
    for resource in &resources {
        let kind = kind_of(resource);
        if !seen.insert((kind, resource.name.as_str())) {
            return Err(Error::Twice(format!("{} {}", kind_name(kind), resource.name)));
        }
    }
    Ok((resources, given))
}

/// The files that are named, and those with YAML or JSON in directories that are named, by name. Directories inside are not
/// looked into: what is meant by them is not said.
fn all(files: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut all = Vec::new();
    for path in files {
        if !path.is_dir() {
            all.push(path.clone());
            continue;
        }
        let failed = |source| Error::File { path: path.display().to_string(), source };
        let entries = std::fs::read_dir(path).map_err(failed)?;
        let mut inside = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.path();
            let extension = file.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
            if matches!(extension, "yaml" | "yml" | "json") && file.is_file() {
                inside.push(file);
            }
        }
        if inside.is_empty() {
            return Err(Error::Empty(format!("{} has no .yaml, .yml or .json and", path.display())));
        }
        inside.sort_unstable();
        all.extend(inside);
    }
    Ok(all)
}

/// At most one byte more than the parser takes, which says so then: only what is not too long has to be text.
pub(super) fn read_text(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    let limit = manifest::MAX_BYTES as u64 + 1;
    if path == Path::new("-") {
        std::io::stdin().take(limit).read_to_end(&mut bytes)?;
    } else {
        std::fs::File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    }
    if bytes.len() > manifest::MAX_BYTES {
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    String::from_utf8(bytes).map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e.utf8_error()))
}

pub(super) fn changes(answer: &v1::ApplyResponse) -> bool {
    answer.changes.iter().any(|c| c.action() != v1::ChangeAction::Unchanged)
}

/// What was done, one line each, and the sum.
pub(super) fn text(changes: &[v1::Change], dry_run: bool) -> String {
    use v1::ChangeAction as Action;
    let mut text = String::new();
    for change in changes.iter().filter(|c| c.action() != Action::Unchanged) {
        text.push_str(&format!("{} {}\n", done(change.action()), reference(change)));
    }
    let count = |action| changes.iter().filter(|c| c.action() == action).count();
    let sum = [Action::Create, Action::Update, Action::Delete, Action::Unchanged]
        .map(|action| format!("{} {}", count(action), done(action)))
        .join(", ");
    let suffix = if dry_run { " (dry run: nothing was changed)" } else { "" };
    text + &sum + suffix + "\n"
}

/// What differs, one line per resource and one per field.
pub(super) fn differences(changes: &[v1::Change]) -> String {
    use v1::ChangeAction as Action;
    let mut text = String::new();
    for change in changes {
        let sign = match change.action() {
            Action::Create => '+',
            Action::Delete => '-',
            Action::Update => '~',
            Action::Unchanged | Action::Unspecified => continue,
        };
        text.push_str(&format!("{sign} {}\n", reference(change)));
        for field in &change.fields {
            text.push_str(&format!("    {}\n", self::field(field)));
        }
    }
    if text.is_empty() { "no differences\n".to_owned() } else { text }
}

pub(super) fn value(answer: &v1::ApplyResponse) -> Value {
    let changes = answer.changes.iter().map(|c| {
        let of = c.r#ref.clone().unwrap_or_default();
        let fields = c.fields.iter().map(field_value);
        json!({
            "kind": kind_name(of.kind()),
            "name": of.name,
            "action": action(c.action()),
            "fields": fields.collect::<Vec<_>>(),
        })
    });
    json!({"revision": answer.revision, "changes": changes.collect::<Vec<_>>()})
}

/// A field, before and after.
pub(super) fn field(field: &v1::FieldChange) -> String {
    let or_none = |value: &str| if value.is_empty() { "(none)".to_owned() } else { value.to_owned() };
    format!("{}: {} -> {}", field.path, or_none(&field.before), or_none(&field.after))
}

pub(super) fn field_value(field: &v1::FieldChange) -> Value {
    // Values are JSON already; what is not is shown as text.
    let parsed = |text: &str| match text {
        "" => Value::Null,
        text => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
    };
    json!({"path": field.path, "before": parsed(&field.before), "after": parsed(&field.after)})
}

fn reference(change: &v1::Change) -> String {
    let of = change.r#ref.clone().unwrap_or_default();
    format!("{} {}", kind_name(of.kind()), of.name)
}

pub(super) const fn action(action: v1::ChangeAction) -> &'static str {
    match action {
        v1::ChangeAction::Create => "create",
        v1::ChangeAction::Update => "update",
        v1::ChangeAction::Delete => "delete",
        v1::ChangeAction::Unchanged => "unchanged",
        v1::ChangeAction::Unspecified => "unspecified",
    }
}

pub(super) const fn done(action: v1::ChangeAction) -> &'static str {
    match action {
        v1::ChangeAction::Create => "created",
        v1::ChangeAction::Update => "updated",
        v1::ChangeAction::Delete => "deleted",
        v1::ChangeAction::Unchanged => "unchanged",
        v1::ChangeAction::Unspecified => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_its_files_and_a_file_of_nothing_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, text).expect("written");
            path
        };
        let none = read(&[directory.path().to_owned()]).expect_err("nothing there").to_string();
        assert!(none.contains("has no .yaml"), "{none}");
        let tenant = |name: &str| format!("kind: tenant\nname: {name}\nspec: {{}}\n");
        file("b.yaml", &tenant("b"));
        file("a.yml", &tenant("a"));
        file("notes.txt", "kind: nonsense");
        std::fs::create_dir(directory.path().join("deeper.yaml")).expect("made");
        let (resources, _) = read(&[directory.path().to_owned()]).expect("two files");
        assert_eq!(resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        for text in ["", "# a template that failed\n", "---\n"] {
            let error = read(&[file("empty.yaml", text)]).expect_err("nothing to apply");
            assert!(error.to_string().contains("empty.yaml holds no resource"), "{error}");
            assert_eq!(error.exit_code(), exit::CONFIG);
        }
    }
}
