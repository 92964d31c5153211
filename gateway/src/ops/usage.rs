//! Usage: requests, tokens and cost by tenant, model and day. The control plane asks for it, and the operations port serves
//! it too.
//!
//! Settlements write usage records to the store that gateways share, so every gateway answers for all of them. The number of
//! records of a question is computed and bounded before any is read.

use std::collections::{BTreeMap, HashSet};
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
use weir_proto::questions::usage_value;
use weir_proto::resource::Name;
use weir_proto::v1::{self, UsageField};
use weir_ratelimit::usage::USAGE_RECORDS_MAX;
use weir_ratelimit::{Key, Limiter, Tally, UsageLines};

use super::page::{self, PageError};
use crate::control::live_config::LiveConfig;
use crate::limits::ledger::Ledger;
use crate::routing::snapshot::Snapshot;
use crate::routing::spend_period::{FIRST_DAY, day_of, parse_day};

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
    /// A question of the control plane. Days are UTC and included; `to` is today and `from` 29 days earlier when not given.
    ///
    /// # Errors
    /// When a field is not what it should be, or there are too many days.
    pub fn of(request: &v1::QueryUsageRequest, now: SystemTime) -> Result<Self, PageError> {
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let day = |text: &str, wrong| {
            given(text).map(|text| parse_day(&text).ok_or(PageError::BadQuery(wrong))).transpose()
        };
        let name = |text: &str, wrong| page::name(given(text).as_deref(), wrong);
        let last = day(&request.to, "to: must be a day such as 2026-11-23")?.unwrap_or_else(|| day_of(now));
        let first = day(&request.from, "from: must be a day such as 2026-11-23")?;
        let first = first.unwrap_or_else(|| last.saturating_sub((DAYS - 1).days()).max(FIRST_DAY));
        if first > last {
            return Err(PageError::BadQuery("from: must not be after to"));
        }
        if (last - first).get_days() >= DAYS_MAX {
            return Err(PageError::BadQuery("from: at most 400 days are kept"));
        }
        Ok(Self {
            tenant: name(&request.tenant, "tenant: must be the name of a tenant")?,
            model: name(&request.model, "model: must be the name of a model")?,
            first,
            last,
            by: By::of(request.group_by()),
        })
    }

    /// From the query `tenant=NAME&model=NAME&from=DAY&to=DAY&by=tenant,model,day`; everything may be left out.
    ///
    /// # Errors
    /// When a parameter is not what it should be, or there are too many days.
    pub fn parse(uri: &Uri, now: SystemTime) -> Result<Self, PageError> {
        let given: Parameters = page::parameters(uri)?;
        // A parameter that is given and empty is a mistake, and no default.
        let text = |text: Option<String>, wrong| match text {
            Some(text) if text.is_empty() => Err(PageError::BadQuery(wrong)),
            text => Ok(text.unwrap_or_default()),
        };
        let mut request = v1::QueryUsageRequest {
            tenant: text(given.tenant, "tenant: must be the name of a tenant")?,
            model: text(given.model, "model: must be the name of a model")?,
            from: text(given.from, "from: must be a day such as 2026-11-23")?,
            to: text(given.to, "to: must be a day such as 2026-11-23")?,
            group_by: Vec::new(),
        };
        for word in given.by.iter().flat_map(|by| by.split(',')) {
            request.push_group_by(match word {
                "tenant" => UsageField::Tenant,
                "model" => UsageField::Model,
                "day" => UsageField::Day,
                _ => {
                    return Err(PageError::BadQuery("by: must be tenant, model or day, or several of them"));
                }
            });
        }
        Self::of(&request, now)
    }
}

impl By {
    /// By these fields; without any by all.
    fn of(fields: impl Iterator<Item = UsageField>) -> Self {
        let mut by = Self { tenant: false, model: false, day: false };
        for field in fields {
            match field {
                UsageField::Tenant => by.tenant = true,
                UsageField::Model => by.model = true,
                UsageField::Day => by.day = true,
                UsageField::Unspecified => {}
            }
        }
        if by.tenant || by.model || by.day { by } else { Self { tenant: true, model: true, day: true } }
    }
}

/// The page `/usage` of the operations port.
pub fn page(live: Arc<LiveConfig>, ledger: Arc<Ledger>) -> Router {
    Router::new().route("/usage", get(answer)).with_state((live, ledger))
}

async fn answer(State((live, ledger)): State<(Arc<LiveConfig>, Arc<Ledger>)>, uri: Uri) -> Response {
    let answer = match Question::parse(&uri, weir_runtime::wall_clock()) {
        Ok(question) => usage(&live, &ledger, &question).await,
        Err(error) => Err(error),
    };
    page::respond(answer.map(|answer| usage_value(&answer)))
}

/// Answers. Tenants are those in force; the usage of a deleted one is found by its name.
///
/// # Errors
/// When too much is asked for at once, or the limit store does not answer.
pub async fn usage(
    live: &LiveConfig,
    ledger: &Arc<Ledger>,
    question: &Question,
) -> Result<v1::QueryUsageResponse, PageError> {
    let snapshot = live.snapshot();
    let reads = question.batches(&snapshot)?.into_iter().map(|batch| read(ledger.clone(), batch));
    let mut reads = stream::iter(reads).buffer_unordered(AT_ONCE);
    let priced = Prices::of(&snapshot);
    let mut sums: BTreeMap<(String, String, String), Sum> = BTreeMap::new();
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
                sums.entry(key).or_default().add(tally, !priced.know(&model));
            }
        }
    }
    let mut total = Sum::default();
    sums.values().for_each(|sum| total.add(sum.tally, sum.unpriced));
    Ok(v1::QueryUsageResponse {
        from: question.first.to_string(),
        to: question.last.to_string(),
        sums: sums
            .into_iter()
            .map(|((tenant, model, day), sum)| v1::UsageSum { tenant, model, day, ..sum.wire() })
            .collect(),
        total: Some(total.wire()),
        gateway_id: String::new(),
    })
}

impl Question {
    /// The records to read: some days of a tenant each.
    fn batches(&self, snapshot: &Snapshot) -> Result<Vec<(Name, Vec<String>)>, PageError> {
        let tenants: Vec<&Name> = match &self.tenant {
            Some(tenant) => vec![tenant],
            None => snapshot.tenants.keys().collect(),
        };
        let days = self.first.series(1.day()).take_while(|day| *day <= self.last);
        let days: Vec<String> = days.map(|day| day.to_string()).collect();
        if tenants.len().saturating_mul(days.len()) > RECORDS_MAX {
            return Err(PageError::BadQuery("from: too many records; ask for fewer days or for one tenant"));
        }
        let of_tenant = |tenant: &Name| {
            let batches = days.chunks(USAGE_RECORDS_MAX).map(|days| (tenant.clone(), days.to_vec()));
            batches.collect::<Vec<_>>()
        };
        Ok(tenants.into_iter().flat_map(of_tenant).collect())
    }
}

/// The models that cost something now. What a model used before it had a price was recorded without cost.
struct Prices<'a>(HashSet<&'a str>);

impl<'a> Prices<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let models = snapshot.models_by_name.iter();
        let priced = models.filter(|(_, model)| {
            model.spec.input_price_micro_dollars > 0 || model.spec.output_price_micro_dollars > 0
        });
        Self(priced.map(|(name, _)| name.as_str()).collect())
    }

    fn know(&self, model: &str) -> bool {
        self.0.contains(model)
    }
}

/// A sum of records.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    tally: Tally,
    /// A part was for models without a price.
    unpriced: bool,
}

impl Sum {
    fn add(&mut self, tally: Tally, unpriced: bool) {
        self.tally = self.tally.plus(tally);
        self.unpriced |= unpriced && tally.requests != 0;
    }

    fn wire(self) -> v1::UsageSum {
        v1::UsageSum {
            requests: self.tally.requests,
            input_tokens: self.tally.input_tokens,
            output_tokens: self.tally.output_tokens,
            cost_micro_dollars: self.tally.spend_micro_dollars,
            unpriced: self.unpriced,
            ..v1::UsageSum::default()
        }
    }
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
