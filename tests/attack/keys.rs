//! Keys: every wrong key gets the same refusal, and no answer helps to guess one.

use http::{HeaderMap, StatusCode};
use weir_proto::v1::{self, resource::Spec};
use weir_tests::cluster::digest;
use weir_tests::cluster::{KEY, gateway_with};
use weir_tests::process::command;

use crate::lab::backend::Backend;
use crate::lab::http1::{End, Heard, body, exchange, models};
use crate::lab::{Lab, resources};

/// A request for the list of models with these headers instead of the key.
async fn ask(lab_address: std::net::SocketAddr, authorization: &[u8]) -> Heard {
    let text = String::from_utf8(models("Connection: close\r\n")).expect("UTF-8");
    let own = format!("Authorization: Bearer {KEY}\r\n");
    let (before, after) = text.split_once(&own).expect("the key is in it");
    exchange(lab_address, [before.as_bytes(), authorization, after.as_bytes()].concat()).await
}

/// An answer without the parts that differ between requests.
fn what_is_told(heard: &Heard) -> (u16, Vec<String>, Vec<u8>) {
    let reply = heard.replies().pop().unwrap_or_else(|| panic!("no answer: {heard:?}"));
    let own =
        |line: &&str| !["x-request-id", "date"].iter().any(|name| line.to_lowercase().starts_with(name));
    (reply.status, reply.head.lines().filter(own).map(str::to_owned).collect(), reply.body)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_key_that_is_not_right_gets_the_same_answer_however_near_it_is() {
    const EXPIRED: &str = "weir_test_key_expired";
    let backend = Backend::start().await;
    let mut resources = resources(backend.address);
    let expired = v1::KeyDigest {
        sha256: digest(EXPIRED),
        prefix: "weir_test".into(),
        expire_time: Some(prost_types::Timestamp { seconds: 1_000_000, nanos: 0 }),
    };
    let key = v1::ApiKeySpec { tenant: "acme".into(), digests: vec![expired], ..Default::default() };
    resources.put("expired-key", Spec::ApiKey(key));
    let gateway = gateway_with(&resources, |_| {}).await;
    let address = gateway.running.address;
    assert_eq!(ask(address, format!("Authorization: Bearer {KEY}\r\n").as_bytes()).await.statuses(), [200]);
    let reference = what_is_told(&ask(address, b"").await);
    assert_eq!(reference.0, 401);
    let bearer = |key: &str| format!("Authorization: Bearer {key}\r\n").into_bytes();
    let (first, last) = (format!("X{}", &KEY[1..]), format!("{}X", &KEY[..KEY.len() - 1]));
    let cases = [
        ("unknown", bearer("weir_nobody_knows_this_one")),
        ("expired", bearer(EXPIRED)),
        ("first letter wrong", bearer(&first)),
        ("last letter wrong", bearer(&last)),
        ("one letter short", bearer(&KEY[..KEY.len() - 1])),
        ("one letter long", bearer(&format!("{KEY}x"))),
        ("other case", bearer(&KEY.to_uppercase())),
        ("empty", bearer("")),
        ("twice in one field", bearer(&format!("{KEY}, Bearer {KEY}"))),
        ("its digest", bearer("a665a45920422f9d417e4867efdc4fb8a04a1f3fff1fa07e998e86f7f7a27ae3")),
        ("another scheme", format!("Authorization: Basic {KEY}\r\n").into_bytes()),
        ("no scheme", format!("Authorization: {KEY}\r\n").into_bytes()),
        ("SQL", bearer("' OR 1=1;--")),
        ("a pattern", bearer("*")),
        ("not text", b"Authorization: Bearer \xff\xfe\r\n".to_vec()),
        ("600 bytes", bearer(&"a".repeat(600))),
        ("60 000 bytes", bearer(&"a".repeat(60_000))),
        ("unknown, in Anthropic's header", b"X-Api-Key: weir_nobody_knows_this_one\r\n".to_vec()),
        ("unknown, in Azure's header", b"Api-Key: weir_nobody_knows_this_one\r\n".to_vec()),
        ("with a scheme in Azure's header", format!("Api-Key: Bearer {KEY}\r\n").into_bytes()),
        ("in a header of Google's", format!("X-Goog-Api-Key: {KEY}\r\n").into_bytes()),
        ("in a cookie", format!("Cookie: authorization=Bearer {KEY}\r\n").into_bytes()),
        ("for a proxy", format!("Proxy-Authorization: Bearer {KEY}\r\n").into_bytes()),
    ];
    for (case, header) in cases {
        let heard = ask(address, &header).await;
        assert_eq!(what_is_told(&heard), reference, "{case}");
    }
    let text = String::from_utf8(models("Connection: close\r\n")).expect("UTF-8");
    let text = text.replace(&format!("Authorization: Bearer {KEY}\r\n"), "");
    let query = text
        .replace("/v1/models", &format!("/v1/models?api_key={KEY}&key={KEY}&authorization=Bearer%20{KEY}"));
    assert_eq!(what_is_told(&exchange(address, query).await), reference, "in the query");
    assert!(backend.arrived().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_taken_from_the_headers_of_azure_and_anthropic_and_stays_here() {
    let lab = Lab::here().await;
    let body = body("m", false);
    for name in ["authorization: Bearer", "x-api-key:", "api-key:", "X-API-Key:"] {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{name} {KEY}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let heard = exchange(lab.clients, head + &body).await;
        assert_eq!(heard.statuses(), [200], "{name}: {heard:?}");
        let arrived = lab.backend.arrived().pop().expect("it arrived");
        assert!(!arrived.head.contains(KEY), "{name}: {}", arrived.head);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_credentials_at_once_are_refused_and_one_in_two_headers_is_not() {
    let lab = Lab::here().await;
    let bearer = format!("Authorization: Bearer {KEY}\r\n");
    for (other, status) in [
        (format!("Api-Key: {KEY}\r\nX-Api-Key: {KEY}\r\n"), 200),
        ("Api-Key: \r\n".to_owned(), 200),
        ("Api-Key: another\r\n".to_owned(), 400),
        ("X-Api-Key: another\r\n".to_owned(), 400),
        (format!("Api-Key: {KEY}\r\nApi-Key: {KEY}\r\n"), 400),
        (format!("X-Api-Key: {KEY}\r\nX-Api-Key: {KEY}\r\n"), 400),
    ] {
        let heard = ask(lab.clients, format!("{bearer}{other}").as_bytes()).await;
        assert_eq!(heard.statuses(), [status], "{other}: {heard:?}");
    }
    assert!(lab.backend.arrived().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_a_megabyte_is_cut_off_unread() {
    let lab = Lab::here().await;
    let heard =
        ask(lab.clients, format!("Authorization: Bearer {}\r\n", "a".repeat(1_000_000)).as_bytes()).await;
    assert_ne!(heard.end, End::Open, "{heard:?}");
    assert!(heard.statuses().iter().all(|status| matches!(status, 400 | 401 | 431)), "{heard:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_and_prompts_are_in_no_log_no_metric_and_no_answer() {
    const PROMPT: &str = "the prompt nobody else may read";
    const WRONG: &str = "weir_a_key_that_is_wrong";
    let directory = tempfile::tempdir().expect("a directory");
    let log = directory.path().join("log");
    let backend = Backend::start().await;
    let data = directory.path().join("data");
    std::fs::create_dir(&data).expect("made");
    resources(backend.address).save(&data);
    let mut gateway = command("weir-gateway");
    gateway
        .args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"])
        .args(["--log=info,weir_gateway=trace,weir_runtime=trace,weir_ratelimit=trace", "--data-dir"])
        .arg(&data)
        .stderr(std::fs::File::create(&log).expect("a file"));
    let _gateway = gateway.spawn().expect("starts");
    let read = || std::fs::read_to_string(&log).expect("readable");
    let serving = || {
        let lines: Vec<serde_json::Value> =
            read().lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        lines.into_iter().find(|line| line["message"] == "serving")
    };
    weir_tests::eventually("it serves", || async { serving().is_some() }).await;
    let line = serving().expect("it serves");
    let address = |field: &str| line[field].as_str().expect("an address").parse().expect("an address");
    let client = weir_tests::client::Client::new(address("clients"), KEY);
    let ops = weir_tests::client::Client::new(address("ops"), "");
    let prompt = body("m", false).replace("hi", PROMPT);
    let mut told = Vec::new();
    for (client, body, status) in [
        (&client, prompt.clone(), StatusCode::OK),
        (&client.with_key(WRONG), prompt.clone(), StatusCode::UNAUTHORIZED),
        (&client, prompt.replace(r#""m""#, r#""nobody""#), StatusCode::NOT_FOUND),
        (&client, prompt[..prompt.len() - 1].to_owned(), StatusCode::BAD_REQUEST),
    ] {
        let answer = client.chat(&body).await;
        assert_eq!(answer.status, status, "{}", answer.text());
        let headers: &HeaderMap = &answer.headers;
        told.push(format!("{headers:?} {}", answer.text()));
    }
    told.push(ops.ask(http::Method::GET, "/metrics", "").await.text().to_owned());
    told.push(read());
    for text in told {
        for secret in [KEY, WRONG, PROMPT] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    }
}
