use weir_control_plane::store::EtcdConfig;
use weir_ratelimit::redis::fuzzing::address;

/// Longest part of an address that may be looked for in an error without being there by chance.
const TELLING_BYTES: usize = 8;

/// An address of Redis or of etcd is one or has a reason, which does not repeat a password.
pub(crate) fn run(data: &[u8]) {
    let Ok(url) = std::str::from_utf8(data) else { return };
    let errors = |url: &str| [address(url).err(), EtcdConfig::parse(url).err()];
    let parts = url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?)));
    let secret = parts.and_then(|(scheme, (login, rest))| Some((scheme, login.split_once(':')?, rest)));
    let secret = secret.filter(|(_, (_, password), _)| password.len() >= TELLING_BYTES);
    for error in errors(url).into_iter().flatten() {
        assert!(error.len() <= 512, "{error}");
        let Some((scheme, (user, password), rest)) = secret else { continue };
        // A password may be what the error says anyway.
        let other = format!("{scheme}://{user}:{}@{rest}", "x".repeat(password.len()));
        let anyway = || errors(&other).iter().flatten().any(|other| other.contains(password));
        assert!(!error.contains(password) || anyway(), "{error} repeats a password");
    }
}
