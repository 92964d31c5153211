//! The end of a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Sent to a process that writes beyond the largest file it may write (`ulimit -f`), to end it. The number is the same on
/// Linux and macOS, on x86 and ARM.
const SIGXFSZ: i32 = 25;

/// Cancels `shutdown` at the first SIGTERM or SIGINT and `force` at the second. Runs until the process ends.
pub async fn shutdown_on_signals(
    shutdown: CancellationToken,
    force: CancellationToken,
) -> std::io::Result<()> {
    // Whoever hears it does not end of it; the write fails then, as on a full disk. Whatever cannot be heard is not.
    let _too_large = signal(SignalKind::from_raw(SIGXFSZ)).ok();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    for token in [shutdown, force] {
        let name = tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "stopping");
        token.cancel();
    }
    Ok(())
}
