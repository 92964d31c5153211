//! `delete`.

use serde_json::json;
use weir_proto::resource::kind_name;
use weir_proto::v1;

use super::wait;
use crate::args::{Cli, WaitArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

pub(super) async fn delete(
    cli: &Cli,
    io: &mut Io<'_>,
    kind: v1::ResourceKind,
    name: &str,
    etag: Option<&str>,
    allow_mass_removal: bool,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request = v1::DeleteResourceRequest {
        r#ref: Some(v1::ResourceRef { kind: kind.into(), name: name.to_owned() }),
        etag: etag.unwrap_or_default().to_owned(),
        request_id: request_id(),
        validate_only: false,
        allow_mass_removal,
    };
    let revision = client
        .call(Retry::Once, request, |mut c, r| async move { c.delete_resource(r).await })
        .await?
        .revision;
    let kind = kind_name(kind);
    io.result(
        || format!("deleted {kind} {name}\n"),
        || json!({"kind": kind, "name": name, "action": "delete", "revision": revision}),
    )?;
    wait::applied(&client, io, wait, revision).await
}
