use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use weir_gateway::http::headers::{Content, coding, content_type, media_type, to_backend, to_client};
use weir_gateway::http::retry_after;

/// In neither direction does a header pass that is not listed, or that is long, and the body is called what it is.
pub(crate) fn run(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    let mut answer = to_client(&headers, HeaderValue::from_static("id"));
    for (name, value) in &answer {
        let listed = [
            "content-type",
            "deprecation",
            "openai-model",
            "openai-processing-ms",
            "openai-version",
            "request-id",
            "sunset",
            "x-request-id",
        ];
        assert!(listed.contains(&name.as_str()), "{name} reaches the client");
        assert!(value.len() <= 256 && value.to_str().is_ok());
    }
    assert_eq!(answer["x-request-id"], "id");
    for (content, wanted) in [(Content::Json, "json"), (Content::Events, "event-stream")] {
        content_type(&mut answer, content);
        assert!(media_type(&answer).ends_with(wanted), "{answer:?} for {content:?}");
    }
    let request = to_backend(&headers, HeaderValue::from_static("id"));
    for name in ["authorization", "cookie", "host", "x-api-key", "connection", "x-forwarded-for", "te", "upgrade"]
    {
        assert!(!request.contains_key(name), "{name} reaches the backend");
    }
    assert_eq!(request["accept-encoding"], "identity");
    let coding = coding(&headers);
    assert!(coding.is_none_or(|coding| !coding.is_empty() && coding.len() <= 4 * 32 && coding.is_ascii()));
    let wait = retry_after::of(&headers, weir_runtime::wall_clock());
    assert!(wait.is_none_or(|wait| wait <= Duration::from_secs(60)));
}
