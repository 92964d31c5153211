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
    litellm_params: { model: gpt-4o, rpm: 200, timeout: 45, input_cost_per_token: 0.0000025 }
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
    assert!(note(&import, "model_list[0].litellm_params.tpm").contains("whole numbers"));
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
