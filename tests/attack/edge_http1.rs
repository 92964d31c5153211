//! Strict HTTP/1: an error by RFC 9112 is answered with its reason, and the connection ends.

use std::fmt::Write as _;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::Instant;
use weir_tests::cluster::KEY;

use crate::lab::backend::SLOW_EVERY;
use crate::lab::http1::{End, Heard, body, chat, exchange, exchange_until, listen, models, post};
use crate::lab::http2::{Ended, Http2, fields, headers};
use crate::lab::{Lab, SOON, connect};

/// The wrong cases of a table, all of which are reported at the end.
#[derive(Debug, Default)]
struct Wrong(Vec<String>);

impl Wrong {
    /// One answer with one of these statuses and its reason in JSON, and then the end of the connection.
    fn unless_refused(&mut self, case: &str, heard: &Heard, statuses: &[u16]) {
        let replies = heard.replies();
        let fault = match &replies[..] {
            [reply] if !statuses.contains(&reply.status) => "another status",
            [reply] if reply.error().is_none_or(|reason| reason.is_empty()) => "no error in JSON",
            [reply] if reply.header("content-type") != Some("application/json") => "another type than JSON",
            [reply] if !reply.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")) => {
                "the client is not told of the end"
            }
            [_] if heard.end != End::Closed => "not closed",
            [_] => return,
            [] => "no answer",
            _ => "more than one answer",
        };
        self.0.push(format!("{case}: one of {statuses:?}, but {fault}: {heard:?}"));
    }

    /// Nothing reached the backend.
    fn unless_kept_back(&mut self, case: &str, lab: &Lab, before: usize) {
        let arrived = lab.backend.arrived();
        if arrived.len() > before {
            self.0.push(format!("{case}: the backend got {:?}", arrived[before].head));
        }
    }

    fn assert_none(self) {
        assert!(self.0.is_empty(), "{} cases:\n{}", self.0.len(), self.0.join("\n"));
    }
}

/// The request for the list of models without `Connection: close`, with this text replaced.
fn list_but(what: &str, instead: &str) -> Vec<u8> {
    let text = String::from_utf8(models("")).expect("UTF-8");
    assert!(text.contains(what), "{what} is in {text}");
    text.replacen(what, instead, 1).into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn ambiguous_framing_is_400_and_closed() {
    let lab = Lab::here().await;
    let (n, te) = (body("m", false).len(), "Transfer-Encoding: chunked\r\n");
    let chunked = format!("{n:x}\r\n{}\r\n0\r\n\r\n", body("m", false));
    let framed =
        |framing: &str| [format!("{}{framing}\r\n{chunked}", post()).as_bytes(), &models("")].concat();
    let more = vec![
        ("chunked twice", framed(&te.repeat(2))),
        ("chunked twice in a list", framed("Transfer-Encoding: chunked, chunked\r\n")),
        ("gzip, chunked", framed("Transfer-Encoding: gzip, chunked\r\n")),
        ("identity, chunked", framed("Transfer-Encoding: identity, chunked\r\n")),
        ("gzip alone", framed("Transfer-Encoding: gzip\r\n")),
        ("identity alone", framed("Transfer-Encoding: identity\r\n")),
        ("an empty encoding", framed("Transfer-Encoding:\r\n")),
        ("a comma before it", framed("Transfer-Encoding: , chunked\r\n")),
        ("a coding in one field, chunked in the next", framed(&format!("Transfer-Encoding: gzip\r\n{te}"))),
        (
            "in HTTP/1.0",
            String::from_utf8(framed(te)).expect("UTF-8").replacen("HTTP/1.1", "HTTP/1.0", 1).into_bytes(),
        ),
        ("on a GET, with a length", models(&format!("{te}Content-Length: 3\r\n"))),
        (
            "lengths that differ by a zero",
            framed(&format!("Content-Length: {n}\r\nContent-Length: 0{n}1\r\n")),
        ),
        ("a list of different lengths", framed("Content-Length: 5, 6\r\n")),
        ("a length with a dot", framed("Content-Length: 5.0\r\n")),
        ("a length with a space within", framed("Content-Length: 1 0\r\n")),
        ("a length of 100 digits", framed(&format!("Content-Length: {}\r\n", "9".repeat(100)))),
    ];
    let mut wrong = Wrong::default();
    for (case, bytes) in crate::http1::ambiguous().into_iter().chain(more) {
        let before = lab.backend.arrived().len();
        // RFC 9112 offers 501 for codings that a server does not know.
        wrong.unless_refused(case, &exchange(lab.clients, &bytes).await, &[400, 501]);
        wrong.unless_kept_back(case, &lab, before);
    }
    wrong.assert_none();
}

/// Heads that break the grammar.
fn malformed() -> Vec<(&'static str, Vec<u8>)> {
    let list = |more: &str| models(more);
    let all_bare = String::from_utf8(models("")).expect("UTF-8").replace("\r\n", "\n").into_bytes();
    vec![
        ("line feeds alone", all_bare),
        ("one line feed alone among fields", list("X-A: a\nX-B: b\r\n")),
        ("line feed alone behind the request line", list_but("HTTP/1.1\r\n", "HTTP/1.1\n")),
        ("line feed alone as the empty line", list_but("\r\n\r\n", "\r\n\n")),
        ("line feed alone before the empty line", list_but("\r\n\r\n", "\n\r\n")),
        ("carriage return in a value", list("X-A: a\rb\r\n")),
        ("carriage return alone as an end", list("X-A: a\rX-B: b\r\n")),
        ("two carriage returns", list("X-A: a\r\r\n")),
        ("zero byte in a value", list("X-A: a\0b\r\n")),
        ("zero byte in a name", list("X\0A: b\r\n")),
        ("zero byte in the path", list_but("/v1/models", "/v1/mod\0els")),
        ("control byte in a value", list("X-A: a\x01b\r\n")),
        ("delete in a value", list("X-A: a\x7fb\r\n")),
        ("folded value", list("X-A: a\r\n b\r\n")),
        ("folded by a tab", list("X-A: a\r\n\tb\r\n")),
        ("first field folded", list_but("Host: x", " Host: x")),
        ("space before the colon", list("X-A : a\r\n")),
        ("no colon", list("XA\r\n")),
        ("no name", list(": a\r\n")),
        ("brackets in a name", list("X(A): a\r\n")),
        ("no host", list_but("Host: x\r\n", "")),
        ("no host, absolute target", {
            let text = String::from_utf8(list_but("Host: x\r\n", "")).expect("UTF-8");
            text.replacen("/v1", "http://x/v1", 1).into_bytes()
        }),
        ("two hosts", list("Host: y\r\n")),
        ("two equal hosts", list("Host: x\r\n")),
        ("host with a user", list_but("Host: x", "Host: a@b")),
        ("host with a path", list_but("Host: x", "Host: a/b")),
        ("host with both", list_but("Host: x", "Host: a@b/../c")),
        ("host with a space", list_but("Host: x", "Host: a b")),
        ("host of a list", list_but("Host: x", "Host: a, b")),
        ("host with a query", list_but("Host: x", "Host: a?b")),
        ("host with a fragment", list_but("Host: x", "Host: a#b")),
        ("host with a backslash", list_but("Host: x", "Host: a\\b")),
        ("host with a scheme", list_but("Host: x", "Host: http://a")),
        ("host with a wrong port", list_but("Host: x", "Host: x:y")),
        ("host with two ports", list_but("Host: x", "Host: x:1:2")),
        ("host with an open bracket", list_but("Host: x", "Host: [::1")),
        ("another authority in the target", list_but("/v1/models", "http://evil.example/v1/models")),
        ("another port in the target", list_but("/v1/models", "http://x:81/v1/models")),
        ("user in the target", list_but("/v1/models", "http://u:p@x/v1/models")),
        ("space before the method", list_but("GET ", " GET ")),
        ("tab for a space", list_but("GET ", "GET\t")),
        ("two spaces", list_but("GET ", "GET  ")),
        ("space behind the version", list_but("HTTP/1.1\r\n", "HTTP/1.1 \r\n")),
        ("no version", b"GET /v1/models\r\n\r\n".to_vec()),
        ("brackets in the method", list_but("GET", "G(ET)")),
        ("version in small letters", list_but("HTTP/1.1", "http/1.1")),
        ("version without a point", list_but("HTTP/1.1", "HTTP/11")),
        ("TLS hello", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[7; 64]].concat()),
        ("random bytes", vec![0x80, 0x81, 0xfe, 0xff, b'\r', b'\n', b'\r', b'\n']),
        ("two keys, the good one first", list("Authorization: Bearer bad\r\n")),
        ("two keys, the good one last", list_but("Host: x\r\n", "Host: x\r\nAuthorization: Bearer bad\r\n")),
        ("the same key twice", list(&format!("authorization: Bearer {KEY}\r\n"))),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_head_is_400_and_closed() {
    let lab = Lab::here().await;
    let mut wrong = Wrong::default();
    for (case, bytes) in malformed() {
        // Behind it is a request that would be answered.
        let heard = exchange(lab.clients, [&bytes[..], &models("")].concat()).await;
        // A missing version may be answered as a wrong version.
        let statuses: &[u16] = if case.contains("version") { &[400, 505] } else { &[400] };
        wrong.unless_refused(case, &heard, statuses);
    }
    wrong.assert_none();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_head_is_refused_alike_when_it_comes_in_pieces() {
    /// Several per line.
    const PIECE_BYTES: usize = 5;
    let lab = Lab::here().await;
    let mut wrong = Wrong::default();
    for (case, bytes) in malformed() {
        let (mut reader, mut writer) = connect(lab.clients).await.into_split();
        let sending = async {
            for piece in [&bytes[..], &models("")].concat().chunks(PIECE_BYTES) {
                // The peer may have refused already.
                if writer.write_all(piece).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            std::future::pending::<()>().await;
        };
        let heard = tokio::select! {
            heard = listen(&mut reader, SOON) => heard,
            () = sending => unreachable!("it only ends with the other"),
        };
        let statuses: &[u16] = if case.contains("version") { &[400, 505] } else { &[400] };
        wrong.unless_refused(case, &heard, statuses);
    }
    wrong.assert_none();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_long_is_431_or_414_and_another_version_is_505() {
    let lab = Lab::here().await;
    let many = |n: usize| {
        (0..n).fold(String::new(), |mut out, i| {
            let _ = write!(out, "X-{i}: a\r\n");
            out
        })
    };
    let long = |n: usize| format!("X-A: {}\r\n", "a".repeat(n));
    let query = |n: usize| list_but("/v1/models", &format!("/v1/models?{}", "a".repeat(n)));
    let cases = [
        ("101 fields", models(&many(99)), vec![431]),
        ("1000 fields", models(&many(1000)), vec![431]),
        ("a field of 70 KB", models(&long(70_000)), vec![431]),
        ("a field of 1 MB", models(&long(1_000_000)), vec![431]),
        ("fields of 70 KB", models(&long(7000).repeat(10)), vec![431]),
        ("a name of 70 KB", models(&format!("{}: a\r\n", "a".repeat(70_000))), vec![431]),
        (
            "a field of 4 MB without an end",
            models(&long(4_000_000)).strip_suffix(b"\r\n\r\n").expect("ends").to_vec(),
            vec![431],
        ),
        ("a target of 100 KB", query(100_000), vec![414]),
        ("a target of 1 MB", query(1_000_000), vec![414]),
        ("a target without an end", format!("GET /{}", "a".repeat(200_000)).into_bytes(), vec![414]),
        ("a method of 100 KB", list_but("GET", &"G".repeat(100_000)), vec![400, 414, 431, 501]),
        ("HTTP/9.9", list_but("HTTP/1.1", "HTTP/9.9"), vec![505]),
        ("HTTP/2.0 in a line", list_but("HTTP/1.1", "HTTP/2.0"), vec![505]),
        ("HTTP/3.0 in a line", list_but("HTTP/1.1", "HTTP/3.0"), vec![505]),
    ];
    let mut wrong = Wrong::default();
    for (case, bytes, statuses) in cases {
        wrong.unless_refused(case, &exchange(lab.clients, &bytes).await, &statuses);
    }
    wrong.assert_none();
    // Requests just within the bounds are served.
    let fits = models(&(many(95) + "Connection: close\r\n"));
    assert_eq!(exchange(lab.clients, fits).await.statuses(), [200]);
    let fits = models(&(long(50_000) + "Connection: close\r\n"));
    assert_eq!(exchange(lab.clients, fits).await.statuses(), [200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unusual_and_right_is_served() {
    let lab = Lab::here().await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let list = text(models("Connection: close\r\n"));
    let post = post() + "Connection: close\r\n";
    let (body, n) = (body("m", false), body("m", false).len());
    for (case, request) in [
        ("absolute target", list.replacen("/v1", "http://x/v1", 1)),
        ("host in capitals", list.replacen("Host: x", "HOST: X", 1).replacen("/v1", "http://x/v1", 1)),
        ("IPv6 host", list.replacen("Host: x", "Host: [::1]:8080", 1)),
        ("host with a port", list.replacen("Host: x", "Host: example.com:80", 1)),
        ("empty value", list.replacen("Host: x", "X-A:\r\nHost: x", 1)),
        ("no space behind the colon", list.replacen("Host: x", "Host:x", 1)),
        ("spaces around a value", list.replacen("Host: x", "Host: \t x \t", 1)),
        ("HTTP/1.0 with a host", list.replacen("HTTP/1.1", "HTTP/1.0", 1)),
        ("HTTP/1.0 without a host", list.replacen("HTTP/1.1", "HTTP/1.0", 1).replacen("Host: x\r\n", "", 1)),
        ("bytes above ASCII in a value", list.replacen("Host: x", "X-A: \u{e4}\r\nHost: x", 1)),
        ("two equal lengths", format!("{post}Content-Length: {n}\r\nContent-Length: {n}\r\n\r\n{body}")),
        ("a length with zeros before it", format!("{post}Content-Length: 00{n}\r\n\r\n{body}")),
        (
            "capitals in the coding",
            format!("{post}Transfer-Encoding: CHUNKED\r\n\r\n{n:x}\r\n{body}\r\n0\r\n\r\n"),
        ),
        (
            "a chunk's extension",
            format!("{post}Transfer-Encoding: chunked\r\n\r\n{n:x};a=b\r\n{body}\r\n0\r\n\r\n"),
        ),
        (
            "zeros before a size",
            format!("{post}Transfer-Encoding: chunked\r\n\r\n000{n:X}\r\n{body}\r\n000\r\n\r\n"),
        ),
    ] {
        let heard = exchange(lab.clients, request).await;
        // Equal lengths may be refused too.
        let served = heard.statuses() == [200] || case == "two equal lengths" && heard.statuses() == [400];
        assert!(served, "{case}: {heard:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_chunks_are_400_and_closed() {
    let lab = Lab::here().await;
    let (body, n) = (body("m", false), body("m", false).len());
    let start = format!("{}Transfer-Encoding: chunked\r\n\r\n", post());
    let one = |size: &str| format!("{start}{size}\r\n{body}\r\n0\r\n\r\n");
    let megabyte = "a".repeat(1 << 20);
    let cases = [
        ("space behind the size", one(&format!("{n:x} "))),
        ("tab behind the size", one(&format!("{n:x}\t"))),
        ("space before the size", one(&format!(" {n:x}"))),
        ("line feed alone", format!("{start}{n:x}\n{body}\r\n0\r\n\r\n")),
        ("line feed alone behind the data", format!("{start}{n:x}\r\n{body}\n0\r\n\r\n")),
        ("line feed alone at the end", format!("{start}{n:x}\r\n{body}\r\n0\r\n\n")),
        ("carriage return alone", format!("{start}{n:x}\r{body}\r\n0\r\n\r\n")),
        ("negative", one("-1")),
        ("with a sign", one(&format!("+{n:x}"))),
        ("hex mark", one(&format!("0x{n:x}"))),
        ("underscore", one(&format!("0_{n:x}"))),
        ("empty", one("")),
        ("no number", one("g")),
        ("2^64", one("10000000000000000")),
        ("2^68", one("fffffffffffffffff")),
        ("2^64 - 1", one("ffffffffffffffff")),
        ("comma", one(&format!("{n:x},"))),
        ("line feed in an extension", one(&format!("{n:x};a\nb"))),
        ("carriage return in an extension", one(&format!("{n:x};a\rb"))),
        ("extension of 1 MiB", one(&format!("{n:x};{megabyte}"))),
        ("many extensions", start.clone() + &format!("1;{}\r\na\r\n", &megabyte[..1000]).repeat(2000)),
        ("data longer than its size", format!("{start}{n:x}\r\n{body}XX0\r\n\r\n")),
        ("size longer than its data", format!("{start}{:x}\r\n{body}\r\n0\r\n\r\n", n + 3)),
        (
            "end without an empty line, then a request",
            format!("{start}{n:x}\r\n{body}\r\n0\r\nGET / HTTP/1.1\r\n\r\n"),
        ),
        (
            "trailers of 1 MiB",
            format!(
                "{start}{n:x}\r\n{body}\r\n0\r\n{}\r\n",
                format!("X-T: {}\r\n", "a".repeat(29)).repeat(30_000)
            ),
        ),
        ("one trailer of 1 MiB", format!("{start}{n:x}\r\n{body}\r\n0\r\nX-T: {megabyte}\r\n\r\n")),
    ];
    let mut wrong = Wrong::default();
    for (case, request) in cases {
        let before = lab.backend.arrived().len();
        let heard = exchange(lab.clients, [request.as_bytes(), &models("")].concat()).await;
        // Trailers may be too long as a head is.
        let statuses: &[u16] = if case.contains("trailer") { &[400, 431] } else { &[400] };
        wrong.unless_refused(case, &heard, statuses);
        wrong.unless_kept_back(case, &lab, before);
    }
    for (case, request) in [
        ("truncated last chunk", format!("{start}{n:x}\r\n{body}\r\n0\r\n")),
        ("truncated size", format!("{start}{n:x}")),
        ("truncated data", format!("{start}{n:x}\r\n{}", &body[..n / 2])),
        ("no last chunk", format!("{start}{n:x}\r\n{body}\r\n")),
        ("truncated body of a length", format!("{}Content-Length: {n}\r\n\r\n{}", post(), &body[..n / 2])),
    ] {
        let before = lab.backend.arrived().len();
        let mut socket = connect(lab.clients).await;
        socket.write_all(request.as_bytes()).await.expect("sent");
        socket.shutdown().await.expect("a half closed connection");
        // 408 would make clients send the same again.
        wrong.unless_refused(case, &listen(&mut socket, SOON).await, &[400]);
        wrong.unless_kept_back(case, &lab, before);
    }
    wrong.assert_none();
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_change_nothing() {
    let lab = Lab::here().await;
    let (body, n) = (body("m", false), body("m", false).len());
    let trailers = "Content-Length: 5\r\nAuthorization: Bearer bad\r\nTransfer-Encoding: x\r\nX-Client-Request-Id: status-500\r\nHost: evil\r\n";
    let first = format!(
        "{}Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n{n:x}\r\n{body}\r\n0\r\n{trailers}\r\n",
        post()
    );
    let heard = exchange(lab.clients, [first.as_bytes(), &models("Connection: close\r\n")].concat()).await;
    assert_eq!(heard.statuses(), [200, 200], "{heard:?}");
    // A key in trailers opens nothing either.
    let without = first
        .replace(&format!("Authorization: Bearer {KEY}\r\n"), "")
        .replace("Bearer bad", &format!("Bearer {KEY}"));
    let heard = exchange_until(lab.clients, without, Duration::from_secs(2)).await;
    assert_eq!(heard.statuses(), [401], "{heard:?}");
    let arrived = lab.backend.arrived();
    assert_eq!(arrived.len(), 1);
    assert_eq!(arrived[0].header("x-client-request-id"), None, "{}", arrived[0].head);
}

#[tokio::test(flavor = "multi_thread")]
async fn line_breaks_between_requests_are_ignored_and_delay_nothing() {
    let lab = Lab::here().await;
    let (list, last) = (models(""), models("Connection: close\r\n"));
    for (case, bytes, count) in [
        ("one before", [b"\r\n", &last[..]].concat(), 1),
        ("three before", [b"\r\n\r\n\r\n", &last[..]].concat(), 1),
        ("one between", [&list[..], b"\r\n", &last[..]].concat(), 2),
        ("three between", [&list[..], b"\r\n\r\n\r\n", &last[..]].concat(), 2),
    ] {
        let heard = exchange(lab.clients, bytes).await;
        assert_eq!(heard.statuses(), vec![200; count], "{case}: {heard:?}");
    }
    // After the last chunk: the answer comes at once, and not with the end of the connection.
    let (began, mut socket) = (Instant::now(), connect(lab.clients).await);
    socket.write_all(&[&list[..], b"\r\n"].concat()).await.expect("sent");
    let mut first = [0; 12];
    tokio::time::timeout(SOON, socket.read_exact(&mut first)).await.expect("in time").expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pipelined_behind_a_stream_delays_no_chunk_of_it() {
    /// The events of the stream, which lasts five seconds.
    const EVENTS: u32 = 50;
    let lab = Lab::here().await;
    let stream = chat("m", &format!("slow-{EVENTS}"), false);
    for (case, behind, answers) in [
        ("a line break", b"\r\n".to_vec(), 1),
        ("a byte", b"G".to_vec(), 1),
        ("a whole request", models("Connection: close\r\n"), 2),
        ("half a request", models("")[..30].to_vec(), 1),
        ("sixty thousand bytes of a body", [&chat("m", "ok", true)[..], &[b' '; 60_000]].concat(), 2),
    ] {
        let (began, mut socket) = (Instant::now(), connect(lab.clients).await);
        socket.write_all(&[&stream[..], &behind].concat()).await.expect("sent");
        let mut heard = Vec::new();
        let mut seen = Vec::new();
        while seen.len() < EVENTS as usize {
            let read = tokio::time::timeout(SOON, socket.read_buf(&mut heard)).await;
            let read = read.unwrap_or_else(|_| panic!("{case}: silent after {} events", seen.len()));
            assert_ne!(read.expect("not reset"), 0, "{case}: ended after {} events", seen.len());
            let events = heard.windows(b"\"content\"".len()).filter(|w| *w == b"\"content\"").count();
            seen.resize(events, began.elapsed());
        }
        // The first event comes at once, and the last one at least half a stream later: chunks are not gathered.
        let whole = SLOW_EVERY * EVENTS;
        assert!(seen[0] < whole / 2, "{case}: the first event came after {:?}", seen[0]);
        let spread = seen[seen.len() - 1].saturating_sub(seen[0]);
        assert!(spread > whole / 4, "{case}: all events came within {spread:?}");
        if answers > 1 {
            let rest = listen(&mut socket, SOON).await;
            let heard = Heard { bytes: [heard, rest.bytes].concat(), end: rest.end };
            assert_eq!(heard.statuses(), vec![200; answers], "{case}: {heard:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_has_the_same_bounds_of_fields_and_of_keys() {
    let lab = Lab::here().await;
    let list = fields("GET", "/v1/models");
    let many = |n: usize| {
        let more = (0..n).map(|i| (format!("x-{i}").into_bytes(), b"a".to_vec()));
        list.iter().cloned().chain(more).collect::<Vec<_>>()
    };
    let same = |name: &str, value: &str, n: usize| {
        let more = std::iter::repeat_n((name.as_bytes().to_vec(), value.as_bytes().to_vec()), n);
        list.iter().cloned().chain(more).collect::<Vec<_>>()
    };
    let key = format!("Bearer {KEY}");
    let mut bad_first = list.clone();
    bad_first.insert(4, (b"authorization".to_vec(), b"Bearer bad".to_vec()));
    for (case, fields, status) in [
        ("90 fields", many(90), 200),
        ("101 fields", many(101), 431),
        ("1500 fields", many(1500), 431),
        ("one field 101 times", same("x-a", "", 101), 431),
        ("cookie crumbs", same("cookie", "a", 500), 431),
        ("two keys, the good one first", same("authorization", "Bearer bad", 1), 400),
        ("two keys, the good one last", bad_first, 400),
        ("the same key twice", same("authorization", &key, 1), 400),
    ] {
        let mut connection = Http2::connect(lab.clients, &[]).await;
        assert!(connection.send(&headers(1, &fields, true)).await);
        assert_eq!(connection.ended(1).await, Ended::Answer(status), "{case}");
        // Only the request was bad: the connection stays open.
        assert!(connection.send(&headers(3, &list, true)).await);
        assert_eq!(connection.ended(3).await, Ended::Answer(200), "{case}: the next request");
    }
}
