//! Who may call what: two roles, each with a bearer token.

use tonic::service::Interceptor;
use tonic::{Request, Status};
use weir_runtime::Secret;

use crate::encoding::sha256;

/// Shorter ones could be guessed.
pub(crate) const TOKEN_MIN_CHARS: usize = 16;

/// The digests of the tokens. Digests of equal length are compared as a whole, so time tells nothing.
#[derive(Clone)]
pub(crate) struct Tokens {
    admin: [u8; 32],
    gateway: Option<[u8; 32]>,
}

/// What a service asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    /// The admin token.
    Admin,
    /// The gateway's token, or the admin's.
    Gateway,
    /// None: only where nobody else can connect.
    Nothing,
}

impl Tokens {
    pub(crate) fn new(admin: &Secret, gateway: Option<&Secret>) -> Self {
        let digest = |secret: &Secret| sha256(secret.expose().as_bytes());
        Self { admin: digest(admin), gateway: gateway.map(digest) }
    }

    pub(crate) fn guard(&self, needs: Needs) -> Guard {
        Guard { tokens: self.clone(), needs }
    }
}

/// Lets a call pass or refuses it.
#[derive(Clone)]
pub(crate) struct Guard {
    tokens: Tokens,
    needs: Needs,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("needs", &self.needs).finish_non_exhaustive()
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.needs == Needs::Nothing {
            return Ok(request);
        }
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let (scheme, token) = header
            .and_then(|header| header.split_once(' '))
            .ok_or_else(|| Status::unauthenticated("a token is needed: authorization: Bearer TOKEN"))?;
        let digest = sha256(token.trim().as_bytes());
        let bearer = scheme.eq_ignore_ascii_case("bearer");
        let admin = equal(&digest, &self.tokens.admin);
        let gateway = self.tokens.gateway.as_ref().is_some_and(|known| equal(&digest, known));
        match (bearer && admin, bearer && gateway, self.needs) {
            (true, _, _) | (_, true, Needs::Gateway) => Ok(request),
            (false, true, _) => {
                Err(Status::permission_denied("the gateway token does not open this service"))
            }
            (false, false, _) => Err(Status::unauthenticated("the token is not known")),
        }
    }
}

fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_opens_what_it_is_for() {
        let (admin, gateway) =
            (Secret::new("admin-admin-admin".into()), Secret::new("gateway-gateway-1".into()));
        let tokens = Tokens::new(&admin, Some(&gateway));
        let code = |needs, header: Option<&str>| {
            let mut request = Request::new(());
            if let Some(header) = header {
                request.metadata_mut().insert("authorization", header.parse().unwrap());
            }
            tokens.guard(needs).call(request).map_or_else(|status| status.code(), |_| tonic::Code::Ok)
        };
        use tonic::Code;
        assert_eq!(code(Needs::Admin, Some("Bearer admin-admin-admin")), Code::Ok);
        assert_eq!(code(Needs::Gateway, Some("bearer admin-admin-admin")), Code::Ok);
        assert_eq!(code(Needs::Gateway, Some("Bearer gateway-gateway-1")), Code::Ok);
        assert_eq!(code(Needs::Admin, Some("Bearer gateway-gateway-1")), Code::PermissionDenied);
        assert_eq!(code(Needs::Admin, Some("Basic admin-admin-admin")), Code::Unauthenticated);
        assert_eq!(code(Needs::Admin, Some("Bearer other")), Code::Unauthenticated);
        assert_eq!(code(Needs::Admin, None), Code::Unauthenticated);
        assert_eq!(code(Needs::Nothing, None), Code::Ok);
    }
}
