//! The command-line arguments of `weir`.

mod defaults;
mod definition;
mod groups;
mod up;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use weir_proto::resource::{KINDS, Name, kind_name};
use weir_proto::{manifest, v1};

pub(crate) use defaults::fill;
pub(crate) use definition::{command, refuse_unused};
pub use groups::{
    AuditArgs, BackupArgs, ContextCommand, DrainArgs, GatewayCommand, KnownEntry, ProbeArgs, Reference,
    RoleName, RollbackArgs, TierName, TokenCommand, UsageArgs, UsageBy, WatchArgs,
};
pub use up::UpArgs;

/// The heading of the options that most commands take, after those of the command itself.
const GLOBAL: &str = "Global options";

/// Manages a Weir cluster: resources, keys, gateways.
///
/// The token of the control plane is taken from the file of --token-file or from the variable WEIR_TOKEN, never from
/// the command line, where other users could read it.
#[derive(Debug, Clone, Parser)]
#[command(name = "weir", version = weir_runtime::version(), propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// Address of the control plane; with several control planes of one store a comma-separated list: the first that answers is used
    #[arg(
        long,
        global = true, help_heading = GLOBAL,
        env = "WEIR_SERVER",
        default_value = "http://127.0.0.1:7070",
        value_name = "URL[,URL...]"
    )]
    pub server: Servers,
    /// File with the token of the control plane; takes precedence over WEIR_TOKEN
    #[arg(long, global = true, help_heading = GLOBAL, env = "WEIR_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// CA certificate (PEM) that signs the control plane's certificate; default: the system's CA certificates
    #[arg(long, global = true, help_heading = GLOBAL, env = "WEIR_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Client certificate (PEM), used instead of a token
    #[arg(long, global = true, help_heading = GLOBAL, env = "WEIR_CERT", value_name = "FILE", requires = "cert_key")]
    pub cert: Option<PathBuf>,
    /// Private key (PEM) of the client certificate
    // Not --key, which is the name of an API key: clap panics when one id has two types.
    #[arg(
        long = "cert-key",
        id = "cert_key",
        global = true, help_heading = GLOBAL,
        env = "WEIR_KEY",
        value_name = "FILE",
        requires = "cert"
    )]
    pub key: Option<PathBuf>,
    /// Context (a named cluster, see weir context set) to use instead of the current one; ignored with --server
    #[arg(long, global = true, help_heading = GLOBAL, env = "WEIR_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,
    /// The environment variable that holds the token of a context, if it is not WEIR_TOKEN.
    #[arg(skip)]
    pub token_env: Option<String>,
    /// Format of the results
    #[arg(long, short = 'o', global = true, help_heading = GLOBAL, value_enum, default_value_t = OutputFormat::Table)]
    pub output: OutputFormat,
    /// Timeout of each call, with a unit: 250ms, 10s, 1m
    #[arg(long, global = true, help_heading = GLOBAL, env = "WEIR_TIMEOUT", value_parser = positive, default_value = "10s", value_name = "DURATION")]
    pub timeout: Duration,
    /// The command
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Run control plane, gateways, limits and three simulated regions in this process
    Up(UpArgs),
    /// Show a resource, or all of a kind
    Get {
        /// pool, backend, model, tenant, api_key, limit or descriptor_rule; plural and short forms (po, be, mo, te, key, li, rule) too
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
    /// Show all fields of a resource, and its status in the cluster
    Describe {
        /// As in get
        kind: Kind,
        /// Its name
        name: String,
    },
    /// Create and change resources from files, in one transaction
    Apply(ApplyArgs),
    /// Show what apply would change; exits with 0 without differences, 1 with differences, more on errors
    Diff(FileArgs),
    /// Delete a resource
    Delete(DeleteArgs),
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
    /// List the kinds of resources, or explain a kind, a field or its values
    Explain {
        /// KIND or KIND.FIELD, such as pool.timeouts; without one the kinds
        #[arg(value_name = "KIND[.FIELD]")]
        what: Option<String>,
        /// Print the reference of all kinds as a page of Markdown
        #[arg(long, conflicts_with = "what")]
        markdown: bool,
    },
    /// Stream changes of resources
    Watch(WatchArgs),
    /// Show the changes of one resource or of all, newest first
    History {
        /// As in get; without one all
        kind: Option<Kind>,
        /// Its name
        #[arg(requires = "kind")]
        name: Option<String>,
        /// Maximum number of entries
        #[arg(long, short = 'n', default_value_t = 20, value_name = "N")]
        last: usize,
    },
    /// Show the audit log, or verify its hash chain
    Audit(AuditArgs),
    /// Restore resources to an earlier revision
    Rollback(RollbackArgs),
    /// Wait until every connected gateway has applied a revision
    Wait {
        /// The revision; without one the newest
        revision: Option<u64>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Check the cluster, with a remedy for each problem
    Check,
    /// Send no new requests to a backend, and wait until its requests in progress have ended
    Drain(DrainArgs),
    /// Use a drained backend again
    Undrain(BackendRef),
    /// Stop using and probing a backend
    Disable(BackendRef),
    /// Use a disabled backend again
    Enable(BackendRef),
    /// Set the weight of a backend
    Weight {
        /// Its name
        backend: String,
        /// Weight relative to the other backends of the pool, 0 to 10000; 0: used only when no other backend is usable
        #[arg(value_parser = clap::value_parser!(u32).range(0..=10_000))]
        weight: u32,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Create, revoke, rotate and list API keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show the state of limits
    #[command(subcommand)]
    Limits(LimitsCommand),
    /// Show usage: requests, tokens and cost by tenant, model and day
    Usage(UsageArgs),
    /// Create, revoke, rotate and list tokens of the control plane
    #[command(subcommand)]
    Token(TokenCommand),
    /// Show your identity and role at the control plane
    Whoami,
    /// Write a copy of the store to a file, for weir-control-plane --restore
    Backup(BackupArgs),
    /// Show the gateways: state, applied revision and its age
    Gateways,
    /// Show the applied resources of one gateway, and where they differ from the newest revision
    #[command(subcommand)]
    Gateway(GatewayCommand),
    /// Show health, weight, load and observers of the backends
    Backends,
    /// Show the votes behind a backend's verdict, and when the backend may recover
    Why {
        /// Its name
        backend: String,
    },
    /// Have the observers of a backend probe it now, and show each result; exits with 1 unless every probe passes
    Probe(ProbeArgs),
    /// Show recent health events of backends, pools and gateways
    Events {
        /// Only of this backend, pool or gateway
        subject: Option<String>,
    },
    /// Check the health of any Weir process: exits with 0 if it is healthy
    Health {
        /// Address of its operations port, such as http://127.0.0.1:9100; a page of it other than /readyz may be named
        #[arg(value_parser = health_url)]
        url: http::Uri,
    },
    /// Convert another gateway's configuration to resources; prints them and changes nothing
    #[command(subcommand)]
    Import(ImportCommand),
    /// List, choose and set contexts: named clusters with the place of their token
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print a completion script for a shell
    #[command(visible_alias = "completion")]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// The format to import.
#[derive(Debug, Clone, Subcommand)]
pub enum ImportCommand {
    /// LiteLLM's config.yaml
    Litellm {
        /// The file
        file: PathBuf,
    },
    /// A rule file of envoyproxy/ratelimit: the limits of one domain
    Ratelimit {
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

/// What delete removes.
#[derive(Debug, Clone, Args)]
pub struct DeleteArgs {
    /// As in get
    pub kind: Kind,
    /// Its name
    pub name: String,
    /// Fail if the resource has changed since this etag was read
    #[arg(long)]
    pub etag: Option<String>,
    /// Allow the removal of more than half of a pool's backends, or of all models, tenants or keys
    #[arg(long)]
    pub allow_mass_removal: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// The resources of apply and diff.
#[derive(Debug, Clone, Args)]
pub struct FileArgs {
    /// File of resources, directory of .yaml, .yml and .json files, or - for standard input; may be repeated
    #[arg(long = "file", short = 'f', required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Delete resources of the same set that are not in the files
    #[arg(long)]
    pub prune: bool,
    /// Name of the set the resources belong to
    #[arg(long, default_value = "default", value_name = "NAME")]
    pub set: String,
    /// Allow the removal of more than half of a pool's backends, or of all models, tenants or keys
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
    /// Show what would change and change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// How long a command waits until the gateways have applied its change.
#[derive(Debug, Clone, Copy, Args)]
pub struct WaitArgs {
    /// How long to wait until every connected gateway has applied the change, at most 60s
    #[arg(long, value_parser = wait, default_value = "10s", value_name = "DURATION")]
    pub wait: Duration,
    /// Do not wait for the gateways
    #[arg(long, conflicts_with = "wait")]
    pub no_wait: bool,
}

/// Commands for API keys.
#[derive(Debug, Clone, Subcommand)]
pub enum KeyCommand {
    /// Create a key; it is shown once and not stored
    Create {
        /// Name of its resource
        name: String,
        /// The tenant of the key
        #[arg(long, value_name = "TENANT")]
        tenant: String,
        /// A model that the key may use; may be repeated. Default: all models of the tenant
        #[arg(long = "model", value_name = "MODEL")]
        models: Vec<String>,
        /// How long the key is valid, such as 30d. Default: without end
        #[arg(long, value_parser = positive, value_name = "DURATION")]
        expires: Option<Duration>,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Revoke a key; its resource stays
    Revoke {
        /// Name of its resource
        name: String,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Replace a key; the old one stays valid for the grace time
    Rotate {
        /// Name of its resource
        name: String,
        /// How long the old key stays valid
        #[arg(long, value_parser = duration, default_value = "24h", value_name = "DURATION")]
        grace: Duration,
        #[command(flatten)]
        #[expect(missing_docs, reason = "flattened: a comment would become help")]
        wait: WaitArgs,
    },
    /// Show all keys, never their secrets
    List,
}

/// Commands for limits.
#[derive(Debug, Clone, Subcommand)]
pub enum LimitsCommand {
    /// Show every limit of a key and a model: what it allows, what is used, and whether it would refuse a request now
    Explain {
        /// Name of the API key's resource; its secret is not needed
        #[arg(long, value_parser = name, value_name = "NAME")]
        key: Name,
        /// Name of the model's resource
        #[arg(long, value_parser = name, value_name = "NAME")]
        model: Name,
        /// Prompt tokens of the imagined request
        #[arg(long, value_name = "N")]
        input_tokens: Option<u64>,
        /// Output tokens of the imagined request. Default: the usual number for this model and tenant
        #[arg(long, value_name = "N")]
        output_tokens: Option<u64>,
        /// Ask this gateway instead of the control plane: URL of its operations port
        #[arg(long, value_parser = health_url, value_name = "URL")]
        gateway: Option<http::Uri>,
        /// With --gateway: file with the token of its operations port. Default: WEIR_OPS_TOKEN, or the control plane's token on this machine
        #[arg(long, env = "WEIR_OPS_TOKEN_FILE", value_name = "FILE")]
        ops_token_file: Option<PathBuf>,
    },
}

/// The format of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Columns
    Table,
    /// More columns
    Wide,
    /// One JSON value
    Json,
    /// For resources, documents as apply reads them; otherwise the same as json
    Yaml,
}

/// A kind of resources, by its name, plural or short form.
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
            _ => {
                return Err(format!(
                    "there are {}; weir explain says what they are",
                    KINDS.map(kind_name).join(", ")
                ));
            }
        }))
    }
}

/// The addresses of the control planes, at least one. Without a scheme, http is used.
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

const NO_PORT: &str = "there is no such port; ports are 1 to 65535";

/// Whether an address has no port, or one that exists. Of one that does not, clients use another.
fn has_port(uri: &http::Uri) -> bool {
    let given = uri.authority().and_then(|authority| authority.as_str().rsplit_once(':'));
    let given = given.map(|(_, port)| port).filter(|port| !port.ends_with(']') && !port.contains('@'));
    given.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn server(text: &str) -> Result<String, String> {
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    match full.parse::<http::Uri>() {
        Ok(uri) if !has_port(&uri) => Err(NO_PORT.to_owned()),
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
        Ok(uri) if !has_port(&uri) => Err(NO_PORT.to_owned()),
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
