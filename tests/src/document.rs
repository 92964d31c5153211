//! Commands of documents, run as they are written: in one shell, with the programs of this build, on free ports.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{binary, command_of};

/// The longest time of all commands together; they wait for processes to be ready.
const TIME_MAX: Duration = Duration::from_secs(120);

/// The top of the source tree, where a reader runs the commands.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The first block of shell commands below a heading.
pub fn commands(document: &Path, heading: &str) -> String {
    let text = std::fs::read_to_string(document).expect("a document");
    let below = text.split_once(&format!("\n{heading}\n")).map(|(_, below)| below);
    let block = below.and_then(|below| below.split_once("```sh\n")?.1.split_once("```\n"));
    block.unwrap_or_else(|| panic!("no commands below '{heading}'")).0.to_owned()
}

/// So many ports that were free a moment ago, each another one.
pub fn free_ports<const N: usize>() -> [u16; N] {
    // All at once, so that no two are the same.
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    held.map(|port| port.local_addr().expect("an address").port())
}

/// What a shell has run. The processes that it left in the background end with this.
#[derive(Debug)]
pub struct Ran {
    /// Its standard output.
    pub out: String,
    /// The standard error of all of them.
    pub err: String,
    directory: TempDir,
    group: u32,
}

impl Ran {
    /// The directory in which it ran.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Ran {
    fn drop(&mut self) {
        // A negative number is a group of processes. All may have ended already.
        let group = format!("-{}", self.group);
        let _ =
            std::process::Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
    }
}

/// Runs commands in a directory of their own that has `deploy` as the source tree has it. Every command must succeed.
pub async fn run(commands: &str, env: &[(&str, String)]) -> Ran {
    let directory = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(
        root().join("deploy").canonicalize().expect("there"),
        directory.path().join("deploy"),
    )
    .expect("linked");
    let path = |name: &str| directory.path().join(name);
    // Files, because processes in the background keep them open.
    let file = |name: &str| File::create(path(name)).expect("a file");
    let programs = binary("weir").parent().expect("a directory").display().to_string();
    let mut shell = command_of("bash");
    shell
        .args(["--norc", "--noprofile", "-e", "-c", commands])
        .current_dir(directory.path())
        .env("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap_or_default()))
        .envs(env.iter().map(|(name, value)| (name, value)))
        .process_group(0)
        .stdout(file("out"))
        .stderr(file("err"));
    let mut child = shell.spawn().expect("bash runs");
    let group = child.id().expect("it runs");
    let mut ran = Ran { out: String::new(), err: String::new(), directory, group };
    let ended = tokio::time::timeout(TIME_MAX, child.wait()).await;
    let read = |name: &str| std::fs::read_to_string(ran.directory().join(name)).expect("text");
    (ran.out, ran.err) = (read("out"), read("err"));
    let succeeded = matches!(&ended, Ok(Ok(status)) if status.success());
    assert!(succeeded, "{ended:?} of\n{commands}\nprinted\n{}\n{}", ran.out, ran.err);
    ran
}
