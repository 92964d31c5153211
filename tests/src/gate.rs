//! Doors in front of a backend, one per gateway. Gateways are told apart by the credential that they send, so a test
//! can cut one of them off from a healthy backend.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What a gateway gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Door {
    /// The backend.
    #[default]
    Open,
    /// A broken connection.
    Broken,
    /// Silence.
    Silent,
    /// The backend, but probes that ask it for tokens get a 500.
    NotReady,
}

/// The doors in front of one backend.
#[derive(Debug, Clone)]
pub struct Gate {
    /// Where gateways find it.
    pub address: SocketAddr,
    doors: watch::Sender<BTreeMap<String, Door>>,
}

impl Gate {
    /// Starts in front of `backend`, open for everybody, until `shutdown`.
    pub async fn start(backend: SocketAddr, shutdown: &CancellationToken) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let doors = watch::Sender::new(BTreeMap::new());
        let serving = serve(listener, backend, doors.subscribe());
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(serving).await });
        Self { address, doors }
    }

    /// Sets the door of the gateway with this credential; "*" is everybody else's.
    pub fn set(&self, credential: &str, door: Door) {
        self.doors.send_modify(|doors| {
            doors.insert(credential.to_owned(), door);
        });
    }
}

type Http = Client<HttpConnector, Full<Bytes>>;
type Answer = Response<Either<Incoming, Full<Bytes>>>;

async fn serve(listener: TcpListener, backend: SocketAddr, doors: watch::Receiver<BTreeMap<String, Door>>) {
    let http: Arc<Http> = Arc::new(Client::builder(TokioExecutor::new()).build_http());
    while let Ok((stream, _)) = listener.accept().await {
        let (http, doors) = (http.clone(), doors.clone());
        let service = service_fn(move |request| pass(http.clone(), backend, doors.clone(), request));
        tokio::spawn(async move {
            // A connection that a shut door breaks ends with an error.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn door(doors: &BTreeMap<String, Door>, headers: &HeaderMap) -> Door {
    let credential = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let credential = credential.and_then(|text| text.strip_prefix("Bearer ")).unwrap_or_default();
    doors.get(credential).or_else(|| doors.get("*")).copied().unwrap_or_default()
}

async fn pass(
    http: Arc<Http>,
    backend: SocketAddr,
    mut doors: watch::Receiver<BTreeMap<String, Door>>,
    request: Request<Incoming>,
) -> Result<Answer, std::io::Error> {
    let broken = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let (mut head, body) = request.into_parts();
    let probe = head.headers.get(header::USER_AGENT).is_some_and(|agent| agent == "weir-probe");
    let now = door(&doors.borrow_and_update(), &head.headers);
    match now {
        Door::Open => {}
        Door::Broken => return Err(broken()),
        Door::Silent => {
            // Waits until the door opens again; the gateway has given up long before.
            let _ = doors.wait_for(|doors| door(doors, &head.headers) != Door::Silent).await;
            return Err(broken());
        }
        Door::NotReady if probe && head.method == Method::POST => {
            let mut answer = Response::new(Either::Right(Full::new(Bytes::new())));
            *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            return Ok(answer);
        }
        Door::NotReady => {}
    }
    let body = body.collect().await.map_err(|_| broken())?.to_bytes();
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    head.uri = format!("http://{backend}{path}").parse().expect("a URI");
    let answer = http.request(Request::from_parts(head, Full::new(body))).await.map_err(|_| broken())?;
    Ok(answer.map(Either::Left))
}
