//! `check`: what is verified of a running cluster, line by line, each with its remedy.

use serde_json::{Value, json};
use weir_proto::v1;
use weir_proto::v1::resource::Spec;

use super::{backends, gateways, get, token};
use crate::args::Cli;
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;

/// One thing that was looked at.
struct Finding {
    what: &'static str,
    /// What is wrong, and what to do.
    wrong: Option<(String, &'static str)>,
}

pub(super) async fn check(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let who = token::who_am_i(&client).await?;
    let all = gateways::read(&client).await?;
    let status = backends::read(&client).await?;
    let pools = get::read_all(&client, v1::ResourceKind::Pool).await?;
    let backends = get::read_all(&client, v1::ResourceKind::Backend).await?;
    let models = get::read_all(&client, v1::ResourceKind::Model).await?;
    let keys = get::read_all(&client, v1::ResourceKind::ApiKey).await?;
    let limits = get::read_all(&client, v1::ResourceKind::Limit).await?;
    let request = v1::VerifyAuditRequest::default();
    let audit = client.call(Retry::Once, request, |mut c, r| async move { c.verify_audit(r).await }).await?;
    let findings = findings(&who, &all, &status, &pools, &backends, &models, &keys, &limits, &audit);
    io.result(|| text(&findings), || Value::Array(findings.iter().map(value).collect()))?;
    let wrong = findings.iter().filter(|f| f.wrong.is_some()).count();
    if wrong == 0 { Ok(()) } else { Err(Error::Check(wrong)) }
}

#[expect(clippy::too_many_arguments, reason = "everything that was read, once")]
fn findings(
    who: &v1::WhoAmIResponse,
    all: &v1::ListGatewaysResponse,
    status: &[v1::BackendStatus],
    pools: &[v1::Resource],
    backends: &[v1::Resource],
    models: &[v1::Resource],
    keys: &[v1::Resource],
    limits: &[v1::Resource],
    audit: &v1::VerifyAuditResponse,
) -> Vec<Finding> {
    let found = |what, names: Vec<String>, remedy| Finding {
        what,
        wrong: (!names.is_empty()).then(|| (names.join(", "), remedy)),
    };
    let connected: Vec<&v1::Gateway> = all.gateways.iter().filter(|g| g.connected).collect();
    let with = |sync: v1::SyncState| {
        connected.iter().filter(|g| g.sync() == sync).map(|g| g.id.clone()).collect::<Vec<_>>()
    };
    let spec = |resource: &v1::Resource| match &resource.spec {
        Some(Spec::Backend(backend)) => Some(backend.clone()),
        _ => None,
    };
    let active =
        |b: &v1::BackendSpec| matches!(b.admin_state(), v1::AdminState::Active | v1::AdminState::Unspecified);
    let usable = |pool: &str| {
        backends.iter().any(|resource| {
            let state = status.iter().find(|s| s.backend == resource.name).and_then(|s| s.health.as_ref());
            let well = state.is_none_or(|h| h.state() != v1::HealthState::Unhealthy);
            well && spec(resource).is_some_and(|b| b.pool == pool && active(&b))
        })
    };
    let empty = pools.iter().filter(|pool| !usable(&pool.name)).map(|pool| pool.name.clone());
    let served =
        |model: &str| backends.iter().filter_map(spec).any(|b| active(&b) && b.models.contains_key(model));
    let unserved = models.iter().filter(|model| !served(&model.name)).map(|model| model.name.clone());
    let now = jiff::Timestamp::now().as_second();
    let ends_soon = |key: &&v1::Resource| match &key.spec {
        Some(Spec::ApiKey(key)) if !key.revoked => {
            let ends = key.digests.iter().map(|d| d.expire_time.as_ref().map_or(i64::MAX, |t| t.seconds));
            ends.max().is_some_and(|end| end < now + SOON_S)
        }
        _ => false,
    };
    let ending = keys.iter().filter(ends_soon).map(|key| key.name.clone());
    let billed = |account: &str| backends.iter().filter_map(spec).any(|b| b.account == account);
    let of_nobody = limits.iter().filter(|limit| match &limit.spec {
        Some(Spec::Limit(spec)) => {
            let account = spec.selector.as_ref().map_or("", |selector| &selector.account);
            !account.is_empty() && !billed(account)
        }
        _ => false,
    });
    let of_nobody = of_nobody.map(|limit| limit.name.clone());
    let none = if connected.is_empty() { vec!["no gateway is connected".to_owned()] } else { Vec::new() };
    let problem = if audit.problem.is_empty() { Vec::new() } else { vec![audit.problem.clone()] };
    vec![
        Finding { what: "the control plane answers and the token is valid", wrong: None },
        found(
            "the versions of the gateways are that of the control plane",
            connected.iter().filter(|g| g.build != who.build).map(|g| g.id.clone()).collect(),
            "upgrade them, one at a time",
        ),
        found(
            "gateways are connected",
            none,
            "start weir-gateway with --control-plane and its token; its log says why it cannot connect",
        ),
        found(
            "every connected gateway answers",
            with(v1::SyncState::Stale),
            "look at its load and its log; its stream is closed after 120 s and begins anew",
        ),
        found(
            "no gateway refuses anything",
            with(v1::SyncState::Error),
            "weir gateway diff ID shows what and why; change the resource or what it needs on that gateway",
        ),
        found(
            "every pool has a backend that can be used",
            empty.collect(),
            "weir backends shows why; add one, enable one, or delete the pool",
        ),
        found(
            "every model is served by an active backend",
            unserved.collect(),
            "add the model to a backend's models, or delete it",
        ),
        found(
            "every account that is limited is one that a backend bills",
            of_nobody.collect(),
            "name the account in its backends, or delete the limit: it limits nothing",
        ),
        found("no API key ends within a week", ending.collect(), "weir key rotate NAME"),
        found(
            "the audit log is whole",
            problem,
            "restore the store from a backup, and find out who wrote to its file",
        ),
    ]
}

/// A week.
const SOON_S: i64 = 7 * 24 * 60 * 60;

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        match &finding.wrong {
            None => text.push_str(&format!("ok     {}\n", finding.what)),
            Some((what, remedy)) => {
                text.push_str(&format!("wrong  {}: {what}\n       {remedy}\n", finding.what));
            }
        }
    }
    text
}

fn value(finding: &Finding) -> Value {
    let (wrong, remedy) = finding.wrong.clone().map(|(w, r)| (Some(w), Some(r))).unwrap_or_default();
    json!({"check": finding.what, "ok": finding.wrong.is_none(), "wrong": wrong, "remedy": remedy})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_an_account_that_nobody_bills_is_named() {
        let resource =
            |name: &str, spec| v1::Resource { name: name.into(), spec: Some(spec), ..Default::default() };
        let limit = |name: &str, account: &str| {
            let selector = v1::LimitSelector { account: account.into(), ..Default::default() };
            resource(name, Spec::Limit(v1::LimitSpec { selector: Some(selector), rates: None }))
        };
        let backend = v1::BackendSpec { account: "openai".into(), ..Default::default() };
        let backends = [resource("b", Spec::Backend(backend))];
        let limits = [limit("used", "openai"), limit("everything", ""), limit("lost", "opneai")];
        let (who, gateways, audit) = Default::default();
        let findings = findings(&who, &gateways, &[], &[], &backends, &[], &[], &limits, &audit);
        let wrong: Vec<_> = findings.iter().filter_map(|f| Some((f.what, f.wrong.as_ref()?))).collect();
        let about = wrong.iter().find(|(what, _)| what.contains("account")).expect("told");
        assert_eq!(about.1.0, "lost");
    }
}
