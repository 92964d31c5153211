//! The tiers of probes.

/// What a probe checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Tier {
    /// The server answers.
    Liveness,
    /// The model answers.
    Readiness,
    /// The model answers at its usual speed.
    Deep,
}

impl Tier {
    pub(crate) const ALL: [Self; 3] = [Self::Liveness, Self::Readiness, Self::Deep];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Liveness => "liveness",
            Self::Readiness => "readiness",
            Self::Deep => "deep",
        }
    }
}
