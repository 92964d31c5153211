//! Compiles the contracts with protox, so that no protoc is needed, and keeps the descriptors for reflection.

use std::{env, fs, path::PathBuf};

const FILES: [&str; 8] = [
    // Envoy's rate limit service, as far as a server needs it.
    "envoy/service/ratelimit/v3/rls.proto",
    "weir/v1/resources.proto",
    "weir/v1/access.proto",
    "weir/v1/discovery_service.proto",
    "weir/v1/questions.proto",
    "weir/v1/report_service.proto",
    "weir/v1/admin_service.proto",
    "weir/v1/limit_service.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=weir");
    println!("cargo::rerun-if-changed=envoy");
    println!("cargo::rerun-if-changed=etcd");
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    tonic_prost_build::configure()
        .bytes(".weir.v1.VersionedResource.body")
        .compile_fds(compiler.file_descriptor_set())?;
    // Apart from the others: it is spoken to etcd, and served to nobody.
    let mut etcd = protox::Compiler::new(["etcd"])?;
    etcd.open_file("rpc.proto")?;
    tonic_prost_build::configure().build_server(false).bytes(".").compile_fds(etcd.file_descriptor_set())?;
    Ok(())
}
