//! A Sentinel whose answers a test decides: the address of the primary of the service `weir`.

use std::net::SocketAddr;

use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// One Sentinel. Gateways that ask different Sentinels may get different answers.
#[derive(Debug)]
pub struct Sentinel {
    address: SocketAddr,
    primary: watch::Sender<Option<SocketAddr>>,
}

impl Sentinel {
    /// A Sentinel that names `primary`, until `shutdown`.
    pub async fn start(primary: SocketAddr, shutdown: &CancellationToken) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let primary = watch::Sender::new(Some(primary));
        let told = primary.subscribe();
        let serving = async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, told.clone()));
            }
        };
        let shutdown = shutdown.clone();
        tokio::spawn(async move { shutdown.run_until_cancelled(serving).await });
        Self { address, primary }
    }

    /// Its address as `--redis` takes it.
    pub fn url(&self) -> String {
        format!("redis+sentinel://{}/weir", self.address)
    }

    /// Names another primary from now on.
    pub fn say(&self, primary: SocketAddr) {
        self.primary.send_replace(Some(primary));
    }

    /// Answers nobody from now on.
    pub fn silence(&self) {
        self.primary.send_replace(None);
    }
}

/// Answers on one connection until it ends.
async fn serve(stream: TcpStream, mut told: watch::Receiver<Option<SocketAddr>>) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    while let Some(words) = command(&mut read).await {
        let Ok(primary) = told.wait_for(Option::is_some).await.map(|primary| *primary) else { return };
        let Some(primary) = primary else { return };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let answer = match words[..] {
            ["SENTINEL", "MASTERS"] => {
                let (ip, port) = (primary.ip().to_string(), primary.port().to_string());
                let fields = ["name", "weir", "ip", &ip, "port", &port, "flags", "master"];
                let fields: String =
                    fields.iter().map(|word| format!("${}\r\n{word}\r\n", word.len())).collect();
                format!("*1\r\n*8\r\n{fields}")
            }
            ["ROLE"] => "*2\r\n$8\r\nsentinel\r\n*1\r\n$4\r\nweir\r\n".to_owned(),
            ["SENTINEL", "SLAVES" | "REPLICAS", _] => "*0\r\n".to_owned(),
            ["HELLO", ..] => "-ERR unknown command 'HELLO'\r\n".to_owned(),
            _ => "+OK\r\n".to_owned(),
        };
        if write.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// The words of the next command: an array of strings, as clients send it.
async fn command(read: &mut (impl AsyncBufRead + Unpin)) -> Option<Vec<String>> {
    let count = number(read, '*').await?;
    let mut words = Vec::new();
    for _ in 0..count {
        let mut word = vec![0; number(read, '$').await? + 2];
        read.read_exact(&mut word).await.ok()?;
        word.truncate(word.len() - 2);
        words.push(String::from_utf8(word).ok()?);
    }
    Some(words)
}

/// Reads a line of a mark and a number.
async fn number(read: &mut (impl AsyncBufRead + Unpin), mark: char) -> Option<usize> {
    let mut line = String::new();
    read.read_line(&mut line).await.ok()?;
    line.trim_end().strip_prefix(mark)?.parse().ok()
}
