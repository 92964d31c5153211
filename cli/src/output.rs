//! Standard output and standard error of commands, and the formats of results.

use std::io::{self, Write};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::Value;
use weir_proto::{manifest, v1};

use crate::args::OutputFormat;
use crate::error::Error;
use crate::tables;

/// How long a service waits for the reader of its standard output.
const PRINT_TIMEOUT: Duration = Duration::from_secs(1);

/// Standard output of a service. A flush returns within a second, even if nothing reads the output; the text is printed
/// when it is read.
#[derive(Debug, Default)]
pub(crate) struct Patient(Vec<u8>);

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let text = std::mem::take(&mut self.0);
        let (printed, done) = mpsc::channel();
        // Not joined, because the thread may hang until the process ends.
        std::thread::Builder::new().name("weir-print".into()).spawn(move || {
            let mut out = io::stdout();
            // The receiver is dropped after the timeout.
            let _ = printed.send(out.write_all(&text).and_then(|()| out.flush()));
        })?;
        let nobody = |_| io::Error::new(io::ErrorKind::TimedOut, "standard output is not read");
        done.recv_timeout(PRINT_TIMEOUT).map_err(nobody)?
    }
}

/// The streams and the output format.
pub(crate) struct Io<'a> {
    pub(crate) out: &'a mut dyn Write,
    pub(crate) err: &'a mut dyn Write,
    pub(crate) format: OutputFormat,
}

impl Io<'_> {
    /// Prints resources of one kind: columns, or documents with the output-only fields.
    pub(crate) fn resources(
        &mut self,
        kind: v1::ResourceKind,
        resources: &[v1::Resource],
    ) -> Result<(), Error> {
        let text = match self.format {
            OutputFormat::Table => tables::resources(kind, resources),
            OutputFormat::Wide => tables::resources_wide(kind, resources),
            OutputFormat::Json => manifest::to_json_with_status(resources),
            OutputFormat::Yaml => manifest::to_yaml_with_status(resources),
        };
        Ok(self.out.write_all(text.as_bytes())?)
    }

    /// Prints a result that is not a resource: text, or the JSON value.
    pub(crate) fn result(
        &mut self,
        text: impl FnOnce() -> String,
        value: impl FnOnce() -> Value,
    ) -> Result<(), Error> {
        match self.format {
            OutputFormat::Table | OutputFormat::Wide => self.out.write_all(text().as_bytes())?,
            // YAML includes JSON.
            OutputFormat::Json | OutputFormat::Yaml => writeln!(self.out, "{:#}", value())?,
        }
        Ok(())
    }

    /// Whether the format is a table, and whether it is wide.
    pub(crate) fn wide(&self) -> bool {
        self.format == OutputFormat::Wide
    }

    /// Prints a note to standard error.
    pub(crate) fn note(&mut self, text: &str) -> Result<(), Error> {
        Ok(writeln!(self.err, "{text}")?)
    }
}
