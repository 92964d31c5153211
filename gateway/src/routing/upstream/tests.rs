//! Real connections to a server whose every move the test decides.

use std::pin::pin;
use std::sync::Mutex;

use bytes::Bytes;
use http::StatusCode;
use http_body_util::{BodyExt as _, Full};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use weir_proto::resource::{Resource, Spec};
use weir_proto::v1;
use weir_runtime::EgressPolicy;

use super::*;

/// What the server does with the second request of a connection, and with all later ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Answer,
    /// Reads the request and closes.
    Close,
    /// Resets.
    Reset,
    /// Announces the close with a 408.
    Announce,
    /// Writes the beginning of an answer and closes.
    Begin,
    /// Begins the body of an answer and closes.
    Break,
}

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Requests by connection, each in the order in which they came.
type Seen = Arc<Mutex<Vec<usize>>>;

async fn read_request(stream: &mut TcpStream) -> bool {
    let mut read = Vec::new();
    loop {
        let mut part = [0; 4096];
        match stream.read(&mut part).await {
            Ok(count) if count > 0 => read.extend_from_slice(&part[..count]),
            _ => return false,
        }
        if read.ends_with(b"\r\n\r\nhello") {
            return true;
        }
    }
}

async fn serve_one(mut stream: TcpStream, number: usize, seen: Seen, then: Then) {
    let mut requests = 0;
    while read_request(&mut stream).await {
        seen.lock().expect("sound").push(number);
        requests += 1;
        let (bytes, ends): (&[u8], bool) = match then {
            _ if requests == 1 => (ANSWER, false),
            Then::Answer => (ANSWER, false),
            Then::Close => (b"", true),
            Then::Reset => {
                stream.set_zero_linger().expect("a socket");
                (b"", true)
            }
            Then::Announce => {
                (b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", true)
            }
            Then::Begin => (b"HTTP/1.1 2", true),
            Then::Break => (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\no", true),
        };
        if stream.write_all(bytes).await.is_err() || ends {
            return;
        }
    }
}

/// Connections to a server that does this with the second request of each.
async fn connected(then: Then) -> (Upstream, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let (seen, counted) = (Seen::default(), Seen::default());
    let log = seen.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let number = counted.lock().expect("sound").len();
            counted.lock().expect("sound").push(number);
            tokio::spawn(serve_one(stream, number, log.clone(), then));
        }
    });
    (upstream(&url), seen)
}

fn upstream(url: &str) -> Upstream {
    // The server closes, and not this side.
    keeping(url, 64, 3600)
}

/// With so many idle connections, for so many seconds each.
fn keeping(url: &str, max_idle: u32, seconds: i64) -> Upstream {
    let spec = v1::BackendSpec {
        pool: "p".into(),
        url: url.into(),
        models: [("m".to_owned(), String::new())].into(),
        connection: Some(v1::ConnectionSettings {
            max_idle,
            idle_timeout: Some(prost_types::Duration { seconds, nanos: 0 }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = Some(v1::resource::Spec::Backend(spec));
    let wire = v1::Resource { name: "b".into(), spec, ..Default::default() };
    let Spec::Backend(spec) = Resource::try_from(&wire).expect("valid").spec else { panic!("a backend") };
    Upstream::new(&spec, Duration::from_secs(30), &EgressPolicy::default(), &Resolver::system())
}

fn request(upstream: &Upstream) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(Bytes::from_static(b"hello")));
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = upstream.uri("/v1/chat/completions").expect("an address");
    request
}

/// Sends one request, and reads its answer.
async fn ask(upstream: &Upstream) -> Result<(StatusCode, bool), SendError> {
    let answer = upstream.send(|| request(upstream)).await?;
    let status = answer.status();
    Ok((status, answer.into_body().collect().await.is_ok()))
}

#[tokio::test]
async fn a_request_that_meets_the_close_of_its_kept_connection_is_sent_once_more_on_a_new_one() {
    for then in [Then::Close, Then::Reset, Then::Announce] {
        let (upstream, seen) = connected(then).await;
        for i in 0..100 {
            let answer = ask(&upstream).await;
            assert!(matches!(answer, Ok((StatusCode::OK, true))), "{then:?} {i}: {answer:?}");
        }
        let resent = upstream.resent();
        assert!(resent > 0, "{then:?}: a kept connection was used");
        assert_eq!(
            seen.lock().expect("sound").len() as u64,
            100 + resent,
            "{then:?}: each once more at most"
        );
    }
}

/// Answers the requests of a connection until `close` says that all are to be closed.
async fn serve_until(mut stream: TcpStream, mut close: tokio::sync::watch::Receiver<usize>) {
    close.mark_unchanged();
    loop {
        tokio::select! {
            biased;
            asked = read_request(&mut stream) => {
                if !asked || stream.write_all(ANSWER).await.is_err() {
                    return;
                }
            }
            _ = close.changed() => return,
        }
    }
}

/// Requests meet the close while they are written, but also before: when their connection is taken from the pool, and when
/// they are handed over to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_request_fails_when_all_kept_connections_are_closed_at_the_moment_of_the_next_requests() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    let close = tokio::sync::watch::Sender::new(0);
    let closes = close.clone();
    let serving = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve_until(stream, closes.subscribe()));
        }
    });
    for round in 0..150 {
        let mut asking = tokio::task::JoinSet::new();
        for caller in 0..20 {
            if caller == round % 20 {
                close.send_replace(round);
            }
            let upstream = upstream.clone();
            asking.spawn(async move { ask(&upstream).await });
        }
        while let Some(answer) = asking.join_next().await {
            let answer = answer.expect("no panic");
            assert!(matches!(answer, Ok((StatusCode::OK, true))), "round {round}: {answer:?}");
        }
    }
    serving.abort();
}

#[tokio::test]
async fn a_connection_that_serves_is_kept_and_nothing_is_sent_again() {
    let (upstream, seen) = connected(Then::Answer).await;
    for _ in 0..20 {
        assert!(matches!(ask(&upstream).await, Ok((StatusCode::OK, true))));
    }
    assert_eq!(upstream.resent(), 0);
    assert_eq!(seen.lock().expect("sound").len(), 20);
}

#[tokio::test]
async fn once_a_byte_of_the_answer_came_nothing_is_sent_again() {
    for then in [Then::Begin, Then::Break] {
        let (upstream, seen) = connected(then).await;
        let mut failed = 0;
        // Until a kept connection was used: the pool learns of an answer's end a moment after its reader.
        while failed == 0 {
            failed += u64::from(!matches!(ask(&upstream).await, Ok((StatusCode::OK, true))));
        }
        assert_eq!(upstream.resent(), 0, "{then:?}");
        let seen = seen.lock().expect("sound");
        let connections: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(seen.len(), connections.len() + 1, "{then:?}: {seen:?}");
    }
}

#[tokio::test]
async fn a_new_connection_that_is_closed_is_a_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    let serving = tokio::spawn(async move {
        let mut requests = 0;
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            requests += usize::from(read_request(&mut stream).await);
            if requests == 3 {
                return listener;
            }
        }
    });
    for _ in 0..3 {
        assert!(ask(&upstream).await.is_err());
    }
    drop(serving.await.expect("ends"));
    assert_eq!(upstream.resent(), 0);
    let refused = ask(&upstream).await.expect_err("nobody listens");
    assert!(refused.is_connect());
}

#[tokio::test]
async fn a_server_that_went_away_is_asked_once_more_and_then_it_is_a_failure() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        drop(listener);
        read_request(&mut stream).await;
        stream.write_all(ANSWER).await.expect("sent");
        // Closes with the second one unread or read, whichever comes first.
        read_request(&mut stream).await;
    });
    assert!(matches!(ask(&upstream).await, Ok((StatusCode::OK, true))));
    assert!(ask(&upstream).await.expect_err("nobody listens").is_connect());
    serving.abort();
}

#[tokio::test]
async fn an_answer_is_read_in_small_parts_however_fast_it_comes() {
    const BYTES: usize = 1 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        while read_request(&mut stream).await {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n");
            let answer = [head.into_bytes(), vec![b'x'; BYTES]].concat();
            stream.write_all(&answer).await.expect("read to its end");
        }
    });
    for _ in 0..3 {
        let mut body = upstream.send(|| request(&upstream)).await.expect("an answer").into_body();
        let (mut largest, mut all) = (0, 0);
        while let Some(frame) = body.frame().await {
            let bytes = frame.expect("sound").data_ref().map_or(0, Bytes::len);
            (largest, all) = (largest.max(bytes), all + bytes);
        }
        assert_eq!(all, BYTES);
        assert!(largest <= 8 << 10, "{largest}");
    }
}

/// A task that has done much is told to pause by whatever it polls next, and is woken for it by the waker that it polls with.
#[tokio::test]
async fn an_answer_is_noticed_by_a_task_that_has_to_pause() {
    let (upstream, _seen) = connected(Then::Answer).await;
    // A task may do 128 things at a time.
    for work in 0..128 {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let mut asking = pin!(ask(&upstream));
        let answer = poll_fn(|cx| {
            for _ in 0..work {
                sender.send(()).expect("open");
                let _ = receiver.poll_recv(cx);
            }
            asking.as_mut().poll(cx)
        });
        let answer = tokio::time::timeout(Duration::from_secs(20), answer).await.expect("noticed");
        assert!(matches!(answer, Ok((StatusCode::OK, true))), "{work}: {answer:?}");
    }
}

/// Ends when the other side has closed.
async fn closed(mut stream: TcpStream) {
    while read_request(&mut stream).await {
        stream.write_all(ANSWER).await.expect("open");
    }
}

#[tokio::test]
async fn no_more_is_kept_than_may_be_and_nothing_for_longer_than_it_may() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("bound"));
    let upstream = keeping(&url, 2, 2);
    let mut asking = tokio::task::JoinSet::new();
    let mut streams = Vec::new();
    for _ in 0..5 {
        let upstream = upstream.clone();
        asking.spawn(async move { ask(&upstream).await.expect("an answer") });
        streams.push(listener.accept().await.expect("a connection").0);
    }
    let mut serving = tokio::task::JoinSet::new();
    streams.into_iter().for_each(|stream| drop(serving.spawn(closed(stream))));
    asking.join_all().await;
    for _ in 0..3 {
        serving.join_next().await.expect("five").expect("no panic");
    }
    assert!(serving.try_join_next().is_none(), "two are kept");
    serving.join_all().await;
}

/// The server closes, and the descriptor is not held until somebody wants the connection.
#[tokio::test]
async fn what_the_server_has_closed_is_closed_here_too() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        assert!(read_request(&mut stream).await);
        stream.write_all(ANSWER).await.expect("open");
        stream.shutdown().await.expect("open");
        assert!(!read_request(&mut stream).await, "closed by the other side");
    });
    assert!(matches!(ask(&upstream).await, Ok((StatusCode::OK, true))));
    serving.await.expect("closed");
}

#[tokio::test]
async fn an_answer_that_nobody_reads_to_its_end_closes_its_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = upstream(&format!("http://{}", listener.local_addr().expect("bound")));
    let serving = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        assert!(read_request(&mut stream).await);
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhe").await.expect("open");
        assert!(!read_request(&mut stream).await, "closed by the other side");
    });
    let answer = upstream.send(|| request(&upstream)).await.expect("an answer");
    drop(answer);
    serving.await.expect("closed");
}

#[tokio::test]
async fn a_head_of_14_kib_is_read_and_one_beyond_the_bounds_is_told_apart_from_a_broken_connection() {
    for (field_bytes, fields, fits) in [(1400, 10, true), (2000, 10, false), (10, 90, true), (10, 110, false)]
    {
        let field = |number| format!("x-field-{number}: {}\r\n", "x".repeat(field_bytes));
        let fields: String = (0..fields).map(field).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            read_request(&mut stream).await;
            let answer = format!("HTTP/1.1 200 OK\r\n{fields}content-length: 2\r\n\r\nok");
            // The gateway may have closed before it was written.
            drop(stream.write_all(answer.as_bytes()).await);
            read_request(&mut stream).await
        });
        match ask(&upstream(&url)).await {
            Ok(answer) => assert!(fits && answer == (StatusCode::OK, true), "{field_bytes} {answer:?}"),
            Err(error) => {
                assert!(!fits && error.is_head_too_large(), "{field_bytes} {error:?}")
            }
        }
    }
}
