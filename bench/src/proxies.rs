//! nginx and haproxy as plain reverse proxies with keep-alive connections on both sides, with their files in the
//! bench's own directory: the proxies that Weir is compared with.
//!
//! No access log anywhere, buffering off (streams must pass), as many workers or threads as cores.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::bail;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::process::{Process, free_port, installed};

/// It must listen within this time.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A proxy in front of some servers.
#[derive(Debug)]
pub(crate) struct Proxy {
    /// The process; its workers are its children.
    pub(crate) process: Process,
    /// The address of each server behind it, in the given order.
    pub(crate) addresses: Vec<SocketAddr>,
}

/// Which proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// nginx.
    Nginx,
    /// haproxy.
    Haproxy,
}

impl Kind {
    /// The program.
    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
        }
    }

    /// Whether it can be run here.
    pub(crate) fn installed(self) -> bool {
        installed(self.program())
    }

    /// Its version, as it says it.
    pub(crate) async fn version(self) -> String {
        let done = Command::new(self.program()).arg("-v").output().await;
        let text = done.map(|o| [o.stdout, o.stderr].concat()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().next().unwrap_or("unknown version").to_owned()
    }
}

impl Proxy {
    /// Starts a proxy with one listener per server.
    pub(crate) async fn start(kind: Kind, servers: &[SocketAddr], directory: &Path) -> anyhow::Result<Self> {
        let mut addresses = Vec::new();
        for _ in servers {
            addresses.push(SocketAddr::from(([127, 0, 0, 1], free_port()?)));
        }
        let file = directory.join(format!("{}.conf", kind.program()));
        let mut command = Command::new(kind.program());
        match kind {
            Kind::Nginx => {
                std::fs::write(&file, nginx(servers, &addresses, directory))?;
                command.arg("-e").arg("stderr").arg("-p").arg(directory).arg("-c").arg(&file);
            }
            Kind::Haproxy => {
                std::fs::write(&file, haproxy(servers, &addresses))?;
                command.arg("-db").arg("-q").arg("-f").arg(&file);
            }
        }
        let process = Process::start(kind.program(), command, directory)?;
        let listens = async {
            for address in &addresses {
                while TcpStream::connect(address).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        };
        if tokio::time::timeout(START_TIMEOUT, listens).await.is_err() {
            bail!("{} does not listen: {}", kind.program(), process.log_tail());
        }
        Ok(Self { process, addresses })
    }
}

fn nginx(servers: &[SocketAddr], addresses: &[SocketAddr], directory: &Path) -> String {
    let at = directory.display();
    let mut text = format!(
        "daemon off;\npid {at}/nginx.pid;\nerror_log stderr error;\nworker_processes auto;\n\
         worker_rlimit_nofile 16384;\nevents {{ worker_connections 8192; }}\nhttp {{\n  access_log off;\n  \
         client_max_body_size 16m;\n  client_body_buffer_size 64k;\n  keepalive_requests 1000000000;\n"
    );
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = writeln!(text, "  {kind}_temp_path {at}/nginx_{kind};");
    }
    for (i, (server, address)) in servers.iter().zip(addresses).enumerate() {
        let _ = write!(
            text,
            "  upstream u{i} {{ server {server}; keepalive 1000; keepalive_requests 1000000000; }}\n  \
             server {{ listen {address}; location / {{ proxy_pass http://u{i}; proxy_http_version 1.1; \
             proxy_set_header Connection \"\"; proxy_buffering off; proxy_read_timeout 300s; }} }}\n"
        );
    }
    text.push_str("}\n");
    text
}

fn haproxy(servers: &[SocketAddr], addresses: &[SocketAddr]) -> String {
    let mut text =
        "global\n  maxconn 8192\ndefaults\n  mode http\n  timeout connect 10s\n  timeout client 300s\n  \
                    timeout server 300s\n  option http-keep-alive\n  http-reuse always\n"
            .to_owned();
    for (i, (server, address)) in servers.iter().zip(addresses).enumerate() {
        let _ = write!(
            text,
            "frontend f{i}\n  bind {address}\n  default_backend b{i}\nbackend b{i}\n  server s {server} \
             pool-max-conn 1000\n"
        );
    }
    text
}
