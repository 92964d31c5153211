//! Calls that a connected gateway answers, because limits and usage are in the store of the gateways.

use prost::Message as _;
use tonic::Status;
use weir_proto::resource::Spec;
use weir_proto::v1::{self, QuestionRefusalKind, ResourceKind};

use super::{Admin, Handle};
use crate::gateways::questions::{Answer, Question, Unanswered, line};
use crate::model::{Key, Refusal, State};
use crate::services::invalid;

/// Bytes of a question that is passed on: a few names.
const QUESTION_BYTES_MAX: usize = 4 << 10;

impl Handle<v1::QueryUsageRequest> for Admin {
    type Answer = v1::QueryUsageResponse;

    async fn do_call(&self, request: v1::QueryUsageRequest) -> Result<Self::Answer, Status> {
        if request.encoded_len() > QUESTION_BYTES_MAX {
            return Err(invalid("tenant", "this request is larger than any with valid names"));
        }
        match self.ask(Question::Usage(request)).await? {
            (gateway_id, Answer::Usage(answer)) => Ok(v1::QueryUsageResponse { gateway_id, ..answer }),
            (gateway_id, other) => Err(unfit(&gateway_id, other)),
        }
    }
}

impl Handle<v1::ExplainLimitsRequest> for Admin {
    type Answer = v1::ExplainLimitsResponse;

    async fn do_call(&self, request: v1::ExplainLimitsRequest) -> Result<Self::Answer, Status> {
        usable(&self.0.catalog.state(), &request)?;
        match self.ask(Question::Limits(request)).await? {
            (gateway_id, Answer::Limits(mut answer)) => {
                self.add_last_minute(&mut answer.limits);
                Ok(v1::ExplainLimitsResponse { gateway_id, ..answer })
            }
            (gateway_id, other) => Err(unfit(&gateway_id, other)),
        }
    }
}

impl Admin {
    /// Adds what all gateways used, which the gateway that answered cannot know.
    fn add_last_minute(&self, limits: &mut [v1::ExplainedLimit]) {
        self.0.aggregate.timeseries().read(|figures| {
            let known = figures.last_minute();
            for limit in limits {
                let key = (limit.scope_kind.clone(), limit.scope.clone(), limit.kind.clone());
                limit.last_minute = known.get(&key).copied();
            }
        });
    }

    async fn ask(&self, question: Question) -> Result<(String, Answer), Status> {
        let connected = *self.0.membership.count().borrow() > 0;
        self.0.questions.ask(&question, connected).await.map_err(|unanswered| {
            let why = unanswered.to_string();
            match unanswered {
                Unanswered::Busy => Status::resource_exhausted(why),
                Unanswered::NoGateway | Unanswered::Unknown | Unanswered::Failed(_) => {
                    Refusal::Precondition(why).into()
                }
            }
        })
    }
}

/// Whether key and model are there and the key can be used: gateways know nothing of a key that is revoked.
fn usable(state: &State, request: &v1::ExplainLimitsRequest) -> Result<(), Status> {
    let key = Key::new(ResourceKind::ApiKey, &request.key);
    let model = Key::new(ResourceKind::Model, &request.model);
    if state.get(&model).is_none() {
        return Err(Refusal::NotFound(model).into());
    }
    let Some(stored) = state.get(&key) else { return Err(Refusal::NotFound(key).into()) };
    match &stored.checked.spec {
        Spec::ApiKey(spec) if spec.revoked => {
            let why =
                format!("{key} is revoked: every gateway refuses it; weir key create makes another one");
            Err(Refusal::Precondition(why).into())
        }
        _ => Ok(()),
    }
}

/// The status for an answer that is none.
fn unfit(gateway_id: &str, answer: Answer) -> Status {
    match answer {
        Answer::Refusal(refusal) => match refusal.kind() {
            QuestionRefusalKind::Invalid => Status::invalid_argument(line(&refusal.message)),
            QuestionRefusalKind::NotFound => Status::not_found(line(&refusal.message)),
            QuestionRefusalKind::Unavailable | QuestionRefusalKind::Unspecified => {
                Refusal::Precondition(format!("gateway {gateway_id}: {}", line(&refusal.message))).into()
            }
        },
        Answer::Usage(_) | Answer::Limits(_) => {
            Status::internal(format!("gateway {gateway_id} answered another question"))
        }
    }
}
