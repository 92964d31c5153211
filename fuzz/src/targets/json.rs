use serde_json::Value;
use weir_gateway::api::json_scanner::{Kind, Scanner};
use weir_gateway::api::json_stream::{Container, Reader, Sink, Text, Word};

/// The scanner, the reader of pieces and serde_json take the same texts for JSON, and a string for the same string.
pub(crate) fn run(data: &[u8]) {
    let ours = scan(data);
    let theirs = serde_json::from_slice::<Value>(data);
    match &theirs {
        // A scanner that reads no value has no reason to refuse a number beyond f64.
        Err(error) if error.to_string().contains("out of range") => {}
        _ => assert_eq!(ours.is_ok(), theirs.is_ok(), "{ours:?} and {theirs:?}"),
    }
    if let (Ok(Some(text)), Ok(Value::String(theirs))) = (&ours, &theirs) {
        assert_eq!(text, theirs);
    }
    let whole = read([data].into_iter());
    assert_eq!(whole.is_some(), ours.is_ok(), "{ours:?}");
    let size = usize::from(data.first().copied().unwrap_or(0) % 7) + 1;
    assert_eq!(read(data.chunks(size)), whole, "pieces of {size} bytes");
    if let (Some(told), Ok(Some(text))) = (whole, &ours) {
        assert_eq!(told.bytes, text.len() as u64);
    }
}

/// What a text was told to hold.
#[derive(Debug, Default, PartialEq)]
struct Told {
    values: u64,
    depth: u64,
    bytes: u64,
}

impl Sink for Told {
    fn open(&mut self, _: Container) {
        self.depth += 1;
    }
    fn close(&mut self) {
        self.depth -= 1;
    }
    fn name(&mut self, name: Text<'_>) {
        self.bytes += name.len;
    }
    fn string(&mut self, text: Text<'_>) {
        (self.values, self.bytes) = (self.values + 1, self.bytes + text.len);
        assert!(text.len <= text.range().len() as u64);
    }
    fn number(&mut self, _: Text<'_>) {
        self.values += 1;
    }
    fn word(&mut self, _: Word, _: usize) {
        self.values += 1;
    }
}

/// `None` when it is no JSON.
fn read<'a>(mut pieces: impl Iterator<Item = &'a [u8]>) -> Option<Told> {
    let (mut reader, mut told) = (Reader::default(), Told::default());
    pieces.try_for_each(|piece| reader.feed(piece, &mut told)).ok()?;
    reader.finish(&mut told).ok()?;
    assert_eq!(told.depth, 0);
    Some(told)
}

/// The text, if it is one string.
fn scan(data: &[u8]) -> Result<Option<String>, weir_gateway::api::json_scanner::Fault> {
    let mut scanner = Scanner::new(data)?;
    let text = match scanner.kind()? {
        Kind::String => {
            let text = scanner.string()?;
            let decoded = text.decode().into_owned();
            assert_eq!(decoded.len(), text.len(), "a string of another length than it says");
            Some(decoded)
        }
        _ => {
            scanner.skip()?;
            None
        }
    };
    scanner.end()?;
    assert!(scanner.shrink() <= data.len() && scanner.numbers() <= data.len());
    Ok(text)
}
