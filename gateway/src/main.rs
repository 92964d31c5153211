//! `weir-gateway`: arguments -> gateway -> run until a signal -> drain.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;
use weir_gateway::config::Config;
use weir_gateway::{StartError, start};
use weir_runtime::exit;

fn main() -> ExitCode {
    let config = Config::parse();
    // Dropped after the runtime, so that what its tasks say last is written too.
    let _flush = weir_runtime::flush_logs_at_end();
    if let Err(error) = weir_runtime::init_logs(&config.log) {
        weir_runtime::say(&format!("weir-gateway: --log: {error}"));
        return exit::USAGE.into();
    }
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(run(config)).into(),
        Err(error) => {
            weir_runtime::say(&format!("weir-gateway: cannot start: {error}"));
            exit::FAILED.into()
        }
    }
}

async fn run(config: Config) -> u8 {
    let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), force.clone()));
    let done = match start(config, None, shutdown, force).await {
        Ok(handle) => {
            tracing::info!(clients = %handle.address, ops = %handle.ops_address, "starting");
            handle.ended().await
        }
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => exit::DONE,
        Err(error) => {
            weir_runtime::say(&format!("weir-gateway: {error}"));
            match error {
                StartError::Config(_) => exit::CONFIG,
                StartError::Listen { .. } => exit::FAILED,
            }
        }
    }
}
