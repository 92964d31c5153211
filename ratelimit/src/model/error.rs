//! Why a limiter could not decide, and what that means for the call and for the store.

use std::time::Duration;

/// None of these is "over the limit".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The store did not answer in time; the outcome is unknown.
    #[error("the limit store did not answer within {0:?}")]
    Timeout(Duration),
    /// The store answered others and not this call; the outcome is unknown.
    #[error("the limit store is late with one answer")]
    Late,
    /// The connection went away while the call was under way; the outcome is unknown.
    #[error("the connection to the limit store was lost during the call")]
    Lost,
    /// The store cannot be reached; the call was never sent.
    #[error("the limit store is unreachable: {0}")]
    Unreachable(String),
    /// The store answered with an error and did nothing.
    #[error("the limit store refused the call: {detail}")]
    Refused {
        /// What state the store is in.
        fault: Fault,
        /// The store's own words, at most 200 characters, no address.
        detail: String,
    },
    /// The call breaks the contract (too many scopes, a capacity out of range).
    #[error("invalid limit call: {0}")]
    Invalid(&'static str),
}

/// Why a store that answers does not do what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// OOM, MISCONF: no room in memory or on disk. Settling and releasing still work when it is memory.
    Full,
    /// READONLY: a replica, such as the primary of before a failover.
    ReadOnly,
    /// LOADING: it starts and reads its data set.
    Loading,
    /// BUSY: a script of somebody runs for too long.
    Busy,
    /// NOREPLICAS: fewer replicas than `min-replicas-to-write`.
    NoReplicas,
    /// NOAUTH, WRONGPASS, NOPERM: the credentials are wrong or lack a permission.
    Denied,
    /// MOVED, ASK, TRYAGAIN, CLUSTERDOWN, MASTERDOWN: the slot is on its way, or nobody serves it.
    Moving,
    /// WRONGTYPE: one of the keys holds something that is not ours, or of another version.
    Record,
    /// Anything else; a defect or a server that is not Redis 7.
    Other,
}

/// What an error says beyond the call that got it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// The store serves nobody now; this call had no effect.
    Away,
    /// The store was too slow or went silent; whether this call had an effect is unknown until it is asked again
    /// under the same id.
    Unknown,
    /// The store serves others, but not these keys now; this call had no effect.
    Keys,
    /// The caller's mistake.
    Caller,
}

impl Error {
    /// What it says about the store and about the call.
    pub const fn trouble(&self) -> Trouble {
        match self {
            Error::Timeout(_) | Error::Late | Error::Lost => Trouble::Unknown,
            Error::Unreachable(_) => Trouble::Away,
            Error::Refused { fault: Fault::Record | Fault::Moving, .. } => Trouble::Keys,
            Error::Refused { .. } => Trouble::Away,
            Error::Invalid(_) => Trouble::Caller,
        }
    }
}

impl Fault {
    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Fault::Full => "full",
            Fault::ReadOnly => "read_only",
            Fault::Loading => "loading",
            Fault::Busy => "busy",
            Fault::NoReplicas => "no_replicas",
            Fault::Denied => "denied",
            Fault::Moving => "moving",
            Fault::Record => "record",
            Fault::Other => "other",
        }
    }

    /// By the first word of the server's answer.
    pub(crate) fn of_code(code: &str) -> Self {
        match code {
            "OOM" | "MISCONF" => Fault::Full,
            "READONLY" => Fault::ReadOnly,
            "LOADING" => Fault::Loading,
            "BUSY" => Fault::Busy,
            "NOREPLICAS" => Fault::NoReplicas,
            "NOAUTH" | "WRONGPASS" | "NOPERM" => Fault::Denied,
            "MOVED" | "ASK" | "TRYAGAIN" | "CLUSTERDOWN" | "MASTERDOWN" => Fault::Moving,
            "WRONGTYPE" => Fault::Record,
            _ => Fault::Other,
        }
    }
}
