//! `health`: one GET, so that a container can check itself without another program in its image.

use http::{HeaderValue, Request, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpStream;

use crate::args::Cli;
use crate::error::Error;
use crate::output::Io;

/// Bytes of an answer that are read.
const ANSWER_MAX_BYTES: usize = 4 << 10;

pub(super) async fn health(cli: &Cli, io: &mut Io<'_>, url: &Uri) -> Result<(), Error> {
    let url = &page(url)?;
    let (status, body) = fetch(cli, url, None, ANSWER_MAX_BYTES).await?;
    let text = String::from_utf8_lossy(&body);
    let text = text.lines().next().unwrap_or_default().escape_debug().to_string();
    if !(200..300).contains(&status) {
        return Err(Error::Unhealthy { url: url.to_string(), status, text });
    }
    io.result(|| format!("{text}\n"), || json!({"url": url.to_string(), "status": status, "text": text}))
}

/// The page to ask: without one the readiness.
fn page(url: &Uri) -> Result<Uri, Error> {
    if url.path() != "/" {
        return Ok(url.clone());
    }
    let full = format!("{}/readyz", url.to_string().trim_end_matches('/'));
    full.parse().map_err(|_| Error::Setting(format!("{url} is not an address")))
}

/// One GET to an operations port: the status, and the answer up to a bound.
pub(super) async fn fetch(
    cli: &Cli,
    url: &Uri,
    token: Option<HeaderValue>,
    max_bytes: usize,
) -> Result<(u16, Bytes), Error> {
    let silent = |reason: String| Error::Silent { url: url.to_string(), reason };
    let asked = tokio::time::timeout(cli.timeout, ask(url, token, max_bytes)).await;
    let late = || silent(format!("no answer within {}", weir_proto::manifest::format_duration(cli.timeout)));
    asked.map_err(|_| late())?.map_err(|e| silent(e.to_string()))
}

async fn ask(
    url: &Uri,
    token: Option<HeaderValue>,
    max_bytes: usize,
) -> Result<(u16, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let host = url.host().unwrap_or_default();
    let port = url.port_u16().unwrap_or(80);
    let socket = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let path = url.path_and_query().map_or("/", |p| p.as_str());
    let authority = url.authority().map_or("", |a| a.as_str());
    let mut request = Request::get(path).header(header::HOST, authority).body(Empty::<Bytes>::new())?;
    request.headers_mut().extend(token.map(|token| (header::AUTHORIZATION, token)));
    let answer = async {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        // What is longer than the bound is no answer of ours; its status counts all the same.
        let body = Limited::new(response.into_body(), max_bytes).collect().await;
        let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        Ok((status, body))
    };
    tokio::select! {
        // The connection has to be driven; when it ends first, the answer says why.
        biased;
        answered = answer => answered,
        Err(error) = connection => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_page_readiness_is_asked_for() {
        let of = |url: &str| page(&url.parse().expect("a URL")).expect("a page").to_string();
        assert_eq!(of("http://127.0.0.1:9100"), "http://127.0.0.1:9100/readyz");
        assert_eq!(of("http://h:1/"), "http://h:1/readyz");
        assert_eq!(of("http://h:1/livez"), "http://h:1/livez");
    }
}
