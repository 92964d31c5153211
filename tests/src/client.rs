//! A plain HTTP client.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::{Client as Hyper, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;

/// A client of one gateway with one key.
#[derive(Debug, Clone)]
pub struct Client {
    base: String,
    key: String,
    http: Hyper<HttpConnector, Full<Bytes>>,
}

/// A complete answer.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// A request without a complete answer.
#[derive(Debug)]
pub struct Broken {
    /// Why, with all causes.
    pub why: String,
    /// The part of the body that arrived; `None` if not even the head did.
    pub body: Option<Vec<u8>>,
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("not JSON ({e}): {:?}", self.body))
    }

    /// The body as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    /// `error.code` of an error.
    pub fn error_code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

impl Client {
    /// A client of this address with this key.
    pub fn new(address: SocketAddr, key: &str) -> Self {
        let http = Hyper::builder(TokioExecutor::new()).build_http();
        Self { base: format!("http://{address}"), key: key.to_owned(), http }
    }

    /// The same client with another key.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: key.to_owned(), ..self.clone() }
    }

    /// Sends a request. The caller reads the body of the answer.
    pub async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Response<Incoming> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.key))
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .expect("a valid request");
        self.http.request(request).await.expect("an answer")
    }

    /// Sends a request and reads the answer.
    pub async fn ask(&self, method: Method, path: &str, body: impl Into<Bytes>) -> Answer {
        let (head, body) = self.send(method, path, body).await.into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    /// Sends a request with these headers and no others, and reads the answer.
    pub async fn ask_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).expect("a valid request");
        let (head, body) = self.http.request(request).await.expect("an answer").into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    /// A chat completion whose connection may fail. The error holds the part of the answer that arrived.
    pub async fn try_chat(&self, body: &str) -> Result<Answer, Broken> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/v1/chat/completions", self.base))
            .header("authorization", format!("Bearer {}", self.key))
            .header("content-type", "application/json")
            .body(Full::new(body.to_owned().into()))
            .expect("a valid request");
        let broken = |error: &dyn std::error::Error, body| Broken { why: chain(error), body };
        let answer = self.http.request(request).await.map_err(|error| broken(&error, None))?;
        let (head, mut rest) = answer.into_parts();
        let mut body = Vec::new();
        while let Some(frame) = rest.frame().await {
            let frame = match frame {
                Ok(frame) => frame,
                Err(error) => return Err(broken(&error, Some(body))),
            };
            body.extend_from_slice(&frame.into_data().unwrap_or_default());
        }
        Ok(Answer { status: head.status, headers: head.headers, body: body.into() })
    }

    /// Opens a chat completion that is streamed, and reads its first chunk.
    pub async fn open_stream(&self, body: &str) -> Incoming {
        let answer = self.send(Method::POST, "/v1/chat/completions", body.to_owned()).await;
        assert_eq!(answer.status(), StatusCode::OK);
        let mut body = answer.into_body();
        body.frame().await.expect("a chunk").expect("an open stream");
        body
    }

    /// A chat completion through a proxy that knows tenants by a header.
    pub async fn chat_as(&self, tenant: &str, body: &str) -> Answer {
        let request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}/v1/chat/completions", self.base))
            .header("x-tenant", tenant)
            .header("content-type", "application/json")
            .body(Full::new(body.to_owned().into()))
            .expect("a valid request");
        let (head, body) = self.http.request(request).await.expect("an answer").into_parts();
        let body = body.collect().await.expect("a whole body").to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    /// A chat completion.
    pub async fn chat(&self, body: &str) -> Answer {
        self.ask(Method::POST, "/v1/chat/completions", body.to_owned()).await
    }
}
