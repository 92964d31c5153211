//! `weir limits explain`: asks a gateway, because gateways share the limits in their store.

use std::net::IpAddr;
use std::path::Path;

use http::{HeaderValue, Uri};
use serde_json::Value;
use weir_proto::manifest::format_duration;

use super::health;
use crate::args::{Cli, LimitsCommand};
use crate::client;
use crate::error::Error;
use crate::output::Io;
use crate::tables::{dollars, table};

/// Bytes of an answer that are read: some hundred limits and backends.
const ANSWER_MAX_BYTES: usize = 1 << 20;

pub(super) async fn limits(cli: &Cli, io: &mut Io<'_>, command: &LimitsCommand) -> Result<(), Error> {
    let LimitsCommand::Explain { key, model, gateway, ops_token_file, input_tokens, output_tokens } = command;
    let mut query = format!("/limits?key={key}&model={model}");
    for (name, count) in [("input", input_tokens), ("output", output_tokens)] {
        if let Some(count) = count {
            query.push_str(&format!("&{name}={count}"));
        }
    }
    let answer = page(cli, gateway, ops_token_file.as_deref(), &query, ANSWER_MAX_BYTES).await?;
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
    let rows = answer["limits"].as_array().into_iter().flatten().map(|limit| {
        let kind = limit["kind"].as_str().unwrap_or_default();
        let amount = |field: &str| amount(kind, limit[field].as_u64().unwrap_or_default());
        let time = |field: &str| {
            limit[field]
                .as_u64()
                .map_or_else(|| "-".to_owned(), |ms| format_duration(std::time::Duration::from_millis(ms)))
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
            amount("limit"),
            amount("remaining"),
            amount("needs"),
            decision,
            time("wait_ms"),
            time("max_wait_ms"),
        ]
    });
    let header = ["SCOPE", "KIND", "LIMIT", "LEFT", "NEEDS", "DECISION", "FITS IN", "MAY WAIT"];
    let mut text = table(&header, rows.collect());
    let slots = answer["backends"].as_array().into_iter().flatten().map(|backend| {
        let state = if backend["active"] == true { "" } else { ", not active" };
        let name = backend["backend"].as_str().unwrap_or_default();
        let account = backend["account"].as_str().map(|name| format!(", account {name}")).unwrap_or_default();
        format!("{name}: {} of {} slots free{state}{account}\n", backend["free"], backend["slots"])
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

fn amount(kind: &str, value: u64) -> String {
    if kind == "spend" { dollars(value) } else { value.to_string() }
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
    fn an_explanation_is_a_table_and_a_sentence() {
        let limit = |kind, decision, wait: Option<u64>| {
            json!({"scope": {"kind": "tenant", "name": "acme"}, "kind": kind, "limit": 20_000_000u64, "remaining": 500_000,
                   "needs": 600_000, "decision": decision, "wait_ms": wait, "max_wait_ms": 0, "shadow": false})
        };
        let answer = json!({
            "limits": [limit("spend", "refuses", Some(90_000))],
            "backends": [{"backend": "b0", "slots": 50, "free": 49, "active": true},
                         {"backend": "b1", "slots": 5, "free": 5, "active": true, "account": "openai"}],
            "allowed": true, "refuses": "spend of tenant acme",
        });
        assert_eq!(
            text(&answer),
            "SCOPE        KIND   LIMIT   LEFT   NEEDS  DECISION  FITS IN  MAY WAIT\n\
             tenant acme  spend  $20.00  $0.50  $0.60  refuses   1m30s    0s\n\
             b0: 49 of 50 slots free\n\
             b1: 5 of 5 slots free, account openai\n\
             a request would be refused by spend of tenant acme\n"
        );
    }
}
