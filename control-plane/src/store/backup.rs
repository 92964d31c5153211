//! A backup of the store as one file. It is checked completely, and restored into an empty store under a new epoch.
//!
//! With a new epoch gateways refuse a mass removal unless the operator allows it, and resources that are not in the backup
//! stay in force until then.

use bytes::Bytes;
use prost::Message as _;

use super::{Entry, Range};
use crate::encoding::sha256;

/// First bytes of the file: what it is and the version of its form.
const MAGIC: &[u8; 8] = b"WEIRBAK1";
const DIGEST_BYTES: usize = 32;

#[derive(Clone, PartialEq, prost::Message)]
struct Copy {
    #[prost(string, tag = "1")]
    epoch: String,
    #[prost(uint64, tag = "2")]
    revision: u64,
    #[prost(message, repeated, tag = "3")]
    rows: Vec<Row>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Row {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
    #[prost(uint64, tag = "3")]
    revision: u64,
}

/// The file of a range.
pub(crate) fn encode(range: &Range) -> Bytes {
    let row =
        |entry: &Entry| Row { key: entry.key.clone(), value: entry.value.clone(), revision: entry.revision };
    let body = Copy {
        epoch: range.epoch.clone(),
        revision: range.revision,
        rows: range.entries.iter().map(row).collect(),
    };
    let body = body.encode_to_vec();
    let mut file = Vec::with_capacity(MAGIC.len() + DIGEST_BYTES + body.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&sha256(&body));
    file.extend_from_slice(&body);
    file.into()
}

/// What is in a file; the reason when it is not whole.
pub(crate) fn decode(file: &[u8]) -> Result<Range, &'static str> {
    let rest = file.strip_prefix(MAGIC).ok_or("it is not a backup of this version")?;
    let (digest, body) = rest.split_at_checked(DIGEST_BYTES).ok_or("it is cut short")?;
    if sha256(body)[..] != *digest {
        return Err("its checksum does not match: it is cut short or damaged");
    }
    let copy = Copy::decode(body).map_err(|_| "it cannot be decoded")?;
    let entry = |row: Row| Entry { key: row.key, value: row.value, revision: row.revision };
    let entries = copy.rows.into_iter().map(entry).collect();
    Ok(Range { entries, revision: copy.revision, epoch: copy.epoch })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_cut_or_flipped_anywhere_is_refused() {
        let entry = Entry { key: "c/x".into(), value: Bytes::from_static(b"value"), revision: 3 };
        let range = Range { entries: vec![entry], revision: 7, epoch: "e".into() };
        let file = encode(&range);
        let read = decode(&file).unwrap();
        assert_eq!((read.entries, read.revision, read.epoch), (range.entries, 7, "e".to_owned()));
        for at in 0..file.len() {
            assert!(decode(&file[..at]).is_err(), "cut at {at}");
            let mut flipped = file.to_vec();
            flipped[at] ^= 1;
            assert!(decode(&flipped).is_err(), "flipped at {at}");
        }
    }
}
