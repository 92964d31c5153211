//! Leases: a key that exists as long as etcd's lease of its holder. The revision that created the key is the fencing token:
//! it rises with every grant, and no two grants have the same.

use std::collections::HashMap;
use std::time::Duration;

use weir_proto::etcd::lease_client::LeaseClient;
use weir_proto::etcd::{
    KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest,
    TxnRequest,
};

use super::{Inner, layout, one};
use crate::store::{Error, Lease};

/// The grants of this process, by name and holder.
pub(super) type Leases = HashMap<(String, String), Grant>;

#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    /// etcd's lease.
    id: i64,
    ttl: Duration,
    /// The revision that made the key.
    made: i64,
}

impl Inner {
    pub(super) async fn lease(&self, name: &str, holder: &str, ttl: Duration) -> Result<Lease, Error> {
        let mut leases = self.leases.lock().await;
        let own = (name.to_owned(), holder.to_owned());
        if let Some(grant) = leases.get(&own).copied() {
            if let Some(grant) = self.renew(name, holder, ttl, grant).await? {
                leases.insert(own, grant);
                return Ok(fencing_token(grant.made));
            }
            leases.remove(&own);
        }
        if let Some(other) = self.holder(name).await? {
            return Err(held(&other));
        }
        let id = self.grant(ttl).await?;
        let compare = vec![layout::created_at(self.layout.lease(name), 0)];
        let success = vec![layout::put(self.layout.lease(name), holder.to_owned().into(), id)];
        let failure = vec![layout::get(self.layout.lease(name))];
        let done = self.client.txn(TxnRequest { compare, success, failure }).await?;
        let made = if done.answer.succeeded {
            done.answer.header.map_or(0, |header| header.revision)
        } else {
            match done.answer.responses.into_iter().find_map(one) {
                // An earlier try was carried out.
                Some(entry) if entry.lease == id => entry.create_revision,
                Some(entry) => {
                    self.revoke(id).await?;
                    return Err(held(&entry));
                }
                None => return Err(Error::Held("somebody who was just here".into())),
            }
        };
        leases.insert(own, Grant { id, ttl, made });
        Ok(fencing_token(made))
    }

    pub(super) async fn release(&self, name: &str, holder: &str) -> Result<(), Error> {
        let grant = self.leases.lock().await.remove(&(name.to_owned(), holder.to_owned()));
        match grant {
            Some(grant) => self.revoke(grant.id).await,
            None => Ok(()),
        }
    }

    /// Renews a grant; `None` when it has ended.
    async fn renew(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
        grant: Grant,
    ) -> Result<Option<Grant>, Error> {
        let key = self.layout.lease(name);
        if grant.ttl == ttl {
            let alive = self.keep_alive(grant.id).await?.ttl > 0;
            // The key may have been deleted manually.
            let ours =
                alive && self.holder(name).await?.is_some_and(|entry| entry.create_revision == grant.made);
            return Ok(ours.then_some(grant));
        }
        // The time of a lease cannot be changed: the key moves to another one, and stays the one it is.
        let id = self.grant(ttl).await?;
        let compare = vec![layout::created_at(key.clone(), grant.made)];
        let success = vec![layout::put(key, holder.to_owned().into(), id)];
        let done = self.client.txn(TxnRequest { compare, success, failure: Vec::new() }).await?;
        if !done.answer.succeeded {
            self.revoke(id).await?;
            return Ok(None);
        }
        self.revoke(grant.id).await?;
        Ok(Some(Grant { id, ttl, ..grant }))
    }

    async fn holder(&self, name: &str) -> Result<Option<KeyValue>, Error> {
        let answer = self.client.range(layout::range(self.layout.lease(name))).await?;
        Ok(answer.kvs.into_iter().next())
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        // etcd counts whole seconds, and gives more when this is less than it can keep.
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        let asked = LeaseGrantRequest { ttl: seconds, id: 0 };
        let done = self.client.call(&asked, |channel, request| {
            let mut client = LeaseClient::new(channel);
            Box::pin(async move { client.lease_grant(request).await })
        });
        Ok(done.await?.answer.id)
    }

    async fn keep_alive(&self, id: i64) -> Result<LeaseKeepAliveResponse, Error> {
        let asked = LeaseKeepAliveRequest { id };
        let done = self.client.call(&asked, |channel, request| {
            let mut client = LeaseClient::new(channel);
            Box::pin(async move {
                let (metadata, extensions, message) = request.into_parts();
                let once = tokio_stream::once(message);
                let stream = tonic::Request::from_parts(metadata, extensions, once);
                let mut answers = client.lease_keep_alive(stream).await?.into_inner();
                let answer = answers.message().await?;
                answer.map(tonic::Response::new).ok_or_else(|| tonic::Status::unavailable("no answer"))
            })
        });
        Ok(done.await?.answer)
    }

    async fn revoke(&self, id: i64) -> Result<(), Error> {
        let asked = LeaseRevokeRequest { id };
        let done = self.client.call(&asked, |channel, request| {
            let mut client = LeaseClient::new(channel);
            Box::pin(async move { client.lease_revoke(request).await })
        });
        match done.await {
            // It has run out meanwhile.
            Err(Error::Failed(reason)) if reason.contains("lease not found") => Ok(()),
            done => done.map(|_| ()),
        }
    }
}

fn fencing_token(made: i64) -> Lease {
    Lease { fencing_token: made.unsigned_abs() }
}

fn held(entry: &KeyValue) -> Error {
    Error::Held(String::from_utf8_lossy(&entry.value).into_owned())
}
