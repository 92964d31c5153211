//! `watch`: changes as they happen, one line each, until Ctrl-C.

use serde_json::json;
use weir_proto::resource::{kind_name, kind_of};
use weir_proto::v1;
use weir_proto::v1::watch_response::Message;

use super::apply;
use crate::args::{Cli, OutputFormat, WatchArgs};
use crate::client::Client;
use crate::error::Error;
use crate::output::Io;

pub(super) async fn watch(cli: &Cli, io: &mut Io<'_>, args: &WatchArgs) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::WatchRequest {
        from_revision: args.from,
        kinds: args.kinds.iter().map(|kind| kind.0.into()).collect(),
    };
    let mut stream = client.open(request, |mut c, r| async move { c.watch(r).await }).await?;
    while let Some(message) = client.heard(stream.message().await)? {
        match message.message {
            Some(Message::Event(event)) => {
                let line = if matches!(io.format, OutputFormat::Table | OutputFormat::Wide) {
                    text(&event)
                } else {
                    value(&event)
                };
                io.out.write_all(line.as_bytes())?;
                io.out.flush()?;
            }
            Some(Message::Bookmark(bookmark)) if args.once => {
                return io.note(&format!("everything up to revision {}", bookmark.revision));
            }
            Some(Message::Bookmark(_)) | None => {}
        }
    }
    Ok(())
}

fn text(event: &v1::WatchEvent) -> String {
    let resource = event.resource.clone().unwrap_or_default();
    let what = if event.actor.is_empty() { "present" } else { apply::done(event.action()) };
    let mut line =
        format!("{:>6}  {what} {} {}", event.revision, kind_name(kind_of(&resource)), resource.name);
    if !event.actor.is_empty() {
        line.push_str(&format!("  by {}", event.actor));
    }
    for field in &event.fields {
        line.push_str(&format!("\n        {}", apply::field(field)));
    }
    line + "\n"
}

/// One JSON value a line, so that a program can read on.
fn value(event: &v1::WatchEvent) -> String {
    let resource = event.resource.clone().unwrap_or_default();
    let text = weir_proto::manifest::to_json_with_status(std::slice::from_ref(&resource));
    let resource: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let value = json!({
        "revision": event.revision,
        "action": apply::action(event.action()),
        "actor": event.actor,
        "fields": event.fields.iter().map(apply::field_value).collect::<Vec<_>>(),
        "resource": resource,
    });
    format!("{value}\n")
}
