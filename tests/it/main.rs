//! The product from outside.

mod errors;
mod failover;
mod limits;
mod processes;
mod stack;
mod streaming;
mod tls;
mod waiting;
