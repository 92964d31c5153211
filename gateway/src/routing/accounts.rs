//! The provider accounts whose limits apply to the backends of a model.

use std::collections::BTreeMap;

use weir_proto::resource::{Name, Resource, Spec};
use weir_ratelimit::Scope;

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

/// Every limit of provider accounts.
#[derive(Debug, Default)]
pub(super) struct AccountLimits(BTreeMap<(Name, Option<Name>), ScopeEntry>);

impl AccountLimits {
    pub(super) fn of(resources: &[Resource]) -> Self {
        let mut limits = Self::default();
        for resource in resources {
            let Spec::Limit(limit) = &resource.spec else { continue };
            let Some(account) = &limit.account else { continue };
            let entry = match &limit.model {
                None => ScopeEntry::new(Scope::Account(account.as_str()), &limit.rates),
                Some(model) => {
                    let scope = Scope::AccountModel { account: account.as_str(), model: model.as_str() };
                    ScopeEntry::new(scope, &limit.rates)
                }
            };
            let id = (account.clone(), limit.model.clone());
            let merged = ScopeEntry::tightest(limits.0.remove(&id), entry);
            limits.0.insert(id, merged);
        }
        limits
    }

    /// The accounts whose limits apply to a model with these backends.
    pub(super) fn for_model(&self, model: &Name, backends: &[ModelBackend]) -> Accounts {
        let mut accounts = Accounts::default();
        if self.0.is_empty() {
            return accounts;
        }
        for backend in backends {
            let at = backend.entry.spec.account.as_ref().and_then(|name| {
                if let Some(known) = accounts.entries.iter().position(|entry| entry.name == *name) {
                    return Some(known);
                }
                let ids = [(name.clone(), None), (name.clone(), Some(model.clone()))];
                let scopes: Vec<ScopeEntry> = ids.iter().filter_map(|id| self.0.get(id)).cloned().collect();
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
}
