//! The settings of a gateway process: flags, or the same names in the environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser};
use weir_proto::manifest::parse_duration;
use weir_ratelimit::redis::ColdStart;
use weir_runtime::{AllowedHost, Cidr, OpsToken, Secret, edge};

use crate::control::credentials::CredentialSources;
use crate::http::bounds::Bounds;
use crate::http::cors::{AllowedOrigin, Cors};

/// Serves the OpenAI API in front of your backends, within the cluster's limits.
#[derive(Debug, Clone, Parser)]
#[command(name = "weir-gateway", version = weir_runtime::version())]
pub struct Config {
    /// Address for clients.
    #[arg(long, env = "WEIR_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Address for operations: /livez, /readyz, /metrics, and for who has the operations token /usage and /limits.
    #[arg(long, env = "WEIR_OPS_LISTEN", default_value = "127.0.0.1:9100")]
    pub ops_listen: SocketAddr,
    /// File with the operations token, at least 16 characters, that opens /usage and /limits. Also as WEIR_OPS_TOKEN.
    /// Without one those pages are closed.
    #[arg(long, env = "WEIR_OPS_TOKEN_FILE", value_name = "PATH")]
    pub ops_token_file: Option<PathBuf>,
    /// The token itself; by environment only, since arguments can be read by everybody on the machine.
    #[arg(skip)]
    pub ops_token: Option<Secret>,
    /// Name under which the operations port may be asked for, such as ops.example.com or *.example.com; may be repeated.
    /// Addresses, localhost, names without dots and private suffixes (.svc, .internal) need none.
    #[arg(
        long = "ops-allowed-host",
        env = "WEIR_OPS_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    pub ops_allowed_hosts: Vec<AllowedHost>,
    /// The control plane; where several share a store, all of them with commas between: http://a:7070,http://b:7070.
    #[arg(
        long,
        env = "WEIR_CONTROL_PLANE",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL[,URL...]"
    )]
    pub control_plane: String,
    /// Who signs the control plane's certificate (PEM), for an address with https; without it, who the system trusts.
    #[arg(long, env = "WEIR_CONTROL_PLANE_CA", value_name = "PATH")]
    pub control_plane_ca: Option<PathBuf>,
    /// Certificate (PEM) by which the control plane knows this gateway; its URI name is weir://gateway/ID.
    #[arg(long, env = "WEIR_CONTROL_PLANE_CERT", value_name = "PATH", requires = "control_plane_key")]
    pub control_plane_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate.
    #[arg(long, env = "WEIR_CONTROL_PLANE_KEY", value_name = "PATH", requires = "control_plane_cert")]
    pub control_plane_key: Option<PathBuf>,
    /// File with the token for the control plane.
    #[arg(long, env = "WEIR_GATEWAY_TOKEN_FILE", value_name = "PATH")]
    pub gateway_token_file: Option<PathBuf>,
    /// The token itself; by environment only, since arguments can be read by everybody on the machine.
    #[arg(skip)]
    pub gateway_token: Option<Secret>,
    /// Redis for the cluster's limits: redis://host:6379, redis+sentinel://host:26379,.../service or
    /// redis+cluster://host:6379,...; rediss for TLS. Without it limits hold for this process alone.
    #[arg(long, env = "WEIR_REDIS", value_name = "URL", hide_env_values = true)]
    pub redis: Option<String>,
    /// What a limit's meter that is not in Redis means. burst: it was never used. strict: it may have been lost with an
    /// older data set, so it was full when this data set was born: a Redis that lost its data grants no burst, and a new
    /// one none at first either.
    #[arg(long, env = "WEIR_COLD_START", value_enum, default_value_t = ColdStart::Burst)]
    pub cold_start: ColdStart,
    /// Directory of the configuration copy that is served while the control plane is away. None is kept without it.
    #[arg(long, env = "WEIR_DATA_DIR", value_name = "PATH")]
    pub data_dir: Option<PathBuf>,
    /// Where backends' credentials may be found.
    #[command(flatten)]
    pub credentials: CredentialSources,
    /// Name of this gateway; one is made up when none is given.
    #[arg(long, env = "WEIR_GATEWAY_ID", value_name = "NAME")]
    pub id: Option<String>,
    /// Region of this gateway.
    #[arg(long, env = "WEIR_REGION", default_value = "", value_name = "NAME")]
    pub region: String,
    /// What `weir up` takes too.
    #[command(flatten)]
    pub common: CommonSettings,
    /// Most client connections at once.
    #[arg(long, env = "WEIR_MAX_CONNECTIONS", default_value_t = 10_000, value_name = "N")]
    pub max_connections: usize,
    /// Most client connections of one address (IPv6: one /64) at once; as many as in all when not given.
    #[arg(long, env = "WEIR_MAX_CONNECTIONS_PER_ADDRESS", value_name = "N")]
    pub max_connections_per_address: Option<usize>,
    /// Most memory that request bodies take together, in MiB.
    #[arg(long, env = "WEIR_BODY_MEMORY_MIB", default_value_t = 1024, value_name = "MIB")]
    pub body_memory_mib: usize,
    /// Largest answer of a backend that is not streamed, in MiB; larger ones are refused. It counts to the memory above.
    #[arg(long, env = "WEIR_ANSWER_MAX_MIB", default_value_t = 256, value_name = "MIB")]
    pub answer_max_mib: usize,
    /// Certificate chain (PEM) to serve clients over TLS alone; read again when it changes.
    #[arg(long, env = "WEIR_TLS_CERT", value_name = "PATH", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate.
    #[arg(long, env = "WEIR_TLS_KEY", value_name = "PATH", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// How long new connections are still taken after SIGTERM, so that load balancers can notice, with a unit: 2s, 1m.
    #[arg(long, env = "WEIR_PRE_STOP", default_value = "2s", value_parser = parse_duration, value_name = "DURATION")]
    pub pre_stop: Duration,
    /// How long streams may run on after that, with a unit: 30s, 10m.
    #[arg(long, env = "WEIR_DRAIN", default_value = "10m", value_parser = parse_duration, value_name = "DURATION")]
    pub drain: Duration,
    /// What is logged, such as info or weir_gateway=debug.
    #[arg(long, env = "WEIR_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

/// The settings that a gateway has in every process that runs one.
#[derive(Debug, Clone, Default, Args)]
pub struct CommonSettings {
    /// Networks that backends may be in although such addresses are refused: link-local ones, where clouds keep
    /// credentials, and other metadata services, such as 169.254.10.0/24,fe80::/10. Loopback and private networks need
    /// none.
    #[arg(long, env = "WEIR_ALLOW_BACKEND_CIDR", value_delimiter = ',', value_name = "CIDR[,CIDR...]")]
    pub allow_backend_cidr: Vec<Cidr>,
    /// Origin of web pages that may use this gateway from a browser, such as http://localhost:3000, or * for all; may be
    /// repeated. None is allowed without it.
    #[arg(
        long = "cors-allowed-origin",
        env = "WEIR_CORS_ALLOWED_ORIGINS",
        value_delimiter = ',',
        value_name = "ORIGIN"
    )]
    pub cors_allowed_origins: Vec<AllowedOrigin>,
    /// Largest request body, in MiB, 1 to 4096; at most what all bodies may take together (--body-memory-mib). When not
    /// given 50, as OpenAI takes, or that if it is less.
    #[arg(
        long,
        env = "WEIR_MAX_BODY_MIB",
        value_parser = clap::value_parser!(u32).range(1..=4096),
        value_name = "MIB"
    )]
    pub max_body_mib: Option<u32>,
}

/// OpenAI takes bodies of 50 MB, which files and images of several pages need.
const BODY_MIB_MAX: usize = 50;

impl Config {
    /// The bounds these settings ask for.
    pub fn bounds(&self) -> Bounds {
        let shipped = Bounds::default();
        Bounds {
            edge: edge::Bounds {
                connections: self.max_connections,
                connections_per_address: self.max_connections_per_address.unwrap_or(self.max_connections),
                ..shipped.edge
            },
            pre_stop: self.pre_stop,
            drain: self.drain,
            ..shipped
        }
    }

    /// The largest request body, bytes.
    ///
    /// # Errors
    /// When all bodies together may take less than one.
    pub fn body_bytes_max(&self) -> Result<usize, String> {
        let all = self.body_memory_mib;
        match self.common.max_body_mib.map(|max| max as usize) {
            Some(max) if max > all => {
                Err(format!("{max} MiB are more than all bodies may take together (--body-memory-mib {all})"))
            }
            Some(max) => Ok(max << 20),
            None => Ok(BODY_MIB_MAX.min(all) << 20),
        }
    }

    /// Which web pages may ask.
    ///
    /// # Errors
    /// When `*` stands beside other origins, or there are too many.
    pub fn cors(&self) -> Result<Cors, String> {
        Cors::new(&self.common.cors_allowed_origins)
    }

    /// The operations token: given, in the environment, or in the file.
    pub fn ops_token(&self) -> Result<OpsToken, String> {
        let token = match (&self.ops_token, std::env::var("WEIR_OPS_TOKEN"), &self.ops_token_file) {
            (Some(token), ..) => Some(token.clone()),
            (None, Ok(token), _) => Some(Secret::new(token)),
            (None, Err(_), Some(path)) => Some(weir_runtime::read_token(path)?),
            (None, Err(_), None) => None,
        };
        OpsToken::new(token.as_ref())
    }

    /// The files and directories of this process that no backend may name as its credential.
    pub(crate) fn own_secrets(&self) -> Vec<PathBuf> {
        let own = [
            &self.gateway_token_file,
            &self.ops_token_file,
            &self.control_plane_key,
            &self.tls_key,
            &self.data_dir,
        ];
        own.into_iter().flatten().chain(&self.credentials.never).cloned().collect()
    }

    /// The token for the control plane: given, in the environment, or in the file.
    pub fn token(&self) -> Result<Option<Secret>, String> {
        if let Some(token) = &self.gateway_token {
            return Ok(Some(token.clone()));
        }
        if let Ok(token) = std::env::var("WEIR_GATEWAY_TOKEN") {
            return Ok(Some(Secret::new(token)));
        }
        let Some(path) = &self.gateway_token_file else { return Ok(None) };
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(Secret::new(text.trim().to_owned()))),
            Err(error) => Err(format!("--gateway-token-file {}: {error}", path.display())),
        }
    }
}
