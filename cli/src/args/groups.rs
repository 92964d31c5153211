//! The arguments of the commands for gateways, audit, tokens, usage, probes and contexts.

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
    /// The sequence number of the entry.
    pub sequence: u64,
    /// The hash of the entry.
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

/// The arguments of watch.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Only this kind; may be repeated
    #[arg(value_name = "KIND")]
    pub kinds: Vec<Kind>,
    /// Only changes after this revision. Default: all resources first, then changes
    #[arg(long, default_value_t = 0, value_name = "REVISION")]
    pub from: u64,
    /// End after the resources that exist, before the first change
    #[arg(long)]
    pub once: bool,
}

/// The arguments of audit.
#[derive(Debug, Clone, Args)]
pub struct AuditArgs {
    /// Maximum number of entries
    #[arg(long, short = 'n', default_value_t = 20, value_name = "N")]
    pub last: usize,
    /// Verify the hash chain instead; fails if it is broken
    #[arg(long)]
    pub verify: bool,
    /// An entry known from an earlier --verify; detects a log that was rewritten completely
    #[arg(long, requires = "verify", value_name = "SEQUENCE:HASH")]
    pub known: Option<KnownEntry>,
}

/// The arguments of rollback.
#[derive(Debug, Clone, Args)]
pub struct RollbackArgs {
    /// The revision to restore; weir history lists revisions
    pub revision: u64,
    /// Only these resources, as KIND/NAME. Default: all except API keys, which are restored only when named
    #[arg(value_name = "KIND/NAME")]
    pub resources: Vec<Reference>,
    /// Show what would change and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Allow the removal of more than half of a pool's backends, or of all models, tenants or keys
    #[arg(long)]
    pub allow_mass_removal: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "flattened: a comment would become help")]
    pub wait: WaitArgs,
}

/// Commands for one gateway.
#[derive(Debug, Clone, Subcommand)]
pub enum GatewayCommand {
    /// Show the resources that the gateway has applied, with their versions
    Config {
        /// Its id
        id: String,
    },
    /// Show where the applied resources differ from the newest revision; exits with 0 without differences, 1 with differences, more on errors
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
    /// How long to wait until the last request of the backend has ended
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
    /// Configuration and report streams only
    Gateway,
}

impl RoleName {
    /// The value in the protocol.
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

/// Commands for tokens of the control plane.
#[derive(Debug, Clone, Subcommand)]
pub enum TokenCommand {
    /// Create a token; it is shown once and not stored
    Create {
        /// Its name, which the audit log shows
        name: String,
        /// The role of the token
        #[arg(long, value_enum)]
        role: RoleName,
        /// With the role gateway: the only gateway that may use the token
        #[arg(long, value_name = "ID")]
        gateway: Option<String>,
        /// How long the token is valid, such as 90d. Default: without end
        #[arg(long, value_parser = positive, value_name = "DURATION")]
        expires: Option<Duration>,
    },
    /// Replace the secret of a token; the old one stays valid for the grace time
    Rotate {
        /// Its name
        name: String,
        /// How long the old secret stays valid
        #[arg(long, value_parser = duration, default_value = "1h", value_name = "DURATION")]
        grace: Duration,
    },
    /// Revoke a token
    Revoke {
        /// Its name
        name: String,
    },
    /// Show all tokens, never their secrets
    List,
}

/// The arguments of usage.
#[derive(Debug, Clone, Args)]
pub struct UsageArgs {
    /// Only this tenant, which may be deleted
    #[arg(long, value_parser = name, value_name = "NAME")]
    pub tenant: Option<Name>,
    /// Only this model
    #[arg(long, value_parser = name, value_name = "NAME")]
    pub model: Option<Name>,
    /// First day, UTC, such as 2026-11-01. Default: 29 days before the last day
    #[arg(long, value_name = "DAY")]
    pub from: Option<jiff::civil::Date>,
    /// Last day, UTC. Default: today
    #[arg(long, value_name = "DAY")]
    pub to: Option<jiff::civil::Date>,
    /// Group the sums by these fields
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [UsageBy::Tenant, UsageBy::Model, UsageBy::Day])]
    pub by: Vec<UsageBy>,
    /// Ask this gateway instead of the control plane: URL of its operations port
    #[arg(long, value_parser = health_url, value_name = "URL")]
    pub gateway: Option<http::Uri>,
    /// With --gateway: file with the token of its operations port. Default: WEIR_OPS_TOKEN, or the control plane's token on this machine
    #[arg(long, env = "WEIR_OPS_TOKEN_FILE", value_name = "FILE")]
    pub ops_token_file: Option<PathBuf>,
}

/// The fields by which usage is grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UsageBy {
    /// The tenant
    Tenant,
    /// The model
    Model,
    /// The day of the admission, UTC
    Day,
}

impl UsageBy {
    /// The name in the gateway's usage page.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Model => "model",
            Self::Day => "day",
        }
    }

    /// The value in the protocol.
    pub const fn field(self) -> v1::UsageField {
        match self {
            Self::Tenant => v1::UsageField::Tenant,
            Self::Model => v1::UsageField::Model,
            Self::Day => v1::UsageField::Day,
        }
    }
}

/// The arguments of backup.
#[derive(Debug, Clone, Args)]
pub struct BackupArgs {
    /// The file to write; must not exist
    pub file: PathBuf,
}

/// A probe tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TierName {
    /// Whether the server answers; costs no tokens
    Liveness,
    /// Whether the model answers; costs one token
    Readiness,
    /// How fast it answers; may cost some hundred tokens
    Deep,
}

impl TierName {
    /// The value in the protocol.
    pub const fn tier(self) -> v1::ProbeTier {
        match self {
            Self::Liveness => v1::ProbeTier::Liveness,
            Self::Readiness => v1::ProbeTier::Readiness,
            Self::Deep => v1::ProbeTier::Deep,
        }
    }
}

/// The arguments of probe.
#[derive(Debug, Clone, Args)]
pub struct ProbeArgs {
    /// Its name
    pub backend: String,
    /// The probe tier
    #[arg(long, value_enum, default_value_t = TierName::Liveness)]
    pub tier: TierName,
    /// How long to wait for the results, at most 60s
    #[arg(long, value_parser = wait, default_value = "10s", value_name = "DURATION")]
    pub wait: Duration,
}

/// Commands for contexts.
#[derive(Debug, Clone, Subcommand)]
pub enum ContextCommand {
    /// List all contexts, and which one is current
    List,
    /// Make a context the current one
    Use {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
    },
    /// Create or replace a context from --server, --token-file, --ca, --cert and --cert-key
    Set {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
        /// Environment variable that holds the token, instead of a file
        #[arg(long, value_name = "VARIABLE", conflicts_with = "token_file")]
        token_env: Option<String>,
        /// Make it the current context
        #[arg(long = "use")]
        switch: bool,
    },
    /// Delete a context
    Delete {
        /// Its name
        #[arg(value_parser = contexts::name)]
        name: String,
    },
}
