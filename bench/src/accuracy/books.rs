//! Compares the usage records with what the servers billed.

use serde_json::Value;

use super::driver::{End, Record};
use super::limits::{Limit, Scope};

/// Tokens by user, from both sides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Books {
    /// From the usage records: tenant, model, tokens.
    rows: Vec<(String, String, u64)>,
    /// From the servers, by model.
    billed: Vec<(&'static str, u64)>,
    /// From the complete answers of clients, by tenant.
    answered: Vec<(&'static str, u64)>,
}

impl Books {
    /// Reads a gateway's usage page, the servers' counts, and the clients' records.
    pub(crate) fn read(page: &str, billed: Vec<(&'static str, u64)>, records: &[Record]) -> Self {
        let page: Value = serde_json::from_str(page).unwrap_or_default();
        let text = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
        let count = |row: &Value, name: &str| row[name].as_u64().unwrap_or(0);
        let rows = page["rows"].as_array().into_iter().flatten().map(|row| {
            let tokens = count(row, "input_tokens") + count(row, "output_tokens");
            (text(row, "tenant"), text(row, "model"), tokens)
        });
        let mut answered: Vec<(&'static str, u64)> = Vec::new();
        for record in records.iter().filter(|r| r.end == End::Answered) {
            let tokens = record.prompt_tokens + record.tokens;
            match answered.iter_mut().find(|(tenant, _)| *tenant == record.tenant) {
                Some((_, sum)) => *sum += tokens,
                None => answered.push((record.tenant, tokens)),
            }
        }
        Self { rows: rows.collect(), billed, answered }
    }

    /// The tokens of a scope in the usage records.
    pub(crate) fn noted(&self, limit: &Limit) -> u64 {
        let of = self.rows.iter().filter(|(tenant, model, _)| match limit.scope {
            Scope::Global => true,
            Scope::Tenant(name) => tenant == name,
            Scope::Model(name) | Scope::Backend(name) => model == name,
        });
        of.map(|(_, _, tokens)| tokens).sum()
    }

    /// The excess of the records over what the servers billed; for a tenant, over what its clients got.
    pub(crate) fn off(&self, limit: &Limit) -> i64 {
        let of = |sums: &[(&str, u64)], name: Option<&str>| -> u64 {
            sums.iter().filter(|(of, _)| name.is_none_or(|name| name == *of)).map(|(_, sum)| sum).sum()
        };
        let must = match limit.scope {
            Scope::Global => of(&self.billed, None),
            Scope::Tenant(name) => of(&self.answered, Some(name)),
            Scope::Model(name) | Scope::Backend(name) => of(&self.billed, Some(name)),
        };
        self.noted(limit).cast_signed() - must.cast_signed()
    }

    /// Whether both sides agree on every scope.
    pub(crate) fn agree(&self, limits: &[Limit]) -> bool {
        limits.iter().all(|limit| self.off(limit) == 0)
    }
}
