//! `weir.v1.LimitService`: the caller brings scopes, limits and reservation ids.
//!
//! A caller that goes away while its acquire is decided knows the id and settles with nothing used; until then the
//! reservation stands, since its caller may have taken it for granted.

use std::sync::Arc;
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status};
use weir_proto::v1;
use weir_proto::v1::limit_service_server::LimitService;
use weir_ratelimit::waiting::{Alternatives, Priority, QueueId, QueuePolicy};
use weir_ratelimit::{Acquire, Error, Limiter, Outcome, Renewal, ServiceStack, Settle};

use crate::metrics::Metrics;
use crate::wire::{Check, duration, limit_states, refusal};

/// The native service: reservations and settlements, with queues.
#[derive(Debug, Clone)]
pub(super) struct Native {
    pub(super) stack: Arc<ServiceStack>,
    pub(super) metrics: Metrics,
}

impl Native {
    /// Counts a call; `limited` says whether an answer is a refusal.
    async fn counted<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T, Status>>,
        limited: impl FnOnce(&T) -> bool,
    ) -> Result<Response<T>, Status> {
        let since = Instant::now();
        let answer = call.await;
        let outcome = match &answer {
            Ok(answer) if limited(answer) => "limited",
            Ok(_) => "ok",
            Err(status) if status.code() == Code::InvalidArgument => "invalid",
            Err(_) => "unavailable",
        };
        self.metrics.called(method, outcome, since.elapsed());
        answer.map(Response::new)
    }

    /// Decides, and waits in turn where the caller lets it; `until` is the caller's deadline.
    async fn do_acquire(
        &self,
        request: v1::AcquireRequest,
        until: Option<Instant>,
    ) -> Result<v1::AcquireResponse, Status> {
        let mut check = Check::default();
        let max_wait = check.max_wait(request.max_wait);
        // Who shares what is scarce: the first tenant named, and all who name none together.
        let tenant = request.scopes.iter().filter_map(|s| s.scope.as_ref()).find(|s| !s.tenant.is_empty());
        let tenant: Arc<str> = tenant.map_or("", |scope| scope.tenant.as_str()).into();
        let call = Acquire {
            id: check.id("reservation_id", &request.reservation_id),
            cost: check.cost("cost", request.cost),
            estimated: request.estimated,
            scopes: check.scopes(&request.scopes),
            candidates: Vec::new(),
            lease_ttl: check.lease_ttl(request.lease_ttl),
        };
        let call = check.finish(call)?;
        let deadline = Instant::now() + max_wait;
        let policy = QueuePolicy {
            tenant,
            priority: Priority::Normal,
            deadline: until.map_or(deadline, |until| until.min(deadline)),
            scopes: call.scopes.iter().map(|_| max_wait).collect(),
            slots: None,
            bytes: 0,
            alternatives: Alternatives::new(),
        };
        let decision = match max_wait.is_zero() {
            true => self.stack.limiter.acquire(&call).await.map_err(|e| refusal(&e))?,
            false => {
                let ask = |_: Option<&QueueId>| async {
                    Ok::<_, Error>((self.stack.limiter.acquire(&call).await?, ()))
                };
                self.stack.waiting.acquire(&call, &policy, ask).await.map_err(|e| refusal(&e))?.decision
            }
        };
        let (granted, wait) = match decision.outcome {
            Outcome::Granted { .. } => (true, None),
            Outcome::Limited { wait } => (false, wait),
            Outcome::NoSlot { wait } => (false, Some(wait)),
        };
        let limits = limit_states(&decision.limits, &call.scopes);
        Ok(v1::AcquireResponse { granted, wait: wait.and_then(duration), limits })
    }

    async fn do_settle(&self, request: v1::SettleRequest) -> Result<v1::SettleResponse, Status> {
        let mut check = Check::default();
        let call = Settle {
            id: check.id("reservation_id", &request.reservation_id),
            actual: check.cost("actual", request.actual),
            scopes: check.scopes(&request.scopes),
            slot: None,
            usage: None,
        };
        let call = check.finish(call)?;
        let settled = self.stack.limiter.settle(&call).await.map_err(|e| refusal(&e))?;
        self.stack.waiting.released(call.scopes.iter().flat_map(|scope| [&scope.record, &scope.leases]));
        Ok(v1::SettleResponse {
            applied: settled.applied,
            limits: limit_states(&settled.limits, &call.scopes),
        })
    }

    async fn do_renew(&self, request: v1::RenewRequest) -> Result<v1::RenewResponse, Status> {
        let mut check = Check::default();
        let ids = check.ids("reservation_ids", &request.reservation_ids);
        let leases: SmallVec<_> = check.lease_sets(&request.scopes);
        let lease_ttl = check.lease_ttl(request.lease_ttl);
        let ids = check.finish(ids)?;
        let renewals: Vec<Renewal> =
            ids.into_iter().map(|id| Renewal { id, leases: leases.clone() }).collect();
        let lost = self.stack.limiter.renew(&renewals, lease_ttl).await.map_err(|e| refusal(&e))?;
        Ok(v1::RenewResponse { lost: lost.iter().map(ToString::to_string).collect() })
    }

    async fn do_release(&self, request: v1::ReleaseRequest) -> Result<v1::ReleaseResponse, Status> {
        let mut check = Check::default();
        let id = check.id("reservation_id", &request.reservation_id);
        let leases = check.lease_sets(&request.scopes);
        let id = check.finish(id)?;
        self.stack.limiter.release(id, &leases).await.map_err(|e| refusal(&e))?;
        self.stack.waiting.released(&leases);
        Ok(v1::ReleaseResponse {})
    }

    async fn do_peek(&self, request: v1::PeekRequest) -> Result<v1::PeekResponse, Status> {
        let mut check = Check::default();
        let scopes = check.scopes(&request.scopes);
        let scopes = check.finish(scopes)?;
        let limits = self.stack.limiter.peek(&scopes).await.map_err(|e| refusal(&e))?;
        Ok(v1::PeekResponse { limits: limit_states(&limits, &scopes) })
    }
}

#[tonic::async_trait]
impl LimitService for Native {
    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        let until = deadline(request.metadata());
        // Large, with its place in a queue; on the heap it is moved once.
        let decided = Box::pin(self.do_acquire(request.into_inner(), until));
        self.counted("acquire", decided, |a| !a.granted).await
    }

    async fn settle(
        &self,
        request: Request<v1::SettleRequest>,
    ) -> Result<Response<v1::SettleResponse>, Status> {
        let settled = Box::pin(self.do_settle(request.into_inner()));
        self.counted("settle", settled, |_| false).await
    }

    async fn renew(&self, request: Request<v1::RenewRequest>) -> Result<Response<v1::RenewResponse>, Status> {
        self.counted("renew", self.do_renew(request.into_inner()), |_| false).await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.counted("release", self.do_release(request.into_inner()), |_| false).await
    }

    async fn peek(&self, request: Request<v1::PeekRequest>) -> Result<Response<v1::PeekResponse>, Status> {
        self.counted("peek", self.do_peek(request.into_inner()), |_| false).await
    }
}

/// Time for an answer on its way to the caller.
const MARGIN: Duration = Duration::from_millis(5);

/// When the caller gives up, by its `grpc-timeout`: at most eight digits and a unit.
fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    let timeout = match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    };
    Some(Instant::now() + timeout.saturating_sub(MARGIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_callers_deadline_is_read_from_its_timeout() {
        let left = |text: &'static str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", tonic::metadata::MetadataValue::from_static(text));
            deadline(&metadata).map(|at| at - Instant::now())
        };
        assert_eq!(left("1S"), Some(Duration::from_millis(995)));
        assert_eq!((left("99999999H").is_some(), left("1n")), (true, Some(Duration::ZERO)));
        for wrong in ["", "S", "1", "1X", "123456789m", "-1S"] {
            assert_eq!(left(wrong), None, "{wrong}");
        }
    }
}
