//! Backends' credentials: what an editor cannot get by naming it, and what one that cannot be read keeps from happening.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::cluster::{Mock, mock};
use weir_tests::eventually;
use weir_tests::plane::{ADMIN_TOKEN, Plane, start, start_with};
use weir_tests::process::{Process, command, command_of, signal};
use weir_tests::scripted::{Scripted, json_answer};

const GATEWAYS: usize = 2;
/// The token by which the control plane knows gateways.
const GATEWAY_TOKEN: &str = "gateway-token-of-the-tests";
/// A variable with a secret of another program.
const OTHER_SECRET: (&str, &str) = ("AWS_SECRET_ACCESS_KEY", "secret-of-another-program");
/// A revocation is in force within a second; a machine that builds at the same time needs longer.
const REVOKED_WITHIN: Duration = Duration::from_secs(5);
/// The usage in the thief's answers.
const USAGE: &str = r#"{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}"#;
const CHAT: &str = r#"{"model":"MODEL","max_tokens":2,"messages":[{"role":"user","content":"hi"}]}"#;

/// A backend that records what it receives.
#[derive(Debug, Clone)]
struct Thief {
    address: SocketAddr,
    heard: Arc<Mutex<String>>,
}

impl Thief {
    async fn start(end: &CancellationToken) -> Self {
        let heard = Arc::<Mutex<String>>::default();
        let written = Arc::clone(&heard);
        let scripted = Scripted::start(end, move |asked, mut wire| {
            let text = asked.head + &String::from_utf8_lossy(&asked.body);
            written.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            async move {
                wire.send(json_answer("ok", USAGE)).await;
                None
            }
        })
        .await;
        Self { address: scripted.address, heard }
    }

    fn heard(&self, text: &str) -> bool {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).contains(text)
    }
}

/// A control plane and gateways that follow it, each a process, in front of a healthy backend and a thief.
struct Fleet {
    plane: Plane,
    gateways: Vec<Process>,
    keys: Vec<String>,
    thief: Thief,
    _good: Mock,
    data: tempfile::TempDir,
    _end: tokio_util::sync::DropGuard,
}

impl Fleet {
    async fn start() -> Self {
        let data = tempfile::tempdir().expect("a directory");
        let token = data.path().join("gateway.token");
        std::fs::write(&token, GATEWAY_TOKEN).expect("written");
        let args = ["--gateway-token-file", token.to_str().expect("UTF-8")];
        let plane = start_with("127.0.0.1:0", &data.path().join("plane"), None, &args).await;
        let end = CancellationToken::new();
        let config = mock_llm::Config { models: vec!["good".into()], ..Default::default() };
        let (good, thief) = (mock(config, &end).await, Thief::start(&end).await);
        std::fs::create_dir(data.path().join("credentials")).expect("made");
        let mut fleet = Self {
            plane,
            gateways: Vec::new(),
            keys: Vec::new(),
            thief,
            _good: good,
            data,
            _end: end.drop_guard(),
        };
        let good = format!(
            "kind: pool\nname: good\nspec: {{}}\n---\nkind: pool\nname: stolen\nspec: {{}}\n---\n\
             kind: model\nname: good\nspec: {{ pool: good }}\n---\nkind: model\nname: stolen\nspec: {{ pool: stolen }}\n---\n\
             kind: backend\nname: good\nspec: {{ pool: good, url: \"http://{}\", models: {{ good: \"\" }} }}\n---\n\
             kind: tenant\nname: acme\nspec: {{}}\n",
            fleet._good.address
        );
        let (code, _, err) = fleet.apply(&good).await;
        assert_eq!(code, 0, "{err}");
        for k in 0..GATEWAYS {
            let gateway = fleet.gateway(k).await;
            fleet.gateways.push(gateway);
        }
        for name in ["victim", "other", "third"] {
            let key = fleet.weir(ADMIN_TOKEN, &["key", "create", name, "--tenant", "acme"]).await.1;
            fleet.keys.push(key.trim().to_owned());
        }
        fleet
    }

    /// Starts gateway `k`; its token is in its environment, as an editor hopes.
    async fn gateway(&self, k: usize) -> Process {
        let (id, copy, credentials) = (format!("gateway-{k}"), self.copy(k), self.credentials());
        let args = [
            "--id",
            &id,
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            "--pre-stop=0s",
            "--control-plane",
            &self.plane.url,
            "--data-dir",
            copy.to_str().expect("UTF-8"),
            "--credential-dir",
            credentials.to_str().expect("UTF-8"),
        ];
        let env = [("WEIR_GATEWAY_TOKEN", GATEWAY_TOKEN), OTHER_SECRET, ("MINE_API_KEY", "sk-mine")];
        Process::start_with("weir-gateway", &args, &env, "serving").await
    }

    fn copy(&self, k: usize) -> PathBuf {
        self.data.path().join(format!("gateway-{k}"))
    }

    fn credentials(&self) -> PathBuf {
        self.data.path().join("credentials")
    }

    fn ops(&self, k: usize) -> Client {
        Client::new(self.gateways[k].text("ops").parse().expect("an address"), "")
    }

    /// Exit code, standard output and standard error.
    async fn weir(&self, token: &str, args: &[&str]) -> (i32, String, String) {
        let mut command = command("weir");
        command.args(args).env("WEIR_SERVER", &self.plane.url).env("WEIR_TOKEN", token);
        let done = command.output().await.expect("runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
    }

    async fn apply_as(&self, token: &str, manifest: &str) -> (i32, String, String) {
        let file = self.data.path().join("manifest.yaml");
        std::fs::write(&file, manifest).expect("written");
        self.weir(token, &["apply", "-f", file.to_str().expect("UTF-8")]).await
    }

    async fn apply(&self, manifest: &str) -> (i32, String, String) {
        self.apply_as(ADMIN_TOKEN, manifest).await
    }

    /// A backend of the thief's pool with this credential.
    fn stealing(&self, credential: &str) -> String {
        format!(
            "kind: backend\nname: thief\nspec: {{ pool: stolen, url: \"http://{}\", models: {{ stolen: \"\" }}, credential: \"{credential}\" }}\n",
            self.thief.address
        )
    }

    async fn chat(&self, gateway: usize, key: usize, model: &str) -> StatusCode {
        let address = self.gateways[gateway].text("clients").parse().expect("an address");
        let client = Client::new(address, &self.keys[key]);
        client.ask(Method::POST, "/v1/chat/completions", CHAT.replace("MODEL", model)).await.status
    }

    /// Revokes a key. Returns the time until no gateway accepted it.
    async fn revoke(&self, key: usize, name: &str) -> Duration {
        for k in 0..GATEWAYS {
            assert_eq!(self.chat(k, key, "good").await, StatusCode::OK, "before it is revoked");
        }
        let revoke = async {
            let (code, _, err) = self.weir(ADMIN_TOKEN, &["key", "revoke", name]).await;
            (code, err, Instant::now())
        };
        let begun = Instant::now();
        let refused = async {
            for k in 0..GATEWAYS {
                let what = format!("gateway {k} refuses the key");
                eventually(&what, || async { self.chat(k, key, "good").await == StatusCode::UNAUTHORIZED })
                    .await;
            }
            Instant::now()
        };
        let ((_, err, _), refused) = tokio::join!(revoke, refused);
        let took = refused - begun;
        println!("revoked at {GATEWAYS} gateways {took:?} after the command was started");
        assert!(took < REVOKED_WITHIN, "{took:?}: {err}");
        took
    }

    /// Asserts that nothing else is affected.
    async fn is_well(&self, key: usize) {
        for k in 0..GATEWAYS {
            assert_eq!(self.chat(k, key, "good").await, StatusCode::OK);
            assert_eq!(self.ops(k).ask(Method::GET, "/readyz", "").await.status, StatusCode::OK);
        }
    }
}

async fn fifo(path: &Path) {
    let made = command_of("mkfifo").arg(path).status().await.expect("mkfifo runs");
    assert!(made.success());
}

/// The log of the newest base of a copy on disk: it is named by the base's digest.
async fn log_of(copy: &Path) -> PathBuf {
    let base = copy.join("config.current");
    eventually("a copy", || async { base.exists() }).await;
    let bytes = std::fs::read(base).expect("a copy");
    let name: String = bytes[8..16].iter().map(|byte| format!("{byte:02x}")).collect();
    copy.join(format!("config.{name}.log"))
}

/// Replaces a file in one step.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).expect("written");
    std::fs::rename(&new, path).expect("renamed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_editor_gets_no_setting_no_variable_and_no_file_that_is_not_meant_for_backends() {
    let fleet = Fleet::start().await;
    let (code, editor, err) = fleet.weir(ADMIN_TOKEN, &["token", "create", "eve", "--role", "editor"]).await;
    assert_eq!(code, 0, "{err}");
    let editor = editor.trim().to_owned();

    // References that can never be credentials are not accepted.
    for credential in [
        "env:WEIR_GATEWAY_TOKEN".to_owned(),
        "env:WEIR_API_KEY".into(),
        "env:weir_gateway_token".into(),
        format!("file:{}/../gateway.token", fleet.credentials().display()),
        "file:relative".into(),
    ] {
        let (code, _, err) = fleet.apply_as(&editor, &fleet.stealing(&credential)).await;
        assert_eq!(code, 64, "{credential}: {err}");
        assert!(err.contains("credential"), "{err}");
    }

    // Gateways report that they do not read other variables and files, and do not tell whether a file exists.
    let inside = |name: &str| format!("file:{}", fleet.credentials().join(name).display());
    let link = |name: &str, target: &Path| {
        std::os::unix::fs::symlink(target, fleet.credentials().join(name)).expect("made");
    };
    link("to-token", &fleet.data.path().join("gateway.token"));
    link("to-nothing", &fleet.data.path().join("nothing"));
    link("to-environment", Path::new("/proc/self/environ"));
    link("to-zeros", Path::new("/dev/zero"));
    link("to-all", Path::new("/"));
    let mut said = std::collections::BTreeSet::new();
    for credential in [
        "file:/etc/hostname".to_owned(),
        "file:/nope/x".into(),
        "file:/dev/zero".into(),
        "file:/proc/self/environ".into(),
        format!("file:{}", fleet.data.path().join("gateway.token").display()),
        format!("file:{}/config.current", fleet.copy(0).display()),
        inside("to-token"),
        inside("to-nothing"),
        inside("to-environment"),
        inside("to-zeros"),
        inside("to-all/etc/hostname"),
        inside("to-all/nope"),
    ] {
        let (code, _, err) = fleet.apply_as(&editor, &fleet.stealing(&credential)).await;
        assert_eq!(code, 1, "{credential}: {err}");
        let reasons = err.lines().filter_map(|line| line.split_once("refuses backend thief: "));
        let reasons: Vec<_> = reasons.map(|(_, reason)| reason.to_owned()).collect();
        assert_eq!(reasons.len(), GATEWAYS, "{credential}: {err}");
        said.extend(reasons);
    }
    assert_eq!(said.len(), 1, "one answer for everything outside: {said:?}");
    assert!(said.iter().all(|reason| reason.contains("--credential-dir")), "{said:?}");
    for variable in [OTHER_SECRET.0, "HOME", "PATH", "NOT_SET"] {
        let (code, _, err) = fleet.apply_as(&editor, &fleet.stealing(&format!("env:{variable}"))).await;
        assert!(code == 1 && err.contains("--credential-env"), "{variable}: {err}");
    }
    for k in 0..GATEWAYS {
        assert_ne!(fleet.chat(k, 0, "stolen").await, StatusCode::OK);
    }

    // Credentials for backends arrive: the thief reads them.
    std::fs::write(fleet.credentials().join("key"), "sk-for-backends\n").expect("written");
    for (credential, secret) in [(inside("key"), "sk-for-backends"), ("env:MINE_API_KEY".into(), "sk-mine")] {
        let (code, _, err) = fleet.apply_as(&editor, &fleet.stealing(&credential)).await;
        assert_eq!(code, 0, "{credential}: {err}");
        for k in 0..GATEWAYS {
            assert_eq!(fleet.chat(k, 0, "stolen").await, StatusCode::OK);
        }
        assert!(fleet.thief.heard(&format!("Bearer {secret}")));
    }
    let hostname = std::fs::read_to_string("/etc/hostname").unwrap_or_default();
    for secret in [ADMIN_TOKEN, GATEWAY_TOKEN, OTHER_SECRET.1, &editor] {
        assert!(!fleet.thief.heard(secret));
    }
    assert!(hostname.trim().is_empty() || !fleet.thief.heard(&format!("Bearer {}", hostname.trim())));
    fleet.is_well(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_credential_that_is_a_fifo_stops_nothing_and_is_used_once_it_is_a_file() {
    let fleet = Fleet::start().await;
    let path = fleet.credentials().join("key");
    fifo(&path).await;
    let stealing = fleet.stealing(&format!("file:{}", path.display()));
    let begun = Instant::now();
    let (code, _, err) = fleet.apply(&stealing).await;
    println!("a FIFO was refused by all gateways {:?} after the command was started", begun.elapsed());
    assert_eq!(code, 1, "{err}");
    assert_eq!(err.matches("it is a FIFO, and only regular files are read").count(), GATEWAYS, "{err}");
    fleet.is_well(0).await;
    fleet.revoke(0, "victim").await;
    fleet.is_well(1).await;
    // If it is removed, the state is as before.
    let (code, _, err) =
        fleet.weir(ADMIN_TOKEN, &["delete", "backend", "thief", "--allow-mass-removal"]).await;
    assert!(code == 0 && err.contains("applied on 2 of 2 gateways"), "{err}");

    // If the file is corrected, it is used without another change.
    let (code, ..) = fleet.apply(&stealing).await;
    assert_eq!(code, 1);
    let begun = Instant::now();
    replace(&path, "sk-first");
    for k in 0..GATEWAYS {
        eventually("it is used", || async { fleet.chat(k, 1, "stolen").await == StatusCode::OK }).await;
        let id = format!("gateway-{k}");
        eventually("nobody refuses it any more", || async {
            fleet.weir(ADMIN_TOKEN, &["gateway", "diff", &id]).await.0 == 0
        })
        .await;
    }
    println!("used by all gateways {:?} after it was a file", begun.elapsed());
    assert!(fleet.thief.heard("Bearer sk-first"));

    // A changed secret is used, and an unreadable file leaves the last secret in use.
    let begun = Instant::now();
    replace(&path, "sk-second");
    eventually("the exchanged one is used", || async {
        fleet.chat(0, 1, "stolen").await;
        fleet.thief.heard("Bearer sk-second")
    })
    .await;
    println!("an exchanged secret was used after {:?}", begun.elapsed());
    std::fs::remove_file(&path).expect("removed");
    fifo(&path).await;
    let unreadable = || async {
        let metrics = fleet.ops(0).ask(Method::GET, "/metrics", "").await;
        metrics.text().lines().any(|line| line.ends_with("credential_files_unreadable 1"))
    };
    eventually("it is counted", unreadable).await;
    assert_eq!(fleet.chat(0, 1, "stolen").await, StatusCode::OK, "the last one stays");
    let (code, _, err) = fleet.apply("kind: tenant\nname: unrelated\nspec: {}\n").await;
    assert!(code == 0 && err.contains("applied on 2 of 2 gateways"), "{err}");
    for k in 0..GATEWAYS {
        assert_eq!(fleet.chat(k, 1, "stolen").await, StatusCode::OK, "also after a change of something else");
    }
    fleet.revoke(1, "other").await;
    fleet.is_well(2).await;
}

/// The disk of a gateway's copy stops answering: the file is a FIFO that nobody reads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_hangs_keeps_no_change_waiting_and_no_process_from_ending() {
    let mut fleet = Fleet::start().await;
    // Where the next change is appended: a pipe that nobody reads.
    let mut logs = Vec::new();
    for k in 0..GATEWAYS {
        let log = log_of(&fleet.copy(k)).await;
        let _ = std::fs::remove_file(&log);
        fifo(&log).await;
        logs.push(log);
    }
    fleet.revoke(0, "victim").await;
    fleet.revoke(1, "other").await;
    let (code, _, err) = fleet.apply("kind: tenant\nname: more\nspec: {}\n").await;
    assert!(code == 0 && err.contains("applied on 2 of 2 gateways"), "{err}");
    fleet.is_well(2).await;
    // When the disk answers, the newest configuration is written: a start without the control plane serves it.
    let (fifo, copy) = (fleet.copy(0).join("fifo"), fleet.copy(0));
    std::fs::rename(&logs[0], &fifo).expect("renamed");
    let mut reader = command_of("cat");
    let reader = reader.arg(&fifo).stdout(std::process::Stdio::null()).status();
    assert!(reader.await.expect("cat runs").success());
    let holds = |path: PathBuf| {
        let is_copy = path != fifo && path.is_file();
        is_copy && std::fs::read(path).is_ok_and(|bytes| bytes.windows(4).any(|four| four == b"more"))
    };
    let written =
        || async { std::fs::read_dir(&copy).expect("the copies").flatten().any(|entry| holds(entry.path())) };
    eventually("the newest configuration is on disk", written).await;
    let begun = Instant::now();
    let gateway = &mut fleet.gateways[1];
    signal(&gateway.child, "-TERM").await;
    let ended = tokio::time::timeout(Duration::from_secs(60), gateway.child.wait()).await;
    assert!(ended.is_ok(), "it ends although its disk hangs");
    println!("ended {:?} after SIGTERM with a disk that hangs", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_starts_without_its_control_plane_has_the_credentials_of_its_copy() {
    let mut fleet = Fleet::start().await;
    let path = fleet.credentials().join("key");
    std::fs::write(&path, "sk-kept").expect("written");
    let (code, _, err) = fleet.apply(&fleet.stealing(&format!("file:{}", path.display()))).await;
    assert_eq!(code, 0, "{err}");
    let mut old = fleet.gateways.remove(0);
    old.kill().await;
    let address = fleet.plane.address();
    let plane = std::mem::replace(
        &mut fleet.plane,
        start("127.0.0.1:0", &fleet.data.path().join("none"), None).await,
    );
    plane.kill().await;
    fleet.plane.url = format!("http://{address}");
    // From its first answer on, because it waited for the disk before it served.
    let gateway = fleet.gateway(0).await;
    fleet.gateways.insert(0, gateway);
    assert_eq!(fleet.chat(0, 0, "stolen").await, StatusCode::OK);
    // A secret that changes meanwhile is used too.
    replace(&path, "sk-exchanged");
    eventually("the exchanged one is used", || async {
        fleet.chat(0, 0, "stolen").await;
        fleet.thief.heard("Bearer sk-exchanged")
    })
    .await;
}
