//! Requests before a model is chosen: paths, methods, keys, pages of browsers; and the path at which a backend is
//! asked.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use http::{Method, StatusCode};
use mock_llm::Config;
use tokio_util::sync::{CancellationToken, DropGuard};
use weir_proto::v1::{self, resource::Spec};
use weir_tests::client::Client;
use weir_tests::cluster::{Gateway, KEY, Resources, gateway, gateway_with, mock};
use weir_tests::scripted::{
    Asked, Scripted, answer, completion, delta, json_answer, stream_end, stream_head,
};
use weir_tests::stack::Stack;

const CHAT: &str = r#"{"model":"gpt-4.1","messages":[{"role":"user","content":"hi"}]}"#;
const STREAM: &str = r#"{"model":"gpt-4.1","stream":true,"messages":[{"role":"user","content":"hi"}]}"#;

/// Models whose names must be escaped in a path, and one that the key may not use.
async fn models() -> (Gateway, DropGuard) {
    let end = CancellationToken::new();
    let mocks = [mock(Config { models: vec!["gpt-4.1".into()], ..Config::default() }, &end).await];
    let mut resources = Resources::in_front_of(&mocks);
    let names = [
        ("llama", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen", "qwen2.5:7b"),
        ("odd", "a b%ü"),
        ("secret", "secret"),
    ];
    for (name, client_name) in names {
        let spec =
            v1::ModelSpec { pool: "chat".into(), client_name: client_name.into(), ..Default::default() };
        resources.put(name, Spec::Model(spec));
    }
    resources.rebuild("acme", |spec| {
        let Spec::Tenant(spec) = spec else { panic!("a tenant") };
        spec.allowed_models = ["gpt-4.1", "llama", "qwen", "odd"].map(str::to_owned).into();
    });
    (gateway(&resources, None).await, end.drop_guard())
}

#[tokio::test]
async fn one_model_is_found_by_its_id_however_it_is_written() {
    let (gw, _end) = models().await;
    for (path, id) in [
        ("gpt-4.1", "gpt-4.1"),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama%2FLlama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen2.5:7b", "qwen2.5:7b"),
        ("qwen2.5%3a7b", "qwen2.5:7b"),
        ("a%20b%25%C3%BC", "a b%ü"),
        ("gpt-4.1?x=1", "gpt-4.1"),
    ] {
        let answer = gw.client.ask(Method::GET, &format!("/v1/models/{path}"), "").await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
        let model = answer.json();
        assert_eq!((&model["id"], &model["object"]), (&id.into(), &"model".into()), "{path}");
        assert_eq!(model["owned_by"], "chat", "{path}");
    }
    // A forbidden model cannot be told from a missing one.
    for id in ["nope", "secret", "gpt-4.1/", "%2e%2e/models", "meta-llama"] {
        let answer = gw.client.ask(Method::GET, &format!("/v1/models/{id}"), "").await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (StatusCode::NOT_FOUND, "model_not_found"),
            "{id}"
        );
        assert_eq!(answer.json()["error"]["param"], "model", "{id}");
    }
    let answer = gw.client.with_key("wrong").ask(Method::GET, "/v1/models/gpt-4.1", "").await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn head_is_answered_as_get_without_a_body() {
    let (gw, _end) = models().await;
    for path in ["/v1/models", "/v1/models/gpt-4.1", "/v1/models/nope"] {
        let get = gw.client.ask(Method::GET, path, "").await;
        let head = gw.client.ask(Method::HEAD, path, "").await;
        assert_eq!(head.status, get.status, "{path}");
        assert!(head.body.is_empty(), "{path}: {:?}", head.body);
        for name in ["content-type", "content-length"] {
            assert_eq!(head.headers.get(name), get.headers.get(name), "{path}: {name}");
        }
        assert_eq!(head.headers["content-length"], get.body.len().to_string(), "{path}");
    }
}

#[tokio::test]
async fn a_wrong_method_or_path_is_told_the_right_one() {
    let (gw, _end) = models().await;
    for (method, path, allow) in [
        (Method::GET, "/v1/chat/completions", "POST"),
        (Method::HEAD, "/v1/responses", "POST"),
        (Method::OPTIONS, "/v1/embeddings", "POST"),
        (Method::POST, "/v1/models", "GET, HEAD"),
        (Method::DELETE, "/v1/models/gpt-4.1", "GET, HEAD"),
    ] {
        let answer = gw.client.ask(method.clone(), path, "").await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        assert_eq!(answer.headers["allow"], allow, "{method} {path}");
    }
    for (path, right) in [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/embeddings", "/v1/embeddings"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/V1/chat/completions", "/v1/chat/completions"),
        ("/v1/completion", "/v1/completions"),
        ("/v1/response", "/v1/responses"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/openai/deployments/gpt-4.1/chat/completions?api-version=2024-10-21", "/v1/chat/completions"),
    ] {
        let answer = gw.client.ask(Method::POST, path, CHAT).await;
        assert_eq!(
            (answer.status, answer.error_code().as_str()),
            (StatusCode::NOT_FOUND, "unknown_url"),
            "{path}"
        );
        let message = answer.json()["error"]["message"].as_str().expect("text").to_owned();
        let hint = format!("Did you mean {right}?");
        assert!(message.starts_with("Invalid URL (POST /") && message.ends_with(&hint), "{path}: {message}");
    }
    let answer = gw.client.ask(Method::GET, "/v1/files", "").await;
    assert_eq!(answer.json()["error"]["message"], "Invalid URL (GET /v1/files).");
}

const PAGE: &str = "https://app.example.com";

#[tokio::test]
async fn pages_of_allowed_origins_may_ask_and_read_every_answer() {
    let end = CancellationToken::new();
    let mocks = [mock(Config { models: vec!["gpt-4.1".into()], ..Config::default() }, &end).await];
    let origins = vec![PAGE.parse().expect("an origin")];
    let gw =
        gateway_with(&Resources::in_front_of(&mocks), |config| config.common.cors_allowed_origins = origins)
            .await;
    let preflight = [
        ("origin", PAGE),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type,x-stainless-os"),
    ];
    // Without a key, on every path: the page must read the reason from the answer.
    for path in ["/v1/chat/completions", "/v1/models", "/v1/nothing"] {
        let answer = gw.client.ask_with(Method::OPTIONS, path, &preflight, "").await;
        assert_eq!((answer.status, answer.body.len()), (StatusCode::NO_CONTENT, 0), "{path}");
        assert_eq!(answer.headers["access-control-allow-origin"], PAGE, "{path}");
        assert_eq!(answer.headers["access-control-allow-headers"], preflight[2].1, "{path}");
        assert!(answer.headers["access-control-allow-methods"].to_str().expect("text").contains("POST"));
    }
    let key = format!("Bearer {KEY}");
    let page = [("origin", PAGE), ("authorization", key.as_str())];
    for (method, path, body, status) in [
        (Method::POST, "/v1/chat/completions", CHAT, StatusCode::OK),
        (Method::POST, "/v1/chat/completions", STREAM, StatusCode::OK),
        (Method::POST, "/v1/chat/completions", "{", StatusCode::BAD_REQUEST),
        (Method::GET, "/v1/models", "", StatusCode::OK),
        (Method::GET, "/v1/nothing", "", StatusCode::NOT_FOUND),
        (Method::PUT, "/v1/models", "", StatusCode::METHOD_NOT_ALLOWED),
    ] {
        let answer = gw.client.ask_with(method, path, &page, body).await;
        assert_eq!(answer.status, status, "{path} {body}");
        assert_eq!(answer.headers["access-control-allow-origin"], PAGE, "{path} {body}");
        assert_eq!(answer.headers["vary"], "Origin", "{path} {body}");
        let exposed = answer.headers["access-control-expose-headers"].to_str().expect("text").to_owned();
        assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
        assert!(!answer.headers.contains_key("access-control-allow-credentials"));
    }
    let stranger = gw.client.ask_with(Method::POST, "/v1/chat/completions", &[("origin", PAGE)], CHAT).await;
    assert_eq!(stranger.status, StatusCode::UNAUTHORIZED, "the origin is no key");
    assert_eq!(stranger.headers["access-control-allow-origin"], PAGE);
    for origin in ["https://evil.example", "null", "https://app.example.com.evil.example"] {
        let asked = [("origin", origin), preflight[1]];
        let answer = gw.client.ask_with(Method::OPTIONS, "/v1/chat/completions", &asked, "").await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{origin}");
        let page = [("origin", origin), page[1]];
        let answer = gw.client.ask_with(Method::POST, "/v1/chat/completions", &page, CHAT).await;
        assert!(!answer.headers.contains_key("access-control-allow-origin"), "{origin}");
        assert_eq!(answer.headers["vary"], "Origin", "{origin}");
    }
}

#[tokio::test]
async fn without_the_setting_no_page_is_allowed_and_with_all_every_page_is() {
    let (gw, _end) = models().await;
    let preflight = [("origin", PAGE), ("access-control-request-method", "POST")];
    let answer = gw.client.ask_with(Method::OPTIONS, "/v1/chat/completions", &preflight, "").await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    let answer = gw.client.ask_with(Method::GET, "/v1/models", &[("origin", PAGE)], "").await;
    let of_pages = |name: &str| name.starts_with("access-control-") || name == "vary";
    assert!(!answer.headers.keys().any(|name| of_pages(name.as_str())), "{:?}", answer.headers);
    let end = CancellationToken::new();
    let mocks = [mock(Config { models: vec!["gpt-4.1".into()], ..Config::default() }, &end).await];
    let all = vec!["*".parse().expect("all")];
    let gw = gateway_with(&Resources::in_front_of(&mocks), |config| config.common.cors_allowed_origins = all)
        .await;
    for origin in [PAGE, "null", "http://localhost:3000"] {
        let asked = [("origin", origin), preflight[1]];
        let answer = gw.client.ask_with(Method::OPTIONS, "/v1/models", &asked, "").await;
        assert_eq!(
            (answer.status, &answer.headers["access-control-allow-origin"]),
            (StatusCode::NO_CONTENT, &"*".parse().unwrap())
        );
        assert!(!answer.headers.contains_key("vary"), "the same for everybody");
    }
}

/// A backend that serves its API only below one path, and the requests that it got.
struct Prefixed {
    asked: Log,
    gateway: Gateway,
    _end: DropGuard,
}

/// The requests of a backend.
type Log = Arc<Mutex<Vec<Asked>>>;

/// A backend that serves its API only below `base`, also behind a prefix of its URL.
async fn prefixed(base: &'static str, end: &CancellationToken) -> (SocketAddr, Log) {
    let log = Log::default();
    let seen = log.clone();
    let backend = Scripted::start(end, move |asked, mut wire| {
        seen.lock().expect("sound").push(asked.clone());
        async move {
            let stream = String::from_utf8_lossy(&asked.body).contains("\"stream\":true");
            let path = asked.path().strip_prefix("/server").unwrap_or(asked.path());
            match path.strip_prefix(base) {
                Some("/chat/completions") if stream => {
                    let events = delta("hello") + &stream_end("");
                    wire.send([stream_head(), events.into_bytes()].concat()).await;
                    return None;
                }
                Some("/chat/completions") => wire.send(json_answer("hello", "")).await,
                Some(endpoint @ ("/completions" | "/embeddings" | "/responses")) => {
                    let body = match endpoint {
                        "/completions" => completion("hello", ""),
                        "/embeddings" => r#"{"object":"list","data":[]}"#.to_owned(),
                        _ => r#"{"object":"response","output":[]}"#.to_owned(),
                    };
                    wire.send(answer(200, &[("content-type", "application/json")], body)).await
                }
                Some("/models") => {
                    let list = r#"{"object":"list","data":[{"id":"gpt-4.1"}]}"#;
                    wire.send(answer(200, &[("content-type", "application/json")], list)).await
                }
                _ => wire.send(answer(404, &[("content-type", "text/plain")], "no such page")).await,
            };
            Some(wire)
        }
    })
    .await;
    (backend.address, log)
}

/// The paths of probes, or of all other requests.
fn paths(log: &Log, probes: bool) -> Vec<String> {
    let asked = log.lock().expect("sound");
    let asked = asked.iter().filter(|asked| (asked.header("user-agent") == Some("weir-probe")) == probes);
    asked.map(|asked| asked.path().to_owned()).collect()
}

impl Prefixed {
    /// `base` is the path of the backend, `url_path` and `api_base_path` are those of its resource.
    async fn start(base: &'static str, url_path: &str, api_base_path: &str) -> Self {
        let end = CancellationToken::new();
        let (backend, asked) = prefixed(base, &end).await;
        let mut resources = Resources::at(&[backend]);
        resources.rebuild("b0", |spec| {
            let Spec::Backend(spec) = spec else { panic!("a backend") };
            spec.url = format!("http://{backend}{url_path}");
            spec.api_base_path = api_base_path.to_owned();
        });
        let gateway = gateway(&resources, None).await;
        Self { asked, gateway, _end: end.drop_guard() }
    }
}

#[tokio::test]
async fn requests_go_below_the_base_path_of_the_backends_api() {
    for (base, url_path, api_base_path) in [
        ("/v1", "", ""),
        ("/proxy/v1", "/proxy", ""),
        ("/v1beta/openai", "", "/v1beta/openai"),
        ("/api/paas/v4", "", "/api/paas/v4/"),
        ("/openai/v1", "/openai/v1", "/"),
        ("", "", "/"),
    ] {
        let world = Prefixed::start(base, url_path, api_base_path).await;
        let client: &Client = &world.gateway.client;
        for (path, body) in [
            ("/v1/chat/completions", CHAT),
            ("/v1/chat/completions", STREAM),
            ("/v1/completions", r#"{"model":"gpt-4.1","prompt":"hi"}"#),
            ("/v1/embeddings", r#"{"model":"gpt-4.1","input":"hi"}"#),
            ("/v1/responses", r#"{"model":"gpt-4.1","input":"hi"}"#),
        ] {
            let answer = client.ask(Method::POST, path, body).await;
            assert_eq!(answer.status, StatusCode::OK, "{base} {path}: {}", answer.text());
        }
        let requests: Vec<String> =
            ["chat/completions", "chat/completions", "completions", "embeddings", "responses"]
                .map(|endpoint| format!("{base}/{endpoint}"))
                .into();
        assert_eq!(paths(&world.asked, false), requests, "{base}");
    }
}

#[tokio::test]
async fn probes_go_below_the_base_path_of_the_backends_api() {
    const BASE: &str = "/api/paas/v4";
    let end = CancellationToken::new();
    let _end = end.clone().drop_guard();
    let (backend, asked) = prefixed(BASE, &end).await;
    let stack = Stack::start(
        1,
        &format!(
            "kind: pool\nname: chat\nspec: {{ health: {{ paid_probes_per_hour: 100000 }} }}\n---\nkind: backend\nname: b0\n\
             spec: {{ pool: chat, url: \"http://{backend}/server\", api_base_path: {BASE}, models: {{ gpt-4.1: \"\" }} }}\n\
             ---\nkind: model\nname: gpt-4.1\nspec: {{ pool: chat }}\n---\nkind: tenant\nname: acme\nspec: {{}}\n"
        ),
    )
    .await;
    for tier in ["liveness", "readiness", "deep"] {
        stack.weir(&["probe", "b0", "--tier", tier, "--wait", "30s"]).await;
    }
    let probed: BTreeSet<String> = paths(&asked, true).into_iter().collect();
    for path in [
        "/server/health",
        "/server/metrics",
        "/server/api/paas/v4/chat/completions",
        "/server/api/paas/v4/models",
    ] {
        assert!(probed.contains(path), "{path}: {probed:?}");
    }
    assert!(!probed.iter().any(|path| path.contains("/v1")), "{probed:?}");
}

#[tokio::test]
async fn what_was_read_as_json_is_sent_as_json() {
    let world = Prefixed::start("/v1", "", "").await;
    let key = format!("Bearer {KEY}");
    for content_type in [None, Some("application/x-www-form-urlencoded"), Some("text/plain; charset=utf-8")] {
        let mut headers = vec![("authorization", key.as_str())];
        headers.extend(content_type.map(|content_type| ("content-type", content_type)));
        let answer =
            world.gateway.client.ask_with(Method::POST, "/v1/chat/completions", &headers, CHAT).await;
        assert_eq!(answer.status, StatusCode::OK);
        let asked = world.asked.lock().expect("sound");
        let last =
            asked.iter().rfind(|asked| asked.header("user-agent") != Some("weir-probe")).expect("it arrived");
        assert_eq!(last.header("content-type"), Some("application/json"), "{content_type:?}");
    }
}
