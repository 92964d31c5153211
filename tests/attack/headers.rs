//! Headers of clients: only those of a list reach a backend, and a value never becomes another header.

use weir_tests::cluster::KEY;
use weir_tests::scripted::Asked;

use crate::lab::Lab;
use crate::lab::http1::{body, exchange, post};
use crate::lab::http2::{DATA, END_STREAM, Ended, Http2, fields, frame, headers};

/// Every header that a gateway sends or passes on.
const EXPECTED: [&str; 13] = [
    "accept",
    "accept-language",
    "content-length",
    "content-type",
    "host",
    "idempotency-key",
    "openai-beta",
    "traceparent",
    "tracestate",
    "user-agent",
    "x-client-request-id",
    "x-request-id",
    "accept-encoding",
];

/// Headers that a client may hope a backend believes.
const STRANGE: [(&str, &str); 20] = [
    ("x-forwarded-for", "1.2.3.4"),
    ("x-forwarded-host", "evil.example"),
    ("x-forwarded-proto", "https"),
    ("x-real-ip", "1.2.3.4"),
    ("forwarded", "for=1.2.3.4"),
    ("via", "1.1 evil"),
    ("cookie", "a=b"),
    ("openai-organization", "theirs"),
    ("openai-project", "theirs"),
    ("x-http-method-override", "DELETE"),
    ("x-original-url", "/admin"),
    ("x-rewrite-url", "/admin"),
    ("content-md5", "x"),
    ("range", "bytes=0-1"),
    ("if-none-match", "*"),
    ("x-weir-tenant", "other"),
    ("x-weir-internal", "1"),
    ("priority", "u=0"),
    ("x_request_id", "theirs"),
    ("origin", "http://evil.example"),
];

fn assert_only_expected(case: &str, arrived: &Asked) {
    for line in arrived.head.lines().skip(1).filter(|line| !line.is_empty()) {
        let name = line.split(':').next().expect("a name").to_ascii_lowercase();
        assert!(EXPECTED.contains(&name.as_str()), "{case}: {name} reached the backend: {}", arrived.head);
    }
    assert!(!arrived.head.contains(KEY), "{case}: the client's key reached the backend");
    let lengths: Vec<_> = arrived.headers("content-length").collect();
    assert_eq!(lengths, [arrived.body.len().to_string()], "{case}: {}", arrived.head);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_listed_headers_reach_a_backend_over_http1() {
    let lab = Lab::here().await;
    let body = body("m", false);
    let strange: String = STRANGE.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    // The names in `Connection` belong to this connection only, even those that would be passed on otherwise.
    let hop = "Connection: close, X-Client-Request-Id, OpenAI-Beta\r\nX-Client-Request-Id: ok\r\nOpenAI-Beta: a\r\n\
               Keep-Alive: timeout=5\r\nProxy-Connection: x\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: x\r\n";
    let request = format!("{}{strange}{hop}Content-Length: {}\r\n\r\n{body}", post(), body.len());
    let heard = exchange(lab.clients, request).await;
    assert_eq!(heard.statuses(), [200], "{heard:?}");
    let arrived = lab.backend.arrived().pop().expect("it arrived");
    assert_only_expected("HTTP/1", &arrived);
    assert!(arrived.headers("content-type").eq(["application/json"]), "{}", arrived.head);
    for hop in ["x-client-request-id", "openai-beta"] {
        assert_eq!(arrived.header(hop), None, "{hop} is hop by hop: {}", arrived.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_listed_headers_reach_a_backend_over_http2() {
    let lab = Lab::here().await;
    let mut all = fields("POST", "/v1/chat/completions");
    all.extend(STRANGE.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())));
    all.push((b"te".to_vec(), b"trailers".to_vec()));
    let mut connection = Http2::connect(lab.clients, &[]).await;
    let data = frame(DATA, END_STREAM, 1, body("m", false).as_bytes());
    assert!(connection.send(&[headers(1, &all, false), data].concat()).await);
    assert_eq!(connection.ended(1).await, Ended::Answer(200));
    assert_only_expected("HTTP/2", &lab.backend.arrived().pop().expect("it arrived"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_from_http2_never_becomes_a_line_of_http1() {
    let lab = Lab::here().await;
    let text = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    let good = fields("POST", "/v1/chat/completions");
    let also = |name: &str, value: &str| [&good[..], &[text(name, value)]].concat();
    let instead = |name: &str, value: &str| {
        let change = |(known, old): &(Vec<u8>, Vec<u8>)| match known == name.as_bytes() {
            true => text(name, value),
            false => (known.clone(), old.clone()),
        };
        good.iter().map(change).collect::<Vec<_>>()
    };
    let without = |name: &str| good.iter().filter(|(n, _)| n != name.as_bytes()).cloned().collect::<Vec<_>>();
    let cases = [
        ("line break in a value", also("user-agent", "a\r\nx-evil: b")),
        ("line feed in a value", also("user-agent", "a\nx-evil: b")),
        ("carriage return in a value", also("user-agent", "a\rx-evil: b")),
        ("zero byte in a value", also("user-agent", "a\0b")),
        ("line break in a name", also("x-a: b\r\nx-evil", "b")),
        ("colon in a name", also("x:a", "b")),
        ("space in a name", also("x a", "b")),
        ("capitals in a name", also("X-Evil", "b")),
        ("empty name", also("", "b")),
        ("line break in the path", instead(":path", "/v1/chat/completions HTTP/1.1\r\nx-evil: y")),
        ("space in the path", instead(":path", "/v1/chat/completions x")),
        ("empty path", instead(":path", "")),
        ("path without a slash", instead(":path", "v1/chat/completions")),
        ("line break in the method", instead(":method", "POST / HTTP/1.1\r\nHost: a\r\n\r\nPOST")),
        ("space in the method", instead(":method", "POST x")),
        ("line break in the authority", instead(":authority", "x\r\nx-evil: z")),
        ("scheme with a host", instead(":scheme", "http://a/b?")),
        ("two paths", also(":path", "/x")),
        ("two methods", [&good[..1], &good[..]].concat()),
        ("pseudo header behind another", [&good[..3], &good[4..], &good[3..4]].concat()),
        ("unknown pseudo header", [&[text(":x", "y")], &good[..]].concat()),
        ("status in a request", [&[text(":status", "200")], &good[..]].concat()),
        ("no path", without(":path")),
        ("no method", without(":method")),
        ("no scheme", without(":scheme")),
        ("connection", also("connection", "close")),
        ("transfer-encoding", also("transfer-encoding", "chunked")),
        ("te beyond trailers", also("te", "gzip")),
        ("upgrade", also("upgrade", "h2c")),
        ("keep-alive", also("keep-alive", "x")),
        ("proxy-connection", also("proxy-connection", "x")),
        ("length too small", also("content-length", "3")),
        ("length too large", also("content-length", "3000")),
        ("length with a sign", also("content-length", "+10")),
        ("two lengths", [&good[..], &[text("content-length", "10"), text("content-length", "3")]].concat()),
        ("tunnel", [&[text(":method", "CONNECT"), text(":authority", "127.0.0.1:1")], &good[4..]].concat()),
        ("websocket", [&[text(":method", "CONNECT"), text(":protocol", "websocket")], &good[1..]].concat()),
    ];
    for (case, fields) in cases {
        let mut connection = Http2::connect(lab.clients, &[]).await;
        let data = frame(DATA, END_STREAM, 1, body("m", false).as_bytes());
        // The peer may close it after the first frame.
        let _ = connection.send(&[headers(1, &fields, false), data].concat()).await;
        let ended = connection.ended(1).await;
        let refused = match ended {
            Ended::Answer(status) => (400..=501).contains(&status),
            Ended::Open => false,
            Ended::Reset(_) | Ended::GoAway(_) | Ended::Closed => true,
        };
        assert!(refused, "{case}: {ended:?}");
        assert!(lab.backend.arrived().is_empty(), "{case}: {:?}", lab.backend.arrived());
    }
}
