//! Simulated OpenAI-compatible LLM server: a test bench for gateways and clients of LLM engines.
//!
//! It answers like a real engine (slots, queue, prefill and decode time, token streams, vLLM's metric names) and
//! misbehaves on command: every [`Faults`] field can be switched at run time, from inside the process through
//! [`Handle`] or over HTTP through `POST /admin/faults`.
//!
//! ```no_run
//! # async fn example() -> std::io::Result<()> {
//! use mock_llm::{Config, Server};
//! use tokio_util::sync::CancellationToken;
//!
//! let config = Config { models: vec!["gpt-4.1".into()], slots: 4, ..Config::default() };
//! let server = Server::bind("127.0.0.1:0", config).await?;
//! let (address, handle) = (server.local_addr(), server.handle());
//! let shutdown = CancellationToken::new();
//! let running = tokio::spawn(server.run(shutdown.clone()));
//! println!("http://{address} has answered {} requests", handle.counters().requests);
//! shutdown.cancel();
//! running.await?;
//! # Ok(())
//! # }
//! ```

// These macros panic if the stream is gone and hang if nobody reads it.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod admin;
mod body;
mod chat;
mod config;
mod connection;
mod engine;
mod error;
mod faults;
mod generate;
mod handle;
mod metrics;
mod oddities;
mod openai;
mod responses;
mod rng;
mod server;
mod text;

#[cfg(test)]
mod tests;

pub use config::{Config, InvalidConfig};
pub use faults::{
    CutAfterTokens, ErrorInStream, ErrorStatus, Faults, Garbage, GarbageAt, Hang, HangAt, InvalidFaults,
};
pub use handle::{Counters, Handle};
pub use oddities::{Reply, StreamTail, UsageForm};
pub use server::Server;
