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
    let applied = format!("applied on {applied} of {connected} gateways");
    let waiting_for = progress.waiting_for.join(", ");
    match (progress.in_flight, waiting_for.as_str()) {
        (in_flight, "") => format!("{in_flight} in progress; {applied}"),
        // None is known, which is not the same as none.
        (0, _) => format!("{applied}; waiting for the reports of {waiting_for}"),
        (in_flight, _) => {
            format!("{in_flight} or more in progress; {applied}; waiting for the reports of {waiting_for}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_reported_yet_is_not_said_to_be_nothing() {
        let of = |in_flight, waiting_for: &[&str]| {
            let waiting_for = waiting_for.iter().map(|id| (*id).to_owned()).collect();
            let progress =
                v1::DrainProgress { applied: 2, connected: 2, in_flight, waiting_for, ..Default::default() };
            line(&progress, false)
        };
        assert_eq!(of(5, &[]), "5 in progress; applied on 2 of 2 gateways");
        assert_eq!(
            of(0, &["gateway-0", "gateway-1"]),
            "applied on 2 of 2 gateways; waiting for the reports of gateway-0, gateway-1"
        );
        assert!(of(5, &["gateway-1"]).starts_with("5 or more in progress; "));
    }
}
