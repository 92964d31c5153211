//! Limits and usage, asked of the control plane while gateways come and go.

use http::StatusCode;
use mock_llm::Config;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::stack::Stack;

const CHAT: &str = r#"{"model":"m","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

async fn json(stack: &Stack, args: &[&str]) -> Value {
    let out = stack.weir(&[args, &["-o", "json"]].concat()).await;
    serde_json::from_str(&out).expect("JSON")
}

#[tokio::test]
async fn usage_and_limits_are_asked_of_the_control_plane_alone() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let mock = mock(Config { models: vec!["m".into()], ..Config::default() }, &end).await;
    let manifest = format!(
        "kind: pool\nname: p\nspec: {{}}\n\
         ---\nkind: backend\nname: b\nspec: {{ pool: p, url: \"http://{}\", models: {{ m: \"\" }} }}\n\
         ---\nkind: model\nname: m\nspec: {{ pool: p }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 600, burst_multiplier: 2 }} }}\n",
        mock.address
    );
    let mut stack = Stack::start(2, &manifest).await;
    for k in 0..2 {
        let answer = stack.client(k).chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    let usage = ["usage", "--by", "tenant"];
    eventually("all is settled", || async {
        let told = json(&stack, &usage).await;
        told["rows"][0]["tenant"] == "acme" && told["total"]["requests"] == 2
    })
    .await;
    let table = stack.weir(&usage).await;
    assert!(table.starts_with("TENANT  REQUESTS") && table.contains("acme    2"), "{table}");
    assert!(table.contains("COST leaves out models without a price"), "{table}");
    let explain = ["limits", "explain", "--key", "acme-key", "--model", "m"];
    let limit = json(&stack, &explain).await["limits"][0].clone();
    assert_eq!(
        (&limit["limit"], &limit["period"], &limit["burst"]),
        (&600.into(), &"minute".into(), &1200.into())
    );

    // Either gateway answers, and one that is killed is passed over.
    stack.gateways[0].kill().await;
    for _ in 0..4 {
        assert_eq!(json(&stack, &usage).await["total"]["requests"], 2);
    }
    stack.weir(&["key", "revoke", "acme-key"]).await;
    let (code, _, err) = stack.try_weir(&explain).await;
    assert!(code == 1 && err.contains("revoked"), "{code}: {err}");
    stack.gateways[1].kill().await;
    eventually("the control plane knows that both are gone", || async {
        let (code, out, err) = stack.try_weir(&usage).await;
        assert_eq!((code, out.as_str()), (1, ""), "nobody can know: {err}");
        err.contains("no gateway is connected") && err.contains("start weir-gateway")
    })
    .await;
}
