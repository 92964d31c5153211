//! The settings of a limit service: flags, or the same names in the environment.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use weir_proto::manifest::parse_duration;
use weir_proto::resource::Resource;
use weir_ratelimit::redis::ColdStart;
use weir_runtime::{AllowedHost, Secret};

/// Shorter tokens could be guessed.
const TOKEN_MIN_CHARS: usize = 16;

/// Serves the cluster's limits to other programs, over the gateways' buckets.
#[derive(Debug, Clone, Parser)]
#[command(name = "weir-ratelimit", version = weir_runtime::version())]
pub struct Config {
    /// Address of the gRPC services.
    #[arg(long, env = "WEIR_LISTEN", default_value = "127.0.0.1:8090", value_name = "HOST:PORT")]
    pub listen: SocketAddr,
    /// Address for operations: /livez, /readyz, /metrics.
    #[arg(long, env = "WEIR_OPS_LISTEN", default_value = "127.0.0.1:9100", value_name = "HOST:PORT")]
    pub ops_listen: SocketAddr,
    /// Name under which the operations port may be asked for, such as ops.example.com or *.example.com; may be repeated.
    /// Addresses, localhost, names without dots and private suffixes (.svc, .internal) need none.
    #[arg(
        long = "ops-allowed-host",
        env = "WEIR_OPS_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    pub ops_allowed_hosts: Vec<AllowedHost>,
    /// Redis of the cluster's limits, such as redis://host:6379. Without it limits hold for this process alone.
    #[arg(long, env = "WEIR_REDIS", value_name = "URL", hide_env_values = true)]
    pub redis: Option<String>,
    /// File with the token that callers send as "authorization: Bearer TOKEN", at least 16 characters. Also as
    /// WEIR_LIMIT_TOKEN. None is asked for without it.
    #[arg(long, env = "WEIR_LIMIT_TOKEN_FILE", value_name = "PATH")]
    pub token_file: Option<PathBuf>,
    /// The token itself; by environment only, since arguments can be read by everybody on the machine.
    #[arg(skip)]
    pub token: Option<Secret>,
    /// Listen beyond loopback without a token: for a network that only its users can reach.
    #[arg(long, env = "WEIR_INSECURE")]
    pub insecure: bool,
    /// The control plane, whose descriptor rules and limits are in force, such as http://host:7070.
    #[arg(long, env = "WEIR_CONTROL_PLANE", value_name = "URL", conflicts_with = "config")]
    pub control_plane: Option<String>,
    /// File with the token for the control plane: its gateways' token. Also as WEIR_GATEWAY_TOKEN.
    #[arg(long, env = "WEIR_GATEWAY_TOKEN_FILE", value_name = "PATH")]
    pub gateway_token_file: Option<PathBuf>,
    /// The token itself; by environment only, since arguments can be read by everybody on the machine.
    #[arg(skip)]
    pub gateway_token: Option<Secret>,
    /// File with resources, as for `weir apply -f`: its descriptor rules and limits are in force, without a control
    /// plane.
    #[arg(long, env = "WEIR_CONFIG", value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Directory of the configuration copy that is served while the control plane is away. None is kept without it.
    #[arg(long, env = "WEIR_DATA_DIR", value_name = "PATH")]
    pub data_dir: Option<PathBuf>,
    /// Name of this process at the control plane; one is made up when none is given.
    #[arg(long, env = "WEIR_LIMIT_SERVICE_ID", value_name = "NAME")]
    pub id: Option<String>,
    /// Region of this process.
    #[arg(long, env = "WEIR_REGION", default_value = "", value_name = "NAME")]
    pub region: String,
    /// A check with no hits (hits_addend 0) needs room for one. Without it, it passes until the limit is exceeded, as in
    /// Envoy's reference server.
    #[arg(long, env = "WEIR_STRICT_ZERO_HITS")]
    pub strict_zero_hits: bool,
    /// What a bucket that is not in Redis means. burst: it was never used. strict: it may have been lost with an
    /// older data set, so it was full when this data set was born: a Redis that lost its data grants no burst, and a new
    /// one none at first either.
    #[arg(long, env = "WEIR_COLD_START", value_enum, default_value_t = ColdStart::Burst)]
    pub cold_start: ColdStart,
    /// How long new calls are still taken after SIGTERM, so that load balancers can notice, with a unit: 2s, 1m.
    #[arg(long, env = "WEIR_PRE_STOP", default_value = "2s", value_parser = parse_duration, value_name = "DURATION")]
    pub pre_stop: Duration,
    /// How long calls may run on after that, with a unit: 10s, 1m.
    #[arg(long, env = "WEIR_DRAIN", default_value = "10s", value_parser = parse_duration, value_name = "DURATION")]
    pub drain: Duration,
    /// What is logged, such as info or weir_ratelimit=debug.
    #[arg(long, env = "WEIR_LOG", default_value = "info", value_name = "FILTER")]
    pub log: String,
}

impl Default for Config {
    /// As without any argument, whatever the environment says.
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 8090).into(),
            ops_listen: ([127, 0, 0, 1], 9100).into(),
            ops_allowed_hosts: Vec::new(),
            redis: None,
            token_file: None,
            token: None,
            insecure: false,
            control_plane: None,
            gateway_token_file: None,
            gateway_token: None,
            config: None,
            data_dir: None,
            id: None,
            region: String::new(),
            strict_zero_hits: false,
            cold_start: ColdStart::Burst,
            pre_stop: Duration::from_secs(2),
            drain: Duration::from_secs(10),
            log: "info".into(),
        }
    }
}

impl Config {
    /// The resources of `--config`.
    pub(super) fn resources(&self) -> Result<Option<Vec<Resource>>, String> {
        let Some(path) = &self.config else { return Ok(None) };
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| format!("--config {name}: {error}"))?;
        let wire = weir_proto::manifest::parse(&text, &name).map_err(|error| format!("--config: {error}"))?;
        let checked: Result<Vec<Resource>, _> = wire.iter().map(Resource::try_from).collect();
        checked.map(Some).map_err(|error| format!("--config {name}: {error}"))
    }

    /// The token for the control plane.
    pub(super) fn control_plane_token(&self) -> Result<Option<Secret>, String> {
        let given = self.gateway_token.as_ref();
        secret(given, "WEIR_GATEWAY_TOKEN", "--gateway-token-file", self.gateway_token_file.as_deref())
    }

    /// The token callers need. Refuses what is unsafe.
    pub(super) fn checked_token(&self) -> Result<Option<Secret>, String> {
        let token =
            secret(self.token.as_ref(), "WEIR_LIMIT_TOKEN", "--token-file", self.token_file.as_deref())?;
        match &token {
            Some(token) if token.expose().chars().count() < TOKEN_MIN_CHARS => {
                Err(format!("--token-file: the token must be at least {TOKEN_MIN_CHARS} characters"))
            }
            None if !self.listen.ip().is_loopback() && !self.insecure => Err(format!(
                "--listen: {} is not loopback, so callers must need a token: set --token-file or WEIR_LIMIT_TOKEN, or \
                 --insecure when only its users can reach this network",
                self.listen
            )),
            _ => Ok(token),
        }
    }
}

/// A token: given, in the environment, or in the file.
fn secret(
    given: Option<&Secret>,
    variable: &str,
    flag: &str,
    file: Option<&Path>,
) -> Result<Option<Secret>, String> {
    if let Some(token) = given {
        return Ok(Some(token.clone()));
    }
    if let Ok(token) = std::env::var(variable) {
        return Ok(Some(Secret::new(token)));
    }
    let Some(path) = file else { return Ok(None) };
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(Secret::new(text.trim().to_owned()))),
        Err(error) => Err(format!("{flag} {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_what_no_argument_gives() {
        if std::env::vars().any(|(name, _)| name.starts_with("WEIR_")) {
            return;
        }
        let parsed = Config::parse_from(["weir-ratelimit"]);
        assert_eq!(format!("{parsed:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn what_is_open_to_others_needs_a_token_or_the_operators_word() {
        let open = Config { listen: ([0, 0, 0, 0], 8090).into(), ..Config::default() };
        assert!(open.checked_token().expect_err("refused").contains("--insecure"));
        let insecure = Config { insecure: true, ..open.clone() };
        assert_eq!(insecure.checked_token(), Ok(None));
        let guarded = Config { token: Some(Secret::new("0123456789abcdef".into())), ..open.clone() };
        assert!(guarded.checked_token().expect("accepted").is_some());
        assert!(!format!("{guarded:?}").contains("0123456789"));
        let short = Config { token: Some(Secret::new("short".into())), ..open };
        assert!(short.checked_token().expect_err("refused").contains("16 characters"));
    }
}
