//! Entry points for fuzz targets: the private parsers of replies and of addresses. Nothing else may use them.

use std::time::Duration;

use ::redis::Value;

use super::reply::{self, Reader};
use super::topology::Source;
use crate::model::call::{Charge, Decision, Settled};
use crate::model::error::Error;
use crate::model::limits::{LimitState, ScopeLimits};
use crate::model::usage::UsageLines;

/// One reply, read as the answer to each kind of call.
#[derive(Debug)]
pub struct Replies {
    /// As the answer to an acquire.
    pub decision: Result<Decision, Error>,
    /// As the answer to a settlement.
    pub settled: Result<Settled, Error>,
    /// As the answer to a peek.
    pub peeked: Result<Vec<LimitState>, Error>,
    /// As the answer to a usage report.
    pub usage: Result<Vec<UsageLines>, Error>,
    /// As the answer to a charge.
    pub charged: Result<Decision, Error>,
    /// As an index below `len`.
    pub index: Result<Option<usize>, Error>,
}

/// The numbers of a reply that came as one string.
pub fn packed(reply: &[u8]) -> Option<Vec<i64>> {
    reply::numbers(Value::BulkString(reply.to_vec())).ok()
}

/// The numbers of a reply that came as an array.
pub fn listed(reply: &[i64]) -> Option<Vec<i64>> {
    reply::numbers(Value::Array(reply.iter().map(|number| Value::Int(*number)).collect())).ok()
}

/// Reads a reply in every way.
pub fn replies(reply: &[i64], scopes: &[ScopeLimits], charges: &[Charge], len: usize) -> Replies {
    let reader = || Reader::new(reply);
    Replies {
        decision: reader().decision(scopes),
        settled: reader().settled(scopes),
        peeked: reader().peeked(scopes),
        usage: reader().usage(len),
        charged: reader().charged(charges),
        index: reader().index(len),
    }
}

/// Whether this is the address of a store; the text of the error if it is not.
pub fn address(url: &str) -> Result<(), String> {
    Source::parse(url, Duration::from_secs(1)).map(drop).map_err(|error| error.to_string())
}
