//! The way of a request, from the accepted connection to the last byte of its answer.
//!
//! [`server`] accepts within [`bounds`]; [`pipeline`] is the way itself, top to bottom: [`authentication`],
//! [`request_body`], `admission`, `attempts` ([`attempt`] is one of them), `answer` and [`response_body`]. The
//! [`context`] of a request collects its facts and becomes its log line. [`headers`] says which headers pass, [`refusal`] how limits
//! are told to clients.

pub mod attempt;
pub mod authentication;
pub mod bounds;
pub mod context;
pub mod gateway;
pub mod headers;
pub mod pipeline;
pub mod refusal;
pub mod request_body;
pub mod response_body;
pub mod server;

mod admission;
mod answer;
mod attempts;
mod call;
mod models;
