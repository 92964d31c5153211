//! File descriptors: the limit of the process, and the part of it that connections of strangers may take.

use std::sync::LazyLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that a process needs besides connections at the very least: for listeners, the runtime, files, the
/// control plane and Redis.
const OWN_MIN: u64 = 64;
/// The highest limit that is asked for: some systems refuse one that they call unlimited.
const WANTED_MAX: u64 = 1 << 20;

static LIMIT: LazyLock<u64> = LazyLock::new(|| {
    let now = getrlimit(Resource::Nofile);
    let current = now.current.unwrap_or(WANTED_MAX);
    let wanted = now.maximum.unwrap_or(WANTED_MAX).min(WANTED_MAX);
    if current >= wanted {
        return current;
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: now.maximum });
    match raised {
        Ok(()) => wanted,
        Err(error) => {
            tracing::warn!(%error, limit = current, "the limit of open files could not be raised");
            current
        }
    }
});

/// The limit of descriptors, after it was raised as far as allowed.
pub(super) fn limit() -> u64 {
    *LIMIT
}

/// The maximum of connections of all listeners of the process. The other half of the descriptors is for backends,
/// Redis, the control plane and files, and no stranger can take it.
pub(super) fn connections_max() -> usize {
    let limit = limit();
    usize::try_from(limit.saturating_sub((limit / 2).max(OWN_MIN)).max(1)).unwrap_or(usize::MAX)
}
