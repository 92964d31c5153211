//! The connection to a control plane: adds the token, a deadline, and a retry at the next control plane if there are
//! several.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_proto::manifest::format_duration;
use weir_proto::v1::admin_service_client::AdminServiceClient;

use crate::args::Cli;
use crate::error::Error;

/// The pause after an attempt without an answer.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Largest answer, bytes; a page of 1000 resources with 1000 models each.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Whether a call may be sent again after UNAVAILABLE: only if it is idempotent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    Once,
    Never,
}

/// The admin service.
pub(crate) struct Client {
    /// The control plane that answers, and its index.
    current: Mutex<(usize, AdminServiceClient<Channel>)>,
    endpoints: Vec<Endpoint>,
    /// All addresses, for messages.
    server: String,
    token: Option<MetadataValue<Ascii>>,
    timeout: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the first control plane that answers. Tries twice, because a control plane may be restarting.
    pub(crate) async fn connect(cli: &Cli) -> Result<Self, Error> {
        let server = cli.server.all().join(", ");
        let token = token(cli.token_file.as_deref(), cli.token_env.as_deref())?;
        let endpoints =
            cli.server.all().iter().map(|url| endpoint(cli, url)).collect::<Result<Vec<_>, _>>()?;
        let unreachable = |error: &(dyn std::error::Error + 'static)| Error::Unreachable {
            server: server.clone(),
            reason: deepest(error),
        };
        let current = match first(&endpoints, 0).await {
            Ok(found) => found,
            Err(_) => {
                tokio::time::sleep(RETRY_PAUSE).await;
                first(&endpoints, 0).await.map_err(|e| unreachable(&e))?
            }
        };
        Ok(Self { current: Mutex::new(current), endpoints, server, token, timeout: cli.timeout })
    }

    fn current(&self) -> (usize, AdminServiceClient<Channel>) {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Switches to the next control plane that answers; stays with the current one if none does.
    async fn move_on(&self, from: usize) {
        if self.endpoints.len() > 1
            && let Ok(found) = first(&self.endpoints, from + 1).await
        {
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = found;
        }
    }

    /// Calls with the default deadline.
    pub(crate) async fn call<Q, A, F, Fut>(&self, retry: Retry, message: Q, method: F) -> Result<A, Error>
    where
        Q: Clone,
        F: Fn(AdminServiceClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        self.call_within(self.timeout, retry, message, method).await
    }

    /// Calls with a deadline per attempt.
    pub(crate) async fn call_within<Q, A, F, Fut>(
        &self,
        timeout: Duration,
        retry: Retry,
        message: Q,
        method: F,
    ) -> Result<A, Error>
    where
        Q: Clone,
        F: Fn(AdminServiceClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let mut tries = if retry == Retry::Once { 1 + self.endpoints.len() } else { 1 };
        loop {
            tries -= 1;
            let (at, stub) = self.current();
            let mut request = Request::new(message.clone());
            if let Some(token) = &self.token {
                request.metadata_mut().insert("authorization", token.clone());
            }
            let answer = tokio::time::timeout(timeout, method(stub, request)).await;
            match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if status.code() == Code::Unavailable && tries > 0 => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    self.move_on(at).await;
                }
                Ok(Err(status)) => return Err(self.refused(status)),
                Err(_) => {
                    return Err(Error::Timeout {
                        server: self.server.clone(),
                        timeout: format_duration(timeout),
                    });
                }
            }
        }
    }

    /// Opens a stream of answers without a deadline for the whole stream.
    pub(crate) async fn open<Q, A, F, Fut>(&self, message: Q, method: F) -> Result<Streaming<A>, Error>
    where
        Q: Clone,
        F: Fn(AdminServiceClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<Streaming<A>>, Status>>,
    {
        self.call(Retry::Once, message, method).await
    }

    /// The next answer of a stream.
    pub(crate) fn heard<A>(&self, answer: Result<A, Status>) -> Result<A, Error> {
        answer.map_err(|status| self.refused(status))
    }

    fn refused(&self, status: Status) -> Error {
        let server = self.server.clone();
        match status.source() {
            // The connection broke, so the status comes from this side.
            Some(cause) if status.code() == Code::Unavailable => {
                Error::Unreachable { server, reason: deepest(cause) }
            }
            _ => Error::Refused { server, status: Box::new(status) },
        }
    }
}

fn endpoint(cli: &Cli, url: &str) -> Result<Endpoint, Error> {
    let unusable = |error: &(dyn std::error::Error + 'static)| Error::Unreachable {
        server: url.to_owned(),
        reason: deepest(error),
    };
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|e| unusable(&e))?
        .connect_timeout(cli.timeout)
        .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
        .map_err(|e| unusable(&e))?;
    if !url.starts_with("https://") {
        return Ok(endpoint);
    }
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| Error::File { path: path.display().to_string(), source })
    };
    let mut tls = match &cli.ca {
        Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let (Some(cert), Some(key)) = (&cli.cert, &cli.key) {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    endpoint.tls_config(tls).map_err(|e| unusable(&e))
}

/// The first control plane that can be connected to, starting with `first`; otherwise the last error.
async fn first(
    endpoints: &[Endpoint],
    from: usize,
) -> Result<(usize, AdminServiceClient<Channel>), tonic::transport::Error> {
    let mut tried = 1;
    loop {
        let at = (from + tried - 1) % endpoints.len();
        match endpoints[at].connect().await {
            Ok(channel) => {
                let stub = AdminServiceClient::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
                return Ok((at, stub));
            }
            Err(error) if tried == endpoints.len() => return Err(error),
            Err(_) => tried += 1,
        }
    }
}

/// A new request id. A retry sends the same id, so that a change is not made twice.
pub(crate) fn request_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

/// The authorization header for HTTP; `None` without a token.
pub(crate) fn token_header(cli: &Cli) -> Result<Option<http::HeaderValue>, Error> {
    let token = token(cli.token_file.as_deref(), cli.token_env.as_deref())?;
    let header = |token: MetadataValue<Ascii>| {
        let mut value = http::HeaderValue::from_bytes(token.as_bytes()).ok()?;
        value.set_sensitive(true);
        Some(value)
    };
    Ok(token.and_then(header))
}

/// The authorization header, from the file or a variable of the environment; `None` without either.
fn token(file: Option<&Path>, variable: Option<&str>) -> Result<Option<MetadataValue<Ascii>>, Error> {
    let (text, origin) = match file {
        Some(path) => {
            let text = std::fs::read_to_string(path)
                .map_err(|source| Error::File { path: path.display().to_string(), source })?;
            (text, "--token-file")
        }
        None => match (std::env::var(variable.unwrap_or("WEIR_TOKEN")), variable) {
            (Ok(text), _) => (text, "the environment"),
            (Err(_), Some(variable)) => {
                let missing = format!("the context's token is in the variable {variable}, which is not set");
                return Err(Error::Setting(missing));
            }
            (Err(_), None) => return Ok(None),
        },
    };
    let text = text.trim();
    if text.is_empty() {
        return Err(Error::Token(origin));
    }
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {text}").parse().map_err(|_| Error::Token(origin))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// The innermost cause, because transport errors hide the reason in their source.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut at = error;
    while let Some(next) = at.source() {
        at = next;
    }
    at.to_string()
}
