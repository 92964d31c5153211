//! The allow-lists of a gateway for the `credential` of backends.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use http::Uri;
use weir_proto::resource::CredentialRef;

use super::file::{AllowedDirs, FileError, secret};

/// Most directories, and most patterns of variables.
const LIST_MAX: usize = 16;
/// File systems of the kernel, which contain secrets but no credentials of backends.
const KERNEL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Allowed sources of backends' credentials. Everything else is refused, even if a resource refers to it.
#[derive(Debug, Clone, Args)]
pub struct CredentialSources {
    /// Directories in which `credential: file:/path` of a backend may lie, with commas between; empty: no file is read.
    /// In a directory called @HOST, files are for backends at that host alone. Files are read again when they change.
    #[arg(
        long,
        env = "WEIR_CREDENTIAL_DIR",
        value_delimiter = ',',
        default_value = "/etc/weir/credentials",
        value_name = "DIR[,DIR...]"
    )]
    pub credential_dir: Vec<PathBuf>,
    /// Variables that `credential: env:NAME` of a backend may name, with commas between: whole names, or a part with one
    /// * before or after it. Variables that begin with WEIR_ are never read.
    #[arg(
        long,
        env = "WEIR_CREDENTIAL_ENV",
        value_delimiter = ',',
        default_value = "*_API_KEY,*_CREDENTIAL,CREDENTIAL_*",
        value_name = "NAME[,NAME...]"
    )]
    pub credential_env: Vec<String>,
    /// Files and directories that are never credentials, of other parts of Weir in this process.
    #[arg(skip)]
    pub never: Vec<PathBuf>,
}

impl CredentialSources {
    /// Whether a backend may refer to this variable; false too if a pattern is invalid.
    pub fn allows(&self, variable: &str) -> bool {
        Policy::new(self, Vec::new())
            .is_ok_and(|policy| policy.variable(variable, |_| Some("set".into())).is_ok())
    }
}

impl Default for CredentialSources {
    fn default() -> Self {
        Self {
            credential_dir: vec!["/etc/weir/credentials".into()],
            credential_env: ["*_API_KEY", "*_CREDENTIAL", "CREDENTIAL_*"].map(str::to_owned).to_vec(),
            never: Vec::new(),
        }
    }
}

/// A pattern of variable names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Whole(String),
    Prefix(String),
    Suffix(String),
}

impl Pattern {
    fn matches(&self, name: &str) -> bool {
        match self {
            Self::Whole(whole) => name == whole,
            Self::Prefix(prefix) => name.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => name.ends_with(suffix.as_str()),
        }
    }
}

impl FromStr for Pattern {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pattern = match (text.strip_suffix('*'), text.strip_prefix('*')) {
            (Some(prefix), _) => Self::Prefix(prefix.to_owned()),
            (None, Some(suffix)) => Self::Suffix(suffix.to_owned()),
            (None, None) => Self::Whole(text.to_owned()),
        };
        let (Self::Whole(part) | Self::Prefix(part) | Self::Suffix(part)) = &pattern;
        if !part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err("must be a name of letters, digits and _, with one * before or after it at most");
        }
        if !matches!(pattern, Self::Suffix(_)) && CredentialRef::is_setting_of_weir(part) {
            return Err("variables that begin with WEIR_ are settings of Weir and never credentials");
        }
        Ok(pattern)
    }
}

/// The validated allow-lists.
#[derive(Debug, Default)]
pub(super) struct Policy {
    pub(super) dirs: AllowedDirs,
    variables: Vec<Pattern>,
    /// The patterns as text, for error messages.
    listed: String,
}

impl Policy {
    /// Checks the settings. `never` are files and directories of Weir itself.
    pub(super) fn new(sources: &CredentialSources, never: Vec<PathBuf>) -> Result<Self, String> {
        let mut allowed = Vec::new();
        // An empty value allows nothing; a list with a default has no other way to be empty.
        for directory in sources.credential_dir.iter().filter(|path| path.as_os_str() != "") {
            let wrong = |reason: &str| format!("--credential-dir {}: {reason}", directory.display());
            let absolute = std::path::absolute(directory).map_err(|error| wrong(&error.to_string()))?;
            if absolute.components().any(|part| part == Component::ParentDir) {
                return Err(wrong("must not have .. in it"));
            }
            if absolute.parent().is_none() {
                return Err(wrong("must be a directory for credentials alone, not all of this machine"));
            }
            if KERNEL.iter().any(|kernel| absolute.starts_with(kernel)) {
                return Err(wrong("is not a place for credentials"));
            }
            allowed.push(normal(&absolute));
        }
        let texts = sources.credential_env.iter().filter(|text| !text.is_empty());
        let variables = texts.clone().map(|text| {
            text.parse::<Pattern>().map_err(|reason| format!("--credential-env '{text}': {reason}"))
        });
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        for (flag, length) in [("--credential-dir", allowed.len()), ("--credential-env", variables.len())] {
            if length > LIST_MAX {
                return Err(format!("{flag}: takes {LIST_MAX} at most"));
            }
        }
        let listed = texts.map(String::as_str).collect::<Vec<_>>().join(", ");
        Ok(Self { dirs: AllowedDirs { allowed, never }, variables, listed })
    }

    /// The secret in an environment variable.
    pub(super) fn variable(
        &self,
        name: &str,
        read: impl Fn(&str) -> Option<OsString>,
    ) -> Result<String, String> {
        let reference = CredentialRef::Env(name.to_owned());
        if let Some(objection) = reference.objection() {
            return Err(format!("credential: {objection}"));
        }
        if !self.variables.iter().any(|pattern| pattern.matches(name)) {
            let may = if self.listed.is_empty() { "no variable" } else { &self.listed };
            return Err(format!(
                "credential: environment variable {name} is not one that this gateway reads for backends; it reads {may}: \
                 rename the variable, or allow it with --credential-env"
            ));
        }
        let Some(value) = read(name) else {
            return Err(format!("credential: environment variable {name} is not set"));
        };
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(value.as_os_str());
        if bytes.len() as u64 > super::file::FILE_BYTES_MAX {
            return Err(format!("credential: environment variable {name}: {}", FileError::TooLarge));
        }
        secret(bytes).map_err(|error| format!("credential: environment variable {name}: {error}"))
    }

    /// The error for every file outside the allowed directories, whether it exists or not.
    pub(super) fn outside(&self) -> String {
        let mut listed = String::new();
        for directory in &self.dirs.allowed {
            let before = if listed.is_empty() { "from " } else { ", " };
            listed.push_str(before);
            listed.push_str(&directory.display().to_string());
        }
        let listed = if listed.is_empty() { "none".to_owned() } else { format!("only {listed}") };
        format!(
            "credential: the file is not in a directory that this gateway reads for backends; it reads {listed}: put it \
             there, or allow its directory with --credential-dir"
        )
    }
}

/// The same path without `.` and doubled slashes.
pub(super) fn normal(path: &Path) -> PathBuf {
    path.components().collect()
}

/// Whether a credential that is bound to these hosts may be sent to this URL.
pub(super) fn is_for(hosts: &[String], url: &Uri) -> bool {
    let Some(host) = url.host().map(str::to_ascii_lowercase) else { return hosts.is_empty() };
    let default = if url.scheme_str() == Some("https") { 443 } else { 80 };
    let with_port = format!("{host}:{}", url.port_u16().unwrap_or(default));
    hosts.iter().all(|named| *named == host || *named == with_port)
}
