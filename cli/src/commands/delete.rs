//! `delete`.

use serde_json::json;
use weir_proto::resource::kind_name;
use weir_proto::v1;

use super::wait;
use crate::args::{Cli, DeleteArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

pub(super) async fn delete(
    cli: &Cli,
    io: &mut Io<'_>,
    DeleteArgs { kind, name, etag, allow_mass_removal, wait }: &DeleteArgs,
) -> Result<(), Error> {
    let kind = kind.0;
    let client = Client::connect(cli).await?;
    let request = v1::DeleteResourceRequest {
        r#ref: Some(v1::ResourceRef { kind: kind.into(), name: name.clone() }),
        etag: etag.clone().unwrap_or_default(),
        request_id: request_id(),
        validate_only: false,
        allow_mass_removal: *allow_mass_removal,
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
