//! One connection to the control plane: the token on every call, a deadline, one retry.

use std::error::Error as _;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Response, Status, Streaming};
use weir_proto::manifest::format_duration;
use weir_proto::v1::admin_service_client::AdminServiceClient;

use crate::args::Cli;
use crate::error::Error;

/// Between an attempt that found nobody and the next one.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Largest answer, bytes; a page of 1000 resources with 1000 models each.
const ANSWER_MAX_BYTES: usize = 64 << 20;

/// Whether a call may be sent again after UNAVAILABLE: only when the same request twice does the same once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retry {
    Once,
    Never,
}

/// The admin service.
pub(crate) struct Client {
    stub: AdminServiceClient<Channel>,
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
    /// Connects; tries a second time after a moment, since a control plane may be restarting.
    pub(crate) async fn connect(cli: &Cli) -> Result<Self, Error> {
        let server = cli.server.as_str().to_owned();
        let token = token(cli.token_file.as_deref(), cli.token_env.as_deref())?;
        let unreachable = |error: &(dyn std::error::Error + 'static)| Error::Unreachable {
            server: server.clone(),
            reason: deepest(error),
        };
        let mut endpoint = Endpoint::from_shared(server.clone())
            .map_err(|e| unreachable(&e))?
            .connect_timeout(cli.timeout)
            .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
            .map_err(|e| unreachable(&e))?;
        if server.starts_with("https://") {
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
            endpoint = endpoint.tls_config(tls).map_err(|e| unreachable(&e))?;
        }
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(_) => {
                tokio::time::sleep(RETRY_PAUSE).await;
                endpoint.connect().await.map_err(|e| unreachable(&e))?
            }
        };
        let stub = AdminServiceClient::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
        Ok(Self { stub, server, token, timeout: cli.timeout })
    }

    /// Calls with the ordinary deadline.
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
        let mut tries = if retry == Retry::Once { 2 } else { 1 };
        loop {
            tries -= 1;
            let mut request = Request::new(message.clone());
            if let Some(token) = &self.token {
                request.metadata_mut().insert("authorization", token.clone());
            }
            let answer = tokio::time::timeout(timeout, method(self.stub.clone(), request)).await;
            match answer {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) if status.code() == Code::Unavailable && tries > 0 => {
                    tokio::time::sleep(RETRY_PAUSE).await;
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

    /// Opens a stream of answers; how long it goes on is up to the caller.
    pub(crate) async fn open<Q, A, F, Fut>(&self, message: Q, method: F) -> Result<Streaming<A>, Error>
    where
        Q: Clone,
        F: Fn(AdminServiceClient<Channel>, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<Streaming<A>>, Status>>,
    {
        self.call(Retry::Once, message, method).await
    }

    /// An answer of a stream, or what went wrong with it.
    pub(crate) fn heard<A>(&self, answer: Result<A, Status>) -> Result<A, Error> {
        answer.map_err(|status| self.refused(status))
    }

    fn refused(&self, status: Status) -> Error {
        let server = self.server.clone();
        match status.source() {
            // The connection broke; the status was made on this side.
            Some(cause) if status.code() == Code::Unavailable => {
                Error::Unreachable { server, reason: deepest(cause) }
            }
            _ => Error::Refused { server, status: Box::new(status) },
        }
    }
}

/// A new request id; sent again with a retry, so that what was done is not done twice.
pub(crate) fn request_id() -> String {
    uuid::Uuid::now_v7().to_string()
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

/// The innermost cause: transport errors say "transport error" and hide the reason below.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut at = error;
    while let Some(next) = at.source() {
        at = next;
    }
    at.to_string()
}
