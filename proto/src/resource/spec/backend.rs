//! Backends.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{DAY, MAX_LIST, or, secs};
use crate::resource::Name;
use crate::resource::check::Check;
use crate::v1;

/// What the operator wants of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AdminState {
    /// In use.
    #[default]
    Active,
    /// No new requests.
    Draining,
    /// Not used, not probed.
    Disabled,
}

/// Where a secret is found; the secret itself is never in a resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CredentialRef {
    /// An environment variable of the gateway.
    Env(String),
    /// A file on the gateway's machine.
    File(String),
}

impl CredentialRef {
    /// Longest name of a variable, bytes.
    const NAME_BYTES_MAX: usize = 256;
    /// Longest path, bytes; Linux takes 4096.
    const PATH_BYTES_MAX: usize = 1024;

    /// Whether a variable of this name is a setting of Weir itself, such as the gateways' token: never a credential.
    pub fn is_setting_of_weir(variable: &str) -> bool {
        variable.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("WEIR_"))
    }

    /// Why nobody may declare this reference, whatever gateways allow; `None` when one may. Asked of what is new: a store
    /// may hold older ones, which gateways refuse.
    pub fn objection(&self) -> Option<&'static str> {
        match self {
            Self::Env(name) if Self::is_setting_of_weir(name) => Some(
                "variables that begin with WEIR_ are settings of Weir and never credentials; use another name",
            ),
            Self::Env(name) if name.len() > Self::NAME_BYTES_MAX => {
                Some("the name of the variable is longer than 256 bytes")
            }
            Self::Env(_) => None,
            Self::File(path) if path.len() > Self::PATH_BYTES_MAX => {
                Some("the path is longer than 1024 bytes")
            }
            Self::File(path) if path.split('/').any(|part| part == "..") => {
                Some("the path must not have .. in it")
            }
            Self::File(path) if path.chars().any(char::is_control) => {
                Some("the path must not have control characters in it")
            }
            Self::File(_) => None,
        }
    }
}

/// One upstream server or account.
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    /// The pool it belongs to.
    pub pool: Name,
    /// Scheme, authority and path prefix without a trailing slash.
    pub url: http::Uri,
    /// Where it is; empty when not said.
    pub region: String,
    /// Its share: 100.
    pub weight: u32,
    /// The most requests the cluster may have in flight there: 50.
    pub max_concurrency: u32,
    /// The models it serves -> the name it knows each by (empty: the client's name).
    pub models: BTreeMap<Name, String>,
    /// Where its credential is found.
    pub credential: Option<CredentialRef>,
    /// What the operator wants of it.
    pub admin_state: AdminState,
    /// Idle connections each gateway keeps: 32.
    pub max_idle: u32,
    /// How long an idle connection is kept: 60 s.
    pub idle_timeout: Duration,
    /// The path that answers when the server lives: "/health".
    pub health_path: String,
    /// For the priority policy; the lowest comes first.
    pub priority: u32,
    /// The provider's account it bills.
    pub account: Option<Name>,
}

impl Backend {
    pub(in crate::resource) fn judge(w: &v1::BackendSpec, check: &mut Check) -> Option<Self> {
        let pool = check.name("pool", &w.pool);
        let account = if w.account.is_empty() { None } else { check.name("account", &w.account) };
        let url = judge_url(&w.url, check);
        check.text("region", &w.region, Name::MAX_BYTES);
        let mut models = BTreeMap::new();
        if w.models.len() > MAX_LIST {
            check.violation("models", "must be at most 1000");
        } else if w.models.is_empty() {
            check.violation("models", "must name at least one model");
        }
        for (model, upstream) in &w.models {
            check.text(&format!("models[{model}]"), upstream, 256);
            if let Some(name) = check.name("models", model) {
                models.insert(name, upstream.clone());
            }
        }
        let admin_state = match v1::AdminState::try_from(w.admin_state) {
            Ok(v1::AdminState::Unspecified | v1::AdminState::Active) => AdminState::Active,
            Ok(v1::AdminState::Draining) => AdminState::Draining,
            Ok(v1::AdminState::Disabled) => AdminState::Disabled,
            Err(_) => {
                check.violation("admin_state", "is not a state this version knows");
                AdminState::default()
            }
        };
        let c = w.connection.clone().unwrap_or_default();
        let health_path = if c.health_path.is_empty() { "/health".to_owned() } else { c.health_path };
        if !health_path.starts_with('/') || http::uri::PathAndQuery::try_from(health_path.as_str()).is_err() {
            check.violation("connection.health_path", "must be a path that starts with '/'");
        }
        let backend = Self {
            pool: pool?,
            url: url?,
            region: w.region.clone(),
            weight: check.range("weight", w.weight.unwrap_or(100), 0, 10_000),
            max_concurrency: check.range("max_concurrency", w.max_concurrency.unwrap_or(50), 1, 100_000),
            models,
            credential: judge_credential(&w.credential, check),
            admin_state,
            max_idle: check.range("connection.max_idle", or(c.max_idle, 32), 1, 10_000),
            idle_timeout: check.duration("connection.idle_timeout", c.idle_timeout.as_ref(), secs(60), DAY),
            health_path,
            priority: check.range("priority", w.priority, 0, 100),
            account,
        };
        Some(backend)
    }
}

fn judge_url(text: &str, check: &mut Check) -> Option<http::Uri> {
    let mut bad = |m: &str| {
        check.violation("url", m);
        None
    };
    // Not part of what is sent to a server, so it can only be a mistake.
    if text.contains('#') {
        return bad("must not have a fragment ('#')");
    }
    let Ok(uri) = text.trim_end_matches('/').parse::<http::Uri>() else {
        return bad("is not a URL, such as http://host:8000");
    };
    match (uri.scheme_str(), uri.authority()) {
        (Some("http" | "https"), Some(authority)) if authority.as_str().contains('@') => {
            bad("must not hold credentials; use the field credential")
        }
        (Some("http" | "https"), Some(_)) if uri.query().is_some() => bad("must not have a query"),
        (Some("http" | "https"), Some(_)) => Some(uri),
        _ => bad("must start with http:// or https:// and name a host"),
    }
}

fn judge_credential(text: &str, check: &mut Check) -> Option<CredentialRef> {
    match text.split_once(':') {
        None if text.is_empty() => None,
        Some(("env", name))
            if !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') =>
        {
            Some(CredentialRef::Env(name.to_owned()))
        }
        Some(("file", path)) if path.starts_with('/') => Some(CredentialRef::File(path.to_owned())),
        _ => {
            // The text may be a secret put there by mistake, so it is not repeated.
            check.violation("credential", "must be env:NAME or file:/absolute/path, never the secret itself");
            None
        }
    }
}
