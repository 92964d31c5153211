//! Keys and values in etcd, which others may write, for the fuzz targets alone.

use bytes::Bytes;
use weir_proto::etcd::KeyValue;

use super::layout::{self, Layout, Tip};

/// The revision and the value that a kept value holds.
pub fn unkept(value: &[u8]) -> Option<(u64, Bytes)> {
    layout::unkept(&KeyValue { value: Bytes::copy_from_slice(value), ..KeyValue::default() })
}

/// A value as it is kept.
pub fn kept(revision: u64, value: &[u8]) -> Bytes {
    layout::kept(revision, value)
}

/// The tip that a value holds, written again.
pub fn tip(value: &[u8]) -> Option<Bytes> {
    Tip::read(value).map(|tip| tip.value())
}

/// The epoch that a value holds, written again.
pub fn epoch(value: &[u8]) -> Option<Bytes> {
    layout::epoch(value).map(|epoch| layout::meta_value(&epoch))
}

/// The store's key of an etcd key, and the etcd key of that.
pub fn key(prefix: &str, key: &[u8]) -> Option<(String, Bytes)> {
    let layout = Layout::new(prefix);
    let key = layout.store_key(key)?;
    let back = layout.key(&key);
    Some((key, back))
}
