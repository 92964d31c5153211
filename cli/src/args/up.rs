//! The arguments of `weir up`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use weir_gateway::config::CommonSettings;
use weir_gateway::control::credentials::CredentialSources;

/// The maximum number of gateways in one process.
const GATEWAYS_MAX: i64 = 64;
/// What all bodies of a gateway may take together is fixed here.
const BODY_MIB_MAX: i64 = 1024;

// The settings are those of a gateway process; of several gateways they are told in fewer words.
const ALLOW_BACKEND_CIDR: &str = "Networks of backends to allow although such addresses are refused by default, such as \
                                  link-local 169.254.10.0/24";
const CORS_ALLOWED_ORIGINS: &str = "Origin of web pages that may use the gateways from a browser, such as \
                                    http://localhost:3000, or * for all";
const MAX_BODY_MIB: &str = "Largest request body, in MiB, 1 to 1024; 50 when not given";

/// The arguments of `weir up`.
#[derive(Debug, Clone, Args)]
#[command(
    mut_arg("allow_backend_cidr", |arg| arg.help(ALLOW_BACKEND_CIDR)),
    mut_arg("cors_allowed_origins", |arg| arg.help(CORS_ALLOWED_ORIGINS)),
    mut_arg("max_body_mib", |arg| {
        arg.help(MAX_BODY_MIB).value_parser(clap::value_parser!(u32).range(1..=BODY_MIB_MAX))
    })
)]
pub struct UpArgs {
    /// Gateways to run, 1 to 64; gateway k, from 0 on, listens on the ports of --listen and --ops-listen plus k
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=GATEWAYS_MAX), value_name = "N")]
    pub gateways: u16,
    /// Address of the first gateway for clients; with port 0 every listener takes a free port unless its flag says another
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Address of the control plane for the commands of weir and for gRPC, on loopback. Default: 127.0.0.1:7070
    #[arg(long, value_parser = loopback, value_name = "ADDR")]
    pub admin_listen: Option<SocketAddr>,
    /// Address of the live page, and of /readyz and /metrics of the control plane, on loopback. Default: 127.0.0.1:7080
    #[arg(long, value_parser = loopback, value_name = "ADDR")]
    pub http_listen: Option<SocketAddr>,
    /// Address of the operations port of the first gateway: /readyz, /metrics. Default: 127.0.0.1:9100
    #[arg(long, value_name = "ADDR")]
    pub ops_listen: Option<SocketAddr>,
    /// Redis that stores the limits, such as redis://127.0.0.1:6379. Default: the memory of this process
    #[arg(long, env = "WEIR_REDIS", hide_env_values = true, value_name = "URL")]
    pub redis: Option<String>,
    /// File of resources to start with instead of the example; used only if the store is empty
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the store. Default: the resources are lost when the process ends
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Settings of every gateway
    #[command(flatten)]
    pub common: CommonSettings,
    /// Allowed sources of backends' credentials
    #[command(flatten)]
    pub credentials: CredentialSources,
    /// Log filter, such as info or weir_gateway=debug
    #[arg(long, env = "WEIR_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
}

/// An address of this machine alone: the tokens of `weir up` are made at its start, so nobody elsewhere can have one.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text.parse().map_err(|_| "must be an address such as 127.0.0.1:7070")?;
    if address.ip().is_loopback() {
        return Ok(address);
    }
    Err("must be a loopback address; for other machines run weir-control-plane with tokens of your own"
        .to_owned())
}
