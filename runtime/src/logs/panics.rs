//! Panics as lines of the log. The standard library's hook writes to standard error itself and holds a lock
//! meanwhile. If the reader of standard error is stopped, a panic would hang its thread, and further panics would
//! hang theirs.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::sync::LazyLock;

use prometheus_client::metrics::counter::Counter;

use super::queue::Queue;
use super::{FLUSH_TIMEOUT, Value, beginning, line};

/// The longest logged text of a panic, bytes.
const MESSAGE_MAX_BYTES: usize = 4 << 10;
/// The longest logged backtrace, bytes. Only `RUST_BACKTRACE` makes one.
const BACKTRACE_MAX_BYTES: usize = 16 << 10;
/// Messages of the standard library before it aborts the process.
const ABORTS: [&str; 2] = ["panic in a destructor during cleanup", "panic in a function that cannot unwind"];

static PANICS: LazyLock<Counter> = LazyLock::new(Counter::default);

/// The count of all panics of this process.
pub(super) fn count() -> Counter {
    PANICS.clone()
}

/// Makes each panic one line of `queue`, whatever the filter, and counts it.
pub(super) fn log_panics(queue: &'static Queue) {
    std::panic::set_hook(Box::new(move |info| {
        PANICS.inc();
        let message = info.payload_as_str().unwrap_or("it is no text");
        let location = info.location().map(ToString::to_string);
        let thread = std::thread::current();
        let mut fields = vec![
            ("panic", Value::Text(beginning(message, MESSAGE_MAX_BYTES))),
            ("location", Value::Text(location.as_deref().unwrap_or("unknown"))),
            ("thread", Value::Text(thread.name().unwrap_or("unnamed"))),
        ];
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
        if let Some(backtrace) = &backtrace {
            fields.push(("backtrace", Value::Text(beginning(backtrace, BACKTRACE_MAX_BYTES))));
        }
        queue.push(line(queue.form(), "ERROR", "weir_runtime::panics", "panicked", &fields).as_bytes());
        if ABORTS.contains(&message) {
            queue.flush(FLUSH_TIMEOUT);
        }
    }));
}
