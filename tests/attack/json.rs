//! JSON of strangers: refused with a reason or forwarded, within bounds of time and memory.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use tokio::time::Instant;

use crate::lab::Lab;

const MESSAGES: &str = r#""messages":[{"role":"user","content":"hi"}]"#;
/// The memory that any body of 16 MiB may cost a gateway at most: the body, and what is built from it.
const MEMORY_KIB: u64 = 96 << 10;

/// A request with these members before its messages.
fn with(members: &str) -> Vec<u8> {
    format!("{{{members},{MESSAGES}}}").into_bytes()
}

/// Each body must be answered with this status.
async fn assert_statuses(lab: &Lab, cases: Vec<(&str, Vec<u8>, u16)>) {
    let client = lab.client();
    for (case, body, status) in cases {
        let (before, began) = (lab.backend.arrived().len(), Instant::now());
        let answer = client.ask(Method::POST, "/v1/chat/completions", Bytes::from(body)).await;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        assert_eq!(answer.status, status, "{case}: {text}");
        let reached = lab.backend.arrived().len() - before;
        assert_eq!(reached, usize::from(status == 200), "{case}: calls of the backend");
        if status != 200 {
            assert!(answer.json()["error"]["message"].is_string(), "{case}: {text}");
            assert!(text.len() < 1000, "{case}: what was sent comes back: {} bytes", text.len());
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{case} took {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_json_or_too_deep_is_refused() {
    let lab = Lab::here().await;
    let deep = |n: usize| with(&format!(r#""model":"m","x":{}{}"#, "[".repeat(n), "]".repeat(n)));
    let raw = |middle: &[u8]| {
        [br#"{"model":"m","u":""#, middle, br#"",""#, &MESSAGES.as_bytes()[1..], b"}"].concat()
    };
    let cases = vec![
        ("plain", with(r#""model":"m""#), 200),
        ("100 000 open brackets", "[".repeat(100_000).into_bytes(), 400),
        ("100 000 open objects", r#"{"a":"#.repeat(100_000).into_bytes(), 400),
        ("100 000 deep", deep(100_000), 400),
        ("129 deep", deep(128), 400),
        ("127 deep", deep(126), 200),
        ("byte order mark", [b"\xef\xbb\xbf", &with(r#""model":"m""#)[..]].concat(), 400),
        ("text behind it", [&with(r#""model":"m""#)[..], b"x"].concat(), 400),
        ("another document behind it", [&with(r#""model":"m""#)[..], br#"{"model":"short"}"#].concat(), 400),
        ("zero byte behind it", [&with(r#""model":"m""#)[..], b"\0"].concat(), 400),
        ("NaN", with(r#""model":"m","temperature":NaN"#), 400),
        ("Infinity", with(r#""model":"m","temperature":Infinity"#), 400),
        ("number with a leading zero", with(r#""model":"m","seed":01"#), 400),
        ("number with a sign", with(r#""model":"m","seed":+1"#), 400),
        ("hex number", with(r#""model":"m","seed":0x1"#), 400),
        ("comment", with(r#""model":"m"/*x*/"#), 400),
        ("single quotes", with("'model':'m'"), 400),
        ("comma too many", format!(r#"{{"model":"m",{MESSAGES},}}"#).into_bytes(), 400),
        ("not UTF-8", raw(b"\xff"), 400),
        ("overlong UTF-8", raw(b"\xc0\xaf"), 400),
        ("surrogates as UTF-8", raw(b"\xed\xa0\x80"), 400),
        ("zero byte in a string", raw(b"\0"), 400),
        ("line break in a string", raw(b"\n"), 400),
        ("half a surrogate pair as the model", with(r#""model":"\ud800""#), 400),
        ("empty", Vec::new(), 400),
        ("a string", b"\"m\"".to_vec(), 400),
        ("an array", b"[]".to_vec(), 400),
        ("null", b"null".to_vec(), 400),
        ("white space", b"  \t\r\n".to_vec(), 400),
    ];
    assert_statuses(&lab, cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_field_that_is_read_cannot_be_given_twice_in_any_spelling() {
    let lab = Lab::here().await;
    let cases = vec![
        ("model", with(r#""model":"m","model":"short""#), 400),
        ("model, escaped", with(r#""model":"m","mod\u0065l":"short""#), 400),
        ("model, other case", with(r#""model":"m","Model":"short""#), 400),
        ("model, all capitals", with(r#""model":"m","MODEL":"short""#), 400),
        ("stream with a long s", with("\"model\":\"m\",\"\u{17f}tream\":true"), 400),
        ("tokens with a Kelvin sign", with("\"model\":\"m\",\"max_to\u{212a}ens\":1"), 400),
        (
            "stream behind the rest",
            format!(r#"{{"stream":false,"model":"m",{MESSAGES},"stream":true}}"#).into_bytes(),
            400,
        ),
        ("max_tokens", with(r#""model":"m","max_tokens":1,"max_tokens":99999"#), 400),
        ("messages", format!(r#"{{"model":"m",{MESSAGES},{MESSAGES}}}"#).into_bytes(), 400),
        ("n", with(r#""model":"m","n":1,"n":5"#), 400),
        (
            "member of stream_options",
            with(
                r#""model":"m","stream":true,"stream_options":{"include_usage":false,"include_usage":true}"#,
            ),
            400,
        ),
        ("stream_options", with(r#""model":"m","stream_options":{},"stream_options":{}"#), 400),
    ];
    assert_statuses(&lab, cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_models_are_only_looked_up_and_come_back_cut_and_escaped() {
    let lab = Lab::here().await;
    let named = |name: &str| with(&format!(r#""model":{name}"#));
    let long = format!("\"{}\"", "m".repeat(1_000_000));
    let names = [
        ("line breaks and escapes", r#""x\r\nweir: fake\u001b[31m\u202e""#),
        ("markup", r#""<img src=x onerror=alert(1)>""#),
        ("path", r#""../../etc/passwd""#),
        ("zero byte", r#""m\u0000""#),
        ("looks like m", "\"\u{217f}\""),
        ("other case", r#""M""#),
        ("space behind", r#""m ""#),
        ("a million letters", long.as_str()),
        ("template", r#""{{7*7}}${jndi:ldap://x}""#),
    ];
    let cases = names.iter().map(|(case, name)| (*case, named(name), 404)).collect();
    assert_statuses(&lab, cases).await;
    for (_, name) in names {
        let answer = lab.client().ask(Method::POST, "/v1/chat/completions", named(name)).await;
        let message = answer.json()["error"]["message"].as_str().expect("a message").to_owned();
        assert!(message.chars().all(|c| c.is_ascii() && !c.is_ascii_control()), "{message:?}");
    }
    let cases = vec![
        ("a number", named("1"), 400),
        ("null", named("null"), 400),
        ("a list", named(r#"["m"]"#), 400),
        ("none", format!("{{{MESSAGES}}}").into_bytes(), 400),
    ];
    assert_statuses(&lab, cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_are_absurd_are_refused_and_other_kinds_are_not_converted() {
    let lab = Lab::here().await;
    let mut cases = Vec::new();
    let absurd = [
        "0",
        "1.5",
        "-1.5",
        "1e-3",
        "1e30",
        "\"5\"",
        "4294967296",
        "9223372036854775808",
        "18446744073709551616",
        "true",
        "[]",
        "{}",
        "-0",
        "1e400",
    ];
    for field in ["max_tokens", "max_completion_tokens"] {
        for value in absurd {
            cases.push((field, with(&format!(r#""model":"m","{field}":{value}"#)), 400));
        }
        // Without a bound, and whole numbers in other forms, as backends accept them.
        for value in ["-1", "100.0", "1e3"] {
            cases.push((field, with(&format!(r#""model":"m","{field}":{value}"#)), 200));
        }
    }
    for value in ["-1", "0", "129", "1000000", "1.5", "\"1\""] {
        cases.push(("n", with(&format!(r#""model":"m","n":{value},"max_tokens":1"#)), 400));
    }
    for value in ["\"true\"", "1", "[]", "{}"] {
        cases.push(("stream", with(&format!(r#""model":"m","stream":{value}"#)), 400));
    }
    assert_statuses(&lab, cases).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_cannot_choose_where_its_request_goes() {
    let lab = Lab::here().await;
    let elsewhere = crate::lab::backend::Backend::start().await;
    let url = format!("http://{}", elsewhere.address);
    let body = with(&format!(
        r#""model":"m","api_base":"{url}","base_url":"{url}","api_key":"x","url":"{url}","metadata":{{"api_base":"{url}"}}"#
    ));
    let answer = lab.client().ask(Method::POST, "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(elsewhere.arrived().is_empty());
    assert_eq!(lab.backend.arrived().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_sixteen_mib_costs_a_second_and_its_own_memory_however_it_is_made() {
    const MIB: usize = 1 << 20;
    let lab = Lab::process(&[]).await;
    lab.assert_served_within(Duration::from_secs(5), "before").await;
    let before = lab.resident_kib();
    let escapes = r"\u0041".repeat((16 * MIB - 300) / 6);
    let members: String = (0..1_400_000).map(|i| format!(r#""a{i}":1,"#)).collect();
    let lists = "[],".repeat((16 * MIB - 300) / 3);
    let cases = [
        ("escapes", format!(r#"{{"model":"m","messages":[{{"role":"user","content":"{escapes}"}}]}}"#)),
        (
            "members",
            format!(
                r#"{{"model":"m",{}{MESSAGES}}}"#,
                &members[..15 * MIB].rsplit_once(r#""a"#).expect("members").0
            ),
        ),
        ("lists", format!(r#"{{"model":"m","x":[{lists}1],{MESSAGES}}}"#)),
        ("spaces", format!(r#"{}{{"model":"m",{MESSAGES}}}"#, " ".repeat(16 * MIB - 300))),
        ("messages", format!(r#"{{"model":"m","messages":[{}{{}}]}}"#, "{},".repeat(1_000_000))),
        ("digits", format!(r#"{{"model":"m","seed":{},{MESSAGES}}}"#, "9".repeat(MIB))),
    ];
    let client = lab.client();
    for (case, body) in cases {
        // What the body before took is given back by then, so that it is not counted twice.
        let rest = Instant::now() + Duration::from_secs(20);
        while lab.resident_kib() > before + (16 << 10) {
            assert!(Instant::now() < rest, "before {case}: {} KiB are kept", lab.resident_kib() - before);
            lab.assert_served_within(Duration::from_secs(5), "between two bodies").await;
        }
        let began = Instant::now();
        let answer = client.ask(Method::POST, "/v1/chat/completions", body).await;
        assert!(answer.status == 200 || answer.status == 400, "{case}: {} {}", answer.status, answer.text());
        // For a debug build on a busy machine; a release build needs less than half a second.
        assert!(began.elapsed() < Duration::from_secs(30), "{case} took {:?}", began.elapsed());
    }
    let most = lab.peak_kib().saturating_sub(before);
    assert!(most < MEMORY_KIB, "{most} KiB more than {before}");
}
