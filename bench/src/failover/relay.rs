//! A TCP relay that can go dark: it accepts nothing and passes nothing on, as a network does that drops every packet
//! without a word.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Bytes passed on at once.
const BUFFER_BYTES: usize = 16 << 10;

/// A relay to one server; it ends when dropped.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) address: SocketAddr,
    dark: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Relay {
    /// Starts one.
    pub(super) async fn start(to: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("the relay's port")?;
        let address = listener.local_addr().context("the relay's port")?;
        let (dark, watched) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(serve(listener, to, watched));
        Ok(Self { address, dark, _task: task })
    }

    /// Goes dark, or passes on again what was held up.
    pub(super) fn set_dark(&self, dark: bool) {
        self.dark.send_replace(dark);
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, mut dark: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    loop {
        if dark.wait_for(|dark| !dark).await.is_err() {
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

async fn pass(client: TcpStream, to: SocketAddr, dark: watch::Receiver<bool>) {
    let Ok(server) = TcpStream::connect(to).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // When one side ends, so does the other.
    tokio::select! {
        () = pump(from_client, to_server, dark.clone()) => {}
        () = pump(from_server, to_client, dark) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut dark: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let Ok(length) = from.read(&mut buffer).await else { return };
        // Also the end of a connection goes unheard.
        if dark.wait_for(|dark| !dark).await.is_err() || length == 0 {
            return;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
