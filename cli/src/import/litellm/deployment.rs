//! One deployment of LiteLLM: who serves it, where, and with which key.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use weir_gateway::control::credentials::CredentialSources;
use weir_proto::resource::CredentialRef;

use crate::import::fields::{Fields, Variables, variable};
use crate::import::providers::{self, Address, Api, Provider, Served};
use crate::import::{Import, resource_name};

/// What a file says for all of its deployments.
#[derive(Debug)]
pub(super) struct Shared<'a> {
    pub(super) variables: &'a Variables,
    /// `router_settings.default_litellm_params`: what a deployment does not say itself.
    pub(super) defaults: Option<&'a Map<String, Value>>,
    /// `litellm_settings.api_base`: where OpenAI's API is.
    pub(super) openai_base: Option<&'a str>,
    /// `credential_list`, by name.
    pub(super) credentials: BTreeMap<&'a str, &'a Map<String, Value>>,
}

impl<'a> Shared<'a> {
    pub(super) fn of(config: &'a Value, variables: &'a Variables) -> Self {
        let credentials = config.get("credential_list").and_then(Value::as_array).into_iter().flatten();
        let named = |entry: &'a Value| {
            let values = entry.get("credential_values").and_then(Value::as_object)?;
            Some((entry.get("credential_name").and_then(Value::as_str)?, values))
        };
        Self {
            variables,
            defaults: config.pointer("/router_settings/default_litellm_params").and_then(Value::as_object),
            openai_base: config.pointer("/litellm_settings/api_base").and_then(Value::as_str),
            credentials: credentials.filter_map(named).collect(),
        }
    }

    /// Where a provider is when its deployment does not say it: by a variable or a setting of the file, or by its own
    /// address.
    fn base(&self, provider: Option<&Provider>) -> Option<String> {
        let provider = provider?;
        let is_openai = matches!(provider.name, "openai" | "text-completion-openai");
        let variable = provider.key.strip_suffix("_API_KEY").map(|start| format!("{start}_API_BASE"));
        let by_variable = variable.as_deref().and_then(|name| self.variables.get(name));
        let of_openai = || self.openai_base.or_else(|| self.variables.get("OPENAI_BASE_URL"));
        let set = if is_openai { of_openai().or(by_variable) } else { by_variable };
        set.or(Some(provider.base)).filter(|base| !base.is_empty()).map(str::to_owned)
    }
}

/// A deployment that can be carried over: who serves it, by which name and where.
pub(super) struct Deployment {
    pub(super) provider: Option<&'static Provider>,
    pub(super) model: String,
    pub(super) address: Address,
}

/// Who serves a deployment, and where; else why it cannot be carried over.
pub(super) fn located(
    shared: &Shared<'_>,
    alias: &str,
    params: &mut Fields<'_>,
    out: &mut Import,
) -> Result<Deployment, String> {
    let upstream = params.text("model").ok_or("no model")?;
    if alias.contains('*') || upstream.contains('*') {
        return Err("wildcards; list the models by name".to_owned());
    }
    let custom = match params.take("custom_llm_provider") {
        None => None,
        Some(_) => Some(params.text("custom_llm_provider").ok_or("who serves it is not known")?),
    };
    // One that is there and cannot be read is never replaced by the provider's own.
    let field = ["api_base", "base_url"].into_iter().find(|field| params.take(field).is_some());
    let given = match field {
        None => None,
        Some(field) => Some(params.text(field).ok_or("where it is is not known")?),
    };
    let given = given.filter(|base| !base.trim().is_empty());
    let Served { provider, model } = providers::split(&upstream, custom.as_deref(), given.as_deref());
    let Some(base) = given.or_else(|| shared.base(provider)) else {
        return Err(match provider {
            Some(provider) if provider.api == Api::Foreign => no_api(provider),
            Some(provider) => format!("no api_base, and no address of '{}' is known", provider.name),
            None => format!("no api_base, and '{upstream}' names no provider that is known"),
        });
    };
    let address = match (providers::address(provider, &base), provider) {
        (Some(address), _) => address,
        (None, Some(provider)) if provider.api != Api::Foreign => {
            let Provider { name, base, .. } = provider;
            return Err(format!(
                "api_base has the native API of '{name}', which Weir does not speak; the OpenAI-compatible one of \
                 the provider is at {base}"
            ));
        }
        (None, provider) => return Err(provider.map_or_else(String::new, no_api)),
    };
    match provider {
        None => params.note(
            "model",
            format!(
                "names no provider that is known: '{model}' is asked for at api_base, which is taken for an \
             OpenAI-compatible API; if a provider stands before the name, take it off"
            ),
        ),
        Some(provider) => note_native(&params.path("model"), provider, &address, out),
    }
    Ok(Deployment { provider, model, address })
}

/// Says, once, that a provider is asked by another API than LiteLLM asks it by.
fn note_native(path: &str, provider: &Provider, address: &Address, out: &mut Import) {
    let name = provider.name;
    let text = match provider.api {
        Api::Compatible | Api::BesideV1 => {
            format!(
                "'{name}' is asked by its OpenAI-compatible API, not by the native one that LiteLLM speaks"
            )
        }
        Api::Azure | Api::AzureFoundry if address.api_base_path == "/openai/v1" => format!(
            "'{name}' is asked by its v1 API (/openai/v1): a model is the name of a deployment, and no api-version \
             is sent"
        ),
        Api::Appended | Api::Versioned | Api::Azure | Api::AzureFoundry | Api::Foreign => return,
    };
    out.note_once(path, text);
}

/// Where the key of a deployment is found.
pub(super) fn credential(params: &mut Fields<'_>, deployment: &Deployment, out: &mut Import) -> String {
    let path = params.path("api_key");
    let host = providers::host(&deployment.address.url).unwrap_or_default();
    let Some(key) = params.take("api_key") else {
        let Some(provider) = deployment.provider.filter(|provider| !provider.key.is_empty()) else {
            return String::new();
        };
        if providers::host(provider.base).is_some_and(|own| own != host) {
            let text = format!("there is none, so {} is sent to {host}, as LiteLLM does", provider.key);
            out.note_once(&path, text);
        }
        note_variable(&path, provider.key, out);
        return format!("env:{}", provider.key);
    };
    if let Some(name) = variable(key) {
        note_variable(&path, name, out);
        return format!("env:{name}");
    }
    if !(key.is_string() || key.is_number()) {
        out.note(&path, "not carried over: must be text");
        return String::new();
    }
    // What servers without keys are given, since clients of OpenAI insist on one.
    let placeholder = key.as_str().map(|key| key.trim().to_ascii_lowercase());
    if placeholder.is_some_and(|key| ["", "empty", "none", "null"].contains(&key.as_str())) {
        out.note(&path, "it is taken for none: no key is sent");
        return String::new();
    }
    let name = resource_name(&host).to_ascii_uppercase().replace(['.', '-'], "_");
    let digit = name.starts_with(|c: char| c.is_ascii_digit());
    let name = format!("{}{name}_API_KEY", if digit { "HOST_" } else { "" });
    // The key itself is never repeated.
    out.note(path, format!("a literal key: set it as {name} where the gateways run"));
    format!("env:{name}")
}

/// Says so, once, when gateways do not read a variable unless they are told to.
fn note_variable(path: &str, variable: &str, out: &mut Import) {
    let text = if CredentialRef::is_setting_of_weir(variable) {
        format!(
            "gateways never read {variable}: variables that begin with WEIR_ are settings of Weir; rename it"
        )
    } else if CredentialSources::default().allows(variable) {
        return;
    } else {
        format!("gateways read {variable} only when started with it in --credential-env")
    };
    out.note_once(path, text);
}

fn no_api(provider: &Provider) -> String {
    format!("the provider '{}' has no API that Weir speaks", provider.name)
}
