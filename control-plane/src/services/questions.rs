//! The stream of questions to one gateway.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{interval, timeout};
use tonic::{Status, Streaming};
use weir_proto::v1::{AnswerQuestionsRequest, AnswerQuestionsResponse};

use super::{Shared, check_about};
use crate::auth::Caller;
use crate::gateways::questions::Answer;
use crate::gateways::registry::Claim;

/// Questions in the outbox of a stream.
pub(super) const OUTBOX: usize = 8;
/// A stream whose gateway does not introduce itself within this time is closed.
const FIRST_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two checks that the token is still valid.
const CHECK: Duration = Duration::from_secs(10);

/// Serves a stream to its end.
pub(super) async fn serve(
    shared: Shared,
    caller: Caller,
    mut inbound: Streaming<AnswerQuestionsRequest>,
    outbox: mpsc::Sender<Result<AnswerQuestionsResponse, Status>>,
) -> Result<(), Status> {
    let first = timeout(FIRST_TIMEOUT, inbound.message())
        .await
        .map_err(|_| Status::invalid_argument("no first message within 5 s"))??;
    let first = first.ok_or_else(|| Status::invalid_argument("the first message names the gateway"))?;
    check_about(&first.gateway_id, &[("incarnation", &first.incarnation)])?;
    shared.authority.speaks_for(&caller, &first.gateway_id)?;
    let joined = shared.questions.join(&first.gateway_id, &first.incarnation, Claim::of(&caller));
    let mut asks = joined.map_err(|taken| Status::aborted(taken.to_string()))?;
    let mut open: BTreeMap<u64, oneshot::Sender<Answer>> = BTreeMap::new();
    let mut number = 0;
    let mut checks = interval(CHECK);
    loop {
        tokio::select! {
            ask = asks.next() => {
                let ask = ask.ok_or_else(|| Status::aborted("another stream of this gateway is here"))?;
                // Nobody waits for the answers that did not come in time.
                open.retain(|_, reply| !reply.is_closed());
                number += 1;
                let question = AnswerQuestionsResponse { number, question: Some(ask.question) };
                // A gateway that does not read is passed over: dropping the reply says so.
                if outbox.try_send(Ok(question)).is_ok() {
                    open.insert(number, ask.reply);
                }
            }
            message = inbound.message() => match message? {
                None => return Ok(()),
                Some(AnswerQuestionsRequest { number, answer, .. }) => {
                    if let (Some(reply), Some(answer)) = (open.remove(&number), answer) {
                        let _ = reply.send(answer);
                    }
                }
            },
            _ = checks.tick() => shared.authority.still(&caller)?,
        }
    }
}
