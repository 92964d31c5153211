use serde_json::Value;
use weir_gateway::api::json_scanner::{Kind, Scanner};

/// The scanner and serde_json take the same texts for JSON, and a string for the same string.
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
