//! What LiteLLM's provider prefixes stand for, as far as they speak the OpenAI API.

/// A provider that Weir can speak to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Provider {
    /// Its address, without the `/v1` that Weir appends; `None`: `api_base` has to say.
    pub(super) url: Option<&'static str>,
    /// The variable from which LiteLLM takes the key when the file names none.
    pub(super) key: Option<&'static str>,
}

/// Prefix, address, variable of the key. Addresses: the providers' own documentation of their OpenAI-compatible API;
/// variables: <https://docs.litellm.ai/docs/providers>.
const PROVIDERS: [(&str, Option<&str>, Option<&str>); 20] = [
    ("anthropic", Some("https://api.anthropic.com"), Some("ANTHROPIC_API_KEY")),
    ("cerebras", Some("https://api.cerebras.ai"), Some("CEREBRAS_API_KEY")),
    ("custom_openai", None, None),
    ("deepseek", Some("https://api.deepseek.com"), Some("DEEPSEEK_API_KEY")),
    ("fireworks_ai", Some("https://api.fireworks.ai/inference"), Some("FIREWORKS_AI_API_KEY")),
    ("groq", Some("https://api.groq.com/openai"), Some("GROQ_API_KEY")),
    ("hosted_vllm", None, None),
    ("litellm_proxy", None, None),
    ("llamafile", None, None),
    ("lm_studio", None, None),
    ("mistral", Some("https://api.mistral.ai"), Some("MISTRAL_API_KEY")),
    ("nvidia_nim", Some("https://integrate.api.nvidia.com"), Some("NVIDIA_NIM_API_KEY")),
    ("ollama", Some("http://localhost:11434"), None),
    ("ollama_chat", Some("http://localhost:11434"), None),
    ("openai", Some("https://api.openai.com"), Some("OPENAI_API_KEY")),
    ("openai_like", None, None),
    ("openrouter", Some("https://openrouter.ai/api"), Some("OPENROUTER_API_KEY")),
    ("text-completion-openai", Some("https://api.openai.com"), Some("OPENAI_API_KEY")),
    ("together_ai", Some("https://api.together.xyz"), Some("TOGETHERAI_API_KEY")),
    ("xai", Some("https://api.x.ai"), Some("XAI_API_KEY")),
];

/// Prefixes of providers whose API is another one; everything else before a slash is part of a model's name.
const FOREIGN: [&str; 14] = [
    "ai21",
    "azure",
    "azure_ai",
    "bedrock",
    "cohere",
    "databricks",
    "gemini",
    "huggingface",
    "palm",
    "replicate",
    "sagemaker",
    "vertex_ai",
    "vertex_ai_beta",
    "watsonx",
];

/// Takes LiteLLM's `model` apart: the provider and the name there, or the prefix that Weir cannot speak to.
pub(super) fn split(model: &str) -> Result<(Provider, &str), &str> {
    let (prefix, name) = model.split_once('/').unwrap_or(("openai", model));
    if let Some((_, url, key)) = PROVIDERS.iter().find(|(known, ..)| *known == prefix) {
        return Ok((Provider { url: *url, key: *key }, name));
    }
    if FOREIGN.contains(&prefix) {
        return Err(prefix);
    }
    Ok((Provider { url: None, key: None }, model))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_taken_off_and_names_with_slashes_kept() {
        assert_eq!(split("gpt-4o").map(|(p, n)| (p.url, n)), Ok((Some("https://api.openai.com"), "gpt-4o")));
        let (provider, name) = split("hosted_vllm/meta-llama/Llama-3").expect("known");
        assert_eq!((provider.url, name), (None, "meta-llama/Llama-3"));
        assert_eq!(split("meta-llama/Llama-3").expect("a name").1, "meta-llama/Llama-3");
        assert_eq!(split("bedrock/anthropic.claude"), Err("bedrock"));
    }
}
