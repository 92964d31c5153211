//! No secret appears anywhere. A stack is given secrets that are easy to find, all of its output is gathered (the
//! most detailed logs, metrics, pages, the output of every command, files, Redis, answers to clients, failures
//! included), and all of it is searched.

use std::path::Path;
use std::process::Stdio;

use http::Method;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_util::sync::CancellationToken;
use weir_tests::client::Client;
use weir_tests::eventually;
use weir_tests::process::{command, command_of, signal};
use weir_tests::scripted::{Scripted, answer};

/// Each text is unlike anything that occurs by chance.
const REDIS: &str = "canary-redis-7f3a91c2e8";
const ADMIN: &str = "canary-admin-51d0b7c9f2";
const GATEWAY: &str = "canary-gateway-c4e8a10b77";
const OPS: &str = "canary-operations-5d0e9c21f8";
const CREDENTIAL: &str = "canary-credential-9b20f6d3ae";
const FILED: &str = "canary-filed-credential-2c77d1";
const WRONG_KEY: &str = "weir_canary-wrong-key-e15b0d";
const WRONG_TOKEN: &str = "canary-wrong-token-83ac61d0";
const PROMPT: &str = "canary-prompt-d7f1c40a6b";
/// All levels of our own crates, and debug of the others.
const LOG: &str =
    "debug,weir_gateway=trace,weir_control_plane=trace,weir_ratelimit=trace,weir_discovery=trace,weir=trace";

/// The gathered output, with its place.
#[derive(Default)]
struct Heard(Vec<(String, Vec<u8>)>);

impl Heard {
    fn note(&mut self, place: impl Into<String>, said: impl Into<Vec<u8>>) {
        self.0.push((place.into(), said.into()));
    }

    /// Every file below a directory.
    fn files(&mut self, directory: &Path) {
        for entry in std::fs::read_dir(directory).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                self.files(&path);
            } else {
                self.note(path.display().to_string(), std::fs::read(&path).expect("readable"));
            }
        }
    }

    /// Finds a secret in any form: plain, in base64, in hexadecimal.
    fn find(&self, secret: &str) -> Vec<String> {
        let hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        // Base64 of a part, whatever precedes it: one of three phases matches.
        let phases = (0..3).map(|skip| {
            let from = &secret.as_bytes()[skip..];
            base64(&from[..from.len() / 3 * 3])
        });
        let forms: Vec<String> = [secret.to_owned(), hex].into_iter().chain(phases).collect();
        let has = |said: &[u8], form: &str| said.windows(form.len()).any(|window| window == form.as_bytes());
        let shown = |(place, said): &(String, Vec<u8>)| {
            let form = forms.iter().find(|form| has(said, form))?;
            let at = said.windows(form.len()).position(|window| window == form.as_bytes())?;
            let around = &said[at.saturating_sub(100)..(at + form.len() + 40).min(said.len())];
            Some(format!("{place}: {}", String::from_utf8_lossy(around)))
        };
        self.0.iter().filter_map(shown).collect()
    }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = three.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(DIGITS[bits >> shift & 63]))
    };
    bytes.chunks_exact(3).flat_map(group).collect()
}

/// A careless provider: it answers with the credential that it received.
async fn careless() -> Scripted {
    Scripted::start(&CancellationToken::new(), |asked, mut wire| async move {
        let status = [403, 500, 429, 401][asked.number as usize % 4];
        let asked = asked.head + &String::from_utf8_lossy(&asked.body);
        let repeated = asked.replace(['"', '\\', '\r', '\n'], " ");
        let body = format!(r#"{{"error":{{"message":"{repeated}","type":"x","code":"invalid_api_key"}}}}"#);
        let headers = [("content-type", "application/json"), ("x-echo", CREDENTIAL), ("connection", "close")];
        wire.send(answer(status, &headers, body)).await;
        None
    })
    .await
}

struct Stack {
    data: TempDir,
    heard: Heard,
    children: Vec<Child>,
}

impl Stack {
    /// Starts a process whose output is kept, and returns the value of a field of the line that reports its start.
    async fn start(
        &mut self,
        name: &str,
        program: &str,
        args: &[&str],
        env: &[(&str, &str)],
        there: &str,
    ) -> serde_json::Value {
        let path = self.data.path().join(format!("{name}.log"));
        let file = std::fs::File::create(&path).expect("a file");
        let mut command = command(program);
        command.args(args).envs(env.iter().copied()).env("WEIR_LOG", LOG);
        let child = command.stdout(file.try_clone().expect("a handle")).stderr(file).spawn().expect("starts");
        // What everybody on the machine can see of a process.
        let id = child.id().expect("it runs");
        self.heard.note(
            format!("command line of {name}"),
            std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default(),
        );
        self.children.push(child);
        let line = std::cell::RefCell::new(None);
        eventually(&format!("{name} says '{there}'"), || async {
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let lines = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
            *line.borrow_mut() = lines.into_iter().find(|line| line["message"] == there);
            line.borrow().is_some()
        })
        .await;
        line.into_inner().expect("it was found")
    }

    /// Runs a command of the operator and keeps its output.
    async fn weir(&mut self, server: &str, args: &[&str]) -> String {
        let token = self.file("admin.token");
        let mut command = command("weir");
        command.args(args).env("WEIR_SERVER", server).env("WEIR_TOKEN_FILE", token).stdin(Stdio::null());
        let done = command.output().await.expect("runs");
        let said = [&done.stdout[..], &done.stderr[..]].concat();
        let text = String::from_utf8_lossy(&said).into_owned();
        self.heard.note(format!("weir {}", args.join(" ")), said);
        text
    }

    fn file(&self, name: &str) -> String {
        self.data.path().join("secrets").join(name).to_str().expect("UTF-8").to_owned()
    }

    async fn get(&mut self, address: &str, path: &str, token: Option<&str>) {
        let mut socket = TcpStream::connect(address).await.expect("connects");
        let token = token.map(|token| format!("authorization: Bearer {token}\r\n")).unwrap_or_default();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n{token}connection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.expect("sends");
        let mut said = Vec::new();
        // The live page never ends: its first part contains everything that it shows.
        let reading = socket.read_to_end(&mut said);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(4), reading).await;
        assert!(!said.is_empty(), "{address}{path} says nothing");
        self.heard.note(format!("{address}{path}"), said);
    }
}

/// A complete answer to a client.
async fn ask(stack: &mut Stack, client: &Client, path: &str, body: &str) -> u16 {
    let answer = client.ask(Method::POST, path, body.to_owned()).await;
    let head = format!("{:?}\n", answer.headers);
    stack.heard.note(format!("answer {} of {path}", answer.status), [head.as_bytes(), &answer.body].concat());
    answer.status.as_u16()
}

#[tokio::test]
async fn no_secret_appears_in_anything_that_the_stack_says_shows_or_keeps() {
    let data = tempfile::tempdir().expect("a directory");
    let mut stack = Stack { data, heard: Heard::default(), children: Vec::new() };
    let root = stack.data.path().to_owned();
    let path = |name: &str| root.join(name).to_str().expect("UTF-8").to_owned();
    std::fs::create_dir(path("secrets")).expect("made");
    for (name, secret) in [("admin.token", ADMIN), ("gateway.token", GATEWAY), ("credential", FILED)] {
        std::fs::write(stack.file(name), secret).expect("written");
    }
    let (control_data, gateway_data, limits_data, backup) =
        (path("control-plane"), path("gateway"), path("limits"), path("backup"));

    // Redis with a password.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = free.local_addr().expect("an address").port();
    drop(free);
    let mut redis = Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--requirepass", REDIS, "--rdbcompression", "no"])
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("redis-server is needed");
    eventually("redis listens", || async { TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
    let url = format!("redis://:{REDIS}@127.0.0.1:{port}");

    // Everything as processes, with secrets in files or the environment as documented.
    let (admin_token, gateway_token, filed) =
        (stack.file("admin.token"), stack.file("gateway.token"), stack.file("credential"));
    let args = ["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--data-dir", &control_data];
    let tokens = ["--admin-token-file", &admin_token, "--gateway-token-file", &gateway_token];
    let args = [&args[..], &tokens].concat();
    let plane = stack.start("control-plane", "weir-control-plane", &args, &[], "control plane serves").await;
    let text = |line: &serde_json::Value, field: &str| line[field].as_str().expect("a field").to_owned();
    let (server, http) = (format!("http://{}", text(&plane, "grpc")), text(&plane, "http"));
    let common =
        ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--pre-stop=0s", "--control-plane", &server];
    let secrets = path("secrets");
    let own = ["--gateway-token-file", &gateway_token, "--id=g", "--data-dir", &gateway_data];
    let env = [("WEIR_REDIS", url.as_str()), ("CANARY_CREDENTIAL", CREDENTIAL), ("WEIR_OPS_TOKEN", OPS)];
    let own = [&own[..], &["--credential-dir", &secrets]].concat();
    let gateway_args = [&common[..], &own].concat();
    let gateway = stack.start("gateway", "weir-gateway", &gateway_args, &env, "serving").await;
    let own = ["--gateway-token-file", &gateway_token, "--id=l", "--data-dir", &limits_data];
    let limit_args = [&common[..], &own].concat();
    stack.start("limits", "weir-ratelimit", &limit_args, &env[..1], "serving").await;
    let mock = weir_tests::cluster::mock(
        mock_llm::Config { models: vec!["m".into()], ..Default::default() },
        &CancellationToken::new(),
    )
    .await;
    let careless = careless().await.address;
    let resources = format!(
        r#"
kind: pool
name: p
spec: {{}}
---
kind: pool
name: careless
spec: {{}}
---
kind: backend
name: good
spec: {{ pool: p, url: "http://{}", models: {{ m: "" }}, credential: "env:CANARY_CREDENTIAL" }}
---
kind: backend
name: filed
spec: {{ pool: p, url: "http://{}", models: {{ m: "" }}, credential: "file:{filed}" }}
---
kind: backend
name: dead
spec: {{ pool: p, url: "http://127.0.0.1:9", models: {{ m: "" }}, credential: "env:CANARY_CREDENTIAL" }}
---
kind: backend
name: missing
spec: {{ pool: p, url: "http://127.0.0.1:9", models: {{ m: "" }}, credential: "env:NOT_THERE_CREDENTIAL" }}
---
kind: backend
name: careless
spec: {{ pool: careless, url: "http://{careless}", models: {{ c: "" }}, credential: "env:CANARY_CREDENTIAL" }}
---
kind: model
name: m
spec: {{ pool: p, limits: {{ requests_per_minute: 20, burst_multiplier: 1, max_wait: 0s }} }}
---
kind: model
name: c
spec: {{ pool: careless }}
---
kind: tenant
name: acme
spec: {{ limits: {{ tokens_per_minute: 100000 }} }}
"#,
        mock.address, mock.address
    );
    let file = path("resources.yaml");
    std::fs::write(&file, &resources).expect("written");
    let applied = stack.weir(&server, &["apply", "-f", &file]).await;
    assert!(applied.contains("10 created"), "{applied}");

    // Secrets that are created now are shown once, to their creator; these outputs are the only ones that are not
    // searched.
    let mut secrets: Vec<(String, String)> = [
        ("the password of Redis", REDIS),
        ("the admin token", ADMIN),
        ("the gateways' token", GATEWAY),
        ("the operations token", OPS),
        ("a backend's credential", CREDENTIAL),
        ("a credential in a file", FILED),
        ("a wrong key", WRONG_KEY),
        ("a wrong token", WRONG_TOKEN),
        ("a prompt", PROMPT),
    ]
    .map(|(what, secret)| (what.to_owned(), secret.to_owned()))
    .into();
    for (what, args) in [
        ("an API key", &["key", "create", "k", "--tenant", "acme"][..]),
        ("a rotated API key", &["key", "rotate", "k"]),
        ("an operator's token", &["token", "create", "olga", "--role", "operator"]),
        ("a rotated token", &["token", "rotate", "olga"]),
        ("a viewer's token", &["token", "create", "vera", "--role", "viewer"]),
    ] {
        let said = stack.weir(&server, args).await;
        stack.heard.0.pop();
        let secret =
            said.split_whitespace().find(|word| word.len() > 40).expect("a secret is shown").to_owned();
        // The start of a key is kept for display, as documented.
        secrets.push((what.to_owned(), secret[12..].to_owned()));
        secrets.push((what.to_owned(), secret));
    }
    let key =
        secrets.iter().find(|(what, secret)| what == "a rotated API key" && secret.starts_with("weir_"));
    let key = key.expect("a key").1.clone();
    let operator = secrets.iter().rfind(|(what, _)| what == "a rotated token").expect("a token").1.clone();

    // Requests: good ones, wrong ones, refused ones, ones that fail upstream.
    let (clients, ops) = (text(&gateway, "clients"), text(&gateway, "ops"));
    let client = Client::new(clients.parse().expect("an address"), &key);
    let chat = |model: &str, stream: bool| {
        format!(
            r#"{{"model":"{model}","stream":{stream},"max_tokens":3,"user":"{PROMPT}","messages":[{{"role":"user","content":"{PROMPT}"}}]}}"#
        )
    };
    let mut seen = std::collections::BTreeSet::new();
    for turn in 0..30 {
        seen.insert(ask(&mut stack, &client, "/v1/chat/completions", &chat("m", turn % 2 == 0)).await);
    }
    assert!(seen.contains(&200) && seen.contains(&429), "{seen:?}");
    for _ in 0..6 {
        seen.insert(ask(&mut stack, &client, "/v1/chat/completions", &chat("c", false)).await);
    }
    let wrong = client.with_key(WRONG_KEY);
    assert_eq!(ask(&mut stack, &wrong, "/v1/chat/completions", &chat("m", false)).await, 401);
    ask(&mut stack, &client, "/v1/chat/completions", &chat("nothing-here", false)).await;
    ask(&mut stack, &client, "/v1/chat/completions", &format!("{{{PROMPT}")).await;
    ask(&mut stack, &client, &format!("/v1/{PROMPT}"), "{}").await;

    // Operators: everything that prints, and everything that changes.
    for args in [
        &["whoami"][..],
        &["get", "backends", "-o", "wide"],
        &["get", "backends", "-o", "yaml"],
        &["get", "keys", "-o", "json"],
        &["get", "keys"],
        &["key", "list", "-o", "json"],
        &["token", "list", "-o", "json"],
        &["describe", "backend", "good"],
        &["describe", "key", "k"],
        &["diff", "-f", &file],
        &["weight", "good", "7"],
        &["drain", "dead", "--no-wait"],
        &["undrain", "dead"],
        &["disable", "dead"],
        &["rollback", "2", "--allow-mass-removal", "--dry-run"],
        &["backends", "-o", "wide"],
        &["why", "dead"],
        &["why", "careless", "-o", "json"],
        &["probe", "good", "--wait", "2s"],
        &["probe", "careless", "--tier", "readiness", "--wait", "5s"],
        &["events"],
        &["gateways", "-o", "wide"],
        &["gateways", "-o", "json"],
        &["gateway", "config", "g"],
        &["gateway", "diff", "g"],
        &["check"],
        &["history"],
        &["history", "-o", "json", "-n", "100"],
        &["audit", "-o", "json"],
        &["audit", "--verify"],
        &["limits", "explain", "--key", "k", "--model", "m", "--gateway", &format!("http://{ops}")],
        &["limits", "explain", "--key", "k", "--model", "m"],
        &["usage"],
        &["backup", &backup],
        &["token", "revoke", "vera"],
        &["key", "revoke", "k"],
    ] {
        stack.weir(&server, args).await;
    }
    let mut refused = command("weir");
    let refused =
        refused.args(["whoami"]).env("WEIR_SERVER", &server).env("WEIR_TOKEN", WRONG_TOKEN).output().await;
    let refused = refused.expect("runs");
    stack.heard.note("weir whoami with a wrong token", [refused.stdout, refused.stderr].concat());

    // Pages and metrics; the live page as its watchers get it.
    stack.get(&http, "/metrics", None).await;
    stack.get(&http, "/", None).await;
    stack.get(&http, "/page/stream", Some(&operator)).await;
    stack.get(&http, "/page/stream", Some(WRONG_TOKEN)).await;
    stack.get(&ops, "/metrics", None).await;
    for path in ["/limits?key=k&model=m", "/usage"] {
        stack.get(&ops, path, None).await;
        stack.get(&ops, path, Some(OPS)).await;
        stack.get(&ops, path, Some(WRONG_TOKEN)).await;
    }

    // clap's messages about the environment, and those about a wrong address.
    let everything = [
        ("WEIR_REDIS", url.as_str()),
        ("WEIR_TOKEN", ADMIN),
        ("WEIR_ADMIN_TOKEN", ADMIN),
        ("WEIR_GATEWAY_TOKEN", GATEWAY),
    ];
    for program in ["weir", "weir-gateway", "weir-control-plane", "weir-ratelimit"] {
        for args in [&["--help"][..], &["--no-such-flag"], &["up", "--help"]] {
            let mut help = command(program);
            let done = help.args(args).envs(everything).output().await.expect("runs");
            stack.heard.note(format!("{program} {args:?}"), [done.stdout, done.stderr].concat());
        }
    }
    for address in [
        format!("redis://:{REDIS}@"),
        format!("redos://:{REDIS}@127.0.0.1"),
        format!("redis://:{REDIS}@127.0.0.1:port"),
    ] {
        for program in ["weir-gateway", "weir-ratelimit"] {
            let mut wrong = command(program);
            let args =
                ["--listen=127.0.0.1:0", "--ops-listen=127.0.0.1:0", "--control-plane=http://127.0.0.1:9"];
            let done = wrong.args(args).env("WEIR_REDIS", &address).output();
            if let Ok(done) = tokio::time::timeout(std::time::Duration::from_secs(20), done).await {
                let done = done.expect("runs");
                stack
                    .heard
                    .note(format!("{program} at a wrong address"), [done.stdout, done.stderr].concat());
            }
        }
    }

    // The contents of Redis, and then its loss under requests.
    let dump = path("redis.rdb");
    let mut cli = command_of("redis-cli");
    let dumped =
        cli.args(["-p", &port.to_string(), "--rdb", &dump]).env("REDISCLI_AUTH", REDIS).output().await;
    assert!(dumped.expect("runs").status.success());
    redis.kill().await.expect("killed");
    for _ in 0..5 {
        ask(&mut stack, &client, "/v1/chat/completions", &chat("m", false)).await;
    }

    // The end of all processes is logged too; then the files on disk are read, except those that are the secrets.
    for child in &mut stack.children {
        signal(child, "-TERM").await;
        let ended = tokio::time::timeout(std::time::Duration::from_secs(30), child.wait()).await;
        ended.expect("it ends").expect("it ended");
    }
    std::fs::remove_dir_all(stack.data.path().join("secrets")).expect("removed");
    stack.heard.files(&root);
    let places = stack.heard.0.len();
    let size: usize = stack.heard.0.iter().map(|(_, said)| said.len()).sum();
    assert!(places > 100 && size > 200_000, "{places} places, {size} bytes: was everything gathered?");
    let found: Vec<String> = secrets
        .iter()
        .flat_map(|(what, secret)| {
            let places = stack.heard.find(secret).into_iter();
            // The answer to a client may repeat what that client sent: a path, or a backend's words about its prompt.
            let places = places.filter(move |place| secret != PROMPT || !place.starts_with("answer "));
            places.map(move |place| format!("{what}: {place}"))
        })
        .collect();
    assert!(found.is_empty(), "{} finds:\n{}", found.len(), found.join("\n"));
}
