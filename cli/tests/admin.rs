//! The command against a small admin service of its own, over real gRPC.
#![allow(missing_docs, reason = "a test")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use clap::Parser;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use weir_proto::v1;
use weir_proto::v1::admin_service_server::{AdminService, AdminServiceServer};

/// What was asked, and what to answer.
#[derive(Debug, Default)]
struct State {
    tokens: Vec<String>,
    applies: Vec<v1::ApplyRequest>,
    updates: Vec<v1::UpdateResourceRequest>,
    drains: Vec<v1::DrainRequest>,
    issues: usize,
    unavailable: usize,
    changes: Vec<v1::Change>,
    pending: Vec<String>,
}

#[derive(Debug, Clone, Default)]
struct Fake(Arc<Mutex<State>>);

type Answer<T> = Result<Response<T>, Status>;

impl Fake {
    /// Notes the token; refuses as often as it was told to.
    fn enter<T>(&self, request: Request<T>, note: impl FnOnce(&mut State, &T)) -> Result<T, Status> {
        let mut state = self.0.lock().expect("not poisoned");
        let token = request.metadata().get("authorization").and_then(|t| t.to_str().ok());
        state.tokens.extend(token.map(str::to_owned));
        note(&mut state, request.get_ref());
        if state.unavailable > 0 {
            state.unavailable -= 1;
            return Err(Status::unavailable("restarting"));
        }
        Ok(request.into_inner())
    }
}

fn tenant() -> v1::Resource {
    let spec = v1::resource::Spec::Tenant(v1::TenantSpec::default());
    v1::Resource { name: "team-a".into(), revision: 7, spec: Some(spec), ..Default::default() }
}

/// A drain with so much left.
fn drain(backend: &str, in_flight: u32) -> v1::Operation {
    let progress = v1::DrainProgress {
        backend: backend.into(),
        revision: 7,
        applied: 3,
        connected: 3,
        in_flight,
        waiting_for: vec![],
    };
    v1::Operation { name: format!("drain/{backend}"), done: in_flight == 0, drain: Some(progress) }
}

#[tonic::async_trait]
impl AdminService for Fake {
    async fn create_resource(
        &self,
        _: Request<v1::CreateResourceRequest>,
    ) -> Answer<v1::CreateResourceResponse> {
        Err(Status::unimplemented(""))
    }
    async fn get_resource(&self, r: Request<v1::GetResourceRequest>) -> Answer<v1::GetResourceResponse> {
        let name = self.enter(r, |_, _| ())?.r#ref.unwrap_or_default().name;
        if name != "team-a" {
            return Err(Status::not_found(format!("tenant {name}")));
        }
        Ok(Response::new(v1::GetResourceResponse { resource: Some(tenant()) }))
    }
    async fn list_resources(
        &self,
        r: Request<v1::ListResourcesRequest>,
    ) -> Answer<v1::ListResourcesResponse> {
        let first = self.enter(r, |_, _| ())?.page_token.is_empty();
        let mut resource = tenant();
        if !first {
            resource.name = "team-b".into();
        }
        let next_page_token = if first { "next".to_owned() } else { String::new() };
        Ok(Response::new(v1::ListResourcesResponse {
            resources: vec![resource],
            next_page_token,
            revision: 7,
        }))
    }
    async fn update_resource(
        &self,
        r: Request<v1::UpdateResourceRequest>,
    ) -> Answer<v1::UpdateResourceResponse> {
        let request = self.enter(r, |s, r| s.updates.push(r.clone()))?;
        let resource = request.resource.map(|r| v1::Resource { revision: 7, ..r });
        Ok(Response::new(v1::UpdateResourceResponse { resource }))
    }
    async fn delete_resource(
        &self,
        r: Request<v1::DeleteResourceRequest>,
    ) -> Answer<v1::DeleteResourceResponse> {
        self.enter(r, |_, _| ())?;
        Err(Status::failed_precondition("backend sgp-1 refers to it"))
    }
    async fn apply(&self, r: Request<v1::ApplyRequest>) -> Answer<v1::ApplyResponse> {
        self.enter(r, |s, r| s.applies.push(r.clone()))?;
        let changes = self.0.lock().expect("not poisoned").changes.clone();
        Ok(Response::new(v1::ApplyResponse { changes, revision: 7 }))
    }
    async fn issue_api_key(&self, r: Request<v1::IssueApiKeyRequest>) -> Answer<v1::IssueApiKeyResponse> {
        self.enter(r, |s, _| s.issues += 1)?;
        Ok(Response::new(v1::IssueApiKeyResponse {
            resource: Some(tenant()),
            secret: "wk-shown-once".into(),
        }))
    }
    async fn rotate_api_key(&self, _: Request<v1::RotateApiKeyRequest>) -> Answer<v1::RotateApiKeyResponse> {
        Err(Status::unimplemented(""))
    }
    async fn list_gateways(&self, r: Request<v1::ListGatewaysRequest>) -> Answer<v1::ListGatewaysResponse> {
        self.enter(r, |_, _| ())?;
        let gateway = v1::Gateway {
            id: "gw-1".into(),
            connected: true,
            applied_revision: 5,
            sync: v1::SyncState::Pending.into(),
            ..Default::default()
        };
        Ok(Response::new(v1::ListGatewaysResponse { gateways: vec![gateway], revision: 7 }))
    }
    async fn query_usage(&self, _: Request<v1::QueryUsageRequest>) -> Answer<v1::QueryUsageResponse> {
        Err(Status::unimplemented(""))
    }
    async fn explain_limits(
        &self,
        _: Request<v1::ExplainLimitsRequest>,
    ) -> Answer<v1::ExplainLimitsResponse> {
        Err(Status::unimplemented(""))
    }
    async fn history(&self, _: Request<v1::HistoryRequest>) -> Answer<v1::HistoryResponse> {
        Err(Status::unimplemented(""))
    }
    async fn rollback(&self, _: Request<v1::RollbackRequest>) -> Answer<v1::RollbackResponse> {
        Err(Status::unimplemented(""))
    }
    async fn verify_audit(&self, _: Request<v1::VerifyAuditRequest>) -> Answer<v1::VerifyAuditResponse> {
        Err(Status::unimplemented(""))
    }
    async fn drain(&self, r: Request<v1::DrainRequest>) -> Answer<v1::DrainResponse> {
        let backend = self.enter(r, |s, r| s.drains.push(r.clone()))?.backend;
        Ok(Response::new(v1::DrainResponse { operation: Some(drain(&backend, 2)) }))
    }
    async fn get_operation(&self, _: Request<v1::GetOperationRequest>) -> Answer<v1::GetOperationResponse> {
        Err(Status::unimplemented(""))
    }
    async fn wait_operation(
        &self,
        r: Request<v1::WaitOperationRequest>,
    ) -> Answer<v1::WaitOperationResponse> {
        let request = self.enter(r, |_, _| ())?;
        let left = request.last_seen.map_or(0, |last_seen| last_seen.in_flight).saturating_sub(1);
        let backend = request.name.trim_start_matches("drain/");
        Ok(Response::new(v1::WaitOperationResponse { operation: Some(drain(backend, left)) }))
    }
    async fn get_gateway_config(
        &self,
        _: Request<v1::GetGatewayConfigRequest>,
    ) -> Answer<v1::GetGatewayConfigResponse> {
        Err(Status::unimplemented(""))
    }
    async fn issue_token(&self, _: Request<v1::IssueTokenRequest>) -> Answer<v1::IssueTokenResponse> {
        Err(Status::unimplemented(""))
    }
    async fn rotate_token(&self, _: Request<v1::RotateTokenRequest>) -> Answer<v1::RotateTokenResponse> {
        Err(Status::unimplemented(""))
    }
    async fn revoke_token(&self, _: Request<v1::RevokeTokenRequest>) -> Answer<v1::RevokeTokenResponse> {
        Err(Status::unimplemented(""))
    }
    async fn list_tokens(&self, _: Request<v1::ListTokensRequest>) -> Answer<v1::ListTokensResponse> {
        Err(Status::unimplemented(""))
    }
    async fn who_am_i(&self, _: Request<v1::WhoAmIRequest>) -> Answer<v1::WhoAmIResponse> {
        Err(Status::unimplemented(""))
    }
    type WatchStream = tokio_stream::Empty<Result<v1::WatchResponse, Status>>;
    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        Err(Status::unimplemented(""))
    }
    type BackupStream = tokio_stream::Empty<Result<v1::BackupResponse, Status>>;
    async fn backup(&self, _: Request<v1::BackupRequest>) -> Answer<Self::BackupStream> {
        Err(Status::unimplemented(""))
    }
    async fn list_backend_status(
        &self,
        _: Request<v1::ListBackendStatusRequest>,
    ) -> Answer<v1::ListBackendStatusResponse> {
        Err(Status::unimplemented(""))
    }
    async fn explain_backend(
        &self,
        r: Request<v1::ExplainBackendRequest>,
    ) -> Answer<v1::ExplainBackendResponse> {
        let backend = self.enter(r, |_, _| ())?.backend;
        let health = v1::BackendHealth {
            backend: backend.clone(),
            state: v1::HealthState::Unhealthy.into(),
            rule: "liveness_quorum".into(),
            reason: "gw-1: cannot connect; gw-2: cannot connect".into(),
            ..Default::default()
        };
        let status = v1::BackendStatus { backend, health: Some(health), weight: 100, ..Default::default() };
        let vote = v1::explain_backend_response::Vote {
            observer: "gw-1".into(),
            tier: v1::ProbeTier::Liveness.into(),
            outcome: v1::ProbeOutcome::Refused.into(),
            detail: "cannot connect".into(),
            failures: 3,
            ..Default::default()
        };
        Ok(Response::new(v1::ExplainBackendResponse {
            status: Some(status),
            votes: vec![vote],
            may_return_time: Some(prost_types::Timestamp { seconds: 60, nanos: 0 }),
            conditions: vec!["one readiness pass".into()],
            failures: vec![v1::explain_backend_response::GatewayFailure {
                gateway_id: "gw-1".into(),
                failure: Some(v1::AttemptFailure {
                    time: Some(prost_types::Timestamp { seconds: 30, nanos: 0 }),
                    model: "small".into(),
                    outcome: "credential_refused".into(),
                    status: 401,
                    message: "Incorrect API key provided: [redacted]".into(),
                }),
            }],
            ..Default::default()
        }))
    }
    async fn list_health_events(
        &self,
        r: Request<v1::ListHealthEventsRequest>,
    ) -> Answer<v1::ListHealthEventsResponse> {
        let subject = self.enter(r, |_, _| ())?.subject;
        let event = v1::HealthEvent { number: 1, subject, kind: "alarm".into(), ..Default::default() };
        Ok(Response::new(v1::ListHealthEventsResponse { events: vec![event] }))
    }
    async fn probe_backend(&self, r: Request<v1::ProbeBackendRequest>) -> Answer<v1::ProbeBackendResponse> {
        let backend = self.enter(r, |_, _| ())?.backend;
        let result = v1::probe_backend_response::ObserverResult {
            observer: "gateway-0".into(),
            tier: v1::ProbeTier::Liveness.into(),
            outcome: v1::ProbeOutcome::Timeout.into(),
            detail: "no answer within 2 s".into(),
            latency: None,
        };
        let health =
            v1::BackendHealth { state: v1::HealthState::Healthy.into(), backend, ..Default::default() };
        Ok(Response::new(v1::ProbeBackendResponse {
            results: vec![result],
            pending_observers: vec!["gateway-1".into()],
            status: Some(v1::BackendStatus { health: Some(health), ..Default::default() }),
        }))
    }
    async fn wait_applied(&self, r: Request<v1::WaitAppliedRequest>) -> Answer<v1::WaitAppliedResponse> {
        self.enter(r, |_, r| assert_eq!(r.revision, 7))?;
        let pending = self.0.lock().expect("not poisoned").pending.clone();
        let elapsed = Some(prost_types::Duration { seconds: 0, nanos: 41_000_000 });
        let applied = 3 - u32::try_from(pending.len()).expect("few");
        Ok(Response::new(v1::WaitAppliedResponse {
            applied,
            connected: 3,
            elapsed,
            pending,
            ..Default::default()
        }))
    }
}

async fn start(state: State) -> (Fake, SocketAddr) {
    let fake = Fake(Arc::new(Mutex::new(state)));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let server = tonic::transport::Server::builder().add_service(AdminServiceServer::new(fake.clone()));
    // Ends with the test's runtime.
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (fake, address)
}

/// Exit code, standard output, standard error.
async fn weir(address: SocketAddr, line: &str) -> (u8, String, String) {
    let server = address.to_string();
    let args = ["weir", "--server", &server].into_iter().chain(line.split_whitespace());
    let cli = weir::Cli::try_parse_from(args).expect("valid arguments");
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let code = weir::execute(cli, &mut out, &mut err).await;
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (code, text(out), text(err))
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("written");
    file
}

fn change() -> v1::Change {
    v1::Change {
        r#ref: Some(v1::ResourceRef { kind: v1::ResourceKind::Backend.into(), name: "sgp-1".into() }),
        action: v1::ChangeAction::Update.into(),
        fields: vec![v1::FieldChange { path: "weight".into(), before: String::new(), after: "80".into() }],
    }
}

const APPLIED: &str = "applied on 3 of 3 gateways at revision 7 in 41 ms\n";

#[tokio::test]
async fn apply_sends_the_file_and_waits() {
    let (fake, at) = start(State { changes: vec![change()], ..Default::default() }).await;
    let yaml = file("kind: tenant\nname: team-a\nspec: {}\n");
    let (code, out, err) = weir(at, &format!("apply --prune --set s -f {}", yaml.path().display())).await;
    let sum = "0 created, 1 updated, 0 deleted, 0 unchanged\n";
    assert_eq!((code, out, err.as_str()), (0, format!("updated backend sgp-1\n{sum}"), APPLIED));
    let state = fake.0.lock().expect("not poisoned");
    let sent = &state.applies[0];
    assert_eq!((sent.apply_set.as_str(), sent.prune, sent.resources[0].name.as_str()), ("s", true, "team-a"));
    assert!(!sent.validate_only);
}

#[tokio::test]
async fn a_bad_file_is_never_sent() {
    let (fake, at) = start(State::default()).await;
    let yaml = file("kind: tenant\nname: Team\nspec: {}\n");
    let (code, _, err) = weir(at, &format!("apply -f {}", yaml.path().display())).await;
    assert_eq!(code, 64);
    assert!(err.contains(":2: name: may hold lower-case letters"), "{err}");
    let (code, _, _) = weir(at, "apply -f /no/such/file").await;
    assert_eq!(code, 64);
    assert!(fake.0.lock().expect("not poisoned").applies.is_empty());
}

#[tokio::test]
async fn diff_says_with_its_exit_code_whether_anything_differs() {
    let (fake, at) = start(State { changes: vec![change()], ..Default::default() }).await;
    let yaml = file("kind: tenant\nname: team-a\nspec: {}\n");
    let line = format!("diff -f {}", yaml.path().display());
    let (code, out, err) = weir(at, &line).await;
    assert_eq!((code, out.as_str(), err.as_str()), (1, "~ backend sgp-1\n    weight: (none) -> 80\n", ""));
    fake.0.lock().expect("not poisoned").changes.clear();
    assert_eq!(weir(at, &line).await, (0, "no differences\n".into(), String::new()));
    assert_eq!(weir(at, "diff -f /no/such/file").await.0, 64);
    assert!(fake.0.lock().expect("not poisoned").applies.iter().all(|a| a.validate_only));
}

#[tokio::test]
async fn a_weight_changes_that_field_alone() {
    let (fake, at) = start(State::default()).await;
    let (code, out, err) = weir(at, "weight sgp-1 80").await;
    assert_eq!((code, out.as_str(), err.as_str()), (0, "backend sgp-1 has weight 80\n", APPLIED));
    let state = fake.0.lock().expect("not poisoned");
    let sent = &state.updates[0];
    assert_eq!(sent.update_mask.clone().expect("a mask").paths, ["weight"]);
    let Some(v1::resource::Spec::Backend(spec)) = &sent.resource.as_ref().expect("one").spec else {
        panic!("a backend")
    };
    assert_eq!(spec.weight, Some(80));
}

#[tokio::test]
async fn a_drain_says_what_is_left_until_nothing_is() {
    let (fake, at) = start(State::default()).await;
    let said = "backend sgp-1 is draining\n";
    assert_eq!(weir(at, "drain sgp-1 --no-wait").await, (0, said.into(), String::new()));
    let (code, out, err) = weir(at, "drain sgp-1").await;
    let steps = "2 in progress; applied on 3 of 3 gateways\n1 in progress; applied on 3 of 3 gateways\n\
                 drained: no request is in progress any more (3 of 3 gateways)\n";
    assert_eq!((code, out.as_str(), err.as_str()), (0, said, steps));
    let state = fake.0.lock().expect("not poisoned");
    assert_eq!(state.drains[0].backend, "sgp-1");
    assert!(!state.drains[0].request_id.is_empty());
}

#[tokio::test]
async fn the_token_of_the_file_is_sent() {
    let (fake, at) = start(State::default()).await;
    let token = file("canary\n");
    weir(at, &format!("gateways --token-file {}", token.path().display())).await;
    assert_eq!(fake.0.lock().expect("not poisoned").tokens, ["Bearer canary"]);
}

#[tokio::test]
async fn a_retry_has_the_same_request_id() {
    let (fake, at) = start(State { unavailable: 1, ..Default::default() }).await;
    assert_eq!(weir(at, "weight sgp-1 80 --no-wait").await.0, 0);
    {
        let state = fake.0.lock().expect("not poisoned");
        assert_eq!(state.updates.len(), 2);
        assert_eq!(state.updates[0].request_id, state.updates[1].request_id);
        assert_eq!(state.updates[0].request_id.as_bytes()[14], b'7');
    }
    fake.0.lock().expect("not poisoned").unavailable = 2;
    let (code, _, err) = weir(at, "weight sgp-1 80 --no-wait").await;
    assert_eq!(code, 69);
    assert!(err.contains("is not ready: restarting"), "{err}");
}

#[tokio::test]
async fn a_key_is_shown_alone_on_standard_output_and_never_asked_for_twice() {
    let (fake, at) = start(State::default()).await;
    let (code, out, err) = weir(at, "key create k --tenant team-a --expires 30d").await;
    assert_eq!((code, out.as_str()), (0, "wk-shown-once\n"));
    assert!(!err.contains("wk-shown-once") && err.ends_with(APPLIED), "{err}");
    fake.0.lock().expect("not poisoned").unavailable = 1;
    assert_eq!(weir(at, "key create k --tenant team-a").await.0, 69);
    assert_eq!(fake.0.lock().expect("not poisoned").issues, 2);
}

#[tokio::test]
async fn gateways_that_do_not_follow_are_named() {
    let (_, at) = start(State { pending: vec!["gw-3".into()], ..Default::default() }).await;
    let (code, _, err) = weir(at, "weight sgp-1 80").await;
    assert_eq!(code, 1);
    assert!(err.starts_with("applied on 2 of 3 gateways at revision 7 in 41 ms; pending: gw-3\n"), "{err}");
}

#[tokio::test]
async fn results_have_three_forms() {
    let (_, at) = start(State::default()).await;
    let (code, out, _) = weir(at, "list tenants").await;
    let table = "NAME    DISPLAY NAME  MODELS  LIMITS  REVISION\n\
                 team-a  -             all     -       7\n\
                 team-b  -             all     -       7\n";
    assert_eq!((code, out.as_str()), (0, table));
    let (_, out, _) = weir(at, "get te team-a -o yaml").await;
    assert_eq!(out, "kind: tenant\nname: team-a\nspec: {}\nstatus:\n  etag: \"\"\n  revision: 7\n");
    let (_, out, _) = weir(at, "get te team-a -o json").await;
    assert!(out.starts_with("[\n  {\n    \"kind\": \"tenant\",\n    \"name\": \"team-a\""), "{out}");
    let (_, out, _) = weir(at, "gateways").await;
    assert!(
        out.lines().nth(1).is_some_and(|l| l.starts_with("gw-1     gateway  -       pending  5         2")),
        "{out}"
    );
}

#[tokio::test]
async fn errors_are_sentences() {
    let (_, at) = start(State::default()).await;
    assert_eq!(weir(at, "get te x").await, (1, String::new(), "weir: not found: tenant x\n".into()));
    let (code, _, err) = weir(at, "delete pool p").await;
    assert_eq!((code, err.as_str()), (1, "weir: not possible now: backend sgp-1 refers to it\n"));
}

#[tokio::test]
async fn a_control_plane_that_is_not_there_is_69() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let at = listener.local_addr().expect("bound");
    drop(listener);
    let (code, _, err) = weir(at, "gateways").await;
    assert_eq!(code, 69);
    assert!(err.contains(&format!("http://{at}")) && err.contains("WEIR_SERVER"), "{err}");
}

#[tokio::test]
async fn why_names_the_rule_the_votes_and_the_way_back() {
    let (_, address) = start(State::default()).await;
    let (code, out, _) = weir(address, "why sgp-1").await;
    assert_eq!(code, 0);
    for part in [
        "sgp-1 is unhealthy",
        "liveness_quorum (gw-1: cannot connect",
        "1970-01-01T00:01:00Z",
        "one readiness pass",
        "COUNTS",
    ] {
        assert!(out.contains(part), "{part} in {out}");
    }
    let (_, out, _) = weir(address, "-o json events chat").await;
    let events: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!((&events[0]["kind"], &events[0]["subject"]), (&"alarm".into(), &"chat".into()));
}

#[tokio::test]
async fn a_probe_shows_what_each_saw_and_fails_unless_all_is_well() {
    let (_, at) = start(State::default()).await;
    let (code, out, err) = weir(at, "probe sgp-1").await;
    let table = "OBSERVER   TIER      OUTCOME            LATENCY  DETAIL\n\
                 gateway-0  liveness  timeout            -        no answer within 2 s\n\
                 gateway-1  -         no answer in time  -        -\n\
                 backend sgp-1 is healthy: -\n";
    assert_eq!((code, out.as_str()), (1, table));
    assert!(err.contains("backend sgp-1: 1 probes failed, 1 observers did not answer in time"), "{err}");
    let (code, out, _) = weir(at, "probe sgp-1 -o json").await;
    assert!(code == 1 && out.contains(r#""outcome": "timeout""#) && out.contains("gateway-1"), "{out}");
}

#[tokio::test]
async fn wide_shows_more_of_each() {
    let (_, at) = start(State::default()).await;
    let (code, out, _) = weir(at, "list tenants -o wide").await;
    assert!(
        code == 0 && out.starts_with("NAME    DISPLAY NAME  MODELS  LIMITS  REVISION  SET  ETAG"),
        "{out}"
    );
    assert!(weir(at, "gateways -o wide").await.1.contains("INCARNATION"));
}
