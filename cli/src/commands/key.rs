//! `key create`, `revoke`, `rotate` and `list`. A new key goes to standard output and nowhere else.

use serde_json::json;
use weir_proto::v1;
use weir_proto::v1::resource::Spec;
use weir_runtime::Secret;

use super::{get, update, wait};
use crate::args::{Cli, KeyCommand, WaitArgs};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;

pub(super) async fn key(cli: &Cli, io: &mut Io<'_>, command: &KeyCommand) -> Result<(), Error> {
    match command {
        KeyCommand::List => get::all(cli, io, v1::ResourceKind::ApiKey).await,
        KeyCommand::Create { name, tenant, models, expires, wait } => {
            let expire_time = expires.map(|d| {
                // The wall clock: an expiry is a date.
                let at = jiff::Timestamp::now().as_second();
                let seconds = at.saturating_add(i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
                prost_types::Timestamp { seconds, nanos: 0 }
            });
            let request = v1::IssueApiKeyRequest {
                name: name.clone(),
                tenant: tenant.clone(),
                allowed_models: models.clone(),
                expire_time,
                limits: None,
                validate_only: false,
            };
            let client = Client::connect(cli).await?;
            // Never again: the first answer may be lost, and the second would be ALREADY_EXISTS.
            let answer = client
                .call(Retry::Never, request, |mut c, r| async move { c.issue_api_key(r).await })
                .await?;
            show(&client, io, answer.resource, Secret::new(answer.secret), wait).await
        }
        KeyCommand::Rotate { name, grace, wait } => {
            let grace = prost_types::Duration::try_from(*grace).ok();
            let request = v1::RotateApiKeyRequest { name: name.clone(), grace, validate_only: false };
            let client = Client::connect(cli).await?;
            // Never again: a second rotation would drop the key in use.
            let answer = client
                .call(Retry::Never, request, |mut c, r| async move { c.rotate_api_key(r).await })
                .await?;
            show(&client, io, answer.resource, Secret::new(answer.secret), wait).await
        }
        KeyCommand::Revoke { name, wait } => {
            let client = Client::connect(cli).await?;
            let spec = v1::ApiKeySpec { revoked: true, ..Default::default() };
            let revision = update(&client, name, Spec::ApiKey(spec), "revoked").await?.revision;
            io.result(
                || format!("key {name} is revoked\n"),
                || json!({"kind": "api_key", "name": name, "action": "update", "revision": revision}),
            )?;
            wait::applied(&client, io, wait, revision).await
        }
    }
}

/// The key alone on a line, so that a script may take it; the advice goes to the person.
async fn show(
    client: &Client,
    io: &mut Io<'_>,
    resource: Option<v1::Resource>,
    secret: Secret,
    wait: &WaitArgs,
) -> Result<(), Error> {
    // The key first: whatever else is wrong, it is shown only now.
    let (name, revision) = resource.map(|r| (r.name, r.revision)).unwrap_or_default();
    io.result(
        || format!("{}\n", secret.expose()),
        || json!({"kind": "api_key", "name": name, "secret": secret.expose(), "revision": revision}),
    )?;
    io.note("keep this key now: it is shown this once and stored nowhere")?;
    wait::applied(client, io, wait, revision).await
}
