use std::net::IpAddr;
use std::sync::LazyLock;

use http::{HeaderMap, HeaderValue, Method, Uri, Version, header};
use weir_runtime::{AllowedHost, AllowedHosts, Head};

use crate::input::Input;

static ALLOWED: LazyLock<AllowedHosts> = LazyLock::new(|| {
    let names = ["ops.example.com", "*.weir.example"];
    let names: Vec<AllowedHost> = names.iter().map(|name| name.parse().expect("a name")).collect();
    AllowedHosts::new(&names).expect("two names")
});

/// What passes names an address, a name that no public site can have, or one that is allowed; and a page that asks comes from
/// that very host. Any text is a name for the command line or is not.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.byte();
    let (host, origin, target) = (input.field(), input.field(), input.text());
    if let Ok(text) = std::str::from_utf8(host)
        && text.parse::<AllowedHost>().is_ok()
    {
        assert!(!text.contains(['/', ':', '@', ' ']), "{text:?} is allowed as a name");
    }
    let (Ok(host), Ok(uri)) = (HeaderValue::from_bytes(host), target.parse::<Uri>()) else { return };
    let mut headers = HeaderMap::new();
    headers.insert(header::HOST, host.clone());
    if flags & 1 != 0 {
        let Ok(origin) = HeaderValue::from_bytes(origin) else { return };
        headers.insert(header::ORIGIN, origin);
    }
    let head = Head { version: Version::HTTP_11, method: &Method::GET, uri: &uri, headers: &headers };
    if ALLOWED.check(&head).is_err() {
        return;
    }
    let host = host.to_str().expect("what passes is text");
    assert!(is_safe(&bare(host)), "{host:?} passes");
    if let Some(authority) = uri.authority() {
        assert!(is_safe(&bare(authority.as_str())), "{authority} passes");
    }
    // What passed as another site's page would have to be of the same name.
    if let Some(origin) = headers.get(header::ORIGIN)
        && uri.authority().is_none()
    {
        let origin = origin.to_str().expect("what passes is text");
        let (_, of) = origin.split_once("://").expect("an origin has a scheme");
        assert_eq!(bare(of), bare(host), "a page of {origin} asked {host}");
    }
}

/// Without port, brackets and last dot, in lower case.
fn bare(host: &str) -> String {
    let port = host.rfind(':').filter(|colon| !host[*colon..].contains(']'));
    let name = &host[..port.unwrap_or(host.len())];
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn is_safe(name: &str) -> bool {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.parse::<IpAddr>().is_ok()
        || !name.contains('.')
        || name == "ops.example.com"
        || name == own.trim().to_ascii_lowercase()
        || [".weir.example", ".svc", ".svc.cluster.local", ".internal", ".localhost"]
            .iter()
            .any(|suffix| name.ends_with(suffix))
}
