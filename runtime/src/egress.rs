//! The addresses that backends may have.
//!
//! The authors of a backend's URL may configure Weir, but need not own the machines it runs on. So that no URL
//! reaches what only the machine itself may reach (a cloud's metadata service, which hands out credentials), some
//! addresses are refused unless the operator of the process allows them. Loopback and private networks are allowed,
//! because engines run there.
//!
//! The address is checked when a connection is opened, after the name was resolved. A name that is good when it is
//! configured may lead elsewhere later, and `2130706433` or `0x7f.1` are addresses too.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tower_service::Service;

/// The maximum of networks that can be allowed.
const ALLOWED_MAX: usize = 64;
/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 32;
/// Causes of an error that are searched for a refusal.
const SOURCES_MAX: usize = 16;

type BoxError = Box<dyn Error + Send + Sync>;

/// A network: an address and the number of its leading bits that count. A bare address is a network of one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// Why a text is not a network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a network; write ADDRESS or ADDRESS/BITS, such as 169.254.10.0/24 or fe80::/10")]
pub struct CidrError(String);

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let wrong = || CidrError(text.chars().take(64).flat_map(char::escape_default).collect());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            Some(bits) if bits.bytes().all(|b| b.is_ascii_digit()) => bits.parse().map_err(|_| wrong())?,
            Some(_) => return Err(wrong()),
        };
        if bits > width {
            return Err(wrong());
        }
        Ok(Self { address, bits })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl Cidr {
    const fn v4(a: u8, b: u8, c: u8, d: u8, bits: u8) -> Self {
        Self { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), bits }
    }

    const fn v6(segments: [u16; 8], bits: u8) -> Self {
        let [a, b, c, d, e, f, g, h] = segments;
        Self { address: IpAddr::V6(Ipv6Addr::new(a, b, c, d, e, f, g, h)), bits }
    }

    /// Whether the address is in the network. IPv4 addresses are not in networks of IPv6.
    pub fn contains(&self, address: IpAddr) -> bool {
        let same = |a: u128, b: u128, width: u8| {
            let rest = u32::from(width - self.bits);
            a.checked_shr(rest).unwrap_or(0) == b.checked_shr(rest).unwrap_or(0)
        };
        match (self.address, address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
            _ => false,
        }
    }
}

/// The refused networks, with the reason. Metadata services outside link-local networks are listed one by one.
const REFUSED: [(Cidr, &str); 14] = [
    (Cidr::v4(0, 0, 0, 0, 8), "unspecified"),
    (Cidr::v4(169, 254, 0, 0, 16), "link-local"),
    (Cidr::v4(100, 100, 100, 200, 32), "a metadata service"),
    (Cidr::v4(168, 63, 129, 16, 32), "a cloud's host agent"),
    (Cidr::v4(192, 0, 0, 192, 32), "a metadata service"),
    (Cidr::v4(224, 0, 0, 0, 4), "multicast"),
    (Cidr::v4(255, 255, 255, 255, 32), "broadcast"),
    (Cidr::v6([0; 8], 128), "unspecified"),
    (Cidr::v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10), "link-local"),
    (Cidr::v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8), "multicast"),
    (Cidr::v6([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0], 32), "a metadata service"),
    (Cidr::v6([0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x0254], 128), "a metadata service"),
    (Cidr::v6([0xfd00, 0x0042, 0, 0, 0, 0, 0, 0x0042], 128), "a metadata service"),
    (Cidr::v6([0xfd00, 0x00c1, 0, 0, 0xa9fe, 0xa9fe, 0, 0], 96), "a metadata service"),
];

/// Networks whose addresses contain an IPv4 address, and the bit at which it begins. Translators forward to that
/// address.
const CARRIERS: [(Cidr, u32); 4] = [
    // IPv4-compatible addresses, which are deprecated; ::1 is handled below.
    (Cidr::v6([0; 8], 96), 96),
    (Cidr::v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96), 96),
    (Cidr::v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48), 96),
    (Cidr::v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16), 16),
];

/// The IPv4 address inside an IPv6 address, if there is one.
fn carried(address: IpAddr) -> Option<IpAddr> {
    let IpAddr::V6(v6) = address else { return None };
    if v6.is_loopback() || v6.is_unspecified() {
        return None;
    }
    let (_, from) = CARRIERS.iter().find(|(network, _)| network.contains(address))?;
    let bits = v6.to_bits().checked_shr(96 - from)? as u32;
    Some(IpAddr::V4(Ipv4Addr::from_bits(bits)))
}

/// A connection that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
// Short, because reasons of probes are cut at 64 characters; the remedy comes first.
#[error("refused (--allow-backend-cidr): {address} is {reason}")]
pub struct RefusedAddress {
    /// The address.
    pub address: IpAddr,
    /// The kind of the address.
    pub reason: &'static str,
}

impl RefusedAddress {
    /// The refusal among the causes of a connection's error, if there is one.
    pub fn of<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        for _ in 0..SOURCES_MAX {
            let error = next?;
            if let Some(refused) = error.downcast_ref() {
                return Some(refused);
            }
            next = error.source();
        }
        None
    }
}

/// The policy: the addresses that may be connected to. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EgressPolicy {
    allowed: Arc<[Cidr]>,
}

impl EgressPolicy {
    /// Allows these networks in addition to all that are not refused.
    ///
    /// # Errors
    /// If there are more than 64.
    /// When there are more than 64.
    pub fn allowing(networks: &[Cidr]) -> Result<Self, String> {
        if networks.len() > ALLOWED_MAX {
            let count = networks.len();
            return Err(format!("--allow-backend-cidr: {count} networks; at most {ALLOWED_MAX}, join some"));
        }
        Ok(Self { allowed: networks.into() })
    }

    /// Whether this address may be connected to.
    ///
    /// # Errors
    /// The kind of the address, and the flag that allows it.
    pub fn check(&self, address: IpAddr) -> Result<(), RefusedAddress> {
        // An IPv4 address in the form of an IPv6 address is judged as IPv4.
        let address = address.to_canonical();
        let carried = carried(address);
        let is_any =
            |networks: &Cidr| [Some(address), carried].into_iter().flatten().any(|a| networks.contains(a));
        match REFUSED.iter().find(|(network, _)| is_any(network)) {
            Some((_, reason)) if !self.allowed.iter().any(is_any) => Err(RefusedAddress { address, reason }),
            _ => Ok(()),
        }
    }
}

/// Opens connections to backends, except to addresses that the policy refuses.
#[derive(Debug, Clone)]
pub struct EgressConnector<R = GaiResolver> {
    http: HttpConnector<PolicyResolver<R>>,
    policy: EgressPolicy,
}

impl EgressConnector {
    /// A connector with the system's resolver. `settle` sets the other options of connections, such as timeouts.
    pub fn new(policy: EgressPolicy, settle: impl FnOnce(&mut HttpConnector<PolicyResolver>)) -> Self {
        Self::resolving(GaiResolver::new(), policy, settle)
    }
}

impl<R> EgressConnector<R> {
    /// A connector that resolves names by `resolver`.
    pub fn resolving(
        resolver: R,
        policy: EgressPolicy,
        settle: impl FnOnce(&mut HttpConnector<PolicyResolver<R>>),
    ) -> Self {
        let resolver = PolicyResolver { resolver, policy: policy.clone() };
        let mut http = HttpConnector::new_with_resolver(resolver);
        // TLS is added by the caller.
        http.enforce_http(false);
        settle(&mut http);
        Self { http, policy }
    }
}

impl<R> Service<Uri> for EgressConnector<R>
where
    R: Service<Name> + Clone + Send + Sync + 'static,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
    R::Future: Send,
{
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // The connector does not ask the resolver for addresses.
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = host.parse::<IpAddr>()
            && let Err(refused) = self.policy.check(address)
        {
            return Box::pin(std::future::ready(Err(refused.into())));
        }
        let connecting = self.http.call(uri);
        Box::pin(async move { connecting.await.map_err(Into::into) })
    }
}

/// Resolves names and leaves out refused addresses.
#[derive(Debug, Clone)]
pub struct PolicyResolver<R = GaiResolver> {
    resolver: R,
    policy: EgressPolicy,
}

impl<R> Service<Name> for PolicyResolver<R>
where
    R: Service<Name>,
    R::Response: Iterator<Item = SocketAddr>,
    R::Error: Into<BoxError>,
    R::Future: Send + 'static,
{
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.resolver.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (resolving, policy) = (self.resolver.call(name), self.policy.clone());
        Box::pin(async move {
            let addresses = resolving.await.map_err(Into::into)?;
            Ok(permitted(&policy, addresses)?.into_iter())
        })
    }
}

/// The addresses that may be connected to.
fn permitted(
    policy: &EgressPolicy,
    addresses: impl Iterator<Item = SocketAddr>,
) -> Result<Vec<SocketAddr>, RefusedAddress> {
    let (mut permitted, mut refused) = (Vec::new(), None);
    for address in addresses.take(ADDRESSES_MAX) {
        match policy.check(address.ip()) {
            Ok(()) => permitted.push(address),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    match refused {
        Some(refused) if permitted.is_empty() => Err(refused),
        _ => Ok(permitted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn metadata_link_local_multicast_and_unspecified_addresses_are_refused_however_they_are_written() {
        for text in [
            "169.254.169.254",
            "169.254.0.1",
            "169.254.170.2",
            "::ffff:169.254.169.254",
            "::ffff:a9fe:a9fe",
            "::169.254.169.254",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "100.100.100.200",
            "::ffff:100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "::ffff:0.0.0.0",
            "fe80::1",
            "fe80::a9fe:a9fe",
            "febf::1",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "fd00:42::42",
            "224.0.0.1",
            "239.255.255.255",
            "ff02::1",
            "255.255.255.255",
        ] {
            let refused = EgressPolicy::default().check(ip(text)).expect_err(text);
            let told: String = refused.to_string().chars().take(64).collect();
            assert!(
                told.contains("--allow-backend-cidr") && told.contains(&refused.address.to_string()),
                "{told}"
            );
        }
    }

    #[test]
    fn loopback_private_and_public_addresses_are_allowed() {
        for text in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "192.0.0.191",
            "169.253.255.255",
            "169.255.0.0",
            "8.8.8.8",
            "fd00::1",
            "fd00:ec3::254",
            "2001:db8::1",
            "::ffff:10.0.0.1",
            "64:ff9b::8.8.8.8",
        ] {
            assert_eq!(EgressPolicy::default().check(ip(text)), Ok(()), "{text}");
        }
    }

    #[test]
    fn an_operator_allows_networks() {
        let allow = |text: &str| EgressPolicy::allowing(&[text.parse().expect("a network")]).expect("few");
        assert!(allow("169.254.169.0/24").check(ip("169.254.169.254")).is_ok());
        assert!(allow("169.254.169.0/24").check(ip("::ffff:169.254.169.254")).is_ok());
        assert!(allow("169.254.169.0/24").check(ip("169.254.170.2")).is_err());
        assert!(allow("fe80::/10").check(ip("fe80::1")).is_ok());
        assert!(allow("fe80::/10").check(ip("169.254.169.254")).is_err());
        assert!(allow("0.0.0.0/0").check(ip("169.254.169.254")).is_ok());
        assert!(allow("::/0").check(ip("169.254.169.254")).is_err(), "of one family only");
        let one: Cidr = "10.0.0.1".parse().expect("a network");
        assert!(EgressPolicy::allowing(&vec![one; ALLOWED_MAX]).is_ok());
        assert!(EgressPolicy::allowing(&vec![one; ALLOWED_MAX + 1]).is_err());
    }

    #[test]
    fn networks_are_read_strictly() {
        for text in [
            "",
            "x",
            "1.2.3",
            "1.2.3.4/33",
            "1.2.3.4/",
            "1.2.3.4/-1",
            "1.2.3.4/+1",
            "::/129",
            "1.2.3.4/8/8",
            "01.2.3.4",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        for text in ["1.2.3.4/0", "1.2.3.4/32", "::/0", "fe80::1/128"] {
            assert_eq!(text.parse::<Cidr>().map(|cidr| cidr.to_string()), Ok(text.to_owned()));
        }
    }

    #[test]
    fn of_a_name_with_several_addresses_only_those_allowed_are_tried() {
        let at = |text: &str| SocketAddr::new(ip(text), 80);
        let policy = EgressPolicy::default();
        let mixed = [at("169.254.169.254"), at("10.0.0.1"), at("fe80::1")];
        assert_eq!(permitted(&policy, mixed.into_iter()), Ok(vec![at("10.0.0.1")]));
        let refused = permitted(&policy, [at("169.254.169.254"), at("fe80::1")].into_iter());
        assert_eq!(refused.expect_err("none is left").address, ip("169.254.169.254"));
        assert_eq!(permitted(&policy, std::iter::empty()), Ok(Vec::new()), "nobody was refused");
        let many = (0..10_000u16).map(|port| SocketAddr::new(ip("10.0.0.1"), port));
        assert_eq!(permitted(&policy, many).expect("allowed").len(), ADDRESSES_MAX);
    }

    #[tokio::test]
    async fn a_refusal_is_found_in_the_error_of_a_connection() {
        let mut connector = EgressConnector::new(EgressPolicy::default(), |_| {});
        for url in
            ["http://169.254.169.254/latest", "http://[::ffff:169.254.169.254]:80/", "http://0.0.0.0:1/"]
        {
            let error = connector.call(url.parse().expect("a URL")).await.expect_err(url);
            assert!(RefusedAddress::of(&*error).is_some(), "{error}");
        }
        // The system's resolver reads these spellings as addresses.
        for url in ["http://0:1/", "http://2852039166/", "http://0xa9fea9fe/"] {
            let error = connector.call(url.parse().expect("a URL")).await.expect_err(url);
            assert!(RefusedAddress::of(&*error).is_some(), "{url}: {error:?}");
        }
    }
}
