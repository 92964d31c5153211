use super::*;
use crate::routing::declared::DeclaredLimit;
use crate::routing::scope::ScopeKind;

fn limited(wait: Option<Duration>) -> GatewayError {
    let scope = "acme".to_owned();
    GatewayError::Limited(Refusal {
        scope_kind: ScopeKind::Tenant,
        scope,
        what: What::Bucket(Kind::Tokens),
        limit: DeclaredLimit { amount: 2, period: Some("minute"), burst: 10 },
        remaining: 2,
        needs: 11,
        wait,
    })
}

#[test]
fn one_answer_for_every_bad_key_and_one_for_every_model_out_of_reach() {
    assert_eq!(GatewayError::MissingKey.to_body(), GatewayError::InvalidKey.to_body());
    let model = || "m".to_owned();
    let unknown = GatewayError::ModelNotFound { model: model() };
    assert_eq!(unknown.to_body(), GatewayError::ModelNotAllowed { model: model() }.to_body());
    assert_eq!((unknown.facts().status.as_u16(), unknown.facts().code), (404, "model_not_found"));
}

#[test]
fn what_a_client_sent_is_cut_and_escaped() {
    let error = GatewayError::ModelNotFound { model: format!("a\n\u{1b}[31m{}", "x".repeat(500)) };
    let message = error.facts().message;
    assert!(
        message.len() < 200 && message.chars().all(|c| c.is_ascii() && !c.is_ascii_control()),
        "{message}"
    );
}

#[test]
fn an_unknown_url_is_named_cut_and_escaped_with_what_was_meant() {
    let message = |url: &str, nearest| {
        let error = GatewayError::UnknownRoute { url: url.to_owned(), nearest };
        assert_eq!((error.facts().status.as_u16(), error.facts().code), (404, "unknown_url"));
        error.facts().message.into_owned()
    };
    assert_eq!(message("POST /v1/x", None), "Invalid URL (POST /v1/x).");
    let near = message("POST /chat/completions", Some("/v1/chat/completions"));
    assert_eq!(near, "Invalid URL (POST /chat/completions). Did you mean /v1/chat/completions?");
    let odd = message(&format!("GET /\u{1b}[31m\u{fc}{}", "x".repeat(500)), None);
    assert!(odd.len() < 120 && odd.chars().all(|c| c.is_ascii() && !c.is_ascii_control()), "{odd}");
}

#[test]
fn a_refusal_explains_itself() {
    let error = limited(Some(Duration::from_millis(1500)));
    let body: Value = serde_json::from_str(&error.to_body()).unwrap();
    assert_eq!(error.facts().status, 429);
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    assert_eq!(body["error"]["retry_after_ms"], 1500);
    assert_eq!(body["error"]["scope"]["name"], "acme");
    assert!(error.facts().message.ends_with("try again in 1.5s."));
    let never = limited(None).facts();
    assert_eq!((never.status.as_u16(), never.code, never.retry_after), (400, "request_exceeds_limit", None));
}

#[test]
fn a_refusal_tells_the_rate_from_the_burst_and_money_in_dollars() {
    let refusal = |what, amount, period, burst, remaining| Refusal {
        scope_kind: ScopeKind::Tenant,
        scope: "cheap".to_owned(),
        what,
        limit: DeclaredLimit { amount, period, burst },
        remaining,
        needs: 1,
        wait: Some(Duration::from_secs(1)),
    };
    let minute = Some("minute");
    for (refusal, text) in [
        (
            refusal(What::Bucket(Kind::Spend), 10_000_000, Some("day"), 10_000_000, 72),
            "Rate limit reached for spend of tenant 'cheap': limit $10.00 per day, remaining $0.000072. Please try \
             again in 1s.",
        ),
        (
            refusal(What::Bucket(Kind::Requests), 60, minute, 300, 0),
            "Rate limit reached for requests of tenant 'cheap': limit 60 per minute, 300 at once, remaining 0. Please \
             try again in 1s.",
        ),
        (
            refusal(What::Bucket(Kind::Tokens), 60, minute, 60, 3),
            "Rate limit reached for tokens of tenant 'cheap': limit 60 per minute, remaining 3. Please try again in 1s.",
        ),
        (
            refusal(What::Concurrency, 5, None, 5, 0),
            "Rate limit reached for concurrency of tenant 'cheap': limit 5 at once, remaining 0. Please try again in 1s.",
        ),
    ] {
        assert_eq!(refusal.message(), text);
    }
    let spend = refusal(What::Bucket(Kind::Spend), 10_000_000, Some("day"), 10_000_000, 72);
    let body: Value = serde_json::from_str(&GatewayError::Limited(spend).to_body()).unwrap();
    let error = &body["error"];
    assert_eq!((&error["period"], &error["unit"]), (&"day".into(), &"micro_dollars".into()));
}

#[test]
fn only_an_upstreams_fault_is_tried_elsewhere_and_429_is_the_callers_alone() {
    let retry_after = None;
    for error in [
        GatewayError::LimitStore,
        GatewayError::NoBackend { retry_after },
        GatewayError::Busy { retry_after },
    ] {
        let facts = error.facts();
        assert_eq!((facts.status.as_u16(), facts.retry_elsewhere), (503, false));
        assert!(facts.retry_after.is_some(), "{error}");
    }
    assert!(GatewayError::UpstreamConnect.facts().retry_elsewhere);
    for error in [
        GatewayError::UpstreamConnect,
        GatewayError::UpstreamBroken,
        GatewayError::UpstreamInvalid,
        GatewayError::UpstreamTimeout,
    ] {
        assert!(error.facts().retry_after.is_some(), "a retry helps: {error}");
    }
    for error in [GatewayError::Deadline, GatewayError::Internal, GatewayError::InvalidKey] {
        assert!(error.facts().retry_after.is_none(), "a retry does not help: {error}");
    }
    assert!(!limited(None).facts().retry_elsewhere);
}

#[test]
fn a_backends_text_reaches_the_client_where_it_may_be_about_the_request() {
    let of = |meaning, status, message: &str, elsewhere_too| {
        let message = message.to_owned();
        GatewayError::Upstream(Box::new(UpstreamFailure {
            status,
            meaning,
            message,
            retry_after: None,
            elsewhere_too,
        }))
    };
    let said = of(Meaning::Failed, 500, "missing role", false);
    assert_eq!((said.facts().status.as_u16(), &*said.facts().message), (500, "missing role"));
    assert!(said.facts().retry_elsewhere && !said.is_final());
    assert!(of(Meaning::Failed, 500, "missing role", true).is_final());
    assert!(of(Meaning::Failed, 500, "", false).facts().message.contains("Please retry"));
    for meaning in [Meaning::Failed, Meaning::Foreign, Meaning::Credential, Meaning::NoModel, Meaning::Quota]
    {
        let error = of(meaning, 500, "", true);
        assert!(error.is_final() && !error.facts().message.contains("retry"), "{}", error.facts().message);
    }
    assert_eq!(of(Meaning::Failed, 500, "", false).facts().status, 502);
    assert_eq!(of(Meaning::Failed, 424, "failed", false).facts().status, 502);
    for meaning in [Meaning::Credential, Meaning::Quota, Meaning::NoModel, Meaning::Foreign, Meaning::Busy] {
        let error = of(meaning, 429, "sk-secret of account 7", false);
        assert!(matches!(error.facts().status.as_u16(), 502 | 503), "429 is the caller's alone: {error}");
        assert!(!error.facts().message.contains("account 7"), "{error}");
        assert!(error.facts().retry_elsewhere && error.facts().blame == Blame::Upstream, "{error}");
    }
}

#[test]
fn bodies_have_openais_shape_and_events_end_once() {
    let error = GatewayError::from(ReadError::Duplicate("model"));
    let body: Value = serde_json::from_str(&error.to_body()).unwrap();
    assert_eq!(body["error"]["param"], "model");
    assert_eq!(body["error"]["message"], "Duplicate parameter: 'model'.");
    let event = GatewayError::Internal.sse_event();
    assert_eq!(event.matches('\n').count(), 2);
    assert!(event.starts_with("data: {\"error\"") && event.contains("\"param\":null"));
}
