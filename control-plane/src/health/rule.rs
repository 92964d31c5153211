//! The states and the rules that lead to them, by the names that events, metrics and explanations use.

use weir_proto::v1::HealthState;

/// The observed state of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Unknown,
    Healthy,
    Degraded,
    Unhealthy,
    Recovering,
}

impl State {
    pub(crate) const fn wire(self) -> HealthState {
        match self {
            Self::Unknown => HealthState::Unknown,
            Self::Healthy => HealthState::Healthy,
            Self::Degraded => HealthState::Degraded,
            Self::Unhealthy => HealthState::Unhealthy,
            Self::Recovering => HealthState::Recovering,
        }
    }

    pub(crate) const fn of_wire(state: HealthState) -> Self {
        match state {
            HealthState::Unspecified | HealthState::Unknown => Self::Unknown,
            HealthState::Healthy => Self::Healthy,
            HealthState::Degraded => Self::Degraded,
            HealthState::Unhealthy => Self::Unhealthy,
            HealthState::Recovering => Self::Recovering,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
            Self::Recovering => "recovering",
        }
    }

    pub(crate) fn of_name(name: &str) -> Option<Self> {
        [Self::Unknown, Self::Healthy, Self::Degraded, Self::Unhealthy, Self::Recovering]
            .into_iter()
            .find(|state| state.name() == name)
    }
}

macro_rules! rules {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal,)*) => {
        /// Why a backend is in its state.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub(crate) enum Rule { $($(#[doc = $doc])+ $name,)* }

        impl Rule {
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            pub(crate) fn of_name(name: &str) -> Option<Self> {
                [$(Self::$name,)*].into_iter().find(|rule| rule.name() == name)
            }
        }
    };
}

rules! {
    /// No observer has probed it yet.
    NotProbed = "not_probed",
    /// The backend says that it is loading its model.
    Loading = "loading",
    /// The first probe passed.
    FirstPass = "first_pass",
    /// A quorum of observers cannot reach the backend.
    LivenessQuorum = "liveness_quorum",
    /// The only observer cannot reach the backend.
    LivenessAlone = "liveness_alone",
    /// A quorum of observers gets no completion.
    ReadinessQuorum = "readiness_quorum",
    /// The only observer gets no completion.
    ReadinessAlone = "readiness_alone",
    /// Observers read that the account at the provider has no quota left.
    QuotaUsedUp = "quota_used_up",
    /// The backend has been loading for longer than `loading_timeout`.
    LoadingTooLong = "loading_too_long",
    /// Every request of the gateways fails, whatever probes say.
    RequestsFail = "requests_fail",
    /// The backend failed during its slow start.
    Relapse = "relapse",
    /// Observers reach the backend and it answers again.
    Recovery = "recovery",
    /// The slow start is over.
    SlowStartDone = "slow_start_done",
    /// The backend answered 429, or 503 with Retry-After.
    Busy = "busy",
    /// Too many requests fail.
    ErrorRate = "error_rate",
    /// Answers take much longer than usual.
    SlowAnswers = "slow_answers",
    /// Tokens per second are much fewer than usual.
    SlowTokens = "slow_tokens",
    /// The KV cache is full.
    CacheFull = "cache_full",
    /// A model that the backend should serve is missing from its list.
    ModelMissing = "model_missing",
    /// The condition that degraded the backend is over.
    DegradationOver = "degradation_over",
}
