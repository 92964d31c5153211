//! A backend that does what the header `x-client-request-id` of a request says; gateways forward that header.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// An answer that is not streamed.
pub(crate) const ANSWER: &str = r#"{"id":"x","object":"chat.completion","model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;
/// Between two events of `slow`.
pub(crate) const SLOW_EVERY: Duration = Duration::from_millis(100);
/// Bytes of the content of an answer `big`.
pub(crate) const BIG_BYTES: usize = 4 << 20;
/// What `fast` and `line` write at once.
const BURST_BYTES: usize = 64 << 10;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub(crate) struct Arrived {
    /// From the request line to the empty line.
    pub(crate) head: String,
    /// The body.
    pub(crate) body: Vec<u8>,
}

impl Arrived {
    /// The values of a header.
    pub(crate) fn values(&self, name: &str) -> Vec<&str> {
        let fields = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        fields.filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
    }
}

/// The backend; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Backend {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    arrived: Arc<Mutex<Vec<Arrived>>>,
    task: AbortHandle,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Backend {
    /// On a free port.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let arrived = Arc::new(Mutex::new(Vec::new()));
        let log = arrived.clone();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let log = log.clone();
                // A gateway that leaves ends it.
                tokio::spawn(async move { serve(socket, &log).await });
            }
        });
        Self { address, arrived, task: task.abort_handle() }
    }

    /// Every request but health checks, in order of arrival.
    pub(crate) fn arrived(&self) -> Vec<Arrived> {
        self.arrived.lock().expect("nobody panicked").clone()
    }
}

async fn serve(mut socket: TcpStream, log: &Mutex<Vec<Arrived>>) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let mut buffer = Vec::new();
    loop {
        let Some(end) = fill(&mut socket, &mut buffer, |have| {
            have.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
        })
        .await?
        else {
            return Ok(());
        };
        let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
        buffer.drain(..end);
        let mut request = Arrived { head, body: Vec::new() };
        let length = request.values("content-length").first().map_or(0, |n| n.parse().expect("a length"));
        if fill(&mut socket, &mut buffer, |have| (have.len() >= length).then_some(length)).await?.is_none() {
            return Ok(());
        }
        request.body = buffer.drain(..length).collect();
        if request.head.starts_with("GET ") {
            let list = r#"{"object":"list","data":[{"id":"m"},{"id":"short"}]}"#;
            socket.write_all(whole("200 OK", "", list).as_bytes()).await?;
            continue;
        }
        let act = request.values("x-client-request-id").first().copied().unwrap_or("ok").to_owned();
        log.lock().expect("nobody panicked").push(request);
        perform(&act, &mut socket).await?;
    }
}

/// Reads until `enough` says where what is wanted ends; nothing once the peer has closed.
async fn fill(
    socket: &mut TcpStream,
    buffer: &mut Vec<u8>,
    enough: impl Fn(&[u8]) -> Option<usize>,
) -> std::io::Result<Option<usize>> {
    loop {
        if let Some(end) = enough(buffer) {
            return Ok(Some(end));
        }
        if socket.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn whole(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    )
}

fn chunk(bytes: &str) -> String {
    format!("{:x}\r\n{bytes}\r\n", bytes.len())
}

/// An event of a stream with this content.
pub(crate) fn event(content: &str) -> String {
    format!(
        "data: {{\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"model\":\"m\",\"choices\":[{{\"index\":0,\
         \"delta\":{{\"content\":\"{content}\"}},\"finish_reason\":null}}]}}\n\n"
    )
}

const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const DONE: &str = "data: [DONE]\n\n";

async fn perform(act: &str, socket: &mut TcpStream) -> std::io::Result<()> {
    let mut say = String::new();
    match act.split_once('-').unwrap_or((act, "")) {
        // Events as fast as they are taken, without an end.
        ("fast", _) => {
            socket.write_all(STREAM.as_bytes()).await?;
            let one = event(&"a".repeat(1000));
            let burst = chunk(&one.repeat(BURST_BYTES / one.len()));
            loop {
                socket.write_all(burst.as_bytes()).await?;
            }
        }
        // One line that never ends.
        ("line", _) => {
            socket.write_all(STREAM.as_bytes()).await?;
            socket.write_all(chunk(&event("a")).as_bytes()).await?;
            socket.write_all(chunk("data: ").as_bytes()).await?;
            let burst = chunk(&"a".repeat(BURST_BYTES));
            loop {
                socket.write_all(burst.as_bytes()).await?;
            }
        }
        // `slow-N`: N events, one each `SLOW_EVERY`, then the end.
        ("slow", count) => {
            socket.write_all(STREAM.as_bytes()).await?;
            for _ in 0..count.parse::<u32>().unwrap_or(u32::MAX) {
                socket.write_all(chunk(&event("a")).as_bytes()).await?;
                tokio::time::sleep(SLOW_EVERY).await;
            }
            say += &(chunk(DONE) + "0\r\n\r\n");
        }
        // An answer of some MiB that is not streamed.
        ("big", _) => {
            say += &whole("200 OK", "", &ANSWER.replace("hi", &"a".repeat(BIG_BYTES)));
        }
        // A stream whose content looks like the end of a stream.
        ("escaped", _) => {
            let content = event(r"\n\ndata: [DONE]\n\n");
            say += &(STREAM.to_owned()
                + &chunk(&content)
                + &chunk(&event("after"))
                + &chunk(DONE)
                + "0\r\n\r\n");
        }
        // `status-NNN`: this status, and a place to go to.
        ("status", code) => say += &whole(&format!("{code} X"), "location: /redirected\r\n", "{}"),
        _ => say += &whole("200 OK", "", ANSWER),
    }
    socket.write_all(say.as_bytes()).await
}
