//! The provider accounts whose limits apply to the backends of a model.

use weir_proto::resource::Name;
use weir_ratelimit::{DeclaredLimits, Scope};

use super::backend::ModelBackend;
use super::scope::ScopeEntry;

/// A provider account whose limits apply to a model.
#[derive(Debug)]
pub struct AccountEntry {
    /// Its name.
    pub name: Name,
    /// The account's own limits and those of its use for the model; at least one.
    pub scopes: Vec<ScopeEntry>,
}

/// The limited provider accounts of a model's backends.
#[derive(Debug, Default)]
pub struct Accounts {
    entries: Vec<AccountEntry>,
    /// The index of the account of each backend of the model.
    of: Vec<Option<usize>>,
}

impl Accounts {
    /// The accounts whose limits apply to a model with these backends.
    pub(super) fn of_model(model: &Name, backends: &[ModelBackend], limits: &DeclaredLimits<'_>) -> Self {
        let mut accounts = Self::default();
        for backend in backends {
            let at = backend.entry.spec.account.as_ref().and_then(|name| {
                if let Some(known) = accounts.entries.iter().position(|entry| entry.name == *name) {
                    return Some(known);
                }
                let account = name.as_str();
                let mut scopes = ScopeEntry::all(Scope::Account(account), limits);
                scopes
                    .extend(ScopeEntry::all(Scope::AccountModel { account, model: model.as_str() }, limits));
                if scopes.is_empty() {
                    return None;
                }
                accounts.entries.push(AccountEntry { name: name.clone(), scopes });
                Some(accounts.entries.len() - 1)
            });
            accounts.of.push(at);
        }
        accounts
    }

    /// Whether no backend of the model is under an account's limits, so that accounts need not be checked.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The account whose limits apply to this backend of the model.
    pub fn of(&self, backend: usize) -> Option<usize> {
        self.of.get(backend).copied().flatten()
    }

    /// All accounts.
    pub fn iter(&self) -> impl Iterator<Item = &AccountEntry> {
        self.entries.iter()
    }
}

impl std::ops::Index<usize> for Accounts {
    type Output = AccountEntry;

    fn index(&self, at: usize) -> &AccountEntry {
        &self.entries[at]
    }
}
