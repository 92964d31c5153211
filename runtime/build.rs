//! Names the commit of a release build in a git clone, for `--version`. `WEIR_COMMIT` takes precedence; without it and
//! without git the commit is unknown.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=WEIR_COMMIT");
    // Every crate depends on this one, so in other profiles each commit would compile everything again.
    if std::env::var_os("WEIR_COMMIT").is_some() || std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let Some(commit) = git(&["rev-parse", "--short=7", "HEAD"]) else { return };
    println!("cargo::rustc-env=WEIR_COMMIT={commit}");
    // The log of HEAD grows with every commit and every switch to another one.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
}

/// What git prints; `None` without git or outside a clone.
fn git(arguments: &[&str]) -> Option<String> {
    let done = Command::new("git").args(arguments).output().ok().filter(|done| done.status.success())?;
    Some(String::from_utf8(done.stdout).ok()?.trim().to_owned())
}
