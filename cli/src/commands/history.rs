//! `history`, `audit` and `rollback`.

use data_encoding::HEXLOWER;
use serde_json::{Value, json};
use weir_proto::resource::kind_name;
use weir_proto::v1;

use super::{apply, wait};
use crate::args::{AuditArgs, Cli, RollbackArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;
use crate::tables;

/// Entries asked for at once.
const PAGE_SIZE: usize = 500;

/// Shows what happened to a resource, or to all.
pub(super) async fn history(
    cli: &Cli,
    io: &mut Io<'_>,
    of: Option<v1::ResourceRef>,
    last: usize,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let mut entries: Vec<v1::AuditEntry> = Vec::new();
    let mut page_token = String::new();
    loop {
        let size = (last - entries.len()).min(PAGE_SIZE);
        let page_size = i32::try_from(size).unwrap_or(i32::MAX);
        let request = v1::HistoryRequest { r#ref: of.clone(), page_size, page_token };
        let page = client.call(Retry::Once, request, |mut c, r| async move { c.history(r).await }).await?;
        entries.extend(page.entries);
        page_token = page.next_page_token;
        if page_token.is_empty() || entries.len() >= last {
            break;
        }
    }
    io.result(
        || text(&entries, of.as_ref()),
        || Value::Array(entries.iter().map(|e| value(e, of.as_ref())).collect()),
    )
}

fn shown<'a>(
    entry: &'a v1::AuditEntry,
    of: Option<&'a v1::ResourceRef>,
) -> impl Iterator<Item = &'a v1::AuditChange> {
    entry.changes.iter().filter(move |c| of.is_none() || c.r#ref.as_ref() == of)
}

fn name(change: &v1::AuditChange) -> String {
    match &change.r#ref {
        Some(reference) => format!("{} {}", kind_name(reference.kind()), reference.name),
        None => format!("token {}", change.token),
    }
}

fn text(entries: &[v1::AuditEntry], of: Option<&v1::ResourceRef>) -> String {
    if entries.is_empty() {
        return "nothing has changed\n".to_owned();
    }
    let mut text = String::new();
    for entry in entries {
        let when = tables::time(entry.time.as_ref());
        let (revision, actor, method) = (entry.revision, &entry.actor, &entry.method);
        text.push_str(&format!("revision {revision}  {when}  {actor}  {method}\n"));
        for change in shown(entry, of) {
            text.push_str(&format!("  {} {}\n", apply::done(change.action()), name(change)));
            if change.action() == v1::ChangeAction::Update {
                for field in &change.fields {
                    text.push_str(&format!("    {}\n", apply::field(field)));
                }
            }
        }
    }
    text
}

fn value(entry: &v1::AuditEntry, of: Option<&v1::ResourceRef>) -> Value {
    let change = |change: &v1::AuditChange| {
        json!({
            "resource": name(change),
            "action": apply::action(change.action()),
            "fields": change.fields.iter().map(apply::field_value).collect::<Vec<_>>(),
        })
    };
    json!({
        "sequence": entry.sequence,
        "revision": entry.revision,
        "time": tables::time(entry.time.as_ref()),
        "actor": entry.actor,
        "role": entry.role().as_str_name(),
        "method": entry.method,
        "request_id": entry.request_id,
        "changes": shown(entry, of).map(change).collect::<Vec<_>>(),
        "hash": HEXLOWER.encode(&entry.hash),
        "previous_hash": HEXLOWER.encode(&entry.previous_hash),
    })
}

/// The whole log, or the check of its chain.
pub(super) async fn audit(cli: &Cli, io: &mut Io<'_>, args: &AuditArgs) -> Result<(), Error> {
    if !args.verify {
        return history(cli, io, None, args.last).await;
    }
    let client = Client::connect(cli).await?;
    let known = args.known.as_ref();
    let request = v1::VerifyAuditRequest {
        known_sequence: known.map_or(0, |known| known.sequence),
        known_hash: known.map(|known| known.hash.clone()).unwrap_or_default(),
    };
    let found = client.call(Retry::Once, request, |mut c, r| async move { c.verify_audit(r).await }).await?;
    let hash = HEXLOWER.encode(&found.last_hash);
    io.result(
        || match found.verified {
            0 => "the audit log is empty\n".to_owned(),
            n => format!(
                "{n} entries, {} to {}, follow from each other\nkeep this elsewhere, for --known: {}:{hash}\n",
                found.first_sequence, found.last_sequence, found.last_sequence
            ),
        },
        || {
            json!({
                "verified": found.verified,
                "first_sequence": found.first_sequence,
                "last_sequence": found.last_sequence,
                "last_hash": hash,
                "problem": found.problem,
            })
        },
    )?;
    if found.problem.is_empty() { Ok(()) } else { Err(Error::AuditBroken(found.problem)) }
}

pub(super) async fn rollback(cli: &Cli, io: &mut Io<'_>, args: &RollbackArgs) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::RollbackRequest {
        revision: args.revision,
        refs: args.resources.iter().map(|r| r.0.clone()).collect(),
        validate_only: args.dry_run,
        allow_mass_removal: args.allow_mass_removal,
        request_id: request_id(),
    };
    let answer = client.call(Retry::Once, request, |mut c, r| async move { c.rollback(r).await }).await?;
    let answer = v1::ApplyResponse { changes: answer.changes, revision: answer.revision };
    let text = |answer: &v1::ApplyResponse| {
        if args.dry_run { apply::differences(&answer.changes) } else { apply::text(&answer.changes, false) }
    };
    io.result(|| text(&answer), || apply::value(&answer))?;
    if args.dry_run || !apply::changes(&answer) {
        return Ok(());
    }
    wait::applied(&client, io, &args.wait, answer.revision).await
}
