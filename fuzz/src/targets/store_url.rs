use weir_control_plane::store::EtcdConfig;
use weir_ratelimit::redis::fuzzing::address;

/// Longest part of an address that may be looked for in an error without being there by chance.
const TELLING_BYTES: usize = 8;

/// An address of Redis or of etcd is one or has a reason, which does not repeat a password.
pub(crate) fn run(data: &[u8]) {
    let Ok(url) = std::str::from_utf8(data) else { return };
    let errors = [address(url).err(), EtcdConfig::parse(url).err()];
    let login = url.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@')).map(|(login, _)| login);
    let password = login.and_then(|login| login.split_once(':')).map(|(_, password)| password);
    for error in errors.into_iter().flatten() {
        assert!(error.len() <= 512, "{error}");
        if let Some(password) = password.filter(|password| password.len() >= TELLING_BYTES) {
            assert!(!error.contains(password), "{error} repeats a password");
        }
    }
}
