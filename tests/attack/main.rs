//! Attacks and faults, a row a test: strangers, slow clients, lying backends and failing machines, and what Weir
//! promises then. `SECURITY.md` and `docs/failures.md` name the test of each promise.

mod backend;
mod credentials;
mod dns;
mod edge_drain;
mod edge_grpc;
mod edge_http1;
mod edge_memory;
mod edge_refusals;
mod edge_silence;
mod edge_windows;
mod faults;
mod fleet;
mod forwarding;
mod headers;
mod http1;
mod http2;
mod json;
mod keys;
mod lab;
mod limit_service;
mod logs;
mod names;
mod ops;
mod partitions;
mod redis;
mod restarts;
mod rogue;
mod series;
mod tls;
mod watch;
mod ways_out;
