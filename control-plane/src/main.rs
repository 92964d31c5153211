//! The control plane as a process of its own.

// They panic when the stream is gone, and hang when nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use tokio_util::sync::CancellationToken;
use weir_control_plane::store::{EtcdConfig, EtcdStore, FileStore};
use weir_control_plane::{Config, ControlPlane, StoreConfig, TlsConfig};
use weir_proto::{manifest, v1};
use weir_runtime::{AllowedHost, Cidr, Secret, exit, flush_logs_at_end, init_logs, say, shutdown_on_signals};

/// Stores resources, sends them to gateways, and computes the health of backends.
#[derive(Parser)]
#[command(name = "weir-control-plane", version = weir_runtime::version())]
struct Args {
    /// Address of the admin, discovery and report services.
    #[arg(long, env = "WEIR_LISTEN", default_value = "127.0.0.1:7070", value_name = "HOST:PORT")]
    listen: SocketAddr,
    /// Address of the live page, /livez, /readyz and /metrics.
    #[arg(long, env = "WEIR_HTTP_LISTEN", default_value = "127.0.0.1:7080", value_name = "HOST:PORT")]
    http_listen: SocketAddr,
    /// Name under which the page and the operations pages may be asked for, such as weir.example.com or *.example.com; may
    /// be repeated. Addresses, localhost, names without dots and private suffixes (.svc, .internal) need none.
    #[arg(
        long = "ops-allowed-host",
        env = "WEIR_OPS_ALLOWED_HOSTS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    ops_allowed_hosts: Vec<AllowedHost>,
    /// Directory of the store and the admin token; created if missing.
    #[arg(long, env = "WEIR_DATA_DIR", default_value = ".weir/control-plane", value_name = "DIR")]
    data_dir: PathBuf,
    /// Keep resources in memory only; they are lost when the process ends.
    #[arg(long, env = "WEIR_STORE_IN_MEMORY")]
    store_in_memory: bool,
    /// Keep resources in etcd, for several control planes: etcd://[USER@]HOST:PORT[,HOST:PORT...][/PREFIX], etcds:// for TLS.
    /// Without it they are in a file of the data directory, for one control plane.
    #[arg(long, env = "WEIR_STORE", value_name = "URL", conflicts_with = "store_in_memory", value_parser = EtcdConfig::parse)]
    store: Option<EtcdConfig>,
    /// A file with the password of etcd's user. Also as WEIR_STORE_PASSWORD.
    #[arg(long, env = "WEIR_STORE_PASSWORD_FILE", value_name = "FILE", requires = "store")]
    store_password_file: Option<PathBuf>,
    /// CA certificate (PEM) of etcd. Default: the CA certificates of the system.
    #[arg(long, env = "WEIR_STORE_CA", value_name = "FILE", requires = "store")]
    store_ca: Option<PathBuf>,
    /// Client certificate (PEM) for etcd.
    #[arg(long, env = "WEIR_STORE_CERT", value_name = "FILE", requires = "store_key")]
    store_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate.
    #[arg(long, env = "WEIR_STORE_KEY", value_name = "FILE", requires = "store_cert")]
    store_key: Option<PathBuf>,
    /// File of resources to start with, as for `weir apply`. Ignored if the store has held any resource.
    #[arg(long, env = "WEIR_BOOTSTRAP", value_name = "FILE")]
    bootstrap: Option<PathBuf>,
    /// A backup, as `weir backup` writes it, to make the store from. The store gets a new epoch, so gateways take no
    /// mass removal from it. Refused when there is a store that holds anything; start without this afterwards.
    #[arg(long, value_name = "FILE", conflicts_with = "store_in_memory")]
    restore: Option<PathBuf>,
    /// File with the admin token, at least 16 characters. Also as WEIR_ADMIN_TOKEN.
    #[arg(long, env = "WEIR_ADMIN_TOKEN_FILE", value_name = "FILE")]
    admin_token_file: Option<PathBuf>,
    /// File with the token for configuration and report streams only. Also as WEIR_GATEWAY_TOKEN.
    #[arg(long, env = "WEIR_GATEWAY_TOKEN_FILE", value_name = "FILE")]
    gateway_token_file: Option<PathBuf>,
    /// A directory of tokens that are each bound to one gateway or limit service: a file is named by its id and holds its
    /// token, at least 16 characters. Read again every few seconds.
    #[arg(long, env = "WEIR_GATEWAY_TOKENS_DIR", value_name = "DIR")]
    gateway_tokens_dir: Option<PathBuf>,
    /// Certificate chain (PEM) to serve gRPC over TLS alone; read again when it changes.
    #[arg(long, env = "WEIR_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate.
    #[arg(long, env = "WEIR_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// CA certificate (PEM) of client certificates. Their URI name is the identity: weir://gateway/ID or weir://ROLE/NAME.
    #[arg(long, env = "WEIR_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// Networks in which backends are probed although such addresses are refused: link-local ones, where clouds keep
    /// credentials, and other metadata services, such as 169.254.10.0/24,fe80::/10. The same as of the gateways.
    #[arg(long, env = "WEIR_ALLOW_BACKEND_CIDR", value_delimiter = ',', value_name = "CIDR[,CIDR...]")]
    allow_backend_cidr: Vec<Cidr>,
    /// Log filter: a level, or levels by target.
    #[arg(long, env = "WEIR_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Dropped after the runtime, so that the last log lines of its tasks are written.
    let _flush = flush_logs_at_end();
    if let Err(message) = init_logs(&args.log) {
        return failed(exit::CONFIG, &message);
    }
    let restore = args.restore.clone();
    let config = match config(args) {
        Ok(config) => config,
        Err(message) => return failed(exit::CONFIG, &message),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return failed(exit::FAILED, &e.to_string()),
    };
    match runtime.block_on(run(config, restore)) {
        Ok(()) => ExitCode::from(exit::DONE),
        Err(e) => failed(e.exit_code(), &e.to_string()),
    }
}

async fn run(config: Config, restore: Option<PathBuf>) -> Result<(), weir_control_plane::Error> {
    if let Some(from) = restore {
        let revision = match &config.store {
            StoreConfig::File(path) => FileStore::restore(path, &from)?,
            StoreConfig::Etcd { etcd, .. } => EtcdStore::restore(etcd.clone(), &from).await?,
            // Refused with the arguments.
            StoreConfig::Memory => 0,
        };
        tracing::info!(revision, from = %from.display(), "the store is restored");
    }
    let failed = |e: &dyn std::fmt::Display| weir_control_plane::Error::Failed(e.to_string());
    let (shutdown, force) = (CancellationToken::new(), CancellationToken::new());
    let mut running = ControlPlane::start(config, shutdown.clone()).await?;
    tokio::select! {
        ended = &mut running.join => return ended.map_err(|e| failed(&e))?,
        signals = shutdown_on_signals(shutdown.clone(), force.clone()) => signals.map_err(|e| failed(&e))?,
    }
    // A second signal: what is still open is cut.
    Ok(())
}

fn config(args: Args) -> Result<Config, String> {
    let store = if args.store_in_memory {
        StoreConfig::Memory
    } else if let Some(etcd) = args.store {
        let etcd = EtcdConfig {
            password: token("store-password-file", args.store_password_file, "WEIR_STORE_PASSWORD")?,
            ca: args.store_ca,
            own: args.store_cert.zip(args.store_key),
            ..etcd
        };
        StoreConfig::Etcd { etcd, data_dir: args.data_dir }
    } else {
        StoreConfig::File(args.data_dir.join("store.redb"))
    };
    Ok(Config {
        listen: args.listen,
        http_listen: args.http_listen,
        ops_allowed_hosts: args.ops_allowed_hosts,
        store,
        bootstrap: args.bootstrap.as_deref().map(bootstrap).transpose()?.unwrap_or_default(),
        admin_token: token("admin-token-file", args.admin_token_file, "WEIR_ADMIN_TOKEN")?,
        gateway_token: token("gateway-token-file", args.gateway_token_file, "WEIR_GATEWAY_TOKEN")?,
        gateway_tokens: args.gateway_tokens_dir,
        tls: args.tls_cert.zip(args.tls_key).map(|(cert, key)| TlsConfig {
            cert,
            key,
            client_ca: args.tls_client_ca,
        }),
        allow_backend_cidr: args.allow_backend_cidr,
    })
}

/// The resources of a file.
fn bootstrap(path: &Path) -> Result<Vec<v1::Resource>, String> {
    let name = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|e| {
        format!("--bootstrap {name}: {e}; name a file that can be read, or leave --bootstrap out")
    })?;
    manifest::parse(&text, &name).map_err(|e| format!("--bootstrap: {e}"))
}

/// A token or a password from its file or its variable. It is no flag: those are seen in the list of processes.
fn token(flag: &str, file: Option<PathBuf>, variable: &str) -> Result<Option<Secret>, String> {
    let text = match file {
        Some(path) => {
            std::fs::read_to_string(&path).map_err(|e| format!("{flag}: {}: {e}", path.display()))?
        }
        None => match std::env::var(variable) {
            Ok(text) => text,
            Err(_) => return Ok(None),
        },
    };
    Ok(Some(Secret::new(text.trim().to_owned())))
}

fn failed(code: u8, message: &str) -> ExitCode {
    say(&format!("weir-control-plane: {message}"));
    ExitCode::from(code)
}
