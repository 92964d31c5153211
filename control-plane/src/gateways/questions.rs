//! Questions that only gateways can answer: which gateways can be asked, and asking one after another until one answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use weir_proto::v1::QuestionRefusalKind;
pub(crate) use weir_proto::v1::answer_questions_request::Answer;
pub(crate) use weir_proto::v1::answer_questions_response::Question;

use super::registry::{Claim, Taken};

/// Open questions of all callers; an answer is at most one report, 4 MiB.
const OPEN_MAX: usize = 16;
/// Questions that wait for one gateway's stream.
const QUEUE: usize = 4;
/// Gateways that are asked one after the other...
const ATTEMPTS: usize = 3;
/// ...each for so long: together less than the 10 s that `weir` waits for a call.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// A gateway that has just connected opens its stream of questions within this time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(2);
/// Characters of a gateway's own text that are passed on.
const TEXT_MAX: usize = 512;

/// Why no gateway answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unanswered {
    /// As many questions are open as may be.
    #[error("{OPEN_MAX} questions are being asked already; try again in a moment")]
    Busy,
    /// There is no gateway.
    #[error(
        "no gateway is connected, and limits and usage are in the store of the gateways; start weir-gateway with \
         --control-plane and its token: its log says why it cannot connect"
    )]
    NoGateway,
    /// There are gateways of an older version.
    #[error(
        "no connected gateway takes questions of a control plane; upgrade the gateways, or ask one of them with \
         --gateway and the address of its operations port"
    )]
    Unknown,
    /// Those that were asked, and what each of them said.
    #[error("{}; weir gateways and the logs of these gateways say more", each(.0))]
    Failed(Vec<(String, String)>),
}

fn each(failures: &[(String, String)]) -> String {
    let each: Vec<String> = failures.iter().map(|(id, why)| format!("gateway {id}: {why}")).collect();
    each.join("; ")
}

/// A question, and where its answer goes.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) question: Question,
    pub(crate) reply: oneshot::Sender<Answer>,
}

/// The gateways that can be asked. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Questions {
    streams: Arc<Mutex<Streams>>,
    /// Changes when a stream opens.
    opened: watch::Sender<u64>,
    open: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Streams {
    by_gateway: BTreeMap<String, Stream>,
    /// The number of the last stream.
    last: u64,
    /// Questions asked so far; each begins with the next gateway.
    turn: usize,
}

#[derive(Debug)]
struct Stream {
    number: u64,
    incarnation: String,
    asks: mpsc::Sender<Ask>,
}

/// The questions for one stream; dropping it ends the stream's part in answering.
#[derive(Debug)]
pub(crate) struct Asks {
    questions: Questions,
    gateway: String,
    number: u64,
    receiver: mpsc::Receiver<Ask>,
}

impl Default for Questions {
    fn default() -> Self {
        Self {
            streams: Arc::default(),
            opened: watch::Sender::default(),
            open: Arc::new(Semaphore::new(OPEN_MAX)),
        }
    }
}

impl Questions {
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the stream of a gateway. It replaces an older stream of the same process, and that of another process only if
    /// the token is bound to this gateway.
    pub(crate) fn join(&self, gateway: &str, incarnation: &str, claim: Claim) -> Result<Asks, Taken> {
        let (asks, receiver) = mpsc::channel(QUEUE);
        let mut streams = self.streams();
        let there = streams.by_gateway.get(gateway);
        if there.is_some_and(|there| !claim.may_replace(&there.incarnation, incarnation)) {
            return Err(Taken::ByAnother(gateway.to_owned()));
        }
        streams.last += 1;
        let number = streams.last;
        let stream = Stream { number, incarnation: incarnation.to_owned(), asks };
        streams.by_gateway.insert(gateway.to_owned(), stream);
        drop(streams);
        self.opened.send_replace(number);
        Ok(Asks { questions: self.clone(), gateway: gateway.to_owned(), number, receiver })
    }

    /// Asks gateways in turn until one answers; `connected` says whether there are gateways at all. Returns which one
    /// answered. A refusal that every gateway would repeat is an answer.
    pub(crate) async fn ask(
        &self,
        question: &Question,
        connected: bool,
    ) -> Result<(String, Answer), Unanswered> {
        let _permit = self.open.try_acquire().map_err(|_| Unanswered::Busy)?;
        if connected {
            self.wait_for_one().await;
        }
        let mut failures = Vec::new();
        for (gateway, asks) in self.in_turn() {
            let (reply, answer) = oneshot::channel();
            // A gateway that is gone, or does not take its questions, costs no time.
            if asks.try_send(Ask { question: question.clone(), reply }).is_err() {
                continue;
            }
            let why = match timeout(ANSWER_TIMEOUT, answer).await {
                Ok(Ok(Answer::Refusal(refusal)))
                    if refusal.kind() == QuestionRefusalKind::Unavailable
                        || refusal.kind() == QuestionRefusalKind::Unspecified =>
                {
                    line(&refusal.message)
                }
                Ok(Ok(answer)) => return Ok((gateway, answer)),
                Ok(Err(_)) => continue,
                Err(_) => format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
            };
            failures.push((gateway, why));
            if failures.len() == ATTEMPTS {
                break;
            }
        }
        Err(match (failures.is_empty(), connected) {
            (false, _) => Unanswered::Failed(failures),
            (true, true) => Unanswered::Unknown,
            (true, false) => Unanswered::NoGateway,
        })
    }

    /// Returns when a gateway can be asked, or after [`JOIN_TIMEOUT`].
    async fn wait_for_one(&self) {
        let (mut opened, deadline) = (self.opened.subscribe(), Instant::now() + JOIN_TIMEOUT);
        while self.streams().by_gateway.is_empty() {
            if !matches!(timeout_at(deadline, opened.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// All gateways, each time beginning with the next one.
    fn in_turn(&self) -> Vec<(String, mpsc::Sender<Ask>)> {
        let mut streams = self.streams();
        let mut all: Vec<_> =
            streams.by_gateway.iter().map(|(id, stream)| (id.clone(), stream.asks.clone())).collect();
        if !all.is_empty() {
            let first = streams.turn % all.len();
            all.rotate_left(first);
        }
        streams.turn = streams.turn.wrapping_add(1);
        all
    }
}

impl Asks {
    /// The next question; `None` when another stream has replaced this one.
    pub(crate) async fn next(&mut self) -> Option<Ask> {
        self.receiver.recv().await
    }
}

impl Drop for Asks {
    fn drop(&mut self) {
        let mut streams = self.questions.streams();
        if streams.by_gateway.get(&self.gateway).is_some_and(|stream| stream.number == self.number) {
            streams.by_gateway.remove(&self.gateway);
        }
    }
}

/// A gateway's text on one line, cut.
pub(crate) fn line(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use weir_proto::v1;

    use super::*;

    fn question() -> Question {
        Question::Usage(v1::QueryUsageRequest::default())
    }

    fn answer(requests: i64) -> Answer {
        let total = Some(v1::UsageSum { requests, ..Default::default() });
        Answer::Usage(v1::QueryUsageResponse { total, ..Default::default() })
    }

    fn refusal(kind: QuestionRefusalKind, message: &str) -> Answer {
        Answer::Refusal(v1::QuestionRefusal { kind: kind.into(), message: message.into() })
    }

    /// Has a gateway answer every question in this way.
    fn answering(questions: &Questions, gateway: &str, answer: Answer) {
        let mut asks = questions.join(gateway, "1", Claim::Own).unwrap();
        tokio::spawn(async move {
            while let Some(ask) = asks.next().await {
                let _ = ask.reply.send(answer.clone());
            }
        });
    }

    #[tokio::test(start_paused = true)]
    async fn questions_go_to_the_gateways_in_turn() {
        let questions = Questions::default();
        answering(&questions, "a", answer(1));
        answering(&questions, "b", answer(2));
        let mut answered = Vec::new();
        for _ in 0..4 {
            answered.push(questions.ask(&question(), true).await.unwrap().0);
        }
        assert_eq!(answered, ["a", "b", "a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_gateway_that_is_silent_gone_or_without_its_store_is_passed_over() {
        let questions = Questions::default();
        let silent = questions.join("a", "1", Claim::Own).unwrap();
        answering(&questions, "b", refusal(QuestionRefusalKind::Unavailable, "no\nstore"));
        answering(&questions, "c", answer(7));
        assert_eq!(questions.ask(&question(), true).await, Ok(("c".to_owned(), answer(7))));
        drop(silent);
        let mut gone = questions.join("c", "2", Claim::Own).unwrap();
        tokio::spawn(async move { gone.next().await });
        let failed = questions.ask(&question(), true).await.unwrap_err();
        assert_eq!(failed, Unanswered::Failed(vec![("b".into(), "nostore".into())]));
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_three_silent_gateways_are_waited_for() {
        let questions = Questions::default();
        let silent: Vec<_> =
            ["a", "b", "c", "d"].map(|id| questions.join(id, "1", Claim::Own).unwrap()).into();
        let began = Instant::now();
        let Err(Unanswered::Failed(failures)) = questions.ask(&question(), true).await else {
            panic!("nobody answers")
        };
        assert_eq!((failures.len(), began.elapsed()), (ATTEMPTS, ANSWER_TIMEOUT * 3));
        drop(silent);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wrong_question_is_asked_once() {
        let questions = Questions::default();
        let wrong = refusal(QuestionRefusalKind::Invalid, "from: must not be after to");
        answering(&questions, "a", wrong.clone());
        answering(&questions, "b", answer(1));
        assert_eq!(questions.ask(&question(), true).await, Ok(("a".to_owned(), wrong)));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_gateway_the_remedy_is_named_and_one_that_connects_is_waited_for() {
        let questions = Questions::default();
        let began = Instant::now();
        assert_eq!(questions.ask(&question(), false).await, Err(Unanswered::NoGateway));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(questions.ask(&question(), true).await, Err(Unanswered::Unknown));
        let joins = async {
            tokio::time::sleep(JOIN_TIMEOUT / 2).await;
            answering(&questions, "a", answer(1));
        };
        let asked = question();
        let (asked, ()) = tokio::join!(questions.ask(&asked, true), joins);
        assert_eq!(asked, Ok(("a".to_owned(), answer(1))));
    }

    #[tokio::test(start_paused = true)]
    async fn open_questions_are_bounded_and_places_come_free() {
        let questions = Questions::default();
        let _silent = ["a", "b", "c", "d"].map(|id| questions.join(id, "1", Claim::Own).unwrap());
        let asked = question();
        let open: Vec<_> = (0..OPEN_MAX)
            .map(|_| {
                let (questions, asked) = (questions.clone(), asked.clone());
                tokio::spawn(async move { questions.ask(&asked, true).await })
            })
            .collect();
        tokio::task::yield_now().await;
        assert_eq!(questions.ask(&asked, true).await, Err(Unanswered::Busy));
        for open in open {
            assert!(open.await.unwrap().is_err());
        }
        assert_ne!(questions.ask(&asked, true).await, Err(Unanswered::Busy));
    }

    #[test]
    fn with_a_shared_token_no_other_process_takes_the_questions_of_one_that_is_here() {
        let questions = Questions::default();
        let _first = questions.join("g", "1", Claim::Shared).unwrap();
        assert!(questions.join("g", "2", Claim::Shared).is_err());
        let mut old = questions.join("g", "1", Claim::Shared).unwrap();
        let _new = questions.join("g", "2", Claim::Own).unwrap();
        assert!(matches!(old.receiver.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }
}
