use axum::http::HeaderValue;
use proptest::prelude::*;

use super::*;

fn hosts(allowed: &[&str]) -> AllowedHosts {
    let allowed: Vec<AllowedHost> = allowed.iter().map(|name| name.parse().expect("a name")).collect();
    AllowedHosts::new(&allowed).expect("few")
}

/// The status for a GET of HTTP/1.1 with these headers; `None` when it passes.
fn judged(hosts: &AllowedHosts, path: &str, headers: &[(&'static str, &[u8])]) -> Option<u16> {
    judged_as(hosts, Version::HTTP_11, path, headers)
}

fn judged_as(
    hosts: &AllowedHosts,
    version: Version,
    path: &str,
    headers: &[(&'static str, &[u8])],
) -> Option<u16> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, HeaderValue::from_bytes(value).expect("a value"));
    }
    let uri = path.parse().expect("a URI");
    let head = Head { version, method: &Method::GET, uri: &uri, headers: &map };
    hosts.check(&head).err().map(|refusal| refusal.status().as_u16())
}

#[test]
fn addresses_and_names_that_no_public_site_has_are_answered() {
    let hosts = hosts(&["ops.example.com", "*.lab.example.org"]);
    let answered = [
        "127.0.0.1",
        "127.0.0.1:9100",
        "10.1.2.3:80",
        "[::1]",
        "[::1]:7080",
        "[fe80::1]:7080",
        "localhost",
        "LOCALHOST:9100",
        "LocalHost.",
        "localhost:",
        "gateway",
        "gateway:9100",
        "weir_gateway_1:9100",
        "weir-control-plane.weir.svc:7080",
        "weir-control-plane.weir.svc.cluster.local",
        "a.google.internal",
        "weir.localhost:7080",
        "ops.example.com",
        "OPS.Example.COM.:443",
        "a.lab.example.org",
        "a.b.lab.example.org:7080",
    ];
    for host in answered {
        assert_eq!(judged(&hosts, "/metrics", &[("host", host.as_bytes())]), None, "{host}");
    }
}

#[test]
fn names_of_public_sites_are_refused() {
    let hosts = hosts(&["ops.example.com", "*.lab.example.org"]);
    let refused = [
        "evil.example",
        "attacker.com:7080",
        "EVIL.EXAMPLE:9100",
        "evil.example.",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "xlocalhost.com",
        "evilinternal.com",
        "svc.evil.com",
        "internal.evil.com",
        "a.ops.example.com",
        "ops.example.com.evil.example",
        "lab.example.org",
        "xlab.example.org",
        "7f000001.rbndr.us",
        "10.0.0.1.nip.io:9100",
    ];
    for host in refused {
        assert_eq!(judged(&hosts, "/metrics", &[("host", host.as_bytes())]), Some(421), "{host}");
    }
}

#[test]
fn what_is_no_host_is_refused() {
    let hosts = hosts(&[]);
    let long = format!("{}.com", "a".repeat(64));
    let longer = "a.".repeat(130);
    let wrong: [&[u8]; 32] = [
        b"",
        b" ",
        b":9100",
        b".",
        b"..",
        b"a..b",
        b"user@127.0.0.1",
        b"127.0.0.1@evil.example",
        b"evil.example#@127.0.0.1",
        b"127.0.0.1/evil.example",
        b"127.0.0.1:9100:9100",
        b"127.0.0.1:99999",
        b"127.0.0.1:+80",
        b"127.0.0.1:80x",
        b"127.0.0.1 evil.example",
        b"127.0.0.1,evil.example",
        b"127%2e0.0.1",
        b"%6cocalhost",
        b"0177.0.0.1",
        b"0x7f.0.0.1",
        b"0x7f000001",
        b"2130706433",
        b"127.1",
        b"256.0.0.1",
        b"[::1",
        b"::1",
        b"[::1]9100",
        b"[fe80::1%25eth0]",
        b"[127.0.0.1]",
        "b\u{fc}cher.example".as_bytes(),
        long.as_bytes(),
        longer.as_bytes(),
    ];
    for host in wrong {
        let text = String::from_utf8_lossy(host);
        assert_eq!(judged(&hosts, "/metrics", &[("host", host)]), Some(400), "{text}");
    }
    assert_eq!(judged(&hosts, "/metrics", &[]), Some(400), "none");
    assert_eq!(judged(&hosts, "/metrics", &[("host", b"localhost"), ("host", b"localhost")]), Some(400));
    assert_eq!(judged_as(&hosts, Version::HTTP_10, "/readyz", &[]), None, "a balancer's check of HTTP/1.0");
    assert_eq!(judged_as(&hosts, Version::HTTP_10, "/readyz", &[("host", b"evil.example")]), Some(421));
}

#[test]
fn an_absolute_form_counts_too() {
    let hosts = hosts(&[]);
    let judged = |uri: &str, host: &str| judged(&hosts, uri, &[("host", host.as_bytes())]);
    assert_eq!(judged("http://127.0.0.1:9100/metrics", "127.0.0.1:9100"), None);
    assert_eq!(judged("http://evil.example/metrics", "127.0.0.1:9100"), Some(421));
    assert_eq!(judged("http://127.0.0.1:9100/metrics", "evil.example"), Some(421));
    let http2 = judged_as(&hosts, Version::HTTP_2, "http://evil.example/metrics", &[]);
    assert_eq!(http2, Some(421), "the authority of HTTP/2");
    assert_eq!(judged_as(&hosts, Version::HTTP_2, "http://localhost:9100/metrics", &[]), None);
}

#[test]
fn pages_of_other_sites_are_refused_and_links_are_followed() {
    let hosts = hosts(&["weir.example.com"]);
    let from = |host: &str, more: &[(&'static str, &str)]| {
        let mut headers = vec![("host", host.as_bytes())];
        headers.extend(more.iter().map(|(name, value)| (*name, value.as_bytes())));
        judged(&hosts, "/page/stream", &headers)
    };
    let own = "127.0.0.1:7080";
    for origin in [
        "http://evil.example",
        "https://evil.example",
        "null",
        "",
        "http://127.0.0.1:9100",
        "http://localhost:7080",
        "file://",
        "http://127.0.0.1:7080.evil.example",
        "http://user@127.0.0.1:7080",
        "ftp://127.0.0.1:7080",
    ] {
        assert_eq!(from(own, &[("origin", origin)]), Some(403), "{origin}");
    }
    assert_eq!(from(own, &[("origin", "http://127.0.0.1:7080")]), None);
    assert_eq!(from("weir.example.com", &[("origin", "https://weir.example.com")]), None, "behind TLS");
    assert_eq!(from("weir.example.com", &[("origin", "https://weir.example.com:444")]), Some(403));
    let both = [("origin", "http://127.0.0.1:7080"), ("origin", "http://evil.example")];
    assert_eq!(from(own, &both), Some(403));
    for site in ["cross-site", "same-site", "Cross-Site"] {
        assert_eq!(from(own, &[("sec-fetch-site", site)]), Some(403), "{site}");
        let link = [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        assert_eq!(from(own, &link), None, "a link");
        let frame = [("sec-fetch-site", site), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
        assert_eq!(from(own, &frame), Some(403), "a frame");
    }
    for site in ["same-origin", "none"] {
        assert_eq!(from(own, &[("sec-fetch-site", site)]), None, "{site}");
    }
}

#[test]
fn the_list_of_names_is_bounded_and_holds_only_names() {
    for wrong in [
        "",
        "*",
        "*.",
        "a b",
        "127.0.0.1",
        "[::1]",
        "a.example:80",
        "a.example:",
        "http://a.example",
        "*.*.a",
        "ex%61mple",
    ] {
        assert!(wrong.parse::<AllowedHost>().is_err(), "{wrong}");
    }
    let many: Vec<AllowedHost> =
        (0..=ALLOWED_MAX).map(|n| format!("n{n}.example").parse().expect("a name")).collect();
    assert!(AllowedHosts::new(&many).is_err());
    assert!(AllowedHosts::new(&many[1..]).is_ok());
}

#[test]
fn a_refusal_repeats_little_and_nothing_raw() {
    let refusal = Refusal::StrangeHost(shown(&format!("{}\u{1b}[31m", "a".repeat(1000))));
    assert!(refusal.to_string().len() < 250 && !refusal.to_string().contains('\u{1b}'));
}

proptest! {
    #[test]
    fn no_host_makes_it_fail_and_what_passes_is_safe(host in any::<Vec<u8>>(), origin in "\\PC*") {
        let Ok(value) = HeaderValue::from_bytes(&host) else { return Ok(()) };
        let mut map = HeaderMap::new();
        map.insert(header::HOST, value);
        if let Ok(origin) = HeaderValue::from_str(&origin) {
            map.insert(header::ORIGIN, origin);
        }
        let uri = Uri::from_static("/metrics");
        let head = Head { version: Version::HTTP_11, method: &Method::GET, uri: &uri, headers: &map };
        let _ = AllowedHosts::default().check(&head);
    }

    #[test]
    fn a_name_with_a_public_suffix_never_passes(name in "[a-zA-Z0-9.-]{0,40}", port in any::<u16>()) {
        let host = format!("{name}.example:{port}");
        prop_assert!(judged(&AllowedHosts::default(), "/", &[("host", host.as_bytes())]).is_some());
    }
}
