//! Which headers pass, in either direction, and the headers that tell a client about its limits.
//!
//! Invariants:
//! - To a backend goes only what `FORWARDED` lists: never the client's credential, cookies, forwarding headers or
//!   anything hop-by-hop, and nothing that `Connection` names, even if it is on the list.
//! - To a client goes only what `ANSWERED` lists: a backend cannot set cookies, redirect, ask for credentials, open the
//!   gateway to other sites, or speak to the proxy in front of it (`X-Accel-Redirect`, `X-Sendfile`).

use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::api::duration::{duration, millis};

/// Request headers that reach a backend.
static FORWARDED: [HeaderName; 8] = [
    header::ACCEPT,
    header::ACCEPT_LANGUAGE,
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("openai-beta"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
    header::USER_AGENT,
    HeaderName::from_static("x-client-request-id"),
];

/// The id of a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Response headers that reach a client: what SDKs and people read of an answer. `openai-organization` and
/// `openai-project` name the operator's account, and caching is not for answers to POST.
static ANSWERED: [HeaderName; 7] = [
    header::CONTENT_TYPE,
    HeaderName::from_static("deprecation"),
    HeaderName::from_static("openai-model"),
    HeaderName::from_static("openai-processing-ms"),
    HeaderName::from_static("openai-version"),
    // The provider's own name of the request, for its support; ours is x-request-id.
    HeaderName::from_static("request-id"),
    HeaderName::from_static("sunset"),
];
/// Longest value of a header that is taken over from an answer, bytes.
const ANSWERED_MAX_BYTES: usize = 256;

/// Says how long a request waited in queues for a limit or a slot, in `x-weir-wait-ms`; nothing when it did not.
pub fn write_wait(headers: &mut HeaderMap, waited: Duration) {
    if !waited.is_zero() {
        headers.insert("x-weir-wait-ms", HeaderValue::from(millis(waited)));
    }
}

/// The headers of a request to a backend, under our request id. The backend's own credential is added by the caller.
pub fn to_backend(client: &HeaderMap, request_id: HeaderValue) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(FORWARDED.len() + 5);
    for (name, value) in client {
        if FORWARDED.contains(name) && !named_by_connection(client, name) {
            out.append(name, value.clone());
        }
    }
    out.insert(REQUEST_ID, request_id);
    // What was read of the body is JSON, whatever the client called it; vLLM refuses the `application/x-www-form-urlencoded`
    // of a `curl -d`.
    out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // An answer is read on its way: tokens are counted, the model is named as the client named it. Without this header
    // RFC 9110 (12.5.3) lets a server choose any encoding.
    out.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    out
}

/// The headers of an answer to the client, under our request id. `Content-Length` is left to whoever frames the body, and
/// so is a `Content-Type` that does not fit it ([`content_type`]).
pub fn to_client(upstream: &HeaderMap, request_id: HeaderValue) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(ANSWERED.len() + 8);
    let mut last = None;
    for (name, value) in upstream {
        // Of repeated ones, which stand together, the first counts.
        if ANSWERED.contains(name) && last.replace(name) != Some(name) {
            let plain = value.to_str().is_ok();
            if plain && value.len() <= ANSWERED_MAX_BYTES && !named_by_connection(upstream, name) {
                out.insert(name, value.clone());
            }
        }
    }
    out.insert(REQUEST_ID, request_id);
    out
}

/// What the body of an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// JSON.
    Json,
    /// Server-sent events.
    Events,
}

/// Makes `Content-Type` say what the body is, whatever the backend called it: nothing a backend sends is a page that a
/// browser shows.
pub fn content_type(headers: &mut HeaderMap, content: Content) {
    let named = written_type(headers);
    let is = |name: &str| named.eq_ignore_ascii_case(name);
    let is_kind_of = |kind: &str| {
        let at = named.len().checked_sub(kind.len());
        at.and_then(|at| named.get(at..)).is_some_and(|end| end.eq_ignore_ascii_case(kind))
    };
    let (fits, right) = match content {
        Content::Json => (is("application/json") || is_kind_of("+json"), "application/json"),
        Content::Events => (is("text/event-stream"), "text/event-stream; charset=utf-8"),
    };
    if !fits {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(right));
    }
}

/// The media type of a body without its parameters, in lower case; empty when none is given.
pub fn media_type(headers: &HeaderMap) -> String {
    written_type(headers).to_ascii_lowercase()
}

/// The same, as it is written.
fn written_type(headers: &HeaderMap) -> &str {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim()
}

/// The first coding of an answer that its body would have to be decoded of before it can be read: of `Content-Encoding`
/// any but `identity`, of `Transfer-Encoding` any but `chunked`.
pub fn coding(headers: &HeaderMap) -> Option<String> {
    let codings = |name, plain: &'static str| {
        let values = headers.get_all(name).iter().flat_map(|value| value.as_bytes().split(|&b| b == b','));
        values
            .map(<[u8]>::trim_ascii)
            .find(|coding| !coding.is_empty() && !coding.eq_ignore_ascii_case(plain.as_bytes()))
    };
    let coding = codings(header::CONTENT_ENCODING, "identity");
    let coding = coding.or_else(|| codings(header::TRANSFER_ENCODING, "chunked"))?;
    Some(coding[..coding.len().min(CODING_MAX_BYTES)].escape_ascii().to_string())
}

/// What is repeated of the name of a coding, bytes.
const CODING_MAX_BYTES: usize = 32;

fn named_by_connection(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b','))
        .any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
}

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// Requests.
    Requests,
    /// Tokens.
    Tokens,
}

/// Where one limit stands after a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShownLimit {
    /// What it counts.
    pub kind: LimitKind,
    /// How much it allows per minute, as declared.
    pub limit: u64,
    /// How much it allows at once: the capacity of its bucket.
    pub burst: u64,
    /// How much can be used now; after a quiet time more than the limit, and at most the burst.
    pub remaining: u64,
    /// Until it is untouched again.
    pub reset: Duration,
}

/// The limits of a request that headers tell about.
pub type ShownLimits = smallvec::SmallVec<[ShownLimit; 8]>;

/// By kind: the limit, what remains of it, when it is untouched again.
static LIMIT_HEADERS: [(LimitKind, [HeaderName; 3]); 2] = [
    (
        LimitKind::Requests,
        [
            HeaderName::from_static("x-ratelimit-limit-requests"),
            HeaderName::from_static("x-ratelimit-remaining-requests"),
            HeaderName::from_static("x-ratelimit-reset-requests"),
        ],
    ),
    (
        LimitKind::Tokens,
        [
            HeaderName::from_static("x-ratelimit-limit-tokens"),
            HeaderName::from_static("x-ratelimit-remaining-tokens"),
            HeaderName::from_static("x-ratelimit-reset-tokens"),
        ],
    ),
];

/// Writes OpenAI's `x-ratelimit-*` headers, of the tightest limit of each kind.
pub fn write_limits(headers: &mut HeaderMap, states: &[ShownLimit]) {
    for (kind, [limit, remaining, reset]) in &LIMIT_HEADERS {
        let tightest = states.iter().filter(|state| state.kind == *kind).min_by(|a, b| {
            // remaining / burst, compared without dividing.
            let (left, right) = (
                u128::from(a.remaining) * u128::from(b.burst),
                u128::from(b.remaining) * u128::from(a.burst),
            );
            left.cmp(&right).then(a.burst.cmp(&b.burst))
        });
        let Some(state) = tightest else { continue };
        headers.insert(limit.clone(), HeaderValue::from(state.limit));
        headers.insert(remaining.clone(), HeaderValue::from(state.remaining));
        if let Ok(value) = HeaderValue::try_from(duration(state.reset)) {
            headers.insert(reset.clone(), value);
        }
    }
}

/// Writes `retry-after` in whole seconds, rounded up and one at least, and `retry-after-ms` exactly.
pub fn write_retry_after(headers: &mut HeaderMap, wait: Duration) {
    headers.insert(header::RETRY_AFTER, HeaderValue::from(millis(wait).div_ceil(1000).max(1)));
    headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(millis(wait)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut out = HeaderMap::new();
        for (name, value) in pairs {
            out.append(*name, HeaderValue::from_static(value));
        }
        out
    }

    #[test]
    fn only_listed_headers_reach_a_backend() {
        let client = map(&[
            ("authorization", "Bearer secret"),
            ("cookie", "a=b"),
            ("x-forwarded-for", "1.2.3.4"),
            ("connection", "keep-alive, X-Request-Id"),
            ("x-request-id", "mine"),
            ("content-type", "application/x-www-form-urlencoded"),
            ("x-api-key", "secret"),
            ("api-key", "secret"),
            ("transfer-encoding", "chunked"),
            ("openai-beta", "a"),
            ("openai-beta", "b"),
        ]);
        let want = map(&[
            ("content-type", "application/json"),
            ("openai-beta", "a"),
            ("openai-beta", "b"),
            ("accept-encoding", "identity"),
            ("x-request-id", "ours"),
        ]);
        assert_eq!(to_backend(&client, HeaderValue::from_static("ours")), want);
    }

    #[test]
    fn upstream_headers_are_cleaned() {
        let upstream = map(&[
            ("content-type", "text/event-stream"),
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("set-cookie", "a=b"),
            ("x-ratelimit-limit-requests", "1"),
            ("x-request-id", "theirs"),
            ("openai-processing-ms", "3"),
        ]);
        let want = map(&[
            ("content-type", "text/event-stream"),
            ("openai-processing-ms", "3"),
            ("x-request-id", "ours"),
        ]);
        assert_eq!(to_client(&upstream, HeaderValue::from_static("ours")), want);
    }

    #[test]
    fn no_header_of_a_backend_passes_that_is_not_listed() {
        let commanding = [
            "x-accel-redirect",
            "x-sendfile",
            "location",
            "www-authenticate",
            "server",
            "access-control-allow-origin",
            "clear-site-data",
            "set-cookie",
            "refresh",
            "link",
            "strict-transport-security",
            "content-encoding",
            "content-security-policy",
            "cache-control",
            "openai-organization",
            "llm_provider-x",
            "x-should-retry",
            "retry-after",
            "x-anything",
        ];
        let mut upstream = map(&[("content-type", "application/json"), ("request-id", "req_1")]);
        for name in commanding {
            upstream.append(name, HeaderValue::from_static("1"));
        }
        let ours = HeaderValue::from_static("ours");
        let want =
            map(&[("content-type", "application/json"), ("request-id", "req_1"), ("x-request-id", "ours")]);
        assert_eq!(to_client(&upstream, ours.clone()), want);
        let long = "x".repeat(ANSWERED_MAX_BYTES + 1);
        let mut upstream = HeaderMap::new();
        upstream.insert("openai-version", HeaderValue::try_from(long).expect("a value"));
        upstream.insert("openai-model", HeaderValue::from_bytes(b"\xff\xfe").expect("a value"));
        assert_eq!(to_client(&upstream, ours), map(&[("x-request-id", "ours")]));
    }

    #[test]
    fn a_body_is_called_what_it_is() {
        for (named, content, want) in [
            ("application/json; charset=utf-8", Content::Json, "application/json; charset=utf-8"),
            ("application/problem+json", Content::Json, "application/problem+json"),
            ("text/html", Content::Json, "application/json"),
            ("", Content::Json, "application/json"),
            ("Text/Event-Stream", Content::Events, "Text/Event-Stream"),
            ("text/html", Content::Json, "application/json"),
        ] {
            let mut headers = map(&[("content-type", named)]);
            content_type(&mut headers, content);
            assert_eq!(headers["content-type"], want, "{named}");
        }
    }

    #[test]
    fn every_coding_but_none_is_found() {
        let found = |pairs: &[(&'static str, &'static str)]| coding(&map(pairs));
        for plain in [
            &[][..],
            &[("content-encoding", "identity")],
            &[("content-encoding", "")],
            &[("content-encoding", " Identity , identity")],
            &[("transfer-encoding", "chunked")],
        ] {
            assert_eq!(found(plain), None, "{plain:?}");
        }
        for coded in
            ["gzip", "br", "zstd", "deflate", "x-gzip", "GZIP", "compress", "identity, gzip", "weird"]
        {
            assert!(found(&[("content-encoding", coded)]).is_some(), "{coded}");
        }
        assert_eq!(
            found(&[("content-encoding", "identity"), ("content-encoding", "br")]).as_deref(),
            Some("br")
        );
        assert_eq!(found(&[("transfer-encoding", "gzip, chunked")]).as_deref(), Some("gzip"));
    }

    #[test]
    fn the_tightest_limit_of_each_kind_is_told() {
        let state = |burst, remaining| ShownLimit {
            kind: LimitKind::Requests,
            limit: burst / 5,
            burst,
            remaining,
            reset: Duration::from_secs(360),
        };
        let mut headers = HeaderMap::new();
        write_limits(&mut headers, &[state(10, 5), state(1000, 100), state(4, 3)]);
        assert_eq!(headers["x-ratelimit-limit-requests"], "200", "the rate that was declared");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "100");
        assert_eq!(headers["x-ratelimit-reset-requests"], "6m0s");
        assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    }

    #[test]
    fn retry_after_is_rounded_up_and_a_second_at_least() {
        let mut headers = HeaderMap::new();
        write_retry_after(&mut headers, Duration::from_micros(1_000_500));
        assert_eq!(
            (&headers["retry-after"], &headers["retry-after-ms"]),
            (&"2".parse().unwrap(), &"1001".parse().unwrap())
        );
        write_retry_after(&mut headers, Duration::ZERO);
        assert_eq!(headers["retry-after"], "1");
    }
}
