//! The harness of the tests from outside: real sockets, real processes, ports chosen by the system, no sleeping for
//! luck.

pub mod client;
pub mod cluster;
pub mod etcd;
pub mod gate;
pub mod limits;
pub mod line;
pub mod plane;
pub mod process;
pub mod redis;
pub mod scripted;
pub mod sentinel;
pub mod stack;

use std::future::Future;
use std::time::Duration;

/// Asks until the answer is yes; a test that waits longer than this has failed. Leases of the dead take 15 s to run
/// out, so on a busy machine half a minute is no failure.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let patience = Duration::from_secs(60);
    let asked = tokio::time::timeout(patience, async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(asked.await.is_ok(), "not within {patience:?}: {what}");
}
