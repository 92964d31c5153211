use weir_runtime::edge::framing::{Framing, HeadBounds};

use crate::input::{Input, chunks};

const BOUNDS: HeadBounds = HeadBounds { bytes: 4096, fields: 16, target_bytes: 1024 };

/// However a connection's bytes are cut, the verdict is the same and comes behind the same line; and where httparse
/// accepts a head that is accepted here, both find the same end of the message.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let seed = input.byte();
    let bytes = input.rest();
    let whole = follow([bytes].into_iter());
    assert_eq!(whole, follow(chunks(bytes, seed).into_iter()), "another verdict for other cuts");
    assert_eq!(whole, follow(bytes.chunks(1)), "another verdict byte by byte");
    agree(bytes);
}

/// Whether all is well and in what part of a message it ends, or that it is refused; and up to where the bytes may be
/// passed on. Of several faults in one line the one named may depend on the cuts.
fn follow<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> (Option<(bool, bool)>, usize) {
    let mut framing = Framing::new(BOUNDS);
    let (mut at, mut checked) = (0, 0);
    for chunk in chunks {
        let verdict = framing.follow(chunk);
        assert!(framing.checked() <= chunk.len(), "more is checked than came");
        if framing.checked() > 0 {
            checked = at + framing.checked();
        }
        at += chunk.len();
        if let Err(violation) = verdict {
            assert!(violation.status.is_client_error() || violation.status.is_server_error());
            return (None, checked);
        }
    }
    (Some((framing.in_head(), framing.in_body())), checked)
}

/// The first message of the bytes, by both readers.
fn agree(bytes: &[u8]) {
    let mut framing = Framing::new(BOUNDS);
    let mut begun = false;
    let mut head = None;
    for (at, byte) in bytes.iter().enumerate() {
        if framing.follow(std::slice::from_ref(byte)).is_err() {
            return;
        }
        begun |= framing.in_head();
        if begun && !framing.in_head() {
            head = Some(at + 1);
            break;
        }
    }
    let Some(end) = head else { return };
    let mut fields = [httparse::EMPTY_HEADER; BOUNDS.fields];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(&bytes[..end]) {
        Ok(httparse::Status::Complete(theirs)) => assert_eq!(theirs, end, "heads of different lengths"),
        Ok(httparse::Status::Partial) => panic!("a head that httparse does not think complete"),
        // It has rules of its own for the target, and refuses what it does not like: no second meaning.
        Err(_) => return,
    }
    let field = |name: &str| {
        let mut all = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
        let first = all.next().map(|field| field.value.trim_ascii());
        assert!(all.next().is_none() || name != "transfer-encoding", "two transfer codings are accepted");
        first
    };
    let expected = match (field("transfer-encoding"), field("content-length")) {
        (Some(coding), length) => {
            assert!(coding.eq_ignore_ascii_case(b"chunked") && length.is_none(), "a body with two lengths");
            chunked(&bytes[end..])
        }
        (None, Some(length)) => {
            let length = std::str::from_utf8(length).expect("digits").parse::<u64>().expect("one length");
            Some(usize::try_from(length).unwrap_or(usize::MAX))
        }
        (None, None) => Some(0),
    };
    let Some(expected) = expected else { return };
    assert_eq!(framing.in_body(), expected > 0, "a body for one and none for the other");
    for (at, byte) in bytes[end..].iter().enumerate().take(expected) {
        assert!(framing.in_body(), "the body ends early, at {at} of {expected}");
        if framing.follow(std::slice::from_ref(byte)).is_err() {
            return;
        }
    }
    if bytes.len() - end >= expected {
        assert!(!framing.in_body(), "the body of {expected} bytes does not end");
    }
}

/// The bytes of a chunked body without trailers, as httparse reads sizes; `None` when it is not whole or not so simple.
fn chunked(bytes: &[u8]) -> Option<usize> {
    let mut at = 0_usize;
    loop {
        let httparse::Status::Complete((line, size)) = httparse::parse_chunk_size(bytes.get(at..)?).ok()?
        else {
            return None;
        };
        at += line;
        if size > 0 {
            at = at.checked_add(usize::try_from(size).ok()?)?;
        }
        if bytes.get(at..at.checked_add(2)?)? != b"\r\n" {
            return None;
        }
        at += 2;
        if size == 0 {
            return Some(at);
        }
    }
}
