//! A limit that refused, and how the client is told.

use std::time::Duration;

use weir_proto::money::dollars;
use weir_ratelimit::{Kind, What};

use super::echo;
use crate::api::duration::duration;
use crate::routing::declared::DeclaredLimit;
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
    /// What was declared.
    pub limit: DeclaredLimit,
    /// How much can be used now.
    pub remaining: u64,
    /// How much the request needs.
    pub needs: u64,
    /// The time until this request would fit; `None` when it never will.
    pub wait: Option<Duration>,
}

impl Refusal {
    /// Whether the limit lets nothing pass at all.
    pub const fn is_closed(&self) -> bool {
        self.limit.burst == 0
    }

    /// Whether the request is larger than the limit allows at once.
    pub const fn can_never_fit(&self) -> bool {
        self.needs > self.limit.burst && !self.is_closed()
    }

    pub(super) fn message(&self) -> String {
        let what = what_name(self.what);
        let (scope, scope_kind) = (echo(&self.scope), self.scope_kind);
        let advice = match self.wait {
            Some(wait) => format!("Please try again in {}.", duration(wait)),
            None if self.can_never_fit() => {
                let needs = self.amount(self.needs);
                format!("This request needs {needs} and can never fit; make it smaller.")
            }
            None => "It lets nothing more pass.".to_owned(),
        };
        let of = format!("Rate limit reached for {what} of {scope_kind} '{scope}'");
        if scope_kind.is_of_account() {
            return format!("{of}. {advice}");
        }
        format!("{of}: limit {}, remaining {}. {advice}", self.allowed(), self.amount(self.remaining))
    }

    /// What the limit allows: how much in which time, and at once where that is another amount.
    fn allowed(&self) -> String {
        let DeclaredLimit { amount, period, burst } = self.limit;
        let mut text = self.amount(amount);
        match period {
            Some(period) => text.push_str(&format!(" per {period}")),
            None if self.what == What::Concurrency => text.push_str(" at once"),
            None => {}
        }
        if burst != amount {
            text.push_str(&format!(", {} at once", self.amount(burst)));
        }
        text
    }

    fn amount(&self, units: u64) -> String {
        if self.what == What::Bucket(Kind::Spend) { dollars(units) } else { units.to_string() }
    }
}
