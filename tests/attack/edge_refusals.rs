//! Refusals reach clients that are still sending: the connection is closed lingering, within bounds.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;

use crate::lab::http1::{End, exchange_until, models, post, write_then_read};
use crate::lab::{Lab, SOON, connect};

/// Above the bound of 16 MiB of these gateways, and above the buffers of both kernels.
const LARGE: usize = 20_000_000;
/// The time for which a client may send after a refusal before it is cut, with room for a busy machine.
const LINGERS_AT_MOST: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_all_of_a_large_body_first_reads_its_refusal() {
    let lab = Lab::here_with(|config| config.common.max_body_mib = Some(16)).await;
    let zeros = vec![b'a'; LARGE];
    let length = format!("Content-Length: {LARGE}\r\n\r\n");
    let part = [b"10000\r\n", &[b'a'; 65_536][..], b"\r\n"].concat();
    let chunks = [&part.repeat(LARGE / 65_536)[..], b"0\r\n\r\n"].concat();
    let chunked = "Transfer-Encoding: chunked\r\n\r\n";
    let wrong = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\n";
    let nowhere = "POST /nope HTTP/1.1\r\nHost: x\r\n";
    let get = "PUT /v1/models HTTP/1.1\r\nHost: x\r\n";
    for (case, head, body, status) in [
        ("too large", post() + &length, &zeros, 413),
        ("too large, in chunks", post() + chunked, &chunks, 413),
        ("wrong key", wrong.to_owned() + &length, &zeros, 401),
        ("wrong key, in chunks", wrong.to_owned() + chunked, &chunks, 401),
        ("no such path", nowhere.to_owned() + &length, &zeros, 404),
        ("no such path, in chunks", nowhere.to_owned() + chunked, &chunks, 404),
        ("no such method", get.to_owned() + &length, &zeros, 405),
        ("compressed", format!("{}Content-Encoding: gzip\r\n{length}", post()), &zeros, 415),
        ("malformed head", format!("{}Host: y\r\n{length}", post()), &zeros, 400),
        ("broken chunk", format!("{}{chunked}-1\r\n", post()), &zeros, 400),
    ] {
        let (sent, heard) = write_then_read(lab.clients, [head.as_bytes(), body].concat()).await;
        assert_eq!(heard.statuses(), [status], "{case}: sent: {sent:?}, {heard:?}");
        assert_ne!(heard.end, End::Open, "{case}: {heard:?}");
    }
    assert!(lab.backend.arrived().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_more_and_more_head_reads_431() {
    let lab = Lab::here().await;
    let field = format!("X-A: {}\r\n", "a".repeat(1000));
    for (case, more) in
        [("fields", field.repeat(4000)), ("one field", format!("X-A: {}", "a".repeat(4_000_000)))]
    {
        let (sent, heard) = write_then_read(lab.clients, models(&more)).await;
        assert_eq!(heard.statuses(), [431], "{case}: sent: {sent:?}, {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_client_that_never_ends_is_cut() {
    let lab = Lab::here().await;
    let wrong = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer no\r\nTransfer-Encoding: chunked\r\n\r\n";
    let slow = async {
        let mut socket = connect(lab.clients).await;
        socket.write_all(wrong.as_bytes()).await.expect("sent");
        let began = Instant::now();
        // A chunk every 100 ms, until the other end has gone.
        while socket.write_all(b"1\r\na\r\n").await.is_ok() {
            assert!(began.elapsed() < LINGERS_AT_MOST, "a trickle behind a refusal is still taken");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let fast = async {
        let mut socket = connect(lab.clients).await;
        socket.write_all(wrong.as_bytes()).await.expect("sent");
        let (began, mut sent, part) =
            (Instant::now(), 0_u64, [b"10000\r\n", &[b'a'; 65_536][..], b"\r\n"].concat());
        while socket.write_all(&part).await.is_ok() {
            sent += part.len() as u64;
            assert!(
                began.elapsed() < LINGERS_AT_MOST,
                "{sent} bytes behind a refusal were taken, and more are"
            );
        }
    };
    let silent = async {
        let mut socket = connect(lab.clients).await;
        socket.write_all(wrong.as_bytes()).await.expect("sent");
        let mut heard = Vec::new();
        let closed = tokio::time::timeout(LINGERS_AT_MOST, socket.read_to_end(&mut heard)).await;
        assert!(closed.is_ok(), "a refused client that says nothing is still connected");
        assert!(heard.starts_with(b"HTTP/1.1 401"), "{}", String::from_utf8_lossy(&heard));
    };
    tokio::join!(slow, fast, silent);
    weir_tests::eventually("nothing of them is left", || async {
        lab.metric("weir_requests_in_flight").await == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_comes_before_the_body_and_at_once() {
    let lab = Lab::here_with(|config| config.common.max_body_mib = Some(16)).await;
    let began = Instant::now();
    let head = format!("{}Content-Length: {LARGE}\r\n\r\n", post());
    let heard = exchange_until(lab.clients, head, Duration::from_secs(2)).await;
    assert_eq!(heard.statuses(), [413], "{heard:?}");
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
}
