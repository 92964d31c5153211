//! Refuses well-formed heads with two meanings: of the caller, of the server, or of the length.

use http::header::{self, HeaderMap, HeaderName};
use http::{Request, StatusCode, Version};

use super::framing::Violation;

/// Fields that name the caller; two of them could be read as two callers.
const CREDENTIALS: [HeaderName; 3] =
    [header::AUTHORIZATION, HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// Refuses a request whose head can be read in two ways. [`super::framing`] has checked the framing before.
pub fn check<B>(request: &Request<B>, fields_max: usize) -> Result<(), Violation> {
    let bad = |what| Err(Violation { status: StatusCode::BAD_REQUEST, what });
    let headers = request.headers();
    if headers.len() > fields_max {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Err(Violation { status, what: "the request has too many header fields" });
    }
    if CREDENTIALS.iter().any(|name| is_repeated(headers, name)) {
        return bad("a credential is given twice");
    }
    if is_repeated(headers, &header::HOST) {
        return bad("the Host field is given twice");
    }
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    if let Some(host) = headers.get(header::HOST) {
        let Ok(host) = host.to_str() else { return bad("the Host field is malformed") };
        if !is_host(host) {
            return bad("the Host field is malformed");
        }
        if authority.is_some_and(|authority| !is_same(authority, host, request.uri().scheme_str())) {
            return bad("the request target and the Host field name different servers");
        }
    } else if request.version() == Version::HTTP_11 {
        return bad("the Host field is missing");
    }
    // CONNECT is refused elsewhere; its target is an authority too.
    if authority.is_some_and(|authority| !is_host(authority)) {
        return bad("the authority of the request is malformed");
    }
    Ok(())
}

fn is_repeated(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.get_all(name).iter().nth(1).is_some()
}

/// `uri-host [":" port]` of RFC 3986, or nothing; no user.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((address, rest)) if address.parse::<std::net::Ipv6Addr>().is_ok() => (None, rest),
            _ => return false,
        },
        None => match text.find(':') {
            Some(colon) => (Some(&text[..colon]), &text[colon..]),
            None => (Some(text), ""),
        },
    };
    let port = match port.strip_prefix(':') {
        Some(port) => port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()),
        None => port.is_empty(),
    };
    let name = |b: u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=".contains(&b);
    port && host.is_none_or(|host| host.bytes().all(name))
}

/// Whether two spellings name one server. Case does not matter, and the scheme's default port may be left out.
fn is_same(authority: &str, host: &str, scheme: Option<&str>) -> bool {
    let plain = |text: &str| -> String {
        let own = if scheme == Some("https") { ":443" } else { ":80" };
        let text = text.to_ascii_lowercase();
        text.strip_suffix(own).or(text.strip_suffix(':')).map_or(text.clone(), str::to_owned)
    };
    authority.eq_ignore_ascii_case(host) || plain(authority) == plain(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(target: &str, fields: &[(&'static str, &'static str)], version: Version) -> Option<u16> {
        let mut request = Request::builder().uri(target).version(version);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        check(&request, 5).err().map(|violation| violation.status.as_u16())
    }

    #[test]
    fn a_head_with_one_meaning_passes() {
        for (target, host) in [
            ("/", "a.example"),
            ("/", ""),
            ("/", "[::1]:8080"),
            ("/", "10.0.0.1:65535"),
            ("http://a.example/x", "A.example"),
            ("http://a.example:80/x", "a.example"),
            ("https://a.example/x", "a.example:443"),
        ] {
            assert_eq!(refused(target, &[("host", host)], Version::HTTP_11), None, "{target} {host}");
        }
        assert_eq!(refused("/", &[], Version::HTTP_10), None);
        assert_eq!(refused("https://a/", &[], Version::HTTP_2), None);
    }

    #[test]
    fn a_head_with_two_meanings_is_refused() {
        for (target, host) in [
            ("/", "a@b/../c"),
            ("/", "a b"),
            ("/", "a/b"),
            ("/", "a:b"),
            ("/", "a:123456"),
            ("/", "[::1"),
            ("/", "[a]:1"),
            ("/", "a?b"),
            ("http://a.example/", "b.example"),
            ("http://a.example:81/", "a.example"),
            ("http://user@a.example/", "user@a.example"),
        ] {
            assert_eq!(refused(target, &[("host", host)], Version::HTTP_11), Some(400), "{target} {host}");
        }
        assert_eq!(refused("/", &[], Version::HTTP_11), Some(400));
        assert_eq!(refused("https://a/", &[("host", "b")], Version::HTTP_2), Some(400));
        assert_eq!(refused("https://a/", &[("host", "a"), ("host", "a")], Version::HTTP_2), Some(400));
        for name in ["authorization", "x-api-key", "api-key"] {
            let twice = [("host", "a"), (name, "Bearer a"), (name, "Bearer a")];
            assert_eq!(refused("/", &twice, Version::HTTP_11), Some(400), "{name}");
        }
        let many = [("host", "a"), ("b", ""), ("c", ""), ("d", ""), ("e", ""), ("f", "")];
        assert_eq!(refused("/", &many, Version::HTTP_2), Some(431));
    }
}
