//! Back-pressure: what a client does not take stays with the backend, and not in the gateway's memory.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::lab::backend::BIG_BYTES;
use crate::lab::http1::chat;
use crate::lab::http2::{self, Ended, Http2, INITIAL_WINDOW_SIZE, window_update};
use crate::lab::{Lab, SOON, connect_narrow};

/// The memory that a stream may hold in the gateway.
const STREAM_KIB: u64 = 128;
/// Concurrent streams of one kind.
const STREAMS: u32 = 40;
/// Memory that is not of streams: pages of code that run for the first time, and parts that the allocator keeps.
const NOISE_KIB: u64 = 8 << 10;
/// When nothing was taken from the backend for this time, everything that it poured has its place.
const STILL: Duration = Duration::from_secs(1);
/// A client that takes nothing is cut after a minute; a busy machine may be late.
const CUT_WITHIN: Duration = Duration::from_secs(90);
/// The time for which slow readers read.
const READING: Duration = Duration::from_secs(3);
/// The largest window.
const WHOLE_WINDOW: u32 = (1 << 31) - 1;

/// Connections, which end when this value is dropped.
enum Open {
    Old(Vec<TcpStream>),
    New(Vec<Http2>),
}

/// Streams over HTTP/1 whose clients read nothing.
async fn old(lab: &Lab, act: &str) -> Open {
    let mut sockets = Vec::new();
    for _ in 0..STREAMS {
        let mut socket = connect_narrow(lab.clients).await;
        socket.write_all(&chat("m", act, false)).await.expect("sent");
        sockets.push(socket);
    }
    Open::Old(sockets)
}

/// Streams over HTTP/2, a number per connection, whose clients give these windows and read nothing.
async fn new(lab: &Lab, act: &str, window: u32, on_each: u32) -> Open {
    let mut connections = Vec::new();
    for _ in 0..STREAMS / on_each {
        let socket = connect_narrow(lab.clients).await;
        let mut connection = Http2::over(socket, &[(INITIAL_WINDOW_SIZE, window)]).await;
        if window > 65_535 {
            assert!(connection.send(&window_update(0, WHOLE_WINDOW - 65_535)).await);
        }
        for i in 0..on_each {
            assert!(connection.send(&http2::chat(1 + 2 * i, "m", act)).await);
        }
        connections.push(connection);
    }
    Open::New(connections)
}

/// Asserts that memory stays within `bound` of `before` while the backend pours, until it is blocked or for
/// `longest`, and that good clients are served meanwhile.
async fn assert_within(lab: &Lab, (before, bound): (u64, u64), longest: Duration, case: &str) {
    let began = Instant::now();
    let (mut poured, mut since) = (lab.backend.poured(), began);
    while began.elapsed() < longest && since.elapsed() < STILL {
        let more = lab.resident_kib().saturating_sub(before);
        assert!(
            more <= bound,
            "{case}: {more} KiB more than {before} after {:?}, {bound} are promised",
            began.elapsed()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = lab.backend.poured();
        if now != poured {
            (poured, since) = (now, Instant::now());
        }
    }
    lab.assert_served_within(SOON, case).await;
    let more = lab.resident_kib().saturating_sub(before);
    assert!(more <= bound, "{case}: {more} KiB more than {before} after a good client, {bound} are promised");
}

/// The memory that all streams of a variation may hold.
fn bound() -> u64 {
    u64::from(STREAMS) * STREAM_KIB + NOISE_KIB
}

async fn idle(lab: &Lab) {
    weir_tests::eventually("nothing is under way", || async {
        lab.metric("weir_requests_in_flight").await == 0.0
    })
    .await;
}

/// A gateway that has had as many short streams at once, so that its code and its buffers are in memory.
async fn warm() -> (Lab, u64) {
    let lab = Lab::process(&[]).await;
    for _ in 0..2 {
        let open = [old(&lab, "slow-3").await, new(&lab, "slow-3", 65_535, STREAMS).await];
        idle(&lab).await;
        drop(open);
    }
    let before = lab.resident_kib();
    (lab, before)
}

/// Each variation may hold the memory of its streams; memory that an earlier variation left is included.
async fn assert_bounded(lab: &Lab, before: u64, case: &str, open: Open) {
    assert_within(lab, (before, bound()), SOON, case).await;
    match open {
        Open::Old(sockets) => drop(sockets),
        Open::New(connections) => drop(connections),
    }
    idle(lab).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_over_http1_that_nobody_reads_hold_128_kib_each_at_most() {
    let (lab, before) = warm().await;
    for (case, act) in [("events as fast as they are taken", "fast"), ("a line without an end", "line")] {
        let open = old(&lab, act).await;
        assert_bounded(&lab, before, case, open).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_over_http2_that_nobody_reads_hold_128_kib_each_at_most() {
    let (lab, before) = warm().await;
    for (case, act, window, on_each) in [
        ("no window, one connection", "fast", 0, STREAMS),
        ("no window, many connections", "fast", 0, 1),
        ("a window of one byte", "fast", 1, STREAMS),
        ("the usual window, one connection", "fast", 65_535, STREAMS),
        ("the usual window, many connections", "fast", 65_535, 1),
        ("the largest window, one connection", "fast", WHOLE_WINDOW, STREAMS),
        ("the largest window, many connections", "fast", WHOLE_WINDOW, 1),
        ("the largest window, a line without an end", "line", WHOLE_WINDOW, 4),
    ] {
        let open = new(&lab, act, window, on_each).await;
        assert_bounded(&lab, before, case, open).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_slowly_gets_all_of_a_stream_and_costs_no_more() {
    let (lab, before) = warm().await;
    let Open::Old(mut sockets) = old(&lab, "fast").await else { unreachable!("HTTP/1") };
    let reading = async {
        use tokio::io::AsyncReadExt as _;
        let (began, mut buffer) = (Instant::now(), [0; 200]);
        while began.elapsed() < READING {
            for socket in &mut sockets {
                let read = socket.read(&mut buffer).await.expect("the stream goes on");
                assert_ne!(read, 0, "a slow reader is cut");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::join!(reading, assert_within(&lab, (before, bound()), READING, "slow readers"));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_that_nobody_reads_are_held_once_and_not_for_ever() {
    /// Answers at once.
    const ANSWERS: u32 = 4;
    /// Each answer is read completely before its first byte is sent; beside it there is at most a copy with the
    /// model's name changed.
    const COPIES: u64 = 2;
    let (lab, before) = warm().await;
    let mut old = Vec::new();
    for _ in 0..ANSWERS / 2 {
        let mut socket = connect_narrow(lab.clients).await;
        socket.write_all(&chat("short", "big", false)).await.expect("sent");
        old.push(socket);
    }
    let mut new = Http2::over(connect_narrow(lab.clients).await, &[(INITIAL_WINDOW_SIZE, 0)]).await;
    for i in 0..ANSWERS / 2 {
        assert!(new.send(&http2::chat(1 + 2 * i, "short", "big")).await);
    }
    let bound = u64::from(ANSWERS) * COPIES * (BIG_BYTES as u64 >> 10) + NOISE_KIB;
    assert_within(&lab, (before, bound), SOON, "large answers").await;
    // A client that takes nothing is cut, at the latest by the clock on writes; the other client has a connection of
    // its own.
    let cut = async {
        while lab.metric("weir_connections").await > 1.0 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(CUT_WITHIN, cut).await.is_ok(), "HTTP/1 is not cut within {CUT_WITHIN:?}");
    let ended = new.ended(1).await;
    assert!(matches!(ended, Ended::Reset(_) | Ended::GoAway(_) | Ended::Closed), "HTTP/2: {ended:?}");
}
