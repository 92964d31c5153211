use weir_gateway::api::upstream_error::{MESSAGE_CHARS_MAX, Meaning, meaning, read, redact, to_openai};

/// A refusal of any bytes has one meaning; what is repeated of it is OpenAI's shape, one bounded line, and without the key
/// that the provider repeats.
pub(crate) fn run(data: &[u8]) {
    let error = read(data);
    for status in [300, 400, 401, 402, 403, 404, 413, 422, 429, 451, 500, 503, 529, 599] {
        let meaning = meaning(status, error.as_ref());
        assert!(meaning != Meaning::Request || (400..500).contains(&status), "{status} is no client's mistake");
        let shaped: serde_json::Value = serde_json::from_str(&to_openai(status, error.as_ref())).expect("JSON");
        let message = shaped["error"]["message"].as_str().expect("a message");
        assert!(message.chars().count() <= MESSAGE_CHARS_MAX + 3 && !message.chars().any(char::is_control));
    }
    let text = format!("{} sk-abcdefghijkl", String::from_utf8_lossy(data));
    let shown = redact(&text, usize::MAX - 1);
    // A key begins where a word does: "task-abcdefghijkl" is none.
    let mut words = shown.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'));
    assert!(!words.any(|word| word.starts_with("sk-abcdefghijkl")), "{shown}");
}
