//! From what operators declare to what the limiter takes. The gateway and the limit service both come through here,
//! which is what makes them share buckets.

use std::collections::HashMap;
use std::time::Duration;

use weir_proto::resource::{self, Name, Rates, Resource, Spec};

use crate::model::key::{Scope, limit_keys, scope_keys};
use crate::model::kind::{Bucket, Kind};
use crate::model::limits::{Mode, ScopeLimits, WithoutStore};

/// A limit that an operator declared over a scope.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Declared<'a> {
    /// The limit resource; `None` for limits that are part of the model, tenant or key that they are over.
    pub limit: Option<&'a Name>,
    /// How much.
    pub rates: &'a Rates,
}

/// Every limit that resources declare, by scope. All that are over a scope hold, each for itself.
#[derive(Debug, Default)]
pub struct DeclaredLimits<'a> {
    by_scope: HashMap<Scope<'a>, Vec<Declared<'a>>>,
    /// Limit resources beyond what one scope may have, which are not in force.
    surplus: Vec<&'a Name>,
}

impl<'a> DeclaredLimits<'a> {
    /// Takes in all resources. A limit over a key that does not exist is over nothing.
    pub fn of(resources: &'a [Resource]) -> Self {
        let mut all = Self::default();
        let mut tenants: HashMap<&Name, &Name> = HashMap::new();
        for Resource { name, spec } in resources {
            let own = match spec {
                Spec::Model(model) => model.limits.as_ref().map(|rates| (Scope::Model(name.as_str()), rates)),
                Spec::Tenant(tenant) => {
                    tenant.limits.as_ref().map(|rates| (Scope::Tenant(name.as_str()), rates))
                }
                Spec::ApiKey(key) => {
                    tenants.insert(name, &key.tenant);
                    let scope = Scope::ApiKey { tenant: key.tenant.as_str(), key: name.as_str() };
                    key.limits.as_ref().map(|rates| (scope, rates))
                }
                Spec::Pool(_) | Spec::Backend(_) | Spec::Limit(_) | Spec::DescriptorRule(_) => None,
            };
            if let Some((scope, rates)) = own {
                all.by_scope.entry(scope).or_default().push(Declared { limit: None, rates });
            }
        }
        let mut limits: Vec<(&Name, &resource::Limit)> = resources
            .iter()
            .filter_map(|resource| match &resource.spec {
                Spec::Limit(limit) => Some((&resource.name, limit)),
                _ => None,
            })
            .collect();
        limits.sort_unstable_by_key(|(name, _)| *name);
        for (name, limit) in limits {
            let Some(scope) = scope_of(limit, &tenants) else { continue };
            let over = all.by_scope.entry(scope).or_default();
            if over.iter().filter(|declared| declared.limit.is_some()).count()
                >= resource::Limit::PER_SELECTOR_MAX
            {
                all.surplus.push(name);
                continue;
            }
            over.push(Declared { limit: Some(name), rates: &limit.rates });
        }
        all
    }

    /// The limits over a scope: its own first, then the limit resources by name.
    pub fn over<'s>(&'s self, scope: Scope<'s>) -> &'s [Declared<'s>] {
        self.by_scope.get(&scope).map_or(&[], Vec::as_slice)
    }

    /// Every scope with a limit.
    pub fn scopes(&self) -> impl Iterator<Item = (Scope<'a>, &[Declared<'a>])> {
        self.by_scope.iter().map(|(scope, over)| (*scope, over.as_slice()))
    }

    /// The limit resources that are not in force because others over the same scope come before them.
    pub fn surplus(&self) -> &[&'a Name] {
        &self.surplus
    }
}

fn scope_of<'a>(limit: &'a resource::Limit, tenants: &HashMap<&'a Name, &'a Name>) -> Option<Scope<'a>> {
    let resource::Limit { tenant, model, api_key, account, .. } = limit;
    let as_str = |name: &'a Option<Name>| name.as_ref().map(Name::as_str);
    Some(match (as_str(account), as_str(tenant), as_str(model), as_str(api_key)) {
        (Some(account), _, None, _) => Scope::Account(account),
        (Some(account), _, Some(model), _) => Scope::AccountModel { account, model },
        (None, _, _, Some(key)) => Scope::ApiKey { tenant: tenants.get(api_key.as_ref()?)?.as_str(), key },
        (None, Some(tenant), Some(model), None) => Scope::TenantModel { tenant, model },
        (None, Some(tenant), None, None) => Scope::Tenant(tenant),
        (None, None, Some(model), None) => Scope::Model(model),
        (None, None, None, None) => Scope::Global,
    })
}

/// The limits of a scope with these rates: those of a limit resource if one is named, else the scope's own.
pub fn scope_limits(scope: Scope<'_>, limit: Option<&str>, rates: &Rates) -> ScopeLimits {
    let (record, leases) = match limit {
        Some(limit) => limit_keys(scope, limit),
        None => scope_keys(scope),
    };
    let (mut buckets, mut prefetch) = ([None; Kind::COUNT], [0; Kind::COUNT]);
    let mode = if rates.shadow { Mode::Shadow } else { Mode::Enforce };
    for (kind, rate) in [
        (Kind::Requests, rates.requests_per_minute),
        (Kind::Tokens, rates.tokens_per_minute),
        (Kind::InputTokens, rates.input_tokens_per_minute),
        (Kind::OutputTokens, rates.output_tokens_per_minute),
    ] {
        let Some(mut bucket) = rate.map(|r| Bucket::per_minute(r, rates.burst_multiplier)) else { continue };
        let aside = bucket.capacity / 100 * u64::from(rates.prefetch_percent)
            + bucket.capacity % 100 * u64::from(rates.prefetch_percent) / 100;
        if mode == Mode::Enforce && aside > 1 {
            prefetch[kind as usize] = aside;
            bucket.capacity -= aside;
        }
        buckets[kind as usize] = Some(bucket);
    }
    let without_store = match rates.without_store {
        resource::WithoutStore::LocalShare => WithoutStore::LocalShare,
        resource::WithoutStore::Open => WithoutStore::Open,
        resource::WithoutStore::Closed => WithoutStore::Closed,
    };
    ScopeLimits { record, leases, buckets, concurrency: rates.concurrency, mode, without_store, prefetch }
}

/// How long a request may wait for a limit. What callers share and cannot plan for is waited for where the limit does
/// not say; what is a caller's own is refused at once, so that it learns of it.
pub fn max_wait(scope: Scope<'_>, rates: &Rates) -> Duration {
    rates.max_wait.unwrap_or(match scope {
        Scope::Global => Duration::from_secs(30),
        Scope::Model(_) | Scope::Account(_) | Scope::AccountModel { .. } => Duration::from_secs(10),
        Scope::Tenant(_) | Scope::ApiKey { .. } | Scope::TenantModel { .. } => Duration::ZERO,
    })
}

#[cfg(test)]
mod tests {
    use weir_proto::manifest::format_duration;
    use weir_proto::reference::{self, Field, Message, Value};

    use super::*;

    fn inside<'a>(message: &'a Message, name: &str) -> &'a Field {
        Field::of(message, name).expect("a field")
    }

    /// The reference of resources is written from the comments of the contract, and this default is known here alone.
    #[test]
    fn the_wait_that_the_contract_tells_is_that_of_a_limit_which_says_none() {
        let kinds = reference::kinds().expect("readable");
        let limit = kinds.iter().find(|kind| kind.name == "limit").expect("a kind");
        let Value::Message(rates) = &inside(&limit.spec, "rates").value else { panic!("fields") };
        let told = inside(rates, "max_wait").facts.default.as_deref();
        let wait = |scope| format_duration(max_wait(scope, &Rates::default()));
        assert_eq!(wait(Scope::Model("m")), wait(Scope::Account("a")));
        assert_eq!(
            (
                wait(Scope::Tenant("t")).as_str(),
                wait(Scope::TenantModel { tenant: "t", model: "m" }).as_str()
            ),
            ("0s", "0s")
        );
        let expected = format!(
            "{} for a global limit, {} for that of a model or an account, which callers share, and zero for that of a tenant \
             or a key",
            wait(Scope::Global),
            wait(Scope::Model("m"))
        );
        assert_eq!(told, Some(expected.as_str()));
    }
}
