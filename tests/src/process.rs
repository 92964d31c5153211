//! The built binaries as processes.

use std::path::PathBuf;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// A binary of this build. The tests run from `target/PROFILE/deps`, and the binaries are one directory above.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let path = test.parent().and_then(|deps| deps.parent()).expect("a target directory").join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace --bins`, or `make test`",
        path.display()
    );
    path
}

/// A command for a binary, without settings of this environment.
pub fn command(name: &str) -> Command {
    command_of(binary(name))
}

/// A command for any program, without settings of this environment.
pub fn command_of(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (variable, _) in std::env::vars().filter(|(v, _)| v.starts_with("WEIR_")) {
        command.env_remove(variable);
    }
    command.kill_on_drop(true).stdin(Stdio::null());
    command
}

/// A running `weir up`, and its output.
#[derive(Debug)]
pub struct Up {
    /// The process.
    pub child: Child,
    /// Its line of `--output json`.
    pub line: serde_json::Value,
}

/// Starts `weir up` on free ports.
pub async fn up(args: &[&str]) -> Up {
    let mut command = command("weir");
    command.args(["up", "--listen", "127.0.0.1:0", "--output", "json"]).args(args).stdout(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let line = lines.next_line().await.expect("readable").expect("a line before it ends");
    Up { child, line: serde_json::from_str(&line).expect("JSON") }
}

/// Starts `weir up` with these resources and the tenant `acme`. Returns when all backends are healthy.
pub async fn up_with(gateways: usize, resources: &str) -> Up {
    let data = tempfile::tempdir().expect("a directory");
    let file = data.path().join("resources.yaml");
    std::fs::write(&file, format!("kind: tenant\nname: acme\nspec: {{}}\n{resources}")).expect("written");
    let gateways = gateways.to_string();
    let up = up(&["--gateways", &gateways, "--config", file.to_str().expect("UTF-8")]).await;
    crate::eventually("all backends are healthy", || async {
        let backends = up.json(&["backends"]).await;
        backends.as_array().expect("a list").iter().all(|backend| backend["health"] == "healthy")
    })
    .await;
    up
}

impl Up {
    /// The JSON that a `weir` command prints.
    pub async fn json(&self, args: &[&str]) -> serde_json::Value {
        let (code, out, err) = self.weir(&[&["-o", "json"], args].concat()).await;
        assert_eq!(code, 0, "weir {args:?}: {err}");
        serde_json::from_str(&out).expect("JSON")
    }

    /// A backend's line of `weir backends`.
    pub async fn backend(&self, name: &str) -> serde_json::Value {
        let backends = self.json(&["backends"]).await;
        let found = backends.as_array().expect("a list").iter().find(|status| status["backend"] == name);
        found.unwrap_or_else(|| panic!("no {name}")).clone()
    }

    /// A text field of that line.
    pub fn text(&self, key: &str) -> &str {
        self.line[key].as_str().unwrap_or_else(|| panic!("no {key} in {}", self.line))
    }

    /// A client of gateway `k`.
    pub fn client(&self, k: usize) -> crate::client::Client {
        let url = self.line["gateways"][k].as_str().expect("a gateway");
        let address = url.strip_prefix("http://").expect("http").parse().expect("an address");
        crate::client::Client::new(address, self.text("api_key"))
    }

    /// Runs a `weir` command against it; returns its exit code, output and errors.
    pub async fn weir(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = command("weir");
        command.args(args).env("WEIR_SERVER", self.text("admin")).env("WEIR_TOKEN", self.text("admin_token"));
        let done = command.output().await.expect("runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
    }
}

/// A running binary, and the log line that reported its start.
#[derive(Debug)]
pub struct Process {
    /// The process; it is killed when this is dropped.
    pub child: Child,
    line: serde_json::Value,
}

impl Process {
    /// Starts it and waits for the message by which it reports its start.
    pub async fn start(name: &str, args: &[&str], message: &str) -> Self {
        Self::start_with(name, args, &[], message).await
    }

    /// The same with these environment variables.
    pub async fn start_with(name: &str, args: &[&str], env: &[(&str, &str)], message: &str) -> Self {
        let mut command = command(name);
        command.args(args).envs(env.iter().copied());
        Self::start_by(command, name, message).await
    }

    /// The same by a command of the test's own, such as a shell that sets limits and then becomes the binary.
    pub async fn start_by(mut command: Command, name: &str, message: &str) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let mut told = Vec::new();
        loop {
            let Some(line) = lines.next_line().await.expect("readable") else {
                panic!("{name} ended before it said '{message}':\n{}", told.join("\n"));
            };
            match serde_json::from_str::<serde_json::Value>(&line) {
                Ok(json) if json["message"] == message => {
                    // Later log lines are read and discarded, so that the process never waits for the test.
                    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                    return Self { child, line: json };
                }
                _ => told.push(line),
            }
        }
    }

    /// A field of the line.
    pub fn text(&self, field: &str) -> &str {
        self.line[field].as_str().unwrap_or_else(|| panic!("no {field} in {}", self.line))
    }

    /// Kills it.
    pub async fn kill(&mut self) {
        signal(&self.child, "-KILL").await;
        self.child.wait().await.expect("dead");
    }
}

/// Sends a signal to the process.
pub async fn signal(child: &Child, signal: &str) {
    let id = child.id().expect("still running").to_string();
    let sent = Command::new("kill").args([signal, &id]).status().await.expect("kill runs");
    assert!(sent.success());
}
