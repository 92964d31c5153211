//! The machine of a bench, without which its figures mean nothing.

use serde_json::{Value, json};

/// The machine as Linux describes it.
pub(crate) fn describe() -> Value {
    let cpu_info = read("/proc/cpuinfo");
    let model = field(&cpu_info, "model name").unwrap_or("unknown");
    let memory = read("/proc/meminfo");
    let memory_kib =
        field(&memory, "MemTotal").and_then(|m| m.split(' ').next()).and_then(|m| m.parse::<u64>().ok());
    let load = read("/proc/loadavg");
    let load_1m: Option<f64> = load.split(' ').next().and_then(|l| l.parse().ok());
    json!({
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "cpu": model,
        "memory_gib": memory_kib.map(|kib| (kib as f64 / 1048576.0 * 10.0).round() / 10.0),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_average_1m_at_start": load_1m,
        "build": if cfg!(debug_assertions) { "debug: figures are not to be used" } else { "release" },
        "weir": weir_runtime::version(),
    })
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}
