//! Questions that gateways answer: who may ask, who is asked, and what comes of it when nobody answers.

use super::*;
use crate::model::tests::resource;
use v1::answer_questions_request::Answer;
use v1::answer_questions_response::Question;

/// A gateway's stream of questions, driven by hand.
struct Answering {
    said: mpsc::Sender<v1::AnswerQuestionsRequest>,
    heard: Streaming<v1::AnswerQuestionsResponse>,
}

impl Answering {
    async fn open(plane: &Plane, id: &str, incarnation: &str) -> Self {
        let (said, requests) = mpsc::channel(8);
        let hello = v1::AnswerQuestionsRequest {
            gateway_id: id.into(),
            incarnation: incarnation.into(),
            ..Default::default()
        };
        said.send(hello).await.unwrap();
        let mut client = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
        let heard = client.answer_questions(ReceiverStream::new(requests)).await.unwrap().into_inner();
        Self { said, heard }
    }

    async fn question(&mut self) -> v1::AnswerQuestionsResponse {
        soon(self.heard.message()).await.unwrap().expect("the stream is open")
    }

    async fn answer(&self, number: u64, answer: Answer) {
        let answer = v1::AnswerQuestionsRequest { number, answer: Some(answer), ..Default::default() };
        self.said.send(answer).await.unwrap();
    }
}

fn usage(requests: i64) -> Answer {
    let total = Some(v1::UsageSum { requests, ..Default::default() });
    Answer::Usage(v1::QueryUsageResponse { total, ..Default::default() })
}

type Call = tokio::task::JoinHandle<Result<v1::QueryUsageResponse, Status>>;

/// Asks in a task of its own. A gateway whose stream is only opening is waited for.
async fn asked(plane: &Plane, request: v1::QueryUsageRequest) -> Call {
    let mut admin = plane.admin().await;
    tokio::spawn(async move { admin.query_usage(request).await.map(tonic::Response::into_inner) })
}

#[tokio::test]
async fn a_question_reaches_a_gateway_and_its_answer_the_caller() {
    let plane = Plane::memory(vec![]).await;
    // With its configuration stream it counts as connected.
    let _connected = plane.gateway(hello("g")).await;
    let mut gateway = Answering::open(&plane, "g", "1").await;
    let request = v1::QueryUsageRequest { tenant: "acme".into(), ..Default::default() };
    let call = asked(&plane, request.clone()).await;
    let question = gateway.question().await;
    assert_eq!(question.question, Some(Question::Usage(request)));
    // An answer to another question changes nothing.
    gateway.answer(question.number + 7, usage(1)).await;
    gateway.answer(question.number, usage(42)).await;
    let answer = soon(call).await.unwrap().unwrap();
    assert_eq!((answer.total.unwrap().requests, answer.gateway_id.as_str()), (42, "g"));
    plane.stop().await;
}

#[tokio::test]
async fn a_gateway_that_leaves_during_a_question_is_followed_by_another() {
    let plane = Plane::memory(vec![]).await;
    let _connected = plane.gateway(hello("a")).await;
    let (mut leaving, mut staying) =
        (Answering::open(&plane, "a", "1").await, Answering::open(&plane, "b", "1").await);
    let mut both_are_known = false;
    let call = loop {
        let call = asked(&plane, v1::QueryUsageRequest::default()).await;
        let number = tokio::select! {
            asked = leaving.question() => {
                if both_are_known {
                    break call;
                }
                leaving.answer(asked.number, usage(1)).await;
                continue;
            }
            asked = staying.question() => asked.number,
        };
        staying.answer(number, usage(1)).await;
        soon(call).await.unwrap().unwrap();
        both_are_known = true;
    };
    drop(leaving);
    let question = staying.question().await;
    staying.answer(question.number, usage(3)).await;
    assert_eq!(soon(call).await.unwrap().unwrap().gateway_id, "b");
    plane.stop().await;
}

#[tokio::test]
async fn without_a_gateway_the_caller_is_told_what_to_do() {
    let plane = Plane::memory(vec![]).await;
    let refused = plane.admin().await.query_usage(v1::QueryUsageRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("no gateway is connected"), "{}", refused.message());
    assert!(refused.message().contains("start weir-gateway"), "{}", refused.message());
    plane.stop().await;
}

#[tokio::test]
async fn what_a_gateway_refuses_is_said_on_one_line() {
    let plane = Plane::memory(vec![]).await;
    let _connected = plane.gateway(hello("g")).await;
    let mut gateway = Answering::open(&plane, "g", "1").await;
    for (kind, code) in [
        (v1::QuestionRefusalKind::Invalid, Code::InvalidArgument),
        (v1::QuestionRefusalKind::NotFound, Code::NotFound),
        (v1::QuestionRefusalKind::Unavailable, Code::FailedPrecondition),
    ] {
        let call = asked(&plane, v1::QueryUsageRequest::default()).await;
        let number = gateway.question().await.number;
        let message = format!("no\u{1b}[31m\n{}", "x".repeat(2000));
        gateway.answer(number, Answer::Refusal(v1::QuestionRefusal { kind: kind.into(), message })).await;
        let refused = soon(call).await.unwrap().unwrap_err();
        assert_eq!(refused.code(), code);
        let text = refused.message();
        assert!(text.len() < 700 && !text.chars().any(char::is_control), "{text}");
    }
    // An answer to something else is none.
    let call = asked(&plane, v1::QueryUsageRequest::default()).await;
    let number = gateway.question().await.number;
    gateway.answer(number, Answer::Limits(v1::ExplainLimitsResponse::default())).await;
    assert_eq!(soon(call).await.unwrap().unwrap_err().code(), Code::Internal);
    plane.stop().await;
}

#[tokio::test]
async fn a_key_that_is_revoked_is_told_from_one_that_is_not_there() {
    let mut all = cluster(1);
    all.push(tenant("t"));
    let plane = Plane::memory(all).await;
    let mut admin = plane.admin().await;
    for name in ["gone", "good"] {
        let issue = v1::IssueApiKeyRequest { name: name.into(), tenant: "t".into(), ..Default::default() };
        admin.issue_api_key(issue).await.unwrap();
    }
    let spec = v1::ApiKeySpec { revoked: true, ..Default::default() };
    let revoked = v1::UpdateResourceRequest {
        resource: Some(resource("gone", v1::resource::Spec::ApiKey(spec))),
        update_mask: Some(prost_types::FieldMask { paths: vec!["revoked".into()] }),
        ..Default::default()
    };
    admin.update_resource(revoked).await.unwrap();
    let mut ask = async |key: &str, model: &str| {
        let request = v1::ExplainLimitsRequest { key: key.into(), model: model.into(), ..Default::default() };
        let refused = admin.explain_limits(request).await.unwrap_err();
        (refused.code(), refused.message().to_owned())
    };
    let (code, text) = ask("gone", "m").await;
    assert!(code == Code::FailedPrecondition && text.contains("gone is revoked"), "{code:?}: {text}");
    assert_eq!(ask("nobody", "m").await.0, Code::NotFound);
    assert_eq!(ask("good", "nothing").await.0, Code::NotFound);
    let (code, text) = ask("good", "m").await;
    assert!(code == Code::FailedPrecondition && text.contains("no gateway is connected"), "{text}");
    plane.stop().await;
}

/// A limit of requests that a gateway has met, and of which requests that ended used so many.
pub(super) fn met(declared: u64, consumed: u64) -> v1::LimitReport {
    v1::LimitReport {
        scope_kind: "global".into(),
        kind: "requests".into(),
        limit: declared * 5,
        used: Some(1),
        declared,
        period: "minute".into(),
        consumed,
        ..Default::default()
    }
}

/// A report stream; dropping it ends the stream.
pub(super) type Reporting = (mpsc::Sender<v1::StreamReportsRequest>, Streaming<v1::StreamReportsResponse>);

/// Reports limits as a gateway does, for as long as the answer is kept.
pub(super) async fn reporting(plane: &Plane, id: &str, limits: Vec<v1::LimitReport>) -> Reporting {
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let (said, requests) = mpsc::channel(4);
    let report = v1::StreamReportsRequest { gateway_id: id.into(), sequence: 1, ..Default::default() };
    said.send(report.clone()).await.unwrap();
    let heard = reports.stream_reports(ReceiverStream::new(requests)).await.unwrap().into_inner();
    said.send(v1::StreamReportsRequest { sequence: 2, limits, ..report }).await.unwrap();
    (said, heard)
}

#[tokio::test]
async fn the_use_of_the_last_minute_is_added_to_what_a_gateway_answers() {
    let mut all = cluster(1);
    all.push(tenant("t"));
    let plane = Plane::memory(all).await;
    let mut admin = plane.admin().await;
    let issue = v1::IssueApiKeyRequest { name: "k".into(), tenant: "t".into(), ..Default::default() };
    admin.issue_api_key(issue).await.unwrap();
    let _g = reporting(&plane, "g", vec![met(2000, 470)]).await;
    let _h = reporting(&plane, "h", vec![met(2000, 10)]).await;
    let mut gateway = Answering::open(&plane, "g", "1").await;
    let limit = |kind: &str| v1::ExplainedLimit {
        scope_kind: "global".into(),
        kind: kind.into(),
        // What a gateway says of all gateways is not believed.
        last_minute: Some(7),
        ..Default::default()
    };
    let answer =
        v1::ExplainLimitsResponse { limits: vec![limit("requests"), limit("tokens")], ..Default::default() };
    // The figure is of whole seconds that have passed.
    soon(async {
        loop {
            let (mut admin, request) = (
                plane.admin().await,
                v1::ExplainLimitsRequest { key: "k".into(), model: "m".into(), ..Default::default() },
            );
            let call = tokio::spawn(async move { admin.explain_limits(request).await.unwrap().into_inner() });
            let number = gateway.question().await.number;
            gateway.answer(number, Answer::Limits(answer.clone())).await;
            let answer = call.await.unwrap();
            let shown: Vec<_> = answer.limits.iter().map(|limit| limit.last_minute).collect();
            if shown == [Some(480), None] {
                break;
            }
        }
    })
    .await;
    plane.stop().await;
}

#[tokio::test]
async fn a_viewer_may_ask_and_a_gateway_may_not() {
    let plane = Plane::memory(vec![]).await;
    let mut gateway = AdminServiceClient::with_interceptor(plane.channel().await, Bearer(GATEWAY));
    let refused = gateway.query_usage(v1::QueryUsageRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let long = v1::QueryUsageRequest { tenant: "x".repeat(10_000), ..Default::default() };
    let refused = plane.admin().await.query_usage(long).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    // Who answers has to be a gateway, and the one that it says it is.
    let mut reports = ReportServiceClient::with_interceptor(plane.channel().await, Bearer(ADMIN));
    let odd = v1::AnswerQuestionsRequest { gateway_id: "two words".into(), ..Default::default() };
    let mut heard = reports.answer_questions(tokio_stream::iter([odd])).await.unwrap().into_inner();
    assert_eq!(soon(heard.message()).await.unwrap_err().code(), Code::InvalidArgument);
    plane.stop().await;
}
