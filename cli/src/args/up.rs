//! The arguments of `weir up`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;
use weir_gateway::control::credentials::CredentialSources;
use weir_runtime::Cidr;

/// Gateways in one process at most.
const GATEWAYS_MAX: i64 = 64;

/// The arguments of `weir up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Gateways to run, 1 to 64; gateway k listens on the port of --listen plus k
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=GATEWAYS_MAX), value_name = "N")]
    pub gateways: u16,
    /// Address of the first gateway; port 0 takes free ports for everything
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "ADDR")]
    pub listen: SocketAddr,
    /// Keep limits in this Redis instead of in this process, such as redis://127.0.0.1:6379
    #[arg(long, env = "WEIR_REDIS", hide_env_values = true, value_name = "URL")]
    pub redis: Option<String>,
    /// Run these resources instead of the example; taken when the store is still empty
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Keep resources here; without it they go with the process
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Networks that backends may be in although such addresses are refused, such as link-local 169.254.10.0/24
    #[arg(long, env = "WEIR_ALLOW_BACKEND_CIDR", value_delimiter = ',', value_name = "CIDR[,CIDR...]")]
    pub allow_backend_cidr: Vec<Cidr>,
    /// Where backends' credentials may be found
    #[command(flatten)]
    pub credentials: CredentialSources,
    /// What is logged, such as info or weir_gateway=debug
    #[arg(long, env = "WEIR_LOG", default_value = "warn", value_name = "FILTER")]
    pub log: String,
}
