//! The actions of clients.

use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use weir_tests::cluster::KEY;
use weir_tests::random::Random;

use super::script::ACTS;
use super::{SELDOM_KEY, TOTAL};
use crate::lab::http1::{self, post};
use crate::lab::http2::{
    self, DATA, END_STREAM, GOAWAY, HEADERS, Http2, INITIAL_WINDOW_SIZE, Next, RST_STREAM,
};
use crate::lab::{SOON, connect, connect_narrow};

/// The result of a way out.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// Requests whose head was sent completely.
    pub(super) sent: u64,
    /// The statuses of answers whose head arrived.
    pub(super) statuses: Vec<u16>,
}

type Acting = Pin<Box<dyn Future<Output = Heard> + Send>>;

/// A client that takes nothing is cut within this time.
const UNTIL_CUT: Duration = TOTAL.saturating_add(Duration::from_millis(1500));

/// The longest silence of an answer.
const QUIET: Duration = UNTIL_CUT;
/// A body of which nothing more arrives is waited for for ten seconds.
const UNTIL_SLOW: Duration = Duration::from_secs(13);

/// Requests as HTTP/1 bytes.
struct Request {
    bytes: Vec<u8>,
    /// Heads in it that the gateway accepts.
    heads: u64,
    /// The start of the last body.
    body_at: usize,
    act: String,
}

fn act(draw: &mut Random) -> String {
    let act = draw.one_of(&ACTS);
    if draw.chance(30) { format!("first-{act}") } else { act.to_owned() }
}

fn body(draw: &mut Random) -> String {
    let model = draw.one_of(&["gpt-4.1", "gpt-4.1", "gpt-4.1", "passing"]);
    let stream = draw.chance(60);
    format!(
        r#"{{"model":"{model}","stream":{stream},"max_tokens":64,"messages":[{{"role":"user","content":"hi"}}]}}"#
    )
}

fn good(draw: &mut Random, close: bool) -> Request {
    let (act, body) = (act(draw), body(draw));
    let connection = if close { "Connection: close\r\n" } else { "" };
    let length = body.len();
    let mut head =
        format!("{}X-Client-Request-Id: {act}\r\n{connection}Content-Length: {length}\r\n\r\n", post());
    if draw.chance(10) {
        head = head.replace(KEY, SELDOM_KEY);
    }
    let bytes = [head.as_bytes(), body.as_bytes()].concat();
    Request { bytes, heads: 1, body_at: head.len(), act }
}

/// A request that is refused.
fn bad(draw: &mut Random) -> Request {
    let (body, post) = (http1::body("gpt-4.1", draw.chance(50)), post());
    let length = body.len();
    let with_body =
        |head: String, body: &str| (format!("{head}Content-Length: {}\r\n\r\n{body}", body.len()), 1);
    let close = format!("{post}Connection: close\r\n");
    let (act, (text, heads)) = match draw.below(12) {
        0 => ("wrong-key", with_body(close.replace(KEY, "weir_other"), &body)),
        1 => ("no-key", with_body(close.replace("Authorization", "X-Other"), &body)),
        2 => ("unknown-model", with_body(close, &body.replace("gpt-4.1", "nobody"))),
        3 => ("no-json", with_body(close, "{\"model\":")),
        4 => ("unknown-route", with_body(close.replace("/v1/chat", "/v2/chat"), &body)),
        5 => ("wrong-method", (format!("{}\r\n", close.replace("POST", "GET")), 1)),
        6 => ("encoded", with_body(format!("{close}Content-Encoding: gzip\r\n"), &body)),
        7 => ("too-large", (format!("{close}Content-Length: {}\r\n\r\n{body}", 17 << 20), 1)),
        8 => ("broken-chunk", (format!("{close}Transfer-Encoding: chunked\r\n\r\n5\r\nhellowhat\r\n"), 1)),
        9 => (
            "half-a-chunked-body",
            (format!("{close}Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n"), 1),
        ),
        10 => ("two-lengths", (format!("{close}Content-Length: 1\r\nContent-Length: 2\r\n\r\n{body}"), 0)),
        _ => ("bad-field", (format!("{close}Bad Field: x\r\n\r\n"), 0)),
    };
    Request { body_at: text.len(), bytes: text.into_bytes(), heads, act: act.into() }
}

/// How a client leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaves {
    /// It reads to the end.
    AtTheEnd,
    /// It closes its side and reads to the end.
    HalfClosed,
    /// During the head of its request.
    InItsHead,
    /// During the body of its request.
    InItsBody,
    /// As soon as it has sent everything.
    AtOnce,
    /// A little later, without reading.
    Later,
    /// With the first bytes of the answer.
    WithTheFirstBytes,
    /// It takes nothing until it is cut.
    WhenCut,
    /// It never sends the rest of its body.
    WithoutItsBody,
}

/// Draws a way out: its name, and its client.
pub(super) fn way(draw: &mut Random, gateway: SocketAddr) -> (String, Acting) {
    match draw.below(100) {
        0..30 => streams(draw, gateway),
        30..45 => {
            let request = bad(draw);
            let leaves = draw.one_of(&[Leaves::AtTheEnd, Leaves::AtTheEnd, Leaves::AtOnce, Leaves::Later]);
            old(draw, gateway, request, leaves, "refused")
        }
        45..55 => {
            // One behind the other, before the first is answered.
            let count = 2 + draw.below(3);
            let mut all = Request { bytes: Vec::new(), heads: 0, body_at: 0, act: String::new() };
            for number in 1..=count {
                let one = good(draw, number == count);
                all.body_at = all.bytes.len() + one.body_at;
                all.bytes.extend(one.bytes);
                all.heads += 1;
                all.act = one.act;
            }
            let leaves = draw.one_of(&[
                Leaves::AtTheEnd,
                Leaves::AtTheEnd,
                Leaves::Later,
                Leaves::InItsBody,
                Leaves::HalfClosed,
            ]);
            old(draw, gateway, all, leaves, "pipelined")
        }
        _ => {
            let close = draw.chance(80);
            let request = good(draw, close);
            let leaves = match draw.below(100) {
                0..35 => Leaves::AtTheEnd,
                35..43 => Leaves::HalfClosed,
                43..48 => Leaves::InItsHead,
                48..53 => Leaves::InItsBody,
                53..63 => Leaves::AtOnce,
                63..78 => Leaves::Later,
                78..91 => Leaves::WithTheFirstBytes,
                91..98 => Leaves::WhenCut,
                _ => Leaves::WithoutItsBody,
            };
            old(draw, gateway, request, leaves, "http1")
        }
    }
}

/// HTTP/1.
fn old(
    draw: &mut Random,
    gateway: SocketAddr,
    request: Request,
    leaves: Leaves,
    kind: &str,
) -> (String, Acting) {
    let name = format!("{kind} {} {leaves:?}", request.act);
    let (resets, later) = (draw.chance(50), draw.pause(600));
    let Request { bytes, heads, body_at, .. } = request;
    let cut_at = match leaves {
        Leaves::InItsHead => usize::try_from(draw.below(body_at as u64)).expect("small"),
        Leaves::InItsBody | Leaves::WithoutItsBody => body_at + (bytes.len() - body_at) / 2,
        _ => bytes.len(),
    };
    let mut sent = heads;
    if leaves == Leaves::InItsHead {
        sent = sent.saturating_sub(1);
    }
    let acting = async move {
        let mut socket = match leaves {
            Leaves::WhenCut | Leaves::Later => connect_narrow(gateway).await,
            _ => connect(gateway).await,
        };
        let all = &bytes[..cut_at];
        let mut heard = Heard { sent, ..Heard::default() };
        let mut answers = Vec::new();
        let (mut reader, mut writer) = socket.split();
        // The gateway may refuse before it has read everything.
        let sending = async {
            let _ = writer.write_all(all).await;
        };
        match leaves {
            Leaves::AtTheEnd | Leaves::WithoutItsBody => {
                let quiet = if leaves == Leaves::AtTheEnd { QUIET } else { UNTIL_SLOW };
                let (read, ()) = tokio::join!(http1::listen(&mut reader, quiet), sending);
                answers = read.bytes;
            }
            Leaves::HalfClosed => {
                sending.await;
                let _ = writer.shutdown().await;
                answers = http1::listen(&mut reader, QUIET).await.bytes;
            }
            Leaves::InItsHead | Leaves::InItsBody | Leaves::AtOnce => sending.await,
            Leaves::Later => {
                sending.await;
                sleep(later).await;
            }
            Leaves::WithTheFirstBytes => {
                sending.await;
                // What came with it is read as well.
                let _ = timeout(SOON, reader.read_buf(&mut answers)).await;
            }
            Leaves::WhenCut => {
                sending.await;
                sleep(UNTIL_CUT).await;
                answers = http1::listen(&mut reader, Duration::from_millis(100)).await.bytes;
            }
        }
        leave(socket, resets);
        if heads > 0 {
            heard.statuses = http1::Heard { bytes: answers, end: http1::End::Open }.statuses();
        }
        heard
    };
    (name, Box::pin(acting))
}

fn leave(socket: TcpStream, resets: bool) {
    if resets {
        // It may have left already.
        let _ = socket.set_zero_linger();
    }
    drop(socket);
}

/// HTTP/2: some streams of one connection.
fn streams(draw: &mut Random, gateway: SocketAddr) -> (String, Acting) {
    /// The actions on a connection.
    #[derive(Debug, Clone, Copy)]
    enum Leaves {
        AtTheEnd,
        ByResets,
        ByResetsAtOnce,
        AtOnce,
        Later,
        WhenCut,
    }
    let leaves = match draw.below(100) {
        0..40 => Leaves::AtTheEnd,
        40..60 => Leaves::ByResets,
        60..70 => Leaves::ByResetsAtOnce,
        70..80 => Leaves::AtOnce,
        80..90 => Leaves::Later,
        _ => Leaves::WhenCut,
    };
    let window = draw.one_of(&[0, 1, 1000, 65_535, 65_535, 65_535, (1 << 31) - 1]);
    let count = u32::try_from(draw.one_of(&[1, 1, 2, 5, 12])).expect("small");
    let later = draw.pause(800);
    let mut bytes = Vec::new();
    let mut acts = Vec::new();
    for number in 0..count {
        let id = 1 + 2 * number;
        let mut act = act(draw);
        let mut fields = http2::fields("POST", "/v1/chat/completions");
        let mut body = body(draw).into_bytes();
        let mut whole = true;
        match draw.below(20) {
            0 => {
                fields.retain(|(name, _)| name != b"authorization");
                act = "no-key".into();
            }
            1 => {
                body = b"{\"model\":\"nobody\",\"messages\":[]}".to_vec();
                act = "unknown-model".into();
            }
            2 => {
                body.truncate(7);
                act = "no-json".into();
            }
            3 if matches!(leaves, Leaves::ByResets | Leaves::Later | Leaves::AtOnce) => {
                whole = false;
                act = "half-a-body".into();
            }
            _ => {}
        }
        fields.push((b"content-type".to_vec(), b"application/json".to_vec()));
        fields.push((b"x-client-request-id".to_vec(), act.clone().into_bytes()));
        bytes.extend(http2::headers(id, &fields, false));
        let end = if whole { END_STREAM } else { 0 };
        bytes.extend(http2::frame(DATA, end, id, &body));
        acts.push(act);
    }
    let resets: Vec<u32> = (0..count).map(|number| 1 + 2 * number).filter(|_| draw.chance(70)).collect();
    let is_rude = draw.chance(50);
    let name = format!("http2 {count} streams, window {window}, {} {leaves:?}", acts[0]);
    let acting = async move {
        let mut heard = Heard { sent: u64::from(count), ..Heard::default() };
        let settings = [(INITIAL_WINDOW_SIZE, window)];
        let mut connection = Http2::over(connect_narrow(gateway).await, &settings).await;
        if !connection.send(&bytes).await {
            return heard;
        }
        let reset = |streams: &[u32]| streams.iter().flat_map(|id| http2::reset(*id)).collect::<Vec<_>>();
        let mut open = count;
        match leaves {
            Leaves::AtOnce => {}
            Leaves::Later => sleep(later).await,
            Leaves::ByResetsAtOnce => {
                let _ = connection.send(&reset(&resets)).await;
                open -= resets.len() as u32;
                listen(&mut connection, open, TOTAL, &mut heard).await;
            }
            Leaves::ByResets => {
                listen(&mut connection, open, later, &mut heard).await;
                let _ = connection.send(&reset(&resets)).await;
            }
            Leaves::WhenCut => sleep(UNTIL_CUT).await,
            Leaves::AtTheEnd => listen(&mut connection, open, UNTIL_CUT, &mut heard).await,
        }
        if is_rude {
            return heard;
        }
        let _ = connection.send(&http2::frame(GOAWAY, 0, 0, &[0; 8])).await;
        listen(&mut connection, open, Duration::from_millis(50), &mut heard).await;
        heard
    };
    (name, Box::pin(acting))
}

/// Reads frames until this number of streams have ended, for at most this time. The windows of streams are not given
/// back.
async fn listen(connection: &mut Http2, mut open: u32, time: Duration, heard: &mut Heard) {
    let reading = async {
        while open > 0 {
            let Next::Frame(frame) = connection.next(SOON).await else { return };
            heard.statuses.extend(frame.status());
            let ends = match frame.kind {
                RST_STREAM => true,
                HEADERS | DATA => frame.flags & END_STREAM != 0,
                _ => false,
            };
            open -= u32::from(ends);
        }
    };
    let _ = timeout(time, reading).await;
}
