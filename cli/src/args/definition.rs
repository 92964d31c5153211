//! The definition of the command line as it is offered: that of [`Cli`], in which no command takes an option that has no
//! effect on it.

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Command, CommandFactory as _};

use super::Cli;
use crate::error::Error;

/// The options that say which control plane is called, and as whom.
const CONNECTION: [&str; 6] = ["server", "token_file", "ca", "cert", "cert_key", "context"];
/// How long its calls take.
const TIMEOUT: [&str; 1] = ["timeout"];

/// The global options that have no effect on a command, and what the command does instead of calling a control plane.
fn unused(command: &str) -> Option<(Vec<&'static str>, &'static str)> {
    let both = || [&CONNECTION[..], &TIMEOUT].concat();
    Some(match command {
        "up" => (both(), "it runs a control plane of its own, which --admin-listen gives an address"),
        "explain" | "import" | "completions" => (both(), "it calls no control plane"),
        "health" => (CONNECTION.to_vec(), "it asks the process at the URL, without a token"),
        _ => return None,
    })
}

/// The definition. A global option that has no effect on a command is not in its help.
pub(crate) fn command() -> Command {
    let whole = Cli::command();
    let global: Vec<Arg> = whole.get_arguments().filter(|arg| arg.is_global_set()).cloned().collect();
    whole.mut_subcommands(|command| {
        let Some((unused, _)) = unused(command.get_name()) else { return command };
        // Clap passes a global option on to commands that do not define it themselves.
        let hidden = global.iter().filter(|arg| unused.contains(&arg.get_id().as_str()));
        command.args(hidden.map(|arg| arg.clone().hide(true)))
    })
}

/// Refuses a global option that was given to a command on which it has no effect. One in the environment is for other
/// commands.
///
/// # Errors
/// Names the option and what the command does instead.
pub(crate) fn refuse_unused(matches: &ArgMatches) -> Result<(), Error> {
    let Some((command, (unused, instead))) =
        matches.subcommand_name().and_then(|name| Some((name, unused(name)?)))
    else {
        return Ok(());
    };
    match unused.into_iter().find(|id| matches.value_source(id) == Some(ValueSource::CommandLine)) {
        None => Ok(()),
        Some(id) => {
            let flag = id.replace('_', "-");
            Err(Error::Setting(format!("--{flag} has no effect on weir {command}: {instead}; leave it out")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_a_command_come_before_the_global_ones() {
        let mut whole = command();
        whole.build();
        for command in whole.get_subcommands_mut() {
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            let (own, global) = help.split_once("Global options:").unwrap_or((&help, ""));
            for flag in ["--server", "--token-file", "--context", "--timeout", "--output"] {
                assert!(
                    !own.contains(&format!("{flag} ")),
                    "{name}: {flag} is among its own options\n{help}"
                );
            }
            assert!(global.is_empty() || own.contains("--help"), "{name}: global options come last\n{help}");
        }
    }

    #[test]
    fn what_has_no_effect_on_a_command_is_neither_offered_nor_taken() {
        let help = |name: &str| {
            let mut whole = command();
            whole.build();
            whole.find_subcommand_mut(name).expect("a command").render_long_help().to_string()
        };
        let (up, usage) = (help("up"), help("usage"));
        for flag in ["--server", "--token-file", "--ca ", "--cert ", "--cert-key", "--context", "--timeout"] {
            assert!(!up.contains(flag) && usage.contains(flag), "{flag}: {up}");
        }
        assert!(up.contains("--output") && help("health").contains("--timeout"));
        let refused = |line: &str| {
            let matches = command().try_get_matches_from(line.split_whitespace()).expect(line);
            refuse_unused(&matches).err().map(|error| (error.to_string(), error.exit_code()))
        };
        for line in [
            "weir up --server http://h:1",
            "weir --server http://h:1 up",
            "weir up --timeout 5s",
            "weir up --token-file t",
            "weir up --context c",
            "weir up --cert c --cert-key k",
            "weir import litellm f --server h",
            "weir explain pool --server h",
            "weir health http://h/readyz --token-file t",
            "weir completions bash --ca c",
        ] {
            let (text, code) = refused(line).expect(line);
            assert!(text.contains("has no effect on weir") && code == 2, "{line}: {text}");
        }
        for line in [
            "weir up -o json",
            "weir health http://h --timeout 1s",
            "weir usage --server h",
            "weir --server h whoami",
        ] {
            assert_eq!(refused(line), None, "{line}");
        }
    }
}
