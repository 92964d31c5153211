//! The log: one line per event on standard error, text for a person at a terminal, JSON for a collector.
//!
//! Nothing that a process does waits for its log. Whoever logs puts a line into a bounded queue ([`queue`]), and one
//! thread writes. A line that finds the queue full, or that cannot be written, is dropped and counted; the log itself
//! says how many as soon as it can. All that a process writes to standard error goes this way: events, panics, and the
//! last word of a process that fails.

mod panics;
mod queue;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tracing_subscriber::fmt::format::Writer as TimeWriter;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::{EnvFilter, fmt};

use queue::Queue;

/// A process that ends gives its log so long, and ends without the rest when nobody reads it.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static LINES_LOST: LazyLock<Counter> = LazyLock::new(Counter::default);
/// The queue of the process. Its thread is never joined: it may hang in a write for as long as the process lives.
static LOG: LazyLock<io::Result<Queue>> = LazyLock::new(|| {
    let form = if io::stderr().is_terminal() { Form::Text } else { Form::Json };
    // A descriptor of our own: a write that hangs must not hold the lock that the standard library puts around its own.
    let sink: Box<dyn Write + Send> = match io::stderr().as_fd().try_clone_to_owned() {
        Ok(descriptor) => Box::new(std::fs::File::from(descriptor)),
        Err(_) => Box::new(io::stderr()),
    };
    Queue::start(sink, form, LINES_LOST.clone())
});

/// Starts logging for the process. `filter` is a `tracing` filter such as `info` or `weir_gateway=debug`; a bad one
/// is an error that names it. JSON unless standard error is a terminal. From here on panics are lines of the log too.
/// A second call changes nothing. Whoever calls this holds [`flush_logs_at_end`] in its `main`.
pub fn init_logs(filter: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|e| format!("log filter '{filter}': {e}"))?;
    let queue = LOG.as_ref().map_err(|e| {
        format!("cannot start the thread that writes the log: {e}; raise the limit of processes (ulimit -u)")
    })?;
    // An event that cannot be formatted is no reason to write to standard error, which may block or be gone.
    let builder = fmt().with_env_filter(filter).with_writer(|| Line(queue)).log_internal_errors(false);
    let started = match queue.form() {
        Form::Text => builder.try_init().is_ok(),
        Form::Json => builder.json().flatten_event(true).try_init().is_ok(),
    };
    if started {
        panics::log_panics(queue);
    }
    Ok(())
}

/// Says something on standard error, in plain text, in its turn among the lines of the log. Never waits and never
/// fails, unlike `eprintln!`, which panics when standard error is gone and hangs when nobody reads it.
pub fn say(text: &str) {
    match &*LOG {
        Ok(queue) => queue.push(format!("{text}\n").as_bytes()),
        Err(_) => {
            LINES_LOST.inc();
        }
    }
}

/// Metrics that every process has: lines of its log that were lost, and panics.
pub fn register(registry: &mut Registry) {
    registry.register(
        "weir_log_lines_lost",
        "Lines of this process's log that were dropped: nobody read them in time, or they could not be written",
        LINES_LOST.clone(),
    );
    registry.register("weir_panics", "Panics in this process, also those that were caught", panics::count());
}

/// Waits when it is dropped until the log is written, 1 s at most. Held by `main` from its first line on, so that it
/// is dropped after the runtime and also when `main` panics.
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

/// One formatted event on its way into the queue. The subscriber writes it with a single call.
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

/// How lines look.
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

/// A line that does not come from `tracing`, because `tracing` refuses what is logged while it logs. It looks like those
/// that do.
fn line(form: Form, level: &str, target: &str, message: &str, fields: &[(&str, Value<'_>)]) -> String {
    let mut time = String::new();
    // A clock that cannot be formatted leaves the line without its time.
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

/// A text as JSON writes it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The beginning of a text, at most so many bytes and whole characters.
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
