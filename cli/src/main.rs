//! The `weir` command: reads the arguments, starts the runtime, runs.

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match weir::arguments() {
        Ok(cli) => cli,
        Err(error) => {
            eprintln!("weir: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(weir::run(cli)),
        Err(error) => {
            eprintln!("weir: cannot start: {error}");
            ExitCode::from(weir_runtime::exit::FAILED)
        }
    }
}
