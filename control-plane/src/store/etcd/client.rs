//! Calls to etcd: any member that answers, each try within its deadline, errors with their remedy.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Response, Status};
use weir_proto::etcd::auth_client::AuthClient;
use weir_proto::etcd::kv_client::KvClient;
use weir_proto::etcd::{AuthenticateRequest, RangeRequest, RangeResponse, TxnRequest, TxnResponse};

use super::EtcdConfig;
use crate::store::Error;

/// For one try at one member: above the time that etcd takes to elect a leader (about 1 s).
pub(super) const TRY: Duration = Duration::from_secs(3);
/// For a whole call, over all its tries.
pub(super) const CALL: Duration = Duration::from_secs(8);
/// Between two tries; members are asked in turn, so this is not the time until the next one is asked.
const PAUSE: Duration = Duration::from_millis(50);
/// A member that is gone without a word is noticed after so long, and as long again.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest answer: etcd sends as much as is asked for, and this asks for pages.
pub(super) const ANSWER_MAX_BYTES: usize = 256 << 20;

/// An etcd cluster.
pub(super) struct Client {
    config: EtcdConfig,
    /// One per endpoint, made when it is first used.
    channels: Vec<Mutex<Option<Channel>>>,
    /// The endpoint that answered last.
    current: AtomicUsize,
    token: RwLock<Option<MetadataValue<Ascii>>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.config.endpoints).finish_non_exhaustive()
    }
}

/// The answer of a call that may have been made more than once.
#[derive(Debug)]
pub(super) struct Done<T> {
    pub(super) answer: T,
    /// An earlier try of it may have been carried out too.
    pub(super) unsure: bool,
}

impl Client {
    pub(super) fn new(config: EtcdConfig) -> Result<Self, Error> {
        let channels = config.endpoints.iter().map(|_| Mutex::new(None)).collect();
        let client = Self { config, channels, current: AtomicUsize::new(0), token: RwLock::new(None) };
        // What is wrong with the addresses or the files is said at the start.
        (0..client.channels.len())
            .try_for_each(|at| client.channel(at).map(|_| ()))
            .map_err(Error::Failed)?;
        Ok(client)
    }

    /// The endpoint to use now, and how to get there.
    pub(super) fn now(&self) -> Result<(usize, Channel), Error> {
        let at = self.current.load(Ordering::Relaxed);
        Ok((at, self.channel(at).map_err(Error::Failed)?))
    }

    fn channel(&self, at: usize) -> Result<Channel, String> {
        let mut kept = self.channels[at].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = &*kept {
            return Ok(channel.clone());
        }
        let channel = self.endpoint(&self.config.endpoints[at])?.connect_lazy();
        *kept = Some(channel.clone());
        Ok(channel)
    }

    fn endpoint(&self, url: &str) -> Result<Endpoint, String> {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .map_err(|e| format!("etcd at {url}: {e}"))?
            .connect_timeout(TRY)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        if !url.starts_with("https://") {
            return Ok(endpoint);
        }
        let read =
            |path: &std::path::PathBuf| std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()));
        let mut tls = match &self.config.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let Some((cert, key)) = &self.config.own {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        endpoint.tls_config(tls).map_err(|e| format!("etcd at {url}: {}", deepest(&e)))
    }

    /// The next call goes to the next endpoint. The connection to this one is made anew when its turn comes, with
    /// certificates that may have been renewed.
    pub(super) fn move_on(&self, from: usize) {
        *self.channels[from].lock().unwrap_or_else(PoisonError::into_inner) = None;
        let next = (from + 1) % self.channels.len();
        let _ = self.current.compare_exchange(from, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// A request with the token, once there is one.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &*self.token.read().unwrap_or_else(PoisonError::into_inner) {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    pub(super) async fn txn(&self, request: TxnRequest) -> Result<Done<TxnResponse>, Error> {
        self.call(&request, |channel, request| {
            let mut kv = KvClient::new(channel)
                .max_decoding_message_size(ANSWER_MAX_BYTES)
                .max_encoding_message_size(ANSWER_MAX_BYTES);
            Box::pin(async move { kv.txn(request).await })
        })
        .await
    }

    pub(super) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        let answer = self.call(&request, |channel, request| {
            let mut kv = KvClient::new(channel).max_decoding_message_size(ANSWER_MAX_BYTES);
            Box::pin(async move { kv.range(request).await })
        });
        Ok(answer.await?.answer)
    }

    /// Calls, again and elsewhere if need be. For what may be carried out twice.
    pub(super) async fn call<Q: Clone, A>(
        &self,
        message: &Q,
        method: impl Fn(Channel, Request<Q>) -> BoxFuture<'static, Result<Response<A>, Status>>,
    ) -> Result<Done<A>, Error> {
        let deadline = Instant::now() + CALL;
        let (mut unsure, mut asked_in) = (false, false);
        loop {
            let (at, channel) = self.now()?;
            let tried = timeout(TRY, method(channel, self.request(message.clone()))).await;
            let status = match tried {
                Ok(Ok(answer)) => return Ok(Done { answer: answer.into_inner(), unsure }),
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {TRY:?}")),
            };
            if wants_login(&status) && self.config.user.is_some() && !asked_in {
                asked_in = true;
                self.log_in().await?;
                continue;
            }
            if !is_passing(&status) {
                return Err(self.error(&status));
            }
            unsure |= may_be_done(&status);
            self.move_on(at);
            if Instant::now() + PAUSE >= deadline {
                let reason = describe(&status);
                let unknown = if unsure { "; it is not known whether it was carried out" } else { "" };
                return Err(Error::Away { at: self.config.names(), reason: format!("{reason}{unknown}") });
            }
            sleep(PAUSE).await;
        }
    }

    /// Gets a token for the user. An etcd that has no authentication needs none.
    pub(super) async fn log_in(&self) -> Result<(), Error> {
        let Some(name) = self.config.user.clone() else { return Ok(()) };
        let password = self.config.password.as_ref().map(|p| p.expose().to_owned()).unwrap_or_default();
        let deadline = Instant::now() + CALL;
        loop {
            let (at, channel) = self.now()?;
            let asked = AuthenticateRequest { name: name.clone(), password: password.clone() };
            let mut auth = AuthClient::new(channel);
            let status = match timeout(TRY, auth.authenticate(asked)).await {
                Ok(Ok(answer)) => {
                    let token = answer.into_inner().token.parse::<MetadataValue<Ascii>>();
                    let mut token =
                        token.map_err(|_| Error::Failed("etcd gave a token that is none".into()))?;
                    token.set_sensitive(true);
                    *self.token.write().unwrap_or_else(PoisonError::into_inner) = Some(token);
                    return Ok(());
                }
                Ok(Err(status)) if status.message().contains("authentication is not enabled") => {
                    return Ok(());
                }
                Ok(Err(status)) if !is_passing(&status) => {
                    return Err(Error::Failed(format!(
                        "etcd at {} does not let the user {name} in: {}; check the user in --store and the password \
                         in --store-password-file",
                        self.config.names(),
                        status.message()
                    )));
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {TRY:?}")),
            };
            self.move_on(at);
            if Instant::now() + PAUSE >= deadline {
                return Err(Error::Away { at: self.config.names(), reason: describe(&status) });
            }
            sleep(PAUSE).await;
        }
    }

    /// What a status means for the store.
    pub(super) fn error(&self, status: &Status) -> Error {
        let (message, at) = (status.message(), self.config.names());
        if message.contains("database space exceeded") {
            return Error::Full(
                "etcd's space quota is used up: compact and defragment it, then `etcdctl alarm disarm`",
            );
        }
        if message.contains("too large")
            || message.contains("larger than max")
            || message.contains("too many operations")
        {
            return Error::TooLarge;
        }
        let remedy = match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => {
                "; give a user that may read and write below the prefix: etcd://USER@... and --store-password-file"
            }
            Code::InvalidArgument if message.contains("user name is empty") => {
                "; it asks for a user: etcd://USER@... and --store-password-file"
            }
            _ => "",
        };
        Error::Failed(format!("etcd at {at}: {}{remedy}", describe(status)))
    }
}

fn wants_login(status: &Status) -> bool {
    let message = status.message();
    message.contains("invalid auth token")
        || message.contains("user name is empty")
        || message.contains("revision of auth store is old")
}

/// Another try, perhaps at another member, may go better.
pub(super) fn is_passing(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => true,
        Code::ResourceExhausted => status.message().contains("too many requests"),
        // A connection that breaks under a call.
        Code::Unknown | Code::Internal => !status.message().contains("etcdserver"),
        _ => false,
    }
}

/// Whether what was asked may have been carried out. Not when there was no connection, or no leader to pass it on.
fn may_be_done(status: &Status) -> bool {
    let cause = describe(status);
    !(cause.contains("refused")
        || cause.contains("etcdserver: no leader")
        || cause.contains("too many requests"))
}

/// A status with its innermost cause: transport errors keep the useful part there.
fn describe(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => deepest(cause),
        None => status.message().to_owned(),
    }
}

fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut at = error;
    while let Some(next) = at.source() {
        at = next;
    }
    at.to_string()
}
