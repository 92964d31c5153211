//! The binaries, as an operator runs them.

use std::process::Stdio;

use http::StatusCode;
use tokio::io::AsyncBufReadExt as _;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::mock;
use weir_tests::process::{Process, command, signal, up};

const CHAT: &str = r#"{"model":"gpt-4.1","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

#[tokio::test]
async fn up_answers_shifts_weight_on_every_gateway_and_stops_when_told() {
    let mut up = up(&["--gateways", "3"]).await;
    for k in 0..3 {
        let answer = up.client(k).chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "gateway {k}: {}", answer.text());
    }
    for backend in ["fra", "vir"] {
        let (code, _, err) = up.weir(&["weight", backend, "0"]).await;
        assert_eq!(code, 0, "{err}");
        assert!(err.contains("applied on 3 of 3 gateways"), "{err}");
    }
    for k in 0..3 {
        for _ in 0..10 {
            let answer = up.client(k).chat(CHAT).await;
            assert_eq!(answer.headers["request-id"], "req-sgp", "gateway {k} holds the new weights");
        }
    }
    signal(&up.child, "-TERM").await;
    assert_eq!(up.child.wait().await.expect("ends").code(), Some(0));
}

#[tokio::test]
async fn a_key_that_is_revoked_is_refused_by_every_gateway_once_the_command_returns() {
    let up = up(&["--gateways", "2"]).await;
    let (code, _, err) = up.weir(&["key", "revoke", "first-look"]).await;
    assert_eq!(code, 0, "{err}");
    for k in 0..2 {
        assert_eq!(up.client(k).chat(CHAT).await.status, StatusCode::UNAUTHORIZED);
    }
}

#[tokio::test]
async fn a_wrong_file_stops_the_whole_apply_with_its_path_and_changes_nothing() {
    let up = up(&[]).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("wrong.yaml");
    let text = "kind: tenant\nname: fine\nspec: {}\n---\nkind: backend\nname: lost\nspec: { pool: nowhere, url: \"http://h\", models: { gpt-4.1: \"\" } }\n";
    std::fs::write(&file, text).expect("written");
    let (code, _, err) = up.weir(&["apply", "-f", file.to_str().expect("UTF-8")]).await;
    assert_eq!(code, 64, "{err}");
    assert!(err.contains("backend lost: spec.pool") && err.contains("nowhere"), "{err}");
    let (code, out, _) = up.weir(&["get", "tenant", "fine"]).await;
    assert_ne!(code, 0, "not even the part that was right is there: {out}");
}

#[tokio::test]
async fn with_the_control_plane_killed_a_restarted_gateway_serves_from_disk() {
    let data = tempfile::tempdir().expect("a directory");
    let directory = data.path().to_str().expect("UTF-8");
    let mut up = up(&["--data-dir", directory]).await;
    let key = up.text("api_key").to_owned();
    assert_eq!(up.client(0).chat(CHAT).await.status, StatusCode::OK);
    // Simulated backends end with their process, so the one that is asked afterwards is started separately.
    let ready = format!("{directory}/mock");
    let mut mock = command("mock-llm");
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address");
    drop(free);
    let _mock = mock
        .args(["--listen", &address.to_string(), "--model", "gpt-4.1"])
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    weir_tests::eventually("the mock listens", || async {
        tokio::net::TcpStream::connect(address).await.is_ok()
    })
    .await;
    let file = format!("{ready}.yaml");
    let text = format!(
        "kind: backend\nname: own\nspec: {{ pool: chat, url: \"http://{address}\", weight: 10000, models: {{ gpt-4.1: \"\" }} }}\n"
    );
    std::fs::write(&file, text).expect("written");
    let (code, _, err) = up.weir(&["apply", "-f", &file, "--set", "own"]).await;
    assert_eq!(code, 0, "{err}");
    signal(&up.child, "-KILL").await;
    up.child.wait().await.expect("dead");

    let copy = format!("{directory}/gateway-0");
    let args = ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"];
    let gateway =
        Process::start("weir-gateway", &[&args[..], &["--data-dir", &copy]].concat(), "serving").await;
    let client = Client::new(gateway.text("clients").parse().expect("an address"), &key);
    for _ in 0..5 {
        let answer = client.chat(CHAT).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
}

/// A gateway on any port whose control plane is away.
const ALONE: [&str; 3] =
    ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"];

/// Runs a process to its end. Returns its exit code and its output.
async fn ended(name: &str, args: &[&str]) -> (i32, String) {
    let done = command(name).args(args).output().await.expect("runs");
    (done.status.code().unwrap_or(-1), String::from_utf8(done.stderr).expect("UTF-8"))
}

#[tokio::test]
async fn the_first_resources_come_from_a_file_and_a_store_in_use_ignores_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name).to_str().expect("UTF-8").to_owned();
    let (first, second, data, token) = (path("first.yaml"), path("second.yaml"), path("data"), path("token"));
    std::fs::write(&first, "kind: tenant\nname: first\nspec: {}\n").expect("written");
    std::fs::write(&second, "kind: tenant\nname: second\nspec: {}\n").expect("written");
    std::fs::write(&token, "0123456789abcdef\n").expect("written");
    for bootstrap in [&first, &second] {
        let listen = ["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--admin-token-file", &token];
        let args = [&listen[..], &["--data-dir", &data, "--bootstrap", bootstrap]].concat();
        let mut plane = Process::start("weir-control-plane", &args, "control plane serves").await;
        let mut weir = command("weir");
        weir.args(["list", "tenants", "--server", plane.text("grpc"), "--token-file", &token]);
        let out = String::from_utf8(weir.output().await.expect("runs").stdout).expect("UTF-8");
        assert!(out.contains("first") && !out.contains("second"), "with {bootstrap}: {out}");
        signal(&plane.child, "-TERM").await;
        assert_eq!(plane.child.wait().await.expect("ends").code(), Some(0));
    }
}

#[tokio::test]
async fn a_file_to_start_with_that_is_missing_or_wrong_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let wrong = directory.path().join("wrong.yaml");
    std::fs::write(&wrong, "kind: tenant\nname: t\nspec: { colour: red }\n").expect("written");
    let (wrong, data) = (wrong.to_str().expect("UTF-8"), directory.path().to_str().expect("UTF-8"));
    for (file, said) in [("/nowhere/weir.yaml", "/nowhere/weir.yaml"), (wrong, "wrong.yaml:3")] {
        let plane = ended("weir-control-plane", &["--data-dir", data, "--bootstrap", file]).await;
        let up = ended("weir", &["up", "--listen", "127.0.0.1:0", "--config", file]).await;
        for (code, text) in [plane, up] {
            assert_eq!(code, 64, "{text}");
            assert!(text.contains(said), "{text}");
        }
    }
}

/// Separate gateways serve the rest too.
#[tokio::test]
async fn up_serves_the_rest_of_a_configuration_whose_one_credential_is_missing() {
    let models = mock_llm::Config { models: vec!["m".into()], ..Default::default() };
    let mock = mock(models, &CancellationToken::new()).await;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("own.yaml");
    let manifest = format!(
        "kind: pool\nname: p\nspec: {{}}\n\
         ---\nkind: backend\nname: good\nspec: {{ pool: p, url: \"http://{0}\", models: {{ m: \"\" }} }}\n\
         ---\nkind: backend\nname: bare\nspec: {{ pool: p, url: \"http://{0}\", models: {{ m: \"\" }}, \
         credential: \"env:PROV_B_KEY\" }}\n\
         ---\nkind: model\nname: m\nspec: {{ pool: p }}\n\
         ---\nkind: tenant\nname: t\nspec: {{}}\n",
        mock.address
    );
    std::fs::write(&file, manifest).expect("written");
    let up = up(&["--config", file.to_str().expect("UTF-8"), "--credential-env", "PROV_*"]).await;
    let refused = up.line["refused"][0].as_str().expect("one");
    assert!(refused.starts_with("backend bare: ") && refused.contains("PROV_B_KEY"), "{refused}");
    let answer = up.client(0).chat(&CHAT.replace("gpt-4.1", "m")).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
}

/// A port that something else listens on.
async fn taken() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    (listener, address)
}

#[tokio::test]
async fn a_port_of_up_that_is_taken_is_named_with_its_flag() {
    let (_listener, address) = taken().await;
    for flag in ["--admin-listen", "--http-listen", "--ops-listen", "--listen"] {
        let mut args = vec!["up", flag, &address];
        if flag != "--listen" {
            args.extend(["--listen", "127.0.0.1:0"]);
        } else {
            args.extend([
                "--admin-listen",
                "127.0.0.1:0",
                "--http-listen",
                "127.0.0.1:0",
                "--ops-listen",
                "127.0.0.1:0",
            ]);
        }
        let (code, text) = ended("weir", &args).await;
        assert!(code == 69 || code == 1, "{flag}: {code}: {text}");
        assert!(text.contains(&address) && text.contains(flag), "{flag}: {text}");
    }
    let (code, text) = ended("weir", &["up", "--server", "http://127.0.0.1:1"]).await;
    assert!(code == 2 && text.contains("--server has no effect on weir up"), "{code}: {text}");
}

#[tokio::test]
async fn up_that_is_stopped_says_nothing_alarming() {
    let mut command = command("weir");
    command
        .args(["up", "--listen", "127.0.0.1:0", "--output", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    let mut lines = tokio::io::BufReader::new(child.stdout.take().expect("piped")).lines();
    lines.next_line().await.expect("readable").expect("it is up");
    signal(&child, "-INT").await;
    let done = child.wait_with_output().await.expect("ends");
    assert!(done.status.success());
    let said = String::from_utf8_lossy(&done.stderr);
    // That the machine allows few open files is said at the start.
    let at_the_end: Vec<&str> = said.lines().filter(|line| !line.contains("open files")).collect();
    assert!(at_the_end.is_empty(), "{at_the_end:?}");
}

#[tokio::test]
async fn health_tells_a_well_process_from_an_unwell_and_a_missing_one() {
    let up = up(&[]).await;
    let ops = up.line["ops"][0].as_str().expect("an address");
    let (code, out, _) = up.weir(&["health", &format!("{ops}/readyz")]).await;
    assert_eq!((code, out.as_str()), (0, "ready\n"));
    let (code, out, _) = up.weir(&["health", ops]).await;
    assert_eq!((code, out.as_str()), (0, "ready\n"), "readiness, where no page is named");
    let (code, _, err) = up.weir(&["health", &format!("{ops}/nothing-here")]).await;
    assert_eq!(code, 1);
    assert!(err.contains("404"), "{err}");
    let (code, _, err) = up.weir(&["health", "http://127.0.0.1:9/readyz"]).await;
    assert_eq!(code, 69);
    assert!(err.contains("http://127.0.0.1:9/readyz"), "{err}");
}

#[tokio::test]
async fn a_gateway_without_a_configuration_is_not_ready_and_refuses_connections() {
    let gateway = Process::start("weir-gateway", &ALONE, "starting").await;
    let (code, text) = ended("weir", &["health", &format!("http://{}/readyz", gateway.text("ops"))]).await;
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no configuration"), "{text}");
    let refused = tokio::net::TcpStream::connect(gateway.text("clients")).await;
    assert_eq!(refused.expect_err("not listening").kind(), std::io::ErrorKind::ConnectionRefused);
}

#[tokio::test]
async fn a_draining_gateway_still_answers_and_sends_its_clients_away() {
    let directory = tempfile::tempdir().expect("a directory");
    let up = up(&["--data-dir", directory.path().to_str().expect("UTF-8")]).await;
    let copy = directory.path().join("gateway-0");
    let args = ["--pre-stop=30s", "--data-dir", copy.to_str().expect("UTF-8")];
    let mut gateway = Process::start("weir-gateway", &[&ALONE[..], &args].concat(), "serving").await;
    let client = Client::new(gateway.text("clients").parse().expect("an address"), up.text("api_key"));
    assert!(!client.chat(CHAT).await.headers.contains_key("connection"));
    signal(&gateway.child, "-TERM").await;
    let ready = format!("http://{}/readyz", gateway.text("ops"));
    weir_tests::eventually("readiness is withdrawn", || async {
        ended("weir", &["health", &ready]).await.0 == 1
    })
    .await;
    let answer = client.chat(CHAT).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(answer.headers["connection"], "close");
    // The second signal ends the remaining time.
    signal(&gateway.child, "-TERM").await;
    assert_eq!(gateway.child.wait().await.expect("ends").code(), Some(0));
}
