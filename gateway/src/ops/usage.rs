//! Usage: requests, tokens and cost by tenant, model and day. Served on the operations port for `weir usage`.
//!
//! Settlements write usage records to the store that gateways share, so every gateway answers for all of them. The number of
//! records of a question is computed and bounded before any is read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::http::Uri;
use axum::response::Response;
use axum::routing::get;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::ToSpan as _;
use jiff::civil::Date;
use serde::Deserialize;
use serde_json::{Value, json};
use weir_proto::resource::Name;
use weir_ratelimit::usage::USAGE_RECORDS_MAX;
use weir_ratelimit::{Key, Limiter, Tally, UsageLines};

use super::page::{self, PageError};
use crate::control::live_config::LiveConfig;
use crate::limits::ledger::Ledger;
use crate::limits::spend_period::{FIRST_DAY, day_of, parse_day};

/// The default number of days.
const DAYS: i32 = 30;
/// The maximum of days of a question, for which records are kept.
const DAYS_MAX: i32 = 400;
/// The maximum of records (one per tenant and day) of a question.
const RECORDS_MAX: usize = 20_000;
/// Concurrent reads, few enough for the store to admit requests meanwhile.
const AT_ONCE: usize = 4;
/// The number of retries of a failed read.
const ATTEMPTS: u32 = 4;

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    tenant: Option<Name>,
    model: Option<Name>,
    /// UTC, both included.
    first: Date,
    last: Date,
    by: By,
}

/// The fields by which the sums are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct By {
    tenant: bool,
    model: bool,
    day: bool,
}

/// The query of the page.
#[derive(Deserialize)]
struct Parameters {
    tenant: Option<String>,
    model: Option<String>,
    from: Option<String>,
    to: Option<String>,
    by: Option<String>,
}

impl Question {
    /// From the query `tenant=NAME&model=NAME&from=DAY&to=DAY&by=tenant,model,day`; everything may be left out. Days are
    /// UTC and included; `to` is today and `from` 29 days earlier when not given.
    ///
    /// # Errors
    /// When a parameter is not what it should be, or there are too many days.
    pub fn parse(uri: &Uri, now: SystemTime) -> Result<Self, PageError> {
        let given: Parameters = page::parameters(uri)?;
        let day = |text: Option<String>, wrong| {
            text.map(|text| parse_day(&text).ok_or(PageError::BadQuery(wrong))).transpose()
        };
        let last = day(given.to, "to: must be a day such as 2026-11-23")?.unwrap_or_else(|| day_of(now));
        let first = day(given.from, "from: must be a day such as 2026-11-23")?;
        let first = first.unwrap_or_else(|| last.saturating_sub((DAYS - 1).days()).max(FIRST_DAY));
        if first > last {
            return Err(PageError::BadQuery("from: must not be after to"));
        }
        if (last - first).get_days() >= DAYS_MAX {
            return Err(PageError::BadQuery("from: at most 400 days are kept"));
        }
        Ok(Self {
            tenant: page::name(given.tenant.as_deref(), "tenant: must be the name of a tenant")?,
            model: page::name(given.model.as_deref(), "model: must be the name of a model")?,
            first,
            last,
            by: By::parse(given.by.as_deref().unwrap_or("tenant,model,day"))?,
        })
    }
}

impl By {
    fn parse(text: &str) -> Result<Self, PageError> {
        let mut by = Self { tenant: false, model: false, day: false };
        for word in text.split(',') {
            match word {
                "tenant" => by.tenant = true,
                "model" => by.model = true,
                "day" => by.day = true,
                _ => {
                    return Err(PageError::BadQuery("by: must be tenant, model or day, or several of them"));
                }
            }
        }
        Ok(by)
    }
}

/// The page `/usage` of the operations port.
pub fn page(live: Arc<LiveConfig>, ledger: Arc<Ledger>) -> Router {
    Router::new().route("/usage", get(answer)).with_state((live, ledger))
}

async fn answer(State((live, ledger)): State<(Arc<LiveConfig>, Arc<Ledger>)>, uri: Uri) -> Response {
    page::respond(match Question::parse(&uri, weir_runtime::wall_clock()) {
        Ok(question) => usage(&live, &ledger, &question).await,
        Err(error) => Err(error),
    })
}

/// Answers. Tenants are those in force; the usage of a deleted one is found by its name.
///
/// # Errors
/// When too much is asked for at once, or the limit store does not answer.
pub async fn usage(live: &LiveConfig, ledger: &Arc<Ledger>, question: &Question) -> Result<Value, PageError> {
    let snapshot = live.snapshot();
    let tenants: Vec<&Name> = match &question.tenant {
        Some(tenant) => vec![tenant],
        None => snapshot.tenants.iter().collect(),
    };
    let days: Vec<String> = question
        .first
        .series(1.day())
        .take_while(|day| *day <= question.last)
        .map(|day| day.to_string())
        .collect();
    if tenants.len().saturating_mul(days.len()) > RECORDS_MAX {
        return Err(PageError::BadQuery("from: too many records; ask for fewer days or for one tenant"));
    }
    let mut batches: Vec<(Name, Vec<String>)> = Vec::new();
    for tenant in tenants {
        batches.extend(days.chunks(USAGE_RECORDS_MAX).map(|days| (tenant.clone(), days.to_vec())));
    }
    let reads = batches.into_iter().map(|batch| read(ledger.clone(), batch));
    let mut reads = stream::iter(reads).buffer_unordered(AT_ONCE);
    let mut rows: BTreeMap<(String, String, String), Tally> = BTreeMap::new();
    while let Some((tenant, days, lines)) = reads.try_next().await? {
        for (day, lines) in days.into_iter().zip(lines) {
            for (model, tally) in lines {
                if question.model.as_ref().is_some_and(|wanted| wanted.as_str() != model) {
                    continue;
                }
                let By { tenant: by_tenant, model: by_model, day: by_day } = question.by;
                let text_if = |wanted: bool, text: &str| if wanted { text.to_owned() } else { String::new() };
                let key =
                    (text_if(by_tenant, tenant.as_str()), text_if(by_model, &model), text_if(by_day, &day));
                let row = rows.entry(key).or_default();
                *row = row.plus(tally);
            }
        }
    }
    let total = rows.values().fold(Tally::default(), |sum, tally| sum.plus(*tally));
    let value = |((tenant, model, day), tally): (&(String, String, String), &Tally)| {
        let mut row = figures(tally);
        for (field, text) in [("tenant", tenant), ("model", model), ("day", day)] {
            if !text.is_empty() {
                row[field] = text.as_str().into();
            }
        }
        row
    };
    Ok(json!({
        "from": question.first.to_string(), "to": question.last.to_string(),
        "rows": rows.iter().map(value).collect::<Vec<_>>(), "total": figures(&total),
    }))
}

fn figures(tally: &Tally) -> Value {
    json!({
        "requests": tally.requests, "input_tokens": tally.input_tokens, "output_tokens": tally.output_tokens,
        "cost_micro_dollars": tally.spend_micro_dollars,
    })
}

/// Some days of a tenant. A store that is busy may be late for one call and answer the next.
async fn read(
    ledger: Arc<Ledger>,
    (tenant, days): (Name, Vec<String>),
) -> Result<(Name, Vec<String>, Vec<UsageLines>), PageError> {
    let records: Vec<Key> = days.iter().map(|day| Key::usage(tenant.as_str(), day)).collect();
    let mut attempt = 1;
    loop {
        match ledger.limiter.usage(&records).await {
            Ok(lines) => return Ok((tenant, days, lines)),
            Err(error) if attempt == ATTEMPTS => return Err(PageError::Store(error.to_string())),
            Err(_) => attempt += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::civil::date;

    use super::*;

    fn parse(query: &str, now: SystemTime) -> Result<Question, PageError> {
        Question::parse(&format!("/usage?{query}").parse().expect("a URI"), now)
    }

    #[test]
    fn a_question_has_bounds_and_defaults() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(20_780 * 24 * 60 * 60);
        let question = parse("", now).expect("whole");
        assert_eq!((question.first, question.last), (date(2026, 10, 25), date(2026, 11, 23)));
        assert_eq!(question.by, By { tenant: true, model: true, day: true });
        let question = parse("tenant=acme&from=2026-11-01&to=2026-11-23&by=day", now).expect("whole");
        assert_eq!((question.first, question.last), (date(2026, 11, 1), date(2026, 11, 23)));
        assert_eq!(question.by, By { tenant: false, model: false, day: true });
        let wrong = [
            "tenant=A!",
            "model=",
            "from=x",
            "to=2026-02-30",
            "by=",
            "by=key",
            "from=2026-11-24",
            "from=2020-01-01",
        ];
        for query in wrong {
            assert!(matches!(parse(query, now), Err(PageError::BadQuery(_))), "{query}");
        }
    }
}
