//! `weir up`: all of Weir in one process, for a first look and for small installations.
//!
//! The parts are the same as in separate processes: a control plane with its gRPC services, gateways that connect to it
//! over a socket, and one limiter for all of them.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use mock_llm::Server as Mock;
use tokio_util::sync::CancellationToken;
use weir_control_plane::{
    Config as ControlPlaneConfig, ControlPlane, Handle as ControlPlaneHandle, StoreConfig,
};
use weir_gateway::config::Config as GatewayConfig;
use weir_gateway::control::credentials::CredentialSources;
use weir_proto::v1::admin_service_client::AdminServiceClient;
use weir_proto::{manifest, resource, v1};
use weir_ratelimit::AnyLimiter;
use weir_ratelimit::memory::MemoryLimiter;
use weir_ratelimit::redis::{RedisLimiter, RedisOptions};
use weir_runtime::Secret;

use crate::args::{OutputFormat, UpArgs};
use crate::error::Error;
use crate::output::Io;

/// The resources without `--config`.
const EXAMPLE: &str = include_str!("up/example.yaml");
/// The regions of the example: name of the backend, name of the region, tokens per second it decodes at.
const REGIONS: [(&str, &str, f64); 3] =
    [("sgp", "singapore", 120.0), ("fra", "frankfurt", 100.0), ("vir", "virginia", 80.0)];
/// The name of the API key that is issued at each start.
const KEY_NAME: &str = "first-look";
/// The start fails if a gateway has not applied the configuration within this time.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The addresses of all parts.
#[derive(Debug)]
struct Started {
    gateways: Vec<SocketAddr>,
    ops: Vec<SocketAddr>,
    admin: SocketAddr,
    control_plane_http: SocketAddr,
    api_key: Secret,
    admin_token: Secret,
    model: Option<String>,
    /// What gateways do not use, and why.
    refused: Vec<(String, String)>,
}

/// Runs until a signal.
pub(crate) async fn up(args: &UpArgs, io: &mut Io<'_>) -> Result<(), Error> {
    weir_runtime::init_logs(&args.log).map_err(Error::Setting)?;
    let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
    tokio::spawn(weir_runtime::shutdown_on_signals(shutdown.clone(), force.clone()));
    // Every part stops when this function returns.
    let end = shutdown.clone().drop_guard();

    let resources = resources(args, &shutdown).await?;
    let config = control_plane_config(args, resources.clone());
    // The gateways drain first and the control plane ends last.
    let gateways_ended = CancellationToken::new();
    let control_plane =
        ControlPlane::start(config, gateways_ended.clone()).await.map_err(control_plane_failed)?;
    let gateways_guard = gateways_ended.drop_guard();
    let limiter = limiter(args).await?;
    let mut running = Vec::new();
    for k in 0..args.gateways {
        let config = gateway_config(args, &control_plane, k)?;
        let gateway =
            weir_gateway::start(config, Some(limiter.clone()), shutdown.clone(), force.clone()).await;
        running.push(gateway.map_err(|error| gateway_failed(&error, k))?);
    }
    let mut admin = Admin::connect(control_plane.grpc_addr, &control_plane.admin_token).await?;
    let api_key = admin.key(&resources).await?;
    let refused = admin.wait_for_gateways(running.len()).await?;
    for gateway in &running {
        gateway.serving().await;
    }
    let started = Started {
        gateways: running.iter().map(|g| g.address).collect(),
        ops: running.iter().map(|g| g.ops_address).collect(),
        admin: control_plane.grpc_addr,
        control_plane_http: control_plane.http_addr,
        api_key,
        admin_token: control_plane.admin_token.clone(),
        model: admin.first_model().await?,
        refused,
    };
    if let Err(error) = started.print(io) {
        tracing::warn!(%error, "addresses not printed to standard output");
    }
    for gateway in running {
        let ended = gateway.ended().await;
        ended.map_err(|e| Error::Start { code: weir_runtime::exit::FAILED, reason: e.to_string() })?;
    }
    drop(gateways_guard);
    drop(end);
    match control_plane.join.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Error::Start { code: error.exit_code(), reason: error.to_string() }),
        Err(error) => Err(Error::Start { code: weir_runtime::exit::FAILED, reason: error.to_string() }),
    }
}

/// The address of a listener: as given, else this port of loopback, so that `weir up` exposes nothing but gateways. With
/// port 0 of the first gateway it is a free port.
fn address(args: &UpArgs, given: Option<SocketAddr>, port: u16) -> SocketAddr {
    let port = if args.listen.port() == 0 { 0 } else { port };
    given.unwrap_or(SocketAddr::from(([127, 0, 0, 1], port)))
}

/// The address of gateway `k`: its port is `k` after the first gateway's, or a free one as the first gateway's is.
fn of_gateway(flag: &'static str, first: SocketAddr, k: u16) -> Result<SocketAddr, Error> {
    if first.port() == 0 {
        return Ok(first);
    }
    let port = first.port().checked_add(k).ok_or_else(|| {
        let port = first.port();
        Error::Setting(format!(
            "{flag}: gateway {k} would listen on port {port} + {k}, and 65535 is the last"
        ))
    })?;
    Ok(SocketAddr::new(first.ip(), port))
}

/// Why the control plane could not start, with the flag of `weir up` for an address that is in use.
fn control_plane_failed(error: weir_control_plane::Error) -> Error {
    let code = error.exit_code();
    let reason = match error {
        weir_control_plane::Error::Bind { name, addr, reason } => {
            let flag = if name == "listen" { "--admin-listen" } else { "--http-listen" };
            format!(
                "cannot listen on {addr}: {reason}; choose another address with {flag}, or stop what uses it; with \
                 --listen 127.0.0.1:0 every listener takes a free port"
            )
        }
        error => error.to_string(),
    };
    Error::Start { code, reason }
}

/// Why gateway `k` could not start.
fn gateway_failed(error: &weir_gateway::StartError, k: u16) -> Error {
    let follows = match error {
        weir_gateway::StartError::Listen { .. } if k > 0 => {
            format!("; gateway {k} listens {k} after the port of that flag")
        }
        _ => String::new(),
    };
    Error::Start { code: weir_runtime::exit::FAILED, reason: format!("gateway {k}: {error}{follows}") }
}

fn control_plane_config(args: &UpArgs, bootstrap: Vec<v1::Resource>) -> ControlPlaneConfig {
    let store = match &args.data_dir {
        Some(directory) => StoreConfig::File(directory.join("weir.redb")),
        None => StoreConfig::Memory,
    };
    ControlPlaneConfig {
        listen: address(args, args.admin_listen, 7070),
        http_listen: address(args, args.http_listen, 7080),
        store,
        bootstrap,
        allow_backend_cidr: args.common.allow_backend_cidr.clone(),
        ..ControlPlaneConfig::default()
    }
}

fn gateway_config(args: &UpArgs, control_plane: &ControlPlaneHandle, k: u16) -> Result<GatewayConfig, Error> {
    Ok(GatewayConfig {
        listen: of_gateway("--listen", args.listen, k)?,
        ops_listen: of_gateway("--ops-listen", address(args, args.ops_listen, 9100), k)?,
        ops_token_file: None,
        // All parts of this process accept the same token.
        ops_token: Some(control_plane.admin_token.clone()),
        ops_allowed_hosts: Vec::new(),
        control_plane: format!("http://{}", control_plane.grpc_addr),
        control_plane_ca: None,
        control_plane_cert: None,
        control_plane_key: None,
        gateway_token_file: None,
        gateway_token: Some(control_plane.admin_token.clone()),
        redis: None,
        cold_start: Default::default(),
        data_dir: args.data_dir.as_ref().map(|d| d.join(format!("gateway-{k}"))),
        credentials: CredentialSources {
            // The store, and the copies of the other gateways.
            never: args.data_dir.iter().cloned().collect(),
            ..args.credentials.clone()
        },
        id: Some(format!("gateway-{k}")),
        region: String::new(),
        common: args.common.clone(),
        max_connections: 10_000,
        max_connections_per_address: None,
        body_memory_mib: 1024,
        answer_max_mib: 256,
        tls_cert: None,
        tls_key: None,
        pre_stop: Duration::ZERO,
        drain: Duration::from_secs(600),
        log: args.log.clone(),
    })
}

async fn limiter(args: &UpArgs) -> Result<AnyLimiter, Error> {
    let Some(url) = &args.redis else { return Ok(AnyLimiter::from(MemoryLimiter::for_callers_here())) };
    let redis = RedisLimiter::connect(url, RedisOptions::default()).await.map_err(|e| {
        let reason = format!("--redis: {e}; start it (redis-server), or leave --redis out");
        Error::Start { code: weir_runtime::exit::UNAVAILABLE, reason }
    })?;
    Ok(AnyLimiter::from(redis))
}

/// The operator's resources, or the example in front of three simulated regions that are started here.
async fn resources(args: &UpArgs, shutdown: &CancellationToken) -> Result<Vec<v1::Resource>, Error> {
    if let Some(path) = &args.config {
        let name = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::File { path: name.clone(), source })?;
        return Ok(manifest::parse(&text, &name)?);
    }
    // The placeholders are not URLs yet, so the names are taken before the addresses are known.
    let placeholder = REGIONS.iter().fold(EXAMPLE.to_owned(), |text, (backend, ..)| {
        text.replace(&format!("{{{backend}}}"), "http://127.0.0.1:1")
    });
    let models = manifest::parse(&placeholder, "the built-in example")?.into_iter();
    let models = models.filter(|r| resource::kind_of(r) == v1::ResourceKind::Model);
    let models: Vec<String> = models.map(|r| r.name).collect();
    let mut text = EXAMPLE.to_owned();
    for (backend, region, decode) in REGIONS {
        let config = mock_llm::Config {
            models: models.clone(),
            region: region.into(),
            instance: backend.into(),
            prefill_tokens_per_s: 4000.0,
            decode_tokens_per_s: decode,
            slots: 64,
            jitter: 0.1,
            ..mock_llm::Config::default()
        };
        let failed = |e: std::io::Error| Error::Start {
            code: weir_runtime::exit::FAILED,
            reason: format!("the simulated region {region} cannot listen: {e}"),
        };
        let server = Mock::bind("127.0.0.1:0", config).await.map_err(failed)?;
        text = text.replace(&format!("{{{backend}}}"), &format!("http://{}", server.local_addr()));
        tokio::spawn(server.run(shutdown.clone()));
    }
    Ok(manifest::parse(&text, "the built-in example")?)
}

/// The calls of `up` to its own control plane.
struct Admin {
    client: AdminServiceClient<tonic::transport::Channel>,
    server: String,
    token: Secret,
}

impl Admin {
    async fn connect(address: SocketAddr, token: &Secret) -> Result<Self, Error> {
        let server = format!("http://{address}");
        let unreachable =
            |e: tonic::transport::Error| Error::Unreachable { server: server.clone(), reason: e.to_string() };
        let endpoint = tonic::transport::Endpoint::from_shared(server.clone()).map_err(unreachable)?;
        let channel = endpoint.connect().await.map_err(unreachable)?;
        Ok(Self { client: AdminServiceClient::new(channel), server, token: token.clone() })
    }

    fn request<T>(&self, message: T) -> Result<tonic::Request<T>, Error> {
        let mut request = tonic::Request::new(message);
        let value = format!("Bearer {}", self.token.expose()).parse();
        request.metadata_mut().insert("authorization", value.map_err(|_| Error::Token("the control plane"))?);
        Ok(request)
    }

    fn refused(&self, status: tonic::Status) -> Error {
        Error::Refused { server: self.server.clone(), status: Box::new(status) }
    }

    /// Issues a key for the first tenant. In a used store the key exists already and its secret is lost, so it is rotated.
    async fn key(&mut self, resources: &[v1::Resource]) -> Result<Secret, Error> {
        let given = resources.iter().find(|r| resource::kind_of(r) == v1::ResourceKind::Tenant);
        let tenant = match given {
            Some(tenant) => tenant.name.clone(),
            None => self.default_tenant().await?,
        };
        let issue = v1::IssueApiKeyRequest { name: KEY_NAME.into(), tenant, ..Default::default() };
        let issue = self.request(issue)?;
        match self.client.issue_api_key(issue).await {
            Ok(answer) => Ok(Secret::new(answer.into_inner().secret)),
            Err(status) if status.code() == tonic::Code::AlreadyExists => {
                let rotate = v1::RotateApiKeyRequest { name: KEY_NAME.into(), ..Default::default() };
                let rotate = self.request(rotate)?;
                let answer = self.client.rotate_api_key(rotate).await.map_err(|s| self.refused(s))?;
                Ok(Secret::new(answer.into_inner().secret))
            }
            Err(status) => Err(self.refused(status)),
        }
    }

    async fn default_tenant(&mut self) -> Result<String, Error> {
        let name = "default".to_owned();
        let spec = Some(v1::resource::Spec::Tenant(v1::TenantSpec::default()));
        let resource = Some(v1::Resource { name: name.clone(), spec, ..Default::default() });
        let request = self.request(v1::CreateResourceRequest { resource, ..Default::default() })?;
        match self.client.create_resource(request).await {
            Ok(_) => Ok(name),
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(name),
            Err(status) => Err(self.refused(status)),
        }
    }

    async fn list(&mut self, kind: v1::ResourceKind) -> Result<v1::ListResourcesResponse, Error> {
        let request =
            v1::ListResourcesRequest { kind: kind as i32, page_size: 1000, page_token: String::new() };
        let request = self.request(request)?;
        Ok(self.client.list_resources(request).await.map_err(|s| self.refused(s))?.into_inner())
    }

    async fn first_model(&mut self) -> Result<Option<String>, Error> {
        let models = self.list(v1::ResourceKind::Model).await?.resources;
        let named = |wanted: &str| models.iter().find(|m| m.name == wanted);
        let model = named("gpt-4.1").or(models.first());
        Ok(model.map(|m| match &m.spec {
            Some(v1::resource::Spec::Model(spec)) if !spec.client_name.is_empty() => spec.client_name.clone(),
            _ => m.name.clone(),
        }))
    }

    /// Returns when every gateway has applied the configuration, with what any of them does not use: a missing credential
    /// keeps its backend out of use, and nothing else.
    async fn wait_for_gateways(&mut self, count: usize) -> Result<Vec<(String, String)>, Error> {
        let revision = self.list(v1::ResourceKind::ApiKey).await?.revision;
        let deadline = tokio::time::Instant::now() + READY_TIMEOUT;
        loop {
            let timeout = prost_types::Duration::try_from(READY_TIMEOUT).ok();
            let request = self.request(v1::WaitAppliedRequest { revision, timeout })?;
            let answer = self.client.wait_applied(request).await.map_err(|s| self.refused(s))?.into_inner();
            if answer.applied as usize + answer.refused.len() >= count {
                let errors = answer.refused.into_iter().flat_map(|gateway| gateway.errors);
                let named = |r: v1::ResourceRef| format!("{} {}", resource::kind_name(r.kind()), r.name);
                let what = |r: Option<_>| r.map_or_else(|| "the configuration".to_owned(), named);
                let mut refused: Vec<_> = errors.map(|error| (what(error.r#ref), error.message)).collect();
                refused.sort_unstable();
                refused.dedup();
                return Ok(refused);
            }
            if tokio::time::Instant::now() >= deadline {
                let reason =
                    format!("{} of {count} gateways applied the configuration in time", answer.applied);
                return Err(Error::Start { code: weir_runtime::exit::FAILED, reason });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Started {
    fn print(&self, io: &mut Io<'_>) -> Result<(), Error> {
        if io.format == OutputFormat::Json {
            let urls = |addresses: &[SocketAddr]| {
                addresses.iter().map(|a| format!("http://{a}")).collect::<Vec<_>>()
            };
            let line = serde_json::json!({
                "gateways": urls(&self.gateways),
                "ops": urls(&self.ops),
                "admin": format!("http://{}", self.admin),
                "control_plane": format!("http://{}", self.control_plane_http),
                "page": self.page(),
                "api_key": self.api_key.expose(),
                "admin_token": self.admin_token.expose(),
                "refused": self.refused.iter().map(|(what, why)| format!("{what}: {why}")).collect::<Vec<_>>(),
            });
            writeln!(io.out, "{line}")?;
        } else {
            io.out.write_all(self.text().as_bytes())?;
        }
        Ok(io.out.flush()?)
    }

    /// The URL of the live page. The token is in the fragment, which browsers never send.
    fn page(&self) -> String {
        format!("http://{}/#token={}", self.control_plane_http, self.admin_token.expose())
    }

    fn text(&self) -> String {
        let mut text = String::from("Weir is up.\n\n");
        for (k, (clients, ops)) in self.gateways.iter().zip(&self.ops).enumerate() {
            let _ =
                writeln!(text, "  gateway {k}       http://{clients}/v1   (operations http://{ops}/readyz)");
        }
        let _ = writeln!(
            text,
            "  control plane   http://{}      (metrics http://{}/metrics)",
            self.admin, self.control_plane_http
        );
        let _ = writeln!(text, "  API key         {}", self.api_key.expose());
        if !self.refused.is_empty() {
            let _ = writeln!(text, "\nNot used by the gateways until it is mended:\n");
            for (what, why) in &self.refused {
                let _ = writeln!(text, "  {what}: {why}");
            }
        }
        let _ = writeln!(text, "\nWatch it:\n\n  {}", self.page());
        let _ = writeln!(text, "\nAsk it something:\n");
        let model = self.model.as_deref().unwrap_or("MODEL");
        if let Some(gateway) = self.gateways.first() {
            let _ = writeln!(
                text,
                "  curl -N http://{gateway}/v1/chat/completions -H 'Authorization: Bearer {}' -H 'Content-Type: application/json' \\\n    -d '{{\"model\":\"{model}\",\"stream\":true,\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}]}}'",
                self.api_key.expose()
            );
        }
        let _ = writeln!(text, "\nManage it:\n");
        let _ = writeln!(
            text,
            "  export WEIR_SERVER=http://{} WEIR_TOKEN={}",
            self.admin,
            self.admin_token.expose()
        );
        let _ = writeln!(text, "  weir backends; weir gateways; weir weight sgp 10\n\nCtrl-C stops it.");
        text
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    fn args(line: &str) -> UpArgs {
        match Cli::try_parse_from(format!("weir up {line}").split_whitespace()).expect(line).command {
            Command::Up(args) => args,
            _ => panic!("{line}"),
        }
    }

    /// The addresses of admin, page, and of clients and operations of gateway `k`.
    fn addresses(line: &str, k: u16) -> Result<[String; 4], String> {
        let args = args(line);
        let config = control_plane_config(&args, Vec::new());
        let listen = of_gateway("--listen", args.listen, k).map_err(|e| e.to_string())?;
        let ops = of_gateway("--ops-listen", address(&args, args.ops_listen, 9100), k);
        let ops = ops.map_err(|e| e.to_string())?;
        Ok([config.listen, config.http_listen, listen, ops].map(|address| address.to_string()))
    }

    #[test]
    fn every_listener_has_a_flag_and_gateways_follow_the_first_one() {
        let of = |line, k| addresses(line, k).expect(line);
        assert_eq!(of("", 2), ["127.0.0.1:7070", "127.0.0.1:7080", "127.0.0.1:8082", "127.0.0.1:9102"]);
        let given =
            "--admin-listen 127.0.0.1:1 --http-listen [::1]:2 --listen 0.0.0.0:30 --ops-listen 10.0.0.1:40";
        assert_eq!(of(given, 1), ["127.0.0.1:1", "[::1]:2", "0.0.0.0:31", "10.0.0.1:41"]);
        let free = "--listen 127.0.0.1:0 --http-listen 127.0.0.1:7081";
        assert_eq!(of(free, 1), ["127.0.0.1:0", "127.0.0.1:7081", "127.0.0.1:0", "127.0.0.1:0"]);
        let beyond = addresses("--listen 127.0.0.1:65530", 6).expect_err("no port");
        assert!(beyond.contains("--listen") && beyond.contains("65535"), "{beyond}");
        for refused in ["--admin-listen 0.0.0.0:7070", "--http-listen 10.0.0.1:7080"] {
            let line = format!("weir up {refused}");
            let error = Cli::try_parse_from(line.split_whitespace()).expect_err(refused).to_string();
            assert!(error.contains("loopback") && error.contains("weir-control-plane"), "{error}");
        }
    }
}
