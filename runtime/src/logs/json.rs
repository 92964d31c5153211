//! Events as JSON, one object on a line: the time, the level, the fields and the target.
//!
//! `tracing-subscriber` has such a formatter; a line of a request costs four times as much there.

use std::cell::RefCell;
use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Formats events.
#[derive(Debug, Clone, Copy)]
pub(super) struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'l> LookupSpan<'l>,
    N: for<'w> FormatFields<'w> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let about = event.metadata();
        writer.write_str("{\"timestamp\":\"")?;
        write_time(&mut writer, crate::wall_clock())?;
        write!(writer, "\",\"level\":\"{}\"", about.level())?;
        let mut fields = Fields { writer: &mut writer, result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        writer.write_str(",\"target\":")?;
        write_text(&mut writer, about.target())?;
        if let Some(span) = context.lookup_current() {
            writer.write_str(",\"span\":")?;
            write_text(&mut writer, span.name())?;
        }
        writer.write_str("}\n")
    }
}

/// Writes the fields of an event.
struct Fields<'a, 'w> {
    writer: &'a mut Writer<'w>,
    result: fmt::Result,
}

impl Fields<'_, '_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        if self.result.is_err() {
            return;
        }
        let writer = &mut *self.writer;
        // Names are identifiers of Rust, with dots at the most.
        self.result = write_all(writer, [",\"", field.name(), "\":"]).and_then(|()| value(writer));
    }
}

impl Visit for Fields<'_, '_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.write(field, |writer| match value.is_finite() {
            true => write!(writer, "{value}"),
            false => writer.write_str("null"),
        });
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, |writer| write!(writer, "{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, |writer| write!(writer, "{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, |writer| writer.write_str(if value { "true" } else { "false" }));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write(field, |writer| write_text(writer, value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, |writer| {
            writer.write_char('"')?;
            write!(Escaped(writer), "{value:?}")?;
            writer.write_char('"')
        });
    }
}

fn write_all<const N: usize>(writer: &mut Writer<'_>, parts: [&str; N]) -> fmt::Result {
    parts.into_iter().try_for_each(|part| writer.write_str(part))
}

fn write_text(writer: &mut Writer<'_>, text: &str) -> fmt::Result {
    writer.write_char('"')?;
    Escaped(writer).write_str(text)?;
    writer.write_char('"')
}

/// Writes into a string of JSON.
struct Escaped<'a, 'w>(&'a mut Writer<'w>);

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.bytes().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)) {
            self.0.write_str(&rest[..at])?;
            match rest.as_bytes()[at] {
                b'"' => self.0.write_str("\\\"")?,
                b'\\' => self.0.write_str("\\\\")?,
                b'\n' => self.0.write_str("\\n")?,
                control => write!(self.0, "\\u{control:04x}")?,
            }
            rest = &rest[at + 1..];
        }
        self.0.write_str(rest)
    }
}

/// The day and the time of the last line, up to its second.
#[derive(Debug, Default)]
struct Second {
    number: u64,
    text: String,
}

/// Writes a time as RFC 3339 in UTC, with microseconds.
fn write_time(writer: &mut Writer<'_>, time: SystemTime) -> fmt::Result {
    thread_local! {
        static LAST: RefCell<Second> = RefCell::default();
    }
    // A clock before 1970 is wrong, and the line says so.
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    LAST.with_borrow_mut(|last| {
        if last.text.is_empty() || last.number != since.as_secs() {
            let second =
                i64::try_from(since.as_secs()).ok().and_then(|second| Timestamp::from_second(second).ok());
            let text = second.unwrap_or(Timestamp::MAX).to_string();
            *last = Second { number: since.as_secs(), text: text.trim_end_matches('Z').to_owned() };
        }
        writer.write_str(&last.text)?;
        write!(writer, ".{:06}Z", since.subsec_micros())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use proptest::prelude::*;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// The lines that are logged meanwhile.
    fn lines(log: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Text(Arc<Mutex<Vec<u8>>>);
        impl std::io::Write for Text {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().expect("not poisoned").extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let text = Text::default();
        let writer = text.clone();
        let layer =
            tracing_subscriber::fmt::layer().event_format(JsonLines).with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = text.0.lock().expect("not poisoned").clone();
        String::from_utf8(bytes).expect("text")
    }

    proptest! {
        #[test]
        fn a_line_is_an_object_that_says_what_was_logged(
            text in any::<String>(), shown in any::<String>(), number in any::<u64>(), signed in any::<i64>(),
            float in any::<f64>(), flag in any::<bool>(), there in proptest::option::of(any::<u32>()),
        ) {
            let line = lines(|| {
                tracing::info!(
                    target: "weir::tests", text, shown = %shown, debug = ?shown, number, signed, float, flag, there,
                    "a message"
                );
            });
            prop_assert_eq!(line.matches('\n').count(), 1, "{}", line);
            let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            prop_assert_eq!(&read["message"], "a message");
            prop_assert_eq!((&read["level"], &read["target"]), (&"INFO".into(), &"weir::tests".into()));
            prop_assert_eq!(&read["text"], &text);
            prop_assert_eq!(&read["shown"], &shown);
            prop_assert_eq!(&read["debug"], &format!("{shown:?}"));
            prop_assert_eq!((read["number"].as_u64(), read["signed"].as_i64()), (Some(number), Some(signed)));
            // The reader may be off by the last digit.
            let off = |read: f64| (read - float).abs() <= float.abs() * 1e-15;
            prop_assert_eq!(read["float"].as_f64().map(off), float.is_finite().then_some(true));
            prop_assert_eq!(read["flag"].as_bool(), Some(flag));
            prop_assert_eq!(read.get("there").and_then(serde_json::Value::as_u64), there.map(u64::from));
        }
    }

    #[test]
    fn a_time_is_written_as_the_log_always_wrote_it() {
        let written = |at: Duration| {
            let mut text = String::new();
            write_time(&mut Writer::new(&mut text), UNIX_EPOCH + at).expect("written");
            text
        };
        let second = Duration::from_secs(1_795_971_600);
        assert_eq!(written(second), "2026-11-29T17:00:00.000000Z");
        assert_eq!(written(second + Duration::from_micros(70)), "2026-11-29T17:00:00.000070Z");
        assert_eq!(written(second + Duration::from_millis(1500)), "2026-11-29T17:00:01.500000Z");
    }

    #[test]
    fn a_line_inside_a_span_names_it() {
        let line = lines(|| tracing::info_span!("outer").in_scope(|| tracing::warn!("within")));
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&read["span"], &read["level"]), (&"outer".into(), &"WARN".into()));
    }
}
