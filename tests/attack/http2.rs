//! Floods in HTTP/2: each is refused or costs no memory, and good clients are served meanwhile.

use std::time::Duration;

use crate::lab::http2::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Ended, Frame, GOAWAY, HEADERS, Http2, Next, PING, PRIORITY,
    RST_STREAM, SETTINGS, block, chat, fields, frame, headers, literal, models, reset, settings,
    window_update,
};
use crate::lab::{Lab, connect_narrow};

/// The memory that a flood may cost a gateway: buffers of one connection, and noise of the allocator.
const MEMORY_KIB: u64 = 16 << 10;
/// A second is promised; a test's machine is busy and its build is slow.
const SERVED_WITHIN: Duration = Duration::from_secs(5);
/// ENHANCE_YOUR_CALM.
const CALM: u32 = 11;
/// The number of bursts within which a flood must be refused.
const BURSTS: usize = 300;

/// A process that has served and was flooded a little, so that later measurements start from a steady state.
async fn warm() -> (Lab, u64) {
    let lab = Lab::process(&[]).await;
    lab.assert_served_within(Duration::from_secs(20), "before").await;
    let mut connection = Http2::connect(lab.clients, &[]).await;
    for i in 0..100 {
        assert!(connection.send(&models(1 + 2 * i)).await);
        assert_eq!(connection.ended(1 + 2 * i).await, Ended::Answer(200));
    }
    let resident = lab.resident_kib();
    (lab, resident)
}

fn assert_memory(lab: &Lab, before: u64, case: &str) {
    let more = lab.peak_kib().saturating_sub(before);
    assert!(more < MEMORY_KIB, "{case}: {more} KiB more than {before}");
}

/// Sends bursts until the peer ends the connection. Returns how; `None` if it did not.
async fn flood(connection: &mut Http2, mut burst: impl FnMut() -> Vec<u8>) -> Option<Ended> {
    for _ in 0..BURSTS {
        let sent = connection.send(&burst()).await;
        loop {
            match connection.next(Duration::from_millis(1)).await {
                Next::Frame(Frame { kind: GOAWAY, payload, .. }) => {
                    let code = payload.get(4..8).and_then(|code| code.try_into().ok());
                    return Some(Ended::GoAway(code.map_or(u32::MAX, u32::from_be_bytes)));
                }
                Next::Frame(_) => {}
                Next::Silence if sent => break,
                Next::Silence | Next::Closed => return Some(Ended::Closed),
            }
        }
    }
    None
}

/// Floods twice. Each time the connection must be ended, by GOAWAY if that still arrives.
async fn assert_flood_is_ended(lab: &Lab, case: &str, begin: &[u8], mut burst: impl FnMut(u32) -> Vec<u8>) {
    for _ in 0..2 {
        let mut connection = Http2::connect(lab.clients, &[]).await;
        assert!(connection.send(begin).await);
        let mut next = 1;
        let ended = flood(&mut connection, || {
            let bytes = burst(next);
            next += 200;
            bytes
        });
        let (ended, ()) = tokio::join!(ended, lab.assert_served_within(SERVED_WITHIN, case));
        assert!(matches!(ended, Some(Ended::GoAway(CALM) | Ended::Closed)), "{case}: {ended:?}");
        lab.assert_served_within(SERVED_WITHIN, case).await;
    }
}

/// A hundred streams, from this one on.
fn hundred(first: u32, one: impl Fn(u32) -> Vec<u8>) -> Vec<u8> {
    (0..100).flat_map(|i| one(first + 2 * i)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_reset_as_fast_as_opened_end_the_connection() {
    let (lab, before) = warm().await;
    let open_reset = |first| hundred(first, |stream| [models(stream), reset(stream)].concat());
    assert_flood_is_ended(&lab, "rapid reset", &[], open_reset).await;
    let work_reset = |first| hundred(first, |stream| [chat(stream, "m", "slow"), reset(stream)].concat());
    assert_flood_is_ended(&lab, "rapid reset of work for a backend", &[], work_reset).await;
    assert_memory(&lab, before, "rapid reset");
    weir_tests::eventually("nothing is under way", || async {
        lab.metric("weir_requests_in_flight").await == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_the_server_is_made_to_reset_end_the_connection() {
    let (lab, before) = warm().await;
    // Each of these is an error of its stream alone, so the server resets the stream.
    let no_window = |stream| [models(stream), window_update(stream, 0)].concat();
    let too_much = |stream| [chat(stream, "m", "slow"), window_update(stream, (1 << 31) - 1)].concat();
    let itself = |stream: u32| {
        [models(stream), frame(PRIORITY, 0, stream, &[&stream.to_be_bytes()[..], &[0]].concat())].concat()
    };
    let half = |stream| [models(stream), frame(DATA, 0, stream, b"late")].concat();
    for (case, one) in [
        ("window update of nothing", &no_window as &dyn Fn(u32) -> Vec<u8>),
        ("window above its end", &too_much),
        ("stream that depends on itself", &itself),
        ("data behind the end", &half),
    ] {
        let mut connection = Http2::connect(lab.clients, &[]).await;
        let mut next = 1;
        let ended = flood(&mut connection, || {
            let bytes = hundred(next, one);
            next += 200;
            bytes
        })
        .await;
        assert!(matches!(ended, Some(Ended::GoAway(_) | Ended::Closed)), "{case}: {ended:?}");
        drop(connection);
        lab.assert_served_within(SERVED_WITHIN, case).await;
        assert_memory(&lab, before, case);
    }
    weir_tests::eventually("nothing is under way", || async {
        lab.metric("weir_requests_in_flight").await == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn header_blocks_and_data_without_an_end_end_the_connection() {
    let (lab, before) = warm().await;
    let request = fields("GET", "/v1/models");
    let request: Vec<(&[u8], &[u8])> = request.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let begun = frame(HEADERS, END_STREAM, 1, &block(&request));
    let more = block(&vec![(&b"x-more"[..], &[b'a'; 20][..]); 200]);
    let big = frame(CONTINUATION, 0, 1, &more).repeat(20);
    assert_flood_is_ended(&lab, "long continuations", &begun, |_| big.clone()).await;
    let empty = frame(CONTINUATION, 0, 1, &[]).repeat(1000);
    assert_flood_is_ended(&lab, "empty continuations", &begun, |_| empty.clone()).await;
    let begun = headers(1, &fields("POST", "/v1/chat/completions"), false);
    let nothing = frame(DATA, 0, 1, &[]).repeat(1000);
    assert_flood_is_ended(&lab, "empty data", &begun, |_| nothing.clone()).await;
    assert_memory(&lab, before, "endless blocks");
}

#[tokio::test(flavor = "multi_thread")]
async fn control_frames_in_floods_cost_no_memory_also_when_no_reply_is_read() {
    let (lab, before) = warm().await;
    let kinds = [
        ("ping", frame(PING, 0, 0, b"12345678")),
        ("settings", settings(&[(3, 100), (4, 65_535)])),
        ("window update", window_update(0, 1)),
        ("priority", frame(PRIORITY, 0, 3, &[0, 0, 0, 0, 0])),
        ("a kind nobody knows", frame(0x7f, 0, 0, &[])),
        ("acknowledged settings", frame(SETTINGS, 1, 0, &[])),
    ];
    for (case, one) in kinds {
        let burst = one.repeat(500);
        let mut connection = Http2::connect(lab.clients, &[]).await;
        let flooding = async {
            for _ in 0..100 {
                if !connection.send(&burst).await {
                    break;
                }
                while let Next::Frame(_) = connection.next(Duration::from_millis(1)).await {}
            }
        };
        tokio::join!(flooding, lab.assert_served_within(SERVED_WITHIN, case));
        assert_memory(&lab, before, case);
        // The same without reading the answers.
        let mut deaf = Http2::over(connect_narrow(lab.clients).await, &[]).await;
        for _ in 0..400 {
            if !deaf.send_within(&burst, Duration::from_millis(500)).await {
                break;
            }
        }
        lab.assert_served_within(SERVED_WITHIN, case).await;
        assert_memory(&lab, before, &format!("{case}, replies not read"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_is_referred_to_thousands_of_times_is_not_unpacked() {
    let (lab, before) = warm().await;
    let request = fields("GET", "/v1/models");
    let request: Vec<(&[u8], &[u8])> = request.iter().map(|(n, v)| (&n[..], &v[..])).collect();
    let mut primed = block(&request);
    // Enters the table as its newest entry: index 62.
    literal(&mut primed, 0x40, b"x-bomb", &[b'a'; 3900]);
    let mut bomb = block(&request);
    bomb.extend([0xbe; 15_000]);
    let mut connection = Http2::connect(lab.clients, &[]).await;
    assert!(connection.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &primed)).await);
    assert_eq!(connection.ended(1).await, Ended::Answer(200));
    for i in 1..40 {
        // The peer may have ended it by now.
        if !connection.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1 + 2 * i, &bomb)).await {
            break;
        }
    }
    let ended = connection.ended(3).await;
    assert!(!matches!(ended, Ended::Answer(200) | Ended::Open), "{ended:?}");
    lab.assert_served_within(SERVED_WITHIN, "after the bomb").await;
    assert_memory(&lab, before, "bomb");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_beyond_the_bound_are_refused_and_the_others_live() {
    let lab = Lab::here().await;
    let mut connection = Http2::connect(lab.clients, &[]).await;
    let open: Vec<u8> =
        (0..300).flat_map(|i| headers(1 + 2 * i, &fields("POST", "/v1/chat/completions"), false)).collect();
    assert!(connection.send(&open).await);
    let mut refused = 0;
    while refused < 50 {
        match connection.next(crate::lab::SOON).await {
            Next::Frame(f) if f.kind == RST_STREAM => {
                assert_eq!(f.error(), Some(7), "REFUSED_STREAM, so that clients try again: {f:?}");
                refused += 1;
            }
            Next::Frame(f) => assert_ne!(f.kind, GOAWAY, "{f:?}"),
            end => panic!("{refused} were refused, then {end:?}"),
        }
    }
    assert!(
        connection.send(&frame(DATA, END_STREAM, 1, crate::lab::http1::body("m", false).as_bytes())).await
    );
    assert_eq!(connection.ended(1).await, Ended::Answer(200));
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_make_no_sense_end_their_connection() {
    let lab = Lab::here().await;
    let cases = [
        ("even stream", models(2)),
        ("older stream", [models(5), models(3)].concat()),
        ("stream 0", frame(HEADERS, END_HEADERS | END_STREAM, 0, &[0x82])),
        ("data of a stream nobody opened", frame(DATA, END_STREAM, 7, b"x")),
        ("push promise of a client", frame(5, END_HEADERS, 1, &2_u32.to_be_bytes())),
        ("window of the connection above its end", window_update(0, (1 << 31) - 1)),
        ("window update of nothing", window_update(0, 0)),
        ("frame of 16 MiB", vec![0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]),
        ("start window of 2^31", settings(&[(4, 1 << 31)])),
        ("frame size of 1", settings(&[(5, 1)])),
        ("padding longer than its frame", frame(HEADERS, 8 | END_HEADERS | END_STREAM, 1, &[9, b'a', b'a'])),
        ("ping of 3 bytes", frame(PING, 0, 0, b"abc")),
        ("settings of 5 bytes", frame(SETTINGS, 0, 0, &[0; 5])),
        ("settings of a stream", frame(SETTINGS, 0, 1, &[])),
        (
            "block that cannot be read",
            frame(HEADERS, END_HEADERS | END_STREAM, 1, &[0xff, 0xff, 0xff, 0xff, 0xff]),
        ),
        (
            "block between a block's parts",
            [frame(HEADERS, 0, 1, &[0x82]), frame(PING, 0, 0, &[0; 8])].concat(),
        ),
    ];
    for (case, bytes) in cases {
        let mut connection = Http2::connect(lab.clients, &[]).await;
        let _ = connection.send(&bytes).await;
        let ended = connection.ended(9).await;
        assert!(matches!(ended, Ended::GoAway(1..) | Ended::Closed), "{case}: {ended:?}");
    }
    lab.assert_served_within(SERVED_WITHIN, "after all of it").await;
}
