//! The arguments.

mod defaults;
mod groups;
mod up;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use weir_proto::resource::Name;
use weir_proto::{manifest, v1};

pub(crate) use defaults::fill;
pub use groups::{
    AuditArgs, BackupArgs, ContextCommand, DrainArgs, GatewayCommand, KnownEntry, ProbeArgs, Reference,
    RoleName, RollbackArgs, TierName, TokenCommand, UsageArgs, UsageBy, WatchArgs,
};
pub use up::UpArgs;

/// Manages a Weir cluster: resources, keys, gateways.
///
/// The token of the control plane is taken from the file of --token-file or from the variable WEIR_TOKEN, never from
/// the command line, where other users could read it.
#[derive(Debug, Clone, Parser)]
#[command(name = "weir", version = weir_runtime::version(), propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Address of the control plane; of several with one store all, with commas between: the first that answers is asked
    #[arg(
        long,
        global = true,
        env = "WEIR_SERVER",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL[,URL...]"
    )]
    pub server: Servers,
    /// File with the token of the control plane; takes precedence over WEIR_TOKEN
    #[arg(long, global = true, env = "WEIR_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Who signs the control plane's certificate (PEM); without it, who the system trusts
    #[arg(long, global = true, env = "WEIR_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Certificate (PEM) to show instead of a token
    #[arg(long, global = true, env = "WEIR_CERT", value_name = "FILE", requires = "cert_key")]
    pub cert: Option<PathBuf>,
    /// Private key (PEM) of that certificate
    // Not --key: that is an API key's name, and one id with two types panics when it is read.
    #[arg(
        long = "cert-key",
        id = "cert_key",
        global = true,
        env = "WEIR_KEY",
        value_name = "FILE",
        requires = "cert"
    )]
    pub key: Option<PathBuf>,
    /// Cluster to speak to, of those made by weir context set; without it the one in use. Whoever names a server uses none
    #[arg(long, global = true, env = "WEIR_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
    /// The variable that holds the token, when it is another than WEIR_TOKEN: of a context.
    #[arg(skip)]
    pub token_env: Option<String>,
    /// Form of the results
    #[arg(long, short = 'o', global = true, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
    /// How long each call may take, with a unit: 250ms, 10s, 1m
    #[arg(long, global = true, env = "WEIR_TIMEOUT", value_parser = positive, default_value = "10s", value_name = "DURATION")]
    pub timeout: Duration,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run everything in this process: control plane, gateways, limits, and three simulated regions
    Up(UpArgs),
    /// Show a resource, or all of a kind
    Get {
        /// pool, backend, model, tenant, key or limit; plural and short forms (be, mo, te, li, po) too
        kind: Kind,
        /// Its name; without one all of the kind
        name: Option<String>,
    },
    /// Show all resources of a kind
    #[command(visible_alias = "ls")]
    List {
        /// As in get
        kind: Kind,
    },
    /// Show everything about a resource, with what the cluster says of it
    Describe {
        /// As in get
        kind: Kind,
        /// Its name
        name: String,
    },
    /// Make the cluster hold what files say: all of it or nothing
    Apply(ApplyArgs),
    /// Show what apply would change; exits with 0 for nothing, 1 for differences, more for errors
    Diff(FileArgs),
    /// Delete a resource
    Delete {
        /// As in get
        kind: Kind,
        /// Its name
        name: String,
        /// Refuse when the resource has changed since this etag was read
        #[arg(long)]
        etag: Option<String>,
        /// Allow that a pool loses more than half of its backends
        #[arg(long)]
        allow_mass_removal: bool,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Change a resource in your editor: VISUAL, EDITOR, or vi
    Edit {
        /// As in get
        kind: Kind,
        /// Its name
        name: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Show the fields of a kind and what they mean, or one field, such as pool.timeouts
    Explain {
        /// KIND or KIND.FIELD
        what: String,
    },
    /// Show changes as they happen
    Watch(WatchArgs),
    /// Show what happened to a resource, or to all, the newest first
    History {
        /// As in get; without one all
        kind: Option<Kind>,
        /// Its name
        #[arg(requires = "kind")]
        name: Option<String>,
        /// At most so many entries
        #[arg(long, short = 'n', default_value_t = 20, value_name = "N")]
        last: usize,
    },
    /// Show who changed what, or check that the log is whole
    Audit(AuditArgs),
    /// Make resources again what they were at a revision
    Rollback(RollbackArgs),
    /// Wait until every connected gateway holds a revision
    Wait {
        /// The revision; without one the newest
        revision: Option<u64>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Verify what can be verified of the cluster, each with its remedy
    Check,
    /// Send no new requests to a backend, and wait until those in progress have ended
    Drain(DrainArgs),
    /// Use a drained backend again
    Undrain(BackendRef),
    /// Neither use nor probe a backend
    Disable(BackendRef),
    /// Use a disabled backend again
    Enable(BackendRef),
    /// Set a backend's share of its pool's requests
    Weight {
        /// Its name
        backend: String,
        /// Share relative to the others, 0 to 10000; 0: only when nothing else is left
        #[arg(value_parser = clap::value_parser!(u32).range(0..=10_000))]
        weight: u32,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Make, revoke, rotate and list API keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show how limits stand
    #[command(subcommand)]
    Limits(LimitsCommand),
    /// Show who used what: requests, tokens and cost by tenant, model and day
    Usage(UsageArgs),
    /// Make, revoke, rotate and list tokens of the control plane
    #[command(subcommand)]
    Token(TokenCommand),
    /// Show who the control plane takes you for
    Whoami,
    /// Write a copy of the store to a file; weir-control-plane --restore takes it
    Backup(BackupArgs),
    /// Show the gateways: how each stands, the revision it holds and how old that is
    Gateways,
    /// Show what one gateway holds, and where that differs from what it is to hold
    #[command(subcommand)]
    Gateway(GatewayCommand),
    /// Show the health, weight and load of the backends, and who probes them
    Backends,
    /// Show what a backend's verdict rests on, and when it may return
    Why {
        /// Its name
        backend: String,
    },
    /// Have a backend looked at now by those who look at it anyway, and show what each saw; exits with 1 unless all is well
    Probe(ProbeArgs),
    /// Show what happened to the health of backends, pools and gateways lately
    Events {
        /// Only of this backend, pool or gateway
        subject: Option<String>,
    },
    /// Ask any process of Weir whether it is well: exits with 0 when it is
    Health {
        /// A page of its operations port, such as http://127.0.0.1:9100/readyz
        #[arg(value_parser = health_url)]
        url: http::Uri,
    },
    /// Make resources of another gateway's configuration; prints them and changes nothing
    #[command(subcommand)]
    Import(ImportCommand),
    /// Show, choose and make contexts: named clusters, each with where its token is
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print a completion script for a shell
    #[command(visible_alias = "completion")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// Whose configuration to read.
#[derive(Debug, Clone, Subcommand)]
pub enum ImportCommand {
    /// LiteLLM's config.yaml
    Litellm {
        /// The file
        file: PathBuf,
    },
}

/// A backend to change.
#[derive(Debug, Clone, Args)]
pub struct BackendRef {
    /// Its name
    pub backend: String,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// Which resources are meant.
#[derive(Debug, Clone, Args)]
pub struct FileArgs {
    /// File of resources, - for standard input; may be repeated
    #[arg(long = "file", short = 'f', required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Delete the resources of the same set that the files do not name
    #[arg(long)]
    pub prune: bool,
    /// Name of the set the resources belong to
    #[arg(long, default_value = "default", value_name = "NAME")]
    pub set: String,
    /// Allow that a pool loses more than half of its backends
    #[arg(long)]
    pub allow_mass_removal: bool,
    /// Take over resources that belong to another set
    #[arg(long)]
    pub take_over: bool,
}

/// The arguments of apply.
#[derive(Debug, Clone, Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub files: FileArgs,
    /// Say what would change, change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// How long a change waits until the gateways hold it.
#[derive(Debug, Clone, Copy, Args)]
pub struct WaitArgs {
    /// How long to wait until every connected gateway holds the change, at most 60s
    #[arg(long, value_parser = wait, default_value = "10s", value_name = "DURATION")]
    pub wait: Duration,
    /// Do not wait for the gateways
    #[arg(long, conflicts_with = "wait")]
    pub no_wait: bool,
}

/// What to do with API keys.
#[derive(Debug, Clone, Subcommand)]
pub enum KeyCommand {
    /// Make a key; it is shown once and stored nowhere
    Create {
        /// Name of its resource
        name: String,
        /// Whose it is
        #[arg(long, value_name = "TENANT")]
        tenant: String,
        /// A model it may use; may be repeated. None: all the tenant may
        #[arg(long = "model", value_name = "MODEL")]
        models: Vec<String>,
        /// For how long it is valid, such as 30d; without it for ever
        #[arg(long, value_parser = positive, value_name = "DURATION")]
        expires: Option<Duration>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Refuse a key from now on and keep its record
    Revoke {
        /// Name of its resource
        name: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Make a new key in place of the present one, which stays valid for a while
    Rotate {
        /// Name of its resource
        name: String,
        /// How long the present key stays valid
        #[arg(long, value_parser = duration, default_value = "24h", value_name = "DURATION")]
        grace: Duration,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Show all keys, never their secrets
    List,
}

/// What to show of limits.
#[derive(Debug, Clone, Subcommand)]
pub enum LimitsCommand {
    /// Show every limit between a key and a model: what it has left and whether it would refuse a request now
    Explain {
        /// Name of the API key's resource; its secret is not needed
        #[arg(long, value_parser = name, value_name = "NAME")]
        key: Name,
        /// Name of the model's resource
        #[arg(long, value_parser = name, value_name = "NAME")]
        model: Name,
        /// A gateway's operations port
        #[arg(long, value_parser = health_url, env = "WEIR_GATEWAY_OPS", default_value = "http://127.0.0.1:9100", value_name = "URL")]
        gateway: http::Uri,
        /// File with that port's token; without it WEIR_OPS_TOKEN and, to this machine, the control plane's token
        #[arg(long, env = "WEIR_OPS_TOKEN_FILE", value_name = "FILE")]
        ops_token_file: Option<PathBuf>,
        /// Prompt tokens of the request that is imagined
        #[arg(long, value_name = "N")]
        input_tokens: Option<u64>,
        /// Tokens of its answer; without either what answers of this model to this tenant usually have
        #[arg(long, value_name = "N")]
        output_tokens: Option<u64>,
    },
}

/// The form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Columns for people
    Table,
    /// More columns
    Wide,
    /// One JSON value
    Json,
    /// Documents as apply reads them, for resources; otherwise as json
    Yaml,
}

/// A kind of resources, by any of its names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind(pub v1::ResourceKind);

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        use v1::ResourceKind as K;
        Ok(Self(match text.to_ascii_lowercase().replace('-', "_").as_str() {
            "pool" | "pools" | "po" => K::Pool,
            "backend" | "backends" | "be" => K::Backend,
            "model" | "models" | "mo" => K::Model,
            "tenant" | "tenants" | "te" => K::Tenant,
            "api_key" | "api_keys" | "apikey" | "apikeys" | "key" | "keys" | "ak" => K::ApiKey,
            "limit" | "limits" | "li" => K::Limit,
            "descriptor_rule" | "descriptor_rules" | "rule" | "rules" => K::DescriptorRule,
            _ => return Err("there are pool, backend, model, tenant, key and limit".to_owned()),
        }))
    }
}

/// The addresses of the control planes, at least one; http is meant where no scheme is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Servers(Vec<String>);

impl Servers {
    /// The addresses with their schemes.
    pub fn all(&self) -> &[String] {
        &self.0
    }
}

impl std::fmt::Display for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl FromStr for Servers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(|one| server(one.trim())).collect::<Result<_, _>>().map(Self)
    }
}

fn server(text: &str) -> Result<String, String> {
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    match full.parse::<http::Uri>() {
        Ok(uri)
            if matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.authority().is_some_and(|a| !a.as_str().contains('@')) =>
        {
            Ok(full)
        }
        _ => {
            Err("must be an address such as http://127.0.0.1:7070, or several with commas between".to_owned())
        }
    }
}

fn name(text: &str) -> Result<Name, String> {
    Name::parse(text).map_err(str::to_owned)
}

fn health_url(text: &str) -> Result<http::Uri, String> {
    match text.parse::<http::Uri>() {
        Ok(uri) if uri.scheme_str() == Some("http") && uri.host().is_some() => Ok(uri),
        _ => Err("must be an address such as http://127.0.0.1:9100/readyz".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    manifest::parse_duration(text).map_err(|e| e.to_string())
}

fn positive(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|d| if d.is_zero() { Err("must be above 0s".to_owned()) } else { Ok(d) })
}

fn wait(text: &str) -> Result<Duration, String> {
    let d = positive(text)?;
    if d > Duration::from_secs(60) { Err("must be at most 60s".to_owned()) } else { Ok(d) }
}

#[cfg(test)]
mod tests;
