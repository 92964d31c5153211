//! `weir drain`: sends no new requests to a backend and waits for those in progress.

use std::time::Duration;

use serde_json::json;
use weir_proto::manifest::format_duration;
use weir_proto::v1;

use crate::args::{Cli, DrainArgs};
use crate::client::{Client, Retry, request_id};
use crate::error::Error;
use crate::output::Io;

/// How long one call waits for progress.
const STEP: Duration = Duration::from_secs(5);
/// Added to the wait time for the network.
const MARGIN: Duration = Duration::from_secs(5);

pub(super) async fn drain(cli: &Cli, io: &mut Io<'_>, args: &DrainArgs) -> Result<(), Error> {
    let client = Client::connect(cli).await?;
    let request =
        v1::DrainRequest { backend: args.backend.clone(), request_id: request_id(), validate_only: false };
    let started = client.call(Retry::Once, request, |mut c, r| async move { c.drain(r).await }).await?;
    let operation = started.operation.ok_or(Error::Answer("operation"))?;
    let revision = operation.drain.as_ref().map_or(0, |drain| drain.revision);
    io.result(
        || format!("backend {} is draining\n", args.backend),
        || json!({"kind": "backend", "name": args.backend, "action": "drain", "revision": revision}),
    )?;
    if args.no_wait {
        return Ok(());
    }
    let (start, mut operation) = (tokio::time::Instant::now(), operation);
    let mut said = String::new();
    loop {
        let progress = operation.drain.clone().unwrap_or_default();
        let line = line(&progress, operation.done);
        if line != said {
            io.note(&line)?;
            said = line;
        }
        if operation.done {
            return Ok(());
        }
        let left = args.wait.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(Error::Undrained(args.backend.clone(), format_duration(args.wait)));
        }
        let step = left.min(STEP);
        let request = v1::WaitOperationRequest {
            name: operation.name.clone(),
            timeout: prost_types::Duration::try_from(step).ok(),
            last_seen: Some(progress),
        };
        let answer =
            client
                .call_within(step + MARGIN, Retry::Once, request, |mut c, r| async move {
                    c.wait_operation(r).await
                })
                .await?;
        operation = answer.operation.ok_or(Error::Answer("operation"))?;
    }
}

fn line(progress: &v1::DrainProgress, done: bool) -> String {
    let (applied, connected) = (progress.applied, progress.connected);
    if done {
        return format!("drained: no request is in progress any more ({applied} of {connected} gateways)");
    }
    let mut line =
        format!("{} in progress; applied on {applied} of {connected} gateways", progress.in_flight);
    if !progress.waiting_for.is_empty() {
        line.push_str(&format!("; waiting for {}", progress.waiting_for.join(", ")));
    }
    line
}
