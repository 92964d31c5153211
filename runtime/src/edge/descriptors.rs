//! File descriptors: how many the process may have, and how many of them strangers may take.

use std::sync::LazyLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that a process needs besides connections at the very least: listeners, the runtime, files, the control
/// plane, Redis.
const OWN_MIN: u64 = 64;
/// More than that is not asked for: some systems refuse what they call unlimited.
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

/// Descriptors the process may have, after the limit was raised as far as it may be.
pub(super) fn limit() -> u64 {
    *LIMIT
}

/// Connections that all listeners of the process may have together. The other half of the descriptors is for backends,
/// Redis, the control plane and files, which no stranger can take.
pub(super) fn connections_max() -> usize {
    let limit = limit();
    usize::try_from(limit.saturating_sub((limit / 2).max(OWN_MIN)).max(1)).unwrap_or(usize::MAX)
}
