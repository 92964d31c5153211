//! The token for pages about tenants.

use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest as _, Sha256};

use crate::Secret;

/// Shorter tokens could be guessed.
const TOKEN_MIN_CHARS: usize = 16;
/// The largest file of a token, bytes.
const FILE_BYTES_MAX: u64 = 4096;

/// The token that opens the pages about tenants. Without one the pages are closed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct OpsToken(Option<Arc<Digest>>);

/// The digest of the token. Digests are compared as a whole, so that the time of a comparison tells nothing.
#[derive(Clone, PartialEq, Eq)]
struct Digest([u8; 32]);

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[digest]")
    }
}

/// Why a page is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpsRefusal {
    /// No token is set.
    #[error(
        "this page tells about tenants and is closed: start this process with --ops-token-file to open it to a token"
    )]
    Closed,
    /// No token was sent, or several.
    #[error("a token is needed: authorization: Bearer TOKEN, with the token of --ops-token-file")]
    Missing,
    /// A wrong token was sent.
    #[error("the token is not the one of --ops-token-file")]
    Wrong,
}

impl OpsToken {
    /// Opens the pages to callers with this token.
    ///
    /// # Errors
    /// If it is shorter than 16 characters.
    pub fn new(token: Option<&Secret>) -> Result<Self, String> {
        let Some(token) = token else { return Ok(Self(None)) };
        if token.expose().chars().count() < TOKEN_MIN_CHARS {
            return Err(format!("the operations token must have at least {TOKEN_MIN_CHARS} characters"));
        }
        Ok(Self(Some(Arc::new(Digest(Sha256::digest(token.expose()).into())))))
    }

    /// Whether the headers of a request contain the token.
    ///
    /// # Errors
    /// Why they do not.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), OpsRefusal> {
        let Self(Some(known)) = self else { return Err(OpsRefusal::Closed) };
        let mut sent = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (sent.next(), sent.next()) else { return Err(OpsRefusal::Missing) };
        let token = value.to_str().ok().and_then(|text| text.split_once(' '));
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or(OpsRefusal::Missing)?;
        let digest: [u8; 32] = Sha256::digest(token.trim()).into();
        let difference = digest.iter().zip(&known.0).fold(0, |difference, (a, b)| difference | (a ^ b));
        if difference == 0 { Ok(()) } else { Err(OpsRefusal::Wrong) }
    }
}

/// Reads a token from its file: the text without the white space around it.
///
/// # Errors
/// If the file cannot be read or is longer than a token.
pub fn read_token(path: &Path) -> Result<Secret, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let kind = std::fs::metadata(path).map_err(|e| failed(&e))?;
    if !kind.is_file() || kind.len() > FILE_BYTES_MAX {
        return Err(failed(&format_args!("it must be a file of at most {FILE_BYTES_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| failed(&e))?;
    Ok(Secret::new(text.trim().to_owned()))
}

/// Shows a page to callers with the token.
pub async fn guard_ops_page(State(token): State<OpsToken>, request: Request, next: Next) -> Response {
    let refusal = match token.check(request.headers()) {
        Ok(()) => return next.run(request).await,
        Err(refusal) => refusal,
    };
    let status = match refusal {
        OpsRefusal::Closed => StatusCode::FORBIDDEN,
        OpsRefusal::Missing | OpsRefusal::Wrong => StatusCode::UNAUTHORIZED,
    };
    let mut response =
        (status, [(header::CACHE_CONTROL, "no-store")], format!("{refusal}\n")).into_response();
    if status == StatusCode::UNAUTHORIZED {
        let bearer = header::HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens_and_without_one_nothing_does() {
        let token = OpsToken::new(Some(&Secret::new("0123456789abcdef".into()))).expect("long enough");
        let check = |token: &OpsToken, values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().expect("a value"));
            }
            token.check(&headers)
        };
        for right in ["Bearer 0123456789abcdef", "bearer  0123456789abcdef "] {
            assert_eq!(check(&token, &[right]), Ok(()), "{right}");
        }
        for wrong in
            ["Bearer 0123456789abcdeF", "Bearer 0123456789abcde", "Bearer 0123456789abcdef0", "Bearer x"]
        {
            assert_eq!(check(&token, &[wrong]), Err(OpsRefusal::Wrong), "{wrong}");
        }
        for none in ["", "Bearer", "0123456789abcdef", "Basic 0123456789abcdef"] {
            assert_eq!(check(&token, &[none]), Err(OpsRefusal::Missing), "{none}");
        }
        assert_eq!(check(&token, &[]), Err(OpsRefusal::Missing));
        let twice = ["Bearer 0123456789abcdef", "Bearer 0123456789abcdef"];
        assert_eq!(check(&token, &twice), Err(OpsRefusal::Missing), "which one counts is not guessed");
        assert_eq!(check(&OpsToken::default(), &["Bearer 0123456789abcdef"]), Err(OpsRefusal::Closed));
        assert!(OpsToken::new(Some(&Secret::new("short".into()))).is_err());
        assert!(!format!("{token:?}").contains("0123"));
    }
}
