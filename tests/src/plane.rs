//! The control plane as a process, and a client of it.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use weir_proto::v1::WhoAmIRequest;
use weir_proto::v1::admin_service_client::AdminServiceClient;

use crate::process::command;

/// The token with all rights.
pub const ADMIN_TOKEN: &str = "admin-token-of-the-tests";

/// Sends the admin token with every call.
#[derive(Debug, Clone)]
pub struct Bearer(MetadataValue<Ascii>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// A client of the admin service.
pub type Admin = AdminServiceClient<InterceptedService<Channel, Bearer>>;

/// A running control plane.
#[derive(Debug)]
pub struct Plane {
    /// The process.
    pub child: Child,
    /// The address of its gRPC services.
    pub url: String,
    /// The address of its page.
    pub page: String,
}

/// Starts a control plane on this address with its store in a directory. `limit_kib` bounds the size of every file
/// that it writes, which has the effect of a full disk.
pub async fn start(listen: &str, data: &Path, limit_kib: Option<u64>) -> Plane {
    start_with(listen, data, limit_kib, &[]).await
}

/// The same with its store in etcd, at a URL as `--store` takes it.
pub async fn start_on(listen: &str, data: &Path, store: &str) -> Plane {
    start_with(listen, data, None, &["--store", store]).await
}

/// The same with more arguments.
pub async fn start_with(listen: &str, data: &Path, limit_kib: Option<u64>, more: &[&str]) -> Plane {
    let mut command = command("weir-control-plane");
    if let Some(kib) = limit_kib {
        // The shell sets the limit and ignores its signal, so that writing fails instead.
        let program = crate::process::binary("weir-control-plane");
        command = crate::process::command_of("sh");
        let line = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", kib * 2);
        command.arg("-c").arg(line).arg(program);
    }
    command
        .args(["--listen", listen, "--http-listen", "127.0.0.1:0", "--data-dir"])
        .arg(data)
        .args(more)
        .env("WEIR_ADMIN_TOKEN", ADMIN_TOKEN)
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let (url, page) = loop {
        let line = lines.next_line().await.expect("readable").expect("it serves before it ends");
        let Ok(line) = serde_json::from_str::<serde_json::Value>(&line) else { panic!("{line}") };
        if line["message"] == "control plane serves" {
            let url = |field: &str| format!("http://{}", line[field].as_str().expect("an address"));
            break (url("grpc"), url("http"));
        }
    };
    // Later log lines are read and discarded, so that the process never waits for the test.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Plane { child, url, page }
}

/// A client of the control plane at a URL, which need not exist yet.
pub fn admin_at(url: &str) -> Admin {
    let channel = Endpoint::from_shared(url.to_owned()).expect("a URL").connect_lazy();
    let value = format!("Bearer {ADMIN_TOKEN}").parse().expect("a header");
    AdminServiceClient::with_interceptor(channel, Bearer(value))
}

impl Plane {
    /// The address of its gRPC services, as `--listen` takes it.
    pub fn address(&self) -> String {
        self.url.trim_start_matches("http://").to_owned()
    }

    /// Whether this control plane is the leader.
    pub async fn leads(&self) -> bool {
        let answer = self.admin().await.who_am_i(WhoAmIRequest {}).await;
        answer.expect("answers").into_inner().leader
    }

    /// A client of its admin service.
    pub async fn admin(&self) -> Admin {
        let channel = Endpoint::from_shared(self.url.clone()).expect("a URL").connect().await.expect("there");
        let value = format!("Bearer {ADMIN_TOKEN}").parse().expect("a header");
        AdminServiceClient::with_interceptor(channel, Bearer(value))
    }

    /// Kills it.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("killed");
    }
}
