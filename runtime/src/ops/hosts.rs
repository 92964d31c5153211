//! The host names that a port for browsers answers to, and the pages whose requests it accepts.
//!
//! A page of another site cannot read this port's answers, unless its own name resolves to this port's address ("DNS
//! rebinding"): then the browser takes both for one site. The name stays in the `Host` header, so names that a public
//! site can have are refused. Always answered are addresses, `localhost`, names without dots, names below a suffix
//! that is never public, and this machine's own name. A flag allows others.

use std::net::Ipv6Addr;
use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{self, HeaderMap, HeaderName};
use axum::http::{Method, StatusCode, Uri, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// The maximum of names that a process can be given.
const ALLOWED_MAX: usize = 64;
/// The longest name, bytes, as in DNS.
const NAME_BYTES_MAX: usize = 253;
/// The longest part of a name between dots, bytes.
const LABEL_BYTES_MAX: usize = 63;
/// The characters of a refused name that the answer repeats.
const SHOWN_CHARS: usize = 64;
/// Suffixes that no public site has: Kubernetes services, and those that RFC 6761 and ICANN reserve for private use.
const PRIVATE_SUFFIXES: [&str; 4] = [".svc", ".svc.cluster.local", ".internal", ".localhost"];

/// A name from the command line: `ops.example.com`, or `*.example.com` for all names below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost(String);

impl FromStr for AllowedHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.strip_prefix("*.").unwrap_or(text);
        match Host::parse(name) {
            // A colon without digits is neither a port nor part of a name.
            Ok(Host { name: HostName::Name(_), port: None }) if !name.contains(':') => {
                Ok(Self(text.to_ascii_lowercase()))
            }
            _ => Err(format!(
                "'{}' is not a host name; give one such as ops.example.com or *.example.com, without a port",
                shown(text)
            )),
        }
    }
}

/// The names that a port answers to besides the safe ones. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct AllowedHosts(Arc<[String]>);

impl AllowedHosts {
    /// These names and this machine's own name.
    ///
    /// # Errors
    /// If there are more than 64.
    pub fn new(allowed: &[AllowedHost]) -> Result<Self, String> {
        if allowed.len() > ALLOWED_MAX {
            return Err(format!("{} names are given; at most {ALLOWED_MAX} are allowed", allowed.len()));
        }
        // If the system does not tell its name, the other rules hold.
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let own = own.trim().parse().ok().map(|AllowedHost(name)| name);
        Ok(Self(allowed.iter().map(|AllowedHost(name)| name.clone()).chain(own).collect()))
    }

    /// Whether a host name is answered.
    fn permits(&self, host: &Host<'_>) -> bool {
        let HostName::Name(name) = &host.name else { return true };
        let local = name == "localhost" || !name.contains('.');
        local
            || PRIVATE_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
            || self.0.iter().any(|allowed| match allowed.strip_prefix('*') {
                Some(suffix) => name.ends_with(suffix),
                None => name == allowed,
            })
    }

    /// Judges the head of a request.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn check(&self, head: &Head<'_>) -> Result<(), Refusal> {
        let mut hosts = head.headers.get_all(header::HOST).iter();
        let host = hosts.next();
        if hosts.next().is_some() {
            return Err(Refusal::BadHost);
        }
        let mut asked = Vec::with_capacity(2);
        for name in [host.map(|host| host.as_bytes()), head.uri.authority().map(|a| a.as_str().as_bytes())] {
            let Some(name) = name else { continue };
            let text = std::str::from_utf8(name).map_err(|_| Refusal::BadHost)?;
            asked.push(Host::parse(text).map_err(|()| Refusal::BadHost)?);
        }
        // Every browser sends a host. Health checks of load balancers use HTTP/1.0, which has none.
        if asked.is_empty() && head.version > Version::HTTP_10 {
            return Err(Refusal::BadHost);
        }
        if let Some(strange) = asked.iter().find(|host| !self.permits(host)) {
            return Err(Refusal::StrangeHost(shown(&strange.name.to_string())));
        }
        if !is_own_page(head, asked.last()) {
            return Err(Refusal::OtherSite);
        }
        Ok(())
    }
}

/// The parts of a request that the check needs.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// The version.
    pub version: Version,
    /// The method.
    pub method: &'a Method,
    /// The target.
    pub uri: &'a Uri,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No host, several hosts, or an invalid one.
    #[error("one host is needed, such as 127.0.0.1 or localhost")]
    BadHost,
    /// A name that this port does not answer to.
    #[error(
        "this port does not answer to the name '{0}': use its address, or allow the name with --ops-allowed-host"
    )]
    StrangeHost(String),
    /// A page of another site sent it.
    #[error("a page of another site sent this request")]
    OtherSite,
}

impl Refusal {
    /// The status of the answer.
    pub const fn status(&self) -> StatusCode {
        match self {
            Self::BadHost => StatusCode::BAD_REQUEST,
            Self::StrangeHost(_) => StatusCode::MISDIRECTED_REQUEST,
            Self::OtherSite => StatusCode::FORBIDDEN,
        }
    }
}

/// Whether a request comes from no page, or from a page of this port. A link on another site may lead here; only the
/// person sees the page that it opens.
fn is_own_page(head: &Head<'_>, host: Option<&Host<'_>>) -> bool {
    for origin in head.headers.get_all(header::ORIGIN) {
        let own = origin.to_str().ok().and_then(|text| {
            let (scheme, host) = text.split_once("://")?;
            let default = match scheme {
                "http" => 80,
                "https" => 443,
                _ => return None,
            };
            Some((Host::parse(host).ok()?, default))
        });
        // Behind a proxy that ends TLS the scheme differs, and with it the port that is left out.
        let same = own.zip(host).is_some_and(|((origin, default), host)| {
            let port = |h: &Host<'_>| h.port.unwrap_or(default);
            origin.name == host.name && port(&origin) == port(host)
        });
        if !same {
            return false;
        }
    }
    let is = |name: &'static str, value: &str| {
        let all = head.headers.get_all(HeaderName::from_static(name));
        all.iter().any(|v| v.as_bytes().eq_ignore_ascii_case(value.as_bytes()))
    };
    let opened =
        *head.method == Method::GET && is("sec-fetch-mode", "navigate") && is("sec-fetch-dest", "document");
    opened || !(is("sec-fetch-site", "cross-site") || is("sec-fetch-site", "same-site"))
}

/// A host with its port.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Host<'a> {
    name: HostName<'a>,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum HostName<'a> {
    /// The spelling is kept; no site has such a name.
    Address(&'a str),
    /// In lower case and without a dot at its end.
    Name(String),
}

impl std::fmt::Display for HostName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(text) => f.write_str(text),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl<'a> Host<'a> {
    /// Parses `host [ ":" port ]` in the narrow form that clients send: no user, no escapes, and no address in a form
    /// that only some parsers accept (`127.1`, `0x7f.0.0.1`, `2130706433`).
    fn parse(text: &'a str) -> Result<Self, ()> {
        if let Some(rest) = text.strip_prefix('[') {
            let (inner, rest) = rest.split_once(']').ok_or(())?;
            Ipv6Addr::from_str(inner).map_err(|_| ())?;
            return Ok(Self { name: HostName::Address(inner), port: port(rest)? });
        }
        let (host, rest) = text.split_at(text.find(':').unwrap_or(text.len()));
        let port = port(rest)?;
        if std::net::Ipv4Addr::from_str(host).is_ok() {
            return Ok(Self { name: HostName::Address(host), port });
        }
        let name = host.strip_suffix('.').unwrap_or(host);
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.split('.').all(is_label) {
            return Err(());
        }
        // Browsers take a name that ends in a number for an address.
        let last = name.rsplit('.').next().unwrap_or_default();
        let hex = last.strip_prefix("0x").or_else(|| last.strip_prefix("0X"));
        if last.bytes().all(|b| b.is_ascii_digit())
            || hex.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err(());
        }
        Ok(Self { name: HostName::Name(name.to_ascii_lowercase()), port })
    }
}

fn is_label(label: &str) -> bool {
    // Compose uses underscores in names of services.
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    !label.is_empty() && label.len() <= LABEL_BYTES_MAX && label.bytes().all(fits)
}

/// The port behind a host: nothing, or a colon and optional digits.
fn port(rest: &str) -> Result<Option<u16>, ()> {
    match rest.strip_prefix(':') {
        None if rest.is_empty() => Ok(None),
        None => Err(()),
        Some("") => Ok(None),
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            digits.parse().map(Some).map_err(|_| ())
        }
        Some(_) => Err(()),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS).flat_map(char::escape_debug).collect()
}

/// Refuses requests that are not for this port, before anything else handles them.
pub(super) async fn guard(State(hosts): State<AllowedHosts>, request: Request, next: Next) -> Response {
    let head = Head {
        version: request.version(),
        method: request.method(),
        uri: request.uri(),
        headers: request.headers(),
    };
    match hosts.check(&head) {
        Ok(()) => next.run(request).await,
        Err(refusal) => {
            let headers = [(header::X_CONTENT_TYPE_OPTIONS, "nosniff"), (header::CACHE_CONTROL, "no-store")];
            (refusal.status(), headers, format!("{refusal}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests;
