//! Which endpoint a request is for: an exact table, and a hint for those who miss it narrowly. A path that is nearly right is
//! never routed, only named in the error.

use http::Method;
use smallvec::SmallVec;

use crate::api::request::RouteKind;
use crate::error::GatewayError;

/// The one path with a variable part; what follows is the id of a model, which may hold slashes.
const MODEL: &str = "/v1/models/";

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    /// An answer of a model.
    Generate(RouteKind),
    /// The list of models.
    Models,
    /// One model of the list, by its id.
    Model(String),
}

/// An endpoint, and the name of its path for logs: a constant, never the client's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) path: &'static str,
    pub(super) route: Route,
}

impl Endpoint {
    /// The endpoint at a path.
    pub(super) fn at(path: &str) -> Option<Self> {
        let generate = |path, kind| Some(Self { path, route: Route::Generate(kind) });
        match path {
            "/v1/chat/completions" => generate("/v1/chat/completions", RouteKind::ChatCompletions),
            "/v1/completions" => generate("/v1/completions", RouteKind::Completions),
            "/v1/embeddings" => generate("/v1/embeddings", RouteKind::Embeddings),
            "/v1/responses" => generate("/v1/responses", RouteKind::Responses),
            "/v1/models" => Some(Self { path: "/v1/models", route: Route::Models }),
            _ => {
                let id = path.strip_prefix(MODEL).filter(|id| !id.trim_matches('/').is_empty())?;
                Some(Self { path: "/v1/models/{model}", route: Route::Model(percent_decoded(id)) })
            }
        }
    }

    /// The methods that the endpoint takes, as the header `Allow` lists them.
    pub(super) const fn allow(&self) -> &'static str {
        match self.route {
            Route::Generate(_) => "POST",
            Route::Models | Route::Model(_) => "GET, HEAD",
        }
    }

    /// Whether it takes this method.
    pub(super) fn takes(&self, method: &Method) -> bool {
        match self.route {
            Route::Generate(_) => *method == Method::POST,
            Route::Models | Route::Model(_) => *method == Method::GET || *method == Method::HEAD,
        }
    }
}

/// The refusal of a path that is none, with the one that was probably meant.
pub(super) fn unknown(method: &Method, path: &str) -> GatewayError {
    GatewayError::UnknownRoute { url: format!("{method} {path}"), nearest: nearest(path) }
}

/// Ends of paths that are compared: a slash may be missing, or be there where none belongs.
const PARTS_MAX: usize = 3;
/// Most typing errors in a name of [`LONG_NAME`] characters or more; a shorter one is another name with two.
const TYPOS_MAX: usize = 2;
const LONG_NAME: usize = 8;

/// The endpoint whose end a path has, but for one or two typing errors, doubled and trailing slashes, case, and what stands
/// before: `/v1` is missing, there twice, or behind a prefix of somebody else's.
fn nearest(path: &str) -> Option<&'static str> {
    // The longest comes first, since one is the end of another.
    const ENDPOINTS: [&str; 5] =
        ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/models"];
    let parts = path.rsplit('/').map(str::trim).filter(|part| !part.is_empty());
    let parts: SmallVec<[&str; PARTS_MAX]> = parts.take(PARTS_MAX).collect();
    let end = |n: usize| parts[..n].iter().rev().copied().collect::<Vec<_>>().join("/").to_ascii_lowercase();
    let ends: SmallVec<[String; PARTS_MAX]> = (1..=parts.len()).map(end).collect();
    ENDPOINTS.into_iter().find(|endpoint| {
        let name = endpoint.trim_start_matches("/v1/");
        let typos = if name.len() >= LONG_NAME { TYPOS_MAX } else { 1 };
        let mut near = ends.iter().filter(|end| end.len().abs_diff(name.len()) <= typos);
        near.any(|end| strsim::osa_distance(end, name) <= typos)
    })
}

/// A text with its `%XX` decoded; what is no such code, or no UTF-8 then, stays as it is.
fn percent_decoded(text: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let (bytes, mut decoded, mut at) = (text.as_bytes(), Vec::with_capacity(text.len()), 0);
    while let Some(&byte) = bytes.get(at) {
        let code = (byte == b'%').then(|| digit(bytes.get(at + 1)).zip(digit(bytes.get(at + 2)))).flatten();
        match code {
            // Two digits of four bits each.
            Some((high, low)) => decoded.push((high * 16 + low) as u8),
            None => decoded.push(byte),
        }
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8(decoded).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn model(path: &str) -> Option<String> {
        match Endpoint::at(path)?.route {
            Route::Model(id) => Some(id),
            Route::Generate(_) | Route::Models => None,
        }
    }

    #[test]
    fn the_id_of_a_model_may_hold_anything() {
        for (path, id) in [
            ("/v1/models/gpt-4.1", "gpt-4.1"),
            ("/v1/models/meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
            ("/v1/models/meta-llama%2FLlama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
            ("/v1/models/meta-llama%2fLlama", "meta-llama/Llama"),
            ("/v1/models/qwen2.5:7b", "qwen2.5:7b"),
            ("/v1/models/qwen2.5%3A7b", "qwen2.5:7b"),
            ("/v1/models/a%20b+c", "a b+c"),
            ("/v1/models/%C3%BC", "ü"),
            ("/v1/models/100%", "100%"),
            ("/v1/models/%zz%4", "%zz%4"),
            ("/v1/models/%ff", "%ff"),
            ("/v1/models/a/", "a/"),
        ] {
            assert_eq!(model(path).as_deref(), Some(id), "{path}");
        }
        for path in ["/v1/models", "/v1/models/", "/v1/models//", "/v1/modelsx", "/V1/models/a"] {
            assert_eq!(model(path), None, "{path}");
        }
    }

    #[test]
    fn a_near_miss_is_told_the_right_path() {
        for (path, right) in [
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("//v1/chat/completions", Some("/v1/chat/completions")),
            ("/v1//chat//completions", Some("/v1/chat/completions")),
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/api/v1/chat/completions", Some("/v1/chat/completions")),
            ("/openai/deployments/gpt/chat/completions", Some("/v1/chat/completions")),
            ("/V1/Chat/Completions", Some("/v1/chat/completions")),
            ("/completions", Some("/v1/completions")),
            ("/v1/embeddings/", Some("/v1/embeddings")),
            ("/responses", Some("/v1/responses")),
            ("/v1/models/", Some("/v1/models")),
            ("/models", Some("/v1/models")),
            ("/v1", None),
            ("/", None),
            ("/v1/messages", None),
            ("/v1/chat/completion", Some("/v1/chat/completions")),
            ("/v1/chat/completion/", Some("/v1/chat/completions")),
            ("/v1/chat/compeltions", Some("/v1/chat/completions")),
            ("/v1/chat-completions", Some("/v1/chat/completions")),
            ("/v1/chatcompletions", Some("/v1/chat/completions")),
            ("/v1/chat/complet/ions", Some("/v1/chat/completions")),
            ("/xchat/completions2", Some("/v1/chat/completions")),
            ("/v1/completion", Some("/v1/completions")),
            ("/V1/Completion", Some("/v1/completions")),
            ("/v1/response", Some("/v1/responses")),
            ("/v1/embedding", Some("/v1/embeddings")),
            ("/v1/embeding", Some("/v1/embeddings")),
            ("/v1/model", Some("/v1/models")),
            ("/v1/nodes", None),
            ("/v1/chat", None),
            ("/v1/chat/complete", None),
            ("/v1/audio/transcriptions", None),
            ("/v1/images/generations", None),
            ("/v1/completions/extra", None),
        ] {
            assert_eq!(nearest(path), right, "{path}");
            assert_eq!(Endpoint::at(path), None, "{path}");
        }
    }

    #[test]
    fn an_endpoint_takes_its_methods_alone() {
        for (path, allow) in
            [("/v1/responses", "POST"), ("/v1/models", "GET, HEAD"), ("/v1/models/m", "GET, HEAD")]
        {
            let endpoint = Endpoint::at(path).expect("there");
            assert_eq!(endpoint.allow(), allow);
            for method in ["GET", "HEAD", "POST", "PUT", "OPTIONS", "get"] {
                let taken = endpoint.takes(&Method::from_bytes(method.as_bytes()).expect("a method"));
                assert_eq!(taken, allow.split(", ").any(|allowed| allowed == method), "{method} {path}");
            }
        }
    }

    proptest! {
        #[test]
        fn a_hint_is_an_endpoint_and_decoding_never_fails(path in "/[ -~ü]{0,40}") {
            prop_assert!(nearest(&path).is_none_or(|right| Endpoint::at(right).is_some()));
            let _ = Endpoint::at(&path);
            prop_assert_eq!(percent_decoded(&path.replace('%', "%25")), path);
        }
    }
}
