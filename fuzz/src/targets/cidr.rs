use std::net::{IpAddr, Ipv6Addr};

use weir_runtime::{Cidr, EgressPolicy};

use crate::input::Input;

/// A network reads back from its text and holds what agrees with its leading bits; the policy says the same of an IPv4 address
/// however it is written, and an operator can allow any one address.
pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (network, address) = (input.text(), input.text());
    let Ok(address) = address.parse::<IpAddr>() else {
        assert!(network.parse::<Cidr>().map_or_else(|e| e.to_string().len() <= 1024, |_| true));
        return;
    };
    let policy = EgressPolicy::default();
    if let IpAddr::V4(v4) = address {
        let mapped = IpAddr::V6(v4.to_ipv6_mapped());
        assert_eq!(policy.check(address).is_ok(), policy.check(mapped).is_ok());
        let compatible = Ipv6Addr::from_bits(u128::from(v4.to_bits()));
        // ::1 is a loopback address and not 0.0.0.1.
        if !compatible.is_loopback() && policy.check(address).is_err() {
            assert!(policy.check(IpAddr::V6(compatible)).is_err(), "{compatible} is let through");
        }
    }
    let single: Cidr = address.to_string().parse().expect("an address is a network of one");
    let allowing = EgressPolicy::allowing(&[single]).expect("one network");
    if let Err(refused) = allowing.check(address) {
        let single: Cidr = refused.address.to_string().parse().expect("an address is a network of one");
        let allowing = EgressPolicy::allowing(&[single]).expect("one network");
        assert_eq!(allowing.check(address), Ok(()), "what a refusal says to allow does not allow it");
    }
    let Ok(network) = network.parse::<Cidr>() else { return };
    let text = network.to_string();
    assert_eq!(text.parse::<Cidr>(), Ok(network));
    let (base, bits) = text.split_once('/').expect("address and bits");
    let (base, bits): (IpAddr, u32) = (base.parse().expect("address"), bits.parse().expect("bits"));
    assert!(network.contains(base), "a network without its own address");
    let same = match (base, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= bits,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= bits,
        _ => false,
    };
    assert_eq!(network.contains(address), same, "{address} in {text}");
}
