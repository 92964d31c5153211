//! The end of a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancels `shutdown` at the first SIGTERM or SIGINT and `hurry` at the second. Runs until the process ends.
pub async fn shutdown_on_signals(
    shutdown: CancellationToken,
    hurry: CancellationToken,
) -> std::io::Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    for token in [shutdown, hurry] {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
        token.cancel();
    }
    Ok(())
}
