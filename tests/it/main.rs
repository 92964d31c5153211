//! The product from outside.

mod errors;
mod failover;
mod limits;
mod processes;
mod stack;
mod streaming;
mod waiting;
mod tls;
