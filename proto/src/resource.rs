//! Resources as checked values: defaults filled in, bounds kept, names parsed.
//!
//! [`Resource::try_from`] is the only judge of a wire resource. It reports every violation at once, each with the
//! path of its field, so that the control plane, the command line and a gateway say the same of the same mistake.
//! What one resource cannot know (whether a pool it names exists) is for the control plane: see
//! [`Resource::references`].

mod check;
mod demand;
mod descriptor;
mod spec;

use std::fmt;
use std::sync::Arc;

use crate::v1;
pub use check::{Violation, Violations};
pub use demand::{Budget, Period, Priority, Queue};
pub use descriptor::{
    DescriptorLimit, DescriptorRule, EntryPattern, HitKind, NamePattern, RuleMode, ScopePattern, TimeUnit,
    ValuePattern,
};
pub use spec::*;

/// The name of a resource: 1 to 63 bytes of lower-case letters, digits, '-' and '.', starting and ending with a
/// letter or digit. A DNS label with dots allowed, since models are called `gpt-4.1`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// Longest name, bytes.
    pub const MAX_BYTES: usize = 63;

    /// Parses a name; the error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            Err("must not be empty")
        } else if bytes.len() > Self::MAX_BYTES {
            Err("must be at most 63 bytes")
        } else if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(b)) {
            Err("may hold lower-case letters, digits, '-' and '.' only")
        } else if !edge(bytes.first()) || !edge(bytes.last()) {
            Err("must start and end with a letter or digit")
        } else {
            Ok(Self(text.into()))
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A checked resource.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Unique within its kind.
    pub name: Name,
    /// What the operator wants.
    pub spec: Spec,
}

/// The spec of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// A pool.
    Pool(Pool),
    /// A backend.
    Backend(Backend),
    /// A model.
    Model(Model),
    /// A tenant.
    Tenant(Tenant),
    /// An API key.
    ApiKey(ApiKey),
    /// A limit.
    Limit(Limit),
    /// A rule for the descriptors of a proxy.
    DescriptorRule(DescriptorRule),
}

/// The kind of a wire resource; unspecified when it has no spec.
pub fn kind_of(resource: &v1::Resource) -> v1::ResourceKind {
    use v1::resource::Spec;
    match resource.spec {
        None => v1::ResourceKind::Unspecified,
        Some(Spec::Pool(_)) => v1::ResourceKind::Pool,
        Some(Spec::Backend(_)) => v1::ResourceKind::Backend,
        Some(Spec::Model(_)) => v1::ResourceKind::Model,
        Some(Spec::Tenant(_)) => v1::ResourceKind::Tenant,
        Some(Spec::ApiKey(_)) => v1::ResourceKind::ApiKey,
        Some(Spec::Limit(_)) => v1::ResourceKind::Limit,
        Some(Spec::DescriptorRule(_)) => v1::ResourceKind::DescriptorRule,
    }
}

/// The name of a kind in files, on the command line and in field paths.
pub const fn kind_name(kind: v1::ResourceKind) -> &'static str {
    match kind {
        v1::ResourceKind::Unspecified => "unspecified",
        v1::ResourceKind::Pool => "pool",
        v1::ResourceKind::Backend => "backend",
        v1::ResourceKind::Model => "model",
        v1::ResourceKind::Tenant => "tenant",
        v1::ResourceKind::ApiKey => "api_key",
        v1::ResourceKind::Limit => "limit",
        v1::ResourceKind::DescriptorRule => "descriptor_rule",
    }
}

/// Every kind, what is referred to first.
pub const KINDS: [v1::ResourceKind; 7] = [
    v1::ResourceKind::Pool,
    v1::ResourceKind::Backend,
    v1::ResourceKind::Model,
    v1::ResourceKind::Tenant,
    v1::ResourceKind::ApiKey,
    v1::ResourceKind::Limit,
    v1::ResourceKind::DescriptorRule,
];

impl Resource {
    /// Its kind.
    pub const fn kind(&self) -> v1::ResourceKind {
        match self.spec {
            Spec::Pool(_) => v1::ResourceKind::Pool,
            Spec::Backend(_) => v1::ResourceKind::Backend,
            Spec::Model(_) => v1::ResourceKind::Model,
            Spec::Tenant(_) => v1::ResourceKind::Tenant,
            Spec::ApiKey(_) => v1::ResourceKind::ApiKey,
            Spec::Limit(_) => v1::ResourceKind::Limit,
            Spec::DescriptorRule(_) => v1::ResourceKind::DescriptorRule,
        }
    }

    /// Every resource this one refers to and needs, with the path of the field that does. A limit or rule may
    /// be made before what it selects and refers to nothing.
    pub fn references(&self) -> Vec<Reference<'_>> {
        use v1::ResourceKind as Kind;
        let mut out = Vec::new();
        let mut add = |path: String, kind, name| out.push(Reference { path, kind, name });
        match &self.spec {
            Spec::Pool(_) => {}
            Spec::DescriptorRule(rule) => {
                for (i, pattern) in rule.consumes.iter().enumerate() {
                    for (field, kind, name) in pattern.named() {
                        add(format!("descriptor_rule.consumes[{i}].{field}"), kind, name);
                    }
                }
            }
            Spec::Limit(l) => {
                let selected = [
                    ("limit.selector.tenant", Kind::Tenant, &l.tenant),
                    ("limit.selector.model", Kind::Model, &l.model),
                    ("limit.selector.api_key", Kind::ApiKey, &l.api_key),
                ];
                for (path, kind, name) in selected {
                    if let Some(name) = name {
                        add(path.into(), kind, name);
                    }
                }
            }
            Spec::Backend(b) => {
                add("backend.pool".into(), Kind::Pool, &b.pool);
                for model in b.models.keys() {
                    add(format!("backend.models[{model}]"), Kind::Model, model);
                }
            }
            Spec::Model(m) => {
                add("model.pool".into(), Kind::Pool, &m.pool);
                for (i, name) in m.fallbacks.iter().enumerate() {
                    add(format!("model.fallbacks[{i}]"), Kind::Model, name);
                }
            }
            Spec::Tenant(t) => {
                for (i, name) in t.allowed_models.iter().enumerate() {
                    add(format!("tenant.allowed_models[{i}]"), Kind::Model, name);
                }
            }
            Spec::ApiKey(k) => {
                add("api_key.tenant".into(), Kind::Tenant, &k.tenant);
                for (i, name) in k.allowed_models.iter().enumerate() {
                    add(format!("api_key.allowed_models[{i}]"), Kind::Model, name);
                }
            }
        }
        out
    }
}

/// A field of a resource that names another resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference<'a> {
    /// The path of the field.
    pub path: String,
    /// The kind referred to.
    pub kind: v1::ResourceKind,
    /// The name referred to.
    pub name: &'a Name,
}

impl TryFrom<&v1::Resource> for Resource {
    type Error = Violations;

    fn try_from(wire: &v1::Resource) -> Result<Self, Violations> {
        let mut check = check::Check::new(kind_name(kind_of(wire)));
        let name = check.name_at("name".into(), &wire.name);
        let spec = match &wire.spec {
            None => {
                check.violation(
                    "spec",
                    "one of pool, backend, model, tenant, api_key, limit, descriptor_rule must be set",
                );
                None
            }
            Some(v1::resource::Spec::Pool(s)) => Some(Spec::Pool(Pool::judge(s, &mut check))),
            Some(v1::resource::Spec::Backend(s)) => Backend::judge(s, &mut check).map(Spec::Backend),
            Some(v1::resource::Spec::Model(s)) => Model::judge(s, &wire.name, &mut check).map(Spec::Model),
            Some(v1::resource::Spec::Tenant(s)) => Some(Spec::Tenant(Tenant::judge(s, &mut check))),
            Some(v1::resource::Spec::ApiKey(s)) => ApiKey::judge(s, &mut check).map(Spec::ApiKey),
            Some(v1::resource::Spec::Limit(s)) => Some(Spec::Limit(Limit::judge(s, &mut check))),
            Some(v1::resource::Spec::DescriptorRule(s)) => {
                Some(Spec::DescriptorRule(DescriptorRule::judge(s, &mut check)))
            }
        };
        match (name, spec, check.finish()) {
            (Some(name), Some(spec), Ok(())) => Ok(Self { name, spec }),
            (_, _, Err(violations)) => Err(violations),
            _ => unreachable!("a missing part is always a violation"),
        }
    }
}

#[cfg(test)]
mod tests;
