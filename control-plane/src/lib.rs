//! The control plane of Weir: keeps what operators declare, hands it to gateways, and gathers what they see.

mod encoding;
mod model;
pub mod store;
mod tree;
