//! The life of a request that costs tokens: early faults, checks, a slot, then the answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body::Body as _;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Response, Version};
use tokio::time::{Instant, sleep};

use crate::body::{Action, Body, Generation, Interrupt, Part};
use crate::chat::{Answer, DONE, Usage};
use crate::config::{CHUNK_BYTES_MAX, OUTPUT_TOKENS_MAX};
use crate::connection::Control;
use crate::engine::{Active, Load, Pace};
use crate::error::ApiError;
use crate::faults::{Drawn, ErrorStatus, GarbageAt, HangAt};
use crate::handle::Shared;
use crate::openai::{Endpoint, REQUEST_BYTES_MAX, Request, reply_response};
use crate::rng::Rng;

/// The body of a 200 that is neither UTF-8 nor JSON nor an event stream.
const GARBAGE_BODY: &[u8] = b"\xff\xfe\x00{\"choices\":[[[\xc0\xaf garbage";

/// Answers one request to `endpoint`. Cancel-safe: dropping it at any point gives back what it holds.
pub(crate) async fn generate(
    shared: &Arc<Shared>,
    control: &Arc<Control>,
    endpoint: Endpoint,
    request: hyper::Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let arrived = Instant::now();
    let number = shared.metrics.requests.fetch_add(1, Relaxed);
    let mut rng = Rng::new(shared.config.seed, number);
    // Two servers with one seed give different ids, as different servers do.
    let id = format!("{:016x}{number:08x}", rng.next() ^ hash_of(&shared.config.instance));
    let drawn = shared.faults().draw(&mut rng);
    let version = request.version();
    let (head, body) = request.into_parts();
    let body = read(body, REQUEST_BYTES_MAX).await?;
    if shared.is_loading() {
        return Err(ApiError::Loading);
    }
    if let Some(fault) = &drawn.error_status {
        return Err(ApiError::Fault(fault.clone()));
    }
    if let Some(reply) = &drawn.reply {
        return Ok(reply_response(reply));
    }
    let request = Request::parse(&body)?;
    if drawn.refuse_stream_options && request.has_stream_options() {
        return Err(ApiError::ExtraField("stream_options"));
    }
    drop(body);
    let known = shared.config.models.iter().position(|name| *name == request.model);
    let Some(model) = known else { return Err(ApiError::UnknownModel(request.model)) };
    if shared.config.embeds_only && endpoint != Endpoint::Embeddings {
        let message = "the model does not support this API; it embeds";
        return Err(ApiError::Invalid { param: "model", message });
    }
    let measured = request.measured(endpoint)?;
    let asked = Asked { shared, endpoint, request: &request, headers: &head.headers, drawn: &drawn };
    let answer = asked.answer(measured.tokens(), id)?;
    let embedding = embedding(shared, &request)?;

    let output_tokens = if endpoint == Endpoint::Embeddings { 0 } else { answer.output_tokens() };
    let load = Load { model, prompt_tokens: answer.prompt_tokens, output_tokens };
    let active = Active::acquire(shared, load, arrived).await?;
    if drawn.hang == Some(HangAt::Headers) {
        shared.hang_released(HangAt::Headers).await;
    }
    let streams = request.streams() && endpoint != Endpoint::Embeddings && !drawn.never_stream;
    if let Some(garbage) = garbage(&drawn, streams, control, version) {
        active.cut();
        return Ok(garbage);
    }
    let mut pace = Pace::new(&shared.config, answer.prompt_tokens, answer.choices, drawn.slow_factor, rng);
    let parts = asked.parts(&answer, measured.items, &embedding, streams);
    if !streams {
        let whole = pace.whole(output_tokens);
        if !whole.is_zero() {
            sleep(whole).await;
        }
        pace = Pace::instant();
        if drawn.error_after_tokens.is_some() {
            active.cut();
            return Ok(ok("application/json", Body::full(simulated_error().json())));
        }
    }
    let interrupts = interrupts(&drawn, &answer, output_tokens, streams);
    let control = if version == Version::HTTP_2 { Arc::default() } else { Arc::clone(control) };
    let generation = Generation::new(active, parts, interrupts, pace, Arc::clone(shared), control);
    Ok(if streams { stream_of(generation) } else { whole(generation) })
}

/// A hash of a name; zero for none.
fn hash_of(name: &str) -> u64 {
    name.bytes().fold(0, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn stream_of(generation: Generation) -> Response<Body> {
    let mut response = ok("text/event-stream; charset=utf-8", Body::Generation(Box::new(generation)));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn whole(generation: Generation) -> Response<Body> {
    ok("application/json", Body::Generation(Box::new(generation.with_known_length())))
}

/// The whole body, refused as soon as it is known to be larger than `bytes_max`.
pub(crate) async fn read(body: Incoming, bytes_max: usize) -> Result<Bytes, ApiError> {
    if body.size_hint().lower() > bytes_max as u64 {
        return Err(ApiError::BodyTooLarge);
    }
    match Limited::new(body, bytes_max).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge),
        Err(_) => Err(ApiError::BodyIncomplete),
    }
}

/// A request, and the faults that were drawn for it.
struct Asked<'a> {
    shared: &'a Shared,
    endpoint: Endpoint,
    request: &'a Request,
    headers: &'a HeaderMap,
    drawn: &'a Drawn,
}

impl Asked<'_> {
    /// The answer to make.
    fn answer(&self, prompt_tokens: u64, id: String) -> Result<Answer, ApiError> {
        let config = &self.shared.config;
        let asked = header_number(self.headers, "x-mock-output-tokens", 1, OUTPUT_TOKENS_MAX)?;
        let chunk_bytes = header_number(self.headers, "x-mock-chunk-bytes", 0, CHUNK_BYTES_MAX as u64)?;
        let tokens_max = self.request.tokens_max()?.unwrap_or(u64::MAX);
        let tokens = asked.unwrap_or(config.output_tokens.min(tokens_max));
        let choices = if self.endpoint == Endpoint::Responses { 1 } else { self.request.choices()? };
        let prefix = match self.endpoint {
            Endpoint::Chat => "chatcmpl-",
            Endpoint::Completions => "cmpl-",
            Endpoint::Embeddings => "embd-",
            Endpoint::Responses => "resp_",
        };
        // A streamed chat sends usage only if it was asked for; everything else always does.
        let asks_usage =
            !self.request.streams() || self.endpoint == Endpoint::Responses || self.request.include_usage();
        let usage = match (self.drawn.no_usage, self.drawn.usage_on_last_choice) {
            (true, _) => Usage::Nowhere,
            (false, true) => Usage::LastChoice,
            (false, false) if asks_usage => Usage::OwnChunk,
            (false, false) => Usage::Nowhere,
        };
        Ok(Answer {
            endpoint: self.endpoint,
            id: format!("{prefix}{id}"),
            created: unix_seconds(),
            model: self.drawn.wrong_model_name.clone().unwrap_or_else(|| self.request.model.clone()),
            choices,
            tokens,
            prompt_tokens,
            finish_reason: if asked.is_none() && tokens == tokens_max { "length" } else { "stop" },
            chunk_bytes: chunk_bytes
                .and_then(|bytes| usize::try_from(bytes).ok())
                .unwrap_or(config.chunk_bytes),
            usage,
            usage_form: self.drawn.usage_form,
            done: !self.drawn.no_done,
            empty_finish_reason: self.drawn.empty_finish_reason,
            comments: self.drawn.comments,
            tail: self.drawn.stream_tail,
        })
    }

    /// The answer in the form of the endpoint.
    fn parts(&self, answer: &Answer, inputs: usize, embedding: &Embedding, streams: bool) -> VecDeque<Part> {
        let mut parts = match (self.endpoint, streams) {
            (Endpoint::Chat | Endpoint::Completions, true) => answer.stream(),
            (Endpoint::Chat | Endpoint::Completions, false) => answer.whole(),
            (Endpoint::Responses, true) => answer.stream_response(),
            (Endpoint::Responses, false) => answer.whole_response(),
            (Endpoint::Embeddings, _) => answer.embeddings(inputs, embedding.dimensions, embedding.base64),
        };
        if streams {
            parts.extend(answer.tail());
        }
        parts
    }
}

#[expect(clippy::disallowed_methods, reason = "an answer says when it was made")]
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}

/// The inputs of an embeddings request.
struct Embedding {
    dimensions: usize,
    base64: bool,
}

fn embedding(shared: &Shared, request: &Request) -> Result<Embedding, ApiError> {
    let dimensions = request.dimensions.unwrap_or(shared.config.embedding_dimensions);
    if !(1..=crate::config::EMBEDDING_DIMENSIONS_MAX).contains(&dimensions) {
        return Err(ApiError::Invalid { param: "dimensions", message: "must be from 1 to 16384" });
    }
    let base64 = match request.encoding_format.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            return Err(ApiError::Invalid { param: "encoding_format", message: "must be float or base64" });
        }
    };
    Ok(Embedding { dimensions, base64 })
}

fn header_number(
    headers: &HeaderMap,
    name: &'static str,
    min: u64,
    max: u64,
) -> Result<Option<u64>, ApiError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let number = value.to_str().ok().and_then(|text| text.parse().ok());
    match number.filter(|number| (min..=max).contains(number)) {
        Some(number) => Ok(Some(number)),
        None => Err(ApiError::Invalid { param: name, message: "is not a number in its range" }),
    }
}

fn garbage(drawn: &Drawn, streams: bool, control: &Control, version: Version) -> Option<Response<Body>> {
    match (drawn.garbage?, streams) {
        (GarbageAt::Wire, _) => {
            control.arm_garbage();
            let mut response = Response::new(Body::full(Bytes::new()));
            if version != Version::HTTP_2 {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Some(response)
        }
        (GarbageAt::Event, true) => None,
        (GarbageAt::Response, true) => Some(ok("text/event-stream", Body::full(GARBAGE_BODY))),
        (GarbageAt::Response | GarbageAt::Event, false) => {
            Some(ok("application/json", Body::full(GARBAGE_BODY)))
        }
    }
}

fn simulated_error() -> ApiError {
    ApiError::Fault(ErrorStatus { status: 500, probability: 1.0, retry_after_s: None })
}

fn interrupts(drawn: &Drawn, answer: &Answer, output_tokens: u64, streams: bool) -> Vec<Interrupt> {
    let middle = (output_tokens / 2).max(1);
    let mut interrupts = Vec::new();
    let mut add = |after_tokens, action| interrupts.push(Interrupt { after_tokens, action });
    match drawn.hang {
        Some(at @ HangAt::FirstByte) => add(0, Action::Hang(at)),
        Some(at @ HangAt::MidStream) => add(middle, Action::Hang(at)),
        Some(HangAt::Accept | HangAt::Headers) | None => {}
    }
    if let Some(tokens) = drawn.cut_after_tokens {
        add(tokens, Action::Cut);
    }
    if streams && drawn.garbage == Some(GarbageAt::Event) {
        add(output_tokens / 2, Action::Garbage);
    }
    if let Some(tokens) = drawn.error_after_tokens.filter(|_| streams) {
        let error = simulated_error().json();
        let event = if answer.endpoint == Endpoint::Responses {
            "event: error\ndata: {\"type\":\"error\",\"code\":\"simulated_error\",\"message\":\"simulated error\",\
             \"param\":null,\"sequence_number\":0}\n\n"
                .to_owned()
        } else {
            format!("data: {error}\n\n{}", if answer.done { DONE } else { "" })
        };
        add(tokens, Action::Replace(event.into()));
    }
    interrupts
}

fn ok(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
