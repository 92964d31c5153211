use std::time::{Duration, SystemTime};

use http::Uri;
use weir_gateway::ops::{explain, usage};

use crate::input::Input;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Any query is a question or has a reason that does not repeat it.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let now = SystemTime::UNIX_EPOCH + DAY * (20_000 + u32::from(input.byte()));
    let Ok(query) = std::str::from_utf8(input.rest()) else { return };
    let Ok(uri) = format!("/?{query}").parse::<Uri>() else { return };
    if let Err(error) = explain::Question::parse(&uri) {
        assert!(error.to_string().len() <= 128);
    }
    match usage::Question::parse(&uri, now) {
        Ok(question) => assert_eq!(Some(question), usage::Question::parse(&uri, now).ok()),
        Err(error) => assert!(error.to_string().len() <= 128),
    }
}
