//! A limit that refused, and how the client is told.

use std::time::Duration;

use weir_ratelimit::What;

use super::echo;
use crate::api::duration::duration;
use crate::routing::scope::{ScopeKind, what_name};

/// A limit that refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the limit is over.
    pub scope_kind: ScopeKind,
    /// The configured name of the scope.
    pub scope: String,
    /// What is limited.
    pub what: What,
    /// How much the limit allows.
    pub limit: u64,
    /// How much is left.
    pub remaining: u64,
    /// How much the request needs.
    pub needs: u64,
    /// The time until this request would fit; `None` when it never will.
    pub wait: Option<Duration>,
}

impl Refusal {
    pub(super) fn message(&self) -> String {
        let Self { scope_kind, limit, remaining, needs, .. } = self;
        let what = what_name(self.what);
        let scope = echo(&self.scope);
        let advice = match self.wait {
            Some(wait) => format!("Please try again in {}.", duration(wait)),
            None if needs > limit && *limit > 0 => {
                format!("This request needs {needs} and can never fit; make it smaller.")
            }
            None => "It lets nothing more pass.".to_owned(),
        };
        if self.scope_kind.is_of_account() {
            return format!("Rate limit reached for {what} of {scope_kind} '{scope}'. {advice}");
        }
        format!(
            "Rate limit reached for {what} of {scope_kind} '{scope}': limit {limit}, remaining {remaining}. {advice}"
        )
    }
}
