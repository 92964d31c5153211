//! `weir-gateway`: arguments -> gateway -> run until a signal -> drain.

use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;
use weir_gateway::config::Config;
use weir_gateway::{StartError, start};
use weir_runtime::exit;

#[tokio::main]
async fn main() -> ExitCode {
    let config = Config::parse();
    if let Err(error) = weir_runtime::init_logs(&config.log) {
        eprintln!("weir-gateway: --log: {error}");
        return exit::USAGE.into();
    }
    let (shutdown, hurry) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), hurry.clone()));
    let done = match start(config, None, shutdown, hurry).await {
        Ok(running) => {
            tracing::info!(clients = %running.address, ops = %running.ops_address, "starting");
            running.ended().await
        }
        Err(error) => Err(error),
    };
    match done {
        Ok(()) => exit::DONE.into(),
        Err(error) => {
            eprintln!("weir-gateway: {error}");
            match error {
                StartError::Config(_) => exit::CONFIG.into(),
                StartError::Listen { .. } => exit::FAILED.into(),
            }
        }
    }
}
