//! Tenants and their keys.

use std::time::SystemTime;

use super::Rates;
use crate::resource::Name;
use crate::resource::check::Check;
use crate::resource::demand::Priority;
use crate::v1;

/// Who is asking.
#[derive(Debug, Clone, PartialEq)]
pub struct Tenant {
    /// A name for people.
    pub display_name: String,
    /// The models it may use; empty is all.
    pub allowed_models: Vec<Name>,
    /// Limits over all its keys and models.
    pub limits: Option<Rates>,
    /// Who goes first when several wait.
    pub priority: Priority,
}

impl Tenant {
    pub(in crate::resource) fn judge(w: &v1::TenantSpec, check: &mut Check) -> Self {
        check.text("display_name", &w.display_name, 256);
        Self {
            display_name: w.display_name.clone(),
            allowed_models: check.names("allowed_models", &w.allowed_models),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
            priority: Priority::judge(w.priority, check),
        }
    }
}

/// A digest of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyDigest {
    /// SHA-256 of the key.
    pub sha256: [u8; 32],
    /// The first characters, for people.
    pub prefix: String,
    /// Refused from then on.
    pub expires: Option<SystemTime>,
}

/// A tenant's credential.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiKey {
    /// Whose it is.
    pub tenant: Name,
    /// The keys it accepts.
    pub digests: Vec<KeyDigest>,
    /// Refused from now on.
    pub revoked: bool,
    /// The models it may use; empty is all the tenant may.
    pub allowed_models: Vec<Name>,
    /// Limits of this key.
    pub limits: Option<Rates>,
}

impl ApiKey {
    /// Most digests at once: the present key and the one it replaces.
    pub const MAX_DIGESTS: usize = 2;

    pub(in crate::resource) fn judge(w: &v1::ApiKeySpec, check: &mut Check) -> Option<Self> {
        let tenant = check.name("tenant", &w.tenant);
        if w.digests.len() > Self::MAX_DIGESTS {
            check.violation("digests", "must be at most 2: the present key and the one it replaces");
        }
        let mut digests = Vec::new();
        for (i, d) in w.digests.iter().enumerate() {
            check.text(&format!("digests[{i}].prefix"), &d.prefix, 16);
            let expires = d.expire_time.as_ref().and_then(|t| match SystemTime::try_from(*t) {
                Ok(t) => Some(t),
                Err(_) => {
                    check.violation(&format!("digests[{i}].expire_time"), "is out of range");
                    None
                }
            });
            match <[u8; 32]>::try_from(d.sha256.as_slice()) {
                Ok(sha256) => digests.push(KeyDigest { sha256, prefix: d.prefix.clone(), expires }),
                Err(_) => {
                    check.violation(&format!("digests[{i}].sha256"), "must be the 32 bytes of a SHA-256")
                }
            }
        }
        let key = Self {
            tenant: tenant?,
            digests,
            revoked: w.revoked,
            allowed_models: check.names("allowed_models", &w.allowed_models),
            limits: Rates::judge("limits", w.limits.as_ref(), check),
        };
        Some(key)
    }
}
