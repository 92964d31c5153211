//! The only place that names keys.
//!
//! Everything of one tenant carries the hash tag `{t:<tenant>}` and so shares a slot of a Redis Cluster; the
//! cluster-wide scope is `{g}`, a model `{m:<model>}`, a provider's account `{a:<account>}`, a backend `{b:<backend>}`.
//!
//! A reservation's record carries the tag of the first scope of its call, or `{g}` when the call has none:
//! [`Key::reservation_of`] is that rule. A renewal knows lease sets only, so it refreshes the record under every
//! tag it sees; that finds the record whenever the first scope's tag holds a lease.
//! The record outlives by a day any stream that is not found this way.
//!
//! Names that are DNS names are used as they are, so that an operator can read them; anything else becomes
//! `h-` and half of its SHA-256. What looks like such a digest is hashed too, so nobody can choose another's key.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::sync::{Arc, LazyLock};

use sha2::{Digest, Sha256};
use smallvec::SmallVec;

use crate::model::id::ReservationId;

/// Names a scope's record in the store; built only in this module.
#[derive(Clone)]
pub struct Key {
    text: Arc<str>,
    /// Keyed, and computed once: a key is looked up some dozen times for each request.
    hash: u64,
}

/// A map by key.
pub type KeyMap<V> = HashMap<Key, V, BuildHasherDefault<KnownHash>>;

impl Key {
    fn new(text: String) -> Self {
        static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        Self { hash: KEYS.hash_one(&text), text: text.into() }
    }

    /// The key as the store sees it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// A keyed hash of it.
    pub(crate) const fn hash_known(&self) -> u64 {
        self.hash
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash && (Arc::ptr_eq(&self.text, &other.text) || self.text == other.text)
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.text.cmp(&other.text)
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Key").field(&self.text).finish()
    }
}

/// Takes the hash that a key has.
#[derive(Debug, Clone, Copy, Default)]
pub struct KnownHash(u64);

impl Hasher for KnownHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    /// For what is no key: FNV-1a.
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

/// Who a set of limits belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope<'a> {
    /// The whole cluster.
    Global,
    /// A model, over all tenants.
    Model(&'a str),
    /// A tenant.
    Tenant(&'a str),
    /// An API key of a tenant, by the key's public id, not its secret.
    ApiKey {
        /// The owner.
        tenant: &'a str,
        /// The key's id.
        key: &'a str,
    },
    /// A tenant's use of one model.
    TenantModel {
        /// The tenant.
        tenant: &'a str,
        /// The model.
        model: &'a str,
    },
    /// What all requests to the backends of one provider's account use.
    Account(&'a str),
    /// An account's use for one model: providers limit each model of an account apart.
    AccountModel {
        /// The account.
        account: &'a str,
        /// The model.
        model: &'a str,
    },
}

/// The record and the lease set of a scope, in this order: what [`ScopeLimits`](crate::ScopeLimits) wants.
pub fn scope_keys(scope: Scope<'_>) -> (Key, Key) {
    (scope.key('s'), scope.key('c'))
}

/// The record and the lease set of a limit resource over a scope. Each has its own beside those of the scope's own limits,
/// so that several limits over one scope hold each for itself.
pub fn limit_keys(scope: Scope<'_>, limit: &str) -> (Key, Key) {
    let of = |key: Key| build(format_args!("{}:l:{}", key.text, name(limit)));
    (of(scope.key('s')), of(scope.key('c')))
}

impl Scope<'_> {
    fn key(self, part: char) -> Key {
        match self {
            Scope::Global => build(format_args!("weir:{{g}}:{part}")),
            Scope::Model(model) => build(format_args!("weir:{{m:{}}}:{part}", name(model))),
            Scope::Tenant(tenant) => build(format_args!("weir:{{t:{}}}:{part}", name(tenant))),
            Scope::ApiKey { tenant, key } => {
                build(format_args!("weir:{{t:{}}}:{part}:k:{}", name(tenant), name(key)))
            }
            Scope::TenantModel { tenant, model } => {
                build(format_args!("weir:{{t:{}}}:{part}:m:{}", name(tenant), name(model)))
            }
            Scope::Account(account) => build(format_args!("weir:{{a:{}}}:{part}", name(account))),
            Scope::AccountModel { account, model } => {
                build(format_args!("weir:{{a:{}}}:{part}:m:{}", name(account), name(model)))
            }
        }
    }
}

impl Key {
    /// The record of the whole cluster.
    pub fn global() -> Key {
        Scope::Global.key('s')
    }

    /// The record of a model.
    pub fn model(model: &str) -> Key {
        Scope::Model(model).key('s')
    }

    /// The record of a tenant.
    pub fn tenant(tenant: &str) -> Key {
        Scope::Tenant(tenant).key('s')
    }

    /// The record of an API key.
    pub fn api_key(tenant: &str, key: &str) -> Key {
        Scope::ApiKey { tenant, key }.key('s')
    }

    /// The record of a tenant's use of one model.
    pub fn tenant_model(tenant: &str, model: &str) -> Key {
        Scope::TenantModel { tenant, model }.key('s')
    }

    /// The record of a provider's account.
    pub fn account(account: &str) -> Key {
        Scope::Account(account).key('s')
    }

    /// The record of an account's use for one model.
    pub fn account_model(account: &str, model: &str) -> Key {
        Scope::AccountModel { account, model }.key('s')
    }

    /// The record (or lease set) of a scope's budget in the period of that label.
    pub fn budget(of: &Key, period: &str) -> Key {
        build(format_args!("{}:b:{}", of.text, name(period)))
    }

    /// What a tenant used on a day, written `2026-11-23`.
    pub fn usage(tenant: &str, day: &str) -> Key {
        build(format_args!("weir:{{t:{}}}:u:{}", name(tenant), name(day)))
    }

    /// The lease set of a backend.
    pub fn backend_slots(backend: &str) -> Key {
        build(format_args!("weir:{{b:{}}}:c", name(backend)))
    }

    /// The record of a rule's own limit for these values of a descriptor. Each combination has a slot of its own.
    pub fn descriptor<'a>(rule: &str, values: impl IntoIterator<Item = &'a str>) -> Key {
        let mut values = values.into_iter();
        let (first, second) = (values.next(), values.next());
        match (first, second) {
            (None, _) => build(format_args!("weir:{{d:{}}}:s", name(rule))),
            (Some(value), None) => build(format_args!("weir:{{d:{}:{}}}:s", name(rule), name(value))),
            (Some(first), Some(second)) => {
                let mut all = String::new();
                for value in [first, second].into_iter().chain(values) {
                    // With its length, so that no two lists read the same.
                    let _ = write!(all, "{}:{value}", value.len());
                }
                build(format_args!("weir:{{d:{}:{}}}:s", name(rule), digest(&all)))
            }
        }
    }

    /// The record of a limit that a proxy brings for a descriptor without a rule of a limit of its own.
    pub fn descriptor_override<'a>(
        domain: &str,
        entries: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Key {
        let mut all = format!("{}:{domain}", domain.len());
        for (key, value) in entries {
            let _ = write!(all, "{}:{key}{}:{value}", key.len(), value.len());
        }
        build(format_args!("weir:{{o:{}}}:s", digest(&all)))
    }

    /// The lease set of the holders that live.
    pub(crate) fn membership() -> Key {
        build(format_args!("weir:{{g}}:roll"))
    }

    /// What all processes have taken ahead of a scope lately.
    pub(crate) fn prefetch(of: &Key) -> Key {
        build(format_args!("{}:a", of.text))
    }

    /// When the data set was born. One key, kept for ever.
    pub fn birth() -> Key {
        build(format_args!("weir:{{g}}:birth"))
    }

    /// The record of a reservation under a hash tag.
    pub fn reservation(tag: &str, id: ReservationId) -> Key {
        build(format_args!("weir:{{{tag}}}:r:{}", id.simple()))
    }

    /// Where the record of a reservation may be that holds these leases.
    pub(crate) fn reservations_near(leases: &[Key], id: ReservationId) -> SmallVec<[Key; 4]> {
        let mut tags: SmallVec<[&str; 4]> = SmallVec::new();
        for tag in leases.iter().map(Key::tag) {
            if !tag.starts_with("b:") && !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        tags.into_iter().map(|tag| Key::reservation(tag, id)).collect()
    }

    /// What is between the braces: keys with the same tag share a slot.
    pub fn tag(&self) -> &str {
        let inner = self.text.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
        inner.map_or("g", |(tag, _)| tag)
    }
}

fn build(text: std::fmt::Arguments<'_>) -> Key {
    Key::new(text.to_string())
}

/// A name as it appears inside a key.
fn name(raw: &str) -> String {
    if is_dns_name(raw) && !is_digest(raw) {
        return raw.to_owned();
    }
    digest(raw)
}

fn digest(raw: &str) -> String {
    let digest = Sha256::digest(raw.as_bytes());
    let mut hashed = String::with_capacity(34);
    hashed.push_str("h-");
    for byte in digest.iter().take(16) {
        let _ = write!(hashed, "{byte:02x}");
    }
    hashed
}

fn is_dns_name(raw: &str) -> bool {
    let bytes = raw.as_bytes();
    let edge = |byte: Option<&u8>| byte.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-'))
}

fn is_digest(raw: &str) -> bool {
    raw.strip_prefix("h-").is_some_and(|hex| hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_readable_and_tagged() {
        assert_eq!(Key::global().as_str(), "weir:{g}:s");
        assert_eq!(Key::tenant("acme").as_str(), "weir:{t:acme}:s");
        assert_eq!(Key::api_key("acme", "k1").as_str(), "weir:{t:acme}:s:k:k1");
        assert_eq!(Key::tenant_model("acme", "gpt-4.1").as_str(), "weir:{t:acme}:s:m:gpt-4.1");
        assert_eq!(Key::account("acme").as_str(), "weir:{a:acme}:s");
        assert_eq!(Key::account_model("acme", "gpt-4.1").as_str(), "weir:{a:acme}:s:m:gpt-4.1");
        assert_eq!(Key::backend_slots("us-1").as_str(), "weir:{b:us-1}:c");
        assert_eq!(Key::usage("acme", "2026-11-23").as_str(), "weir:{t:acme}:u:2026-11-23");
        let (record, leases) = scope_keys(Scope::Tenant("acme"));
        assert_eq!((record.tag(), leases.as_str()), ("t:acme", "weir:{t:acme}:c"));
    }

    #[test]
    fn odd_names_cannot_reach_other_keys() {
        let odd = Key::tenant("a}:s{b:x");
        assert_eq!(odd.as_str().len(), "weir:{t:}:s".len() + 34);
        assert_ne!(Key::tenant("Acme"), Key::tenant("acme"));
        let digest = name("Acme");
        assert_ne!(name(&digest), digest, "a name that is another's digest is hashed again");
        assert!(name("").starts_with("h-"));
        assert!(name(&"a".repeat(64)).starts_with("h-"));
    }
}
