//! Silent and slow connections: they are cut in time on every port, and keep nobody out.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use weir_tests::client::Client;
use weir_tests::plane;
use weir_tests::process::{Process, binary, command_of};

use crate::lab::backend::Backend;
use crate::lab::http1::{chat, exchange, models};
use crate::lab::http2::{self, Ended, Http2, PREFACE};
use crate::lab::{Lab, SOON, connect, resources};
use crate::tls::{certificate, flags, trusting};

/// The time for a first request.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// The additional time of a busy machine.
const LATE: Duration = Duration::from_secs(8);
/// Good clients are answered within a second; a busy machine with a slow build has some more.
const AT_ONCE: Duration = Duration::from_secs(3);

/// The behaviour of a stranger's connection.
#[derive(Debug, Clone, Copy)]
enum Stranger {
    Says(&'static [u8]),
    /// These bytes, and then a byte per second.
    Trickles(&'static [u8]),
}

/// The time for which the peer keeps the connection, at most as long as the test waits.
async fn kept(address: SocketAddr, stranger: Stranger) -> Option<Duration> {
    let began = Instant::now();
    let (mut reader, mut writer) = connect(address).await.into_split();
    let (Stranger::Says(first) | Stranger::Trickles(first)) = stranger;
    writer.write_all(first).await.expect("sent");
    let mut heard = Vec::new();
    let ended = async {
        let reading = reader.read_to_end(&mut heard);
        let Stranger::Trickles(_) = stranger else { return drop(reading.await) };
        let trickle = async {
            while writer.write_all(b"a").await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        // Whichever side learns of it first.
        tokio::select! { _ = reading => {}, () = trickle => {} }
    };
    tokio::time::timeout(FIRST_REQUEST + LATE, ended).await.ok()?;
    Some(began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_whole_first_request_is_cut_after_ten_seconds_on_every_port() {
    const HALF_HEAD: &[u8] = b"GET / HTTP/1.1\r\nHost: x\r\n";
    /// A record of a handshake that announces 512 bytes and has six.
    const HALF_HELLO: &[u8] = &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    let directory = tempfile::tempdir().expect("a directory");
    certificate(directory.path());
    let secured = flags(directory.path());
    let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
    let (gateway, tls_gateway) = (Lab::process(&[]).await, Lab::process(&secured).await);
    let (data, tls_data) = (directory.path().join("cp"), directory.path().join("cp-tls"));
    let plane = plane::start("127.0.0.1:0", &data, None).await;
    let tls_plane = plane::start_with("127.0.0.1:0", &tls_data, None, &secured).await;
    let listen = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0"];
    let limits = Process::start("weir-ratelimit", &listen, "serving").await;
    let at = |text: &str| text.rsplit('/').next().expect("an address").parse().expect("an address");
    let plain: [(&str, SocketAddr); 6] = [
        ("gateway, clients", gateway.clients),
        ("gateway, operations", gateway.ops),
        ("control plane, gRPC", at(&plane.url)),
        ("control plane, page", at(&plane.page)),
        ("limit service, gRPC", at(limits.text("grpc"))),
        ("limit service, operations", at(limits.text("ops"))),
    ];
    let greeting: &'static [u8] = [PREFACE, &http2::settings(&[])].concat().leak();
    // Without END_HEADERS, and without the CONTINUATION that must follow.
    let half = http2::frame(http2::HEADERS, 0, 1, &http2::block(&[(b":method", b"GET")]));
    let half_head: &'static [u8] = [greeting, &half].concat().leak();
    let long_frame: &'static [u8] = [greeting, &[0, 0x20, 0, http2::HEADERS, 0, 0, 0, 0, 1]].concat().leak();
    let kinds = [
        ("nothing", Stranger::Says(b"")),
        ("P", Stranger::Says(b"P")),
        ("half a preface", Stranger::Says(&PREFACE[..15])),
        ("half a head", Stranger::Says(HALF_HEAD)),
        ("a head, a byte each second", Stranger::Trickles(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: ")),
        ("a request line, a byte each second", Stranger::Trickles(b"GET /")),
        ("HTTP/2 without a request", Stranger::Says(greeting)),
        ("half a head of HTTP/2", Stranger::Says(half_head)),
        ("a frame of HTTP/2, a byte each second", Stranger::Trickles(long_frame)),
    ];
    let secure = [("gateway, TLS", tls_gateway.clients), ("control plane, TLS", at(&tls_plane.url))];
    let hellos = [
        ("nothing", Stranger::Says(b"")),
        ("half a hello", Stranger::Says(HALF_HELLO)),
        ("a hello, a byte each second", Stranger::Trickles(HALF_HELLO)),
    ];
    let mut strangers = JoinSet::new();
    for (ports, kinds) in [(&plain[..], &kinds[..]), (&secure[..], &hellos[..])] {
        for (port, address) in ports.iter().copied() {
            for (kind, stranger) in kinds.iter().copied() {
                strangers.spawn(async move { (port, kind, kept(address, stranger).await) });
            }
        }
    }
    // A caller that has sent a request is no stranger, and is not cut with them.
    let mut known = connect(gateway.clients).await;
    known.write_all(&models("")).await.expect("sent");
    let mut wrong = Vec::new();
    for (port, kind, kept) in strangers.join_all().await {
        match kept {
            None => wrong.push(format!("{port}, {kind}: still open after {:?}", FIRST_REQUEST + LATE)),
            // A port may detect a wrong protocol at once, but not a slow client.
            Some(time) if time < FIRST_REQUEST / 2 && port == "gateway, clients" => {
                wrong.push(format!("{port}, {kind}: cut after {time:?} already"));
            }
            Some(_) => {}
        }
    }
    wrong.sort();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    known.write_all(&models("Connection: close\r\n")).await.expect("sent");
    let mut answers = String::new();
    known.read_to_string(&mut answers).await.expect("read to its end");
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{answers}");
}

/// Opens this number of connections that send these bytes.
async fn open(address: SocketAddr, count: usize, first: &[u8]) -> Vec<TcpStream> {
    let mut sockets = Vec::with_capacity(count);
    for _ in 0..count {
        let mut socket = connect(address).await;
        // It may have been closed already.
        let _ = socket.write_all(first).await;
        sockets.push(socket);
    }
    sockets
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_beyond_the_bound_put_out_each_other_and_nobody_who_asked_for_something() {
    for (case, first) in [
        ("silent", &b""[..]),
        ("half a head", b"GET / HTTP/1.1\r\nHost:"),
        ("half a preface", &PREFACE[..15]),
    ] {
        let lab = Lab::process(&["--max-connections=200"]).await;
        lab.assert_served_within(SOON, "before").await;
        let mut stream = connect(lab.clients).await;
        stream.write_all(&chat("m", "slow-40", true)).await.expect("sent");
        let mut known = connect(lab.clients).await;
        known.write_all(&models("")).await.expect("sent");
        let mut streams = Http2::connect(lab.clients, &[]).await;
        assert!(streams.send(&http2::models(1)).await);
        assert_eq!(streams.ended(1).await, Ended::Answer(200));
        let mut strangers = Vec::new();
        for round in 1..=5 {
            strangers.extend(open(lab.clients, 200, first).await);
            for _ in 0..3 {
                lab.assert_served_within(AT_ONCE, &format!("{case}, round {round}")).await;
            }
        }
        assert!(lab.metric("weir_connections").await <= 200.0, "{case}");
        let mut whole = String::new();
        stream
            .read_to_string(&mut whole)
            .await
            .unwrap_or_else(|e| panic!("{case}: a running stream was cut: {e}"));
        assert!(whole.contains("[DONE]"), "{case}: {whole}");
        let again = known.write_all(&models("Connection: close\r\n")).await;
        again.unwrap_or_else(|e| panic!("{case}: an idle connection that had its answer was put out: {e}"));
        let mut answers = String::new();
        known.read_to_string(&mut answers).await.unwrap_or_else(|e| panic!("{case}: {e}"));
        assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{case}: {answers}");
        assert!(streams.send(&http2::models(3)).await, "{case}");
        assert_eq!(streams.ended(3).await, Ended::Answer(200), "{case}: HTTP/2");
        drop(strangers);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_never_take_the_descriptors_that_backends_need() {
    const DESCRIPTORS: u32 = 256;
    for port in ["clients", "ops"] {
        let backend = Backend::start().await;
        let data = tempfile::tempdir().expect("a directory");
        resources(backend.address).save(data.path());
        let line = format!("ulimit -n {DESCRIPTORS}; exec \"$0\" \"$@\"");
        let mut limited = command_of("sh");
        limited
            .args(["-c", &line])
            .arg(binary("weir-gateway"))
            .args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"])
            .arg("--data-dir")
            .arg(data.path())
            .stderr(Stdio::piped());
        let mut child = limited.spawn().expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let serving = loop {
            let line = lines.next_line().await.expect("readable").expect("it serves before it ends");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            if line["message"] == "serving" {
                break line;
            }
        };
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let address = |field: &str| serving[field].as_str().expect("an address").parse().expect("an address");
        let (clients, attacked): (SocketAddr, SocketAddr) = (address("clients"), address(port));
        let _silent = open(attacked, 400, b"").await;
        for _ in 0..5 {
            let began = Instant::now();
            let heard = exchange(clients, chat("m", "ok", true)).await;
            assert_eq!(heard.statuses(), [200], "beside 400 silent connections to {port}: {heard:?}");
            assert!(
                began.elapsed() < AT_ONCE,
                "{:?} beside 400 silent connections to {port}",
                began.elapsed()
            );
        }
        let ops = Client::new(address("ops"), "");
        let ready = tokio::time::timeout(SOON, ops.ask(http::Method::GET, "/readyz", ""))
            .await
            .expect("operations answer");
        assert_eq!(ready.status, 200, "{port}: {}", ready.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_delay_no_tls_handshake() {
    let directory = tempfile::tempdir().expect("a directory");
    let connector = trusting(&certificate(directory.path()));
    let secured = flags(directory.path());
    let secured: Vec<&str> = secured.iter().map(String::as_str).collect();
    let gateway = Lab::process(&secured).await;
    let plane = plane::start_with("127.0.0.1:0", &directory.path().join("cp"), None, &secured).await;
    let plane_address: SocketAddr = plane.address().parse().expect("an address");
    for (port, address) in [("gateway", gateway.clients), ("control plane", plane_address)] {
        let _silent = open(address, 1500, b"").await;
        for _ in 0..5 {
            let began = Instant::now();
            let socket = connect(address).await;
            let name = ServerName::try_from("localhost").expect("a name");
            let shaken = tokio::time::timeout(SOON, connector.connect(name, socket)).await;
            let shaken = shaken.unwrap_or_else(|_| panic!("{port}: no handshake within {SOON:?}"));
            let mut socket = shaken.unwrap_or_else(|e| panic!("{port}: {e}"));
            assert!(began.elapsed() < AT_ONCE, "{port}: a handshake took {:?}", began.elapsed());
            if port == "gateway" {
                socket.write_all(&models("Connection: close\r\n")).await.expect("sent");
                let mut answer = String::new();
                socket.read_to_string(&mut answer).await.expect("read to its end");
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }
        }
    }
}
