//! Authentication and authorization: roles, the methods of each role, tokens and certificates.
//!
//! Methods that are not listed are denied. A token is a row of the store with digests of its secrets. Two more tokens are
//! set at the start of the process, for the time before the store has any.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use weir_proto::status::{refusal, with_reason};
use weir_proto::v1::{self, Role};
use weir_runtime::Secret;
use weir_runtime::grpc::{Bound, StreamBound, standard_bound};

use crate::catalog::Catalog;
use crate::encoding::sha256;
use crate::model::State;
use crate::tls::Identity;

mod bound_tokens;
mod gate;

pub(crate) use bound_tokens::GatewayTokens;
pub(crate) use gate::{Reach, gated};

/// The shortest allowed token; shorter ones could be guessed.
pub(crate) const TOKEN_MIN_CHARS: usize = 16;

/// The timeout of a call: the longest wait that a call can request, 60 s, and the time of a large change.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// The maximum of gateway streams of one kind: one each of ten thousand gateways, and some that are about to end.
const GATEWAY_STREAMS_MAX: usize = 16_384;
/// The maximum of streams with a token of one gateway: the current one, its replacement, and one in reserve.
const STREAMS_PER_GATEWAY: usize = 4;
/// The maximum of watch streams.
const WATCHES_MAX: usize = 256;
/// The maximum of watch streams of one caller.
const WATCHES_PER_CALLER: usize = 64;
/// The maximum of backups in progress; each holds a copy of the store in memory.
const BACKUPS_MAX: usize = 4;
const BACKUPS_PER_CALLER: usize = 2;
/// A backup that is not read within this time is cancelled.
const BACKUP_AGE: Duration = Duration::from_secs(15 * 60);

/// The bound of a call, by its path.
pub(crate) fn bound(path: &str) -> Bound {
    let stream =
        |kind, most, most_per_caller, age| Bound::Stream(StreamBound { kind, most, most_per_caller, age });
    match path {
        "/weir.v1.DiscoveryService/StreamConfig" => {
            stream("configuration streams", GATEWAY_STREAMS_MAX, STREAMS_PER_GATEWAY, None)
        }
        "/weir.v1.ReportService/StreamReports" => {
            stream("report streams", GATEWAY_STREAMS_MAX, STREAMS_PER_GATEWAY, None)
        }
        "/weir.v1.ReportService/AnswerQuestions" => {
            stream("streams of questions", GATEWAY_STREAMS_MAX, STREAMS_PER_GATEWAY, None)
        }
        "/weir.v1.AdminService/Watch" => stream("watches", WATCHES_MAX, WATCHES_PER_CALLER, None),
        "/weir.v1.AdminService/Backup" => {
            stream("backups", BACKUPS_MAX, BACKUPS_PER_CALLER, Some(BACKUP_AGE))
        }
        _ => standard_bound(path, WATCHES_PER_CALLER).unwrap_or(Bound::Unary(CALL_TIMEOUT)),
    }
}

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Caller {
    /// The name in the audit log.
    pub(crate) name: Arc<str>,
    pub(crate) role: Role,
    /// The gateway that the token is bound to.
    pub(crate) gateway_id: Option<Arc<str>>,
    proof: Proof,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Proof {
    /// A token set at the start of the process.
    Fixed,
    /// A token of the store, by the digest of the secret used.
    Token([u8; 32]),
    /// A token from a file, bound to a gateway, by its digest.
    File([u8; 32]),
    /// A client certificate, verified when the connection was opened.
    Certificate,
}

/// Longest id of a gateway, bytes.
pub(crate) const GATEWAY_ID_MAX_BYTES: usize = 63;

/// Whether a text is a valid gateway id: short, and safe in logs and labels.
pub(crate) fn is_gateway_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= GATEWAY_ID_MAX_BYTES && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Authenticates and authorizes all callers. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Authority {
    catalog: Arc<Catalog>,
    fixed: Arc<Fixed>,
    /// The tokens of gateways from files.
    bound: GatewayTokens,
}

#[derive(Debug)]
struct Fixed {
    admin: [u8; 32],
    gateway: Option<[u8; 32]>,
}

/// The role that a method requires; `None` for an unknown method, which is denied.
pub(crate) fn needs(path: &str) -> Option<Role> {
    let (service, method) = path.trim_start_matches('/').split_once('/')?;
    Some(match (service, method) {
        ("weir.v1.DiscoveryService", "StreamConfig")
        | ("weir.v1.ReportService", "StreamReports" | "AnswerQuestions") => Role::Gateway,
        (
            "grpc.reflection.v1.ServerReflection" | "grpc.reflection.v1alpha.ServerReflection",
            "ServerReflectionInfo",
        ) => Role::Viewer,
        ("weir.v1.AdminService", method) => {
            match method {
                "GetResource" | "ListResources" | "ListGateways" | "ListBackendStatus" | "ExplainBackend"
                | "ListHealthEvents" | "WaitApplied" | "Watch" | "History" | "VerifyAudit"
                | "GetOperation" | "WaitOperation" | "GetGatewayConfig" | "QueryUsage" | "ExplainLimits"
                | "WhoAmI" => Role::Viewer,
                // The call itself restricts which fields an operator may update.
                "UpdateResource" | "Drain" | "ProbeBackend" => Role::Operator,
                "CreateResource" | "DeleteResource" | "Apply" | "IssueApiKey" | "RotateApiKey"
                | "Rollback" => Role::Editor,
                "IssueToken" | "RotateToken" | "RevokeToken" | "ListTokens" | "Backup" => Role::Admin,
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// Whether a role may call methods that require another role.
pub(crate) fn opens(role: Role, needed: Role) -> bool {
    match (role, needed) {
        (Role::Unspecified, _) | (_, Role::Unspecified) => false,
        // The gateway role is separate from the operators' roles; only the admin may do everything.
        (Role::Gateway, needed) => needed == Role::Gateway,
        (Role::Admin, _) => true,
        (_, Role::Gateway) => false,
        (role, needed) => role >= needed,
    }
}

/// The name of a role.
pub(crate) const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Unspecified => "nobody",
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Editor => "editor",
        Role::Admin => "admin",
        Role::Gateway => "gateway",
    }
}

impl Caller {
    fn fixed(name: &str, role: Role) -> Self {
        Self { name: name.into(), role, gateway_id: None, proof: Proof::Fixed }
    }

    /// The process itself.
    pub(crate) fn bootstrap() -> Self {
        Self::fixed("bootstrap", Role::Admin)
    }
}

impl Authority {
    pub(crate) fn new(
        catalog: Arc<Catalog>,
        admin: &Secret,
        gateway: Option<&Secret>,
        bound: GatewayTokens,
    ) -> Self {
        let digest = |secret: &Secret| sha256(secret.expose().as_bytes());
        let fixed = Arc::new(Fixed { admin: digest(admin), gateway: gateway.map(digest) });
        Self { catalog, fixed, bound }
    }

    /// The caller of a request, by its token or, without one, by its certificate.
    pub(crate) fn identify(&self, metadata: &MetadataMap, peer: Option<&Identity>) -> Result<Caller, Status> {
        let mut sent = metadata.get_all("authorization").iter();
        let header = sent.next().and_then(|value| value.to_str().ok());
        // Two authorization headers are refused, because proxies may read another one than this process.
        if sent.next().is_some() {
            return Err(Status::unauthenticated("one token is needed, not several"));
        }
        let Some(header) = header else {
            return match peer {
                Some(identity) => Ok(Caller {
                    name: Arc::clone(&identity.name),
                    role: identity.role,
                    gateway_id: (identity.role == Role::Gateway).then(|| Arc::clone(&identity.name)),
                    proof: Proof::Certificate,
                }),
                None => Err(no_token()),
            };
        };
        let token = header.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let (_, token) = token.ok_or_else(no_token)?;
        let digest = sha256(token.trim().as_bytes());
        if equal(&digest, &self.fixed.admin) {
            return Ok(Caller::fixed("admin", Role::Admin));
        }
        if self.fixed.gateway.as_ref().is_some_and(|known| equal(&digest, known)) {
            return Ok(Caller::fixed("gateway", Role::Gateway));
        }
        if let Some(id) = self.bound.holder(&digest) {
            let name = format!("gateway {id}").into();
            return Ok(Caller {
                name,
                role: Role::Gateway,
                gateway_id: Some(id),
                proof: Proof::File(digest),
            });
        }
        stored(&self.catalog.state(), &digest, weir_runtime::wall_clock())
    }

    /// The caller of a method, by its path, if its role allows the method.
    pub(crate) fn authorise(
        &self,
        metadata: &MetadataMap,
        peer: Option<&Identity>,
        path: &str,
    ) -> Result<Caller, Status> {
        let caller = self.identify(metadata, peer)?;
        // Unknown methods are denied.
        let needed = needs(path).ok_or_else(|| Status::unimplemented("there is no such method"))?;
        if opens(caller.role, needed) {
            return Ok(caller);
        }
        let method = path.rsplit('/').next().unwrap_or_default();
        tracing::warn!(
            target: "weir::audit",
            actor = &*caller.name,
            role = role_name(caller.role),
            method,
            "refused: the role does not allow this"
        );
        let text = format!(
            "{method} needs the role {}, and {} is {}",
            role_name(needed),
            caller.name,
            role_name(caller.role)
        );
        Err(with_reason(Code::PermissionDenied, &text, refusal::ROLE))
    }

    /// Whether the credentials of a caller are still valid; streams check this regularly.
    pub(crate) fn still(&self, caller: &Caller) -> Result<(), Status> {
        match &caller.proof {
            Proof::Fixed | Proof::Certificate => Ok(()),
            Proof::File(digest) => match self.bound.holder(digest) {
                Some(_) => Ok(()),
                None => Err(unknown_token("the token is not known any more")),
            },
            Proof::Token(digest) => {
                stored(&self.catalog.state(), digest, weir_runtime::wall_clock()).map(|_| ())
            }
        }
    }

    /// Whether a caller may use this gateway id. If a token is bound to the id, only its holder may use it.
    pub(crate) fn speaks_for(&self, caller: &Caller, gateway_id: &str) -> Result<(), Status> {
        let refused = |text: String| Err(with_reason(Code::PermissionDenied, &text, refusal::GATEWAY_ID));
        match &caller.gateway_id {
            Some(own) if **own == *gateway_id => Ok(()),
            Some(own) => {
                refused(format!("{} speaks for gateway {own} and not for {gateway_id}", caller.name))
            }
            None if self.bound.has(gateway_id) => {
                refused(format!("gateway {gateway_id} has a token of its own; give that one to it"))
            }
            None => match self.catalog.state().tokens.values().find(|t| t.gateway_id == gateway_id) {
                None => Ok(()),
                Some(token) => refused(format!(
                    "gateway {gateway_id} has a token of its own, {}; give that one to it",
                    token.name
                )),
            },
        }
    }
}

/// The caller with a digest.
fn stored(state: &State, digest: &[u8; 32], now: SystemTime) -> Result<Caller, Status> {
    for token in state.tokens.values() {
        for secret in &token.secrets {
            let known = <&[u8; 32]>::try_from(secret.sha256.as_slice());
            if !known.is_ok_and(|known| equal(digest, known)) {
                continue;
            }
            if expired(secret, now) {
                let text = format!("token {} has expired", token.name);
                return Err(with_reason(Code::Unauthenticated, &text, refusal::TOKEN_EXPIRED));
            }
            let id = Some(token.gateway_id.as_str()).filter(|id| !id.is_empty());
            return Ok(Caller {
                name: token.name.as_str().into(),
                role: token.role(),
                gateway_id: id.map(Into::into),
                proof: Proof::Token(*digest),
            });
        }
    }
    Err(unknown_token("the token is not known"))
}

fn no_token() -> Status {
    let text = "a token is needed: authorization: Bearer TOKEN";
    with_reason(Code::Unauthenticated, text, refusal::TOKEN_MISSING)
}

fn unknown_token(text: &str) -> Status {
    with_reason(Code::Unauthenticated, text, refusal::TOKEN_UNKNOWN)
}

pub(crate) fn expired(secret: &v1::TokenSecret, now: SystemTime) -> bool {
    secret.expire_time.is_some_and(|end| SystemTime::try_from(end).is_ok_and(|end| end <= now))
}

/// Compares two digests in constant time.
pub(crate) fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

#[cfg(test)]
pub(crate) mod tests {
    use prost::Message as _;

    use super::*;

    const ROLES: [Role; 5] = [Role::Viewer, Role::Operator, Role::Editor, Role::Admin, Role::Gateway];

    /// Every method that this process serves, from the descriptors.
    pub(crate) fn methods() -> Vec<String> {
        let files = prost_types::FileDescriptorSet::decode(weir_proto::FILE_DESCRIPTOR_SET).unwrap();
        let served = ["AdminService", "DiscoveryService", "ReportService"];
        let services = files.file.iter().flat_map(|f| f.service.iter().map(move |s| (f.package(), s)));
        services
            .filter(|(package, service)| *package == "weir.v1" && served.contains(&service.name()))
            .flat_map(|(package, service)| {
                let method = move |m: &prost_types::MethodDescriptorProto| {
                    format!("/{package}.{}/{}", service.name(), m.name())
                };
                service.method.iter().map(method)
            })
            .collect()
    }

    #[test]
    fn every_method_of_the_contract_has_a_role() {
        let methods = methods();
        assert!(methods.len() > 20, "{methods:?}");
        for method in methods {
            assert!(needs(&method).is_some(), "{method} has no role: add it to auth::needs");
        }
        assert_eq!(needs("/weir.v1.AdminService/Other"), None);
        assert_eq!(needs("/other.Service/GetResource"), None);
    }

    #[test]
    fn each_role_opens_what_is_below_it_and_gateways_are_apart() {
        let matrix = ROLES.map(|role| ROLES.map(|needed| u8::from(opens(role, needed))));
        assert_eq!(
            matrix,
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]
        );
        assert!(ROLES.iter().all(|role| !opens(Role::Unspecified, *role)));
    }
}
