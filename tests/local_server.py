"""HTTP servers on this machine that answer as a test says, and remember what they were asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from meshift.rewards import http


class Asked(NamedTuple):
    """A request: its path, its headers, and its body, which was JSON."""

    path: str
    headers: dict[str, str]
    body: object


class Handler(BaseHTTPRequestHandler):
    """Notes the request; the server's `act(handler)` answers."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(Asked(self.path, dict(self.headers), body))
        self.server.act(self, body)

    do_GET = do_POST  # noqa: N815 - what a followed redirect would ask by

    def say(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def local_servers(monkeypatch, path):
    """`start(act)` -> a server whose `url` ends in `path`, answers by `act(handler, body)` and keeps
    what it is `asked`. At the end `released` is set, for an `act` that hangs."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)
    servers = []

    def start(act):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.act, server.asked, server.released = act, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}{path}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()
