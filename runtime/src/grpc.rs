//! Bounds of gRPC calls: their longest time, and the number and the age of open streams.
//!
//! They stand in front of a service, so that they hold for every method.

mod gate;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Sleep, sleep, timeout};
use tonic::Status;
use tonic::body::Body;

pub use gate::{Admitted, Gated, Gatekeeper};

/// Concurrent calls on one connection; more wait at the caller. Far above the needs of one program.
pub const STREAMS_PER_CONNECTION: u32 = 256;
/// The largest head of a call, bytes. A token and tracing fields are some hundred.
pub const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// A stream without an answer within this time has failed: its first message never came.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// The one method that needs no token: kubelets and proxies check the health and have no token.
pub const HEALTH_CHECK: &str = "/grpc.health.v1.Health/Check";
/// The timeout of a health check, which is a few bytes each way.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// The maximum of streams that watch the health: one for each proxy, with room to spare.
const HEALTH_WATCHES_MAX: usize = 256;
/// A health watch ends at this age. It is then opened again, and its token is checked again.
const HEALTH_WATCH_AGE: Duration = Duration::from_secs(10 * 60);
/// The maximum of reflection streams, which people use by hand.
const REFLECTIONS_MAX: usize = 64;
/// The age of a reflection stream. Reading all descriptors takes a second.
const REFLECTION_AGE: Duration = Duration::from_secs(30);

/// The bounds of the methods that every gRPC port serves: health and reflection. `None` for other methods. One caller
/// may have at most `health_watches_per_caller` health watches.
pub fn standard_bound(path: &str, health_watches_per_caller: usize) -> Option<Bound> {
    match path {
        HEALTH_CHECK => Some(Bound::Unary(CHECK_TIMEOUT)),
        "/grpc.health.v1.Health/Watch" => Some(Bound::Stream(StreamBound {
            kind: "health watches",
            most: HEALTH_WATCHES_MAX,
            most_per_caller: health_watches_per_caller.min(HEALTH_WATCHES_MAX),
            age: Some(HEALTH_WATCH_AGE),
        })),
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => {
            Some(Bound::Stream(StreamBound {
                kind: "reflection streams",
                most: REFLECTIONS_MAX,
                most_per_caller: REFLECTIONS_MAX,
                age: Some(REFLECTION_AGE),
            }))
        }
        _ => None,
    }
}

/// The bound of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// One answer within this time after the head of the call. A call whose message never comes ends too.
    Unary(Duration),
    /// A stream.
    Stream(StreamBound),
}

/// The bounds of the streams of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamBound {
    /// Its name, for the text of a refusal.
    pub kind: &'static str,
    /// The maximum of open streams in this process.
    pub most: usize,
    /// The maximum of open streams of one caller.
    pub most_per_caller: usize,
    /// The age at which it ends; `None` if its service ends it.
    pub age: Option<Duration>,
}

/// The permits of open streams. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Permits(Arc<Mutex<Open>>);

/// The counts of open streams.
#[derive(Debug, Default)]
struct Open {
    by_kind: BTreeMap<&'static str, usize>,
    by_caller: BTreeMap<(&'static str, Arc<str>), usize>,
}

/// The permit of one stream. Dropping it returns the permit.
#[derive(Debug)]
pub struct Permit {
    permits: Permits,
    kind: &'static str,
    caller: Arc<str>,
}

impl Permits {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a permit for a stream of a caller.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED if all permits, or all of this caller, are taken.
    pub fn take(&self, bound: &StreamBound, caller: &Arc<str>) -> Result<Permit, Status> {
        let StreamBound { kind, most, most_per_caller, .. } = *bound;
        let mut open = self.open();
        if open.by_kind.get(kind).is_some_and(|open| *open >= most) {
            return Err(Status::resource_exhausted(format!("{most} {kind} are open already; end one")));
        }
        let key = (kind, Arc::clone(caller));
        if open.by_caller.get(&key).is_some_and(|open| *open >= most_per_caller) {
            let text = format!("{caller} has {most_per_caller} {kind} open already; end one");
            return Err(Status::resource_exhausted(text));
        }
        *open.by_kind.entry(kind).or_default() += 1;
        *open.by_caller.entry(key).or_default() += 1;
        drop(open);
        Ok(Permit { permits: self.clone(), kind, caller: Arc::clone(caller) })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.permits.open();
        if let Some(count) = open.by_kind.get_mut(self.kind) {
            *count = count.saturating_sub(1);
        }
        let key = (self.kind, Arc::clone(&self.caller));
        if let Some(count) = open.by_caller.get_mut(&key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.by_caller.remove(&key);
            }
        }
    }
}

/// Makes a call within its bound.
async fn bounded(
    bound: Bound,
    permits: Permits,
    caller: Arc<str>,
    call: impl Future<Output = Result<http::Response<Body>, Infallible>>,
) -> Result<http::Response<Body>, Infallible> {
    match bound {
        Bound::Unary(within) => match timeout(within, call).await {
            Ok(answer) => answer,
            Err(_) => {
                let text = format!("the call was not whole, or not answered, within {} s", within.as_secs());
                Ok(Status::deadline_exceeded(text).into_http())
            }
        },
        Bound::Stream(bound) => {
            let permit = match permits.take(&bound, &caller) {
                Ok(permit) => permit,
                Err(status) => return Ok(status.into_http()),
            };
            match timeout(HEAD_TIMEOUT, call).await {
                Ok(answer) => answer.map(|answer| answer.map(|body| PermitBody::of(body, bound.age, permit))),
                Err(_) => Ok(Status::deadline_exceeded("no message within 30 s").into_http()),
            }
        }
    }
}

/// The body of a stream, which holds the stream's permit.
struct PermitBody {
    /// `None` after its end.
    body: Option<Body>,
    end: Option<Pin<Box<Sleep>>>,
    permit: Option<Permit>,
}

impl PermitBody {
    fn of(body: Body, age: Option<Duration>, permit: Permit) -> Body {
        // A refusal in the head alone needs no permit.
        if body.is_end_stream() {
            return body;
        }
        Body::new(Self { body: Some(body), end: age.map(|age| Box::pin(sleep(age))), permit: Some(permit) })
    }
}

impl http_body::Body for PermitBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        if this.end.as_mut().is_some_and(|end| end.as_mut().poll(context).is_ready()) {
            (this.body, this.permit) = (None, None);
            let mut trailers = HeaderMap::new();
            let status = Status::unavailable("the stream has reached its age; open a new one");
            return Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))));
        }
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(|body| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const TWO: StreamBound = StreamBound { kind: "watches", most: 3, most_per_caller: 2, age: None };

    #[test]
    fn permits_are_bounded_by_caller_and_in_all_and_come_back() {
        let permits = Permits::default();
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let first = permits.take(&TWO, &a).expect("free");
        let _second = permits.take(&TWO, &a).expect("free");
        let refused = permits.take(&TWO, &a).expect_err("of one caller");
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("a has 2 watches"), "{refused:?}");
        let _third = permits.take(&TWO, &b).expect("another caller's");
        assert!(permits.take(&TWO, &b).expect_err("in all").message().contains("3 watches"));
        drop(first);
        drop(permits.take(&TWO, &b).expect("free again"));
        assert_eq!(permits.open().by_caller.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_message_never_comes_ends() {
        let never = pending::<Result<http::Response<Body>, Infallible>>();
        let bound = Bound::Unary(Duration::from_secs(5));
        let answer = bounded(bound, Permits::default(), "a".into(), never).await.expect("infallible");
        assert_eq!(answer.headers()["grpc-status"], "4");
        let never = pending::<Result<http::Response<Body>, Infallible>>();
        let permits = Permits::default();
        let answer =
            bounded(Bound::Stream(TWO), permits.clone(), "a".into(), never).await.expect("infallible");
        assert_eq!(answer.headers()["grpc-status"], "4");
        assert!(permits.open().by_caller.is_empty(), "its permit is free");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_ends_at_its_age_and_frees_its_permit() {
        struct Silent;
        impl http_body::Body for Silent {
            type Data = Bytes;
            type Error = Status;
            fn poll_frame(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
                Poll::Pending
            }
        }
        let permits = Permits::default();
        let bound = StreamBound { age: Some(Duration::from_secs(30)), ..TWO };
        let call = ready(Ok(http::Response::new(Body::new(Silent))));
        let answer =
            bounded(Bound::Stream(bound), permits.clone(), "a".into(), call).await.expect("infallible");
        assert_eq!(permits.open().by_caller.len(), 1);
        let mut body = answer.into_body();
        let frame = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
        let trailers = frame.expect("a frame").expect("no error").into_trailers().expect("trailers");
        assert_eq!(trailers["grpc-status"], "14");
        assert!(permits.open().by_caller.is_empty());
        assert!(std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await.is_none());
    }
}
