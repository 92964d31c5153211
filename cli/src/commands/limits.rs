//! `weir limits explain`. The control plane has a gateway answer, because gateways share the limits in their store.

use std::net::IpAddr;
use std::path::Path;

use http::{HeaderValue, Uri};
use serde_json::Value;
use weir_proto::manifest::format_duration;
use weir_proto::money::dollars;
use weir_proto::questions::limits_value;
use weir_proto::v1;

use super::health;
use crate::args::{Cli, LimitsCommand};
use crate::client::{self, Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables::table;

/// Bytes of an answer of a gateway that are read: some hundred limits and backends.
const ANSWER_MAX_BYTES: usize = 1 << 20;

pub(super) async fn limits(cli: &Cli, io: &mut Io<'_>, command: &LimitsCommand) -> Result<(), Error> {
    let LimitsCommand::Explain { key, model, input_tokens, output_tokens, gateway, ops_token_file } = command;
    let answer = match gateway {
        Some(gateway) => {
            let mut query = format!("/limits?key={key}&model={model}");
            for (name, count) in [("input", input_tokens), ("output", output_tokens)] {
                if let Some(count) = count {
                    query.push_str(&format!("&{name}={count}"));
                }
            }
            page(cli, gateway, ops_token_file.as_deref(), &query, ANSWER_MAX_BYTES).await?
        }
        None => {
            let request = v1::ExplainLimitsRequest {
                key: key.to_string(),
                model: model.to_string(),
                input_tokens: *input_tokens,
                output_tokens: *output_tokens,
            };
            let client = Client::connect(cli).await?;
            let asked =
                client.call(Retry::Once, request, |mut c, r| async move { c.explain_limits(r).await });
            limits_value(&asked.await?)
        }
    };
    io.result(|| text(&answer), || answer.clone())
}

/// Reads a page of a gateway's operations port with its token.
pub(super) async fn page(
    cli: &Cli,
    gateway: &Uri,
    token_file: Option<&Path>,
    path: &str,
    max_bytes: usize,
) -> Result<Value, Error> {
    let token = ops_token(cli, gateway, token_file)?;
    let base = gateway.to_string();
    let url: Uri = format!("{}{path}", base.trim_end_matches('/'))
        .parse()
        .map_err(|_| Error::Setting("--gateway takes an address without a path".to_owned()))?;
    let (status, body) = health::fetch(cli, &url, token, max_bytes).await?;
    if !(200..300).contains(&status) {
        let text = String::from_utf8_lossy(&body);
        let text = text.lines().next().unwrap_or_default().escape_debug().to_string();
        return Err(Error::Unhealthy { url: url.to_string(), status, text });
    }
    serde_json::from_slice(&body).map_err(|_| Error::Answer("a page of the gateway"))
}

/// The authorization header for a gateway's operations port. The control plane's token allows more, so it is sent to this
/// machine only.
fn ops_token(cli: &Cli, gateway: &Uri, file: Option<&Path>) -> Result<Option<HeaderValue>, Error> {
    let text = match (file, std::env::var("WEIR_OPS_TOKEN")) {
        (Some(path), _) => Some(
            std::fs::read_to_string(path)
                .map_err(|source| Error::File { path: path.display().to_string(), source })?,
        ),
        (None, Ok(token)) => Some(token),
        (None, Err(_)) => None,
    };
    let Some(text) = text else {
        return if is_here(gateway) { client::token_header(cli) } else { Ok(None) };
    };
    let mut value: HeaderValue =
        format!("Bearer {}", text.trim()).parse().map_err(|_| Error::Token("--ops-token-file"))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Whether the host of a URL is `localhost` or a loopback address.
fn is_here(gateway: &Uri) -> bool {
    let host = gateway.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn text(answer: &Value) -> String {
    let rows = answer["limits"].as_array().into_iter().flatten().map(row);
    let header =
        ["SCOPE", "KIND", "USED", "LIMIT", "BURST", "LEFT", "NEEDS", "DECISION", "FITS IN", "MAY WAIT"];
    let mut text = table(&header, rows.collect());
    let slots = answer["backends"].as_array().into_iter().flatten().map(|backend| {
        let name = backend["backend"].as_str().unwrap_or_default();
        let account = backend["account"].as_str().map(|name| format!(", account {name}")).unwrap_or_default();
        let unused = backend["unused"].as_str().map(|why| format!(", not used: {why}")).unwrap_or_default();
        format!("{name}: {} of {} slots free{account}{unused}\n", backend["free"], backend["slots"])
    });
    text.extend(slots);
    if answer["allowed"] == false {
        text.push_str("the key may not use this model\n");
    }
    match answer["refuses"].as_str() {
        Some(limit) => text.push_str(&format!("a request would be refused by {limit}\n")),
        None => text.push_str("no limit would refuse a request\n"),
    }
    text
}

/// One limit: what is used of it in its period, what it allows, and what the bucket has left.
fn row(limit: &Value) -> Vec<String> {
    let kind = limit["kind"].as_str().unwrap_or_default();
    let number = |field: &str| limit[field].as_u64().unwrap_or_default();
    let amount = |value: u64| if kind == "spend" { dollars(value) } else { value.to_string() };
    let time = |field: &str| {
        let time = limit[field].as_u64().map(std::time::Duration::from_millis);
        time.map_or_else(|| "-".to_owned(), format_duration)
    };
    let in_use = || amount(number("limit").saturating_sub(number("remaining")));
    let (used, allowed, burst) = match limit["period"].as_str() {
        Some("minute") => {
            let used = limit["last_minute"].as_u64().map(|used| format!("{used}/min"));
            let allowed = format!("{}/min", number("limit"));
            (used.unwrap_or_else(|| "-".to_owned()), allowed, number("burst").to_string())
        }
        Some(period) => (in_use(), format!("{}/{period}", amount(number("limit"))), "-".to_owned()),
        None => (in_use(), amount(number("limit")), "-".to_owned()),
    };
    let (scope, name) = (&limit["scope"]["kind"], &limit["scope"]["name"]);
    let name = name.as_str().unwrap_or_default();
    let mut decision = limit["decision"].as_str().unwrap_or_default().to_owned();
    if limit["shadow"] == true {
        decision.push_str(" (shadow)");
    }
    vec![
        format!("{} {name}", scope.as_str().unwrap_or_default()).trim_end().to_owned(),
        kind.to_owned(),
        used,
        allowed,
        burst,
        amount(number("remaining")),
        amount(number("needs")),
        decision,
        time("wait_ms"),
        time("max_wait_ms"),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_this_machine_is_here() {
        let here = |url: &str| is_here(&url.parse().expect("a URL"));
        for url in
            ["http://127.0.0.1:9100", "http://localhost:9100", "http://[::1]:9100", "http://127.9.9.9:1"]
        {
            assert!(here(url), "{url}");
        }
        for url in [
            "http://gateway:9100",
            "http://10.0.0.1:9100",
            "http://localhost.example:9100",
            "http://0.0.0.0:1",
        ] {
            assert!(!here(url), "{url}");
        }
    }

    #[test]
    fn use_rate_and_burst_are_told_apart_and_money_has_its_period() {
        let scope = json!({"kind": "tenant", "name": "acme"});
        let limits = json!([
            {"scope": scope, "kind": "requests", "limit": 2000, "period": "minute", "burst": 10_000,
             "remaining": 9_998, "last_minute": 480, "needs": 1, "decision": "fits", "max_wait_ms": 0},
            {"scope": scope, "kind": "tokens", "limit": 500, "period": "minute", "burst": 2500, "remaining": 2500,
             "last_minute": null, "needs": 7, "decision": "fits", "max_wait_ms": 0, "shadow": true},
            {"scope": scope, "kind": "spend", "limit": 20_000_000, "period": "day", "burst": 20_000_000,
             "remaining": 500_000, "needs": 600_000, "decision": "refuses", "wait_ms": 90_000, "max_wait_ms": 0},
            {"scope": scope, "kind": "concurrency", "limit": 10, "period": null, "burst": 10, "remaining": 7,
             "needs": 1, "decision": "fits", "max_wait_ms": 30_000},
        ]);
        let answer = json!({
            "limits": limits,
            "backends": [
                {"backend": "b0", "slots": 50, "free": 49, "unused": null},
                {"backend": "b1", "slots": 5, "free": 5, "account": "openai", "unused": "unhealthy"},
            ],
            "allowed": true, "refuses": "spend of tenant acme",
        });
        let wanted = "\
SCOPE        KIND         USED     LIMIT       BURST  LEFT   NEEDS  DECISION       FITS IN  MAY WAIT
tenant acme  requests     480/min  2000/min    10000  9998   1      fits           -        0s
tenant acme  tokens       -        500/min     2500   2500   7      fits (shadow)  -        0s
tenant acme  spend        $19.50   $20.00/day  -      $0.50  $0.60  refuses        1m30s    0s
tenant acme  concurrency  3        10          -      7      1      fits           -        30s
b0: 49 of 50 slots free
b1: 5 of 5 slots free, account openai, not used: unhealthy
a request would be refused by spend of tenant acme
";
        assert_eq!(text(&answer), wanted);
    }
}
