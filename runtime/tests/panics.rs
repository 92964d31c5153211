//! Panics as lines of the log, seen from outside: the test runs itself as a process whose standard error it reads.

use std::io::{PipeReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::time::Instant;

/// Tells the process that it must panic, and after how many lines.
const CHILD: &str = "WEIR_TEST_PANICS_AFTER_LINES";
const PANICS: usize = 50;
/// More lines than fit into a pipe.
const PIPE_FULL_LINES: usize = 20_000;
const TEST: &str = "a_panic_is_one_line_of_the_log_and_counted_and_waits_for_nobody";

fn panics_in_many_threads(lines_before: usize) {
    let _flush = weir_runtime::flush_logs_at_end();
    // Panics are logged whatever the filter.
    weir_runtime::init_logs("off").expect("a filter");
    for _ in 0..lines_before {
        weir_runtime::say("a line that nobody reads");
    }
    for _ in 0..PANICS {
        let panicked =
            std::thread::Builder::new().name("worker".into()).spawn(|| panic!("a bug\nof \"ours\""));
        assert!(panicked.expect("a thread").join().is_err());
    }
    let mut registry = Registry::default();
    weir_runtime::register(&mut registry);
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &registry).expect("figures");
    assert!(page.contains(&format!("weir_panics_total {PANICS}\n")), "{page}");
}

/// Runs the process with a pipe as standard error. Returns the rest of the pipe.
fn run(lines_before: usize) -> PipeReader {
    let (log, stderr) = std::io::pipe().expect("a pipe");
    let mut command = Command::new(std::env::current_exe().expect("a path"));
    command.args(["--exact", TEST, "--nocapture"]).env(CHILD, lines_before.to_string());
    command.env_remove("RUST_BACKTRACE").stdout(Stdio::null()).stderr(stderr);
    let mut child = command.spawn().expect("starts");
    drop(command);
    let started = Instant::now();
    let ended = loop {
        if let Some(ended) = child.try_wait().expect("it can be waited for") {
            break ended;
        }
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().expect("killed");
            panic!("a panic waits for the log");
        }
        std::thread::park_timeout(Duration::from_millis(5));
    };
    assert!(ended.success(), "{ended}");
    log
}

#[test]
fn a_panic_is_one_line_of_the_log_and_counted_and_waits_for_nobody() {
    if let Ok(lines) = std::env::var(CHILD) {
        return panics_in_many_threads(lines.parse().expect("a number"));
    }
    let mut log = String::new();
    run(0).read_to_string(&mut log).expect("UTF-8");
    let lines: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    assert_eq!(lines.len(), PANICS, "{log}");
    for line in &lines {
        assert_eq!(line["message"], "panicked");
        assert_eq!(line["panic"], "a bug\nof \"ours\"");
        assert_eq!((&line["level"], &line["thread"]), (&"ERROR".into(), &"worker".into()));
        let location = line["location"].as_str().expect("a text");
        assert!(location.contains("panics.rs:"), "{location}");
    }
    // Nobody reads, and the process panics, counts, and ends all the same.
    drop(run(PIPE_FULL_LINES));
}
