//! What happens to a streamed answer on its way to the client.
//!
//! [`sse`] finds the events in a stream of bytes, [`meter`] reads facts from them and changes the few bytes that must
//! change. Both are pure: bytes in, bytes out, no clock.

pub mod meter;
pub mod sse;
