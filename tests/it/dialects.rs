//! Answers of backends with other dialects: the counted usage and its price.

use http::{Method, StatusCode};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{Gateway, OPS_TOKEN, Resources, gateway};
use weir_tests::eventually;
use weir_tests::scripted::{Asked, Scripted, answer, completion, stream_head};

/// A gateway in front of a backend of this dialect that answers requests with these bytes. Probes pass, and none of
/// them asks for tokens.
async fn in_front_of(dialect: v1::Dialect, bytes: Vec<u8>, end: &CancellationToken) -> Gateway {
    let backend = Scripted::start(end, move |asked: Asked, mut wire| {
        let bytes = match asked.head.starts_with("POST") {
            true => bytes.clone(),
            false => answer(200, &[], b""),
        };
        async move {
            wire.send(bytes).await;
            None
        }
    })
    .await;
    let mut resources = Resources::at(&[backend.address]);
    let health = v1::HealthProfile { paid_probes_per_hour: Some(0), ..Default::default() };
    resources.put("chat", Spec::Pool(v1::PoolSpec { health: Some(health), ..Default::default() }));
    resources.rebuild("b0", |spec| {
        let Spec::Backend(spec) = spec else { panic!("a backend") };
        spec.set_dialect(dialect);
    });
    let model = v1::ModelSpec {
        pool: "chat".into(),
        input_price_micro_dollars: 2_000_000,
        output_price_micro_dollars: 6_000_000,
        cached_input_price_micro_dollars: Some(300_000),
        cache_write_price_micro_dollars: Some(2_500_000),
        ..Default::default()
    };
    resources.put("gpt-4.1", Spec::Model(model));
    gateway(&resources, None).await
}

/// The usage, once there is some.
async fn used(gateway: &Gateway) -> (Value, Value, Value) {
    let ask = || async {
        let client = Client::new(gateway.running.ops_address, OPS_TOKEN);
        client.ask(Method::GET, "/usage", "").await.json()["total"].clone()
    };
    eventually("it is settled", || async { ask().await["requests"] == 1 }).await;
    let total = ask().await;
    (total["input_tokens"].clone(), total["output_tokens"].clone(), total["cost_micro_dollars"].clone())
}

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"},{"role":"user","content":[{"type":"image_url","image_url":{"url":"https://h/a.png"}}]}]}"#;

#[tokio::test]
async fn cached_tokens_and_hidden_reasoning_are_counted_at_their_prices() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    for (dialect, usage, expected) in [
        (
            v1::Dialect::Xai,
            r#"{"prompt_tokens":2341,"completion_tokens":31,"total_tokens":3108,"prompt_tokens_details":{"cached_tokens":2000},"completion_tokens_details":{"reasoning_tokens":736}}"#,
            (2341, 767, 341 * 2 + 600 + 767 * 6),
        ),
        (
            v1::Dialect::Gemini,
            r#"{"prompt_tokens":1469,"completion_tokens":744,"total_tokens":2496}"#,
            (1469, 1027, 1469 * 2 + 1027 * 6),
        ),
        (
            v1::Dialect::Anthropic,
            r#"{"input_tokens":12,"cache_creation_input_tokens":5000,"cache_read_input_tokens":20000,"output_tokens":503}"#,
            (25_012, 503, 12 * 2 + 12_500 + 6_000 + 503 * 6),
        ),
        (
            v1::Dialect::NewApi,
            r#"{"prompt_tokens":686,"completion_tokens":123,"total_tokens":809,"input_tokens":0,"output_tokens":0}"#,
            (686, 123, 686 * 2 + 123 * 6),
        ),
    ] {
        let body = completion("hello", usage);
        let gateway =
            in_front_of(dialect, answer(200, &[("content-type", "application/json")], body), &end).await;
        let got = gateway.client.chat(CHAT).await;
        assert_eq!(got.status, StatusCode::OK, "{dialect:?}: {}", got.text());
        let (input, output, cost) = expected;
        assert_eq!(used(&gateway).await, (input.into(), output.into(), cost.into()), "{dialect:?}");
    }
}

#[tokio::test]
async fn a_stream_of_responses_whose_last_event_is_large_ends_well_and_is_counted() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let response = |usage: &str| {
        let instructions = "You are an agent. ".repeat(5000);
        format!(
            r#"{{"id":"r","object":"response","error":null,"instructions":"{instructions}","usage":{usage}}}"#
        )
    };
    let event = |kind: &str, rest: String| format!("event: {kind}\ndata: {{\"type\":\"{kind}\",{rest}}}\n\n");
    let usage = r#"{"input_tokens":5000,"input_tokens_details":{"cached_tokens":4000},"output_tokens":20,"total_tokens":5020}"#;
    let events = [
        event("response.created", format!("\"response\":{}", response("null"))),
        event("response.output_text.delta", r#""delta":"Hi""#.to_owned()),
        event("response.completed", format!("\"response\":{}", response(usage))),
    ]
    .concat();
    let bytes = [stream_head(), events.clone().into_bytes()].concat();
    let gateway = in_front_of(v1::Dialect::Openai, bytes, &end).await;
    let body = r#"{"model":"gpt-4.1","input":"hi","stream":true}"#;
    let got = gateway.client.ask(Method::POST, "/v1/responses", body).await;
    assert_eq!(got.status, StatusCode::OK, "{}", got.text());
    assert_eq!(got.text(), events, "nothing is added to a stream that has ended well");
    let cost = 1000 * 2 + 1200 + 20 * 6;
    assert_eq!(used(&gateway).await, (5000.into(), 20.into(), cost.into()));
}

#[tokio::test]
async fn zeros_beside_text_do_not_make_an_answer_free() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let body =
        completion(&"word ".repeat(2000), r#"{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}"#);
    let bytes = answer(200, &[("content-type", "application/json")], body);
    let gateway = in_front_of(v1::Dialect::Unspecified, bytes, &end).await;
    assert_eq!(gateway.client.chat(CHAT).await.status, StatusCode::OK);
    let (input, output, _) = used(&gateway).await;
    assert_eq!(output, 2500);
    assert!(input.as_u64().is_some_and(|tokens| tokens > 0), "{input}");
}

#[tokio::test]
async fn background_responses_are_refused_by_name() {
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let gateway = in_front_of(v1::Dialect::Openai, answer(200, &[], b"{}"), &end).await;
    let body = r#"{"model":"gpt-4.1","input":"hi","background":true}"#;
    let got = gateway.client.ask(Method::POST, "/v1/responses", body).await;
    assert_eq!(got.status, StatusCode::BAD_REQUEST, "{}", got.text());
    assert_eq!(got.json()["error"]["param"], "background");
}
