//! The answers to wrong requests.

use http::{Method, StatusCode};
use mock_llm::Config;
use tokio_util::sync::CancellationToken;
use weir_tests::cluster::{Resources, gateway, gateway_with, mock};

fn mock_config() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

#[tokio::test]
async fn each_mistake_gets_its_status_and_an_openai_body() {
    let end = CancellationToken::new();
    let mocks = [mock(mock_config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let good = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
    let cases: [(&str, &str, StatusCode); 7] = [
        ("unknown model", r#"{"model":"nope","messages":[]}"#, StatusCode::NOT_FOUND),
        ("not JSON", "{", StatusCode::BAD_REQUEST),
        ("empty", "", StatusCode::BAD_REQUEST),
        ("no model", r#"{"messages":[]}"#, StatusCode::BAD_REQUEST),
        ("duplicate", r#"{"model":"gpt-4.1","mod\u0065l":"other","messages":[]}"#, StatusCode::BAD_REQUEST),
        ("fraction", r#"{"model":"gpt-4.1","max_tokens":1.5,"messages":[]}"#, StatusCode::BAD_REQUEST),
        ("trailing", r#"{"model":"gpt-4.1","messages":[]}x"#, StatusCode::BAD_REQUEST),
    ];
    for (name, body, status) in cases {
        let answer = gw.client.chat(body).await;
        assert_eq!(answer.status, status, "{name}");
        let error = &answer.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{name}: {error}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{name}: {error}");
        assert!(answer.headers.contains_key("x-request-id"), "{name}");
    }
    for key in ["", "wrong", "weir_test_key_"] {
        let answer = gw.client.with_key(key).chat(good).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{key:?}");
        assert_eq!(answer.error_code(), "invalid_api_key");
    }
    let answer = gw.client.ask(Method::POST, "/v1/nothing", "{}").await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(answer.json()["error"]["message"], "Invalid URL (POST /v1/nothing).");
    let answer = gw.client.ask(Method::GET, "/v1/chat/completions", "").await;
    assert_eq!(
        (answer.status, &answer.headers["allow"]),
        (StatusCode::METHOD_NOT_ALLOWED, &"POST".parse().unwrap())
    );
    assert_eq!(mocks[0].handle.counters().requests, 0, "none of these reached a backend");
    assert_eq!(gw.client.chat(good).await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_body_above_the_bound_is_413() {
    let end = CancellationToken::new();
    let mocks = [mock(mock_config(), &end).await];
    let gw =
        gateway_with(&Resources::in_front_of(&mocks), |config| config.common.max_body_mib = Some(1)).await;
    let answer = gw.client.chat(&"x".repeat((1 << 20) + 1)).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let message = answer.json()["error"]["message"].as_str().expect("text").to_owned();
    assert!(message.contains("1048576 bytes") && message.contains("operator"), "{message}");
    assert_eq!(
        gw.client.chat(&"x".repeat(1 << 20)).await.status,
        StatusCode::BAD_REQUEST,
        "read, and no JSON"
    );
}

#[tokio::test]
async fn a_body_as_large_as_openai_takes_is_taken() {
    let end = CancellationToken::new();
    let mocks = [mock(mock_config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let answer = gw.client.chat(&"x".repeat(50 << 20)).await;
    assert_eq!((answer.status, answer.error_code().as_str()), (StatusCode::BAD_REQUEST, "invalid_json"));
    assert_eq!(gw.client.chat(&"x".repeat((50 << 20) + 1)).await.status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn models_are_the_gateways_own_list() {
    let end = CancellationToken::new();
    let mocks = [mock(mock_config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let list = gw.client.ask(Method::GET, "/v1/models", "").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "gpt-4.1");
}
