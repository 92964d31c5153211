//! Backends that lie, break off, or answer with what is no answer: what reaches the client, what is charged, who is blamed.

mod addresses;
mod counts;
mod endless;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::{Answer, Client};
use weir_tests::cluster::{Gateway, Resources, gateway};
use weir_tests::eventually;
use weir_tests::scripted::{
    Scripted, answer, chunk, completion, delta, event, head, json_answer, stream_end, stream_head,
};

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
const STREAM: &str = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;
const JSON: (&str, &str) = ("content-type", "application/json");
const EVENTS: (&str, &str) = ("content-type", "text/event-stream");

/// Tokens a minute of the tenant in tests of what is charged.
const LIMIT: u64 = 500_000;

/// A gateway in front of one backend that sends the bytes of the moment and closes its connection.
struct Scene {
    says: Arc<Mutex<Bytes>>,
    backend: Scripted,
    gateway: Gateway,
    _end: tokio_util::sync::DropGuard,
}

impl Scene {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Resources)) -> Self {
        let end = CancellationToken::new();
        let says: Arc<Mutex<Bytes>> = Arc::default();
        let script = says.clone();
        let backend = Scripted::start(&end, move |_, mut wire| {
            let bytes = script.lock().expect("sound").clone();
            async move {
                wire.send(bytes).await;
                None
            }
        })
        .await;
        let mut resources = Resources::at(&[backend.address]);
        change(&mut resources);
        let gateway = gateway(&resources, None).await;
        Self { says, backend, gateway, _end: end.drop_guard() }
    }

    /// The answer to this request while the backend says this.
    async fn ask(&self, says: impl Into<Bytes>, request: &str) -> Answer {
        self.ask_at("/v1/chat/completions", says, request).await
    }

    async fn ask_at(&self, path: &str, says: impl Into<Bytes>, request: &str) -> Answer {
        *self.says.lock().expect("sound") = says.into();
        self.gateway.client.ask(Method::POST, path, request.to_owned()).await
    }

    /// The sum of the metric's series whose labels hold all of these texts.
    async fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        metric(&self.gateway, name, labels).await
    }

    /// Waits until the metric's sum is this.
    async fn counts(&self, name: &str, labels: &[&str], want: f64) {
        eventually(&format!("{name}{labels:?} is {want}"), || async {
            self.metric(name, labels).await == want
        })
        .await;
    }
}

async fn metric(gateway: &Gateway, name: &str, labels: &[&str]) -> f64 {
    let page = Client::new(gateway.running.ops_address, "").ask(Method::GET, "/metrics", "").await;
    let of_name = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']))
            && labels.iter().all(|label| line.contains(label))
    };
    let values = page.text().lines().filter(of_name).filter_map(|line| line.rsplit(' ').next());
    values.map(|value| value.parse::<f64>().expect("a number")).sum()
}

fn with_limit(resources: &mut Resources) {
    let limits = v1::Rates { tokens_per_minute: Some(LIMIT), ..Default::default() };
    resources.put("acme", Spec::Tenant(v1::TenantSpec { limits: Some(limits), ..Default::default() }));
}

fn with_timeouts(silence: Duration, total: Duration) -> impl FnOnce(&mut Resources) {
    let wire = |time: Duration| prost_types::Duration::try_from(time).ok();
    let (first_byte, idle, total) = (wire(silence), wire(silence), wire(total));
    let timeouts = v1::Timeouts { first_byte, idle, total, ..Default::default() };
    move |resources| {
        resources.put("chat", Spec::Pool(v1::PoolSpec { timeouts: Some(timeouts), ..Default::default() }));
    }
}

fn left(answer: &Answer) -> u64 {
    answer.headers["x-ratelimit-remaining-tokens"].to_str().expect("text").parse().expect("a number")
}

/// The client is told that the backend failed, in so many words and no more, and when to come back.
fn assert_invalid(answer: &Answer, case: &str) {
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{case}: {:?}", answer.body);
    assert_eq!(answer.error_code(), "upstream_invalid_response", "{case}");
    assert!(answer.headers.contains_key("retry-after"), "{case}");
}

/// A stream that ended with an error event of the gateway, and not with `[DONE]`.
fn assert_cut(text: &str, code: &str) {
    assert!(!text.contains("data: [DONE]"), "{text}");
    let last = text.trim_end().rsplit("\n\n").next().unwrap_or_default();
    let payload = last.strip_prefix("data: ").unwrap_or_else(|| panic!("no event at the end: {text}"));
    let payload: Value = serde_json::from_str(payload).expect("JSON");
    assert_eq!(payload["error"]["code"], code, "{text}");
}

#[tokio::test]
async fn an_encoded_answer_is_the_backends_fault_and_none_is_asked_for() {
    let accepted: Arc<Mutex<Vec<String>>> = Arc::default();
    let codings =
        ["gzip", "br", "zstd", "deflate", "x-gzip", "compress", "GZIP", "identity, gzip", "unknown"];
    let scene = Scene::new().await;
    for coding in codings {
        for (stream, kind) in [(CHAT, JSON), (STREAM, EVENTS)] {
            let says = answer(200, &[kind, ("content-encoding", coding)], completion("hi", ""));
            assert_invalid(&scene.ask(says, stream).await, coding);
        }
        let says = answer(400, &[JSON, ("content-encoding", coding)], "{}");
        assert_invalid(&scene.ask(says, CHAT).await, coding);
    }
    let chunked =
        [head(200, &[JSON, ("transfer-encoding", "gzip, chunked")]), chunk(completion("hi", "")), chunk("")];
    assert_eq!(scene.ask(chunked.concat(), CHAT).await.status, StatusCode::BAD_GATEWAY);
    let errors = codings.len() as f64 * 3.0;
    assert!(scene.metric("weir_backend_attempts_total", &["invalid_answer"]).await >= errors);
    // One that says so in full is no different from one that does not.
    let plain = answer(200, &[JSON, ("content-encoding", "identity")], completion("hi", ""));
    assert_eq!(scene.ask(plain, CHAT).await.status, StatusCode::OK);

    let (end, seen) = (CancellationToken::new(), accepted.clone());
    let backend = Scripted::start(&end, move |asked, mut wire| {
        seen.lock().expect("sound").push(asked.header("accept-encoding").unwrap_or("none").to_owned());
        async move {
            wire.send(json_answer("hi", "")).await;
            Some(wire)
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    gateway.client.chat(CHAT).await;
    assert_eq!(*accepted.lock().expect("sound"), ["identity"]);
}

/// Bodies under a 200 that are no answer.
fn nonsense() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("empty", Vec::new()),
        ("blank", b" \n".to_vec()),
        ("a page", b"<!doctype html><title>Log in</title>".to_vec()),
        ("text", b"OK".to_vec()),
        ("an array", b"[]".to_vec()),
        ("a string", b"\"hi\"".to_vec()),
        ("a number", b"1".to_vec()),
        ("null", b"null".to_vec()),
        ("cut", br#"{"choices":["#.to_vec()),
        ("two objects", b"{}{}".to_vec()),
        ("deep", [br#"{"a":"#.to_vec(), b"[".repeat(100_000)].concat()),
        (
            "deep and whole",
            [br#"{"a":"#.to_vec(), b"[".repeat(5000), b"]".repeat(5000), b"}".to_vec()].concat(),
        ),
        ("not UTF-8", b"{\"a\":\"\xff\xfe\"}".to_vec()),
        ("a byte order mark", b"\xef\xbb\xbf{}".to_vec()),
        ("NaN", br#"{"a":NaN}"#.to_vec()),
        ("of another endpoint", br#"{"id":"1","detail":"Not authenticated"}"#.to_vec()),
        ("an empty error", br#"{"error":{}}"#.to_vec()),
        ("zeros", vec![0; 4096]),
    ]
}

#[tokio::test]
async fn a_200_that_is_no_json_object_is_502_on_every_route_and_the_backends_fault() {
    let scene = Scene::new().await;
    let routes = [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", r#"{"model":"gpt-4.1","prompt":"hi"}"#),
        ("/v1/embeddings", r#"{"model":"gpt-4.1","input":"hi"}"#),
        ("/v1/responses", r#"{"model":"gpt-4.1","input":"hi"}"#),
    ];
    for (name, body) in nonsense() {
        for (path, request) in routes {
            let says = answer(200, &[JSON], &body);
            assert_invalid(&scene.ask_at(path, says, request).await, &format!("{name} at {path}"));
        }
        // A stream was asked for, and no stream came.
        assert_invalid(&scene.ask(answer(200, &[("content-type", "text/html")], &body), STREAM).await, name);
    }
    // Statuses of success without a body, and a part of one.
    for (status, body) in [(204, ""), (205, ""), (206, "{\"choices\":[")] {
        assert_invalid(&scene.ask(answer(status, &[JSON], body), CHAT).await, &status.to_string());
    }
    let asked = nonsense().len() as f64 * 5.0 + 3.0;
    scene.counts("weir_backend_attempts_total", &["b0", "invalid_answer"], asked).await;
}

#[tokio::test]
async fn what_is_no_answer_is_tried_elsewhere() {
    let end = CancellationToken::new();
    let bad = Scripted::raw(&end, answer(200, &[("content-type", "text/html")], "<html>")).await;
    let encoded = Scripted::raw(&end, answer(200, &[EVENTS, ("content-encoding", "gzip")], "x")).await;
    let good = Scripted::start(&end, |asked, mut wire| async move {
        let stream = asked.body.windows(13).any(|part| part == br#""stream":true"#);
        let says = match stream {
            true => [stream_head(), delta("hi").into(), stream_end("").into()].concat(),
            false => json_answer("hi", ""),
        };
        wire.send(says).await;
        None
    })
    .await;
    let gateway = gateway(&Resources::at(&[bad.address, good.address, encoded.address]), None).await;
    for n in 0..12 {
        let answer = gateway.client.chat([CHAT, STREAM][n % 2]).await;
        assert_eq!(answer.status, StatusCode::OK, "{n}: {:?}", answer.body);
        assert!(answer.text().contains("hi"));
    }
    assert!(bad.requests() > 0 && encoded.requests() > 0, "both were asked first at least once");
}

#[tokio::test]
async fn a_stream_nobody_asked_for_is_no_answer_and_a_unary_answer_becomes_the_stream_asked_for() {
    let scene = Scene::new().await;
    let stream = [stream_head(), delta("hi").into(), stream_end("").into()].concat();
    assert_invalid(&scene.ask(stream, CHAT).await, "a stream");
    let unary = scene.ask(json_answer("hi", ""), STREAM).await;
    assert_eq!(unary.status, StatusCode::OK);
    assert!(unary.headers["content-type"].to_str().expect("text").starts_with("text/event-stream"));
    let first =
        unary.text().split("\n\n").next().and_then(|event| event.strip_prefix("data: ")).expect("an event");
    let first: Value = serde_json::from_str(first).expect("JSON");
    assert_eq!(first["choices"][0]["delta"]["content"], "hi");
    assert!(unary.text().ends_with("data: [DONE]\n\n"));
}

/// Headers by which a server commands the proxy before it or the browser behind it, or tells about itself.
const COMMANDING: [(&str, &str); 24] = [
    ("x-accel-redirect", "/internal/secret"),
    ("x-accel-buffering", "yes"),
    ("x-accel-expires", "1000"),
    ("x-sendfile", "/etc/passwd"),
    ("x-reproxy-url", "http://127.0.0.1/"),
    ("location", "http://127.0.0.1/"),
    ("refresh", "0; url=http://127.0.0.1/"),
    ("link", "<http://127.0.0.1/>; rel=preload"),
    ("www-authenticate", "Basic realm=\"x\""),
    ("proxy-authenticate", "Basic realm=\"x\""),
    ("server", "nginx/1.0"),
    ("via", "1.1 inner"),
    ("x-powered-by", "php"),
    ("access-control-allow-origin", "*"),
    ("access-control-allow-credentials", "true"),
    ("clear-site-data", "\"*\""),
    ("set-cookie", "a=b"),
    ("strict-transport-security", "max-age=1"),
    ("content-security-policy", "default-src *"),
    ("alt-svc", "h3=\":443\""),
    ("cache-control", "public, max-age=1000"),
    ("x-ratelimit-limit-requests", "1"),
    ("openai-organization", "operator"),
    ("x-request-id", "theirs"),
];

#[tokio::test]
async fn headers_of_a_backend_pass_by_an_allow_list() {
    let scene = Scene::new().await;
    let mut headers = COMMANDING.to_vec();
    headers.extend([
        ("openai-processing-ms", "7"),
        ("openai-version", "2020-10-01"),
        ("request-id", "req_1"),
    ]);
    let whole = answer(200, &[&headers[..], &[JSON]].concat(), completion("hi", ""));
    let refusal = r#"{"error":{"message":"<script>","type":"invalid_request_error"}}"#;
    let refusing = answer(400, &[&headers[..], &[("content-type", "text/html")]].concat(), refusal);
    let stream = head(200, &[&headers[..], &[EVENTS, ("connection", "close")]].concat());
    let stream = [stream, delta("hi").into(), stream_end("").into()].concat();
    for (says, request, kind) in [
        (whole, CHAT, "application/json"),
        (refusing, CHAT, "application/json"),
        (stream, STREAM, "text/event-stream"),
    ] {
        let answer = scene.ask(says, request).await;
        for (name, value) in COMMANDING {
            assert_ne!(
                answer.headers.get(name).map(http::HeaderValue::as_bytes),
                Some(value.as_bytes()),
                "{name}"
            );
        }
        assert_eq!(answer.headers["openai-processing-ms"], "7");
        assert_eq!(answer.headers["request-id"], "req_1");
        assert_eq!(answer.headers["content-type"], kind);
        let ours = [
            "cache-control",
            "content-length",
            "content-type",
            "date",
            "openai-processing-ms",
            "openai-version",
            "request-id",
            "transfer-encoding",
            "x-accel-buffering",
            "x-request-id",
        ];
        let odd: Vec<&str> =
            answer.headers.keys().map(http::HeaderName::as_str).filter(|n| !ours.contains(n)).collect();
        assert!(odd.is_empty(), "{odd:?}");
    }
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let end = CancellationToken::new();
    let target = Scripted::raw(&end, json_answer("redirected", "")).await;
    let scene = Scene::new().await;
    let location = format!("http://{}/redirected", target.address);
    for status in [301, 302, 303, 307, 308] {
        let answer = scene.ask(answer(status, &[("location", &location)], ""), CHAT).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
        assert!(!answer.headers.contains_key("location") && answer.headers.contains_key("retry-after"));
    }
    assert_eq!(target.requests(), 0);
}

#[tokio::test]
async fn garbage_in_place_of_http_is_502() {
    let scene = Scene::new().await;
    for says in [
        &b""[..],
        b"\x16\x03\x01\x02\x00",
        b"GARBAGE\r\n\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\0b\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n{}",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    ] {
        let answer = scene.ask(says, CHAT).await;
        assert_eq!(answer.status, StatusCode::BAD_GATEWAY, "{:?}", says.escape_ascii().to_string());
        assert!(answer.headers.contains_key("retry-after"));
    }
    assert_eq!(scene.ask(json_answer("hi", ""), CHAT).await.status, StatusCode::OK);
}

#[tokio::test]
async fn bytes_after_an_answer_are_never_the_answer_to_another_request() {
    let end = CancellationToken::new();
    let smuggled = json_answer("smuggled", "");
    let backend = Scripted::start(&end, move |asked, mut wire| {
        let smuggled = smuggled.clone();
        async move {
            let text = format!("right {}", asked.number);
            wire.send([json_answer(&text, ""), smuggled].concat()).await;
            Some(wire)
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    for _ in 0..20 {
        let answer = gateway.client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.text().contains("right"), "{}", answer.text());
    }
}

#[tokio::test]
async fn an_error_inside_a_stream_passes_without_done_and_is_the_backends_fault() {
    let scene = Scene::new().await;
    let error = event(r#"{"error":{"message":"out of memory","code":500}}"#);
    let says = [stream_head(), delta("hi").into(), error.into(), b"data: [DONE]\n\n".to_vec()].concat();
    let answer = scene.ask(says, STREAM).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(answer.text().contains("out of memory"));
    scene.counts("weir_backend_attempts_total", &["b0", "server_error"], 1.0).await;
    // As the first event, nothing was sent yet.
    let error = event(r#"{"error":{"message":"out of memory","code":500}}"#);
    let says = [stream_head(), error.into()].concat();
    let first = scene.ask(says, STREAM).await;
    assert_eq!((first.status.as_u16(), first.error_code().as_str()), (500, "upstream_error"));
    assert!(first.text().contains("out of memory") && first.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn a_stream_that_breaks_off_ends_with_an_error_event_however_it_breaks() {
    let (end, read) = (CancellationToken::new(), Arc::new(Notify::new()));
    let was_read = read.clone();
    let backend = Scripted::start(&end, move |asked, mut wire| {
        let was_read = was_read.clone();
        async move {
            let chunked = [EVENTS, ("transfer-encoding", "chunked")];
            let begin = [head(200, &chunked), chunk(delta("hi"))].concat();
            let says = match asked.number {
                // FIN, where the end of the connection is the end of the body.
                0 => [stream_head(), delta("hi").into()].concat(),
                // The body ends as it should, and the answer does not.
                1 => [begin, chunk("")].concat(),
                // FIN within an event.
                2 => [begin, chunk("data: {\"cho")].concat(),
                // FIN, or a reset, within a chunked body.
                _ => begin,
            };
            wire.send(says).await;
            if asked.number == 4 {
                // A reset takes along what was not read yet.
                was_read.notified().await;
                return wire.reset();
            }
            None
        }
    })
    .await;
    let gateway = gateway(&Resources::at(&[backend.address]), None).await;
    for n in 0..5 {
        let answer = gateway.client.send(Method::POST, "/v1/chat/completions", STREAM).await;
        assert_eq!(answer.status(), StatusCode::OK, "{n}");
        let mut body = answer.into_body();
        let first = body.frame().await.expect("a frame").expect("whole").into_data().expect("data");
        if n == 4 {
            read.notify_one();
        }
        let rest = body.collect().await.expect("a whole body").to_bytes();
        let text = [first, rest].concat();
        assert_cut(std::str::from_utf8(&text).expect("UTF-8"), "upstream_disconnected");
    }
    eventually("five failures", || async {
        metric(&gateway, "weir_backend_attempts_total", &["connect_failure"]).await == 5.0
    })
    .await;
}

#[tokio::test]
async fn a_backend_that_hangs_after_its_head_is_given_up_in_time() {
    let end = CancellationToken::new();
    let backend = Scripted::start(&end, |asked, mut wire| async move {
        let whole = [head(200, &[JSON, ("content-length", "100")]), b"{".to_vec()].concat();
        let says = match asked.number {
            0 => head(200, &[EVENTS]),
            1 => [head(200, &[EVENTS]), delta("hi").into()].concat(),
            2 => whole,
            _ => Vec::new(),
        };
        wire.send(says).await;
        wire.until_closed().await;
        None
    })
    .await;
    let mut resources = Resources::at(&[backend.address]);
    with_timeouts(Duration::from_millis(700), Duration::from_secs(3))(&mut resources);
    let gateway = gateway(&resources, None).await;
    let began = Instant::now();
    for (n, request) in [STREAM, STREAM, CHAT, CHAT].into_iter().enumerate() {
        let answer = gateway.client.chat(request).await;
        if n == 1 {
            assert_cut(answer.text(), "upstream_timeout");
            continue;
        }
        assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT, "{n}");
        // Of an answer that is not streamed it is not known whether it would have come.
        let (code, again) = if n == 0 { ("upstream_timeout", true) } else { ("deadline_exceeded", false) };
        assert_eq!(answer.error_code(), code, "{n}");
        assert_eq!(answer.headers.contains_key("retry-after"), again, "another backend may be free by then");
    }
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(metric(&gateway, "weir_backend_attempts_total", &["timeout"]).await, 2.0);
}

#[tokio::test]
async fn all_backends_dead_is_502_at_once_with_a_time_to_come_back() {
    let dead = || async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        listener.local_addr().expect("bound")
    };
    let gateway = gateway(&Resources::at(&[dead().await, dead().await, dead().await]), None).await;
    for request in [CHAT, STREAM, CHAT, STREAM] {
        let answer = gateway.client.chat(request).await;
        assert!(matches!(answer.status.as_u16(), 502 | 503), "{}", answer.status);
        assert!(answer.headers.contains_key("retry-after"), "{}", answer.status);
        assert!(answer.headers.contains_key("retry-after-ms"));
        assert!(!answer.text().contains("127.0.0.1"), "no address: {}", answer.text());
    }
}

#[tokio::test]
async fn what_a_model_writes_never_ends_its_stream() {
    let scene = Scene::new().await;
    let text = "\n\ndata: [DONE]\n\ndata: {\"error\":{}}\r\r";
    let says = [stream_head(), delta(text).into(), delta("after").into(), stream_end("").into()].concat();
    let answer = scene.ask(says, STREAM).await;
    assert!(answer.text().contains("after"));
    assert_eq!(answer.text().matches("\ndata: [DONE]\n").count(), 1);
    scene.counts("weir_backend_attempts_total", &["outcome=\"ok\""], 1.0).await;
}

#[tokio::test]
async fn wrong_keys_cost_who_sends_them_and_never_who_has_a_good_one() {
    let scene = Scene::new().await;
    *scene.says.lock().expect("sound") = json_answer("hi", "").into();
    let wrong = scene.gateway.client.with_key("weir_wrong");
    let first = wrong.chat(CHAT).await;
    let mut closed = 0;
    for n in 0..150 {
        let answer = wrong.chat(CHAT).await;
        assert_eq!((answer.status, &answer.body), (StatusCode::UNAUTHORIZED, &first.body), "{n}");
        assert!(!answer.headers.contains_key("retry-after"));
        closed += u32::from(answer.headers.get("connection").is_some_and(|value| value == "close"));
        if n % 30 == 0 {
            let good = scene.gateway.client.chat(CHAT).await;
            assert_eq!(good.status, StatusCode::OK, "{n}");
            assert!(!good.headers.contains_key("connection"));
        }
    }
    // From the 101st of a minute on.
    assert!((1..=51).contains(&closed), "{closed}");
    assert_eq!(scene.metric("weir_authentication_failures_total", &["unknown"]).await, 151.0);
    assert_eq!(scene.backend.requests(), 5);
    // No key at all is told apart in the metric, and in no answer.
    let request = http::Request::builder()
        .method(Method::POST)
        .uri(format!("http://{}/v1/chat/completions", scene.gateway.running.address))
        .body(http_body_util::Full::<Bytes>::from(CHAT))
        .expect("a request");
    let http = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new());
    let (head, body) = http.build_http().request(request).await.expect("an answer").into_parts();
    assert_eq!(head.status, StatusCode::UNAUTHORIZED);
    assert_eq!(body.collect().await.expect("a body").to_bytes(), first.body);
    assert_eq!(scene.metric("weir_authentication_failures_total", &["missing"]).await, 1.0);
}
