//! What a request and a chunk of a stream cost a gateway, in instructions and allocations: figures that are the same on a busy
//! machine, so that a test can hold them.
//!
//! The gateway runs under valgrind's callgrind with one worker thread. Callgrind counts the instructions of user mode, each
//! byte that `rep movsb` copies as one, and knows no SHA instructions, so the figures compare builds and not machines.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use clap::Args;
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::load::Connection;
use crate::process::installed;
use crate::redis_server::Redis;
use crate::report::{Report, Row, progress};
use crate::resources::{KEY, Resources};
use crate::roles::{Gateway, GatewayArgs, Mock, MockArgs};

const MODEL: &str = "fast";
/// Connections that send at the same time.
const CONNECTIONS: u32 = 8;
/// Bytes of the prompt.
const PROMPT_BYTES: usize = 1000;
/// The tokens of a unary answer: about 1 KiB.
const TOKENS: u64 = 150;
/// The tokens of the streams whose difference is the cost of the chunks.
const STREAM_TOKENS: [u64; 2] = [100, 600];
/// Callgrind must answer within this time.
const PATIENCE: Duration = Duration::from_secs(30);

/// What must not be exceeded, by the name of the row: instructions and allocations. A few percent above what was counted when
/// they were set; a change that makes something cheaper lowers its bar.
const BARS: [(&str, f64, f64); 3] = [
    ("request", 140_000.0, 35.0),
    ("request_with_limits_in_redis", 240_000.0, 110.0),
    ("stream_chunk", 7_500.0, 0.1),
];

/// How much is counted.
#[derive(Debug, Args)]
pub(crate) struct InstructionsArgs {
    /// Requests of each kind
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(40..=10_000), value_name = "N")]
    requests: u32,
    /// Fail if a figure is above its bar
    #[arg(long)]
    check: bool,
    /// Keep callgrind's profiles in this directory
    #[arg(long, value_name = "DIRECTORY")]
    profiles: Option<PathBuf>,
}

/// What one part of the load cost.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    instructions: f64,
    allocations: f64,
}

/// Runs the bench.
pub(crate) async fn run(args: &InstructionsArgs) -> anyhow::Result<Report> {
    for program in ["valgrind", "vgdb"] {
        ensure!(installed(program), "{program} is missing: install the package valgrind");
    }
    let directory = tempfile::tempdir().context("a temporary directory")?;
    let profiles = args.profiles.clone().unwrap_or_else(|| directory.path().join("profiles"));
    std::fs::create_dir_all(&profiles).with_context(|| format!("make {}", profiles.display()))?;
    let mock = MockArgs { model: MODEL.into(), slots: 100_000, ..MockArgs::default() };
    let mock = Mock::start("mock", &mock, directory.path()).await?;

    let mut costs = Vec::new();
    let plain = Counted::start("plain", None, mock.address, directory.path(), &profiles).await?;
    costs.push(("request", plain.unary(args.requests).await?));
    costs.push(("stream_chunk", plain.chunk(args.requests).await?));
    drop(plain);
    let redis = Redis::start(directory.path()).await?;
    let limited = Counted::start("limited", Some(&redis), mock.address, directory.path(), &profiles).await?;
    costs.push(("request_with_limits_in_redis", limited.unary(args.requests).await?));

    let mut above = Vec::new();
    let rows = costs.iter().map(|(name, cost)| {
        let bar = BARS.iter().find(|(of, ..)| of == name);
        let row = Row::default()
            .text("what", *name)
            .figure("instructions", cost.instructions, 0)
            .figure("instructions_bar", bar.map(|bar| bar.1), 0)
            .figure("allocations", cost.allocations, 2)
            .figure("allocations_bar", bar.map(|bar| bar.2), 2);
        if bar.is_some_and(|bar| cost.instructions > bar.1 || cost.allocations > bar.2) {
            above.push(format!(
                "{name}: {:.0} instructions and {:.2} allocations",
                cost.instructions, cost.allocations
            ));
        }
        row
    });
    let rows = rows.collect();
    let notes = vec![
        format!(
            "{} requests of each kind over {CONNECTIONS} connections that stay open, prompt and answer of 1 KiB; a chunk: \
             the difference of streams of {} and of {} tokens.",
            args.requests, STREAM_TOKENS[1], STREAM_TOKENS[0]
        ),
        "user mode only, under valgrind's callgrind; what runs beside requests (clocks, reports) is in the figures.".into(),
    ];
    let report = Report { bench: "instructions", machine: crate::machine::describe(), rows, notes };
    if args.check && !above.is_empty() {
        report.print(crate::report::Output::Table)?;
        anyhow::bail!("above the bar: {}; make it cheaper, or raise the bar and say why", above.join("; "));
    }
    Ok(report)
}

/// A gateway under callgrind.
struct Counted {
    name: &'static str,
    gateway: Gateway,
    profiles: PathBuf,
}

impl Counted {
    async fn start(
        name: &'static str,
        redis: Option<&Redis>,
        backend: SocketAddr,
        directory: &Path,
        profiles: &Path,
    ) -> anyhow::Result<Self> {
        progress(&format!("instructions: a gateway under callgrind, {name}"));
        let out = profiles.join(format!("{name}.%p"));
        let under = ["valgrind", "--tool=callgrind", "--compress-strings=no"].map(str::to_owned);
        let under = under.into_iter().chain([format!("--callgrind-out-file={}", out.display())]).collect();
        let args = GatewayArgs {
            id: name.into(),
            redis: redis.map(Redis::url),
            under,
            // With one thread the same is done in the same order.
            env: vec![("TOKIO_WORKER_THREADS".into(), "1".into())],
            ..GatewayArgs::default()
        };
        let resources = Resources::wide(&[(MODEL, backend)], redis.is_some());
        let gateway = Gateway::start(&args, &resources, directory).await?;
        Ok(Self { name, gateway, profiles: profiles.into() })
    }

    /// The cost of one request whose answer is not streamed.
    async fn unary(&self, requests: u32) -> anyhow::Result<Cost> {
        let request = request(TOKENS, false);
        let mut connections = self.connections().await?;
        // What is made once for a connection, a key or a model is made here.
        send(&mut connections, &request, requests / 4).await?;
        self.ask("zero").await?;
        send(&mut connections, &request, requests).await?;
        Ok(self.counted().await?.per(f64::from(requests)))
    }

    /// The cost of one chunk of a stream.
    async fn chunk(&self, requests: u32) -> anyhow::Result<Cost> {
        let streams = requests / 4;
        let mut connections = self.connections().await?;
        let mut costs = Vec::new();
        for tokens in STREAM_TOKENS {
            let request = request(tokens, true);
            send(&mut connections, &request, streams / 2).await?;
            self.ask("zero").await?;
            send(&mut connections, &request, streams).await?;
            costs.push(self.counted().await?);
        }
        let chunks = f64::from(streams) * (STREAM_TOKENS[1] - STREAM_TOKENS[0]) as f64;
        let difference = |of: fn(&Cost) -> f64| of(&costs[1]) - of(&costs[0]);
        let (instructions, allocations) = (difference(|c| c.instructions), difference(|c| c.allocations));
        Ok(Cost { instructions, allocations }.per(chunks))
    }

    async fn connections(&self) -> anyhow::Result<Vec<Connection>> {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            connections.push(Connection::open(self.gateway.address).await?);
        }
        Ok(connections)
    }

    /// What has been counted since the last `zero`.
    async fn counted(&self) -> anyhow::Result<Cost> {
        let before = self.dumps()?;
        self.ask("dump").await?;
        let after = self.dumps()?;
        let new = after.iter().find(|(path, _)| !before.contains_key(*path));
        let (path, _) = new.context("callgrind wrote no profile")?;
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        cost(&text).with_context(|| format!("{} is no profile of callgrind", path.display()))
    }

    /// Profiles with something in them.
    fn dumps(&self) -> anyhow::Result<BTreeMap<PathBuf, u64>> {
        let mut dumps = BTreeMap::new();
        for entry in std::fs::read_dir(&self.profiles)? {
            let entry = entry?;
            let bytes = entry.metadata()?.len();
            if bytes > 0 && entry.file_name().to_string_lossy().starts_with(self.name) {
                dumps.insert(entry.path(), bytes);
            }
        }
        Ok(dumps)
    }

    /// Gives callgrind a command.
    async fn ask(&self, command: &str) -> anyhow::Result<()> {
        let mut vgdb = Command::new("vgdb");
        vgdb.arg(format!("--pid={}", self.gateway.process.id())).arg(command).kill_on_drop(true);
        let done = tokio::time::timeout(PATIENCE, vgdb.output()).await;
        let output = done.with_context(|| format!("callgrind does not answer within {PATIENCE:?}"))??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vgdb {command}: {said}");
        Ok(())
    }
}

impl Cost {
    fn per(self, count: f64) -> Self {
        Self { instructions: self.instructions / count, allocations: self.allocations / count }
    }
}

/// Sends a number of requests over all connections at once; every one must be answered with 200.
async fn send(connections: &mut Vec<Connection>, request: &Bytes, requests: u32) -> anyhow::Result<()> {
    let each = requests.div_ceil(CONNECTIONS);
    let mut sending = JoinSet::new();
    for mut connection in std::mem::take(connections) {
        let request = request.clone();
        sending.spawn(async move {
            for _ in 0..each {
                let answer = connection.call(&request).await?;
                ensure!(answer.status == 200, "answered {}: {}", answer.status, answer.excerpt);
            }
            anyhow::Ok(connection)
        });
    }
    while let Some(sent) = sending.join_next().await {
        connections.push(sent??);
    }
    Ok(())
}

fn request(tokens: u64, stream: bool) -> Bytes {
    let text = "How does a weir work, and why is it built? ".repeat(PROMPT_BYTES / 43 + 1);
    crate::load::chat_about(&text[..PROMPT_BYTES], KEY, MODEL, tokens, stream)
}

/// The instructions of a profile, and the calls of the allocator from outside of it.
fn cost(profile: &str) -> Option<Cost> {
    let is_own = |function: &str| {
        let name = function.trim_start_matches('_');
        name.starts_with("mi_") || name.contains("mimalloc")
    };
    let allocates = |function: &str| {
        ["mi_malloc", "mi_zalloc", "mi_calloc", "mi_realloc", "mi_rezalloc"]
            .iter()
            .any(|name| function.starts_with(name))
    };
    let (mut function, mut called) = ("", "");
    let (mut instructions, mut allocations) = (None, 0.0);
    for line in profile.lines() {
        if let Some(name) = line.strip_prefix("fn=") {
            function = name;
        } else if let Some(name) = line.strip_prefix("cfn=") {
            called = name;
        } else if let Some(calls) = line.strip_prefix("calls=") {
            if allocates(called) && !is_own(function) {
                allocations += calls.split(' ').next()?.parse::<f64>().ok()?;
            }
        } else if let Some(total) = line.strip_prefix("totals: ") {
            instructions = total.trim().parse().ok();
        }
    }
    instructions.map(|instructions| Cost { instructions, allocations })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_gives_its_instructions_and_what_was_allocated_from_outside_of_the_allocator() {
        let profile = "events: Ir\nfn=weir::handle\n12 400\ncfn=mi_malloc_aligned\ncalls=7 0\n12 900\n\
                       fn=mi_realloc_aligned\n0 10\ncfn=mi_malloc_aligned\ncalls=3 0\n0 20\ntotals: 1330\n";
        assert_eq!(cost(profile), Some(Cost { instructions: 1330.0, allocations: 7.0 }));
        assert_eq!(cost("events: Ir\nfn=a\n"), None);
    }
}
