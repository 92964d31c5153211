//! The `weir` command, which calls the admin service.
//!
//! * [`Cli`]: the arguments; one definition gives parsing, help and completion.
//! * [`run`]: executes a command and returns the exit code; [`execute`] is the same with the streams as arguments, for
//!   tests.
//!
//! Results go to standard output. Progress and errors go to standard error.

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
use std::pin::Pin;
use std::process::ExitCode;

use clap::FromArgMatches as _;

pub use args::{
    ApplyArgs, AuditArgs, BackendRef, BackupArgs, Cli, Command, ContextCommand, DeleteArgs, DrainArgs,
    FileArgs, GatewayCommand, KeyCommand, Kind, KnownEntry, OutputFormat, ProbeArgs, Reference, RoleName,
    RollbackArgs, Servers, TierName, TokenCommand, UpArgs, UsageArgs, UsageBy, WaitArgs, WatchArgs,
};
pub use error::Error;

/// The arguments of the process, with the defaults of the current context. Invalid arguments and `--help` end the process.
pub fn arguments() -> Result<Cli, Error> {
    let matches = args::command().get_matches();
    args::refuse_unused(&matches)?;
    let mut cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if !matches!(cli.command, Command::Context(_) | Command::Up(_)) {
        args::fill(&mut cli, &matches)?;
    }
    Ok(cli)
}

/// Executes the command on the streams of the process.
pub fn run(cli: Cli) -> Pin<Box<dyn Future<Output = ExitCode>>> {
    Box::pin(run_to_end(cli))
}

async fn run_to_end(cli: Cli) -> ExitCode {
    if matches!(cli.command, Command::Up(_)) {
        // A service does not wait for a reader of its output. The reason of its end is in its log.
        let mut err = Vec::new();
        let code = execute(cli, &mut output::Patient::default(), &mut err).await;
        let err = String::from_utf8_lossy(&err);
        err.lines().for_each(weir_runtime::say);
        return ExitCode::from(code);
    }
    // Without a lock, which would block other writers across an await.
    ExitCode::from(execute(cli, &mut std::io::stdout(), &mut std::io::stderr()).await)
}

/// Prints the reason of a failure to standard error. An error while printing is ignored.
pub fn complain(reason: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "weir: {reason}");
}

/// Executes the command and returns the exit code: see [`weir_runtime::exit`]; `diff` has its own.
pub async fn execute(cli: Cli, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let mut io = output::Io { out, err, format: cli.output };
    match commands::dispatch(&cli, &mut io).await {
        Ok(code) => code,
        // A closed pipe is not a failure of the command.
        Err(Error::Print(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => weir_runtime::exit::DONE,
        Err(error) => {
            let _ = writeln!(io.err, "weir: {error}");
            match (&cli.command, error.exit_code()) {
                // 1 means differences.
                (
                    Command::Diff(_) | Command::Gateway(GatewayCommand::Diff { .. }),
                    weir_runtime::exit::FAILED,
                ) => weir_runtime::exit::USAGE,
                (_, code) => code,
            }
        }
    }
}
