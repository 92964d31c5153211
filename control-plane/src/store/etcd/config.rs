//! The address and credentials of etcd.

use std::path::PathBuf;

use weir_runtime::Secret;

/// The default prefix of keys.
const PREFIX: &str = "/weir";
const FORM: &str = "etcd://[USER@]HOST:PORT[,HOST:PORT...][/PREFIX], or etcds:// for TLS";

/// Of a host that is refused, so many characters are repeated.
const SHOWN_CHARS: usize = 64;

/// An etcd cluster and the place of a store in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT` of each member; any of them may answer.
    pub endpoints: Vec<String>,
    /// What every key begins with: one etcd may hold several stores. Begins with a slash and does not end with one.
    pub prefix: String,
    /// The user, for an etcd with authentication.
    pub user: Option<String>,
    /// That user's password.
    pub password: Option<Secret>,
    /// The CA certificate (PEM) of the members. `None`: the CA certificates of the system.
    pub ca: Option<PathBuf>,
    /// Client certificate and key (PEM), if etcd requires one.
    pub own: Option<(PathBuf, PathBuf)>,
}

impl EtcdConfig {
    /// Reads `etcd://[USER@]HOST:PORT[,HOST:PORT...][/PREFIX]`; `etcds` stands for TLS. The error names the problem.
    pub fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = match url.split_once("://") {
            Some(("etcd", rest)) => ("http", rest),
            Some(("etcds", rest)) => ("https", rest),
            // Not repeated: it may be the address of something else, with a password in it.
            _ => return Err(format!("this is not the address of a store, which is written {FORM}")),
        };
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, _)) if user.contains(':') => {
                return Err(
                    "a password does not belong into the URL, where others read it; give it in a file, with \
                            --store-password-file"
                        .into(),
                );
            }
            Some((user, hosts)) if !user.is_empty() => (Some(user.to_owned()), hosts),
            Some(_) => return Err(format!("there is no user before the @; a store is written {FORM}")),
            None => (None, authority),
        };
        let endpoint = |host: &str| match host.rsplit_once(':') {
            Some((name, port)) if !name.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(format!("{scheme}://{host}"))
            }
            _ => Err(format!("'{}' is not HOST:PORT; a store is written {FORM}", shown(host))),
        };
        let endpoints = hosts.split(',').map(endpoint).collect::<Result<Vec<_>, _>>()?;
        let path = path.trim_matches('/');
        let prefix = if path.is_empty() { PREFIX.to_owned() } else { format!("/{path}") };
        Ok(Self { endpoints, prefix, user, password: None, ca: None, own: None })
    }

    /// The endpoints, for people.
    pub(super) fn names(&self) -> String {
        self.endpoints.join(", ")
    }
}

/// As much of a host as helps; no user, in case an @ stands where none belongs.
fn shown(host: &str) -> String {
    let host = host.rsplit('@').next().unwrap_or(host);
    host.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_members_user_and_prefix_and_is_refused_with_its_form() {
        let one = EtcdConfig::parse("etcd://a:2379").unwrap();
        assert_eq!((one.endpoints, one.prefix.as_str()), (vec!["http://a:2379".to_owned()], "/weir"));
        let all = EtcdConfig::parse("etcds://weir@a:1,[::1]:2/teams/one/").unwrap();
        assert_eq!(all.endpoints, ["https://a:1", "https://[::1]:2"]);
        assert_eq!((all.prefix.as_str(), all.user.as_deref()), ("/teams/one", Some("weir")));
        for wrong in
            ["a:2379", "etcd://", "etcd://a", "etcd://a:b", "etcd://a:1,", "etcd://@a:1", "http://a:1"]
        {
            assert!(EtcdConfig::parse(wrong).unwrap_err().contains("etcd://[USER@]"), "{wrong}");
        }
        let refused = EtcdConfig::parse("etcd://weir:canary@a:1").unwrap_err();
        assert!(refused.contains("--store-password-file"), "{refused}");
    }

    #[test]
    fn no_refusal_repeats_a_password_or_a_long_host() {
        let long = format!("etcd://{}", "h".repeat(4096));
        for url in [
            "etcd://weir:canary@a:1",
            "http://weir:canary@a:1",
            "weir:canary@a:1",
            "etcd:///weir:canary@a",
            &long,
        ] {
            let refused = EtcdConfig::parse(url).unwrap_err();
            assert!(!refused.contains("canary") && refused.len() < 512, "{refused}");
        }
    }
}
