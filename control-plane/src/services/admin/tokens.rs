//! Tokens: made here, shown once, kept as digests; each with a role, and a gateway's with its one gateway.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::Timestamp;
use tonic::Status;
use weir_proto::v1::{self, Role, Token, TokenSecret};

use super::{Admin, Handle, duration};
use crate::auth::expired;
use crate::catalog::Answer;
use crate::encoding::{base64url, sha256};
use crate::model::audit::without_digests;
use crate::model::{Plan, Refusal, State, TokenStep};
use crate::services::invalid;

/// Most tokens; each call looks through them.
const TOKENS_MAX: usize = 1000;
/// Characters of a secret that are kept to recognise it by.
const PREFIX_CHARS: usize = 12;
const NAME_MAX_BYTES: usize = 63;
/// How long the old secret of a rotated token stays valid.
const GRACE: Duration = Duration::from_secs(60 * 60);
const GRACE_MAX: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// What the process itself is called in the audit log.
const RESERVED: [&str; 3] = ["admin", "gateway", "bootstrap"];

impl Answer for v1::IssueTokenResponse {
    fn set_revision(&mut self, _: u64) {}
}

impl Answer for v1::RotateTokenResponse {
    fn set_revision(&mut self, _: u64) {}
}

impl Answer for v1::RevokeTokenResponse {
    fn set_revision(&mut self, _: u64) {}
}

/// 256 random bits, so a plain digest cannot be searched.
fn new_secret(expire_time: Option<Timestamp>) -> Result<(String, TokenSecret), Status> {
    let mut random = [0_u8; 32];
    getrandom::fill(&mut random).map_err(|_| Status::unavailable("the system has no randomness"))?;
    let text = format!("weirtok_{}", base64url(&random));
    let prefix = text.chars().take(PREFIX_CHARS).collect();
    let secret = TokenSecret { sha256: sha256(text.as_bytes()).to_vec(), prefix, expire_time };
    Ok((text, secret))
}

fn is_name(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    !name.is_empty() && name.len() <= NAME_MAX_BYTES && name.bytes().all(fits)
}

fn in_future(time: Option<Timestamp>) -> Result<(), Status> {
    let past =
        time.is_some_and(|t| SystemTime::try_from(t).map_or(true, |t| t <= weir_runtime::wall_clock()));
    if past { Err(invalid("expire_time", "must be in the future")) } else { Ok(()) }
}

fn step(name: &str, before: Option<Arc<Token>>, after: Option<Token>) -> Plan {
    Plan { tokens: vec![TokenStep { name: name.into(), before, after }], ..Plan::default() }
}

fn shown(plan: &Plan) -> Option<Token> {
    plan.tokens.first().and_then(|step| step.after.as_ref()).map(without_digests)
}

impl Handle<v1::IssueTokenRequest> for Admin {
    type Answer = v1::IssueTokenResponse;

    async fn do_call(&self, request: v1::IssueTokenRequest) -> Result<Self::Answer, Status> {
        let call = self.unremembered("IssueToken", request.validate_only)?;
        if !is_name(&request.name) || RESERVED.contains(&request.name.as_str()) {
            let rule = "must be 1 to 63 of a-z, 0-9, '-' and '.', and not admin, gateway or bootstrap";
            return Err(invalid("name", rule));
        }
        if request.role() == Role::Unspecified {
            return Err(invalid("role", "must be viewer, operator, editor, admin or gateway"));
        }
        if !request.gateway_id.is_empty() && request.role() != Role::Gateway {
            return Err(invalid("gateway_id", "is of the role gateway only"));
        }
        if request.gateway_id.len() > NAME_MAX_BYTES {
            return Err(invalid("gateway_id", "must be at most 63 bytes"));
        }
        in_future(request.expire_time)?;
        let (text, secret) = new_secret(request.expire_time)?;
        let text = if request.validate_only { String::new() } else { text };
        let token = Token {
            name: request.name.clone(),
            role: request.role,
            gateway_id: request.gateway_id.clone(),
            secrets: vec![secret],
            create_time: Some(weir_runtime::wall_clock().into()),
        };
        let plan = |state: &State| {
            if state.tokens.contains_key(request.name.as_str()) {
                return Err(Refusal::Precondition(format!("there is a token {} already", request.name)));
            }
            if state.tokens.len() >= TOKENS_MAX {
                return Err(Refusal::Precondition(format!(
                    "there are {TOKENS_MAX} tokens already; revoke some"
                )));
            }
            let twin = |t: &&Arc<Token>| !token.gateway_id.is_empty() && t.gateway_id == token.gateway_id;
            if let Some(twin) = state.tokens.values().find(twin) {
                let text =
                    format!("gateway {} has the token {} already; rotate it", twin.gateway_id, twin.name);
                return Err(Refusal::Precondition(text));
            }
            Ok(step(&request.name, None, Some(token.clone())))
        };
        let answer =
            |plan: &Plan, _: &State| v1::IssueTokenResponse { token: shown(plan), secret: text.clone() };
        self.change(call, plan, answer).await
    }
}

fn present(state: &State, name: &str) -> Result<Arc<Token>, Refusal> {
    let found = state.tokens.get(name).cloned();
    found.ok_or_else(|| Refusal::Precondition(format!("there is no token {name}")))
}

impl Handle<v1::RotateTokenRequest> for Admin {
    type Answer = v1::RotateTokenResponse;

    async fn do_call(&self, request: v1::RotateTokenRequest) -> Result<Self::Answer, Status> {
        let call = self.unremembered("RotateToken", request.validate_only)?;
        let grace = duration(request.grace, GRACE)
            .filter(|grace| *grace <= GRACE_MAX)
            .ok_or_else(|| invalid("grace", "must be 0 to 30 days"))?;
        in_future(request.expire_time)?;
        let (text, secret) = new_secret(request.expire_time)?;
        let text = if request.validate_only { String::new() } else { text };
        let plan = |state: &State| {
            let before = present(state, &request.name)?;
            let now = weir_runtime::wall_clock();
            let secrets = rotated(secret.clone(), &before.secrets, now, now + grace);
            let after = Token { secrets, ..Token::clone(&before) };
            Ok(step(&request.name, Some(before), Some(after)))
        };
        let answer =
            |plan: &Plan, _: &State| v1::RotateTokenResponse { token: shown(plan), secret: text.clone() };
        self.change(call, plan, answer).await
    }
}

/// The secrets after a rotation: the new one, and the newest of those before until the grace is over. The new one ends
/// when the old one would have, unless an end is given.
fn rotated(new: TokenSecret, before: &[TokenSecret], now: SystemTime, end: SystemTime) -> Vec<TokenSecret> {
    let live = before.iter().find(|secret| !expired(secret, now));
    let expire_time = new.expire_time.or_else(|| live.and_then(|old| old.expire_time));
    let mut out = vec![TokenSecret { expire_time, ..new }];
    if let Some(old) = live.filter(|_| end > now) {
        let own = old.expire_time.and_then(|t| SystemTime::try_from(t).ok());
        let end = own.map_or(end, |own| own.min(end));
        out.push(TokenSecret { expire_time: Some(end.into()), ..old.clone() });
    }
    out
}

impl Handle<v1::RevokeTokenRequest> for Admin {
    type Answer = v1::RevokeTokenResponse;

    async fn do_call(&self, request: v1::RevokeTokenRequest) -> Result<Self::Answer, Status> {
        let call = self.unremembered("RevokeToken", request.validate_only)?;
        let plan = |state: &State| Ok(step(&request.name, Some(present(state, &request.name)?), None));
        self.change(call, plan, |_: &Plan, _: &State| v1::RevokeTokenResponse {}).await
    }
}

impl Handle<v1::ListTokensRequest> for Admin {
    type Answer = v1::ListTokensResponse;

    async fn do_call(&self, _: v1::ListTokensRequest) -> Result<Self::Answer, Status> {
        let state = self.0.catalog.state();
        Ok(v1::ListTokensResponse { tokens: state.tokens.values().map(|t| without_digests(t)).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_keeps_the_secret_it_replaces_for_the_grace_and_lengthens_nothing() {
        let at = |s: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        let secret = |prefix: &str, end: Option<u64>| TokenSecret {
            sha256: vec![],
            prefix: prefix.into(),
            expire_time: end.map(|s| at(s).into()),
        };
        let before = [secret("b", Some(900)), secret("a", Some(150))];
        let after = rotated(secret("c", None), &before, at(100), at(200));
        assert_eq!(after, [secret("c", Some(900)), secret("b", Some(200))]);
        let after = rotated(secret("c", Some(2000)), &before, at(100), at(100));
        assert_eq!(after, [secret("c", Some(2000))], "no grace, no old secret");
    }
}
