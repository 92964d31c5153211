//! The product from outside.

mod accounts;
mod answers;
mod apply;
mod budgets;
#[cfg(target_os = "linux")]
mod burst;
#[cfg(target_os = "linux")]
mod canary;
mod clock;
mod clocks;
mod commands;
mod control_plane;
mod dialects;
mod edge;
mod envoy;
mod errors;
mod evidence;
mod failover;
mod figures;
mod hard_slots;
mod health;
mod high_availability;
mod limits;
mod many_backends;
mod pains;
mod processes;
mod questions;
mod ratelimit;
mod readme;
mod redis_tls;
mod refused;
mod stack;
mod store;
mod streaming;
mod tls;
mod usage;
mod waiting;
