//! The control plane of Weir: keeps what operators declare, hands it to gateways, and gathers what they see.

mod catalog;
mod encoding;
mod fleet;
mod model;
mod publish;
mod registry;
pub mod store;
mod tree;
