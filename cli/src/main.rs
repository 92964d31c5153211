//! The `weir` command: reads the arguments, starts the runtime, runs.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match weir::arguments() {
        Ok(cli) => cli,
        Err(error) => {
            weir::complain(&error);
            return ExitCode::from(error.exit_code());
        }
    };
    // A service's log is written after its runtime has ended; commands have none.
    let _flush = matches!(cli.command, weir::Command::Up(_)).then(weir_runtime::flush_logs_at_end);
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(weir::run(cli)),
        Err(error) => {
            weir::complain(&format_args!("cannot start: {error}"));
            ExitCode::from(weir_runtime::exit::FAILED)
        }
    }
}
