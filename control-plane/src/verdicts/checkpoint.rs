//! The states of backends over a restart. They are marked stale until the first probe.

use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::health::{Cluster, Rule, State, Timestamp};

/// Of another form it is not read.
const FORMAT: u64 = 1;
/// Larger files are not ours.
const MAX_BYTES: u64 = 16 << 20;

/// What a checkpoint holds.
#[derive(Debug, Default)]
pub(super) struct Saved(Vec<Value>);

impl Saved {
    /// Puts back what is known of backends that are still the same.
    pub(super) fn restore(self, cluster: &mut Cluster, now: Timestamp) {
        for saved in self.0 {
            let text = |key: &str| saved[key].as_str().unwrap_or_default();
            let (backend, identity) = (text("backend"), text("identity"));
            let same = cluster.target(backend).is_some_and(|target| target.identity == identity);
            let (Some(state), Some(rule), true) =
                (State::of_name(text("state")), Rule::of_name(text("rule")), same)
            else {
                continue;
            };
            let damping = saved["damping"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or_default();
            cluster.restore(backend, |record| record.restore(state, rule, text("detail"), damping, now));
        }
        cluster.restored(now);
    }
}

/// The checkpoint of a cluster.
pub(super) fn text(cluster: &Cluster) -> String {
    let backends = cluster.records().filter_map(|(name, record)| {
        let target = cluster.target(name)?;
        Some(json!({
            "backend": name,
            "identity": target.identity,
            "state": record.state.name(),
            "rule": record.rule.name(),
            "detail": record.detail,
            "damping": record.damping(),
        }))
    });
    json!({"format": FORMAT, "backends": backends.collect::<Vec<_>>()}).to_string()
}

/// Reads a checkpoint; one that is not there or not readable is none.
pub(super) fn read(path: &Path) -> Saved {
    let small = std::fs::metadata(path).is_ok_and(|meta| meta.len() <= MAX_BYTES);
    let text = if small { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() };
    let Ok(mut value) = serde_json::from_str::<Value>(&text) else { return Saved::default() };
    match (value["format"].as_u64(), value["backends"].take()) {
        (Some(FORMAT), Value::Array(backends)) => Saved(backends),
        _ => Saved::default(),
    }
}

/// Replaces a checkpoint, so that there is always a whole one.
pub(super) fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let new = path.with_extension("new");
    // What a crash left behind is not ours to append to.
    let _ = std::fs::remove_file(&new);
    let mut file = crate::store::create_private(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, path)
}
