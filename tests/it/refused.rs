//! What a gateway and a limit service say when no control plane takes them: the reason with its remedy, on `/readyz` and, once for
//! each change of the reason, in the log.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use weir_tests::eventually;
use weir_tests::plane::{ADMIN_TOKEN, start, start_with};
use weir_tests::process::command;

const PROGRAMS: [&str; 2] = ["weir-gateway", "weir-ratelimit"];

/// A process that follows a control plane, or tries to.
struct Follower {
    name: String,
    ops: String,
    log: Arc<Mutex<Vec<Value>>>,
    _child: Child,
}

impl Follower {
    async fn start(program: &str, control_plane: &str, args: &[&str]) -> Self {
        let mut command = command(program);
        command.args(["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--log=info,weir_discovery=debug"]);
        command.args(["--control-plane", control_plane]).args(args).stderr(Stdio::piped());
        let mut child = command.spawn().expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let ops = loop {
            let line = lines.next_line().await.expect("readable").expect("it listens before it ends");
            let line: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let ops = line["ops"].as_str().map(str::to_owned);
            log.lock().expect("not poisoned").push(line);
            if let Some(ops) = ops {
                break ops;
            }
        };
        let kept = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
                kept.lock().expect("not poisoned").push(line);
            }
        });
        Self { name: format!("{program} {args:?}"), ops, log, _child: child }
    }

    /// What `weir health` prints of it.
    async fn readyz(&self) -> String {
        let mut command = command("weir");
        let done =
            command.args(["health", &format!("http://{}/readyz", self.ops)]).output().await.expect("runs");
        String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned()
    }

    /// Returns when `/readyz` says all of this.
    async fn says(&self, parts: &[&str]) {
        eventually(&format!("{}: {parts:?}", self.name), || async {
            let text = self.readyz().await;
            parts.iter().all(|part| text.contains(part))
        })
        .await;
    }

    /// The reasons in the log at this level.
    fn reasons(&self, level: &str) -> Vec<String> {
        let log = self.log.lock().expect("not poisoned");
        let told = log.iter().filter(|line| {
            let message = line["message"].as_str().unwrap_or_default();
            line["level"] == level && message.contains("not followed")
        });
        told.map(|line| line["reason"].as_str().expect("a reason").to_owned()).collect()
    }
}

/// A `weir` command that must succeed; returns its output.
async fn weir(server: &str, args: &[&str]) -> String {
    let mut command = command("weir");
    let done = command.args(args).env("WEIR_SERVER", server).env("WEIR_TOKEN", ADMIN_TOKEN).output().await;
    let done = done.expect("runs");
    assert!(done.status.success(), "weir {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).expect("UTF-8")
}

/// Writes a file and returns its path as an argument.
fn file(directory: &Path, name: &str, text: &str) -> String {
    let path: PathBuf = directory.join(name);
    std::fs::write(&path, text).expect("written");
    path.to_str().expect("UTF-8").to_owned()
}

#[tokio::test]
async fn each_reason_is_told_with_its_remedy() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = start("127.0.0.1:0", &data.path().join("plane"), None).await;
    let made = async |name: &str, args: &[&str]| {
        let token = weir(&plane.url, &[&["token", "create", name], args].concat()).await;
        file(data.path(), name, &token)
    };
    let viewer = made("ops", &["--role", "viewer"]).await;
    let other = made("a", &["--role", "gateway", "--gateway", "gw-a"]).await;
    let revoked = made("old", &["--role", "gateway"]).await;
    weir(&plane.url, &["token", "revoke", "old"]).await;
    let made_up = file(data.path(), "made-up", "weirtok_that-nobody-has-made");
    let token =
        "needs a token of role gateway: --gateway-token-file, `weir token create NAME --role gateway`";
    let here = plane.url.as_str();
    let cases: [(&str, &[&str], &[&str]); 6] = [
        (here, &[], &["503", "control plane refused: needs", token]),
        (
            here,
            &["--gateway-token-file", &viewer],
            &["refused: StreamConfig needs the role gateway, and ops is viewer", token],
        ),
        (here, &["--gateway-token-file", &made_up], &["refused: the token is not known", token]),
        (
            here,
            &["--gateway-token-file", &revoked],
            &["refused: the token is not known: it was revoked", token],
        ),
        (
            here,
            &["--gateway-token-file", &other],
            &["speaks for gateway gw-a and not for gw-b", "--id", "--gateway gw-b`"],
        ),
        (
            "http://127.0.0.1:9",
            &[],
            &["control plane not reached", "http://127.0.0.1:9 (--control-plane)", "refused"],
        ),
    ];
    let mut followers = Vec::new();
    for program in PROGRAMS {
        for (control_plane, args, says) in cases {
            let follower = Follower::start(program, control_plane, &[args, &["--id", "gw-b"]].concat()).await;
            followers.push((follower, says));
        }
    }
    for (follower, says) in &followers {
        follower.says(says).await;
    }
}

#[tokio::test]
async fn a_reason_is_logged_when_it_changes_and_not_with_every_attempt() {
    let data = tempfile::tempdir().expect("a directory");
    // The port is known before anybody listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = free.local_addr().expect("an address").to_string();
    drop(free);
    for program in PROGRAMS {
        let follower = Follower::start(program, &format!("http://{address}"), &["--id", "gw"]).await;
        let repeated = async |times: usize| {
            eventually("attempts", || async { follower.reasons("DEBUG").len() >= times }).await;
        };
        repeated(2).await;
        assert_eq!(follower.reasons("WARN").len(), 1, "{:?}", follower.reasons("WARN"));
        let plane = start(&address, &data.path().join(program), None).await;
        eventually("the other reason", || async { follower.reasons("WARN").len() > 1 }).await;
        repeated(follower.reasons("DEBUG").len() + 2).await;
        let reasons = follower.reasons("WARN");
        assert!(
            reasons[0].starts_with("not reached") && reasons[1].starts_with("refused: needs"),
            "{reasons:?}"
        );
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        plane.kill().await;
    }
}

#[tokio::test]
async fn who_serves_a_copy_is_ready_and_says_that_it_is_refused() {
    let data = tempfile::tempdir().expect("a directory");
    let plane = start("127.0.0.1:0", &data.path().join("plane"), None).await;
    let resources = file(data.path(), "first.yaml", "kind: tenant\nname: first\nspec: {}\n");
    weir(&plane.url, &["apply", "-f", &resources]).await;
    for program in PROGRAMS {
        let made = weir(&plane.url, &["token", "create", program, "--role", "gateway"]).await;
        let (token, copy) = (file(data.path(), "token", &made), data.path().join(format!("copy-{program}")));
        let copy = copy.to_str().expect("UTF-8");
        let args = ["--id", program, "--gateway-token-file", &token, "--data-dir", copy];
        let follower = Follower::start(program, &plane.url, &args).await;
        eventually("ready", || async { follower.readyz().await == "ready\n" }).await;
        // The copy is written behind that.
        eventually("a copy", || async { Path::new(copy).join("config.current").exists() }).await;
        drop(follower);
        weir(&plane.url, &["token", "revoke", program]).await;
        let follower = Follower::start(program, &plane.url, &args).await;
        follower.says(&["ready; control plane refused: the token is not known"]).await;
    }
}

#[tokio::test]
async fn trouble_with_tls_is_told_as_such() {
    let data = tempfile::tempdir().expect("a directory");
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let certificate = file(data.path(), "cert.pem", &cert.pem());
    let key = file(data.path(), "key.pem", &signing_key.serialize_pem());
    let tls = ["--tls-cert", &certificate, "--tls-key", &key];
    let plane = start_with("127.0.0.1:0", &data.path().join("plane"), None, &tls).await;
    let (_, port) = plane.url.rsplit_once(':').expect("a port");
    let (secure, plain) = (format!("https://localhost:{port}"), format!("http://localhost:{port}"));
    for (program, url, args, says) in [
        ("weir-gateway", &secure, &[][..], ["not reached: TLS: ", "check --control-plane-ca"]),
        ("weir-ratelimit", &secure, &[], ["not reached: TLS: ", "a CA of this system must have signed"]),
        ("weir-gateway", &plain, &[], ["not reached: ", "an address with TLS begins with https"]),
        (
            "weir-gateway",
            &secure,
            &["--control-plane-ca", &certificate],
            ["refused: needs a token", "--gateway-token-file"],
        ),
    ] {
        Follower::start(program, url, args).await.says(&says).await;
    }
}
