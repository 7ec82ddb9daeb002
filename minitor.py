"""Tor in one Python file: a client and an onion-service host, without dependencies.

For CPython 3.9+ and MicroPython 1.24+.  Each section uses only what stands above it, and the
upper half never touches the network.

    with minitor.Tor() as tor:
        print(tor.http_get("http://<56 characters>.onion/"))
        print(tor.create_onion_service(80, target=8080).address)

MIT licence.
"""

__version__ = "0.1.0"
__all__ = (
    "Advertisement", "AsyncTor", "BlockingNode", "Bridges", "Calls", "DirectTransport", "Discovery",
    "HybridTransport", "Link", "Node", "Proxy", "SocksTransport", "Tor", "TorError", "TorTransport",
)

# === 1. Platform ===
# Every difference between CPython and MicroPython.

import asyncio
import binascii
import hashlib
import json
import os
import sys
import time
from array import array
from struct import pack, pack_into, unpack, unpack_from

MICROPYTHON = sys.implementation.name == "micropython"
NARROW = sys.maxsize == (1 << 31) - 1

if MICROPYTHON:
    import gc
    import tls
    from cryptolib import aes

    # Early: so what lives long stays together, and large pieces find room.
    _heap = gc.mem_free() + gc.mem_alloc()
    gc.threshold(_heap // 4)
    # The budget in bytes, and when it was last exceeded.  An ESP32's heap grows into what WiFi and
    # TLS need; one that is larger is in PSRAM.
    _admission = [_heap * 7 // 8, None]
    if sys.platform == "esp32" and _heap < 1 << 18:
        _admission[0] = 96 << 10
    # What may end a task that nobody cancelled: `wait_for` without memory cancels.
    FAILURES = Exception, asyncio.CancelledError
    ticks_ms, ticks_diff, Turn = time.ticks_ms, time.ticks_diff, asyncio.Lock
    wait_for = asyncio.wait_for
    print_exception = sys.print_exception

    def consteq(a, b):  # In constant time.
        return len(a) == len(b) and not sum([x ^ y for x, y in zip(a, b)])

else:
    import io
    import socket
    import ssl
    import threading
    from concurrent import futures
    from hmac import compare_digest as consteq
    from operator import sub as ticks_diff
    from types import SimpleNamespace

    class Turn:  # There is memory for all at once.
        async def __aenter__(self):
            pass

        async def __aexit__(self, *_):
            pass

    _admission, FAILURES = [0, None], Exception
    # What controllers are told of: `watch(event, subject, …)` for each.
    watchers = []

    def announce(*what):
        for watch in watchers:
            try:
                watch(*what)
            except Exception as e:
                log(ERR, "bug: %s as %s was told: %s", type(e).__name__, what[0], e)

    async def wait_for(awaitable, seconds):
        # asyncio's loses a cancellation, before Python 3.12, that comes as the work is done.
        if seconds is None:
            return await awaitable
        task = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait([task], timeout=seconds)
            if not task.done():
                raise asyncio.TimeoutError
            return task.result()
        finally:
            if task.cancel():
                await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # or what nobody asked for would be warned about

    ticks_ms = lambda: int(time.monotonic() * 1000)
    print_exception = lambda error: sys.excepthook(type(error), error, error.__traceback__)

# Clocks count from 1970 on Unix, from 2000 on a chip.
_EPOCH = 946684800 if time.gmtime(0)[0] == 2000 else 0
urandom = os.urandom


def uint(data):
    return int.from_bytes(data, "big")


_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"


def b32encode(data):
    n = uint(data)
    return "".join([_BASE32[n >> i & 31] for i in range(len(data) * 8 - 5, -1, -5)])


def now():  # In whole seconds since 1970.
    return int(time.time()) + _EPOCH


def randbelow(n):
    # No bias, as n is 2^64 at most.
    return uint(urandom(16)) % n


def sha256(data):
    return hashlib.sha256(data).digest()


def crowded():
    """Tell whether memory is past its budget, so that nothing new is begun."""
    if not MICROPYTHON or gc.mem_alloc() <= _admission[0]:
        return False
    # Refusing shall not cost a collection each time.
    if _admission[1] is None or ticks_diff(ticks_ms(), _admission[1]) > 1000:
        gc.collect()
        _admission[1] = ticks_ms() if gc.mem_alloc() > _admission[0] else None
        if _admission[1] is None:
            return False
        log(NOTICE, "%d bytes are in use: nothing new begins", gc.mem_alloc())
    return True


def fits(n):
    """Tell whether `n` bytes more keep memory in its budget."""
    if MICROPYTHON:
        gc.collect()
    return not MICROPYTHON or gc.mem_alloc() + n <= _admission[0]


def private_dir(path):
    """Make a folder, and those above it, on a host for its owner alone."""
    if not MICROPYTHON:
        os.makedirs(path, 0o700, exist_ok=True)
        return os.chmod(path, 0o700)
    if "/" in path:
        private_dir(path.rpartition("/")[0])
    try:
        os.mkdir(path)
    except OSError:
        pass


def read_file(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return None


replace = os.rename if MICROPYTHON else os.replace


def write_file(path, *pieces):
    """Replace a file in one step."""
    partial, options = path + ".tmp", {}
    if not MICROPYTHON:
        # Two processes may share a folder.
        partial = "%s.%d.tmp" % (path, os.getpid())
        options["opener"] = lambda name, flags: os.open(name, flags, 0o600)
    with open(partial, "wb", **options) as f:
        for piece in pieces:
            f.write(piece)
        if not MICROPYTHON:
            f.flush()
            os.fsync(f.fileno())
    replace(partial, path)


def spool(path):
    """Return a file for what is written once and read again, on a host in memory."""
    return open(path, "w+b") if MICROPYTHON else io.BytesIO()


DEBUG, INFO, NOTICE, WARN, ERR = range(5)
_log = [NOTICE, None]


def set_log(severity, sink=None):
    """Pass messages of `severity` and above to `sink(severity, text)`; None: standard error."""
    _log[:] = [severity, sink]


def log(severity, text, *args):
    """Log `text % args`: never private keys or addresses of clients."""
    if severity < _log[0]:
        return
    try:
        if _log[1]:
            return _log[1](severity, text % args)
        name = "debug info notice warn err".split()[severity]
        line = time.gmtime()[:6] + (name, text % args)
        print("%d-%02d-%02d %02d:%02d:%02d [%s] %s" % line, file=sys.stderr)
    except MemoryError:
        pass


def cache_file(path, data):
    """As write_file, but on failure just warn."""
    try:
        write_file(path, data)
    except OSError as e:
        log(WARN, "cannot write %s: %s", path, e)


class Promise:
    """A value, or an exception, that one task sets and others wait for."""

    def __init__(self):
        self._event = asyncio.Event()
        self.value = self._error = None

    def done(self):
        return self._event.is_set()

    def set(self, value=None, error=None):
        if not self.done():
            self.value, self._error = value, error
            self._event.set()

    async def wait(self, seconds=None):
        """Wait for it; asyncio.TimeoutError after `seconds`."""
        if not self.done():
            await wait_for(self._event.wait(), seconds)
        if self._error is not None:
            raise self._error
        return self.value


_tasks = set()


def spawn(coroutine):
    """Run a task that is held on to; what it raises is logged."""

    async def run():
        try:
            await coroutine
        except Exception as e:
            log(ERR, "bug: %s in a task: %s", type(e).__name__, e)
            if _log[0] == DEBUG:
                print_exception(e)

    task = asyncio.create_task(run())
    if not MICROPYTHON:
        _tasks.add(task)
        # What is cancelled before it began would be warned about.
        task.add_done_callback(lambda task: _tasks.discard(task) or coroutine.close())
    return task


async def lasting(work, wanted):
    """Run the coroutine function `work` while `wanted()`, again whatever ends it."""
    while wanted():
        try:
            await work()
        except FAILURES as e:
            if wanted():
                log(WARN, "a task starts anew: %s: %s", type(e).__name__, e)
        await asyncio.sleep(10)


def _noting(seen):
    def note(der, depth):
        # `der` is memory that is gone afterwards.
        if depth == 0:
            seen[0] = sha256(der)
        return 0

    return note


async def tls_connect(address, port, seconds, through=None):
    """Reader, writer, and a list: the certificate's SHA-256, once data was read.

    `through`: on a host, a socket that is connected already.
    """
    # CERTS proves the relay's identity (tor-spec 4.2).
    seen = [b""]
    if MICROPYTHON:
        context, limit = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT), {}
        context.verify_mode, context.verify_callback = tls.CERT_OPTIONAL, _noting(seen)
    else:
        context, limit = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), {"limit": 1 << 18}
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    # As tor's: a fixed one, or none, would stand out.
    name = "www.%s.com" % b32encode(urandom(20))[: 4 + randbelow(22)]
    if not MICROPYTHON and through:
        address, port, limit["sock"] = None, None, through
    opening = asyncio.open_connection(address, port, ssl=context, server_hostname=name, **limit)
    reader, writer = await wait_for(opening, seconds)
    if not MICROPYTHON:
        seen[0] = sha256(writer.get_extra_info("ssl_object").getpeercert(True))
    return reader, writer, seen


async def hang_up(writer):
    """Close the connection, whatever is unsent."""
    if not MICROPYTHON:
        return writer.transport.abort()
    try:
        await writer.wait_closed()  # close() does nothing.
    except OSError:
        pass


# === 2. Errors ===


class TorError(Exception):
    """Any of minitor's errors; `reason`: tor's number for it, or 0."""

    def __init__(self, text, reason=0):
        super().__init__(text)
        self.reason = reason


class ConfigError(TorError):
    """An option, file or argument is wrong."""


class AddressError(ConfigError):
    """That is no onion address, host name or port."""


class ProtocolError(TorError):
    """A peer, a relay or a document broke the specification."""


class ClockError(TorError):
    """This machine's clock is too wrong for Tor."""


class DirectoryError(TorError):
    """The directory could not be fetched or verified."""


class ChannelError(TorError):
    """A relay could not be reached, or the link to it broke."""


class CircuitError(TorError):
    """A circuit could not be built, or was closed; `reason` as in tor-spec 5.4."""


class StreamError(TorError):
    """A stream could not be opened, or was reset; `reason` as in tor-spec 6.3."""


class OnionError(TorError):
    """An onion service could not be reached; `reason` as in proposal 304."""


class DescriptorError(OnionError):
    """An onion service's descriptor was not found, or is false."""


class AuthorizationError(OnionError):
    """An onion service admits some clients alone; `reason` 0xF4: by a key, 0xF5: by another key."""


class NetworkError(TorError):
    """No way leads out: this machine has no network, or Tor no circuit."""


class ProxyError(TorError):
    """The SOCKS proxy is not there, or refuses."""


class PeerError(TorError):
    """A peer cannot be reached, or refuses; `reason` as in proposal 304."""


class WrongPeer(PeerError):
    """Who answers is not the peer that was asked for."""


class LinkError(TorError):
    """A link is closed, or messages may have been lost; `lost`: these."""

    lost = ()


class DiscoveryError(TorError):
    """No peer answers, or knows what was looked for."""


class TorTimeout(TorError):
    """Something took longer than it may."""


class MemoryShort(CircuitError):
    """A circuit was closed for want of memory here."""


# Where there is no memory for another one.
NO_MEMORY = MemoryShort("out of memory", 5)
# What no relay is to blame for.
SHORT = MemoryError, MemoryShort


# === 3. Bytes ===
# Binary structures; all raise ProtocolError.


def require(good, text):
    if not good:
        raise ProtocolError(text)


def decimal(text, least, most):
    """The number in `text` (bytes), in [least, most]."""
    require(text.isdigit() and len(text) < 21 and least <= int(text) <= most, "bad number")
    return int(text)


class Reader:
    """Takes from the front of `data`; errors name `what`."""

    def __init__(self, data, what="structure"):
        self.data, self.at, self.what = data, 0, what

    def take(self, n):
        require(n <= self.left(), self.what + " is truncated")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def uint(self, n):
        return uint(self.take(n))

    def left(self):
        return len(self.data) - self.at


def _pieces(packed, size):
    return [packed[at : at + size] for at in range(0, len(packed), size)]


def b64encode(data):
    return binascii.b2a_base64(data).rstrip(b"=\n").decode()


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def b64decode(text, size=None):
    """Decode base64 (bytes, padded or not), of `size` bytes if given."""
    text = text.rstrip(b"=")
    # MicroPython's decoder takes garbage for something.
    require(len(text) % 4 != 1 and not text.strip(_BASE64), "bad base64")
    data = binascii.a2b_base64(text + b"==="[: -len(text) % 4])
    require(size in (None, len(data)), "base64 of a wrong length")
    return data


def b32decode(text):
    require(len(text) % 8 == 0 and not text.strip(_BASE32), "bad base32")
    n = 0
    for c in text:
        n = n << 5 | _BASE32.index(c)
    return n.to_bytes(len(text) * 5 // 8, "big")


# === 4. Hashes and ciphers ===
# tor-spec 0.3.  Sha1, Sha3_256: update, copy, digest.  AesCtr(key[, iv]).crypt(data) goes on.

_MASK = (1 << 64) - 1


def _roots(last, power):
    # FIPS 180-4 4.2.3, by Newton.
    for p in range(2, last + 1):
        if all(p % q for q in range(2, p)):
            n, x, y = p << 64 * power, 1 << 68, 1 << 67
            while y < x:
                x, y = y, ((power - 1) * y + n // y ** (power - 1)) // power
            yield x & _MASK


def _lanes():
    # The order of FIPS 202 3.2.2 and 3.2.3: where a lane goes, and its column; in bytes.
    x, y = 1, 0
    for i in range(24):
        x, y = y, (2 * x + 3 * y) % 5
        yield 8 * (x + 5 * y)
        yield 8 * x


_ROUNDS = pack("<80Q", *_roots(409, 3))
_LANES = bytes(_lanes())
_BITS = b"\x01\x1a^p\x1f!yU\x0e\x0c5&?O]SRH\x16fyX!t\0"  # FIPS 202 3.2.5


# Each changes a state in place: numbers, little-endian, and behind them a block, which it clears.
if MICROPYTHON and NARROW:
    # Message schedule; key stream.  For `p[0] ^= x` viper makes thrice the code.
    _SCRATCH = bytearray(640)

    @micropython.viper
    def _xor(target, at, source, start, n):
        t, s = ptr8(int(ptr8(target)) + int(at)), ptr8(int(ptr8(source)) + int(start))
        i = int(n)
        while i and int(t) & 3:
            t[0] = t[0] ^ s[0]
            t, s = ptr8(int(t) + 1), ptr8(int(s) + 1)
            i -= 1
        if i > 11:
            # Chips load only aligned words.
            turn = (int(s) & 3) << 3
            back = 31 - turn
            p, q = ptr32(int(t)), ptr32(int(s) & -4)
            x = uint(q[0])
            while i > 11:
                y = uint(q[1])
                p[0] = p[0] ^ int(x >> turn | y << back << 1)
                x = uint(q[2])
                p[1] = p[1] ^ int(y >> turn | x << back << 1)
                p = ptr32(int(p) + 8)
                q = ptr32(int(q) + 8)
                i -= 8
            t, s = ptr8(int(p)), ptr8(int(q) + (turn >> 3))
        while i:
            i -= 1
            t[i] = t[i] ^ s[i]

    @micropython.viper
    def _counters(counter, at, stream, n):
        last = ptr8(int(ptr8(counter)) + int(at))
        c, t, i = ptr32(int(last)), ptr32(stream), int(n)
        while i > 0:
            t[0] = c[0]
            t[1] = c[1]
            t[2] = c[2]
            t[3] = c[3]
            t = ptr32(int(t) + 16)
            i -= 16
            if i >= 0:
                last[15] = last[15] + 1
                j = 15
                while j and last[j] == 0:
                    j -= 1
                    last[j] = last[j] + 1

    @micropython.viper
    def _sha1(state):
        q = ptr32(state)
        b = uint(q[1])
        a, c = uint(q[0]), uint(q[2])
        d, e = uint(q[3]), uint(q[4])
        p, n = ptr32(_SCRATCH), 16
        while n:
            x = uint(q[5])
            p[0] = x << 24 | (x & 0xFF00) << 8 | x >> 8 & 0xFF00 | x >> 24
            q[5] = 0
            p = ptr32(int(p) + 4)
            q = ptr32(int(q) + 4)
            n -= 1
        q, n = ptr32(_SCRATCH), 64
        while n:
            x = uint(q[13] ^ q[8] ^ q[2] ^ q[0])
            q[16] = x << 1 | x >> 31
            q = ptr32(int(q) + 4)
            n -= 1
        q, k, i = ptr32(_SCRATCH), uint(0x5A827999), 0
        while i < 4:
            n = 20
            while n:
                if i & 1:
                    x = b ^ c ^ d
                elif i:
                    x = (b | c) & d | b & c
                else:
                    x = (c ^ d) & b ^ d
                x = (a << 5 | a >> 27) + x + e + k + uint(q[0])
                e = d
                d = c
                c = b << 30 | b >> 2
                b = a
                a = x
                q = ptr32(int(q) + 4)
                n -= 1
            i += 1
            k = uint(0x6ED9EBA1)
            if i == 2:
                k = uint(0x8F1BBCDC)
            elif i == 3:
                k = uint(0xCA62C1D6)
        q = ptr32(state)
        q[0], q[1] = q[0] + int(a), q[1] + int(b)
        q[2], q[3] = q[2] + int(c), q[3] + int(d)
        q[4] = q[4] + int(e)

    @micropython.viper
    def _sha512_schedule(state):
        # Numbers are low word, high word; sums are made of halves of words, for the carries.
        q = ptr32(_SCRATCH)
        p = ptr32(state)
        n = 32
        while n:
            n -= 1
            x = uint(p[16 + n])
            q[n ^ 1] = x << 24 | (x & 0xFF00) << 8 | x >> 8 & 0xFF00 | x >> 24
            # a to h take the place of the block.
            p[16 + n] = p[n & 15]
        n = 64
        while n:
            x, y = uint(q[2]), uint(q[3])
            s = (x >> 1 | y << 31) ^ (x >> 8 | y << 24) ^ (x >> 7 | y << 25)
            t = (y >> 1 | x << 31) ^ (y >> 8 | x << 24) ^ y >> 7
            x, y = uint(q[28]), uint(q[29])
            u = (x >> 19 | y << 13) ^ (y >> 29 | x << 3) ^ (x >> 6 | y << 26)
            t = t + ((y >> 19 | x << 13) ^ (x >> 29 | y << 3) ^ y >> 6)
            x, y = uint(q[0]), uint(q[18])
            v = (x & 0xFFFF) + (y & 0xFFFF) + (s & 0xFFFF) + (u & 0xFFFF)
            x = (x >> 16) + (y >> 16) + (s >> 16) + (u >> 16) + (v >> 16)
            q[32] = x << 16 | v & 0xFFFF
            q[33] = t + uint(q[1] + q[19]) + (x >> 16)
            q = ptr32(int(q) + 8)
            n -= 1

    @micropython.viper
    def _sha512(state, rounds):
        _sha512_schedule(state)
        p = ptr32(int(ptr32(state)) + 64)
        q = ptr32(_SCRATCH)
        k = ptr32(rounds)
        n = 80
        while n:
            x, y = uint(p[8]), uint(p[9])
            s = (x >> 14 | y << 18) ^ (x >> 18 | y << 14) ^ (y >> 9 | x << 23)
            t = (y >> 14 | x << 18) ^ (y >> 18 | x << 14) ^ (x >> 9 | y << 23)
            t = t + uint((p[13] ^ p[9] & (p[11] ^ p[13])) + p[15] + k[1] + q[1])
            u = uint(p[12] ^ p[8] & (p[10] ^ p[12]))
            x, y, z = uint(p[14]), uint(k[0]), uint(q[0])
            v = (x & 0xFFFF) + (y & 0xFFFF) + (z & 0xFFFF) + (s & 0xFFFF) + (u & 0xFFFF)
            x = (x >> 16) + (y >> 16) + (z >> 16) + (s >> 16) + (u >> 16) + (v >> 16)
            s = x << 16 | v & 0xFFFF
            t = t + (x >> 16)
            x, y = uint(p[0]), uint(p[1])
            u = (x >> 28 | y << 4) ^ (y >> 2 | x << 30) ^ (y >> 7 | x << 25)
            z = (y >> 28 | x << 4) ^ (x >> 2 | y << 30) ^ (x >> 7 | y << 25)
            z = z + t + uint(p[1] & p[3] | p[5] & (p[1] | p[3]))
            y = uint(p[0] & p[2] | p[4] & (p[0] | p[2]))
            v = (s & 0xFFFF) + (u & 0xFFFF) + (y & 0xFFFF)
            y = (s >> 16) + (u >> 16) + (y >> 16) + (v >> 16)
            i = 15
            while i > 1:
                p[i] = p[i - 2]
                i -= 1
            p[0] = y << 16 | v & 0xFFFF
            p[1] = z + (y >> 16)
            x = uint(p[8])
            v = (x & 0xFFFF) + (s & 0xFFFF)
            x = (x >> 16) + (s >> 16) + (v >> 16)
            p[8] = x << 16 | v & 0xFFFF
            p[9] = p[9] + int(t + (x >> 16))
            k = ptr32(int(k) + 8)
            q = ptr32(int(q) + 8)
            n -= 1
        q = ptr32(state)
        while n < 8:
            x, y = uint(q[0]), uint(p[0])
            v = (x & 0xFFFF) + (y & 0xFFFF)
            x = (x >> 16) + (y >> 16) + (v >> 16)
            q[0] = x << 16 | v & 0xFFFF
            q[1] = q[1] + p[1] + int(x >> 16)
            p[0] = p[1] = p[16] = p[17] = 0
            p = ptr32(int(p) + 8)
            q = ptr32(int(q) + 8)
            n += 1

    @micropython.viper
    def _keccak(state):
        # What comes first is in registers; several at once are slower.
        p = ptr32(state)
        n = 0
        a, d, bits = p, ptr32(_SCRATCH), ptr8(_BITS)
        while int(bits[0]):
            p, q, i = a, d, 10
            while i:
                q[0] = p[0] ^ p[10] ^ p[20] ^ p[30] ^ p[40]
                p = ptr32(int(p) + 4)
                q = ptr32(int(q) + 4)
                i -= 1
            p = d
            p[10], p[11] = p[0], p[1]
            x, y, i = uint(p[8]), uint(p[9]), 5
            while i:
                u, v = uint(p[0]), uint(p[1])
                p[0] = x ^ uint(p[2] << 1) ^ uint(p[3]) >> 31
                p[1] = y ^ uint(p[3] << 1) ^ uint(p[2]) >> 31
                x, y, p = u, v, ptr32(int(p) + 8)
                i -= 1
            a[0], a[1] = a[0] ^ d[0], a[1] ^ d[1]
            x, y = uint(a[2] ^ d[2]), uint(a[3] ^ d[3])
            lanes, turn = ptr8(_LANES), 0
            while i < 24:
                i += 1
                turn += i
                n = turn & 31
                p = ptr32(int(a) + lanes[0])
                q = ptr32(int(d) + lanes[1])
                u = uint(p[0] ^ q[0])
                v = uint(p[1] ^ q[1])
                if turn & 32:
                    p[1] = x << n | y >> 32 - n
                    p[0] = y << n | x >> 32 - n
                else:
                    p[0] = x << n | y >> 32 - n
                    p[1] = y << n | x >> 32 - n
                x = u
                y = v
                lanes = ptr8(int(lanes) + 2)
            p, i = a, 10
            while i:
                x, y = uint(p[0]), uint(p[2])
                p[0] = (y ^ -1) & uint(p[4]) ^ x
                p[2] = uint((p[4] ^ -1) & p[6]) ^ y
                p[4] = (p[6] ^ -1) & p[8] ^ p[4]
                p[6] = (p[8] ^ -1) & int(x) ^ p[6]
                p[8] = int((x ^ -1) & y) ^ p[8]
                # The high words of a plane, then the next one.
                p = ptr32(int(p) + (36 if i & 1 else 4))
                i -= 1
            n = bits[0]
            a[0] = a[0] ^ (n & 3 | (n & 4) << 1 | (n & 8) << 4 | (n & 16) << 11 | (n & 32) << 26)
            a[1] = a[1] ^ (n & 64) << 25
            bits = ptr8(int(bits) + 1)

else:
    # On 64 bits viper's integers are longer.
    _SCRATCH = bytearray(528)

    def _xor(target, at, source, start, n):
        x = uint(target[at : at + n]) ^ uint(source[start : start + n])
        target[at : at + n] = x.to_bytes(n, "big")

    def _counters(counter, at, stream, n):
        for i in range(0, n, 16):
            block = stream[i : i + 16] = counter[at : at + 16]
            if n - i > 15:
                block = (uint(block) + 1 & (1 << 128) - 1).to_bytes(16, "big")
                counter[at : at + 16] = block

    def _sha1(state, mask=0xFFFFFFFF):
        w, start = list(unpack_from(">16I", state, 20)), unpack_from("<5I", state)
        while len(w) < 80:
            x = w[-3] ^ w[-8] ^ w[-14] ^ w[-16]
            w.append((x << 1 | x >> 31) & mask)
        a, b, c, d, e = start
        for i, x in enumerate(w):
            x += (a << 5 | a >> 27) + e
            if i < 20:
                x += (d ^ b & (c ^ d)) + 0x5A827999
            elif 40 <= i < 60:
                x += (b & c | d & (b | c)) + 0x8F1BBCDC
            else:
                x += (b ^ c ^ d) + (0x6ED9EBA1 if i < 60 else 0xCA62C1D6)
            a, b, c, d, e = x & mask, a, (b << 30 | b >> 2) & mask, c, d
        w = [(x + y) & mask for x, y in zip((a, b, c, d, e), start)]
        pack_into("<5I", state, 0, *w)
        _xor(state, 20, state, 20, 64)

    def _sha512(state, rounds, mask=_MASK):
        def turns(x, i, j, k):
            x |= x << 64
            return (x >> i ^ x >> j ^ x >> k) & mask

        w, start = list(unpack_from(">16Q", state, 64)), unpack_from("<8Q", state)
        while len(w) < 80:
            x = turns(w[-15], 1, 8, 71) + turns(w[-2], 19, 61, 70)
            w.append(w[-16] + w[-7] + x & mask)
        a, b, c, d, e, f, g, h = start
        for k, w in zip(unpack("<80Q", rounds), w):
            x = turns(e, 14, 18, 41) + (g ^ e & (f ^ g)) + h + k + w
            y = turns(a, 28, 34, 39) + (a & b | c & (a | b)) + x
            a, b, c, d, e, f, g, h = y & mask, a, b, c, (d + x) & mask, e, f, g
        w = [(x + y) & mask for x, y in zip((a, b, c, d, e, f, g, h), start)]
        pack_into("<8Q", state, 0, *w)
        _xor(state, 64, state, 64, 128)

    def _keccak(state, mask=_MASK):
        a = list(unpack_from("<25Q", state))
        b = a[:]
        for bits in _BITS[:-1]:
            c = [a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20] for x in range(5)]
            d = [c[x - 1] ^ (c[x - 4] << 1 & mask | c[x - 4] >> 63) for x in range(5)]
            b[0] = a[0] ^ d[0]
            x, y, turn = 1, 0, 0
            for i in range(1, 25):
                turn = turn + i & 63
                lane = a[x + 5 * y] ^ d[x]
                x, y = y, (2 * x + 3 * y) % 5
                b[x + 5 * y] = lane << turn & mask | lane >> 64 - turn
            for i in range(0, 25, 5):
                c = b[i : i + 5] * 2
                a[i : i + 5] = [c[x] ^ c[x + 2] ^ c[x + 1] & c[x + 2] for x in range(5)]
            for j in range(7):
                a[0] ^= (bits >> j & 1) << (1 << j) - 1
        pack_into("<25Q", state, 0, *a)



# What `finish` returns; SHA-512 and SHA-3 have the longest states.
_END = bytearray(200)


class _Hash:
    # `_size` bytes from `_at` on make a block; the digest's byte i is the state's i ^ `_turn`.

    def __init__(self, data=b""):
        self._state, self._length = bytearray(self._start), 0
        self.update(data)

    def copy(self):
        other = type(self)()
        other._state[:], other._length = self._state, self._length
        return other

    def update(self, data, start=0, n=None):
        n = len(data) if n is None else n
        while n:
            at = self._length % self._size
            count = min(n, self._size - at)
            _xor(self._state, self._at + at, data, start, count)
            self._length += count
            start += count
            n -= count
            if at + count == self._size:
                self._absorb(self._state)

    def finish(self, suffix=128):
        """Return a state that begins with the digest; the next call changes it."""
        n, end = len(self._state), self._at + self._size
        _xor(_END, 0, _END, 0, n)
        _xor(_END, 0, self._state, 0, n)
        at = self._at + self._length % self._size
        _END[at] ^= suffix
        self._pad(at, end)
        self._absorb(_END)
        return _END

    def _pad(self, at, end):
        if at >= end - self._size // 8:
            self._absorb(_END)
        n = self._length << 3
        while n:
            end -= 1
            _END[end] = n & 255
            n >>= 8

    def digest(self):
        numbers = unpack_from("<" + self._format, self.finish())
        return pack(">" + self._format, *numbers)

    def stamp(self, data, at):
        """Write the digest's first four bytes to data[at:]."""
        end = self.finish()
        for i in range(4):
            data[at + i] = end[i ^ self._turn]


class _Sha1(_Hash):
    _size, _at, _turn, _format = 64, 20, 3, "5I"
    _start = pack("<5I64x", 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)
    _absorb = staticmethod(_sha1)


class _Sha512(_Hash):
    _size, _at, _format = 128, 64, "8Q"
    _start = pack("<8Q128x", *_roots(19, 2))

    def _absorb(self, state):
        _sha512(state, _ROUNDS)


class _Sha3(_Hash):
    _size, _at, _turn, _start = 136, 0, 0, bytes(200)
    _absorb = staticmethod(_keccak)

    def finish(self, suffix=6):
        return _Hash.finish(self, suffix)

    def _pad(self, at, end):
        _END[end - 1] ^= 128

    def digest(self, n=32, suffix=6):
        end = self.finish(suffix)
        out = bytes(end[:136])
        while len(out) < n:
            _keccak(end)
            out += end[:136]
        return out[:n]


Sha1 = _Sha1 if MICROPYTHON else hashlib.sha1
Sha3_256 = _Sha3 if MICROPYTHON else hashlib.sha3_256
Sha512 = _Sha512 if MICROPYTHON else hashlib.sha512


# AES without OpenSSL is bit-sliced: a plane is a bit of the 4 bytes of a row, of 2048 blocks.


def _planes(block):
    bits = [[b"\0\xff"[x >> j & 1 :][:1] * 256 for x in block] for j in range(7, -1, -1)]
    return [uint(b"".join(bit[row::4])) for row in range(4) for bit in bits]


def _sum(a, b):
    return [x ^ y for x, y in zip(a, b)]


def _times(p, q):
    # GF(2^4) on the basis z, z^2, z^3, z^4, where z^5 = 1.
    (a, b, c, d), (e, f, g, h) = p, q
    x = a & h ^ b & g ^ c & f ^ d & e
    y, z = a & f ^ b & e ^ d & h ^ x, a & g ^ b & f ^ c & e ^ x
    return b & h ^ c & g ^ d & f ^ x, a & e ^ c & h ^ d & g ^ x, y, z


def _sub_bytes(a, b, c, d, e, f, g, h):
    # Less its 0x63, by way of GF(2^4)[y] / (y^2 + y + z): the inverse of p·y + q is
    # (p·y + p + q)·s^7 where s = (z·p^2 + q·(p + q))^2.
    x, y = f ^ h, a ^ c ^ g
    q = x ^ e, x, c ^ h, y ^ b ^ h
    p = a, b, c, d = b ^ c ^ d, y, a ^ b ^ d ^ e ^ f, y ^ e ^ f
    r = _sum(p, q)
    a, b, c, d = _sum(_times(q, r), (b, b ^ c, a ^ b, b ^ d))
    s = t = c, a, d, b
    for _ in range(2):
        t = _times((t[2], t[0], t[3], t[1]), s)
    (a, b, c, d), (e, f, g, h) = _times(r, t), _times(p, t)
    x = c ^ f ^ g ^ h
    y = a ^ d ^ x
    return [b ^ c ^ g, e ^ f ^ h, y ^ c, y, c ^ h, b ^ c ^ d, d, x]


def _round_keys(key):
    # FIPS 197 5.2; all but the first have SubBytes' 0x63.
    size, w = len(key), bytes(key)
    for i in range(size, 4 * size + 112, 4):
        t = w[-4:]
        if i % size in (0, 16):
            t = [_sub_bytes(*[x >> j & 1 for j in range(7, -1, -1)]) for x in t]
            t = [99 ^ int("".join(map(str, x)), 2) for x in t]
        if i % size == 0:
            t = t[1] ^ b"\1\2\4\x08\x10 @\x80\x1b6"[i // size - 1], t[2], t[3], t[0]
        w += bytes(_sum(t, w[-size:]))
    return w[:16] + bytes([x ^ 99 for x in w[16:]])


def _key_stream(keys, counter):
    s, everywhere = _planes((counter % (1 << 128)).to_bytes(16, "big")), (1 << 8192) - 1
    for j in range(11):
        s[31 - j] ^= ((1 << 2048) - 1) // ((1 << (1 << j)) + 1)
    s = _sum(s, _planes(keys[:16]))
    for at in range(16, len(keys), 16):
        s = sum([_sub_bytes(*row) for row in _pieces(s, 8)], [])
        # ShiftRows, MixColumns
        turns = [(i // 8 * 2048, x) for i, x in enumerate(s)]
        s = [(x << n | x >> 8192 - n) & everywhere for n, x in turns]
        if at + 16 < len(keys):
            below = s[8:] + s[:8]
            u = _sum(s, below)
            s = [x ^ u[i & 24 | i + 1 & 7] ^ u[i - 16] for i, x in enumerate(below)]
            for i in 3, 4, 6:
                s[i::8] = _sum(s[i::8], u[::8])
        s = _sum(s, _planes(keys[at : at + 16]))
    out = bytearray(1 << 15)
    for i, row in enumerate(_pieces(s, 8)):
        x = 0
        for plane in row:
            # A digit as a character has its bit lowest.
            x = x << 1 | uint(bin(plane | 1 << 8192)[3:].encode()) & (1 << (1 << 16)) // 255
        for j, column in enumerate(_pieces(x.to_bytes(8192, "big"), 2048)):
            out[4 * j + i :: 16] = column
    return out


class AesCtrPortable:
    def __init__(self, key, iv=bytes(16)):
        self._keys, n = _round_keys(key), uint(iv)
        self._next, self._stream = n & -2048, b""
        self.crypt(bytes(n % 2048 * 16))

    def crypt(self, data):
        n = len(data)
        while len(self._stream) < n:
            self._stream += _key_stream(self._keys, self._next)
            self._next += 2048
        x, self._stream = uint(data) ^ uint(self._stream[:n]), self._stream[n:]
        return x.to_bytes(n, "big")


if MICROPYTHON:
    # Whoever encrypts keeps its cipher object, 313 bytes, until others came: a circuit's cells make
    # no garbage, and few of many circuits have such objects.
    _recent, _RECENT = [], 5
    _STREAM = memoryview(_SCRATCH)[:528]

    def forget_ciphers(most=0):
        while len(_recent) > most:
            old = _recent.pop(0)
            old._out = old._in = None

    class AesCtrCryptolib:
        """Two in one: with `back` it is another cipher, of the key `back`."""

        def __init__(self, key, iv=bytes(16), back=b""):
            # Counters, how much of their blocks is used, keys: in one piece of memory.
            self._state = bytearray(iv) + bytes(18) + key + (back or key)
            self._out = self._in = None

        def apply(self, data, start, n, back=0):
            """Encrypt data[start : start + n] where it stands."""
            state, cipher = self._state, self._in if back else self._out
            if not cipher:
                size = len(state) // 2 - 17
                key = 34 + size * back
                cipher = aes(state[key : key + size], 1)
                if back:
                    self._in = cipher
                else:
                    self._out = cipher
                _recent.append(self)
                forget_ciphers(_RECENT)
            while n:
                at = state[32 + back]
                count = min(n, 528 - at)
                _counters(state, 16 * back, _SCRATCH, at + count)
                cipher.encrypt(_STREAM, _STREAM)
                _xor(data, start, _SCRATCH, at, count)
                state[32 + back] = at + count & 15
                start += count
                n -= count

        def crypt(self, data):
            out = bytearray(data)
            self.apply(out, 0, len(out))
            return bytes(out)


class AesCtrOpenssl:
    def __init__(self, key, iv=bytes(16)):
        self._context, self._free = _evp.EVP_CIPHER_CTX_new(), _evp.EVP_CIPHER_CTX_free
        _evp.EVP_EncryptInit_ex(self._context, _ciphers[len(key)](), None, bytes(key), bytes(iv))

    def __del__(self):
        self._free(self._context)

    def crypt(self, data):
        n = len(data)
        # Filled in place; shorter ones Python shares.
        out = bytes(n if n > 1 else 2)
        _encrypt(self._context, out, _size, bytes(data), n)
        return out[:n]


AesCtr = AesCtrCryptolib if MICROPYTHON else AesCtrPortable
if not MICROPYTHON:
    try:
        import _ssl
        import ctypes

        # The interpreter's own.  Calls are too short to let go of its lock.
        _evp = ctypes.PyDLL(_ssl.__file__)
        _encrypt, _size = _evp.EVP_EncryptUpdate, ctypes.byref(ctypes.c_int())
        _ciphers = {16: _evp.EVP_aes_128_ctr, 32: _evp.EVP_aes_256_ctr}
        for _f in _evp.EVP_CIPHER_CTX_new, _ciphers[16], _ciphers[32]:
            _f.restype = ctypes.POINTER(ctypes.c_char)
        if AesCtrOpenssl(bytes(16)).crypt(bytes(4)) == b"f\xe9K\xd4":
            AesCtr = AesCtrPortable if os.environ.get("MINITOR_PORTABLE_AES") else AesCtrOpenssl
    except Exception:  # Not here.
        pass


def sha1(data):
    return hashlib.sha1(data).digest()


def sha3_256(data):
    return Sha3_256(data).digest()


def shake256(data, n):
    return Sha3_256(data).digest(n, 31) if MICROPYTHON else hashlib.shake_256(data).digest(n)


def sha512(data):
    return Sha512(data).digest()


def hmac_sha256(key, data):
    key = (sha256(key) if len(key) > 64 else key) + bytes(64)
    inner, outer = [bytes(b ^ x for b in key[:64]) for x in (0x36, 0x5C)]
    return sha256(outer + sha256(inner + data))


def hkdf_sha256(secret, salt, info, n):
    # RFC 5869.
    key, out, block = hmac_sha256(salt, secret), b"", b""
    while len(out) < n:
        block = hmac_sha256(key, block + info + bytes([len(out) // 32 + 1]))
        out += block
    return out[:n]


# === 5. Curves and signatures ===
# RFC 7748, RFC 8032, key blinding (rend-spec-v3, A.2).  Python's integers take varying time.

_P = (1 << 255) - 19
_L = (1 << 252) + 27742317777372353535851937790883648493
_D = -121665 * pow(121666, _P - 2, _P) % _P
_ROOT = pow(2, _P // 4, _P)  # of -1


def _int(data):
    return int.from_bytes(data, "little")


def _bytes(n):
    return n.to_bytes(32, "little")


def _clamp(data):
    return _int(data) & (1 << 254) - 8 | 1 << 254


def x25519(k, u=b"\t" + bytes(31)):
    # What the secret key `k` and `u` share; without `u`, the public key.  RFC 7748, 5 and 6.1.
    p, k, x1 = _P, _clamp(k), _int(u) & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, x1, 1
    # Swapped where a bit differs from the one above; at the end not, as bit 0 is 0.
    k ^= k >> 1
    for t in range(254, -1, -1):
        if k >> t & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b = x2 + z2, x2 - z2
        da, cb = (x3 - z3) * a, (x3 + z3) * b
        x3, z3 = (da + cb) % p, (da - cb) % p
        x3, z3 = x3 * x3 % p, z3 * z3 % p * x1 % p
        a, b = a * a % p, b * b % p
        c = a - b
        x2, z2 = a * b % p, (a + 121665 * c) * c % p
    x2 = x2 * pow(z2, p - 2, p) % p
    require(x2 and len(u) == 32, "bad X25519 key")
    return _bytes(x2)


def x25519_keypair():
    x = urandom(32)
    return x, x25519(x)


def _add(p, q):
    # Points are X, Y, Z, T: x = X/Z, y = Y/Z, xy = T/Z (RFC 8032, 5.1.4).
    x1, y1, z1, t1 = p
    x2, y2, z2, t2 = q
    a = (y1 - x1) * (y2 - x2) % _P
    b = (y1 + x1) * (y2 + x2) % _P
    c = t1 * t2 % _P * (2 * _D) % _P
    d = 2 * z1 * z2 % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _multiply(*terms):
    # The sum of k * point, encoded.  Each k becomes odd digits with three zeros or more between.
    added = []
    for k, point in terms:
        twice, odd, digits = _add(point, point), [None, point], bytearray(256)
        for i in range(7):
            odd.append(_add(odd[i + 1], twice))
        i = 0
        while k:
            if k & 1:
                digits[i] = (k >> 1 & 7) + 1
                k &= -16
            k >>= 1
            i += 1
        added.append((odd, digits))
    p = _P
    x, y, z, e, h = 0, 1, 1, 0, 1
    for i in range(255, -1, -1):
        a, b = x * x % p, y * y % p
        e, g, h = -2 * x * y % p, a - b, a + b
        f = (2 * z * z + g) % p
        x, y, z = e * f % p, g * h % p, f * g % p
        # Only an addition needs T = e * h.
        for odd, digits in added:
            if digits[i]:
                x, y, z, h = _add((x, y, z, e * h % p), odd[digits[i]])
                e = 1
    z = pow(z, p - 2, p)
    return _bytes(y * z % p | (x * z % p & 1) << 255)


def _decode(data):
    # None if `data` is not the one encoding of a point (5.1.3).
    sign, y = divmod(_int(data), 1 << 255)
    xx = (y * y - 1) * pow(y * y * _D + 1, _P - 2, _P) % _P
    x = pow(xx, (_P + 3) // 8, _P)
    for x in x, x * _ROOT % _P:
        if x * x % _P == xx and (x or not sign) and y < _P and len(data) == 32:
            x = x if x & 1 == sign else _P - x
            return x, y, 1, x * y % _P


_BASE = _decode(b"X" + b"f" * 31)


def ed25519_valid(public):
    """Whether `public` has no torsion."""
    A = _decode(public)
    return A and A[1] != 1 and _multiply((_L, A)) == b"\1" + bytes(31)


def ed25519_expand(seed):
    # Scalar and prefix.
    esk = sha512(seed)
    return _bytes(_clamp(esk[:32])) + esk[32:]


def ed25519_public(esk):
    return _multiply((_int(esk[:32]), _BASE))


def ed25519_sign(esk, public, message, file=None):
    """Sign `message`, and with it what is in `file`."""

    def hashed(start):
        h = Sha512(start + message)
        if file:
            file.seek(0)
            while piece := file.read(512):
                h.update(piece)
        return _int(h.digest())

    r = hashed(esk[32:]) % _L
    R = _multiply((r, _BASE))
    return R + _bytes((r + hashed(R + public) * _int(esk[:32])) % _L)


def ed25519_verify(public, message, signature):
    """Verify without cofactor, as tor; keys of low order are refused."""
    A, R, s = _decode(public), signature[:32], _int(signature[32:])
    if len(signature) != 64 or s >= _L or not A:
        return False
    # Of low order x = 0, y = 0 or x^2 = -y^2.
    x, y, _, t = A
    h = _int(sha512(R + public + message)) % _L
    return x * y * (x * x + y * y) % _P != 0 and _multiply((s, _BASE), (h, (-x, y, 1, -t))) == R


def ed25519_blind_public(public, param):
    A = _decode(public)
    require(A, "Ed25519 key is no point")
    return _multiply((_clamp(param), A))


def ed25519_blind_secret(esk, param):
    a = _clamp(param) * _int(esk[:32]) % _L
    prefix = sha512(b"Derive temporary signing key hash input" + esk[32:])[:32]
    return _bytes(a) + prefix


def rsa_public_key(der):
    """The modulus of an RSAPublicKey (RFC 8017, A.1.1) of 1024, or 2048 to 4096 bits."""
    size = len(der)
    require(size == 140 or 270 <= size <= 526, "bad RSA key")
    head = b"0\x81\x89\2\x81\x81\0"
    if size > 140:
        head = pack(">4HB", 0x3082, size - 4, 0x282, size - 13, 0)
    n = der[len(head) : -5]
    require(der == head + n + b"\2\3\1\0\1" and n[0] > 127 and n[-1] & 1, "bad RSA key")
    return n


def rsa_verify(n, digest, signature):
    """Verify PKCS#1 v1.5 over the bare `digest` (dir-spec 1.3)."""
    if len(signature) != len(n) or signature >= n:
        return False
    s = pow(uint(signature), 65537, uint(n))
    fill = b"\xff" * (len(n) - 3 - len(digest))
    return s.to_bytes(len(n), "big") == b"\0\1" + fill + b"\0" + digest


# === 6. Certificates and documents ===
# cert-spec, and dir-spec's authority certificates, consensus and microdescriptors.


def check_ed_cert(data, kind, public, when):
    """The key that a certificate by the key `public` is for (cert-spec 2.1)."""
    what, signer = "certificate of type %d" % kind, None
    r = Reader(data, what)
    version, found, expires, key_type = unpack(">BBIB", r.take(7))
    good, key = (version, found, key_type) == (1, kind, 3 if kind == 5 else 1), r.take(32)
    for _ in range(r.uint(1)):
        size, extension, flags = r.uint(2), r.uint(1), r.uint(1)
        body = r.take(size)
        if extension == 4:
            signer, flags = body, size != 32
        good = good and not flags & 1
    signed, signature = data[: r.at], r.take(64)
    require(good and not r.left(), what + " is malformed")
    require(expires * 3600 >= when, what + " has expired, or the clock is ahead")
    # Type 5, for a TLS certificate, and 10, by an ntor key, need not name it.
    named = kind != 5 and (MICROPYTHON or kind != 10)
    good = signer == public or not (named or signer)
    good = good and ed25519_verify(public, signed, signature)
    require(good, what + " has a bad signature, or is signed by another key")
    return key


def document(text):
    """A function: keyword to arguments and object, b"" if there is none (dir-spec 1.2)."""
    items, inside = [(b"", [])], False
    for line in text.split(b"\n"):
        if line.startswith(b"-----"):
            inside = line.startswith(b"-----BEGIN ")
        elif inside:
            items[-1][1].append(line)
        elif line:
            items.append((line + b" ", []))

    def item(keyword):
        found = [i for i in items if i[0].startswith(keyword + b" ")] or [(b"", [])]
        require(len(found) == 1, "a document has two " + keyword.decode())
        line, body = found[0]
        return line[len(keyword) + 1 : -1], b64decode(b"".join(body))

    return item


def parse_time(text):
    """Seconds since 1970 of b"2024-05-17 17:00:00"."""
    bounds = (0, 4, 1970, 2099), (5, 7, 1, 12), (8, 10, 1, 31), (11, 13, 0, 23), (14, 16, 0, 59)
    year, month, day, hour, minute = [decimal(text[a:b], low, high) for a, b, low, high in bounds]
    # Leap years are every fourth from 1901 to 2099.
    day += 367 * year - 7 * (year + (month + 9) // 12) // 4 + 275 * month // 9 - 719574
    return ((day * 24 + hour) * 60 + minute) * 60 + decimal(text[17:19], 0, 60)


# Relays' flags and protocol versions, as bits; all that are listed are running.
FLAG_WORDS = (
    "BadExit Exit Fast Guard HSDir MiddleOnly NoEdConsensus Stable V2Dir "
    "FlowCtrl=1 HSDir=2 HSIntro=4 HSRend=2 Relay=2"
).split(" ")
BADEXIT, EXIT, FAST, GUARD, HSDIR, MIDDLEONLY, NOEDCONSENSUS = 1, 2, 4, 8, 16, 32, 64
STABLE, V2DIR, FLOWCTRL1, HSDIR2, HSINTRO4 = 128, 256, 512, 1024, 2048
# KNOWN: the microdescriptor is there.
HSREND2, RELAY2, KNOWN, USABLE = 4096, 8192, 16384, 32768

# What the network may require, unless its consensus is newer than this release.
_SUPPORTED = (
    b"Cons=1-2 Desc=1-2 DirCache=2 FlowCtrl=1 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=4-5 "
    b"Microdesc=1-3 Relay=1-3"
)
_RELEASED = 1795132800


def number_ranges(text):
    """Yield (80, 80) and (443, 445) of "80,443-445"; ValueError."""
    for one in text.split(","):
        low, _, high = one.partition("-")
        yield int(low), int(high or low)


def _versions(text):
    # b"Link=1-2 Fast" as "Link=1", "Link=2", "Fast" (tor-spec 9).
    for word in text.decode().split():
        name, equals, ranges = word.partition("=")
        if not equals:
            yield name
        for low, high in number_ranges(ranges) if ranges else ():
            require(0 <= low <= high < 64, "bad protocol version")
            for version in range(low, high + 1):
                yield "%s=%d" % (name, version)


# How the parameters begin that a board asks for; there are 40 others.
_PARAMS = "ci gu hs mi us va"


def _integers(text, kept):
    # A board keeps what it asks for.
    words = [word.split("=") for word in text.decode().split()]
    return {name: int(n) for name, n in words if not MICROPYTHON or name[:2] in kept}


def clock_error(ahead):
    """A ClockError: by how many seconds this machine's clock is ahead, or (negative) behind."""
    hours = (abs(ahead) + 1800) // 3600
    much = "%d hours" % hours if hours < 96 else "%d days" % (hours // 24)
    text = "about %s ahead" if ahead > 0 else "at least %s behind"
    return ClockError("the clock of this machine is %s: set it, as by NTP" % text % much)


class Consensus:
    """What stands around the relays in a consensus (dir-spec 3.4.1): the lines `head`."""

    def __init__(self, head):
        item, self.head = document(head), head
        text = lambda name: item(name)[0]
        times = map(text, (b"valid-after", b"fresh-until", b"valid-until"))
        self.valid_after, self.fresh_until, self.valid_until = map(parse_time, times)
        kind = text(b"network-status-version"), text(b"vote-status")
        good = kind == (b"3 microdesc", b"consensus") and int(text(b"consensus-method")) >= 28
        good = good and self.valid_after < self.fresh_until <= self.valid_until
        require(good, "this is no consensus of the microdescriptor flavour")
        self.params = _integers(text(b"params"), _PARAMS)
        self.bandwidth_weights = _integers(text(b"bandwidth-weights"), "Wg Wm We")
        required = set(_versions(text(b"required-client-protocols")))
        self.lacking = sorted(required - set(_versions(_SUPPORTED)))
        srvs = map(text, (b"shared-rand-previous-value", b"shared-rand-current-value"))
        self.srv_previous, self.srv_current = [s and b64decode(s.split(b" ")[-1], 32) for s in srvs]

    def param(self, name, default, low=0, high=2147483647):
        return min(max(self.params.get(name, default), low), high)

    def missing_certs(self, certs, authorities):
        t = self.valid_after
        return [p for p in self.signatures if p[0] in authorities and certs.get(p, (0, -1))[1] < t]

    def verify(self, certs, authorities):
        """Raise DirectoryError unless more than half of `authorities` signed this."""
        signed = set()
        for pair, signature in self.signatures.items():
            key, expires = certs.get(pair, (None, -1))
            if expires >= self.valid_after and rsa_verify(key, self.digest, signature):
                signed.add(pair[0])
        counts = len(signed & set(authorities)), len(authorities)
        if counts[0] * 2 <= counts[1]:
            raise DirectoryError("only %d of %d authorities signed the consensus" % counts)

    def check_times(self, when):
        """Raise DirectoryError, ClockError or ConfigError unless good at `when` (+- 1 day)."""
        age = when - self.valid_after
        if when > self.valid_until + 86400:
            text = "the consensus is %d hours old (or the clock is ahead)"
            raise DirectoryError(text % (age // 3600))
        if age < -86400:
            raise clock_error(age)
        if self.lacking and self.valid_after >= _RELEASED:
            raise ConfigError("get a newer minitor: the network requires " + " ".join(self.lacking))


class _Splitter:
    # Cuts what arrives at each `_mark`, for `_entry`.
    def __init__(self, sink):
        self._sink, self._rest, self._hash, self._bits = sink, b"", None, {}

    def feed(self, data):
        entries = (self._rest + data).split(self._mark)
        self._rest = entries.pop()
        try:
            for entry in entries:
                self._entry(entry)
        except (ValueError, IndexError):
            raise ProtocolError("a document is malformed")
        require(len(self._rest) <= 32768, "a part of a document is too long")


class CertParser(_Splitter):
    """Parses authority certificates (dir-spec 3.1) of `identities` into the dict `certs`.

    {(identity, digest of the signing key): (signing key, when it expires)}
    """

    _mark = b"\n"

    def __init__(self, certs, identities):
        super().__init__(certs)
        self._identities = identities

    def _entry(self, line):
        if line == b"dir-key-certificate-version 3":
            self._hash, self._items, self._body = Sha1(), {}, None
        if not self._hash:
            return
        if b"dir-key-certification" not in self._items:
            self._hash.update(line + b"\n")
        if line.startswith(b"-----BEGIN "):
            self._body = b""
        elif line.startswith(b"-----"):
            self._items[self._name], self._body = b64decode(self._body or b""), None
            if self._name == b"dir-key-certification":
                self._judge()
        elif self._body is None:
            self._name, _, arguments = line.partition(b" ")
            require(self._name not in self._items, "an authority certificate has two of a kind")
            self._items[self._name] = arguments
        else:
            self._body += line

    def _judge(self):
        item = lambda name: self._items.get(b"dir-" + name, b"")
        digest, self._hash = self._hash.digest(), None
        identity, signing = item(b"identity-key"), item(b"signing-key")
        fingerprint = sha1(identity)
        if fingerprint in self._identities:
            key = rsa_public_key(signing)
            good = rsa_verify(rsa_public_key(identity), digest, item(b"key-certification"))
            good = good and rsa_verify(key, fingerprint, item(b"key-crosscert"))
            require(good, "an authority certificate has a bad signature")
            self._sink[fingerprint, sha1(signing)] = key, parse_time(item(b"key-expires"))


_SIGNATURE = b"\ndirectory-signature "
# What a Consensus is made of, beside its footer.
_HEAD = (
    b" network-status-version vote-status consensus-method valid-after fresh-until valid-until "
    b"params required-client-protocols shared-rand-previous-value shared-rand-current-value "
)


class ConsensusParser(_Splitter):
    """Parses a consensus for `sink`: RelayTable.add."""

    _mark, _head, _signatures = b"\nr ", None, None

    def feed(self, data):
        if self._head is None:
            data = self._begin(data)
        super().feed(data)
        signed, found, rest = self._rest.partition(_SIGNATURE)
        if found:
            self._rest, footer, self._weights = signed.partition(b"\ndirectory-footer\n")
            require(footer and self._head, "the consensus is truncated")
            super().feed(self._mark)
            self._hash.update(footer[1:] + self._weights + _SIGNATURE)
            self._mark, self._signatures, self._rest = _SIGNATURE, {}, b""
            self.feed(rest)

    def _begin(self, data):
        # Line by line, what stands before the relays.
        data, at = self._rest + data, 0
        self._hash, self._rest = self._hash or hashlib.sha256(), b""
        while (end := data.find(b"\n", at) + 1) > 0:
            if data[at : at + 2] == b"r ":
                self._head = b"\n".join(self._bits.values()) + b"\n"
                self._bits.clear()
                return data[at + 2 :]
            line, at = data[at:end], end
            self._hash.update(line)
            keyword = line.split(b" ")[0].strip()
            good = keyword not in self._bits and keyword != b"directory-signature"
            require(good, "a document is malformed")
            if b" %s " % keyword in _HEAD:
                self._bits[keyword] = line[:-1]
        self._rest = data[at:]
        return b""

    def _signature(self, text):
        arguments, body = document(_SIGNATURE + text)(b"directory-signature")
        # Without a name it is SHA-1.
        if arguments.startswith(b"sha256 "):
            identity, key = map(binascii.unhexlify, arguments.split(b" ")[1:3])
            self._signatures[identity, key] = body

    def _entry(self, text):
        if self._signatures is not None:
            return self._signature(text)
        require(_SIGNATURE not in text, "a document is malformed")
        text = b"\nr " + text
        self._hash.update(text[1:] + b"\n")
        get = {line[:2]: line[2:] for line in text.split(b"\n")}.get
        if not get(b"m "):
            return
        fields = get(b"r ").split(b" ")
        address = bytes(map(int, fields[4].split(b".")))
        high, low = (get(b"a ", b"").partition(b"[")[2] + b"::").split(b":")[:2]
        net6 = int(b"0" + high, 16) << 16 | int(b"0" + low, 16)
        weight = int(get(b"w ", b"").partition(b"Bandwidth=")[2].split(b" ")[0] or 0)
        flags = self._flags(get(b"s ", b"")) | self._flags(get(b"pr", b""))
        keys = b64decode(fields[1], 20), b64decode(get(b"m "), 32)
        self._sink(*keys, address, int(fields[5]), net6, flags, weight)

    def _flags(self, words):
        # A few lines are those of nearly all relays.
        if words not in self._bits:
            if len(self._bits) > (15 if MICROPYTHON else 255):
                self._bits.clear()
            found = set(_versions(words))
            self._bits[words] = sum([1 << i for i, word in enumerate(FLAG_WORDS) if word in found])
        return self._bits[words]

    def finish(self):
        """The Consensus, with `digest`, and `signatures` by (identity, key digest)."""
        good = self._signatures is not None and self._rest[-1:] == b"\n"
        require(good, "the consensus is truncated")
        self.feed(_SIGNATURE)
        try:
            c = Consensus(self._head + self._weights)
        except ValueError:
            raise ProtocolError("a document is malformed")
        c.digest, c.signatures = self._hash.digest(), self._signatures
        return c


class MicrodescParser(_Splitter):
    """Parses microdescriptors (dir-spec 3.3) for `sink(digest, keys, beside)`.

    Keys: Ed25519 identity and ntor key, less if malformed; beside: exit policy, family (4 bytes
    of each member), family ids (8 of each SHA-256).
    """

    _mark = b"\n"

    def feed(self, data):
        super().feed(data)
        # A family line can have 128 KB.
        cut = self._rest.rfind(b" $")
        if cut > 256:
            self._entry(self._rest[:cut], b"")
            self._rest = self._rest[cut:]

    def finish(self):
        require(not self._rest, "a microdescriptor is truncated")
        self._entry(b"onion-key")

    def _entry(self, line, end=b"\n"):
        if line == b"onion-key":
            if self._hash:
                self._sink(self._hash.digest(), b"".join(self._keys), self._beside)
            self._hash = hashlib.sha256(b"onion-key\n")
            self._keys, self._beside = [b"", b""], [b"", b"", b""]
        elif self._hash:
            self._hash.update(line + end)
            try:
                self._item(line, line.split(b" "))
            except (ProtocolError, ValueError, IndexError):
                # Nothing can be put there any more.
                self._keys = []

    def _item(self, line, word):
        if word[0] == b"ntor-onion-key":
            self._keys[1] = b64decode(word[1], 32)
        elif word[:2] == [b"id", b"ed25519"]:
            require(not self._keys[0], "two identities")
            self._keys[0] = b64decode(word[2], 32)
        elif word[0] == b"p":
            self._beside[0] = line[2:]
        elif word[0] in (b"family", b""):
            members = [binascii.unhexlify(one[1:9]) for one in word if one[:1] == b"$"]
            self._beside[1] = (self._beside[1] + b"".join(members))[:4096]
        elif word[0] == b"family-ids":
            self._beside[2] = b"".join([sha256(one)[:8] for one in word[1:17] if one])


# === 7. Relay table ===
# The relays of a consensus in fixed records, sorted by RSA identity.

# RSA identity; IPv4 address, port, IPv6 /32; Ed25519 identity, at first the microdescriptor's
# digest; ntor key.  In memory: numbers of exit policy, family, family ids; half of the digest.
_RECORD, _SIZE = ">20s4sHI70s16s", 116
# Bytes of distinct policies and families, fewer than 65536: what is beyond is none.
_MAX_BESIDE = 4 << 20
_LAYOUT = repr((_RECORD, FLAG_WORDS, sys.byteorder)).encode("ascii")


class Record:
    """A descriptor; or a relay: `address` (text), `port`, `rsa_id`, `ed_id`, `ntor_key`, …"""

    private = False


def _tagged(r, size):
    # [(type, value)]; lengths have `size` bytes.
    return [(r.uint(1), r.take(r.uint(size))) for _ in range(r.uint(1))]


def parse_link_specifiers(r, ntor_key):
    """Take `specifiers` (tor-spec 5.1.2) from a Reader; return the relay, perhaps `private`."""
    start, t, pairs = r.at, Record(), _tagged(r, 1)
    t.specifiers, t.ntor_key = r.data[start : r.at], ntor_key
    # Relays take the first address.
    found, ids = dict(reversed(pairs)), [kind for kind, _ in pairs if kind in (2, 3)]
    where, t.rsa_id, t.ed_id = [found.get(kind, b"") for kind in (0, 2, 3)]
    good = list(map(len, (where, t.rsa_id, t.ed_id, ids))) == [6, 20, 32, 2]
    # EXTEND2 has room for 498, 88 of them for the rest.
    require(good and len(t.specifiers) <= 410, "unusable link specifiers")
    t.address, t.port = ".".join(map(str, where[:4])), uint(where[4:])
    # RFC 6890.
    a, b = where[:2]
    t.private = a in (0, 10, 127) or a > 223 or (a, b) in ((169, 254), (192, 168))
    t.private |= (a, b >> 6) == (100, 1) or (a, b >> 4) == (172, 1)
    return t


def policy_takes(policy, spans):
    """Return for each (low, high) whether an exit policy takes all these ports."""
    word, _, ports = policy.partition(b" ")
    try:
        ranges = list(number_ranges(ports.decode()))
    except ValueError:
        word = b""
    if word == b"accept":
        return [any([a <= low and high <= b for a, b in ranges]) for low, high in spans]
    good = word == b"reject"
    return [good and all([high < a or b < low for a, b in ranges]) for low, high in spans]


class _Relays:
    # `whole`: all microdescriptors are to be fetched before use; `short`: for some relays there
    # was no room.
    use_family_lists, use_family_ids, whole, short = True, True, False, False

    def relay(self, i):
        r, where = Record(), self._field(i, 20, 6)
        r.rsa_id, r.ed_id, r.ntor_key = self.rsa_id(i), self.ed_id(i), self._field(i, 62, 32)
        r.specifiers = b"\3\0\6%s\2\x14%s\3\x20%s" % (where, r.rsa_id, r.ed_id)
        r.address, r.port = ".".join(map(str, where[:4])), uint(where[4:])
        r.index, r.flags = i, self.flags_of(i)
        return r

    def rsa_id(self, i):
        return self._field(i, 0, 20)

    def ed_id(self, i):
        return self._field(i, 30, 32)

    def digest(self, i):
        """Of the microdescriptor, while it is not there."""
        return self._field(i, 30, 32)

    def subnets(self, i):
        return unpack(">H4xI", self._field(i, 20, 10))

    def find(self, rsa_id):
        """Return the index of a relay, or -1."""
        # They are spread evenly.
        low, high, first, last, key = 0, len(self), 0, 1 << 24, uint(rsa_id[:3])
        while low < high and first <= key <= last:
            at = low + (key - first) * (high - low) // (last - first + 1)
            i = self.index_at(at)
            found = self.rsa_id(i)
            if found == rsa_id:
                return i
            if found < rsa_id:
                low, first = at + 1, uint(found[:3])
            else:
                high, last = at, uint(found[:3])
        return -1


class RelayTable(_Relays):
    """The relays in memory; indexes count from 0."""

    def __init__(self, records=b"", flags=b"", weights=b"", beside=(b"",)):
        self.records = bytearray(records)
        self.flags, self.weights = array("I", flags), array("I", weights)
        # Exit policies, families and family ids: each once, and its number.
        self._beside, self._numbers, self._room = [], {}, _MAX_BESIDE
        for text in beside:
            self._number(text)

    def _number(self, text):
        room = self._room - len(text) - 64
        if text not in self._numbers and room >= 0:
            self._room, self._numbers[text] = room, len(self._beside)
            self._beside.append(text)
        return self._numbers.get(text, 0)

    def add(self, rsa_id, md_digest, address, port, net6, flags, weight):
        n = len(self)
        good = 0 < port < 65536 and len(address) == 4 and not (weight | net6) >> 32
        good = good and n < 65535 and self.rsa_id(n - 1) < rsa_id
        require(good, "a relay is malformed, not in order, or one too many")
        fields = rsa_id, address, port, net6, md_digest, md_digest
        self.records += pack(_RECORD, *fields)
        self.flags.append(flags)
        self.weights.append(weight)

    def __len__(self):
        return len(self.flags)

    def flags_of(self, i):
        return self.flags[i]

    def index_at(self, n):
        return n

    def finish(self, consensus, old):
        """Take over from the table `old`, or None, what is the same in this new one."""
        if old:
            self.carry_over(old)

    def _field(self, i, at, size):
        at += i * _SIZE
        return bytes(self.records[at : at + size])

    def rows(self, mask=0, need=0):
        """Yield index, flags and weight of the relays that have of `mask` just `need`."""
        for i, flags in enumerate(self.flags):
            if flags & mask == need:
                yield i, flags, self.weights[i]

    def identities(self, need):
        """Yield index and Ed25519 identity of the relays with all flags `need`."""
        for i, _, _ in self.rows(need, need):
            yield i, self.ed_id(i)

    def missing(self, most=65535):
        """Yield the relays whose microdescriptors are to be fetched: lists of `most` indexes."""
        yield from _pieces([i for i, _, _ in self.rows(KNOWN, 0)], most)

    def set_microdesc(self, i, keys, beside):
        self.flags[i] |= KNOWN
        if len(keys) == 64:
            self.flags[i] |= USABLE
            numbers = [self._number(text) for text in beside]
            pack_into(">64sHHH", self.records, i * _SIZE + 30, keys, *numbers)

    def _texts(self, i):
        numbers = unpack(">HHH", self._field(i, 94, 6))
        return [self._beside[n] for n in numbers]

    def carry_over(self, old):
        for i, _, _ in self.rows(KNOWN, 0):
            j, half = old.find(self.rsa_id(i)), self._field(i, 100, 16)
            if j >= 0 and old.flags[j] & KNOWN and old._field(j, 100, 16) == half:
                keys = old._field(j, 30, 64 if old.flags[j] & USABLE else 0)
                self.set_microdesc(i, keys, old._texts(j))

    def same_family(self, i, j):
        (_, list_i, ids_i), (_, list_j, ids_j) = self._texts(i), self._texts(j)
        shared = self.use_family_ids and set(_pieces(ids_i, 8)) & set(_pieces(ids_j, 8))
        listed = self.use_family_lists and self.rsa_id(j)[:4] in _pieces(list_i, 4)
        return shared or listed and self.rsa_id(i)[:4] in _pieces(list_j, 4)

    def exit_allows(self, i, port):
        return policy_takes(self._texts(i)[0], [(port, port)])[0]

    def save(self, path, network_id, consensus):
        pieces = [consensus.head, self.records, self.flags, self.weights] + self._beside
        body = b"".join([pack(">I", len(piece)) + piece for piece in map(bytes, pieces)])
        cache_file(path, sha256(_LAYOUT + network_id + body) + body)


# On flash: a file "hot" of rows in the consensus's order, written anew each hour (which commits
# all), and shards of records, in slots that keep their relays: what is new goes where the hot
# file in force has nothing.  A row: flags, weight (5 bits exponent), slot, 4 bytes of a hash over
# what the record was made of.  A record: as above; bits of exit policy, family ids, family.
_ROW, _ROWS, _COLD, _SLOT, _SHARDS = "<HHH4s", 50, ">20s4sHI80s", 110, 400
# A shard: digest, bits of its usable slots, records: one block.  40 numbers, 37 of them slots.
_SLOTS = 37
# Where the spans of ports begin for which a bit tells that all in them are taken.
_PORTS = (
    "1 20 22 23 25 26 53 54 80 81 110 111 143 144 443 444 465 466 587 588 993 996 5222 5223 "
    "6667 6668 6697 6698 8000 8080 8081 9001"
)
# What is open for writing, to be closed before another opens it.
_writing = []


def _bit(bits, i):
    return bits[i >> 3] >> (i & 7) & 1


def _family_bit(rsa_id):
    return 1 << (rsa_id[3] & 63)


class FlashTable(_Relays):
    """The relays in files; indexes are numbers of slots."""

    def __init__(self, path, network_id):
        self._path, self._salt = path + ".d/", sha256(_LAYOUT + network_id)
        self._n = self.shards = 0
        self._rows, self._first, self._found = array("H", bytes(10 * _ROWS)), -1, {}
        # The records of one shard by fours: neither large pieces of memory nor many.
        self._usable, self._records, self._loaded, self._dirty = bytearray(), None, -1, 0
        self._old = self._hot = self._new = None
        self._forced, self._failed = True, False

    def _digest(self, n, pieces):
        h = hashlib.sha256(self._salt + bytes((n >> 8, n & 255)))
        for piece in pieces:
            h.update(piece)
        return h.digest()[:16]

    def load(self):
        """Return the Consensus, or None where something is missing or damaged."""
        try:
            self._open("hot")
            size = self._hot.seek(0, 2)
            if size < 40:
                return None
            self._hot.seek(size - 40)
            tail, h = self._hot.read(40), hashlib.sha256(self._salt)
            head, self.shards, self._n = unpack(">IHH", tail[:8])
            self._hot.seek(0)
            for left in range(size - 32, 0, -1024):
                h.update(self._hot.read(min(left, 1024)))
            good = h.digest() == tail[8:] and size == 10 * self._n + head + 40
            for n in range(self.shards if good else 0):
                with open(self._path + str(n), "rb") as f:
                    digest, bits = f.read(16), f.read(5)
                    # One piece more, which has to be empty.
                    pieces = [bits] + [f.read(_SLOT) for _ in range(_SLOTS + 1)]
                self._usable.extend(bits)
                if self._digest(n, pieces) != digest:
                    return None
            self._hot.seek(10 * self._n)
            return Consensus(self._hot.read(head)) if good else None
        except (OSError, ValueError):
            return None

    def begin(self, old):
        """Be ready for a new consensus; `old`: the table in force, or None."""
        while _writing:
            _writing.pop().close()
        private_dir(self._path[:-1])
        if old:
            self._usable, self.shards, self.whole = old._usable, old.shards, True
        else:
            self._remove("hot")
            n = 0
            while self._remove(str(n)):
                n += 1
        self._old, self._cursor, self._last, self._vacant = old, 0, b"", self._slots(old)
        self._hot, self._sum = open(self._path + "hot.tmp", "wb"), hashlib.sha256(self._salt)
        _writing.append(self._hot)
        if old:
            # It waits there for its microdescriptors: each shard is written once.
            self._new = open(self._path + "new", "wb")
            _writing.append(self._new)

    def _remove(self, name):
        try:
            os.remove(self._path + name)
            return True
        except OSError:
            pass

    def _open(self, name):
        self._hot, self._first = open(self._path + name, "rb"), -1

    def _slots(self, old):
        # Yield those that `old` does not use: of the emptiest shards first.
        count, used, most = bytearray(_SHARDS), b"", _SHARDS
        if old:
            most = min(max(old.shards, len(old) // 31 + 1), _SHARDS)
            used = bytearray(5 * most)
            for i, _, _ in old.rows():
                used[i >> 3] |= 1 << (i & 7)
                count[i // 40] += 1
        for least in range(_SLOTS):
            for n in range(most):
                if count[n] != least:
                    continue
                self.shards = max(self.shards, n + 1)
                self._usable.extend(bytes(5 * self.shards - len(self._usable)))
                for i in range(40 * n, 40 * n + _SLOTS):
                    if not (old and _bit(used, i)):
                        yield i

    def add(self, rsa_id, md_digest, address, port, net6, flags, weight):
        good = 0 < port < 65536 and len(address) == 4 and not (weight | net6) >> 32
        require(good and self._last < rsa_id, "a relay is malformed, or not in order")
        self._last = rsa_id
        fields = pack(_COLD, rsa_id, address, port, net6, md_digest)[:62]
        mark = sha256(fields)[:4]
        i = self._kept(rsa_id, unpack("<HH", mark))
        if i < 0:
            i = next(self._vacant, -1)
            if i < 0:
                self.short = True
                return
            self._usable[i >> 3] &= ~(1 << (i & 7))
            if self._new:
                self._new.write(pack("<H", i) + fields)
            else:
                self._place(i, fields)
        exponent = 0
        while weight >> 11:
            weight, exponent = weight >> 1, exponent + 1
        row = pack(_ROW, flags, exponent << 11 | weight, i, mark)
        self._hot.write(row)
        self._sum.update(row)
        self._n += 1

    def _kept(self, rsa_id, mark):
        # Its slot in the old table, or -1 if something is new.
        old = self._old
        while old and self._cursor < len(old):
            at, h = old._row(self._cursor), old._rows
            i, same = h[at + 2], (h[at + 3], h[at + 4]) == mark
            if not same and old.rsa_id(i) > rsa_id:
                break
            self._cursor += 1
            if same:
                return i
        return -1

    def finish(self, consensus, old):
        tail = consensus.head + pack(">IHH", len(consensus.head), self.shards, self._n)
        self._sum.update(tail)
        self._hot.write(tail + self._sum.digest())
        self._flush()
        while _writing:
            _writing.pop().close()
        self._open("hot.tmp")
        self._vacant, self._records, self._loaded = None, None, -1
        self._forced = False

    def __len__(self):
        return self._n

    def _row(self, n):
        # Where row `n` is in self._rows.
        at = n % _ROWS
        if self._first != n - at:
            self._first = n - at
            self._hot.seek(10 * self._first)
            self._hot.readinto(self._rows)
        return 5 * at

    def index_at(self, n):
        return self._rows[self._row(n) + 2]

    def rows(self, mask=0, need=0):
        h, usable = self._rows, self._usable
        for first in range(0, self._n, _ROWS):
            for at in range(0, 5 * min(_ROWS, self._n - first), 5):
                if self._first != first:
                    self._row(first)
                i, flags = h[at + 2], h[at]
                if usable[i >> 3] >> (i & 7) & 1:
                    flags |= USABLE
                if flags & mask == need:
                    weight = h[at + 1]
                    yield i, flags, (weight & 2047) << (weight >> 11)

    def flags_of(self, i):
        return USABLE if _bit(self._usable, i) else 0

    def identities(self, need):
        # In the order of slots: each shard is opened once.
        self._flush()
        wanted = bytearray(5 * self.shards)
        for i, _, _ in self.rows(need, need):
            wanted[i >> 3] |= 1 << (i & 7)
        for n in range(self.shards):
            with open(self._path + str(n), "rb") as f:
                for i in range(40 * n, 40 * n + _SLOTS):
                    if _bit(wanted, i):
                        f.seek(51 + i % 40 * _SLOT)
                        yield i, f.read(32)

    def find(self, rsa_id):
        # A few relays are looked up again and again.
        if rsa_id not in self._found:
            if len(self._found) > 7:
                self._found.clear()
            self._found[rsa_id] = _Relays.find(self, rsa_id)
        return self._found[rsa_id]

    def _field(self, i, at, size):
        if i // 40 == self._loaded:
            at += i % 4 * _SLOT
            return bytes(self._records[i % 40 // 4][at : at + size])
        return self._read(i // 40, 21 + i % 40 * _SLOT + at, size)

    def _read(self, n, at, size):
        with open(self._path + str(n), "rb") as f:
            f.seek(at)
            return f.read(size)

    def _load(self, n):
        if n != self._loaded:
            self._flush()
            self._loaded = -1
            if not self._records:
                sizes = [min(4, _SLOTS - i) * _SLOT for i in range(0, _SLOTS, 4)]
                self._records = [bytearray(size) for size in sizes]
            try:
                with open(self._path + str(n), "rb") as f:
                    f.seek(21)
                    for four in self._records:
                        f.readinto(four)
            except OSError:
                for four in self._records:
                    four[:] = bytes(len(four))
            self._loaded = n

    def _flush(self):
        n = self._loaded
        if self._dirty:
            self._dirty = 0
            pieces = [self._usable[5 * n : 5 * n + 5]] + self._records
            try:
                write_file(self._path + str(n), self._digest(n, pieces), *pieces)
            except OSError:
                # Usable is what is there; a new table cannot come into force any more.
                self._loaded, self._failed = -1, True
                self._usable[5 * n : 5 * n + 5] = bytes(5)
                self._usable[5 * n : 5 * n + 5] = self._read(n, 16, 5)
                raise

    def _place(self, i, fields, usable=0):
        # Set the record of a relay whose microdescriptor is not there, or that has none.
        self._load(i // 40)
        bit = 1 << (i & 7)
        at, four = i % 4 * _SLOT, self._records[i % 40 // 4]
        four[at : at + _SLOT] = fields + bytes(_SLOT - len(fields))
        self._usable[i >> 3] = self._usable[i >> 3] & ~bit | usable * bit
        self._dirty = 1

    def _pending(self):
        # Put the new ones into their shards; yield the slots of each shard.
        wanted = []
        with open(self._path + "new", "rb") as f:
            while fields := f.read(64):
                i = fields[0] | fields[1] << 8
                if wanted and i // 40 != self._loaded:
                    yield wanted
                    wanted = []
                if not self.flags_of(i):
                    self._place(i, fields[2:])
                    wanted.append(i)
        if wanted:
            yield wanted
        self._flush()
        self._new = None

    def missing(self, most=0):
        """As RelayTable's, but shard by shard."""
        wanted = []
        if self._new:
            return (yield from self._pending())
        for i, _, _ in self.rows(USABLE, 0):
            if wanted and i // 40 != self._loaded:
                yield wanted
                wanted = []
            self._load(i // 40)
            if any(self.digest(i)):
                wanted.append(i)
        if wanted:
            yield wanted

    def set_microdesc(self, i, keys, beside):
        self._load(i // 40)
        good, fields = len(keys) == 64, self._field(i, 0, 30)
        if good:
            policy, family, ids = beside
            starts = [int(port) for port in _PORTS.split()]
            taken = policy_takes(policy, [(a, b - 1) for a, b in zip(starts, starts[1:] + [65536])])
            ports = sum([1 << n for n, all_of_it in enumerate(taken) if all_of_it])
            ids, bits = b"".join([one[:2] for one in _pieces(ids, 8)[:2]]), 0
            for member in _pieces(family, 4):
                bits |= _family_bit(member)
            fields += keys + pack(">I4sQ", ports, ids, bits)
        self._place(i, fields, good)

    def exit_allows(self, i, port):
        n = sum([int(start) <= port for start in _PORTS.split()]) - 1
        return bool(uint(self._field(i, 94, 4)) >> n & 1)

    def same_family(self, i, j):
        # Those that are of one family always are; some that are not, seem to be.
        a, b = [self._field(k, 98, 12) for k in (i, j)]
        shared = set(_pieces(a[:4], 2)) & set(_pieces(b[:4], 2)) - {b"\0\0"}
        if self.use_family_ids and shared:
            return True
        mutual = uint(a[4:]) & _family_bit(self.rsa_id(j)) and uint(b[4:])
        return bool(self.use_family_lists and mutual & _family_bit(self.rsa_id(i)))

    def save(self, path, network_id, consensus):
        """Put the new table into force, or keep what came since."""
        try:
            for _ in self._pending() if self._new else ():
                pass
            self._flush()
            self._records, self._loaded = None, -1
            if not self._forced:
                if self._failed:
                    raise OSError("a shard is lacking")
                replace(self._path + "hot.tmp", self._path + "hot")
                for table in (self, self._old or self):
                    table._hot.close()
                self._open("hot")
                self._forced, self._old = True, None
                self._remove("new")
        except OSError as e:
            raise DirectoryError("the relays cannot be written to %s: %s" % (self._path, e))


def new_table(path, network_id, old):
    """Return an empty table, to take the place of `old` (or None)."""
    if not MICROPYTHON:
        return RelayTable()
    table = FlashTable(path, network_id)
    table.begin(old)
    return table


def load_table(path, network_id):
    """The (table, Consensus) that `save` wrote, or None."""
    if MICROPYTHON:
        table = FlashTable(path, network_id)
        consensus = table.load()
        return consensus and (table, consensus)
    data = read_file(path) or b""
    r, pieces = Reader(data[32:]), []
    if sha256(_LAYOUT + network_id + r.data) != data[:32]:
        return None
    while r.left():
        pieces.append(r.take(r.uint(4)))
    return RelayTable(*pieces[1:4], pieces[4:]), Consensus(pieces[0])


# === 8. Cells and handshakes ===
# tor-spec 3 to 6, rend-spec-v3 3, 4.

PADDING, RELAY, DESTROY, CREATE_FAST, CREATED_FAST = 0, 3, 4, 5, 6
VERSIONS, NETINFO, RELAY_EARLY, CREATE2, CREATED2, PADDING_NEGOTIATE = range(7, 13)
VPADDING, CERTS, AUTH_CHALLENGE = 128, 129, 130

BEGIN, DATA, END, CONNECTED, SENDME = range(1, 6)
TRUNCATED, DROP, RESOLVE, RESOLVED, BEGIN_DIR = range(9, 14)
EXTEND2, EXTENDED2, XOFF, XON, DATA_MAX = 14, 15, 43, 44, 498
ESTABLISH_INTRO, ESTABLISH_RENDEZVOUS, INTRODUCE1 = range(32, 35)
INTRODUCE2, RENDEZVOUS1, RENDEZVOUS2 = range(35, 38)
INTRO_ESTABLISHED, RENDEZVOUS_ESTABLISHED, INTRODUCE_ACK = range(38, 41)

# By number: tor-spec 6.3 and 5.4.
END_REASONS = (
    "none|no reason given|host not found|connection refused|exit policy|circuit destroyed|closed|"
    "timeout|no route|hibernating|internal error|out of resources|connection reset|"
    "protocol error|no directory"
).split("|")
DESTROY_REASONS = (
    "no reason given|protocol error|internal error|requested|hibernating|out of resources|"
    "next relay unreachable|next relay is another|link closed|too old|timeout|destroyed|"
    "no such service"
).split("|")
END_CONNECTREFUSED, END_DONE, END_TIMEOUT, END_RESOURCELIMIT = 3, 6, 7, 11


def reason_text(reasons, number):
    return reasons[number] if number < len(reasons) else "unknown reason %d" % number


def cell(circ_id, command, body=b""):
    return pack(">IB", circ_id, command) + body + bytes(509 - len(body))


def parse_certs(body, tls_digest, rsa_id, ed_id):
    """Verify CERTS (tor-spec 4.2, cert-spec 2.3) of a relay but for the time.

    Return its Ed25519 identity, and when the first certificate expires.
    """
    pairs = _tagged(Reader(body, "CERTS"), 2)
    certs = dict(pairs)
    good = len(certs) == len(pairs) and {2, 4, 5, 7}.issubset(certs)
    require(good, "CERTS: one is missing, or comes twice")
    # Of the X.509 certificate only the key (1024 bits) counts: the cross-certificate proves it.
    at, cross = certs[2].find(b"0\x81\x89\2\x81\x81\0"), certs[7]
    key, r = certs[2][at : at + 140], Reader(cross, "CERTS")
    identity, expires, signature = r.take(32), r.uint(4), r.take(r.uint(1))
    good = sha1(key) == rsa_id and ed_id in (None, identity)
    require(good, "CERTS: not the relay expected")
    digest = sha256(b"Tor TLS RSA/Ed25519 cross-certificate" + cross[:36])
    good = not r.left() and rsa_verify(rsa_public_key(key), digest, signature)
    require(good, "CERTS: the RSA cross-certificate is wrong")
    key = check_ed_cert(certs[4], 4, identity, 0)
    good = check_ed_cert(certs[5], 5, key, 0) == tls_digest
    require(good, "CERTS: for another TLS certificate")
    return identity, 3600 * min([expires] + [uint(certs[kind][2:6]) for kind in (4, 5)])


_NTOR = b"ntor-curve25519-sha256-1"


def ntor(rsa_id, B):
    """CREATE2 for ntor (tor-spec 5.1.4) and a function: CREATED2 to Df, Db, Kf, Kb, KH."""
    x, X = x25519_keypair()

    def finish(reply):
        Y = reply[2:34]
        secret = x25519(x, Y) + x25519(x, B) + rsa_id + B + X + Y + _NTOR
        verify = hmac_sha256(_NTOR + b":verify", secret)
        mac = hmac_sha256(_NTOR + b":mac", verify + rsa_id + B + Y + X + _NTOR + b"Server")
        good = reply[:2] == b"\0\x40" and consteq(mac, reply[34:66])
        require(good, "ntor: the relay lacks its onion key")
        return hkdf_sha256(secret, _NTOR + b":key_extract", _NTOR + b":key_expand", 92)

    return b"\0\2\0\x54" + rsa_id + B + X, finish


def fast_finish(x, reply):
    """Keys as ntor's, for CREATE_FAST with `x` (tor-spec 5.1.3)."""
    k = b"".join([sha1(x + reply[:20] + bytes([i])) for i in range(5)])
    require(consteq(k[:20], reply[20:40]), "CREATED_FAST: the key hash is wrong")
    return k[20:92] + k[:20]


def begin(host, port, flags=1):
    """BEGIN's body; `host` "": of an onion service; `flags` 1: IPv6 will do (tor-spec 6.2)."""
    host = "[%s]" % host if ":" in host else host
    return b"%s:%d\0%s" % (host.encode(), port, pack(">I", flags) if host else b"")


def parse_begin(body):
    """The port (tor-spec 6.2)."""
    text, end, _ = body.partition(b"\0")
    require(end and b":" in text, "bad BEGIN")
    return decimal(text.split(b":")[-1], 1, 65535)


def parse_resolved(body, names=False):
    """The addresses (text), or the `names`, in RESOLVED (tor-spec 6.4)."""
    r, found = Reader(body, "RESOLVED"), []
    while r.left():
        kind, value, _ = r.uint(1), r.take(r.uint(1)), r.take(4)
        require(len(value) == {4: 4, 6: 16}.get(kind, len(value)), "bad RESOLVED")
        if names:
            if kind == 0 and value.isascii():
                found.append(value.decode())
        elif kind == 4:
            found.append(".".join(map(str, value)))
        elif kind == 6:
            found.append(":".join(["%x" % n for n in unpack(">8H", value)]))
    return found


# rend-spec-v3 3, 4.  `intro`: a relay with `auth_key` and `enc_key`; secret: `esk`, `b`.

_HS = b"tor-hs-ntor-curve25519-sha3-256-1"
_EXTRACT, _EXPAND = _HS + b":hs_key_extract", _HS + b":hs_key_expand"
_AUTH = b"\2\0\x20"


def hs_mac(key, message):
    return sha3_256(len(key).to_bytes(8, "big") + key + message)


def establish_intro(intro, kh):
    # 3.1.1; `kh`: KH of the circuit's last hop.
    data = _AUTH + intro.auth_key + b"\0"
    data += hs_mac(kh, data)
    signed = b"Tor establish-intro cell v1" + data
    return data + b"\0\x40" + ed25519_sign(intro.esk, intro.auth_key, signed)


def _intro_keys(exp, X, intro, subcred):
    # ENC_KEY, MAC_KEY (3.3.2).
    secret = exp + intro.auth_key + X + intro.enc_key + _HS
    return shake256(secret + _EXTRACT + _EXPAND + subcred, 64)


def _rend_keys(secret, intro, X, Y):
    # AUTH_INPUT_MAC; Df, Db, Kf, Kb (3.3.2, 4.2).
    ids = intro.auth_key + intro.enc_key
    secret += ids + X + Y + _HS
    auth = hs_mac(secret, _HS + b":hs_verify") + ids + Y + X + _HS + b"Server"
    return hs_mac(auth, _HS + b":hs_mac"), shake256(hs_mac(secret, _EXTRACT) + _EXPAND, 128)


def hs_ntor_client(intro, subcred, cookie, relay, flow=False):
    """INTRODUCE1 (3.2, 3.3) and a function: RENDEZVOUS2 to Df, Db, Kf, Kb."""
    x, X = x25519_keypair()
    exp = x25519(x, intro.enc_key)

    def finish(reply):
        mac, keys = _rend_keys(x25519(x, reply[:32]) + exp, intro, X, reply[:32])
        require(consteq(mac, reply[32:64]), "RENDEZVOUS2: the service lacks its keys")
        return keys

    keys = _intro_keys(exp, X, intro, subcred)
    # `flow`: with congestion control.
    plain = cookie + (b"\1\1\0" if flow else b"\0")
    plain += b"\1\0\x20" + relay.ntor_key + relay.specifiers
    # tor's are at least 310 bytes long.
    plain += bytes(190)[len(plain) :]
    body = bytes(20) + _AUTH + intro.auth_key + b"\0" + X + AesCtr(keys[:32]).crypt(plain)
    return body + hs_mac(keys[32:], body), finish


def hs_ntor_service(intro, subcreds, body):
    """Open INTRODUCE2 (3.3): the rendezvous point with `flow`, cookie, RENDEZVOUS1, keys."""
    r = Reader(body, "INTRODUCE2")
    require(r.take(55)[20:] == _AUTH + intro.auth_key, "INTRODUCE2: for another key")
    _tagged(r, 1)
    X = r.take(32)
    exp = x25519(intro.b, X)
    found = [_intro_keys(exp, X, intro, subcred) for subcred in subcreds]
    found = [keys for keys in found if consteq(hs_mac(keys[32:], body[:-32]), body[-32:])]
    require(found, "INTRODUCE2: the MAC is wrong")
    r = Reader(AesCtr(found[0][:32]).crypt(body[r.at : -32]), "INTRODUCE2")
    cookie, flow = r.take(20), 1 in dict(_tagged(r, 1))
    require(r.take(3) == b"\1\0\x20", "INTRODUCE2: unknown onion key")
    target = parse_link_specifiers(r, r.take(32))
    target.flow = flow
    y, Y = x25519_keypair()
    auth, keys = _rend_keys(x25519(y, X) + exp, intro, X, Y)
    # As long as tor's.
    return target, cookie, cookie + Y + auth + urandom(84), keys


# === 9. Onion addresses and descriptors ===
# Also time periods and the hash ring (rend-spec-v3 1, 2, 6, appendices A, F).


def onion_address(key):
    return b32encode(key + sha3_256(b".onion checksum" + key + b"\3")[:2] + b"\3") + ".onion"


def parse_onion_address(text):
    """The public identity key in an address, subdomains aside; AddressError."""
    name = ".".join(text.lower().rstrip(".").split(".")[-2:])
    try:
        key = b32decode(name[:-6])[:32]
        if onion_address(key) == name and ed25519_valid(key):
            return key
    except ProtocolError:
        pass
    raise AddressError("%s is no onion address (56 characters and .onion), or mistyped" % text)


def time_periods(consensus, testing):
    """A service's two time periods, and which of them clients use (2.2.1).

    Each: number, minutes, shared random value, start of its protocol run.
    """
    after = consensus.valid_after
    interval = consensus.fresh_until - after
    run = 24 * interval
    length = max(1, run // 60) if testing else consensus.param("hsdir_interval", 1440, 5, 14400)
    start = after - after // interval % 24 * interval
    number, at_start = [(t // 60 - 12 * interval // 60) // length for t in (after, start)]
    rotated = number > at_start
    found = []
    for back, value in (1, consensus.srv_previous), (0, consensus.srv_current):
        n = number + 1 - rotated - back
        disaster = b"shared-random-disaster" + pack(">QQ", length, n)
        found.append((n, length, value or sha3_256(disaster), start - back * run))
    return found[0], found[1], found[rotated]


def blinding_param(key, period):
    # A.2.
    text = b"Derive temporary signing key\0%s(%d, %d)key-blind" % ((key,) + _BASE[:2])
    return sha3_256(text + pack(">QQ", *period[:2]))


def subcredential(key, blinded):
    return sha3_256(b"subcredential" + sha3_256(b"credential" + key) + blinded)


def hsdir_ring(table, consensus, blinded, period, use):
    """The indexes of the directories where to "store" or "fetch" a descriptor (2.2.3)."""
    replicas = consensus.param("hsdir_n_replicas", 2, 1, 16)
    spread = consensus.param("hsdir_spread_" + use, 4 if use == "store" else 3, 1, 128)
    number, length, value, _ = period
    places, needed, found = [], HSDIR | HSDIR2 | USABLE, []
    for n in range(replicas):
        start = b"store-at-idx" + blinded + pack(">QQQ", n + 1, length, number)
        places.append((sha3_256(start), []))
    value += pack(">QQ", number, length)
    for i, ed_id in table.identities(needed):
        at = sha3_256(b"node-idx" + ed_id + value)
        for start, nearest in places:
            item = at < start, at, i
            if len(nearest) < replicas * spread or item < nearest[-1]:
                nearest[:] = sorted(nearest + [item])[: replicas * spread]
    for _, nearest in places:
        # A replica skips what an earlier one took.
        found += [i for _, _, i in nearest if i not in found][:spread]
    return found


def revision_counter(esk, seconds):
    """The revision counter (F.2) `seconds` into the period's protocol run."""
    # tor hashes the string's final zero.
    cipher = AesCtr(sha3_256(b"rev-counter-generation\0" + esk))
    total = n = min(max(seconds + 1, 1), 1 << 18)
    for at in range(0, n, 256):
        count = min(256, n - at)
        total += sum(unpack("<%dH" % count, cipher.crypt(bytes(2 * count))))
    return total


def make_ed_cert(kind, key, when, esk, public):
    # cert-spec 2.1, good for 54 hours.
    body = pack(">BBIB", 1, kind, when // 3600 + 54, 1) + key + b"\1\0\x20\4\0" + public
    return body + ed25519_sign(esk, public, body)


_base64 = binascii.b2a_base64  # ends the line


def _armour(keyword, label, pieces, end=b"\n"):
    # Yield an item, its object in base64.
    yield b"%s\n-----BEGIN %s-----\n" % (keyword, label)
    data = b""
    for piece in pieces:
        data += piece
        n = len(data) // 48 * 48
        if n:
            yield b"".join([_base64(data[i : i + 48]) for i in range(0, n, 48)])
            data = data[n:]
    yield (_base64(data) if data else b"") + b"-----END %s-----%s" % (label, end)


def _enc_key_ed(u):
    # The Ed25519 form, sign 0, of an X25519 key: y = (u - 1) / (u + 1).
    u = _int(u) & (1 << 255) - 1
    return _bytes((u - 1) * pow(u + 1, _P - 2, _P) % _P)


def _layer(keyword, secret, salt):
    # To en- or decrypt; the MAC of salt and text to come (2.5.3).
    keys = shake256(secret + salt + b"hsdir-%s-data" % keyword, 80)
    mac = Sha3_256(bytes(7) + b"\x20" + keys[48:] + bytes(7) + b"\x10" + salt)
    return AesCtr(keys[:32], keys[32:48]).crypt, mac


def _seal(keyword, secret, salt, pieces):
    crypt, mac = _layer(keyword, secret, salt)
    yield salt
    for piece in pieces:
        piece = crypt(piece)
        mac.update(piece)
        yield piece
    yield mac.digest()


def _unseal(item, keyword, secret):
    # None for another secret.
    blob = item(keyword)[1]
    require(len(blob) > 48, "descriptor: a layer is missing")
    crypt, mac = _layer(keyword, secret, blob[:16])
    mac.update(blob[16:-32])
    good = consteq(mac.digest(), blob[-32:])
    return crypt(blob[16:-32]).partition(b"\0")[0] if good else None


def _client_keys(subcred, secret, public):
    # CLIENT-ID, COOKIE-KEY (2.5.1.2).
    keys = shake256(subcred + x25519(secret, public), 40)
    return keys[:8], keys[8:]


def _cookie(text, item, subcred, secret):
    # The descriptor cookie for the client with that key, b"" if there is none (2.5.1.3).
    public = b64decode(item(b"desc-auth-ephemeral-key")[0].split(b" ")[0], 32)
    client_id, key = _client_keys(subcred, secret, public)
    for line in text.split(b"\nauth-client ")[1:]:
        words = line.partition(b"\n")[0].split(b" ")
        if len(words) > 2 and consteq(words[0].rstrip(b"="), b64encode(client_id).encode()):
            return AesCtr(key, b64decode(words[1], 16)).crypt(b64decode(words[2], 16))
    return b""


_SIGNED = b"Tor onion service descriptor sig v3"


def make_descriptor(file, esk, blinded, subcred, revision, intro_points, when, flow=0, clients=()):
    """Write a descriptor (2.4, 2.5) to `file`, in pieces; `esk`: the blinded secret key.

    `clients`: the X25519 keys of those who can read it, if not everybody.
    """
    signer, secret = ed25519_expand(urandom(32)), subcred + pack(">Q", revision)
    public = ed25519_public(signer)

    def cert(keyword, kind, key, esk=signer, by=public):
        made = make_ed_cert(kind, key, when, esk, by)
        return b"".join(_armour(keyword, b"ED25519 CERT", [made]))

    def inner():
        yield b"create2-formats 2\n" + (b"flow-control 1-2 %d\n" % flow if flow else b"")
        for i in intro_points:
            yield b"introduction-point " + _base64(i.specifiers)
            yield b"onion-key ntor " + _base64(i.ntor_key) + cert(b"auth-key", 9, i.auth_key)
            yield b"enc-key ntor " + _base64(i.enc_key)
            yield cert(b"enc-key-cert", 11, _enc_key_ed(i.enc_key))

    def outer(size=0):
        yield from _pieces(head, 480)
        for piece in _armour(b"encrypted", b"MESSAGE", sealed, b""):
            size += len(piece)
            yield piece
        left = -(len(head) + size) % 10000
        for at in range(0, left, 480):
            yield bytes(min(480, left - at))

    x, X = x25519_keypair()
    cookie, lines = urandom(16) if clients else b"", []
    # Made up: nobody shall see how many clients are authorized, nor whether there are any.
    for _ in range(-len(clients) % 16 or 16 * (not clients)):
        lines.append([urandom(n) for n in (8, 16, 16)])
    for client in clients:
        (client_id, key), iv = _client_keys(subcred, x, client), urandom(16)
        line = [client_id, iv, AesCtr(key, iv).crypt(cookie)]
        lines.insert(randbelow(len(lines) + 1), line)
    head = b"desc-auth-type x25519\ndesc-auth-ephemeral-key " + _base64(X)
    for line in lines:
        head += ("auth-client %s %s %s\n" % tuple([b64encode(word) for word in line])).encode()
    sealed = _seal(b"encrypted", blinded + cookie + secret, urandom(16), inner())
    text = _seal(b"superencrypted", blinded + secret, urandom(16), outer())
    file.write(b"hs-descriptor 3\ndescriptor-lifetime 180\n")
    file.write(cert(b"descriptor-signing-key-cert", 8, public, esk, blinded))
    file.write(b"revision-counter %d\n" % revision)
    for piece in _armour(b"superencrypted", b"MESSAGE", text):
        file.write(piece)
    if not MICROPYTHON:
        require(file.tell() < 49900, "descriptor: too large for directories, fewer clients may do")
    signature = ed25519_sign(signer, public, _SIGNED, file)
    file.write(b"signature %s\n" % b64encode(signature).encode())


def _cert(item, keyword, kind, public, when):
    return check_ed_cert(item(keyword)[1], kind, public, when)


def _intro_point(text, signing, when):
    # Certified by the key `signing`; other kinds of keys may stand beside ntor's.
    specifiers, _, text = text.partition(b"\n")
    item = document(text)
    words = [item(name)[0].split(b" ")[0] for name in (b"onion-key ntor", b"enc-key ntor")]
    onion_key, enc_key = [b64decode(word, 32) for word in words]
    target = parse_link_specifiers(Reader(b64decode(specifiers.split(b" ")[0])), onion_key)
    target.auth_key, target.enc_key = _cert(item, b"auth-key", 9, signing, when), enc_key
    certified = _cert(item, b"enc-key-cert", 11, signing, when) == _enc_key_ed(enc_key)
    require(certified and any(onion_key) and any(enc_key), "descriptor: bad key")
    return target


def parse_descriptor(data, blinded, subcred, when, secret=None):
    """Return `subcred`, `revision`, `until`, `flow`, `intro_points` (the good ones); verified.

    `secret`: the client's X25519 key.  AuthorizationError: it takes one, or another one.
    """
    text, end, signature = data.rpartition(b"\nsignature ")
    require(end and text.startswith(b"hs-descriptor 3\n"), "descriptor: cut, or not version 3")
    item = document(text)
    signing = _cert(item, b"descriptor-signing-key-cert", 8, blinded, when)
    signature = b64decode(signature.rstrip(b"\n"), 64)
    require(ed25519_verify(signing, _SIGNED + text + b"\n", signature), "descriptor: bad signature")
    found = Record()
    found.until = when + 60 * decimal(item(b"descriptor-lifetime")[0], 30, 720)
    found.subcred = subcred
    found.revision = decimal(item(b"revision-counter")[0], 0, (1 << 64) - 1)
    tail = subcred + pack(">Q", found.revision)
    text = _unseal(item, b"superencrypted", blinded + tail)
    require(text is not None, "descriptor: superencrypted is corrupt")
    item = document(text)
    cookie = _cookie(text, item, subcred, secret) if secret else b""
    text = _unseal(item, b"encrypted", blinded + cookie + tail)
    if text is None and secret:
        raise AuthorizationError("does not admit this key: the right one, not withdrawn?", 0xF5)
    if text is None:
        raise AuthorizationError("admits clients by keys alone: give one (--auth-dir, "
                                 "ClientOnionAuthDir, add_onion_key)", 0xF4)
    sections = text.split(b"\nintroduction-point ")
    item = document(sections[0])
    require(b"2" in item(b"create2-formats")[0].split(b" "), "descriptor: without ntor")
    # Versions, the SENDME increment.
    flow = item(b"flow-control")[0]
    found.flow = decimal(flow[4:], 1, 254) if flow[:4] == b"1-2 " else 0
    found.intro_points = []
    for section in sections[1:21]:
        try:
            found.intro_points.append(_intro_point(section, signing, when))
        except ProtocolError as e:
            log(INFO, "introduction point refused: %s", e)
    require(found.intro_points, "descriptor: no usable introduction point")
    return found


# === 10. Channel ===
# One TLS link to a relay, and the circuits that share it (tor-spec 3 and 4).


# Bytes read and written.
traffic = [0, 0]


def relieve(circuits, still=0):
    """For want of memory end the stream that holds most (and is `still` for so many ms), or,
    without any and if not `still`, close a circuit."""
    most, victim, other = 1023, None, None
    try:
        for circuit in circuits:
            for stream in circuit.streams.values():
                held = len(stream._incoming) + len(stream.outgoing)
                if held > most and ticks_diff(ticks_ms(), stream.moved) >= still:
                    most, victim = held, stream
            # Best an idle one of a service's client, never an introduction point's.
            if not circuit.on_control and (not other or circuit.on_begin and not circuit.streams):
                other = circuit
        if victim:
            log(NOTICE, "out of memory: a stream ends")
            victim.send_end(END_RESOURCELIMIT)
        elif other and not still:
            log(NOTICE, "out of memory: a circuit ends")
            other.starve()
    except MemoryError:
        pass


class Channel:
    """A link to the relay `rsa_id` that is also `ed_id`, if given.

    `opened`: Promise of itself; `closed`: why it is gone; `skew`: its clock minus ours, in seconds;
    `expired`: its certificates are, by ours.
    """

    closed, expired, skew, _lacks = None, False, 0, 0

    def __init__(self, address, port, rsa_id, ed_id, seconds):
        self.address, self.port, self.rsa_id, self.ed_id = address, port, rsa_id, ed_id
        self.circuits, self._queue, self._queued, self._tasks = {}, [], 0, []
        self.opened, self._wake = Promise(), asyncio.Event()
        self._due = [VERSIONS, CERTS, NETINFO]
        if not MICROPYTHON:
            announce("ORCONN", self, "LAUNCHED")
        spawn(self._run(seconds))

    def __str__(self):
        return "relay %s:%d (%s)" % (self.address, self.port, self.rsa_id.hex())

    async def _run(self, seconds):
        if not MICROPYTHON and self.closed:
            return  # before it began, as bridges were turned on: it must not dial any more
        try:
            opening = (tls_connect if MICROPYTHON else self._dial)(self.address, self.port, seconds)
            reader, writer, self._certificate = await opening
            read = self._read_cells if MICROPYTHON else self._read_batches
            self._tasks.append(spawn(read(reader)))
            self._tasks.append(spawn(self._write(writer)))
            # Or what is closed would stay in memory.
            reader = writer = None
            self.send(pack(">HBHHH", 0, VERSIONS, 4, 4, 5))
            await self.opened.wait(seconds)
        except MemoryError as e:
            # Not the relay's fault.
            self.opened.set(error=e)
            self.close("out of memory")
        except Exception as e:
            self.close("cannot be reached: ", str(e) or "no answer within %d s" % seconds)
        while not self.closed:
            await asyncio.sleep(1 if MICROPYTHON else 5)
            idle = ticks_diff(ticks_ms(), self._used) // 1000
            try:
                if MICROPYTHON:
                    # For what memory was too short then.
                    self._resume()
                if idle > 180 and not self.circuits:
                    self.close("idle")
                elif idle > 240:
                    self.send(cell(0, PADDING))
            except MemoryError:
                pass
        # Even if the peer reads nothing.
        await asyncio.sleep(2)
        for task in self._tasks:
            task.cancel()

    if not MICROPYTHON:
        _dial = staticmethod(tls_connect)

    def room(self):
        # In cells.
        return ((3084 if MICROPYTHON else 1 << 18) - self._queued) // 514

    def send(self, data):
        self._queue.append(data)
        self._queued += len(data)
        self._wake.set()

    def _relieve(self):
        # At first others may let go of some memory.
        self._lacks += 1
        if self._lacks % 4 == 0:
            relieve(self.circuits.values())

    def _resume(self):
        for circuit in list(self.circuits.values()):
            circuit.resume()

    async def _write(self, writer):
        full, size = False, 0
        try:
            while self._queue or not self.closed:
                try:
                    if full:
                        self._resume()
                    idle, full = not self._queue, False
                    waiting = self._wake.wait() if idle else writer.drain()
                    if MICROPYTHON and not idle:
                        # As its `write` has it, which would copy.
                        size = len(self._queue[0])
                        setattr(writer, "out_buf", self._queue.pop(0))
                    elif not idle:
                        data, self._queue = b"".join(self._queue), []
                        size = len(data)
                        if not MICROPYTHON:
                            traffic[1] += size
                        writer.write(data)
                except MemoryError:
                    self._relieve()
                    waiting, idle = asyncio.sleep(0), True
                await waiting
                self._wake.clear()
                if not idle:
                    self._used, full = ticks_ms(), self.room() < 1
                    self._queued -= size
        except Exception as e:
            self.close("the link broke: ", e)
        finally:
            self._tasks[0].cancel()
            await hang_up(writer)
            self._tasks.clear()

    async def _read_batches(self, reader):
        # In VERSIONS the circuit ID is two bytes shorter.
        data, rest, self._at = b"", b"\0\0", 0
        while not self.closed:
            try:
                self._cells(rest, len(rest))
                rest, self._at = rest[self._at :], 0
                data = data or await reader.read(1 << 18)
                if not data:
                    raise OSError("the relay closed it")
                if not MICROPYTHON:
                    traffic[0] += len(data)
                rest, data = rest + data, b""
            except MemoryError:
                # What was read is still here.
                self._relieve()
                await asyncio.sleep(0)
            except Exception as e:
                self.close("the link broke: ", e)

    async def _read_cells(self, reader):
        # One by one, where each is decrypted: for want of memory none is lost.
        data, have, self._at = bytearray(514), 2, 0
        while not self.closed:
            try:
                self._cells(data, have)
                rest = data[self._at : have]
                if len(data) > 514 or have == 514 == len(rest):
                    # Only those before NETINFO, and VPADDING, are longer.
                    data = rest + bytes(514)
                else:
                    data[: len(rest)] = rest
                have, self._at = len(rest), 0
                n = await reader.readinto(memoryview(data)[have:])
                if n == 0:
                    raise OSError("the relay closed it")
                have += n or 0
            except MemoryError:
                self._relieve()
                await asyncio.sleep(0)
            except Exception as e:
                self.close("the link broke: ", e)

    def _cells(self, data, end):
        # Dispatch whole cells, relay cells in a row for a circuit together; `_at`: how far.
        while end - (at := self._at) >= 7:
            head, command, body, size = data[at : at + 5], data[at + 4], at + 5, 509
            require(command == VERSIONS or VERSIONS not in self._due, "no VERSIONS came first")
            if command >= 128 or command == VERSIONS:
                size, body = data[body] << 8 | data[body + 1], body + 2
                require(size <= 16384, "a cell of %d bytes" % size)
            if end - body < size:
                break
            self._at = at = body + size
            circuit = self.circuits.get(uint(head[:4]))
            if self._due or command in (VERSIONS, CERTS, NETINFO):
                self._handshake(command, bytes(data[body:at]))
            elif circuit:
                many = command == RELAY and not MICROPYTHON
                while many and at + 514 <= end and data[at : at + 5] == head:
                    self._at = at = at + 514
                try:
                    body = (memoryview if MICROPYTHON else bytes)(data)[body:at]
                    if many:
                        body = b"".join([body[n : n + 509] for n in range(0, len(body), 514)])
                    circuit.receive(body, command)
                except MemoryError:
                    circuit.starve()

    def _handshake(self, command, body):
        # Clients do not answer AUTH_CHALLENGE.
        if command in (AUTH_CHALLENGE, VPADDING, PADDING):
            return
        require(command in self._due[:1], "cell %d out of place" % command)
        self._due.pop(0)
        if command == VERSIONS:
            offered = _pieces(body, 2)
            self._pads = b"\0\5" in offered
            require(self._pads or b"\0\4" in offered, "no link protocol in common")
        elif command == CERTS:
            expires = parse_certs(body, self._certificate[0], self.rsa_id, self.ed_id)[1]
            self.expired = expires < now()
        else:
            timestamp = uint(body[:4])
            self.skew = timestamp - now() if timestamp else 0
            require(not self.expired, "its certificates have expired, or the clock is ahead")
            # No time, and no address of ours (tor-spec 4.5).  Its own may be a name.
            where = [int(n) & 255 for n in self.address.encode().split(b".") if n.isdigit()]
            self.send(cell(0, NETINFO, b"\0\0\0\0\4\4" + bytes(where)))
            if self._pads:
                # None is sent here: one side alone would stand out (padding-spec 2).
                self.send(cell(0, PADDING_NEGOTIATE, b"\0\1"))
            self.opened.set(self)
            if not MICROPYTHON:
                announce("ORCONN", self, "CONNECTED")

    def close(self, why="closed", error=""):
        """Close the channel and its circuits; what is queued is still written."""
        if self.closed:
            return
        self.closed = NO_MEMORY
        try:
            why = "%s%s" % (why, error)
            self.closed = ChannelError("%s: %s" % (self, why))
            log(INFO, "%s", self.closed)
        except MemoryError:
            pass
        if not MICROPYTHON:
            announce("ORCONN", self, "CLOSED" if self.opened.done() else "FAILED")
        self.opened.set(error=self.closed)
        while self.circuits:
            self.circuits.popitem()[1].close(why, 8)
        self._wake.set()


class Channels:
    open = {}  # By RSA identity.
    if not MICROPYTHON:
        link = Channel  # what makes one, or refuses to

    async def get(self, address, port, rsa_id, ed_id=None, seconds=20):
        """The relay's one open Channel, or a new one; ChannelError."""
        self.open = {r: c for r, c in self.open.items() if not c.closed}
        if rsa_id not in self.open:
            link = (Channel if MICROPYTHON else self.link)(address, port, rsa_id, ed_id, seconds)
            self.open[rsa_id] = link
        return await self.open[rsa_id].opened.wait()

    def close(self):
        for channel in self.open.values():
            channel.close()


# === 11. Circuits and streams ===
# Relay encryption, extending, flow control, streams, teardown (tor-spec 5 to 7).

# Cells that are encrypted in one go; no more than a SENDME of congestion control is for.
BATCH = 1 if MICROPYTHON else 31
CIRCUIT_WINDOW, STREAM_WINDOW, STREAM_INCREMENT = 1000, 500, 50
# With congestion control XOFF stops streams.
NO_LIMIT, XOFF_LIMIT = float("inf"), 500 * 498
# So much unread, a stream sends no SENDME; so much unsent, `drain` waits; so much is written at
# once, on a board what fills a cell.
READ_AHEAD, WRITE_AHEAD, PIECE = (4096, 0, 478) if MICROPYTHON else (1 << 18, 1 << 17, 1 << 16)
# So much unread, the stream ends.
MOST_UNREAD = 32768 if MICROPYTHON else 16 * XOFF_LIMIT


_TAG = bytearray(4)


class Layer(AesCtrCryptolib if MICROPYTHON else object):
    """Relay encryption with a hop (tor-spec 5.2); `keys`: Df, Db, Kf, Kb; `service`: we are it.

    `digests`: out, in.  On a board apply(cell, 5, 509) encrypts, with back=1 it decrypts.
    """

    def __init__(self, keys, onion=False, service=False):
        digest, form = (Sha3_256, "32s32s32s32s") if onion else (Sha1, "20s20s16s16s")
        Df, Db, Kf, Kb = unpack_from(form, keys)
        if service:
            Df, Db, Kf, Kb = Db, Df, Kb, Kf
        self.digests = digest(Df), digest(Db)
        if MICROPYTHON:
            AesCtrCryptolib.__init__(self, Kf, back=Kb)
        else:
            self.out_cipher, self.in_cipher = AesCtr(Kf), AesCtr(Kb)

    def not_last(self):
        # Messages go to the last hop.  A board ends a circuit whatever another one says.
        self.digests = None, None if MICROPYTHON else self.digests[1]

    def seal(self, data, at):
        """Write the tag of the relay message data[at : at + 509]."""
        digest = self.digests[0]
        digest.update(data, at, 509)
        digest.stamp(data, at + 5)

    def opens(self, data, at):
        """Tell whether the tag of data[at : at + 509] is right."""
        for i in range(at + 5, at + 9):
            _TAG[i & 3], data[i] = data[i], 0
        digest = self.digests[1]
        digest.update(data, at, 509)
        digest.stamp(data, at + 5)
        good = True
        for i in range(at + 5, at + 9):
            good = good and data[i] == _TAG[i & 3]
        return good

    def sent(self, body):
        """Tell whether this hop sent the decrypted cell; count it then."""
        trial = self.digests[1].copy()
        trial.update(bytes(body[:5]) + bytes(4) + bytes(body[9:]))
        if trial.digest()[:4] == body[5:9]:
            self.digests = None, trial
            return True


def sendme_increment(param):
    """How many cells a SENDME of congestion control is for; 0: there is none."""
    return 0 if MICROPYTHON or not param("cc_alg", 2) else param("cc_sendme_inc", 31, 1, 254)


class Vegas:
    """The congestion window `cwnd`, in cells, of an onion circuit (proposal 324, 3.3)."""

    def __init__(self, param):
        self.increment = sendme_increment(param)
        self.cwnd = param("cc_cwnd_init", 124, 31, 10000)
        self._least = param("cc_cwnd_min", 124, 31, 1000)
        self._cap = param("cc_sscap_onion", 475, 100, 10000)
        marks = ("alpha", 186), ("beta", 372), ("gamma", 248), ("delta", 434)
        self._marks = [param("cc_vegas_%s_onion" % name, n, 0, 1000) for name, n in marks]
        self._rtt, self._least_rtt, self._acks = 0, NO_LIMIT, 0
        self._slow, self._full = True, False

    def acked(self, inflight, rtt):
        """Return `cwnd` after a SENDME; `inflight`: with the cells it is for; `rtt`: in ms."""
        cwnd, increment = self.cwnd, self.increment
        alpha, beta, gamma, delta = self._marks
        self._rtt = rtt = max((2 * rtt + self._rtt) / 3 if self._rtt else rtt, 1)
        if rtt < self._least_rtt or cwnd == self._least and not self._slow:
            self._least_rtt = rtt
        bdp = int(cwnd * self._least_rtt / rtt)
        queue = cwnd - bdp
        if not self._full or 4 * inflight < cwnd:
            self._full = inflight + 4 * increment >= cwnd
        if not self._slow:
            if queue > delta:
                cwnd = bdp + delta - 1
            elif queue > beta:
                cwnd -= 1
            elif self._full and queue < alpha:
                cwnd += 1
        elif queue >= gamma:
            cwnd, self._slow = bdp + gamma, False
        elif self._full:
            past = cwnd > self._cap
            grow = max((increment * self._cap + cwnd) // (2 * cwnd), 1) if past else increment
            self._slow = grow * cwnd > increment * increment and cwnd < 5000
            cwnd += grow
        self.cwnd = max(cwnd, self._least)
        self._acks += 1
        if self._acks * increment >= self.cwnd:
            self._acks, self._full = 0, False
        return self.cwnd


def congestion_control(param, wanted):
    return Vegas(param) if not MICROPYTHON and wanted and sendme_increment(param) else None


class Stream:
    """A stream through a circuit: asyncio's reader and writer in one."""

    outgoing, _error = b"", None
    _stopped = _ended = _closing = False

    def __init__(self, circuit, stream_id):
        self.circuit, self.stream_id, self._incoming = circuit, stream_id, bytearray()
        # `moved`: when bytes were last sent or read.
        self.opened, self._changed, self.moved = Promise(), asyncio.Event(), ticks_ms()
        self._package = NO_LIMIT if circuit.vegas else STREAM_WINDOW
        # None for DATA before CONNECTED.
        self._deliver = self._package if circuit.on_begin else 0
        circuit.streams[stream_id] = self

    def feed(self, data):
        self._deliver -= 1
        unread = len(self._incoming)
        if self._deliver < 0 or unread > MOST_UNREAD or unread > READ_AHEAD and crowded():
            # A client of ours loses the stream, not the circuit; a window may be too large here.
            short = self.circuit.on_begin or MICROPYTHON and self._deliver >= 0
            require(short, "DATA too early on a stream, or too much")
            return self.send_end(END_RESOURCELIMIT)
        if not self._closing:
            try:
                self._incoming.extend(data)
            except MemoryError:
                self.send_end(END_RESOURCELIMIT)

    def arrived(self):
        # Wake the reader, and let the other side go on, or stop it.
        self._changed.set()
        unread = len(self._incoming)
        if self._ended:
            return
        while self._deliver <= STREAM_WINDOW - STREAM_INCREMENT and unread < READ_AHEAD:
            self._deliver += STREAM_INCREMENT
            self._send(SENDME, b"")
        # XON comes when half is read.
        stop = unread * (1 + self._stopped) > XOFF_LIMIT
        if self.circuit.vegas and stop != self._stopped:
            self._stopped, command = stop, XOFF if stop else XON
            self._send(command, bytes(1 if stop else 5))

    def message(self, command, data):
        if command == END:
            reason = data[0] if data else 1
            self.end(StreamError("the stream ended: " + reason_text(END_REASONS, reason), reason))
        elif command in (XOFF, XON) and self.circuit.vegas:
            self._package = 0 if command == XOFF else NO_LIMIT
        elif command == SENDME and self._package <= STREAM_WINDOW - STREAM_INCREMENT:
            self._package += STREAM_INCREMENT
        elif command in (CONNECTED, RESOLVED) and not self.opened.done():
            self._deliver = self._package
            self.opened.set(data)
        else:
            raise ProtocolError("message %d out of place on a stream" % command)
        self.flush()

    def _send(self, command, *pieces):
        try:
            self.circuit.send(command, self.stream_id, *pieces)
        except CircuitError:
            pass  # it ended this stream

    def flush(self):
        try:
            self._flush()
        except MemoryError:
            pass  # the channel tries again

    def _flush(self):
        circuit, room = self.circuit, self.circuit.channel.room
        while whole := self.outgoing:
            count = min(BATCH, room(), circuit.window - circuit.inflight, self._package)
            if count <= 0:
                break
            # Random bytes in the first cell: nobody can foretell the SENDME's tag (7.4).
            end = min(len(whole), DATA_MAX * count - 20)
            starts = range(-20, end, DATA_MAX)
            pieces = [whole[max(at, 0) : at + DATA_MAX] for at in starts]
            self.outgoing = whole[end:]
            try:
                self._send(DATA, *pieces)
            except MemoryError:
                self.outgoing = whole
                raise
            self._package -= len(pieces)
            self.moved = ticks_ms()
        self._changed.set()
        if self._closing and not self.outgoing:
            self.send_end(END_DONE if circuit.on_begin else 1)

    def send_end(self, reason):
        """End the stream; for want of memory, with what is unread."""
        if self._ended:
            return
        error = StreamError("closed here", END_DONE)
        if reason == END_RESOURCELIMIT:
            error, self._incoming = StreamError("out of memory", reason), bytearray()
        self.end(error)
        self._send(END, bytes([reason]))

    def end(self, error):
        self._closing, self._ended, self.outgoing = True, True, b""
        # Clients end with MISC whatever happened: at a service, no error.
        if error.reason != END_DONE and not (error.reason == 1 and self.circuit.on_begin):
            self._error = error
        self.circuit.streams.pop(self.stream_id, None)
        self.opened.set(error=error)
        self._changed.set()
        if not MICROPYTHON:
            announce("STREAM", self)

    def accept(self):
        if not self._ended:
            self.opened.set()
            self._send(CONNECTED, b"")

    def _take(self, n):
        piece = bytes(memoryview(self._incoming)[:n])
        self._incoming = self._incoming[n:]
        self.moved = ticks_ms()
        self.arrived()
        return piece

    async def _change(self):
        self._changed.clear()
        await self._changed.wait()

    async def _more(self):
        # Wait for bytes; None: that was all.
        if self._error:
            raise self._error
        if not self._closing:
            await self._change()
            return True

    async def read(self, n=-1):
        """Return up to `n` bytes as they come, or all until the end; b"" at the end."""
        pieces = []
        while n < 0:
            pieces.append(await self.read(65536))
            if not pieces[-1]:
                return b"".join(pieces)
        while n and not self._incoming and await self._more():
            pass
        return self._take(n)

    async def readexactly(self, n):
        """Return `n` bytes; EOFError when the stream ends before."""
        data = b""
        while (left := n - len(data)) > 0:
            piece = await self.read(left)
            if not piece:
                raise EOFError("the stream ended %d bytes early" % left)
            data += piece
        return data

    async def readuntil(self, separator=b"\n", limit=65536):
        """Return bytes up to and with `separator`; EOFError, or StreamError past `limit`."""
        while (at := self._incoming.find(separator)) < 0:
            if len(self._incoming) >= limit + len(separator):
                raise StreamError("more than %d bytes without %r" % (limit, separator), 13)
            if not await self._more():
                raise EOFError("the stream ended before %r" % separator)
        return self._take(at + len(separator))

    async def readline(self):
        """Return a line with its end, or what is left at the end."""
        try:
            return await self.readuntil()
        except EOFError:
            return await self.read(65536)

    def write(self, data):
        """Send `data`; follow with `await drain()`."""
        if self._closing:
            raise self._error or StreamError("the stream is closed", END_DONE)
        self.outgoing += bytes(data)
        self.flush()

    async def drain(self):
        """Wait until there is room for more; StreamError where the stream broke."""
        while len(self.outgoing) > WRITE_AHEAD:
            await self._change()
        if self._error:
            raise self._error

    def close(self):
        """End the stream, both ways (tor-spec 6.3), when all is sent."""
        self._closing = True
        self.flush()

    def is_closing(self):
        return self._closing

    async def wait_closed(self):
        while not self._ended:
            await self._change()

    def get_extra_info(self, name, default=None):
        return default


class Circuit:
    """`path`: relays, the nearest first; `kh`: KH of the last; `closing`: None, or a Promise of
    `closed`.

    `on_control`: {command: function(body)}; `on_begin`: coroutine function(stream, port).
    """

    on_begin = kh = vegas = closed = closing = _last_id = None
    inflight, window, _deliver, _increment = 0, CIRCUIT_WINDOW, CIRCUIT_WINDOW, 100
    # (tag, time) of cells that are due a SENDME.
    _due = ()

    def __init__(self, channel, window=CIRCUIT_WINDOW):
        self.channel, self.path, self._layers = channel, [], []
        self.streams, self.on_control, self._expected = {}, {}, {}
        # What few circuits need is set where they do.
        if window != CIRCUIT_WINDOW:
            self.window = window
        if channel.closed:
            raise channel.closed
        while (circ_id := randbelow(1 << 31) | 1 << 31) in channel.circuits:
            pass
        self.circ_id, channel.circuits[circ_id] = circ_id, self
        if not MICROPYTHON:
            announce("CIRC", self)

    def __str__(self):
        return "circuit %d over %s" % (self.circ_id & 0xFFFF, self.channel)

    async def extend(self, relay, seconds):
        """Add `relay` (tor-spec 5.1), or the only hop by CREATE_FAST: None; CircuitError."""
        x = urandom(20)
        asked, finish = (CREATE_FAST, x, CREATED_FAST), lambda Y: fast_finish(x, Y)
        if relay:
            create2, finish = ntor(relay.rsa_id, relay.ntor_key)
            asked = CREATE2, create2, CREATED2
            if self.path:
                asked = EXTEND2, relay.specifiers + create2, EXTENDED2
        reply = await self.ask(*asked, seconds)
        try:
            keys = finish(reply)
        except ProtocolError as e:
            raise self.close("hop %d: %s" % (len(self.path) + 1, e), 1)
        if self.path and MICROPYTHON:
            # Of a hop that is not the last no more is needed, and there is more.
            self.path[-1], hop = Record(), self.path[-1]
            self.path[-1].rsa_id = hop.rsa_id
        self.path.append(relay)
        self._add(Layer(keys))
        self.kh = keys[72:]
        if not MICROPYTHON:
            announce("CIRC", self)

    def add_onion_hop(self, keys, service=False, vegas=None):
        """Add the virtual hop of a rendezvous (rend-spec-v3 4.2.1)."""
        self._add(Layer(keys, True, service))
        self.kh = None
        if vegas:
            self.vegas, self._increment, self.window = vegas, vegas.increment, vegas.cwnd

    def _add(self, layer):
        if self._layers:
            self._layers[-1].not_last()
        self._layers.append(layer)

    def expect(self, command):
        """A Promise of the body of `command`, which comes once; CircuitError."""
        if self.closed:
            raise self.closed
        promise = self._expected[command] = Promise()
        return promise

    async def ask(self, command, body, answer, seconds):
        """Send a message, or CREATE; return the body of the `answer`; CircuitError."""
        promise = self.expect(answer)
        if self._layers:
            self.send(command, 0, body)
        else:
            self.channel.send(cell(self.circ_id, command, body))
        try:
            return await promise.wait(seconds)
        except asyncio.TimeoutError:
            raise self.close("no answer within %d s" % seconds, 10)

    async def open_stream(self, command, body, seconds, early=b""):
        """Open a Stream by BEGIN, BEGIN_DIR or RESOLVE (tor-spec 6.2, 6.4); StreamError.

        `early`: what is sent along, before there is an answer.
        """
        if len(self.streams) > 60000:
            raise StreamError("the circuit has no stream ID left", END_RESOURCELIMIT)
        # In turn: an END for one closed here may be on its way.
        stream_id = randbelow(65536) if self._last_id is None else self._last_id
        while (stream_id := stream_id % 65535 + 1) in self.streams:
            pass
        self._last_id, stream = stream_id, Stream(self, stream_id)
        try:
            self.send(command, stream_id, body)
            if not MICROPYTHON:
                stream.early = len(early)
                if early:
                    stream.write(early)
            await stream.opened.wait(seconds)
            return stream
        except BaseException as e:
            stream.close()
            if isinstance(e, asyncio.TimeoutError):
                raise StreamError("no answer within %d s" % seconds, END_TIMEOUT)
            raise

    def send(self, command, stream_id, *pieces):
        """Send relay messages of one kind to the last hop; CircuitError."""
        if self.closed:
            raise self.closed
        try:
            self._send(command, stream_id, pieces)
        except MemoryError:
            if MICROPYTHON and command == DATA:
                raise
            raise self.starve()

    def _send(self, command, stream_id, pieces):
        # Up to eight may be early (tor-spec 5.6); no path is so long.
        kind = RELAY_EARLY if command == EXTEND2 else RELAY
        if MICROPYTHON:
            return self._send_cell(kind, command, stream_id, *pieces)
        digest, cells = self._layers[-1].digests[0], []
        for data in pieces:
            size = len(data)
            if size < DATA_MAX:
                data = (data + bytes(4) + urandom(DATA_MAX - size))[:DATA_MAX]
            digest.update(pack(">BHHIH", command, 0, stream_id, 0, size))
            digest.update(data)
            tag = digest.digest()
            cells += pack(">BHH4sH", command, 0, stream_id, tag[:4], size), data
            if command == DATA:
                self.inflight += 1
                if self.inflight % self._increment == 0:
                    self._due += ((tag[:20], ticks_ms()),)
        data = b"".join(cells)
        for layer in reversed(self._layers):
            data = layer.out_cipher.crypt(data)
        head = pack(">IB", self.circ_id, kind)
        self.channel.send(head.join([b""] + _pieces(data, 509)))

    def _send_cell(self, kind, command, stream_id, data):
        # On a board, which seldom has much memory in one piece.  For want of it nothing is sent.
        n, made, layer = len(data), bytearray(514), self._layers[-1]
        pack_into(">IBBHHIH", made, 0, self.circ_id, kind, command, 0, stream_id, 0, n)
        made[16 : 16 + n] = data
        if n < DATA_MAX - 4:
            made[20 + n :] = urandom(DATA_MAX - 4 - n)
        try:
            layer.seal(made, 5)
            if command == DATA:
                self.inflight += 1
                if self.inflight % self._increment == 0:
                    self._due += ((layer.digests[0].digest()[:20], ticks_ms()),)
            i = len(self._layers)
            while i:
                i -= 1
                self._layers[i].apply(made, 5, 509)
            self.channel.send(made)
        except MemoryError:
            # The relays would count other bytes now.
            raise self.starve()

    def resume(self):
        for stream in list(self.streams.values()):
            if stream.outgoing:
                stream.flush()

    def receive(self, data, command=RELAY):
        """Take the body of a cell, or of relay cells in a row."""
        try:
            if command == RELAY:
                self._decrypt(data)
            elif command == DESTROY:
                self.close("destroyed: " + reason_text(DESTROY_REASONS, data[0]), data[0], False)
            elif command in (CREATED2, CREATED_FAST):
                self._message(command, 0, bytes(data))
        except ProtocolError as e:
            self.close(str(e), 1)
        except MemoryError:
            self.starve()
        except CircuitError:
            pass  # closed while it answered

    def _decrypt(self, data):
        require(self._layers, "a relay cell before the first hop")
        layer, touched = self._layers[-1], set()
        if MICROPYTHON:
            view = memoryview(bytearray(data) if isinstance(data, bytes) else data)
            for hop in self._layers:
                hop.apply(view, 0, len(view), 1)
        else:
            for hop in self._layers[:-1]:
                data = self._from_hop(hop, hop.in_cipher.crypt(data))
            view = memoryview(bytearray(layer.in_cipher.crypt(data)))
        digest = layer.digests[1]
        for at in range(0, len(view), 509):
            if MICROPYTHON:
                command, recognised = view[at], view[at + 1] | view[at + 2]
                stream_id = view[at + 3] << 8 | view[at + 4]
                size = view[at + 9] << 8 | view[at + 10]
                good = layer.opens(view, at)
            else:
                command, recognised, stream_id, tag, size = unpack_from(">BHH4sH", view, at)
                view[at + 5 : at + 9] = b"\0\0\0\0"
                digest.update(view[at : at + 509])
                good = digest.digest()[:4] == tag
            if recognised or not good or size > DATA_MAX:
                raise ProtocolError("a relay cell that no hop recognises")
            data = view[at + 11 : at + 11 + size]
            if command != DATA:
                self._message(command, stream_id, bytes(data))
                if self.closed:
                    return
                continue
            self._deliver -= 1
            require(self._deliver >= 0 and stream_id, "more DATA than the window allows")
            stream = self.streams.get(stream_id)
            if stream:
                stream.feed(data)
                touched.add(stream)
            if self._deliver <= CIRCUIT_WINDOW - self._increment:
                self._deliver += self._increment
                self.send(SENDME, 0, b"\1\0\x14" + digest.digest()[:20])
        for stream in touched:
            stream.arrived()

    def _from_hop(self, hop, data):
        # Take out what this hop, not the last, sent.
        at = 0
        while at < len(data):
            if data[at + 1] == 0 == data[at + 2] and hop.sent(data[at : at + 509]):
                self._unasked(data[at], data[at + 11])
                # The layers behind never saw it: their key streams go on without.
                data = data[:at] + data[at + 509 :]
            else:
                at += 509
        return data

    def _unasked(self, command, reason):
        if command == TRUNCATED:
            raise ProtocolError("truncated: " + reason_text(DESTROY_REASONS, reason))
        require(command == DROP, "message %d out of place" % command)

    def _message(self, command, stream_id, data):
        stream = self.streams.get(stream_id)
        if stream:
            stream.message(command, data)
        elif stream_id and command == BEGIN and self.on_begin:
            port = parse_begin(data)
            try:
                spawn(self.on_begin(Stream(self, stream_id), port))
            except MemoryError:
                self.streams.pop(stream_id, None)
                self.send(END, stream_id, bytes([END_RESOURCELIMIT]))
        elif stream_id:
            # It may have been closed here.
            late = command in (END, SENDME, CONNECTED, RESOLVED, XOFF, XON)
            require(late, "message %d for no stream" % command)
        elif command == SENDME:
            # Version 1, and the tag (tor-spec 7.3).
            good = self._due and data[:1] == b"\1" and consteq(self._due[0][0], data[3:23])
            require(good, "a SENDME that was not due")
            rtt, self._due = ticks_diff(ticks_ms(), self._due[0][1]), self._due[1:]
            if self.vegas:
                self.window = self.vegas.acked(self.inflight, rtt)
            self.inflight -= self._increment
            self.resume()
        elif command in self._expected:
            self._expected.pop(command).set(data)
        elif command in self.on_control:
            self.on_control[command](data)
        else:
            self._unasked(command, data[0] if data else 0)

    def starve(self):
        return self.close("out of memory", 5, True, MemoryShort)

    def close(self, text="closed here", reason=0, tell=True, kind=CircuitError):
        """Return the first CircuitError of it (tor-spec 5.4)."""
        if not self.closed:
            # Memory may be short: first what frees some.
            self.closed = ended = NO_MEMORY
            self._layers = []
            if MICROPYTHON:
                forget_ciphers()
            self.channel.circuits.pop(self.circ_id, None)
            try:
                self.closed = kind("%s: %s" % (self, text), reason)
                log(INFO, "%s", self.closed)
                ended = StreamError(str(self.closed), 8)
                if tell:  # no reason, as tor
                    self.channel.send(cell(self.circ_id, DESTROY))
            except MemoryError:
                pass
            if self.closing:
                self.closing.set(self.closed)
            for promise in self._expected.values():
                promise.set(error=self.closed)
            while self.streams:
                self.streams.popitem()[1].end(ended)
            if not MICROPYTHON:
                announce("CIRC", self)
        return self.closed


# Below the budget, for overlays and what they work on.
_ROOM = 24 << 10


def make_room(channels):
    """On a board, before what takes much memory: end idle circuits of a service's clients."""
    idle = [c for channel in channels for c in channel.circuits.values()
            if c.on_begin and not c.streams]
    # Those first that were used last longest ago.
    idle.sort(key=lambda c: ticks_diff(c.since, ticks_ms()))
    while idle and not fits(_ROOM):
        idle.pop(0).close()


BUILD_SECONDS = 20
DIRTY_MS = 600000  # tor's MaxCircuitDirtiness
# By so much `since` goes back for a circuit that shall get no new stream.
OUTDATED = 2 * DIRTY_MS if MICROPYTHON else 1 << 50


def is_dirty(circuit):
    """Tell whether `circuit`, in use `since` then, gets no new stream."""
    limit = DIRTY_MS if MICROPYTHON else getattr(circuit, "dirty_ms", DIRTY_MS)
    return circuit.closed or ticks_diff(ticks_ms(), circuit.since) > limit


async def close_idle(circuit):
    """Wait for the end of `circuit`; close it once it is dirty and carries no stream."""
    circuit.closing = circuit.closing or Promise()
    while not circuit.closed:
        try:
            await circuit.closing.wait(30)
        except asyncio.TimeoutError:
            if is_dirty(circuit) and not circuit.streams:
                circuit.close()


async def pump(stream, reader, writer):
    """Move bytes between a Tor stream and a local connection until one ends."""

    async def move(source, sink):
        # Faster out of Tor than cells come in.
        size = PIECE if sink is stream else 2 * PIECE
        try:
            while data := await source.read(size):
                sink.write(data)
                await sink.drain()
        except MemoryError:
            stream.send_end(END_RESOURCELIMIT)
        except (OSError, TorError):
            pass
        stream.close()

    try:
        task = spawn(move(reader, stream))
        if not MICROPYTHON:
            await asyncio.sleep(0)  # what is cancelled before it begins is warned about
        await move(stream, writer)
        task.cancel()
    except MemoryError:
        stream.send_end(END_RESOURCELIMIT)
    try:
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass


# === 12. Paths and guards ===
# Which relays a circuit goes through (path-spec 2, guard-spec, proposal 333: vanguards-lite).

_NEED = FAST | RELAY2 | FLOWCTRL1
_NEVER = NOEDCONSENSUS | MIDDLEONLY
# Role: position, flags needed, flags refused.
_ROLES = {
    "guard": ("g", _NEED | GUARD | STABLE | V2DIR, _NEVER),
    "middle": ("m", _NEED | USABLE, NOEDCONSENSUS),
    "exit": ("e", _NEED | USABLE | EXIT, _NEVER | BADEXIT),
    "intro": ("m", _NEED | USABLE | HSINTRO4, _NEVER),
    "rend": ("m", _NEED | USABLE | HSREND2, _NEVER),
}


def distinct(table, i, j):
    """Tell whether networks and families of relays `i` and `j` differ (path-spec 2.2)."""
    (net, net6), (other, other6) = table.subnets(i), table.subnets(j)
    return net != other and (not net6 or net6 != other6) and not table.same_family(i, j)


# Failing up to so many hours, a guard is tried again after so many minutes: a primary one, or
# another (guard-spec A.1).
_RETRIES = (6, 10, 60), (96, 90, 240), (168, 240, 1080), (1 << 16, 540, 2160)


class Guard:
    """A sampled guard, good `until` then (guard-spec 4.1).

    `index`: in the table, -1: not listed now, but until `unlisted` (0: it is listed).
    """

    failing_since = failed_at = primary = 0

    def __init__(self, rsa_id, until, confirmed, index=-1, unlisted=0):
        self.rsa_id, self.until, self.confirmed, self.index = rsa_id, until, confirmed, index
        self.unlisted = unlisted

    def down(self):
        """Tell whether it failed, and is not to be tried again yet (4.5)."""
        hours = (now() - self.failing_since) // 3600
        waits = [wait for wait in _RETRIES if hours < wait[0]] or _RETRIES
        return 0 <= now() - self.failed_at < waits[0][1 if self.primary else 2] * 60


class PathSelector:
    """Chooses paths, lists of Relay; CircuitError.  `path`: the guards' file (None: no guards)."""

    updates = 0
    # Indexes of relays that the configuration refuses as guards (guard-spec 4.2).
    refused = ()
    if not MICROPYTHON:
        # Whether a relay is one to avoid.
        excluded = staticmethod(lambda relay: False)

    def __init__(self, table, consensus, path):
        # `online`: when a relay last answered; `layer_two`: {RSA identity: until}, as tor unstored.
        self.online, self.layer_two = 0, {}
        self._load(path)
        self.update(table, consensus)

    def _load(self, path):
        self.sample, self._file = [], path
        try:
            stored = json.loads(read_file(path or "") or b"[]")
            for g in stored:
                dates = int(g[1]), int(g[2] > 0), -1, int(g[3]) if g[3:] else 0
                self.sample.append(Guard(b32decode(g[0]), *dates))
        except Exception:
            log(WARN, "%s is damaged: choosing new guards", path)
            self.sample = []

    def update(self, table, consensus):
        """Take over a new consensus, and sample guards (guard-spec 4.2, 4.10)."""
        self.updates += 1
        self.table, self.param, self._doubts = table, consensus.param, {}
        self._totals = {}
        self._weights = consensus.bandwidth_weights
        if self._file:
            self._expand(*self._expire())

    def _expire(self):
        # How many guards are listed, and how many of these are sampled (4.1, 4.10).
        found, count, listed, t = {self.table.find(g.rsa_id): g for g in self.sample}, 0, 0, now()
        for g in self.sample:
            g.index = -1
        for i, _ in self.weigh(*_ROLES["guard"]):
            count += 1
            if i in found:
                found[i].index = i
                listed += 1
        life, gone = self._seconds("lifetime"), self._seconds("remove-unlisted-guards-after", 20)
        life = max(life, self._seconds("confirmed-min-lifetime", 60))
        for g in self.sample:
            # Dates that are too late come from a wrong clock.
            g.until = min(g.until, t + life)
            g.unlisted = 0 if g.index >= 0 else min(g.unlisted or t - randbelow(gone // 5), t)
        late = lambda g: g.until <= t or g.unlisted and g.unlisted + gone <= t
        self.sample = [g for g in self.sample if not late(g)]
        return count, listed

    def _expand(self, count, listed):
        # Sample more, while too few are usable (4.2).
        p, order = self.param, self._order()
        # A failure counts once a relay answered since: a dead network uses up no guards.
        usable = [g for g in order if g.failed_at > self.online or not g.down()]
        least = p("guard-min-filtered-sample-size", 20, 1)
        share = count * p("guard-max-sample-threshold-percent", 20, 1, 100) // 100
        most = max(least, min(p("guard-max-sample-size", 60, 1), share))
        # Unlisted ones take room, but for the primary guards there is always some.
        room = max(most - len(self.sample), self._primaries() - len(order))
        lack, room = least - len(usable), min(room, count - listed)
        while lack > 0 and room > 0:
            i = self.pick("guard", lambda i: i not in [g.index for g in self.sample])
            self.sample.append(Guard(self.table.rsa_id(i), self._until("lifetime"), 0, i))
            lack, room = lack - (i not in self.refused), room - 1
        self._save()

    def _factors(self, position):
        # Only ratios count (dir-spec 3.8.3).
        w = [self._weights.get("W" + position + kind, -1) for kind in "mged"]
        w[2] = 0 if position == "g" else w[2]
        w = zip((0, GUARD, EXIT, GUARD | EXIT), w if min(w) >= 0 else (1, 1, 1, 1))
        return dict(w)

    def weigh(self, position, need, never=0):
        """Yield (index, weight) of the relays with all flags `need` and none of `never`."""
        factors, kind = self._factors(position), GUARD | EXIT
        for i, flags, weight in self.table.rows(need | never, need):
            # Not 0: without weights, all are alike.
            yield i, weight * factors[flags & kind] or 1

    def _draw(self, fit, *which):
        # An index by weight, or -1.  First as if nearly all were fit: that asks for few.
        if which not in self._totals:
            self._totals[which] = sum(w for _, w in self.weigh(*which))
        for _ in range(4):
            at = randbelow(self._totals[which] or 1)
            for i, w in self.weigh(*which):
                at -= w
                if at < 0:
                    break
            if at >= 0:
                # The table is not as it was.
                del self._totals[which]
                break
            if fit(i):
                return i
        total, found = 0, -1
        for i, w in self.weigh(*which):
            if fit(i):
                total += w
                found = i if randbelow(total) < w else found
        return found

    def pick(self, role, accept, stable=STABLE, among=()):
        """The index of a relay for `role`, or `among` some, that `accept(index)` takes."""
        position, need, never = _ROLES[role]
        # If none is left: without these flags, as tor; then those that failed lately.
        least, t = need & ~(FAST | STABLE | EXIT), now()
        for need, t in ((need | stable, t), (least, t), (least, 1 << 40)):
            fit = lambda i: self._doubts.get(i, 0) <= t and accept(i)
            left = [i for i in among if self.table.flags_of(i) & USABLE and fit(i)]
            i = left[randbelow(len(left))] if left else -1
            if not among:
                i = self._draw(fit, position, need, never)
            if i >= 0:
                return i
        raise CircuitError("no %s is left for this path" % role)

    def percent(self):
        """For how many of 100 paths microdescriptors are here (path-spec 2.1.0)."""
        percent, weights, counts = 100, {}, {}
        for _, flags, weight in self.table.rows():
            flags &= GUARD | EXIT | USABLE
            weights[flags] = weights.get(flags, 0) + weight
            counts[flags] = counts.get(flags, 0) + 1
        for position, need in (("g", GUARD), ("m", 0), ("e", EXIT)):
            factors, have, total = self._factors(position), 0, 0
            for flags, weight in weights.items():
                if flags & need == need:
                    weight = weight * factors[flags & ~USABLE] or counts[flags]
                    total += weight
                    have += weight if flags & USABLE else 0
            percent = percent * have // total if total else percent
        return percent

    def _save(self):
        stored = [(b32encode(g.rsa_id), g.until, g.confirmed, g.unlisted) for g in self.sample]
        cache_file(self._file, json.dumps(stored).encode())

    def _seconds(self, name, days=120):
        return self.param("guard-%s-days" % name, days, 1, 3650) * 86400

    def _until(self, name, days=120):
        # Random, not to tell when it was set (guard-spec A.2).
        return now() + self._seconds(name, days) - randbelow(self._seconds("lifetime") // 10)

    def _order(self):
        return [g for g in self.sample if g.index >= 0 and g.index not in self.refused]

    def _primaries(self):
        return self.param("guard-n-primary-guards", 3, 1)

    def primary(self):
        """The guards to use first (4.4): what was one remains one, until others are confirmed."""
        first, rest = [], []
        for g in self._order():
            (first if g.confirmed or g.primary else rest).append(g)
        found = (first + rest)[: self._primaries()]
        for g in self.sample:
            g.primary = g in found
        return found

    def guard(self, accept=lambda i: True, kind="guards", use=1):
        """The Relay to enter by, of those that `accept(index)` takes (4.6)."""
        flags, primary = self.table.flags_of, self.primary()
        fit = [g for g in self._order() if flags(g.index) & USABLE and accept(g.index)]
        # Where all are down, the best take turns.
        up = [g for g in fit if not g.down()] or sorted(fit[:3], key=lambda g: g.failed_at)[:1]
        if not up:
            raise CircuitError("no entry guard is left")
        use = self.param("guard-n-primary-%s-to-use" % kind, use, 1)
        best = [g for g in up if g in primary][:use] or up[:1]
        return self.table.relay(best[randbelow(len(best))].index)

    def failed(self, rsa_id, hop=0):
        """Try others before this guard (guard-spec 4.7), or later `hop`."""
        if hop:
            self._doubts[self.table.find(rsa_id)] = now() + 120
        for g in [g for g in self.sample if g.rsa_id == rsa_id and not hop]:
            g.failed_at = now()
            g.failing_since = g.failing_since or g.failed_at

    def succeeded(self, rsa_id):
        """A relay is up; return whether no better guard than it may be up again (4.8)."""
        silence, primary = now() - self.online, self.primary()
        # After a long one the primary ones are tried again, and those that failed in it.
        if silence > self.param("guard-internet-likely-down-interval", 600, 1):
            for g in self.sample:
                g.failed_at = 0 if g.primary or g.failed_at > self.online else g.failed_at
        self.online = now()
        for g in [g for g in self.sample if g.rsa_id == rsa_id]:
            g.failed_at = g.failing_since = 0
            if g not in primary and [p for p in primary if p.failing_since and not p.down()]:
                return False
            if not g.confirmed:
                g.until = max(g.until, self._until("confirmed-min-lifetime", 60))
                # The confirmed ones come first, in this order (guard-spec 4.3).
                self.sample.remove(g)
                self.sample.insert(sum([other.confirmed for other in self.sample]), g)
                g.confirmed = 1
                self._save()
        return True

    def exit_path(self, port):
        # tor's LongLivedPorts, roughly.
        stable = 0 if port in (80, 443) else STABLE
        last = self.pick("exit", lambda i: self.table.exit_allows(i, port), stable)
        return self._path(self.table.relay(last), ["middle"], (), stable)

    def onion_path(self, target=None):
        """Guard, layer-2 guard, then middle and `target`, or a rendezvous point."""
        return self._path(target, ["middle", "middle" if target else "rend"], self._layer_two())

    def _path(self, last, roles, second, stable=STABLE):
        # `second`: the layer-2 guards, one of which takes the first role.
        table, path = self.table, [self.table.find(last.rsa_id) if last else -1]
        apart = lambda i: self._apart(i, path, second)
        path.append(self.guard(lambda i: second or apart(i)).index)
        for role in roles:
            path.append(self.pick(role, apart, stable, second if len(path) == 2 else ()))
        return [table.relay(i) for i in path[1:]] + ([last] if last else [])

    def _apart(self, i, path, second):
        # As in tor: to avoid their families, or a guard as target, would tell of them.
        if second:
            return i not in path
        return all([distinct(self.table, i, j) for j in path if j >= 0])

    def _layer_two(self):
        # Their indexes.  Each lives for the longer of two random times.
        p, table, two = self.param, self.table, self.layer_two
        if not p("vanguards-lite-enabled", 1, 0, 1):
            return []
        for rsa_id in [r for r in two if two[r] <= now() or table.find(r) < 0]:
            del two[rsa_id]
        low = p("guard-hs-l2-lifetime-min", 86400, 1)
        span = p("guard-hs-l2-lifetime-max", 12 * 86400, low + 1) - low
        while len(two) < p("guard-hs-l2-number", 4, 1, 19):
            i = self.pick("middle", lambda i: table.rsa_id(i) not in two)
            two[table.rsa_id(i)] = now() + low + max(randbelow(span), randbelow(span))
        return [table.find(rsa_id) for rsa_id in two]


class BuildTimes:
    """Tells how long to wait for a circuit, from how long others took (path-spec 2.4).

    By Pareto's distribution, as tor, of the last thousand.  `path`: the file that keeps them.
    """

    def __init__(self, path):
        self._file, self._recent, self._factor, self._known, self._new = path, [], 1, None, 0
        try:
            stored = json.loads(read_file(path) or "[]")
            self.times = [min(max(int(ms), 1), 1 << 22) for ms in stored[-1000:]]
        except Exception:
            log(WARN, "%s is damaged: learning anew how long circuits take", path)
            self.times = []

    def learning(self, param):
        """Tell whether more are needed."""
        enough = param("cbtmincircs", 100, 1, 10000), 1000
        return len(self.times) < min(enough) and not param("cbtdisabled", 0, 0, 1)

    def ms(self, param, hops=3):
        """For how many milliseconds to wait for a circuit of `hops`."""
        if not self._known:
            guess = self.learning(param) or param("cbtdisabled", 0, 0, 1)
            first = param("cbtinitialtimeout", 60000, 10) * self._factor
            self._known = first if guess else self._estimate(param)
        return self._known * hops * (hops + 1) / 12

    def _estimate(self, param):
        import math

        # Xm: the mean of the fullest bins of 10 ms.
        times, bins = self.times, {}
        for ms in times:
            bins[ms // 10] = bins.get(ms // 10, 0) + 1
        modes = sorted(bins, key=lambda b: (-bins[b], b))[: param("cbtnummodes", 10, 1, 20)]
        xm = sum([bins[b] * (10 * b + 5) for b in modes]) / sum([bins[b] for b in modes])
        logs = sum([math.log(max(xm, ms)) for ms in times]) - len(times) * math.log(xm)
        rest = 1 - param("cbtquantile", 80, 10, 99) / 100
        found = min(xm * rest ** (-logs / len(times)), max(times))
        # This machine's own work may take half a second.
        return max(found, param("cbtmintimeout", 10, 10), 500)

    def add(self, ms, param, built=True):
        """Note that a circuit's first three hops were built within `ms`, or failed after it."""
        limit, most = self.ms(param), param("cbtrecentcount", 20, 3, 1000)
        self._recent = (self._recent + [ms > limit])[-most:]
        if sum(self._recent) >= param("cbtmaxtimeouts", 18, 3, 10000):
            # The network is another now.
            first = param("cbtinitialtimeout", 60000, 10)
            self._factor = 2 * limit / first if limit >= first else 1
            self.times, self._recent, self._known = [], [], None
        elif built:
            self.times, self._known, self._new = (self.times + [ms])[-1000:], None, self._new + 1
            if self._new % 10 == 0:
                cache_file(self._file, json.dumps(self.times).encode())


# === 13. Directory client ===
# dir-spec 4 and 5.

# Of tor 0.4.9.11: v3 identities of 9 authorities; where these, and then 200 fallback mirrors, are.
# 4 bytes address, 2 port, 20 identity in 32 digits to base 91.
_PLACES = r"""
$$$$$$$1M}v$w?y)xas8w|x9sxiOhPCc$$$$$$$&Z%6~EXe\j'S{tw~P.<w7Wzm/$$$$$$$0jCE2Ub@4AV-1yn99&OS+p[hg
$$$$$$$1%+[Sf5GH%r'nKWoj5)j9B@At$$$$$$$$.}:rPO-sB.@$WhoG^?>37iOl$$$$$$$($edf9nuyB@k7Y;[s%APr7Px,
$$$$$$$%{yRK[M'4\U+<ZcHn\$<+c5xq$$$$$$$&11v>]_s=0g:CdAs3rR0I.gx|$$$$$$$*4.zbM2aU-kx0[$N[:cIJw`v-
J@H}>qn\96cZqkdkx-Yv,EFB4Mu>4*Tpe.q~Bnawd%K%[$<j=9;?.i^cg8FH9T`21TW+YUg_PPuke]@1gxwE?q8Z:q~>NpG^
KGg~/GTLNH^z[>`0YwliZxr-2:k^&D.v]gJaj\j9<?rioPvaPeAtM^mvSc14uME_W2{&T/:JgZ\?;V,U]1i4mxwP[~x_VL+=
_XCd'*fd0W<:DMg0LU\Lp7P3%wuPTY7ia%_x9)x7nr-AD6l/&UrYLNGiSP%:q]Nxdq%9cM)'@%v3pSm13<genl~s7qiPO^H~
77P_~Md/&*Er_b\3RgQC:}^;LiC.6=/(TNKj%3&qby'K+&uAHE]E(m}-vV2*K~8$[Tcr\](w:vTKJz3=7WIjX@17qE2e`Ql_
[[-Um&RB9d(*n[k+kq'^eV7x@9_G>bX|@eB.OD_6*6bJeNb_a]yq6f}egj&ENRdQYSdL?Q:CE_.^}HRcy..KAg'iqpA=R?E_
&^0Dl=IJ|&3$NUNgzN768?Sa:xWxDL3%Phrv3a`ePoFtPY~Bb?Je)Vw.;<*f%.$k^Phd>aJ{srsSB<ZlT)K,V{D/Y:3JK7kM
(ewg0IAel[67(5}0@Fc@x{`ycF~V(B@<e*DW;u;+Aub]}>]}Wf[oS`0cDv@LgPxsLzdRTp'dwsV4_oJg:,&np/^.Z<4Y8R0w
V|S`;WM2|rx>i~P)hIW;];]qx%YwbD|<TNI{@uP-/CU%<[ZV>.BJiA1>)UfUD48<]Qm]_|^Ba6>CGnXx<;L{r:{31Z21*,z+
+-;HabFqpn1GMVY%y{$@WPlwy5L4a3/4;J,9L*An0bAtSm5A,bHetvoPyg%s;~&K/AIfY9=FYsbuC_(f`3HcxUa1Jx1Eqx|X
<$0DLbR'rH3L7LC0y{I}=v*vA6kyXe5r6\m:x\}Kw2O%y0q[-Em$D/}}Uxub5XBn:ZEK\)kl@FJ6'kvF^D1>DI9>bnP:K7jy
[M5V<PA]VhR.BZjUhDbiXClne`%zMxS;O1Y^,.>h>_<Zo}aECGq=hm&CwR1`&)4H<cbahD+?fdZkMB<:ok@};0*e'&?^Eh`|
P)lm8ziNip;@3jm8Dw{hZiRr2BHgf;^'B}(=R;-(_Tpx5@-N_ZKSfK)0<TmwS\jS<R9nrYyg>hfN)u=`G*+N0z>]BDMHBQR|
^FPf4LK1c`D\QuVmK[p5x/Qxbfd-O7y$77NBbzQCUYiuui0yt4fHSq9Q_Oyi4rfB1O$[3Qw>M[m<\C+JKc~sS]6rf(xkTDPA
dwI@5W-zRf/k7qe[/P44CX36c3-]d]i.LRx(c0-pD3iw*d*7.fgQKe-:5dT.h$`E<$0V_}+p>UsNy']i[{Ke/v3TX]d)fOP*
<bI%6l+r2,=(.up],P3swDz--yL'c;|QW2{&xl$:6A:)4VZyKpfEl`uL%UOB\%.}cU|azs|g{bf`U{K^@F^yV{]r72.s&/M7
\NQQM=J_Z8wW@~oyEXP)pN*EazV{/.Lu+-;H^%dL|1h.$4b:)@P<<(;AlgUCCmry7vX_M0Zkmax?X%7>+[^VfBEk41i7M`PR
1\405x7lBC64Vv8:7FQCfkr>cTKma9>/]y$yVV~<R'YU}mt4wHhi5D*I^km4|7=OTai)&}p=KZdtgcVdEP,KDa+LY8UF8-a7
1VH1Y&Wy$2qRnr&QDnZSgS.3b%:E%jY:JBc/4cdH24L9'{r),CXBG1f9RRS1EmVKJUnRmo}\?/CL3%&_00g>HspZo0w\3SUB
2{H=@B}u)a*p;v,0$6;^~o;MP8@B`;j{SAtF})`Ez>aiJC0[wai],xb*J@rgl^KI77NDB)|'3)kC;d%UDR=,Yak8W7iwtSEN
]N4AB&W,cX-)fsD.\wN16(0lx,i&Z_Ye@eB-r0>cw[j+JI5dOuVN[a-F36)`%1`BcrOd5z`Zz1Y[%erp3,<m=]:Ud:VKHK;^
[X[^ar6aJ+dl*_,3qcSd\6XgXyiUY$@BDaWnu(+`Zy*Y*sC>r5:k%q|pi.~9C}(7]y$yWk7u^`+=_Cs>'kXuUTSK?Z%W=MJ2
@+vy+gFY)DjkD,93r%]s{'['+{Mfp5py<jw4<.|](S)F\p9{UqmQkOT.6lDBL@I|Bh)-]2K]hdk<)>DLH?2:&?9:d&I:M98V
LR{,fDX|lW6')bJhvlOqI&_l{f~ie?e2W2{&gbNM//*C9M{G_Y$1IQ'U@*P,vl@.+&[WvJY;0>r0b=8}a(WhgMvxH%;?7e&<
+-;H_9xy.%}W.%SPW0^oSM3AdiXY:a?'Tc=PAUNLHMS{<NL{niGW1u=*&ss(g%cu^5dW;iL90%MjGSjUZN|RV5'ia;g+dLTZ
N>+<S<4'<QH=\cQhkxBe2WUif>X|h>G^]s~geqV@LC3[md(e'+[w6=dKB;(`2t|)%l6k{Q)l+2&W>65F:>Yn;.K(p@4..xY.
8ITzzcq_V,O|Ec@;1=b)m_TcTU=z&B{iOf6CrfPqe*{'n-pa^3MEi<}K\Yc:FA@61\4*\bj`\.V~Ex&8lK2d$Bdrk{\v6g>Z
8>0x<w]e'|3mI+09nUys_QzKdI5UyCv0]pI)LSaQw@j~qa>^j2vB;j<izVBw{k)-=H,Zz(lD5lD-^xe9EM|%LDz2T3]G1SX7
[Izcs$}:8E@1L,LC;$d?TOP,B2Iwq{ZYP)lg0(U\xm1*n\]A)<<*+|W7g(KaM?'N<Wk*epLP];y~u$ot.fI6bEHdGqlU]c~G
@eB-RDK|W:PT,x8s973CZXT4=T3)3nfB77N@kGSsaZHJ%L3ba_tS=`8T1}:>i0|=>b&MvPu}G)8Z]Uzz&\?h[7VQQNO~zWal
[YW<I`@dXqxQqR{.I74GL,MAQLl9[7>Q7DX[]Fjn+jViTo<n-GxGE$H|5$KQ6}^Y^*Aw5Rsr>B+u8kpCA+R;W-|^LHDnj]d[
@eB.gm1y9.5<n]%3:DhywJv1)N2mOZQO8}*@m1;z^L>P1B>h7]o.^6NPVid_;t`A@J{Y`Ni|DZgCvLVbO&G%7=F5W,>y15c1
?H*mX2gw)T3{p<CF{uXvi4_DHIkI'RzL>`r}VIl^7d/`mRoc%z\>Gl>)9IJ^t+.D=`tWZpoSP)Ub.[;XwOkhM00-snjx?2gq
]N4BsYMJa(3iAq\9&'A8Rhs`H;;+hR\_3Bom%)8P[1IFz7ra2mI'S&G&P.}gWC-L1zG4ig?0hb;F?H5Z`=;QYV,2.)azuPi$
[KqD4x3_m5zhU7f<ei0<om0BVC2N&Iq@>`[AM/r4%K\Z,LFE'gk.aiQ2oz6(}T_]YSeLVJHSQ-oDKePl*(~G%A;2shUO[r'o
Khqr@Bw-y*8Ul&-S?C1u{:aAmkbihYR%?ODQ~0,77x7SAzp,jy/vzh-JZc?jOm2*;F*8BTm+sbq5rvfG}`3T>TUB`e4D<Z7r
3Mjw{7gI'|Av:<}1]BY=xf)B~Dj:h<n|?Xt(R]HqZ}Eiy9F1E+`iCt*9bu*OJ'w&bWR6EYz+A&&j1mCj1'vd`N7hc*GYzvSx
P)ljLzARh;>4TcbFUVwpB.zyW{@^GB9G@eB-cNYq}2tJX+qIONmvsv$)$,X+0*>Y45@11{D9;N2]9&v$BA3{$YtL1{qFWsq0
_;u\d4;$B-A*3@Xt@/F6<H@h58stbn=%;)s5p457,t:r;ZCew/ll'82L/\=XU5u;dnj_UTo(X4@|}Dw.]rrpGw|cC,8Ez}+{
G(O]t53cz`Cw<RMx_@=K+%'x2fysdj?c^&fa:ps*RqNH(<VZ'3+x&)I9xr*rlh$0>b&MvT/Ky}O9Kwj^3FU*s~YX*eInE?3-
\QzaQddVfX%B`r{wY}=z',eQ1\'n{F2Q77NDY>:Llm9*z,kyG{/$R$__<F|7HT02[TLzez?jq24IWV9\QHWK_@rV2YeO*)k4
@eB-000?a]`pN_'9j?M),EL[P>IZ^>@h77P_zl&_{rsly_`y:\K:f*/EcmL:fH^vP)ljd3Zs=:xv)rqzIjC-|Lp*AlLp3)4f
%l6l1igLh*wX(h9>x-EvidGnAW+c_AQiV*TL*iT6?bzvEbfk*'{%DCIWFkR*krH7]h8;u<wrT0&Q-X%R45xt^Yc\MIwf[}2^
3WQh52%jJ:]64ox-TmadQmgBB6{8?|Dn[Nww+[k>SUzO'_cm3IUrRWWxVN94,qe^W2{&sve-~opdJ9q9}I>oITxIl`N8-<t>
DaWnu(*-i_TrAOtgQ24y8a4c5<&c(ALM77Pbavf}[tw<^_/NUgwH>}.CPXK,PVE5]q6wbqX=@:J11mN}Y79+~Y*ex81:/xo*
R.=/`AYW_N^g5]J&:)`(MVKH5H1DFeiV>0dry@tl]hX_0|Vt.(8>Cqq1[C8^U:6U@<pDv?LY8fSxiC_MIh\3K2BpO+C<(npA
7:_t|ecdm[\G3F>E(,E{UTPD8+rE~Bo,W2{(3HvDFoFZ;?H'g=Gftma'HBrz,hG'X&62iQwfM;d=xL256T>&KyI|<sIYp6%&
1VQxJY]|+'T3/0w&Vke9G@XX<nK|q2*6%\1VsTh:ijs'Q1]Cx?4;ou8Zt>7}K^R.P.U*<'j=Avju7J4WK*5{Rafd=-Kh@-Lb
@`9D^ySIW5w:\VCf-}x*>6`G-_AWZct88>0x<uy=.r+'{k|.qE7SJv,cN3QG2pNv6kQ-F~7\*GjjSO`MYjB;V@9C-b7wN~.(
1W-,ejoUm@+h>_Pj@[YQ0Vhj/|6Y.V:o\{,T2=}Ik1p%f8cjR*iWGu>Sel`}/+}{8V.qGMMey/aV<'@*/e3wAxagU(Vqn9TS
]xl9TcCY^hr,P]1:1isA4^nv|'kHe4rAcJQ-jGvO$(^<2-b5A)W\kGrO5/g:V$cf7N'S(?yR{]}_nCLBya,zwgGKJJfY:}HD
N\3e\^>xCYx~vr8*<N'rd8@C-u<[*rvF1V-^^`Wkb|_>=Y:`7n,5F`Wt<pzfpaN1*}>DX<,+'Q%7%8}q3%N%5?w]hINFa?=a
1zMXjN}f@[]+PUCt6+^HP@ogxH,?UJVz77NDeRQ>x@svk/}Fmbrdk^P7-?FaCoM877PboD7L:Ws(t=tg}pnfzId>YHn7U?4B
@8U@6^4I`)<BI|r-p0&O-`xcqVXfoL2INRqibVk?e@zvE.SdgNN@cYw+<<`dTaM3@eB-obpj=hM**~NxaA87]<CL63,7PL7%
+'sdFi<8S>nEf7l=/0<ugZ.5KDEgg;66^S%(RRZ\{~xYERiwNP`rVgYehlR5clSACGP;Z<u44<cznB-Ibuz}cA/J&Cy^BsVx
`isiA\>n:$xc;n~18Ct{7l+0hxR2t|TX77NC<R4IQS'Z'L<qDbrH?u~(<Kkek>t7/Ir<84E/D^/rPp$<XaL<`yIh<e(h\S6k
[YC2l14=5ID9>n`~4Nq1:?zMJ[fgrw0&?%cQ@0}::vn}16gIdHl5e&[qb8?=)d~~;v%:xQ<z]YRD0a,{xfP&B5<=iSPloxy0
e-Bk]}82p(8Z%wG>8unQ7)e3JY6>5Il0YR.BNUN/SIX(1w-&&Y}$vJ=rd?.X])iAVHAuX{Oa4:SkK0r_q4]{,k[OsLFx3&eR
[FXj-=7lpGc^i1{n|)g8x^mdWj,gU{1H77PatlM/>]w`&WkOHUCX?wt|N8`P@(~w>/y~RlaR5G'5NK}}h[a}c]FN&P43}dR*
@eB/1Nv]L.&<q;T;HZzmm^}X|K5l)jDF[X[[p|^GzB'q~f+\tumPAh+D^dE2%.O^J=0VKbmV}_}R:tyO9o&E3jcAkCM,o,^8
[TLo<E:B5.%X?|h[3<b2\bW)%Kf'cUkF]eL]A?A3hcba`^pS>C]lG+idchONLfR1e*X**Y)[>MVO0dAW8_L*q}*[|005IPKy
DaWnsnseJzezY0=;%76/?~H&3S}\/'[/D7hxc/2(|RK'4L?0kBf/vN7|Sub7@MS4%UtK@UC,F.eUx@JHK\DU}W|JN+_R9)o-
77P`Qv;f&u;_-&4OsI)GH@U~_'X{v[B`Xd:,FqoKZ5gY((4SP5dde^%CoFX^2%m=[[-Ut7hS[*U{\=7e@2tE^IOBn<(rY2Hs
P)lh?G0+g<7E5ZtQLK~MI@dlZU>?@D@6@/`%NYiB_R_2`4_++j.ctSj&\hrpg'J|@0E}6Y9@X=$?m&%%aqaNrO((LC3`KQ/i
1QXdJE*6o)t&)}t>XJA.B*~L$:o~&|,uOt6zk.}fs@>hLAXm;eteU8L1F/MmU9:HXj`W=taM2y?k7`E+vCIo[sifum6sz1>E
aS0Pb)pMG{0q$9PA@YD}+3ovqqAk3)Tk1NVhGggN^d-@c[~Bn^%K;:^r1\Lpq3noD7hibk{u+GRjlmM0TQ`Cxp-p_L;L/`@Z
55j8r32oOIiwn8*y>>*%M,bTy<vL]MV\1VQwtUKcKv,UA.o8%|Z)~xBuS:U:MYOL55oZ|kv,OW~+a.&[(PQ8JjKsi7J$mEs^
+&[WD@D3eNJD}bYr<{J;n-j;UBNUX`d~e&B4mB-)^vL{8heM,dOm,vP5Rp202aCR[Nww,p$kh6V+6kPdsmB/`U/-(KtI[e62
7o>.{0{o{HZ-'u/Gwar4=:bziwZP56cJ77NBvR-2po:W:z4\Y'n5}l3Rv8qc~$j)Ob&v;dB;Nu'5|yXHr1/es/lmpzL<rb3M
/AIiGbBXNFZk/Gpu8Vx3gQZc;(d(0z-JXd:`hJex;Tf8(p.LO4bOk^@oa(g?1>qe56$}HOi>Z,C_O%9p5:G/w'-*D+wGl;Or
77ND_HEih3x[z.`t:lo{`4Q{2x%Q'oM_=`{KjhS+NpK8+:>M4KfN_P)Z+{DLybCd
"""


def place(entry):
    """(address, OR port, RSA identity) of a directory, which packed is a third as large."""
    if isinstance(entry, tuple):
        return entry
    return ".".join(map(str, entry[:4])), uint(entry[4:6]), entry[6:]


def load_network(path=None):
    """The Tor network of the torrc file `path`, or of its lines, or the public one; ConfigError.

    `authorities`, `fallbacks`: see place; `identities`: the v3 ones.
    """
    network, places, v3_ids, lines = Record(), [], [], []
    network.testing = False
    if path is None:
        for entry in _pieces(_PLACES.replace("\n", ""), 32):
            n = 0
            for digit in entry:
                n = n * 91 + ord(digit) - 36
            places.append(n.to_bytes(26, "big"))
        v3_ids, places = [entry[6:] for entry in places[:9]], places[9:]
    elif not MICROPYTHON and isinstance(path, list):
        lines = path
    else:
        try:
            with open(path) as f:
                lines = f.read().split("\n")
        except (OSError, UnicodeError) as e:
            raise ConfigError("cannot read the network file %s: %s" % (path, e))
    for line in lines:
        words = line.split("#")[0].lower().split()
        options = dict([word.split("=", 1) for word in words if "=" in word])
        try:
            if words[:1] == ["testingtornetwork"]:
                network.testing = words[1] == "1"
            elif words[:1] == ["dirauthority"] and "v3ident" in options:
                before, _, after = " ".join([w for w in words if "=" not in w]).rpartition(":")
                rsa_id = bytes.fromhex("".join(after.split()[1:]))
                v3_ids.append(bytes.fromhex(options["v3ident"]))
                if not len(rsa_id) == len(v3_ids[-1]) == 20:
                    raise ValueError
                places.append((before.split()[-1], int(options["orport"]), rsa_id))
        except (ValueError, KeyError, IndexError):
            raise ConfigError("bad line in the network file: %s" % line)
    if not v3_ids:
        raise ConfigError("the network file has no DirAuthority with a v3ident")
    n, network.identities = len(v3_ids), set(v3_ids)
    network.authorities, network.fallbacks = places[:n], places[n:]
    network.id = sha256(b"".join(sorted(v3_ids)))
    return network


class _Identity:
    eof, unused_data = True, b""
    decompress = lambda self, data, size: data


# Content-Encodings (dir-spec 6.1).
_DECODERS = {"identity": _Identity}
if not MICROPYTHON:
    import lzma
    import zlib

    _DECODERS["x-tor-lzma"] = lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, 16 << 20)
    _DECODERS["deflate"] = zlib.decompressobj
# What 64 KB may unpack to.
_MAX_PIECE = 4 << 20
_FETCH_SECONDS = 600 if MICROPYTHON else 120


async def _send_request(stream, path, sink, body):
    method, fields, size = "GET", "", 0
    if body:
        method, size = "POST", body.seek(0, 2)
        fields = "Content-Length: %d\r\n" % size
    if sink:
        fields += "Accept-Encoding: %s\r\n" % ", ".join(_DECODERS)
    text = method + " "
    for piece in [path] if isinstance(path, str) else path:
        if len(text) > 100:
            stream.write(text.encode())
            text = ""
            await stream.drain()
        text += piece
    stream.write(("%s HTTP/1.0\r\n%s\r\n" % (text, fields)).encode())
    for at in range(0, size, PIECE):
        await stream.drain()
        body.seek(at)  # others may read it, too
        stream.write(body.read(PIECE))
    await stream.drain()


def _answer_head(head):
    # A decoder's class, and Content-Length or None.
    lines = head.decode().lower().split("\r\n")
    status, fields = int(lines[0].split(" ")[1]), dict([s.split(": ", 1) for s in lines[1:-2]])
    if status != 200:
        raise DirectoryError("the directory answered with status %d" % status)
    return _DECODERS[fields.get("content-encoding", "identity")], fields.get("content-length")


async def http_request(stream, path, limit, sink=None, body=None):
    """GET, or POST the file `body`; return the answer, of at most `limit` bytes; TorErrors.

    With `sink`, a function, it may come compressed, and goes there piece by piece.  `path`: a
    text, or an iterable of its pieces.
    """
    # In functions of their own, as they leave much behind.
    await _send_request(stream, path, sink, body)
    try:
        make, length = _answer_head(await stream.readuntil(b"\r\n\r\n", 8192))
    except (ValueError, KeyError, IndexError, EOFError):
        raise ProtocolError("the directory's answer is no HTTP")
    decoder, pieces, size = None, [], 0
    while data := await stream.read(PIECE):
        size += len(data)
        while data:
            decoder, most = decoder or make(), min(limit, _MAX_PIECE)
            try:
                piece = decoder.decompress(data, most + 1)
            except Exception as e:
                raise ProtocolError("bad compressed data: %s" % e)
            # Less is all there is in `data`.
            require(len(piece) <= most, "the directory's answer is too long")
            limit -= len(piece)
            (sink or pieces.append)(piece)
            # One more may follow.
            data, decoder = decoder.unused_data, None if decoder.eof else decoder
    require(not decoder and length in (None, str(size)), "the directory's answer is cut off")
    return b"".join(pieces)


async def directory_request(circuit, *request, seconds=None):
    stream = await circuit.open_stream(BEGIN_DIR, b"", 30)
    try:
        return await wait_for(http_request(stream, *request), seconds or _FETCH_SECONDS)
    except asyncio.TimeoutError:
        raise DirectoryError("the directory is too slow")
    finally:
        stream.close()


_BATCH, _WORKERS, _LOOK = (37, 1, 8) if MICROPYTHON else (92, 3, 1)
# By what a digest is found; a number takes no memory.
_short = (lambda digest: uint(digest[:4]) >> 3) if MICROPYTHON else bytes
# For the first directory; between looks at the clock; until what bootstrap left out is fetched, as
# a board has no memory for that while it publishes.
_CONNECT_SECONDS, _PAUSE_SECONDS, _LATER = 15 if MICROPYTHON else 5, 5, 60 if MICROPYTHON else 0
# Of each kind: directory guards, then mirrors, then authorities; after any of these errors.
_TRIES = 4
_ITS_FAULT = ChannelError, CircuitError, DirectoryError, MemoryError, ProtocolError, StreamError


def _microdescs_path(table, relays):
    # In pieces that a cell has room for.
    start = "/tor/micro/d/"
    for ten in _pieces(relays, 10):
        yield start + "-".join([b64encode(table.digest(i)) for i in ten])
        start = "-"


class Directory:
    """`table` and `consensus`, from `bootstrap()` on; `paths`, to be set, is told of new ones."""

    def __init__(self, network, data_dir, channels, progress):
        self.network, self._channels, self._progress = network, channels, progress
        self._path = data_dir + "/relays"
        self.table = self.consensus = self.paths = None
        # `_near`: over the link of its circuits alone, as another is dear.
        self._certs, self._percent, self._failures, self._near = {}, 0, 0, MICROPYTHON
        # Who needs much memory, to refresh or to publish; and who needs it for a moment, to judge a
        # consensus or to answer an introduction.
        self.turn, self.moment = Turn(), Turn()

    def _report(self, percent, tag, summary):
        if percent > self._percent:
            self._percent = percent
            if self._progress:
                self._progress(percent, tag, summary)

    async def bootstrap(self):
        """Return when circuits can be built; DirectoryError, ClockError, ConfigError."""
        cached = load_table(self._path, self.network.id)
        if cached:
            # Of an old one, most microdescriptors are still good.
            self.table = cached[0]
            try:
                cached[1].check_times(now())
                return await self._fill(*cached)
            except (DirectoryError, ClockError) as e:
                log(INFO, "Not using the cached directory: %s", e)
        for _ in range(3):
            await self._fill(*await self._ask(self._consensus_from))
            if not self.table.short:
                break

    async def refresh(self):
        """Keep the directory fresh, for ever (dir-spec 5.1)."""
        delay = 0
        await asyncio.sleep(_LATER)
        while True:
            try:
                async with self.turn:
                    await self._fill(self.table, self.consensus, 101)
                when = 0 if self.table.short else self._next_time()
                await asyncio.sleep(_PAUSE_SECONDS)
                # The clock may be set, or the machine sleep.  A board with clients waits for an
                # hour that is better, while the consensus is good.
                while now() < when or now() < self.consensus.valid_until and not fits(_ROOM):
                    await asyncio.sleep(_PAUSE_SECONDS)
                async with self.turn:
                    await self._renew()
                delay = 0
            except (MemoryError, OSError, TorError) as e:
                log(NOTICE, "The directory could not be refreshed: %s", e)
                # Others are asked by turns.
                self._near = MICROPYTHON and (isinstance(e, SHORT) or not self._near)
                # In the end as often as there is a new one: on the public network each hour.
                c, least = self.consensus, 2 if self.network.testing else 30
                delay = min(delay * 2 or least, c.fresh_until - c.valid_after)
                await asyncio.sleep(delay + randbelow(delay))

    async def _renew(self):
        table, consensus = await self._ask(self._consensus_from)
        if consensus.valid_after <= self.consensus.valid_after and not self.table.short:
            raise DirectoryError("there is no newer consensus")
        await self._fill(table, consensus)
        self._near = MICROPYTHON
        if table.short:
            raise DirectoryError("there is no room for all relays")

    def _next_time(self):
        # As tor's update_consensus_networkstatus_fetch_time_impl.
        c = self.consensus
        start = c.fresh_until + (c.fresh_until - c.valid_after) * 3 // 4
        span = max((c.valid_until - start) * 7 // 8, 1)
        return min(start, c.valid_until - span - 1) + randbelow(span)

    async def _circuit(self):
        # One hop: to a directory guard, else a mirror, in the end an authority; with bridges to
        # those alone.
        network, paths, failures = self.network, self.paths, self._failures
        if paths and (failures < _TRIES or not MICROPYTHON and getattr(paths, "alone", False)):
            relay = paths.guard() if self._near else paths.guard(kind="dir-guards", use=3)
            where = relay.address, relay.port, relay.rsa_id
        else:
            places = failures < 2 * _TRIES and network.fallbacks or network.authorities
            if not MICROPYTHON:
                places = places or network.fallbacks
                if not places:
                    raise DirectoryError("ExcludeNodes and StrictNodes leave no directory to ask")
            where = place(places[randbelow(len(places))])
        self._report(5, "conn", "Connecting to a relay")
        # At first 90 in all, on a host; guards get longer.
        seconds = 15 if paths else _CONNECT_SECONDS + failures // 2
        try:
            circuit = Circuit(await self._channels.get(*where, seconds=seconds))
            await circuit.extend(None, seconds)
        except TorError as e:
            if paths and not isinstance(e, SHORT):
                paths.failed(where[2])
            channel = self._channels.open.get(where[2])
            if channel and channel.expired:
                self._judge_clock(channel)
            raise
        if paths:
            paths.succeeded(where[2])
        if not MICROPYTHON:
            announce("BUILT", circuit)
        return circuit

    def _judge_clock(self, channel):
        # Something is too old: whose clock is wrong?  Authorities alone are believed.
        known = [place(entry)[2] for entry in self.network.authorities]
        if channel.rsa_id in known and abs(channel.skew) >= 3600:
            raise clock_error(-channel.skew)

    async def _ask(self, use, *args):
        # What `use(circuit, *args)` returns with the first directory that serves.
        self._failures = 0
        tries = _TRIES if self._near and self.paths else 3 * _TRIES
        while self._failures < tries:
            circuit = None
            try:
                if MICROPYTHON:
                    make_room(self._channels.open.values())
                circuit = await self._circuit()
                return await use(circuit, *args)
            except _ITS_FAULT as e:
                if self.paths and isinstance(e, SHORT):
                    raise
                error = e
                self._failures += 1
                log(INFO, "Leaving the directory of %s: %s", circuit or "a relay", e)
            except ClockError as e:
                if self._progress:
                    self._progress(self._percent, "clock_skew", str(e))
                raise
            except OSError as e:
                raise DirectoryError("the relays cannot be written to %s: %s" % (self._path, e))
            finally:
                if circuit:
                    circuit.close()
                    if MICROPYTHON and not circuit.channel.circuits:
                        circuit.channel.close()
        raise DirectoryError("no directory gave what can be used: %s" % error)

    async def _consensus_from(self, circuit):
        # A new RelayTable and its Consensus.
        table, consensus = await self._unverified(circuit)
        async with self.moment:
            if MICROPYTHON:
                make_room(self._channels.open.values())  # clients came since
            table.finish(consensus, self.table)
            await self._verify(consensus, circuit)
        return table, consensus

    async def _unverified(self, circuit):
        identities = self.network.identities
        table = new_table(self._path, self.network.id, self.table)
        parser = ConsensusParser(table.add)
        self._report(25, "requesting_status", "Asking for networkstatus consensus")
        # A mirror answers only if more than half of these signed what it has.
        wanted = "+".join([i[:3].hex() for i in sorted(identities)]).upper()
        path = "/tor/status-vote/current/consensus-microdesc/" + wanted
        await directory_request(circuit, path, 32 << 20, parser.feed)
        return table, parser.finish()

    async def _verify(self, consensus, circuit):
        identities = self.network.identities
        # The certificates are judged by the consensus's time, and that by the clock.
        missing = consensus.missing_certs(self._certs, identities)
        if missing:
            self._report(40, "loading_keys", "Loading authority key certs")
            pairs = ["%s-%s" % (i.hex(), k.hex()) for i, k in missing]
            path = "/tor/keys/fp-sk/" + "+".join(pairs).upper()
            try:
                sink = CertParser(self._certs, identities).feed
                await directory_request(circuit, path, 1 << 17, sink, seconds=120)
            except DirectoryError as e:
                log(INFO, "Authority certificates are missing: %s", e)
        consensus.verify(self._certs, identities)
        consensus.signatures = {}
        if MICROPYTHON:
            # 4 KB of the public network's, for what is fetched once in some hours.
            self._certs.clear()
        try:
            consensus.check_times(now())
        except DirectoryError:
            self._failures = max(self._failures, 2 * _TRIES)  # they are asked next
            self._judge_clock(circuit.channel)
            raise

    async def _fill(self, table, consensus, until=0):
        # Fetch microdescriptors for `until` percent of paths; use the table.
        changed = table is not self.table
        if MICROPYTHON:
            # It is on flash.
            consensus.head = b""
        table.use_family_lists = consensus.param("use-family-lists", 1, 0, 1)
        table.use_family_ids = consensus.param("use-family-ids", 1, 0, 1)
        weights = PathSelector(table, consensus, None)
        least = consensus.param("min_paths_for_circs_pct", 60, 25, 95)
        until, why = until or (101 if table.whole else least), ""
        for _ in range(3):
            if weights.percent() >= until or not next(table.missing(), 0):
                break
            queue, changed = table.missing(4 * _BATCH), True
            args = self._microdescs_from, weights, until, queue
            self._report(45, "requesting_descriptors", "Asking for relay descriptors")
            try:
                await asyncio.gather(*[self._ask(*args) for _ in range(_WORKERS)])
            except DirectoryError as e:
                why = ": %s" % e
                break
        if weights.percent() < least:
            raise DirectoryError("too few microdescriptors came" + why)
        if changed:
            table.save(self._path, self.network.id, consensus)
        self.table, self.consensus = table, consensus
        if changed and self.paths:
            self.paths.update(table, consensus)
        self._report(75, "enough_dirinfo", "Loaded enough directory info to build circuits")

    async def _microdescs_from(self, circuit, weights, until, queue):
        table = weights.table

        def sink(digest, *found):
            i = wanted.pop(_short(digest), -1)
            if i >= 0 and table.digest(i) == digest:
                table.set_microdesc(i, *found)

        for n, some in enumerate(queue):
            if n % _LOOK == 0:
                percent = weights.percent()
                if percent >= until:
                    return
                done = 50 + 24 * percent // until
                self._report(done, "loading_descriptors", "Loading relay descriptors")
            for batch in _pieces(some, _BATCH):
                wanted = {_short(table.digest(i)): i for i in batch}
                parser = MicrodescParser(sink)
                path = _microdescs_path(table, batch)
                await directory_request(circuit, path, 8 << 20, parser.feed)
                parser.finish()


# === 14. Onion client ===
# rend-spec-v3 2 to 4.

_REND_SECONDS = 40
_MAX_DESCRIPTORS = 8 if MICROPYTHON else 256


# When a directory that has none wants a descriptor, in seconds since whatever.
OVERDUE = -1 << 29


def descriptor_place(tor, key, n):
    """Start, blinding parameter and key, subcredential, {directory's identity: OVERDUE}."""
    table, consensus = tor.directory.table, tor.directory.consensus
    period = time_periods(consensus, tor.directory.network.testing)[n]
    param = blinding_param(key, period)
    blinded = ed25519_blind_public(key, param)
    ring = hsdir_ring(table, consensus, blinded, period, "fetch" if n > 1 else "store")
    ring = {table.rsa_id(i): OVERDUE for i in ring}
    return period[3], param, blinded, subcredential(key, blinded), ring


async def hsdir_request(tor, rsa_id, path, body=None):
    i = tor.directory.table.find(rsa_id)
    if i < 0:
        raise CircuitError("the directory is not listed any more")
    circuit = await tor.circuit_to(tor.directory.table.relay(i))
    try:
        return await directory_request(circuit, path, 50000, None, body, seconds=30)
    finally:
        circuit.close()


async def _try_each(tor, items, use, kind, text, reason):
    # What `use(item)` returns for the first of `items`, at random, that works.
    error = "none is known"
    items = sorted(items, key=lambda _: randbelow(1 << 30))
    if not MICROPYTHON:
        items.sort(key=tor.paths.excluded)
    for item in items:
        try:
            return await use(item)
        except AuthorizationError:
            raise
        except TorError as e:
            error = e
            log(INFO, "trying another: %s", e)
            reason = e.reason if isinstance(e, OnionError) and e.reason else reason
    raise kind("%s %s" % (text, error), reason)


async def _find_descriptor(tor, key, *servers):
    found = tor.descriptors.get(key)
    if found and now() < found.until:
        return found
    _, _, blinded, subcred, ring = descriptor_place(tor, key, 2)
    if not MICROPYTHON:
        ring = servers or ring

    async def fetch(rsa_id):
        if not MICROPYTHON:
            result = "FAILED", rsa_id, blinded, "NOT_FOUND"
            announce("HS_DESC", key, "REQUESTED", rsa_id, blinded)
        try:
            text = await hsdir_request(tor, rsa_id, "/tor/hs/3/" + b64encode(blinded))
            descriptor = parse_descriptor(text, blinded, subcred, now(), tor.onion_keys.get(key))
            if not MICROPYTHON:
                result = "RECEIVED", rsa_id, blinded, text
            return descriptor
        except AuthorizationError as e:
            if not MICROPYTHON:
                result = "RECEIVED", rsa_id, blinded, text
                tor.keep_sealed(key, (text, blinded, subcred))
            raise AuthorizationError("%s %s" % (onion_address(key), e), e.reason)
        except ProtocolError as e:
            raise DescriptorError(str(e), 0xF1)
        finally:
            if not MICROPYTHON:
                announce("HS_DESC", key, *result)

    text = "no descriptor of %s: is it right, and up?" % onion_address(key)
    found = await _try_each(tor, ring, fetch, DescriptorError, text, 0xF0)
    if len(tor.descriptors) >= _MAX_DESCRIPTORS:
        tor.descriptors.clear()
    tor.descriptors[key] = found
    return found


async def _introduce(tor, descriptor, intro):
    circuits, cookie = [await tor.circuit_to()], urandom(20)
    rend = circuits[0]
    try:
        established = rend.expect(RENDEZVOUS_ESTABLISHED)
        rend.send(ESTABLISH_RENDEZVOUS, 0, cookie)
        circuits.append(await tor.circuit_to(intro))
        await established.wait(BUILD_SECONDS)
        # A message is taken only where it is expected, and once: RENDEZVOUS2 not before
        # INTRODUCE1 is on its way, with keys bound to it (bug 41297).
        vegas, subcred = congestion_control(tor.paths.param, descriptor.flow), descriptor.subcred
        body, finish = hs_ntor_client(intro, subcred, cookie, rend.path[-1], vegas)
        joined = rend.expect(RENDEZVOUS2)
        ack = await circuits[1].ask(INTRODUCE1, body, INTRODUCE_ACK, BUILD_SECONDS)
        require(ack[:2] == b"\0\0", "an introduction point refused: " + ack[:2].hex())
        rend.add_onion_hop(finish(await joined.wait(_REND_SECONDS)), False, vegas)
        return circuits.pop(0)
    except asyncio.TimeoutError:
        raise OnionError("nothing came from the rendezvous point", 0xF3)
    except CircuitError as e:
        # The introduction point's silence.
        raise OnionError(str(e), 0xF7) if e.reason == 10 else e
    finally:
        for circuit in circuits:
            circuit.close()


async def meet(tor, key):
    """A circuit to the service with the identity `key`; OnionError."""
    # One that lost relays publishes anew within seconds.
    end, pause = now() + _REND_SECONDS, 0
    while True:
        descriptor = await _find_descriptor(tor, key)
        intros, text = descriptor.intro_points, onion_address(key) + " cannot be reached, is it up?"
        use = lambda intro: _introduce(tor, descriptor, intro)
        try:
            return await _try_each(tor, intros, use, OnionError, text, 0xF2)
        except OnionError:
            descriptor.until = 0
            if now() > end:
                raise
        await asyncio.sleep(pause)
        pause = 3


def auth_key(key):
    """An X25519 key for client authorization: 32 bytes, or text as in its files; ConfigError."""
    try:
        if isinstance(key, str):
            # In base32, what stands before it aside.
            key = key.rpartition(":")[2].strip().lower()
            key = b32decode(key + "aaaa")[:32] if len(key) == 52 else b""
        # Refuses the points of low order, which share zeros with everybody.
        x25519(key, key)
    except ProtocolError:
        raise ConfigError("no X25519 key: 32 bytes, or 52 characters of base32, are needed")
    return key


def auth_text(key):
    """The X25519 key `key` as in files of client authorization."""
    return "descriptor:x25519:" + b32encode(key + bytes(3))[:52].upper()


def read_auth(folder, ending, parse):
    """Return [(path, parse(words))] of the files of client authorization in `folder`; ConfigError.

    Bad ones are passed over, as tor does.
    """
    found = []
    try:
        if ending == ".auth":
            os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o700)
        names = sorted(os.listdir(folder))
    except OSError as e:
        raise ConfigError("the folder %s cannot be used: %s" % (folder, e))
    for name in names:
        path = folder + "/" + name
        try:
            if name[-len(ending) :] != ending or name == ending:
                raise ConfigError("its name does not end in " + ending)
            text = (read_file(path) or b"").decode("utf-8", "replace")
            words = [word.strip() for word in text.split(":")]
            if words[-3:-1] != ["descriptor", "x25519"]:
                raise ConfigError("it cannot be read, or is not …descriptor:x25519:<key>")
            found.append((path, parse(words[:-3], words[-1])))
        except TorError as e:
            log(WARN, "%s is passed over: %s", path, e)
    return found


def load_onion_keys(folder):
    """Return {public identity key: (the client's key, path)} of *.auth_private; ConfigError."""
    found = {}

    def parse(words, key):
        return parse_onion_address("".join(words)[:56] + ".onion"), auth_key(key)

    for path, (identity, key) in read_auth(folder, ".auth_private", parse):
        if identity in found:
            raise ConfigError("two files are for one address: %s, %s" % (found[identity][1], path))
        found[identity] = key, path
    return found


# === 15. Onion service ===
# Introduction points, publishing, introductions, streams (rend-spec-v3 2 to 4).

INTRO_POINTS = 3
# Introductions in a second; tasks, about one a circuit; streams on one; uploads at once.
_RATE, _MAX_TASKS, _MAX_STREAMS, _UPLOADS = (2, 11, 8, 1) if MICROPYTHON else (25, 1024, 512, 4)
# An introduction point lives for once or twice as many: this bounds memory, too.
_INTRODUCTIONS = 512 if MICROPYTHON else 16384
# Of a rendezvous cookie so many bytes are kept, to know it again.
_COOKIE = 4 if MICROPYTHON else 20
# Past the budget, a stream that holds memory ends after so long without a byte.
STILL_MS = 30000


def load_service_key(key_dir):
    """Return (expanded secret key, public key) of a HiddenServiceDir, made if it has none."""
    name, head = "hs_ed25519_secret_key", b"== ed25519v1-secret: type0 ==\0\0\0"
    path = key_dir + "/" + name
    try:
        private_dir(key_dir)
        if name not in os.listdir(key_dir):
            write_file(path, head + ed25519_expand(urandom(32)))
        data = read_file(path) or b""
        if len(data) != 96 or data[:32] != head:
            raise ConfigError("%s cannot be read, or is no key of version 3" % path)
        public = ed25519_public(data[32:])
        write_file(key_dir + "/hs_ed25519_public_key", head.replace(b"secret", b"public") + public)
        write_file(key_dir + "/hostname", onion_address(public).encode() + b"\n")
    except OSError as e:
        raise ConfigError("the folder %s cannot hold a key: %s" % (key_dir, e))
    return data[32:], public


def load_clients(key_dir):
    """Return the keys in the authorized_clients of a HiddenServiceDir; ConfigError."""

    def parse(words, key):
        if words:
            raise ConfigError("it is not descriptor:x25519:<key>")
        return auth_key(key)

    folder = key_dir + "/authorized_clients"
    found = [key for _, key in read_auth(folder, ".auth", parse)]
    if not found and [name for name in os.listdir(folder) if name[-5:] == ".auth"]:
        log(WARN, "%s has no good key: everybody is admitted, as by tor", folder)
    return found


class OnionService:
    """See create_onion_service.  `rate`: introductions in a second, eight times that in a burst."""

    # As HiddenService… in a torrc.
    intro_points = INTRO_POINTS
    max_streams, strict, export = _MAX_STREAMS, False, False

    def __init__(self, tor, key_dir, ports, clients=None):
        self.tor, self.key_dir, self.ports = tor, key_dir, {}
        for port, target in ports.items():
            if isinstance(target, int):
                target = "127.0.0.1", target
            unix = not MICROPYTHON and isinstance(target, str) and target[:5] == "unix:"
            if not (unix or callable(target) or isinstance(target, tuple) and len(target) == 2):
                raise ConfigError("%r is no target for an onion service" % (target,))
            self.ports[port] = target
        # Not in a folder: the keys themselves.
        given = not MICROPYTHON and isinstance(key_dir, tuple)
        self._esk, self.key = key_dir if given else load_service_key(key_dir)
        if MICROPYTHON and clients is None and "authorized_clients" in os.listdir(key_dir):
            # There is no code for these.
            raise ConfigError("%s/authorized_clients is for hosts: give `clients`" % key_dir)
        if not MICROPYTHON and clients is None and not given:
            clients = load_clients(key_dir) or None
        if clients is not None and not clients:
            raise ConfigError("nobody is among `clients`: without it, everybody is admitted")
        self.clients = [auth_key(key) for key in clients or ()]
        self.address, self.rate = onion_address(self.key), _RATE
        self.intros, self.circuits, self._tasks, self._launched = [], [], [], [0] * 10
        # `_tokens`: introductions that may be answered now; `_shown`: those published.
        self._tokens, self._shown, self._periods, self._published = 8 * _RATE, (), (), Promise()

    async def start(self):
        self._tasks.append(spawn(lasting(self._keep_intros, self._wanted)))
        self._tasks.append(spawn(lasting(self._keep_published, self._wanted)))
        await self._published.wait()

    def _wanted(self):
        return self in self.tor.services

    def admit(self, clients):
        """Publish for the clients with these keys alone; without any, for everybody."""
        if clients and not set(clients) >= set(self.clients or [None]):
            # Whom it admits no more knows these.
            for intro in self.intros:
                intro.until = 0
        self.clients = clients

    async def close(self):
        """Take the service down."""
        self.tor.services = [s for s in self.tor.services if s is not self]
        for task in self._tasks:
            task.cancel()
        for circuit in self.circuits + [i.circuit for i in self.intros if i.circuit]:
            circuit.close()
        self._published.set(error=OnionError("the service was closed"))

    def _over(self, intro):
        return now() > intro.until or intro.left <= 0

    def _tidy(self):
        self._tasks = [task for task in self._tasks if not task.done()]
        for circuit in self.circuits:
            if is_dirty(circuit) and not circuit.streams:
                circuit.close()
        self.circuits = [circuit for circuit in self.circuits if not circuit.closed]

    async def _keep_intros(self):
        updates, paths, directory = None, self.tor.paths, self.tor.directory
        while True:
            self._tidy()
            self._tokens = min(self._tokens + self.rate, 8 * self.rate)
            try:
                for intro in list(self.intros):
                    if updates != paths.updates and directory.table.find(intro.rsa_id) < 0:
                        intro.until = 0
                    self._keep_intro(intro)
                updates = paths.updates
                most = INTRO_POINTS if MICROPYTHON else self.intro_points
                while len([i for i in self.intros if not self._over(i)]) < most:
                    self.intros.append(self._new_intro())
            except (MemoryError, TorError) as e:
                log(WARN, "no introduction point for %s: %s", self.address, e)
                await asyncio.sleep(10)
            await asyncio.sleep(1)

    def _new_intro(self):
        table, intro = self.tor.directory.table, Record()
        used = [table.find(i.rsa_id) for i in self.intros]
        apart = lambda i: all([j < 0 or distinct(table, i, j) for j in used])
        relay = table.relay(self.tor.paths.pick("intro", apart, STABLE))
        # What a circuit and the descriptor need, no more.
        intro.rsa_id, intro.ntor_key, intro.specifiers = (
            relay.rsa_id, relay.ntor_key, relay.specifiers)
        if not MICROPYTHON:
            intro.address, intro.port = relay.address, relay.port
        intro.esk = ed25519_expand(urandom(32))
        intro.auth_key = ed25519_public(intro.esk)
        intro.b, intro.enc_key = x25519_keypair()
        intro.until = now() + 64800 + randbelow(21600)
        intro.left = _INTRODUCTIONS + randbelow(_INTRODUCTIONS)
        # `begun`: how many circuits were.  `cookies`: those used, their beginnings.
        intro.circuit, intro.busy, intro.begun, intro.cookies = None, False, 0, bytearray()
        return intro

    def _keep_intro(self, intro):
        # Begin a circuit, where there is none.
        circuit, over = intro.circuit, self._over(intro)
        # It stays until the descriptor names another.
        good = circuit and not circuit.closed and (intro in self._shown or not over)
        if good or intro.busy:
            return
        if circuit:
            intro.circuit = None
            circuit.close()
        # As tor: again three times, but not eleven circuits in five minutes.
        if over or intro.begun > 3:
            self.intros.remove(intro)
        elif not 0 <= now() - self._launched[0] < 300:
            self._launched, task = self._launched[1:] + [now()], spawn(self._establish(intro))
            intro.busy, intro.begun = True, intro.begun + 1
            self._tasks.append(task)

    async def _establish(self, intro):
        circuit, start = None, now()
        try:
            circuit = await self.tor.circuit_to(intro)
            circuit.on_control[INTRODUCE2] = lambda body: self._introduced(intro, body)
            body = establish_intro(intro, circuit.kh)
            await circuit.ask(ESTABLISH_INTRO, body, INTRO_ESTABLISHED, BUILD_SECONDS)
            intro.circuit, circuit = circuit, None
        except (MemoryError, TorError) as e:
            log(INFO, "introduction point lost: %s", e)
            if self.tor.paths.online < start:
                # Nobody answered: it was not this one, and costs the network nothing.
                self._launched, intro.begun = [0] + self._launched[:-1], intro.begun - 1
            elif not isinstance(e, SHORT):
                self.intros.remove(intro)
            await asyncio.sleep(5)
        finally:
            intro.busy = False
            if circuit:
                circuit.close()

    async def _keep_published(self):
        waited, updates, state = 0, None, None
        while True:
            await asyncio.sleep(1)
            most = INTRO_POINTS if MICROPYTHON else self.intro_points
            ready = sorted([i for i in self.intros if i.circuit], key=self._over)[:most]
            waited = waited + 1 if len(ready) < most else 0
            if not ready or 0 < waited < 30:
                continue
            try:
                if updates != self.tor.paths.updates:
                    self._periods = self._new_periods()
                    updates = self.tor.paths.updates
                if state != (set(ready), self.clients):
                    state = set(ready), self.clients
                    for period in self._periods:
                        period[4].update({rsa_id: OVERDUE for rsa_id in period[4]})
                for period in self._periods:
                    t, ring = now() - period[0], period[4]
                    if [due for due in ring.values() if due < t]:
                        async with self.tor.directory.turn:
                            await self._publish(ready, t, *period)
            except (MemoryError, OSError, TorError) as e:
                log(WARN, "no descriptor could be made: %s: %s", type(e).__name__, e)
                await asyncio.sleep(20)
                continue
            # Clients look for one of both.
            good = [[t for t in p[4].values() if t > now() + 20 - p[0]] for p in self._periods]
            if all(good):
                self._shown = state[0]
                self._published.set()
            else:
                log(WARN, "the descriptors of %s could not be published", self.address)
                await asyncio.sleep(20)

    def _new_periods(self):
        # Who has the descriptor of a period need not get it again.
        found = [descriptor_place(self.tor, self.key, n) for n in (0, 1)]
        for start, _, blinded, _, ring in found:
            for before in [p for p in self._periods if p[2] == blinded]:
                shift = before[0] - start
                ring.update({d: before[4][d] + shift for d in ring if d in before[4]})
        return found

    async def _publish(self, intros, t, start, param, blinded, subcred, ring):
        # `ring`: when directories want the descriptor, in seconds since `start`, as `t` is.
        tor = self.tor
        if MICROPYTHON:
            make_room(tor._channels.open.values())
        todo = [rsa_id for rsa_id in ring if ring[rsa_id] < t]
        ring.update({rsa_id: t + 20 for rsa_id in todo})

        async def upload(rsa_id):
            if not MICROPYTHON:
                announce("HS_DESC", self.key, "UPLOAD", rsa_id, blinded)
            try:
                await hsdir_request(tor, rsa_id, "/tor/hs/3/publish", file)
                ring[rsa_id] = t + 3600 + randbelow(3600)  # as tor
                if not MICROPYTHON:
                    announce("HS_DESC", self.key, "UPLOADED", rsa_id)
            except (MemoryError, TorError) as e:
                log(INFO, "a descriptor was not uploaded: %s", e)
                if not MICROPYTHON:
                    announce("HS_DESC", self.key, "FAILED", rsa_id, blinded, "UPLOAD_REJECTED")

        esk = ed25519_blind_secret(self._esk, param)
        revision, flow = revision_counter(esk, t), sendme_increment(tor.paths.param)
        with spool(MICROPYTHON and self.key_dir + "/descriptor") as file:
            known = revision, intros, start + t, flow, self.clients
            make_descriptor(file, esk, blinded, subcred, *known)
            for some in _pieces(todo, _UPLOADS):
                await asyncio.gather(*[upload(rsa_id) for rsa_id in some])

    def _introduced(self, intro, body):
        self._tidy()
        full = self._short() or len(self._tasks) + len(self.circuits) >= _MAX_TASKS
        idle = [c for c in self.circuits if full and not c.streams]
        if not self._tokens or intro.left < -_INTRODUCTIONS or full and not idle:
            return log(INFO, "an introduction is dropped: too many, or out of memory")
        if full:
            idle[0].close()
            self._tidy()
        self._tokens -= 1
        try:
            self._tasks.append(spawn(self._answer(intro, body)))
        except MemoryError:
            log(INFO, "an introduction is dropped: out of memory")

    def _short(self):
        # Whether memory is past its budget; then who does not move may have to go.
        return crowded() and (relieve(self.circuits, STILL_MS) or True)

    async def _answer(self, intro, body):
        # Meet the client of INTRODUCE2 (3.3, 4).
        circuit, param = None, self.tor.paths.param
        try:
            async with self.tor.directory.moment:
                subcreds = [period[3] for period in self._periods]
                target, cookie, answer, keys = hs_ntor_service(intro, subcreds, body)
                used = any([cookie[:_COOKIE] in i.cookies for i in self.intros])
                require(not used, "its rendezvous cookie was used before")
                intro.cookies += cookie[:_COOKIE]
                intro.left -= 1
                attempts = param("hs_service_max_rdv_failures", 2, 1, 10)
                circuit = await self.tor.circuit_to(target, attempts)
                circuit.send(RENDEZVOUS1, 0, answer)
                circuit.add_onion_hop(keys, True, congestion_control(param, target.flow))
                circuit.on_begin = self._begin
                self.circuits.append(circuit)
        except (MemoryError, TorError) as e:
            log(INFO, "an introduction came to nothing: %s", e)
            if circuit:
                circuit.close()

    async def _begin(self, stream, port):
        circuit, target = stream.circuit, self.ports.get(port)
        circuit.since = ticks_ms()
        if target is None:
            # No second guess.  DESTROY would overtake END.
            circuit.on_begin = lambda *_: asyncio.sleep(0)
            stream.send_end(END_DONE)
            await asyncio.sleep(0.2)
            return circuit.close()
        most = _MAX_STREAMS if MICROPYTHON else self.max_streams
        if self._short() or len(circuit.streams) > most:
            log(INFO, "a stream is refused: too many, or out of memory")
            if not MICROPYTHON and self.strict:
                return circuit.close()
            return stream.send_end(END_RESOURCELIMIT)
        if not MICROPYTHON and isinstance(target, list):
            target = target[randbelow(len(target))]
        try:
            if callable(target):
                stream.accept()
                await target(stream, stream)
                return stream.close()
            if isinstance(target, str):
                opening = asyncio.open_unix_connection(target[5:])
            else:
                opening = asyncio.open_connection(*target)
            reader, writer = await opening
        except Exception as e:
            short = isinstance(e, MemoryError)
            stream.send_end(END_RESOURCELIMIT if short else END_CONNECTREFUSED)
            severity = INFO if isinstance(e, (TorError, EOFError)) else WARN
            return log(severity, "what port %d leads to failed: %s: %s", port, type(e).__name__, e)
        if not MICROPYTHON and self.export:
            n = circuit.circ_id
            text = "PROXY TCP6 fc00:dead:beef:4dad::%x:%x ::1 %d %d\r\n"
            writer.write((text % (n >> 16, n & 65535, n & 65535, port)).encode())
        stream.accept()
        await pump(stream, reader, writer)


# === 16. Tor ===


SPARES = 0 if MICROPYTHON else 2


def folders(data_dir, network):
    """Folder for state and network's file, or the defaults."""
    if network is None and hasattr(os, "getenv"):
        network = os.getenv("MINITOR_NETWORK")
    if not data_dir:
        data_dir = "minitor"
        if network:
            data_dir = network + ".minitor"
        elif not MICROPYTHON:
            data_dir = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
            data_dir += "/minitor"
    return data_dir, network


def check_target(host, port):
    named = 0 < len(host) < 256 and not host.lower().strip(_BASE32 + "0189-_.:")
    if not named or not isinstance(port, int) or not 0 < port < 65536:
        raise AddressError("no name in ASCII, no address, or not 1 to 65535: %r:%r" % (host, port))


def is_onion(host):
    return host.lower().rstrip(".").endswith(".onion")


def packed_address(text):
    """The bytes of an IP address, or None."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, text)
        except (OSError, ValueError):
            pass
    return None


class AsyncTor:
    """Tor for asyncio.  `data_dir`: a folder for state; `network`: a torrc file of another
    Tor network (default $MINITOR_NETWORK); `progress`: function(percent, tag, summary), which
    the tag "clock_skew" tells of each ClockError, also later.
    `budget`: on a board, how many bytes of heap may be in use for a stream or circuit to begin.
    `bridges`: on a host, the Bridges by which alone to enter the network.
    """

    selector = PathSelector

    def __init__(self, data_dir=None, network=None, progress=None, budget=0, bridges=None):
        _admission[0] = budget or _admission[0]
        self.data_dir, network = folders(data_dir, network)
        network, self._channels = load_network(network), Channels()
        self.directory = Directory(network, self.data_dir, self._channels, progress)
        # `_shared`: {(isolation, key of an onion service, or port): Promise of a circuit}.
        self.services, self.descriptors, self._shared = [], {}, {}
        # {identity key of an onion service: the client's X25519 key}.
        self.onion_keys = {}
        self._spares, self._tasks = [], []
        if not MICROPYTHON:
            # `wanted`: {port: when it was last asked for}; `_exits`: circuits for those, unused.
            self.ready, self.proxies, self.wanted, self._exits = False, [], {}, None
            # `pause`: before another circuit is built ahead where one failed, in seconds.
            self.dirty_ms, self._opening, self.pause = DIRTY_MS, 0, 30
            # {identity key: descriptor, and what it takes to read it but for that key}.
            self._sealed = {}
            self.build_times = BuildTimes(self.data_dir + "/build_times.json")
            self.bridges = bridges
            if bridges:
                bridges.attach(self)

    async def start(self):
        """Be ready for use; CircuitError, ClockError, ConfigError, DirectoryError."""
        try:
            private_dir(self.data_dir)
        except OSError as e:
            raise ConfigError("the folder %s cannot be used: %s" % (self.data_dir, e))
        try:
            await self._bootstrap()
        except BaseException:
            await self.aclose()
            raise
        if not MICROPYTHON:
            self.ready = True
        return self

    async def _bootstrap(self):
        directory, select = self.directory, PathSelector
        if not MICROPYTHON and self.bridges:
            await self.bridges.start()
        await directory.bootstrap()
        if MICROPYTHON:
            # What is dear there: a link to the guard alone stays.
            self._channels.close()
        file = self.data_dir + "/guards.json"
        if not MICROPYTHON:
            select = self.bridges.select if self.bridges else self.selector
        self.paths = directory.paths = select(directory.table, directory.consensus, file)
        directory._report(95, "circuit_create", "Establishing a Tor circuit")
        self._spares = [await self.circuit_to()]
        self._tasks.append(spawn(lasting(directory.refresh, self._wanted)))
        if SPARES:
            self._tasks.append(spawn(lasting(self._keep_spares, self._wanted)))
        directory._report(100, "done", "Done")

    def _wanted(self):
        return self._tasks

    async def aclose(self):
        """Take the services down, close all circuits and links."""
        if not MICROPYTHON:
            for proxy in list(self.proxies or ()):
                proxy.close()
        for service in list(self.services):
            await service.close()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        if not MICROPYTHON:
            self._exits = None
        self._channels.close()
        await asyncio.sleep(0.05)  # what is queued goes out, as DESTROY
        if not MICROPYTHON and self.bridges:
            await self.bridges.close()

    __aenter__, __aexit__ = start, lambda self, *_: self.aclose()

    async def circuit_to(self, target=None, attempts=None, choose=None):
        # Three hops and `target`, or the path `choose()`; CircuitError.
        if target and target.private and not self.directory.network.testing:
            raise CircuitError("a relay with a private address: " + target.address)
        attempts = attempts or (3 if target else 6)  # a target may be down for good
        if not MICROPYTHON and attempts > 1:
            return await self._soon(target, attempts, choose)
        for _ in range(attempts):
            circuit, path = (None, choose()) if choose else self._begun(target)
            if not MICROPYTHON:
                times = self.build_times if not circuit else None
            try:
                if not circuit:
                    hop = path[0]
                    channel = await self._channels.get(hop.address, hop.port, hop.rsa_id, hop.ed_id)
                    circuit = Circuit(channel, self.paths.param("circwindow", 1000, 100, 1000))
                circuit.since = ticks_ms()
                for hop in path[len(circuit.path) :]:
                    await circuit.extend(hop, BUILD_SECONDS)
                    if len(circuit.path) == 1 and not self.paths.succeeded(hop.rsa_id):
                        path = path[:1]
                        raise CircuitError("better guards may be up again")
                    if not MICROPYTHON and times and len(circuit.path) == 3:
                        times.add(ticks_ms() - circuit.since, self.paths.param)
                        times = None
                if not MICROPYTHON:
                    announce("BUILT", circuit)
                    hops = ["%s:%d" % (hop.address, hop.port) for hop in path]
                    log(INFO, "%s is built: %s", circuit, ", ".join(hops))
                if MICROPYTHON and target:
                    circuit.path = [target]
                return circuit
            except BaseException as e:
                n = 0
                if circuit:
                    n = len(circuit.path)
                    circuit.close()
                error, kind = e, CircuitError
                if isinstance(e, SHORT):
                    kind = MemoryShort
                    await asyncio.sleep(1)
                elif not isinstance(e, (ChannelError, CircuitError)):
                    raise
                elif n < len(path):
                    self.paths.failed(path[n].rsa_id, n)
                if not MICROPYTHON and times and n:
                    times.add(ticks_ms() - circuit.since, self.paths.param, False)
        raise kind("no circuit could be built: %s" % error)

    async def _soon(self, target, attempts, choose):
        # As circuit_to; when one is late, another is begun beside it.  Late ones are built all
        # the same, as tor's: or only the quick would be known.
        tasks, won = set(), False
        seconds = self.build_times.ms(self.paths.param, 4 if target else 3) / 1000
        try:
            while True:
                if attempts:
                    attempts -= 1
                    tasks.add(asyncio.ensure_future(self.circuit_to(target, 1, choose)))
                limit = seconds if attempts else None
                done, _ = await asyncio.wait(tasks, timeout=limit, return_when="FIRST_COMPLETED")
                seconds *= 1 if done else 2
                for task in done:
                    tasks.remove(task)
                    error = task.exception()
                    won = not error
                    if won:
                        return task.result()
                    if not (attempts or tasks) or not isinstance(error, CircuitError):
                        raise error
        finally:
            for task in tasks:
                _tasks.add(task)
                task.add_done_callback(lambda task: self._late(task, not (target or choose)))
                if not won:
                    task.cancel()

    def _late(self, task, spare):
        # What `_soon` began is built, and not needed any more.
        _tasks.discard(task)
        if not task.cancelled() and not task.exception():
            if spare and self._tasks and len(self._spares) < SPARES:
                self._spares.append(task.result())
            else:
                task.result().close()

    def _begun(self, target):
        # A spare circuit or None, and the path to `target`.
        while self._spares:
            circuit = self._spares.pop(0)
            # Not for A-B-A; but the guard may be the target, as in tor.
            again = target and target.rsa_id in [r.rsa_id for r in circuit.path[1:]]
            if not again and not is_dirty(circuit):
                return circuit, circuit.path + ([target] if target else [])
            circuit.close()
        return None, self.paths.onion_path(target)

    async def _keep_spares(self):
        while True:
            try:
                while len(self._spares) < SPARES:
                    self._spares.append(await self.circuit_to(choose=self.paths.onion_path))
            except (MemoryError, TorError):
                await asyncio.sleep(self.pause)
            await asyncio.sleep(1)

    def _allows(self, circuit, port):
        i = self.directory.table.find(circuit.path[-1].rsa_id)
        return i >= 0 and self.directory.table.exit_allows(i, port)

    def _attach(self, proxy):
        # A Proxy: from the first one on, circuits are built ahead.
        self.proxies.append(proxy)
        self.wanted = self.wanted or {443: ticks_ms(), 80: ticks_ms()}
        if self._exits is None:
            self._exits = []
            self._tasks.append(spawn(lasting(self._keep_exits, self._wanted)))

    async def _keep_exits(self):
        # Circuits for the ports that proxies asked for in the last hour (path-spec 2.1.1).
        def clean(port=0):
            return [c for c in self._exits if not c.closed and (not port or self._allows(c, port))]

        tick = 0
        while True:
            await asyncio.sleep(1)
            if not self.ready:
                continue
            tick, t, param = tick + 1, ticks_ms(), self.paths.param
            ports = sorted([(used, port) for port, used in self.wanted.items()])[-8:]
            self.wanted = {port: used for used, port in ports if t - used < 3600000}
            learn = tick % param("cbttestfreq", 10, 1) == 0 and self.build_times.learning(param)
            for circuit in self._exits:
                if t - circuit.since > 1800000 or learn and len(clean()) >= 10:
                    circuit.close()
            self._exits = clean()
            due = [port for port in self.wanted if learn or len(clean(port)) < 2]
            if due and len(self._exits) < 10:
                try:
                    choose = lambda: self.paths.exit_path(due[0])
                    self._exits.append(await self.circuit_to(choose=choose))
                except TorError as e:
                    log(INFO, "no circuit could be built ahead: %s", e)
                    self.wanted.pop(due[0], None)
                    await asyncio.sleep(self.pause)

    async def _exit(self, port):
        # A circuit that nobody used, to an exit for `port`.
        if not MICROPYTHON and self.proxies:
            self.wanted[port] = ticks_ms()
            for circuit in self._exits:
                if not circuit.closed and self._allows(circuit, port):
                    self._exits.remove(circuit)
                    circuit.since = ticks_ms()
                    return circuit
        return await self.circuit_to(choose=lambda: self.paths.exit_path(port))

    async def _in_turn(self, opening):
        # So many at once, as tor's MaxClientCircuitsPending.
        while self._opening >= 32:
            await asyncio.sleep(0.05)
        self._opening += 1
        try:
            return await opening
        finally:
            self._opening -= 1

    async def _circuit(self, key, port, isolation=None):
        # A shared one: to the onion service `key`, or an exit for `port`.
        async def keep():
            try:
                opening = meet(self, key) if key else self._exit(port)
                promise.set(await (opening if MICROPYTHON else self._in_turn(opening)))
                if not MICROPYTHON:
                    promise.value.dirty_ms = self.dirty_ms
                await close_idle(promise.value)
            except (MemoryError, TorError) as e:
                promise.set(error=e if isinstance(e, TorError) else NO_MEMORY)
            finally:
                # Or who waits would wait for ever; the log has what it was.
                if not promise.done():
                    promise.set(error=CircuitError("a bug, or cancelled", 2))

        name = isolation, key or port
        for other, promise in list(self._shared.items()):
            circuit = promise.value
            if is_dirty(circuit) if circuit else promise.done():
                del self._shared[other]
            elif other == name:
                break
            elif circuit and not key and other[0] == isolation and isinstance(other[1], int):
                if self._allows(circuit, port):
                    break
        else:
            promise = self._shared[name] = Promise()
            spawn(keep())
        circuit = await promise.wait()
        if key:
            circuit.since = ticks_ms()  # as in tor: a new one would be dear
        return circuit

    def newnym(self):
        """Open new streams on new circuits; forget descriptors (control-spec, NEWNYM)."""
        for promise in self._shared.values():
            if promise.value:
                promise.value.since -= OUTDATED
        self._shared, self.descriptors = {}, {}
        if not MICROPYTHON:
            self._sealed = {}

    def keep_sealed(self, key, what):
        if len(self._sealed) > 7:
            self._sealed.clear()
        self._sealed[key] = what

    def add_onion_key(self, address, secret):
        """Use the X25519 key `secret` for an onion service that admits some clients alone.

        32 bytes, or text as in an .auth_private file; None: use none any more.  Returns whether it
        reads a descriptor that could not be read before.  AddressError, ConfigError.
        """
        key = parse_onion_address(address)
        if secret is None:
            self.onion_keys.pop(key, None)
            self.descriptors.pop(key, None)
            return False
        self.onion_keys[key] = secret = auth_key(secret)
        sealed = not MICROPYTHON and self._sealed.pop(key, None)
        try:
            if sealed:
                text, blinded, subcred = sealed
                self.descriptors[key] = parse_descriptor(text, blinded, subcred, now(), secret)
        except TorError:
            return False
        return bool(sealed)

    async def open_connection(self, host, port, timeout=120, isolation=None, flags=1, early=b""):
        """Connect to a name, IP or onion address; return (reader, writer), as asyncio.

        `isolation`: anything hashable; streams of different ones never share a circuit.
        `flags`: of BEGIN (tor-spec 6.2).  `early`: bytes to send along, before it is known
        whether there is a connection; how many of them went, `reader.early` tells.
        AddressError, CircuitError, OnionError, StreamError, TorTimeout.
        """
        check_target(host, port)
        key = parse_onion_address(host) if is_onion(host) else None
        body = begin("" if key else host, port, flags)
        opening = self._on_circuit(key, port, BEGIN, body, isolation, early)
        try:
            stream = await wait_for(opening, timeout)
        except asyncio.TimeoutError:
            raise TorTimeout("connecting to %s took longer than %s s" % (host, timeout))
        except StreamError as e:
            raise StreamError("%s:%d: %s" % (host, port, e), e.reason)
        return stream, stream

    async def resolve(self, host, isolation=None):
        """Return the IP addresses (text) of `host` as an exit sees them; StreamError."""
        check_target(host, 443)
        if is_onion(host):
            raise AddressError(host + " has no IP address")
        addresses = parse_resolved(await self._resolved(host, isolation))
        if not addresses:
            raise StreamError("the exit finds no address of " + host, 2)
        return addresses

    async def resolve_ptr(self, address, isolation=None):
        """Return the names of an IP address (text) as an exit sees them; StreamError."""
        packed = packed_address(address)
        if not packed:
            raise AddressError("no IP address: %r" % address)
        parts, zone = map(str, packed), "in-addr"
        if len(packed) == 16:
            parts, zone = packed.hex(), "ip6"
        host = ".".join(list(parts)[::-1] + [zone, "arpa"])
        names = parse_resolved(await self._resolved(host, isolation), True)
        if not names:
            raise StreamError("the exit finds no name of " + address, 2)
        return names

    async def _resolved(self, host, isolation):
        stream = await self._on_circuit(None, 443, RESOLVE, host.encode() + b"\0", isolation)
        stream.circuit.streams.pop(stream.stream_id, None)
        return stream.opened.value

    async def _on_circuit(self, key, port, command, body, isolation=None, early=b""):
        # A stream; from another circuit, as tor, after these END reasons (6.3).
        again = (END_TIMEOUT,) if key else (1, 2, 4, 5, 7, 8, 9, 11)
        if crowded():
            raise StreamError("not opened: out of memory", END_RESOURCELIMIT)
        for last in (False, key, True):
            circuit = await self._circuit(key, port, isolation)
            more = [bytes(early)] if early else []
            try:
                return await circuit.open_stream(command, body, 30, *more)
            except (CircuitError, StreamError) as e:
                if not circuit.closed and e.reason not in again:
                    raise
                circuit.since -= OUTDATED
                circuit.refusal = e.reason
                if last:
                    raise

    async def create_onion_service(self, port, target=None, key_dir=None, clients=None):
        """Host an onion service; return it, with `address` and `close`, once it is reachable.

        `target` of `port`: a local port (default: the same), (host, port), "unix:/path", or a
        coroutine function(reader, writer); for several ports, `port` is {port: target}.
        `key_dir`: as tor's HiddenServiceDir (default: onion_service in `data_dir`).
        `clients`: X25519 keys (32 bytes, or text as in an .auth file) of those who are admitted
        (default: as the files in `key_dir`/authorized_clients say; without any, everybody).
        """
        ports = port if isinstance(port, dict) else {port: target or port}
        for number in ports:
            check_target("port", number)
        key_dir = key_dir or self.data_dir + "/onion_service"
        if key_dir in [service.key_dir for service in self.services]:
            raise ConfigError("a service has the key in %s already: give a key_dir" % key_dir)
        service = OnionService(self, key_dir, ports, clients)
        self.services.append(service)
        try:
            await service.start()
        except BaseException:
            await service.close()
            raise
        return service


def _http_opener(tor, context):
    # urllib with http and https alone, no proxy, all connections from `tor`.
    import http.client as http  # slow
    import urllib.request as web

    class Plain(http.HTTPConnection):
        def connect(self):
            self.sock = tor.create_connection((self.host, self.port), self.timeout)

    class Tls(http.HTTPSConnection, Plain):
        pass  # HTTPSConnection wraps what Plain connects

    errors = web.HTTPErrorProcessor, web.HTTPDefaultErrorHandler, web.UnknownHandler

    class Handler(web.HTTPHandler, web.HTTPSHandler, web.HTTPRedirectHandler, *errors):
        http_open = lambda self, request: self.do_open(Plain, request)
        https_open = lambda self, request: self.do_open(Tls, request, context=context)

        def redirect_request(self, request, response, *where):
            response.close()  # urllib would read it all
            new = super().redirect_request(request, response, *where)
            if (new.type, new.host) != (request.type, request.host):
                new.headers = {}  # cookies and passwords were for the first server
            return new

    opener = web.OpenerDirector()
    opener.addheaders = [("User-Agent", "Mozilla/5.0")]
    opener.add_handler(Handler())
    return opener


def http_call(url, function, *arguments):
    try:
        return function(*arguments)
    except TorError:
        raise
    except Exception as e:
        late = isinstance(getattr(e, "reason", e), socket.timeout)
        raise (TorTimeout if late else StreamError)("%s: %s" % (url, e))


class LoopThread:
    """A thread with an event loop; `service` has coroutine functions `start` and `aclose`."""

    def __init__(self, service):
        self._service, self._loop = service, asyncio.new_event_loop()
        self._stop, run = self._loop.create_future(), self._loop.run_until_complete
        live = lambda: run(self._main()) or self._loop.close()
        self._thread = threading.Thread(target=live, daemon=True)
        self._thread.start()
        try:
            self.run(service.start())
        except BaseException:
            self.close()
            raise

    async def _main(self):
        await asyncio.wait([self._stop])
        await self._service.aclose()
        # Repeated: `wait_for` before Python 3.12 may lose a cancellation.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=0.1)

    def run(self, coroutine):
        """Run `coroutine` in this event loop; return its result."""
        if self._stop.done() or threading.current_thread() is self._thread:
            coroutine.close()
            raise ConfigError("this is closed, or would have to wait for itself")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except futures.CancelledError:
            raise TorError("this was closed meanwhile")
        finally:
            future.cancel()  # after Ctrl-C

    __enter__ = lambda self: self

    def close(self, *_):
        """Take the services down, close everything, end the thread."""
        if not self._stop.done():
            self._loop.call_soon_threadsafe(self._stop.cancel)
        self._thread.join()

    __exit__ = close


class Tor(LoopThread):
    """AsyncTor for programs without asyncio; ready when constructed, any thread may call."""

    def __init__(self, data_dir=None, network=None, progress=None, bridges=None):
        self._tor = AsyncTor(data_dir, network, progress, 0, bridges)
        LoopThread.__init__(self, self._tor)

    def resolve(self, host, isolation=None):
        return self.run(self._tor.resolve(host, isolation))

    def resolve_ptr(self, address, isolation=None):
        return self.run(self._tor.resolve_ptr(address, isolation))

    def newnym(self):
        self._loop.call_soon_threadsafe(self._tor.newnym)

    def add_onion_key(self, address, secret):
        return self._tor.add_onion_key(address, secret)

    def create_onion_service(self, port, target=None, key_dir=None, clients=None):
        """As AsyncTor.create_onion_service; `close` waits, too."""
        service = self.run(self._tor.create_onion_service(port, target, key_dir, clients))
        return SimpleNamespace(address=service.address, close=lambda: self.run(service.close()))

    def create_connection(self, address, timeout=None, isolation=None):
        """Connect to (host, port): a socket.socket, `timeout` its timeout in seconds."""

        async def connect():
            stream, _ = await self._tor.open_connection(*address, timeout, isolation)
            end, ours = socket.socketpair()
            spawn(pump(stream, *await asyncio.open_connection(sock=ours)))
            end.settimeout(timeout)
            return end

        return self.run(connect())

    def urlopen(self, url, data=None, timeout=120, context=None):
        """As urllib.request.urlopen, with TorErrors; `timeout`: of each wait, in seconds."""
        if isinstance(url, str) and "://" not in url:
            url = "http://" + url
        opener = _http_opener(self, context)
        return http_call(getattr(url, "full_url", url), opener.open, url, data, timeout)

    def http_get(self, url):
        """Return a page of less than 64 MiB, as text; TorError, also for statuses above 399."""
        with self.urlopen(url) as response:
            data = http_call(url, response.read, 1 << 26)
        if response.length or len(data) == 1 << 26:
            raise StreamError("%s ends early, or is too large" % url)
        return http_call(url, data.decode, response.headers.get_content_charset("utf-8"), "replace")


# === 17. Front doors ===
# What programs connect to: SOCKS 4, 4a and 5 (RFC 1928, RFC 1929, socks-extensions, proposals 304
# and 351), HTTP CONNECT (http-connect-spec, proposal 365).

SOCKS_CONNECT, SOCKS_RESOLVE, SOCKS_RESOLVE_PTR = 1, 0xF0, 0xF1
# By END's reason: its name, HTTP's status, SOCKS's reply.
_ENDS = [end.split() for end in (
    "NONE 500 1|MISC 500 1|RESOLVEFAILED 503 4|CONNECTREFUSED 403 5|EXITPOLICY 503 2|DESTROY 502 1|"
    "DONE 502 5|TIMEOUT 504 6|NOROUTE 503 4|HIBERNATING 502 1|INTERNAL 502 1|RESOURCELIMIT 502 1|"
    "CONNRESET 503 5|TORPROTOCOL 502 1|NOTDIRECTORY 500 1"
).split("|")]


def socks_reply(version, code, address=""):
    """A SOCKS reply; `code`: as of version 5; `address`: an IP address or a name (text)."""
    packed = packed_address(address or "0.0.0.0")
    if version == 4:
        if code or not packed or len(packed) > 4:
            return b"\0\x5b" + bytes(6)
        return b"\0\x5a\0\0" + packed
    kind = b"\3" + bytes([len(address)]) + address.encode()
    if packed:
        kind = (b"\1" if len(packed) == 4 else b"\4") + packed
    return bytes([5, code, 0]) + kind + b"\0\0"


def parse_socks(data, no_auth=False):
    """Parse all that a SOCKS client has sent yet; `no_auth`: rather without a user name.

    Returns what is due to it in answer so far, and: None, if more must come; or the request
    (`version`, `command`, `host`, `port`, `auth`: None or (user, password), `literal`: whether it
    had an address and no name, `used`: its bytes); or a text that says what is wrong with it.
    """
    answer, r = [], Reader(data)
    try:
        version = r.uint(1)
        if version in (4, 5):
            request = _parse_socks4(r) if version == 4 else _parse_socks5(r, answer, no_auth)
        else:
            request = "the first byte is %d: not SOCKS" % version
            if version in b"CDGHOPT":
                answer.append(_NO_HTTP)
    except ProtocolError:
        # More must come.
        request = None
    if isinstance(request, str) and version == 4:
        answer.append(socks_reply(4, 1))
    return b"".join(answer), request


def _request(r, version, command, host, port, auth, literal):
    # ASCII, as check_target will say.
    host = host if literal else host.decode("utf-8", "replace").strip("[]")
    return SimpleNamespace(version=version, command=command, host=host, port=port,
                           auth=auth, literal=literal, used=r.at)


def _parse_socks4(r):
    command, port, address = r.uint(1), r.uint(2), r.take(4)

    def text():
        size = bytes(r.data[r.at : r.at + 257]).find(b"\0")
        if size < 0 and r.left() > 256:
            return None
        return r.take(size + 1 or r.left() + 1)[:-1]

    named = address[:3] == b"\0\0\0" and address[3]
    user = text()
    host = text() if named and user is not None else ".".join(map(str, address))
    if user is None or host is None:
        return "a text is too long"
    if command not in (SOCKS_CONNECT, SOCKS_RESOLVE) or address == bytes(4):
        return "command %d, or no address" % command
    return _request(r, 4, command, host, port, (user, b"") if user else None, not named)


def _parse_socks5(r, answer, no_auth):
    methods, auth = r.take(r.uint(1)), None
    if b"\2" in methods and not (no_auth and b"\0" in methods):
        answer.append(b"\5\2")
    elif b"\0" not in methods:
        answer.append(b"\5\xff")
        return "neither 'no authentication' nor user name and password are offered"
    else:
        answer.append(b"\5\0")
    version = r.uint(1)
    # Some send a user name unasked.
    if version == 1 or answer[0] == b"\5\2":
        user, password = r.take(r.uint(1)), r.take(r.uint(1))
        good = version == 1 and (user[:8] != b"<torS0X>" or user[8:] == b"0")
        answer.append(b"\1\0" if good else b"\1\1")
        if not good:
            return "a user name of an unknown format (<torS0X>)"
        auth, version = (user, password) if user or password else None, r.uint(1)
    command, kind = r.take(3)[::2]
    host, error = b"", 0
    if kind == 1:
        host = ".".join(map(str, r.take(4)))
    elif kind == 4:
        host = socket.inet_ntop(socket.AF_INET6, r.take(16))
    elif kind == 3:
        host = r.take(r.uint(1))
    else:
        error = 8
    port = 0 if error else r.uint(2)
    if version != 5 or command not in (SOCKS_CONNECT, SOCKS_RESOLVE, SOCKS_RESOLVE_PTR):
        error = 7 if version == 5 else 1
    if not error:
        request = _request(r, 5, command, host, port, auth, kind != 3)
        if command != SOCKS_RESOLVE_PTR or packed_address(request.host):
            return request
        error = 8
    answer.append(socks_reply(5, error))
    return "version %d, command %d or address type %d is not supported" % (version, command, kind)


_HTML, _PAGE = "Content-Type: text/html", b"<!doctype html><title>minitor</title><h1>%s</h1>\n"
_ALLOW, _ONLY = "Allow: OPTIONS, CONNECT", _PAGE % b"This port takes CONNECT and nothing else"


def _http(status, text, *fields, body=b""):
    # Via goes with what a server said, or would have.
    who = "Server: tor/1.0" if body or _ALLOW in fields else "Via: tor/1.0 tor-network"
    fields += "Tor-Capabilities: ", "%s (minitor %s)" % (who, __version__), "", ""
    return ("HTTP/1.0 %d " % status + "\r\n".join((text,) + fields)).encode() + body


_NO_HTTP = _http(501, "SOCKS only", _HTML, body=_PAGE % b"This is a SOCKS proxy, no HTTP proxy")


def parse_http(data, no_auth=False):
    """As parse_socks, of an HTTP CONNECT request."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if len(head) > 8192:
        return b"", "a request of more than 8192 bytes"
    if not end:
        return b"", None
    lines = head.split(b"\r\n")
    words, fields = lines[0].split(b" "), {}
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    if len(words) != 3 or words[2][:5] != b"HTTP/":
        return b"", "no HTTP request"
    method = words[0].upper()
    if method != b"CONNECT":
        # A page of a foreign site, by a false name for this machine, learns nothing.
        host = fields.get(b"host", b"").decode("utf-8", "replace")
        if not is_loopback(host if packed_address(host) else host.rpartition(":")[0] or host):
            return b"", "no CONNECT"
        if method == b"OPTIONS":
            return _http(200, "OK", _ALLOW), "OPTIONS"
        return _http(405, "Method Not Allowed", _ALLOW, _HTML, body=_ONLY), "no CONNECT"
    if b"tor-rpc-target" in fields:
        return _http(501, "No RPC here"), "RPC is not supported"
    host, _, port = words[1].rpartition(b":")
    if not port.isdigit() or len(port) > 5:
        return _http(400, "Bad Request"), "no host and port"
    names = b"proxy-authorization", b"tor-stream-isolation", b"x-tor-stream-isolation"
    auth = tuple([fields.get(name) for name in names])
    r = Reader(data)
    r.at = len(head) + 4
    auth = auth if any(auth) else None
    return b"", _request(r, "HTTP", SOCKS_CONNECT, host, int(port), auth, False)


def proxy_error(request, error, extended):
    """The reply that tells a client of an error; `extended`: SOCKS's of proposal 304."""
    reason = error.reason if isinstance(error, StreamError) and error.reason < len(_ENDS) else 0
    name, status, code = _ENDS[reason]
    code = int(code)
    if isinstance(error, OnionError):
        status, code = 503, error.reason if extended and error.reason else 4
    elif isinstance(error, AddressError):
        onion = is_onion(request.host) and request.command == SOCKS_CONNECT
        status, code = 400, 0xF6 if extended and onion else 1
    elif isinstance(error, TorTimeout):
        status, code = 504, 6
    if request.version != "HTTP":
        return socks_reply(request.version, code)
    kind = "minitor/" + type(error).__name__ + (" end/" + name) * (reason > 0)
    text = END_REASONS[reason] if reason else type(error).__name__
    return _http(int(status), text, "Tor-Request-Failed: " + kind)


def is_loopback(host):
    packed = packed_address(host.strip("[]")) or b""
    return host.lower() == "localhost" or packed[:1] == b"\x7f" or packed == bytes(15) + b"\1"


_ISOLATE = (
    "isolateclientaddr isolatesocksauth isolateclientprotocol isolatedestport isolatedestaddr"
).split()
_FLAGS_ON = _ISOLATE[:2] + "ipv4traffic ipv6traffic dnsrequest oniontraffic".split()
_FLAGS = _FLAGS_ON + _ISOLATE[2:] + (
    "preferipv6 keepaliveisolatesocksauth extendederrors prefersocksnoauth groupwritable"
    " worldwritable"
).split()
# No names are remembered here, nor mapped.
_FLAGS_IDLE = (
    "cacheipv4dns cacheipv6dns cachedns useipv4cache useipv6cache usednscache preferipv6automap"
    " relaxdirmodecheck"
).split()


def parse_listener(where, flags=()):
    """`host`, `port` (0: any), `path`, `group` and `on` (flags) of what follows SocksPort in a
    torrc: [ADDRESS:]PORT or unix:PATH, and flags (a text, or words); ConfigError."""
    found = SimpleNamespace(host="", port=0, path=None, group=None, on=set(_FLAGS_ON))
    where = str(where)
    if where[:5] == "unix:":
        found.path = where[5:]
        found.on.discard("isolateclientaddr")
    else:
        host, _, port = where.rpartition(":")
        host = "127.0.0.1" if host.lower() in ("", "localhost") else host.strip("[]")
        number = 0 if port.lower() == "auto" else int(port) if port.isdecimal() else 65536
        if not packed_address(host) or number > 65535:
            raise ConfigError("%s: a port, ADDRESS:PORT or unix:PATH is needed" % where)
        found.host, found.port = host, number
    for word in flags.split() if isinstance(flags, str) else flags:
        name = word.lower()
        wanted = name[:2] != "no"
        name = name if wanted else name[2:]
        name = name.rstrip("s") if name[:7] == "isolate" else name
        if name[:13] == "sessiongroup=" and name[13:].isdecimal():
            found.group = int(name[13:])
        elif name == "oniontrafficonly" and wanted:
            found.on -= {"ipv4traffic", "ipv6traffic", "dnsrequest"}
        elif name in _FLAGS:
            (found.on.add if wanted else found.on.discard)(name)
        elif name not in _FLAGS_IDLE:
            raise ConfigError("%s is no flag of a port (see SocksPort in tor's manual)" % word)
    if "isolatesocksauth" not in found.on:
        if "keepaliveisolatesocksauth" in found.on:
            raise ConfigError("KeepAliveIsolateSOCKSAuth needs IsolateSOCKSAuth")
        found.on.add("prefersocksnoauth")
    if not found.path and found.on & {"groupwritable", "worldwritable"}:
        raise ConfigError("GroupWritable and WorldWritable are for unix:PATH")
    return found


def _bind(to):
    # A socket, and where it listens; OSError.
    if to.path:
        with socket.socket(socket.AF_UNIX) as trial:
            # What a process left that is gone?
            if os.path.exists(to.path) and not os.path.isfile(to.path):
                if trial.connect_ex(to.path):
                    os.unlink(to.path)
        bound, modes = socket.socket(socket.AF_UNIX), (0o177, 0o117, 0o111, 0o111)
        group, world = [flag in to.on for flag in ("groupwritable", "worldwritable")]
        before = os.umask(modes[group + 2 * world])
        try:
            bound.bind(to.path)
        finally:
            os.umask(before)
        return bound, "unix:" + to.path
    bound = socket.socket(socket.AF_INET6 if ":" in to.host else socket.AF_INET)
    if os.name == "posix":
        # A port that was in use a moment ago; elsewhere this lets others take ours.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((to.host, to.port))
    host = "[%s]" % to.host if ":" in to.host else to.host
    return bound, "%s:%d" % (host, bound.getsockname()[1])


# So long a client may take for its request, and Tor to open a stream.
PROXY_SECONDS = 120
_EARLY = 1 << 16
_ADDRESS = (
    "a program asks by SOCKS%d for an IP address, not for a name. If it looks names up itself, "
    "that tells others where it goes: let it use SOCKS4a, or SOCKS5 with remote host names"
)
_WARNINGS = {
    4: _ADDRESS % 4,
    5: _ADDRESS % 5,
    "authorization": "Proxy-Authorization of the old form: its user should be tor (proposal 365)",
    "no CONNECT": "a program sends HTTP requests: CONNECT alone will do (curl: --proxytunnel)",
}


class Isolation(tuple):
    """What streams have in common that may share a circuit; `source`: their client's address."""

    source = ""


class Proxy:
    """A port for programs: `kind` "socks" (4, 4a, 5) or "http" (HTTP CONNECT).

    `where`: [ADDRESS:]PORT (ADDRESS: 127.0.0.1; PORT 0: any) or unix:PATH; `flags`: words, or a
    text, as after SocksPort in tor's manual (IsolateDestAddr, SessionGroup=1, ExtendedErrors, …).
    It listens from here on, and serves once it was started.  `address`: where.  ConfigError.
    """

    def __init__(self, kind, where, flags=()):
        self.kind, self._to = kind, parse_listener(where, flags)
        self._parse = {"socks": parse_socks, "http": parse_http}[kind]
        self._tor = self._server = None
        self._tasks, self._warned = set(), set()
        try:
            self._socket, self.address = _bind(self._to)
            self._socket.listen(1024)
        except OSError as e:
            raise ConfigError("cannot listen at %s: %s" % (where, e))
        if not self._to.path and not is_loopback(self._to.host):
            log(WARN, "%s: whoever reaches this machine can use this %s port, which knows no "
                "password. Are you sure?", self.address, self.kind)

    async def start(self, tor):
        """Serve through `tor`, an AsyncTor or Tor, once that is ready; return itself."""
        self._tor = tor = getattr(tor, "_tor", tor)
        tor._attach(self)
        start = asyncio.start_unix_server if self._to.path else asyncio.start_server
        self._server = await start(self._accept, sock=self._socket, backlog=1024)
        return self

    def close(self):
        """Stop listening, and close all connections."""
        if self._server:
            self._tor.proxies = [proxy for proxy in self._tor.proxies if proxy is not self]
            self._server.close()
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        if self._to.path and os.path.exists(self._to.path):
            os.unlink(self._to.path)

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, TorError, asyncio.TimeoutError, asyncio.CancelledError) as e:
            # Not their texts: no destination goes to a log.
            log(INFO, "%s: %s", self.address, type(e).__name__)
        except Exception as e:
            log(ERR, "bug: %s at %s", type(e).__name__, self.address)
            if _log[0] == DEBUG:
                print_exception(e)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _read_request(self, reader, writer):
        data, said, no_auth = b"", 0, "prefersocksnoauth" in self._to.on
        while True:
            piece = await reader.read(4096)
            if not piece:
                raise EOFError
            data += piece
            answer, request = self._parse(data, no_auth)
            writer.write(answer[said:])
            said = len(answer)
            if request:
                return request, data

    def _warn(self, kind):
        if kind not in self._warned:
            self._warned.add(kind)
            log(WARN, "%s: %s", self.address, _WARNINGS[kind])

    def _isolation(self, request, peer):
        values = peer, request.auth, request.version, request.port, request.host.lower()
        on = [flag in self._to.on for flag in _ISOLATE]
        group = self if self._to.group is None else self._to.group
        return Isolation([group] + [(v,) if wanted else None for v, wanted in zip(values, on)])

    def _check(self, request):
        # Warn of what leaks, refuse what the flags refuse (END's reason 4: by policy).
        if request.literal and request.command != SOCKS_RESOLVE_PTR:
            self._warn(request.version)
        if request.version == "HTTP" and request.auth and not _is_modern(request.auth[0]):
            self._warn("authorization")
        size = len(packed_address(request.host) or b"")
        need = {4: "ipv4traffic", 16: "ipv6traffic"}.get(size, "dnsrequest")
        if ("oniontraffic" if is_onion(request.host) else need) not in self._to.on:
            raise StreamError("refused by the flags of this port", 4)

    async def _serve(self, reader, writer):
        reading = self._read_request(reader, writer)
        request, data = await wait_for(reading, PROXY_SECONDS)
        if isinstance(request, str):
            if request == "no CONNECT":
                self._warn(request)
            return log(INFO, "%s: %s", self.address, request)
        peer = writer.get_extra_info("peername")
        isolation = self._isolation(request, peer[0] if peer else "")
        isolation.source = " SOURCE_ADDR=%s:%d" % peer[:2] if peer else ""
        early = bytearray(data[request.used :])
        work = asyncio.ensure_future(self._open(request, isolation, early))
        watch = asyncio.ensure_future(self._watch(reader, early))
        try:
            await asyncio.wait({work, watch}, return_when="FIRST_COMPLETED")
            watch.cancel()
            await asyncio.wait({watch})
            if not work.done():
                raise EOFError
            stream, answer = work.result()
        except TorError as e:
            writer.write(proxy_error(request, e, "extendederrors" in self._to.on))
            return log(INFO, "%s: %s %d", self.address, type(e).__name__, e.reason)
        finally:
            work.cancel()
            watch.cancel()
        writer.write(answer)
        if stream:
            await self._relay(request, stream, early, reader, writer)

    async def _watch(self, reader, early):
        # Take what the client sends before it has an answer; return when it goes away.
        while len(early) < _EARLY:
            try:
                data = await reader.read(_EARLY - len(early))
            except OSError:
                return
            if not data:
                return
            early += data
        await asyncio.Event().wait()

    async def _open(self, request, isolation, early):
        # A stream or None, and the answer.
        self._check(request)
        tor, host, end = self._tor, request.host, ticks_ms() + PROXY_SECONDS * 1000
        while not tor.ready:
            if ticks_ms() > end:
                raise TorTimeout("Tor is not ready yet")
            await asyncio.sleep(0.1)
        if request.command == SOCKS_CONNECT:
            on = [flag in self._to.on for flag in ("ipv6traffic", "ipv4traffic", "preferipv6")]
            options = PROXY_SECONDS, isolation, on[0] + 2 * (not on[1]) + 4 * on[2], early
            stream, _ = await tor.open_connection(host, request.port, *options)
            http = request.version == "HTTP"
            return stream, _http(200, "OK") if http else socks_reply(request.version, 0)
        if request.command == SOCKS_RESOLVE_PTR:
            answers = await tor.resolve_ptr(host, isolation)
        elif packed_address(host):
            answers = [host]
        else:
            answers = sorted(await tor.resolve(host, isolation), key=lambda a: ":" in a)
        return None, socks_reply(request.version, 0, answers[0][:255])

    async def _relay(self, request, stream, early, reader, writer):
        circuit = stream.circuit
        keep = request.auth and "keepaliveisolatesocksauth" in self._to.on
        circuit.since = ticks_ms() if keep else circuit.since
        try:
            stream.write(early[stream.early :])
        except TorError:
            pass  # the answer is here already, and its end
        await pump(stream, reader, writer)
        circuit.since = ticks_ms() if keep else circuit.since


def _is_modern(authorization):
    # tor wants the user name tor, Arti tor-iso.
    scheme, _, value = (authorization or b"Basic dG9yOg==").partition(b" ")
    try:
        user = b64decode(value.strip()).partition(b":")[0]
    except (ProtocolError, ValueError):
        return False
    return scheme.lower() == b"basic" and user in (b"tor", b"tor-iso")


# torrc and the daemon that it describes (tor(1)).

if not MICROPYTHON:
    import re

# Options by type, as tor has them, with defaults; Ignored: what changes nothing here, with what
# minitor does anyway.  Then how the names begin that only relays and authorities have.
_OPTIONS = {
    "Boolean": (
        "ControlPortFileGroupReadable=0 ControlSocketsGroupWritable=0 CookieAuthentication=0 "
        "CookieAuthFileGroupReadable=0 EnforceDistinctCountries=0 RunAsDaemon=0 StrictNodes=0 "
        "TestingTorNetwork=0 UnixSocksGroupWritable=0 UseBridges=0 __LeaveStreamsUnattached=0 "
        "__ReloadTorrcOnSIGHUP=1"
    ),
    "Integer": "__OwningControllerProcess=0",
    "TimeInterval": "MaxCircuitDirtiness=600 NewCircuitPeriod=30",
    "String": "GeoIPExcludeUnknown=auto SafeLogging=1 SyslogIdentityTag User",
    "Filename": (
        "ClientOnionAuthDir ControlPortWriteToFile CookieAuthFile DataDirectory "
        "GeoIPFile=/usr/share/tor/geoip PidFile"
    ),
    "RouterList": "EntryNodes ExcludeExitNodes ExcludeNodes ExitNodes",
    "LineList": (
        "Bridge ClientTransportPlugin ControlPort ControlSocket DirAuthority FallbackDir "
        "HashedControlPassword HTTPTunnelPort Log SocksPort"
    ),
    "Dependent": (
        "HiddenServiceAllowUnknownPorts HiddenServiceDir HiddenServiceDirGroupReadable "
        "HiddenServiceExportCircuitID HiddenServiceMaxStreams HiddenServiceMaxStreamsCloseCircuit "
        "HiddenServiceNumIntroductionPoints HiddenServicePort HiddenServiceVersion"
    ),
    "Ignored": (
        "AvoidDiskWrites CircuitBuildTimeout ClientOnly=1 DisableDebuggerAttachment "
        "EnforceDistinctSubnets=1 GeoIPv6File HardwareAccel HeartbeatPeriod "
        "HiddenServiceNonAnonymousMode=0 HiddenServiceSingleHopMode=0 "
        "LearnCircuitBuildTimeout=1 LogTimeGranularity NumCPUs "
        "ShutdownWaitLength UseEntryGuards=1 UseMicrodescriptors=1"
    ),
}
_TYPES = {
    word.partition("=")[0].lower(): (kind, word.partition("=")[0], word.partition("=")[2])
    for kind, words in _OPTIONS.items()
    for word in words.split()
}
_NODES = _OPTIONS["RouterList"].split()
# What decides over paths.
_OF_PATHS = _NODES + "EnforceDistinctCountries GeoIPExcludeUnknown GeoIPFile StrictNodes".split()
_ABBREVIATIONS = {"l": "log", "dirserver": "dirauthority"}
_FOR_RELAYS = (
    "accel accounting alternate assume auth bandwidth bridge contactinfo consensusparams dirc "
    "dirp dirr dos exit extend extor extrainfo family hidserv ipv6exit keydir maxadv metrics "
    "myfamily nickname offline orport outbound publishs relay server signing sslkey testing v3"
)
_UNITS = {"": 1, "second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}
_UNITS["month"] = 2629728
_SEVERITIES = "debug info notice warn err".split()


def _unescape(match):
    text = match[1].decode("ascii")
    if text[0] in "xX":
        return bytes([int(text[1:], 16)])
    if text[0].isdigit():
        if int(text, 8) > 255:
            raise ConfigError("no byte: \\%s" % text)
        return bytes([int(text, 8)])
    return {"n": b"\n", "r": b"\r", "t": b"\t"}.get(text, text.encode())


def unquote_c(text):
    """What a string with C's escapes, without its quotes, stands for; ConfigError."""
    data = text.encode("utf-8", "surrogateescape")
    pattern = rb"\\([xX][0-9a-fA-F]{2}|[0-7]{1,3}|[nrt\"'\\])"
    return re.sub(pattern, _unescape, data).decode("utf-8", "surrogateescape")


def quote_c(text):
    return '"%s"' % re.sub(r'(["\\])', r"\\\1", text).replace("\n", "\\n").replace("\r", "\\r")


def parse_torrc(text, name="torrc"):
    """Yield (option, text, "file:line"); ConfigError."""
    blank = re.compile(r"(?:[ \t\n\v\f\r]+|#[^\n]*)*")
    option = re.compile(r"(?:[^ \t\n\v\f\r#\\]|\\(?!\n))*")
    quoted = re.compile(
        r'"((?:[^"\\\n]|\\(?:[xX][0-9a-fA-F]{2}|[0-7]{1,3}|[nrt"\'\\]))*)"[ \t]*\r?(?=[\n#]|\Z)')
    # After the first continuation, comments do not end it.
    plain = re.compile(
        r"((?:[^\n#\\]|\\(?!\n))*)((?:\\\n(?:[^\n#\\]|\\(?!\n)|#[^\n]*\n?)*)*)")
    at = 0
    while (at := blank.match(text, at).end()) < len(text):
        where = "%s:%d" % (name, text.count("\n", 0, at) + 1)
        key = option.match(text, at)
        at = key.end()
        while text[at : at + 1] in (" ", "\t"):
            at += 1
        if text[at : at + 1] == '"':
            match = quoted.match(text, at)
            if not match:
                raise ConfigError(where + ": a bad escape, no closing quote, or more after it")
            try:
                value = unquote_c(match[1])
            except ConfigError as e:
                raise ConfigError("%s: %s" % (where, e))
        else:
            match = plain.match(text, at)
            value = match[1] + re.sub(r"\\\n|#[^\n]*\n?", "", match[2])
            value = value.strip(" \t\n\v\f\r")
        if "\0" in key[0] + value or not key[0]:
            raise ConfigError(where + ": a line without an option, or a zero byte")
        yield key[0], value, where
        at = match.end()


def _included(pattern, where):
    # The files that %include names: folders stand for the files in them.
    import glob

    found = [pattern]
    if re.search(r"[*?]", pattern):
        found = sorted(glob.glob(pattern.replace("[", "[[]")))
    for path in found:
        if os.path.isdir(path):
            inside = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n[0] != "."]
            yield from [name for name in inside if os.path.isfile(name)]
        else:
            yield path


def read_torrc(path, text=None, depth=0):
    """Return [(option, text, where)] of the file `path` and what it includes; ConfigError."""
    lines = []
    try:
        if text is None:
            with open(path, encoding="utf-8", errors="surrogateescape") as f:
                text = f.read()
        for key, value, where in parse_torrc(text, path):
            if key != "%include":
                lines.append((key, value, where))
                continue
            if depth > 30 or not value:
                raise ConfigError(where + ": %include of nothing, or too deep")
            for name in _included(os.path.expanduser(value), where):
                lines += read_torrc(name, None, depth + 1)
    except (OSError, ValueError) as e:
        raise ConfigError("cannot read the torrc %s: %s" % (path, e))
    return lines


def option_name(key):
    """The full name of an option, whatever its case, or its beginning alone; ConfigError."""
    key = key.lower()
    key = _ABBREVIATIONS.get(key, key)
    names = [name for name in _TYPES if name.startswith(key)] if key else []
    if key in _TYPES or len(names) == 1:
        return _TYPES[key if key in _TYPES else names[0]][1]
    if key.strip("_").startswith(tuple(_FOR_RELAYS.split())) and not names:
        raise ConfigError("only relays and authorities have this option, and minitor is neither")
    raise ConfigError("unknown option, or one that minitor does not have")


def _decimal(text, least, most):
    if not text.isdecimal() or not text.isascii() or not least <= int(text[:20]) <= most:
        raise ConfigError("not %d to %d: %s" % (least, most, text))
    return int(text)


def _interval(text):
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{0,9})?)[ \t]*([a-z]*?)s?", text.lower(), re.ASCII)
    if not match or match[2] not in _UNITS or text.lower().endswith("ss"):
        raise ConfigError("no interval, such as `10 minutes`: " + text)
    seconds = int(float(match[1]) * _UNITS[match[2]])
    return _decimal(str(seconds), 0, (1 << 31) - 1)


def _address(text, port=None):
    # (host, port) of "host:port", "[host]:port"; with `port` also "host"; ConfigError.
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::(\d+))?|([^\[\]:]+)(?::(\d+))?", text)
    number = match and (match[2] or match[4])
    if not match or number is None and port is None:
        raise ConfigError("no address:port: " + text)
    host = match[1] or match[3]
    place = host, _decimal(number, 1, 65535) if number else port
    check_target(*place)
    return place


def _split_place(text):
    # A first word, or unix:"…", and the rest.
    match = re.match(r'unix:"((?:[^"\\]|\\.)*)"|[^\s"]+(?=\s|\Z)', text)
    if not match:
        raise ConfigError("a port, ADDRESS:PORT or unix:PATH is needed")
    where = match[0] if match[1] is None else "unix:" + unquote_c(match[1])
    return where, text[match.end() :].strip()


def _path(text):
    return os.path.abspath(os.path.expanduser(text))


def parse_port(text):
    """Return (where, flags) of a …Port line, for parse_listener; None for 0; ConfigError."""
    where, flags = _split_place(text)
    if where == "0":
        return None
    if where[:5] == "unix:":
        where = "unix:" + _path(where[5:])
    parse_listener(where, flags)
    return where, flags


def parse_log(text):
    """Return (severities, "stdout", "stderr", "syslog" or "file", path) of a Log line."""
    match = re.fullmatch(r"(?is)(.*?)(?:\b(stdout|stderr|syslog)|\bfile[ \t]+(.+))?", text)
    levels = set()
    # Domains are not told apart: what one asks for, all give.
    for word in re.sub(r"\[[\w~*, \t]*\]", " ", match[1].lower()).split():
        low, _, high = word.partition("-")
        try:
            low, high = _SEVERITIES.index(low), _SEVERITIES.index(high or "err")
        except ValueError:
            low = high = 9
        levels |= set(range(low, high + 1))
    if not levels or 9 in levels:
        raise ConfigError("not as `notice stdout` or `info-warn file /path`")
    kind = "file" if match[3] else (match[2] or "stdout").lower()
    return levels, kind, _path(match[3].strip()) if match[3] else None


def _pattern(item):
    # As in parse_nodes.
    import ipaddress

    if item[0] == "[":
        net, _, rest = item[1:].partition("]")
        bits, _, ports = rest.partition(":")
        net += bits
    else:
        net, _, ports = (item, "", "") if item.count(":") > 1 else item.partition(":")
    try:
        net = ipaddress.ip_network({"*4": "0.0.0.0/0", "*6": "::/0"}.get(net, net), False)
        span = [int(port) for port in (ports.strip("*") or "1-65535").split("-")]
        low, high = span if len(span) > 1 else span * 2
    except ValueError:
        raise ConfigError("no fingerprint, no address pattern, no {cc}: " + item)
    if net.version == 6 and net.prefixlen > 32:
        raise ConfigError("minitor keeps no more than 32 bits of a relay's IPv6 address: " + item)
    return net.max_prefixlen // 8, int(net.network_address), int(net.netmask), low, high


def parse_nodes(text):
    """Return (fingerprints, patterns, countries) of a list of relays; ConfigError.

    A pattern: (size of addresses, network, mask, first port, last port).
    """
    ids, patterns, countries = set(), [], set()
    for item in text.replace(",", " ").split():
        match = re.fullmatch(r"\$?([0-9a-fA-F]{40})(?:[=~][a-zA-Z0-9]{1,19})?", item)
        if match:
            ids.add(bytes.fromhex(match[1]))
        elif re.fullmatch(r"\{([a-zA-Z][a-zA-Z0-9]|\?\?)\}", item):
            countries.add(item[1:3].upper())
        elif re.fullmatch("[a-zA-Z0-9]{1,19}", item):
            raise ConfigError("minitor knows no nicknames, give the fingerprint of " + item)
        elif item[0] == "*" and item[1:2] not in ("4", "6"):
            patterns += [_pattern("*4" + item[1:]), _pattern("*6" + item[1:])]
        else:
            patterns.append(_pattern(item))
    return ids, patterns, countries


def parse_password_hash(text):
    """Return (salt and count, hash) of a HashedControlPassword; ConfigError."""
    if not re.fullmatch(r"16:[0-9a-fA-F]{58}", text):
        raise ConfigError("no output of --hash-password")
    data = bytes.fromhex(text[3:])
    return data[:9], data[9:]


def hash_password(password, salt):
    """The S2K of RFC 2440 with SHA-1; `salt`: 8 bytes and the count's."""
    count = (16 + (salt[8] & 15)) << (salt[8] >> 4) + 6
    data = salt[:8] + password
    return sha1((data * (count // len(data) + 1))[:count])


def _fallback(text):
    # As in load_network's `fallbacks`.
    words = text.split()
    options = dict([word.split("=", 1) for word in words if "=" in word])
    rest = [word for word in words if "=" not in word]
    if len(rest) != 1 or not re.fullmatch(r"[0-9a-fA-F]{40}", options.get("id", "")):
        raise ConfigError("no `address[:port] orport=port id=fingerprint`")
    port = _decimal(options.get("orport", ""), 1, 65535)
    return _address(rest[0], 1)[0], port, bytes.fromhex(options["id"])


def socks_arguments(words):
    """How `name=value` words of a Bridge line reach a transport (pt-spec 3.5), as bytes."""
    return ";".join([re.sub(r"([\\;])", r"\\\1", word) for word in words]).encode()


def _bridge(text):
    # (transport or None, (host, port), RSA identity or b"", arguments).
    words = text.split()
    transport = words.pop(0) if words and re.fullmatch(r"[a-zA-Z_]\w*", words[0], re.A) else None
    place, rsa_id = _address(words.pop(0) if words else "", 443), ""
    if not packed_address(place[0]):
        raise ConfigError("no IP address, and names are not looked up: " + place[0])
    if transport and words and "=" not in words[0]:
        rsa_id = words.pop(0)
    elif not transport:
        rsa_id, words = "".join(words), []
    if rsa_id and not re.fullmatch(r"\$?[0-9a-fA-F]{40}", rsa_id):
        raise ConfigError("no fingerprint (40 hexadecimal digits): " + rsa_id)
    if [word for word in words if "=" not in word[1:]]:
        raise ConfigError("no `[transport] address:port [fingerprint] [name=value …]`")
    if len(socks_arguments(words)) > 510:
        raise ConfigError("its arguments are longer than 510 bytes")
    return transport, place, bytes.fromhex(rsa_id[-40:]), words


def _plugin(text):
    # (transports, "exec", "socks4" or "socks5", words or place).
    names = r"[a-zA-Z_]\w*"
    match = re.fullmatch(r"(%s(?:,%s)*)\s+(exec|socks4|socks5)\s+(.+)" % (names, names), text, re.A)
    if not match:
        raise ConfigError("no `transports exec path` or `transport socks5 address:port`")
    names, kind, what = match[1].split(","), match[2], match[3]
    if kind == "exec":
        return names, kind, what.split()
    place = _address(what)
    if len(names) > 1 or not packed_address(place[0]):
        raise ConfigError("a proxy that runs already has one transport, and an IP address")
    return names, kind, place


def _service_port(text):
    # (port, target as of create_onion_service).
    number, _, text = text.partition(" ")
    port = _decimal(number, 1, 65535)
    where, rest = _split_place(text.strip() or number)
    if rest:
        raise ConfigError("more than a port and its target")
    if where[:5] == "unix:":
        return port, where
    if where.isdecimal():
        return port, ("127.0.0.1", _decimal(where, 1, 65535))
    return port, _address(where, port if "." in where or ":" in where else None)


def _boolean(text):
    return _decimal(text, 0, 1) == 1


def _only(wanted):
    def check(text):
        if text != wanted:
            raise ConfigError("minitor has %s alone" % wanted)
        return True

    return check


_OF_SERVICES = {
    "HiddenServiceVersion": _only("3"),
    "HiddenServiceAllowUnknownPorts": _only("0"),
    "HiddenServiceDirGroupReadable": _only("0"),
    "HiddenServiceExportCircuitID": _only("haproxy"),
    "HiddenServiceMaxStreams": lambda text: _decimal(text, 0, 65535),
    "HiddenServiceMaxStreamsCloseCircuit": _boolean,
    "HiddenServiceNumIntroductionPoints": lambda text: _decimal(text, 3, 20),
}


def parse_services(entries):
    """Return {folder: {option: value}} of HiddenService… lines [(option, text, where)].

    HiddenServicePort: {port: [target]}.  ConfigError.
    """
    services, service = {}, None
    for name, text, where in entries:
        try:
            if name == "HiddenServiceDir":
                folder = _path(text)
                if folder in services:
                    raise ConfigError("it stands here twice")
                services[folder] = service = {"HiddenServicePort": {}, "where": where}
            elif not service:
                raise ConfigError("no HiddenServiceDir stands before")
            elif name == "HiddenServicePort":
                port, target = _service_port(text)
                service[name].setdefault(port, []).append(target)
            else:
                service[name] = _OF_SERVICES[name](text)
        except TorError as e:
            raise ConfigError("%s: %s %s: %s" % (where, name, text, e))
    for folder, service in services.items():
        if not service["HiddenServicePort"]:
            raise ConfigError("%s: no HiddenServicePort for %s" % (service["where"], folder))
    return services


def set_service(service, wanted):
    """Give an OnionService what parse_services found."""
    get, service.ports = wanted.get, wanted["HiddenServicePort"]
    service.intro_points = get("HiddenServiceNumIntroductionPoints", INTRO_POINTS)
    service.max_streams = get("HiddenServiceMaxStreams") or 65535
    service.strict = get("HiddenServiceMaxStreamsCloseCircuit")
    service.export = get("HiddenServiceExportCircuitID")


_PARSERS = {
    "Boolean": _boolean,
    "Integer": lambda text: _decimal(text, 0, (1 << 31) - 1),
    "TimeInterval": _interval,
    "Filename": _path,
    "RouterList": parse_nodes,
    "Bridge": _bridge,
    "ClientTransportPlugin": _plugin,
    "ControlPort": parse_port,
    "ControlSocket": lambda t: parse_port(t if t[:5] == "unix:" or t == "0" else "unix:" + t),
    "FallbackDir": _fallback,
    "HashedControlPassword": parse_password_hash,
    "HTTPTunnelPort": parse_port,
    "Log": parse_log,
    "SocksPort": parse_port,
}
_HIDDEN = "HiddenServiceOptions"


_geoip = {}


def load_geoip(path):
    """Return arrays of the first and last addresses, and countries; ConfigError."""
    first, last, countries = array("I"), array("I"), []
    try:
        # The last one is kept: it takes a second.
        key = path, os.path.getmtime(path)
        if key in _geoip:
            return _geoip[key]
        with open(path) as f:
            for line in f:
                parts = line.strip().split(",")
                if len(parts) == 3 and line[0] != "#":
                    first.append(int(parts[0]))
                    last.append(int(parts[1]))
                    countries.append(sys.intern(parts[2]))
    except (OSError, OverflowError, ValueError) as e:
        raise ConfigError("cannot read the GeoIPFile %s: %s (Debian: tor-geoipdb)" % (path, e))
    _geoip.clear()
    _geoip[key] = first, last, countries
    return _geoip[key]


def country(geoip, address):
    """The country, or "??", of an IPv4 address as a number."""
    from bisect import bisect

    first, last, countries = geoip
    i = bisect(first, address) - 1
    return countries[i] if i >= 0 and address <= last[i] else "??"


class Config(dict):
    """The value of each option; `lines`: {option: [(option, text, where)]} as written."""

    _table = None

    def country(self, address):
        """The country, by GeoIPFile, of an IPv4 address as a number; ConfigError."""
        self._table = self._table or load_geoip(self["GeoIPFile"])
        return country(self._table, address)


def _assign(lines, entries):
    # Add the lines of one file, or of the command line, which override earlier ones.
    fresh = set()
    for key, text, where in entries:
        mark = key[:1] if key[:1] in "+/" else ""
        try:
            name = option_name(key[len(mark) :])
        except ConfigError as e:
            raise ConfigError("%s: %s: %s" % (where, key, e))
        kind, _, default = _TYPES[name.lower()]
        group = _HIDDEN if kind == "Dependent" else name
        many = kind in ("LineList", "Dependent")
        if mark == "/" or not text and not many:
            lines.pop(group, None)
        elif not text:
            log(WARN, "%s: %s has no value: skipped", where, name)
        else:
            if kind == "Ignored" and text != default:
                log(NOTICE, "%s: %s %s changes nothing in minitor", where, name, text)
            if not many and group in fresh:
                log(WARN, "%s: %s is given more than once: the last one counts", where, name)
            if not many or mark != "+" and group not in fresh:
                lines[group] = []
            fresh.add(group)
            lines.setdefault(group, []).append((name, text, where))


def configure(*sources):
    """Return the Config of lists of (option, text, where), of which the later ones override."""
    config = Config()
    config.lines = {}
    for entries in sources:
        _assign(config.lines, entries)
    for kind, name, default in _TYPES.values():
        parse = _PARSERS.get(name) or _PARSERS.get(kind) or str
        config[name] = [] if kind == "LineList" else parse(default) if default else None
        for name, text, where in config.lines.get(name, ()):
            try:
                value = parse(text)
            except TorError as e:
                # It may be the password itself.
                text = "…" if "Password" in name else text
                raise ConfigError("%s: %s %s: %s" % (where, name, text, e))
            if kind != "LineList":
                config[name] = value
            elif value is not None:
                config[name].append(value)
    config[_HIDDEN] = parse_services(config.lines.get(_HIDDEN, ()))
    _check(config)
    return config


def nodes_of(config, name):
    """What parse_nodes found, with unknown countries as GeoIPExcludeUnknown has it."""
    ids, patterns, countries = config[name] or ((), (), set())
    unknown = config["GeoIPExcludeUnknown"]
    if name[:7] == "Exclude" and (unknown == "1" or unknown == "auto" and countries):
        countries = countries | {"??", "A1"}
    return ids, patterns, countries


def _check(config):
    # What only together is right or wrong, or what minitor cannot do.
    def refuse(name, text):
        where = config.lines[name][0][2] + ": " if name in config.lines else ""
        raise ConfigError("%s%s: %s" % (where, name, text))

    if config["MaxCircuitDirtiness"] < 10 or config["MaxCircuitDirtiness"] > 30 * 86400:
        refuse("MaxCircuitDirtiness", "not 10 seconds to 30 days")
    if config["SafeLogging"] not in ("0", "1", "relay"):
        refuse("SafeLogging", "neither 0 nor 1 nor relay")
    if config["DirAuthority"]:
        try:
            load_network(["DirAuthority " + text for text in config["DirAuthority"]])
        except ConfigError as e:
            refuse("DirAuthority", e)
    if config["UseBridges"]:
        _check_bridges(config, refuse)
    if config["ClientOnionAuthDir"]:
        try:
            load_onion_keys(config["ClientOnionAuthDir"])
        except ConfigError as e:
            refuse("ClientOnionAuthDir", e)
    if config["GeoIPExcludeUnknown"] not in ("0", "1", "auto"):
        refuse("GeoIPExcludeUnknown", "neither 0 nor 1 nor auto")
    for name in ["EnforceDistinctCountries"] + _NODES:
        if config[name] is True or nodes_of(config, name)[2]:
            try:
                config.country(0)
            except ConfigError as e:
                refuse(name, e)


def _check_bridges(config, refuse):
    if not config["Bridge"]:
        refuse("UseBridges", "no Bridge line says which bridges")
    if config["EntryNodes"]:
        refuse("EntryNodes", "with UseBridges the bridges are the entries")
    offered = {name for names, _, _ in config["ClientTransportPlugin"] for name in names}
    lines = config.lines["Bridge"]
    lacking = [
        "%s: Bridge %s: no ClientTransportPlugin line is for the transport %s" % (where, text, name)
        for (_, text, where), (name, _, _, _) in zip(lines, config["Bridge"])
        if name and name not in offered
    ]
    if len(lacking) == len(lines):
        raise ConfigError(lacking[0])
    for text in lacking:
        log(WARN, "%s: not used", text)


class ChosenPaths(PathSelector):
    """PathSelector within EntryNodes, ExitNodes, ExcludeNodes and ExcludeExitNodes, and perhaps
    with each hop in another country."""

    # Whether few guards are left, which have a sample of their own (guard-spec 2.B); not yet known.
    _restricted = None
    # In which countries no layer-2 guard shall be.
    _abroad = ()

    def __init__(self, config, table, consensus, path):
        self.config, self._default = config, path
        super().__init__(table, consensus, path)

    def update(self, table, consensus):
        config, lists = self.config, {}
        # {index: country}, as far as was asked for.
        self._countries = {}
        for name in _NODES:
            nodes = nodes_of(config, name)
            if any(nodes):
                relays = [(i, table.relay(i), table.subnets(i)[1]) for i, _, _ in table.rows()]
                lists[name] = {i for i, r, net6 in relays if is_among(r, nodes, config, net6)}
        never = self._never = lists.get("ExcludeNodes", set())
        self._exits = lists.get("ExitNodes")
        self._no_exits = never | lists.get("ExcludeExitNodes", set())
        _, need, refused = _ROLES["guard"]
        guards = {i for i, _, _ in table.rows(need | refused, need)}
        self.refused = guards - (lists.get("EntryNodes", guards) - never)
        if self._file:
            self._choose_sample(len(guards), consensus.param)
        super().update(table, consensus)

    def _choose_sample(self, count, param):
        least = count * param("guard-meaningful-restriction-percent", 20, 1) / 100
        # Not back and forth where it is nearly that many.
        margin = {None: 1, False: 0.95, True: 1.05}[self._restricted]
        left, before = count - len(self.refused), self._restricted
        self._restricted = left < least * margin
        if self._restricted != before and (self._restricted or before):
            name, kind = os.path.splitext(self._default)
            self._load(name + "_restricted" + kind if self._restricted else self._default)
        if left < count * param("guard-extreme-restriction-percent", 1, 1, 100) // 100:
            text = "EntryNodes and ExcludeNodes leave %d of %d guards: who uses these stands out"
            log(WARN, text, left, count)

    def weigh(self, position, need, never=0):
        # What is refused as a guard is sampled all the same, unless that is most.
        within, without = None, self._never
        if position == "g":
            without = self.refused if self._restricted else ()
        elif position == "e":
            within, without = self._exits, self._no_exits
        for i, weight in super().weigh(position, need, never):
            if i not in without and (within is None or i in within):
                yield i, weight

    def excluded(self, relay):
        """Tell whether ExcludeNodes names a relay, or the one of an RSA identity."""
        rsa_id = getattr(relay, "rsa_id", relay)
        i = self.table.find(rsa_id)
        if i >= 0 or rsa_id is relay:
            return i in self._never
        return is_among(relay, nodes_of(self.config, "ExcludeNodes"), self.config)

    # EnforceDistinctCountries.

    def _country(self, i):
        if i not in self._countries:
            self._countries[i] = country_of(self.table.relay(i), self.config)
        return self._countries[i]

    def _homes(self):
        # Of the guards in use: what is chosen before them shall not make others necessary.
        use = self.param("guard-n-primary-guards-to-use", 1, 1)
        return {self._country(g.index) for g in self.primary()[:use]}

    def _apart(self, i, path, second):
        good = super()._apart(i, path, second)
        if good and self.config["EnforceDistinctCountries"]:
            # The target of an onion circuit is not ours; where a bridge is may be unknown.
            ours, here = [j for j in path[bool(second) :] if j >= 0], self._country(i)
            known = here != "??" or i >= len(self.table)
            good = known and here not in map(self._country, ours)
        return good

    def _layer_two(self):
        if self.config["EnforceDistinctCountries"]:
            self._abroad = self._homes() | {"??"}
            for rsa_id in list(self.layer_two):
                i = self.table.find(rsa_id)
                if i < 0 or self._country(i) in self._abroad:
                    del self.layer_two[rsa_id]
        try:
            return super()._layer_two()
        finally:
            self._abroad = ()

    def pick(self, role, accept, stable=STABLE, among=()):
        given = accept
        within = lambda refused: lambda i: self._country(i) not in refused and given(i)
        if role != "exit" or not self.config["EnforceDistinctCountries"]:
            accept = within(self._abroad) if self._abroad else accept
            return super().pick(role, accept, stable, among)
        try:
            return super().pick(role, within(self._homes() | {"??"}), stable, among)
        except CircuitError:
            return super().pick(role, within({"??"}), stable, among)

    def exit_path(self, port):
        return self._explained(super().exit_path, port)

    def onion_path(self, target=None):
        return self._explained(super().onion_path, target)

    def _explained(self, choose, *args):
        try:
            return choose(*args)
        except CircuitError as e:
            if not self.config["EnforceDistinctCountries"]:
                raise
            known = {self._country(i) for i, _, _ in self.table.rows(USABLE, USABLE)} - {"??"}
            raise CircuitError("%s: EnforceDistinctCountries wants each hop in another country, "
                               "and the usable relays are in %d by GeoIPFile" % (e, len(known)))


def country_of(relay, config):
    """The country of a relay, by its IPv4 address, or "??"."""
    packed = packed_address(relay.address)
    return config.country(uint(packed)) if len(packed) == 4 else "??"


def is_among(relay, nodes, config, net6=0):
    """Tell whether `relay`, in the IPv6 network `net6`, is one of nodes_of's `nodes`."""
    ids, patterns, countries = nodes
    packed = packed_address(relay.address)
    places = {16: net6 << 96} if net6 else {}
    places[len(packed)] = uint(packed)
    return (
        relay.rsa_id in ids
        or any([places[size] & mask == net and low <= relay.port <= high
                for size, net, mask, low, high in patterns if size in places])
        or bool(countries) and country_of(relay, config) in countries
    )


def mirrors(places, config):
    """Of directories, as in load_network, those outside ExcludeNodes; all where none is left."""
    nodes, kept = nodes_of(config, "ExcludeNodes"), []
    for entry in places:
        relay = Record()
        relay.address, relay.port, relay.rsa_id = place(entry)
        if not is_among(relay, nodes, config):
            kept.append(entry)
    return kept if kept or config["StrictNodes"] else places


# Bridges (dir-spec 2.1.1, guard-spec 4) and pluggable transports (pt-spec).

# So long a plugin may take to be ready, and to end; the pauses before it is started again.
_PLUGIN_SECONDS, _PLUGIN_END, _PLUGIN_PAUSES = 30, 1, (1, 300)
# So long a link through a transport may take; when a bridge is asked for its descriptor again.
_TRANSPORT_SECONDS, _BRIDGE_PAUSES, _DESCRIPTOR_SECONDS = 60, (15, 3600), 3 * 3600
_SOCKS_ERRORS = (
    "|general failure|not allowed|network unreachable|host unreachable|connection refused|"
    "timed out|command not supported|addresses of this type not supported"
).split("|")


def parse_router(text, rsa_id, ed_id, when):
    """Verify the descriptor (dir-spec 2.1.1) of the relay that has these identities.

    Return `ntor_key`, `family` (4 bytes of each member), `family_ids` (8 of each SHA-256).
    """
    item, found = document(text), Record()
    key, master = item(b"signing-key")[1], b64decode(item(b"master-key-ed25519")[0], 32)
    good = text[:7] == b"router " and item(b"router")[0] and sha1(key) == rsa_id
    require(good and master == ed_id, "the descriptor is another relay's")
    signing = check_ed_cert(item(b"identity-ed25519")[1], 4, master, when)
    found.ntor_key = b64decode(item(b"ntor-onion-key")[0], 32)
    # That the key is its own, by that key itself: with the sign that the descriptor tells.
    sign, cross = item(b"ntor-onion-key-crosscert")
    require(sign in (b"0", b"1"), "the descriptor has no cross-certificate")
    public = (_int(_enc_key_ed(found.ntor_key)) | int(sign) << 255).to_bytes(32, "little")
    good = check_ed_cert(cross, 10, public, when) == master
    ends = [text.find(mark) + len(mark) for mark in (b"\nrouter-sig-ed25519 ",
                                                     b"\nrouter-signature\n")]
    digest = sha256(b"Tor router descriptor signature v1" + text[: ends[0]])
    signature = b64decode(item(b"router-sig-ed25519")[0], 64)
    good = good and ed25519_verify(signing, digest, signature) and ends[0] < ends[1]
    signature = item(b"router-signature")[1]
    good = good and rsa_verify(rsa_public_key(key), sha1(text[: ends[1]]), signature)
    require(good, "the descriptor's signatures are wrong")
    members = re.findall(rb"\$([\da-fA-F]{8})", item(b"family")[0])
    found.family = {binascii.unhexlify(member) for member in members}
    found.family_ids = set()
    for body in re.findall(rb"\nfamily-cert\n-----BEGIN FAMILY CERT-----\n([^-]+)-", text):
        cert = b64decode(body.replace(b"\n", b""))
        require(check_ed_cert(cert, 12, cert[44:76], when) == master, "a family-cert is another's")
        found.family_ids.add(sha256(b"ed25519:" + b64encode(cert[44:76]).encode())[:8])
    return found


def take_plugin_line(line, methods):
    """Take what a managed proxy says (pt-spec 3.3) up to CMETHODS DONE; tell whether that is it.

    `methods`: {transport: (SOCKS version, (host, port)), or a text: why not}.  ProtocolError.
    """
    word, _, rest = line.partition(" ")
    require(word not in ("VERSION-ERROR", "ENV-ERROR", "PROXY-ERROR"), "says " + line)
    if word == "VERSION":
        require(rest == "1", "speaks another version: " + rest)
        methods[""] = rest
    if word[:7] != "CMETHOD":
        return False
    require("" in methods, "names no VERSION first")
    name, _, more = rest.partition(" ")
    if word == "CMETHOD-ERROR":
        methods[name] = more or "no reason given"
    elif word == "CMETHOD":
        kind, _, where = more.partition(" ")
        try:
            methods[name] = {"socks4": 4, "socks5": 5}[kind], _address(where.strip())
            require(packed_address(methods[name][1][0]), "")
        except (KeyError, TorError):
            raise ProtocolError("says what makes no sense: " + line)
    return line == "CMETHODS DONE"


class Plugin:
    """A managed proxy (pt-spec), which is started, and again when it ends, while this is there."""

    def __init__(self, names, words, folder):
        self.names, self._words, self._folder = names, words, folder
        self._methods, self._process, self._said = Promise(), None, ""
        self._task = spawn(self._run())

    def __str__(self):
        return "the transport plugin " + self._words[0]

    async def method(self, name):
        """The SOCKS version and place of a transport; ChannelError."""
        found = (await self._methods.wait()).get(name, "it does not offer that")
        if isinstance(found, str):
            raise ChannelError("%s has no %s: %s" % (self, name, found))
        return found

    async def _run(self):
        pause, most = _PLUGIN_PAUSES
        while True:
            started = time.monotonic()
            try:
                await self._serve()
            except asyncio.TimeoutError:
                error = "is not ready within %s s" % _PLUGIN_SECONDS
            except Exception as e:  # or who waits would wait for ever
                error = str(e)
            finally:
                await self._end()
            if time.monotonic() - started > most:
                pause = _PLUGIN_PAUSES[0]
            if self._said:
                error += "; the last it said: " + self._said
            error, self._said = ChannelError("%s %s" % (self, error)), ""
            log(WARN, "%s; it is started again in %s s", error, pause)
            self._methods.set(error=error)  # for who waits
            self._methods = Promise()
            self._methods.set(error=error)
            await asyncio.sleep(pause)
            self._methods, pause = Promise(), min(2 * pause, most)

    async def _serve(self):
        # Until it ends.
        env = dict(
            os.environ, TOR_PT_MANAGED_TRANSPORT_VER="1", TOR_PT_EXIT_ON_STDIN_CLOSE="1",
            TOR_PT_STATE_LOCATION=self._folder, TOR_PT_CLIENT_TRANSPORTS=",".join(self.names))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
        try:
            # Ctrl-C is for this program, which ends that one.
            self._process = process = await asyncio.create_subprocess_exec(
                *self._words, env=env, start_new_session=True, **pipes)
        except OSError as e:
            raise ChannelError("cannot be started: %s" % e)
        spawn(self._read(process.stderr))
        methods, done = {}, lambda line: take_plugin_line(line, methods)
        if not await wait_for(self._read(process.stdout, done), _PLUGIN_SECONDS):
            raise ChannelError("ended before it was ready")
        for name in self.names:
            if isinstance(methods.get(name), tuple):
                log(INFO, "%s offers %s", self, name)
        self._methods.set(methods)
        await self._read(process.stdout)
        raise ChannelError("ended")

    async def _read(self, reader, done=lambda line: False):
        # Whether a line was `done`, before they end.
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                line = b"a line without end\n"
            if not line:
                return False
            line = re.sub("[^ -~]", "?", line.decode("ascii", "replace").strip())[:1000]
            self._said = line
            if done(line):
                return True
            self._note(line)

    def _note(self, line):
        # pt-spec 3.3.4, 3.3.5; the rest is nothing that one has to know.
        severity = INFO
        match = re.match(r"(LOG|STATUS) (?:SEVERITY=(\w+) )?(.*)", line)
        if match:
            announce("PT_" + match[1], self._words[0], line[len(match[1]) + 1 :])
            names = {"error": ERR, "warning": WARN, "notice": NOTICE, "debug": DEBUG}
            severity = names.get((match[2] or "").lower(), INFO)
        log(severity, "%s: %s", self, line)

    async def _end(self):
        # Its input ends, as it was promised; then by force (pt-spec 3.4).
        process, self._process = self._process, None
        if not process:
            return
        process.stdin.close()
        for stop in (lambda: None, process.terminate, process.kill):
            try:
                stop()
                await wait_for(process.wait(), _PLUGIN_END)
                break
            except (asyncio.TimeoutError, ProcessLookupError):
                pass
        process._transport.close()  # or what it wrote stays open

    async def close(self):
        self._methods.set(error=ChannelError("%s was ended" % self))
        self._task.cancel()
        await asyncio.wait([self._task])


async def dial_through(version, proxy, place, words):
    """Connect to `place` through a transport's SOCKS proxy (pt-spec 3.5); return the socket."""
    loop, packed = asyncio.get_running_loop(), packed_address(place[0])
    sock = socket.socket(socket.AF_INET6 if ":" in proxy[0] else socket.AF_INET)

    async def take(n):
        data = b""
        while len(data) < n:
            piece = await loop.sock_recv(sock, n - len(data))
            if not piece:
                raise ChannelError("its transport hung up")
            data += piece
        return data

    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, proxy)
        ask, port, text = lambda data: loop.sock_sendall(sock, data), pack(">H", place[1]), words
        if version == 4:
            if len(packed) != 4 or b"\0" in text:
                raise ChannelError("its transport speaks SOCKS 4, which has no IPv6")
            await ask(b"\4\1" + port + packed + text + b"\0")
            code = (await take(8))[1]
            error = "" if code == 90 else "code %d" % code
        else:
            user, password = text[:255], text[255:] or b"\0"
            await ask(b"\5\1" + (b"\2" if text else b"\0"))
            if await take(2) != (b"\5\2" if text else b"\5\0"):
                raise ChannelError("its transport takes no arguments as they are given here")
            if text:
                await ask(b"\1%c%s%c%s" % (len(user), user, len(password), password))
                if (await take(2))[1]:
                    raise ChannelError("its transport refuses the arguments of the Bridge line")
            await ask(b"\5\1\0" + (b"\1" if len(packed) == 4 else b"\4") + packed + port)
            _, code, _, kind = await take(4)
            error = reason_text(_SOCKS_ERRORS, code)
            await take(2 + ({1: 4, 4: 16}.get(kind) or (await take(1))[0]))
        if error:
            raise ChannelError("its transport cannot reach it: " + error)
        return sock
    except BaseException:
        sock.close()
        raise


class Bridge(Record):
    """A Bridge line: `transport`, `address`, `port`, `rsa_id`, `words`, `where` it stands.

    Its descriptor gives `ed_id`, `ntor_key` and families; `error`: why there is none.
    """

    ed_id = ntor_key = error = None
    flags, family, family_ids = USABLE, (), ()

    def __str__(self):
        at = "[%s]" % self.address if ":" in self.address else self.address
        name = self.transport + " " if self.transport else ""
        return "bridge %s%s:%d (%s)" % (name, at, self.port, self.where)


class BridgeLink(Channel):
    """A Channel to a bridge, through its transport; learns `rsa_id`, if it is b"", and `ed_id`."""

    def __init__(self, bridges, bridge, seconds):
        self._bridges, self._bridge = bridges, bridge
        seconds = max(seconds, _TRANSPORT_SECONDS) if bridge.transport else seconds
        super().__init__(bridge.address, bridge.port, bridge.rsa_id, bridge.ed_id, seconds)

    def __str__(self):
        return str(self._bridge)

    async def _dial(self, address, port, seconds):
        through = None
        if self._bridge.transport:
            through = await wait_for(self._bridges.dial(self._bridge), seconds)
        return await tls_connect(address, port, seconds, through)

    def _handshake(self, command, body):
        if command != CERTS:
            return super()._handshake(command, body)
        certs = dict(_tagged(Reader(body, "CERTS"), 2))
        # As parse_certs has it, which then proves it.
        at = certs.get(2, b"").find(b"0\x81\x89\2\x81\x81\0")
        rsa_id = sha1(certs.get(2, b"")[at : at + 140])
        if rsa_id != (self.rsa_id or rsa_id):
            text = "its fingerprint is %s, which the Bridge line does not say: that is wrong, or"
            text += " another answers in its place"
            raise ProtocolError(text % rsa_id.hex().upper())
        self.rsa_id = rsa_id
        super()._handshake(command, body)
        self.ed_id = certs[7][:32]


# The index of the first bridge, beside those of a RelayTable's relays.
_BRIDGES = 1 << 16


class _BridgedTable:
    # A RelayTable for a PathSelector, and the bridges.
    def __init__(self, table, bridges):
        self._table, self._bridges = table, bridges

    def __getattr__(self, name):
        return getattr(self._table, name)

    def __len__(self):
        return len(self._table)

    def relay(self, i):
        return self._bridges[i - _BRIDGES] if i >= _BRIDGES else self._table.relay(i)

    def flags_of(self, i):
        return USABLE if i >= _BRIDGES else self._table.flags_of(i)

    def rsa_id(self, i):
        return self._bridges[i - _BRIDGES].rsa_id if i >= _BRIDGES else self._table.rsa_id(i)

    def find(self, rsa_id):
        found = [bridge.index for bridge in self._bridges if bridge.rsa_id == rsa_id]
        return found[0] if found else self._table.find(rsa_id)

    def subnets(self, i):
        if i < _BRIDGES:
            return self._table.subnets(i)
        packed = packed_address(self.relay(i).address)
        return (uint(packed[:2]), 0) if len(packed) == 4 else (-1, uint(packed[:4]))

    def same_family(self, i, j):
        i, j = sorted((i, j))
        if j < _BRIDGES:
            return self._table.same_family(i, j)
        # Listed by each other, or of one id.
        (_, listed, ids), bridge = self._table._texts(i), self.relay(j)
        mutual = self.rsa_id(i)[:4] in bridge.family and bridge.rsa_id[:4] in _pieces(listed, 4)
        shared = set(_pieces(ids, 8)) & set(bridge.family_ids)
        return self.use_family_lists and mutual or self.use_family_ids and shared


class Bridges(ChosenPaths):
    """The bridges by which alone to enter the network: for one `AsyncTor(bridges=Bridges([…]))`.

    `lines`: as after Bridge in a torrc; `transports`: as after ClientTransportPlugin; or a
    Config has both.  ConfigError.
    """

    alone, _tor = True, None

    def __init__(self, lines=(), transports=(), config=None):
        if config is None:
            entries = [("UseBridges", "1", "bridges")]
            entries += [("Bridge", text, "bridge %d" % n) for n, text in enumerate(lines, 1)]
            entries += [("ClientTransportPlugin", text, "transport %d" % n)
                        for n, text in enumerate(transports, 1)]
            config = configure(entries)
        self.config, self.bridges = config, []
        self._plugins, self._tasks = {}, []
        places = {}
        for found, (_, _, where) in zip(config["Bridge"], config.lines["Bridge"]):
            bridge = Bridge()
            bridge.transport, place, bridge.rsa_id, bridge.words = found
            (bridge.address, bridge.port), bridge.where = place, where
            if place in places:
                log(WARN, "%s stands there again: the last one counts", bridge)
            if self._offers(bridge.transport) and not self._excludes(bridge):
                places[place] = bridge
        for bridge in places.values():
            bridge.index = _BRIDGES + len(self.bridges)
            self.bridges.append(bridge)
        if not self.bridges:
            raise ConfigError("ExcludeNodes names all bridges")

    def _offers(self, transport):
        found = [p for p in self.config["ClientTransportPlugin"] if transport in p[0]]
        return not transport or found

    def _excludes(self, bridge):
        nodes = self.config["ExcludeNodes"]
        found = nodes and bridge.rsa_id in nodes[0]
        if nodes and ":" not in bridge.address:
            found = is_among(bridge, nodes, self.config)
        if found:
            log(WARN, "%s is among ExcludeNodes: not used", bridge)
        return found

    def attach(self, tor):
        """Be the only way in for `tor`; ConfigError where this is another's."""
        if self._tor:
            raise ConfigError("these Bridges are another AsyncTor's: make others for this one")
        self._tor, self._state = tor, tor.data_dir + "/bridges.json"
        try:
            stored = json.loads(read_file(self._state) or b"[]")
            self._stored = [bytes.fromhex(text) for text in stored]
        except Exception:
            log(WARN, "%s is damaged: choosing among the bridges anew", self._state)
            self._stored = []
        tor.bridges, tor.directory.paths, tor._channels.link = self, self, self.link
        empty = SimpleNamespace(param=lambda name, default, *_: default, bandwidth_weights={})
        super().__init__(self.config, RelayTable(), empty, None)

    def select(self, table, consensus, path):
        """In place of a PathSelector."""
        self.update(table, consensus)
        return self

    def update(self, table, consensus):
        super().update(_BridgedTable(table, self.bridges), consensus)
        self._list_guards()

    def weigh(self, position, need, never=0):
        for i, weight in super().weigh(position, need, never):
            if i not in self._listed:
                yield i, weight

    def _list_guards(self):
        # Those that served come first, in that order; the others at random (guard-spec 4.3).
        mine, known = {b.rsa_id for b in self.bridges} - {b""}, {g.rsa_id for g in self.sample}
        for rsa_id in [r for r in self._stored if r in mine] + list(mine):
            if rsa_id not in known:
                old, at = rsa_id in self._stored, sum([g.confirmed for g in self.sample])
                at += 0 if old else randbelow(len(self.sample) - at + 1)
                self.sample.insert(at, Guard(rsa_id, 1 << 40, int(old)))
                known.add(rsa_id)
        # Those that are public relays, too.
        self._listed = {self.table._table.find(rsa_id) for rsa_id in mine}
        usable = {b.rsa_id: b.index for b in self.bridges if b.ntor_key}
        for g in self.sample:
            g.index = usable.get(g.rsa_id, -1)

    def _save(self):
        stored = [g.rsa_id.hex() for g in self.sample if g.confirmed]
        cache_file(self._state, json.dumps(stored).encode())

    def _errors(self):
        return "; ".join([str(b.error) for b in self.bridges if b.error]) or "none answered yet"

    def guard(self, *args, **named):
        if not self._order():
            raise CircuitError("no bridge can be used: " + self._errors())
        return super().guard(*args, **named)

    def link(self, address, port, rsa_id, ed_id, seconds):
        """In place of Channel: whatever asks, there is none to another relay; ChannelError."""
        for bridge in self.bridges:
            where = bridge.address, bridge.port, bridge.rsa_id
            if where == (address, port, rsa_id) and rsa_id:
                return BridgeLink(self, bridge, seconds)
        text = "%s:%d is no bridge: with UseBridges nothing goes there"
        raise ChannelError(text % (address, port))

    async def dial(self, bridge):
        """A socket to `bridge`, through its transport; ChannelError."""
        how = self._plugins.get(bridge.transport)
        if isinstance(how, Plugin):
            how = await how.method(bridge.transport)
        if not how:
            raise ChannelError("its transport is closed")
        place = bridge.address, bridge.port
        return await dial_through(*how, place, socks_arguments(bridge.words))

    def begin(self):
        """Start the plugins, and ask the bridges for their descriptors."""
        if self._tasks:
            return
        needed, self._again = {bridge.transport for bridge in self.bridges}, asyncio.Event()
        folder = os.path.abspath(self._tor.data_dir) + "/pt_state"
        for names, kind, what in self.config["ClientTransportPlugin"]:
            if needed & set(names) - self._plugins.keys():
                how = Plugin(names, what, folder) if kind == "exec" else (int(kind[-1]), what)
                self._plugins.update({name: how for name in names if name not in self._plugins})
        self._tasks = [spawn(self._keep(bridge)) for bridge in self.bridges]

    def _hoped(self):
        # Those that served before, come before any that can be used, and are being asked.
        asked = [b.rsa_id for b in self.bridges if not b.ntor_key and not b.error]
        better = self.sample[: self.sample.index(self._order()[0])]
        return [g for g in better if g.confirmed and g.rsa_id in asked]

    async def start(self):
        """Return once there is a bridge to use; ChannelError when there is none."""
        report, transports = self._tor.directory._report, [b for b in self.bridges if b.transport]
        if transports:
            report(1, "conn_pt", "Connecting to pluggable transport")
        self.begin()
        failed = lambda: all([bridge.error for bridge in self.bridges])
        if failed():
            # Whoever comes again has them tried at once.
            for bridge in self.bridges:
                bridge.error = None
            again, self._again = self._again, asyncio.Event()
            again.set()
        end = time.monotonic() + BUILD_SECONDS
        # Those that served before are better than new ones.
        while not self._order() or self._hoped() and time.monotonic() < end:
            if failed():
                raise ChannelError("no bridge can be used: " + self._errors())
            await asyncio.sleep(0.05)
        if transports:
            report(2, "conn_done_pt", "Connected to pluggable transport")

    async def _keep(self, bridge):
        # Its descriptor: it changes now and then.
        first, most = _BRIDGE_PAUSES
        pause = first
        while True:
            try:
                await self._fetch(bridge)
                bridge.error, pause, delay = None, first, _DESCRIPTOR_SECONDS
            except Exception as e:  # whatever it is, another may serve
                text = str(e) if str(bridge) in str(e) else "%s: %s" % (bridge, e)
                log(INFO if bridge.ntor_key else WARN, "%s", text)
                bridge.error, delay, pause = ChannelError(text), pause, min(2 * pause, most)
            again = self._again
            try:
                await wait_for(again.wait(), delay + randbelow(delay))
            except asyncio.TimeoutError:
                pass

    async def _fetch(self, bridge):
        channels, link = self._tor._channels, None
        try:
            if bridge.rsa_id:
                link = await channels.get(bridge.address, bridge.port, bridge.rsa_id)
            else:
                link = BridgeLink(self, bridge, BUILD_SECONDS)
                await link.opened.wait()
                bridge.rsa_id = link.rsa_id
                log(NOTICE, "Learned fingerprint %s for %s", link.rsa_id.hex().upper(), bridge)
                channels.open = dict(channels.open)
                channels.open.setdefault(link.rsa_id, link)
            circuit = Circuit(link)
            try:
                await circuit.extend(None, BUILD_SECONDS)
                text = await directory_request(circuit, "/tor/server/authority", 1 << 16)
            finally:
                circuit.close()
            found = parse_router(text, link.rsa_id, link.ed_id, now())
        finally:
            if link and link not in channels.open.values():
                link.close()
        new, bridge.ed_id = bridge.ntor_key != found.ntor_key, link.ed_id
        bridge.ntor_key, bridge.family = found.ntor_key, found.family
        bridge.family_ids = found.family_ids
        self._list_guards()
        if new:
            log(NOTICE, "new bridge descriptor of %s", bridge)

    async def close(self):
        """End what runs for the bridges, their plugins, too."""
        tasks, self._tasks, plugins, self._plugins = self._tasks, [], self._plugins, {}
        for task in tasks:
            task.cancel()
        running = {plugin for plugin in plugins.values() if isinstance(plugin, Plugin)}
        await asyncio.gather(*[plugin.close() for plugin in running])


def enter_by(tor, bridges):
    """Have `tor`, which runs, enter by these Bridges alone from now on; None: by its own guards."""
    directory, old = tor.directory, tor.bridges
    tor.bridges = directory.paths = None
    tor._channels.link = Channel
    if bridges:
        bridges.attach(tor)
        bridges.begin()
    # What is open leads elsewhere.
    tor._channels.close()
    if old:
        spawn(old.close())
    if tor.ready:
        select = bridges.select if bridges else tor.selector
        file = tor.data_dir + "/guards.json"
        tor.paths = directory.paths = select(directory.table, directory.consensus, file)


def log_writer(kind, path, options):
    """Return functions write(severity, text) and close() for a Log line; ConfigError."""
    if kind == "syslog":
        import syslog

        tag = options["SyslogIdentityTag"]
        syslog.openlog("minitor" + ("-" + tag if tag else ""))
        levels = syslog.LOG_DEBUG, syslog.LOG_INFO, syslog.LOG_NOTICE, syslog.LOG_WARNING
        levels += (syslog.LOG_ERR,)
        return lambda severity, text: syslog.syslog(levels[severity], text), syslog.closelog
    file, close = getattr(sys, kind, None), lambda: None
    if kind == "file":
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            opener = lambda name, _: os.open(name, flags, 0o600)
            file = open(path, "a", opener=opener, errors="surrogateescape")
        except OSError as e:
            raise ConfigError("cannot write the log %s: %s" % (path, e))
        close = file.close

    def write(severity, text):
        t = time.time()
        stamp = time.strftime("%b %d %H:%M:%S", time.localtime(t))
        line = "%s.%03d [%s] %s\n" % (stamp, t % 1 * 1000, _SEVERITIES[severity], text)
        file.write(line)
        file.flush()

    return write, close


# The control port (control-spec).

# As what tor controllers take minitor, and what they may ask for.
TOR_VERSION = "0.4.9.11 (minitor-%s)" % __version__
_EVENTS = (
    "ADDRMAP BUILDTIMEOUT_SET BW CELL_STATS CIRC CIRC_BW CIRC_MINOR CLIENTS_SEEN CONF_CHANGED "
    "CONN_BW DEBUG DESCCHANGED ERR GUARD HS_DESC HS_DESC_CONTENT INFO NETWORK_LIVENESS "
    "NEWCONSENSUS NEWDESC NOTICE NS ORCONN PT_LOG PT_STATUS SIGNAL STATUS_CLIENT STATUS_GENERAL "
    "STATUS_SERVER STREAM STREAM_BW TRANSPORT_LAUNCHED WARN"
).split()
_LEVELS = [name.upper() for name in _SEVERITIES]
_SIGNALS = {
    "RELOAD": "RELOAD", "HUP": "RELOAD", "SHUTDOWN": "SHUTDOWN", "INT": "SHUTDOWN",
    "HALT": "HALT", "TERM": "HALT", "DUMP": "DUMP", "USR1": "DUMP", "DEBUG": "DEBUG",
    "USR2": "DEBUG", "NEWNYM": "NEWNYM", "CLEARDNSCACHE": "CLEARDNSCACHE",
    "HEARTBEAT": "HEARTBEAT", "ACTIVE": "ACTIVE", "DORMANT": "DORMANT",
}
_CIRCUIT_REASONS = (
    "NONE TORPROTOCOL INTERNAL REQUESTED HIBERNATING RESOURCELIMIT CONNECTFAILED OR_IDENTITY "
    "CHANNEL_CLOSED FINISHED TIMEOUT DESTROYED NOSUCHSERVICE"
).split()
_SAFECOOKIE = b"Tor safe cookie authentication %s hash"


def parse_words(text):
    """Split a controller's arguments: [(name, value)], name None for what has no `=`; TorError."""
    found, at = [], 0
    pattern = re.compile(
        r'[ \t]*(?:([^ \t"=]+)=)?(?:"((?:[^"\\]|\\.)*)"(?=[ \t]|\Z)|([^ \t"]*)(?=[ \t]|\Z))')
    text = text.rstrip()
    while at < len(text):
        match = pattern.match(text, at)
        if not match or match.end() == at:
            raise TorError("Cannot parse keyword argument(s)", 512)
        value = match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
        found.append((match[1], value))
        at = match.end()
    return found


def parse_command(command, text):
    """Return arguments and words, [(name, value)], of a command in _SYNTAX; TorError."""
    least, most, names = _SYNTAX[command]
    args, words = text.split(None, most), []
    try:
        if len(args) < least:
            raise TorError("Need at least %d argument(s)" % least, 512)
        if len(args) > most:
            if names is None:
                raise TorError("Cannot accept more than %d argument(s)" % most, 512)
            words = parse_words(args.pop())
        for name, _ in words if names != "*" else ():
            if name is None or '"' in text:
                raise TorError("Cannot parse keyword argument(s)", 512)
            if names != "=" and name.lower() not in names.split():
                raise TorError('Unrecognized keyword argument "%s"' % name, 512)
    except TorError as e:
        raise TorError("Bad arguments to %s: %s" % (command, e), 512)
    return args, words


def iso_time(seconds, form="%Y-%m-%dT%H:%M:%S", zone=time.gmtime):
    return time.strftime(form, zone(seconds))


def numbered(what):
    """The number by which controllers know a circuit or stream."""
    if not hasattr(what, "number"):
        _numbers[0] += 1
        what.number, what.made = _numbers[0], time.time()
    return what.number


_numbers = [0]


def describe_circuit(circuit):
    """What follows `650 CIRC` or stands in circuit-status."""
    number = numbered(circuit)
    built = getattr(circuit, "built", False)
    state = "BUILT" if built else "EXTENDED" if circuit.path else "LAUNCHED"
    more = "BUILD_FLAGS=NEED_CAPACITY"
    if circuit.closed:
        state, reason = "CLOSED" if state == "BUILT" else "FAILED", circuit.closed.reason
        more += " REASON=" + _CIRCUIT_REASONS[reason if reason < len(_CIRCUIT_REASONS) else 0]
    relays = [relay or circuit.channel for relay in circuit.path]
    path = ",".join(["$" + relay.rsa_id.hex().upper() for relay in relays])
    if relays == [circuit.channel]:
        more = more.replace("NEED_CAPACITY", "ONEHOP_TUNNEL,IS_INTERNAL,NEED_CAPACITY")
    purpose = "HS_SERVICE_REND" if circuit.on_begin else getattr(circuit, "purpose", "GENERAL")
    made = iso_time(circuit.made) + ".%06d" % (circuit.made % 1 * 1000000)
    words = str(number), state, path, more, "PURPOSE=" + purpose, "TIME_CREATED=" + made
    return " ".join([word for word in words if word])


def _router_lines(table, i):
    # An entry as in a consensus; there is no name, and no digest of a descriptor.
    relay = table.relay(i)
    flags = [w for n, w in enumerate(FLAG_WORDS[:9]) if relay.flags >> n & 1 and w[:2] != "No"]
    flags = sorted(flags + ["Running", "Valid"])
    identity = b64encode(relay.rsa_id)
    line = "r Unnamed %s %s 2038-01-01 00:00:00 %s %d 0" % (
        identity, identity, relay.address, relay.port)
    return "%s\ns %s\nw Bandwidth=%d" % (line, " ".join(flags), table.weights[i])


def quoted_lines(text):
    """`text` as data of the control protocol."""
    lines = text.rstrip("\n").replace("\r", "").split("\n")
    return "\r\n".join(["." * (line[:1] == ".") + line for line in lines])


def reply_lines(code, lines):
    """The lines of a reply with their status `code`."""
    lines = ["%d%s%s" % (code, "-" * (line[:1] != "+"), line) for line in lines]
    return lines[:-1] + [line.replace("-", " ", 1) for line in lines[-1:]]


def end_name(error):
    """Why a stream ended, as controllers read it."""
    name = _ENDS[error.reason][0] if error and 0 < error.reason < len(_ENDS) else ""
    if isinstance(error, TorTimeout):
        return "TIMEOUT"
    if isinstance(error, StreamError) and name:
        return "END REMOTE_REASON=" + name
    return "MISC" if error else "DONE"


def _virtual(head, mask, size):
    # A random address within a network: its first bytes, the bits of the last of them that stay.
    packed = bytearray(urandom(size))
    packed[: len(head)] = head[:-1] + bytes([head[-1] | packed[len(head) - 1] & mask])
    packed[-1] = packed[-1] % 254 + 1
    return socket.inet_ntop(socket.AF_INET if size == 4 else socket.AF_INET6, bytes(packed))


# Addresses that stand for others, by what MAPADDRESS asks for, as tor's VirtualAddrNetwork….
_VIRTUAL = {
    "0.0.0.0": lambda: _virtual(b"\x7f\xc0", 63, 4),
    "::": lambda: "[%s]" % _virtual(b"\xfe\x80", 63, 16),
    ".": lambda: b32encode(urandom(10)) + ".virtual",
}
_HOST = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"


def _kind(address):
    return len(packed_address(address.strip("[]")) or b"")


class Control:
    """A controller's connection.

    Commands are functions(text, data), those in _SYNTAX functions(arguments, words), that return
    lines of a reply of 250, a whole line as text, or None: OK.
    """

    known, owner, asked, nonces = False, False, False, None

    def __init__(self, daemon, reader, writer):
        self.daemon, self.tor, self._reader, self._writer = daemon, daemon.tor, reader, writer
        self.events, self.tasks = set(), set()

    def send(self, *lines):
        # Who does not read is let go, before all that waits fills memory.
        if self._writer.transport.get_write_buffer_size() > 1 << 22:
            return self._writer.transport.abort()
        text = "".join([line + "\r\n" for line in lines])
        self._writer.write(text.encode("utf-8", "surrogateescape"))

    def event(self, name, text, data=None):
        text = " ".join(text.splitlines())
        if name in self.events and data is None:
            self.send("650 %s %s" % (name, text))
        elif name in self.events:
            self.send("650+%s %s" % (name, text), quoted_lines(data), ".", "650 OK")

    def spawn(self, coroutine):
        # Who floods finds an end.
        if len(self.tasks) >= 1000:
            coroutine.close()
            raise TorError("Resource exhausted: too much is under way", 451)
        task = spawn(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def serve(self):
        self.daemon.controls.append(self)
        try:
            name = ""
            while name != "QUIT":
                name, _, text = (await self._line()).partition(" ")
                data, name = None, name.upper()
                if name[:1] == "+":
                    data = await self._data()
                self.send(*await self._answer(name, text.strip(), data))
                await self._writer.drain()
                if not self.known and (name not in _BEFORE or name == "AUTHENTICATE"):
                    break
        finally:
            self.daemon.controls.remove(self)
            self.daemon.set_severity()
            for address, (service, owner) in list(self.daemon.onions.items()):
                if owner is self:
                    del self.daemon.onions[address]
                    await service.close()
            if self.owner:
                log(NOTICE, "The owning controller is gone: exiting.")
                self.daemon.stopping.set()

    async def _answer(self, name, text, data):
        try:
            if not self.known and name not in _BEFORE:
                raise TorError("Authentication required.", 514)
            if name not in _CONTROL:
                raise TorError('Unrecognized command "%s"' % name, 510)
            if name[:1] == "+" and not data:
                raise TorError("Bad arguments to %s: Empty body" % name, 512)
            args = parse_command(name, text) if name in _SYNTAX else (text, data)
            lines = await _CONTROL[name](self, *args)
        except TorError as e:
            code = e.reason if e.reason > 450 else 552
            return reply_lines(code, str(e).splitlines() or [""])
        if isinstance(lines, str):
            return [lines]
        return reply_lines(250, ["OK"] if lines is None else lines)

    async def _line(self):
        try:
            line = await self._reader.readline()
        except ValueError:
            line = b""  # too long
        if not line.endswith(b"\n"):
            raise EOFError
        return line.decode("utf-8", "surrogateescape").rstrip("\r\n")

    async def _data(self):
        lines, size = [], 0
        while (line := await self._line()) != ".":
            lines.append(line[line[:1] == "." :])
            size += len(line) + 1
            if size > 1 << 20 or not self.known:
                raise EOFError
        return "\n".join(lines)

    # Who it is.

    def _methods(self):
        config, found = self.daemon.config, []
        if config["CookieAuthentication"]:
            found += ["COOKIE", "SAFECOOKIE"]
        if config["HashedControlPassword"]:
            found.append("HASHEDPASSWORD")
        return found or ["NULL"]

    async def protocolinfo(self, text, data):
        if self.asked and not self.known or not "".join(text.split() + ["1"]).isdecimal():
            self.asked = None
            raise TorError("No such version %s, or asked twice" % quote_c(text), 513)
        self.asked, methods = True, self._methods()
        line = "AUTH METHODS=" + ",".join(methods)
        if "COOKIE" in methods:
            line += " COOKIEFILE=" + quote_c(self.daemon.cookie_file)
        return ["PROTOCOLINFO 1", line, 'VERSION Tor="%s"' % TOR_VERSION, "OK"]

    async def authchallenge(self, text, data):
        if not text:
            raise TorError("Bad arguments to AUTHCHALLENGE: Need at least 1 argument(s)", 512)
        match = re.fullmatch(r'SAFECOOKIE[ ]+(?:"((?:[^"\\]|\\.)*)"|([0-9a-f]*))', text, re.I)
        if not match or "COOKIE" not in self._methods() or len(match[2] or "") % 2:
            raise TorError("Cookie authentication is disabled, or the nonce is wrong", 513)
        ours, cookie = urandom(32), self.daemon.cookie
        theirs = bytes.fromhex(match[2]) if match[1] is None else match[1].encode()
        self.nonces = cookie + theirs + ours
        mac = hmac_sha256(_SAFECOOKIE % b"server-to-controller", self.nonces)
        words = mac.hex().upper(), ours.hex().upper()
        return ["AUTHCHALLENGE SERVERHASH=%s SERVERNONCE=%s" % words]

    async def authenticate(self, text, data):
        methods, config = self._methods(), self.daemon.config
        given = None
        if re.fullmatch(r"([0-9a-fA-F]{2})*", text):
            given = bytes.fromhex(text)
        elif re.fullmatch(r'"(?:[^"\\]|\\.)*"', text):
            given = re.sub(r"\\(.)", r"\1", text[1:-1]).encode("utf-8", "surrogateescape")
        # As in tor's words, which controllers look for.
        good, why = "NULL" in methods, "Authentication cookie did not match expected value."
        if config["HashedControlPassword"]:
            why = "Password did not match HashedControlPassword *or* authentication cookie."
        if given is not None and self.nonces:
            why = "Safe cookie response did not match expected value."
            kind = _SAFECOOKIE % b"controller-to-server"
            good |= consteq(given, hmac_sha256(kind, self.nonces))
        elif given is not None:
            good |= "COOKIE" in methods and consteq(given, self.daemon.cookie)
            for salt, digest in config["HashedControlPassword"]:
                good |= consteq(digest, hash_password(given, salt))
        self.nonces = None
        if not good:
            raise TorError("Authentication failed: %s" % why, 515)
        self.known = True

    # What it asks.

    async def getinfo(self, text, data):
        lines, unknown = [], []
        for key in text.split():
            value = self._info(key)
            if value is None:
                unknown.append('Unrecognized key "%s"' % key)
            elif "\n" in value or key in _LISTS and value:
                lines.append("+%s=\r\n%s\r\n." % (key, quoted_lines(value)))
            else:
                lines.append("%s=%s" % (key, value))
        if unknown:
            raise TorError("\n".join(unknown), 552)
        return lines + ["OK"]

    def _info(self, key):
        if key in _INFO:
            return _INFO[key](self)
        kind, _, what = key.rpartition("/")
        return _INFO[kind + "/"](self, what) if kind + "/" in _INFO else None

    async def getconf(self, text, data):
        config, lines, unknown = self.daemon.config, [], []
        for word in text.split():
            if word.lower() == _HIDDEN.lower():
                name, group, default = _HIDDEN, _HIDDEN, ""
            else:
                try:
                    kind, name, default = _TYPES[option_name(word).lower()]
                except ConfigError:
                    unknown.append('Unrecognized configuration key "%s"' % word)
                    continue
                group = _HIDDEN if kind == "Dependent" else name
            entries = [e for e in config.lines.get(group, ()) if name in (group, e[0])]
            for option, value, _ in entries:
                if _TYPES[option.lower()][0] in ("TimeInterval", "Integer"):
                    value = config[option]
                lines.append("%s=%s" % (option, value))
            if not entries:
                lines.append("%s=%s" % (name, default) if default else name)
        if unknown:
            raise TorError("\n".join(unknown), 552)
        return lines or ["OK"]

    async def setconf(self, args, words):
        entries = []
        for name, value in words:
            name, value = (name, value) if name else (value, "")
            try:
                option_name(name)
            except ConfigError:
                raise TorError("Unrecognized option: Unknown option '%s'.  Failing." % name, 552)
            entries.append((name if value else "/" + name, value))
        old = [e for lines in self.daemon.config.lines.values() for e in lines]
        entries = [(name, value, "controller") for name, value in entries]
        await self._configure((old, entries), 513, "Unacceptable option value")

    async def _configure(self, sources, code, text):
        try:
            config = configure(*sources)
            for name in _FIXED:
                if name in config.lines and config[name] != self.daemon.config[name]:
                    code, text = 553, "Transition not allowed"
                    raise ConfigError(name + " cannot change while minitor runs")
            await self.daemon.use(config)
        except ConfigError as e:
            raise TorError("%s: %s" % (text, " ".join(str(e).splitlines())), code)

    async def loadconf(self, text, data):
        try:
            lines = [(name, value, "controller") for name, value, _ in parse_torrc(data)]
        except ConfigError as e:
            raise TorError("Invalid config file: %s" % e, 552)
        await self._configure((lines,), 552, "Invalid config file")

    async def saveconf(self, args, words):
        if not self.daemon.torrc:
            raise TorError("Unable to write configuration to disk.", 551)
        try:
            write_file(self.daemon.torrc, config_text(self.daemon.config).encode())
        except OSError as e:
            raise TorError("Unable to write configuration to disk: %s" % e, 551)

    async def setevents(self, text, data):
        names = {name.upper() for name in text.split()} - {"EXTENDED"}
        for name in sorted(names):
            if name not in _EVENTS:
                raise TorError('Unrecognized event "%s"' % name, 552)
        self.events = names
        self.daemon.set_severity()

    async def signal(self, args, words):
        name = _SIGNALS.get(args[0].upper())
        if not name:
            raise TorError('Unrecognized signal code "%s"' % args[0], 552)
        asyncio.get_running_loop().call_soon(self.daemon.signal, name)

    async def usefeature(self, text, data):
        for name in text.split():
            if name.upper() not in _FEATURES:
                raise TorError('Unrecognized feature "%s"' % name, 552)

    # Circuits and streams.

    def _circuit(self, number):
        for circuit in self.daemon.circuits():
            if str(numbered(circuit)) == number:
                return circuit
        raise TorError('Unknown circuit "%s"' % number, 552)

    def _stream(self, number):
        for stream in self.daemon.streams():
            if str(stream.number) == number:
                return stream
        raise TorError('Unknown stream "%s"' % number, 552)

    async def closecircuit(self, args, words):
        circuit = self._circuit(args[0])
        unused = "ifunused" in [value.lower() for name, value in words if name is None]
        if not (unused and circuit.streams):
            circuit.close("closed by a controller", 3)

    async def closestream(self, args, words):
        stream, reason = self._stream(args[0]), args[1]
        if not reason.isdecimal() or len(reason) > 3 or int(reason) > 255:
            raise TorError('Unrecognized reason "%s"' % reason, 552)
        if isinstance(stream, Stream):
            # Clients say no more than MISC.
            return stream.send_end(1)
        stream.ended = int(reason)
        stream.work.cancel()

    async def attachstream(self, args, words):
        stream, circuit = self._stream(args[0]), args[1] != "0" and self._circuit(args[1])
        for _, hop in words if circuit else ():
            if not hop.isdecimal():
                raise TorError("Bad value hop=" + hop, 552)
        choice = getattr(stream, "choice", None)
        if not choice or choice.done():
            raise TorError("Connection is not managed by controller.", 555)
        if circuit and not getattr(circuit, "built", False):
            raise TorError("Can't attach stream to non-open origin circuit", 551)
        for hop in [int(hop[:9]) for _, hop in words] + [0] if circuit else ():
            if len(circuit.path) < 2 or hop == 1:
                raise TorError("Can't attach stream to this one-hop circuit.", 551)
            if hop > len(circuit.path):
                raise TorError("Circuit doesn't have %d hops." % hop, 551)
            if 0 < hop < len(circuit.path):
                raise TorError("minitor opens streams at a circuit's last hop alone.", 551)
        if circuit and (circuit.on_begin or is_onion(stream.target.rpartition(":")[0])):
            raise TorError("Unable to attach stream", 551)
        choice.set(circuit)

    async def extendcircuit(self, args, words):
        number, relays, purpose = args[0], None, ""
        # A list of relays may hold `=`, after a fingerprint.
        if words and (words[0][0] or "$")[0] == "$":
            name, names = words.pop(0)
            relays = (name + "=" if name else "") + names
        for name, value in words:
            purpose = value.upper() if (name or "").lower() == "purpose" else purpose
        if purpose and purpose not in _PURPOSES:
            raise TorError('Unknown purpose "%s"' % purpose.lower(), 552)
        circuit = number != "0" and self._circuit(number)
        if circuit and relays is None:
            raise TorError("syntax error: path required.", 512)
        path = [self._relay(name) for name in relays.split(",")] if relays is not None else []
        if not self.tor.ready:
            raise TorError("Couldn't start circuit", 551)
        if circuit:
            circuit.built = False
            self.spawn(self._extend(circuit, path))
        else:
            circuit = await self._launch(path)
            self._set_purpose(circuit, purpose or "GENERAL")
        return ["EXTENDED %d" % numbered(circuit)]

    async def _extend(self, circuit, path):
        try:
            for relay in path:
                await circuit.extend(relay, BUILD_SECONDS)
            announce("BUILT", circuit)
        except CircuitError as e:
            log(INFO, "a controller's circuit: %s", e)

    async def _launch(self, path):
        # A circuit as soon as there is one, which goes on building.
        launched = Promise()

        async def build():
            self.daemon.launching[asyncio.current_task()] = launched
            try:
                choose = lambda: path or self.tor.paths.exit_path(443)
                await close_idle(await self.tor.circuit_to(attempts=1, choose=choose))
            except TorError as e:
                log(INFO, "a controller's circuit: %s", e)
            finally:
                self.daemon.launching.pop(asyncio.current_task(), None)
                launched.set(error=TorError("Couldn't start circuit", 551))

        self.spawn(build())
        return await launched.wait()

    def _set_purpose(self, circuit, purpose):
        circuit.purpose = purpose
        # A controller's own stays, whatever its age.
        circuit.dirty_ms = NO_LIMIT if purpose == "CONTROLLER" else self.tor.dirty_ms

    async def setcircuitpurpose(self, args, words):
        circuit = self._circuit(args[0])
        purpose = dict([(name.lower(), value.upper()) for name, value in words]).get("purpose")
        if purpose not in _PURPOSES:
            text = 'Unknown purpose "%s"' % purpose.lower() if purpose else "No purpose given"
            raise TorError(text, 552)
        before = getattr(circuit, "purpose", "GENERAL")
        self._set_purpose(circuit, purpose)
        number, state, path = describe_circuit(circuit).split(" ")[:3]
        self.daemon.event("CIRC_MINOR", "%s PURPOSE_CHANGED %s PURPOSE=%s OLD_PURPOSE=%s" % (
            number, path, purpose, before))

    def _relay(self, name, text='No such router "%s"', need=USABLE):
        table, match = self.tor.directory.table, re.match(r"\$?([0-9a-fA-F]{40})(?![^~=])", name)
        i = table.find(bytes.fromhex(match[1])) if match and table else -1
        if i < 0 or not table.flags_of(i) & need:
            raise TorError(text % name, 552)
        return table.relay(i)

    async def dropguards(self, args, words):
        if self.tor.ready:
            log(WARN, "DROPGUARDS: a controller has new guards chosen, which may harm anonymity")
            self.tor.paths.sample.clear()
            self.tor.paths.update(self.tor.directory.table, self.tor.directory.consensus)

    async def droptimeouts(self, args, words):
        times = self.tor.build_times
        times.times, times._recent, times._known = [], [], None

    async def mapaddress(self, args, words):
        lines = []
        for old, new in words:
            try:
                lines.append("250-%s=%s" % (self.daemon.map_address(old, new), new))
            except TorError as e:
                lines.append("%d-%s" % (e.reason, e))
        if not lines:
            raise TorError("syntax error: not enough arguments to mapaddress.", 512)
        self.send(*lines[:-1], lines[-1].replace("-", " ", 1))
        return []

    async def resolve(self, args, words):
        back = ("mode", "reverse") in [((n or "").lower(), value.lower()) for n, value in words]

        async def ask(name):
            why = ""
            try:
                await self.daemon.ready.wait()
                found = await (self.tor.resolve_ptr if back else self.tor.resolve)(name)
            except TorError:
                found, why = ["<error>"], " error=yes"
            end, form = time.time() + 60, '"%Y-%m-%d %H:%M:%S"'
            self.daemon.event("ADDRMAP", '%s %s %s%s EXPIRES=%s CACHED="NO"' % (
                name, found[0], iso_time(end, form, time.localtime), why, iso_time(end, form)))

        for _, name in [word for word in words if word[0] is None]:
            self.spawn(ask(name))

    async def hsfetch(self, args, words):
        if not re.fullmatch(r"[a-z2-7]{56}", args[0].lower()):
            raise TorError('Invalid argument "%s"' % args[0], 513)
        try:
            key = parse_onion_address(args[0] + ".onion")
        except TorError:
            raise TorError('Invalid argument "%s"' % args[0], 513)
        lost, every = 'Server "%s" not found', (1 << 32) - 1
        servers = [(self._relay(value, lost, every).rsa_id,) for _, value in words]

        async def fetch():
            await self.daemon.ready.wait()
            for server in servers or [()]:
                self.tor.descriptors.pop(key, None)
                try:
                    await _find_descriptor(self.tor, key, *server)
                except TorError as e:
                    log(INFO, "HSFETCH: %s", e)

        self.spawn(fetch())

    # Onion services of its own.

    async def add_onion(self, args, words):
        flags, clients, lines = set(), [], [("HiddenServiceDir", "/", "")]
        for name, value in words:
            name = name.lower()
            if name == "flags":
                flags |= set(value.lower().split(",")) - {""} or {value}
            elif name == "port":
                lines.append(("HiddenServicePort", value.replace(",", " ", 1), name))
            elif name == "maxstreams":
                lines.append(("HiddenServiceMaxStreams", value, name))
            elif name == "clientauthv3":
                clients.append(value)
            elif value != "0":
                raise TorError("minitor does not have " + name, 512)
        for flag in flags - {"discardpk", "detach", "maxstreamsclosecircuit", "v3auth"}:
            raise TorError("Invalid 'Flags' argument, or one that minitor lacks: " + flag, 512)
        if "maxstreamsclosecircuit" in flags:
            lines.append(("HiddenServiceMaxStreamsCloseCircuit", "1", "flag"))
        try:
            wanted = parse_services(lines)["/"]
        except ConfigError as e:
            raise TorError("Invalid VIRTPORT/TARGET, or MaxStreams: %s" % e, 512)
        keys = self._client_keys(clients, "v3auth" in flags)
        kind, colon, blob = args[0].partition(":")
        kind = kind.upper()
        try:
            if not colon:
                raise TorError("Invalid key type/blob", 512)
            if kind == "NEW" and blob.upper() in ("BEST", "ED25519-V3"):
                esk = ed25519_expand(urandom(32))
            elif kind == "ED25519-V3":
                esk = b64decode(blob.encode(), 64)
            else:
                raise TorError("Invalid key type", 513)
        except ProtocolError:
            raise TorError("Failed to decode ED25519-V3 key", 512)
        service = OnionService(self.tor, (esk, ed25519_public(esk)), {}, keys)
        if service.address in [other.address for other in self.daemon.hosted()]:
            raise TorError("Onion address collision", 550)
        if len(self.daemon.onions) >= 1000:
            raise TorError("Failed to add Onion Service: there are 1000", 551)
        set_service(service, wanted)
        self.daemon.onions[service.address] = service, None if "detach" in flags else self
        self.daemon.start(service)
        lines = ["ServiceID=" + service.address[:56]]
        if kind == "NEW" and "discardpk" not in flags:
            lines.append("PrivateKey=ED25519-V3:" + binascii.b2a_base64(esk).decode().strip())
        return lines + ["ClientAuthV3=" + text for text in clients] + ["OK"]

    async def del_onion(self, args, words):
        try:
            address = onion_address(parse_onion_address(args[0] + ".onion"))
        except TorError:
            address = ""
        if address[:56] != args[0].lower():
            raise TorError("Malformed Onion Service id", 512)
        service, owner = self.daemon.onions.get(address, (None, None))
        if not service or owner not in (None, self):
            raise TorError("Unknown Onion Service id", 552)
        del self.daemon.onions[address]
        await service.close()

    # Client authorization.

    def _client_keys(self, texts, wanted):
        # What ClientAuthV3 says, None if there is none.
        try:
            keys = [auth_key(":" + text) for text in texts]
        except ConfigError:
            raise TorError("Cannot decode v3 client auth key", 512)
        if wanted != bool(keys):
            raise TorError("No auth %s specified" % ("clients" if wanted else "type"), 512)
        return keys or None

    def _onion(self, words, what):
        # The first of `words`, an address without .onion.
        name = words[0] if words else None
        if name is None:
            raise TorError("Incomplete %s command" % what, 512)
        try:
            parse_onion_address(name + ".onion")
        except AddressError:
            name = ""
        if len(name) != 56:
            raise TorError('Invalid v3 address "%s"' % words[0], 512)
        return name.lower() + ".onion"

    async def onion_client_auth_add(self, plain, words):
        flags, client = set(), ""
        address = self._onion(plain if len(plain) > 1 else (), "ONION_CLIENT_AUTH_ADD")
        kind, mark, blob = plain[1].partition(":")
        if mark and kind.lower() != "x25519":
            raise TorError('Unrecognized key type "%s"' % kind, 552)
        try:
            key = b64decode(blob.encode(), 32)
        except (ProtocolError, ValueError):
            raise TorError("Failed to decode x25519 private key", 512)
        try:
            auth_key(key)
        except ConfigError:
            raise TorError("Invalid private key", 553)
        for name, value in words:
            if name.lower() == "flags":
                flags |= set(value.lower().split(","))
            elif name.lower() == "clientname":
                client = value
        if flags - {"permanent"}:
            raise TorError("Invalid 'Flags' argument", 512)
        if len(client) > 16:
            raise TorError("ClientName longer than 16 chars", 512)
        before = parse_onion_address(address) in self.tor.onion_keys
        if self.daemon.keep_key(address, key, client, bool(flags)):
            return "252 Registered client and decrypted desc"
        if before:
            return "251 Client for onion existed and replaced"

    async def onion_client_auth_remove(self, text, data):
        address = self._onion(text.split(), "ONION_CLIENT_AUTH_REMOVE")
        if parse_onion_address(address) not in self.tor.onion_keys:
            return '251 No credentials for "%s"' % address[:56]
        self.daemon.forget_key(address)

    async def onion_client_auth_view(self, text, data):
        wanted = text and self._onion(text.split(), "ONION_CLIENT_AUTH_VIEW")
        lines = []
        for key, secret in self.tor.onion_keys.items():
            path, client = self.daemon.client_keys.get(key, (None, ""))
            line = "CLIENT %s x25519:%s" % (
                onion_address(key)[:56], binascii.b2a_base64(secret).decode().strip())
            line += " Flags=Permanent" * bool(path) + (client and " ClientName=" + client)
            if wanted in ("", onion_address(key)):
                lines.append(line)
        head = "ONION_CLIENT_AUTH_VIEW " + wanted[:56]
        return [head.strip()] + sorted(lines) + ["OK"]

    async def takeownership(self, text, data):
        self.owner = True

    async def dropownership(self, text, data):
        self.owner = False

    async def quit(self, text, data):
        return ["closing connection"]

    async def obsolete(self, text, data):
        raise TorError("SETROUTERPURPOSE is obsolete.", 511)


# Before who asks is known.
_BEFORE = ("PROTOCOLINFO", "AUTHCHALLENGE", "AUTHENTICATE", "QUIT")
_CONTROL = {
    "PROTOCOLINFO": Control.protocolinfo, "AUTHCHALLENGE": Control.authchallenge,
    "AUTHENTICATE": Control.authenticate, "GETINFO": Control.getinfo, "GETCONF": Control.getconf,
    "SETCONF": Control.setconf, "RESETCONF": Control.setconf, "+LOADCONF": Control.loadconf,
    "SAVECONF": Control.saveconf, "SETEVENTS": Control.setevents, "SIGNAL": Control.signal,
    "DROPGUARDS": Control.dropguards, "DROPTIMEOUTS": Control.droptimeouts,
    "MAPADDRESS": Control.mapaddress, "ATTACHSTREAM": Control.attachstream,
    "CLOSECIRCUIT": Control.closecircuit, "SETCIRCUITPURPOSE": Control.setcircuitpurpose,
    "CLOSESTREAM": Control.closestream, "EXTENDCIRCUIT": Control.extendcircuit,
    "RESOLVE": Control.resolve, "HSFETCH": Control.hsfetch, "ADD_ONION": Control.add_onion,
    "DEL_ONION": Control.del_onion, "ONION_CLIENT_AUTH_ADD": Control.onion_client_auth_add,
    "ONION_CLIENT_AUTH_REMOVE": Control.onion_client_auth_remove,
    "ONION_CLIENT_AUTH_VIEW": Control.onion_client_auth_view,
    "TAKEOWNERSHIP": Control.takeownership, "DROPOWNERSHIP": Control.dropownership,
    "USEFEATURE": Control.usefeature, "SETROUTERPURPOSE": Control.obsolete, "QUIT": Control.quit,
}  # fmt: skip
# The least and most arguments, and the names of the words after them: None: there are none;
# "*": any, also alone or quoted; "=": any with a value.
_SYNTAX = {
    "SETCONF": (0, 0, "*"), "RESETCONF": (0, 0, "*"), "SAVECONF": (0, 0, "*"),
    "SIGNAL": (1, 1, None), "MAPADDRESS": (0, 0, "="), "ATTACHSTREAM": (2, 2, "hop"),
    "CLOSECIRCUIT": (1, 1, "*"), "SETCIRCUITPURPOSE": (1, 1, "="), "EXTENDCIRCUIT": (1, 1, "*"),
    "CLOSESTREAM": (2, 9, "*"), "RESOLVE": (0, 0, "*"), "HSFETCH": (1, 1, "server"),
    "DEL_ONION": (1, 1, None), "DROPGUARDS": (0, 0, None), "DROPTIMEOUTS": (0, 0, None),
    "ADD_ONION": (1, 1, "port flags maxstreams powdefensesenabled powqueuerate powqueueburst "
                        "clientauth clientauthv3"),
    "ONION_CLIENT_AUTH_ADD": (0, 2, "="),
}  # fmt: skip
_PURPOSES = "GENERAL", "CONTROLLER"
_FEATURES = "VERBOSE_NAMES", "EXTENDED_EVENTS"


def config_text(config):
    """The lines of a torrc for `config`; as by tor, without options for the moment (__…)."""
    entries = [entry for entries in config.lines.values() for entry in entries]
    plain = re.compile(r"[^\s\"#\\][^\"#\\\n\r]*")
    return "".join([
        "%s %s\n" % (name, text if plain.fullmatch(text) else quote_c(text))
        for name, text, _ in entries if name[:2] != "__"
    ])


_NO_LISTENERS = "or", "extor", "dir", "trans", "natd", "dns", "metrics"


def _listening(control, kind):
    kinds = {"socks": "Socks", "httptunnel": "HTTP tunnel", "control": "Control"}
    if kind not in kinds and kind not in _NO_LISTENERS:
        return None
    found = control.daemon.listening.items()
    here = [what.address for key, what in found if _LISTENERS[key[0]][0] == kinds.get(kind)]
    return " ".join(['"%s"' % address for address in here])


def _routers(control, which):
    table = control.tor.directory.table
    if which is None:
        indexes = [i for i, _, _ in table.rows()] if table else ()
        return "\n".join([_router_lines(table, i) for i in indexes])
    rsa_id = which.lstrip("$").partition("~")[0]
    if not table or not re.fullmatch("[0-9a-fA-F]{40}", rsa_id):
        return None
    i = table.find(bytes.fromhex(rsa_id))
    return _router_lines(table, i) if i >= 0 else None


def _mappings(control):
    return "\n".join(["%s %s NEVER" % pair for pair in control.daemon.mapping.items()])


def _descriptor_limit(control):
    import resource

    return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _refused(text, code=551):
    def info(control, what=None):
        raise TorError(text, code)

    return info


def _country(control, address):
    packed = packed_address(address) or b""
    if len(packed) != 4:
        raise TorError("No country is known of " + address, 551)
    return control.daemon.config.country(uint(packed)).lower()


def _guards(control):
    paths = control.tor.ready and control.tor.paths
    return "\n".join([
        "$%s %s" % (g.rsa_id.hex().upper(),
                    "down" if g.down() else "up" if g.confirmed else "never-connected")
        for g in (paths.sample if paths else ())
    ])


def _onions(control, mine):
    found = control.daemon.onions.items()
    return "\n".join([address[:56] for address, (_, owner) in found if owner is mine])


def _time_of(name):
    def info(control):
        consensus = control.tor.directory.consensus
        return iso_time(getattr(consensus, name), "%Y-%m-%d %H:%M:%S") if consensus else ""

    return info


def _random_value(control, i):
    consensus = control.tor.directory.consensus
    value = consensus and (consensus.srv_previous, consensus.srv_current)[i]
    return binascii.b2a_base64(value).decode().strip() if value else ""


_INFO = {
    "version": lambda c: TOR_VERSION,
    "accounting/enabled": lambda c: "0",
    "address-mappings/all": _mappings,
    "address-mappings/control": _mappings,
    "address-mappings/cache": lambda c: "",  # none is kept
    "address-mappings/config": lambda c: "",
    "config-file": lambda c: c.daemon.torrc or "",
    "config-can-saveconf": lambda c: "%d" % bool(c.daemon.torrc),
    "config-defaults-file": lambda c: "",
    "config-text": lambda c: config_text(c.daemon.config).rstrip("\n"),
    "config/names": lambda c: "\n".join(sorted([_HIDDEN + " Virtual"] + [
        "%s %s" % (t[1], t[0].replace("Ignored", "String")) for t in _TYPES.values()])),
    "config/defaults": lambda c: "\n".join(["SocksPort 9050"] + sorted([
        "%s %s" % option[1:] for option in _TYPES.values() if option[2]])),
    "info/names": lambda c: "\n".join(sorted([
        "%s%s -- see control-spec" % (key, "*" * (key[-1] == "/")) for key in _INFO])),
    "events/names": lambda c: " ".join(_EVENTS),
    "signal/names": lambda c: " ".join(_SIGNALS),
    "features/names": lambda c: " ".join(_FEATURES),
    "process/descriptor-limit": _descriptor_limit,
    "process/pid": lambda c: str(os.getpid()),
    "process/uid": lambda c: str(os.getuid()),
    "process/user": lambda c: os.environ.get("USER", ""),
    "bw-event-cache": lambda c: " ".join(["%d,%d" % moved for moved in c.daemon.bandwidth]),
    "traffic/read": lambda c: str(traffic[0]),
    "traffic/written": lambda c: str(traffic[1]),
    "uptime": lambda c: "%d" % (time.time() - c.daemon.started),
    "dormant": lambda c: "0",
    "network-liveness": lambda c: "up" if c.tor.ready else "down",
    "circuit-status": lambda c: "\n".join(map(describe_circuit, c.daemon.circuits())),
    "stream-status": lambda c: "\n".join([
        "%d %s %d %s" % (stream.number, getattr(stream, "state", "SUCCEEDED"),
                         numbered(stream.circuit) if stream.circuit else 0, stream.target)
        for stream in c.daemon.streams()]),
    "orconn-status": lambda c: "\n".join([
        "$%s %s" % (channel.rsa_id.hex().upper(),
                    "CONNECTED" if channel.opened.done() else "LAUNCHED")
        for channel in c.daemon.channels()]),
    "entry-guards": _guards,
    "helper-nodes": _guards,
    "net/listeners/": _listening,
    "ip-to-country/": _country,
    "ip-to-country/ipv6-available": lambda c: "0",
    "ip-to-country/ipv4-available": lambda c: "1" if os.path.exists(
        c.daemon.config["GeoIPFile"]) else "0",
    "ns/all": lambda c: _routers(c, None),
    "ns/id/": _routers,
    "ns/purpose/": lambda c, purpose: "",
    "consensus/valid-after": _time_of("valid_after"),
    "consensus/fresh-until": _time_of("fresh_until"),
    "consensus/valid-until": _time_of("valid_until"),
    "current-time/local": lambda c: iso_time(time.time(), zone=time.localtime),
    "current-time/utc": lambda c: iso_time(time.time()),
    "sr/current": lambda c: _random_value(c, 1),
    "sr/previous": lambda c: _random_value(c, 0),
    # What only relays have, or what is not kept here: microdescriptors are compiled at once.
    "address": _refused("Address unknown"),
    "address/": _refused("Address unknown"),
    "fingerprint": _refused("Not running in server mode"),
    "exit-policy/full": _refused("Not running in server mode", 552),
    "desc/all-recent": lambda c: "",
    "desc/download-enabled": lambda c: "0",
    "desc/id/": _refused("minitor fetches microdescriptors, not router descriptors", 552),
    "desc/name/": _refused("minitor fetches microdescriptors, not router descriptors", 552),
    "md/all": lambda c: "",
    "md/download-enabled": lambda c: "1",
    "hs/client/desc/id/": _refused("Not found in cache"),
    "hs/service/desc/id/": _refused("Not found in cache"),
    "dir/status-vote/current/consensus": _refused("Could not open cached consensus."),
    "dir/status-vote/current/consensus-microdesc": _refused("Could not open cached consensus."),
    "limits/max-mem-in-queues": lambda c: "0",
    "onions/current": lambda c: _onions(c, c),
    "onions/detached": lambda c: _onions(c, None),
    "status/bootstrap-phase": lambda c: c.daemon.phase,
    "status/circuit-established": lambda c: "%d" % bool(c.tor.ready),
    "status/enough-dir-info": lambda c: "%d" % bool(c.tor.directory.consensus),
    "status/version/recommended": lambda c: "?",
    "status/version/current": lambda c: "recommended",
}
# Several lines even where there is one.
_LISTS = ("circuit-status", "stream-status", "orconn-status", "entry-guards", "ns/all",
          "config/names", "config/defaults", "info/names", "config-text")


# What a running daemon keeps.
_FIXED = (
    "DataDirectory DirAuthority FallbackDir PidFile RunAsDaemon SyslogIdentityTag "
    "TestingTorNetwork User"
).split()
_ENTRY = "UseBridges", "Bridge", "ClientTransportPlugin", "ExcludeNodes"
_LISTENERS = {
    "SocksPort": ("Socks", "socks"),
    "HTTPTunnelPort": ("HTTP tunnel", "http"),
    "ControlPort": ("Control", None),
    "ControlSocket": ("Control", None),
}
_ADDRESS_TEXT = re.compile(r"\b[a-z2-7]{56}\.onion\b") if not MICROPYTHON else None


_OWN_SOCKET = "/minitor_control"


class ControlListener:
    """A port for controllers, as a Proxy is for programs; `known`: who come need no password."""

    def __init__(self, daemon, where, flags="", known=False):
        self._daemon, self._to, self._known = daemon, parse_listener(where, flags), known
        try:
            self._socket, self.address = _bind(self._to)
        except OSError as e:
            raise ConfigError("cannot listen at %s: %s" % (where, e))
        config = daemon.config
        open_to_all = self._to.path and "worldwritable" in self._to.on
        if not self._to.path and not is_loopback(self._to.host):
            log(WARN, "%s: others can reach this control port", self.address)
        if not (known or self._to.path and not open_to_all or config["CookieAuthentication"]
                or config["HashedControlPassword"]):
            log(WARN, "%s: whoever reaches this control port controls minitor: set "
                "CookieAuthentication or HashedControlPassword", self.address)

    async def start(self):
        start = asyncio.start_unix_server if self._to.path else asyncio.start_server
        self._server = await start(self._serve, sock=self._socket, limit=1 << 16)
        return self

    async def _serve(self, reader, writer):
        try:
            control = Control(self._daemon, reader, writer)
            control.known = self._known
            await control.serve()
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # it went away, or sent a line without end; or this ends
        except Exception as e:
            log(ERR, "bug: %s at the control port: %s", type(e).__name__, e)
            if _log[0] == DEBUG:
                print_exception(e)
        finally:
            writer.close()

    def close(self):
        self._server.close()
        if self._to.path and os.path.exists(self._to.path):
            os.unlink(self._to.path)


class Daemon:
    """What a torrc, the file `torrc`, describes, running; `load`: makes its Config anew."""

    running, _own = False, None
    phase, cookie = 'NOTICE BOOTSTRAP PROGRESS=0 TAG=starting SUMMARY="Starting"', None

    def __init__(self, config, load, torrc=None):
        self.config, self._load, self.torrc = config, load, torrc
        self.ready, self.stopping, self.started = Promise(), Promise(), time.time()
        # `onions`: {address: (OnionService, the Control whose it is, or None)}.
        # `client_keys`: {identity key: (its file or None, a controller's name)} of tor.onion_keys.
        self.controls, self.onions, self.client_keys = [], {}, {}
        # {(option, where, flags): what listens}, {folder: OnionService}.
        self.listening, self.services, self._logs = {}, {}, []
        # `opening`: {number: Isolation of a stream that is not open yet}; `launching`: {task:
        # Promise of the Circuit that it builds}; `mapping`: {address: the one in its place};
        # `bandwidth`: bytes read and written in the last seconds.
        self.opening, self.launching, self.mapping, self.bandwidth = {}, {}, {}, []
        self.open_logs(config)
        self._lock = self._take_folder()
        network = ["DirAuthority " + text for text in config["DirAuthority"]]
        bridges = self._bridges(config)
        self.tor = tor = AsyncTor(self.folder, network or None, self._progress, 0, bridges)
        network = tor.directory.network
        network.testing = network.testing or config["TestingTorNetwork"]
        network.fallbacks = config["FallbackDir"] or network.fallbacks
        self._mirrors = network.fallbacks, network.authorities
        self._keep_from(config)
        tor.selector = lambda *args: ChosenPaths(self.config, *args)
        build = tor.circuit_to

        async def circuit_to(target=None, *args, **named):
            if target and self.config["StrictNodes"] and tor.paths.excluded(target):
                raise CircuitError("StrictNodes: it is among ExcludeNodes: " + target.address)
            lists = tor.paths.config
            circuit = await build(target, *args, **named)
            if tor.paths.config is not lists:
                raise circuit.close("the lists of relays are others now")
            return circuit

        tor.circuit_to = circuit_to
        self._watch_streams(tor)

    def _watch_streams(self, tor):
        # Controllers are told of the streams of AsyncTor, and may map and attach them.
        opens, finds, finds_names, takes = (
            tor.open_connection, tor.resolve, tor.resolve_ptr, tor._circuit)

        async def resolve(host, wish):
            return [host] if packed_address(host) else await finds(host, wish)

        def open_connection(host, port, timeout=120, isolation=None, *more):
            use = lambda host, wish: opens(host, port, timeout, wish, *more)
            return self._open(use, host, port, isolation)

        tor.open_connection = open_connection
        tor.resolve = lambda host, isolation=None: self._open(resolve, host, 0, isolation)
        tor.resolve_ptr = lambda host, isolation=None: self._open(finds_names, host, 0, isolation)
        tor._circuit = lambda key, port, wish=None: self._attach(takes, key, port, wish)

    async def _open(self, use, host, port, isolation):
        # What is no address shall not look like more words of an event.
        check_target(host, port or 443)
        wish, kind, more = Isolation(isolation or ()), "" if port else "RESOLVE", " REASON=DONE"
        wish.target, wish.circuit, wish.ended, wish.tries = "%s:%d" % (host, port), None, 0, 0
        self.opening[numbered(wish)] = wish
        source = getattr(isolation, "source", "")
        self.tell(wish, "NEW" + kind, source + " PURPOSE=" + ("USER" if port else "DNS_REQUEST"))
        try:
            mapped = self.mapped(host)
            if mapped != host:
                wish.target = "%s:%d" % (mapped, port)
                self.tell(wish, "REMAP", " SOURCE=CACHE")
            wish.work = asyncio.ensure_future(use(mapped, wish))
            found = await wish.work
            self.tell(wish, "SUCCEEDED")
            if port:
                found[0].number, found[0].target, more = wish.number, wish.target, ""
            return found
        except asyncio.CancelledError:
            # Its client is gone, or a controller closed it.
            if not wish.ended:
                raise
            error = StreamError("closed by a controller", wish.ended)
            more = " REASON=" + end_name(error).rpartition("=")[2]
            raise error
        except TorError as e:
            more = " REASON=" + end_name(e)
            self.tell(wish, "FAILED", more)
            raise
        finally:
            del self.opening[wish.number]
            if more:
                self.tell(wish, "CLOSED", more)

    async def _attach(self, take, key, port, wish):
        # A circuit for a stream: one that `take` finds or, where they do that, a controller.
        if not isinstance(wish, Isolation):
            return await take(key, port, wish)
        if wish.tries:
            ended = wish.circuit.closed
            why = "DESTROY" if ended else end_name(StreamError("", wish.circuit.refusal))
            self.tell(wish, "DETACHED", " REASON=" + why)
        wish.circuit, wish.tries = None, wish.tries + 1
        if self.config["__LeaveStreamsUnattached"]:
            wish.choice = Promise()
            self.tell(wish, "CONTROLLER_WAIT")
            try:
                wish.circuit = await wish.choice.wait(PROXY_SECONDS)
            except asyncio.TimeoutError:
                raise TorTimeout("no controller attached the stream within %d s" % PROXY_SECONDS)
        if wish.circuit:
            wish.circuit.since = ticks_ms()
        else:
            wish.circuit = await take(key, port, tuple(wish))
        self.tell(wish, "SENTCONNECT" if wish.target[-2:] != ":0" else "SENTRESOLVE")
        return wish.circuit

    def tell(self, stream, state, more=""):
        """Tell controllers that a stream is in this state."""
        stream.state = state
        number = numbered(stream.circuit) if stream.circuit else 0
        words = stream.number, state, number, stream.target, more
        self.event("STREAM", "%d %s %d %s%s" % words)

    def streams(self):
        """The streams, and those that are wanted."""
        streams = [s for c in self.circuits() for s in c.streams.values() if hasattr(s, "number")]
        return streams + list(self.opening.values())

    def mapped(self, host):
        """The address in the place of `host`, by MAPADDRESS."""
        for _ in range(16):
            before, host = host, self._mapped(host)
            if host == before:
                break
        return host

    def _mapped(self, host):
        key = host.lower()
        labels = key.split(".")
        found = [(self.mapping.get(key), 0)]
        found += [(self.mapping.get("*." + ".".join(labels[i:])), i) for i in range(len(labels))]
        for new, i in found:
            if new and new[:2] == "*.":
                return ".".join(labels[:i] + [new[2:]])
            if new:
                return new
        return host

    def map_address(self, old, new):
        """Put `new` in the place of `old` (control-spec 3.8), which is returned; TorError."""
        text = "syntax error: invalid address mapping  '%s=%s': %%s" % (old, new)
        name = new[2:] if new[:2] == "*." else new
        if name.strip(_HOST) and not packed_address(name.strip("[]")) and new != "*":
            raise TorError("syntax error: invalid address '%s'" % new, 512)
        if "*" in (old, new):
            raise TorError(text % "can't remap from or to *", 512)
        if new[:2] == "*." and old[:2] != "*.":
            raise TorError(text % "only a wildcard can become one", 512)
        if old in _VIRTUAL:
            fresh = _VIRTUAL[old]()
            alike = [a for a, to in self.mapping.items() if to == new and _kind(a) == _kind(fresh)]
            old = (alike + [fresh])[0]
        if len(self.mapping) >= 10000:
            raise TorError("resource exhausted: skipping '%s=%s'" % (old, new), 451)
        key = old.lower().strip("[]")
        self.mapping.pop(key, None)
        if new and key != new.lower().strip("[]"):
            self.mapping[key] = new.strip("[]")
            self.event("ADDRMAP", '%s %s NEVER CACHED="YES"' % (old, new))
        return old

    def _keep_from(self, config):
        # Ask none of ExcludeNodes for the directory.
        network = self.tor.directory.network
        network.fallbacks, network.authorities = [mirrors(p, config) for p in self._mirrors]

    def _bridges(self, config):
        return Bridges(config=config) if config["UseBridges"] else None

    def _progress(self, *what):
        log(NOTICE, "Bootstrapped %d%% (%s): %s", *what)
        self.phase = 'NOTICE BOOTSTRAP PROGRESS=%d TAG=%s SUMMARY="%s"' % what
        self.event("STATUS_CLIENT", self.phase)

    def event(self, *what):
        for control in self.controls:
            control.event(*what)

    def channels(self):
        return [c for c in list(self.tor._channels.open.values()) if not c.closed]

    def circuits(self):
        return [circuit for c in self.channels() for circuit in list(c.circuits.values())]

    def hosted(self):
        return list(self.services.values()) + [service for service, _ in self.onions.values()]

    def _watch(self, name, subject, *more):
        # What `announce` tells, as controllers have it.
        if name == "BUILT":
            name, subject.built = "CIRC", True
        elif name == "CIRC" and self.launching:
            launched = self.launching.get(asyncio.current_task())
            if launched:
                launched.set(subject)
        if not self.controls:
            pass
        elif name == "STREAM":
            if hasattr(subject, "number"):
                self.tell(subject, "CLOSED", " REASON=" + end_name(subject._error))
        elif name == "CIRC":
            self.event(name, describe_circuit(subject))
        elif name == "ORCONN":
            known = "$" + subject.rsa_id.hex().upper() if subject.rsa_id else "%s:%d" % (
                subject.address, subject.port)
            self.event(name, "%s %s" % (known, more[0]))
        elif name[:3] == "PT_":
            self.event(name, "PT=%s %s" % (subject, more[0]))
        elif name == "HS_DESC":
            words = [more[0], onion_address(subject)[:56], "UNKNOWN", "$" + more[1].hex().upper()]
            words += [b64encode(more[2])] if more[2:] else []
            failed = more[0] == "FAILED"
            self.event(name, " ".join(words + (["REASON=" + more[3]] if failed else [])))
            if more[0] == "RECEIVED" or failed and more[3] == "NOT_FOUND":
                words = words[1], words[4], words[3]
                text = "" if failed else more[3].decode("utf-8", "replace")
                self.event("HS_DESC_CONTENT", " ".join(words), text)

    async def _measure(self):
        # BW: bytes in the last second.
        while True:
            before = traffic[:]
            await asyncio.sleep(1)
            moved = traffic[0] - before[0], traffic[1] - before[1]
            self.bandwidth = self.bandwidth[-299:] + [moved]
            self.event("BW", "%d %d" % moved)

    def _make_cookie(self, config):
        self.cookie_file = path = config["CookieAuthFile"] or self.folder + "/control_auth_cookie"
        self.cookie = self.cookie or urandom(32)
        try:
            write_file(path, self.cookie)
            if config["CookieAuthFileGroupReadable"]:
                os.chmod(path, 0o640)
        except OSError as e:
            raise ConfigError("cannot write the CookieAuthFile %s: %s" % (path, e))

    def signal(self, name):
        """Do what the signal of that name (control-spec 3.7) asks for."""
        if name == "RELOAD":
            spawn(self.reload())
        elif name in ("SHUTDOWN", "HALT"):
            self.stopping.set()
        elif name == "NEWNYM":
            self.tor.newnym()
            # As tor.
            self._forget_keys(lambda path: not path)
        elif name == "DEBUG":
            self._logs = [(range(5), write, close) for _, write, close in self._logs]
            self.set_severity()
        elif name == "DUMP":
            log(NOTICE, "%d links, %d circuits, %d bytes read, %d bytes written",
                len(self.channels()), len(self.circuits()), *traffic)
        self.event("SIGNAL", name)

    def _take_folder(self):
        # tor's file and lock, too.
        import fcntl

        self.folder = self.config["DataDirectory"] or folders(None, None)[0]
        try:
            private_dir(self.folder)
            lock = open(self.folder + "/lock", "a")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("another process uses the DataDirectory " + self.folder)
        except OSError as e:
            raise ConfigError("the DataDirectory %s cannot be used: %s" % (self.folder, e))
        return lock

    def open_logs(self, config):
        """Log to where `config` says; ConfigError."""
        logs, specs = [], config["Log"]
        if not specs and not config["RunAsDaemon"]:
            specs = [parse_log("notice stdout")]
        for levels, kind, path in specs:
            if kind not in ("stdout", "stderr") or not config["RunAsDaemon"]:
                logs.append((levels,) + log_writer(kind, path, config))
        for _, _, close in self._logs:
            close()
        self._logs = logs
        self.set_severity()

    def set_severity(self):
        """Log what some log, or a controller, wants."""
        wanted = {ERR}.union(*[levels for levels, _, _ in self._logs])
        wanted |= {_LEVELS.index(n) for c in self.controls for n in c.events if n in _LEVELS}
        set_log(min(wanted), self._log)

    def _log(self, severity, text):
        if self.config["SafeLogging"] == "1":
            text = _ADDRESS_TEXT.sub("[scrubbed]", text)
        for levels, write, _ in self._logs:
            if severity in levels:
                try:
                    write(severity, text)
                except (OSError, ValueError):
                    pass  # a full disk, or a closed terminal
        self.event(_LEVELS[severity], text)

    async def open_listeners(self, config):
        """Listen where `config` says, and nowhere else; ConfigError."""
        wanted = [(option,) + place for option in _LISTENERS for place in config[option]]
        if not config.lines.get("SocksPort"):
            wanted.append(("SocksPort", "9050", ""))
        for key in set(self.listening) - set(wanted):
            log(NOTICE, "Closing the %s listener on %s", _LISTENERS[key[0]][0], key[1])
            self.listening.pop(key).close()
        for key in wanted:
            if key not in self.listening:
                self.listening[key] = found = await self._listen(config, *key)
                name = _LISTENERS[key[0]][0]
                log(NOTICE, "Opened %s listener connection (ready) on %s", name, found.address)
        if config["ControlPortWriteToFile"]:
            self._write_ports(config)

    async def _listen(self, config, option, where, flags):
        if where[:5] == "unix:" and config[
            "UnixSocksGroupWritable" if option == "SocksPort" else "ControlSocketsGroupWritable"
        ]:
            flags += " GroupWritable"
        kind = _LISTENERS[option][1]
        if kind:
            return await Proxy(kind, where, flags).start(self.tor)
        return await ControlListener(self, where, flags).start()

    def _write_ports(self, config):
        path = config["ControlPortWriteToFile"]
        found = [what.address for key, what in self.listening.items() if key[0][:7] == "Control"]
        lines = ["UNIX_PORT=" + a[5:] if a[:5] == "unix:" else "PORT=" + a for a in found]
        try:
            write_file(path, "".join([line + "\n" for line in lines]).encode())
            os.chmod(path, 0o640 if config["ControlPortFileGroupReadable"] else 0o600)
        except OSError as e:
            raise ConfigError("cannot write the file %s: %s" % (path, e))

    def open_services(self, config):
        """Host what `config` says, in place of what runs; ConfigError."""
        for folder, wanted in config[_HIDDEN].items():
            service = self.services.get(folder)
            if not service:
                service = self.services[folder] = OnionService(self.tor, folder, {})
                self.start(service)
            else:
                service.admit(load_clients(folder))
            set_service(service, wanted)
        for folder in self.services.keys() - config[_HIDDEN].keys():
            spawn(self.services.pop(folder).close())

    def open_keys(self, config):
        """Have the keys for client authorization that `config` names; ConfigError."""
        folder = config["ClientOnionAuthDir"]
        found = load_onion_keys(folder) if folder else {}
        self._forget_keys(lambda path: path)
        for identity, (key, path) in found.items():
            self.tor.add_onion_key(onion_address(identity), key)
            self.client_keys[identity] = path, ""

    def _forget_keys(self, which):
        for identity, (path, _) in list(self.client_keys.items()):
            if which(path):
                del self.client_keys[identity]
                self.tor.add_onion_key(onion_address(identity), None)

    def keep_key(self, address, key, client, permanent):
        """Have a controller's key of a client; as add_onion_key; TorError."""
        identity, path = parse_onion_address(address), None
        if permanent:
            folder = self.config["ClientOnionAuthDir"]
            path = self.client_keys.get(identity, (None,))[0]
            path = path or "%s/%s.auth_private" % (folder, address[:56])
            try:
                if not folder:
                    raise OSError("there is no ClientOnionAuthDir")
                write_file(path, ("%s:%s\n" % (address[:56], auth_text(key))).encode())
            except OSError as e:
                log(WARN, "a client's key was not kept: %s", e)
                raise TorError('Unable to store creds for "%s"' % address[:56], 553)
        self.client_keys[identity] = path, client
        return self.tor.add_onion_key(address, key)

    def forget_key(self, address):
        """Forget the key of a client, its file, too."""
        path, _ = self.client_keys.pop(parse_onion_address(address), (None, ""))
        self.tor.add_onion_key(address, None)
        try:
            if path:
                os.unlink(path)
        except OSError as e:
            log(WARN, "%s cannot be removed: %s", path, e)

    def start(self, service):
        """Have a service published, once there is a network."""

        async def start():
            try:
                await self.ready.wait()
                if service not in self.hosted():
                    return
                self.tor.services.append(service)
                await service.start()
                log(NOTICE, "%s is reachable", service.address)
            except TorError as e:
                log(INFO, "%s: %s", service.address, e)

        spawn(start())

    async def use(self, config):
        """Take over a Config, or, ConfigError, keep the old one."""
        for name in _FIXED:
            if config[name] != self.config[name]:
                log(WARN, "%s cannot change while minitor runs: it stays as it was", name)
                config[name] = self.config[name]
        try:
            self.open_logs(config)
            used = config["UseBridges"] or self.config["UseBridges"]
            entry = used and [n for n in _ENTRY if config[n] != self.config[n]]
            bridges = self._bridges(config) if entry else None
            if config["CookieAuthentication"]:
                self._make_cookie(config)
            await self.open_listeners(config)
            self.open_services(config)
            self.open_keys(config)
        except ConfigError:
            if self.running:
                self.open_logs(self.config)
                await self.open_listeners(self.config)
            raise
        self.running = True
        self._tell_changes(config)
        changed = [name for name in _OF_PATHS if config[name] != self.config[name]]
        self.config = config
        self.tor.dirty_ms = 1000 * config["MaxCircuitDirtiness"]
        self.tor.pause = config["NewCircuitPeriod"]
        if changed:
            self._keep_from(config)
        if entry:
            enter_by(self.tor, bridges)
        if changed and self.ready.done():
            paths, directory = self.tor.paths, self.tor.directory
            paths.config = config
            paths.update(directory.table, directory.consensus)
            # As tor: what was built by other lists takes no new stream.
            self.tor.newnym()
            for circuit in (self.tor._exits or []) + self.tor._spares:
                circuit.close("the lists of relays are others now")

    def _tell_changes(self, config):
        lines, old, new = [], self.config.lines, config.lines
        for group in sorted(set(old) | set(new)):
            before, after = [[e[:2] for e in both.get(group, ())] for both in (old, new)]
            if before != after:
                lines += ["650-%s=%s" % entry for entry in after] or ["650-" + group]
        for control in self.controls if lines else ():
            if "CONF_CHANGED" in control.events:
                control.send("650-CONF_CHANGED", *lines, "650 OK")

    async def reload(self):
        log(NOTICE, "Received reload signal (hup). Reloading config and resetting internal state.")
        try:
            await self.use(self._load() if self.config["__ReloadTorrcOnSIGHUP"] else self.config)
        except TorError as e:
            log(ERR, "The configuration stays as it was: %s", e)

    async def _bootstrap(self):
        delay = 2
        while not self.ready.done():
            try:
                # As `start`, but what listens stays.
                await self.tor._bootstrap()
                break
            except (OSError, TorError) as e:
                log(WARN, "Not connected to Tor: %s; trying again in %d s", e, delay)
                self.tor._channels.close()
            await asyncio.sleep(delay)
            delay = min(2 * delay, 300)
        self.tor.ready = True
        self.ready.set()
        self.event("STATUS_CLIENT", "NOTICE ENOUGH_DIR_INFO")
        self.event("STATUS_CLIENT", "NOTICE CIRCUIT_ESTABLISHED")

    async def _watch_owner(self):
        # __OwningControllerProcess: who started it ended.
        while True:
            await asyncio.sleep(3)
            try:
                os.kill(self.config["__OwningControllerProcess"], 0)
            except ProcessLookupError:
                return self.stopping.set()
            except OSError:
                pass

    async def run(self, ready):
        """Run until a signal ends it; `ready()` is called once it listens."""
        import signal

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stopping.set)
        numbers = {"HUP": signal.SIGHUP, "USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2}
        for name, number in numbers.items():
            loop.add_signal_handler(number, self.signal, _SIGNALS[name])
        watchers.append(self._watch)
        config, tasks = self.config, []
        try:
            await self.use(config)
            if config["PidFile"]:
                self._write_pid(config["PidFile"])
            try:
                # For --stop and the like: in a folder that only the owner reaches.
                own = ControlListener(self, "unix:" + self.folder + _OWN_SOCKET, "", True)
                self._own = await own.start()
            except ConfigError as e:
                log(WARN, "--status, --newnym and --stop will not reach this one: %s", e)
            ready()
            tasks += spawn(self._bootstrap()), spawn(self._measure())
            if config["__OwningControllerProcess"]:
                tasks.append(spawn(self._watch_owner()))
            await self.stopping.wait()
            log(NOTICE, "Catching signal TERM, exiting cleanly.")
        finally:
            await self._shut_down(tasks)

    def _write_pid(self, path):
        try:
            with open(path, "w") as f:
                f.write("%d\n" % os.getpid())
        except OSError as e:
            raise ConfigError("cannot write the PidFile %s: %s" % (path, e))

    async def _shut_down(self, tasks):
        watchers.remove(self._watch)
        for task in tasks:
            task.cancel()
        for server in list(self.listening.values()) + [self._own] * bool(self._own):
            server.close()
        await self.tor.aclose()
        for path in (self.config["PidFile"], self.config["ControlPortWriteToFile"]):
            if path and os.path.exists(path):
                os.unlink(path)
        # The lock goes with the process.
        for _, _, close in self._logs:
            close()


def become(user):
    """Go on as this user alone; ConfigError."""
    import pwd

    try:
        entry = pwd.getpwnam(user)
        if os.getuid() != entry.pw_uid:
            os.initgroups(user, entry.pw_gid)
            os.setgid(entry.pw_gid)
            os.setuid(entry.pw_uid)
    except (KeyError, OSError) as e:
        raise ConfigError("cannot become the User %s: %s" % (user, e))


def daemonize():
    """Go on in the background; return what tells the caller, who waits, that all is well."""
    end, ours = os.pipe()
    sys.stdout.flush()
    if os.fork():
        os.close(ours)
        os._exit(0 if os.read(end, 1) else 1)
    os.close(end)
    os.setsid()
    if os.fork():
        os._exit(0)

    def ready():
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.write(ours, b"1")
        os.close(ours)

    return ready


# Of tor's command line: whether an argument follows.
_COMMANDS = {
    "-f": 1, "--torrc-file": 1, "--defaults-torrc": 1, "--hash-password": 1, "--verify-config": 0,
    "--list-torrc-options": 0, "--ignore-missing-torrc": 0, "--allow-missing-torrc": 0,
    "--quiet": 0, "--hush": 0, "--stop": 0, "--newnym": 0, "--status": 0,
}
_REQUESTS = {
    "--stop": "SIGNAL SHUTDOWN",
    "--newnym": "SIGNAL NEWNYM",
    "--status": (
        "GETINFO version process/pid uptime status/bootstrap-phase net/listeners/socks "
        "net/listeners/httptunnel net/listeners/control traffic/read traffic/written"
    ),
}


def ask_running(folder, request):
    """Return the lines with which the daemon in a DataDirectory answers; ConfigError."""
    lines, stops = [], request == _REQUESTS["--stop"]
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(15)
            s.connect(folder + _OWN_SOCKET)
            # Who is told to stop hangs up when all is done.
            s.sendall((request + "\r\n" + "QUIT\r\n" * (not stops)).encode())
            with s.makefile() as f:
                for line in f:
                    lines.append(line.strip())
    except OSError as e:
        if not (stops and lines):
            raise ConfigError("no minitor answers in the DataDirectory %s: %s" % (folder, e))
    return [line[4:] for line in lines if line[3:4] == "-"]


def parse_arguments(argv):
    """Return ({command: argument}, lines for `configure`) of tor's arguments; ConfigError."""
    commands, lines, at = {}, [], 0
    while at < len(argv):
        word, at = argv[at], at + 1
        key = re.sub("^--?", "", word)
        follows = _COMMANDS.get(word, key[:1] != "/" and word != "--diverse")
        if follows and at == len(argv):
            raise ConfigError("%s needs a value" % word)
        value = argv[at] if follows else ""
        at += bool(follows)
        if word == "--diverse":
            lines.append(("EnforceDistinctCountries", "1", word))
        elif word in _COMMANDS:
            commands["-f" if word == "--torrc-file" else word] = value
        else:
            lines.append((key, value, "argument"))
    return commands, lines


def is_for_daemon(argv):
    """Tell whether these arguments are as tor's."""
    names = [re.sub("^--?[+/]?", "", word).lower() for word in argv[:1]]
    return bool(set(argv) & _COMMANDS.keys()) or bool(set(names) & _TYPES.keys())


def run_daemon(argv):
    """Do as tor with these arguments; return the exit status."""
    commands, lines = parse_arguments(argv)
    if "--hash-password" in commands:
        salt = urandom(8) + b"\x60"
        digest = hash_password(commands["--hash-password"].encode(), salt)
        return print("16:" + (salt + digest).hex().upper()) or 0
    if "--list-torrc-options" in commands:
        return print("\n".join(sorted([name for _, name, _ in _TYPES.values()]))) or 0
    path = commands.get("-f")
    path = path if path in (None, "-") else _path(path)
    given = sys.stdin.read() if path == "-" else None
    missing = {"--ignore-missing-torrc", "--allow-missing-torrc"} & commands.keys()

    def load():
        sources = [[("Log", "warn stdout", "")]] if {"--hush", "--quiet"} & commands.keys() else []
        for name, text in ((commands.get("--defaults-torrc"), None), (path, given)):
            if name and not (missing and name == path and not os.path.exists(name)):
                sources.append(read_torrc(name, text))
        return configure(*sources, lines)

    config = load()
    if "--verify-config" in commands:
        return print("Configuration was valid") or 0
    for command in _REQUESTS.keys() & commands.keys():
        folder = config["DataDirectory"] or folders(None, None)[0]
        return print(*ask_running(folder, _REQUESTS[command]), sep="\n") or 0
    if config["User"]:
        become(config["User"])
    ready = daemonize() if config["RunAsDaemon"] else lambda: None
    asyncio.run(Daemon(config, load, path if given is None else None).run(ready))
    return 0


# === 18. Peers ===
# Messages between identified peers that survive disconnects, over transports that can be exchanged.
#
# A transport is any object with
#     async dial(address, seconds): a stream; TorErrors, as `_told_apart` tells
#     async listen(accept): from then on await accept(stream) in a task for each connection, and
#         close it when that returns
#     address: what others dial, known after `listen`
#     async close()
# and a stream one with async read(n): up to `n` bytes, b"" at the end; async write(data); close();
# `private`: whether nobody on the way can read or change it.  They raise OSError or TorError.

if not MICROPYTHON:
    from collections import deque

PEER_PORT = 7717
# As long may the other end take what is left.
_CLOSE_SECONDS = 5


def load_identity(key):
    """(expanded secret key, public key) of a HiddenServiceDir (its path, made if it is not
    there), of a seed of 32 bytes, or of such a pair; ConfigError."""
    if isinstance(key, str):
        return load_service_key(key)
    if isinstance(key, (bytes, bytearray)) and len(key) == 32:
        esk = ed25519_expand(bytes(key))
        return esk, ed25519_public(esk)
    if not isinstance(key, tuple) or [len(part) for part in key] != [64, 32]:
        raise ConfigError("an identity is a folder, a seed of 32 bytes, or a pair of keys")
    return key


def split_address(address, port=PEER_PORT):
    """Host and port of "HOST[:PORT]"; AddressError."""
    host, given = address, str(port)
    if address[:1] == "[" and address[-1:] != "]" or address.count(":") == 1:
        host, _, given = address.rpartition(":")
    if not given.isdecimal() or len(given) > 5:
        raise AddressError("%s: no port is behind the colon" % address)
    host = host.strip("[]")
    check_target(host, int(given))
    return host, int(given)


class PeerStream:
    """A transport's stream, over a reader and a writer as asyncio's."""

    def __init__(self, reader, writer, private):
        self._writer, self.read, self.private = writer, reader.read, private

    async def write(self, data):
        self._writer.write(data)
        await self._writer.drain()

    def close(self):
        self._writer.close()
        transport = getattr(self._writer, "transport", None)
        if transport:
            # Who takes nothing would keep it for ever.
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, transport.abort)


async def _told_apart(opening, address, seconds):
    # What a coroutine returns that opens a connection.
    task = asyncio.ensure_future(opening)
    try:
        return await wait_for(task, seconds)
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and not task.exception():
            task.result()[1].close()  # it has come about in this very moment
        raise
    except asyncio.TimeoutError:
        raise TorTimeout("%s did not answer in %s s" % (address, seconds))
    except (OnionError, StreamError) as e:
        if isinstance(e, AuthorizationError):
            raise
        raise PeerError("%s cannot be reached, is it up? %s" % (address, e), e.reason)
    except (ChannelError, CircuitError, DirectoryError) as e:
        raise NetworkError("Tor does not get to %s: %s" % (address, e), e.reason)
    except OSError as e:
        import errno

        down = errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL
        if e.errno in down:
            raise NetworkError("no network leads from here to %s: %s" % (address, e))
        raise PeerError("%s cannot be reached, is it up? %s" % (address, e))


class DirectTransport:
    """Bare TCP between IP addresses: whoever watches sees who talks to whom.

    `where`: IP address and port (0: any) to listen at; `address`: what others dial, if not that.
    """

    def __init__(self, where="127.0.0.1:0", address=None):
        self._where, self.address, self._server = where, address, None

    async def dial(self, address, seconds=120):
        host, port = split_address(address)
        if not packed_address(host):
            raise AddressError("%s: a direct connection is to an IP address and port" % address)
        opening = asyncio.open_connection(host, port, limit=1 << 18)
        return PeerStream(*await _told_apart(opening, address, seconds), False)

    async def listen(self, accept):
        to = parse_listener(self._where)
        private = self._trusts(to.host)

        async def serve(reader, writer):
            try:
                await accept(PeerStream(reader, writer, private))
            except asyncio.CancelledError:
                pass  # the program ends: asyncio 3.11 would print it
            finally:
                writer.close()

        try:
            bound, address = _bind(to)
        except OSError as e:
            raise ConfigError("cannot listen at %s: %s" % (self._where, e))
        self._server = await asyncio.start_server(serve, sock=bound, limit=1 << 18)
        self.address = self.address or address

    def _trusts(self, host):
        return False

    async def close(self):
        if self._server:
            self._server.close()


class SocksTransport(DirectTransport):
    """Through the SOCKS port `proxy` ([ADDRESS:]PORT or unix:PATH) of a running tor, best with its
    flag ExtendedErrors; each connection has a circuit of its own.

    `where`: to listen at, as its HiddenServicePort says; `address`: that onion service's.
    """

    def __init__(self, proxy="9050", where="127.0.0.1:0", address=None):
        DirectTransport.__init__(self, where, address)
        self._proxy = parse_listener(proxy)

    def _trusts(self, host):
        # Who gets there came through tor, or is on this machine.
        return is_loopback(host)

    async def dial(self, address, seconds=120):
        host, port = split_address(address)
        if not is_onion(host):
            raise AddressError("%s is no onion address" % address)
        parse_onion_address(host)
        opening = self._ask(host.encode(), port, address)
        private = bool(self._proxy.path) or self._trusts(self._proxy.host)
        return PeerStream(*await _told_apart(opening, address, seconds), private)

    async def _ask(self, host, port, address):
        to = self._proxy
        try:
            if to.path:
                opening = asyncio.open_unix_connection(to.path, limit=1 << 18)
            else:
                opening = asyncio.open_connection(to.host, to.port, limit=1 << 18)
            reader, writer = await opening
        except OSError as e:
            raise ProxyError("no proxy at %s:%d: %s" % (to.path or to.host, to.port, e))
        try:
            writer.write(b"\5\2\0\2")
            method = await reader.readexactly(2)
            if method == b"\5\2":
                # IsolateSOCKSAuth.
                writer.write(b"\1\7minitor\x10" + urandom(8).hex().encode())
                method = b"\5" + (await reader.readexactly(2))[1:]
            if method != b"\5\0":
                raise ProxyError("the proxy refuses: " + method.hex())
            writer.write(b"\5\1\0\3" + bytes([len(host)]) + host + pack(">H", port))
            _, code, _, kind = await reader.readexactly(4)
            size = {1: 4, 4: 16, 3: 0}.get(kind, 0) or (await reader.readexactly(1))[0]
            await reader.readexactly(size + 2)
            if code:
                raise _socks_error(code, address)
            return reader, writer
        except BaseException as e:
            writer.close()
            if isinstance(e, (EOFError, OSError)):
                raise ProxyError("the proxy hung up: %s" % e)
            raise


def _socks_error(code, address):
    # RFC 1928 and proposal 304.
    text = "%s: SOCKS error %02X" % (address, code)
    if code in (0xF4, 0xF5):
        return AuthorizationError(text + ", it admits some clients alone", code)
    kinds = {3: NetworkError, 4: PeerError, 5: PeerError, 6: TorTimeout, 0xF6: AddressError,
             0xF7: TorTimeout}
    if code in kinds or code >= 0xF0:
        return kinds.get(code, PeerError)(text + ": is it up?", code)
    return ProxyError(text, code)


class TorTransport:
    """Through `tor` (AsyncTor, or Tor) in this process; `key`: see load_identity, needed to
    listen: the onion service's; `others`: its other ports, as of create_onion_service."""

    def __init__(self, tor, key=None, port=PEER_PORT, others=()):
        self._tor, self._port, self._others = getattr(tor, "_tor", tor), port, dict(others)
        self._key, self._service = key and load_identity(key), None
        self.address = key and "%s:%d" % (onion_address(self._key[1]), port)

    async def dial(self, address, seconds=120):
        host, port = split_address(address)
        if not is_onion(host):
            raise AddressError("%s is no onion address" % address)
        # A circuit of its own: the last one may be what failed.
        opening = self._tor.open_connection(host, port, seconds, object())
        return PeerStream(*await _told_apart(opening, address, seconds), True)

    async def listen(self, accept):
        serve = lambda reader, writer: accept(PeerStream(reader, writer, True))
        port = self._port
        if self._others:
            port = dict(self._others)
            port[self._port] = serve
        self._service = await self._tor.create_onion_service(port, serve, self._key)

    async def close(self):
        if self._service:
            await self._service.close()


class HybridTransport:
    """Through `tor`, a transport; directly, by the transport `direct`, to peers for whom that was
    allowed and who are not reached so.  Listens at both."""

    def __init__(self, tor, direct):
        self._tor, self._direct, self._allowed = tor, direct, {}

    def allow(self, address, direct):
        """Let what is dialled as `address` be dialled as `direct`; None: not any more."""
        self._allowed[address] = direct

    async def dial(self, address, seconds=120):
        try:
            return await self._tor.dial(address, seconds)
        except TorError:
            if not self._allowed.get(address):
                raise
            return await self._direct.dial(self._allowed[address], seconds)

    async def listen(self, accept):
        await self._direct.listen(accept)
        await self._tor.listen(accept)

    @property
    def address(self):
        return self._tor.address

    async def close(self):
        await self._tor.close()
        await self._direct.close()


# The handshake (SIGMA-I): D dials R, whose key it knows.  `|` is concatenation.
#     D: M1 = "mnlink1" | private (1 byte) | X, and SHA3("… hint" | R | M1) in 16 bytes
#     R: M2 = private | Y                       R is silent towards who does not know its key.
#     Both: th = SHA3(name | R | M1 | M2), keys = HKDF(DH(x, Y), th); records below are sealed.
#     R: signature by R of name | " responder" | th
#     D: D | signature by D of name | " dialer" | th | D | state
#     R: state
# Messages afterwards are sealed, too, unless both say that the connection is private: that is
# signed, so none can bring a private end to talk in the clear to one that is not.
# A record is its length in 4 bytes and, sealed, ciphertext and 16 bytes of HMAC-SHA256 over its
# number and the ciphertext.  In it are frames: START, ACK, PING, PONG, BYE with 8 bytes, and LAST
# and MORE with a length in 4 bytes: a message's last unit and others.  Units are counted from 1.

_NAME, _MAGIC = b"minitor link 1", b"mnlink1"
_START, _ACK, _PING, _PONG, _BYE, _LAST, _MORE = range(1, 8)
UNIT = 1 << 16
_MOST_RECORD = 3 * UNIT
# What a unit costs in memory beside its bytes.
_COST = 200
# As long a handshake may take, and the way to the peer; so many may be going on; the least that
# may be on the way; so much, or for so long, is taken before that is acknowledged.
HANDSHAKE_SECONDS, DIAL_SECONDS, _GREETINGS = 30, 120, 64
_WINDOW, _ACK_BYTES, _ACK_SECONDS = 1 << 22, 1 << 21, 0.5
_STATE = ">8sI16s16sQQQB"


class _Seal:
    # One direction of a sealed connection.
    def __init__(self, keys):
        self._aes, self._count = AesCtr(keys[:16], keys[16:32]), 0
        pad = keys[32:] + bytes(32)
        self._hashes = [hashlib.sha256(bytes([b ^ x for b in pad])) for x in (0x36, 0x5C)]

    def _tag(self, text):
        inner, outer = [h.copy() for h in self._hashes]
        inner.update(pack(">Q", self._count))
        inner.update(text)
        self._count += 1
        outer.update(inner.digest())
        return outer.digest()[:16]

    def seal(self, data):
        text = self._aes.crypt(data)
        return text + self._tag(text)

    def open(self, data):
        text = data[:-16]
        require(consteq(self._tag(text), data[-16:]), "a record is not as the peer sent it")
        return self._aes.crypt(text)


class _Pipe:
    # A connection and what belongs to it: `hello`, the peer's state; `count` of the last unit.
    def __init__(self, stream, private):
        self.stream, self.private, self._data, self._at = stream, private, b"", 0
        self._out = self._in = self.hello = self.count = self.asked = None
        self.over, self.tasks, self.dialed = asyncio.Event(), [], False
        self.heard, self.said, self.pinged, self.pong = time.monotonic(), 0, 0, b""

    async def take(self, n):
        left = len(self._data) - self._at
        if left < n:
            pieces = [self._data[self._at :]]
            while left < n:
                pieces.append(await self.stream.read(1 << 16))
                if not pieces[-1]:
                    raise EOFError("the peer hung up")
                left += len(pieces[-1])
                self.heard = time.monotonic()
            self._data, self._at = b"".join(pieces), 0
        self._at += n
        return self._data[self._at - n : self._at]

    async def read(self):
        n = uint(await self.take(4))
        require(n <= _MOST_RECORD, "a record is too long")
        data = await self.take(n)
        return self._in.open(data) if self._in else data

    def write(self, *pieces):
        data = b"".join(pieces)
        if self._out:
            data = self._out.seal(data)
        return self.stream.write(pack(">I", len(data)) + data)

    def seal(self, secret, th, dialed):
        """Seal records by what both ends know now; `dialed`: at the end that dialled."""
        keys = hkdf_sha256(secret, th, _NAME, 128)
        ends = [_Seal(keys[:64]), _Seal(keys[64:])]
        self._out, self._in = ends if dialed else ends[::-1]

    def open(self, private):
        if private and self.private:
            self._out = self._in = None


def _hint(public, m1):
    return sha3_256(_NAME + b" hint" + public + m1)[:16]


async def _greet(pipe, key, peer, state):
    # The dialling end: the peer's state in bytes.
    (esk, public), (x, X) = key, x25519_keypair()
    m1 = _MAGIC + bytes([pipe.private]) + X
    await pipe.stream.write(m1 + _hint(peer, m1))
    try:
        m2 = await pipe.take(33)
    except EOFError:
        raise WrongPeer("who answers is not %s, or does not want to" % onion_address(peer))
    require(m2[0] < 2, "bad handshake")
    th = sha3_256(_NAME + peer + m1 + m2)
    pipe.seal(x25519(x, m2[1:]), th, True)
    if not ed25519_verify(peer, _NAME + b" responder" + th, await pipe.read()):
        raise WrongPeer("who answers is not " + onion_address(peer))
    proof = ed25519_sign(esk, public, _NAME + b" dialer" + th + public)
    # What this end has by now.
    await pipe.write(public, proof, state())
    answer = await pipe.read()
    pipe.open(m2[0])
    return answer


async def _welcome(pipe, key):
    # The end that was dialled: the peer's key, its state in bytes, whether its end is private.
    esk, public = key
    head = await pipe.take(len(_MAGIC) + 49)
    m1 = head[:-16]
    known = m1[:7] == _MAGIC and m1[7] < 2 and consteq(head[-16:], _hint(public, m1))
    require(known, "who dials does not know this key")
    y, Y = x25519_keypair()
    m2 = bytes([pipe.private]) + Y
    th = sha3_256(_NAME + public + m1 + m2)
    secret = x25519(y, m1[8:])
    await pipe.stream.write(m2)
    pipe.seal(secret, th, False)
    await pipe.write(ed25519_sign(esk, public, _NAME + b" responder" + th))
    proof = await pipe.read()
    peer = proof[:32]
    text = _NAME + b" dialer" + th + peer
    require(peer != public and ed25519_verify(peer, text, proof[32:96]), "a false signature")
    return peer, proof[96:], m1[7]


def _parse_state(data):
    names = "life ups id theirs taken got limit kept".split()
    require(len(data) >= 69, "a handshake is too short")
    state = SimpleNamespace(**dict(zip(names, unpack_from(_STATE, data))))
    state.protocol = data[69:].decode("utf-8", "replace")
    return state


class _Journal:
    # What a link keeps on disk: records of a checksum (CRC-32), length, kind, number, bytes.
    # S: the session of what is sent; M, m: a unit that is a message's last, or not; U: up to
    # there it was on the way to that life of the peer; A: acknowledged; L: up to there lost; R: of
    # so many lost ones the sender was told; T: up to there the peer's session was taken here.
    def __init__(self, path, sync):
        self._path, self._sync, self._written, self._synced = path, sync, 0, 0
        self._least = 1 << 20
        self.id, self.base, self.sent, self.units, self.lost = None, 1, 0, {}, []
        self.theirs, self.taken, self.life, self._fd = bytes(16), 0, b"", None
        try:
            private_dir(os.path.dirname(path))
            self._fd = self._opened(path, 0)
            self._size = self._load(read_file(path) or b"")
            os.ftruncate(self._fd, self._size)
            if not self.id:
                self.id = urandom(16)
                self.write(_journal_record(b"S", 0, self.id))
        except (OSError, LinkError) as e:
            if self._fd is not None:
                os.close(self._fd)
            raise ConfigError("the journal %s cannot be used: %s" % (path, e))

    def _opened(self, path, flags):
        # Locked, until it is closed.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o600)
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise ConfigError("another process uses the journal " + path)
        return fd

    def _load(self, data):
        # Up to what was torn when power or process ended; a message is whole, or none.
        at = whole = 0
        while len(data) - at >= 17:
            crc, size, kind, number = unpack_from(">IIcQ", data, at)
            end = at + 17 + size
            if end > len(data) or binascii.crc32(data[at + 4 : end]) != crc:
                break
            body, at = data[at + 17 : end], end
            whole = whole if kind == b"m" else end
            if kind == b"S":
                self.id, self.base = body, number + 1
            elif kind == b"T":
                self.theirs, self.taken = body, number
            elif kind == b"U":
                self.life, self.sent = body, number
            elif kind == b"R":
                self.lost = self.lost[number:]
            elif kind in (b"A", b"L"):
                gone = [self.units.pop(n) for n in range(self.base, number + 1) if n in self.units]
                self.lost += _messages(gone) if kind == b"L" else []
                self.base, self.sent = number + 1, max(self.sent, number)
            else:
                self.units[number] = kind == b"m", body
        while self.units and self.units[max(self.units)][0]:
            del self.units[max(self.units)]
        return whole

    def write(self, *records):
        """Append records; LinkError, and then it is as if that was not tried."""
        data = b"".join(records)
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError("the disk is full")
        except OSError as e:
            os.ftruncate(self._fd, self._size)
            raise LinkError("the journal %s cannot be written: %s" % (self._path, e))
        self._size += len(data)
        self._written += 1

    async def sync(self):
        """Have all on the disk before anything leaves."""
        if self._sync and self._synced < self._written:
            written, fd = self._written, os.dup(self._fd)  # `tidy` may exchange it meanwhile
            syncing = asyncio.get_running_loop().run_in_executor(None, os.fsync, fd)
            syncing.add_done_callback(lambda _: os.close(fd))
            await asyncio.wait([syncing])
            syncing.result()
            self._synced = max(self._synced, written)

    def tidy(self, base, units, lost, theirs, taken):
        """Write it anew where most of it is over."""
        if self._size < self._least:
            return
        kept = sum([len(unit) for _, unit in units.values()]) + sum([len(text) for text in lost])
        if self._size < (1 << 20) + 2 * kept:
            return
        first, partial = base - len(lost), self._path + ".new"
        pieces = [_journal_record(b"S", first - 1, self.id), _journal_record(b"T", taken, theirs)]
        pieces += [_journal_record(b"M", first + i, text) for i, text in enumerate(lost)]
        pieces += [_journal_record(b"L", base - 1), _journal_record(b"U", self.sent, self.life)]
        pieces += _unit_records(units)
        old, written = self._fd, self._written
        try:
            self._fd = self._opened(partial, os.O_TRUNC)
            try:
                for piece in pieces:
                    if os.write(self._fd, piece) != len(piece):
                        raise OSError("the disk is full")
                os.fsync(self._fd)
                replace(partial, self._path)
            except OSError:
                os.close(self._fd)
                os.unlink(partial)
                raise
        except (OSError, ConfigError) as e:
            # The one there is goes on.
            self._fd, self._least = old, 2 * self._size
            return log(WARN, "the journal %s cannot be written anew: %s", self._path, e)
        os.close(old)
        self._size, self._least = sum([len(piece) for piece in pieces]), 1 << 20
        self._synced = written

    def close(self, forget=False, *records):
        """`forget`: nothing in it matters to the next start."""
        try:
            self.write(*records)
            if forget:
                os.unlink(self._path)
        except (OSError, LinkError) as e:
            log(WARN, "the journal %s: %s", self._path, e)
        os.close(self._fd)


def _journal_record(kind, number, body=b""):
    rest = pack(">IcQ", len(body), kind, number) + body
    return pack(">I", binascii.crc32(rest)) + rest


def _messages(units):
    # Of units as (whether more follow, bytes).
    messages, parts = [], []
    for more, unit in units:
        parts.append(unit)
        if not more:
            messages.append(b"".join(parts))
            parts = []
    return messages


def _unit_records(units):
    return [_journal_record(b"m" if more else b"M", n, unit) for n, (more, unit) in units.items()]


class Link:
    """A channel for messages (bytes) to the peer with the Ed25519 key `peer`; see Node.link.

        await link.send(b"...")         waits while too much is not acknowledged
        async for message in link: ...  each once, in order; ends when the link is closed
        await link.flush()              until the peer's application took all of it
        await link.close()              flushes for some seconds

    A message is acknowledged when the peer's application takes it, and kept until then; after a
    cut the link is up again by itself.  When the peer started anew without a journal, what was
    sent and not acknowledged may be lost: the next `send` or `flush` raises a LinkError, with these
    messages in `lost`; nothing more is sent by that call, and the link goes on.

    `up`; `error`: the last; `round_trip` in seconds; `buffered`: bytes that are kept.
    """

    def __init__(self, node, peer, protocol):
        self.node, self.peer, self.protocol, self.address = node, peer, protocol, None
        self.error = self.round_trip = self._pipe = self._keeper = self._journal = None
        self.retry, self.closed, self.lagging = True, False, False
        self._changed, self._arrived, self._wake = [asyncio.Event() for _ in range(3)]
        self._turn, self._life, self._ups = asyncio.Lock(), urandom(8), 0
        # Out: {number: (whether more follow, unit)}; the first; the next to be queued, and to go;
        # the last that ever went; bytes kept, and on the way; so many may be.
        self._id, self._units, self._base, self._next, self._at = urandom(16), {}, 1, 1, 1
        self._sent = self.buffered = self._flying = self._acked = 0
        self._window, self._limit, self._mark, self._trips = _WINDOW, node.buffer, 0, []
        self._lost, self._raised, self._gaps, self._bye = [], 0, 0, False
        # In: the peer's session, its last unit here and the last one taken, as was told; messages
        # as (session, number, bytes, cost); units of one that is not complete; bytes of both.
        self._theirs, self._got, self._taken, self._told = bytes(16), 0, 0, 0
        self._their_life, self._fresh, self._dropped, self._stale = b"", True, False, 0
        self._inbox, self._parts, self._unread = deque(), [], 0
        self._due = self._timer = None
        # Whether an acknowledgement is waited for, here, and there.
        self._hurry = self._pressed = False
        if node.journal:
            name = onion_address(peer)[:56] + ("." + protocol.encode().hex()) * bool(protocol)
            journal = self._journal = _Journal("%s/%s" % (node.journal, name), node.fsync)
            self._id, self._units, self._base = journal.id, journal.units, journal.base
            self._next = self._at = max(journal.units, default=self._base - 1) + 1
            self._sent, self._theirs, self._lost = journal.sent, journal.theirs, journal.lost
            self._their_life = journal.life
            self._got = self._taken = journal.taken
            self._fresh = not self._taken
            self.buffered = sum([len(unit) + _COST for _, unit in self._units.values()])

    up = property(lambda self: self._pipe is not None)

    def __repr__(self):
        return "<Link to %s, %s>" % (onion_address(self.peer), "up" if self.up else "down")

    # Sending.

    def _check(self):
        if self._raised and self._journal and not self.closed:
            self._journal.write(_journal_record(b"R", self._raised))
        # Who calls again has heard of these.
        self._lost = self._lost[self._raised :]
        self._raised = len(self._lost)
        if self._lost:
            lost = list(self._lost)
            why = "the link was closed" if self.closed else "the peer started anew"
            error = LinkError("%s: %d messages may be lost" % (why, len(lost)))
            error.lost = lost
            raise error
        if self.closed or self._bye:
            raise LinkError("the link is closed: %s" % (self.error or "by this end"))

    async def _change(self):
        self._changed.clear()
        await self._changed.wait()

    async def send(self, message):
        """Have a message sent; waits for room.  ConfigError: it is too large; LinkError."""
        n = len(message)
        count = n // UNIT + 1 if n % UNIT or not n else n // UNIT
        cost = n + count * _COST
        if n > self.node.largest or cost > min(self._limit, self.node.buffer):
            raise ConfigError("a message of %d bytes is too large" % n)
        async with self._turn:
            self._check()
            while self.buffered and self.buffered + cost > self.node.buffer:
                self._hurry = True
                self._wake.set()
                await self._change()
                self._check()
            units, message, n = {}, bytes(message), self._next
            for i in range(count):
                unit = message[i * UNIT : (i + 1) * UNIT] if count > 1 else message
                units[n + i] = i < count - 1, unit
            if self._journal:
                self._journal.write(*_unit_records(units))
            self._units.update(units)
            self._next += count
            self.buffered += cost
        self._wake.set()

    async def flush(self, seconds=None):
        """Wait until the peer's application took all that was sent; LinkError, TorTimeout."""
        last = self._next
        self._hurry = self._base < last
        self._wake.set()
        try:
            await wait_for(self._flushed(last), seconds)
        except asyncio.TimeoutError:
            raise TorTimeout("%d bytes are not acknowledged after %s s" % (self.buffered, seconds))

    async def _flushed(self, last):
        self._check()
        gaps = self._gaps
        while self._base < last:
            await self._change()
            self._check()
            if gaps != self._gaps:
                raise LinkError("messages may be lost: another call was told which")

    async def ready(self, seconds=DIAL_SECONDS):
        """Wait until it is up; the last failure's TorError, or TorTimeout, after `seconds`."""

        async def wait():
            while not self._pipe:
                if self.closed:
                    raise self.error or LinkError("the link is closed")
                await self._change()

        try:
            await wait_for(wait(), seconds)
        except asyncio.TimeoutError:
            raise self.error or TorTimeout("the link is not up after %s s" % seconds)
        return self

    # Receiving.

    def __aiter__(self):
        return self

    async def _arrival(self):
        while not self._inbox and not self.closed:
            self._arrived.clear()
            await self._arrived.wait()

    async def __anext__(self):
        while True:
            await self._arrival()
            if self._inbox:
                return self._take()
            if self.closed:
                raise StopAsyncIteration

    async def receive(self, seconds=None):
        """Return the next message; LinkError when the link was closed, TorTimeout."""
        while not self._inbox:
            try:
                await wait_for(self._arrival(), seconds)
            except asyncio.TimeoutError:
                raise TorTimeout("no message came in %s s" % seconds)
            if self.closed and not self._inbox:
                raise LinkError("the link is closed: %s" % (self.error or "by this end"))
        return self._take()

    def _take(self):
        session, number, message, cost = self._inbox[0]
        if session == self._theirs:
            if self._journal:
                self._journal.write(_journal_record(b"T", number, session))
            self._taken = number
            self._tidy()
            self._acknowledge(cost)
        self._inbox.popleft()
        self._unread -= cost
        return message

    def _acknowledge(self, cost):
        # With the next that is sent; at once where the peer may be waiting; or soon, but not often,
        # as over Tor each cell that goes the other way delays those that come.
        self._told += cost
        pressed = self._pressed and len(self._inbox) == 1
        if pressed or self._told >= min(_ACK_BYTES, self.node.limit() // 2):
            self._due = True
            self._wake.set()
        elif not self._timer:
            self._timer = asyncio.get_running_loop().call_later(_ACK_SECONDS, self._ack_now)

    def _ack_now(self):
        self._timer, self._due = None, True
        self._wake.set()

    # One connection after another.

    def _state(self):
        # What the other end has to know (`_parse_state`).
        limit, kept = self.node.limit(), self._journal is not None
        # Before its first START, a session may have told another life of this end what it sent.
        theirs = bytes(16) if self._fresh else self._theirs
        state = self._life, self._ups, self._id, theirs, self._taken, self._got, limit, kept
        return pack(_STATE, *state)

    def _wins(self, pipe):
        # Whether a connection takes the place of the one there is.  Both ends decide alike: who
        # dials has none, so a second one from there replaces the first.  Of two that were dialled
        # at once, from both sides, that of the smaller key stays.
        old, hello = self._pipe, pipe.hello
        if not old or old.dialed == pipe.dialed or old.hello.life != hello.life:
            return True
        return hello.ups > old.hello.ups or pipe.dialed == (self.node.key < self.peer)

    def _resume(self, hello):
        """Learn what the peer has, and where to go on; ProtocolError."""
        same = hello.life == self._their_life
        if hello.theirs == self._id:
            require(hello.taken <= hello.got <= self._sent, "the peer has what was never sent")
            self._confirm(hello.taken)
            self._at = max(hello.got + 1, self._base)
        elif hello.theirs == bytes(16) and (same or self._base == 1 and hello.kept):
            # It has nothing of this, for sure.
            self._at = self._base
        else:
            self._give_up(self._sent)
            self._at = self._base
        self._flying = sum([self._cost(n) for n in range(self._base, self._at)])
        if hello.id != self._theirs:
            require(self._unread <= self.node.buffer, "too many sessions")
            self._theirs, self._fresh = hello.id, True
            self._forget_parts()
            self._got = self._taken = 0
            self._stale, self._dropped = self._unread, False
            if self._journal:
                self._journal.write(_journal_record(b"T", 0, hello.id))
                self._tidy()
        self._their_life, self._limit = hello.life, hello.limit
        whole = 0
        for number, (more, _) in self._units.items():
            whole += self._cost(number)
            require(whole <= self._limit, "the peer takes %d bytes at most" % self._limit)
            whole *= more

    def _cost(self, number):
        return len(self._units[number][1]) + _COST

    def _give_up(self, last):
        # What may have arrived, and may not; to the end of a message that was begun.
        while last >= self._base and self._units[last][0]:
            last += 1
        lost = _messages([self._units[n] for n in range(self._base, last + 1)])
        if lost:
            self._lost += lost
            self._gaps += 1
            self._sent = max(self._sent, last)
            self._confirm(last, b"L")

    def _confirm(self, number, kind=b"A"):
        # Up to there all is done with.
        if number < self._base:
            return
        for n in range(self._base, number + 1):
            cost = self._cost(n)
            self.buffered -= cost
            if n < self._at:
                self._flying -= cost
                self._acked += cost
            del self._units[n]
        self._base, self._at = number + 1, max(self._at, number + 1)
        if self._journal:
            self._journal.write(_journal_record(kind, number))
            self._tidy()
        self._changed.set()
        self._wake.set()

    def _tidy(self):
        if self._journal:
            self._journal.tidy(self._base, self._units, self._lost, self._theirs, self._taken)

    def _install(self, pipe):
        """Go on over this connection; ProtocolError, or PeerError where another one has won."""
        if self.closed or not self._wins(pipe):
            raise PeerError("another connection to that peer is there")
        self._cut(self._pipe, None)
        self._resume(pipe.hello)
        self._pipe, self.error = pipe, None
        self._ups += 1
        self._acked, self._mark = 0, time.monotonic()
        pipe.tasks = [spawn(self._read(pipe)), spawn(self._write(pipe)), spawn(self._watch(pipe))]
        self._changed.set()
        self._tell("up")

    def _cut(self, pipe, error):
        # End a connection, whatever is on the way.
        if not pipe or pipe.over.is_set():
            return
        if error and not isinstance(error, TorError):
            error = PeerError("the connection ended: %s" % error)
        pipe.over.set()
        pipe.stream.close()
        for task in pipe.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if pipe is self._pipe:
            self._pipe, self.error = None, error
            self._changed.set()
            self._tell("down", error)

    def _tell(self, event, detail=None):
        if self.node.on_event:
            try:
                self.node.on_event(self, event, detail)
            except Exception as e:
                log(ERR, "bug: %s as %s was told: %s", type(e).__name__, event, e)

    async def _write(self, pipe):
        try:
            await pipe.write(pack(">BQ", _START, self._at))
            while True:
                self._wake.clear()
                frames = self._frames(pipe)
                if not frames:
                    if self._bye:
                        break
                    await self._wake.wait()
                    continue
                if self._journal:
                    await self._journal.sync()
                await pipe.write(*frames)
            # The other end hangs up when it has all.
            await pipe.write(pack(">BQ", _BYE, 0))
        except (OSError, EOFError, TorError) as e:
            self._cut(pipe, e)

    def _frames(self, pipe):
        # What is due, about UNIT bytes of it at most.
        frames, size = [], 0
        while self._at < self._next and size < UNIT:
            more, unit = self._units[self._at]
            cost = len(unit) + _COST
            # A message that was begun has to come to its end.
            begun = self._units.get(self._at - 1, (False,))[0]
            most = self._limit if begun else min(self._window, self._limit)
            if self._flying and self._flying + cost > most:
                break
            frames += pack(">BI", _MORE if more else _LAST, len(unit)), unit
            self._flying += cost
            size += cost
            self._sent = max(self._sent, self._at)
            self._at += 1
        journal, life = self._journal, self._their_life
        if journal and size and (self._sent > journal.sent or life != journal.life):
            journal.write(_journal_record(b"U", self._sent, life))
            journal.sent, journal.life = self._sent, life
        if pipe.pong:
            frames.append(pipe.pong)
            pipe.pong, self._pressed = b"", bool(self._inbox)
        t, most = time.monotonic(), self.node.keepalive
        # Who has nothing to say, says that again: the peer may be kept from asking.
        if self._told and (frames or self._due or self._bye) or t - pipe.said > most:
            frames.append(pack(">BQ", _ACK, self._taken))
            self._told, self._due = 0, False
            self._pressed = self._pressed and bool(self._inbox)
        due = not pipe.pinged or frames and t - pipe.pinged > 1 or t - pipe.heard > most
        if (due or self._hurry and self._at == self._next) and pipe.asked is None:
            pipe.asked, pipe.pinged, self._hurry = t, t, self._hurry and self._at < self._next
            frames.append(pack(">BQ", _PING, self._ups))
        if frames:
            pipe.said = t
        return frames

    async def _read(self, pipe):
        try:
            while not pipe.over.is_set():
                self._feed(pipe, await pipe.read())
        except (OSError, EOFError, TorError) as e:
            self._cut(pipe, e)

    def _feed(self, pipe, data):
        at = 0
        while at < len(data) and not pipe.over.is_set():
            kind = data[at]
            require(len(data) - at >= (5 if kind in (_LAST, _MORE) else 9), "a frame is truncated")
            if kind in (_LAST, _MORE):
                (n,) = unpack_from(">I", data, at + 1)
                at += 5 + n
                require(at <= len(data) and n <= UNIT, "a unit is truncated, or too long")
                self._unit(pipe, kind == _MORE, data[at - n : at])
                continue
            (number,) = unpack_from(">Q", data, at + 1)
            at += 9
            if kind == _ACK:
                require(number < self._at, "the peer acknowledges what was not sent")
                self._confirm(number)
                self._pace()
            elif kind == _PING:
                pipe.pong = pack(">BQ", _PONG, number)
                self._wake.set()
            elif kind == _PONG:
                require(pipe.asked is not None, "an answer to nothing")
                self._ponged(pipe)
            elif kind == _START and pipe.count is None:
                self._started(pipe, number)
            else:
                require(kind == _BYE, "frame %d is unknown, or out of place" % kind)
                self._end(LinkError("the peer closed the link"))

    def _started(self, pipe, number):
        require(0 < number < 1 << 62, "units are counted from 1")
        pipe.count = number - 1
        if number > self._got + 1:
            require(not self._dropped, "it begins behind what was dropped here")
            if not self._fresh:
                log(WARN, "units %d to %d of a peer are gone: is the journal here an old one?",
                    self._got + 1, number - 1)
            self._got = self._taken = number - 1
            self._forget_parts()
        self._fresh = False

    def _forget_parts(self):
        self._unread -= sum([len(unit) + _COST for unit in self._parts])
        self._parts = []

    def _unit(self, pipe, more, unit):
        require(pipe.count is not None, "a unit before its number")
        pipe.count += 1
        if pipe.count <= self._got:
            return
        self._got = pipe.count
        self._unread += len(unit) + _COST
        require(self._unread <= self.node.limit() + self._stale, "more than was agreed on")
        self._parts.append(unit)
        if not more:
            message = unit if len(self._parts) == 1 else b"".join(self._parts)
            require(len(message) <= self.node.largest, "a message is too large")
            cost = len(message) + len(self._parts) * _COST
            self._inbox.append((self._theirs, self._got, message, cost))
            self._parts = []
            self._arrived.set()
        self.node._shed()

    def _drop(self):
        # What nobody took is not acknowledged either, so it will come again.
        self._inbox.clear()
        self._parts, self._unread, self._stale, self._dropped = [], 0, 0, True
        self._got = self._taken
        self._cut(self._pipe, LinkError("there is no room for more that nobody takes"))

    def _pace(self):
        # What may be on the way: twice what fits into a round trip, at the rate so far.
        passed = time.monotonic() - self._mark
        if self.round_trip and passed > max(0.05, self.round_trip):
            most = int(2 * self._acked / passed * min(self._trips))
            self._window = max(_WINDOW, min(most, self._limit))
            self._acked, self._mark = 0, time.monotonic()

    def _ponged(self, pipe):
        trip, pipe.asked = time.monotonic() - pipe.asked, None
        self._wake.set()
        self._trips = self._trips[-15:] + [trip]
        self.round_trip = trip if not self.round_trip else (7 * self.round_trip + trip) / 8
        if self.lagging:
            self.lagging = False
            self._tell("lag", 0)

    async def _watch(self, pipe):
        # Keep it alive, and end it where it is dead; seconds by a clock that nobody sets.
        most = self.node.keepalive
        while True:
            await asyncio.sleep(min(1, most / 4))
            self._wake.set()
            silence = time.monotonic() - pipe.heard
            waited = time.monotonic() - pipe.asked if pipe.asked is not None else 0
            # An answer waits behind what is sent, at whatever pace.
            if silence > 2 * most or waited > 8 * most:
                why = "nothing came in %.1f s, no answer in %.1f" % (silence, waited)
                return self._cut(pipe, TorTimeout(why))
            if waited > max(1, 4 * (self.round_trip or 0)) and not self.lagging:
                self.lagging = True
                self._tell("lag", waited)

    async def _connect(self):
        stream = await self.node.transport.dial(self.address, DIAL_SECONDS)
        host, name = self.address.partition(":")[0], onion_address(self.peer)
        # Another's onion service could read and change what goes through it.
        pipe = _Pipe(stream, stream.private and (not is_onion(host) or host.endswith(name)))

        def state():
            if self._pipe or self.closed:
                raise PeerError("another connection to that peer is there")
            return self._state() + self.protocol.encode()

        pipe.dialed = True
        try:
            greeting = _greet(pipe, self.node.identity, self.peer, state)
            pipe.hello = _parse_state(await wait_for(greeting, HANDSHAKE_SECONDS))
            self._install(pipe)
        except BaseException as e:
            stream.close()
            if isinstance(e, asyncio.TimeoutError):
                raise TorTimeout("%s is silent" % self.address)
            if isinstance(e, (EOFError, OSError)):
                raise PeerError("%s hung up: does it accept this peer? %s" % (self.address, e))
            raise

    async def _keep(self):
        # Dial, and again whenever it is down.
        pause, (least, most) = 0, self.node.pauses
        while not self.closed:
            try:
                if not self._pipe:
                    await self._connect()
            except TorError as e:
                if not self._pipe and not self.closed:
                    self.error = e
                    log(INFO, "a peer is not reached: %s", type(e).__name__)
                    if not self.retry or isinstance(e, ConfigError):
                        return self._end(e)
            pipe, since = self._pipe, time.monotonic()
            if pipe:
                await pipe.over.wait()
                if not self.retry:
                    return self._end(self.error)
                if time.monotonic() - since > 1:
                    pause = 0
                    continue
            pause = min(max(least, 2 * pause), most)
            await asyncio.sleep(pause * (500 + randbelow(1000)) / 1000)

    async def close(self, seconds=5):
        """Flush for `seconds`, then close the link at both ends; LinkError, with `lost`, where
        messages are not acknowledged by then, unless they are in the journal."""
        if self.closed:
            return
        try:
            try:
                await self.flush(seconds)
            except (LinkError, TorTimeout):
                self._raised = 0  # told at the end
            pipe, self._bye = self._pipe, True
            if pipe:
                self._wake.set()
                try:
                    await wait_for(pipe.over.wait(), 2)
                except asyncio.TimeoutError:
                    pass
        finally:
            self._end(None)
        if self._lost:
            self._check()

    def _end(self, error):
        # For good.
        if self.closed:
            return
        self.closed = True
        self._cut(self._pipe, error)
        self.error = error
        self.node._leaves(self)
        if self._keeper and self._keeper is not asyncio.current_task():
            self._keeper.cancel()
        if self._timer:
            self._timer.cancel()
        if self._journal:
            # What nobody took, the peer still has.
            self._inbox.clear()
            told = _journal_record(b"R", len(self._lost))
            self._journal.close(not (self._units or self._taken), told)
        else:
            self._give_up(self._next - 1)
        self._changed.set()
        self._arrived.set()
        self._tell("closed", error)


class Node:
    """A peer among peers: an identity, a transport, links.

    `key`: our Ed25519 identity, that of the onion address, see load_identity.
    `transport`: a DirectTransport, SocksTransport, TorTransport, HybridTransport, or like them.
    `journal`: a folder where links keep what is not acknowledged, for the next start.
    `allow`: function(key of 32 bytes) that tells whether that peer may link to us.
    `on_event`: function(link, event, detail): "up", "down" (why), "lag" (for so many seconds; 0:
    over), "closed" (why).

        async with Node(key, transport) as node:
            link = node.link("….onion")
            async for link in node: ...     links that peers opened

    `key`: our public key; `address`: what others give to `link`; `links`: {(peer, protocol): Link}.
    """

    # Bytes each link keeps at most, each way, and all together of what nobody took; the largest
    # message; seconds of silence until it is asked, and until it is cut; pauses between attempts;
    # whether the journal outlives power cuts; links at most.
    buffer, room, largest, keepalive, pauses = 17 << 20, 64 << 20, 16 << 20, 15, (0.25, 60)
    fsync, most = True, 256

    def __init__(self, key, transport, journal=None, allow=None, on_event=None):
        self.identity, self.transport, self.journal = load_identity(key), transport, journal
        self.allow, self.on_event, self.links, self.handlers = allow, on_event, {}, {}
        self.key, self._new, self._greetings, self.closed = self.identity[1], deque(), [], False

    @property
    def address(self):
        return self.transport.address

    def limit(self):
        # What a peer may have on the way: the largest message fits.
        return min(self.buffer, self.largest + (self.largest // UNIT + 1) * _COST)

    async def start(self):
        """Listen; return itself.  ConfigError, and what the transport raises."""
        self._changed = asyncio.Event()
        try:
            await self.transport.listen(self._accept)
        except BaseException:
            await self.transport.close()  # what listens already
            raise
        return self

    async def close(self, seconds=5):
        """Close all links, after they were flushed for `seconds`, and stop listening; LinkError."""
        if self.closed:
            return
        self.closed, errors = True, []
        closing = [link.close(seconds) for link in list(self.links.values())]
        try:
            for error in await asyncio.gather(*closing, return_exceptions=True):
                errors += [error] * isinstance(error, Exception)
        finally:
            for pipe in self._greetings:
                pipe.stream.close()
            self._changed.set()
            await self.transport.close()
        if errors:
            errors[0].lost = sum([getattr(error, "lost", []) for error in errors], [])
            raise errors[0]

    __aenter__, __aexit__ = start, lambda self, *_: self.close()
    aclose = close

    def link(self, peer, address=None, protocol="", retry=True):
        """Return the Link to `peer` (a key of 32 bytes, or an onion address) at `address` (by
        default the onion address), which is dialled until it is up, and whenever it is down.

        `protocol`: a name; links of different ones have nothing to do with each other.
        `retry`: else the link is closed by the first failure.  AddressError, ConfigError.
        """
        if isinstance(peer, str):
            address, peer = address or peer, parse_onion_address(split_address(peer)[0])
        if len(peer) != 32 or peer == self.key or self.closed:
            raise ConfigError("a link needs the key of another peer, and an open node")
        link = self.links.get((peer, protocol))
        if not link:
            link = self.links[peer, protocol] = Link(self, peer, protocol)
        if not link.address:
            link.address, link.retry = address or onion_address(peer), retry
            link._keeper = spawn(link._keep())
        return link

    def serve(self, protocol, handler):
        """Run the coroutine function handler(link) for each link of `protocol` that a peer opens.

        Without, those of the protocol "" come out of `async for link in node`; others are refused.
        """
        self.handlers[protocol] = handler

    def _shed(self):
        # Who has most here that nobody took pays for it.
        while sum([link._unread for link in self.links.values()]) > self.room:
            max(self.links.values(), key=lambda link: link._unread)._drop()

    def _leaves(self, link):
        del self.links[link.peer, link.protocol]
        if link in self._new:
            self._new.remove(link)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self._new:
            if self.closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._new.popleft()

    async def _accept(self, stream):
        # A connection from somebody, until it is over.
        pipe = _Pipe(stream, stream.private)
        try:
            if len(self._greetings) >= _GREETINGS:
                # Whoever only holds places will lose them.
                self._greetings.pop(randbelow(_GREETINGS)).stream.close()
            self._greetings.append(pipe)
            try:
                await wait_for(self._greeted(pipe), HANDSHAKE_SECONDS)
            finally:
                self._greetings = [other for other in self._greetings if other is not pipe]
            await pipe.over.wait()
        except (OSError, EOFError, TorError, asyncio.TimeoutError) as e:
            log(INFO, "a peer's connection came to nothing: %s: %s", type(e).__name__, e)
        finally:
            stream.close()

    async def _greeted(self, pipe):
        peer, state, private = await _welcome(pipe, self.identity)
        pipe.hello = _parse_state(state)
        link = self._opened(peer, pipe.hello.protocol)
        if link.closed or not link._wins(pipe):
            raise PeerError("another connection to that peer is there")
        # What it brings now would come again.
        link._cut(link._pipe, None)
        await pipe.write(link._state())
        pipe.open(private)
        link._install(pipe)

    def _opened(self, peer, protocol):
        # The link for a peer that dialled.
        link = self.links.get((peer, protocol))
        if link and link.address:
            return link
        if self.closed or self.allow and not self.allow(peer):
            raise PeerError("that peer is not allowed here")
        if link:
            return link
        handler = self.handlers.get(protocol)
        if protocol and not handler:
            raise PeerError("nobody serves the protocol of a peer")
        if len(self.links) >= self.most:
            # The oldest that is down and goes nowhere, best one with nothing to send.
            down = [old for old in self.links.values() if not (old.up or old.address)]
            if not down:
                raise PeerError("there are too many links")
            min(down, key=lambda old: old.buffered > 0)._end(LinkError("too many links"))
        link = self.links[peer, protocol] = Link(self, peer, protocol)
        if handler:
            spawn(self._handle(handler, link))
        else:
            self._new.append(link)
            self._changed.set()
        return link

    async def _handle(self, handler, link):
        try:
            await handler(link)
        except TorError as e:
            log(INFO, "a link's handler ended: %s: %s", type(e).__name__, e)


class BlockingLink:
    """A Link for programs without asyncio: `link` is that; messages by iteration, or `receive`."""

    def __init__(self, link, run):
        self.link, self._run, self.peer = link, run, link.peer

    def send(self, message):
        return self._run(self.link.send(message))

    def receive(self, seconds=None):
        return self._run(self.link.receive(seconds))

    def flush(self, seconds=None):
        return self._run(self.link.flush(seconds))

    def ready(self, seconds=DIAL_SECONDS):
        return self._run(self.link.ready(seconds)) and self

    def close(self, seconds=5):
        return self._run(self.link.close(seconds))

    __iter__ = lambda self: self

    def __next__(self):
        try:
            return self._run(self.link.__anext__())
        except StopAsyncIteration:
            raise StopIteration


class BlockingNode(LoopThread):
    """A Node for programs without asyncio, with its arguments, in a thread; any thread may call.

    With a TorTransport of a Tor give that as `tor`: it runs there.  Iteration gives the
    BlockingLinks that peers open; `node` is the Node.
    """

    def __init__(self, *args, tor=None, **options):
        self.node, self._stop, self._closing = Node(*args, **options), None, threading.Lock()
        if tor:
            self.run = tor.run
            self.run(self.node.start())
        else:
            LoopThread.__init__(self, self.node)
        self.key, self.address = self.node.key, self.node.address

    def link(self, *args, **options):
        async def link():
            return self.node.link(*args, **options)

        return BlockingLink(self.run(link()), self.run)

    def close(self, *_):
        """Close all links, after they were flushed for some seconds, and stop; LinkError."""
        with self._closing:
            try:
                if not self.node.closed:
                    self.run(self.node.close())
            finally:
                if self._stop:
                    LoopThread.close(self)

    __exit__ = close
    __iter__ = lambda self: self

    def __next__(self):
        try:
            return BlockingLink(self.run(self.node.__anext__()), self.run)
        except StopAsyncIteration:
            raise StopIteration


# Calls over one link that have no answer, each way.
_CALLS_AT_ONCE = 64


class Calls:
    """Calls to peers and from them, over links of `node` with that `protocol`.

    `answer`: function or coroutine function(key, request): the reply (bytes) to the peer with that
    public key; a coroutine is cancelled when its link ends.  A link is closed when it was not used
    for `idle` seconds.
    """

    def __init__(self, node, protocol, answer=None, idle=60, largest=1 << 20):
        # `_waiting`: {(link, number): Promise}; `_turns`: {link that is read from: Semaphore}.
        self._node, self._protocol, self._answer = node, protocol, answer
        self._idle, self._largest, self._waiting, self._turns = idle, largest, {}, {}
        self._count = 0
        if answer:
            node.serve(protocol, self._serve)

    async def call(self, contact, request, seconds=120):
        """Return the reply of a contact (public key, address) to `request`; TorError."""
        try:
            return await wait_for(self._called(contact, request), seconds)
        except asyncio.TimeoutError:
            raise TorTimeout("%s did not answer in %s s" % (contact[1], seconds))

    async def _called(self, contact, request):
        old = self._node.links.get((contact[0], self._protocol))
        while True:
            link = self._node.link(*contact, self._protocol, False)
            if link not in self._turns:
                self._turns[link] = asyncio.Semaphore(_CALLS_AT_ONCE)
                spawn(self._serve(link, True))
            try:
                async with self._turns[link]:
                    return await self._exchange(link, request)
            except (LinkError, PeerError):
                # One of the ends may just have closed a link that nobody used.
                if link is not old:
                    raise
                old = None
                while link._bye and not link.closed:
                    await link._change()

    async def _exchange(self, link, request):
        self._count = self._count + 1 & 0xFFFFFFFF
        number, promise = self._count, Promise()
        self._waiting[link, number] = promise
        try:
            await link.ready()
            await link.send(pack(">BI", 0, number) + request)
            return await promise.wait()
        finally:
            del self._waiting[link, number]

    async def _serve(self, link, ours=False):
        # Until it is closed, or was not used for a while.
        if link in self._turns and not ours:
            return
        error, replies = LinkError("the link is closed"), set()
        self._turns.setdefault(link, asyncio.Semaphore(_CALLS_AT_ONCE))
        waiting = lambda: [other for other, _ in self._waiting if other is link]
        try:
            while await self._next(link, replies) or replies or waiting():
                pass
        except (OSError, TorError) as e:
            error = e if isinstance(e, LinkError) else LinkError(str(e))
        finally:
            del self._turns[link]
            for task in replies:
                task.cancel()
            for (other, _), promise in list(self._waiting.items()):
                if other is link:
                    promise.set(error=error)
            try:
                await link.close(1)
            except TorError:
                pass  # what was not sent is nobody's reply any more

    async def _reply(self, link, number, request):
        try:
            reply = self._answer(link.peer, request)
            if not isinstance(reply, bytes):
                reply = await reply
            await link.send(pack(">BI", 1, number) + reply)
        except TorError as e:
            log(INFO, "a call is not answered: %s", e)

    async def _next(self, link, replies):
        # A message; None: there was none.
        try:
            message = await link.receive(self._idle)
        except TorTimeout:
            return None
        require(5 <= len(message) <= self._largest, "a call of %d bytes" % len(message))
        kind, number = unpack_from(">BI", message)
        if kind == 0:
            require(self._answer, "a call, and nobody is there who answers")
            require(len(replies) < 2 * _CALLS_AT_ONCE, "too many calls at once")
            # Beside: it may call who asks, and who asks may take no more before we do.
            task = spawn(self._reply(link, number, message[5:]))
            replies.add(task)
            task.add_done_callback(replies.discard)
        elif (link, number) in self._waiting:
            self._waiting[link, number].set(message[5:])
        return True


# Advertisements and discovery.  Who offers what, signed by the key of an onion address.

_AD_PREFIX = b"minitor advertisement 1\0"
AD_SECONDS, _AD_LONGEST, _AD_SKEW = 3 * 3600, 86400, 1800
MOST_SERVICES, MOST_METADATA = 16, 128
_NAMES = _BASE32 + "0189-_."


def _ad_fault(services, lifetime):
    # What is wrong with them, or None.
    if len(services) > MOST_SERVICES:
        return "more than %d services" % MOST_SERVICES
    if not 0 < lifetime <= _AD_LONGEST:
        return "a lifetime of %d s: not 1 to %d" % (lifetime, _AD_LONGEST)
    for name, (port, metadata) in services.items():
        if not 0 < len(name) < 64 or name.strip(_NAMES) or is_onion(name):
            return "%r is no name of a service: 1 to 63 of a-z, 0-9, - _ ." % name
        if not 0 < port < 65536 or len(metadata) > MOST_METADATA:
            return "%s: port %d, and %d bytes of metadata" % (name, port, len(metadata))


def check_service(name):
    fault = _ad_fault({name: (1, b"")}, 1)
    if fault:
        raise ConfigError(fault)


class Advertisement:
    """Who offers what: `key` (Ed25519), `address` (onion), `services`: {name: (port, metadata
    of up to 128 bytes)}, `timestamp` and `expiry` in seconds since 1970, `signature`.
    """

    def __init__(self, key, services, timestamp, expiry, signature=b""):
        self.key, self.address, self.services = key, onion_address(key), services
        self.timestamp, self.expiry, self.signature = timestamp, expiry, signature

    @staticmethod
    def create(secret, services, seconds=AD_SECONDS, timestamp=None):
        """Sign `services`, as above, for `seconds`.  `secret`: of load_service_key; ConfigError."""
        fault = _ad_fault(services, seconds)
        if fault:
            raise ConfigError("cannot be advertised: " + fault)
        timestamp = now() if timestamp is None else timestamp
        ad = Advertisement(secret[1], services, timestamp, timestamp + seconds)
        ad.signature = ed25519_sign(*secret, _AD_PREFIX + ad._content())
        return ad

    def _content(self):
        # Of one content, one encoding: services in the order of their names.
        data = b32decode(self.address[:-6])
        data += pack(">QIB", self.timestamp, self.expiry - self.timestamp, len(self.services))
        for name, (port, metadata) in sorted(self.services.items()):
            data += bytes([len(name)]) + name.encode()
            data += pack(">HB", port, len(metadata)) + metadata
        return data

    def encode(self):
        """Address (35 bytes: key, checksum, version), timestamp (8), lifetime (4), count (1);
        for each service length (1) and name, port (2), length (1) and metadata; signature (64)."""
        return self._content() + self.signature

    @staticmethod
    def decode(data):
        """Return the Advertisement in `data`, unverified; ProtocolError where `encode` makes
        another of it."""
        reader, services = Reader(data, "advertisement"), {}
        key = reader.take(35)[:32]
        timestamp, lifetime = reader.uint(8), reader.uint(4)
        for _ in range(reader.uint(1)):
            name = reader.take(reader.uint(1))
            require(not name.strip(_NAMES.encode()), "a service's name is none")
            port = reader.uint(2)
            services[name.decode()] = port, reader.take(reader.uint(1))
        ad = Advertisement(key, services, timestamp, timestamp + lifetime, reader.take(64))
        fault = _ad_fault(services, lifetime)
        require(not fault, "bad advertisement: %s" % fault)
        require(ad.encode() == data, "an advertisement is not encoded as it has to be")
        return ad

    def verify(self, at=None):
        """Check it at the time `at` (default: now); ProtocolError."""
        at, who = now() if at is None else at, "the advertisement of " + self.address
        require(at < self.expiry, who + " has expired, or this clock is fast")
        require(self.timestamp <= at + _AD_SKEW, who + " is of the future, or this clock is slow")
        signed = ed25519_verify(self.key, _AD_PREFIX + self._content(), self.signature)
        require(signed and ed25519_valid(self.key), who + " is not signed by its key")
        return self


# A distributed hash table of advertisements (Kademlia).  A contact is (public key, where it takes
# calls: "host:port"); whoever calls or is called has proven its key.

# Contacts in a bucket and in an answer; calls at once in a look-up, and when some are late.
_K, _ALPHA, _ALPHA_LATE = 8, 3, 12
# Calls of a look-up; how many contacts of one peer may fail before it counts as a liar.
_MOST_ASKED, _CREDIT = 96, 3
# In seconds: a call; when it is late; between rounds of upkeep.
CALL_SECONDS, _LATE_SECONDS, UPKEEP_SECONDS = 60, 8, 1800
# Bytes of a call or an answer, and of advertisements in it; advertisements kept, and of one name.
MOST_CALL, _MOST_ADS_SENT, MOST_ADS, _MOST_OF_NAME = 1 << 14, 12000, 1024, 128
# Calls of one peer, of all: so many at once, then so many a second.  What storing costs.
_PEER_RATE, _RATE_OF_ALL, _MOST_RATES, _STORE_COST = (100, 5), (2000, 200), 4096, 4
LOOK, STORE, DONE, REFUSED = range(4)


def place_of(what):
    """Where in the table something is: a public key (bytes) or a service's name (text)."""
    named = isinstance(what, str)
    text = b"minitor discovery: " + (b"name " + what.encode() if named else b"key " + what)
    return uint(sha3_256(text))


def places_of(ad):
    return [place_of(ad.key)] + [place_of(name) for name in ad.services]


def pack_contact(contact):
    return contact[0] + bytes([len(contact[1])]) + contact[1].encode()


def _read_address(reader):
    text = reader.take(reader.uint(1))
    require(len(text) < 128 and not text.strip(_NAMES.encode() + b":[]"), "no address")
    return text.decode()


def parse_contact(text, direct=False):
    """The contact in a text: ADDRESS.onion[:PORT]; where `direct`, ADDRESS.onion@HOST:PORT."""
    address, at, where = text.partition("@")
    host, port = split_address(where or address)
    if at and not direct:
        raise AddressError("%s: peers are called over Tor here" % text)
    key = parse_onion_address(address if at else host)
    host = "[%s]" % host if ":" in host else host
    return key, "%s:%d" % (host if at else onion_address(key), port)


class _Lookup:
    """The contacts that a look-up has learnt of, and whom it asks next.

    Who is learnt of from liars alone, is not asked: they could name others without end.
    """

    def __init__(self, place, contacts):
        # `known`: {contact: [distance, state, who named it]}; `credit`: {who: so many more}.
        # `verified`: advertisements, encoded.
        self.place, self.known, self.asked, self.credit = place, {}, 0, {None: 1 << 30}
        self.verified = set()
        self.learn(None, contacts)

    def learn(self, source, contacts):
        self.credit.setdefault(source, _CREDIT)
        for contact in contacts:
            distance = place_of(contact[0]) ^ self.place
            self.known.setdefault(contact, [distance, "new", set()])[2].add(source)

    def next(self):
        """The contact to ask next, or None."""
        window, done = 0, set()
        for contact, (_, state, sources) in sorted(self.known.items(), key=lambda i: i[1][0]):
            trusted = [source for source in sources if self.credit[source] > 0]
            over = state in ("failed", "late") or contact[0] in done
            if over or state == "new" and not trusted:
                continue
            if state == "new" and self.asked < _MOST_ASKED:
                self.known[contact][1], self.asked = "asked", self.asked + 1
                return contact
            if state == "answered":
                done.add(contact[0])
            window += 1
            if window == _K:
                break
        return None

    def result(self, contact, good):
        """Note how a call ended."""
        _, before, sources = self.known[contact]
        self.known[contact][1] = "answered" if good else "failed"
        for source in sources:
            self.credit[source] += (1 if good else -1) + (before == "late")

    def late(self):
        """What is asked takes long: count on it no more, unless it is all there is."""
        for entry in self.known.values():
            if entry[1] == "asked":
                entry[1] = "late"
                for source in entry[2]:
                    self.credit[source] -= 1

    def waits(self):
        """How many are asked and not late."""
        return len([entry for entry in self.known.values() if entry[1] == "asked"])

    def lied(self, contact):
        self.known[contact][1], self.credit[contact] = "failed", -(1 << 30)

    def nearest(self):
        """The contacts nearest to the place that have answered."""
        found = [(d, c) for c, (d, state, _) in self.known.items() if state == "answered"]
        return [contact for _, contact in sorted(found)[:_K]]


class Discovery:
    """A peer that finds others, by key and by what they offer, and is found.

    `call`: coroutine function(contact, request): reply, both bytes, from who has proven the
    contact's key; TorError.  Its other end is `answer` of a Discovery.  `secret`: as of
    load_service_key.  `address`: "host:port" where calls are taken; "": none are, so that others
    are not told of this peer.  `direct`: contacts may be elsewhere than at their onion address.
    """

    def __init__(self, call, secret, address="", direct=False):
        self._call, self._secret, self.key, self._direct = call, secret, secret[1], direct
        self.address, self.place = address, place_of(self.key)
        # `_asked`: those called just now; `_seeds`: where to begin.
        self._buckets, self._asked, self._seeds, self._fault = {}, set(), [], None
        self._looks = set()
        # `_ads`: {key: (distance, Advertisement, encoded)}; `_places`: {place: keys}; `_rates`:
        # {key: (calls left, when)}; `_looks`: tasks.
        self._ads, self._places, self._rates, self.services, self._kept = {}, {}, {}, None, 0

    @staticmethod
    def over(node, direct=False):
        """A Discovery whose calls go over links of `node`, once that is started."""
        answer = lambda key, request: found.answer(key, request)
        calls = Calls(node, "discovery", answer, largest=MOST_CALL + 5)
        found = Discovery(calls.call, node.identity, node.address or "", direct)
        return found

    # Contacts.

    def contacts(self):
        """Return those who have answered, and did not fail since."""
        return [contact for bucket, _ in self._buckets.values() for contact in bucket]

    def _near(self, place, n=_K):
        return sorted(self.contacts(), key=lambda contact: place_of(contact[0]) ^ place)[:n]

    def _is_good(self, contact):
        # Whether it may be called: nobody shall make us connect elsewhere than to a peer.
        key, address = contact
        there = self._direct or address.partition(":")[0] == onion_address(key)
        return there and key != self.key and address != ""

    def _bucket(self, key):
        # Where it belongs: contacts, least recently seen first; and spare ones.
        number = len(bin(place_of(key) ^ self.place))
        return self._buckets.setdefault(number, ([], []))

    def _seen(self, contact):
        # It has answered.  Who is there for long will be: it makes room only when it fails.
        for peers in self._bucket(contact[0]):
            others = [other for other in peers if other[0] != contact[0]]
            if len(others) < _K:
                peers[:] = others + [contact]
                return
        peers[:] = others[1:] + [contact]

    def _gone(self, key, address=None):
        # It did not answer at that address, or lied.
        bucket, spare = self._bucket(key)
        for contact in list(bucket):
            if contact[0] == key and address in (None, contact[1]):
                bucket.remove(contact)
                bucket += [spare.pop()] if spare else []

    def _heard(self, contact):
        # It calls, and says that it takes calls: others are told of it when it does.
        bucket, _ = self._bucket(contact[0])
        if contact in bucket:
            return self._seen(contact)
        busy = len(self._asked) >= _ALPHA_LATE or contact in self._asked or len(bucket) == _K
        if not busy and self._is_good(contact):
            self._asked.add(contact)
            spawn(self._check(contact))

    async def _check(self, contact):
        try:
            await self._look(contact, self.place)
        except TorError as e:
            log(INFO, "a peer is not there: %s", e)

    # Calls.

    def _head(self, kind):
        return bytes([kind, len(self.address)]) + self.address.encode()

    async def _ask(self, contact, kind, body):
        # The answer's body; TorError.
        request = self._head(kind) + body
        self._asked.add(contact)
        try:
            reply = await wait_for(self._call(contact, request), CALL_SECONDS)
            require(1 <= len(reply) <= MOST_CALL, "an answer of %d bytes" % len(reply))
        except asyncio.TimeoutError:
            self._gone(*contact)
            raise TorTimeout("%s did not answer in %d s" % (contact[1], CALL_SECONDS))
        except TorError:
            self._gone(*contact)
            raise
        finally:
            self._asked.discard(contact)
        reader = Reader(reply, "answer")
        if reader.uint(1) != DONE:
            raise DiscoveryError("%s refuses to answer" % contact[1])
        # Where it is to be called, it knows best: others may have named another place.
        there = contact[0], _read_address(reader)
        if self._is_good(there):
            self._seen(there)
        else:
            self._gone(contact[0])
        return reader.take(reader.left())

    async def _look(self, contact, place):
        # Contacts and advertisements, undecoded, that a peer has for a place.
        body = await self._ask(contact, LOOK, place.to_bytes(32, "big"))
        try:
            reader, contacts, ads = Reader(body, "answer"), [], []
            count = reader.uint(1)
            require(count <= _K, "an answer of %d contacts" % count)
            for _ in range(count):
                contacts.append((reader.take(32), _read_address(reader)))
            while reader.left():
                ads.append(reader.take(reader.uint(2)))
        except ProtocolError:
            self._gone(contact[0])
            raise
        return [contact for contact in contacts if self._is_good(contact)], ads

    async def _find(self, place):
        # The peers nearest to a place, and {key: Advertisement} of all that is there.
        known = self._near(place) + ([] if len(self.contacts()) >= _K else self._seeds)
        lookup, tasks, found = _Lookup(place, known), {}, {}
        for key in self._places.get(place, ()):
            self._take(found, self._ads[key][1])
        try:
            while True:
                while lookup.waits() < _ALPHA and len(tasks) < _ALPHA_LATE:
                    contact = lookup.next()
                    if not contact:
                        break
                    tasks[self._looking(contact, place)] = contact
                nearest = lookup.nearest()
                if not tasks or len(nearest) == _K and not lookup.waits():
                    return nearest, found
                done, _ = await asyncio.wait(
                    tasks, timeout=_LATE_SECONDS, return_when="FIRST_COMPLETED")
                if not done:
                    lookup.late()
                for task in done:
                    contact, error = tasks.pop(task), task.exception()
                    lookup.result(contact, not error)
                    if not error:
                        await self._learn(lookup, contact, *task.result(), found)
                    elif isinstance(error, TorError):
                        self._fault = error
                    else:
                        raise error
        except BaseException:
            # Only then: who is late is to be known as that, or as gone.
            for task in tasks:
                task.cancel()
            raise

    def _looking(self, contact, place):
        # The task of a call, held on to.
        def done(task):
            self._looks.discard(task)
            return task.cancelled() or task.exception()

        task = asyncio.ensure_future(self._look(contact, place))
        self._looks.add(task)
        task.add_done_callback(done)
        return task

    async def _learn(self, lookup, contact, contacts, ads, found):
        lookup.learn(contact, contacts)
        try:
            for data in ads:
                if data not in lookup.verified and len(found) < _K * _MOST_OF_NAME:
                    ad = Advertisement.decode(data)
                    require(lookup.place in places_of(ad), "an advertisement of something else")
                    if now() < ad.expiry:
                        self._take(found, ad.verify())
                        lookup.verified.add(data)
                        await asyncio.sleep(0)  # a signature takes milliseconds
        except ProtocolError as e:
            log(INFO, "a peer lies: %s", e)
            lookup.lied(contact)
            self._gone(contact[0])

    def _take(self, found, ad):
        old = found.get(ad.key)
        if ad.expiry > now() and (not old or ad.timestamp > old.timestamp):
            found[ad.key] = ad

    # Answers.

    def answer(self, key, request):
        """Return the reply to what a peer with that public key asks."""
        try:
            reader = Reader(request, "call")
            kind, address = reader.uint(1), _read_address(reader)
            cost = _STORE_COST if kind == STORE else 1
            if not self._affords(key, _PEER_RATE, cost) or not self._affords(0, _RATE_OF_ALL, cost):
                return bytes([REFUSED])
            if address:
                self._heard((key, address))
            body = reader.take(reader.left())
            if kind == STORE:
                ad = Advertisement.decode(body)
                require(ad.key == key, "an advertisement of another than the caller")
                self._keep(ad)
                return self._head(DONE)
            require(kind == LOOK and len(body) == 32, "no call")
            return self._head(DONE) + self._answer_look(key, uint(body))
        except ProtocolError as e:
            log(INFO, "a peer's call is refused: %s", e)
            return bytes([REFUSED])

    def _affords(self, key, rate, cost):
        burst, each = rate
        left, since = self._rates.pop(key, (burst, ticks_ms()))
        left = min(burst, left + ticks_diff(ticks_ms(), since) * each / 1000)
        good = left >= cost
        self._rates[key] = left - cost * good, ticks_ms()
        if len(self._rates) > _MOST_RATES:
            del self._rates[next(iter(self._rates))]  # whose last call is longest ago
        return good

    def _answer_look(self, asker, place):
        contacts = [c for c in self._near(place, _K + 1) if c[0] != asker][:_K]
        reply = bytes([len(contacts)]) + b"".join([pack_contact(c) for c in contacts])
        left = _MOST_ADS_SENT
        # Where not all fit, others each time.
        for _, key in sorted([(urandom(8), key) for key in self._places.get(place, ())]):
            _, ad, data = self._ads[key]
            left -= len(data) + 2
            if left >= 0 and ad.expiry > now():
                reply += pack(">H", len(data)) + data
        return reply

    # What is kept.

    def _keep(self, ad):
        # ProtocolError where it is false, or older than what is there.
        old, data = self._ads.get(ad.key), ad.encode()
        if old and old[2] == data:
            return
        require(not old or ad.timestamp > old[1].timestamp, "an advertisement older than the last")
        ad.verify()
        self._drop(ad.key)
        places = places_of(ad)
        self._ads[ad.key] = min([place ^ self.place for place in places]), ad, data
        for place in places:
            keys = self._places.setdefault(place, set())
            keys.add(ad.key)
            if len(keys) > _MOST_OF_NAME:
                # Each peer keeps others, and nobody knows beforehand which.
                keys.discard(max(keys, key=lambda key: place_of(key) ^ self.place))
        if len(self._ads) > MOST_ADS:
            self._expire()
        if len(self._ads) > MOST_ADS:
            others = [key for key in self._ads if key != self.key]
            self._drop(max(others, key=lambda key: self._ads[key][0]))

    def _drop(self, key):
        old = self._ads.pop(key, None)
        for place in places_of(old[1]) if old else ():
            keys = self._places.get(place, set())
            keys.discard(key)
            if not keys:
                self._places.pop(place, None)

    def _expire(self):
        for key, (_, ad, _) in list(self._ads.items()):
            if ad.expiry <= now() and key != self.key:
                self._drop(key)

    # What programs use.

    async def join(self, contacts):
        """Get to know others, beginning with `contacts` (as `contacts` returns them, or texts as
        `parse_contact` takes them); DiscoveryError where none answers."""
        known = [parse_contact(c, self._direct) if isinstance(c, str) else c for c in contacts]
        self._seeds = [contact for contact in known if self._is_good(contact)]
        nearest, _ = await self._find(self.place)
        if self._seeds and not nearest:
            raise DiscoveryError(
                "none of %d peers answers: %s" % (len(self._seeds), self._fault or "they lie"))

    async def advertise(self, services, seconds=AD_SECONDS):
        """Publish `services`, as an Advertisement has them, under our key and their names; return
        how many peers keep them.  `upkeep` does it anew in time."""
        # Later than the last one, unless that is of a time when this clock was fast.
        old = self._ads.get(self.key)
        if old and old[1].timestamp > now() + _AD_SKEW:
            old = self._drop(self.key)
        at = max(now(), old[1].timestamp + 1 if old else 0)
        ad = Advertisement.create(self._secret, services, seconds, at)
        self.services = services, seconds
        self._keep(ad)
        peers = set()
        for place in places_of(ad):
            peers.update((await self._find(place))[0])
        peers, data, kept = list(peers), ad.encode(), 0
        while peers:
            some, peers = peers[:_ALPHA_LATE], peers[_ALPHA_LATE:]
            calls = [self._ask(contact, STORE, data) for contact in some]
            kept += (await asyncio.gather(*calls, return_exceptions=True)).count(b"")
        self._kept = kept
        return kept

    async def discover(self, name):
        """Return the Advertisements of all who offer the service `name`."""
        check_service(name)
        _, found = await self._find(place_of(name))
        return [ad for _, ad in sorted(found.items())]

    async def locate(self, address):
        """Return the newest Advertisement of an onion address; DiscoveryError."""
        key = parse_onion_address(address)
        _, found = await self._find(place_of(key))
        if key not in found:
            raise DiscoveryError("no peer knows of an advertisement of " + address)
        return found[key]

    async def stay(self, contacts, services, told=None):
        """Join by `contacts`, advertise `services`, and look after both for ever; `told`:
        function(TorError or None, how many peers keep the advertisement) after each round."""
        pause = 30
        while True:
            error = None
            try:
                if not self.contacts():
                    await self.join(contacts)
                if self.services:
                    await self.upkeep()
                else:
                    await self.advertise(services)
            except TorError as e:
                error = e
            if told:
                told(error, self._kept)
            pause = min(2 * pause, UPKEEP_SECONDS)
            await asyncio.sleep(pause * (750 + randbelow(500)) / 1000)

    async def upkeep(self):
        """Drop what has expired, look after contacts, advertise anew: now and then."""
        self._expire()
        for bucket, _ in list(self._buckets.values()):
            if bucket:
                await self._check(bucket[0])
        await self._find(self.place)
        await self._find(uint(urandom(32)))
        # At a third of its time: those who come nearer to its places than who had it, get it.
        due = self.services and self._ads[self.key][1].timestamp + self.services[1] // 3
        if self.services and (self._kept < _K or now() >= due):
            await self.advertise(*self.services)


# === 19. Command line ===

OWN_PAGE = """<!doctype html><title>minitor</title><h1>It works.</h1>
<p>This page came from an onion service hosted by minitor, Tor in one Python file.
"""


def web_answer(folder, method, path):
    import html
    import io
    import mimetypes
    from urllib.parse import quote, unquote

    def page(text, status="200 OK"):
        return status + "\r\nContent-Type: text/html; charset=utf-8", io.BytesIO(text.encode())

    if method not in (b"GET", b"HEAD"):
        return page("", "405 Method Not Allowed\r\nAllow: GET, HEAD")
    if not folder:
        return page(OWN_PAGE)
    path = unquote(path.partition(b"?")[0])
    names = path.split("/")
    try:
        at = os.path.join(folder, *names)
        index = at + "index.html" * path.endswith("/")
        at = os.path.realpath(index if os.path.isfile(index) else at)
        # Hidden files stay hidden, so no ".."; a link must not lead outside.
        hidden = [name for name in names if name[:1] == "." and name != ".well-known"]
        if hidden or os.path.commonpath((folder, at)) != folder:
            raise ValueError
        if os.path.isfile(at):
            kind, coding = mimetypes.guess_type(at)
            kind = "application/octet-stream" if coding or not kind else kind
            kind += "; charset=utf-8" * (kind[:5] == "text/")
            return "200 OK\r\nContent-Type: " + kind, open(at, "rb")
        entries = sorted(e.name + "/" * e.is_dir() for e in os.scandir(at) if e.name[0] != ".")
        if path[-1:] != "/":
            return page("", "301 Moved Permanently\r\nLocation: /%s/" % quote(path.strip("/")))
        rows = ['<li><a href="./%s">%s</a>' % (quote(e), html.escape(e)) for e in entries]
        return page("<h1>%s</h1><ul>" % html.escape(path) + "".join(rows))
    except (OSError, ValueError):
        return page("<h1>Not found", "404 Not Found")


async def web_serve(folder, reader, writer):
    try:
        request = await wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        status, body = web_answer(folder, *(request.split() + [b"", b""])[:2])
        with body:
            size = body.seek(0, 2)
            body.seek(0)
            # Neither Date nor Server: these tell about clock and machine.
            head = "HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            piece = (head % (status, size)).encode()
            while piece:
                writer.write(piece)
                await wait_for(writer.drain(), 120)
                piece = body.read(min(size, 1 << 16)) if request[:4] != b"HEAD" else b""
                size -= len(piece)
    except (OSError, EOFError, TorError, asyncio.TimeoutError):
        pass
    writer.close()


def serve_target(what):
    """The target that --serve's argument names; ConfigError."""
    if what[:5] == "unix:":
        return what
    host, _, port = what.rpartition(":")
    if port.isdecimal():
        target = host.strip("[]") or "127.0.0.1", int(port)
        check_target(*target)
        return target
    if what and not os.path.isdir(what):
        raise ConfigError("--serve %s: no port, no host:port, no folder" % what)
    folder = what and os.path.realpath(what)
    return lambda reader, writer: web_serve(folder, reader, writer)


def diversify():
    """Have every AsyncTor of this process take hops in different countries; ConfigError."""
    config = configure([("EnforceDistinctCountries", "1", "--diverse")])
    AsyncTor.selector = lambda self, *args: ChosenPaths(config, *args)


def make_client_key(name, address, key_dir, auth_dir):
    """Make a client's key for the service at `address`, or, None, with the key in `key_dir`.

    The latter gets the client's file; `auth_dir`, if any, the file with the private key.  What is
    not written is printed.  ConfigError.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError("%r names no client: letters, digits, - and _ can" % name)
    identity = parse_onion_address(address) if address else load_service_key(key_dir)[1]
    (secret, public), host = x25519_keypair(), onion_address(identity)[:56]
    places = [
        (auth_dir, host + ".auth_private", host + ":" + auth_text(secret)),
        (not address and key_dir + "/authorized_clients", name + ".auth", auth_text(public)),
    ]
    for folder, file, _ in places:
        if folder:
            private_dir(folder)
        if folder and os.path.lexists(os.path.join(folder, file)):
            raise ConfigError("%s/%s is there already" % (folder, file))
    for folder, file, text in places:
        if not folder:
            print("what %s has to hold:" % file, file=sys.stderr)
            print(text, flush=True)
            continue
        path = os.path.join(folder, file)
        with open(path, "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as f:
            f.write(text + "\n")
        print("written: " + path, file=sys.stderr)


def netcat(tor, host, port, linger=None):
    """Send standard input to host:port through `tor`, a Tor, and what comes back to standard
    output, until the other side ends, or `linger` seconds after the input; StreamError …"""
    stream, _ = tor.run(tor._tor.open_connection(host, port))

    async def send(data):
        stream.write(data)
        await stream.drain()

    async def end():
        stream.close()

    def feed():
        # In a thread: asyncio cannot wait for files.
        try:
            while data := os.read(0, 1 << 16):
                tor.run(send(data))
        except (OSError, TorError):
            pass  # the reader is told
        if linger is not None:
            time.sleep(linger)
            tor.run(end())

    def show(data):
        while data:
            data = data[os.write(1, data) :]

    threading.Thread(target=feed, daemon=True).start()
    while data := tor.run(stream.read(1 << 16)):
        http_call("standard output", show, data)
    tor.run(stream.wait_closed())  # when all is sent


def read_peers(options, folder):
    """The contacts that --peer, --peers and the last time name; ConfigError."""
    lines = [("--peer", text) for text in options.peer]
    for path in (options.peers, folder + "/peers"):
        data = read_file(path) if path else b""
        if data is None and path is options.peers:
            raise ConfigError("cannot read %s" % path)
        for text in (data or b"").decode("utf-8", "replace").split("\n"):
            lines.append((path, text.partition("#")[0].strip()))
    found = []
    for source, text in lines:
        try:
            found += [parse_contact(text)] if text else []
        except AddressError as e:
            raise ConfigError("%s: %s" % (source, e))
    return found


def offers(words, port):
    """{name: (port, metadata)}, {port: target} of what --advertise names: NAME[=WHAT], WHAT as
    after --serve; ConfigError."""
    services, targets = {}, {}
    for word in words:
        name, _, what = word.partition("=")
        check_target("port", port)
        services[name], targets[port] = (port, b""), serve_target(what)
        port += 1
    fault = _ad_fault(services, AD_SECONDS)
    if fault or PEER_PORT in targets or len(targets) > len(services):
        port = "port %d is for peers, and a name cannot be there twice" % PEER_PORT
        raise ConfigError("--advertise: " + (fault or port))
    return services, targets


async def _node_of(tor, key, targets=None):
    # For peers over Tor; with targets it is reached, too.
    transport = TorTransport(tor, key if targets is not None else None, others=targets or ())
    if targets is None:
        transport.listen = lambda accept: asyncio.sleep(0)
    node = Node(key, transport)
    # What is sent here is small, and so is what a stranger can make this machine keep.
    node.buffer, node.largest = 1 << 18, 1 << 16
    return await node.start()


async def _leave(node):
    try:
        await node.close(0)
    except LinkError:
        pass  # answers that nobody waited for


def _remember(peer, folder):
    known = [address + "\n" for _, address in peer.contacts()]
    if known:
        cache_file(folder + "/peers", "".join(known).encode())


async def advertise(tor, key, services, targets, contacts, folder):
    """Host and advertise services for ever, as --advertise does."""
    node, said = await _node_of(tor, key, targets), [None]
    peer = Discovery.over(node)
    print(peer.address, flush=True)

    def told(error, kept):
        if error:
            log(WARN, "%s", error)
        elif kept not in said:
            print("Advertised at %d peers" % kept, file=sys.stderr)
        said[0] = kept
        _remember(peer, folder)

    try:
        await peer.stay(contacts, services, told)
    finally:
        await _leave(node)


async def discover(tor, what, contacts, folder):
    """Print what --discover does, for a service's name or an onion address."""
    node = await _node_of(tor, urandom(32))
    try:
        peer = Discovery.over(node)
        await peer.join(contacts)
        _remember(peer, folder)
        ads = [await peer.locate(what)] if is_onion(what) else await peer.discover(what)
        if not ads:
            raise DiscoveryError("nobody advertises " + what)
        for ad in ads:
            for name in sorted(ad.services) if is_onion(what) else [what]:
                print("%s:%d %s" % (ad.address, ad.services[name][0], name))
    finally:
        await _leave(node)


def peer_options(choose, add):
    choose("--advertise", nargs="+", metavar="NAME[=WHAT]",
        help="host WHAT, as --serve does, and tell peers that it is there")
    choose("--discover", metavar="NAME", help="print who offers it; ADDRESS: what that offers")
    add("--peer", action="append", default=[], metavar="ADDRESS",
        help="a peer to ask first (what its --advertise prints)")
    add("--peers", metavar="FILE", help="peers, one a line")


def peer_command(options, folder, key_dir):
    """Check --advertise or --discover; return function(tor): a coroutine that does it, or None."""
    what = options.discover
    if not options.advertise and what is None:
        return None
    contacts = read_peers(options, folder)
    if options.advertise:
        services, targets = offers(options.advertise, options.port)
        private_dir(folder)
        key = load_service_key(key_dir)
        return lambda tor: advertise(tor, key, services, targets, contacts, folder)
    if is_onion(what):
        parse_onion_address(what)
    else:
        check_service(what)
    if not contacts:
        raise ConfigError("nobody is known who could be asked: say --peer ADDRESS, or --peers "
                          "FILE, with what --advertise prints elsewhere")
    return lambda tor: discover(tor, what, contacts, folder)


def run_command(options):
    import shutil

    if options.diverse:
        diversify()
    folder = folders(options.data_dir, options.network)[0]
    key_dir = options.key_dir or folder + "/onion_service"
    if options.address:
        private_dir(folder)
        return print(onion_address(load_service_key(key_dir)[1]))
    if options.make_client_key:
        name, address = (options.make_client_key + [None])[:2]
        return make_client_key(name, address, key_dir, options.auth_dir)
    check_target("port", options.port)
    doors = [("socks", options.socks)] * (options.socks is not None)
    doors += [("http", options.http_tunnel)] * (options.http_tunnel is not None)
    keys = load_onion_keys(options.auth_dir) if options.auth_dir else {}
    # A port that is taken shows before the bootstrap.
    doors = [Proxy(kind, *text.partition(" ")[::2]) for kind, text in doors]
    if options.serve is not None:
        target = serve_target(options.serve)
    if options.connect is not None:
        target = split_address(options.connect, options.port)
        if is_onion(target[0]):
            parse_onion_address(target[0])
    command = peer_command(options, folder, key_dir)
    progress = lambda *what: print("Bootstrapped %d%% (%s): %s" % what, file=sys.stderr)
    with Tor(options.data_dir, options.network, progress) as tor:
        for identity, (key, _) in keys.items():
            tor.add_onion_key(onion_address(identity), key)
        for proxy in doors:
            tor.run(proxy.start(tor))
            print("%s proxy at %s" % (proxy.kind.upper(), proxy.address), flush=True)
        if doors:
            return threading.Event().wait()
        if options.connect is not None:
            return netcat(tor, *target, options.q)
        if command:
            return tor.run(command(tor))
        if not options.get:
            service = tor.create_onion_service(options.port, target, options.key_dir)
            print(service.address, flush=True)
            return threading.Event().wait()
        with tor.urlopen(options.get) as response:
            with open(options.o or 1, "wb", closefd=bool(options.o)) as out:
                http_call(options.get, shutil.copyfileobj, response, out)
        if response.length:
            raise StreamError(options.get + " ends early")


def parse_options(argv):
    """What `argv`, without the program's name, asks for; it exits where that is nothing."""
    import argparse

    parser = argparse.ArgumentParser("minitor", allow_abbrev=False, epilog=(
        "As tor: -f torrc, options of a torrc (--SocksPort 9050), --verify-config, "
        "--hash-password; and --status, --newnym, --stop for one that runs."))
    parser.error = lambda message: parser.exit(2, "minitor: %s (see --help)\n" % message)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--serve", nargs="?", const="", metavar="WHAT",
        help="host a page, PORT, HOST:PORT, unix:/PATH or FOLDER at an onion address")
    add("--get", "--host", metavar="URL", help="fetch a URL or onion address")
    add("--connect", metavar="ADDRESS[:PORT]",
        help="connect standard input and output to it, as netcat")
    peer_options(add, parser.add_argument)
    add("--address", action="store_true", help="print the service's address")
    add("--make-client-key", nargs="+", metavar=("NAME", "ADDRESS"),
        help="make the key of a client that the service, or the one at ADDRESS, admits")
    add("--socks", nargs="?", const="9050", metavar="WHERE",
        help="be a SOCKS proxy at [ADDRESS:]PORT or unix:PATH (9050)")
    add = parser.add_argument
    add("--http-tunnel", metavar="WHERE", help="with --socks: take HTTP CONNECT there")
    add("-o", metavar="FILE", help="where --get writes (standard output)")
    add("--diverse", action="store_true",
        help="take the hops of each circuit in different countries (Debian: tor-geoipdb)")
    add("-q", type=float, metavar="SECONDS", help="with --connect: end so long after the input")
    add("--port", type=int, default=80, help="the service's port (80)")
    add("--key-dir", help="the service's key, as tor's HiddenServiceDir")
    add("--auth-dir", help="client keys for onion services, as tor's ClientOnionAuthDir")
    add("--data-dir", help="state (~/.local/state/minitor)")
    add("--network", help="another Tor network ($MINITOR_NETWORK)")
    add("-v", action="count", default=0, help="say more")
    add("--version", action="version", version="minitor " + __version__)
    options = parser.parse_args(argv)
    if options.http_tunnel and not options.socks:
        parser.error("--http-tunnel goes with --socks")
    if len(options.make_client_key or ()) > 2:
        parser.error("--make-client-key takes a NAME and an ADDRESS")
    return options


def main(argv=None):
    """Run the command line `argv` (default: the program's); return the exit status."""
    import signal

    argv = sys.argv[1:] if argv is None else argv
    if is_for_daemon(argv):
        try:
            return run_daemon(argv)
        except TorError as e:
            print("minitor:", e, file=sys.stderr)
            return 1
    options = parse_options(argv)
    # No onion address of others, as with SafeLogging.
    set_log((WARN, INFO, DEBUG)[min(options.v, 2)], lambda severity, text: print(
        time.strftime("%H:%M:%S [") + _SEVERITIES[severity],
        _ADDRESS_TEXT.sub("[scrubbed]", text), sep="] ", file=sys.stderr))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(options)
    except KeyboardInterrupt:
        return 130 if options.get or options.connect or getattr(options, "discover", 0) else 0
    except Exception as e:
        if options.v > 1:
            print_exception(e)
        print("minitor:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
