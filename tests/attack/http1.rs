//! HTTP/1 of strangers: no smuggled requests, no switch to another protocol, and strict paths and bodies.

use http::StatusCode;
use weir_tests::cluster::KEY;

use crate::lab::Lab;
use crate::lab::SOON;
use crate::lab::http1::{End, body, exchange, exchange_until, models, post};

/// Requests whose end is ambiguous. Each has a complete request behind it.
pub(crate) fn ambiguous() -> Vec<(&'static str, Vec<u8>)> {
    let (body, post, behind) = (body("m", false), post(), models("Connection: close\r\n"));
    let n = body.len();
    let chunked = format!("{n:x}\r\n{body}\r\n0\r\n\r\n");
    let m = chunked.len() + behind.len();
    let with =
        |framing: &str, body: &str| [format!("{post}{framing}\r\n\r\n{body}").as_bytes(), &behind].concat();
    let te = "Transfer-Encoding: chunked";
    vec![
        (
            "length that covers what is behind, and chunks",
            with(&format!("Content-Length: {m}\r\n{te}"), &chunked),
        ),
        ("chunks, then a short length", with(&format!("{te}\r\nContent-Length: 6"), &chunked)),
        ("no length, and chunks", with(&format!("Content-Length: 0\r\n{te}"), &chunked)),
        ("unknown coding", with("Transfer-Encoding: xchunked", &chunked)),
        ("chunked is not the last", with("Transfer-Encoding: chunked, identity", &chunked)),
        ("second field is unknown", with(&format!("{te}\r\nTransfer-Encoding: x"), &chunked)),
        ("three framings", with(&format!("Transfer-Encoding: x\r\n{te}\r\nContent-Length: 4"), &chunked)),
        (
            "space before the colon",
            with(&format!("Transfer-Encoding : chunked\r\nContent-Length: {n}"), &body),
        ),
        ("vertical tab", with(&format!("Transfer-Encoding: \x0bchunked\r\nContent-Length: {n}"), &body)),
        ("zero byte", with(&format!("Transfer-Encoding: chunked\0\r\nContent-Length: {n}"), &body)),
        ("quoted", with("Transfer-Encoding: \"chunked\"", &chunked)),
        ("parameter", with("Transfer-Encoding: chunked;q=1", &chunked)),
        ("folded", with("Transfer-Encoding:\r\n chunked", &chunked)),
        ("folded length", with(&format!("Content-Length:\r\n {n}"), &body)),
        ("two lengths", with(&format!("Content-Length: {n}\r\nContent-Length: 5"), &body)),
        ("list of lengths", with(&format!("Content-Length: {n}, {n}"), &body)),
        ("length with a sign", with(&format!("Content-Length: +{n}"), &body)),
        ("negative length", with("Content-Length: -1", &body)),
        ("length with an underscore", with("Content-Length: 1_0", &body)),
        ("length in hex", with("Content-Length: 0x10", &body)),
        ("empty length", with("Content-Length:", &body)),
        ("length of 2^64", with("Content-Length: 18446744073709551616", &body)),
        ("space after the name of the length", with(&format!("Content-Length : {n}"), &body)),
        ("carriage return in a value", with(&format!("X-A: a\rX-B: b\r\nContent-Length: {n}"), &body)),
        ("zero byte in a value", with(&format!("X-A: a\0b\r\nContent-Length: {n}"), &body)),
        ("zero byte in a name", with(&format!("X\0A: b\r\nContent-Length: {n}"), &body)),
        ("space in a name", with(&format!("X A: b\r\nContent-Length: {n}"), &body)),
        ("no name", with(&format!(": b\r\nContent-Length: {n}"), &body)),
        ("no colon", with(&format!("XA\r\nContent-Length: {n}"), &body)),
        ("bell in a value", with(&format!("X-A: a\x07\r\nContent-Length: {n}"), &body)),
        ("folded value", with(&format!("X-A: a\r\n b\r\nContent-Length: {n}"), &body)),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_behind_an_ambiguous_request_is_ever_processed() {
    let lab = Lab::here().await;
    for (case, bytes) in ambiguous() {
        let heard = exchange(lab.clients, &bytes).await;
        assert_ne!(heard.end, End::Open, "{case}: {heard:?}");
        let statuses = heard.statuses();
        assert!(statuses.len() <= 1, "{case}: what is behind it was answered: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_an_upgrade_are_the_next_request_and_nothing_else() {
    let lab = Lab::here().await;
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n";
    let h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    for upgrade in [websocket, h2c] {
        let bytes = [models(upgrade), models("Connection: close\r\n")].concat();
        let heard = exchange(lab.clients, bytes).await;
        assert_eq!(heard.statuses(), [200, 200], "{upgrade}: {heard:?}");
        assert!(!heard.bytes.starts_with(b"HTTP/1.1 101"), "{upgrade}: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_refused_before_its_body_leaves_the_connection_in_step_or_closes_it() {
    let lab = Lab::here().await;
    let behind = models("Connection: close\r\n");
    let n = behind.len();
    for (case, first, body, status) in [
        (
            "wrong key",
            format!(
                "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nContent-Length: {n}\r\n\r\n"
            ),
            &behind[..],
            401,
        ),
        (
            "unknown path",
            format!("POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: {n}\r\n\r\n"),
            &behind[..],
            404,
        ),
        (
            "a body where none is read",
            String::from_utf8(models(&format!("Content-Length: {n}\r\n"))).expect("UTF-8"),
            &behind[..],
            200,
        ),
    ] {
        let heard = exchange(lab.clients, [first.as_bytes(), body, &behind].concat()).await;
        let statuses = heard.statuses();
        assert_eq!(heard.end, End::Closed, "{case}: {heard:?}");
        // The body looks like a request: if it were answered as one, there would be two more answers.
        assert!(statuses == [status] || statuses == [status, 200], "{case}: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_opens_no_tunnel() {
    let lab = Lab::here().await;
    let backend = lab.backend.address;
    for target in [backend.to_string(), "/v1/models".to_owned(), "*".to_owned()] {
        let bytes = format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {backend}\r\nAuthorization: Bearer {KEY}\r\n\r\n\
             POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        let heard = exchange(lab.clients, bytes).await;
        assert!(heard.statuses().iter().all(|status| (400..=501).contains(status)), "{target}: {heard:?}");
        assert!(lab.backend.arrived().is_empty(), "{target} reached the backend");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_exact_paths_and_methods_are_routed() {
    let lab = Lab::here().await;
    for path in [
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/../v1/models",
        "/v1/%2e%2e/v1/models",
        "/v1%2fmodels",
        "/v1/models;x",
        "/V1/Models",
        "/v1/../metrics",
        "/metrics",
        "/livez",
        "/usage",
        "/limits",
        "/v1/models%00",
        "/v1/models%20",
        "/./v1/models",
        "/v1\\models",
        "/",
        "*",
    ] {
        let text = String::from_utf8(models("Connection: close\r\n")).expect("UTF-8");
        let heard = exchange(lab.clients, text.replace("/v1/models", path)).await;
        let refused = heard.statuses().iter().all(|status| matches!(status, 400 | 404));
        assert!(refused && heard.end == End::Closed, "{path}: {heard:?}");
    }
    for method in ["TRACE", "OPTIONS", "PUT", "DELETE", "PATCH", "head", "get", "POST", "PROPFIND"] {
        let text = String::from_utf8(models("Connection: close\r\nX-Secret: tell me\r\n")).expect("UTF-8");
        let heard = exchange(lab.clients, text.replace("GET", method)).await;
        assert_eq!(heard.statuses(), [405], "{method}: {heard:?}");
        assert!(!String::from_utf8_lossy(&heard.bytes).contains("tell me"), "{method} echoes: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_too_large_is_refused_before_it_is_sent_and_a_compressed_one_is_not_read() {
    let lab = Lab::here().await;
    let too_large = format!("{}Content-Length: {}\r\n\r\n", post(), (50 << 20) + 1);
    let heard = exchange_until(lab.clients, too_large, std::time::Duration::from_secs(3)).await;
    assert_eq!(heard.statuses(), [413], "{heard:?}");
    for (case, expect) in [("100-continue", 417), ("200-ok", 417)] {
        // With a wrong key the client is not asked to send a body.
        let bytes = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nExpect: {case}\r\nConnection: close\r\nContent-Length: 5\r\n\r\n"
        );
        let heard = exchange_until(lab.clients, bytes, SOON).await;
        assert!(heard.statuses() == [401] || heard.statuses() == [expect], "{case}: {heard:?}");
        assert!(!heard.bytes.starts_with(b"HTTP/1.1 100"), "{case}: {heard:?}");
    }
    let n = body("m", false).len();
    for encoding in ["gzip", "deflate", "br", "zstd", "gzip, identity", "x", "compress", "identity, gzip"] {
        let request = format!(
            "{}Content-Encoding: {encoding}\r\nConnection: close\r\nContent-Length: {n}\r\n\r\n{}",
            post(),
            body("m", false)
        );
        let heard = exchange(lab.clients, request).await;
        assert_eq!(heard.statuses(), [415], "{encoding}: {heard:?}");
    }
    assert!(lab.backend.arrived().is_empty());
    assert_eq!(lab.client().chat(&body("m", false)).await.status, StatusCode::OK);
}
