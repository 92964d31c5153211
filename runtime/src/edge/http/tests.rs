use http_body_util::Full;
use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::edge::Bounds;

const BOUNDS: HttpBounds =
    HttpBounds { head: HeadBounds { bytes: 8 << 10, fields: 100, target_bytes: 1 << 10 }, streams: 10 };
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: weir\r\n\r\n";

/// A connection on which every request is answered.
fn serve() -> (DuplexStream, Arc<Connection>) {
    let (client, server) = duplex(64 << 10);
    let connection = Arc::new(Connection::new(std::net::IpAddr::from([127, 0, 0, 1]), Bounds::operations()));
    let handler =
        |_client: Client, _request: Request<Incoming>| async { Response::new(Full::new(Bytes::from("yes"))) };
    let refuse: Refuse = |_| Refusal { body: "{}".to_owned(), request_id: None };
    tokio::spawn(serve_http1(server, Arc::clone(&connection), BOUNDS, refuse, handler));
    (client, connection)
}

async fn answer(client: &mut DuplexStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"yes") {
        assert!(
            client.read_buf(&mut text).await.expect("reads") > 0,
            "closed after {:?}",
            String::from_utf8_lossy(&text)
        );
    }
    String::from_utf8(text).expect("text")
}

#[tokio::test]
async fn a_request_that_arrives_while_its_idle_connection_is_asked_to_close_is_answered() {
    let (mut client, connection) = serve();
    client.write_all(REQUEST).await.expect("written");
    assert!(!answer(&mut client).await.contains("connection: close"));
    connection.drain();
    client.write_all(REQUEST).await.expect("written");
    connection.close_idle();
    assert!(answer(&mut client).await.contains("connection: close"));
    assert_eq!(client.read(&mut [0]).await.expect("reads"), 0, "closed with the answer");
}

#[tokio::test]
async fn an_idle_connection_that_is_asked_to_close_closes() {
    let (mut client, connection) = serve();
    client.write_all(REQUEST).await.expect("written");
    answer(&mut client).await;
    connection.close_idle();
    assert_eq!(client.read(&mut [0]).await.expect("reads"), 0);
}
