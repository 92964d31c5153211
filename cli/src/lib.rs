//! The `weir` command: what operators type, turned into calls of the admin service.
//!
//! * [`Cli`]: the arguments; one definition gives parsing, help and completion.
//! * [`run`]: does what they say and answers with the exit code; [`execute`] is the same with the streams given, so
//!   that tests read what is printed.
//!
//! Results go to standard output, everything for people only (what is waited for, what went wrong) to standard error.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod args;
mod client;
mod commands;
mod contexts;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod import;
mod output;
mod tables;
mod up;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory as _, FromArgMatches as _};

pub use args::{
    ApplyArgs, AuditArgs, BackendRef, BackupArgs, Cli, Command, ContextCommand, DrainArgs, FileArgs,
    GatewayCommand, KeyCommand, Kind, KnownEntry, OutputFormat, ProbeArgs, Reference, RoleName, RollbackArgs,
    Servers, TierName, TokenCommand, UpArgs, UsageArgs, UsageBy, WaitArgs, WatchArgs,
};
pub use error::Error;

/// The arguments of the process, with what the context in use adds to them. Wrong usage, and questions such as
/// `--help`, end the process.
pub fn arguments() -> Result<Cli, Error> {
    let matches = Cli::command().get_matches();
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if !matches!(cli.command, Command::Context(_) | Command::Up(_)) {
        args::fill(&mut cli, &matches)?;
    }
    Ok(cli)
}

/// Does what the arguments say, on the process's own streams.
pub async fn run(cli: Cli) -> ExitCode {
    if matches!(cli.command, Command::Up(_)) {
        // A service waits for nobody who reads what it prints. Why it ends is said in its log.
        let mut err = Vec::new();
        let code = execute(cli, &mut output::Patient::default(), &mut err).await;
        let err = String::from_utf8_lossy(&err);
        err.lines().for_each(weir_runtime::say);
        return ExitCode::from(code);
    }
    // Unlocked: a lock held across an await would stop every other printer.
    ExitCode::from(execute(cli, &mut std::io::stdout(), &mut std::io::stderr()).await)
}

/// Says on standard error why the command fails. It fails all the same when nobody can be told.
pub fn complain(reason: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "weir: {reason}");
}

/// Does what the arguments say and returns the exit code; see [`weir_runtime::exit`], and `diff` for its own.
pub async fn execute(cli: Cli, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let mut io = output::Io { out, err, format: cli.output };
    match commands::dispatch(&cli, &mut io).await {
        Ok(code) => code,
        // The reader of a pipe may go away; that is not our failure.
        Err(Error::Print(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => weir_runtime::exit::DONE,
        Err(error) => {
            let _ = writeln!(io.err, "weir: {error}");
            match (&cli.command, error.exit_code()) {
                // 1 says that there are differences.
                (
                    Command::Diff(_) | Command::Gateway(GatewayCommand::Diff { .. }),
                    weir_runtime::exit::FAILED,
                ) => weir_runtime::exit::USAGE,
                (_, code) => code,
            }
        }
    }
}
