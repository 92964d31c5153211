//! What the context in use adds to the arguments.

use std::str::FromStr as _;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::{Cli, Servers};
use crate::contexts::{self, Contexts, TokenRef};
use crate::error::Error;

/// Fills in what neither flags nor variables say.
///
/// # Errors
/// When a context is named that is not there, or the file cannot be read.
pub(crate) fn fill(cli: &mut Cli, matches: &ArgMatches) -> Result<(), Error> {
    let given = matches.value_source("server").is_some_and(|source| source != ValueSource::DefaultValue);
    if cli.context.is_none() && given {
        return Ok(());
    }
    let known = match contexts::path() {
        Ok(path) => Contexts::read(&path)?,
        // Without a home there is no context, which matters only to those who ask for one.
        Err(_) if cli.context.is_none() => return Ok(()),
        Err(error) => return Err(error),
    };
    let Some(name) = cli.context.as_ref().or(known.current.as_ref()) else { return Ok(()) };
    if given {
        return Err(Error::Setting(
            "--context and a server of its own (--server, WEIR_SERVER) exclude each other".into(),
        ));
    }
    let context = known.all.get(name).ok_or_else(|| {
        Error::Setting(format!("there is no context {name}; weir context list shows those there are"))
    })?;
    cli.server = Servers::from_str(&context.server).map_err(Error::Setting)?;
    // What the person says now counts more than what was noted once.
    if cli.token_file.is_none() && std::env::var_os("WEIR_TOKEN").is_none() {
        match &context.token {
            Some(TokenRef::File(path)) => cli.token_file = Some(path.clone()),
            Some(TokenRef::Env(name)) => cli.token_env = Some(name.clone()),
            None => {}
        }
    }
    cli.ca = cli.ca.take().or_else(|| context.ca.clone());
    if cli.cert.is_none() && cli.key.is_none() {
        (cli.cert, cli.key) = (context.cert.clone(), context.key.clone());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, FromArgMatches as _};

    use super::*;

    #[test]
    fn who_names_a_server_uses_no_context() {
        let matches =
            Cli::command().try_get_matches_from(["weir", "whoami", "--server", "h:1"]).expect("valid");
        let mut cli = Cli::from_arg_matches(&matches).expect("valid");
        fill(&mut cli, &matches).expect("nothing to do");
        assert_eq!(
            (cli.server.to_string(), cli.token_file, cli.token_env),
            ("http://h:1".to_owned(), None, None)
        );
    }
}
