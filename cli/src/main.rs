//! The `weir` command: reads the arguments, starts the runtime, runs.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = weir::Cli::parse();
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(weir::run(cli)),
        Err(error) => {
            eprintln!("weir: cannot start: {error}");
            ExitCode::from(weir_runtime::exit::FAILED)
        }
    }
}
