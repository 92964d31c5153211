//! Endpoints that do not generate: health, models, metrics, faults, statistics.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response};
use serde_json::json;

use crate::body::Body;
use crate::error::ApiError;
use crate::faults::Faults;
use crate::generate::read;
use crate::handle::{Handle, Shared};
use crate::openai::{error_response, reply_response};

/// Largest body of `POST /admin/faults`.
const FAULTS_BYTES_MAX: usize = 64 * 1024;

/// Answers every path that is not a generating endpoint.
pub(crate) async fn answer(
    shared: &Arc<Shared>,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let handle = Handle { shared: Arc::clone(shared) };
    let method = request.method().clone();
    if let Some(reply) = shared.faults().reply.as_ref().filter(|reply| reply.everywhere)
        && !request.uri().path().starts_with("/admin/")
    {
        return Ok(reply_response(reply));
    }
    match (request.uri().path(), method) {
        ("/health", Method::GET | Method::HEAD) => {
            if shared.is_loading() {
                return Err(ApiError::Loading);
            }
            Ok(json_response(r#"{"status":"ok"}"#.to_owned()))
        }
        ("/v1/models", Method::GET) => Ok(json_response(models(shared))),
        ("/metrics", Method::GET) => {
            let mut response = Response::new(Body::full(shared.metrics.render()));
            let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            Ok(response)
        }
        ("/admin/faults", Method::GET) => faults(&handle),
        ("/admin/faults", Method::POST) => {
            let body = read(request.into_body(), FAULTS_BYTES_MAX).await?;
            let new: Faults =
                serde_json::from_slice(&body).map_err(|error| ApiError::InvalidFaults(error.to_string()))?;
            handle.set_faults(new).map_err(|error| ApiError::InvalidFaults(error.to_string()))?;
            faults(&handle)
        }
        ("/admin/faults", Method::DELETE) => {
            handle.clear_faults();
            faults(&handle)
        }
        ("/admin/stats", Method::GET) => Ok(json_response(json!(handle.counters()).to_string())),
        ("/health" | "/v1/models" | "/metrics" | "/admin/stats", _) => Ok(wrong_method("GET")),
        ("/admin/faults", _) => Ok(wrong_method("GET, POST, DELETE")),
        _ => Err(ApiError::UnknownPath),
    }
}

/// 405 with the methods that would do.
pub(crate) fn wrong_method(allowed: &'static str) -> Response<Body> {
    let mut response = error_response(&ApiError::WrongMethod);
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    response
}

fn faults(handle: &Handle) -> Result<Response<Body>, ApiError> {
    Ok(json_response(json!(handle.faults()).to_string()))
}

fn models(shared: &Shared) -> String {
    let model =
        |name: &String| json!({ "id": name, "object": "model", "created": 0, "owned_by": "mock-llm" });
    let models: Vec<_> = shared.config.models.iter().map(model).collect();
    json!({ "object": "list", "data": models }).to_string()
}

fn json_response(json: String) -> Response<Body> {
    let mut response = Response::new(Body::full(json));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
