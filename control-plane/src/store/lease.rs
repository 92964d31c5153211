//! Who holds which lease, for stores of one process: in memory, since the leases end with the process.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::Error;

#[derive(Debug)]
struct Grant {
    holder: String,
    fencing: u64,
    until: Instant,
}

#[derive(Debug, Default)]
pub(super) struct Leases(Mutex<HashMap<String, Grant>>);

impl Leases {
    /// Renews the lease for who has it; `None` when it is free and a new number is needed.
    pub(super) fn renew(&self, name: &str, holder: &str, ttl: Duration) -> Result<Option<u64>, Error> {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match grants.get_mut(name).filter(|grant| grant.until > now) {
            Some(grant) if grant.holder == holder => {
                grant.until = now + ttl;
                Ok(Some(grant.fencing))
            }
            Some(grant) => Err(Error::Held(grant.holder.clone())),
            None => Ok(None),
        }
    }

    /// Grants it under a new number, unless somebody was faster.
    pub(super) fn grant(&self, name: &str, holder: &str, ttl: Duration, fencing: u64) -> Result<u64, Error> {
        if let Some(fencing) = self.renew(name, holder, ttl)? {
            return Ok(fencing);
        }
        let grant = Grant { holder: holder.to_owned(), fencing, until: Instant::now() + ttl };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), grant);
        Ok(fencing)
    }

    /// Ends it, if this holder has it.
    pub(super) fn release(&self, name: &str, holder: &str) {
        let mut grants = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.get(name).is_some_and(|grant| grant.holder == holder) {
            grants.remove(name);
        }
    }
}
