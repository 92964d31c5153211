//! The liveness probe: HEAD, and GET if HEAD is not conclusive.

use std::error::Error;
use std::time::Duration;

use http::Method;
use tokio::time::{Instant, timeout};
use weir_proto::v1::ProbeOutcome;
use weir_runtime::RefusedAddress;

use crate::answer::{Answer, Finding};

/// Probes within `limit`; `ask` sends one request to the health page. Returns the finding, and the latency of a successful
/// probe.
pub async fn liveness<Asked>(ask: impl Fn(Method) -> Asked, limit: Duration) -> (Finding, Option<Duration>)
where
    Asked: Future<Output = Result<Answer, Finding>>,
{
    let began = Instant::now();
    let found = timeout(limit, head_then_get(ask)).await.unwrap_or_else(|_| late(limit));
    let latency = found.is_good().then(|| began.elapsed());
    (found, latency)
}

async fn head_then_get<Asked>(ask: impl Fn(Method) -> Asked) -> Finding
where
    Asked: Future<Output = Result<Answer, Finding>>,
{
    match ask(Method::HEAD).await {
        Ok(answer) => {
            let found = judge(&answer);
            if found.is_good() {
                return found;
            }
        }
        Err(found) if found.outcome == ProbeOutcome::Refused => return found,
        // A kept connection may have been closed by the backend, so the probe is repeated on a new one.
        Err(_) => {}
    }
    ask(Method::GET).await.map_or_else(|found| found, |answer| judge(&answer))
}

fn judge(answer: &Answer) -> Finding {
    answer.liveness().unwrap_or_else(|| answer.refusal())
}

/// No answer within a time limit.
pub fn late(limit: Duration) -> Finding {
    Finding::new(ProbeOutcome::Timeout, format!("no answer within {} ms", limit.as_millis()))
}

/// A request that a client could not send since there was no connection, or got no answer to.
pub fn no_answer(error: &(dyn Error + 'static), is_connect: bool) -> Finding {
    if let Some(refused) = RefusedAddress::of(error) {
        Finding::new(ProbeOutcome::Refused, refused.to_string())
    } else if is_connect {
        Finding::new(ProbeOutcome::Refused, "cannot connect")
    } else {
        Finding::new(ProbeOutcome::Broken, "the connection broke")
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use bytes::Bytes;
    use http::StatusCode;

    use super::*;

    fn answer(status: StatusCode) -> Result<Answer, Finding> {
        Ok(Answer { status, retry_after: false, body: Bytes::new(), with_credential: false })
    }

    /// Probes with these answers to HEAD and GET; what was found, and what was asked.
    async fn probed(
        head: Result<Answer, Finding>,
        get: Result<Answer, Finding>,
    ) -> (ProbeOutcome, String, Vec<Method>) {
        let asked = RefCell::default();
        let ask = |method: Method| {
            let answer = if method == Method::HEAD { head.clone() } else { get.clone() };
            RefCell::<Vec<Method>>::borrow_mut(&asked).push(method);
            async { answer }
        };
        let (found, latency) = liveness(ask, Duration::from_secs(1)).await;
        assert_eq!(latency.is_some(), found.is_good());
        (found.outcome, found.detail, asked.into_inner())
    }

    #[tokio::test]
    async fn get_is_asked_only_where_head_does_not_tell() {
        let broken = || Err(Finding::new(ProbeOutcome::Broken, "the connection broke"));
        let refused = || Err(Finding::new(ProbeOutcome::Refused, "cannot connect"));
        let (both, head) = (vec![Method::HEAD, Method::GET], vec![Method::HEAD]);
        for (answers, outcome, detail, asked) in [
            ((answer(StatusCode::NOT_FOUND), broken()), ProbeOutcome::Pass, "answered 404", &head),
            ((refused(), answer(StatusCode::OK)), ProbeOutcome::Refused, "cannot connect", &head),
            ((broken(), answer(StatusCode::OK)), ProbeOutcome::Pass, "answered 200", &both),
            (
                (answer(StatusCode::NOT_IMPLEMENTED), answer(StatusCode::OK)),
                ProbeOutcome::Pass,
                "answered 200",
                &both,
            ),
            ((answer(StatusCode::OK), refused()), ProbeOutcome::Pass, "answered 200", &head),
            (
                (answer(StatusCode::BAD_GATEWAY), broken()),
                ProbeOutcome::Broken,
                "the connection broke",
                &both,
            ),
            ((broken(), answer(StatusCode::BAD_GATEWAY)), ProbeOutcome::Status, "answered 502", &both),
        ] {
            let found = probed(answers.0, answers.1).await;
            assert_eq!(found, (outcome, detail.to_owned(), asked.clone()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_timeout() {
        let (found, latency) = liveness(|_| std::future::pending(), Duration::from_millis(250)).await;
        assert_eq!(found, Finding::new(ProbeOutcome::Timeout, "no answer within 250 ms"));
        assert_eq!(latency, None);
    }
}
