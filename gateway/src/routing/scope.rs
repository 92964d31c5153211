//! The limits of one scope, compiled for the limiter.

use std::fmt;
use std::time::{Duration, SystemTime};

use weir_proto::resource::{Budget, Name};
use weir_ratelimit::{Declared, DeclaredLimits, Scope, ScopeLimits, What, max_wait, scope_limits};

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
    /// The name of what it limits, `TENANT/MODEL` for two; empty for global. With the limit resource in brackets where
    /// there are several.
    pub name: String,
    /// How long a request may wait for it.
    pub max_wait: Duration,
    /// Its money per period; each period is a scope of its own while it lasts.
    pub budget: Option<Budget>,
    /// When it begins anew, for what does not drain.
    pub renews: Option<SystemTime>,
}

impl ScopeEntry {
    /// Every limit that is declared over a scope.
    pub(super) fn all(scope: Scope<'_>, limits: &DeclaredLimits<'_>) -> Vec<Self> {
        Self::over(scope, limits.over(scope))
    }

    /// All of these limits over a scope.
    pub(super) fn over(scope: Scope<'_>, over: &[Declared<'_>]) -> Vec<Self> {
        let entry = |declared: &Declared<'_>| {
            let mut entry = Self::new(scope, declared);
            // One of several is told from the others by its resource.
            if let (2.., Some(limit)) = (over.len(), declared.limit) {
                let space = if entry.name.is_empty() { "" } else { " " };
                entry.name = format!("{}{space}({limit})", entry.name);
            }
            entry
        };
        over.iter().map(entry).collect()
    }

    fn new(scope: Scope<'_>, declared: &Declared<'_>) -> Self {
        let rates = declared.rates;
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
            limits: scope_limits(scope, declared.limit.map(Name::as_str), rates),
            kind,
            name,
            max_wait: max_wait(scope, rates),
            budget: rates.budget,
            renews: None,
        }
    }
}
