//! What happens to backends and observers, for people, and the alarms that are on.

use super::evidence::Timestamp;

macro_rules! kinds {
    ($(#[$outer:meta])* $kind:ident { $($(#[doc = $doc:literal])+ $name:ident = $text:literal,)* }) => {
        $(#[$outer])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum $kind { $($(#[doc = $doc])+ $name,)* }

        impl $kind {
            /// Its name in events, metrics and logs.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

kinds! {
    /// What kind of thing happened.
    EventKind {
        /// A backend changed its state.
        State = "state",
        /// A backend is suspect; other observers are asked to probe it.
        Suspect = "suspect",
        /// The other observers reach the backend: those that failed were outvoted.
        Cleared = "acquitted",
        /// Nobody reports on a backend any more.
        Stale = "stale",
        /// An observer lost its vote.
        Isolated = "isolated",
        /// An alarm is on.
        Alarm = "alarm",
        /// An alarm is over.
        AlarmOver = "alarm_over",
    }
}

kinds! {
    /// What an alarm is about.
    AlarmKind {
        /// Too little of a pool is healthy.
        Panic = "panic",
        /// More backends of a pool are unhealthy than may be ejected.
        EjectionBudget = "ejection_budget",
        /// Many backends were ejected at once.
        CorrelatedFlip = "correlated_flip",
        /// An observer lost its vote.
        Isolated = "isolated",
    }
}

impl AlarmKind {
    /// What is wrong, and what is done about it.
    pub(crate) const fn explanation(self) -> &'static str {
        match self {
            Self::Panic => {
                "too little of the pool is well; every active backend that can be connected to is used"
            }
            Self::EjectionBudget => "more backends are unhealthy than may be left out; the rest stays in use",
            Self::CorrelatedFlip => {
                "many backends fell at once: look at what they share before you look at each"
            }
            Self::Isolated => "it sees most backends fail while others do not",
        }
    }
}

/// Something that happened, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Rises by one with every event.
    pub(crate) number: u64,
    pub(crate) at: Timestamp,
    /// A backend, a pool or a gateway.
    pub(crate) subject: String,
    pub(crate) kind: EventKind,
    pub(crate) message: String,
}

/// An alarm that is on.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alarm {
    pub(crate) kind: AlarmKind,
    /// A pool or an observer; empty: all backends.
    pub(crate) subject: String,
}
