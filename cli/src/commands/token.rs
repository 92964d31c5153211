//! `token create`, `rotate`, `revoke` and `list`; `whoami`. A new secret goes to standard output and nowhere else.

use serde_json::{Value, json};
use weir_proto::v1;
use weir_runtime::Secret;

use crate::args::{Cli, TokenCommand};
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;
use crate::tables::{table, time};

pub(super) async fn token(cli: &Cli, io: &mut Io<'_>, command: &TokenCommand) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    match command {
        TokenCommand::Create { name, role, gateway, expires } => {
            let expire_time = expires.map(|d| {
                // The wall clock: an expiry is a date.
                let now = jiff::Timestamp::now().as_second();
                let seconds = now.saturating_add(i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
                prost_types::Timestamp { seconds, nanos: 0 }
            });
            let request = v1::IssueTokenRequest {
                name: name.clone(),
                role: role.role().into(),
                gateway_id: gateway.clone().unwrap_or_default(),
                expire_time,
                validate_only: false,
            };
            // Never again: the first answer may be lost, and the second would say that there is one.
            let answer =
                client.call(Retry::Never, request, |mut c, r| async move { c.issue_token(r).await }).await?;
            show(io, name, &Secret::new(answer.secret))
        }
        TokenCommand::Rotate { name, grace } => {
            let grace = prost_types::Duration::try_from(*grace).ok();
            let request = v1::RotateTokenRequest { name: name.clone(), grace, ..Default::default() };
            let answer =
                client.call(Retry::Never, request, |mut c, r| async move { c.rotate_token(r).await }).await?;
            show(io, name, &Secret::new(answer.secret))
        }
        TokenCommand::Revoke { name } => {
            let request = v1::RevokeTokenRequest { name: name.clone(), validate_only: false };
            client.call(Retry::Never, request, |mut c, r| async move { c.revoke_token(r).await }).await?;
            io.result(|| format!("token {name} is revoked\n"), || json!({"name": name, "action": "delete"}))
        }
        TokenCommand::List => {
            let request = v1::ListTokensRequest {};
            let tokens = client
                .call(Retry::Once, request, |mut c, r| async move { c.list_tokens(r).await })
                .await?
                .tokens;
            io.result(|| tokens_table(&tokens), || Value::Array(tokens.iter().map(value).collect()))
        }
    }
}

fn show(io: &mut Io<'_>, name: &str, secret: &Secret) -> Result<(), Error> {
    io.result(|| format!("{}\n", secret.expose()), || json!({"name": name, "secret": secret.expose()}))?;
    io.note("keep this token now: it is shown this once and stored nowhere")
}

fn tokens_table(tokens: &[v1::Token]) -> String {
    let rows = tokens.iter().map(|t| {
        let secrets: Vec<String> = t.secrets.iter().map(|s| format!("{}...", s.prefix)).collect();
        let ends = t.secrets.first().and_then(|s| s.expire_time.as_ref());
        let gateway = if t.gateway_id.is_empty() { "-".to_owned() } else { t.gateway_id.clone() };
        vec![t.name.clone(), role(t.role()).to_owned(), gateway, secrets.join(","), time(ends)]
    });
    table(&["NAME", "ROLE", "GATEWAY", "SECRETS", "EXPIRES"], rows.collect())
}

fn value(token: &v1::Token) -> Value {
    let secret = |s: &v1::TokenSecret| json!({"prefix": s.prefix, "expire_time": s.expire_time.as_ref().map(|t| time(Some(t)))});
    json!({
        "name": token.name,
        "role": role(token.role()),
        "gateway_id": token.gateway_id,
        "secrets": token.secrets.iter().map(secret).collect::<Vec<_>>(),
    })
}

pub(super) const fn role(role: v1::Role) -> &'static str {
    match role {
        v1::Role::Unspecified => "-",
        v1::Role::Viewer => "viewer",
        v1::Role::Operator => "operator",
        v1::Role::Editor => "editor",
        v1::Role::Admin => "admin",
        v1::Role::Gateway => "gateway",
    }
}

pub(super) async fn show_who_am_i(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let who = who_am_i(&Client::connect(cli).await?).await?;
    let role = role(who.role());
    io.result(
        || {
            // Of one alone it goes without saying; this is for several.
            let leader = if who.leader { "" } else { "; this control plane is not the leader" };
            format!("{} with the role {role}, at revision {}{leader}\n", who.name, who.revision)
        },
        || {
            json!({
                "name": who.name, "role": role, "build": who.build,
                "store_epoch": who.store_epoch, "revision": who.revision, "leader": who.leader,
            })
        },
    )
}

pub(super) async fn who_am_i(client: &Client) -> Result<v1::WhoAmIResponse, Error> {
    let request = v1::WhoAmIRequest {};
    client.call(Retry::Once, request, |mut c, r| async move { c.who_am_i(r).await }).await
}
