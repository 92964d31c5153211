//! `weir-ratelimit`: arguments -> service -> run until a signal -> drain.

use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;
use weir_ratelimit::service::{self, Config};
use weir_runtime::exit;

#[tokio::main]
async fn main() -> ExitCode {
    let config = Config::parse();
    if let Err(error) = weir_runtime::init_logs(&config.log) {
        eprintln!("weir-ratelimit: --log: {error}");
        return exit::CONFIG.into();
    }
    let (shutdown, hurry) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), hurry.clone()));
    match service::start(config, None, shutdown, hurry).await {
        Ok(running) => {
            tracing::info!(grpc = %running.address, ops = %running.ops_address, "serving");
            running.ended().await;
            exit::DONE.into()
        }
        Err(error) => {
            eprintln!("weir-ratelimit: {error}");
            error.exit_code().into()
        }
    }
}
