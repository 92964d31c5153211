use http::StatusCode;
use weir_gateway::probe::fuzzing::{judge, missing, tokens_written};

use crate::input::Input;

const DETAIL_MAX_BYTES: usize = 128;
const NAME_MAX_BYTES: usize = 256;

/// What is kept of an answer is short, whatever the backend sent, and no more is missing than was wanted.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let flags = input.byte();
    let status = match flags & 7 {
        0..=2 => 200,
        3 => 400,
        4 => 404,
        5 => 429,
        _ => 503,
    };
    let status = StatusCode::from_u16(status).expect("a status");
    let asked = input.text();
    let body = input.rest();
    for (_, detail, name) in judge(status, flags & 8 != 0, body, asked) {
        assert!(detail.len() <= DETAIL_MAX_BYTES, "{detail}");
        assert!(name.is_none_or(|name| name == asked || name.len() <= NAME_MAX_BYTES));
    }
    let wanted = [asked, "another"];
    assert!(missing(body, &wanted).iter().all(|name| wanted.contains(name)));
    if let Some(tokens) = tokens_written(body, 32) {
        assert!(tokens > 0 && tokens <= (body.len() as u64).max(1 << 20));
    }
}
