//! Which headers pass, in either direction, and the headers that tell a client about its limits.
//!
//! Invariants:
//! - To a backend goes only what `FORWARDED` lists: never the client's credential, cookies, forwarding headers or
//!   anything hop-by-hop, and nothing that `Connection` names, even if it is on the list.
//! - To a client goes nothing hop-by-hop, no cookie, no rate limits of the upstream's own and no internal header.

use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Request headers that reach a backend.
const FORWARDED: [&str; 10] = [
    "accept",
    "accept-language",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "traceparent",
    "tracestate",
    "user-agent",
    "x-client-request-id",
    "x-request-id",
];

/// Response headers that stop here: hop-by-hop, cookies, framing and what the gateway says itself.
const WITHHELD: [&str; 17] = [
    "alt-svc",
    "connection",
    "content-length",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authentication-info",
    "proxy-connection",
    "retry-after",
    "retry-after-ms",
    "set-cookie",
    "strict-transport-security",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
    "x-request-id",
];

/// Says how long a request waited in queues for a limit or a slot, in `x-weir-wait-ms`; nothing when it did not.
pub fn write_wait(headers: &mut HeaderMap, waited: Duration) {
    if !waited.is_zero() {
        headers.insert("x-weir-wait-ms", HeaderValue::from(millis(waited)));
    }
}

/// The headers of a request to a backend. The backend's own credential is added by the caller.
pub fn to_backend(client: &HeaderMap) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(FORWARDED.len() + 4);
    for name in FORWARDED {
        if named_by_connection(client, name) {
            continue;
        }
        for value in client.get_all(name) {
            out.append(HeaderName::from_static(name), value.clone());
        }
    }
    out
}

/// The headers of an answer to the client, under our request id. `Content-Length` is left to whoever frames the body.
pub fn to_client(upstream: &HeaderMap, request_id: HeaderValue) -> HeaderMap {
    let mut out = HeaderMap::with_capacity(upstream.len() + 8);
    for (name, value) in upstream {
        let text = name.as_str();
        let withheld = WITHHELD.contains(&text)
            || text.starts_with("x-ratelimit-")
            || text.starts_with("ratelimit")
            || text.starts_with("x-weir-")
            || named_by_connection(upstream, text);
        if !withheld {
            out.append(name.clone(), value.clone());
        }
    }
    out.insert("x-request-id", request_id);
    out
}

fn named_by_connection(headers: &HeaderMap, name: &str) -> bool {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&b| b == b','))
        .any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_bytes()))
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
pub struct LimitState {
    /// What it counts.
    pub kind: LimitKind,
    /// How much it allows when untouched.
    pub limit: u64,
    /// How much is left.
    pub remaining: u64,
    /// Until it is untouched again.
    pub reset: Duration,
}

/// The limits of a request that headers tell about.
pub type ShownLimits = smallvec::SmallVec<[LimitState; 8]>;

/// Writes OpenAI's `x-ratelimit-*` headers, of the tightest limit of each kind.
pub fn write_limits(headers: &mut HeaderMap, states: &[LimitState]) {
    for (kind, names) in [
        (
            LimitKind::Requests,
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"],
        ),
        (
            LimitKind::Tokens,
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"],
        ),
    ] {
        let tightest = states.iter().filter(|state| state.kind == kind).min_by(|a, b| {
            // remaining / limit, compared without dividing.
            let (left, right) = (
                u128::from(a.remaining) * u128::from(b.limit),
                u128::from(b.remaining) * u128::from(a.limit),
            );
            left.cmp(&right).then(a.limit.cmp(&b.limit))
        });
        let Some(state) = tightest else { continue };
        let [limit, remaining, reset] = names.map(HeaderName::from_static);
        headers.insert(limit, HeaderValue::from(state.limit));
        headers.insert(remaining, HeaderValue::from(state.remaining));
        if let Ok(value) = HeaderValue::try_from(duration(state.reset)) {
            headers.insert(reset, value);
        }
    }
}

/// Writes `retry-after` in whole seconds, rounded up and one at least, and `retry-after-ms` exactly.
pub fn write_retry_after(headers: &mut HeaderMap, wait: Duration) {
    headers.insert(header::RETRY_AFTER, HeaderValue::from(millis(wait).div_ceil(1000).max(1)));
    headers.insert(HeaderName::from_static("retry-after-ms"), HeaderValue::from(millis(wait)));
}

/// A duration as OpenAI writes it: `120ms`, `1.5s`, `6m0s`, `1h0m0s`; rounded up to a millisecond.
pub fn duration(duration: Duration) -> String {
    let ms = millis(duration);
    let (hours, minutes, rest) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    let seconds = match rest % 1000 {
        0 => format!("{}s", rest / 1000),
        part => format!("{}.{part:03}", rest / 1000).trim_end_matches('0').to_owned() + "s",
    };
    match (hours, minutes) {
        (0, 0) if ms > 0 && ms < 1000 => format!("{ms}ms"),
        (0, 0) => seconds,
        (0, _) => format!("{minutes}m{seconds}"),
        _ => format!("{hours}h{minutes}m{seconds}"),
    }
}

/// Whole milliseconds, rounded up: one that comes back too early is refused again.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
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
            ("content-type", "application/json"),
            ("transfer-encoding", "chunked"),
            ("openai-beta", "a"),
            ("openai-beta", "b"),
        ]);
        let want = map(&[("content-type", "application/json"), ("openai-beta", "a"), ("openai-beta", "b")]);
        assert_eq!(to_backend(&client), want);
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
    fn the_tightest_limit_of_each_kind_is_told() {
        let state = |limit, remaining| LimitState {
            kind: LimitKind::Requests,
            limit,
            remaining,
            reset: Duration::from_secs(360),
        };
        let mut headers = HeaderMap::new();
        write_limits(&mut headers, &[state(10, 5), state(1000, 100), state(4, 3)]);
        assert_eq!(headers["x-ratelimit-limit-requests"], "1000");
        assert_eq!(headers["x-ratelimit-remaining-requests"], "100");
        assert_eq!(headers["x-ratelimit-reset-requests"], "6m0s");
        assert!(!headers.contains_key("x-ratelimit-limit-tokens"));
    }

    #[test]
    fn durations_read_as_openai_writes_them() {
        for (ms, text) in [
            (0, "0s"),
            (120, "120ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (360_000, "6m0s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_millis(ms)), text);
        }
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
