use proptest::prelude::*;
use weir_proto::{manifest, resource};

use super::*;

const CONFIG: &str = r#"
model_list:
  - model_name: gpt-4o
    litellm_params:
      model: openai/gpt-4o
      api_key: os.environ/OPENAI_KEY_EU
      api_base: https://eu.api.openai.com/v1
      rpm: 100
      weight: 3
  - model_name: gpt-4o
    litellm_params: { model: gpt-4o, rpm: 200, timeout: 45, input_cost_per_token: 0.0000025, cache_read_input_token_cost: 1.25e-06 }
    model_info: { output_cost_per_token: 0.00001, mode: chat }
  - model_name: Llama 3
    litellm_params:
      model: hosted_vllm/meta-llama/Llama-3
      api_base: http://10.0.0.5:8000/v1
      api_key: sk-literal-secret
      max_parallel_requests: 16
  - model_name: claude-bedrock
    litellm_params: { model: bedrock/anthropic.claude-v2, aws_region_name: us-east-1 }
  - model_name: "openai/*"
    litellm_params: { model: "openai/*" }
router_settings:
  routing_strategy: least-busy
  num_retries: 2
  allowed_fails: 3
  cooldown_time: 30
  fallbacks: [{ gpt-4o: ["Llama 3"] }, { gpt-4o-mini: ["gpt-4o"] }]
litellm_settings: { drop_params: true, request_timeout: 120 }
general_settings: { master_key: sk-1234 }
"#;

fn imported() -> Import {
    import(CONFIG, "config.yaml").expect("readable")
}

fn note<'a>(import: &'a Import, path: &str) -> &'a str {
    let found = import.notes.iter().find(|note| note.path == path);
    &found.unwrap_or_else(|| panic!("nothing said of {path}: {:#?}", import.notes)).text
}

#[test]
fn the_result_is_valid_and_reads_back() {
    let import = imported();
    for wire in &import.resources {
        resource::Resource::try_from(wire).unwrap_or_else(|e| panic!("{}: {e:?}", wire.name));
    }
    let text = manifest::to_yaml(&import.resources);
    let back = manifest::parse(&text, "imported").expect("reads back");
    assert_eq!(back, import.resources);
}

#[test]
fn deployments_become_backends_that_serve_the_model() {
    let import = imported();
    let backends: Vec<_> = import
        .resources
        .iter()
        .filter_map(|r| match &r.spec {
            Some(Spec::Backend(spec)) => Some((r.name.as_str(), spec)),
            _ => None,
        })
        .collect();
    let names: Vec<_> = backends.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["eu.api.openai.com", "api.openai.com", "10.0.0.5"]);
    assert_eq!(backends[0].1.url, "https://eu.api.openai.com");
    assert_eq!((backends[0].1.weight, backends[0].1.credential.as_str()), (Some(3), "env:OPENAI_KEY_EU"));
    assert_eq!(backends[1].1.credential, "env:OPENAI_API_KEY", "LiteLLM's own default");
    let said = note(&import, "model_list[0].litellm_params.api_key");
    assert!(said.contains("OPENAI_KEY_EU") && said.contains("--credential-env"), "{said}");
    assert_eq!(backends[2].1.models["llama-3"], "meta-llama/Llama-3");
    assert_eq!(backends[2].1.max_concurrency, Some(16));
}

#[test]
fn models_keep_their_name_price_limit_and_fallbacks() {
    let import = imported();
    let model = |name: &str| {
        import.resources.iter().find_map(|r| match &r.spec {
            Some(Spec::Model(spec)) if r.name == name => Some(spec.clone()),
            _ => None,
        })
    };
    let gpt = model("gpt-4o").expect("there");
    assert_eq!((gpt.input_price_micro_dollars, gpt.output_price_micro_dollars), (2_500_000, 10_000_000));
    assert_eq!(gpt.cached_input_price_micro_dollars, Some(1_250_000));
    assert_eq!(gpt.cache_write_price_micro_dollars, None, "the input price");
    assert_eq!(gpt.limits, None, "limits are the deployments' own");
    assert_eq!(gpt.fallbacks, ["llama-3"]);
    assert_eq!(gpt.timeouts.and_then(|t| t.total).map(|d| d.seconds), Some(45));
    assert_eq!(model("llama-3").expect("there").client_name, "Llama 3");
    assert!(model("claude-bedrock").is_none());
}

#[test]
fn what_a_deployment_limits_is_an_account_of_its_own() {
    let import = imported();
    let limits: Vec<_> = import
        .resources
        .iter()
        .filter_map(|r| match &r.spec {
            Some(Spec::Limit(spec)) => Some((spec.selector.clone()?, spec.rates?.requests_per_minute?)),
            _ => None,
        })
        .map(|(selector, rate)| (selector.account, selector.model, rate))
        .collect();
    let of = |account: &str, rate| (account.to_owned(), "gpt-4o".to_owned(), rate);
    assert_eq!(limits, [of("api.openai.com", 200), of("eu.api.openai.com", 100)]);
    let backends = import.resources.iter().filter_map(|r| match &r.spec {
        Some(Spec::Backend(spec)) => Some((r.name.as_str(), spec.account.as_str())),
        _ => None,
    });
    let accounts = ["eu.api.openai.com", "api.openai.com"].map(|name| (name, name));
    assert_eq!(backends.collect::<Vec<_>>(), [accounts[0], accounts[1], ("10.0.0.5", "")]);
    assert!(note(&import, "model_list[1].litellm_params").contains("the account api.openai.com"));
}

#[test]
fn slots_of_one_deployment_are_not_shared_with_another_model() {
    let entry = |name: &str| {
        format!(
            "  - model_name: {name}\n    litellm_params: {{ model: openai/{name}, api_key: os.environ/K, \
             max_parallel_requests: 4, tpm: 12.5 }}\n"
        )
    };
    let import = import(&format!("model_list:\n{}{}", entry("a"), entry("b")), "f.yaml").expect("readable");
    let backends = import.resources.iter().filter(|r| matches!(r.spec, Some(Spec::Backend(_))));
    assert_eq!(backends.count(), 2);
    assert!(note(&import, "model_list[0].litellm_params.tpm").contains("a whole number"));
}

#[test]
fn what_is_left_out_is_said_and_secrets_are_not_repeated() {
    let import = imported();
    assert!(note(&import, "model_list[3]").contains("'bedrock'"));
    assert!(note(&import, "model_list[4]").contains("wildcards"));
    assert!(note(&import, "model_list[1].model_info.mode").contains("not carried over"));
    assert!(note(&import, "model_list[2].litellm_params.api_key").contains("HOST_10_0_0_5_API_KEY"));
    assert!(note(&import, "general_settings.master_key").contains("not carried over"));
    assert!(note(&import, "litellm_settings.drop_params").contains("not carried over"));
    assert!(note(&import, "router_settings.fallbacks").contains("gpt-4o-mini"));
    let everything = format!("{import:?}{}", manifest::to_yaml(&import.resources));
    assert!(!everything.contains("sk-literal-secret") && !everything.contains("sk-1234"));
}

#[test]
fn a_file_of_something_else_is_refused_by_name() {
    assert!(matches!(import("kind: pool", "f.yaml"), Err(Unreadable::NoModels(f)) if f == "f.yaml"));
    assert!(matches!(import("a: [", "f.yaml"), Err(Unreadable::Yaml(..))));
}

#[test]
fn what_weir_does_not_take_is_said_and_not_made_up() {
    let text = r#"
model_list:
  - model_name: m
    litellm_params: { model: openai/m, api_base: "http://", input_cost_per_token: 1e9, output_cost_per_token: -1 }
"#;
    let import = import(text, "config.yaml").expect("readable");
    let noted =
        |part: &str| import.notes.iter().any(|note| format!("{} {}", note.path, note.text).contains(part));
    assert!(
        noted("input_cost_per_token not carried over") && noted("output_cost_per_token not carried over")
    );
    assert!(noted("has to be corrected by hand: backend.url"), "{:?}", import.notes);
    let Some(Spec::Model(model)) = import.resources.iter().find_map(|r| match &r.spec {
        Some(spec @ Spec::Model(_)) => Some(spec),
        _ => None,
    }) else {
        panic!("no model")
    };
    assert_eq!((model.input_price_micro_dollars, model.output_price_micro_dollars), (0, 0));
}

/// The pool's clocks in seconds: first byte, idle, total.
fn clocks_of(import: &Import) -> [Option<i64>; 3] {
    let pool = import.resources.iter().find_map(|r| match &r.spec {
        Some(Spec::Pool(spec)) => Some(spec.clone()),
        _ => None,
    });
    let clocks = pool.expect("a pool").timeouts.expect("clocks");
    [clocks.first_byte, clocks.idle, clocks.total].map(|time| time.map(|time| time.seconds))
}

#[test]
fn clocks_are_those_of_litellm() {
    let with = |params: &str, rest: &str| {
        let list =
            "model_list:\n  - model_name: m\n    litellm_params: { model: openai/m, api_key: os.environ/K";
        import(&format!("{list}{params} }}\n{rest}"), "f.yaml").expect("readable")
    };
    let bare = with("", "");
    assert_eq!(clocks_of(&bare), [None, None, Some(6000)], "LiteLLM's own default");
    assert!(note(&bare, "litellm_settings.request_timeout").contains("6000 s"));

    let set = with("", "router_settings: { timeout: 300, stream_timeout: 60 }\n");
    assert_eq!(clocks_of(&set), [Some(60), Some(60), Some(300)]);
    assert!(note(&set, "router_settings.timeout").contains("ends streams too"));

    let silence = with("", "router_settings: { stream_timeout: 60 }\n");
    assert_eq!(clocks_of(&silence), [Some(60), Some(60), Some(6000)]);

    let model_of = |import: &Import| {
        let mut models = import.resources.iter().filter_map(|r| match &r.spec {
            Some(Spec::Model(spec)) => Some(spec.timeouts),
            _ => None,
        });
        let clocks = models.next().expect("a model")?;
        Some([clocks.first_byte, clocks.idle, clocks.total].map(|time| time.map(|time| time.seconds)))
    };
    let own = with(", timeout: 600, stream_timeout: 90", "litellm_settings: { request_timeout: 120 }\n");
    assert_eq!(clocks_of(&own), [Some(120); 3], "without another, streams go by the one for all answers");
    assert_eq!(model_of(&own), Some([Some(90), Some(90), Some(600)]));
    assert_eq!(model_of(&with(", timeout: 600", "")), Some([Some(600); 3]));
    let of_all = with(", timeout: 600", "router_settings: { stream_timeout: 60 }\n");
    assert_eq!(
        model_of(&of_all),
        Some([None, None, Some(600)]),
        "that of all streams comes before a timeout"
    );
    assert_eq!((model_of(&bare), model_of(&set)), (None, None));
    let said = own.notes.iter().filter(|note| note.text.contains("ends streams too"));
    assert_eq!(said.count(), 1, "once is enough");
    for wire in bare.resources.iter().chain(&set.resources).chain(&own.resources) {
        resource::Resource::try_from(wire).unwrap_or_else(|e| panic!("{}: {e:?}", wire.name));
    }
}

/// Where each backend sends chat completions, and the model's name there, by the name clients ask for.
fn asked(import: &Import) -> BTreeMap<String, (String, String)> {
    let mut asked = BTreeMap::new();
    for wire in &import.resources {
        let Some(Spec::Backend(spec)) = &wire.spec else { continue };
        let resource = resource::Resource::try_from(wire).unwrap_or_else(|e| panic!("{}: {e}", wire.name));
        let resource::Spec::Backend(backend) = resource.spec else { panic!("a backend") };
        let url = format!("{}{}", spec.url, backend.api_path("/chat/completions"));
        for (model, upstream) in &spec.models {
            let upstream = if upstream.is_empty() { model.clone() } else { upstream.clone() };
            asked.insert(model.clone(), (url.clone(), upstream));
        }
    }
    asked
}

/// A file with one deployment, named `m`, of these parameters.
fn one(params: &str) -> Import {
    import(&format!("model_list: [{{model_name: m, litellm_params: {params}}}]"), "f.yaml").expect("readable")
}

fn model_of(import: &Import) -> v1::ModelSpec {
    let mut models = import.resources.iter().filter_map(|r| match &r.spec {
        Some(Spec::Model(spec)) => Some(spec.clone()),
        _ => None,
    });
    models.next_back().unwrap_or_else(|| panic!("no model: {:#?}", import.notes))
}

#[test]
fn apis_without_v1_and_known_prefixes_are_asked_where_litellm_asks_them() {
    for (params, url, model) in [
        (
            "{model: openai/glm-4.7, api_base: 'https://open.bigmodel.cn/api/paas/v4'}",
            "https://open.bigmodel.cn/api/paas/v4/chat/completions",
            "glm-4.7",
        ),
        (
            "{model: openai/gemini-2.5-flash, api_base: 'https://generativelanguage.googleapis.com/v1beta/openai/'}",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
            "gemini-2.5-flash",
        ),
        (
            "{model: moonshot/kimi-k3, api_base: 'https://api.moonshot.ai/v1'}",
            "https://api.moonshot.ai/v1/chat/completions",
            "kimi-k3",
        ),
        ("{model: zai/glm-4.7}", "https://api.z.ai/api/paas/v4/chat/completions", "glm-4.7"),
        ("{model: perplexity/sonar}", "https://api.perplexity.ai/chat/completions", "sonar"),
        (
            "{model: azure/my-deployment, api_base: 'https://r.openai.azure.com', api_version: '2024-10-21'}",
            "https://r.openai.azure.com/openai/v1/chat/completions",
            "my-deployment",
        ),
        (
            "{model: llama, custom_llm_provider: groq}",
            "https://api.groq.com/openai/v1/chat/completions",
            "llama",
        ),
        ("{model: openai/x, base_url: 'http://10.0.0.1/v1'}", "http://10.0.0.1/v1/chat/completions", "x"),
        (
            "{model: gemini/gemini-2.5-pro}",
            "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
            "gemini-2.5-pro",
        ),
        ("{model: claude-3-5-sonnet}", "https://api.anthropic.com/v1/chat/completions", "claude-3-5-sonnet"),
    ] {
        let import = one(params);
        assert_eq!(asked(&import)["m"], (url.to_owned(), model.to_owned()), "{params}");
    }
    assert!(
        note(&one("{model: gemini/x}"), "model_list[0].litellm_params.model").contains("OpenAI-compatible")
    );
    let azure = one("{model: azure/d, api_base: 'https://r.openai.azure.com', api_version: v}");
    assert!(note(&azure, "model_list[0].litellm_params.model").contains("/openai/v1"));
    assert_eq!(note(&azure, "model_list[0].litellm_params.api_version"), "not carried over");
}

#[test]
fn nothing_is_sent_to_a_company_that_the_file_does_not_name() {
    // Whoever serves it, or where, is not said: nothing is made of it.
    for params in [
        "{model: some-model}",
        "{model: meta-llama/Llama-3}",
        "{model: azure/gpt-4o}",
        "{model: hosted_vllm/m}",
        "{model: bedrock/anthropic.claude}",
        "{model: vertex_ai/gemini-2.5-pro}",
        "{model: gemini-2.5-pro}",
        "{model: gpt-4o, custom_llm_provider: my_own}",
        "{model: gpt-4o, custom_llm_provider: [groq]}",
        "{model: openai/gpt-4o, api_base: os.environ/BASE}",
        "{model: openai/gpt-4o, base_url: os.environ/BASE}",
        "{model: openai/gpt-4o, api_base: [x]}",
        "{model: openai/gpt-4o, litellm_credential_name: elsewhere}",
        "{model: anthropic/claude, api_base: 'https://messages.example'}",
        "{model: os.environ/MODEL, api_base: 'http://10.0.0.1/v1'}",
        "{model: [a]}",
    ] {
        let import = one(params);
        assert_eq!(asked(&import), BTreeMap::new(), "{params}");
        assert!(note(&import, "model_list[0]").starts_with("not carried over: "), "{params}");
    }
    // An unknown prefix is part of the name, which is said.
    let import = one("{model: wonder/m-1, api_base: 'https://wonder.example/v1'}");
    assert_eq!(asked(&import)["m"].1, "wonder/m-1");
    assert!(note(&import, "model_list[0].litellm_params.model").contains("'wonder/m-1'"));
    let import = one("{model: openai/m, api_base: 'http://10.0.0.1/v1'}");
    assert!(
        note(&import, "model_list[0].litellm_params.api_key").contains("OPENAI_API_KEY is sent to 10.0.0.1")
    );
}

#[test]
fn addresses_may_stand_in_defaults_credentials_and_variables_of_the_file() {
    let deployments = "model_list:\n  - {model_name: a, litellm_params: {model: openai/a}}\n  - {model_name: b, \
                       litellm_params: {model: openai/b, litellm_credential_name: here}}\n  - {model_name: c, \
                       litellm_params: {model: groq/c}}\n  - {model_name: d, litellm_params: {model: os.environ/D, \
                       api_base: os.environ/BASE}}\n";
    let shared = "credential_list:\n  - {credential_name: here, credential_values: {api_base: 'http://10.0.0.2/v1', api_key: \
                  os.environ/B_API_KEY}}\n  - {credential_name: broken}\nenvironment_variables: {OPENAI_API_BASE: \
                  'http://10.0.0.1/v1', GROQ_API_BASE: 'http://10.0.0.3/v1', D: deepseek/d, BASE: 'http://10.0.0.4/v1'}\n";
    let import = import(&format!("{deployments}{shared}"), "f.yaml").expect("readable");
    let urls: Vec<String> = asked(&import).into_values().map(|(url, _)| url).collect();
    assert_eq!(urls, [1, 2, 3, 4].map(|n| format!("http://10.0.0.{n}/v1/chat/completions")));
    assert_eq!(asked(&import)["d"].1, "d");
    assert!(note(&import, "credential_list[1]").contains("credential_values"));
    let by_default = "router_settings: {default_litellm_params: {api_base: 'http://10.0.0.9/v1'}}\n";
    let import = super::import(
        &format!("{}{by_default}", &deployments[..deployments.find("  - {model_name: b").expect("b")]),
        "f.yaml",
    );
    assert_eq!(asked(&import.expect("readable"))["a"].0, "http://10.0.0.9/v1/chat/completions");
}

#[test]
fn numbers_are_read_from_text_and_from_variables_of_the_file() {
    let import = import(
        "model_list:\n  - model_name: m\n    litellm_params: {model: hosted_vllm/m, api_base: 'http://10.0.0.1:8000/v1', \
         timeout: '300', stream_timeout: os.environ/STREAM, rpm: '60', tpm: 1000.0, weight: '3', \
         max_parallel_requests: '8'}\n    model_info: {input_cost_per_token: '0.000001', output_cost_per_token: '2e-6'}\n\
         router_settings: {num_retries: '2', cooldown_time: '30', timeout: os.environ/T}\n\
         environment_variables: {STREAM: 20}\n",
        "f.yaml",
    )
    .expect("readable");
    let model = model_of(&import);
    assert_eq!((model.input_price_micro_dollars, model.output_price_micro_dollars), (1_000_000, 2_000_000));
    let timeouts = model.timeouts.expect("clocks");
    assert_eq!(
        (timeouts.total.map(|t| t.seconds), timeouts.first_byte.map(|t| t.seconds)),
        (Some(300), Some(20))
    );
    let rates = import.resources.iter().find_map(|r| match &r.spec {
        Some(Spec::Limit(spec)) => spec.rates,
        _ => None,
    });
    let rates = rates.expect("a limit");
    assert_eq!((rates.requests_per_minute, rates.tokens_per_minute), (Some(60), Some(1000)));
    let Some(Spec::Backend(backend)) = &import.resources[1].spec else { panic!("{:?}", import.resources[1]) };
    assert_eq!((backend.weight, backend.max_concurrency), (Some(3), Some(8)));
    let Some(Spec::Pool(pool)) = &import.resources[0].spec else { panic!("{:?}", import.resources[0]) };
    assert_eq!(pool.retry_budget.expect("retries").max_attempts, 3);
    assert!(note(&import, "router_settings.timeout").contains("the value of T"));
}

#[test]
fn every_field_that_is_not_read_with_its_type_is_said() {
    let import = import(
        "model_list:\n  - model_name: m\n    tpm: 5\n    litellm_params: {model: openai/m, api_key: os.environ/OPENAI_API_KEY, \
         timeout: 30s, stream_timeout: 0, rpm: many, weight: 0, input_cost_per_token: free, api_base: null, \
         max_retries: 3, mock_response: hi}\n    model_info: [mode]\n  - model_name: n\n    litellm_params: {model: openai/n, \
         api_key: EMPTY}\n    model_info: {output_cost_per_token: [1], base_model: x}\n  - {model_name: 4, litellm_params: \
         {model: openai/o}}\n\
         router_settings: {num_retries: -1, allowed_fails: often, fallbacks: [{m: n}, text, {m: [n]}, {m: [n]}], \
         enable_pre_call_checks: true}\nlitellm_settings: {fallbacks: m}\ngeneral_settings: [x]\nguardrails: []\n",
        "f.yaml",
    )
    .expect("readable");
    let params = "model_list[0].litellm_params";
    for path in [
        "model_list[0].tpm".to_owned(),
        "model_list[0].model_info".to_owned(),
        format!("{params}.timeout"),
        format!("{params}.stream_timeout"),
        format!("{params}.rpm"),
        format!("{params}.weight"),
        format!("{params}.input_cost_per_token"),
        format!("{params}.max_retries"),
        format!("{params}.mock_response"),
        "model_list[1].model_info.output_cost_per_token".to_owned(),
        "model_list[1].model_info.base_model".to_owned(),
        "model_list[2]".to_owned(),
        "router_settings.num_retries".to_owned(),
        "router_settings.allowed_fails".to_owned(),
        "router_settings.fallbacks[0].m".to_owned(),
        "router_settings.fallbacks[1]".to_owned(),
        "router_settings.fallbacks".to_owned(),
        "router_settings.enable_pre_call_checks".to_owned(),
        "litellm_settings.fallbacks".to_owned(),
        "general_settings".to_owned(),
        "guardrails".to_owned(),
    ] {
        assert!(note(&import, &path).contains("not carried over"), "{path}: {}", note(&import, &path));
    }
    assert!(
        !import.notes.iter().any(|note| note.path.ends_with("api_base")),
        "null is as absent: {:?}",
        import.notes
    );
    assert!(note(&import, "model_list[1].litellm_params.api_key").contains("no key is sent"));
}

proptest! {
    /// Whatever a deployment holds, each of its fields is read or said, and nothing goes to OpenAI that is not OpenAI's.
    #[test]
    fn no_field_of_a_deployment_vanishes(
        model in prop_oneof![Just("openai/m"), Just("groq/m"), Just("odd/m"), Just("m"), Just("azure/m")],
        base in proptest::option::of(prop_oneof![Just("'http://10.0.0.1/v1'"), Just("os.environ/X"), Just("7"), Just("''")]),
        fields in proptest::collection::btree_map(
            prop_oneof![
                Just("timeout"), Just("stream_timeout"), Just("rpm"), Just("tpm"), Just("weight"), Just("foo"),
                Just("max_parallel_requests"), Just("input_cost_per_token"), Just("output_cost_per_token"),
            ],
            prop_oneof![
                Just("1"), Just("'1'"), Just("-1"), Just("x"), Just("[1]"), Just("{a: 1}"), Just("os.environ/X"), Just("true"),
                Just("0.5"), Just("1e300"),
            ],
            0..6,
        ),
    ) {
        let base = base.map(|base| format!(", api_base: {base}")).unwrap_or_default();
        let more: String = fields.iter().map(|(name, value)| format!(", {name}: {value}")).collect();
        let import = one(&format!("{{model: {model}{base}{more}}}"));
        let asked = asked(&import);
        let is_openais = asked.values().any(|(url, _)| url.contains("api.openai.com"));
        prop_assert!(!is_openais || model == "openai/m", "{model} {base}");
        if asked.is_empty() {
            prop_assert!(import.notes.iter().any(|note| note.path == "model_list[0]"), "{:?}", import.notes);
        } else {
            for (name, value) in fields {
                let path = format!("model_list[0].litellm_params.{name}");
                let refused = |note: &crate::import::Note| note.path == path && note.text.contains("not carried over");
                let said = import.notes.iter().any(refused);
                let is_read = matches!(value, "1" | "'1'")
                    || (value == "0.5" && (name.ends_with("timeout") || name.ends_with("token")));
                prop_assert_eq!(said, name == "foo" || !is_read, "{}: {}", path, value);
            }
        }
    }
}
