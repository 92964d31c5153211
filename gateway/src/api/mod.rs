//! OpenAI's API as bytes: what a request asks for, what an answer says, and the few bytes that are changed in either.
//!
//! Everything here is pure: bytes in, bytes out, no clock and no configuration. [`request`] reads a request's body;
//! [`sse`] finds the events of a stream and [`response`] reads facts from answers, endpoint by endpoint, and renames their
//! model; [`usage`] knows what the counts of a backend's dialect mean and bounds what it may report; [`json_scanner`],
//! [`json_stream`], [`json_number`] and [`json_edit`] are what they are built on; [`duration`] writes times as OpenAI does.

pub mod answer;
pub mod duration;
pub mod json_edit;
pub mod json_number;
pub mod json_scanner;
pub mod json_stream;
pub mod request;
pub mod response;
pub mod sse;
pub mod upstream_error;
pub mod usage;
