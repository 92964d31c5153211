//! `drain`, `undrain`, `disable`, `enable` and `weight`.

use serde_json::json;
use weir_proto::v1;
use weir_proto::v1::resource::Spec;

use super::{update, wait};
use crate::args::{BackendRef, Cli, WaitArgs};
use crate::client::Client;
use crate::error::Error;
use crate::output::Io;
use crate::tables;

/// One field of a backend as it is to be.
struct Change {
    spec: v1::BackendSpec,
    field: &'static str,
    /// What is printed when it is done.
    done: String,
}

pub(super) async fn set_state(
    cli: &Cli,
    io: &mut Io<'_>,
    args: &BackendRef,
    state: v1::AdminState,
) -> Result<(), Error> {
    let spec = v1::BackendSpec { admin_state: state.into(), ..Default::default() };
    let done = format!("backend {} is {}", args.backend, tables::state(state));
    change(cli, io, &args.backend, Change { spec, field: "admin_state", done }, &args.wait).await
}

pub(super) async fn set_weight(
    cli: &Cli,
    io: &mut Io<'_>,
    backend: &str,
    weight: u32,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let spec = v1::BackendSpec { weight: Some(weight), ..Default::default() };
    let done = format!("backend {backend} has weight {weight}");
    change(cli, io, backend, Change { spec, field: "weight", done }, wait).await
}

async fn change(
    cli: &Cli,
    io: &mut Io<'_>,
    backend: &str,
    change: Change,
    wait: &WaitArgs,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let resource = update(&client, backend, Spec::Backend(change.spec), change.field).await?;
    let revision = resource.revision;
    io.result(
        || change.done + "\n",
        || json!({"kind": "backend", "name": backend, "action": "update", "revision": revision}),
    )?;
    wait::applied(&client, io, wait, revision).await
}
