//! Backends.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{DAY, MAX_LIST, address, or, secs};
use crate::resource::Name;
use crate::resource::check::Check;
use crate::v1;

/// For how long an idle connection is kept unless said otherwise. uvicorn, and vLLM with it, closes after 5 s: a request
/// that meets the close has to be sent again.
const IDLE_TIMEOUT: Duration = secs(4);

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

/// Which API a backend speaks, as far as that differs from OpenAI's; `weir/v1/resources.proto` says what each means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Dialect {
    /// OpenAI.
    #[default]
    OpenAi,
    /// Azure OpenAI.
    Azure,
    /// Anthropic.
    Anthropic,
    /// Gemini.
    Gemini,
    /// Vertex AI.
    Vertex,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// The server of llama.cpp.
    LlamaCpp,
    /// Text Generation Inference.
    Tgi,
    /// Ollama.
    Ollama,
    /// xAI.
    Xai,
    /// DeepSeek.
    DeepSeek,
    /// Mistral.
    Mistral,
    /// Groq.
    Groq,
    /// OpenRouter.
    OpenRouter,
    /// new-api and what is built on it.
    NewApi,
}

impl Dialect {
    /// Every dialect.
    pub const ALL: [Self; 16] = [
        Self::OpenAi,
        Self::Azure,
        Self::Anthropic,
        Self::Gemini,
        Self::Vertex,
        Self::Vllm,
        Self::Sglang,
        Self::LlamaCpp,
        Self::Tgi,
        Self::Ollama,
        Self::Xai,
        Self::DeepSeek,
        Self::Mistral,
        Self::Groq,
        Self::OpenRouter,
        Self::NewApi,
    ];

    /// Whether its count of the output may leave out the reasoning, which its total holds.
    pub const fn hides_reasoning(self) -> bool {
        matches!(self, Self::Gemini | Self::Vertex | Self::Xai)
    }

    /// Whether its usage may be Anthropic's under OpenAI's names, where tokens of the cache come on top of the prompt.
    pub const fn relays_anthropic(self) -> bool {
        matches!(self, Self::Anthropic | Self::OpenRouter | Self::NewApi)
    }

    fn judge(wire: i32, check: &mut Check) -> Self {
        match v1::Dialect::try_from(wire) {
            Ok(v1::Dialect::Unspecified | v1::Dialect::Openai) => Self::OpenAi,
            Ok(v1::Dialect::Azure) => Self::Azure,
            Ok(v1::Dialect::Anthropic) => Self::Anthropic,
            Ok(v1::Dialect::Gemini) => Self::Gemini,
            Ok(v1::Dialect::Vertex) => Self::Vertex,
            Ok(v1::Dialect::Vllm) => Self::Vllm,
            Ok(v1::Dialect::Sglang) => Self::Sglang,
            Ok(v1::Dialect::LlamaCpp) => Self::LlamaCpp,
            Ok(v1::Dialect::Tgi) => Self::Tgi,
            Ok(v1::Dialect::Ollama) => Self::Ollama,
            Ok(v1::Dialect::Xai) => Self::Xai,
            Ok(v1::Dialect::Deepseek) => Self::DeepSeek,
            Ok(v1::Dialect::Mistral) => Self::Mistral,
            Ok(v1::Dialect::Groq) => Self::Groq,
            Ok(v1::Dialect::Openrouter) => Self::OpenRouter,
            Ok(v1::Dialect::NewApi) => Self::NewApi,
            Err(_) => {
                check.violation("dialect", "is not a dialect this version knows");
                Self::default()
            }
        }
    }
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
    /// What stands between the URL and an endpoint, without a trailing slash: "/v1". Empty: nothing.
    pub api_base_path: String,
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
    /// How long an idle connection is kept: 4 s.
    pub idle_timeout: Duration,
    /// The path that answers when the server lives: "/health".
    pub health_path: String,
    /// For the priority policy; the lowest comes first.
    pub priority: u32,
    /// The provider's account it bills.
    pub account: Option<Name>,
    /// Which API it speaks.
    pub dialect: Dialect,
}

impl Backend {
    pub(in crate::resource) fn judge(w: &v1::BackendSpec, check: &mut Check) -> Option<Self> {
        let pool = check.name("pool", &w.pool);
        let account = if w.account.is_empty() { None } else { check.name("account", &w.account) };
        let url = address::judge_url(&w.url, check);
        let api_base_path = address::judge_api_base_path(w, check);
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
            api_base_path,
            region: w.region.clone(),
            weight: check.range("weight", w.weight.unwrap_or(100), 0, 10_000),
            max_concurrency: check.range("max_concurrency", w.max_concurrency.unwrap_or(50), 1, 100_000),
            models,
            credential: judge_credential(&w.credential, check),
            admin_state,
            max_idle: check.range("connection.max_idle", or(c.max_idle, 32), 1, 10_000),
            idle_timeout: check.duration(
                "connection.idle_timeout",
                c.idle_timeout.as_ref(),
                IDLE_TIMEOUT,
                DAY,
            ),
            health_path,
            priority: check.range("priority", w.priority, 0, 100),
            account,
            dialect: Dialect::judge(w.dialect, check),
        };
        Some(backend)
    }

    /// The path, below the URL, of an endpoint of the API such as `/chat/completions`.
    pub fn api_path(&self, endpoint: &str) -> String {
        format!("{}{endpoint}", self.api_base_path)
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
