//! Questions of control planes that only a gateway can answer, because the limit store is the gateways'. One stream per
//! control plane, beside its report stream and on the same connection, so that nothing has to listen for questions.
//!
//! Every connected control plane may ask, the leader or not: answers change nothing.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Channel;
use weir_discovery::Identity;
use weir_proto::v1::report_service_client::ReportServiceClient;
use weir_proto::v1::{self, AnswerQuestionsRequest, QuestionRefusalKind};

/// What is asked.
pub use weir_proto::v1::answer_questions_response::Question;

/// What is answered.
pub use weir_proto::v1::answer_questions_request::Answer;

/// Questions of one control plane that are answered at the same time; further ones are refused, and another gateway is
/// asked.
const AT_ONCE: usize = 4;
/// Bytes of a question; it has a few names.
const QUESTION_BYTES_MAX: usize = 16 << 10;
/// The pause before a stream that ended is opened again.
const PAUSE: Duration = Duration::from_secs(1);

/// A question, and where its answer goes.
#[derive(Debug)]
pub struct Asked {
    /// What is asked.
    pub question: Question,
    /// Where the answer goes; closed when nobody waits for it any more.
    pub reply: oneshot::Sender<Answer>,
}

/// Where questions go.
#[derive(Debug, Clone)]
pub struct Questions(mpsc::Sender<Asked>);

impl Questions {
    /// The channel of questions. The receiver must be read.
    pub fn channel() -> (Self, mpsc::Receiver<Asked>) {
        let (sender, receiver) = mpsc::channel(AT_ONCE);
        (Self(sender), receiver)
    }

    /// Serves the questions of one control plane; opens the stream again when it ends. Never returns, and ends when it is
    /// dropped.
    pub(super) async fn serve(&self, channel: Channel, identity: &Identity) {
        loop {
            match self.follow(channel.clone(), identity).await {
                // An older control plane has no questions.
                Err(status) if status.code() == Code::Unimplemented => return std::future::pending().await,
                Err(status) => tracing::debug!(reason = status.message(), "stream of questions ended"),
                Ok(()) => {}
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn follow(&self, channel: Channel, identity: &Identity) -> Result<(), tonic::Status> {
        let ended = |_| tonic::Status::cancelled("the stream ended");
        let mut client = ReportServiceClient::new(channel).max_decoding_message_size(QUESTION_BYTES_MAX);
        let (up, answers) = mpsc::channel(AT_ONCE);
        let hello = AnswerQuestionsRequest {
            gateway_id: identity.id.clone(),
            incarnation: identity.incarnation.clone(),
            ..AnswerQuestionsRequest::default()
        };
        up.send(hello).await.map_err(ended)?;
        let request = identity.request(ReceiverStream::new(answers)).map_err(tonic::Status::internal)?;
        let mut stream = client.answer_questions(request).await?.into_inner();
        let mut open = FuturesUnordered::new();
        loop {
            let answered = tokio::select! {
                message = stream.message() => match message? {
                    None => return Ok(()),
                    Some(asked) if open.len() >= AT_ONCE => answer_to(asked.number, busy()),
                    Some(asked) => {
                        open.push(self.answer(asked));
                        continue;
                    }
                },
                Some(answered) = open.next() => answered,
            };
            up.send(answered).await.map_err(ended)?;
        }
    }

    async fn answer(&self, asked: v1::AnswerQuestionsResponse) -> AnswerQuestionsRequest {
        let number = asked.number;
        let Some(question) = asked.question else {
            let why =
                "this gateway does not know the question; check that it has the control plane's version";
            return answer_to(number, refusal(QuestionRefusalKind::Unavailable, why));
        };
        let (reply, answer) = oneshot::channel();
        if self.0.send(Asked { question, reply }).await.is_err() {
            return answer_to(number, busy());
        }
        // It is dropped unanswered when the gateway stops.
        answer_to(number, answer.await.unwrap_or_else(|_| busy()))
    }
}

fn answer_to(number: u64, answer: Answer) -> AnswerQuestionsRequest {
    AnswerQuestionsRequest { number, answer: Some(answer), ..AnswerQuestionsRequest::default() }
}

/// Why a question is not answered.
pub fn refusal(kind: QuestionRefusalKind, message: impl Into<String>) -> Answer {
    Answer::Refusal(v1::QuestionRefusal { kind: kind.into(), message: message.into() })
}

fn busy() -> Answer {
    refusal(QuestionRefusalKind::Unavailable, "this gateway answers other questions, or is stopping")
}
