//! What a backend means when it refuses: read from the status and from the API's error body, for all providers.
//!
//! Invariants:
//! - A 4xx is the API's word only with the API's error body. A page of a proxy in between is not, whatever its status.
//! - The text of a provider is repeated only after [`redact`]: cut, on one line, without credentials.
//! - Reading is bounded by [`ERROR_BODY_MAX`]; a longer body is taken for the API's word when it begins as JSON.

use std::time::Duration;

use serde_json::{Map, Value};

use super::json_scanner::{Fault, Kind, Scanner};

/// The most of a refusal's body that is looked into, bytes.
pub const ERROR_BODY_MAX: usize = 256 << 10;
/// The most of a provider's message that is repeated, characters.
pub const MESSAGE_CHARS_MAX: usize = 500;
/// The most of a provider's `type`, `code` or `param` that is repeated, characters.
const WORD_CHARS_MAX: usize = 64;

/// What a refusal means, and so whose it is to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Meaning {
    /// The request's own mistake. The client gets the provider's own words; nobody is blamed.
    Request,
    /// The backend refuses the gateway's credential. The operator mends it.
    Credential,
    /// The provider's account has no money or quota left. The operator mends it.
    Quota,
    /// Busy or over a rate limit of the provider: a matter of time.
    Busy,
    /// The backend does not have the model that the configuration says it has.
    NoModel,
    /// The backend failed at this request. Whether the request or the backend is at fault shows at another backend.
    Failed,
    /// Not the API's word: a page of a proxy in between, a redirect, a wrong path.
    Foreign,
}

impl Meaning {
    /// The word for it in logs, metrics and reports.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Credential => "credential_refused",
            Self::Quota => "quota_used_up",
            Self::Busy => "busy",
            Self::NoModel => "no_model",
            Self::Failed => "server_error",
            Self::Foreign => "not_the_api",
        }
    }
}

/// The error that a body of the API holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApiError {
    /// The provider's text; empty when it gives none.
    pub message: String,
    /// OpenAI's `type`, or what stands in its place; empty without one.
    pub kind: String,
    /// OpenAI's `code`, numbers as text; empty without one.
    pub code: String,
    /// OpenAI's `param`; empty without one.
    pub param: String,
    /// Whether the body has OpenAI's shape already: an object `error` with a text `message`.
    pub is_openai: bool,
    /// How long to wait, where the body says so (Google's `RetryInfo`, "try again in 1.2s").
    pub retry_after: Option<Duration>,
    /// It is told as the APIs of models tell one: in an `error`, or as an object that says that it is one.
    is_told_as_error: bool,
    /// All of it in lower case, to look words up in; bounded.
    words: String,
}

/// Reads the error body of any provider; `None` when it is none: not JSON, or JSON without an error in it.
///
/// Known forms: OpenAI's and its followers' `{"error":{..}}`; `{"error":"text"}` (Ollama, llamafile); Anthropic's
/// `{"type":"error","error":{..}}`; Google's, also as an array of one; `{"object":"error","message":..}` (older vLLM,
/// Mistral); `{"detail":..}` (FastAPI); `{"message":..}` and `{"Message":..}` (AWS).
pub fn read(body: &[u8]) -> Option<ApiError> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body).trim_ascii();
    if !matches!(body.first(), Some(b'{' | b'[')) {
        return None;
    }
    if body.len() > ERROR_BODY_MAX {
        // Validation errors may repeat the whole request. What they say at the beginning is enough.
        let text = String::from_utf8_lossy(&body[..MESSAGE_CHARS_MAX]);
        let words = text.to_lowercase();
        return Some(ApiError { message: text.into_owned(), words, ..ApiError::default() });
    }
    let value: Value = serde_json::from_slice(body).ok()?;
    let value = match &value {
        Value::Array(items) => items.first()?,
        other => other,
    };
    let top = value.as_object()?;
    let word = |value: Option<&Value>| match value {
        Some(Value::String(text)) => cut(text, WORD_CHARS_MAX),
        Some(Value::Number(number)) => number.to_string(),
        _ => String::new(),
    };
    let mut error = match error_of(top) {
        Some(Value::Object(inner)) => ApiError {
            message: text_of(inner.get("message").or_else(|| inner.get("msg"))),
            kind: first_of([word(inner.get("type")), word(inner.get("status"))]),
            code: word(inner.get("code")),
            param: word(inner.get("param")),
            is_openai: top.get("error").and_then(|error| error.get("message")).is_some_and(Value::is_string),
            ..ApiError::default()
        },
        Some(Value::String(text)) => {
            ApiError { message: text.clone(), kind: word(top.get("error_type")), ..ApiError::default() }
        }
        _ => {
            let said = ["message", "Message", "detail", "errors", "error_message", "msg", "error_msg"];
            let said = said.iter().find_map(|name| top.get(*name).filter(|value| !value.is_null()))?;
            ApiError {
                message: text_of(Some(said)),
                kind: first_of([word(top.get("type")), word(top.get("__type"))]),
                code: word(top.get("code")),
                param: word(top.get("param")),
                ..ApiError::default()
            }
        }
    };
    let says_so = top.get("object").is_some_and(|object| object == "error") || top.contains_key("__type");
    error.is_told_as_error = says_so || error_of(top).is_some();
    error.words = value.to_string().to_lowercase();
    error.retry_after = retry_delay(value).or_else(|| try_again_in(&error.words));
    Some(error)
}

/// Where something is said of an error: at the top, in a choice (OpenRouter), in the part of Groq's own.
fn error_of(top: &Map<String, Value>) -> Option<&Value> {
    let of_choice = || top.get("choices")?.as_array()?.iter().find_map(|choice| filled(choice.get("error")));
    filled(top.get("error")).or_else(of_choice).or_else(|| filled(top.get("x_groq")?.get("error")))
}

fn filled(error: Option<&Value>) -> Option<&Value> {
    error.filter(|error| match error {
        Value::Object(members) => !members.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => false,
    })
}

/// The message as text, whatever it is: FastAPI and Mistral put a list of findings there.
fn text_of(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

fn first_of(words: [String; 2]) -> String {
    words.into_iter().find(|word| !word.is_empty()).unwrap_or_default()
}

/// Google's `error.details[].retryDelay`, such as "37s".
fn retry_delay(value: &Value) -> Option<Duration> {
    let details = value["error"]["details"].as_array()?;
    details.iter().find_map(|detail| seconds(detail["retryDelay"].as_str()?.strip_suffix('s')?))
}

/// "Please try again in 1m2.5s", "retry after 20 seconds".
fn try_again_in(words: &str) -> Option<Duration> {
    let rest = ["try again in ", "retry after ", "retry in ", "please wait "]
        .iter()
        .find_map(|phrase| words.split_once(phrase))?
        .1;
    let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == ' ')).unwrap_or(rest.len());
    go_duration(rest[..end].trim_end_matches('.'))
}

/// A time as Go writes it (`6m0s`, `12ms`, `1.5s`), also with a space before the unit and the unit in full.
pub fn go_duration(text: &str) -> Option<Duration> {
    let mut total = Duration::ZERO;
    let mut rest = text.trim();
    let mut any = false;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
        let (number, after) = rest.split_at(digits);
        let after = after.trim_start();
        let letters = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let scale = match unit {
            "ms" | "millisecond" | "milliseconds" => 0.001,
            "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
            "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
            "h" | "hour" | "hours" => 3600.0,
            "d" | "day" | "days" => 86_400.0,
            _ => return any.then_some(total),
        };
        let Some(part) = number.parse::<f64>().ok().and_then(|n| scaled(n, scale)) else {
            return any.then_some(total);
        };
        (total, any) = (total.saturating_add(part), true);
        rest = next.trim_start();
    }
    any.then_some(total)
}

/// A time in seconds, fractions allowed, such as `29.7`.
pub fn seconds(text: &str) -> Option<Duration> {
    text.trim().parse().ok().and_then(|n| scaled(n, 1.0))
}

fn scaled(number: f64, scale: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number * scale).ok()
}

/// What a status of 300 and above means with the error that its body holds.
pub fn meaning(status: u16, error: Option<&ApiError>) -> Meaning {
    let Some(error) = error else { return without_body(status) };
    if error.is_quota(status) {
        return Meaning::Quota;
    }
    match status {
        401 => Meaning::Credential,
        400 | 403 if error.is_credential() => Meaning::Credential,
        403 if error.is_of_firewall() => Meaning::Foreign,
        404 if error.is_no_route() => Meaning::Foreign,
        400 | 404 if error.is_no_model(status) => Meaning::NoModel,
        429 | 498 | 503 | 529 => Meaning::Busy,
        // A failure of the model at this input (AWS 424, TGI 424), or a time-out of its server.
        408 | 424 => Meaning::Failed,
        405..=407 | 421 | 426 => Meaning::Foreign,
        400..=499 => Meaning::Request,
        500.. if error.is_overloaded() => Meaning::Busy,
        500.. => Meaning::Failed,
        _ => Meaning::Foreign,
    }
}

/// A refusal without the API's error body.
fn without_body(status: u16) -> Meaning {
    match status {
        401 => Meaning::Credential,
        // The length of a request and the law of its country are the request's own, whoever says so.
        413 | 451 => Meaning::Request,
        429 | 498 | 503 | 529 => Meaning::Busy,
        408 | 424 | 500.. => Meaning::Failed,
        _ => Meaning::Foreign,
    }
}

impl ApiError {
    fn says(&self, phrases: &[&str]) -> bool {
        phrases.iter().any(|phrase| self.words.contains(phrase))
    }

    fn is(&self, words: &[&str]) -> bool {
        words.iter().any(|word| self.kind.eq_ignore_ascii_case(word) || self.code.eq_ignore_ascii_case(word))
    }

    /// Out of money or of a quota that time alone does not give back within minutes.
    fn is_quota(&self, status: u16) -> bool {
        let named = self.is(&[
            "insufficient_quota",
            "insufficient_balance",
            "insufficient_credits",
            "billing_error",
            "billing_not_active",
            "billing_hard_limit_reached",
            "quota_exceeded",
            "arrearage",
            "1113",
        ]);
        let told = self.says(&[
            "exceeded your current quota",
            "insufficient balance",
            "insufficient credit",
            "insufficient funds",
            "credit balance is too low",
            "not enough credit",
            "no credits",
            "out of credits",
            "more credits",
            "spend limit",
            "spending limit",
            "check your plan and billing",
            "billing is not active",
        ]);
        match status {
            429 | 402 | 403 | 503 => named || told,
            // A caller's text may stand in a message of 400; only words of the provider's own count there.
            400 => {
                self.is(&["billing_error"])
                    || self.says(&["credit balance is too low", "spend limit reached"])
            }
            _ => false,
        }
    }

    /// Our key is wrong, revoked or not allowed to do this.
    fn is_credential(&self) -> bool {
        let named = self.is(&[
            "authentication_error",
            "invalid_api_key",
            "invalid_authentication",
            "permission_error",
            "permission_denied",
            "accessdeniedexception",
            "unrecognizedclientexception",
            "account_deactivated",
            "unsupported_country_region_territory",
            "forbidden_api_key",
        ]);
        named
            || self.says(&[
                "api_key_invalid",
                "api key not valid",
                "invalid api key",
                "incorrect api key",
                "api key expired",
                "api key is disabled",
                "invalid authentication",
                "not authenticated",
                "invalid_api_key",
                "accessdenied",
                "access token",
                "deactivated",
            ])
    }

    /// The model is not there, in the provider's words.
    fn is_no_model(&self, status: u16) -> bool {
        if self.is(&[
            "model_not_found",
            "model_not_available",
            "deploymentnotfound",
            "resourcenotfoundexception",
        ]) {
            return true;
        }
        let of_model = self.param == "model" || self.says(&["model"]);
        let gone = self.says(&[
            "not found",
            "not_found",
            "does not exist",
            "not exist",
            "unknown model",
            "no such model",
        ]);
        // A 404 about something that the request names is the request's, and so is a 400 without the very word.
        match status {
            404 => {
                let of_request = self.says(&[
                    "previous_response",
                    "response with id",
                    "response id",
                    "conversation",
                    "file with id",
                    "no such file",
                    "vector store",
                    "item with id",
                    "tool",
                    "adapter",
                ]);
                of_model && gone && !of_request
            }
            _ => self.says(&["model does not exist", "unknown model", "no such model"]),
        }
    }

    /// A firewall in front says no without a reason (`{"message":"Forbidden"}`); a model says what is wrong with the request.
    fn is_of_firewall(&self) -> bool {
        let text = self.message.trim().trim_end_matches('.').to_ascii_lowercase();
        let bare = ["", "forbidden", "access denied", "blocked", "request blocked", "access forbidden"];
        !self.is_told_as_error || bare.contains(&text.as_str())
    }

    /// No such path there: the backend's address is set up wrongly.
    fn is_no_route(&self) -> bool {
        let text = self.message.trim().trim_end_matches('.');
        let bare = text.is_empty()
            || text.eq_ignore_ascii_case("not found")
            || text.eq_ignore_ascii_case("404 page not found");
        (bare && self.param.is_empty() && !self.is(&["model_not_found", "not_found_error"]))
            || self.says(&[
                "invalid url",
                "no route",
                "unknown url",
                "unknown_url",
                "route not found",
                "path not found",
                "cannot post",
            ])
    }

    fn is_overloaded(&self) -> bool {
        self.is(&[
            "overloaded_error",
            "overloaded",
            "server_busy",
            "engine_overloaded",
            "modelnotreadyexception",
        ]) || self.says(&[
            "overloaded",
            "model is loading",
            "loading model",
            "server is busy",
            "no available capacity",
        ])
    }

    /// Whether it names a member of the request, such as `stream_options`.
    pub fn mentions(&self, member: &str) -> bool {
        self.words.contains(member)
    }
}

/// A refusal in OpenAI's shape, for a body that has another.
pub fn to_openai(status: u16, error: Option<&ApiError>) -> String {
    let fallback = ApiError::default();
    let error = error.unwrap_or(&fallback);
    let message = match error.message.is_empty() {
        true => format!("The model's server refused the request with status {status}."),
        false => redact(&error.message, MESSAGE_CHARS_MAX),
    };
    let kind = match error.kind.is_empty() {
        true if status >= 500 => "server_error",
        true => "invalid_request_error",
        false => &error.kind,
    };
    let text = |word: &str| if word.is_empty() { Value::Null } else { Value::from(word) };
    let (param, code) = (text(&error.param), text(&error.code));
    serde_json::json!({ "error": { "message": message, "type": kind, "param": param, "code": code } })
        .to_string()
}

/// The error that an event of a stream holds, in OpenAI's shape.
pub fn in_stream(payload: &[u8]) -> String {
    let mut error = read(payload).unwrap_or_default();
    if error.message.is_empty() {
        error.message = "The model's server reported an error in the stream.".into();
    }
    to_openai(500, Some(&error))
}

fn cut(text: &str, max: usize) -> String {
    text.chars().take(max).collect()
}

/// A provider's text, fit to be repeated: on one line, of at most `max` characters, without what looks like a credential.
/// Providers repeat the key that they refuse, in part or whole.
pub fn redact(text: &str, max: usize) -> String {
    let mut out = String::new();
    let mut after_bearer = false;
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !out.is_empty() {
            out.push(' ');
        }
        let hide = after_bearer || is_secret(word);
        after_bearer =
            ["bearer", "basic", "key:", "token:"].iter().any(|name| word.eq_ignore_ascii_case(name));
        out.push_str(if hide { "[redacted]" } else { word });
        if out.chars().nth(max).is_some() {
            return cut(&out, max) + "...";
        }
    }
    out
}

/// Bytes in a row that a text and a value of the request have in common when the text repeats the request.
const ECHO_BYTES: usize = 12;
/// The longest request that a text is compared with, bytes.
const ECHO_REQUEST_MAX: usize = 1 << 20;

/// A provider's text for people other than the client: without what it repeats of the values in the client's request, which
/// are nobody else's to read. The names of members stay, since they say what is wrong. `text` is short; where the request is
/// not JSON, or too long to be compared, nothing of the text is shown.
pub fn without_echo(text: &str, request: &[u8]) -> String {
    let hidden = || "[not shown: it may repeat the request]".to_owned();
    if text.len() < ECHO_BYTES {
        return text.to_owned();
    }
    if request.len() > ECHO_REQUEST_MAX {
        return hidden();
    }
    let mut echo = Echo::of(text);
    match echo.compare(request) {
        Ok(()) => echo.left(text),
        Err(_) => hidden(),
    }
}

/// Which bytes of a text stand in a request too.
struct Echo<'a> {
    text: &'a [u8],
    /// Where each window of the text begins, in the order of the windows.
    windows: Vec<(&'a [u8], usize)>,
    /// A bit for the first two bytes of each window, so that most of the request is passed over quickly.
    begins: Box<[bool; 1 << 16]>,
    repeated: Vec<bool>,
}

impl<'a> Echo<'a> {
    fn of(text: &'a str) -> Self {
        let text = text.as_bytes();
        let mut begins = Box::new([false; 1 << 16]);
        let mut windows: Vec<(&[u8], usize)> =
            text.windows(ECHO_BYTES).enumerate().map(|(at, window)| (window, at)).collect();
        windows.iter().for_each(|(window, _)| begins[begin(window)] = true);
        windows.sort_unstable();
        Self { text, windows, begins, repeated: vec![false; text.len()] }
    }

    fn compare(&mut self, request: &[u8]) -> Result<(), Fault> {
        let mut s = Scanner::new(request)?;
        if s.kind()? != Kind::Object {
            return self.value(&mut s);
        }
        s.object(|s, name| match name.raw {
            // Operators know it from elsewhere, and it is what many refusals are about.
            "model" => s.skip(),
            _ => self.value(s),
        })
    }

    fn value(&mut self, s: &mut Scanner<'_>) -> Result<(), Fault> {
        match s.kind()? {
            Kind::String => {
                self.mark(s.string()?.raw.as_bytes());
                Ok(())
            }
            Kind::Object => s.object(|s, _| self.value(s)),
            Kind::Array => s.array(|s| self.value(s)),
            Kind::Number | Kind::Bool | Kind::Null => s.skip(),
        }
    }

    fn mark(&mut self, value: &[u8]) {
        for window in value.windows(ECHO_BYTES).filter(|window| self.begins[begin(window)]) {
            let first = self.windows.partition_point(|(known, _)| *known < window);
            for (_, at) in self.windows[first..].iter().take_while(|(known, _)| *known == window) {
                self.repeated[*at..*at + ECHO_BYTES].fill(true);
            }
        }
    }

    fn left(&self, text: &str) -> String {
        let mut out = String::new();
        let mut inside = false;
        for (at, c) in text.char_indices() {
            let repeated = self.repeated[at..at + c.len_utf8()].contains(&true);
            match (repeated, inside) {
                (true, false) => out.push_str("[request]"),
                (false, _) => out.push(c),
                (true, true) => {}
            }
            inside = repeated;
        }
        debug_assert!(self.text.len() == text.len(), "another text");
        out
    }
}

fn begin(window: &[u8]) -> usize {
    usize::from(window[0]) << 8 | usize::from(window[1])
}

/// Longest run of letters and digits that is a word. Keys of all providers are longer; UUIDs have dashes in between.
const WORD_RUN_MAX: usize = 24;

fn is_secret(word: &str) -> bool {
    let lower = word.to_ascii_lowercase();
    let prefixed = [
        "sk-", "sk_", "pk-", "rk-", "gsk_", "xai-", "hf_", "nvapi-", "aiza", "akia", "eyj", "ghp_", "key-",
        "weir_",
    ]
    .iter()
    .any(|prefix| {
        lower
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'))
            .any(|part| part.starts_with(prefix) && part.len() > prefix.len() + 3)
    });
    let named = ["api_key=", "apikey=", "key=", "token=", "password=", "secret="]
        .iter()
        .any(|name| lower.contains(name));
    let mixed = |run: &str| {
        let (digits, letters) =
            (run.bytes().any(|b| b.is_ascii_digit()), run.bytes().any(|b| b.is_ascii_alphabetic()));
        run.len() > WORD_RUN_MAX && digits && letters
    };
    let random = word.split(|c: char| !c.is_ascii_alphanumeric()).any(mixed);
    // "sk-xx***yy", as providers shorten the key they were given.
    let starred = word.contains("***") && word.bytes().any(|b| b.is_ascii_alphanumeric());
    prefixed || named || random || starred
}

#[cfg(test)]
#[path = "upstream_error/tests.rs"]
mod tests;
