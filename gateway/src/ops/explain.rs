//! Explains the limits of a key and a model: every limit, what remains of it, and its decision on a request now. Served on
//! the operations port too; nothing is charged and nothing is written.
//!
//! The control plane asks a gateway, because the limits are in the store that gateways share; every gateway gives the same
//! answer. The name of the key is enough, its secret is not needed.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use axum::routing::get;
use serde::Deserialize;
use weir_proto::questions::limits_value;
use weir_proto::resource::{AdminState, Name};
use weir_proto::v1::{self, HealthState};
use weir_ratelimit::{
    Cost, FOREVER, Kind, LimitState, Limiter, MAX_SCOPES, Mode, ScopeLimits, Verdict, What,
};

use super::page::{self, PageError};
use crate::api::duration::millis;
use crate::control::live_config::LiveConfig;
use crate::limits::ledger::Ledger;
use crate::limits::price;
use crate::routing::backend::BackendEntry;
use crate::routing::declared::declared;
use crate::routing::entries::ModelEntry;
use crate::routing::scope::{ScopeEntry, what_name};
use crate::routing::snapshot::Snapshot;
use crate::routing::spend_period;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    key: Name,
    model: Name,
    /// Prompt and completion tokens of the imagined request; `None`: the usual number of such requests.
    tokens: Option<(u64, u64)>,
}

/// The query of the page.
#[derive(Deserialize)]
struct Parameters {
    key: Option<String>,
    model: Option<String>,
    input: Option<String>,
    output: Option<String>,
}

const KEY: &str = "key: must be the name of an API key";
const MODEL: &str = "model: must be the name of a model";

impl Question {
    /// A question of the control plane.
    ///
    /// # Errors
    /// When a name is missing or not a name.
    pub fn of(request: &v1::ExplainLimitsRequest) -> Result<Self, PageError> {
        let name = |text: &str, wrong| Name::parse(text).map_err(|_| PageError::BadQuery(wrong));
        let (input, output) = (request.input_tokens, request.output_tokens);
        Ok(Self {
            key: name(&request.key, KEY)?,
            model: name(&request.model, MODEL)?,
            tokens: input.or(output).map(|_| (input.unwrap_or(0), output.unwrap_or(0))),
        })
    }

    /// From the query `key=NAME&model=NAME`, and where a certain request is meant `input=N&output=N`.
    ///
    /// # Errors
    /// When a name is missing or not a name, or a number is not one.
    pub fn parse(uri: &Uri) -> Result<Self, PageError> {
        let given: Parameters = page::parameters(uri)?;
        let tokens = |text: Option<String>, wrong| {
            text.map(|text| text.parse().map_err(|_| PageError::BadQuery(wrong))).transpose()
        };
        Self::of(&v1::ExplainLimitsRequest {
            key: given.key.unwrap_or_default(),
            model: given.model.unwrap_or_default(),
            input_tokens: tokens(given.input, "input: must be a number of tokens")?,
            output_tokens: tokens(given.output, "output: must be a number of tokens")?,
        })
    }
}

/// The page `/limits` of the operations port.
pub fn page(live: Arc<LiveConfig>, ledger: Arc<Ledger>) -> Router {
    Router::new().route("/limits", get(answer)).with_state((live, ledger))
}

async fn answer(State((live, ledger)): State<(Arc<LiveConfig>, Arc<Ledger>)>, uri: Uri) -> Response {
    let answer = match Question::parse(&uri) {
        Ok(question) => explain(&live, &ledger, &question).await,
        Err(error) => Err(error),
    };
    page::respond(answer.map(|answer| limits_value(&answer)))
}

/// Answers.
///
/// # Errors
/// When the key or model is not there, or the limit store does not answer.
pub async fn explain(
    live: &LiveConfig,
    ledger: &Ledger,
    question: &Question,
) -> Result<v1::ExplainLimitsResponse, PageError> {
    let snapshot = live.snapshot();
    let unknown = |kind, name: &Name| PageError::Unknown { kind, name: name.clone() };
    let key = snapshot.keys.values().find(|key| key.name == question.key);
    let key = key.ok_or_else(|| unknown("key", &question.key))?.clone();
    let model = snapshot.models_by_name.get(&question.model);
    let model = model.ok_or_else(|| unknown("model", &question.model))?.clone();
    let (input, output) =
        question.tokens.unwrap_or_else(|| (0, ledger.estimates.output(&key.tenant.queue, &model.queue)));
    let cost = price::cost(&model, input, output);

    let now = weir_runtime::wall_clock();
    let own = snapshot.scopes(&key, &model.name);
    let budgets = spend_period::scopes(&own, now);
    let entries: Vec<&ScopeEntry> = own.into_iter().chain(&budgets).collect();
    let mut rows = rows(ledger, &entries, &cost, now).await?;
    let mut refusing = worst(&rows);
    let mut accounts = Vec::new();
    for account in model.accounts.iter() {
        let entries: Vec<&ScopeEntry> = account.scopes.iter().collect();
        let of_account = self::rows(ledger, &entries, &cost, now).await?;
        accounts.push(worst(&of_account));
        rows.extend(of_account);
    }
    if refusing.is_none() {
        refusing = refused_by_accounts(&model, &accounts);
    }
    Ok(v1::ExplainLimitsResponse {
        key: key.name.to_string(),
        tenant: key.tenant.name.to_string(),
        model: model.name.to_string(),
        allowed: key.allows(&model.name),
        input_tokens: input,
        output_tokens: output,
        waiting: ledger.waiting.len() as u64,
        refuses: refusing.map(|(label, _)| label).unwrap_or_default(),
        limits: rows.iter().map(Row::explained).collect(),
        backends: slots(ledger, &snapshot, &model).await?,
        gateway_id: String::new(),
    })
}

async fn rows<'a>(
    ledger: &Ledger,
    entries: &[&'a ScopeEntry],
    cost: &Cost,
    now: SystemTime,
) -> Result<Vec<Row<'a>>, PageError> {
    let scopes: Vec<ScopeLimits> = entries.iter().map(|e| e.limits.clone()).collect();
    let limits = ledger.limiter.peek(&scopes).await.map_err(|e| PageError::Store(e.to_string()))?;
    let row = |limit: &LimitState| {
        let entry = entries.iter().find(|e| e.limits.record == limit.scope)?;
        let needs = match limit.what {
            What::Bucket(kind) => cost.get(kind),
            What::Concurrency => 1,
        };
        Some(Row::of(entry, limit, needs, now))
    };
    Ok(limits.iter().filter_map(row).collect())
}

/// A limit that refuses, and for how long, milliseconds.
type Refusing = (String, u64);

/// The limit that refuses for longest.
fn worst(rows: &[Row<'_>]) -> Option<Refusing> {
    let refusing = rows.iter().filter(|row| row.refuses());
    let refusing = refusing.map(|row| (row.label(), row.wait_ms.unwrap_or(u64::MAX)));
    refusing.max_by_key(|(_, wait_ms)| *wait_ms)
}

/// The limit of the account that fits soonest, when the account of every backend in use refuses.
fn refused_by_accounts(model: &ModelEntry, accounts: &[Option<Refusing>]) -> Option<Refusing> {
    let backends = model.backends.iter().enumerate();
    let in_use = backends.filter(|(_, backend)| backend.entry.spec.admin_state == AdminState::Active);
    let refusing: Option<Vec<&Refusing>> =
        in_use.map(|(at, _)| accounts.get(model.accounts.of(at)?)?.as_ref()).collect();
    refusing?.into_iter().min_by_key(|(_, wait_ms)| *wait_ms).cloned()
}

/// One limit as it stands.
struct Row<'a> {
    entry: &'a ScopeEntry,
    limit: LimitState,
    needs: u64,
    decision: &'static str,
    /// The time until the request fits; `None` if it fits now or never.
    wait_ms: Option<u64>,
}

impl<'a> Row<'a> {
    fn of(entry: &'a ScopeEntry, limit: &LimitState, needs: u64, now: SystemTime) -> Self {
        let wait = match limit.what {
            What::Bucket(kind) => bucket_wait(entry, kind, limit, needs, now),
            What::Concurrency => match limit.verdict {
                Verdict::Fits => Ok(0),
                Verdict::Wait(wait) => Ok(millis(wait)),
                Verdict::Never => Err(()),
            },
        };
        let decision = match wait {
            Ok(0) => "fits",
            Ok(wait) if u128::from(wait) <= entry.max_wait.as_millis() => "waits",
            Ok(_) => "refuses",
            Err(()) => "never fits",
        };
        Self { entry, limit: limit.clone(), needs, decision, wait_ms: wait.ok().filter(|ms| *ms > 0) }
    }

    fn refuses(&self) -> bool {
        self.entry.limits.mode == Mode::Enforce && matches!(self.decision, "refuses" | "never fits")
    }

    fn kind(&self) -> &'static str {
        what_name(self.limit.what)
    }

    fn label(&self) -> String {
        format!("{} of {} {}", self.kind(), self.entry.kind, self.entry.name).trim_end().to_owned()
    }

    fn explained(&self) -> v1::ExplainedLimit {
        let declared = declared(self.entry, &self.limit);
        v1::ExplainedLimit {
            scope_kind: self.entry.kind.as_str().to_owned(),
            scope: self.entry.name.clone(),
            kind: self.kind().to_owned(),
            limit: declared.amount,
            period: declared.period.unwrap_or_default().to_owned(),
            burst: declared.burst,
            remaining: self.limit.remaining,
            // Only the control plane knows what all gateways used.
            last_minute: None,
            needs: self.needs,
            decision: self.decision.to_owned(),
            wait_ms: self.wait_ms,
            reset_ms: Some(self.limit.reset).filter(|reset| *reset < FOREVER).map(millis),
            max_wait_ms: millis(self.entry.max_wait),
            shadow: self.entry.limits.mode == Mode::Shadow,
        }
    }
}

/// Milliseconds until a cost fits, zero for now; an error when it never will. A bucket that is overdrawn needs its debt
/// drained first, which only its reset tells.
fn bucket_wait(
    entry: &ScopeEntry,
    kind: Kind,
    limit: &LimitState,
    needs: u64,
    now: SystemTime,
) -> Result<u64, ()> {
    // What is a guess is clamped to the bucket, as at admission.
    let needs = needs.min(limit.limit);
    if limit.limit == 0 {
        return Err(());
    }
    if needs <= limit.remaining && limit.verdict == Verdict::Fits {
        return Ok(0);
    }
    if let Some(renews) = entry.renews {
        return renews.duration_since(now).map(millis).map_err(|_| ());
    }
    let bucket = entry.limits.buckets[kind as usize].ok_or(())?;
    let full = u128::from(limit.limit - needs) * bucket.period.as_micros();
    // Until empty, less the time in which what may stay would drain.
    let spare = full.checked_div(u128::from(bucket.rate)).ok_or(())?;
    let wait = limit.reset.as_micros().saturating_sub(spare).div_ceil(1000);
    Ok(u64::try_from(wait).unwrap_or(u64::MAX).max(1))
}

/// The slots of the model's backends, as the whole cluster has taken them.
async fn slots(
    ledger: &Ledger,
    snapshot: &Snapshot,
    model: &Arc<ModelEntry>,
) -> Result<Vec<v1::BackendSlots>, PageError> {
    let mut rows = Vec::with_capacity(model.backends.len());
    for backends in model.backends.chunks(MAX_SCOPES) {
        let scopes: Vec<ScopeLimits> = backends
            .iter()
            .map(|backend| ScopeLimits {
                record: backend.entry.slots.clone(),
                leases: backend.entry.slots.clone(),
                buckets: [None; Kind::COUNT],
                concurrency: Some(backend.entry.spec.max_concurrency),
                mode: Mode::Enforce,
                without_store: weir_ratelimit::WithoutStore::LocalShare,
                prefetch: Default::default(),
            })
            .collect();
        let states = ledger.limiter.peek(&scopes).await.map_err(|e| PageError::Store(e.to_string()))?;
        rows.extend(backends.iter().zip(states).map(|(backend, state)| {
            let entry = &backend.entry;
            v1::BackendSlots {
                backend: entry.name.to_string(),
                slots: state.limit,
                free: state.remaining,
                active: entry.spec.admin_state == AdminState::Active,
                account: entry.spec.account.as_ref().map(Name::to_string).unwrap_or_default(),
                unused: unused(snapshot, entry).to_owned(),
            }
        }));
    }
    Ok(rows)
}

/// Why this gateway gives a backend no requests; empty when it does.
fn unused(snapshot: &Snapshot, backend: &BackendEntry) -> &'static str {
    let pool = snapshot.pools.get(&backend.spec.pool);
    match backend.spec.admin_state {
        AdminState::Draining => "draining",
        AdminState::Disabled => "disabled",
        AdminState::Active if backend.state.health() == HealthState::Unhealthy => "unhealthy",
        AdminState::Active if pool.is_some_and(|pool| pool.state.is_ejected(&backend.name)) => {
            "ejected by a gateway"
        }
        AdminState::Active => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<Question, PageError> {
        Question::parse(&format!("/limits?{query}").parse().expect("a URI"))
    }

    #[test]
    fn a_question_names_key_and_model_and_perhaps_a_size() {
        let question = parse("key=acme-key&model=gpt-4.1").expect("whole");
        assert_eq!((question.key.as_str(), question.model.as_str()), ("acme-key", "gpt-4.1"));
        assert_eq!(question.tokens, None);
        assert_eq!(parse("model=m&key=k&output=7").expect("whole").tokens, Some((0, 7)));
        for wrong in ["", "key=k", "model=m", "key=K!&model=m", "key=k&model=m&input=x"] {
            assert!(matches!(parse(wrong), Err(PageError::BadQuery(_))), "{wrong}");
        }
    }

    #[test]
    fn a_query_is_percent_decoded_and_its_parameters_are_given_once() {
        assert_eq!(parse("key=acme%2Dkey&model=m").expect("whole").key.as_str(), "acme-key");
        assert!(
            matches!(parse("key=k&key=l&model=m"), Err(PageError::BadQuery(why)) if why.starts_with("query"))
        );
    }
}
