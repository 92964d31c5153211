//! Closed loop: each of a number of clients sends its next request when the last one is answered.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Outcome, call};

/// Loads `address` with `clients` connections for `duration`.
pub(crate) async fn closed(
    address: SocketAddr,
    request: &Bytes,
    clients: usize,
    duration: Duration,
) -> Outcome {
    let started = Instant::now();
    let until = started + duration;
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        tasks.spawn(client(address, request.clone(), until));
    }
    let mut sum = Outcome::new();
    while let Some(outcome) = tasks.join_next().await {
        if let Ok(outcome) = outcome {
            sum.add(outcome);
        }
    }
    sum.elapsed = started.elapsed();
    sum
}

async fn client(address: SocketAddr, request: Bytes, until: Instant) -> Outcome {
    let mut outcome = Outcome::new();
    let mut connection = None;
    loop {
        let sent = Instant::now();
        if sent >= until {
            return outcome;
        }
        let result = call(&mut connection, address, &request).await;
        outcome.count(sent.elapsed(), &result);
        if result.is_err() {
            // Without a pause, a server that refuses connections would make this loop spin.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
