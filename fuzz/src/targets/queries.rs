use weir_gateway::{explain, usage};

use crate::input::Input;

/// Any query is a question or has a reason that does not repeat it.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let today = 20_000 + u64::from(input.byte());
    let Ok(query) = std::str::from_utf8(input.rest()) else { return };
    if let Err(error) = explain::Question::parse(query) {
        assert!(error.to_string().len() <= 128);
    }
    match usage::Question::parse(query, today) {
        Ok(question) => assert_eq!(Some(question), usage::Question::parse(query, today).ok()),
        Err(error) => assert!(error.to_string().len() <= 128),
    }
}
