//! The commands, one file per noun.

mod apply;
mod backend;
mod backends;
mod backup;
mod check;
mod context;
mod delete;
mod drain;
mod edit;
mod explain;
mod gateways;
mod get;
mod health;
mod history;
mod import;
mod key;
mod limits;
mod probe;
mod token;
mod usage;
mod wait;
mod watch;

use weir_proto::v1;
use weir_runtime::exit;

use crate::args::{self, Cli, Command, ImportCommand};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

/// Does a command; the exit code is 0 except for the two that say whether anything differs.
pub(crate) async fn dispatch(cli: &Cli, io: &mut Io<'_>) -> Result<u8, Error> {
    use v1::AdminState as State;
    match &cli.command {
        Command::Up(args) => crate::up::up(args, io).await?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut args::command(), "weir", &mut script);
            io.out.write_all(&script)?;
        }
        Command::Get { kind, name: Some(name) } => get::one(cli, io, kind.0, name).await?,
        Command::Get { kind, name: None } | Command::List { kind } => get::all(cli, io, kind.0).await?,
        Command::Describe { kind, name } => get::describe(cli, io, kind.0, name).await?,
        Command::Apply(args) => apply::apply(cli, io, args).await?,
        Command::Diff(args) => return apply::diff(cli, io, args).await,
        Command::Delete(args) => delete::delete(cli, io, args).await?,
        Command::Edit { kind, name, wait } => edit::edit(cli, io, kind.0, name, wait).await?,
        Command::Explain { what, markdown } => explain::explain(io, what.as_deref(), *markdown)?,
        Command::Watch(args) => watch::watch(cli, io, args).await?,
        Command::History { kind, name, last } => {
            let of = kind.zip(name.clone());
            let of = of.map(|(kind, name)| v1::ResourceRef { kind: kind.0.into(), name });
            if kind.is_some() && of.is_none() {
                return Err(Error::Setting("history takes KIND and NAME, or neither".to_owned()));
            }
            history::history(cli, io, of, (*last).max(1)).await?;
        }
        Command::Audit(args) => history::audit(cli, io, args).await?,
        Command::Rollback(args) => history::rollback(cli, io, args).await?,
        Command::Wait { revision, wait } => {
            let client = Client::connect(cli).await?;
            let newest = token::who_am_i(&client).await?.revision;
            wait::applied(&client, io, wait, revision.unwrap_or(newest)).await?;
        }
        Command::Check => check::check(cli, io).await?,
        Command::Drain(args) => drain::drain(cli, io, args).await?,
        Command::Undrain(args) | Command::Enable(args) => {
            backend::set_state(cli, io, args, State::Active).await?;
        }
        Command::Disable(args) => backend::set_state(cli, io, args, State::Disabled).await?,
        Command::Weight { backend, weight, wait } => {
            backend::set_weight(cli, io, backend, *weight, wait).await?;
        }
        Command::Import(ImportCommand::Litellm { file }) => import::litellm(io, file)?,
        Command::Import(ImportCommand::Ratelimit { file }) => import::ratelimit(io, file)?,
        Command::Health { url } => health::health(cli, io, url).await?,
        Command::Key(command) => key::key(cli, io, command).await?,
        Command::Usage(args) => usage::usage(cli, io, args).await?,
        Command::Limits(command) => limits::limits(cli, io, command).await?,
        Command::Token(command) => token::token(cli, io, command).await?,
        Command::Whoami => token::show_who_am_i(cli, io).await?,
        Command::Backup(args) => backup::backup(cli, io, args).await?,
        Command::Gateways => gateways::gateways(cli, io).await?,
        Command::Gateway(command) => return gateways::one(cli, io, command).await,
        Command::Backends => backends::backends(cli, io).await?,
        Command::Why { backend } => backends::why(cli, io, backend).await?,
        Command::Probe(args) => probe::probe(cli, io, args).await?,
        Command::Context(command) => context::context(cli, io, command)?,
        Command::Events { subject } => backends::events(cli, io, subject.as_deref()).await?,
    }
    Ok(exit::DONE)
}

/// Changes the fields of `mask` of one resource.
async fn update(
    client: &Client,
    name: &str,
    spec: v1::resource::Spec,
    mask: &str,
) -> Result<v1::Resource, Error> {
    let request = v1::UpdateResourceRequest {
        resource: Some(v1::Resource { name: name.to_owned(), spec: Some(spec), ..Default::default() }),
        update_mask: Some(prost_types::FieldMask { paths: vec![mask.to_owned()] }),
        request_id: request_id(),
        validate_only: false,
    };
    let answer =
        client.call(Retry::Once, request, |mut c, r| async move { c.update_resource(r).await }).await?;
    answer.resource.ok_or(Error::Answer("resource"))
}
