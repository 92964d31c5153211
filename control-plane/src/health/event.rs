//! Health events of backends and observers, and active alarms.

use super::evidence::Timestamp;

macro_rules! kinds {
    ($(#[$outer:meta])* $kind:ident { $($(#[doc = $doc:literal])+ $name:ident = $text:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum $kind { $($(#[doc = $doc])+ $name,)* }

        impl $kind {
            /// The name in events, metrics and logs.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

kinds! {
    /// The kind of a health event.
    EventKind {
        /// A backend changed its state.
        State = "state",
        /// A backend is suspect: other observers are told to probe it now.
        Suspect = "suspect",
        /// A backend is not suspect any more: the other observers reach it and outvoted those that failed.
        SuspectCleared = "suspect_cleared",
        /// No observer reports on a backend any more.
        Stale = "stale",
        /// An observer lost its vote.
        Isolated = "isolated",
        /// An alarm became active.
        Alarm = "alarm",
        /// An alarm ended.
        AlarmCleared = "alarm_cleared",
    }
}

kinds! {
    /// The kind of an alarm.
    AlarmKind {
        /// Panic mode: too little of a pool is healthy.
        Panic = "panic",
        /// More backends of a pool are unhealthy than may be ejected.
        EjectionBudget = "ejection_budget",
        /// Many backends were ejected within a short time.
        CorrelatedFlip = "correlated_flip",
        /// An observer lost its vote.
        Isolated = "isolated",
    }
}

impl AlarmKind {
    /// A description for people: the condition and its effect.
    pub(crate) const fn explanation(self) -> &'static str {
        match self {
            Self::Panic => {
                "too little of the pool is healthy; every active backend that accepts connections is used"
            }
            Self::EjectionBudget => "more backends are unhealthy than may be ejected; the others stay in use",
            Self::CorrelatedFlip => "many backends were ejected at once: check what they share first",
            Self::Isolated => "the observer sees most backends fail while others do not",
        }
    }
}

/// A health event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Rises by one with every event.
    pub(crate) number: u64,
    /// The last time.
    pub(crate) at: Timestamp,
    /// The first time.
    pub(crate) first: Timestamp,
    /// How often it happened, see [`super::params::FOLDED_WITHIN`].
    pub(crate) count: u64,
    /// The backend, pool or gateway.
    pub(crate) subject: String,
    pub(crate) kind: EventKind,
    pub(crate) message: String,
}

/// An active alarm.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alarm {
    pub(crate) kind: AlarmKind,
    /// The pool or observer; empty for all backends.
    pub(crate) subject: String,
}
