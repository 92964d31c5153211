//! Where limits are kept: inside one process, or in Redis for all of them. One contract, one suite of tests.

pub(crate) mod any;
pub mod memory;
pub mod redis;
