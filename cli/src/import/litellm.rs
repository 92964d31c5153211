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
use weir_proto::v1::{self, resource::Spec};

use self::deployment::{Shared, credential, located};
use super::fields::{Fields, Variables};
use super::{Import, free_name, providers, resource_name};

mod deployment;

mod clocks;

/// The pool and the tenant everything belongs to.
const POOL: &str = "litellm";
const TENANT: &str = "default";
/// Models of one file; LiteLLM's own examples have a few dozen.
const MODELS_MAX: usize = 5_000;
/// The largest count that is read of a setting; those of Weir are smaller.
const COUNT_MAX: u64 = 1 << 20;
/// Most fallbacks of a model.
const FALLBACKS_MAX: usize = 8;
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
    let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
    let config: Value = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| Unreadable::Yaml(file.to_owned(), Box::new(error)))?;
    let Some(list) = config.get("model_list").and_then(Value::as_array) else {
        return Err(Unreadable::NoModels(file.to_owned()));
    };
    if list.len() > MODELS_MAX {
        return Err(Unreadable::TooMany(file.to_owned()));
    }
    let variables = Variables::of(config.get("environment_variables"));
    let mut reader = Reader::new(Shared::of(&config, &variables));
    for (i, entry) in list.iter().enumerate() {
        reader.deployment(&format!("model_list[{i}]"), entry);
    }
    let mut pool = v1::PoolSpec::default();
    for (section, value) in config.as_object().into_iter().flatten().filter(|(k, _)| *k != "model_list") {
        match (section.as_str(), value.as_object()) {
            ("router_settings" | "litellm_settings", Some(fields)) => {
                reader.settings(section, fields, &mut pool);
            }
            ("general_settings", Some(fields)) => reader.general(fields),
            ("environment_variables", Some(_)) => {
                reader.out.note(section, "not carried over: set these variables where the gateways run");
            }
            ("credential_list", None) if value.is_array() => reader.credential_list(value),
            (_, None) if value.is_null() => {}
            _ => reader.out.note(section, "not carried over"),
        }
    }
    Ok(reader.finish(pool))
}

/// What tells one backend from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Site {
    url: String,
    /// Empty: `/v1`.
    api_base_path: String,
    /// As in the contract.
    dialect: i32,
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

#[derive(Debug)]
struct Reader<'a> {
    shared: Shared<'a>,
    out: Import,
    backends: Vec<Backend>,
    models: BTreeMap<String, v1::ModelSpec>,
    limits: Vec<Limit>,
    /// LiteLLM's name -> the resource's.
    names: HashMap<String, String>,
    fallbacks: Vec<(String, String, Vec<String>)>,
}

impl<'a> Reader<'a> {
    fn new(shared: Shared<'a>) -> Self {
        Self {
            shared,
            out: Import::default(),
            backends: Vec::new(),
            models: BTreeMap::new(),
            limits: Vec::new(),
            names: HashMap::new(),
            fallbacks: Vec::new(),
        }
    }

    fn deployment(&mut self, path: &str, entry: &'a Value) {
        let variables = self.shared.variables;
        let mut fields = Fields::new(path, entry.as_object(), variables);
        let alias = fields.text("model_name");
        let params = fields.take("litellm_params").and_then(Value::as_object);
        let info = fields.take("model_info");
        if info.is_some_and(|info| !info.is_object()) {
            fields.note("model_info", "not carried over: must be a map");
        }
        fields.finish(&mut self.out);
        let (Some(alias), Some(params)) = (alias, params) else {
            self.out.note(path, "not carried over: no model_name or no litellm_params");
            return;
        };
        let mut info = Fields::new(format!("{path}.model_info"), info.and_then(Value::as_object), variables);
        let mut params = Fields::new(format!("{path}.litellm_params"), Some(params), variables);
        if let Some(name) = params.text("litellm_credential_name") {
            match self.shared.credentials.get(name.as_str()) {
                Some(values) => params = params.or(Some(values)),
                None => {
                    params.note("litellm_credential_name", "no credential_list of this file has this name");
                    params.refuse(&mut self.out);
                    self.out
                        .note(path, "not carried over: where it is may be in a credential that is not here");
                    return;
                }
            }
        }
        let mut params = params.or(self.shared.defaults);
        let deployment = match located(&self.shared, &alias, &mut params, &mut self.out) {
            Ok(deployment) => deployment,
            Err(why) => {
                params.refuse(&mut self.out);
                self.out.note(path, format!("not carried over: {why}"));
                return;
            }
        };
        let credential = credential(&mut params, &deployment, &mut self.out);
        let site = Site {
            url: deployment.address.url,
            api_base_path: deployment.address.api_base_path,
            dialect: deployment.provider.map_or(v1::Dialect::Unspecified, providers::dialect_of).into(),
            credential,
            weight: whole(&mut params, "weight", 10_000),
            max_concurrency: whole(&mut params, "max_parallel_requests", 100_000),
        };
        let model = self.model_name(&alias);
        let backend = self.place(site, &model, &deployment.model);
        let (requests, tokens) = (params.whole("rpm", 0, RATE_MAX), params.whole("tpm", 0, RATE_MAX));
        if requests.is_some() || tokens.is_some() {
            let account = self.backends[backend].name.clone();
            let text = format!("rpm and tpm became a limit of {model} at the account {account}");
            self.out.note(format!("{path}.litellm_params"), text);
            self.limits.push(Limit { backend, model: model.clone(), requests, tokens });
        }
        self.model(&model, &alias, &mut params, &mut info);
        params.finish(&mut self.out);
        info.finish(&mut self.out);
    }

    /// What of the named credentials cannot be read.
    fn credential_list(&mut self, list: &Value) {
        for (i, entry) in list.as_array().into_iter().flatten().enumerate() {
            let name = entry.get("credential_name").and_then(Value::as_str).unwrap_or_default();
            if !self.shared.credentials.contains_key(name) {
                let text = "not carried over: must have credential_name and credential_values";
                self.out.note(format!("credential_list[{i}]"), text);
            }
        }
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

    fn model(&mut self, name: &str, alias: &str, params: &mut Fields<'_>, info: &mut Fields<'_>) {
        let model = self.models.entry(name.to_owned()).or_default();
        model.pool = POOL.into();
        if alias != name {
            alias.clone_into(&mut model.client_name);
        }
        // Where deployments differ, the dearest counts.
        if let Some(price) = price(params, info, "input_cost_per_token") {
            model.input_price_micro_dollars = model.input_price_micro_dollars.max(price);
        }
        if let Some(price) = price(params, info, "output_cost_per_token") {
            model.output_price_micro_dollars = model.output_price_micro_dollars.max(price);
        }
        if let Some(price) = price(params, info, "cache_read_input_token_cost") {
            let known = model.cached_input_price_micro_dollars.unwrap_or(0);
            model.cached_input_price_micro_dollars = Some(known.max(price));
        }
        if let Some(price) = price(params, info, "cache_creation_input_token_cost") {
            let known = model.cache_write_price_micro_dollars.unwrap_or(0);
            model.cache_write_price_micro_dollars = Some(known.max(price));
        }
        let total = seconds(params, "timeout");
        clocks::total(&mut model.timeouts, total, &params.path("timeout"), &mut self.out);
        clocks::silence(&mut model.timeouts, seconds(params, "stream_timeout"));
    }

    /// `router_settings` and `litellm_settings` share most of their fields.
    fn settings(&mut self, section: &str, map: &Map<String, Value>, pool: &mut v1::PoolSpec) {
        let mut fields = Fields::new(section, Some(map), self.shared.variables);
        if let Some(strategy) = fields.text("routing_strategy") {
            self.strategy(&fields.path("routing_strategy"), &strategy, pool);
        }
        if let Some(n) = fields.whole("num_retries", 0, COUNT_MAX) {
            pool.retry_budget.get_or_insert_default().max_attempts = n.min(9) as u32 + 1;
        }
        if let Some(n) = fields.whole("allowed_fails", 0, COUNT_MAX) {
            // LiteLLM cools a deployment down once it failed more often than this.
            pool.ejection.get_or_insert_default().consecutive_failures = n.min(99) as u32 + 1;
        }
        if let Some(time) = seconds(&mut fields, "cooldown_time") {
            pool.ejection.get_or_insert_default().base_duration = Some(time);
        }
        for field in ["request_timeout", "timeout"] {
            let time = seconds(&mut fields, field);
            clocks::total(&mut pool.timeouts, time, &fields.path(field), &mut self.out);
        }
        clocks::silence(&mut pool.timeouts, seconds(&mut fields, "stream_timeout"));
        if let Some(value) = fields.take("fallbacks") {
            self.fallbacks(&fields.path("fallbacks"), value);
        }
        for field in ["redis_host", "redis_port", "redis_password", "redis_url", "cache", "cache_params"] {
            if fields.take(field).is_some() {
                fields.note(field, "not carried over: gateways are given Redis by --redis");
            }
        }
        // Read already, since deployments depend on them.
        let shared = [
            ("router_settings", "default_litellm_params", self.shared.defaults.is_some()),
            ("litellm_settings", "api_base", self.shared.openai_base.is_some()),
        ];
        for (_, field, _) in shared.iter().filter(|(of, _, read)| *of == section && *read) {
            let _ = fields.take(field);
        }
        fields.finish(&mut self.out);
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
        let Some(list) = value.as_array() else {
            self.out.note(path, "not carried over: must be a list of a model and the list of its fallbacks");
            return;
        };
        for (i, entry) in list.iter().enumerate() {
            let Some(chains) = entry.as_object() else {
                self.out.note(
                    format!("{path}[{i}]"),
                    "not carried over: must be a model and the list of its fallbacks",
                );
                continue;
            };
            for (model, chain) in chains {
                let names = chain.as_array().into_iter().flatten().map(|m| m.as_str().map(str::to_owned));
                match names.collect::<Option<Vec<String>>>().filter(|_| chain.is_array()) {
                    Some(names) => self.fallbacks.push((path.to_owned(), model.clone(), names)),
                    None => {
                        let text = "not carried over: must be a list of names of models";
                        self.out.note(format!("{path}[{i}].{model}"), text);
                    }
                }
            }
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
    fn finish(mut self, mut pool: v1::PoolSpec) -> Import {
        clocks::complete(&mut pool, self.models.values_mut(), &mut self.out);
        for (path, model, chain) in std::mem::take(&mut self.fallbacks) {
            let known = chain.iter().filter_map(|m| self.names.get(m).cloned()).collect::<Vec<_>>();
            let target = self.names.get(&model).and_then(|name| self.models.get_mut(name));
            let text = match target {
                Some(target) if !target.fallbacks.is_empty() => "it has others already".to_owned(),
                Some(target) if known.len() == chain.len() => {
                    target.fallbacks = known.iter().take(FALLBACKS_MAX).cloned().collect();
                    if known.len() <= FALLBACKS_MAX {
                        continue;
                    }
                    format!("all beyond the first {FALLBACKS_MAX}")
                }
                _ => "not all of these models exist".to_owned(),
            };
            self.out.note(path, format!("not carried over for '{model}': {text}"));
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
                api_base_path: site.api_base_path,
                dialect: site.dialect,
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
        self.out.judge();
        self.out
    }
}

/// A whole number above zero.
fn whole(fields: &mut Fields<'_>, field: &str, max: u64) -> Option<u32> {
    fields.whole(field, 1, max).and_then(|number| u32::try_from(number).ok())
}

/// Dollars per token as micro-dollars per million tokens: of a deployment, or of what is said of its model.
fn price(params: &mut Fields<'_>, info: &mut Fields<'_>, field: &str) -> Option<u64> {
    let micro = |dollars: f64| (dollars * 1e12).round();
    let allowed = |dollars: f64| (0.0..=PRICE_MAX as f64).contains(&micro(dollars));
    let what = "a price in dollars per token that Weir takes";
    let dollars = match params.take(field) {
        Some(_) => params.number(field, allowed, what),
        None => info.number(field, allowed, what),
    }?;
    // In bounds, which a double holds exactly.
    Some(micro(dollars) as u64)
}

/// A time given in seconds.
fn seconds(fields: &mut Fields<'_>, field: &str) -> Option<prost_types::Duration> {
    fields.number(field, |time| duration(time).is_some(), "a time in seconds above zero").and_then(duration)
}

/// Seconds as a duration; none for what is no time.
fn duration(seconds: f64) -> Option<prost_types::Duration> {
    let time = std::time::Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero())?;
    prost_types::Duration::try_from(time).ok()
}

#[cfg(test)]
mod tests;
