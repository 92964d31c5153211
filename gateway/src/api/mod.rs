//! OpenAI's API as bytes: what a request asks for, what an answer says, and the few bytes that are changed in either.
//!
//! Everything here is pure: bytes in, bytes out, no clock and no configuration. [`request`] reads a request's body;
//! [`sse`] finds the events of a stream and [`response`] reads facts from answers and renames their model; [`usage`]
//! bounds what a backend may report; [`json_scanner`] and [`json_edit`] are what they are built on; [`duration`] writes
//! times as OpenAI does.

pub mod duration;
pub mod json_edit;
pub mod json_scanner;
pub mod request;
pub mod response;
pub mod sse;
pub mod usage;
