//! The results of a bench: rows of named figures, as a table for people or as one JSON object for programs.
//!
//! Both show the same rows under the same names. Names are stable snake_case with the unit in them.

use std::io::Write as _;

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::{Map, Value, json};

/// Rows with more columns are printed as lines.
const COLUMNS_MAX: usize = 11;

/// The reader of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// A table.
    Table,
    /// One JSON object on stdout.
    Json,
}

/// Figures by name, in the order of the columns.
#[derive(Debug, Clone, Default)]
pub(crate) struct Row(Vec<(&'static str, Value)>);

impl Row {
    /// A text.
    pub(crate) fn text(mut self, name: &'static str, text: impl Into<String>) -> Self {
        self.0.push((name, Value::String(text.into())));
        self
    }

    /// A count.
    pub(crate) fn count(mut self, name: &'static str, count: u64) -> Self {
        self.0.push((name, json!(count)));
        self
    }

    /// A figure with this number of decimals; `None` was not measured.
    pub(crate) fn figure(
        mut self,
        name: &'static str,
        figure: impl Into<Option<f64>>,
        decimals: i32,
    ) -> Self {
        let scale = 10_f64.powi(decimals);
        let rounded = figure.into().filter(|f| f.is_finite()).map(|f| (f * scale).round() / scale);
        let value = match rounded {
            None => Value::Null,
            Some(whole) if decimals == 0 => json!(whole as i64),
            Some(figure) => json!(figure),
        };
        self.0.push((name, value));
        self
    }
}

impl Row {
    fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name)
    }

    fn cell(&self, name: &str) -> String {
        match self.0.iter().find(|(n, _)| *n == name).map(|(_, value)| value) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        }
    }
}

/// The result of one bench.
#[derive(Debug)]
pub(crate) struct Report {
    /// The subcommand.
    pub(crate) bench: &'static str,
    /// The machine.
    pub(crate) machine: Value,
    /// The results.
    pub(crate) rows: Vec<Row>,
    /// What a reader must know to judge the rows.
    pub(crate) notes: Vec<String>,
}

impl Report {
    /// Prints to stdout.
    pub(crate) fn print(&self, output: Output) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        match output {
            Output::Json => writeln!(out, "{}", self.json())?,
            Output::Table => {
                writeln!(out, "\n{}\n{}", self.bench, self.machine_line())?;
                for table in self.tables() {
                    writeln!(out, "{table}\n")?;
                }
                for note in &self.notes {
                    writeln!(out, "- {note}")?;
                }
            }
        }
        out.flush()
    }

    fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let figures = row.0.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
                Value::Object(figures.collect::<Map<_, _>>())
            })
            .collect();
        json!({ "bench": self.bench, "machine": self.machine, "rows": rows, "notes": self.notes })
    }

    fn machine_line(&self) -> String {
        let Value::Object(machine) = &self.machine else { return String::new() };
        let text = |value: &Value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        machine.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect::<Vec<_>>().join(", ")
    }

    /// Rows of the same figures make a table.
    fn tables(&self) -> Vec<Table> {
        self.rows.chunk_by(|a, b| a.names().eq(b.names())).map(table).collect()
    }
}

/// One line per row; one column per row if that would be too wide to read.
fn table(rows: &[Row]) -> Table {
    let names: Vec<&'static str> = rows.iter().take(1).flat_map(Row::names).collect();
    let title = |name: &str| name.replace('_', " ");
    let mut lines: Vec<Vec<String>> = vec![names.iter().map(|name| title(name)).collect()];
    lines.extend(rows.iter().map(|row| names.iter().map(|name| row.cell(name)).collect()));
    if names.len() > COLUMNS_MAX {
        lines = transposed(&lines);
    }
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let mut lines = lines.into_iter();
    table.set_header(lines.next().unwrap_or_default());
    table.add_rows(lines);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn transposed(lines: &[Vec<String>]) -> Vec<Vec<String>> {
    let width = lines.first().map_or(0, Vec::len);
    (0..width).map(|i| lines.iter().filter_map(|line| line.get(i).cloned()).collect()).collect()
}

/// Prints the progress on stderr, because a bench takes minutes.
pub(crate) fn progress(text: &str) {
    eprintln!("weir-bench: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_and_json_show_the_same_figures() {
        let row = Row::default().text("target", "weir").figure("added_p50_us", 12.346, 1).count("errors", 0);
        let empty = Row::default().text("target", "nginx").figure("added_p50_us", None, 1).count("errors", 0);
        let report = Report {
            bench: "proxy",
            machine: json!({"cores": 2}),
            rows: vec![row, empty],
            notes: vec!["a note".into()],
        };
        let json = report.json();
        assert_eq!(json["rows"][0]["added_p50_us"], 12.3);
        assert_eq!(json["rows"][1]["added_p50_us"], Value::Null);
        let [table] = report.tables().try_into().expect("rows of the same figures");
        let table = table.to_string();
        assert!(table.contains("added p50 us") && table.contains("12.3"), "{table}");
        let wide = vec![vec!["target".into(), "a".into()], vec!["weir".into(), "1".into()]];
        assert_eq!(transposed(&wide), [["target", "weir"], ["a", "1"]]);
    }
}
