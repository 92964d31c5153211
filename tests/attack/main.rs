//! Attacks and faults, a row a test: what strangers, slow clients, lying backends and failing machines may do to Weir,
//! and what it promises then. `SECURITY.md` and `docs/failures.md` name the test of each promise.

mod dns;
mod faults;
mod fleet;
mod partitions;
mod redis;
mod restarts;
