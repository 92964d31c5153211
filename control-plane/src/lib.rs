//! The control plane of Weir: keeps what operators declare, hands it to gateways, and gathers what they see.

pub mod store;
