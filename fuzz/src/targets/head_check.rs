use http::{HeaderName, HeaderValue, Request, Version, header};
use weir_runtime::edge::check;

use crate::input::Input;

const FIELDS_MAX: usize = 16;

/// A head that passes has one caller, at most one host, and names no other server in its target.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let version = if input.byte() & 1 == 0 { Version::HTTP_11 } else { Version::HTTP_2 };
    let Ok(request) = Request::builder().uri(input.field()).version(version).body(()) else { return };
    let (mut head, ()) = request.into_parts();
    for line in input.rest().split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            head.headers.append(name, value);
        }
    }
    let request = Request::from_parts(head, ());
    if check(&request, FIELDS_MAX).is_err() {
        return;
    }
    let headers = request.headers();
    assert!(headers.len() <= FIELDS_MAX);
    for once in [header::AUTHORIZATION, header::HOST, HeaderName::from_static("x-api-key")] {
        assert!(headers.get_all(&once).iter().count() <= 1, "{once} is there more than once");
    }
    let host = headers.get(header::HOST).map(|host| host.to_str().expect("a host is text"));
    assert!(host.is_some() || version != Version::HTTP_11, "no host");
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    for named in [host, authority].into_iter().flatten() {
        assert!(!named.contains(['@', '/', '\\', '?', '#', ' ']), "{named:?} is no host");
    }
    if let (Some(host), Some(authority)) = (host, authority) {
        let name = |text: &str| {
            let port = text.rfind(':').filter(|colon| !text[*colon..].contains(']'));
            text[..port.unwrap_or(text.len())].to_ascii_lowercase()
        };
        assert_eq!(name(host), name(authority), "two servers");
    }
}
