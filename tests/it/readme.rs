//! The commands of README.md, run as they are written, and the examples of `deploy/examples`.

use http::Method;
use weir_tests::client::Client;
use weir_tests::document::{commands, free_ports, root, run};
use weir_tests::eventually;
use weir_tests::plane::{ADMIN_TOKEN, start};
use weir_tests::process::command;
use weir_tests::redis::Redis;

/// Puts a free port where the document has another one, which it must name.
fn replaced(text: &str, port: &str, free: impl std::fmt::Display) -> String {
    assert!(text.contains(port), "{port} is not in\n{text}");
    text.replace(port, &free.to_string())
}

#[tokio::test]
async fn separate_processes_come_up_by_the_commands_of_the_readme_alone() {
    let redis = Redis::start().await;
    let [grpc, http, clients_0, clients_1, ops_0, ops_1] = free_ports();
    let written = commands(&root().join("README.md"), "## As separate processes");
    let written = replaced(&written, "6379", redis.address().port());
    let written = replaced(&written, "7080", http);
    let written = replaced(&written, "808$k", "${clients[$k]}");
    let written = replaced(&written, "910$k", "${ops[$k]}");
    assert!(!written.contains("7070"), "the default port of gRPC is given by the environment");
    let arrays = format!("clients=({clients_0} {clients_1}); ops=({ops_0} {ops_1})\n");
    let control_plane = format!("http://127.0.0.1:{grpc}");
    let env = [
        ("WEIR_LISTEN", format!("127.0.0.1:{grpc}")),
        ("WEIR_HTTP_LISTEN", format!("127.0.0.1:{http}")),
        ("WEIR_CONTROL_PLANE", control_plane.clone()),
        ("WEIR_SERVER", control_plane),
    ];
    let ran = run(&(arrays + &written), &env).await;
    let gateways: Vec<&str> =
        ran.out.lines().filter(|line| line.trim_start().starts_with("gateway-")).collect();
    assert_eq!(gateways.len(), 2, "{}", ran.out);
    assert!(gateways.iter().all(|line| line.contains("synced")), "{}", ran.out);
    let key = ran.out.lines().find(|line| line.starts_with("weir_")).expect("a key").trim();
    for port in [clients_0, clients_1] {
        let answer = Client::new(([127, 0, 0, 1], port).into(), key).ask(Method::GET, "/v1/models", "").await;
        assert!(answer.text().contains("chat-small"), "{}", answer.text());
    }
    eventually("gateways use this Redis", || async { redis.cli(&["DBSIZE"]).await.trim() != "0" }).await;
    // Nobody else can read the tokens.
    for token in ["control-plane/admin.token", "gateway-0.token", "ops.token"] {
        use std::os::unix::fs::PermissionsExt as _;
        let file = ran.directory().join("data").join(token);
        let mode = std::fs::metadata(&file).expect("there").permissions().mode();
        assert_eq!(mode & 0o077, 0, "{token}: {mode:o}");
    }
}

#[tokio::test]
async fn the_examples_are_applied_as_they_are() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = start("127.0.0.1:0", data.path(), None).await;
    for name in ["complete", "two-backends"] {
        let file = root().join(format!("deploy/examples/{name}.yaml"));
        for more in [&["--dry-run"][..], &[]] {
            let mut weir = command("weir");
            weir.args(["apply", "-f"]).arg(&file).args(more);
            weir.env("WEIR_SERVER", &plane.url).env("WEIR_TOKEN", ADMIN_TOKEN);
            let done = weir.output().await.expect("runs");
            assert!(done.status.success(), "{name} {more:?}: {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}
