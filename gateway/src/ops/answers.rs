//! Answers the questions of control planes about limits and usage.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use weir_proto::v1::QuestionRefusalKind;

use super::page::PageError;
use super::{explain, usage};
use crate::control::live_config::LiveConfig;
use crate::control::questions::{Answer, Asked, Question, Questions, refusal};
use crate::limits::ledger::Ledger;

/// Questions that are answered at the same time, few enough for the store to admit requests meanwhile.
const AT_ONCE: usize = 4;
/// The time for one answer; the control plane has given up by then.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer: some ten thousand sums. A control plane takes 4 MiB in one message.
const ANSWER_BYTES_MAX: usize = 3 << 20;

/// Answers questions from the configuration and the ledger of this gateway.
#[derive(Debug)]
pub struct Answers {
    live: Arc<LiveConfig>,
    ledger: Arc<Ledger>,
    questions: mpsc::Receiver<Asked>,
}

impl Answers {
    /// Where questions go, and what answers them, which must be run.
    pub fn new(live: Arc<LiveConfig>, ledger: Arc<Ledger>) -> (Questions, Self) {
        let (asking, questions) = Questions::channel();
        (asking, Self { live, ledger, questions })
    }

    /// Answers until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { live, ledger, mut questions } = self;
        // Open answers end with the set.
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(_) = open.join_next(), if !open.is_empty() => {}
                Some(asked) = questions.recv(), if open.len() < AT_ONCE => {
                    open.spawn(reply(live.clone(), ledger.clone(), asked));
                }
            }
        }
    }
}

async fn reply(live: Arc<LiveConfig>, ledger: Arc<Ledger>, asked: Asked) {
    let Asked { question, mut reply } = asked;
    let late = "the limit store does not answer in time; for usage, ask for fewer days or for one tenant";
    let answer = tokio::select! {
        // Nobody waits any more.
        () = reply.closed() => return,
        answer = tokio::time::timeout(TIMEOUT, answer(&live, &ledger, &question)) => answer,
    };
    let answer = answer.unwrap_or_else(|_| refusal(QuestionRefusalKind::Unavailable, late));
    let _ = reply.send(bounded(answer));
}

async fn answer(live: &LiveConfig, ledger: &Arc<Ledger>, question: &Question) -> Answer {
    let answer = match question {
        Question::Usage(request) => match usage::Question::of(request, weir_runtime::wall_clock()) {
            Ok(question) => usage::usage(live, ledger, &question).await.map(Answer::Usage),
            Err(error) => Err(error),
        },
        Question::Limits(request) => match explain::Question::of(request) {
            Ok(question) => explain::explain(live, ledger, &question).await.map(Answer::Limits),
            Err(error) => Err(error),
        },
    };
    answer.unwrap_or_else(|error| {
        let kind = match &error {
            PageError::BadQuery(_) => QuestionRefusalKind::Invalid,
            PageError::Unknown { .. } => QuestionRefusalKind::NotFound,
            PageError::Store(_) => QuestionRefusalKind::Unavailable,
        };
        refusal(kind, error.to_string())
    })
}

/// An answer that is too large for one message is refused, with what to ask for instead.
fn bounded(answer: Answer) -> Answer {
    let bytes = match &answer {
        Answer::Usage(usage) => usage.encoded_len(),
        Answer::Limits(limits) => limits.encoded_len(),
        Answer::Refusal(_) => 0,
    };
    if bytes <= ANSWER_BYTES_MAX {
        return answer;
    }
    let why =
        "the answer is larger than 3 MiB; ask for fewer days, for one tenant, or for sums by fewer fields";
    refusal(QuestionRefusalKind::Invalid, why)
}

#[cfg(test)]
mod tests {
    use weir_proto::v1;

    use super::*;

    #[test]
    fn an_answer_that_is_too_large_is_refused_with_a_remedy() {
        let usage = |sums| {
            let sum = v1::UsageSum { tenant: "t".repeat(60), ..v1::UsageSum::default() };
            Answer::Usage(v1::QueryUsageResponse { sums: vec![sum; sums], ..Default::default() })
        };
        assert_eq!(bounded(usage(1000)), usage(1000));
        let Answer::Refusal(refusal) = bounded(usage(100_000)) else { panic!("too large") };
        assert_eq!(refusal.kind(), QuestionRefusalKind::Invalid);
        assert!(refusal.message.contains("fewer days"), "{}", refusal.message);
    }
}
