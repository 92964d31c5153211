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
    /// It says that it is loading its model.
    Loading = "loading",
    /// It passed for the first time.
    FirstPass = "first_pass",
    /// Several observers cannot reach it.
    LivenessQuorum = "liveness_quorum",
    /// The only observer there is cannot reach it.
    LivenessAlone = "liveness_alone",
    /// Several observers get no completion.
    ReadinessQuorum = "readiness_quorum",
    /// The only observer there is gets no completion.
    ReadinessAlone = "readiness_alone",
    /// It has been loading for longer than anybody waits.
    LoadingTooLong = "loading_too_long",
    /// It failed during its slow start.
    Relapse = "relapse",
    /// It is reached and answers again.
    Recovery = "recovery",
    /// Its slow start is over.
    RampDone = "ramp_done",
    /// It asks to be left alone.
    Busy = "busy",
    /// Too many of its requests fail.
    ErrorRate = "error_rate",
    /// It answers much later than usual.
    SlowAnswers = "slow_answers",
    /// It writes much slower than usual.
    SlowTokens = "slow_tokens",
    /// Its KV cache is full.
    CacheFull = "cache_full",
    /// A model it should serve is not on its list.
    ModelMissing = "model_missing",
    /// What degraded it is over.
    DegradationOver = "degradation_over",
}
