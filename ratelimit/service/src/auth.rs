//! Who may call: whoever has the token, when one is set.

use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use tonic::Status;
use weir_runtime::Secret;

/// Lets a call pass or refuses it. Digests of equal length are compared as a whole, so time tells nothing.
#[derive(Debug, Clone)]
pub(super) struct Guard(Option<[u8; 32]>);

impl Guard {
    pub(super) fn new(token: Option<&Secret>) -> Self {
        Self(token.map(|token| Sha256::digest(token.expose().as_bytes()).into()))
    }
}

impl Guard {
    /// Whether the head of a call carries the token.
    pub(super) fn check(&self, headers: &HeaderMap) -> Result<(), Status> {
        let Some(known) = &self.0 else { return Ok(()) };
        let mut sent = headers.get_all(header::AUTHORIZATION).iter();
        let header = sent.next().and_then(|value| value.to_str().ok());
        // Two of them are read differently by whoever stands between.
        let header = header.filter(|_| sent.next().is_none());
        let (scheme, token) = header
            .and_then(|header| header.split_once(' '))
            .ok_or_else(|| Status::unauthenticated("a token is needed: authorization: Bearer TOKEN"))?;
        let digest: [u8; 32] = Sha256::digest(token.trim().as_bytes()).into();
        let difference = digest.iter().zip(known).fold(0, |difference, (a, b)| difference | (a ^ b));
        if scheme.eq_ignore_ascii_case("bearer") && difference == 0 {
            Ok(())
        } else {
            Err(Status::unauthenticated("the token is not known"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_opens() {
        let guard = Guard::new(Some(&Secret::new("0123456789abcdef".into())));
        let passes = |header: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = header {
                headers.insert(header::AUTHORIZATION, value.parse().expect("a value"));
            }
            guard.check(&headers).is_ok()
        };
        assert!(passes(Some("Bearer 0123456789abcdef")) && passes(Some("bearer 0123456789abcdef")));
        assert!(!passes(Some("Bearer 0123456789abcdeF")) && !passes(Some("Basic 0123456789abcdef")));
        assert!(!passes(Some("0123456789abcdef")) && !passes(None));
        let mut twice = HeaderMap::new();
        for _ in 0..2 {
            twice.append(header::AUTHORIZATION, "Bearer 0123456789abcdef".parse().expect("a value"));
        }
        assert!(guard.check(&twice).is_err(), "one token, not two");
        assert!(Guard::new(None).check(&HeaderMap::new()).is_ok());
    }
}
