use weir_proto::manifest::{format_duration, parse_duration};
use weir_proto::resource::Name;

/// A duration reads back from how it is written, and a name is a name of DNS.
pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match parse_duration(text) {
        Ok(duration) => {
            let written = format_duration(duration);
            assert_eq!(parse_duration(&written), Ok(duration), "{text} is written {written}");
        }
        Err(error) => assert!(error.to_string().len() <= 256 + 8 * text.len()),
    }
    if let Ok(name) = Name::parse(text) {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        assert!(name.as_str() == text && (1..=63).contains(&text.len()) && text.bytes().all(fits));
    }
}
