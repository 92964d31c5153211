//! Waits after a change until the gateways have applied it.

use std::time::Duration;

use weir_proto::v1;

use crate::args::WaitArgs;
use crate::client::{Client, Retry};
use crate::error::Error;
use crate::output::Io;

/// Added to the wait time of the control plane for the network.
const MARGIN: Duration = Duration::from_secs(5);

/// Waits and prints how many gateways have applied the revision. Fails if some have not in time.
pub(super) async fn applied(
    client: &Client,
    io: &mut Io<'_>,
    args: &WaitArgs,
    revision: u64,
) -> Result<(), Error> {
    if args.no_wait {
        return Ok(());
    }
    let timeout = prost_types::Duration::try_from(args.wait).ok();
    let request = v1::WaitAppliedRequest { revision, timeout };
    let answer =
        client
            .call_within(args.wait + MARGIN, Retry::Once, request, |mut c, r| async move {
                c.wait_applied(r).await
            })
            .await?;
    io.note(&line(&answer, revision))?;
    for gateway in &answer.refused {
        for error in &gateway.errors {
            let what = super::gateways::refused(error);
            io.note(&format!("{} refuses {what}: {}", gateway.gateway_id, error.message))?;
        }
    }
    match () {
        () if !answer.pending.is_empty() => Err(Error::Pending),
        () if !answer.refused.is_empty() => Err(Error::PartlyRefused),
        () => Ok(()),
    }
}

fn line(answer: &v1::WaitAppliedResponse, revision: u64) -> String {
    let roles = [
        (answer.applied, answer.connected, "gateway"),
        (answer.limit_services_applied, answer.limit_services_connected, "limit service"),
    ];
    let count = |(applied, connected, role): (u32, u32, &str)| {
        format!("{applied} of {connected} {role}{}", if connected == 1 { "" } else { "s" })
    };
    let counts: Vec<String> =
        roles.into_iter().filter(|(_, connected, _)| *connected > 0).map(count).collect();
    if counts.is_empty() {
        return format!("no gateway is connected; each applies revision {revision} when it connects");
    }
    let elapsed = answer.elapsed.and_then(|d| Duration::try_from(d).ok()).unwrap_or_default();
    let mut text =
        format!("applied on {} at revision {revision} in {} ms", counts.join(" and "), elapsed.as_millis());
    if !answer.pending.is_empty() {
        text.push_str("; pending: ");
        text.push_str(&answer.pending.join(", "));
    }
    text
}
