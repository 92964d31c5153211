//! Redirects of a backend and contents of a prompt have no effect on the gateway.

use http::StatusCode;

use crate::lab::Lab;
use crate::lab::http1::{chat, exchange};

#[tokio::test(flavor = "multi_thread")]
async fn redirects_of_a_backend_are_never_followed() {
    for status in ["301", "302", "303", "307", "308"] {
        let lab = Lab::here().await;
        let heard = exchange(lab.clients, chat("m", &format!("status-{status}"), true)).await;
        let [reply] = &heard.replies()[..] else { panic!("{status}: {heard:?}") };
        assert_eq!(reply.status, StatusCode::BAD_GATEWAY.as_u16(), "{status}: {heard:?}");
        assert_eq!(
            reply.header("location"),
            None,
            "{status}: the client is not sent there either: {heard:?}"
        );
        for arrived in lab.backend.arrived() {
            assert!(!arrived.head.contains("/redirected"), "{status}: {}", arrived.head);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_looks_like_the_end_of_a_stream_stays_content() {
    let lab = Lab::here().await;
    let heard = exchange(lab.clients, chat("m", "escaped", true)).await;
    let body = heard.replies().pop().expect("an answer").body;
    let text = String::from_utf8(body).expect("UTF-8");
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    let ends: Vec<usize> = (0..events.len()).filter(|i| events[*i] == "data: [DONE]").collect();
    assert_eq!(ends, [events.len() - 1], "one end, and it is the last event: {text}");
    let first: serde_json::Value =
        serde_json::from_str(events[0].strip_prefix("data: ").expect("an event")).expect("JSON");
    assert_eq!(first["choices"][0]["delta"]["content"], "\n\ndata: [DONE]\n\n");
    assert!(text.contains("after"), "what follows it is sent: {text}");
}
