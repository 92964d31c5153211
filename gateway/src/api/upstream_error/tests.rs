use proptest::prelude::*;

use super::*;

fn of(status: u16, body: &str) -> Meaning {
    meaning(status, read(body.as_bytes()).as_ref())
}

/// A row of `refusals.jsonl`: what a provider sends, in its documented shape, and what it means. A `body` of text is the
/// body itself, anything else is JSON. The test with OpenAI's SDK reads the same table.
#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Refusal {
    status: u16,
    meaning: String,
    body: Value,
}

impl Refusal {
    fn all() -> Vec<Self> {
        let row = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        include_str!("refusals.jsonl").lines().map(row).collect()
    }

    fn found(&self) -> &'static str {
        let body = match &self.body {
            Value::String(text) => text.clone(),
            json => json.to_string(),
        };
        of(self.status, &body).as_str()
    }
}

#[test]
fn each_refusal_of_each_provider_has_its_meaning() {
    let all = Refusal::all();
    let wrong: Vec<_> = all.iter().filter(|row| row.found() != row.meaning).collect();
    assert!(wrong.is_empty(), "{:#?}", wrong.iter().map(|row| (row, row.found())).collect::<Vec<_>>());
    let meanings: std::collections::HashSet<&str> = all.iter().map(|row| row.meaning.as_str()).collect();
    assert!(all.len() >= 60 && meanings.len() == 7, "{} rows of {meanings:?}", all.len());
}

#[test]
fn a_callers_own_text_in_a_message_does_not_make_it_the_operators_trouble() {
    for text in ["insufficient balance", "exceeded your current quota", "invalid api key", "unknown url"] {
        let body = serde_json::json!({ "error": { "message": format!("bad value: '{text}'"), "type": "invalid_request_error" } });
        let meaning = of(422, &body.to_string());
        assert_eq!(meaning, Meaning::Request, "{text}");
    }
}

#[test]
fn the_wait_is_found_in_the_body() {
    let wait = |body: &str| read(body.as_bytes()).and_then(|error| error.retry_after);
    let google = r#"[{"error":{"code":429,"message":"x","details":[{"@type":"a"},{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"37.5s"}]}}]"#;
    assert_eq!(wait(google), Some(Duration::from_millis(37_500)));
    for (text, expected) in [
        ("Rate limit reached. Please try again in 1m2.5s. Visit ...", Some(62_500)),
        ("Please try again in 20ms.", Some(20)),
        ("Please retry after 26 seconds.", Some(26_000)),
        ("Try again in 7.66s", Some(7_660)),
        ("try again in a while", None),
        ("try again later", None),
    ] {
        let body = serde_json::json!({ "error": { "message": text } }).to_string();
        assert_eq!(wait(&body), expected.map(Duration::from_millis), "{text}");
    }
}

#[test]
fn times_are_read_as_go_and_as_people_write_them() {
    for (text, expected) in [
        ("1s", Some(1.0)),
        ("6m0s", Some(360.0)),
        ("2m59.56s", Some(179.56)),
        ("1h2m3s", Some(3723.0)),
        ("12ms", Some(0.012)),
        ("5 minutes", Some(300.0)),
        ("", None),
        ("soon", None),
        ("-1s", None),
        ("5", None),
    ] {
        assert_eq!(go_duration(text).map(|d| d.as_secs_f64()), expected, "{text}");
    }
    assert_eq!(seconds("29.7"), Some(Duration::from_millis(29_700)));
    assert_eq!(seconds("-1"), None);
    assert_eq!(seconds("1e400"), None);
}

#[test]
fn credentials_are_not_repeated_and_words_are() {
    for secret in [
        "sk-abcdef123456",
        "sk-proj-abcd***wxyz",
        "gsk_aaaabbbbccccdddd",
        "AIzaSyA1234567890abcdefghijklmnop",
        "0123456789abcdef0123456789abcdef",
        "https://h/v1?key=abc",
        "eyJhbGciOi.eyJzdWIi.x",
    ] {
        let text = redact(&format!("Incorrect API key provided: {secret}. See the docs"), 500);
        assert!(
            !text.contains(secret) && text.contains("[redacted]") && text.ends_with("See the docs"),
            "{text}"
        );
    }
    assert_eq!(redact("Authorization: Bearer abc def", 500), "Authorization: Bearer [redacted] def");
    let plain = "Unsupported parameter: 'max_tokens' is not supported with model gpt-4o-mini-2024-07-18, id 6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    assert_eq!(redact(plain, 500), plain);
    assert_eq!(redact("a\nb\u{1b}[31m c", 500), "a b [31m c");
    assert_eq!(redact(&"long ".repeat(500), 10), "long long ...");
}

#[test]
fn what_repeats_the_request_is_hidden_and_the_names_of_its_members_are_not() {
    let request = r#"{"model":"gpt-4.1-mini-2025","max_completion_tokens":3,"user":"somebody@example.com","messages":[{"role":"user","content":"the secret plan is to buy \"all\" bread"}],"metadata":{"a":["deeper than deep"]}}"#;
    for (text, shown) in [
        ("Unsupported parameter: 'max_completion_tokens'", "Unsupported parameter: 'max_completion_tokens'"),
        ("no model gpt-4.1-mini-2025 here", "no model gpt-4.1-mini-2025 here"),
        ("blocked: the secret plan is to buy", "blocked: [request]"),
        ("user somebody@example.com is blocked", "user [request] is blocked"),
        ("deeper than deep and somebody@example.com", "[request] and [request]"),
        ("short", "short"),
        ("no overlap at all in this text", "no overlap at all in this text"),
    ] {
        assert_eq!(without_echo(text, request.as_bytes()), shown, "{text}");
    }
    let all = without_echo(request, request.as_bytes());
    for hidden in ["secret plan", "somebody@", "deeper"] {
        assert!(!all.contains(hidden), "{all}");
    }
    for odd in [&b"not json, but a long text"[..], b"", &vec![b' '; ECHO_REQUEST_MAX + 1]] {
        assert_eq!(without_echo("a text of some length", odd), "[not shown: it may repeat the request]");
    }
}

#[test]
fn another_shape_becomes_openais() {
    for (body, message) in [
        (r#"{"error":"model 'x' not found"}"#, "model 'x' not found"),
        (r#"{"detail":"Unsupported media type"}"#, "Unsupported media type"),
        (r#"[{"error":{"code":400,"message":"bad","status":"INVALID_ARGUMENT"}}]"#, "bad"),
        ("<html>", "The model's server refused the request with status 413."),
    ] {
        let error = read(body.as_bytes());
        let shaped: Value = serde_json::from_str(&to_openai(413, error.as_ref())).expect("JSON");
        assert_eq!(shaped["error"]["message"], message);
        assert!(shaped["error"]["type"].is_string());
    }
    assert!(read(br#"{"error":{"message":"m"}}"#).is_some_and(|error| error.is_openai));
    assert!(read(br#"{"error":"m"}"#).is_some_and(|error| !error.is_openai));
}

#[test]
fn a_long_body_is_bounded_and_still_the_apis_word() {
    let body = format!(r#"{{"detail":[{{"msg":"bad","input":"{}"}}]}}"#, "x".repeat(ERROR_BODY_MAX));
    let error = read(body.as_bytes()).expect("the API's word");
    assert!(error.message.len() <= MESSAGE_CHARS_MAX);
    assert_eq!(meaning(422, Some(&error)), Meaning::Request);
}

proptest! {
    #[test]
    fn no_run_of_a_value_of_the_request_is_shown(
        value in "[a-z \u{e9}\u{1f98a}]{0,40}", before in "[A-Z]{0,20}", after in "[A-Z]{0,20}", from in 0usize..40,
    ) {
        let request = serde_json::json!({ "messages": [{ "content": value }] }).to_string();
        let part: String = value.chars().skip(from).collect();
        let shown = without_echo(&format!("{before}{part}{after}"), request.as_bytes());
        for run in part.as_bytes().windows(ECHO_BYTES) {
            prop_assert!(!shown.as_bytes().windows(ECHO_BYTES).any(|window| window == run), "{shown}");
        }
        prop_assert!(shown.starts_with(&before) && shown.ends_with(&after), "{shown}");
    }

    #[test]
    fn no_bytes_panic(status in 300u16..600, body in proptest::collection::vec(any::<u8>(), 0..200)) {
        let error = read(&body);
        let _ = (meaning(status, error.as_ref()), to_openai(status, error.as_ref()));
        let _ = redact(&String::from_utf8_lossy(&body), 50);
    }

    #[test]
    fn what_is_repeated_is_one_bounded_line(text in "\\PC{0,300}|(a|\n|\t|\u{7f}){0,100}", max in 1usize..100) {
        let out = redact(&text, max);
        prop_assert!(out.chars().count() <= max + 3);
        prop_assert!(!out.chars().any(char::is_control));
    }
}
