//! The live page: the state of the cluster, on the HTTP port.
//!
//! The files of the page are public and contain no data. The data needs the same tokens and roles as the admin service, in
//! an `authorization` header that the page's script adds, so that no other site can make a browser request it. Changes go
//! through the admin service, with the same roles, checks and audit log.

pub(crate) mod act;
mod feed;
mod frame;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};

pub(crate) use self::feed::Feed;
use crate::auth::{Caller, needs, opens};
use crate::services::Shared;

/// The content security policy: the page loads its own files and calls its own server only.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";
/// Largest body of a change, bytes.
const BODY_MAX_BYTES: usize = 4096;
/// The methods whose answers the page shows. The caller needs a role that may call all of them.
const SHOWN: [&str; 4] = [
    "/weir.v1.AdminService/ListGateways",
    "/weir.v1.AdminService/ListBackendStatus",
    "/weir.v1.AdminService/ListHealthEvents",
    "/weir.v1.AdminService/History",
];
/// The method behind the page's changes.
const CHANGES: &str = "/weir.v1.AdminService/UpdateResource";

/// The script of the page: one file for browsers, several by concern for readers. Each starts with a comment.
const SCRIPT: &str = concat!(
    include_str!("page/script/format.js"),
    include_str!("page/script/widgets.js"),
    include_str!("page/script/backends.js"),
    include_str!("page/script/limits_gateways.js"),
    include_str!("page/script/log.js"),
    include_str!("page/script/board.js"),
    include_str!("page/script/feed.js"),
);

#[derive(Debug, Clone)]
struct Page {
    shared: Shared,
    feed: Arc<Feed>,
}

/// The routes of the page.
pub(crate) fn routes(shared: Shared, feed: Arc<Feed>) -> Router {
    let file =
        |kind: &'static str, text: &'static str| get(async move || ([(header::CONTENT_TYPE, kind)], text));
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("page/index.html")))
        .route("/page.css", file("text/css; charset=utf-8", include_str!("page/page.css")))
        .route("/page.js", file("text/javascript; charset=utf-8", SCRIPT))
        .route("/icon.svg", file("image/svg+xml", include_str!("page/icon.svg")))
        .route("/page/stream", get(stream))
        .route("/page/backends/{name}", post(act::act).layer(DefaultBodyLimit::max(BODY_MAX_BYTES)))
        .layer(map_response(guarded))
        .with_state(Page { shared, feed })
}

/// Adds the security headers to every answer.
async fn guarded(mut response: Response) -> Response {
    let headers: [(HeaderName, &'static str); 7] = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        // Without caching, data is not stored and a new version of the page is used at once.
        (header::CACHE_CONTROL, "no-store"),
    ];
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

impl Page {
    /// The caller, if its role may call all of these methods.
    fn caller(&self, headers: &HeaderMap, methods: &[&str]) -> Result<Caller, Refused> {
        let metadata = MetadataMap::from_headers(headers.clone());
        let mut caller = Err(Status::permission_denied("no method is requested"));
        for method in methods {
            caller = Ok(self.shared.authority.authorise(&metadata, None, method)?);
        }
        Ok(caller?)
    }
}

/// The data, as server-sent events for as long as the caller reads them.
async fn stream(State(page): State<Page>, headers: HeaderMap) -> Result<Response, Refused> {
    let caller = page.caller(&headers, &SHOWN)?;
    let operates = needs(CHANGES).is_some_and(|needed| opens(caller.role, needed));
    let events = page.feed.watch(&page.shared, caller, operates)?;
    let headers =
        [(header::CONTENT_TYPE, "text/event-stream"), (HeaderName::from_static("x-accel-buffering"), "no")];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// A gRPC status as an HTTP answer.
#[derive(Debug)]
struct Refused(Status);

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self(status)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.code() {
            Code::Unauthenticated => StatusCode::UNAUTHORIZED,
            Code::PermissionDenied => StatusCode::FORBIDDEN,
            Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::Aborted | Code::AlreadyExists | Code::FailedPrecondition => StatusCode::CONFLICT,
            Code::Unavailable | Code::ResourceExhausted => StatusCode::SERVICE_UNAVAILABLE,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let body = serde_json::json!({ "error": self.0.message() }).to_string();
        let mut response = (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response
    }
}
