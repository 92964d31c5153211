//! The metrics that alerts and the dashboard use are those that the processes have.

use std::collections::BTreeSet;
use std::path::Path;

use http::{Method, StatusCode};
use mock_llm::Config;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::process::Process;
use weir_tests::stack::Stack;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

/// Every metric name of ours in a text, as the processes register it.
fn names(text: &str) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let ours = text.split(word).filter(|name| name.starts_with("weir_") && name.len() > "weir_".len());
    let of_kind = |name: &str| {
        let suffix = ["_total", "_bucket", "_sum", "_count"].into_iter().find_map(|s| name.strip_suffix(s));
        suffix.unwrap_or(name).to_owned()
    };
    ours.map(of_kind).collect()
}

/// Metrics with labels are there from their first event on.
async fn told(stack: &Stack, limits: &Process) -> BTreeSet<String> {
    let mut told = BTreeSet::new();
    for (process, address) in [(&stack.gateways[0], "ops"), (&stack.control_plane, "http"), (limits, "ops")] {
        let address = process.text(address).parse().expect("an address");
        let page = Client::new(address, "").ask(Method::GET, "/metrics", "").await;
        let types = page.text().lines().filter_map(|line| line.strip_prefix("# TYPE ").map(names));
        told.extend(types.flatten());
    }
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_the_dashboard_ask_for_figures_that_there_are() {
    let config = Config { models: vec!["gpt-4.1".into()], ..Config::default() };
    let mock = mock(config, &CancellationToken::new()).await;
    let manifest = format!(
        "kind: pool\nname: chat\nspec: {{}}\n\
         ---\nkind: backend\nname: b\nspec: {{ pool: chat, url: \"http://{}\", models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{}}\n",
        mock.address
    );
    let stack = Stack::start(1, &manifest).await;
    let limits = stack.limit_service(0).await;
    eventually("served", || async { stack.client(0).chat(CHAT).await.status == StatusCode::OK }).await;
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    for file in ["prometheus/rules.yml", "grafana/weir.json"] {
        let asked = names(&std::fs::read_to_string(deploy.join(file)).expect(file));
        assert!(asked.len() > 5, "{file}: {asked:?}");
        eventually(&format!("what {file} asks for: {asked:?}"), || async {
            asked.is_subset(&told(&stack, &limits).await)
        })
        .await;
    }
}
