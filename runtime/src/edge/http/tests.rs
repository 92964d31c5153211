use http_body_util::Full;
use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::edge::clock::now_ms;
use crate::edge::table::Table;
use crate::edge::{Bounds, EdgeMetrics};

mod http2_frames;

use self::http2_frames::{Frames, Kind};

const BOUNDS: HttpBounds =
    HttpBounds { head: HeadBounds { bytes: 8 << 10, fields: 100, target_bytes: 1 << 10 }, streams: 10 };
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: weir\r\n\r\n";
const PEER: std::net::IpAddr = std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
/// Shorter than the interval of HTTP/2 pings.
const IDLE: Duration = Duration::from_secs(5);
/// Reasons to close idle connections.
const REASONS: [Cut; 3] = [Cut::Idle, Cut::Evicted, Cut::Drained];

fn bounds() -> Bounds {
    Bounds { connections: 1, idle: IDLE, stranger_idle: IDLE, ..Bounds::operations() }
}

/// Answers every request of a connection, of either protocol.
fn serve(connection: &Arc<Connection>) -> DuplexStream {
    let (client, server) = duplex(64 << 10);
    let handler = |_client: Client, _request: Request<Incoming>| {
        std::future::ready(Response::new(Full::new(Bytes::from("yes"))))
    };
    let refuse: Refuse = |_| Refusal { body: "{}".to_owned(), request_id: None };
    tokio::spawn(serve_http(server, Arc::clone(connection), BOUNDS, refuse, handler));
    client
}

/// A connection of HTTP/1 after its first answer.
async fn answered() -> (DuplexStream, Arc<Connection>) {
    let connection = Arc::new(Connection::new(PEER, bounds()));
    let mut client = serve(&connection);
    client.write_all(REQUEST).await.expect("written");
    assert!(!answer(&mut client).await.contains("connection: close"));
    (client, connection)
}

async fn answer(client: &mut DuplexStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"yes") {
        assert!(
            client.read_buf(&mut text).await.expect("reads") > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&text)
        );
    }
    String::from_utf8(text).expect("text")
}

/// A connection of HTTP/2 after an answer on its first stream.
async fn answered_http2(known: bool) -> (Frames, Arc<Connection>) {
    let connection = Arc::new(Connection::new(PEER, bounds()));
    if known {
        connection.trust();
    }
    let mut frames = Frames::begin(serve(&connection)).await;
    frames.ask(1).await;
    frames.answer_to(1).await;
    (frames, connection)
}

/// Asks a connection to close, for a reason.
async fn close_for(why: Cut, connection: &Connection) {
    if why == Cut::Idle {
        tokio::time::advance(IDLE).await;
    }
    close_now(why, connection);
}

/// The same, without letting another task run before.
fn close_now(why: Cut, connection: &Connection) {
    match why {
        Cut::Idle => assert!(!connection.sweep(now_ms())),
        other => connection.ask_to_close(other),
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_arrives_while_its_idle_connection_is_asked_to_close_is_answered() {
    for why in REASONS {
        let (mut client, connection) = answered().await;
        tokio::time::advance(IDLE).await;
        client.write_all(REQUEST).await.expect("written");
        close_now(why, &connection);
        assert!(!answer(&mut client).await.contains("connection: close"), "{why:?}");
        client.write_all(REQUEST).await.expect("written");
        answer(&mut client).await;
        assert_eq!(connection.was_cut(), None, "{why:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_answer_to_a_request_that_arrives_at_the_end_of_a_drain_says_that_the_connection_closes() {
    let (mut client, connection) = answered().await;
    connection.drain();
    client.write_all(REQUEST).await.expect("written");
    connection.ask_to_close(Cut::Drained);
    assert!(answer(&mut client).await.contains("connection: close"));
    assert_eq!(client.read(&mut [0]).await.expect("reads"), 0, "closed with the answer");
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_that_is_asked_to_close_closes() {
    for why in REASONS {
        let (mut client, connection) = answered().await;
        close_for(why, &connection).await;
        assert_eq!(client.read(&mut [0]).await.expect("reads"), 0);
        assert_eq!(connection.was_cut(), Some(why));
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_begins_as_the_idle_time_ends_has_its_time_unless_others_need_the_room() {
    for why in REASONS {
        let (mut client, connection) = answered().await;
        tokio::time::advance(IDLE - Duration::from_millis(1)).await;
        let (begin, rest) = REQUEST.split_at(10);
        client.write_all(begin).await.expect("written");
        while connection.is_at_rest(Cut::Idle) {
            tokio::task::yield_now().await;
        }
        close_for(why, &connection).await;
        if why == Cut::Evicted {
            assert_eq!(client.read(&mut [0]).await.expect("reads"), 0);
            continue;
        }
        tokio::time::advance(bounds().head - IDLE - Duration::from_secs(1)).await;
        assert!(!connection.sweep(now_ms()) && connection.was_cut().is_none());
        client.write_all(rest).await.expect("written");
        answer(&mut client).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_later_head_that_never_ends_is_refused_in_time() {
    let (mut client, connection) = answered().await;
    client.write_all(&REQUEST[..10]).await.expect("written");
    while connection.is_at_rest(Cut::Idle) {
        tokio::task::yield_now().await;
    }
    tokio::time::advance(bounds().head).await;
    assert!(!connection.sweep(now_ms()));
    let mut text = String::new();
    client.read_to_string(&mut text).await.expect("reads");
    assert!(text.starts_with("HTTP/1.1 408 "), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_does_not_make_room_because_of_its_request_takes_room_again() {
    let table = Table::new("test", bounds(), EdgeMetrics::default());
    tokio::spawn(super::super::table::sweep(Arc::downgrade(&table)));
    let first = table.admit(PEER).expect("room");
    let mut client = serve(first.connection());
    client.write_all(REQUEST).await.expect("written");
    answer(&mut client).await;
    client.write_all(REQUEST).await.expect("written");
    let second = table.admit(PEER).expect("the idle one makes room");
    answer(&mut client).await;
    assert_eq!((table.len(), first.connection().was_cut()), (2, None));
    // Both connections exist, and both must end for the next one.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let busy = second.connection().begin();
    assert!(table.admit(PEER).is_none(), "the room of one is not enough");
    drop(busy);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _third = table.admit(PEER).expect("both make room");
    assert_eq!(client.read(&mut [0]).await.expect("reads"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_of_http2_that_arrives_while_its_connection_is_asked_to_close_is_answered() {
    for why in REASONS {
        for known in [false, true] {
            let (mut client, connection) = answered_http2(known).await;
            tokio::time::advance(IDLE).await;
            client.ask(3).await;
            close_now(why, &connection);
            client.answer_to(3).await;
            assert_eq!(connection.was_cut(), None, "{why:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_of_http2_is_told_which_of_its_requests_are_answered_before_its_connection_closes() {
    for why in REASONS {
        let (mut client, connection) = answered_http2(true).await;
        close_for(why, &connection).await;
        assert_eq!(client.goaway().await, i32::MAX as u32, "{why:?}");
        // In flight while the client is told of the end.
        client.ask(3).await;
        client.pong().await;
        assert_eq!(client.last_answer_and_goaway().await, (Some(3), Some(3)), "{why:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_idle_client_of_http2_that_does_not_answer_holds_its_connection_for_a_moment() {
    let (mut client, connection) = answered_http2(true).await;
    close_for(Cut::Idle, &connection).await;
    let asked = Instant::now();
    while let Some((kind, _)) = client.next().await {
        assert!(matches!(kind, Kind::GoAway | Kind::Ping), "{kind:?}");
    }
    assert_eq!(asked.elapsed(), GOAWAY_GRACE);
    assert_eq!(connection.was_cut(), Some(Cut::Idle));
}

#[tokio::test(start_paused = true)]
async fn a_stranger_of_http2_makes_room_at_once() {
    let (mut client, connection) = answered_http2(false).await;
    let asked = Instant::now();
    connection.ask_to_close(Cut::Evicted);
    assert!(client.next().await.is_none());
    assert_eq!((asked.elapsed(), connection.was_cut()), (Duration::ZERO, Some(Cut::Evicted)));
}
