//! Answers without an end: what the gateway takes of them, and what it tells the client.

use std::sync::{Arc, Mutex};

use http::StatusCode;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Answer;
use weir_tests::cluster::{Resources, gateway};
use weir_tests::eventually;
use weir_tests::scripted::{Scripted, head, stream_end, stream_head};

use super::{CHAT, JSON, STREAM, Scene, with_limit};

/// Sends the beginning and then the same bytes without end; how many bytes of those the gateway took is told.
async fn endless(begin: Vec<u8>, again: Vec<u8>) -> (Answer, u64) {
    let end = CancellationToken::new();
    let taken: Arc<Mutex<u64>> = Arc::default();
    let told = taken.clone();
    let backend = Scripted::start(&end, move |_, mut wire| {
        let (begin, again, told) = (begin.clone(), again.clone(), told.clone());
        async move {
            wire.send(begin).await;
            // A bound of the test's own, far beyond every bound of the gateway.
            let times = wire.repeat(&again, (1 << 30) / again.len() as u64).await;
            *told.lock().expect("sound") += times * again.len() as u64;
            None
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    let answer = gateway.client.chat(CHAT).await;
    eventually("the backend's connection is closed", || async { *taken.lock().expect("sound") > 0 }).await;
    let taken = *taken.lock().expect("sound");
    (answer, taken)
}

#[tokio::test]
async fn an_endless_head_is_502_after_a_bounded_number_of_bytes() {
    for again in [vec![b'a'; 65_536], b"x-a: b\r\n".repeat(8192)] {
        let (answer, taken) = endless(b"HTTP/1.1 200 OK\r\nx-big: ".to_vec(), again).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
        // What lies in the buffers of two sockets is not read.
        assert!(taken < 32 << 20, "{taken}");
    }
}

#[tokio::test]
async fn an_endless_body_is_502_after_a_bounded_number_of_bytes() {
    let (answer, taken) = endless(head(200, &[JSON]), vec![b' '; 1 << 20]).await;
    // A bound of the gateway's own: it is blamed on nobody, and a retry would not help.
    assert_eq!((answer.status, answer.error_code().as_str()), (StatusCode::BAD_GATEWAY, "answer_too_large"));
    assert_eq!(answer.headers["x-should-retry"], "false");
    assert!(answer.text().contains("--answer-max-mib"));
    assert!(taken < 128 << 20, "{taken}");
}

#[tokio::test]
async fn an_endless_line_of_a_stream_passes_in_parts_and_is_charged_by_its_bytes() {
    let scene = Scene::with(with_limit).await;
    let line = format!("data: {}\n\n", "x".repeat(1 << 20));
    let says = [stream_head(), line.into_bytes(), stream_end("").into()].concat();
    let answer = scene.ask(says, STREAM).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(answer.body.len() > 1 << 20 && answer.text().ends_with("data: [DONE]\n\n"));
    scene
        .counts(
            "weir_tokens_total",
            &["direction=\"output\"", "counted"],
            // Its data, with the blank before it.
            ((1_u64 << 20) + 1).div_ceil(4) as f64,
        )
        .await;
}
