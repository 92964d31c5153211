//! The replies of scripts: whole numbers, as an array of integers or, for many numbers, as one string of doubles.

use std::time::Duration;

use ::redis::{RedisError, Value};

use crate::model::call::{Charge, Decision, Outcome, Settled};
use crate::model::checks::blank_limits;
use crate::model::error::{Error, Fault};
use crate::model::leaky_bucket::FOREVER;
use crate::model::limits::{LimitState, ScopeLimits, Verdict, What};
use crate::model::usage::{Tally, UsageLines};

/// The numbers of a reply in either form.
pub(super) fn numbers(reply: Value) -> Result<Vec<i64>, RedisError> {
    match reply {
        // The doubles are whole and below 2^53, so no precision is lost.
        Value::BulkString(bytes) => {
            Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes) as i64).collect())
        }
        other => Ok(::redis::from_redis_value(other)?),
    }
}

/// Reads a reply from front to back. A missing number is an error and has no default.
pub(crate) struct Reader<'a> {
    rest: std::slice::Iter<'a, i64>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(reply: &'a [i64]) -> Self {
        Self { rest: reply.iter() }
    }

    pub(crate) fn decision(mut self, scopes: &[ScopeLimits]) -> Result<Decision, Error> {
        let (outcome, slot, wait, now_us) = (self.int()?, self.int()?, self.int()?, self.unsigned()?);
        let outcome = match outcome {
            0 | 3 => Outcome::Granted { slot: usize::try_from(slot).ok() },
            1 => Outcome::Limited { wait: u64::try_from(wait).ok().map(Duration::from_micros) },
            2 => {
                Outcome::NoSlot { wait: Duration::from_micros(u64::try_from(wait).map_err(|_| malformed())?) }
            }
            _ => return Err(malformed()),
        };
        Ok(Decision { outcome, limits: self.limits(scopes)?, now_us, degraded: false })
    }

    pub(crate) fn settled(mut self, scopes: &[ScopeLimits]) -> Result<Settled, Error> {
        let applied = self.int()? == 1;
        let now_us = self.unsigned()?;
        Ok(Settled { applied, limits: self.limits(scopes)?, now_us })
    }

    pub(crate) fn peeked(mut self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        self.int()?;
        self.limits(scopes)
    }

    pub(crate) fn usage(mut self, records: usize) -> Result<Vec<UsageLines>, Error> {
        (0..records).map(|_| (0..self.unsigned()?).map(|_| self.usage_line()).collect()).collect()
    }

    fn usage_line(&mut self) -> Result<(String, Tally), Error> {
        let bytes = self.unsigned()?;
        let name: Vec<u8> = (0..bytes)
            .map(|_| self.int().and_then(|byte| u8::try_from(byte).map_err(|_| malformed())))
            .collect::<Result<_, _>>()?;
        let name = String::from_utf8(name).map_err(|_| malformed())?;
        Ok((name, Tally::from_array([self.int()?, self.int()?, self.int()?, self.int()?])))
    }

    /// Reads an index below `len`; `None` for no index.
    pub(crate) fn index(mut self, len: usize) -> Result<Option<usize>, Error> {
        match self.int()? {
            -1 => Ok(None),
            index => usize::try_from(index).ok().filter(|i| *i < len).map(Some).ok_or_else(malformed),
        }
    }

    pub(crate) fn charged(mut self, charges: &[Charge]) -> Result<Decision, Error> {
        let (outcome, wait, now_us) = (self.int()?, self.int()?, self.unsigned()?);
        let outcome = match outcome {
            0 => Outcome::Granted { slot: None },
            1 => Outcome::Limited { wait: u64::try_from(wait).ok().map(Duration::from_micros) },
            _ => return Err(malformed()),
        };
        let mut limits = Vec::with_capacity(charges.len());
        for charge in charges {
            let mut limit = LimitState {
                scope: charge.record.clone(),
                what: What::Bucket(charge.kind),
                verdict: Verdict::Fits,
                limit: charge.bucket.capacity,
                remaining: 0,
                reset: Duration::ZERO,
            };
            self.limit(&mut limit)?;
            limits.push(limit);
        }
        Ok(Decision { outcome, limits, now_us, degraded: false })
    }

    fn limits(&mut self, scopes: &[ScopeLimits]) -> Result<Vec<LimitState>, Error> {
        let mut limits = blank_limits(scopes);
        for limit in &mut limits {
            self.limit(limit)?;
        }
        Ok(limits)
    }

    fn limit(&mut self, limit: &mut LimitState) -> Result<(), Error> {
        let (verdict, wait) = (self.int()?, self.unsigned()?);
        limit.verdict = match verdict {
            0 => Verdict::Fits,
            1 => Verdict::Wait(Duration::from_micros(wait)),
            2 => Verdict::Never,
            _ => return Err(malformed()),
        };
        limit.remaining = self.unsigned()?;
        limit.reset = u64::try_from(self.int()?).map_or(FOREVER, Duration::from_micros);
        Ok(())
    }

    fn int(&mut self) -> Result<i64, Error> {
        self.rest.next().copied().ok_or_else(malformed)
    }

    fn unsigned(&mut self) -> Result<u64, Error> {
        u64::try_from(self.int()?).map_err(|_| malformed())
    }
}

pub(crate) fn malformed() -> Error {
    Error::Refused { fault: Fault::Other, detail: "reply of an unknown form".into() }
}
