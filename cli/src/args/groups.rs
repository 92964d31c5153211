//! The arguments of the commands that look at the cluster and its past.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use data_encoding::HEXLOWER_PERMISSIVE;
use weir_proto::resource::Name;
use weir_proto::v1;

use super::{Kind, WaitArgs, duration, health_url, name, positive, wait};
use crate::contexts;

/// A resource, as KIND/NAME.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference(pub v1::ResourceRef);

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, name) = text.split_once('/').ok_or("must be KIND/NAME, such as backend/sgp-1")?;
        let Kind(kind) = kind.parse()?;
        Ok(Self(v1::ResourceRef { kind: kind.into(), name: name.to_owned() }))
    }
}

/// An entry of the audit log whose hash is known, as SEQUENCE:HASH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownEntry {
    /// Which entry.
    pub sequence: u64,
    /// Its hash.
    pub hash: Vec<u8>,
}

impl FromStr for KnownEntry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rule = "must be SEQUENCE:HASH as weir audit --verify prints them";
        let (sequence, digits) = text.split_once(':').ok_or(rule)?;
        let sequence = sequence.parse().map_err(|_| rule)?;
        let hash = HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).map_err(|_| rule)?;
        if hash.len() == 32 { Ok(Self { sequence, hash }) } else { Err(rule.to_owned()) }
    }
}

/// What to follow.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Only this kind; may be repeated
    #[arg(value_name = "KIND")]
    pub kinds: Vec<Kind>,
    /// Changes after this revision; without it everything there is comes first
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    pub from: u64,
    /// End after what is there, before the first change
    #[arg(long)]
    pub once: bool,
}

/// Which part of the audit log.
#[derive(Debug, Clone, Args)]
pub struct AuditArgs {
    /// At most so many entries
    #[arg(long, short = 'n', default_value_t = 20, value_name = "N")]
    pub last: usize,
    /// Recompute the hash chain instead; fails when it is broken
    #[arg(long)]
    pub verify: bool,
    /// An entry known from an earlier --verify: shows that the log was not rewritten as a whole
    #[arg(long, requires = "verify", value_name = "SEQUENCE:HASH")]
    pub known: Option<KnownEntry>,
}

/// What to go back to.
#[derive(Debug, Clone, Args)]
pub struct RollbackArgs {
    /// The revision to go back to; weir history shows them
    pub revision: u64,
    /// Only these, as KIND/NAME. None: all but API keys, which come back only when named
    #[arg(value_name = "KIND/NAME")]
    pub resources: Vec<Reference>,
    /// Say what would change, change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Allow that a pool loses more than half of its backends
    #[arg(long)]
    pub allow_mass_removal: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// What to see of one gateway.
#[derive(Debug, Clone, Subcommand)]
pub enum GatewayCommand {
    /// Show what it holds
    Config {
        /// Its id
        id: String,
    },
    /// Show where that differs from what it is to hold; exits with 0 for nothing, 1 for differences, more for errors
    Diff {
        /// Its id
        id: String,
    },
}

/// A backend to drain.
#[derive(Debug, Clone, Args)]
pub struct DrainArgs {
    /// Its name
    pub backend: String,
    /// How long to wait until its last stream has ended
    #[arg(long, value_parser = positive, default_value = "10m", value_name = "DURATION")]
    pub wait: Duration,
    /// Do not wait
    #[arg(long, conflicts_with = "wait")]
    pub no_wait: bool,
}

/// A role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleName {
    /// Reads everything but tokens
    Viewer,
    /// Changes weights and states of backends, drains
    Operator,
    /// Changes every resource, issues API keys, rolls back
    Editor,
    /// Manages tokens and takes backups
    Admin,
    /// Discovery and reports only
    Gateway,
}

impl RoleName {
    /// As the contract has it.
    pub const fn role(self) -> v1::Role {
        match self {
            Self::Viewer => v1::Role::Viewer,
            Self::Operator => v1::Role::Operator,
            Self::Editor => v1::Role::Editor,
            Self::Admin => v1::Role::Admin,
            Self::Gateway => v1::Role::Gateway,
        }
    }
}

/// What to do with tokens of the control plane.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenCommand {
    /// Make a token; it is shown once and stored nowhere
    Create {
        /// Its name, which the audit log shows
        name: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: RoleName,
        /// Of role gateway: the one gateway it speaks for
        #[arg(long, value_name = "ID")]
        gateway: Option<String>,
        /// For how long it is valid, such as 90d; without it for ever
        #[arg(long, value_parser = positive, value_name = "DURATION")]
        expires: Option<Duration>,
    },
    /// Make a new secret in place of the present one, which stays valid for a while
    Rotate {
        /// Its name
        name: String,
        /// How long the present secret stays valid
        #[arg(long, value_parser = duration, default_value = "1h", value_name = "DURATION")]
        grace: Duration,
    },
    /// Refuse a token from now on
    Revoke {
        /// Its name
        name: String,
    },
    /// Show all tokens, never their secrets
    List,
}

/// Whose usage to show, of which days, and how it is added up.
#[derive(Debug, Clone, Args)]
pub struct UsageArgs {
    /// Only of this tenant; also of one that has been deleted
    #[arg(long, value_parser = name, value_name = "NAME")]
    pub tenant: Option<Name>,
    /// Only of this model
    #[arg(long, value_parser = name, value_name = "NAME")]
    pub model: Option<Name>,
    /// First day, UTC, such as 2026-11-01; without it 29 days before the last
    #[arg(long, value_name = "DAY")]
    pub from: Option<jiff::civil::Date>,
    /// Last day, UTC; without it today
    #[arg(long, value_name = "DAY")]
    pub to: Option<jiff::civil::Date>,
    /// What to tell apart; the rest is added up
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [UsageBy::Tenant, UsageBy::Model, UsageBy::Day])]
    pub by: Vec<UsageBy>,
    /// A gateway's operations port
    #[arg(long, value_parser = health_url, env = "WEIR_GATEWAY_OPS", default_value = "http://127.0.0.1:9100", value_name = "URL")]
    pub gateway: http::Uri,
    /// File with that port's token; without it WEIR_OPS_TOKEN and, to this machine, the control plane's token
    #[arg(long, env = "WEIR_OPS_TOKEN_FILE", value_name = "FILE")]
    pub ops_token_file: Option<PathBuf>,
}

/// What usage is told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UsageBy {
    /// Who asked
    Tenant,
    /// What was asked
    Model,
    /// The day of the admission, UTC
    Day,
}

impl UsageBy {
    /// As the gateway's page has it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Model => "model",
            Self::Day => "day",
        }
    }
}

/// Where to put a backup.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// The file; refused when it is there already
    pub file: PathBuf,
}

/// How deep to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TierName {
    /// Whether the server answers; costs nothing
    Liveness,
    /// Whether the model answers; costs one token
    Readiness,
    /// How fast it answers; may cost some hundred tokens
    Deep,
}

impl TierName {
    /// As the contract has it.
    pub const fn tier(self) -> v1::ProbeTier {
        match self {
            Self::Liveness => v1::ProbeTier::Liveness,
            Self::Readiness => v1::ProbeTier::Readiness,
            Self::Deep => v1::ProbeTier::Deep,
        }
    }
}

/// A backend to look at.
#[derive(Debug, Clone, Args)]
pub struct ProbeArgs {
    /// Its name
    pub backend: String,
    /// How deep
    #[arg(long, value_enum, default_value_t = TierName::Liveness)]
    pub tier: TierName,
    /// How long to wait for the answers, at most 60s
    #[arg(long, value_parser = wait, default_value = "10s", value_name = "DURATION")]
    pub wait: Duration,
}

/// What to do with contexts.
#[derive(Debug, Clone, Subcommand)]
pub enum ContextCommand {
    /// Show all contexts, and which one is in use
    List,
    /// Speak to this cluster from now on
    Use {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
    },
    /// Make or replace a context of --server, --token-file, --ca, --cert and --cert-key as given
    Set {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
        /// The variable that holds its token, where it is in no file
        #[arg(long, value_name = "VARIABLE", conflicts_with = "token_file")]
        token_env: Option<String>,
        /// Speak to it from now on
        #[arg(long = "use")]
        switch: bool,
    },
    /// Forget a context
    Delete {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
    },
}
