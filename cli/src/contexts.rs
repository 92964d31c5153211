//! Contexts: named clusters with their address and the place of their token, in one file that only its owner can read. The
//! file never contains a token.
//!
//! A context is used completely or not at all. A server set by flag or variable disables the context, because the token of
//! one cluster must never be sent to another.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};

use crate::error::Error;

/// Longest name of a context.
const NAME_MAX: usize = 63;

/// One cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Context {
    pub(crate) server: String,
    pub(crate) token: Option<TokenRef>,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
}

/// The place of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TokenRef {
    /// In a file.
    File(PathBuf),
    /// In a variable of the environment.
    Env(String),
}

impl std::fmt::Display for TokenRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Env(name) => write!(f, "env:{name}"),
        }
    }
}

impl FromStr for TokenRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "must be file:PATH or env:NAME; contexts never contain a token".to_owned();
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("env", name))
                if !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') =>
            {
                Ok(Self::Env(name.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

/// All contexts, and the current one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Contexts {
    pub(crate) current: Option<String>,
    pub(crate) all: BTreeMap<String, Context>,
}

/// The path of the file: `WEIR_CONFIG`, or `weir/contexts.json` in the user's configuration directory.
pub(crate) fn path() -> Result<PathBuf, Error> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || var("HOME").map(|home| home.join(".config"));
    var("WEIR_CONFIG")
        .or_else(|| Some(var("XDG_CONFIG_HOME").or_else(home)?.join("weir/contexts.json")))
        .ok_or_else(|| Error::Setting("there is no home directory; set WEIR_CONFIG to a file".to_owned()))
}

impl Contexts {
    /// Reads the contexts; empty without a file.
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text)
                .ok_or_else(|| Error::Setting(format!("{} is not a file of contexts", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(Error::File { path: path.display().to_string(), source }),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(text).ok()?;
        let path = |value: &Value, field: &str| value.get(field).and_then(Value::as_str).map(PathBuf::from);
        let mut all = BTreeMap::new();
        for (name, value) in value.get("contexts")?.as_object()? {
            let token = value.get("token").and_then(Value::as_str).map(str::parse).transpose().ok()?;
            let context = Context {
                server: value.get("server")?.as_str()?.to_owned(),
                token,
                ca: path(value, "ca"),
                cert: path(value, "cert"),
                key: path(value, "key"),
            };
            all.insert(name.clone(), context);
        }
        let current = value.get("current").and_then(Value::as_str).map(str::to_owned);
        Some(Self { current, all })
    }

    /// The JSON form, as in the file and for `-o json`.
    pub(crate) fn value(&self) -> Value {
        let rows = self.all.iter().map(|(name, context)| {
            let mut row = json!({ "server": context.server });
            let mut add = |field: &str, value: Option<String>| {
                if let Some(value) = value {
                    row[field] = value.into();
                }
            };
            let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
            add("token", context.token.as_ref().map(ToString::to_string));
            add("ca", text(&context.ca));
            add("cert", text(&context.cert));
            add("key", text(&context.key));
            (name.clone(), row)
        });
        json!({ "current": self.current, "contexts": rows.collect::<serde_json::Map<_, _>>() })
    }

    /// Replaces the file in one step; only its owner can read it.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        let failed = |source| Error::Write { path: path.display().to_string(), source };
        let directory =
            path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(failed)?;
        // A temporary file is made with mode 0600, and keeps it.
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        writeln!(file, "{:#}", self.value()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(path).map_err(|e| failed(e.error))?;
        Ok(())
    }
}

/// A valid name of a context.
pub(crate) fn name(text: &str) -> Result<String, String> {
    let fits = (1..=NAME_MAX).contains(&text.len());
    if fits && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Ok(text.to_owned());
    }
    Err("must be 1 to 63 letters, digits, '-', '_' or '.'".to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_only_its_owner_reads_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/contexts.json");
        assert_eq!(Contexts::read(&path).expect("none"), Contexts::default());
        let context = Context {
            server: "https://weir.example:7070".into(),
            token: Some(TokenRef::File("/run/secrets/token".into())),
            ca: Some("/etc/ca.pem".into()),
            cert: None,
            key: None,
        };
        let contexts = Contexts { current: Some("prod".into()), all: [("prod".to_owned(), context)].into() };
        contexts.write(&path).expect("written");
        assert_eq!(Contexts::read(&path).expect("read"), contexts);
        let mode = std::fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(&path, "{").expect("written");
        assert!(Contexts::read(&path).is_err());
    }

    #[test]
    fn a_token_is_a_reference() {
        assert_eq!("env:PROD_TOKEN".parse(), Ok(TokenRef::Env("PROD_TOKEN".into())));
        for wrong in ["s3cr3t", "file:", "env:", "env:A B", "vault:x"] {
            assert!(wrong.parse::<TokenRef>().is_err(), "{wrong}");
        }
    }
}
