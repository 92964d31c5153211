//! The limit service from outside: its contract over memory and over a real Redis, and how it starts and ends.

mod envoy;
mod harness;
mod native;
mod process;
