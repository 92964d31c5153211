//! One line per event on standard error: text for a person at a terminal, JSON for a collector.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

/// Starts logging for the process. `filter` is a `tracing` filter such as `info` or `weir_gateway=debug`; a bad one
/// is an error that names it. JSON unless standard error is a terminal. A second call changes nothing.
pub fn init_logs(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log filter '{filter}': {e}"))?;
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = if std::io::stderr().is_terminal() {
        builder.try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
    Ok(())
}
