//! The wire contract of Weir, and its translation into checked domain types.
//!
//! * [`v1`]: what `weir/v1/*.proto` generates, nothing added.
//! * [`envoy`]: the wire contract of Envoy's rate limit service.
//! * [`etcd`]: the part of etcd's API that the control plane's store speaks.
//! * [`resource`]: the same resources as values that hold only what is valid: defaults filled in, durations as
//!   [`std::time::Duration`], names parsed. [`resource::Resource::try_from`] is the only judge of a wire resource.
//! * [`latency`]: the intervals in which latencies are counted.
//! * [`status`]: gRPC errors that name the fields that are wrong.
//! * [`manifest`]: the YAML that operators write, to and from [`v1::Resource`].
//! * [`money`]: amounts in dollars, as people read them.
//! * [`questions`]: answers about limits and usage as JSON.
//! * [`mod@reference`]: kinds, fields and values with their comments, for people who write that YAML.

pub mod latency;
pub mod manifest;
pub mod money;
pub mod questions;
pub mod reference;
pub mod resource;
pub mod status;

pub mod v1 {
    //! Generated from `weir/v1/*.proto`.
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        unreachable_pub,
        reason = "generated; documented in the .proto files"
    )]
    tonic::include_proto!("weir.v1");
}

pub mod envoy {
    //! Generated from `envoy/`: Envoy's rate limit service, at the paths Envoy gives it.
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        unreachable_pub,
        reason = "generated; documented in the .proto files"
    )]
    pub mod config {
        pub mod core {
            pub mod v3 {
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }
    pub mod extensions {
        pub mod common {
            pub mod ratelimit {
                pub mod v3 {
                    tonic::include_proto!("envoy.extensions.common.ratelimit.v3");
                }
            }
        }
    }
    pub mod service {
        pub mod ratelimit {
            pub mod v3 {
                tonic::include_proto!("envoy.service.ratelimit.v3");
            }
        }
    }
    pub mod r#type {
        pub mod v3 {
            tonic::include_proto!("envoy.r#type.v3");
        }
    }
}

pub mod etcd {
    //! Generated from `etcd/rpc.proto`.
    #![allow(
        missing_docs,
        clippy::all,
        clippy::pedantic,
        unreachable_pub,
        reason = "generated; documented in etcd's own files"
    )]
    tonic::include_proto!("etcdserverpb");
}

/// The compiled descriptors of every file, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
