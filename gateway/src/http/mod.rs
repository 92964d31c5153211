//! The way of a request, from the accepted connection to the last byte of its answer.
//!
//! [`server`] accepts within [`bounds`]; [`pipeline`] is the way itself, top to bottom: `route`, [`authentication`],
//! [`request_body`], `admission`, `attempts` ([`attempt`] is one of them, `exchanges` are their calls, `hedge` says
//! when two run at once, `blame` which failures count, `slot_round` where they get slots, [`first_event`] how a stream
//! begins), `answer` and [`response_body`]; `keep_alive` speaks before. The
//! [`context`] of a request collects its facts and becomes its log line. [`headers`] says which headers pass, [`refusal`] how limits
//! are told to clients, [`cors`] which web pages may ask from a browser.

pub mod attempt;
pub mod authentication;
pub mod bounds;
pub mod context;
pub mod cors;
pub mod first_event;
pub mod gateway;
pub mod headers;
pub mod pipeline;
pub mod refusal;
pub mod request_body;
pub mod response_body;
pub mod retry_after;
pub mod server;

mod admission;
mod answer;
mod attempts;
mod blame;
mod call;
mod exchanges;
mod hedge;
mod joined;
mod keep_alive;
mod models;
mod others;
mod route;
mod slot_round;
