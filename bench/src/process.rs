//! The processes of a bench and their cost: CPU time and memory from `/proc`, children included.
//!
//! A process is ended by its own id, at the latest when its handle is dropped.

use std::io::PipeReader;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// A process must report its start within this time, also one that runs under valgrind.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The target of a process's standard error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Log {
    /// A file beside its data.
    #[default]
    File,
    /// A full disk.
    DiskFull,
    /// An open pipe that nobody reads.
    ReaderStopped,
    /// A pipe whose reader is gone.
    ReaderGone,
}

impl Log {
    /// Standard error, and the handle that keeps it in this state.
    fn open(self, file: &Path) -> std::io::Result<(Stdio, Option<PipeReader>)> {
        Ok(match self {
            Self::File => (std::fs::File::create(file)?.into(), None),
            Self::DiskFull => (std::fs::File::options().write(true).open("/dev/full")?.into(), None),
            Self::ReaderStopped => {
                let (reader, writer) = std::io::pipe()?;
                (writer.into(), Some(reader))
            }
            Self::ReaderGone => (std::io::pipe()?.1.into(), None),
        })
    }
}

/// A running process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    pid: Pid,
    stdout: Option<BufReader<ChildStdout>>,
    log: PathBuf,
    /// The end of a pipe that nobody reads.
    _unread: Option<PipeReader>,
}

/// The resources that processes used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    /// CPU seconds since the start.
    pub(crate) cpu_s: f64,
    /// Resident memory now, MiB.
    pub(crate) rss_mib: f64,
    /// The peak of resident memory since [`Process::forget_peak`], MiB.
    pub(crate) peak_rss_mib: f64,
}

impl Process {
    /// Starts a process. Its standard error goes into a file in `directory`.
    pub(crate) fn start(name: &str, command: Command, directory: &Path) -> anyhow::Result<Self> {
        Self::start_logging(name, command, directory, Log::File)
    }

    /// Starts a process with a log that may be broken.
    pub(crate) fn start_logging(
        name: &str,
        mut command: Command,
        directory: &Path,
        to: Log,
    ) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let (stderr, unread) = to.open(&log).with_context(|| format!("log of {name}"))?;
        for (variable, _) in std::env::vars().filter(|(v, _)| v.starts_with("WEIR_BENCH_") || v == "WEIR_LOG")
        {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr).kill_on_drop(true);
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let pid = pid.with_context(|| format!("{name} ended at once"))?;
        let stdout = child.stdout.take().map(BufReader::new);
        Ok(Self { name: name.to_owned(), child, pid, stdout, log, _unread: unread })
    }

    /// The id of the process.
    pub(crate) fn id(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// The next line it prints.
    pub(crate) async fn line(&mut self) -> anyhow::Result<String> {
        let name = self.name.clone();
        let stdout = self.stdout.as_mut().with_context(|| format!("{name} prints nothing"))?;
        let mut line = String::new();
        let read = tokio::time::timeout(START_TIMEOUT, stdout.read_line(&mut line)).await;
        match read {
            Ok(Ok(length)) if length > 0 => Ok(line.trim_end().to_owned()),
            _ => bail!("{name} did not start: {}", self.log_tail()),
        }
    }

    /// The end of its standard error.
    pub(crate) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// The resources that it and its children used.
    pub(crate) fn usage(&self) -> Usage {
        let mut sum = Usage::default();
        for pid in family(self.pid) {
            sum.cpu_s += cpu_s(pid).unwrap_or(0.0);
            sum.rss_mib += status_mib(pid, "VmRSS").unwrap_or(0.0);
            sum.peak_rss_mib += status_mib(pid, "VmHWM").unwrap_or(0.0);
        }
        sum
    }

    /// Resets the peak of resident memory, if the kernel allows it.
    pub(crate) fn forget_peak(&self) {
        for pid in family(self.pid) {
            let _ = std::fs::write(format!("/proc/{}/clear_refs", pid.as_raw_nonzero()), "5");
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        kill_process(self.pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Returns when it has ended by itself.
    pub(crate) async fn ended(&mut self) -> anyhow::Result<()> {
        let ended = tokio::time::timeout(START_TIMEOUT, self.child.wait()).await;
        ended.with_context(|| format!("{} does not end", self.name))?.map(drop).context("wait for a process")
    }

    /// Kills it.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.with_context(|| format!("kill {}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The handle of the child kills the child itself. The child's own children (nginx's workers) would survive
        // it.
        if self.child.id().is_some() {
            for pid in family(self.pid).into_iter().skip(1) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }
}

/// Whether a program can be run.
pub(crate) fn installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&paths).chain(more).any(|directory| directory.join(program).is_file())
}

/// A port that nobody listens on now.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(listener.local_addr().context("find a free port")?.port())
}

fn family(root: Pid) -> Vec<Pid> {
    let mut members = vec![root];
    let mut next = 0;
    while let Some(&pid) = members.get(next) {
        next += 1;
        let pid = pid.as_raw_nonzero();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        members.extend(children.split_whitespace().filter_map(|c| Pid::from_raw(c.parse().ok()?)));
    }
    members
}

fn cpu_s(pid: Pid) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    // The second field is the program's name in parentheses and may contain spaces.
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / rustix::param::clock_ticks_per_second() as f64)
}

fn status_mib(pid: Pid, field: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}
