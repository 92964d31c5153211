//! The faults that can be switched on, and the decision which of them a request gets.

use serde::{Deserialize, Serialize};

use crate::oddities::{Reply, StreamTail, UsageForm, always};
use crate::rng::Rng;

/// Largest slowdown.
const SLOW_FACTOR_MAX: f64 = 10_000.0;
/// Longest model name to answer with.
const MODEL_NAME_BYTES_MAX: usize = 256;
/// Most comments before a stream.
const COMMENTS_MAX: u32 = 100;
/// Shortest idle time after which connections are closed.
const IDLE_MS_MIN: u32 = 10;

/// All faults. The default is no fault; every field may be left out in JSON.
///
/// Faults act on the four generating endpoints. Only `loading` (also `/health`) and `hang` at `accept` (the whole
/// connection, except one that starts with a request to `/admin/`) reach further, so a server can fail its requests
/// while its health looks good.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Answer with an error status at once.
    pub error_status: Option<ErrorStatus>,
    /// Stop answering until the fault changes or the client leaves.
    pub hang: Option<Hang>,
    /// Reset the TCP connection (on HTTP/2: the stream) after some tokens.
    pub cut_after_tokens: Option<CutAfterTokens>,
    /// Send bytes that mean nothing.
    pub garbage: Option<Garbage>,
    /// Multiplies every delay; above 0, at most 10 000. No effect where the delay is zero.
    pub slow_factor: Option<f64>,
    /// Health and the generating endpoints answer 503, as while weights are loaded.
    pub loading: bool,
    /// Put an error object inside an answer with status 200, then end as after a success.
    pub error_in_stream: Option<ErrorInStream>,
    /// Leave out `usage` although the client asked for it (llama.cpp's server).
    pub no_usage: bool,
    /// End streams without `[DONE]` (`transformers serve`).
    pub no_done: bool,
    /// Put `usage` into the chunk with `finish_reason`, asked for or not, instead of a chunk with empty `choices`.
    pub usage_on_last_choice: bool,
    /// Name another model than the requested one; at most 256 bytes.
    pub wrong_model_name: Option<String>,
    /// Send this reply instead of every answer.
    pub reply: Option<Reply>,
    /// The form of usage.
    pub usage_form: UsageForm,
    /// What streams do after their last event.
    pub stream_tail: Option<StreamTail>,
    /// Comments before the first event of a stream, as relays send them while they wait; at most 100.
    pub comments: u32,
    /// `finish_reason` is "" where it is null elsewhere (older Ollama and SGLang).
    pub empty_finish_reason: bool,
    /// Answer 422 to a request with `stream_options` (Mistral).
    pub refuse_stream_options: bool,
    /// Answer a request for a stream with one JSON object.
    pub never_stream: bool,
    /// Close a connection after this idle time, at least 10 ms, as servers do after seconds.
    pub close_idle_after_ms: Option<u32>,
}

/// See [`Faults::error_status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorStatus {
    /// HTTP status, 400 to 599.
    pub status: u16,
    /// Share of requests, 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
    /// Value of `Retry-After` in seconds; no header if left out.
    #[serde(default)]
    pub retry_after_s: Option<u32>,
}

/// See [`Faults::hang`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hang {
    /// The place where it stops.
    pub at: HangAt,
    /// Share of requests (of connections, for `accept`), 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
}

/// Where a hang happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HangAt {
    /// The connection is accepted and never read.
    Accept,
    /// The request is read and holds its slot, the response head never comes.
    Headers,
    /// The response head comes, the first byte of the body never does.
    FirstByte,
    /// Half of the tokens come.
    MidStream,
}

/// See [`Faults::cut_after_tokens`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CutAfterTokens {
    /// Tokens sent before the cut; 0 cuts right after the response head. An answer with fewer tokens is not cut.
    pub tokens: u64,
    /// Share of requests, 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
}

/// See [`Faults::garbage`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Garbage {
    /// What is replaced.
    pub at: GarbageAt,
    /// Share of requests, 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
}

/// What garbage replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GarbageAt {
    /// The HTTP response itself, status line included; the connection is closed after it.
    Wire,
    /// The body of a 200.
    Response,
    /// One event in the middle of a stream; the rest follows. Without streaming, the same as `response`.
    Event,
}

/// See [`Faults::error_in_stream`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorInStream {
    /// Tokens sent before the error; 0 if left out, the error is then the first event.
    #[serde(default)]
    pub after_tokens: u64,
    /// Share of requests, 0.0 to 1.0; 1.0 if left out.
    #[serde(default = "always")]
    pub probability: f64,
}

/// A fault has a value outside its bound.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} must be {expected}")]
pub struct InvalidFaults {
    /// Path of the field.
    pub field: &'static str,
    /// The allowed range.
    pub expected: &'static str,
}

impl Faults {
    /// Checks every bound stated at the fields.
    ///
    /// # Errors
    /// The first field outside its bound.
    pub fn validate(&self) -> Result<(), InvalidFaults> {
        let share = |probability: Option<f64>| probability.is_none_or(|p| (0.0..=1.0).contains(&p));
        let range = "0.0 to 1.0";
        let checks = [
            (
                self.error_status.as_ref().is_none_or(|e| (400..=599).contains(&e.status)),
                "error_status.status",
                "400 to 599",
            ),
            (share(self.error_status.as_ref().map(|f| f.probability)), "error_status.probability", range),
            (share(self.hang.as_ref().map(|f| f.probability)), "hang.probability", range),
            (
                share(self.cut_after_tokens.as_ref().map(|f| f.probability)),
                "cut_after_tokens.probability",
                range,
            ),
            (share(self.garbage.as_ref().map(|f| f.probability)), "garbage.probability", range),
            (
                share(self.error_in_stream.as_ref().map(|f| f.probability)),
                "error_in_stream.probability",
                range,
            ),
            (
                self.slow_factor.is_none_or(|factor| factor > 0.0 && factor <= SLOW_FACTOR_MAX),
                "slow_factor",
                "above 0 and at most 10000",
            ),
            (
                self.wrong_model_name.as_ref().is_none_or(|name| name.len() <= MODEL_NAME_BYTES_MAX),
                "wrong_model_name",
                "at most 256 bytes",
            ),
        ];
        let odd = [
            (
                self.reply.as_ref().is_none_or(|reply| (200..=599).contains(&reply.status)),
                "reply.status",
                "200 to 599",
            ),
            (share(self.reply.as_ref().map(|f| f.probability)), "reply.probability", range),
            (
                self.reply.as_ref().is_none_or(Reply::is_sendable),
                "reply",
                "a body and headers of at most 32 KiB, headers in plain ASCII",
            ),
            (self.comments <= COMMENTS_MAX, "comments", "at most 100"),
            (
                self.close_idle_after_ms.is_none_or(|ms| ms >= IDLE_MS_MIN),
                "close_idle_after_ms",
                "at least 10",
            ),
        ];
        match checks.into_iter().chain(odd).find(|(holds, ..)| !holds) {
            Some((_, field, expected)) => Err(InvalidFaults { field, expected }),
            None => Ok(()),
        }
    }

    /// Whether a new connection must be accepted and never read.
    pub(crate) fn hangs_on_accept(&self, rng: &mut Rng) -> bool {
        self.hang.as_ref().is_some_and(|hang| hang.at == HangAt::Accept && rng.chance(hang.probability))
    }

    /// Draws the faults of one request. Every fault draws exactly once, so switching one on or off does not change
    /// the draws of the others under the same seed.
    pub(crate) fn draw(&self, rng: &mut Rng) -> Drawn {
        let mut hit = |probability: Option<f64>| rng.chance(probability.unwrap_or(0.0));
        let error = hit(self.error_status.as_ref().map(|f| f.probability));
        let hang = hit(self.hang.as_ref().map(|f| f.probability));
        let cut = hit(self.cut_after_tokens.as_ref().map(|f| f.probability));
        let garbage = hit(self.garbage.as_ref().map(|f| f.probability));
        let error_in_stream = hit(self.error_in_stream.as_ref().map(|f| f.probability));
        let reply = hit(self.reply.as_ref().map(|f| f.probability));
        Drawn {
            error_status: self.error_status.clone().filter(|_| error),
            hang: self.hang.as_ref().filter(|_| hang).map(|f| f.at),
            cut_after_tokens: self.cut_after_tokens.as_ref().filter(|_| cut).map(|f| f.tokens),
            garbage: self.garbage.as_ref().filter(|_| garbage).map(|f| f.at),
            error_after_tokens: self
                .error_in_stream
                .as_ref()
                .filter(|_| error_in_stream)
                .map(|f| f.after_tokens),
            slow_factor: self.slow_factor.unwrap_or(1.0),
            no_usage: self.no_usage,
            no_done: self.no_done,
            usage_on_last_choice: self.usage_on_last_choice,
            wrong_model_name: self.wrong_model_name.clone(),
            reply: self.reply.clone().filter(|_| reply),
            usage_form: self.usage_form,
            stream_tail: self.stream_tail,
            comments: self.comments,
            empty_finish_reason: self.empty_finish_reason,
            refuse_stream_options: self.refuse_stream_options,
            never_stream: self.never_stream,
        }
    }
}

/// The faults of one request, after the draw.
#[derive(Clone, Debug)]
pub(crate) struct Drawn {
    pub(crate) error_status: Option<ErrorStatus>,
    pub(crate) hang: Option<HangAt>,
    pub(crate) cut_after_tokens: Option<u64>,
    pub(crate) garbage: Option<GarbageAt>,
    pub(crate) error_after_tokens: Option<u64>,
    pub(crate) slow_factor: f64,
    pub(crate) no_usage: bool,
    pub(crate) no_done: bool,
    pub(crate) usage_on_last_choice: bool,
    pub(crate) wrong_model_name: Option<String>,
    pub(crate) reply: Option<Reply>,
    pub(crate) usage_form: UsageForm,
    pub(crate) stream_tail: Option<StreamTail>,
    pub(crate) comments: u32,
    pub(crate) empty_finish_reason: bool,
    pub(crate) refuse_stream_options: bool,
    pub(crate) never_stream: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_refused() {
        assert!(serde_json::from_str::<Faults>(r#"{"hangs":{"at":"headers"}}"#).is_err());
        assert!(serde_json::from_str::<Faults>(r#"{"hang":{"at":"headers","p":1}}"#).is_err());
        assert!(serde_json::from_str::<Faults>(r#"{"hang":{"at":"somewhere"}}"#).is_err());
    }

    #[test]
    fn probability_is_one_when_left_out_and_survives_a_round_trip() {
        let text = r#"{"hang":{"at":"mid_stream"},"error_status":{"status":500,"probability":0.5}}"#;
        let faults: Faults = serde_json::from_str(text).unwrap();
        assert_eq!(faults.hang, Some(Hang { at: HangAt::MidStream, probability: 1.0 }));
        let again: Faults = serde_json::from_str(&serde_json::to_string(&faults).unwrap()).unwrap();
        assert_eq!(faults, again);
    }

    #[test]
    fn bounds_are_checked() {
        for text in [
            r#"{"error_status":{"status":200}}"#,
            r#"{"hang":{"at":"accept","probability":1.1}}"#,
            r#"{"garbage":{"at":"wire","probability":-0.1}}"#,
            r#"{"slow_factor":0}"#,
            r#"{"reply":{"status":100}}"#,
            r#"{"reply":{"status":200,"content_type":"a\nb"}}"#,
            r#"{"comments":101}"#,
            r#"{"close_idle_after_ms":1}"#,
        ] {
            let faults: Faults = serde_json::from_str(text).unwrap();
            assert!(faults.validate().is_err(), "{text}");
        }
    }

    #[test]
    fn one_fault_does_not_shift_the_draws_of_another() {
        let cut = Some(CutAfterTokens { tokens: 1, probability: 0.5 });
        let alone = Faults { cut_after_tokens: cut.clone(), ..Faults::default() };
        let hang = Some(Hang { at: HangAt::Headers, probability: 0.5 });
        let both = Faults { cut_after_tokens: cut, hang, ..Faults::default() };
        for request in 0..200 {
            let a = alone.draw(&mut Rng::new(3, request)).cut_after_tokens;
            let b = both.draw(&mut Rng::new(3, request)).cut_after_tokens;
            assert_eq!(a, b);
        }
    }
}
