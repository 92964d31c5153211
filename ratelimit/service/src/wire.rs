//! Between the wire of `weir.v1.LimitService` and the limiter: every mistake of a request is told at once, with the
//! path of its field.

use std::time::Duration;

use smallvec::SmallVec;
use tonic::Status;
use weir_proto::resource::{Name, Rates, Violation, Violations};
use weir_proto::{status, v1};
use weir_ratelimit::{
    Cost, Error, FOREVER, Key, LimitState, MAX_SCOPES, ReservationId, Scope, ScopeLimits, Scopes, Trouble,
    Verdict, What, limit_keys, scope_keys, scope_limits,
};

/// Most reservations in one renewal.
const RENEWALS_MAX: usize = 1000;
const LEASE_DEFAULT: Duration = Duration::from_secs(15);
const LEASE_MIN: Duration = Duration::from_secs(1);
const LEASE_MAX: Duration = Duration::from_secs(3600);
/// Longest wait of an acquire.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Everything that is wrong with a request so far.
#[derive(Default)]
pub(super) struct Check(Vec<Violation>);

impl Check {
    pub(super) fn wrong(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Violation { path: path.into(), message: message.into() });
    }

    pub(super) fn finish<T>(self, value: T) -> Result<T, Status> {
        if self.0.is_empty() { Ok(value) } else { Err(status::invalid_argument(&Violations(self.0))) }
    }

    pub(super) fn id(&mut self, path: &str, text: &str) -> ReservationId {
        ReservationId::try_parse(text).unwrap_or_else(|_| {
            self.wrong(path, "must be a UUID of the caller's making");
            ReservationId::nil()
        })
    }

    pub(super) fn ids(&mut self, path: &str, texts: &[String]) -> Vec<ReservationId> {
        if texts.is_empty() || texts.len() > RENEWALS_MAX {
            self.wrong(path, format!("must be 1 to {RENEWALS_MAX}, are {}", texts.len()));
        }
        let texts = texts.iter().take(RENEWALS_MAX).enumerate();
        texts.map(|(i, text)| self.id(&format!("{path}[{i}]"), text)).collect()
    }

    pub(super) fn lease_ttl(&mut self, wire: Option<prost_types::Duration>) -> Duration {
        let Some(wire) = wire else { return LEASE_DEFAULT };
        match Duration::try_from(wire) {
            Ok(ttl) if (LEASE_MIN..=LEASE_MAX).contains(&ttl) => ttl,
            _ => {
                self.wrong("lease_ttl", format!("must be {LEASE_MIN:?} to {LEASE_MAX:?}"));
                LEASE_DEFAULT
            }
        }
    }

    pub(super) fn max_wait(&mut self, wire: Option<prost_types::Duration>) -> Duration {
        let Some(wire) = wire else { return Duration::ZERO };
        match Duration::try_from(wire) {
            Ok(wait) if wait <= WAIT_MAX => wait,
            _ => {
                self.wrong("max_wait", format!("must be at most {WAIT_MAX:?}"));
                Duration::ZERO
            }
        }
    }

    pub(super) fn cost(&mut self, path: &str, wire: Option<v1::Cost>) -> Cost {
        let Some(v1::Cost { requests, input_tokens, output_tokens }) = wire else {
            self.wrong(path, "must be set");
            return Cost::default();
        };
        Cost::new([requests, input_tokens.saturating_add(output_tokens), input_tokens, output_tokens, 0])
    }

    pub(super) fn scopes(&mut self, wire: &[v1::ScopedRates]) -> Scopes {
        if wire.is_empty() || wire.len() > MAX_SCOPES {
            self.wrong("scopes", format!("must be 1 to {MAX_SCOPES}, are {}", wire.len()));
        }
        let mut scopes = Vec::<ScopeLimits>::new();
        for (i, scoped) in wire.iter().take(MAX_SCOPES).enumerate() {
            let selector = scoped.scope.clone().unwrap_or_default();
            let scope = self.scope(&format!("scopes[{i}].scope"), &selector);
            let path = format!("scopes[{i}].rates");
            let rates = match &scoped.rates {
                None => {
                    self.wrong(path, "must be set");
                    continue;
                }
                Some(rates) => Rates::checked(&path, rates),
            };
            match (scope, rates) {
                (Some(scope), Ok(rates)) => {
                    let limit = Some(selector.limit.as_str()).filter(|limit| !limit.is_empty());
                    let limits = scope_limits(scope, limit, &rates);
                    if let Some(first) = scopes.iter().position(|other| other.record == limits.record) {
                        self.wrong(format!("scopes[{i}].scope"), format!("is that of scopes[{first}] again"));
                    }
                    scopes.push(limits);
                }
                (_, Err(Violations(violations))) => self.0.extend(violations),
                (None, Ok(_)) => {}
            }
        }
        scopes.into()
    }

    /// The lease sets of these scopes.
    pub(super) fn lease_sets(&mut self, wire: &[v1::LimitSelector]) -> SmallVec<[Key; 4]> {
        if wire.is_empty() || wire.len() > MAX_SCOPES {
            self.wrong("scopes", format!("must be 1 to {MAX_SCOPES}, are {}", wire.len()));
        }
        let wire = wire.iter().take(MAX_SCOPES).enumerate();
        wire.filter_map(|(i, selector)| {
            Some((self.scope(&format!("scopes[{i}]"), selector)?, &selector.limit))
        })
        .map(|(scope, limit)| if limit.is_empty() { scope_keys(scope).1 } else { limit_keys(scope, limit).1 })
        .collect()
    }

    fn scope<'a>(&mut self, path: &str, selector: &'a v1::LimitSelector) -> Option<Scope<'a>> {
        let v1::LimitSelector { tenant, model, api_key, account, limit } = selector;
        for (field, text) in [
            ("tenant", tenant),
            ("model", model),
            ("api_key", api_key),
            ("account", account),
            ("limit", limit),
        ] {
            if let Err(message) = Name::parse(text)
                && !text.is_empty()
            {
                self.wrong(format!("{path}.{field}"), message);
            }
        }
        if !account.is_empty() {
            return match (tenant.as_str(), model.as_str(), api_key.as_str()) {
                ("", "", "") => Some(Scope::Account(account)),
                ("", model, "") => Some(Scope::AccountModel { account, model }),
                _ => {
                    self.wrong(
                        path,
                        "an account goes alone or with a model: it is the provider's, not a tenant's",
                    );
                    None
                }
            };
        }
        match (tenant.as_str(), model.as_str(), api_key.as_str()) {
            ("", "", "") => Some(Scope::Global),
            ("", model, "") => Some(Scope::Model(model)),
            (tenant, "", "") => Some(Scope::Tenant(tenant)),
            (tenant, model, "") => Some(Scope::TenantModel { tenant, model }),
            ("", _, _) => {
                self.wrong(format!("{path}.tenant"), "must be set with api_key: the tenant whose key it is");
                None
            }
            (tenant, "", key) => Some(Scope::ApiKey { tenant, key }),
            (_, _, _) => {
                self.wrong(path, "no scope is of a model and an api_key together");
                None
            }
        }
    }
}

/// How a limit refuses, or would.
const fn refuses(limit: &LimitState) -> bool {
    !matches!(limit.verdict, Verdict::Fits)
}

/// Limits as the caller counts them: by the position of their scopes in its request.
pub(super) fn limit_states(limits: &[LimitState], scopes: &[ScopeLimits]) -> Vec<v1::LimitState> {
    let position = |limit: &LimitState| limit.position_in(scopes).and_then(|at| u32::try_from(at).ok());
    let state = |limit: &LimitState| v1::LimitState {
        scope: position(limit).unwrap_or(u32::MAX),
        kind: match limit.what {
            What::Bucket(kind) => kind.name().to_owned(),
            What::Concurrency => "concurrency".to_owned(),
        },
        exceeded: refuses(limit),
        limit: limit.limit,
        remaining: limit.remaining,
        reset: duration(limit.reset),
        wait: match limit.verdict {
            Verdict::Wait(wait) => duration(wait),
            Verdict::Fits | Verdict::Never => None,
        },
    };
    limits.iter().map(state).collect()
}

/// What never comes is absent.
pub(super) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    if duration >= FOREVER { None } else { prost_types::Duration::try_from(duration).ok() }
}

/// An error of the limiter as the caller sees it; the store's own words stay in the log.
pub(super) fn refusal(error: &Error) -> Status {
    tracing::debug!(%error, "the limit store failed");
    match (error, error.trouble()) {
        (Error::Invalid(reason), _) => Status::invalid_argument(*reason),
        (_, Trouble::Unknown) => Status::unavailable(
            "the limit store did not answer in time; ask again with the same reservation_id, or settle with nothing",
        ),
        (_, Trouble::Away | Trouble::Keys | Trouble::Caller) => {
            Status::unavailable("the limit store is away; nothing was changed")
        }
    }
}
