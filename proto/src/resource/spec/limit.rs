//! Limits.

use std::time::Duration;

use crate::resource::Name;
use crate::resource::check::Check;
use crate::resource::demand::{self, Budget};
use crate::v1;

/// A limit over everything, a tenant, a model, an API key, a tenant's use of a model, an account or an account's use for a
/// model. Several limits over the same hold each for itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// Requests of this tenant.
    pub tenant: Option<Name>,
    /// Requests for this model.
    pub model: Option<Name>,
    /// Requests with this API key; alone.
    pub api_key: Option<Name>,
    /// Requests to backends that bill this account; alone or with `model`.
    pub account: Option<Name>,
    /// How much.
    pub rates: Rates,
}

impl Limit {
    /// Most limit resources over one selector.
    pub const PER_SELECTOR_MAX: usize = 4;

    pub(in crate::resource) fn judge(w: &v1::LimitSpec, check: &mut Check) -> Self {
        let selector = w.selector.clone().unwrap_or_default();
        let mut name = |path: &str, text: &str| {
            if text.is_empty() { None } else { check.name(path, text) }
        };
        let (tenant, model, api_key, account) = (
            name("selector.tenant", &selector.tenant),
            name("selector.model", &selector.model),
            name("selector.api_key", &selector.api_key),
            name("selector.account", &selector.account),
        );
        let callers = [("selector.tenant", &selector.tenant), ("selector.api_key", &selector.api_key)];
        let caller = callers.into_iter().find(|(_, name)| !name.is_empty());
        if let Some((path, _)) = caller.filter(|_| !selector.account.is_empty()) {
            check.violation(
                path,
                "cannot be with account: a provider limits its account whoever asks; \
                 limit the tenant or key in its own limits",
            );
        }
        let beside_key = !selector.tenant.is_empty() || !selector.model.is_empty();
        if !selector.api_key.is_empty() && beside_key && selector.account.is_empty() {
            check.violation(
                "selector.api_key",
                "goes alone: a key belongs to one tenant, and limits of its use of one model are not counted",
            );
        }
        if !selector.limit.is_empty() {
            check.violation(
                "selector.limit",
                "is for callers of the limit service; a limit is named by its resource",
            );
        }
        let rates = Rates::judge("rates", w.rates.as_ref(), check);
        if rates.is_none() {
            check.violation("rates", "must be set");
        }
        if !selector.account.is_empty() && rates.as_ref().is_some_and(|rates| rates.budget.is_some()) {
            check.violation("rates.budget", "cannot be of an account; budget the tenants, keys or models");
        }
        Self { tenant, model, api_key, account, rates: rates.unwrap_or_default() }
    }
}

/// What happens to a limit when its store cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WithoutStore {
    /// Each gateway enforces its share.
    #[default]
    LocalShare,
    /// Requests pass.
    Open,
    /// Requests are refused with 503.
    Closed,
}

/// Rates and concurrency of one scope; `None` is not limited.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    /// Requests per minute.
    pub requests_per_minute: Option<u64>,
    /// Prompt and completion tokens per minute.
    pub tokens_per_minute: Option<u64>,
    /// Prompt tokens per minute.
    pub input_tokens_per_minute: Option<u64>,
    /// Completion tokens per minute.
    pub output_tokens_per_minute: Option<u64>,
    /// Requests in flight.
    pub concurrency: Option<u32>,
    /// Minutes' worth that may be used at once: 5.
    pub burst_multiplier: f64,
    /// How long a request may wait, zero for not at all; `None` is the default of what is limited.
    pub max_wait: Option<Duration>,
    /// What happens without the limit store.
    pub without_store: WithoutStore,
    /// Count only.
    pub shadow: bool,
    /// Money per period.
    pub budget: Option<Budget>,
    /// Per cent of the capacity that is set aside for quota taken ahead: 0.
    pub prefetch_percent: u32,
}

impl Default for Rates {
    fn default() -> Self {
        Self {
            requests_per_minute: None,
            tokens_per_minute: None,
            input_tokens_per_minute: None,
            output_tokens_per_minute: None,
            concurrency: None,
            burst_multiplier: Self::BURST_MULTIPLIER,
            max_wait: None,
            without_store: WithoutStore::default(),
            shadow: false,
            budget: None,
            prefetch_percent: 0,
        }
    }
}

impl Rates {
    /// The default of [`Rates::burst_multiplier`].
    pub const BURST_MULTIPLIER: f64 = 5.0;
    /// The largest [`Rates::prefetch_percent`]: a limit is mostly decided by its store.
    pub const PREFETCH_PERCENT_MAX: u32 = 50;
    /// The largest rate and capacity, units: what a script's double holds exactly in micro-units (2^53).
    pub const MAX_UNITS: u64 = 9_000_000_000;

    /// Checks rates that are no part of a resource. Violations start with `path`.
    pub fn checked(path: &str, wire: &v1::Rates) -> Result<Self, crate::resource::Violations> {
        let mut check = Check::new("");
        let rates = Self::judge(path, Some(wire), &mut check);
        check.finish()?;
        Ok(rates.unwrap_or_default())
    }

    pub(in crate::resource) fn judge(
        path: &str,
        wire: Option<&v1::Rates>,
        check: &mut Check,
    ) -> Option<Self> {
        let w = wire?;
        let burst = w.burst_multiplier.unwrap_or(Self::BURST_MULTIPLIER);
        let burst = check.range(&format!("{path}.burst_multiplier"), burst, 1.0, 1000.0);
        let mut rate = |field: &str, value: Option<u64>| {
            let value = value?;
            let path = format!("{path}.{field}");
            if check.range(&path, value, 0, Self::MAX_UNITS) as f64 * burst > Self::MAX_UNITS as f64 {
                check.violation(&path, format!("times burst_multiplier must be at most {}", Self::MAX_UNITS));
            }
            Some(value)
        };
        let (rpm, tpm, itpm, otpm) = (
            rate("requests_per_minute", w.requests_per_minute),
            rate("tokens_per_minute", w.tokens_per_minute),
            rate("input_tokens_per_minute", w.input_tokens_per_minute),
            rate("output_tokens_per_minute", w.output_tokens_per_minute),
        );
        let without_store = match v1::WithoutStore::try_from(w.without_store) {
            Ok(v1::WithoutStore::Unspecified | v1::WithoutStore::LocalShare) => WithoutStore::LocalShare,
            Ok(v1::WithoutStore::Open) => WithoutStore::Open,
            Ok(v1::WithoutStore::Closed) => WithoutStore::Closed,
            Err(_) => {
                check.violation(&format!("{path}.without_store"), "is not a policy this version knows");
                WithoutStore::default()
            }
        };
        Some(Self {
            requests_per_minute: rpm,
            tokens_per_minute: tpm,
            input_tokens_per_minute: itpm,
            output_tokens_per_minute: otpm,
            concurrency: w.concurrency,
            burst_multiplier: burst,
            max_wait: demand::wait(&format!("{path}.max_wait"), w.max_wait.as_ref(), check),
            budget: Budget::judge(&format!("{path}.budget"), w.budget.as_ref(), check),
            without_store,
            shadow: w.shadow,
            prefetch_percent: check.range(
                &format!("{path}.prefetch_percent"),
                w.prefetch_percent.unwrap_or(0),
                0,
                Self::PREFETCH_PERCENT_MAX,
            ),
        })
    }
}
