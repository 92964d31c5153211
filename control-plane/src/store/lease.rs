//! Leases of stores with one process, in memory, because the leases end with the process.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Error;

#[derive(Debug)]
struct Grant {
    holder: String,
    fencing_token: u64,
    until: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HashMap<String, Grant>>);

impl Leases {
    /// Renews the lease of its holder; `None` if the lease is free and needs a new fencing token.
    pub(super) fn renew(&self, name: &str, holder: &str, ttl: Duration) -> Result<Option<u64>, Error> {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match grants.get_mut(name).filter(|grant| grant.until > now) {
            Some(grant) if grant.holder == holder => {
                grant.until = now + ttl;
                Ok(Some(grant.fencing_token))
            }
            Some(grant) => Err(Error::Held(grant.holder.clone())),
            None => Ok(None),
        }
    }

    /// Grants the lease with a new fencing token, unless another holder has it.
    pub(super) fn grant(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
        fencing_token: u64,
    ) -> Result<u64, Error> {
        if let Some(fencing_token) = self.renew(name, holder, ttl)? {
            return Ok(fencing_token);
        }
        let grant = Grant { holder: holder.to_owned(), fencing_token, until: Instant::now() + ttl };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), grant);
        Ok(fencing_token)
    }

    /// Ends it, if this holder has it.
    pub(super) fn release(&self, name: &str, holder: &str) {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.get(name).is_some_and(|grant| grant.holder == holder) {
            grants.remove(name);
        }
    }
}
