//! `usage`: asks a gateway, since settlements keep the account where gateways share it.

use serde_json::Value;

use super::limits;
use crate::args::{Cli, UsageArgs, UsageBy};
use crate::error::Error;
use crate::output::Io;
use crate::tables::{dollars, table};

/// Bytes of an answer that are read: some hundred thousand rows.
const ANSWER_MAX_BYTES: usize = 32 << 20;

pub(super) async fn usage(cli: &Cli, io: &mut Io<'_>, args: &UsageArgs) -> Result<(), Error> {
    let by: Vec<&str> = args.by.iter().map(|by| by.name()).collect();
    let mut path = format!("/usage?by={}", by.join(","));
    let fields = [
        ("tenant", args.tenant.as_ref().map(ToString::to_string)),
        ("model", args.model.as_ref().map(ToString::to_string)),
        ("from", args.from.map(|day| day.to_string())),
        ("to", args.to.map(|day| day.to_string())),
    ];
    for (field, value) in fields.into_iter().filter_map(|(field, value)| Some((field, value?))) {
        path.push_str(&format!("&{field}={value}"));
    }
    let answer =
        limits::page(cli, &args.gateway, args.ops_token_file.as_deref(), &path, ANSWER_MAX_BYTES).await?;
    io.result(|| text(&answer, &args.by), || answer.clone())
}

fn text(answer: &Value, by: &[UsageBy]) -> String {
    let columns: Vec<UsageBy> = [UsageBy::Tenant, UsageBy::Model, UsageBy::Day]
        .into_iter()
        .filter(|column| by.contains(column))
        .collect();
    let figures = |row: &Value| {
        let count = |field: &str| row[field].as_i64().unwrap_or_default();
        let cost = count("cost_micro_dollars");
        let sign = if cost < 0 { "-" } else { "" };
        [
            count("requests").to_string(),
            count("input_tokens").to_string(),
            count("output_tokens").to_string(),
            format!("{sign}{}", dollars(cost.unsigned_abs())),
        ]
    };
    let line = |row: &Value| {
        let names = columns.iter().map(|column| row[column.name()].as_str().unwrap_or_default().to_owned());
        names.chain(figures(row)).collect::<Vec<_>>()
    };
    let mut rows: Vec<Vec<String>> = answer["rows"].as_array().into_iter().flatten().map(line).collect();
    let total = (0..columns.len()).map(|n| if n == 0 { "total".to_owned() } else { String::new() });
    rows.push(total.chain(figures(&answer["total"])).collect());
    let header: Vec<String> = columns.iter().map(|column| column.name().to_uppercase()).collect();
    let header: Vec<&str> = header
        .iter()
        .map(String::as_str)
        .chain(["REQUESTS", "INPUT TOKENS", "OUTPUT TOKENS", "COST"])
        .collect();
    table(&header, rows)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn usage_is_a_table_with_a_total() {
        let row = json!({"tenant": "acme", "day": "2026-11-23", "requests": 2, "input_tokens": 30,
                         "output_tokens": 400, "cost_micro_dollars": 1_500_000});
        let answer = json!({"rows": [row], "total": row});
        assert_eq!(
            text(&answer, &[UsageBy::Day, UsageBy::Tenant]),
            "TENANT  DAY         REQUESTS  INPUT TOKENS  OUTPUT TOKENS  COST\n\
             acme    2026-11-23  2         30            400            $1.50\n\
             total               2         30            400            $1.50\n"
        );
    }
}
