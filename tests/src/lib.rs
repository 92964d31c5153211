//! The harness of the tests from outside: real sockets, real processes, ports that the system chooses, and no sleeps.

pub mod client;
pub mod cluster;
pub mod document;
pub mod etcd;
pub mod gate;
pub mod limits;
pub mod line;
pub mod plane;
pub mod process;
pub mod random;
pub mod redis;
pub mod scripted;
pub mod sentinel;
pub mod stack;

use std::future::Future;
use std::time::Duration;

/// Repeats a question until the answer is yes; the test fails after a minute. Leases of dead holders expire after 15
/// s, so half a minute is no failure on a busy machine.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let patience = Duration::from_secs(60);
    let asked = tokio::time::timeout(patience, async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(asked.await.is_ok(), "not within {patience:?}: {what}");
}
