//! The limits of one scope, compiled for the limiter.

use std::fmt;
use std::time::{Duration, SystemTime};

use weir_proto::resource::{Budget, Rates};
use weir_ratelimit::{Scope, ScopeLimits, What, max_wait, scope_limits};

/// What the limits of a scope are over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScopeKind {
    /// Every request.
    Global,
    /// A model.
    Model,
    /// A tenant.
    Tenant,
    /// An API key.
    ApiKey,
    /// A tenant's use of a model.
    TenantModel,
    /// A provider's account.
    Account,
    /// The use of a provider's account for a model.
    AccountModel,
}

impl ScopeKind {
    /// As refusals, metrics and reports name it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Global => "global",
            Self::Model => "model",
            Self::Tenant => "tenant",
            Self::ApiKey => "api_key",
            Self::TenantModel => "tenant_model",
            Self::Account => "account",
            Self::AccountModel => "account_model",
        }
    }

    /// Whether the limit is that of a provider's account: not the caller's own, and how it stands is not the caller's
    /// to know.
    pub const fn is_of_account(self) -> bool {
        matches!(self, Self::Account | Self::AccountModel)
    }
}

impl fmt::Display for ScopeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is limited, as refusals, pages and reports name it.
pub const fn what_name(what: What) -> &'static str {
    match what {
        What::Bucket(kind) => kind.name(),
        What::Concurrency => "concurrency",
    }
}

/// One scope's limits, compiled.
#[derive(Debug, Clone)]
pub struct ScopeEntry {
    /// As the limiter takes it.
    pub limits: ScopeLimits,
    /// What the limits are over.
    pub kind: ScopeKind,
    /// The name of what it limits, `TENANT/MODEL` for two; empty for global.
    pub name: String,
    /// How long a request may wait for it.
    pub max_wait: Duration,
    /// Its money per period; each period is a scope of its own while it lasts.
    pub budget: Option<Budget>,
    /// When it begins anew, for what does not drain.
    pub renews: Option<SystemTime>,
}

impl ScopeEntry {
    pub(super) fn new(scope: Scope<'_>, rates: &Rates) -> Self {
        let (kind, name) = match scope {
            Scope::Global => (ScopeKind::Global, String::new()),
            Scope::Model(model) => (ScopeKind::Model, model.to_owned()),
            Scope::Tenant(tenant) => (ScopeKind::Tenant, tenant.to_owned()),
            Scope::ApiKey { key, .. } => (ScopeKind::ApiKey, key.to_owned()),
            Scope::TenantModel { tenant, model } => (ScopeKind::TenantModel, format!("{tenant}/{model}")),
            Scope::Account(account) => (ScopeKind::Account, account.to_owned()),
            Scope::AccountModel { account, model } => (ScopeKind::AccountModel, format!("{account}/{model}")),
        };
        Self {
            limits: scope_limits(scope, rates),
            kind,
            name,
            max_wait: max_wait(scope, rates),
            budget: rates.budget,
            renews: None,
        }
    }

    /// Two limits over one scope share its record, so they become one.
    pub(super) fn tightest(a: Option<Self>, b: Self) -> Self {
        let Some(a) = a else { return b };
        let limits = weir_ratelimit::rates::tightest(&a.limits, b.limits);
        let budget = match (a.budget, b.budget) {
            (Some(x), Some(y)) if x.micro_dollars < y.micro_dollars => Some(x),
            (x, y) => y.or(x),
        };
        Self { limits, budget, max_wait: a.max_wait.min(b.max_wait), ..b }
    }
}
