//! The defaults that the current context adds to the arguments.

use std::str::FromStr as _;

use clap::ArgMatches;
use clap::parser::ValueSource;

use super::{Cli, Servers};
use crate::contexts::{self, Contexts, TokenRef};
use crate::error::Error;

/// Sets the arguments that neither flags nor environment variables set.
///
/// # Errors
/// If the named context does not exist, or the file cannot be read.
pub(crate) fn fill(cli: &mut Cli, matches: &ArgMatches) -> Result<(), Error> {
    let given = matches.value_source("server").is_some_and(|source| source != ValueSource::DefaultValue);
    if cli.context.is_none() && given {
        return Ok(());
    }
    let known = match contexts::path() {
        Ok(path) => Contexts::read(&path)?,
        // Without a home directory there are no contexts, which is an error only if one is named.
        Err(_) if cli.context.is_none() => return Ok(()),
        Err(error) => return Err(error),
    };
    let Some(name) = cli.context.as_ref().or(known.current.as_ref()) else { return Ok(()) };
    if given {
        return Err(Error::Setting(
            "--context and a server of its own (--server, WEIR_SERVER) exclude each other".into(),
        ));
    }
    let context = known
        .all
        .get(name)
        .ok_or_else(|| Error::Setting(format!("there is no context {name}; weir context list shows all")))?;
    cli.server = Servers::from_str(&context.server).map_err(Error::Setting)?;
    // Flags and environment variables take precedence over the context.
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
