//! `get`, `list` and `describe`.

use weir_proto::{manifest, v1};

use super::backends;
use crate::args::{Cli, OutputFormat};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;

/// Resources asked for at once.
const PAGE_SIZE: i32 = 500;

pub(super) async fn one(cli: &Cli, io: &mut Io<'_>, kind: v1::ResourceKind, name: &str) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let resource = read(&client, kind, name).await?;
    io.resources(kind, &[resource])
}

pub(super) async fn all(cli: &Cli, io: &mut Io<'_>, kind: v1::ResourceKind) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let resources = read_all(&client, kind).await?;
    io.resources(kind, &resources)
}

/// Every resource of a kind, all of one revision.
pub(super) async fn read_all(client: &Client, kind: v1::ResourceKind) -> Result<Vec<v1::Resource>, Error> {
    let mut resources = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = v1::ListResourcesRequest { kind: kind.into(), page_size: PAGE_SIZE, page_token };
        let page =
            client.call(Retry::Once, request, |mut c, r| async move { c.list_resources(r).await }).await?;
        resources.extend(page.resources);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(resources);
        }
    }
}

/// Always in full; a backend with its health.
pub(super) async fn describe(
    cli: &Cli,
    io: &mut Io<'_>,
    kind: v1::ResourceKind,
    name: &str,
) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let resource = read(&client, kind, name).await?;
    if !matches!(io.format, OutputFormat::Table | OutputFormat::Wide) {
        return io.resources(kind, &[resource]);
    }
    io.out.write_all(manifest::to_yaml_with_status(&[resource]).as_bytes())?;
    if kind == v1::ResourceKind::Backend {
        let all = backends::read(&client).await?;
        let found: Vec<_> = all.into_iter().filter(|b| b.backend == name).collect();
        io.out.write_all(b"\n")?;
        io.out.write_all(backends::table(&found).as_bytes())?;
    }
    Ok(())
}

pub(super) async fn read(client: &Client, kind: v1::ResourceKind, name: &str) -> Result<v1::Resource, Error> {
    let reference = v1::ResourceRef { kind: kind.into(), name: name.to_owned() };
    let request = v1::GetResourceRequest { r#ref: Some(reference) };
    let answer = client.call(Retry::Once, request, |mut c, r| async move { c.get_resource(r).await }).await?;
    answer.resource.ok_or(Error::Answer("resource"))
}
