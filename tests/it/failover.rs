//! One backend fails: nobody notices, as long as nothing was sent.

use http::StatusCode;
use mock_llm::{Config, ErrorStatus, Faults};
use tokio_util::sync::CancellationToken;
use weir_tests::cluster::{Resources, gateway, mock};

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;

fn config() -> Config {
    Config { models: vec!["gpt-4.1".into()], ..Config::default() }
}

#[tokio::test]
async fn a_dead_backend_costs_no_request_and_is_left_alone() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await, mock(config(), &end).await];
    let resources = Resources::in_front_of(&mocks);
    let error = ErrorStatus { status: 500, probability: 1.0, retry_after_s: None };
    mocks[1].handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    let gw = gateway(&resources, None).await;
    for i in 0..60 {
        let answer = gw.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "request {i}: {}", answer.text());
    }
    let tried = mocks[1].handle.counters().requests;
    assert!(tried <= 3, "ejected after three failures in a row, tried {tried} times");
}

#[tokio::test]
async fn a_clients_own_mistake_is_never_held_against_a_backend() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let error = ErrorStatus { status: 400, probability: 1.0, retry_after_s: None };
    mocks[0].handle.set_faults(Faults { error_status: Some(error), ..Faults::default() }).expect("valid");
    for _ in 0..10 {
        assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::BAD_REQUEST);
    }
    mocks[0].handle.clear_faults();
    assert_eq!(gw.client.chat(CHAT).await.status, StatusCode::OK);
    assert_eq!(mocks[0].handle.counters().requests, 11, "each was sent once");
}

#[tokio::test]
async fn with_every_backend_down_the_answer_is_ours_and_attempts_are_bounded() {
    let end = CancellationToken::new();
    let mocks = [mock(config(), &end).await, mock(config(), &end).await];
    let gw = gateway(&Resources::in_front_of(&mocks), None).await;
    let error = ErrorStatus { status: 503, probability: 1.0, retry_after_s: Some(1) };
    for m in &mocks {
        let faults = Faults { error_status: Some(error.clone()), ..Faults::default() };
        m.handle.set_faults(faults).expect("valid");
    }
    for _ in 0..10 {
        let answer = gw.client.chat(CHAT).await;
        assert!(answer.status.is_server_error(), "never 429 for our trouble: {}", answer.status);
    }
    let attempts: u64 = mocks.iter().map(|m| m.handle.counters().requests).sum();
    assert!(attempts <= 20, "{attempts} attempts for 10 requests");
}
