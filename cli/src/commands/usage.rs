//! `weir usage`. The control plane has a gateway answer, since settlements keep the account where gateways share it.

use serde_json::Value;
use weir_proto::money::dollars;
use weir_proto::questions::usage_value;
use weir_proto::v1;

use super::limits;
use crate::args::{Cli, UsageArgs, UsageBy};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables::table;

/// Bytes of an answer of a gateway that are read: some hundred thousand rows.
const ANSWER_MAX_BYTES: usize = 32 << 20;

pub(super) async fn usage(cli: &Cli, io: &mut Io<'_>, args: &UsageArgs) -> Result<(), Error> {
    let answer = match &args.gateway {
        Some(gateway) => {
            let token_file = args.ops_token_file.as_deref();
            limits::page(cli, gateway, token_file, &path(args), ANSWER_MAX_BYTES).await?
        }
        None => {
            let client = Client::connect(cli).await?;
            let asked =
                client.call(Retry::Once, request(args), |mut c, r| async move { c.query_usage(r).await });
            usage_value(&asked.await?)
        }
    };
    io.result(|| text(&answer, &args.by), || answer.clone())
}

fn request(args: &UsageArgs) -> v1::QueryUsageRequest {
    let text = |value: Option<String>| value.unwrap_or_default();
    v1::QueryUsageRequest {
        tenant: text(args.tenant.as_ref().map(ToString::to_string)),
        model: text(args.model.as_ref().map(ToString::to_string)),
        from: text(args.from.map(|day| day.to_string())),
        to: text(args.to.map(|day| day.to_string())),
        group_by: args.by.iter().map(|by| by.field().into()).collect(),
    }
}

/// The same as the path of a gateway's page.
fn path(args: &UsageArgs) -> String {
    let by: Vec<&str> = args.by.iter().map(|by| by.name()).collect();
    let mut path = format!("/usage?by={}", by.join(","));
    let asked = request(args);
    let fields = [("tenant", asked.tenant), ("model", asked.model), ("from", asked.from), ("to", asked.to)];
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_empty()) {
        path.push_str(&format!("&{field}={value}"));
    }
    path
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
        // Nothing is known of what has no price, which is not the same as free.
        let unknown = cost == 0 && row["unpriced"] == true;
        let cost = if unknown { "-".to_owned() } else { format!("{sign}{}", dollars(cost.unsigned_abs())) };
        [
            count("requests").to_string(),
            count("input_tokens").to_string(),
            count("output_tokens").to_string(),
            cost,
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
    let mut text = table(&header, rows);
    if answer["total"]["unpriced"] == true {
        text.push_str(
            "COST leaves out models without a price: input_price_micro_dollars, weir explain model\n",
        );
    }
    text
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

    #[test]
    fn the_cost_of_a_model_without_a_price_is_not_known() {
        let row = |model: &str, cost: i64, unpriced: bool| {
            json!({"model": model, "requests": 1, "input_tokens": 3, "output_tokens": 4,
                   "cost_micro_dollars": cost, "unpriced": unpriced})
        };
        let answer = json!({"rows": [row("bare", 0, true), row("free", 0, false), row("mixed", 250_000, true)],
                            "total": row("", 250_000, true)});
        assert_eq!(
            text(&answer, &[UsageBy::Model]),
            "MODEL  REQUESTS  INPUT TOKENS  OUTPUT TOKENS  COST\n\
             bare   1         3             4              -\n\
             free   1         3             4              $0.00\n\
             mixed  1         3             4              $0.25\n\
             total  1         3             4              $0.25\n\
             COST leaves out models without a price: input_price_micro_dollars, weir explain model\n"
        );
    }
}
