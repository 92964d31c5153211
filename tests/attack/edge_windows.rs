//! Clients that take nothing: a backend's slots are freed by the pool's timeouts, whatever the client does.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use crate::lab::http1;
use crate::lab::http2::{
    self, DATA, Ended, HEADERS, Http2, INITIAL_WINDOW_SIZE, Next, RST_STREAM, chat, models, settings,
    window_update,
};
use crate::lab::{Lab, SHORT_SLOTS, SHORT_TOTAL, SOON, connect_narrow};

/// Beyond the pool's timeouts, on a busy machine.
const LATE: Duration = Duration::from_secs(2);

/// The time from `began` until nothing is in flight; a good client is served then.
async fn assert_slots_come_back(lab: &Lab, began: Instant, case: &str) {
    weir_tests::eventually("the slots are free", || async {
        lab.metric("weir_requests_in_flight").await == 0.0
    })
    .await;
    let took = began.elapsed();
    assert!(
        took < SHORT_TOTAL + LATE,
        "{case}: the slots were free after {took:?}, the pool says {SHORT_TOTAL:?}"
    );
    let heard = http1::exchange(lab.clients, http1::chat("short", "ok", true)).await;
    assert_eq!(heard.statuses(), [200], "{case}: {heard:?}");
}

async fn all_are_taken(lab: &Lab) {
    let taken = f64::from(SHORT_SLOTS);
    weir_tests::eventually("all slots are taken", || async {
        lab.metric("weir_requests_in_flight").await >= taken
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_streams_without_a_window_give_their_slots_back_in_time() {
    let lab = Lab::here().await;
    for (case, act, window) in [
        ("no window, a slow backend", "slow", 0),
        ("no window, a fast backend", "fast", 0),
        ("one byte of window", "slow", 1),
        ("a window that is used up", "fast", 65_535),
        ("a small window", "fast", 1000),
    ] {
        let began = Instant::now();
        let mut connection = Http2::connect(lab.clients, &[(INITIAL_WINDOW_SIZE, window)]).await;
        for i in 0..SHORT_SLOTS {
            assert!(connection.send(&chat(1 + 2 * i, "short", act)).await);
        }
        all_are_taken(&lab).await;
        assert!(connection.answers_pings().await, "{case}: the connection is well");
        assert_slots_come_back(&lab, began, case).await;
        assert!(connection.answers_pings().await, "{case}: and stays well");
        // Another stream of the same connection is served once it may be written.
        let more =
            [settings(&[(INITIAL_WINDOW_SIZE, 1 << 20)]), window_update(0, 1 << 20), models(99)].concat();
        assert!(connection.send(&more).await);
        assert_eq!(connection.ended(99).await, Ended::Answer(200), "{case}: the connection lives on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_whose_client_takes_nothing_is_reset_and_never_ends_as_if_whole() {
    let lab = Lab::here().await;
    let mut connection = Http2::connect(lab.clients, &[(INITIAL_WINDOW_SIZE, 0)]).await;
    assert!(connection.send(&chat(1, "short", "slow")).await);
    let (mut said, mut end) = (None, None);
    while end.is_none() {
        match connection.next(SOON).await {
            Next::Frame(f) if f.stream == 1 && f.kind == HEADERS => said = f.status(),
            Next::Frame(f) if f.stream == 1 && f.kind == RST_STREAM => end = Some(f.error()),
            Next::Frame(f) if f.stream == 1 && f.kind == DATA => {
                assert_eq!(f.flags & http2::END_STREAM, 0, "it ends as a whole answer does: {f:?}");
            }
            Next::Frame(_) => {}
            other => panic!("the stream was not ended: {other:?}"),
        }
    }
    assert_eq!(said, Some(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_whose_connection_has_no_window_or_no_reader_give_their_slots_back_in_time() {
    let lab = Lab::here().await;
    // Unlimited windows of streams; that of the connection stays at 65 535.
    let large = [(INITIAL_WINDOW_SIZE, (1 << 31) - 1)];
    let began = Instant::now();
    let mut connection = Http2::connect(lab.clients, &large).await;
    for i in 0..SHORT_SLOTS {
        assert!(connection.send(&chat(1 + 2 * i, "short", "fast")).await);
    }
    all_are_taken(&lab).await;
    assert_slots_come_back(&lab, began, "the connection's window is used up").await;
    assert!(connection.answers_pings().await, "the connection is well");

    let began = Instant::now();
    let mut deaf = Http2::over(connect_narrow(lab.clients).await, &large).await;
    assert!(deaf.send(&window_update(0, (1 << 31) - 65_536)).await);
    for i in 0..SHORT_SLOTS {
        assert!(deaf.send(&chat(1 + 2 * i, "short", "fast")).await);
    }
    all_are_taken(&lab).await;
    assert_slots_come_back(&lab, began, "HTTP/2, nobody reads the socket").await;

    let began = Instant::now();
    let mut sockets = Vec::new();
    for _ in 0..SHORT_SLOTS {
        let mut socket = connect_narrow(lab.clients).await;
        socket.write_all(&http1::chat("short", "fast", false)).await.expect("sent");
        sockets.push(socket);
    }
    all_are_taken(&lab).await;
    assert_slots_come_back(&lab, began, "HTTP/1, nobody reads the socket").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_get_their_turn_while_clients_without_a_window_come_again_and_again() {
    let lab = Lab::here().await;
    let mut connection = Http2::connect(lab.clients, &[(INITIAL_WINDOW_SIZE, 0)]).await;
    for i in 0..SHORT_SLOTS {
        assert!(connection.send(&chat(1 + 2 * i, "short", "slow")).await);
    }
    all_are_taken(&lab).await;
    let began = Instant::now();
    loop {
        let heard = http1::exchange(lab.clients, http1::chat("short", "ok", true)).await;
        match &heard.statuses()[..] {
            [200] => break,
            [503] => assert!(began.elapsed() < SHORT_TOTAL + LATE, "nobody else was served: {heard:?}"),
            other => panic!("{other:?}: {heard:?}"),
        }
    }
}
