//! The stores of limits: memory of one process, or Redis for all processes. Both keep one contract and pass one test
//! suite.

pub(crate) mod any;
pub mod memory;
pub mod redis;
