//! `weir check`: checks of a running cluster, one line each, with a remedy.

use serde_json::{Value, json};
use weir_proto::v1;
use weir_proto::v1::resource::Spec;

use super::{backends, gateways, get, token};
use crate::args::Cli;
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;

/// The result of one check.
struct Finding {
    what: &'static str,
    /// The problem and the remedy.
    wrong: Option<(String, &'static str)>,
}

/// The state of the cluster that the checks need, read once.
#[derive(Default)]
struct Cluster {
    who: v1::WhoAmIResponse,
    gateways: Vec<v1::Gateway>,
    status: Vec<v1::BackendStatus>,
    pools: Vec<v1::Resource>,
    backends: Vec<v1::Resource>,
    models: Vec<v1::Resource>,
    keys: Vec<v1::Resource>,
    limits: Vec<v1::Resource>,
    audit: v1::VerifyAuditResponse,
}

pub(super) async fn check(cli: &Cli, io: &mut Io<'_>) -> Result<(), Error> {
    let cluster = Cluster::read(&Client::connect(cli).await?).await?;
    let findings = cluster.findings();
    io.result(|| text(&findings), || Value::Array(findings.iter().map(value).collect()))?;
    let wrong = findings.iter().filter(|f| f.wrong.is_some()).count();
    if wrong == 0 { Ok(()) } else { Err(Error::Check(wrong)) }
}

impl Cluster {
    async fn read(client: &Client) -> Result<Self, Error> {
        let request = v1::VerifyAuditRequest::default();
        Ok(Self {
            who: token::who_am_i(client).await?,
            gateways: gateways::read(client).await?.gateways,
            status: backends::read(client).await?,
            pools: get::read_all(client, v1::ResourceKind::Pool).await?,
            backends: get::read_all(client, v1::ResourceKind::Backend).await?,
            models: get::read_all(client, v1::ResourceKind::Model).await?,
            keys: get::read_all(client, v1::ResourceKind::ApiKey).await?,
            limits: get::read_all(client, v1::ResourceKind::Limit).await?,
            audit: client
                .call(Retry::Once, request, |mut c, r| async move { c.verify_audit(r).await })
                .await?,
        })
    }

    fn findings(&self) -> Vec<Finding> {
        let connected = || self.gateways.iter().filter(|gateway| gateway.connected);
        let names = |wrong: &dyn Fn(&v1::Gateway) -> bool| {
            connected().filter(|gateway| wrong(gateway)).map(|gateway| gateway.id.clone()).collect()
        };
        let none = if connected().next().is_none() {
            vec!["no gateway is connected".to_owned()]
        } else {
            Vec::new()
        };
        let problem = Some(self.audit.problem.clone()).filter(|problem| !problem.is_empty());
        vec![
            Finding { what: "the control plane answers and the token is valid", wrong: None },
            finding(
                "gateways and control plane have the same version",
                names(&|gateway| gateway.build != self.who.build),
                "upgrade them, one at a time",
            ),
            finding(
                "gateways are connected",
                none,
                "start weir-gateway with --control-plane and its token; its log says why it cannot connect",
            ),
            finding(
                "every connected gateway answers",
                names(&|gateway| gateway.sync() == v1::SyncState::Stale),
                "check its load and its log; its stream is closed after 120 s and opened again",
            ),
            finding(
                "no gateway refuses a resource",
                names(&|gateway| gateway.sync() == v1::SyncState::Error),
                "weir gateway diff ID shows resource and reason; change the resource, or what it needs on that gateway",
            ),
            finding(
                "every pool has a usable backend",
                self.pools_without_backend(),
                "weir backends shows why; add one, enable one, or delete the pool",
            ),
            finding(
                "every model is served by an active backend",
                self.unserved_models(),
                "add the model to a backend's models, or delete it",
            ),
            finding(
                "every limited provider account is used by a backend",
                self.limits_of_unknown_accounts(),
                "set the account of its backends, or delete the limit, which has no effect",
            ),
            finding("no API key expires within a week", self.ending_keys(), "weir key rotate NAME"),
            finding(
                "the hash chain of the audit log is intact",
                problem.into_iter().collect(),
                "restore the store from a backup, and find out who wrote to it",
            ),
        ]
    }

    fn backend_specs(&self) -> impl Iterator<Item = (&v1::Resource, &v1::BackendSpec)> {
        self.backends.iter().filter_map(|resource| match &resource.spec {
            Some(Spec::Backend(backend)) => Some((resource, backend)),
            _ => None,
        })
    }

    fn pools_without_backend(&self) -> Vec<String> {
        let is_well = |backend: &str| {
            let health = self.status.iter().find(|s| s.backend == backend).and_then(|s| s.health.as_ref());
            health.is_none_or(|health| health.state() != v1::HealthState::Unhealthy)
        };
        let is_usable = |pool: &str| {
            self.backend_specs()
                .any(|(resource, b)| b.pool == pool && is_active(b) && is_well(&resource.name))
        };
        self.pools.iter().filter(|pool| !is_usable(&pool.name)).map(|pool| pool.name.clone()).collect()
    }

    fn unserved_models(&self) -> Vec<String> {
        let is_served =
            |model: &str| self.backend_specs().any(|(_, b)| is_active(b) && b.models.contains_key(model));
        self.models.iter().filter(|model| !is_served(&model.name)).map(|model| model.name.clone()).collect()
    }

    fn limits_of_unknown_accounts(&self) -> Vec<String> {
        let is_billed = |account: &str| self.backend_specs().any(|(_, b)| b.account == account);
        let is_lost = |limit: &&v1::Resource| match &limit.spec {
            Some(Spec::Limit(spec)) => {
                let account = spec.selector.as_ref().map_or("", |selector| &selector.account);
                !account.is_empty() && !is_billed(account)
            }
            _ => false,
        };
        self.limits.iter().filter(is_lost).map(|limit| limit.name.clone()).collect()
    }

    fn ending_keys(&self) -> Vec<String> {
        let now = jiff::Timestamp::now().as_second();
        let ends_soon = |key: &&v1::Resource| match &key.spec {
            Some(Spec::ApiKey(key)) if !key.revoked => {
                let ends = key.digests.iter().map(|d| d.expire_time.as_ref().map_or(i64::MAX, |t| t.seconds));
                ends.max().is_some_and(|end| end < now + SOON_S)
            }
            _ => false,
        };
        self.keys.iter().filter(ends_soon).map(|key| key.name.clone()).collect()
    }
}

/// A check that fails if `names` is not empty.
fn finding(what: &'static str, names: Vec<String>, remedy: &'static str) -> Finding {
    Finding { what, wrong: (!names.is_empty()).then(|| (names.join(", "), remedy)) }
}

fn is_active(backend: &v1::BackendSpec) -> bool {
    matches!(backend.admin_state(), v1::AdminState::Active | v1::AdminState::Unspecified)
}

/// API keys that end within this time are reported.
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
        let backends = vec![resource("b", Spec::Backend(backend))];
        let limits = vec![limit("used", "openai"), limit("everything", ""), limit("lost", "opneai")];
        let findings = Cluster { backends, limits, ..Cluster::default() }.findings();
        let wrong: Vec<_> = findings.iter().filter_map(|f| Some((f.what, f.wrong.as_ref()?))).collect();
        let about = wrong.iter().find(|(what, _)| what.contains("account")).expect("told");
        assert_eq!(about.1.0, "lost");
    }
}
