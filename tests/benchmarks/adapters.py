"""One client of the benchmark, in a process of its own.

    adapters.py KIND NETWORK_FILE DATA_DIR

KIND: minitor, tor (DATA_DIR is then the SOCKS port of a C tor), torpy, torquests.  Commands are
lines on standard input, "get URL" or "put URL MB"; each is answered by a line of JSON: seconds
until the first byte came, seconds in all, bytes, error.
"""

import hashlib
import json
import re
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
PIECE = 1 << 16

from httptarget import payload  # noqa: E402

BLOCK = payload(1000 * 1000, 3)


def http_head(method, parts, size):
    return ("%s %s%s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (
        method, parts.path, "?" + parts.query if parts.query else "", parts.hostname, size)).encode()


class Timed:
    """Counts what comes back after the head of an HTTP response."""

    def __init__(self):
        self.started, self.first, self.size = time.monotonic(), None, 0
        self.digest, self.head = hashlib.sha256(), b""

    def feed(self, data):
        if self.first is None:
            self.first = time.monotonic() - self.started
        if self.head is not None:
            self.head += data
            head, found, data = self.head.partition(b"\r\n\r\n")
            if not found:
                return
            if b" 200 " not in head.partition(b"\r\n")[0]:
                raise ValueError(head.partition(b"\r\n")[0].decode())
            self.head = None
        self.size += len(data)
        self.digest.update(data)

    def report(self):
        return {"first": self.first, "seconds": time.monotonic() - self.started,
                "bytes": self.size, "sha256": self.digest.hexdigest()}


def pieces(mb):
    """Yield what is sent of `mb` megabytes: the same one again and again."""
    for _ in range(mb):
        for at in range(0, len(BLOCK), PIECE):
            yield BLOCK[at:at + PIECE]


def over_socket(connect, method, url, mb=0):
    """Do one exchange over what `connect(host, port)` returns, with sendall and recv."""
    parts, timed = urlsplit(url), Timed()
    sock = connect(parts.hostname, parts.port or 80)
    sock.sendall(http_head(method, parts, mb * len(BLOCK)))
    for piece in pieces(mb):
        sock.sendall(piece)
    while True:
        data = sock.recv(PIECE)
        if not data:
            break
        timed.feed(data)
    sock.close()
    return timed.report()


# ── C tor, by SOCKS


def tor(network_file, port):
    def connect(host, target):
        sock = socket.create_connection(("127.0.0.1", int(port)), 180)
        sock.sendall(b"\x05\x01\x00")
        sock.recv(2)
        name = host.encode()
        sock.sendall(b"\x05\x01\x00\x03" + bytes([len(name)]) + name + target.to_bytes(2, "big"))
        answer = b""
        while len(answer) < 10:
            piece = sock.recv(10 - len(answer))
            if not piece:
                raise OSError("SOCKS: closed")
            answer += piece
            if len(answer) > 1 and answer[1]:
                raise OSError("SOCKS error %d" % answer[1])
        return sock

    return lambda method, url, mb=0: over_socket(connect, method, url, mb)


# ── minitor


def minitor(network_file, data_dir):
    import asyncio

    import minitor

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    running = []

    async def run(method, url, mb):
        timed, parts = Timed(), urlsplit(url)
        if not running:
            running.append(minitor.AsyncTor(data_dir=data_dir, network=network_file))
            await running[0].start()
        reader, writer = await running[0].open_connection(parts.hostname, parts.port or 80)
        writer.write(http_head(method, parts, mb * len(BLOCK)))
        for piece in pieces(mb):
            writer.write(piece)
            await writer.drain()
        while True:
            data = await reader.read(PIECE)
            if not data:
                break
            timed.feed(data)
        writer.close()
        return timed.report()

    return lambda method, url, mb=0: loop.run_until_complete(run(method, url, mb))


# ── torpy: knows the public network only, so its lists are replaced

AUTHORITY = re.compile(r"^DirAuthority (\S+) orport=(\d+) .*v3ident=(\w+) ([\d.]+):(\d+) (\w+)$", re.M)


def torpy(network_file, data_dir):
    from torpy.cache_storage import TorCacheDirStorage
    from torpy.client import TorClient
    from torpy.consesus import DirectoryFlags, DirectoryList, DirectoryServer, TorConsensus

    found = AUTHORITY.findall(Path(network_file).read_text())
    servers = [DirectoryServer(nickname=name, or_port=port, v3ident=ident, ip=ip,
                               dir_port=dir_port, fingerprint=fingerprint)
               for name, port, ident, ip, dir_port, fingerprint in found]
    mirrors = [DirectoryServer(nickname=None, or_port=port, ip=ip, dir_port=dir_port, flags=[],
                               fingerprint=fingerprint, dir_flags=DirectoryFlags.ALL())
               for _, port, _, ip, dir_port, fingerprint in found]
    running = []

    def connect(host, port):
        if not running:
            consensus = TorConsensus(DirectoryList(servers), DirectoryList(mirrors),
                                     TorCacheDirStorage(Path(data_dir)))
            running.append(TorClient(consensus))
            guard = running[0].get_guard()
            running.append(guard.create_circuit(3))
        return Socket(running[1].create_stream((host, port)))

    class Socket:
        def __init__(self, stream):
            self.stream = stream.__enter__()
            self.sendall, self.recv = self.stream.send, self.stream.recv

        def close(self):
            self.stream.close()

    return lambda method, url, mb=0: over_socket(connect, method, url, mb)


# ── torquests: likewise


def torquests(network_file, data_dir):
    from torquests import Session
    from torquests._client import bootstrap
    from torquests._client.config import TorConfig
    from torquests._client.torclient import TorClient
    from torquests._dir import authorities

    found = AUTHORITY.findall(Path(network_file).read_text())
    authorities.DEFAULT_AUTHORITIES = tuple(
        authorities.DirectoryAuthority(name, bytes.fromhex(ident), (ip, int(dir_port)))
        for name, _, ident, ip, dir_port, _ in found)
    _short_periods(bootstrap)
    running = []

    def run(method, url, mb=0):
        timed = Timed()
        timed.head = None
        if not running:
            Path(data_dir).mkdir(exist_ok=True)
            client = TorClient.bootstrap(config=TorConfig(cache_dir=Path(data_dir)))
            running.append(Session(tor=client))
        response = running[0].request(method, url, data=b"".join(pieces(mb)) or None, stream=True, timeout=60)
        response.raise_for_status()
        for data in response.iter_content(PIECE):
            timed.feed(data)
        return timed.report()

    return run


def _short_periods(bootstrap):
    # It counts periods from noon, as on the public network; here they start after 12 votes.
    def time_period(self):
        consensus = self.consensus
        interval = int((consensus.fresh_until - consensus.valid_after).total_seconds())
        when = int(consensus.valid_after.timestamp())
        return (when - 12 * interval) // (self.period_length() * 60)

    bootstrap.LiveDirectory.time_period = time_period


def main(kind, network_file, data_dir):
    run = None
    for line in sys.stdin:
        words = line.split()
        try:
            # Loading the program is part of the first answer.
            run = run or globals()[kind](network_file, data_dir)
            if words[0] == "get":
                report = run("GET", words[1])
            else:
                report = run("POST", words[1], int(words[2]))
        except Exception as e:
            report = {"error": "%s: %s" % (type(e).__name__, e)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
