//! What LiteLLM's provider prefixes stand for: where each provider's API is, and whether it is one that Weir speaks.
//!
//! Nothing is ever sent to another company than the file says: a provider without an address of its own here needs
//! `api_base`, and a name that no provider is known for is never OpenAI's.

use http::Uri;
use weir_proto::v1;

/// How the address of an API follows from LiteLLM's `api_base`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    /// `/chat/completions` is appended to it, as LiteLLM does for everything that speaks OpenAI's API.
    Appended,
    /// The same, after `/v1` if it does not end so.
    Versioned,
    /// The native API is beside an OpenAI-compatible one at `/v1` of the same server.
    BesideV1,
    /// The native API is another one; the provider has an OpenAI-compatible one too, at the address given here.
    Compatible,
    /// Azure: its v1 API is below `/openai/v1`, and a model there is a deployment.
    Azure,
    /// Azure's Foundry: as Azure where the resource is of that kind, else as it is given.
    AzureFoundry,
    /// No API that Weir speaks.
    Foreign,
}

/// A provider of LiteLLM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Provider {
    /// LiteLLM's prefix.
    pub(super) name: &'static str,
    /// How its address is made.
    pub(super) api: Api,
    /// Its address in place of `api_base`; empty: `api_base` has to say.
    pub(super) base: &'static str,
    /// The variable from which LiteLLM takes the key when the file names none; empty: none is sent.
    pub(super) key: &'static str,
}

const fn openai_like(name: &'static str, base: &'static str, key: &'static str) -> Provider {
    Provider { name, api: Api::Appended, base, key }
}

const fn foreign(name: &'static str) -> Provider {
    Provider { name, api: Api::Foreign, base: "", key: "" }
}

/// Addresses: the providers' own documentation of their OpenAI-compatible API, and LiteLLM's
/// `get_llm_provider_logic.py`; variables: <https://docs.litellm.ai/docs/providers>.
const PROVIDERS: &[Provider] = &[
    foreign("ai21"),
    openai_like("ai21_chat", "https://api.ai21.com/studio/v1", "AI21_API_KEY"),
    openai_like("aiml", "", "AIML_API_KEY"),
    openai_like("aiohttp_openai", "", ""),
    foreign("aleph_alpha"),
    Provider {
        name: "anthropic",
        api: Api::Compatible,
        base: "https://api.anthropic.com/v1",
        key: "ANTHROPIC_API_KEY",
    },
    foreign("anthropic_text"),
    openai_like("anyscale", "https://api.endpoints.anyscale.com/v1", "ANYSCALE_API_KEY"),
    Provider { name: "azure", api: Api::Azure, base: "", key: "AZURE_API_KEY" },
    Provider { name: "azure_ai", api: Api::AzureFoundry, base: "", key: "AZURE_AI_API_KEY" },
    foreign("azure_text"),
    openai_like("baseten", "", "BASETEN_API_KEY"),
    foreign("bedrock"),
    foreign("bedrock_converse"),
    openai_like("cerebras", "https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    openai_like("clarifai", "", "CLARIFAI_API_KEY"),
    foreign("cloudflare"),
    openai_like("codestral", "https://codestral.mistral.ai/v1", "CODESTRAL_API_KEY"),
    Provider {
        name: "cohere",
        api: Api::Compatible,
        base: "https://api.cohere.ai/compatibility/v1",
        key: "COHERE_API_KEY",
    },
    Provider {
        name: "cohere_chat",
        api: Api::Compatible,
        base: "https://api.cohere.ai/compatibility/v1",
        key: "COHERE_API_KEY",
    },
    openai_like("cometapi", "", "COMETAPI_KEY"),
    openai_like("compactifai", "", "COMPACTIFAI_API_KEY"),
    openai_like("custom_openai", "", ""),
    openai_like("dashscope", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    openai_like("databricks", "", "DATABRICKS_API_KEY"),
    openai_like("deepinfra", "https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    openai_like("deepseek", "https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    openai_like("docker_model_runner", "", ""),
    openai_like("empower", "https://app.empower.dev/api/v1", "EMPOWER_API_KEY"),
    openai_like("featherless_ai", "", "FEATHERLESS_AI_API_KEY"),
    openai_like("fireworks_ai", "https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY"),
    openai_like("friendliai", "https://api.friendli.ai/serverless/v1", "FRIENDLI_TOKEN"),
    openai_like("galadriel", "https://api.galadriel.com/v1", "GALADRIEL_API_KEY"),
    Provider {
        name: "gemini",
        api: Api::Compatible,
        base: "https://generativelanguage.googleapis.com/v1beta/openai",
        key: "GEMINI_API_KEY",
    },
    openai_like("github", "https://models.inference.ai.azure.com", "GITHUB_API_KEY"),
    foreign("github_copilot"),
    openai_like("groq", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    openai_like("heroku", "", "HEROKU_API_KEY"),
    openai_like("hosted_vllm", "", ""),
    foreign("huggingface"),
    openai_like("hyperbolic", "https://api.hyperbolic.xyz/v1", "HYPERBOLIC_API_KEY"),
    openai_like("infinity", "", ""),
    openai_like("jina_ai", "https://api.jina.ai/v1", "JINA_AI_API_KEY"),
    openai_like("lambda_ai", "", "LAMBDA_API_KEY"),
    openai_like("lemonade", "", ""),
    openai_like("litellm_proxy", "", "LITELLM_PROXY_API_KEY"),
    openai_like("llamafile", "", ""),
    openai_like("lm_studio", "", ""),
    foreign("maritalk"),
    openai_like("meta_llama", "https://api.llama.com/compat/v1", "LLAMA_API_KEY"),
    openai_like("minimax", "", "MINIMAX_API_KEY"),
    Provider {
        name: "mistral",
        api: Api::Versioned,
        base: "https://api.mistral.ai/v1",
        key: "MISTRAL_API_KEY",
    },
    openai_like("moonshot", "https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
    openai_like("morph", "", "MORPH_API_KEY"),
    openai_like("nebius", "https://api.studio.nebius.ai/v1", "NEBIUS_API_KEY"),
    foreign("nlp_cloud"),
    openai_like("novita", "https://api.novita.ai/v3/openai", "NOVITA_API_KEY"),
    openai_like("nscale", "", "NSCALE_API_KEY"),
    openai_like("nvidia_nim", "https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    foreign("oci"),
    Provider { name: "ollama", api: Api::BesideV1, base: "http://localhost:11434", key: "" },
    Provider { name: "ollama_chat", api: Api::BesideV1, base: "http://localhost:11434", key: "" },
    foreign("oobabooga"),
    openai_like("openai", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    openai_like("openai_like", "", ""),
    openai_like("openrouter", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    openai_like("ovhcloud", "", "OVHCLOUD_API_KEY"),
    foreign("palm"),
    openai_like("perplexity", "https://api.perplexity.ai", "PERPLEXITYAI_API_KEY"),
    foreign("petals"),
    foreign("predibase"),
    foreign("replicate"),
    foreign("sagemaker"),
    foreign("sagemaker_chat"),
    openai_like("sambanova", "https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    foreign("snowflake"),
    foreign("text-completion-codestral"),
    openai_like("text-completion-openai", "https://api.openai.com/v1", "OPENAI_API_KEY"),
    openai_like("together_ai", "https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    foreign("triton"),
    openai_like("v0", "", "V0_API_KEY"),
    openai_like("vercel_ai_gateway", "https://ai-gateway.vercel.sh/v1", "VERCEL_AI_GATEWAY_API_KEY"),
    foreign("vertex_ai"),
    foreign("vertex_ai_beta"),
    openai_like("vllm", "", ""),
    openai_like("volcengine", "https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE_API_KEY"),
    openai_like("voyage", "https://api.voyageai.com/v1", "VOYAGE_API_KEY"),
    openai_like("wandb", "", "WANDB_API_KEY"),
    foreign("watsonx"),
    foreign("watsonx_text"),
    openai_like("xai", "https://api.x.ai/v1", "XAI_API_KEY"),
    openai_like("xinference", "", ""),
    openai_like("zai", "https://api.z.ai/api/paas/v4", "ZAI_API_KEY"),
];

/// Providers of models that a file may name without a prefix, by how their names begin. LiteLLM has lists of such names;
/// one that none of them holds is an error there.
const BARE: &[(&str, &str)] = &[
    ("gpt-", "openai"),
    ("chatgpt-", "openai"),
    ("o1", "openai"),
    ("o3", "openai"),
    ("o4", "openai"),
    ("ft:gpt-", "openai"),
    ("codex-", "openai"),
    ("text-embedding-3-", "openai"),
    ("text-embedding-ada-", "openai"),
    ("omni-moderation", "openai"),
    ("davinci-", "openai"),
    ("babbage-", "openai"),
    ("claude-", "anthropic"),
    ("command-", "cohere_chat"),
    ("gemini-", "vertex_ai"),
    ("anthropic.", "bedrock"),
    ("amazon.", "bedrock"),
    ("meta.", "bedrock"),
    ("mistral.", "bedrock"),
    ("cohere.", "bedrock"),
    ("jamba-", "ai21_chat"),
];

/// The provider with this prefix.
pub(super) fn named(name: &str) -> Option<&'static Provider> {
    PROVIDERS.iter().find(|provider| provider.name == name)
}

/// Who serves a model, and its name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Served {
    /// `None`: nobody is known, so `api_base` alone says where it is.
    pub(super) provider: Option<&'static Provider>,
    /// The name there.
    pub(super) model: String,
}

/// Takes LiteLLM's `model` apart. `custom` is its `custom_llm_provider`, which wins over what the name begins with.
pub(super) fn split(model: &str, custom: Option<&str>, api_base: Option<&str>) -> Served {
    if let Some(custom) = custom {
        let model = model.strip_prefix(custom).and_then(|rest| rest.strip_prefix('/')).unwrap_or(model);
        let provider = named(custom);
        return Served { provider, model: name_at(provider, model) };
    }
    if let Some((prefix, name)) = model.split_once('/')
        && let Some(provider) = named(prefix)
    {
        return Served { provider: Some(provider), model: name_at(Some(provider), name) };
    }
    // LiteLLM knows some providers by their address.
    let by_address = api_base.and_then(|base| {
        let known = |provider: &&Provider| provider.api == Api::Appended && host(provider.base).is_some();
        PROVIDERS.iter().filter(known).find(|provider| host(provider.base) == host(base))
    });
    let bare = || {
        let known = BARE.iter().find(|(start, _)| !model.contains('/') && model.starts_with(start));
        known.and_then(|(_, provider)| named(provider))
    };
    Served { provider: by_address.or_else(bare), model: model.to_owned() }
}

/// What LiteLLM makes of a name for some providers.
fn name_at(provider: Option<&'static Provider>, model: &str) -> String {
    match provider.map(|provider| provider.name) {
        Some("azure") => {
            let kinds = ["o_series/", "gpt5_series/", "responses/"];
            kinds.iter().find_map(|kind| model.strip_prefix(kind)).unwrap_or(model).to_owned()
        }
        Some("openai") => model.strip_prefix("responses/").unwrap_or(model).to_owned(),
        Some("fireworks_ai") if !model.starts_with("accounts/") && !model.contains('#') => {
            format!("accounts/fireworks/models/{model}")
        }
        _ => model.to_owned(),
    }
}

/// Where a backend is: its `url` and `api_base_path` (empty: `/v1`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) url: String,
    pub(super) api_base_path: String,
}

/// The backend at which LiteLLM's own address is reached; `None` for a native API at an address of the operator's.
pub(super) fn address(provider: Option<&Provider>, api_base: &str) -> Option<Address> {
    let base = api_base.trim().trim_end_matches('/');
    match provider.map_or(Api::Appended, |provider| provider.api) {
        Api::Appended => Some(appended(base)),
        Api::Versioned if base.ends_with("/v1") => Some(appended(base)),
        Api::Versioned => Some(appended(&format!("{base}/v1"))),
        Api::BesideV1 => {
            let url = base.strip_suffix("/v1").unwrap_or(base).trim_end_matches('/');
            Some(Address { url: url.to_owned(), api_base_path: String::new() })
        }
        Api::Compatible => {
            let own = provider.map(|provider| provider.base).unwrap_or_default();
            (host(base) == host(own)).then(|| appended(own))
        }
        Api::Azure => Some(azure(base)),
        Api::AzureFoundry => {
            let host = host(base).unwrap_or_default();
            let resource = [".services.ai.azure.com", ".openai.azure.com", ".cognitiveservices.azure.com"];
            match resource.iter().any(|kind| host.ends_with(kind)) {
                true => Some(azure(base)),
                false => Some(appended(base)),
            }
        }
        Api::Foreign => None,
    }
}

/// What LiteLLM appends to; some files hold the whole address.
const ENDPOINTS: [&str; 4] = ["/chat/completions", "/completions", "/embeddings", "/responses"];

/// `api_base` and an endpoint behind it.
fn appended(base: &str) -> Address {
    let base = ENDPOINTS.iter().find_map(|endpoint| base.strip_suffix(endpoint)).unwrap_or(base);
    let base = base.trim_end_matches('/');
    if let Some(url) = base.strip_suffix("/v1") {
        return Address { url: url.to_owned(), api_base_path: String::new() };
    }
    // What is no URL, or has a query, stays as it is: the resource is judged later and the operator is told.
    let parsed = base.parse::<Uri>().ok().filter(|uri| uri.query().is_none() && !base.contains('#'));
    match parsed.as_ref().map(|uri| (uri.path(), base.strip_suffix(uri.path()))) {
        Some((path, Some(origin))) if path != "/" => {
            Address { url: origin.to_owned(), api_base_path: path.to_owned() }
        }
        _ => Address { url: base.to_owned(), api_base_path: "/".to_owned() },
    }
}

/// Azure's v1 API: everything from `/openai` on is made anew, deployments and `api-version` included.
fn azure(base: &str) -> Address {
    let end = ["/openai", "/models", "?"].iter().filter_map(|part| base.find(part)).min();
    let url = base[..end.unwrap_or(base.len())].trim_end_matches('/');
    Address { url: url.to_owned(), api_base_path: "/openai/v1".to_owned() }
}

/// The host of an address, in lower case.
pub(super) fn host(url: &str) -> Option<String> {
    url.trim().parse::<Uri>().ok()?.host().map(str::to_ascii_lowercase)
}

/// The `dialect` of a provider's backends; unspecified is OpenAI's.
pub(super) fn dialect_of(provider: &Provider) -> v1::Dialect {
    match provider.name {
        "anthropic" => v1::Dialect::Anthropic,
        "azure" | "azure_ai" => v1::Dialect::Azure,
        "deepseek" => v1::Dialect::Deepseek,
        "gemini" => v1::Dialect::Gemini,
        "groq" => v1::Dialect::Groq,
        "hosted_vllm" | "vllm" => v1::Dialect::Vllm,
        "mistral" | "codestral" => v1::Dialect::Mistral,
        "ollama" | "ollama_chat" => v1::Dialect::Ollama,
        "openrouter" => v1::Dialect::Openrouter,
        "xai" => v1::Dialect::Xai,
        _ => v1::Dialect::Unspecified,
    }
}

#[cfg(test)]
mod tests;
