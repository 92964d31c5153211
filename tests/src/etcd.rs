//! An etcd cluster of a test's own. Each member is a process that can be killed and started again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

/// A cluster; it ends with the test.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Member>,
    flags: Vec<String>,
    /// The scheme of its clients.
    scheme: &'static str,
    data: TempDir,
}

#[derive(Debug)]
struct Member {
    client: u16,
    peer: u16,
    /// `None` while the member is dead.
    child: Option<Child>,
}

impl Etcd {
    /// Starts this many members and waits until they accept calls.
    pub async fn start(members: usize) -> Self {
        Self::with(members, &[]).await
    }

    /// The same with flags of the test's own.
    pub async fn with(members: usize, flags: &[&str]) -> Self {
        Self::spoken_to(members, flags, "http").await
    }

    /// One member with TLS: it shows `cert.pem` and `key.pem` of a directory and accepts clients with a certificate
    /// that its `ca.pem` signed.
    pub async fn secured(directory: &Path) -> Self {
        let file = |name: &str| directory.join(name).to_str().expect("UTF-8").to_owned();
        let (cert, key, ca) = (file("cert.pem"), file("key.pem"), file("ca.pem"));
        let flags =
            ["--cert-file", &cert, "--key-file", &key, "--trusted-ca-file", &ca, "--client-cert-auth"];
        Self::spoken_to(1, &flags, "https").await
    }

    async fn spoken_to(members: usize, flags: &[&str], scheme: &'static str) -> Self {
        // All ports are reserved at the same time, so that none is used twice.
        let mut free = Vec::new();
        for _ in 0..2 * members {
            free.push(TcpListener::bind("127.0.0.1:0").await.expect("a free port"));
        }
        let port = |listener: &TcpListener| listener.local_addr().expect("an address").port();
        let members =
            free.chunks(2).map(|two| Member { client: port(&two[0]), peer: port(&two[1]), child: None });
        let members: Vec<_> = members.collect();
        drop(free);
        let flags = flags.iter().map(ToString::to_string).collect();
        let mut etcd = Self { members, flags, scheme, data: tempfile::tempdir().expect("a directory") };
        for member in 0..etcd.members.len() {
            etcd.spawn(member);
        }
        etcd.ready().await;
        etcd
    }

    fn spawn(&mut self, member: usize) {
        let peer = |at: usize| format!("http://127.0.0.1:{}", self.members[at].peer);
        let all =
            (0..self.members.len()).map(|at| format!("m{at}={}", peer(at))).collect::<Vec<_>>().join(",");
        let client = format!("{}://127.0.0.1:{}", self.scheme, self.members[member].client);
        let child = Command::new("etcd")
            .args(["--name", &format!("m{member}"), "--initial-cluster", &all, "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer(member), "--initial-advertise-peer-urls", &peer(member)])
            .arg("--data-dir")
            .arg(self.directory(member))
            .args(&self.flags)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("etcd is needed: run `make tools`, or apt-get install etcd-server");
        self.members[member].child = Some(child);
    }

    async fn ready(&self) {
        for member in self.members.iter().filter(|member| member.child.is_some()) {
            // It listens once it has found the other members.
            crate::eventually("etcd listens", || async {
                TcpStream::connect(("127.0.0.1", member.client)).await.is_ok()
            })
            .await;
        }
    }

    /// The data directory of a member.
    pub fn directory(&self, member: usize) -> PathBuf {
        self.data.path().join(format!("m{member}"))
    }

    /// The store under a prefix, as `--store` takes it, over all members.
    pub fn url(&self, prefix: &str) -> String {
        self.url_of(&(0..self.members.len()).collect::<Vec<_>>(), prefix)
    }

    /// The same over some members.
    pub fn url_of(&self, members: &[usize], prefix: &str) -> String {
        let hosts = members.iter().map(|at| format!("127.0.0.1:{}", self.members[*at].client));
        let scheme = if self.scheme == "https" { "etcds" } else { "etcd" };
        format!("{scheme}://{}/{prefix}", hosts.collect::<Vec<_>>().join(","))
    }

    /// The store under a prefix, as `--store` takes it, with each member at another address.
    pub fn url_by(addresses: &[SocketAddr], prefix: &str) -> String {
        let hosts: Vec<_> = addresses.iter().map(ToString::to_string).collect();
        format!("etcd://{}/{prefix}", hosts.join(","))
    }

    /// The address of each member for clients.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.members.iter().map(|member| ([127, 0, 0, 1], member.client).into()).collect()
    }

    /// Kills a member.
    pub async fn kill(&mut self, member: usize) {
        let mut child = self.members[member].child.take().expect("it runs");
        child.kill().await.expect("killed");
    }

    /// Starts a member again with its data, and waits until it accepts calls.
    pub async fn restart(&mut self, member: usize) {
        self.spawn(member);
        self.ready().await;
    }

    /// The leader among the members.
    pub async fn leader(&self) -> usize {
        loop {
            for (at, member) in self.members.iter().enumerate().filter(|(_, member)| member.child.is_some()) {
                let Some(status) = post(member.client, "/v3/maintenance/status", &json!({})).await else {
                    continue;
                };
                if status["leader"].is_string() && status["leader"] == status["header"]["member_id"] {
                    return at;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Calls etcd's JSON API at a running member, as an operator does with curl.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        let member = self.members.iter().find(|member| member.child.is_some()).expect("one runs");
        post(member.client, path, body).await.unwrap_or_else(|| panic!("{path} is answered"))
    }

    /// Compacts all revisions before the current one.
    pub async fn compact(&self) {
        let range = self.post("/v3/kv/range", &json!({"key": "AA=="})).await;
        let revision = &range["header"]["revision"];
        self.post("/v3/kv/compaction", &json!({"revision": revision, "physical": true})).await;
    }
}

async fn post(port: u16, path: &str, body: &Value) -> Option<Value> {
    let body = body.to_string();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        Some(String::from_utf8_lossy(&answer).into_owned())
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), exchange).await.ok()??;
    // One JSON object, perhaps in chunks with their lengths around it.
    let (_, body) = answer.split_once("\r\n\r\n")?;
    serde_json::from_str(&body[body.find('{')?..=body.rfind('}')?]).ok()
}
