"""A model's server whose every byte a test decides: it answers by the name of the model that it is asked for."""

import dataclasses
import http.server
import json
import threading


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is answered to a request."""

    status: int
    content_type: str
    #: Sent one by one, each in a write of its own.
    parts: list
    #: Whether the body ends, or its connection breaks off.
    ends: bool = True


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Each part is a segment of its own.
    disable_nagle_algorithm = True
    wbufsize = 0

    def do_HEAD(self):
        self.simple(404, b"")

    def do_GET(self):
        # A server that lists no models says nothing of which it has.
        self.simple(200 if self.path.endswith("/models") else 404, b'{"object":"list","data":[]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answer = self.server.answers[body["model"]]
        self.send_response(answer.status)
        self.send_header("content-type", answer.content_type)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for part in filter(None, answer.parts):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        if answer.ends:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def simple(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Upstream(http.server.ThreadingHTTPServer):
    """Serves until `stop`. `answers` is by the name of the model."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        # The other side went.
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.shutdown()
        self.server_close()
