use weir_control_plane::fuzzing::etcd;

use crate::input::Input;

/// What is read of a key or a value in etcd is what writes that very key or value.
pub(crate) fn run(data: &[u8]) {
    if let Some((revision, value)) = etcd::unkept(data) {
        assert_eq!(etcd::kept(revision, &value), data);
    }
    if let Some(epoch) = etcd::epoch(data) {
        assert_eq!(epoch, data);
    }
    if let Some(tip) = etcd::tip(data) {
        assert_eq!(etcd::tip(&tip), Some(tip));
    }
    let mut input = Input::new(data);
    let (prefix, key) = (input.text(), input.field());
    if let Some((store, back)) = etcd::key(prefix, key) {
        assert_eq!(back, key);
        assert!(store.len() <= key.len());
    }
}
