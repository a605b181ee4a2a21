"""Servers on this machine that speak OpenAI's chat completions, with answers that a test gives."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from meshift.rewards import http


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Authorization"), question))
        answer = self.server.answer(question)
        if answer is None:
            self.server.released.wait(30)
            return
        status, body = answer if isinstance(answer, tuple) else (200, chat(answer))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def chat_servers(monkeypatch):
    """For a fixture: `serve(answer)` -> a server that says `answer(question)`: a text, (status, body), or
    None to hang."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(http, "FIRST_PAUSE_S", 0.01)
    servers = []

    def start(answer):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.answer, server.asked, server.lock = answer, [], threading.Lock()
        server.released = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()
