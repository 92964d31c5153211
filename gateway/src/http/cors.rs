//! Which web pages may use the gateway from a browser.
//!
//! Off unless origins are named. A page shows its key by a header of its own and never by a cookie, so nothing here allows
//! credentials of the browser's, and an origin that is allowed can do no more than any client with a key.

use std::collections::BTreeSet;
use std::str::FromStr;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode};

use super::response_body::Body;

/// Most origins that may be named.
const ORIGINS_MAX: usize = 100;
/// Longest list of request headers of a preflight that is taken over, bytes.
const HEADERS_MAX_BYTES: usize = 4096;
/// How long a browser may keep the answer to a preflight: short, so that an origin that is taken off is gone soon.
const MAX_AGE: &str = "600";
/// The methods of all endpoints.
const METHODS: &str = "GET, HEAD, POST";
/// What a page may send when its preflight does not say what it wants to.
const HEADERS: &str = "authorization, content-type, api-key, x-api-key, x-request-id";
/// What a page may read of an answer beside what every page may.
const EXPOSED: &str = "x-request-id, request-id, retry-after, retry-after-ms, x-weir-wait-ms, openai-model, \
     openai-processing-ms, openai-version, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, \
     x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens";

/// An origin that an operator allows: `*` for all, or a scheme and a host as browsers send them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AllowedOrigin(String);

impl FromStr for AllowedOrigin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim().to_ascii_lowercase();
        if text == "*" {
            return Ok(Self(text));
        }
        let wrong = |why: &str| Err(format!("{text:?} is no origin: {why}"));
        let Some((scheme, authority)) = text.split_once("://") else {
            return wrong("write a scheme and a host, such as https://app.example.com, or * for all");
        };
        if authority.contains('*') {
            return wrong("name each origin, or allow all by * alone");
        }
        if authority.contains(['/', '?', '#', '@']) {
            return wrong("an origin ends with its host or port, without a path or a slash");
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"+-._[]:".contains(&b);
        if scheme.is_empty() || authority.is_empty() || !text.bytes().all(|b| plain(b) || b == b'/') {
            return wrong("write a scheme and a host, such as https://app.example.com, or * for all");
        }
        // Browsers leave out the port that a scheme has anyway.
        let own_port = match scheme {
            "https" => ":443",
            "http" => ":80",
            _ => "",
        };
        let authority = authority.strip_suffix(own_port).unwrap_or(authority);
        Ok(Self(format!("{scheme}://{authority}")))
    }
}

/// The origins that are allowed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cors {
    any: bool,
    origins: BTreeSet<String>,
}

impl Cors {
    /// Of what an operator named; nothing is allowed when that is nothing.
    ///
    /// # Errors
    /// When `*` stands beside others, or there are more than 100.
    pub fn new(allowed: &[AllowedOrigin]) -> Result<Self, String> {
        let any = allowed.iter().any(|origin| origin.0 == "*");
        if any && allowed.len() > 1 {
            return Err("* allows every origin and stands alone: leave out the others".to_owned());
        }
        if allowed.len() > ORIGINS_MAX {
            return Err(format!("at most {ORIGINS_MAX} origins may be named, not {}", allowed.len()));
        }
        let origins =
            if any { BTreeSet::new() } else { allowed.iter().map(|origin| origin.0.clone()).collect() };
        Ok(Self { any, origins })
    }

    /// What answers to a request allow: the value of `Access-Control-Allow-Origin`. `None` when its page is not allowed
    /// here, or it comes from none.
    pub(super) fn allowed(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        let mut named = headers.get_all(header::ORIGIN).iter();
        let (origin, None) = (named.next()?, named.next()) else { return None };
        if self.any {
            return Some(HeaderValue::from_static("*"));
        }
        let is_listed = origin.to_str().is_ok_and(|origin| self.origins.contains(origin));
        is_listed.then(|| origin.clone())
    }

    /// The answer to a browser that asks whether its page may send a request; `None` for other requests. It needs no key,
    /// since browsers send none with it.
    pub(super) fn preflight<B>(&self, request: &Request<B>) -> Option<Response<Body>> {
        let asked = request.headers();
        let is_preflight =
            request.method() == Method::OPTIONS && asked.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
        if !is_preflight || self.allowed(asked).is_none() {
            return None;
        }
        let mut response = Response::new(Body::from(Bytes::new()));
        *response.status_mut() = StatusCode::NO_CONTENT;
        let headers = response.headers_mut();
        let wanted = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).filter(|names| are_names(names));
        let wanted = wanted.cloned().unwrap_or(HeaderValue::from_static(HEADERS));
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(METHODS));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted);
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(MAX_AGE));
        Some(response)
    }

    /// Marks an answer, whatever it is, for the page that asked; `allowed` is what [`Cors::allowed`] said of the request.
    pub(super) fn mark(&self, headers: &mut HeaderMap, allowed: Option<HeaderValue>) {
        if !self.origins.is_empty() {
            // The answer depends on who asks, also where nobody is allowed: a cache must not mix them up.
            headers.append(header::VARY, HeaderValue::from_static("Origin"));
        }
        if let Some(origin) = allowed {
            headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
            headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED));
        }
    }
}

/// Whether a value is a list of names of headers, which alone is repeated to a browser.
fn are_names(value: &HeaderValue) -> bool {
    value.len() <= HEADERS_MAX_BYTES
        && value.to_str().is_ok_and(|names| {
            names.split(',').all(|name| HeaderName::from_bytes(name.trim().as_bytes()).is_ok())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origins: &[&str]) -> Cors {
        let origins: Vec<AllowedOrigin> =
            origins.iter().map(|origin| origin.parse().expect("an origin")).collect();
        Cors::new(&origins).expect("allowed")
    }

    fn asked(headers: &[(&'static str, &str)]) -> HeaderMap {
        let value = |text: &str| HeaderValue::from_str(text).expect("a value");
        let mut map = HeaderMap::new();
        for (name, text) in headers {
            map.append(*name, value(text));
        }
        map
    }

    fn options(headers: &[(&'static str, &str)]) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = Method::OPTIONS;
        *request.headers_mut() = asked(headers);
        request
    }

    #[test]
    fn an_origin_is_written_as_browsers_send_it() {
        for (text, origin) in [
            ("*", "*"),
            ("https://App.Example.com", "https://app.example.com"),
            ("https://a.example:443", "https://a.example"),
            ("http://a.example:80", "http://a.example"),
            ("http://localhost:3000 ", "http://localhost:3000"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
            ("tauri://localhost", "tauri://localhost"),
        ] {
            assert_eq!(text.parse(), Ok(AllowedOrigin(origin.to_owned())), "{text}");
        }
        for (text, says) in [
            ("", "no origin"),
            ("null", "no origin"),
            ("app.example.com", "write a scheme"),
            ("https://", "write a scheme"),
            ("https://a.example/", "without a path"),
            ("https://a.example/app", "without a path"),
            ("https://user@a.example", "without a path"),
            ("https://*.example.com", "name each origin"),
            ("https://a b", "write a scheme"),
            ("https://a\r\nx: y", "write a scheme"),
        ] {
            let error = text.parse::<AllowedOrigin>().expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
        let many: Vec<AllowedOrigin> = (0..101).map(|n| AllowedOrigin(format!("https://h{n}"))).collect();
        assert!(Cors::new(&many).is_err() && Cors::new(&many[..100]).is_ok());
        assert!(Cors::new(&[AllowedOrigin("*".into()), many[0].clone()]).is_err());
    }

    #[test]
    fn only_named_origins_are_allowed_and_answers_say_that_they_differ() {
        let page = |origin: &str| asked(&[("origin", origin)]);
        let listed = cors(&["https://a.example", "http://localhost:3000"]);
        assert_eq!(listed.allowed(&page("https://a.example")).expect("listed"), "https://a.example");
        for other in [
            "https://b.example",
            "http://a.example",
            "https://a.example:8443",
            "https://a.example.evil",
            "null",
            "",
        ] {
            assert_eq!(listed.allowed(&page(other)), None, "{other}");
        }
        let twice = asked(&[("origin", "https://a.example"), ("origin", "https://a.example")]);
        assert_eq!((listed.allowed(&twice), listed.allowed(&HeaderMap::new())), (None, None));
        let mut headers = HeaderMap::new();
        listed.mark(&mut headers, None);
        assert!(headers["vary"] == "Origin" && headers.len() == 1, "{headers:?}");
        listed.mark(&mut headers, listed.allowed(&page("https://a.example")));
        assert_eq!(headers["access-control-allow-origin"], "https://a.example");
        assert!(headers["access-control-expose-headers"].to_str().expect("text").contains("retry-after-ms"));
        assert!(!headers.contains_key("access-control-allow-credentials"));
        let any = cors(&["*"]);
        assert_eq!(any.allowed(&page("null")).expect("all"), "*");
        let mut headers = HeaderMap::new();
        any.mark(&mut headers, None);
        assert!(headers.is_empty(), "the same for everybody");
    }

    #[test]
    fn off_means_that_nothing_of_it_is_there() {
        let off = Cors::default();
        let preflight =
            options(&[("origin", "https://a.example"), ("access-control-request-method", "POST")]);
        assert!(off.preflight(&preflight).is_none() && off.allowed(preflight.headers()).is_none());
        let mut headers = HeaderMap::new();
        off.mark(&mut headers, None);
        assert!(headers.is_empty());
    }

    #[test]
    fn a_preflight_is_allowed_what_it_asks_for() {
        let listed = cors(&["https://a.example"]);
        let origin = ("origin", "https://a.example");
        let method = ("access-control-request-method", "POST");
        let allowed = |headers: &[(&'static str, &str)]| {
            let response = listed.preflight(&options(headers))?;
            assert_eq!(response.status(), StatusCode::NO_CONTENT);
            let names = response.headers()["access-control-allow-headers"].to_str().expect("text");
            Some(names.to_owned())
        };
        let wanted = "authorization,content-type, x-stainless-os";
        let asked = allowed(&[origin, method, ("access-control-request-headers", wanted)]);
        assert_eq!(asked.as_deref(), Some(wanted));
        assert_eq!(allowed(&[origin, method]).as_deref(), Some(HEADERS));
        let long = "x".repeat(HEADERS_MAX_BYTES + 1);
        for odd in ["a b", "a;b", "", long.as_str()] {
            let asked = allowed(&[origin, method, ("access-control-request-headers", odd)]);
            assert_eq!(asked.as_deref(), Some(HEADERS), "{odd}");
        }
        assert_eq!(allowed(&[origin]), None, "a plain OPTIONS is none");
        assert_eq!(allowed(&[("origin", "https://b.example"), method]), None);
        let mut post = options(&[origin, method]);
        *post.method_mut() = Method::POST;
        assert!(listed.preflight(&post).is_none());
    }
}
