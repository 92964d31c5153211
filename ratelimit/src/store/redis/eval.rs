//! One script call on a connection.

use ::redis::aio::ConnectionLike;
use ::redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

use super::failures::classify_connect;
use super::options::CONNECT_TIMEOUT;
use super::reply;
use super::script::{self, Script};
use super::topology::Shared;
use crate::model::error::Error;
use crate::model::key::Key;

/// Calls a script by its hash, and with its text if the server does not know it.
pub(super) async fn eval(
    link: &mut impl ConnectionLike,
    birth: u64,
    script: &Script,
    keys: &[&Key],
    args: &script::Args,
) -> Result<Vec<i64>, RedisError> {
    let command = |name: &str, body: &str| {
        let mut command =
            Cmd::with_capacity(4 + keys.len() + args.len(), 64 * (3 + keys.len()) + args.bytes());
        command.arg(name).arg(body).arg(keys.len());
        for key in keys {
            command.arg(key.as_str());
        }
        for arg in args.parts() {
            command.arg(arg);
        }
        command.arg(birth);
        command
    };
    let mut result = command("EVALSHA", script.hash()).query_async::<Value>(link).await;
    if matches!(&result, Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)) {
        result = command("EVAL", script.text()).query_async(link).await;
    }
    reply::numbers(result?)
}

/// The time at which the data set behind a connection was created; in a Cluster, that of the shard of one key.
pub(super) async fn birth(link: &mut Shared) -> Result<u64, Error> {
    let key = Key::birth();
    let keys = [&key];
    let none = script::Args::default();
    let asked = eval(link, 0, &script::BIRTH, &keys, &none);
    let reply =
        tokio::time::timeout(CONNECT_TIMEOUT, asked).await.map_err(|_| Error::Timeout(CONNECT_TIMEOUT))?;
    let reply = reply.map_err(|error| classify_connect(&error))?;
    reply.first().and_then(|us| u64::try_from(*us).ok()).ok_or_else(reply::malformed)
}
