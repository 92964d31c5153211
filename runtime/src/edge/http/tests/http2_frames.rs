//! An HTTP/2 client that sends each frame when a test tells it to.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

/// `:method: GET`, `:scheme: http`, `:path: /` and `:authority: weir`, encoded by HPACK.
const HEAD: &[u8] = b"\x82\x86\x84\x41\x04weir";
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// Types of frames (RFC 9113, 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Data = 0,
    Headers = 1,
    Settings = 4,
    Ping = 6,
    GoAway = 7,
    WindowUpdate = 8,
}

impl Kind {
    fn of(code: u8) -> Self {
        let all = [Self::Data, Self::Headers, Self::Settings, Self::Ping, Self::GoAway, Self::WindowUpdate];
        all.into_iter().find(|kind| *kind as u8 == code).expect("a known frame")
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Frames(DuplexStream);

impl Frames {
    /// Sends the preface and empty settings.
    pub(super) async fn begin(mut io: DuplexStream) -> Self {
        io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("written");
        let mut frames = Self(io);
        frames.send(Kind::Settings, 0, 0, &[]).await;
        frames
    }

    async fn send(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend([kind as u8, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).await.expect("written");
    }

    /// Sends a request.
    pub(super) async fn ask(&mut self, stream: u32) {
        self.send(Kind::Headers, END_HEADERS | END_STREAM, stream, HEAD).await;
    }

    /// The next frame with its flags, stream and payload; `None` at the end.
    async fn read(&mut self) -> Option<(Kind, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((Kind::of(kind), flags, u32::from_be_bytes(stream), payload))
    }

    /// The next frame other than settings and window updates; `None` at the end.
    pub(super) async fn next(&mut self) -> Option<(Kind, Vec<u8>)> {
        loop {
            match self.read().await? {
                (Kind::Settings, flags, ..) if flags & ACK == 0 => {
                    self.send(Kind::Settings, ACK, 0, &[]).await;
                }
                (Kind::Settings | Kind::WindowUpdate, ..) => {}
                (kind, _, _, payload) => return Some((kind, payload)),
            }
        }
    }

    /// Reads up to the end of an answer.
    pub(super) async fn answer_to(&mut self, stream: u32) {
        loop {
            match self.read().await.expect("closed before the answer") {
                (Kind::Settings, flags, ..) if flags & ACK == 0 => {
                    self.send(Kind::Settings, ACK, 0, &[]).await;
                }
                (Kind::Data, flags, of, _) if of == stream && flags & END_STREAM != 0 => return,
                _ => {}
            }
        }
    }

    /// The last stream in a GOAWAY.
    pub(super) async fn goaway(&mut self) -> u32 {
        loop {
            let (kind, payload) = self.next().await.expect("closed before it was told");
            if kind == Kind::GoAway {
                return last_stream(&payload);
            }
        }
    }

    /// Reads to the end. Returns the stream of the last answer, and the last stream in the last GOAWAY.
    pub(super) async fn last_answer_and_goaway(&mut self) -> (Option<u32>, Option<u32>) {
        let (mut answer, mut goaway) = (None, None);
        while let Some((kind, flags, stream, payload)) = self.read().await {
            match kind {
                Kind::Data if flags & END_STREAM != 0 => answer = Some(stream),
                Kind::GoAway => goaway = Some(last_stream(&payload)),
                _ => {}
            }
        }
        (answer, goaway)
    }

    /// Answers the next ping.
    pub(super) async fn pong(&mut self) {
        loop {
            let (kind, payload) = self.next().await.expect("closed before a ping");
            if kind == Kind::Ping {
                return self.send(Kind::Ping, ACK, 0, &payload).await;
            }
        }
    }
}

fn last_stream(goaway: &[u8]) -> u32 {
    u32::from_be_bytes(goaway[..4].try_into().expect("a stream"))
}
