//! The parts under test as processes: this binary runs itself in another role, so that a bench needs no other binary.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::load::{self, Connection};
use crate::process::{Log, Process};
use crate::resources::Resources;

/// A gateway must be ready within this time, also one that runs under valgrind.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// What this process is when it is not the bench itself.
#[derive(Debug, Subcommand)]
pub(crate) enum Role {
    /// A gateway.
    Gateway(Box<weir_gateway::config::Config>),
    /// A simulated LLM server.
    Mock(MockArgs),
    /// A control plane with a file store.
    ControlPlane(ControlPlaneArgs),
    /// A limit service.
    LimitService(Box<weir_ratelimit_service::Config>),
}

/// A control plane on loopback.
#[derive(Debug, Clone, Args)]
pub(crate) struct ControlPlaneArgs {
    /// Where its gRPC services listen.
    #[arg(long)]
    listen: SocketAddr,
    /// Where its pages are.
    #[arg(long)]
    http_listen: SocketAddr,
    /// The file of its store; the token is beside it.
    #[arg(long)]
    store: PathBuf,
    /// What it logs.
    #[arg(long, default_value = "error")]
    log: String,
}

/// A simulated LLM server on a free port.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct MockArgs {
    /// The model it serves.
    #[arg(long)]
    pub(crate) model: String,
    /// The port; 0 is a free one.
    #[arg(long, default_value_t = 0)]
    pub(crate) port: u16,
    /// Answers at the same time.
    #[arg(long, default_value_t = 100_000)]
    pub(crate) slots: usize,
    /// Tokens per second of an answer; 0 is no delay.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) decode_tokens_per_s: f64,
    /// Spread of the time of a token, 0 to 1.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) jitter: f64,
    /// Bytes of each token; 0 is words.
    #[arg(long, default_value_t = 0)]
    pub(crate) chunk_bytes: usize,
    /// Seed of its jitter.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

/// Runs a role until SIGTERM.
pub(crate) fn run(role: Role) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), force.clone()));
        match role {
            Role::Gateway(config) => {
                weir_runtime::init_logs(&config.log).map_err(anyhow::Error::msg)?;
                let running = weir_gateway::start(*config, None, shutdown, force).await?;
                say(&json!({ "clients": running.address, "ops": running.ops_address }))?;
                running.ended().await?;
            }
            Role::Mock(args) => {
                let server = mock_llm::Server::bind(("127.0.0.1", args.port), mock_config(args)).await?;
                say(&json!({ "clients": server.local_addr() }))?;
                server.run(shutdown).await;
            }
            Role::ControlPlane(args) => {
                weir_runtime::init_logs(&args.log).map_err(anyhow::Error::msg)?;
                let config = weir_control_plane::Config {
                    listen: args.listen,
                    http_listen: args.http_listen,
                    store: weir_control_plane::StoreConfig::File(args.store),
                    ..Default::default()
                };
                let running = weir_control_plane::ControlPlane::start(config, shutdown).await?;
                say(&json!({ "grpc": running.grpc_addr, "http": running.http_addr }))?;
                running.join.await.context("the control plane panicked")??;
            }
            Role::LimitService(config) => {
                weir_runtime::init_logs(&config.log).map_err(anyhow::Error::msg)?;
                let running = weir_ratelimit_service::start(*config, None, shutdown, force).await?;
                say(&json!({ "grpc": running.address, "ops": running.ops_address }))?;
                running.ended().await;
            }
        }
        Ok(())
    })
}

fn say(line: &Value) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn mock_config(args: MockArgs) -> mock_llm::Config {
    mock_llm::Config {
        models: vec![args.model],
        slots: args.slots,
        queue: 100_000,
        decode_tokens_per_s: args.decode_tokens_per_s,
        jitter: args.jitter,
        chunk_bytes: args.chunk_bytes,
        seed: args.seed,
        // The request decides.
        output_tokens: 10_000_000,
        connections_max: 100_000,
        drain: Duration::ZERO,
        ..mock_llm::Config::default()
    }
}

/// A simulated LLM server in a process of its own.
#[derive(Debug)]
pub(crate) struct Mock {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    /// Itself.
    pub(crate) process: Process,
}

impl Mock {
    /// Starts one.
    pub(crate) async fn start(name: &str, args: &MockArgs, directory: &Path) -> anyhow::Result<Self> {
        let mut command = this_binary("mock")?;
        command.args(["--model", &args.model]).args(["--port", &args.port.to_string()]);
        command.args(["--slots", &args.slots.to_string()]);
        command.args(["--decode-tokens-per-s", &args.decode_tokens_per_s.to_string()]);
        command.args(["--jitter", &args.jitter.to_string(), "--seed", &args.seed.to_string()]);
        command.args(["--chunk-bytes", &args.chunk_bytes.to_string()]);
        let mut process = Process::start(name, command, directory)?;
        let line = process.line().await?;
        Ok(Self { address: address(&line, "clients")?, process })
    }

    /// Its counters.
    pub(crate) async fn stats(&self) -> anyhow::Result<Value> {
        let body = fetch(self.address, "/admin/stats").await?;
        serde_json::from_str(&body).context("counters of a mock")
    }
}

/// The operations token of every gateway here; all of them are on this machine and end with the bench.
const OPS_TOKEN: &str = "operations-token-of-the-bench";

/// The settings of a gateway.
#[derive(Debug, Clone, Default)]
pub(crate) struct GatewayArgs {
    /// Its name.
    pub(crate) id: String,
    /// The address of the limit store; without one, limits are in the process.
    pub(crate) redis: Option<String>,
    /// The control plane and the token for it; without one the gateway serves its copy on disk.
    pub(crate) control_plane: Option<(SocketAddr, String)>,
    /// Whether a missing bucket counts as full when the data set was created.
    pub(crate) strict: bool,
    /// Variables of its environment, such as credentials.
    pub(crate) env: Vec<(String, String)>,
    /// More flags.
    pub(crate) flags: Vec<String>,
    /// A program that runs it, with its arguments; none where this is empty.
    pub(crate) under: Vec<String>,
    /// Its log.
    pub(crate) log: Logging,
}

/// The log of a process.
#[derive(Debug, Clone)]
pub(crate) struct Logging {
    /// The filter.
    pub(crate) filter: &'static str,
    /// The target.
    pub(crate) to: Log,
}

impl Default for Logging {
    fn default() -> Self {
        Self { filter: "error", to: Log::File }
    }
}

/// A gateway in a process of its own.
#[derive(Debug)]
pub(crate) struct Gateway {
    /// Where clients are served.
    pub(crate) address: SocketAddr,
    /// Where operations are served.
    pub(crate) ops: SocketAddr,
    /// Itself.
    pub(crate) process: Process,
}

impl Gateway {
    /// Starts one that serves these resources, and waits until it is ready.
    pub(crate) async fn start(
        args: &GatewayArgs,
        resources: &Resources,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let data = directory.join(&args.id);
        if args.control_plane.is_none() {
            resources.save(&data)?;
        }
        let mut command = this_binary_under(&args.under, "gateway")?;
        command.args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--log", args.log.filter]);
        command.args(["--pre-stop", "0s", "--drain", "1s", "--id", &args.id]);
        command.arg("--data-dir").arg(&data);
        if let Some(url) = &args.redis {
            command.args(["--redis", url]);
        }
        if args.strict {
            command.args(["--cold-start", "strict"]);
        }
        // The discard port: nothing listens there.
        let (plane, token) =
            args.control_plane.clone().unwrap_or((([127, 0, 0, 1], 9).into(), String::new()));
        command.args(["--control-plane", &format!("http://{plane}")]);
        command.env("WEIR_GATEWAY_TOKEN", token).env("WEIR_OPS_TOKEN", OPS_TOKEN);
        command.envs(args.env.iter().map(|(name, value)| (name, value)));
        command.args(&args.flags);
        let mut process = Process::start_logging(&args.id, command, directory, args.log.to)?;
        let line = process.line().await?;
        let gateway = Self { address: address(&line, "clients")?, ops: address(&line, "ops")?, process };
        let ready = async {
            while fetch(gateway.ops, "/readyz").await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(READY_TIMEOUT, ready).await.is_err() {
            bail!("{} is not ready after {READY_TIMEOUT:?}: {}", args.id, gateway.process.log_tail());
        }
        Ok(gateway)
    }
}

/// A control plane in a process of its own.
#[derive(Debug)]
pub(crate) struct ControlPlaneProcess {
    /// Where admin, discovery and reports are.
    pub(crate) grpc: SocketAddr,
    /// Where its pages are.
    pub(crate) http: SocketAddr,
    /// Opens everything.
    pub(crate) token: String,
    /// Itself.
    pub(crate) process: Process,
}

impl ControlPlaneProcess {
    /// Starts one with the store in a directory, at these addresses (gRPC, pages) or on free ports.
    pub(crate) async fn start(
        addresses: Option<(SocketAddr, SocketAddr)>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        Self::start_logging(addresses, directory, &Logging::default()).await
    }

    /// Starts one with a log that may be broken.
    pub(crate) async fn start_logging(
        addresses: Option<(SocketAddr, SocketAddr)>,
        directory: &Path,
        log: &Logging,
    ) -> anyhow::Result<Self> {
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        let (grpc, http) = addresses.unwrap_or((free, free));
        let mut command = this_binary("control-plane")?;
        command.args(["--listen", &grpc.to_string(), "--http-listen", &http.to_string()]);
        command.arg("--store").arg(directory.join("control-plane/store.redb"));
        command.args(["--log", log.filter]);
        let mut process = Process::start_logging("control-plane", command, directory, log.to)?;
        let line = process.line().await?;
        let token = std::fs::read_to_string(directory.join("control-plane/admin.token"))
            .context("the control plane's token")?;
        let (grpc, http) = (address(&line, "grpc")?, address(&line, "http")?);
        Ok(Self { grpc, http, token: token.trim().to_owned(), process })
    }
}

/// A limit service in a process of its own, with the limits of no one.
#[derive(Debug)]
pub(crate) struct LimitService {
    /// Where its services are.
    pub(crate) grpc: SocketAddr,
    /// Where operations are served.
    pub(crate) ops: SocketAddr,
    /// Itself.
    pub(crate) process: Process,
}

impl LimitService {
    /// Starts one.
    pub(crate) async fn start(directory: &Path, log: &Logging) -> anyhow::Result<Self> {
        let mut command = this_binary("limit-service")?;
        command.args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--log", log.filter]);
        command.args(["--pre-stop", "0s", "--drain", "1s"]);
        let mut process = Process::start_logging("limit-service", command, directory, log.to)?;
        let line = process.line().await?;
        Ok(Self { grpc: address(&line, "grpc")?, ops: address(&line, "ops")?, process })
    }
}

fn this_binary(role: &str) -> anyhow::Result<Command> {
    this_binary_under(&[], role)
}

fn this_binary_under(program: &[String], role: &str) -> anyhow::Result<Command> {
    let binary = std::env::current_exe().context("the path of this binary")?;
    let mut command = match program.split_first() {
        None => Command::new(binary),
        Some((program, args)) => {
            let mut command = Command::new(program);
            command.args(args).arg(binary);
            command
        }
    };
    command.args(["role", role]);
    Ok(command)
}

fn address(line: &str, name: &str) -> anyhow::Result<SocketAddr> {
    let line: Value = serde_json::from_str(line).with_context(|| format!("unexpected line: {line}"))?;
    let text = line[name].as_str().with_context(|| format!("no {name} in {line}"))?;
    Ok(text.parse()?)
}

/// The body of a page that must answer 200.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut connection = Connection::open(address).await?;
    let (answer, body) = connection.call_for_body(&load::get(path, OPS_TOKEN)).await?;
    if answer.status != 200 {
        bail!("http://{address}{path} answered {}: {body}", answer.status);
    }
    Ok(body)
}
