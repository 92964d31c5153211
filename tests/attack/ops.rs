//! Operations ports and the port of the live page: which callers are answered, under which host names, and with what
//! about tenants.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use weir_tests::cluster::{OPS_TOKEN, Resources, gateway, gateway_with};
use weir_tests::plane::{self, ADMIN_TOKEN};
use weir_tests::process::{Process, command};

/// The status and the text of the answer to these header lines.
async fn ask(address: SocketAddr, line: &str, headers: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.expect("connects");
    let request = format!("{line}\r\n{headers}connection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    // A refused client may be reset after its answer.
    let _ = socket.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no answer to {line} {headers}: {answer}")), answer)
}

async fn get(address: SocketAddr, path: &str, headers: &str) -> u16 {
    ask(address, &format!("GET {path} HTTP/1.1"), headers).await.0
}

/// Hosts of other sites and invalid hosts, with the port of ours.
async fn only_its_own_names(what: &str, address: SocketAddr, paths: &[&str]) {
    let port = address.port();
    for path in paths {
        for host in ["127.0.0.1", "localhost", "LocalHost", "[::1]", "weir", "weir.internal"] {
            let own = format!("host: {host}:{port}\r\n");
            assert_eq!(get(address, path, &own).await, 200, "{what}{path} as {host}");
        }
        for host in ["evil.example", "attacker.com:7080", "EVIL.example.", "127.0.0.1.evil.example"] {
            let status = get(address, path, &format!("host: {host}\r\n")).await;
            assert_eq!(status, 421, "{what}{path} as {host}");
        }
        for host in ["", "user@127.0.0.1", "127.0.0.1/", "2130706433", "0x7f.1", "a b"] {
            let status = get(address, path, &format!("host: {host}\r\n")).await;
            assert_eq!(status, 400, "{what}{path} as '{host}'");
        }
        assert_eq!(get(address, path, "").await, 400, "{what}{path} without a host");
        let twice = "host: localhost\r\nhost: localhost\r\n";
        assert_eq!(get(address, path, twice).await, 400, "{what}{path} with two hosts");
        let absolute = format!("GET http://evil.example{path} HTTP/1.1");
        let status = ask(address, &absolute, "host: localhost\r\n").await.0;
        assert!(matches!(status, 400 | 421), "{what}{path} by another authority: {status}");
        let own = format!("host: 127.0.0.1:{port}\r\n");
        for from in ["origin: http://evil.example\r\n", "origin: null\r\n", "sec-fetch-site: cross-site\r\n"]
        {
            assert_eq!(get(address, path, &format!("{own}{from}")).await, 403, "{what}{path} {from}");
        }
    }
    // Missing pages do not tell more.
    assert_eq!(get(address, "/nothing", "host: evil.example\r\n").await, 421, "{what}");
}

#[tokio::test]
async fn a_gateways_operations_port_answers_only_to_names_that_no_other_site_has() {
    let gateway = gateway(&Resources::in_front_of(&[]), None).await;
    let paths = ["/metrics", "/livez", "/readyz"];
    only_its_own_names("gateway", gateway.running.ops_address, &paths).await;
}

#[tokio::test]
async fn the_control_planes_page_answers_only_to_names_that_no_other_site_has() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = plane::start("127.0.0.1:0", data.path(), None).await;
    let address = plane.page.trim_start_matches("http://").parse().expect("an address");
    only_its_own_names("control plane", address, &["/", "/page.js", "/metrics", "/readyz"]).await;
    let own = format!("host: {address}\r\nauthorization: Bearer {ADMIN_TOKEN}\r\n");
    let change = |from: &str| format!("{own}{from}content-length: 2\r\n");
    let post = "POST /page/backends/b0 HTTP/1.1";
    let (status, _) = ask(address, post, &change("origin: http://evil.example\r\n")).await;
    assert_eq!(status, 403, "a change from another site's page, even with the token");
}

#[tokio::test]
async fn a_limit_services_operations_port_answers_only_to_names_that_no_other_site_has() {
    let args = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"];
    let service = Process::start("weir-ratelimit", &args, "serving").await;
    let address = service.text("ops").parse().expect("an address");
    only_its_own_names("limit service", address, &["/metrics", "/livez"]).await;
}

#[tokio::test]
async fn an_operator_can_allow_a_name() {
    let allowed = |config: &mut weir_gateway::config::Config| {
        config.ops_allowed_hosts =
            ["ops.example.com", "*.lab.example.com"].map(|name| name.parse().expect("a name")).to_vec();
    };
    let gateway = gateway_with(&Resources::in_front_of(&[]), allowed).await;
    let address = gateway.running.ops_address;
    for (host, expected) in [
        ("ops.example.com", 200),
        ("OPS.example.com:443", 200),
        ("a.lab.example.com", 200),
        ("example.com", 421),
        ("lab.example.com", 421),
    ] {
        assert_eq!(get(address, "/readyz", &format!("host: {host}\r\n")).await, expected, "{host}");
    }
}

#[tokio::test]
async fn what_tells_about_tenants_needs_the_operations_token() {
    let gateway = gateway(&Resources::in_front_of(&[]), None).await;
    let address = gateway.running.ops_address;
    for path in ["/usage", "/usage?by=tenant", "/limits?key=acme-key&model=gpt-4.1", "/limits"] {
        let with = |authorization: &str| format!("host: {address}\r\n{authorization}");
        let (status, text) = ask(address, &format!("GET {path} HTTP/1.1"), &with("")).await;
        assert_eq!(status, 401, "{path}");
        assert!(text.contains("--ops-token-file") && !text.contains("acme"), "{text}");
        for wrong in [
            "authorization: Bearer nobody-has-this-one\r\n",
            "authorization: Bearer \r\n",
            "authorization: Basic b3BlcmF0aW9ucw==\r\n",
            &format!("authorization: Bearer {}\r\n", weir_tests::cluster::KEY),
        ] {
            assert_eq!(get(address, path, &with(wrong)).await, 401, "{path} {wrong}");
        }
        let twice = format!("authorization: Bearer {OPS_TOKEN}\r\nauthorization: Bearer {OPS_TOKEN}\r\n");
        assert_eq!(get(address, path, &with(&twice)).await, 400, "two tokens may be two callers");
        let join = if path.contains('?') { '&' } else { '?' };
        let asked = get(address, &format!("{path}{join}token={OPS_TOKEN}"), &with("")).await;
        assert_eq!(asked, 401, "a token in the address is none");
        let status = get(address, path, &with(&format!("authorization: Bearer {OPS_TOKEN}\r\n"))).await;
        assert!(matches!(status, 200 | 400), "{path}: {status}");
    }
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(get(address, path, &format!("host: {address}\r\n")).await, 200, "{path} is for probes");
    }
}

#[tokio::test]
async fn without_an_operations_token_the_pages_about_tenants_are_closed() {
    let gateway = gateway_with(&Resources::in_front_of(&[]), |config| config.ops_token = None).await;
    let address = gateway.running.ops_address;
    for authorization in ["", "authorization: Bearer \r\n", "authorization: Bearer x\r\n"] {
        let headers = format!("host: {address}\r\n{authorization}");
        let (status, text) = ask(address, "GET /usage HTTP/1.1", &headers).await;
        assert_eq!(status, 403);
        assert!(text.contains("--ops-token-file"), "it says what to do: {text}");
    }
}

#[tokio::test]
async fn a_short_operations_token_stops_the_start() {
    let mut gateway = command("weir-gateway");
    gateway.args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"]).env("WEIR_OPS_TOKEN", "short");
    let ended = gateway.output().await.expect("runs");
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(64), "{text}");
    assert!(text.contains("--ops-token-file") && text.contains("16 characters"), "{text}");
}
