//! Who may call: whoever has the token, when one is set.

use sha2::{Digest, Sha256};
use tonic::service::Interceptor;
use tonic::{Request, Status};
use weir_runtime::Secret;
use weir_runtime::edge::GrpcPeer;

/// Lets a call pass or refuses it. Digests of equal length are compared as a whole, so time tells nothing.
#[derive(Debug, Clone)]
pub(super) struct Guard(Option<[u8; 32]>);

impl Guard {
    pub(super) fn new(token: Option<&Secret>) -> Self {
        Self(token.map(|token| Sha256::digest(token.expose().as_bytes()).into()))
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.check(&request)?;
        if let Some(peer) = request.extensions().get::<GrpcPeer>() {
            peer.connection.trust();
        }
        Ok(request)
    }
}

impl Guard {
    fn check(&self, request: &Request<()>) -> Result<(), Status> {
        let Some(known) = &self.0 else { return Ok(()) };
        let mut headers = request.metadata().get_all("authorization").iter();
        let header = headers.next().and_then(|value| value.to_str().ok());
        if headers.next().is_some() {
            return Err(Status::unauthenticated("authorization is given twice"));
        }
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
        let mut guard = Guard::new(Some(&Secret::new("0123456789abcdef".into())));
        let mut passes = |header: Option<&str>| {
            let mut request = Request::new(());
            if let Some(header) = header {
                request.metadata_mut().insert("authorization", header.parse().expect("a value"));
            }
            guard.call(request).is_ok()
        };
        assert!(passes(Some("Bearer 0123456789abcdef")) && passes(Some("bearer 0123456789abcdef")));
        assert!(!passes(Some("Bearer 0123456789abcdeF")) && !passes(Some("Basic 0123456789abcdef")));
        assert!(!passes(Some("0123456789abcdef")) && !passes(None));
        assert!(Guard::new(None).call(Request::new(())).is_ok());
    }
}
