//! API keys: made here, shown once, kept as digests.

use std::time::SystemTime;

use prost_types::Timestamp;
use tonic::Status;
use weir_proto::v1::KeyDigest;

use crate::encoding::{base64url, sha256};

/// Characters of a key that are kept for people to recognise it by; the other 38 are not guessed from them.
const PREFIX_CHARS: usize = 10;

/// A new key and its digest. 256 random bits, so a plain digest cannot be searched.
pub(super) fn new_key(expire_time: Option<Timestamp>) -> Result<(String, KeyDigest), Status> {
    let mut random = [0_u8; 32];
    getrandom::fill(&mut random).map_err(|_| Status::unavailable("the system has no randomness"))?;
    let key = format!("weir_{}", base64url(&random));
    let prefix = key.chars().take(PREFIX_CHARS).collect();
    let digest = KeyDigest { sha256: sha256(key.as_bytes()).to_vec(), prefix, expire_time };
    Ok((key, digest))
}

/// The digests after a rotation: the new one, and the newest of those before until the grace is over. One that was
/// already being replaced goes at once, since two are all a key may have.
pub(super) fn rotated(
    new: KeyDigest,
    before: &[KeyDigest],
    now: SystemTime,
    grace_end: SystemTime,
) -> Vec<KeyDigest> {
    let expires = |digest: &KeyDigest| digest.expire_time.and_then(|t| SystemTime::try_from(t).ok());
    let live = before.iter().find(|digest| expires(digest).is_none_or(|end| end > now));
    let mut out = vec![KeyDigest { expire_time: live.and_then(|d| d.expire_time), ..new }];
    if let Some(old) = live.filter(|_| grace_end > now) {
        let end = expires(old).map_or(grace_end, |end| end.min(grace_end));
        out.push(KeyDigest { expire_time: Some(end.into()), ..old.clone() });
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_key_is_long_random_and_known_by_its_prefix() {
        let (key, digest) = new_key(None).unwrap();
        assert_eq!((key.len(), digest.prefix.len(), digest.sha256.len()), (48, 10, 32));
        assert!(key.starts_with(&digest.prefix) && key.starts_with("weir_"));
        assert_ne!(new_key(None).unwrap().0, key);
    }

    #[test]
    fn a_rotation_keeps_at_most_the_key_it_replaces() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let at = |s: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        let digest = |prefix: &str, end: Option<u64>| KeyDigest {
            sha256: vec![],
            prefix: prefix.into(),
            expire_time: end.map(|s| at(s).into()),
        };
        let before = [digest("b", None), digest("a", Some(2000))];
        let after = rotated(digest("c", None), &before, now, at(1500));
        assert_eq!(after, [digest("c", None), digest("b", Some(1500))]);
        assert_eq!(
            rotated(digest("c", None), &before, now, now),
            [digest("c", None)],
            "no grace, no old key"
        );
        let ending = [digest("b", Some(1200))];
        assert_eq!(
            rotated(digest("c", None), &ending, now, at(1500)),
            [digest("c", Some(1200)), digest("b", Some(1200))],
            "a rotation does not lengthen a key's life"
        );
    }
}
