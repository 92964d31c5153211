//! Behaviour over real sockets: each test binds its own server on port 0 and waits for conditions, never for time.

mod api;
mod faults;
mod slots;

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{Config, Counters, Faults, Handle, Server};

/// Longest a condition may take; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that stops when it is dropped.
struct Bench {
    addr: SocketAddr,
    handle: Handle,
    _stop: DropGuard,
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    /// Whether the body ended as it should.
    complete: bool,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    /// The `data:` of each event, JSON except for `[DONE]`.
    fn events(&self) -> Vec<Value> {
        let data = self.text().lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| if data == "[DONE]" { json!(data) } else { serde_json::from_str(data).unwrap() })
            .collect()
    }
}

fn chat(extra: Value) -> Value {
    merged(json!({ "model": "mock-model", "messages": [{ "role": "user", "content": "12345678" }] }), extra)
}

fn merged(mut request: Value, extra: Value) -> Value {
    request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    request
}

impl Bench {
    async fn start(config: Config) -> Self {
        let server = Server::bind("127.0.0.1:0", config).await.unwrap();
        let (addr, handle, stop) = (server.local_addr(), server.handle(), CancellationToken::new());
        tokio::spawn(server.run(stop.clone()));
        Self { addr, handle, _stop: stop.drop_guard() }
    }

    fn fault(&self, json: Value) {
        self.handle.set_faults(serde_json::from_value::<Faults>(json).unwrap()).unwrap();
    }

    /// Response head and the body still to come, on a connection of its own.
    async fn open(
        &self,
        method: Method,
        path: &str,
        headers: &[(&'static str, &'static str)],
        body: impl Into<Bytes>,
    ) -> Result<Response<hyper::body::Incoming>, hyper::Error> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        sender.send_request(request(method, path, headers, body.into())).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&'static str, &'static str)],
        body: impl Into<Bytes>,
    ) -> Reply {
        collect(self.open(method, path, headers, body).await.unwrap()).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(Method::GET, path, &[], "").await
    }

    async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(Method::POST, path, &[], body.to_string()).await
    }

    async fn chat(&self, extra: Value) -> Reply {
        self.post("/v1/chat/completions", chat(extra)).await
    }

    async fn open_stream(&self, tokens: &'static str) -> Response<hyper::body::Incoming> {
        let body = chat(json!({ "stream": true })).to_string();
        let headers = [("x-mock-output-tokens", tokens)];
        self.open(Method::POST, "/v1/chat/completions", &headers, body).await.unwrap()
    }

    /// Waits until the counters are as wanted.
    async fn until(&self, wanted: impl Fn(&Counters) -> bool) {
        let reached = async {
            while !wanted(&self.handle.counters()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("not reached: {:?}", self.handle.counters());
        }
    }

    async fn h2(&self) -> hyper::client::conn::http2::SendRequest<Full<Bytes>> {
        let stream = TokioIo::new(TcpStream::connect(self.addr).await.unwrap());
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

fn request(
    method: Method,
    path: &str,
    headers: &[(&'static str, &'static str)],
    body: Bytes,
) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = format!("http://mock{path}").parse().unwrap();
    request.headers_mut().insert("host", HeaderValue::from_static("mock"));
    for (name, value) in headers {
        request.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    request
}

async fn collect(response: Response<hyper::body::Incoming>) -> Reply {
    let (head, mut incoming) = response.into_parts();
    let (mut body, mut complete) = (Vec::new(), true);
    while let Some(frame) = tokio::time::timeout(PATIENCE, incoming.frame()).await.expect("body stalls") {
        match frame {
            Ok(frame) => body.extend_from_slice(&frame.into_data().unwrap_or_default()),
            Err(_) => {
                complete = false;
                break;
            }
        }
    }
    Reply { status: head.status, headers: head.headers, body: body.into(), complete }
}
