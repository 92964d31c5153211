//! History, rollback, and the check of the audit log.

use std::collections::BTreeSet;

use tonic::Status;
use weir_proto::v1::{self, ResourceKind};

use super::view::page_size;
use super::{Admin, Handle, changes, options};
use crate::catalog::Answer;
use crate::encoding::{hex, unhex};
use crate::model::{Edit, Key, Plan, State, plan};
use crate::services::invalid;

/// Records that one call reads; a page may have fewer entries than requested and still have a next page.
const SCANNED_MAX: usize = 20_000;

impl Handle<v1::HistoryRequest> for Admin {
    type Answer = v1::HistoryResponse;

    async fn do_call(&self, request: v1::HistoryRequest) -> Result<Self::Answer, Status> {
        let size = page_size(request.page_size)?;
        let key = request.r#ref.as_ref().map(|r| super::view::key(Some(r))).transpose()?;
        let of = key.as_ref().map_or_else(|| "*".to_owned(), Key::path);
        let mut before = match request.page_token.as_str() {
            "" => u64::MAX,
            token => parse(token, &of)
                .ok_or_else(|| invalid("page_token", "is not from an answer to this request"))?,
        };
        let (mut entries, mut scanned) = (Vec::new(), 0);
        loop {
            let records = self.0.catalog.records_before(before, size.max(100)).await?;
            let Some(last) = records.last() else {
                return Ok(v1::HistoryResponse { entries, next_page_token: String::new() });
            };
            before = last.record.sequence;
            scanned += records.len();
            for logged in records.iter().filter(|l| key.as_ref().is_none_or(|key| l.touches(key))) {
                entries.push(logged.to_wire());
                if entries.len() == size {
                    before = logged.record.sequence;
                    break;
                }
            }
            if before <= self.0.catalog.oldest_sequence() {
                return Ok(v1::HistoryResponse { entries, next_page_token: String::new() });
            }
            if entries.len() == size || scanned >= SCANNED_MAX {
                let next_page_token = hex(format!("{before}/{of}").as_bytes());
                return Ok(v1::HistoryResponse { entries, next_page_token });
            }
        }
    }
}

fn parse(token: &str, of: &str) -> Option<u64> {
    let text = String::from_utf8(unhex(token)?).ok()?;
    let (before, rest) = text.split_once('/')?;
    (rest == of).then_some(before)?.parse().ok()
}

impl Answer for v1::RollbackResponse {
    fn set_revision(&mut self, revision: u64) {
        self.revision = revision;
    }
}

impl Handle<v1::RollbackRequest> for Admin {
    type Answer = v1::RollbackResponse;

    async fn do_call(&self, request: v1::RollbackRequest) -> Result<Self::Answer, Status> {
        let call = self.call(
            "Rollback",
            "weir.v1.RollbackRequest",
            &request,
            &request.request_id,
            request.validate_only,
        )?;
        let mut named = BTreeSet::new();
        for reference in &request.refs {
            named.insert(super::view::key(Some(reference))?);
        }
        let then = self.0.catalog.at(request.revision).await?;
        let plan =
            |now: &State| plan(now, edits(now, &then, &named), options(request.allow_mass_removal, false));
        let answer = |plan: &Plan, state: &State| v1::RollbackResponse {
            changes: changes(plan),
            revision: state.revision,
        };
        self.change(call, plan, answer).await
    }
}

/// The edits that restore an earlier state. API keys are restored only when named, because a key that was revoked since then
/// must not become valid again by the rollback of a weight.
fn edits(now: &State, then: &State, named: &BTreeSet<Key>) -> Vec<Edit> {
    let wanted = |key: &&Key| {
        if named.is_empty() { key.kind != ResourceKind::ApiKey } else { named.contains(*key) }
    };
    let all: BTreeSet<&Key> = now.resources.keys().chain(then.resources.keys()).collect();
    let edit = |key: &Key| match (now.get(key), then.get(key)) {
        (_, Some(old)) => Some(Edit::Put(Box::new(old.wire.clone()))),
        (Some(_), None) => Some(Edit::Delete(key.clone())),
        (None, None) => None,
    };
    all.into_iter().filter(wanted).filter_map(edit).collect()
}

impl Handle<v1::VerifyAuditRequest> for Admin {
    type Answer = v1::VerifyAuditResponse;

    async fn do_call(&self, request: v1::VerifyAuditRequest) -> Result<Self::Answer, Status> {
        let found = self.0.catalog.verify().await?;
        let mut problem = found.problem.unwrap_or_default();
        if problem.is_empty() && request.known_sequence > 0 {
            let known = self.0.catalog.record(request.known_sequence).await?;
            problem = match known {
                Some(logged) if *logged.hash == *request.known_hash => String::new(),
                Some(_) => format!("entry {} does not have the hash that is known", request.known_sequence),
                None => format!("entry {} is not kept", request.known_sequence),
            };
        }
        if !problem.is_empty() {
            tracing::error!(problem, "audit log verification failed");
        }
        Ok(v1::VerifyAuditResponse {
            verified: found.count,
            first_sequence: found.first,
            last_sequence: found.last,
            last_hash: found.last_hash.to_vec(),
            problem,
        })
    }
}
