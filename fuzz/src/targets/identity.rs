use weir_control_plane::fuzzing::{certificate, named};

/// A name in a certificate is a role and a short name without control characters; any bytes are a certificate or are not.
pub(crate) fn run(data: &[u8]) {
    let found = std::str::from_utf8(data).ok().and_then(named);
    for (role, name) in found.into_iter().chain(certificate(data)) {
        assert!(["viewer", "operator", "editor", "admin", "gateway"].contains(&role), "{role}");
        assert!((1..=63).contains(&name.len()), "{name:?}");
        assert!(name.bytes().all(|byte| byte.is_ascii_graphic()), "{name:?}");
    }
}
