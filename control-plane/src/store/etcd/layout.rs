//! What is where in etcd.
//!
//! | key | value |
//! |---|---|
//! | `PREFIX/meta` | the form of the rest, and the epoch |
//! | `PREFIX/s/k/KEY` | the store revision of the key's last change, 8 bytes, big endian; then the value |
//! | `PREFIX/s/tip` | the store's revision, and an id of the transaction that made it |
//! | `PREFIX/lease/NAME` | its holder; there as long as the lease |
//!
//! Every transaction rewrites the tip, so whoever compares the tip compares everything, and revisions are the store's
//! own: they rise by one, and a copy can be restored into another etcd without losing its history.

use bytes::{BufMut as _, Bytes, BytesMut};
use weir_proto::etcd::{
    Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RequestOp, compare, request_op,
};

/// The form of what is kept; of another one it is not touched.
const FORM: &str = "weir-store-1";

/// The names of keys under a prefix.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    prefix: String,
}

/// The newest revision, as the tip says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tip {
    pub(super) revision: u64,
    /// Of the transaction that made it.
    pub(super) transaction: String,
}

impl Tip {
    pub(super) fn value(&self) -> Bytes {
        format!("{} {}", self.revision, self.transaction).into()
    }

    pub(super) fn read(value: &[u8]) -> Option<Self> {
        let (revision, transaction) = std::str::from_utf8(value).ok()?.split_once(' ')?;
        Some(Self { revision: revision.parse().ok()?, transaction: transaction.to_owned() })
    }
}

impl Layout {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(super) fn meta(&self) -> Bytes {
        format!("{}/meta", self.prefix).into()
    }

    pub(super) fn tip(&self) -> Bytes {
        format!("{}/s/tip", self.prefix).into()
    }

    pub(super) fn lease(&self, name: &str) -> Bytes {
        format!("{}/lease/{name}", self.prefix).into()
    }

    pub(super) fn key(&self, key: &str) -> Bytes {
        format!("{}/s/k/{key}", self.prefix).into()
    }

    /// Everything that transactions write: the beginning and the end of it.
    pub(super) fn written(&self) -> (Bytes, Bytes) {
        let begin: Bytes = format!("{}/s/", self.prefix).into();
        let end = after(&begin);
        (begin, end)
    }

    /// The store's key of an etcd key.
    pub(super) fn store_key(&self, key: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.strip_prefix("/s/k/")?;
        Some(key.to_owned())
    }
}

/// The first key after all that begin with this.
pub(super) fn after(begin: &[u8]) -> Bytes {
    let mut end = begin.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end.into()
}

pub(super) fn meta_value(epoch: &str) -> Bytes {
    format!("{FORM} {epoch}").into()
}

/// The epoch; `None` when it is of another form.
pub(super) fn epoch(meta: &[u8]) -> Option<String> {
    let (form, epoch) = std::str::from_utf8(meta).ok()?.split_once(' ')?;
    (form == FORM && !epoch.is_empty()).then(|| epoch.to_owned())
}

/// A value as it is kept.
pub(super) fn kept(revision: u64, value: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(8 + value.len());
    out.put_u64(revision);
    out.extend_from_slice(value);
    out.freeze()
}

/// A kept value's revision and the value; `None` when it is none of ours.
pub(super) fn unkept(entry: &KeyValue) -> Option<(u64, Bytes)> {
    let revision = entry.value.first_chunk::<8>()?;
    Some((u64::from_be_bytes(*revision), entry.value.slice(8..)))
}

pub(super) const fn range(key: Bytes) -> RangeRequest {
    RangeRequest { key, range_end: Bytes::new(), limit: 0, revision: 0 }
}

pub(super) const fn op(request: request_op::Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

pub(super) const fn get(key: Bytes) -> RequestOp {
    op(request_op::Request::RequestRange(range(key)))
}

pub(super) const fn put(key: Bytes, value: Bytes, lease: i64) -> RequestOp {
    op(request_op::Request::RequestPut(PutRequest { key, value, lease }))
}

pub(super) const fn delete(key: Bytes, range_end: Bytes) -> RequestOp {
    op(request_op::Request::RequestDeleteRange(DeleteRangeRequest { key, range_end }))
}

/// The key was last changed at this revision of etcd's.
pub(super) fn modified_at(key: Bytes, revision: i64) -> Compare {
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Mod.into(),
        key,
        target_union: Some(compare::TargetUnion::ModRevision(revision)),
    }
}

/// The key was made at this revision of etcd's; zero: it does not exist.
pub(super) fn created_at(key: Bytes, revision: i64) -> Compare {
    Compare {
        result: compare::CompareResult::Equal.into(),
        target: compare::CompareTarget::Create.into(),
        key,
        target_union: Some(compare::TargetUnion::CreateRevision(revision)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_range_is_behind_all_that_begin_like_it() {
        assert_eq!(after(b"/weir/s/"), Bytes::from_static(b"/weir/s0"));
        assert_eq!(after(b"a\xff\xff"), Bytes::from_static(b"b"));
        assert_eq!(after(b"\xff"), Bytes::new());
    }

    #[test]
    fn what_is_kept_is_read_again_and_nothing_else() {
        let entry = |value: Bytes| KeyValue { value, ..KeyValue::default() };
        assert_eq!(unkept(&entry(kept(7, b"x"))), Some((7, Bytes::from_static(b"x"))));
        assert_eq!(unkept(&entry(Bytes::from_static(b"short"))), None);
        let tip = Tip { revision: 12, transaction: "t".into() };
        assert_eq!(Tip::read(&tip.value()), Some(tip));
        assert_eq!(Tip::read(b"12"), None);
        assert_eq!(epoch(&meta_value("e")).as_deref(), Some("e"));
        assert_eq!(epoch(b"weir-store-2 e"), None);
        let layout = Layout::new("/weir");
        assert_eq!(layout.store_key(&layout.key("c/x")).as_deref(), Some("c/x"));
        assert_eq!(layout.store_key(&layout.tip()), None);
    }
}
