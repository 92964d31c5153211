//! A connection between a client and a server that can be cut, kept from coming back, and silenced in one direction
//! or both.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Bytes that one direction holds. A silent direction blocks its sender.
const BUFFER_BYTES: usize = 16 << 10;

/// One line. All connections over it share its state.
#[derive(Debug, Clone)]
pub struct Line {
    /// The address for the client.
    pub address: SocketAddr,
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Counts cuts. Connections of an earlier count are broken.
    cuts: u64,
    /// New connections are broken at once.
    down: bool,
    /// Nothing passes, and nothing breaks.
    silent: Silent,
}

#[derive(Debug, Clone, Copy, Default)]
struct Silent {
    to_server: bool,
    to_client: bool,
}

impl Line {
    /// A line to a server, until `shutdown`.
    pub async fn to(server: SocketAddr, shutdown: &CancellationToken) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let state = watch::Sender::new(State::default());
        let serving = serve(listener, server, state.subscribe());
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(serving).await });
        Self { address, state }
    }

    /// Breaks every connection, new ones included, until it is [mended](Self::mend).
    pub fn cut(&self) {
        self.state.send_modify(|state| {
            state.cuts += 1;
            state.down = true;
        });
    }

    /// Lets nothing pass, without breaking a connection, until it is mended.
    pub fn silence(&self) {
        self.state.send_modify(|state| state.silent = Silent { to_server: true, to_client: true });
    }

    /// The same for the client's bytes only.
    pub fn silence_to_server(&self) {
        self.state.send_modify(|state| state.silent.to_server = true);
    }

    /// The same for the server's bytes only.
    pub fn silence_to_client(&self) {
        self.state.send_modify(|state| state.silent.to_client = true);
    }

    /// Repairs it. Bytes that were written while it was silent arrive.
    pub fn mend(&self) {
        self.state.send_modify(|state| (state.down, state.silent) = (false, Silent::default()));
    }
}

async fn serve(listener: TcpListener, server: SocketAddr, state: watch::Receiver<State>) {
    while let Ok((client, _)) = listener.accept().await {
        let now = *state.borrow();
        if now.down {
            continue;
        }
        let state = state.clone();
        tokio::spawn(async move {
            let Ok(server) = TcpStream::connect(server).await else { return };
            for side in [&client, &server] {
                let _ = side.set_nodelay(true);
            }
            let ((from_client, to_client), (from_server, to_server)) =
                (client.into_split(), server.into_split());
            let mut cut = state.clone();
            // When one direction ends, both are dropped.
            tokio::select! {
                () = pump(from_client, to_server, state.clone(), |silent| silent.to_server) => {}
                () = pump(from_server, to_client, state, |silent| silent.to_client) => {}
                _ = cut.wait_for(|state| state.cuts != now.cuts) => {}
            }
        });
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    is_silent: fn(&Silent) -> bool,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else { return };
        if state.wait_for(|state| !is_silent(&state.silent)).await.is_err()
            || to.write_all(&buffer[..count]).await.is_err()
        {
            return;
        }
    }
}
