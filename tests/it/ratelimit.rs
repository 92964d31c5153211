//! Limit services beside gateways: one configuration, one set of buckets.

use http::StatusCode;
use mock_llm::Config;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_tests::cluster::mock;
use weir_tests::eventually;
use weir_tests::limits::Limits;
use weir_tests::stack::Stack;

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":1,"messages":[{"role":"user","content":"hi"}]}"#;

/// A tenant with a number of requests that hardly drain, and a rule by which a proxy consumes them.
fn manifest(backend: std::net::SocketAddr, requests: u32) -> String {
    format!(
        "kind: pool\nname: chat\nspec: {{}}\n\
         ---\nkind: backend\nname: only\nspec: {{ pool: chat, url: \"http://{backend}\", \
         max_concurrency: 10000, models: {{ gpt-4.1: \"\" }} }}\n\
         ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n\
         ---\nkind: tenant\nname: acme\nspec: {{ limits: {{ requests_per_minute: 1, burst_multiplier: {requests} }} }}\n\
         ---\nkind: descriptor_rule\nname: edge-tenant\nspec: {{ domain: edge, entries: [{{ key: tenant }}], \
         consumes: [{{ tenant: \"{{tenant}}\" }}] }}\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_bucket_refuses_at_a_gateway_and_at_two_limit_services() {
    let config = Config { models: vec!["gpt-4.1".into()], slots: 4096, ..Config::default() };
    let mock = mock(config, &CancellationToken::new()).await;
    let stack = Stack::start(2, &manifest(mock.address, 100)).await;
    let services = [stack.limit_service(0).await, stack.limit_service(1).await];
    let limits = [Limits::new(services[0].text("grpc")), Limits::new(services[1].text("grpc"))];
    for one in &limits {
        eventually("the rules arrive", || async {
            !one.ask(&[("tenant", "acme")], 0).await.statuses.is_empty()
                && one.ask(&[("tenant", "acme")], 0).await.statuses[0].current_limit.is_some()
        })
        .await;
    }
    // Some at each first: in a race one kind may be fast enough to take everything.
    for i in 0..30 {
        assert_eq!(stack.client(i % 2).chat(CHAT).await.status, StatusCode::OK);
        assert!(limits[i % 2].passes("acme").await);
    }
    let mut calls = JoinSet::new();
    for i in 0..400 {
        let (client, limits) = (stack.client(i % 2), limits[i % 2].clone());
        calls.spawn(async move {
            if i % 4 < 2 {
                match client.chat(CHAT).await.status {
                    StatusCode::OK => ("gateway", true),
                    StatusCode::TOO_MANY_REQUESTS => ("gateway", false),
                    other => panic!("{other}"),
                }
            } else {
                ("limits", limits.passes("acme").await)
            }
        });
    }
    let answers = calls.join_all().await;
    let granted = |at: &str| answers.iter().filter(|(by, ok)| *by == at && *ok).count();
    assert_eq!(
        granted("gateway") + granted("limits"),
        40,
        "of what 60 left; {} at gateways",
        granted("gateway")
    );
    assert_eq!(stack.client(0).chat(CHAT).await.status, StatusCode::TOO_MANY_REQUESTS);
    for one in &limits {
        assert!(!one.passes("acme").await);
    }

    let shown = stack.weir(&["gateways", "--output", "json"]).await;
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let roles: Vec<&str> =
        shown["gateways"].as_array().expect("a list").iter().filter_map(|g| g["role"].as_str()).collect();
    let count = |role: &str| roles.iter().filter(|r| **r == role).count();
    assert_eq!((count("gateway"), count("limit-service")), (2, 2), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_waited_for_on_limit_services_and_a_restart_without_the_control_plane_keeps_it() {
    let mut stack = Stack::start(1, &manifest(([127, 0, 0, 1], 9).into(), 10)).await;
    let mut service = stack.limit_service(0).await;
    eventually("listed", || async { stack.weir(&["gateways"]).await.contains("limit-service") }).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("more.yaml");
    let text =
        "kind: tenant\nname: other\nspec: { limits: { requests_per_minute: 1, burst_multiplier: 2 } }\n";
    std::fs::write(&file, text).expect("written");
    stack.weir(&["apply", "-f", file.to_str().expect("UTF-8"), "--set", "more"]).await;
    let limits = Limits::new(service.text("grpc"));
    let status = limits.ask(&[("tenant", "other")], 0).await.statuses.remove(0);
    assert_eq!(status.limit_remaining, 2, "in force once the command returned");

    stack.control_plane.kill().await;
    service.kill().await;
    let service = stack.limit_service(0).await;
    let limits = Limits::new(service.text("grpc"));
    assert!(limits.passes("other").await && limits.passes("other").await);
    assert!(!limits.passes("other").await);
}
