use std::collections::BTreeSet;

use super::*;

fn at(provider: &str, api_base: &str) -> Option<(String, String)> {
    let provider = named(provider).unwrap_or_else(|| panic!("{provider} is not known"));
    address(Some(provider), api_base).map(|address| (address.url, address.api_base_path))
}

/// Where a backend of this address sends a chat completion.
fn asked(address: &Address) -> String {
    let base = match address.api_base_path.as_str() {
        "" => "/v1",
        "/" => "",
        path => path,
    };
    format!("{}{base}/chat/completions", address.url)
}

#[test]
fn the_table_is_in_order_and_names_each_provider_once() {
    let names: Vec<&str> = PROVIDERS.iter().map(|provider| provider.name).collect();
    let sorted: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(names, sorted.into_iter().collect::<Vec<_>>());
    for (_, provider) in BARE {
        assert!(named(provider).is_some(), "{provider}");
    }
}

#[test]
fn prefixes_are_taken_off_and_names_with_slashes_kept() {
    for (model, provider, name) in [
        ("gpt-4o", Some("openai"), "gpt-4o"),
        ("openai/gpt-4o", Some("openai"), "gpt-4o"),
        ("hosted_vllm/meta-llama/Llama-3", Some("hosted_vllm"), "meta-llama/Llama-3"),
        ("moonshot/kimi-k3", Some("moonshot"), "kimi-k3"),
        ("dashscope/qwen-plus", Some("dashscope"), "qwen-plus"),
        ("zai/glm-4.7", Some("zai"), "glm-4.7"),
        ("volcengine/doubao-1-5-pro", Some("volcengine"), "doubao-1-5-pro"),
        ("perplexity/sonar", Some("perplexity"), "sonar"),
        ("deepinfra/meta-llama/Llama-3", Some("deepinfra"), "meta-llama/Llama-3"),
        ("openrouter/openai/gpt-4o:free", Some("openrouter"), "openai/gpt-4o:free"),
        ("azure/o_series/my-o3", Some("azure"), "my-o3"),
        ("fireworks_ai/llama-v3", Some("fireworks_ai"), "accounts/fireworks/models/llama-v3"),
        ("fireworks_ai/accounts/a/models/b", Some("fireworks_ai"), "accounts/a/models/b"),
        ("bedrock/anthropic.claude", Some("bedrock"), "anthropic.claude"),
        ("claude-3-5-sonnet", Some("anthropic"), "claude-3-5-sonnet"),
        ("gemini-2.5-flash", Some("vertex_ai"), "gemini-2.5-flash"),
        ("meta-llama/Llama-3", None, "meta-llama/Llama-3"),
        ("qwen2.5:7b", None, "qwen2.5:7b"),
    ] {
        let served = split(model, None, None);
        assert_eq!((served.provider.map(|p| p.name), served.model.as_str()), (provider, name), "{model}");
    }
}

#[test]
fn a_provider_is_also_known_by_its_address_or_by_a_field_of_its_own() {
    let by_address = split("llama-3.1-8b", None, Some("https://api.groq.com/openai/v1"));
    assert_eq!(by_address.provider.map(|p| p.name), Some("groq"));
    let by_field = split("llama-3.1-8b", Some("groq"), None);
    assert_eq!((by_field.provider.map(|p| p.name), by_field.model.as_str()), (Some("groq"), "llama-3.1-8b"));
    assert_eq!(split("groq/llama", Some("groq"), None).model, "llama");
    assert_eq!(split("gpt-4o", Some("my_provider"), None).provider, None, "never OpenAI's by its name");
}

#[test]
fn what_litellm_would_ask_is_asked() {
    for (provider, api_base, asked_there) in [
        (
            "openai",
            "https://open.bigmodel.cn/api/paas/v4",
            "https://open.bigmodel.cn/api/paas/v4/chat/completions",
        ),
        (
            "openai",
            "https://generativelanguage.googleapis.com/v1beta/openai/",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
        ),
        (
            "openai",
            "https://api.deepinfra.com/v1/openai",
            "https://api.deepinfra.com/v1/openai/chat/completions",
        ),
        (
            "openai",
            "https://ark.cn-beijing.volces.com/api/v3",
            "https://ark.cn-beijing.volces.com/api/v3/chat/completions",
        ),
        ("openai", "http://10.0.0.5:8000/v1/", "http://10.0.0.5:8000/v1/chat/completions"),
        ("openai", "http://10.0.0.5:8000", "http://10.0.0.5:8000/chat/completions"),
        ("openai", "https://h/proxy/v1", "https://h/proxy/v1/chat/completions"),
        ("openai", "https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("perplexity", "https://api.perplexity.ai", "https://api.perplexity.ai/chat/completions"),
        ("mistral", "https://h", "https://h/v1/chat/completions"),
        ("mistral", "https://h/v1", "https://h/v1/chat/completions"),
        ("ollama", "http://localhost:11434", "http://localhost:11434/v1/chat/completions"),
        ("ollama_chat", "http://h:11434/v1", "http://h:11434/v1/chat/completions"),
        ("azure", "https://r.openai.azure.com", "https://r.openai.azure.com/openai/v1/chat/completions"),
        (
            "azure",
            "https://r.openai.azure.com/openai/deployments/d/chat/completions?api-version=2024-10-21",
            "https://r.openai.azure.com/openai/v1/chat/completions",
        ),
        ("azure", "https://apim.example/team/", "https://apim.example/team/openai/v1/chat/completions"),
        (
            "azure_ai",
            "https://r.services.ai.azure.com/models",
            "https://r.services.ai.azure.com/openai/v1/chat/completions",
        ),
        (
            "azure_ai",
            "https://m.eastus2.models.ai.azure.com/v1",
            "https://m.eastus2.models.ai.azure.com/v1/chat/completions",
        ),
        ("databricks", "https://adb/serving-endpoints", "https://adb/serving-endpoints/chat/completions"),
    ] {
        let address = address(named(provider), api_base).expect(api_base);
        assert_eq!(asked(&address), asked_there, "{provider} at {api_base}");
    }
}

#[test]
fn every_default_address_becomes_a_backend() {
    for provider in PROVIDERS.iter().filter(|provider| !provider.base.is_empty()) {
        let address = address(Some(provider), provider.base).unwrap_or_else(|| panic!("{}", provider.name));
        let asked = asked(&address);
        assert!(!address.url.ends_with("/v1") && asked.parse::<Uri>().is_ok(), "{}: {asked}", provider.name);
        if !matches!(provider.api, Api::BesideV1) {
            assert_eq!(asked, format!("{}/chat/completions", provider.base));
        }
        let is_openai = matches!(provider.name, "openai" | "text-completion-openai");
        assert_eq!(asked.contains("api.openai.com"), is_openai, "{}", provider.name);
    }
}

#[test]
fn a_native_api_elsewhere_and_what_is_no_address_are_not_guessed() {
    assert_eq!(at("anthropic", "https://my-proxy.example"), None);
    assert_eq!(at("gemini", "https://my-proxy.example"), None);
    assert!(at("anthropic", "https://api.anthropic.com").is_some());
    assert_eq!(at("bedrock", "https://bedrock-runtime.us-east-1.amazonaws.com"), None);
    let whole = |text: &str| Some((text.to_owned(), "/".to_owned()));
    assert_eq!(at("openai", "https://h/x?key=1"), whole("https://h/x?key=1"), "told when it is judged");
    assert_eq!(at("openai", "not a url"), whole("not a url"));
}
