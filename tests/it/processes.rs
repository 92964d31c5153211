//! The binaries, as an operator runs them.

use std::process::Stdio;

use http::StatusCode;
use weir_tests::client::Client;
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
            assert_eq!(answer.headers["x-mock-instance"], "sgp", "gateway {k} holds the new weights");
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
    assert!(err.contains("backend.pool") && err.contains("nowhere"), "{err}");
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
    // Simulated backends end with their process, so the one that is asked afterwards is started by itself.
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
