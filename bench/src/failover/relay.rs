//! A TCP relay that can go dark: it accepts nothing and passes nothing on, like a network that drops every packet.
//! For all callers, or for those with a given credential.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The bytes that are passed on at once.
const BUFFER_BYTES: usize = 16 << 10;

/// The text before a caller's credential on the wire.
const AUTHORIZATION: &[u8] = b"authorization: Bearer ";

/// The callers for whom the relay is dark.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Dark {
    all: bool,
    callers: BTreeSet<String>,
}

impl Dark {
    fn for_caller(&self, caller: &OnceLock<String>) -> bool {
        self.all || caller.get().is_some_and(|caller| self.callers.contains(caller))
    }
}

/// A relay to one server. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    dark: watch::Sender<Dark>,
    _task: JoinSet<()>,
}

impl Relay {
    /// Starts one.
    pub(crate) async fn start(to: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("the relay's port")?;
        let address = listener.local_addr().context("the relay's port")?;
        let (dark, watched) = watch::channel(Dark::default());
        let mut task = JoinSet::new();
        task.spawn(serve(listener, to, watched));
        Ok(Self { address, dark, _task: task })
    }

    /// Goes dark, or passes on what was held back.
    pub(super) fn set_dark(&self, dark: bool) {
        self.dark.send_replace(Dark { all: dark, ..Dark::default() });
    }

    /// Goes dark for the callers with these credentials.
    pub(crate) fn cut_off(&self, callers: BTreeSet<String>) {
        self.dark.send_replace(Dark { all: false, callers });
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, mut dark: watch::Receiver<Dark>) {
    let mut connections = JoinSet::new();
    loop {
        if dark.wait_for(|dark| !dark.all).await.is_err() {
            return;
        }
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                connections.spawn(pass(client, to, dark.clone()));
            }
            changed = dark.changed() => if changed.is_err() { return },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn pass(client: TcpStream, to: SocketAddr, dark: watch::Receiver<Dark>) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Known with the first request; the server sends nothing before.
    let caller = Arc::new(OnceLock::new());
    // If one side ends, the other one is closed too.
    tokio::select! {
        () = pump(from_client, to_server, dark.clone(), &caller) => {}
        () = pump(from_server, to_client, dark, &caller) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut dark: watch::Receiver<Dark>,
    caller: &OnceLock<String>,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let Ok(length) = from.read(&mut buffer).await else { return };
        if caller.get().is_none()
            && let Some(name) = credential(&buffer[..length])
        {
            // Both directions may find the credential, but only once.
            let _ = caller.set(name);
        }
        // The end of a connection is not passed on either.
        if dark.wait_for(|dark| !dark.for_caller(caller)).await.is_err() || length == 0 {
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// The credential of a request.
fn credential(head: &[u8]) -> Option<String> {
    let at = head.windows(AUTHORIZATION.len()).position(|w| w.eq_ignore_ascii_case(AUTHORIZATION))?;
    let rest = &head[at + AUTHORIZATION.len()..];
    let end = rest.iter().position(|byte| *byte == b'\r')?;
    String::from_utf8(rest[..end].to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_are_known_by_what_they_send() {
        let head = b"HEAD /health HTTP/1.1\r\nhost: b\r\nauthorization: Bearer g1\r\n\r\n";
        let caller = OnceLock::new();
        assert_eq!(credential(head).as_deref(), Some("g1"));
        assert_eq!(credential(b"HEAD / HTTP/1.1\r\n\r\n"), None);
        let dark = Dark { all: false, callers: ["g1".to_owned()].into() };
        assert!(!dark.for_caller(&caller));
        caller.set("g1".to_owned()).expect("once");
        assert!(dark.for_caller(&caller) && !Dark::default().for_caller(&caller));
    }
}
