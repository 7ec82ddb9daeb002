"""An HTTP server on this machine that the tests fetch from and send to.

GET /bytes/N?seed=S     N bytes that follow from S (default 0): `payload(N, S)`
POST /echo              the body comes back
POST /sum               the SHA-256 of the body comes back, in hexadecimal
GET /slow/N             N bytes, one every 0.1 s
GET /                   a line of text
GET /page               the same for a browser
"""

import functools
import hashlib
import random
import socketserver
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

HELLO = b"hello from behind the onion\n"


@functools.lru_cache(8)
def payload(n, seed=0):
    """Return the `n` bytes that /bytes/n?seed=seed gives."""
    return random.Random(seed).getrandbits(8 * n).to_bytes(n, "big") if n else b""


def sha256hex(data):
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, body, status=200, kind="application/octet-stream"):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.server.served[self.path] += 1
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        kind, _, n = url.path[1:].partition("/")
        if url.path == "/":
            self.reply(HELLO)
        elif url.path == "/page":
            self.reply(b"<!doctype html><p>" + HELLO, kind="text/html")
        elif kind == "bytes" and n.isdigit():
            seed = int(parse_qs(url.query).get("seed", ["0"])[0])
            self.reply(payload(int(n), seed))
        elif kind == "slow" and n.isdigit():
            self.send_response(200)
            self.send_header("Content-Length", n)
            self.end_headers()
            for byte in payload(int(n)):
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        else:
            self.reply(b"no such page\n", 404)

    def do_POST(self):
        left = int(self.headers.get("Content-Length", 0))
        digest, pieces = hashlib.sha256(), []
        while left:
            piece = self.rfile.read1(min(left, 65536))
            if not piece:
                return
            left -= len(piece)
            digest.update(piece)
            if self.path == "/echo":
                pieces.append(piece)
        self.reply(b"".join(pieces) if self.path == "/echo" else digest.hexdigest().encode())


class Target(socketserver.ThreadingTCPServer):
    """The server in threads of its own: `port`, `served` (replies by path), `stop()`."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.port, self.served = self.server_address[1], Counter()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, address):
        # Clients that go away are part of the tests.
        pass

    def stop(self):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    print(Target(int(sys.argv[1]) if len(sys.argv) > 1 else 0).port, flush=True)
    threading.Event().wait()
