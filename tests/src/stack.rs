//! The product as an operator runs it: Redis, a control plane and gateways, each a process that can be killed.

use tempfile::TempDir;

use crate::client::Client;
use crate::process::{Process, command, signal};
use crate::redis::Redis;

/// The variable with the name of each gateway, for backends whose credential is `env:` of it.
pub const CREDENTIAL: &str = "TEST_CREDENTIAL";

/// All parts but the backends, which the test starts itself so that it can count their requests.
#[derive(Debug)]
pub struct Stack {
    /// The limit store.
    pub redis: Redis,
    /// The control plane, with its store on disk.
    pub control_plane: Process,
    /// The gateways, each with its copy of the configuration on disk.
    pub gateways: Vec<Process>,
    key: String,
    data: TempDir,
}

impl Stack {
    /// Starts the stack with this many gateways, applies `manifest`, and creates a key of its tenant `acme`. Returns
    /// when every gateway has applied both.
    pub async fn start(gateways: usize, manifest: &str) -> Self {
        let data = tempfile::tempdir().expect("a directory");
        let redis = Redis::start().await;
        let directory = data.path().join("control-plane");
        let args = ["--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--data-dir"];
        let args = [&args[..], &[directory.to_str().expect("UTF-8")]].concat();
        let control_plane = Process::start("weir-control-plane", &args, "control plane serves").await;
        let mut stack = Self { redis, control_plane, gateways: Vec::new(), key: String::new(), data };
        for k in 0..gateways {
            let gateway = stack.gateway(k).await;
            stack.gateways.push(gateway);
        }
        let file = stack.data.path().join("resources.yaml");
        std::fs::write(&file, manifest).expect("written");
        stack.weir(&["apply", "-f", file.to_str().expect("UTF-8")]).await;
        let key = stack.weir(&["key", "create", "acme-key", "--tenant", "acme"]).await;
        stack.key = key.trim().to_owned();
        stack
    }

    /// Starts gateway `k` with the copy on disk of an earlier gateway `k`.
    pub async fn gateway(&self, k: usize) -> Process {
        self.gateway_by(k, self.control_plane.text("grpc")).await
    }

    /// The same with the control plane at another address.
    pub async fn gateway_by(&self, k: usize, control_plane: &str) -> Process {
        self.gateway_with(k, control_plane, 0).await
    }

    /// The same with a number of seconds for which it accepts connections after it was told to end.
    pub async fn gateway_with(&self, k: usize, control_plane: &str, pre_stop_s: u64) -> Process {
        let copy = self.data.path().join(format!("gateway-{k}"));
        let control_plane = format!("http://{control_plane}");
        let token_file = self.token_file();
        let redis = self.redis.url();
        let id = format!("gateway-{k}");
        let pre_stop = format!("--pre-stop={pre_stop_s}s");
        let args = [
            "--id",
            &id,
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            &pre_stop,
            "--control-plane",
            &control_plane,
            "--gateway-token-file",
            &token_file,
            "--ops-token-file",
            &token_file,
            "--redis",
            &redis,
            "--data-dir",
            copy.to_str().expect("UTF-8"),
        ];
        Process::start_with("weir-gateway", &args, &[(CREDENTIAL, &id)], "serving").await
    }

    /// Stops the control plane and starts it again at the same address with the same store.
    pub async fn restart_control_plane(&mut self) {
        let address = self.control_plane.text("grpc").to_owned();
        signal(&self.control_plane.child, "-TERM").await;
        self.control_plane.child.wait().await.expect("ends");
        let directory = self.data.path().join("control-plane");
        let args = ["--listen", &address, "--http-listen", "127.0.0.1:0", "--data-dir"];
        let args = [&args[..], &[directory.to_str().expect("UTF-8")]].concat();
        self.control_plane = Process::start("weir-control-plane", &args, "control plane serves").await;
    }

    /// Starts limit service `k` with the copy on disk of an earlier one.
    pub async fn limit_service(&self, k: usize) -> Process {
        let copy = self.data.path().join(format!("limits-{k}"));
        let control_plane = format!("http://{}", self.control_plane.text("grpc"));
        let (token_file, redis, id) = (self.token_file(), self.redis.url(), format!("limits-{k}"));
        let args = [
            "--listen=127.0.0.1:0",
            "--ops-listen=127.0.0.1:0",
            "--pre-stop=0s",
            "--control-plane",
            &control_plane,
            "--gateway-token-file",
            &token_file,
            "--redis",
            &redis,
            "--id",
            &id,
            "--data-dir",
            copy.to_str().expect("UTF-8"),
        ];
        Process::start("weir-ratelimit", &args, "serving").await
    }

    /// The key of the tenant.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// A client of gateway `k`.
    pub fn client(&self, k: usize) -> Client {
        self.client_of(&self.gateways[k])
    }

    /// A client of this gateway.
    pub fn client_of(&self, gateway: &Process) -> Client {
        Client::new(gateway.text("clients").parse().expect("an address"), &self.key)
    }

    /// Runs a `weir` command that must succeed, and returns its output.
    pub async fn weir(&self, args: &[&str]) -> String {
        let (code, out, err) = self.try_weir(args).await;
        assert_eq!(code, 0, "weir {args:?}: {err}");
        out
    }

    /// Runs a `weir` command; returns its exit code, output and errors.
    pub async fn try_weir(&self, args: &[&str]) -> (i32, String, String) {
        let mut command = command("weir");
        command
            .args(args)
            .env("WEIR_SERVER", format!("http://{}", self.control_plane.text("grpc")))
            .env("WEIR_TOKEN_FILE", self.token_file());
        let done = command.output().await.expect("runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr))
    }

    fn token_file(&self) -> String {
        self.data.path().join("control-plane/admin.token").to_str().expect("UTF-8").to_owned()
    }
}
