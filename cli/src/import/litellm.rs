//! LiteLLM's `config.yaml`.
//!
//! One pool holds everything: a backend of Weir says itself which models it serves, so LiteLLM's deployments of one
//! model become backends that serve it. Deployments with the same address, key and weight are one backend.
//! What a deployment limits (`rpm`, `tpm`) becomes a limit of its model at its backend, which is an account of that
//! backend's name: LiteLLM counts each deployment apart, also those that share a key. `max_parallel_requests` is how many
//! slots its backend has, which then serves no other model.
//! What has no counterpart is listed, never dropped in silence.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use serde_json::{Map, Value};
use weir_gateway::control::credentials::CredentialSources;
use weir_proto::resource::{CredentialRef, Resource, kind_name, kind_of};
use weir_proto::v1::{self, resource::Spec};

use super::providers;
use super::{Import, Note, resource_name};

/// The pool and the tenant everything belongs to.
const POOL: &str = "litellm";
const TENANT: &str = "default";
/// Models of one file; LiteLLM's own examples have a few dozen.
const MODELS_MAX: usize = 5_000;
/// The largest rate of a limit.
const RATE_MAX: u64 = weir_proto::resource::Rates::MAX_UNITS;

/// The largest price, micro-dollars per million tokens.
const PRICE_MAX: u64 = 1 << 40;

/// Why a file cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unreadable {
    #[error("{0}: not YAML: {1}")]
    Yaml(String, Box<serde_saphyr::Error>),
    #[error("{0}: no model_list; is this a config.yaml of LiteLLM?")]
    NoModels(String),
    #[error("{0}: more than {MODELS_MAX} entries in model_list")]
    TooMany(String),
}

/// Reads the text of a file of this name.
pub(crate) fn import(text: &str, file: &str) -> Result<Import, Unreadable> {
    let options = serde_saphyr::options! { with_snippet: false };
    let config: Value = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| Unreadable::Yaml(file.to_owned(), Box::new(error)))?;
    let Some(list) = config.get("model_list").and_then(Value::as_array) else {
        return Err(Unreadable::NoModels(file.to_owned()));
    };
    if list.len() > MODELS_MAX {
        return Err(Unreadable::TooMany(file.to_owned()));
    }
    let mut reader = Reader::default();
    for (i, entry) in list.iter().enumerate() {
        reader.deployment(&format!("model_list[{i}]"), entry);
    }
    let mut pool = v1::PoolSpec::default();
    for (section, value) in config.as_object().into_iter().flatten().filter(|(k, _)| *k != "model_list") {
        let Some(fields) = value.as_object() else {
            reader.out.note(section, "not carried over");
            continue;
        };
        match section.as_str() {
            "router_settings" | "litellm_settings" => reader.settings(section, fields, &mut pool),
            "general_settings" => reader.general(fields),
            "environment_variables" => {
                reader.out.note(section, "not carried over: set these variables where the gateways run");
            }
            _ => reader.out.note(section, "not carried over"),
        }
    }
    Ok(reader.finish(pool))
}

/// What tells one backend from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Site {
    url: String,
    credential: String,
    weight: Option<u32>,
    max_concurrency: Option<u32>,
}

#[derive(Debug, Default)]
struct Backend {
    name: String,
    site: Option<Site>,
    /// Model resource -> the name there.
    models: BTreeMap<String, String>,
}

/// The limits of a deployment: of a model at a backend.
#[derive(Debug)]
struct Limit {
    backend: usize,
    model: String,
    requests: Option<u64>,
    tokens: Option<u64>,
}

#[derive(Debug, Default)]
struct Reader {
    out: Import,
    backends: Vec<Backend>,
    models: BTreeMap<String, v1::ModelSpec>,
    limits: Vec<Limit>,
    /// LiteLLM's name -> the resource's.
    names: HashMap<String, String>,
    fallbacks: Vec<(String, String, Vec<String>)>,
}

impl Reader {
    fn deployment(&mut self, path: &str, entry: &Value) {
        let params = entry.get("litellm_params").and_then(Value::as_object);
        let (Some(alias), Some(params)) = (entry.get("model_name").and_then(Value::as_str), params) else {
            self.out.note(path, "not carried over: no model_name or no litellm_params");
            return;
        };
        let Some(upstream) = params.get("model").and_then(Value::as_str) else {
            self.out.note(format!("{path}.litellm_params"), "not carried over: no model");
            return;
        };
        if alias.contains('*') || upstream.contains('*') {
            self.out.note(path, "not carried over: wildcards; list the models by name");
            return;
        }
        let (provider, upstream) = match providers::split(upstream) {
            Ok(known) => known,
            Err(prefix) => {
                let text = format!("not carried over: the provider '{prefix}' has no API that Weir speaks");
                self.out.note(path, text);
                return;
            }
        };
        let Some(url) = params.get("api_base").and_then(Value::as_str).or(provider.url) else {
            self.out.note(path, "not carried over: no api_base");
            return;
        };
        let Some(url) = self.plain(&format!("{path}.litellm_params.api_base"), url) else { return };
        let credential = self.credential(path, params, provider.key, &url);
        let site = Site {
            url: url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
            credential,
            weight: self.whole(path, params, "weight", 10_000),
            max_concurrency: self.whole(path, params, "max_parallel_requests", 100_000),
        };
        let model = self.model_name(alias);
        let backend = self.place(site, &model, upstream);
        let (requests, tokens) = (self.rate(path, params, "rpm"), self.rate(path, params, "tpm"));
        if requests.is_some() || tokens.is_some() {
            let account = self.backends[backend].name.clone();
            let text = format!("rpm and tpm became a limit of {model} at the account {account}");
            self.out.note(format!("{path}.litellm_params"), text);
            self.limits.push(Limit { backend, model: model.clone(), requests, tokens });
        }
        self.model(path, &model, alias, entry, params);
    }

    /// A text that is a value, or the variable that LiteLLM would have read when it started.
    fn plain(&mut self, path: &str, text: &str) -> Option<String> {
        if let Some(variable) = text.strip_prefix("os.environ/") {
            let text =
                format!("not carried over: put the value of {variable} into the file and import again");
            self.out.note(path, text);
            return None;
        }
        Some(text.to_owned())
    }

    fn credential(
        &mut self,
        path: &str,
        params: &Map<String, Value>,
        default: Option<&str>,
        url: &str,
    ) -> String {
        match params.get("api_key").and_then(Value::as_str) {
            Some(text) => match text.strip_prefix("os.environ/") {
                Some(variable) => {
                    self.note_variable(&format!("{path}.litellm_params.api_key"), variable);
                    format!("env:{variable}")
                }
                None => {
                    let host = url.parse::<http::Uri>().ok().and_then(|u| u.host().map(resource_name));
                    let variable = host.unwrap_or_default().to_ascii_uppercase().replace(['.', '-'], "_");
                    let digit = variable.starts_with(|c: char| c.is_ascii_digit());
                    let variable = format!("{}{variable}_API_KEY", if digit { "HOST_" } else { "" });
                    // The key itself is never repeated.
                    let text = format!("a literal key: set it as {variable} where the gateways run");
                    self.out.note(format!("{path}.litellm_params.api_key"), text);
                    format!("env:{variable}")
                }
            },
            None => default.map(|variable| format!("env:{variable}")).unwrap_or_default(),
        }
    }

    /// Says so, once, when gateways do not read a variable unless they are told to.
    fn note_variable(&mut self, path: &str, variable: &str) {
        let text = if CredentialRef::is_setting_of_weir(variable) {
            format!(
                "gateways never read {variable}: variables that begin with WEIR_ are settings of Weir; rename it"
            )
        } else if CredentialSources::default().allows(variable) {
            return;
        } else {
            format!("gateways read {variable} only when started with it in --credential-env")
        };
        if !self.out.notes.iter().any(|note| note.text == text) {
            self.out.note(path, text);
        }
    }

    /// A whole number of a deployment, if it is one that Weir takes.
    fn whole(&mut self, path: &str, params: &Map<String, Value>, field: &str, max: u64) -> Option<u32> {
        let value = params.get(field)?;
        let number = value.as_u64().filter(|n| (1..=max).contains(n)).and_then(|n| u32::try_from(n).ok());
        if number.is_none() {
            let text = format!("not carried over: Weir takes whole numbers from 1 to {max} here");
            self.out.note(format!("{path}.litellm_params.{field}"), text);
        }
        number
    }

    /// The resource of a model of this name; two names that look the same as resources are told apart.
    fn model_name(&mut self, alias: &str) -> String {
        if let Some(name) = self.names.get(alias) {
            return name.clone();
        }
        let taken: BTreeSet<&str> = self.names.values().map(String::as_str).collect();
        let name = free_name(&resource_name(alias), |name| taken.contains(name));
        self.names.insert(alias.to_owned(), name.clone());
        name
    }

    /// A limit per minute of a deployment, if it is one that Weir takes.
    fn rate(&mut self, path: &str, params: &Map<String, Value>, field: &str) -> Option<u64> {
        let value = params.get(field)?;
        let number = value.as_u64().filter(|n| *n <= RATE_MAX);
        if number.is_none() && !value.is_null() {
            let text = format!("not carried over: Weir takes whole numbers up to {RATE_MAX} here");
            self.out.note(format!("{path}.litellm_params.{field}"), text);
        }
        number
    }

    /// Puts a model on the backend of a site: one that serves it already is full, and so is one whose slots are those of
    /// a deployment. Returns the backend's place.
    fn place(&mut self, site: Site, model: &str, upstream: &str) -> usize {
        let upstream = if upstream == model { String::new() } else { upstream.to_owned() };
        let shared = site.max_concurrency.is_none();
        let fits = |b: &Backend| shared && b.site.as_ref() == Some(&site) && !b.models.contains_key(model);
        if let Some(at) = self.backends.iter().position(fits) {
            self.backends[at].models.insert(model.to_owned(), upstream);
            return at;
        }
        let host = site.url.parse::<http::Uri>().ok().and_then(|u| u.host().map(resource_name));
        let base = host.unwrap_or_else(|| "backend".to_owned());
        let name = free_name(&base, |name| self.backends.iter().any(|b| b.name == name));
        self.backends.push(Backend { name, site: Some(site), models: [(model.to_owned(), upstream)].into() });
        self.backends.len() - 1
    }

    fn model(&mut self, path: &str, name: &str, alias: &str, entry: &Value, params: &Map<String, Value>) {
        let empty = Map::new();
        let info = entry.get("model_info").and_then(Value::as_object).unwrap_or(&empty);
        let model = self.models.entry(name.to_owned()).or_default();
        model.pool = POOL.into();
        if alias != name {
            alias.clone_into(&mut model.client_name);
        }
        // Dollars per token -> micro-dollars per million tokens. Where deployments differ, the dearest counts.
        let mut price = |field| {
            let dollars = params.get(field).or_else(|| info.get(field)).and_then(Value::as_f64)?;
            let micro = (dollars * 1e12).round();
            if !(0.0..=PRICE_MAX as f64).contains(&micro) {
                self.out.note(format!("{path}.{field}"), "not carried over: no price that Weir takes");
                return None;
            }
            Some(micro as u64)
        };
        let prices = [price("input_cost_per_token"), price("output_cost_per_token")];
        if let Some(price) = prices[0] {
            model.input_price_micro_dollars = model.input_price_micro_dollars.max(price);
        }
        if let Some(price) = prices[1] {
            model.output_price_micro_dollars = model.output_price_micro_dollars.max(price);
        }
        if let Some(seconds) = params.get("timeout").and_then(Value::as_f64) {
            model.timeouts.get_or_insert_default().total = duration(seconds);
        }
        if let Some(seconds) = params.get("stream_timeout").and_then(Value::as_f64) {
            model.timeouts.get_or_insert_default().first_byte = duration(seconds);
        }
        const CARRIED: [&str; 11] = [
            "model",
            "api_base",
            "api_key",
            "weight",
            "max_parallel_requests",
            "rpm",
            "tpm",
            "timeout",
            "stream_timeout",
            "input_cost_per_token",
            "output_cost_per_token",
        ];
        for field in params.keys().filter(|field| !CARRIED.contains(&field.as_str())) {
            self.out.note(format!("{path}.litellm_params.{field}"), "not carried over");
        }
        for field in info.keys().filter(|field| !CARRIED.contains(&field.as_str())) {
            self.out.note(format!("{path}.model_info.{field}"), "not carried over");
        }
    }

    /// `router_settings` and `litellm_settings` share most of their fields.
    fn settings(&mut self, section: &str, fields: &Map<String, Value>, pool: &mut v1::PoolSpec) {
        for (field, value) in fields {
            let path = format!("{section}.{field}");
            let seconds = value.as_f64().and_then(duration);
            let whole = value.as_u64().and_then(|n| u32::try_from(n).ok());
            match (field.as_str(), seconds, whole) {
                ("routing_strategy", ..) => self.strategy(&path, value.as_str().unwrap_or_default(), pool),
                ("num_retries", _, Some(n)) => {
                    pool.retry_budget.get_or_insert_default().max_attempts = n.saturating_add(1).min(10);
                }
                ("allowed_fails", _, Some(n)) => {
                    // LiteLLM cools a deployment down once it failed more often than this.
                    pool.ejection.get_or_insert_default().consecutive_failures = n.saturating_add(1).min(100);
                }
                ("cooldown_time", Some(time), _) => {
                    pool.ejection.get_or_insert_default().base_duration = Some(time);
                }
                ("timeout" | "request_timeout", Some(time), _) => {
                    pool.timeouts.get_or_insert_default().total = Some(time);
                }
                ("stream_timeout", Some(time), _) => {
                    pool.timeouts.get_or_insert_default().first_byte = Some(time);
                }
                ("fallbacks", ..) => self.fallbacks(&path, value),
                (
                    "redis_host" | "redis_port" | "redis_password" | "redis_url" | "cache" | "cache_params",
                    ..,
                ) => {
                    self.out.note(path, "not carried over: gateways are given Redis by --redis");
                }
                _ => self.out.note(path, "not carried over"),
            }
        }
    }

    fn strategy(&mut self, path: &str, strategy: &str, pool: &mut v1::PoolSpec) {
        let policy = match strategy {
            "simple-shuffle" => v1::BalancingPolicy::WeightedRoundRobin,
            "least-busy" => v1::BalancingPolicy::LeastRequest,
            other => {
                let text = format!(
                    "'{other}' becomes weighted_round_robin, whose weights follow load, latency and health"
                );
                self.out.note(path, text);
                v1::BalancingPolicy::WeightedRoundRobin
            }
        };
        pool.set_balancing_policy(policy);
    }

    fn fallbacks(&mut self, path: &str, value: &Value) {
        let chains = value.as_array().into_iter().flatten().filter_map(Value::as_object).flatten();
        for (model, chain) in chains {
            let chain = chain.as_array().into_iter().flatten();
            let chain = chain.filter_map(|m| m.as_str().map(str::to_owned)).collect();
            self.fallbacks.push((path.to_owned(), model.clone(), chain));
        }
    }

    fn general(&mut self, fields: &Map<String, Value>) {
        for field in fields.keys() {
            let text = match field.as_str() {
                "master_key" => "not carried over: the control plane makes an admin token of its own",
                "database_url" => {
                    "not carried over: keys that LiteLLM keeps in its database are made anew by weir key create"
                }
                _ => "not carried over",
            };
            self.out.note(format!("general_settings.{field}"), text);
        }
    }

    /// Joins what was read. Whatever refers to a model that was left out is left out too.
    fn finish(mut self, pool: v1::PoolSpec) -> Import {
        for (path, model, chain) in std::mem::take(&mut self.fallbacks) {
            let known = chain.iter().filter_map(|m| self.names.get(m).cloned()).take(8).collect::<Vec<_>>();
            let target = self.names.get(&model).and_then(|name| self.models.get_mut(name));
            match target {
                Some(target) if known.len() == chain.len() => target.fallbacks = known,
                _ => self
                    .out
                    .note(path, format!("not carried over for '{model}': not all of these models exist")),
            }
        }
        let mut put = |name: String, spec| {
            self.out.resources.push(v1::Resource { name, spec: Some(spec), ..Default::default() });
        };
        put(POOL.into(), Spec::Pool(pool));
        let names: Vec<String> = self.backends.iter().map(|backend| backend.name.clone()).collect();
        for (at, backend) in self.backends.into_iter().enumerate() {
            let Some(site) = backend.site else { continue };
            let limited = self.limits.iter().any(|limit| limit.backend == at);
            let spec = v1::BackendSpec {
                pool: POOL.into(),
                url: site.url,
                credential: site.credential,
                weight: site.weight,
                max_concurrency: site.max_concurrency,
                models: backend.models.into_iter().collect(),
                account: if limited { backend.name.clone() } else { String::new() },
                ..Default::default()
            };
            put(backend.name, Spec::Backend(spec));
        }
        for (name, model) in self.models {
            put(name, Spec::Model(model));
        }
        put(TENANT.into(), Spec::Tenant(v1::TenantSpec::default()));
        let mut limits: BTreeMap<String, v1::LimitSpec> = BTreeMap::new();
        for limit in self.limits {
            let account = &names[limit.backend];
            let name = resource_name(&format!("{account}-{}", limit.model));
            let name = free_name(&name, |name| limits.contains_key(name));
            let rates = v1::Rates {
                requests_per_minute: limit.requests,
                tokens_per_minute: limit.tokens,
                burst_multiplier: Some(1.0),
                ..Default::default()
            };
            let selector =
                v1::LimitSelector { account: account.clone(), model: limit.model, ..Default::default() };
            limits.insert(name, v1::LimitSpec { selector: Some(selector), rates: Some(rates) });
        }
        for (name, spec) in limits {
            put(name, Spec::Limit(spec));
        }
        // Said now and not only when it is applied: values come from a file that nobody checked by Weir's rules.
        for resource in &self.out.resources {
            let Err(violations) = Resource::try_from(resource) else { continue };
            let name = format!("{} {}", kind_name(kind_of(resource)), resource.name);
            self.out.notes.extend(violations.0.into_iter().map(|violation| Note {
                path: name.clone(),
                text: format!("has to be corrected by hand: {}: {}", violation.path, violation.message),
            }));
        }
        self.out
    }
}

/// The name, or the name with the first number behind it that is free.
fn free_name(base: &str, taken: impl Fn(&str) -> bool) -> String {
    if !taken(base) {
        return base.to_owned();
    }
    let base = &base[..base.len().min(57)];
    (2..).map(|n| format!("{base}-{n}")).find(|name| !taken(name)).unwrap_or_default()
}

/// Seconds as a duration; none for what is no time.
fn duration(seconds: f64) -> Option<prost_types::Duration> {
    let time = std::time::Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero())?;
    prost_types::Duration::try_from(time).ok()
}

#[cfg(test)]
mod tests;
