//! `edit`: a resource in the operator's own editor, applied when it has changed.

use std::io::Write as _;

use weir_proto::resource::kind_name;
use weir_proto::{manifest, v1};

use super::{get, wait};
use crate::args::{Cli, WaitArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

pub(super) async fn edit(
    cli: &Cli,
    io: &mut Io<'_>,
    kind: v1::ResourceKind,
    name: &str,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let before = get::read(&client, kind, name).await?;
    let bare = v1::Resource { name: name.to_owned(), spec: before.spec.clone(), ..Default::default() };
    let text = manifest::to_yaml(std::slice::from_ref(&bare));
    let edited = in_editor(&text).await?;
    if edited == text {
        return io.note("nothing was changed");
    }
    let mut resources = manifest::parse(&edited, "the edited text")?;
    let after = match (resources.pop(), resources.is_empty()) {
        (Some(after), true) if after.name == name && weir_proto::resource::kind_of(&after) == kind => after,
        _ => {
            return Err(Error::Setting(format!(
                "the edited text must hold {} {name} and nothing else; nothing was changed",
                kind_name(kind)
            )));
        }
    };
    // The etag: what somebody else changed meanwhile is not overwritten.
    let request = v1::UpdateResourceRequest {
        resource: Some(v1::Resource { etag: before.etag, ..after }),
        update_mask: Some(prost_types::FieldMask { paths: vec!["*".into()] }),
        request_id: request_id(),
        validate_only: false,
    };
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.update_resource(r).await }).await?;
    let revision = answer.resource.ok_or(Error::Answer("resource"))?.revision;
    io.note(&format!("updated {} {name}", kind_name(kind)))?;
    wait::applied(&client, io, wait, revision).await
}

/// The text as the editor leaves it. The file is private and goes away again.
async fn in_editor(text: &str) -> Result<String, Error> {
    let editor = ["VISUAL", "EDITOR"].iter().find_map(|name| std::env::var(name).ok());
    let editor = editor.filter(|e| !e.trim().is_empty()).unwrap_or_else(|| "vi".to_owned());
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        Error::Setting(format!("{what}: {e}; set EDITOR to a program that edits a file"))
    };
    let mut file = tempfile::Builder::new()
        .prefix("weir-")
        .suffix(".yaml")
        .tempfile()
        .map_err(|e| failed("no temporary file", &e))?;
    file.write_all(text.as_bytes()).map_err(|e| failed("no temporary file", &e))?;
    // By the shell, since EDITOR may hold arguments.
    let mut command = tokio::process::Command::new("sh");
    command.arg("-c").arg(format!("{editor} \"$1\"")).arg("sh").arg(file.path());
    let status = command.status().await.map_err(|e| failed(&editor, &e))?;
    if !status.success() {
        return Err(failed(&editor, &format!("it ended with {status}; nothing was changed")));
    }
    std::fs::read_to_string(file.path()).map_err(|e| failed("the edited file", &e))
}
