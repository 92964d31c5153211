//! The drain of a gateway: streams are told of it, and idle connections do not delay it.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;
use weir_tests::process::signal;

use crate::lab::http1::{End, chat, listen};
use crate::lab::http2::{self, Ended, Http2, models};
use crate::lab::{Lab, SOON, connect};

async fn ended_within(lab: &mut Lab, within: Duration, case: &str) {
    let child = &mut lab.process.as_mut().expect("a process").child;
    let ended = tokio::time::timeout(within, child.wait()).await;
    let code = ended.unwrap_or_else(|_| panic!("{case}: still there after {within:?}")).expect("ends").code();
    assert_eq!(code, Some(0), "{case}");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_limit_of_a_drain_a_stream_gets_its_error_event_and_closes() {
    let mut lab = Lab::process(&["--drain=2s"]).await;
    let mut old = connect(lab.clients).await;
    old.write_all(&chat("m", "slow", false)).await.expect("sent");
    let mut new = Http2::connect(lab.clients, &[]).await;
    assert!(new.send(&http2::chat(1, "m", "slow")).await);
    weir_tests::eventually("both streams run", || async {
        lab.metric("weir_requests_in_flight").await == 2.0
    })
    .await;
    let began = Instant::now();
    signal(&lab.process.as_ref().expect("a process").child, "-TERM").await;
    let heard = listen(&mut old, SOON).await;
    assert!(began.elapsed() >= Duration::from_secs(2), "it was cut before the limit: {:?}", began.elapsed());
    assert_eq!(heard.end, End::Closed, "{heard:?}");
    let body = heard.replies().pop().expect("an answer").body;
    let text = String::from_utf8(body).expect("UTF-8");
    let last = text.trim_end().rsplit("\n\n").next().expect("an event");
    let event: serde_json::Value =
        serde_json::from_str(last.strip_prefix("data: ").expect("an event")).expect("JSON");
    assert!(event["error"]["message"].is_string(), "the last event is the error: {last}");
    assert!(!text.contains("[DONE]"), "{last}");
    let mut events = Vec::new();
    while let http2::Next::Frame(f) = new.next(SOON).await {
        if f.kind == http2::DATA {
            events.extend(f.payload);
        }
    }
    let events = String::from_utf8(events).expect("UTF-8");
    assert!(events.contains("\"error\"") && !events.contains("[DONE]"), "over HTTP/2: {events}");
    ended_within(&mut lab, SOON, "after the limit").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_do_not_hold_a_drain() {
    let mut lab = Lab::process(&["--drain=120s"]).await;
    // The client reads nothing from now on, so it never learns that it should leave.
    let mut used = Http2::connect(lab.clients, &[]).await;
    assert!(used.send(&models(1)).await);
    assert_eq!(used.ended(1).await, Ended::Answer(200));
    let mut _unused = Http2::connect(lab.clients, &[]).await;
    let mut kept = connect(lab.clients).await;
    kept.write_all(&crate::lab::http1::models("")).await.expect("sent");
    let _silent = connect(lab.clients).await;
    let mut half = connect(lab.clients).await;
    half.write_all(b"GET /v1/models HTTP/1.1\r\nHost:").await.expect("sent");
    lab.assert_served_within(SOON, "before the end").await;
    signal(&lab.process.as_ref().expect("a process").child, "-TERM").await;
    // A partial head has its ten seconds; nothing else delays the end.
    ended_within(&mut lab, Duration::from_secs(30), "idle connections").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_in_time_is_whole_although_the_gateway_drains() {
    let mut lab = Lab::process(&["--drain=60s"]).await;
    let mut old = connect(lab.clients).await;
    old.write_all(&chat("m", "slow-20", false)).await.expect("sent");
    weir_tests::eventually("it runs", || async { lab.metric("weir_requests_in_flight").await == 1.0 }).await;
    signal(&lab.process.as_ref().expect("a process").child, "-TERM").await;
    let heard = listen(&mut old, SOON).await;
    let body = heard.replies().pop().expect("an answer").body;
    let text = String::from_utf8(body).expect("UTF-8");
    assert!(text.ends_with("data: [DONE]\n\n") && !text.contains("\"error\""), "{text}");
    ended_within(&mut lab, SOON, "after its last stream").await;
}
