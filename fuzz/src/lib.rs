//! Fuzz targets: one for each parser of bytes that strangers write.
//!
//! A target is a function of bytes that panics when its property does not hold. The fuzzer (`fuzz/run`) looks for bytes
//! that make it panic, hang or grow; `cargo test` runs it over the files in `corpus/`, which are what the fuzzer found
//! worth keeping and what once went wrong.

mod input;
mod targets;

pub use targets::TARGETS;

/// A property and its name.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// As its module and its corpus are called.
    pub name: &'static str,
    /// Panics when the property does not hold for these bytes.
    pub run: fn(&[u8]),
}
