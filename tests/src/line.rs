//! A line between a client and a server: it can be cut, kept from coming back, and fall silent, in one direction or both.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Bytes that one direction holds at most; what is silent pushes back on who writes.
const BUFFER_BYTES: usize = 16 << 10;

/// One line; all connections over it share its fate.
#[derive(Debug, Clone)]
pub struct Line {
    /// Where the client finds the server.
    pub address: SocketAddr,
    state: watch::Sender<State>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// Connections of an earlier one are broken.
    cuts: u64,
    /// New connections are broken at once.
    down: bool,
    /// Nothing gets through, and nothing breaks.
    silent: Silent,
}

#[derive(Debug, Clone, Copy, Default)]
struct Silent {
    to_server: bool,
    to_client: bool,
}

impl Line {
    /// To a server, until `shutdown`.
    pub async fn to(server: SocketAddr, shutdown: &CancellationToken) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let state = watch::Sender::new(State::default());
        let serving = serve(listener, server, state.subscribe());
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(serving).await });
        Self { address, state }
    }

    /// Breaks every connection; new ones too, until it is [mended](Self::mend).
    pub fn cut(&self) {
        self.state.send_modify(|state| {
            state.cuts += 1;
            state.down = true;
        });
    }

    /// Lets nothing through, and breaks nothing, until it is mended.
    pub fn silence(&self) {
        self.state.send_modify(|state| state.silent = Silent { to_server: true, to_client: true });
    }

    /// The same for what the client sends only.
    pub fn silence_to_server(&self) {
        self.state.send_modify(|state| state.silent.to_server = true);
    }

    /// The same for what the server sends only.
    pub fn silence_to_client(&self) {
        self.state.send_modify(|state| state.silent.to_client = true);
    }

    /// Makes it whole again. What was written into a silent line arrives.
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
            // Whichever direction ends, both are dropped: a line has no half.
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
