//! The log: one line per event on standard error, as text at a terminal and as JSON for a collector.
//!
//! No work of a process waits for its log. A line goes into a bounded queue ([`queue`]), which one thread writes. A
//! line that finds the queue full, or that cannot be written, is dropped and counted; the log reports the count as
//! soon as it can. Everything that a process writes to standard error goes this way: events, panics, and the last
//! message of a process that fails.

mod json;
mod panics;
mod queue;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::fmt::format::Writer as TimeWriter;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use queue::Queue;

/// The time that a process gives its log at its end. If nobody reads the log, the process ends without the rest.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static LINES_LOST: LazyLock<Counter> = LazyLock::new(Counter::default);
/// The queue of the process. Its thread is never joined, because it may hang in a write as long as the process lives.
static LOG: LazyLock<io::Result<Queue>> = LazyLock::new(|| {
    let form = if io::stderr().is_terminal() { Form::Text } else { Form::Json };
    // A descriptor of its own: a write that hangs must not hold the standard library's lock of standard error.
    let sink: Box<dyn Write + Send> = match io::stderr().as_fd().try_clone_to_owned() {
        Ok(descriptor) => Box::new(std::fs::File::from(descriptor)),
        Err(_) => Box::new(io::stderr()),
    };
    Queue::start(sink, form, LINES_LOST.clone())
});

/// Starts logging for the process. `filter` is a level, or levels by module: `info`, `warn,weir_gateway=debug`; a bad
/// filter is an error that names it. Lines are JSON unless standard error is a terminal. From here on panics are
/// lines of the log too. A second call changes nothing. The caller's `main` must hold [`flush_logs_at_end`].
pub fn init_logs(filter: &str) -> Result<(), String> {
    let filter: Targets = filter.parse().map_err(|e| format!("log filter '{filter}': {e}"))?;
    let queue = LOG.as_ref().map_err(|e| {
        format!("cannot start the thread that writes the log: {e}; raise the limit of processes (ulimit -u)")
    })?;
    // `tracing` would report an event that it cannot format on standard error, which may block or be gone.
    let builder =
        fmt().with_max_level(LevelFilter::TRACE).with_writer(|| Line(queue)).log_internal_errors(false);
    let started = match queue.form() {
        Form::Text => builder.finish().with(filter).try_init().is_ok(),
        Form::Json => builder.event_format(json::JsonLines).finish().with(filter).try_init().is_ok(),
    };
    if started {
        panics::log_panics(queue);
    }
    Ok(())
}

/// Writes plain text to standard error, in its turn among the lines of the log. Never waits and never fails, unlike
/// `eprintln!`, which panics if standard error is gone and hangs if nobody reads it.
pub fn say(text: &str) {
    match &*LOG {
        Ok(queue) => queue.push(format!("{text}\n").as_bytes()),
        Err(_) => {
            LINES_LOST.inc();
        }
    }
}

/// Registers the metrics of every process: lost lines of its log, and panics.
pub fn register(registry: &mut Registry) {
    registry.register(
        "weir_log_lines_lost",
        "Lines of this process's log that were dropped: nobody read them in time, or they could not be written",
        LINES_LOST.clone(),
    );
    registry.register("weir_panics", "Panics in this process, also those that were caught", panics::count());
}

/// Waits when it is dropped until the log is written, at most 1 s. `main` holds it from its first line on, so that it
/// is dropped after the runtime, and also when `main` panics.
#[derive(Debug)]
#[must_use = "it flushes when it is dropped"]
pub struct FlushLogs(());

/// See [`FlushLogs`].
pub fn flush_logs_at_end() -> FlushLogs {
    FlushLogs(())
}

impl Drop for FlushLogs {
    fn drop(&mut self) {
        if let Ok(queue) = &*LOG {
            queue.flush(FLUSH_TIMEOUT);
        }
    }
}

/// A formatted event for the queue. The subscriber writes it with a single call.
#[derive(Debug)]
struct Line(&'static Queue);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The form of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Json,
}

/// The value of a field.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Number(u64),
    Text(&'a str),
}

/// A line that does not come from `tracing`, which cannot log while it logs. It has the form of the others.
fn line(form: Form, level: &str, target: &str, message: &str, fields: &[(&str, Value<'_>)]) -> String {
    let mut time = String::new();
    // If the clock cannot be formatted, the line has no time.
    let _ = SystemTime.format_time(&mut TimeWriter::new(&mut time));
    let mut line = match form {
        Form::Text => format!("{time} {level:>5} {target}: {message}"),
        Form::Json => {
            format!("{{\"timestamp\":\"{time}\",\"level\":\"{level}\",\"message\":{}", quoted(message))
        }
    };
    for (name, value) in fields {
        // Writing to a string does not fail.
        let _ = match (form, value) {
            (Form::Text, Value::Number(number)) => write!(line, " {name}={number}"),
            (Form::Text, Value::Text(text)) => write!(line, " {name}={text:?}"),
            (Form::Json, Value::Number(number)) => write!(line, ",\"{name}\":{number}"),
            (Form::Json, Value::Text(text)) => write!(line, ",\"{name}\":{}", quoted(text)),
        };
    }
    if form == Form::Json {
        let _ = write!(line, ",\"target\":\"{target}\"}}");
    }
    line.push('\n');
    line
}

/// A text in JSON form.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The beginning of a text, of at most this number of bytes and of complete characters.
fn beginning(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_lines_are_json_a_collector_can_read_whatever_they_say() {
        let text = "a \"quote\", a\nline and \u{1b}[31m";
        let fields = [("lost", Value::Number(3)), ("panic", Value::Text(text))];
        let line = line(Form::Json, "WARN", "weir_runtime::logs", "log lines were lost", &fields);
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        let json: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(json["message"], "log lines were lost");
        assert_eq!((&json["level"], &json["target"]), (&"WARN".into(), &"weir_runtime::logs".into()));
        assert_eq!((&json["lost"], &json["panic"]), (&3.into(), &text.into()));
        assert!(json["timestamp"].as_str().is_some_and(|t| t.ends_with('Z')), "{line}");
    }

    #[test]
    fn own_lines_are_one_line_of_text_for_a_person() {
        let line = line(Form::Text, "ERROR", "t", "panicked", &[("panic", Value::Text("two\nlines"))]);
        assert!(line.ends_with("ERROR t: panicked panic=\"two\\nlines\"\n"), "{line:?}");
    }

    #[test]
    fn a_cut_text_keeps_whole_characters() {
        assert_eq!((beginning("añb", 2), beginning("añb", 3), beginning("añb", 9)), ("a", "añ", "añb"));
    }
}
