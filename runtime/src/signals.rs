//! The end of a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The signal to a process that writes beyond its largest file size (`ulimit -f`), which ends the process by default.
/// Its number is the same on Linux and macOS, on x86 and ARM.
const SIGXFSZ: i32 = 25;

/// Cancels `shutdown` at the first SIGTERM or SIGINT and `force` at the second. Runs until the process ends.
pub async fn shutdown_on_signals(
    shutdown: CancellationToken,
    force: CancellationToken,
) -> std::io::Result<()> {
    // A handled signal does not end the process; the write then fails, as on a full disk. A signal without a handler
    // keeps its default.
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
