//! What stands between a key and a model: every limit, what it has left, and what it would say to a request now. Served
//! on the operations port for `weir limits explain`; nothing is charged and nothing is written.
//!
//! A gateway answers this, not the control plane, because limits live in the store that gateways share; any of them
//! gives the same answer while they share one. The key is named, so its secret is not needed.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::{Value, json};
use weir_proto::resource::{AdminState, Name};
use weir_ratelimit::{
    Cost, FOREVER, Kind, LimitState, Limiter, MAX_SCOPES, Mode, ScopeLimits, Verdict, What,
};

use crate::control::live_config::LiveConfig;
use crate::headers::millis;
use crate::limits::ledger::Ledger;
use crate::limits::{price, spend_period};
use crate::routing::backend::ModelBackend;
use crate::routing::entries::ModelEntry;
use crate::routing::scope::{ScopeEntry, what_name};

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// A parameter is missing or wrong.
    #[error("{0}")]
    BadQuery(&'static str),
    /// No such key or model is in force.
    #[error("this gateway knows no {kind} {name}")]
    Unknown {
        /// "key" or "model".
        kind: &'static str,
        /// As asked for.
        name: Name,
    },
    /// The limit store does not answer.
    #[error("the limits cannot be read now: {0}")]
    Store(String),
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    key: Name,
    model: Name,
    /// Prompt and completion tokens of the request that is imagined; absent what such requests usually have.
    tokens: Option<(u64, u64)>,
}

impl Question {
    /// From the query `key=NAME&model=NAME`, and where a certain request is meant `input=N&output=N`.
    ///
    /// # Errors
    /// When a name is missing or not a name, or a number is not one.
    pub fn parse(query: &str) -> Result<Self, Unanswered> {
        let field = |name: &str| {
            query.split('&').filter_map(|pair| pair.split_once('=')).find(|(k, _)| *k == name).map(|(_, v)| v)
        };
        let name = |name| field(name).and_then(|text| Name::parse(text).ok());
        let number = |name, message| match field(name) {
            None => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| Unanswered::BadQuery(message)),
        };
        let input = number("input", "input: must be a number of tokens")?;
        let output = number("output", "output: must be a number of tokens")?;
        Ok(Self {
            key: name("key").ok_or(Unanswered::BadQuery("key: must be the name of an API key"))?,
            model: name("model").ok_or(Unanswered::BadQuery("model: must be the name of a model"))?,
            tokens: input.or(output).map(|_| (input.unwrap_or(0), output.unwrap_or(0))),
        })
    }
}

/// The page `/limits` of the operations port.
pub fn page(live: Arc<LiveConfig>, ledger: Arc<Ledger>) -> Router {
    Router::new().route("/limits", get(answer)).with_state((live, ledger))
}

async fn answer(
    State((live, ledger)): State<(Arc<LiveConfig>, Arc<Ledger>)>,
    RawQuery(query): RawQuery,
) -> Response {
    let question = Question::parse(&query.unwrap_or_default());
    let answered = match question {
        Ok(question) => explain(&live, &ledger, &question).await,
        Err(error) => Err(error),
    };
    match answered {
        Ok(value) => ([(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response(),
        Err(error) => {
            let status = match error {
                Unanswered::BadQuery(_) => StatusCode::BAD_REQUEST,
                Unanswered::Unknown { .. } => StatusCode::NOT_FOUND,
                Unanswered::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            };
            (status, format!("{error}\n")).into_response()
        }
    }
}

/// Answers.
///
/// # Errors
/// When the key or model is not there, or the limit store does not answer.
pub async fn explain(live: &LiveConfig, ledger: &Ledger, question: &Question) -> Result<Value, Unanswered> {
    let snapshot = live.snapshot();
    let unknown = |kind, name: &Name| Unanswered::Unknown { kind, name: name.clone() };
    let key = snapshot.keys.values().find(|key| key.name == question.key);
    let key = key.ok_or_else(|| unknown("key", &question.key))?.clone();
    let model = snapshot.models_by_name.get(&question.model);
    let model = model.ok_or_else(|| unknown("model", &question.model))?.clone();
    let (input, output) =
        question.tokens.unwrap_or_else(|| (0, ledger.estimates.output(&key.tenant.queue, &model.queue)));
    let cost = price::cost(&model, input, output);

    let now = SystemTime::now();
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
    let backends = slots(ledger, &model).await?;
    Ok(json!({
        "key": key.name.as_str(), "tenant": key.tenant.name.as_str(), "model": model.name.as_str(),
        "allowed": key.allows(&model.name), "input_tokens": input, "output_tokens": output,
        "waiting": ledger.waiting.len(),
        "refuses": refusing.map(|(label, _)| label),
        "limits": rows.iter().map(Row::value).collect::<Vec<_>>(),
        "backends": backends,
    }))
}

async fn rows<'a>(
    ledger: &Ledger,
    entries: &[&'a ScopeEntry],
    cost: &Cost,
    now: SystemTime,
) -> Result<Vec<Row<'a>>, Unanswered> {
    let scopes: Vec<ScopeLimits> = entries.iter().map(|e| e.limits.clone()).collect();
    let limits = ledger.limiter.peek(&scopes).await.map_err(|e| Unanswered::Store(e.to_string()))?;
    let row = |limit: &LimitState| {
        let entry = entries.get(limit.scope)?;
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
    says: &'static str,
    /// Until the request fits, when it does not now and ever will.
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
        let says = match wait {
            Ok(0) => "fits",
            Ok(wait) if u128::from(wait) <= entry.max_wait.as_millis() => "waits",
            Ok(_) => "refuses",
            Err(()) => "never fits",
        };
        Self { entry, limit: *limit, needs, says, wait_ms: wait.ok().filter(|ms| *ms > 0) }
    }

    fn refuses(&self) -> bool {
        self.entry.limits.mode == Mode::Enforce && matches!(self.says, "refuses" | "never fits")
    }

    fn kind(&self) -> &'static str {
        what_name(self.limit.what)
    }

    fn label(&self) -> String {
        format!("{} of {} {}", self.kind(), self.entry.kind, self.entry.name).trim_end().to_owned()
    }

    fn value(&self) -> Value {
        let reset = Some(self.limit.reset).filter(|reset| *reset < FOREVER).map(millis);
        json!({
            "scope": { "kind": self.entry.kind.as_str(), "name": self.entry.name },
            "kind": self.kind(), "limit": self.limit.limit, "remaining": self.limit.remaining,
            "needs": self.needs, "says": self.says, "wait_ms": self.wait_ms, "reset_ms": reset,
            "max_wait_ms": millis(self.entry.max_wait),
            "shadow": self.entry.limits.mode == Mode::Shadow,
        })
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
async fn slots(ledger: &Ledger, model: &Arc<ModelEntry>) -> Result<Vec<Value>, Unanswered> {
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
        let states = ledger.limiter.peek(&scopes).await.map_err(|e| Unanswered::Store(e.to_string()))?;
        for (ModelBackend { entry: backend, .. }, state) in backends.iter().zip(states) {
            rows.push(json!({
                "backend": backend.name.as_str(), "slots": state.limit, "free": state.remaining,
                "active": backend.spec.admin_state == AdminState::Active,
                "account": backend.spec.account.as_ref().map(Name::as_str),
            }));
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_names_key_and_model_and_perhaps_a_size() {
        let question = Question::parse("key=acme-key&model=gpt-4.1").expect("whole");
        assert_eq!((question.key.as_str(), question.model.as_str()), ("acme-key", "gpt-4.1"));
        assert_eq!(question.tokens, None);
        assert_eq!(Question::parse("model=m&key=k&output=7").expect("whole").tokens, Some((0, 7)));
        for wrong in ["", "key=k", "model=m", "key=K!&model=m", "key=k&model=m&input=x"] {
            assert!(matches!(Question::parse(wrong), Err(Unanswered::BadQuery(_))), "{wrong}");
        }
    }
}
