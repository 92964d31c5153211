//! Where results go, and their forms.

use std::io::Write;

use serde_json::Value;
use weir_proto::{manifest, v1};

use crate::args::OutputFormat;
use crate::error::Error;
use crate::tables;

/// The streams and the form wanted.
pub(crate) struct Io<'a> {
    pub(crate) out: &'a mut dyn Write,
    pub(crate) err: &'a mut dyn Write,
    pub(crate) format: OutputFormat,
}

impl Io<'_> {
    /// Prints resources of one kind: columns, or documents with what the system says of them.
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

    /// Prints a result that is no resource: text for people, or the value.
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

    /// Whether columns are wanted, and whether more of them.
    pub(crate) fn wide(&self) -> bool {
        self.format == OutputFormat::Wide
    }

    /// Says something to the person.
    pub(crate) fn note(&mut self, text: &str) -> Result<(), Error> {
        Ok(writeln!(self.err, "{text}")?)
    }
}

/// A point in time, RFC 3339 to the second; "-" for none.
pub(crate) fn time(time: Option<&prost_types::Timestamp>) -> String {
    let second = time.and_then(|t| jiff::Timestamp::from_second(t.seconds).ok());
    second.map_or_else(|| "-".to_owned(), |t| t.to_string())
}
