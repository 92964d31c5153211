use proptest::prelude::*;

use super::*;
use crate::api::json_scanner::Scanner;

/// Writes down what it is told.
#[derive(Debug, Default, PartialEq)]
struct Notes(Vec<String>);

impl Sink for Notes {
    fn open(&mut self, container: Container) {
        self.0.push(format!("{container:?}"));
    }
    fn close(&mut self) {
        self.0.push("close".into());
    }
    fn name(&mut self, name: Text<'_>) {
        self.0.push(format!("name {name:?}"));
    }
    fn string(&mut self, text: Text<'_>) {
        self.0.push(format!("string {text:?}"));
    }
    fn number(&mut self, text: Text<'_>) {
        self.0.push(format!("number {text:?}"));
    }
    fn word(&mut self, word: Word, end: usize) {
        self.0.push(format!("{word:?} to {end}"));
    }
}

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Notes, ()> {
    let (mut reader, mut notes) = (Reader::default(), Notes::default());
    for piece in pieces {
        reader.feed(piece, &mut notes).map_err(drop)?;
    }
    reader.finish(&mut notes).map_err(drop)?;
    Ok(notes)
}

fn scanned(text: &[u8]) -> bool {
    Scanner::new(text).is_ok_and(|mut s| s.skip().and_then(|()| s.end()).is_ok())
}

#[test]
fn a_text_is_told_in_its_order_with_lengths_and_places() {
    let notes = read([br#" {"a\n":[1.5e3,"\ud83d\ude00x",null]} "#.as_slice()]).expect("JSON");
    let text = |short: &str, len, start, end| {
        format!("{:?}", Text { short: Some(short.as_bytes()), len, start, end })
    };
    let expected = [
        "Object".to_owned(),
        format!("name {}", text(r"a\n", 2, 2, 7)),
        "Array".into(),
        format!("number {}", text("1.5e3", 5, 9, 14)),
        format!("string {}", text(r"\ud83d\ude00x", 5, 15, 30)),
        "Null to 35".into(),
        "close".into(),
        "close".into(),
    ];
    assert_eq!(notes.0, expected);
    let long = format!("\"{}\"", "x".repeat(SHORT_BYTES + 1));
    assert!(read([long.as_bytes()]).expect("JSON").0[0].contains("short: None, len: 65"));
}

#[test]
fn depth_is_bounded_and_the_texts_of_json_scanner_are_faults_here_too() {
    let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
    assert!(read([deep(128).as_bytes()]).is_ok());
    assert!(read([deep(129).as_bytes()]).is_err());
    for text in
        ["", "{", "{} x", "NaN", "-", "01", "1.", "1e", "[1,]", "{\"a\":1,}", "{a:1}", "\"\\ud800\"", "tru"]
    {
        assert!(read([text.as_bytes()]).is_err() && !scanned(text.as_bytes()), "{text}");
    }
    assert!(read([b"\"\xFF\"".as_slice()]).is_err());
    assert!(read([b"\"\xC3".as_slice(), b"\""]).is_err());
    assert!(read([b"\"\xC3".as_slice(), b"\xA9\""]).is_ok());
}

proptest! {
    #[test]
    fn cuts_do_not_matter_and_the_scanner_agrees(
        text in r#"[\[\]{}",:\\ue0-9dDcC.\-+ntrfalseu\x00-\x20é]{0,24}"#, cuts in proptest::collection::vec(0usize..30, 0..5),
    ) {
        let bytes = text.as_bytes();
        let whole = read([bytes]);
        prop_assert_eq!(whole.is_ok(), scanned(bytes), "{:?}", text);
        prop_assert_eq!(&read(bytes.chunks(1)), &whole);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        prop_assert_eq!(read(cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]])), whole);
    }

    #[test]
    fn any_json_is_read_in_any_pieces(
        text in r#"\{"a":("(é|\\n|\\ud83d\\ude00|x){0,90}"|-?[1-9][0-9]{0,70}(\.[0-9]+)?|\[(true,|null,|0,){0,3}\{\}\])\}"#, size in 1usize..9,
    ) {
        let whole = read([text.as_bytes()]);
        prop_assert!(whole.is_ok() && scanned(text.as_bytes()), "{}", text);
        prop_assert_eq!(read(text.as_bytes().chunks(size)), whole);
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in 1usize..9) {
        prop_assert_eq!(read(bytes.chunks(size)), read([bytes.as_slice()]));
    }
}
