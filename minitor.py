"""Tor in one Python file: a client and an onion-service host, without dependencies.

The same file runs on CPython (3.9 and later) and on MicroPython (1.24 and
later).  It is read from top to bottom: each section uses only what stands
above it; the upper half turns bytes into values and values into bytes, the
lower half talks to the network.

    with minitor.Tor() as tor:
        print(tor.http_get("http://<56 characters>.onion/"))
        service = tor.create_onion_service(80, target=8080)
        print(service.address)

MIT licence.
"""

__version__ = "0.1.0"
__all__ = ("AsyncTor", "Tor", "TorError")

# ═══ 1. Platform ════════════════════════════════════════════════════════════
# Every difference between CPython and MicroPython, and nothing of it below.

import asyncio
import binascii
import hashlib
import json
import os
import struct
import sys
import time
from array import array

MICROPYTHON = sys.implementation.name == "micropython"

if MICROPYTHON:
    import tls

    # MicroPython counts from 1970 on Unix and from 2000 on a chip.
    _EPOCH = 946684800 if time.gmtime(0)[0] == 2000 else 0
    ticks_ms = time.ticks_ms
    ticks_diff = time.ticks_diff
    current_task = asyncio.current_task

    def hexlify(data):
        return binascii.hexlify(data).decode()

    def makedirs(path):
        """Make the folder `path` and those above it."""
        at = ""
        for part in path.split("/"):
            at += part + "/"
            try:
                os.mkdir(at[:-1])
            except OSError:
                pass

    def consteq(a, b):
        """Compare two byte strings of equal length in constant time."""
        if len(a) != len(b):
            return False
        bits = 0
        for x, y in zip(a, b):
            bits |= x ^ y
        return bits == 0

    def _restrict(path, mode):
        pass

    def _sync(file):
        file.flush()
else:
    import hmac
    import ssl

    _EPOCH = 0
    current_task = asyncio.current_task
    consteq = hmac.compare_digest

    def ticks_ms():
        """Return milliseconds of a clock that never goes back; compare with `ticks_diff`."""
        return int(time.monotonic() * 1000)

    def ticks_diff(later, earlier):
        return later - earlier

    def hexlify(data):
        return bytes(data).hex()

    def makedirs(path):
        """Make the folder `path`, mode 0700, and those above it."""
        os.makedirs(path, 0o700, exist_ok=True)

    def _restrict(path, mode):
        os.chmod(path, mode)

    def _sync(file):
        file.flush()
        os.fsync(file.fileno())


def now():
    """Return the time in whole seconds since 1970."""
    return int(time.time()) + _EPOCH


def utc(seconds):
    """Return `seconds` since 1970 as year, month, day, hour, minute, second."""
    return time.gmtime(seconds - _EPOCH)[:6]


def urandom(n):
    return os.urandom(n)


def randbelow(n):
    """Return a uniform integer in [0, n), n at least 1, from the system's randomness."""
    size, top = 1, 256
    while top < n:
        size, top = size + 1, top << 8
    top -= top % n
    while True:
        x = int.from_bytes(os.urandom(size), "big")
        if x < top:
            return x % n


def sha256(data):
    return hashlib.sha256(data).digest()


def read_file(path):
    """Return the bytes of the file `path`, or None where there is none."""
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError:
        return None


def write_file(path, data, mode=0o600):
    """Replace the file `path` by `data` (bytes, or an iterable of bytes) in one step."""
    partial = path + ".tmp"
    if not MICROPYTHON:
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode))
    with open(partial, "wb") as f:
        for piece in (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data:
            f.write(piece)
        _sync(f)
    _restrict(partial, mode)
    os.rename(partial, path)


def private_dir(path):
    """Make the folder `path`, and let only its owner in."""
    makedirs(path)
    _restrict(path, 0o700)


DEBUG, INFO, NOTICE, WARN, ERR = 0, 1, 2, 3, 4
SEVERITIES = ("debug", "info", "notice", "warn", "err")
_log = [NOTICE, None]


def set_log(severity, sink=None):
    """Pass messages of `severity` and above to `sink(severity, text)`; None: standard error."""
    _log[:] = [severity, sink]


def log(severity, text, *args):
    """Log `text % args`.  Callers never pass private keys or addresses of clients."""
    if severity >= _log[0]:
        if args:
            text = text % args
        if _log[1]:
            _log[1](severity, text)
        else:
            stamp = "%d-%02d-%02d %02d:%02d:%02d" % utc(now())
            print("%s [%s] %s" % (stamp, SEVERITIES[severity], text), file=sys.stderr)


class Promise:
    """A value, or an exception, that one task sets and others wait for."""

    def __init__(self):
        self._event = asyncio.Event()
        self._value = self._error = None

    def done(self):
        return self._event.is_set()

    def get(self):
        """Return the value, None where there is none (yet)."""
        return self._value

    def set(self, value=None):
        if not self._event.is_set():
            self._value = value
            self._event.set()

    def fail(self, error):
        if not self._event.is_set():
            self._error = error
            self._event.set()

    async def wait(self, seconds=None):
        """Return the value or raise the exception; asyncio.TimeoutError after `seconds`."""
        if not self._event.is_set():
            if seconds is None:
                await self._event.wait()
            else:
                await asyncio.wait_for(self._event.wait(), seconds)
        if self._error is not None:
            raise self._error
        return self._value


_tasks = set()


def spawn(coroutine):
    """Run `coroutine` as a task that the module holds on to, and return the task.

    An exception that gets out of it is a bug of ours: it is logged, and ends that task only.
    """

    async def run():
        try:
            await coroutine
        except asyncio.CancelledError:
            raise
        except Exception as e:
            log(ERR, "bug: %s in a task: %s", type(e).__name__, e)
            if _log[0] == DEBUG:
                print_exception(e)
        finally:
            _tasks.discard(current_task())

    task = asyncio.create_task(run())
    _tasks.add(task)
    return task


def print_exception(error):
    if MICROPYTHON:
        sys.print_exception(error)
    else:
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)


def _host_name():
    # Shaped like a host name and random, as tor's are: a fixed one, or none, would stand out.
    letters = "abcdefghijklmnopqrstuvwxyz234567"
    return "www." + "".join(letters[b & 31] for b in urandom(8 + randbelow(12))) + ".com"


async def tls_connect(address, port, seconds):
    """Open a TLS connection to a relay at `address` (IP address as text).

    Returns reader, writer, and a function that gives the SHA-256 of the relay's
    certificate (bytes) once something was read.  The certificate is not checked
    here: CERTS proves the identity (tor-spec 4.2).  Raises OSError or
    asyncio.TimeoutError.
    """
    if MICROPYTHON:
        seen = []

        def note(der, depth):
            # `der` is a view on memory that is gone afterwards.
            if depth == 0:
                seen[:] = [sha256(der)]
            return 0

        context = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT)
        context.verify_mode = tls.CERT_OPTIONAL
        context.verify_callback = note
        opening = asyncio.open_connection(
            address, port, ssl=context, server_hostname=_host_name()
        )
        reader, writer = await asyncio.wait_for(opening, seconds)
        return reader, writer, lambda: seen[0] if seen else b""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    opening = asyncio.open_connection(
        address, port, ssl=context, server_hostname=_host_name(), limit=1 << 18
    )
    reader, writer = await asyncio.wait_for(opening, seconds)
    certificate = writer.get_extra_info("ssl_object").getpeercert(True)
    return reader, writer, lambda: sha256(certificate)


async def hang_up(writer):
    """Close the connection at once, whatever is still unsent."""
    try:
        if MICROPYTHON:
            # `close` closes nothing there, `wait_closed` does.
            writer.close()
            await writer.wait_closed()
        else:
            writer.transport.abort()
    except OSError:
        pass


# ═══ 2. Errors ══════════════════════════════════════════════════════════════
# What a caller can meet.  Each message says what happened, to which relay,
# address or file, and what to do about it.


class TorError(Exception):
    """The base of every error that minitor raises."""


class ConfigError(TorError):
    """The caller asked for something that cannot be: an option, a file, an argument."""


class AddressError(ConfigError):
    """An onion address, host name or port that is not one."""


class ProtocolError(TorError):
    """A peer, a relay or a document broke the specification."""


class ClockError(TorError):
    """The clock of this machine is wrong by more than Tor can bear."""


class DirectoryError(TorError):
    """The directory could not be fetched or verified."""


class ChannelError(TorError):
    """A relay could not be reached, or the link to it broke."""


class CircuitError(TorError):
    """A circuit could not be built, or was closed; `reason` is tor-spec 5.4's number."""

    def __init__(self, text, reason=0):
        super().__init__(text)
        self.reason = reason


class StreamError(TorError):
    """A stream could not be opened, or was reset; `reason` is tor-spec 6.3's number."""

    def __init__(self, text, reason=1):
        super().__init__(text)
        self.reason = reason


class OnionError(TorError):
    """An onion service could not be reached."""


class DescriptorError(OnionError):
    """An onion service's descriptor was not found, or is not to be trusted."""


class TorTimeout(TorError):
    """Something took longer than it may."""


# ═══ 3. Bytes ═══════════════════════════════════════════════════════════════
# Readers and writers of binary structures, base32 and base64.


class Reader:
    """Take integers and byte strings, big-endian, from the front of `data`.

    Raises ProtocolError, naming `what`, when `data` is too short.
    """

    def __init__(self, data, what="structure"):
        self.data = data
        self.at = 0
        self.what = what

    def take(self, n):
        end = self.at + n
        if end > len(self.data):
            raise ProtocolError("%s is truncated at byte %d" % (self.what, len(self.data)))
        piece = bytes(self.data[self.at : end])
        self.at = end
        return piece

    def uint(self, n):
        """Take an integer of `n` bytes."""
        return int.from_bytes(self.take(n), "big")

    def left(self):
        return len(self.data) - self.at

    def rest(self):
        return self.take(self.left())


def b64encode(data):
    """Return `data` in base64, as text, without padding or line breaks."""
    return binascii.b2a_base64(data).decode().strip().rstrip("=")


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def b64decode(text):
    """Decode base64 (text or bytes, padded or not, without blanks); ProtocolError if it is not.

    MicroPython's decoder takes garbage for something, so the alphabet is checked first.
    """
    if isinstance(text, str):
        text = text.encode()
    text = text.rstrip(b"=")
    if len(text) % 4 == 1 or text.strip(_BASE64):
        raise ProtocolError("bad base64")
    try:
        return binascii.a2b_base64(text + b"==="[: -len(text) % 4])
    except ValueError:
        raise ProtocolError("bad base64")


_BASE32 = "abcdefghijklmnopqrstuvwxyz234567"


def b32encode(data):
    """Return `data` (a multiple of 5 bytes) in lower-case base32."""
    n = int.from_bytes(data, "big")
    size = len(data) * 8 // 5
    return "".join(_BASE32[n >> 5 * (size - 1 - i) & 31] for i in range(size))


def b32decode(text):
    """Decode lower- or upper-case base32 of a multiple of 8 characters; ProtocolError."""
    n = len(text) % 8
    if n:
        raise ProtocolError("bad base32")
    for c in text.lower():
        v = _BASE32.find(c)
        if v < 0:
            raise ProtocolError("bad base32")
        n = n << 5 | v
    return n.to_bytes(len(text) * 5 // 8, "big")


# ═══ 4. Hashes and ciphers ══════════════════════════════════════════════════
# SHA-1, SHA-2, SHA-3, HMAC, HKDF, and AES in counter mode (tor-spec 0.3).
#
# Sha1([data]) and Sha3_256([data]) have update(data), copy() and a repeatable digest().
# AesCtr(key[, iv]), key of 16 or 32 bytes, iv of 16 (zeros): crypt(data) encrypts or decrypts
# to bytes; the key stream goes on from call to call.

if MICROPYTHON:
    from cryptolib import aes

    _MASK = 0xFFFFFFFFFFFFFFFF

    class _Hash:
        def __init__(self, data=b"", state=None):
            # The state after whole blocks, the length of the data, what is not a block yet.
            self._state, self._length, self._rest = state or (self._start, 0, b"")
            self.update(data)

        def update(self, data):
            self._length += len(data)
            data = self._rest + bytes(data)
            at = 0
            while at + self._size <= len(data):
                self._state = self._absorb(self._state, data, at)
                at += self._size
            self._rest = data[at:]

        def copy(self):
            return type(self)(b"", (self._state, self._length, self._rest))

    class Sha1(_Hash):
        _size = 64
        _start = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)

        def _absorb(self, state, data, at):
            # FIPS 180-4 6.1.2
            mask = 0xFFFFFFFF
            w = list(struct.unpack_from(">16I", data, at))
            a, b, c, d, e = state
            for i in range(80):
                j = i & 15
                if i > 15:
                    x = w[j - 3] ^ w[j - 8] ^ w[j - 14] ^ w[j]
                    w[j] = (x << 1 | x >> 31) & mask
                if i < 20:
                    x = (d ^ b & (c ^ d)) + 0x5A827999
                elif 40 <= i < 60:
                    x = (b & c | d & (b | c)) + 0x8F1BBCDC
                else:
                    x = (b ^ c ^ d) + (0x6ED9EBA1 if i < 60 else 0xCA62C1D6)
                x += (a << 5 | a >> 27) + e + w[j]
                e, d, c, b, a = d, c, (b << 30 | b >> 2) & mask, a, x & mask
            return [(x + y) & mask for x, y in zip(state, (a, b, c, d, e))]

        def digest(self):
            end = self.copy()
            zeros = bytes((55 - self._length) % 64)
            end.update(b"\x80" + zeros + struct.pack(">Q", self._length * 8))
            return struct.pack(">5I", *end._state)

    def _keccak_tables():
        # The round constants, and for each lane that moves: whence, whither, how far it turns.
        constants, moves = [], []
        lfsr, x, y, turn = 1, 1, 0, 0
        for t in range(1, 25):
            constants.append(0)
            for j in range(7):
                constants[-1] |= (lfsr & 1) << (1 << j) - 1
                lfsr = lfsr << 1 ^ (lfsr >> 7) * 0x171
            turn = (turn + t) & 63
            i = x + 5 * y
            x, y = y, (2 * x + 3 * y) % 5
            moves.append((i, x + 5 * y, turn, 64 - turn))
        return constants, moves

    _KECCAK = _keccak_tables()

    def _keccak(a):
        # Keccak-f[1600] (FIPS 202 3.3) on a list of 25 lanes.
        mask = _MASK
        constants, moves = _KECCAK
        b = [0] * 25
        for constant in constants:
            c = [a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20] for x in range(5)]
            d = [c[x - 1] ^ (c[x - 4] << 1 & mask | c[x - 4] >> 63) for x in range(5)] * 5
            b[0] = a[0] ^ d[0]
            for i, j, left, right in moves:
                x = a[i] ^ d[i]
                b[j] = x << left & mask | x >> right
            for i in range(0, 25, 5):
                p, q, r, s, t = b[i : i + 5]
                a[i : i + 5] = p ^ r ^ q & r, q ^ s ^ r & s, r ^ t ^ s & t, s ^ p ^ t & p, t ^ q ^ p & q
            a[0] ^= constant
        return a

    class Sha3_256(_Hash):
        _size = 136
        _start = (0,) * 25

        def _absorb(self, state, data, at):
            lanes = struct.unpack_from("<17Q", data, at) + (0,) * 8
            return _keccak([x ^ y for x, y in zip(state, lanes)])

        def _end(self, suffix):
            n = 136 - len(self._rest)
            end = (suffix + (1 << 8 * n - 1)).to_bytes(n, "little")
            return self._absorb(self._state, self._rest + end, 0)

        def digest(self):
            return struct.pack("<4Q", *self._end(6)[:4])

    def shake256(data, n):
        """Return `n` bytes of SHAKE-256 of `data`."""
        a = Sha3_256(data)._end(31)
        out = struct.pack("<17Q", *a[:17])
        while len(out) < n:
            out += struct.pack("<17Q", *_keccak(a)[:17])
        return out[:n]

    def _root(n, power):
        # The first 64 bits after the point (FIPS 180-4 4.2.3, 5.3.5).
        x = 0
        for bit in range(66, -1, -1):
            if (x | 1 << bit) ** power <= n << 64 * power:
                x |= 1 << bit
        return x & _MASK

    _sha512 = []

    def sha512(data):
        if not _sha512:
            primes = [p for p in range(2, 410) if all(p % q for q in range(2, p))]
            _sha512[:] = [_root(p, 3) for p in primes], [_root(p, 2) for p in primes[:8]]
        mask = _MASK
        constants, state = _sha512
        n = len(data)
        data = data + b"\x80" + bytes((111 - n) % 128 + 8) + struct.pack(">Q", n * 8)
        for at in range(0, len(data), 128):
            w = list(struct.unpack_from(">16Q", data, at))
            a, b, c, d, e, f, g, h = state
            for i, k in enumerate(constants):
                # A word twice, one behind the other, is turned by a shift.
                j = i & 15
                if i > 15:
                    x = w[j - 15] * (mask + 2)
                    y = w[j - 2] * (mask + 2)
                    x = (x >> 1 ^ x >> 8 ^ x >> 71) & mask
                    w[j] = w[j] + w[j - 7] + x + ((y >> 19 ^ y >> 61 ^ y >> 70) & mask) & mask
                x = e | e << 64
                y = a | a << 64
                x = h + ((x >> 14 ^ x >> 18 ^ x >> 41) & mask) + (g ^ e & (f ^ g)) + k + w[j]
                y = ((y >> 28 ^ y >> 34 ^ y >> 39) & mask) + (a & b | c & (a | b))
                a, b, c, d, e, f, g, h = (x + y) & mask, a, b, c, (d + x) & mask, e, f, g
            state = [(x + y) & mask for x, y in zip(state, (a, b, c, d, e, f, g, h))]
        return struct.pack(">8Q", *state)

    class AesCtr:
        # Keeps no cipher object: those take 313 bytes, and no time to make.

        def __init__(self, key, iv=bytes(16)):
            self._key = key
            # The counter, and in four more bits the byte within its block.
            self._at = int.from_bytes(iv, "big") << 4

        def crypt(self, data):
            cipher = aes(self._key, 1)
            pieces = []
            at = 0
            while at < len(data):
                # The key stream to the next multiple of 1 KB: one byte of the counter changes.
                piece = data[at : at + 1024 - (self._at & 1023)]
                n = len(piece)
                skip = self._at & 15
                counter = (self._at >> 4 & (1 << 128) - 1).to_bytes(16, "big")
                blocks = bytearray(counter * (skip + n + 15 >> 4))
                for i in range(15, len(blocks), 16):
                    blocks[i] += i >> 4
                cipher.encrypt(blocks, blocks)
                x = int.from_bytes(blocks[skip : skip + n], "big") ^ int.from_bytes(piece, "big")
                pieces.append(x.to_bytes(n, "big"))
                at += n
                self._at += n
            return b"".join(pieces)

else:
    Sha1 = hashlib.sha1
    Sha3_256 = hashlib.sha3_256

    def shake256(data, n):
        """Return `n` bytes of SHAKE-256 of `data`."""
        return hashlib.shake_256(data).digest(n)

    def sha512(data):
        return hashlib.sha512(data).digest()

    # The portable AES works on planes: integers whose bit b belongs to block b.  A byte is
    # eight of them, the highest bit first, and a state 16 bytes; so moving bytes and doubling
    # costs nothing, and 2,048 blocks little more than one.
    _BLOCKS = 2048
    _ONES = (1 << _BLOCKS) - 1
    _LOW_BITS = ((1 << 8 * _BLOCKS) - 1) // 255
    # The numbers 0 to 2,047, but the lowest bit first.
    _COUNT = [_ONES // ((1 << (1 << j)) + 1) << (1 << j) for j in range(11)]

    def _constant(x):
        return [_ONES * (x >> j & 1) for j in range(7, -1, -1)]

    def _sum(a, b):
        return [x ^ y for x, y in zip(a, b)]

    def _bytes(planes):
        # The byte of each block: a plane's binary digits are characters with its bits lowest.
        x = 0
        for plane in planes:
            digits = bin(plane | _ONES + 1)[3:].encode()
            x = x << 1 | int.from_bytes(digits, "big") & _LOW_BITS
        return x.to_bytes(_BLOCKS, "little")

    def _times(p, q):
        # In GF(2^4), on the basis z, z^2, z^3, z^4 where z^5 = 1.
        a, b, c, d = p
        e, f, g, h = q
        x = a & h ^ b & g ^ c & f ^ d & e
        y = a & f ^ b & e ^ d & h ^ x
        z = a & g ^ b & f ^ c & e ^ x
        return b & h ^ c & g ^ d & f ^ x, a & e ^ c & h ^ d & g ^ x, y, z

    def _sub_byte(a, b, c, d, e, f, g, h):
        # The S-box less its 0x63 (FIPS 197 5.1.1), by way of GF(2^4)[y] / (y^2 + y + z): the
        # inverse of p·y + q is (p·y + p + q)·s^14, where s = z·p^2 + q·(p + q).
        x, y = f ^ h, a ^ c ^ g
        p = b ^ c ^ d, y, a ^ b ^ d ^ e ^ f, y ^ e ^ f
        q = x ^ e, x, c ^ h, y ^ b ^ h
        r = _sum(p, q)
        a, b, c, d = p
        s = t = _sum(_times(q, r), (b, b ^ c, a ^ b, b ^ d))
        for x in 0, 1:
            t = _times((t[2], t[0], t[3], t[1]), s)
        t = t[2], t[0], t[3], t[1]
        a, b, c, d = _times(r, t)
        e, f, g, h = _times(p, t)
        x = c ^ f ^ g ^ h
        y = a ^ d ^ x
        return [b ^ c ^ g, e ^ f ^ h, y ^ c, y, c ^ h, b ^ c ^ d, d, x]

    def _round_keys(key):
        # FIPS 197 5.2, each byte as planes, the S-box's 0x63 added to those after the first 16.
        box = [x ^ 0x63 for x in _bytes(_sub_byte(*_COUNT[7::-1]))[:256]]
        size = len(key)
        w = list(key)
        power = 1
        while len(w) < 4 * size + 112:
            t = w[-4:]
            if len(w) % size in (0, 16):
                t = [box[x] for x in t]
            if len(w) % size == 0:
                t = [t[1] ^ power, t[2], t[3], t[0]]
                power = power << 1 ^ (power >> 7) * 0x11B
            w += _sum(t, w[-size:])
        return [_constant(x ^ 0x63 * (i > 15)) for i, x in enumerate(w)]

    def _mix(u, a, v, k):
        # MixColumns and AddRoundKey: 2·u + a + v + k, u and v being sums of neighbours.
        u0, u1, u2, u3, u4, u5, u6, u7 = u
        u = u1, u2, u3, u4 ^ u0, u5 ^ u0, u6, u7 ^ u0, u0
        return [w ^ x ^ y ^ z for w, x, y, z in zip(u, a, v, k)]

    def _key_stream(keys, counter):
        # The key stream of 2,048 blocks from `counter` on, which is a multiple of that.
        s = [_sum(_constant(x), k) for x, k in zip(counter.to_bytes(16, "big"), keys)]
        s[14][5:] = _sum(s[14][5:], _COUNT[:7:-1])
        s[15] = _sum(s[15], _COUNT[7::-1])
        for at in range(16, len(keys), 16):
            t = [_sub_byte(*s[5 * i & 15]) for i in range(16)]
            k = keys[at : at + 16]
            n = [t[i & 12 | i + 1 & 3] for i in range(16)]
            u = [_sum(x, y) for x, y in zip(t, n)]
            s = [_mix(u[i], n[i], u[i ^ 2], k[i]) for i in range(16)]
        out = bytearray(16 * _BLOCKS)
        for i in range(16):
            out[i::16] = _bytes(_sum(t[i], k[i]))
        return out

    class AesCtrPortable:
        def __init__(self, key, iv=bytes(16)):
            self._keys = _round_keys(key)
            counter = int.from_bytes(iv, "big")
            self._counter = counter - counter % _BLOCKS
            self._stream = bytearray()
            self.crypt(bytes(counter % _BLOCKS * 16))

        def crypt(self, data):
            n = len(data)
            while len(self._stream) < n:
                self._stream += _key_stream(self._keys, self._counter)
                self._counter = (self._counter + _BLOCKS) % (1 << 128)
            x = int.from_bytes(data, "little") ^ int.from_bytes(self._stream[:n], "little")
            del self._stream[:n]
            return x.to_bytes(n, "little")

    class AesCtrOpenssl:
        def __init__(self, key, iv=bytes(16)):
            self._free = _evp.EVP_CIPHER_CTX_free
            self._update = _evp.EVP_EncryptUpdate
            self._context = ctypes.c_void_p(_evp.EVP_CIPHER_CTX_new())
            self._size = ctypes.byref(ctypes.c_int())
            cipher = ctypes.c_void_p(_ciphers[len(key)]())
            _evp.EVP_EncryptInit_ex(self._context, cipher, None, bytes(key), bytes(iv))

        def __del__(self):
            self._free(self._context)

        def crypt(self, data):
            n = len(data)
            # Filled in place before anyone sees it; of shorter ones Python keeps one for all.
            out = bytes(n if n > 1 else 2)
            self._update(self._context, out, self._size, bytes(data), n)
            return out[:n]

    AesCtr = AesCtrPortable
    try:
        import _ssl
        import ctypes

        # The interpreter's own libcrypto; calls are too short to let go of its lock (CDLL).
        _evp = ctypes.PyDLL(getattr(_ssl, "__file__", None))
        _ciphers = {16: _evp.EVP_aes_128_ctr, 32: _evp.EVP_aes_256_ctr}
        for _function in _evp.EVP_CIPHER_CTX_new, _ciphers[16], _ciphers[32]:
            _function.restype = ctypes.c_void_p
        if not os.environ.get("MINITOR_PORTABLE_AES"):
            if AesCtrOpenssl(bytes(16)).crypt(bytes(4)) == b"\x66\xe9\x4b\xd4":
                AesCtr = AesCtrOpenssl
    except Exception:
        pass  # No OpenSSL within reach, whatever the reason.


def sha1(data):
    return hashlib.sha1(data).digest()


def sha3_256(data):
    return Sha3_256(data).digest()


def hmac_sha256(key, data):
    if len(key) > 64:
        key = sha256(key)
    key += bytes(64 - len(key))
    inner = sha256(bytes(b ^ 0x36 for b in key) + data)
    return sha256(bytes(b ^ 0x5C for b in key) + inner)


def hkdf_sha256(secret, salt, info, n):
    """Return `n` bytes (up to 8,160) derived from `secret` (RFC 5869)."""
    key = hmac_sha256(salt, secret)
    out = block = b""
    i = 0
    while len(out) < n:
        i += 1
        block = hmac_sha256(key, block + info + bytes((i,)))
        out += block
    return out[:n]


# ═══ 5. Curves and signatures ═══════════════════════════════════════════════
# X25519 (RFC 7748), Ed25519 (RFC 8032) with key blinding (rend-spec-v3, A.2),
# RSA as directory authorities sign.  Python's integers are not constant-time.

_P = (1 << 255) - 19
_L = (1 << 252) + 27742317777372353535851937790883648493
_D = 0x52036CEE2B6FFE738CC740797779E89800700A4D4141D8AB75EB4DCA135978A3
_ROOT = 0x2B8324804FC1DF0B2B4D00993DFBD7A72F431806AD2FE478C4EE1B274A0EA0B0  # of -1


def _int(data):
    return int.from_bytes(data, "little")


def _clamp(data):
    return _int(data) & (1 << 254) - 8 | 1 << 254


def x25519(k, u):
    """Return the secret (32 bytes) that the secret key `k` and the public key `u` share.

    Raises ProtocolError if `u` has low order (RFC 7748, 6.1) or not 32 bytes.
    """
    if len(u) != 32:
        raise ProtocolError("X25519 key of %d bytes" % len(u))
    p = _P
    k = _clamp(k)
    u = _int(u) & (1 << 255) - 1
    x2, z2, x3, z3 = 1, 0, u, 1
    swapped = 0
    for t in range(254, -1, -1):
        bit = k >> t & 1
        if bit != swapped:
            x2, z2, x3, z3 = x3, z3, x2, z2
            swapped = bit
        a, b = x2 + z2, x2 - z2
        da, cb = (x3 - z3) * a, (x3 + z3) * b
        x3, z3 = (da + cb) % p, (da - cb) % p
        x3, z3 = x3 * x3 % p, z3 * z3 % p * u % p
        a, b = a * a % p, b * b % p
        c = a - b
        x2, z2 = a * b % p, (a + 121665 * c) * c % p
    # Bit 0 of a clamped k is 0: no swap is left.
    x2 = x2 * pow(z2, p - 2, p) % p
    if not x2:
        raise ProtocolError("X25519 key of low order")
    return x2.to_bytes(32, "little")


def x25519_public(x):
    """Return the public key of the secret key `x`."""
    return x25519(x, b"\t" + bytes(31))


def x25519_keypair():
    """Return a new secret key and its public key."""
    x = urandom(32)
    return x, x25519_public(x)


# Points are tuples X, Y, Z, T: x = X/Z, y = Y/Z, xy = T/Z (RFC 8032, section 5.1.4).


def _add(p, q):
    x1, y1, z1, t1 = p
    x2, y2, z2, t2 = q
    a = (y1 - x1) * (y2 - x2) % _P
    b = (y1 + x1) * (y2 + x2) % _P
    c = t1 * t2 % _P * (2 * _D) % _P
    d = 2 * z1 * z2 % _P
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % _P, g * h % _P, f * g % _P, e * h % _P


def _multiply(*terms):
    """Return the sum of k * point over `terms`, pairs of k (of either sign) and point.

    Each k becomes odd digits, four zeros or more between them; above 16, d means d - 32.
    """
    rows = []
    for k, point in terms:
        twice = _add(point, point)
        odd = [point]
        for i in range(7):
            odd.append(_add(odd[i], twice))
        odd += [(-x, y, z, -t) for x, y, z, t in odd[::-1]]
        digits = bytearray(260)
        i = 0
        while k:
            if k & 1:
                digits[i] = d = k & 31
                k += 32 - d if d > 16 else -d
            k >>= 1
            i += 1
        rows.append((digits, odd))
    p = _P
    x, y, z, e, h = 0, 1, 1, 0, 1
    for i in range(259, -1, -1):
        a, b = x * x % p, y * y % p
        e, g, h = -2 * x * y % p, a - b, a + b
        f = (2 * z * z + g) % p
        x, y, z = e * f % p, g * h % p, f * g % p
        # Only an addition needs T = e * h.
        for digits, odd in rows:
            if digits[i]:
                x, y, z, h = _add((x, y, z, e * h % p), odd[digits[i] >> 1])
                e = 1
    return x, y, z, e * h % p


def _encode(point):
    z = pow(point[2], _P - 2, _P)
    return (point[1] * z % _P | (point[0] * z % _P & 1) << 255).to_bytes(32, "little")


def _decode(data):
    # RFC 8032, 5.1.3.  None if `data` is not the one encoding of a point.
    y = _int(data)
    sign = y >> 255
    y &= (1 << 255) - 1
    if len(data) != 32 or y >= _P:
        return None
    v = (y * y * _D + 1) % _P
    xx = (y * y - 1) * pow(v, _P - 2, _P) % _P
    x = pow(xx, (_P + 3) // 8, _P)
    if x * x % _P != xx:
        x = x * _ROOT % _P
    if x * x % _P != xx or sign and not x:
        return None
    if x & 1 != sign:
        x = _P - x
    return x, y, 1, x * y % _P


_BASE = _decode(b"X" + b"f" * 31)


def ed25519_valid(public):
    """Return whether `public` is a point of prime order: no torsion."""
    A = _decode(public)
    return A is not None and A[1] != 1 and _encode(_multiply((_L, A))) == b"\1" + bytes(31)


def ed25519_expand(seed):
    """Return the expanded secret key of a seed: 32 bytes of scalar, 32 of prefix."""
    esk = sha512(seed)
    return _clamp(esk[:32]).to_bytes(32, "little") + esk[32:]


def ed25519_public_expanded(esk):
    """Return the public key of an expanded secret key."""
    return _encode(_multiply((_int(esk[:32]), _BASE)))


def ed25519_public(seed):
    """Return the public key of a seed."""
    return ed25519_public_expanded(ed25519_expand(seed))


def ed25519_sign_expanded(esk, public, message):
    """Return the signature (64 bytes) of `message` by an expanded secret key."""
    r = _int(sha512(esk[32:] + message)) % _L
    R = _encode(_multiply((r, _BASE)))
    h = _int(sha512(R + public + message))
    return R + ((r + h * _int(esk[:32])) % _L).to_bytes(32, "little")


def ed25519_sign(seed, message):
    """Return the signature of `message` by the key of a seed."""
    esk = ed25519_expand(seed)
    return ed25519_sign_expanded(esk, ed25519_public_expanded(esk), message)


def ed25519_verify(public, message, signature):
    """Return whether `signature` over `message` is by the key `public`.

    Without cofactor, as in tor; S beyond the group order and keys of low order are refused.
    """
    A = _decode(public)
    s = _int(signature[32:])
    if len(signature) != 64 or s >= _L or A is None:
        return False
    eight = A
    for i in range(3):
        eight = _add(eight, eight)
    if not eight[0]:
        return False
    R = bytes(signature[:32])
    h = _int(sha512(R + public + message)) % _L
    return _encode(_multiply((s, _BASE), (-h, A))) == R


def ed25519_blind_public(public, param):
    """Blind the key `public` by `param` (32 bytes); ProtocolError if it is no point."""
    A = _decode(public)
    if A is None:
        raise ProtocolError("Ed25519 key is no point")
    return _encode(_multiply((_clamp(param), A)))


def ed25519_blind_secret(esk, param):
    """Blind an expanded secret key into another."""
    a = _clamp(param) * _int(esk[:32]) % _L
    prefix = sha512(b"Derive temporary signing key hash input" + esk[32:])[:32]
    return a.to_bytes(32, "little") + prefix


def der_take(reader, tag):
    """Take a DER element of type `tag` from a Reader; return its content."""
    found, n = reader.uint(1), reader.uint(1)
    if n > 127:
        size = n & 127
        n = reader.uint(size) if 0 < size < 3 else 0
        if n < 128 or size == 2 and n < 256:
            found = None
    if found != tag:
        raise ProtocolError("bad DER in %s" % reader.what)
    return reader.take(n)


def rsa_public_key(der):
    """Return (n, e) of an RSAPublicKey in DER (RFC 8017, A.1.1).

    Raises ProtocolError unless n has 1024 to 4096 bits in whole bytes and e is 65537.
    """
    outer = Reader(der, "RSA key")
    inner = Reader(der_take(outer, 0x30), "RSA key")
    n, e = der_take(inner, 2), der_take(inner, 2)
    whole = 129 <= len(n) <= 513 and not n[0] and n[1] > 127
    if not whole or not n[-1] & 1 or e != b"\1\0\1" or inner.left() or outer.left():
        raise ProtocolError("bad RSA key")
    return int.from_bytes(n, "big"), 65537


def rsa_verify(key, digest, signature):
    """Return whether `signature` is PKCS#1 v1.5 by (n, e) over the bare `digest` (dir-spec 1.3)."""
    n, e = key
    size = len(signature)
    s = int.from_bytes(signature, "big")
    if size < 128 or n >> 8 * size - 1 != 1 or s >= n:
        return False
    padded = b"\0\1" + b"\xff" * (size - 3 - len(digest)) + b"\0" + digest
    return pow(s, e, n) == int.from_bytes(padded, "big")


# ═══ 6. Certificates and documents ══════════════════════════════════════════
# cert-spec, and dir-spec's authority certificates, microdescriptor consensus and
# microdescriptors.  The last two are parsed as they arrive, and never held whole.


class EdCert:
    """An Ed25519 certificate (cert-spec 2.1), from `parse_ed_cert`.

    `type`; `expires` (seconds since 1970); `key_type`; `key`, the 32 bytes certified;
    `signing_key`, the 32 bytes of the extension 04, or None.
    """

    def check(self, public, when):
        """Raise ProtocolError unless `public` (None: `signing_key`) signed it and it is good."""
        public = public or self.signing_key
        if public is None or self.signing_key not in (None, public):
            raise ProtocolError("%s is signed by another key" % self.what)
        if self.expires < when:
            raise ProtocolError("%s has expired" % self.what)
        if not ed25519_verify(public, self.body, self.signature):
            raise ProtocolError("%s has a bad signature" % self.what)


def parse_ed_cert(data, what, kind=None):
    """Return the EdCert (of type `kind`, if given) in `data`; errors name `what`."""
    r = Reader(data, what)
    cert = EdCert()
    version, cert.what, cert.type = r.uint(1), what, r.uint(1)
    if version != 1 or kind not in (None, cert.type):
        raise ProtocolError("%s has version %d, type %d" % (what, version, cert.type))
    cert.expires = r.uint(4) * 3600
    cert.key_type, cert.key, cert.signing_key = r.uint(1), r.take(32), None
    for _ in range(r.uint(1)):
        size, extension, flags = r.uint(2), r.uint(1), r.uint(1)
        body = r.take(size)
        if extension == 4 and size == 32:
            cert.signing_key = body
        elif extension == 4 or flags & 1:
            raise ProtocolError("%s has a bad extension %d" % (what, extension))
    cert.body = bytes(data[: r.at])
    cert.signature = r.take(64)
    if r.left():
        raise ProtocolError("%s is too long" % what)
    return cert


def parse_crosscert(data, rsa_key, when):
    """Return the Ed25519 identity that `rsa_key` certifies in `data` (cert-spec 2.3)."""
    r = Reader(data, "RSA cross-certificate")
    key, expires = r.take(32), r.uint(4) * 3600
    signature = r.take(r.uint(1))
    digest = sha256(b"Tor TLS RSA/Ed25519 cross-certificate" + bytes(data[:36]))
    if r.left() or expires < when or not rsa_verify(rsa_key, digest, signature):
        raise ProtocolError("RSA cross-certificate is expired or wrong")
    return key


def document_items(lines):
    """Return [[keyword, arguments, object]] of a document's lines (dir-spec 1.2), as bytes."""
    items, armour = [], None
    for line in lines:
        if line.startswith(b"-----BEGIN ") and items:
            armour = []
        elif armour is None:
            if line:
                keyword, _, arguments = line.partition(b" ")
                items.append([keyword, arguments, b""])
        elif line.startswith(b"-----END "):
            items[-1][2] = b64decode(b"".join(armour))
            armour = None
        else:
            armour.append(line)
    return items


def one_item(items, keyword, default=None):
    """Return arguments and object of the item that stands there exactly once.

    With `default`, that (and no object) if it is not there.
    """
    found = [item for item in items if item[0] == keyword]
    if len(found) != 1:
        if found or default is None:
            raise ProtocolError("a document has %d times %s" % (len(found), keyword.decode()))
        return default, b""
    return found[0][1], found[0][2]


def parse_time(text):
    """Return b"2024-05-17 17:00:00" as seconds since 1970; ValueError."""
    date, _, clock = text.partition(b" ")
    year, month, day = [int(x) for x in date.split(b"-")]
    hour, minute, second = [int(x) for x in clock.split(b":")]
    if not (1970 <= year < 10000 and 1 <= month <= 12 and 1 <= day <= 31 and 0 <= hour < 24):
        raise ValueError
    # In a year that begins with March the leap day comes last.
    year -= month < 3
    day += year * 365 + year // 4 - year // 100 + year // 400 + ((month + 9) % 12 * 153 + 2) // 5
    return (day - 719469) * 86400 + hour * 3600 + minute * 60 + second


def _b64(text, size):
    data = b64decode(text)
    if len(data) != size:
        raise ValueError
    return data


def parse_authority_certs(text, identities):
    """Return {(identity, signing key digest): (key, expires)} of key certificates (dir-spec 3.1).

    `text` (bytes) holds any number; those of others than `identities` (20-byte
    fingerprints) are passed over.  ProtocolError if one is malformed or badly signed.
    """
    found = {}
    mark, signed = b"dir-key-certificate-version 3\n", b"\ndir-key-certification\n"
    for one in text.split(mark)[1:]:
        items = document_items(one.split(b"\n"))
        identity = one_item(items, b"dir-identity-key")[1]
        signing = one_item(items, b"dir-signing-key")[1]
        fingerprint, key = sha1(identity), rsa_public_key(signing)
        if fingerprint in identities:
            digest = sha1(mark + one[: one.find(signed) + len(signed)])
            certification = one_item(items, b"dir-key-certification")[1]
            if not (
                rsa_verify(rsa_public_key(identity), digest, certification)
                and rsa_verify(key, fingerprint, one_item(items, b"dir-key-crosscert")[1])
            ):
                raise ProtocolError("an authority certificate has a bad signature")
            try:
                expires = parse_time(one_item(items, b"dir-key-expires")[0])
            except ValueError:
                raise ProtocolError("an authority certificate has a bad time")
            found[fingerprint, sha1(signing)] = key, expires
    return found


# What the table keeps of a relay's flags and protocol versions, in one integer that is a
# small one on 32 bits too.  The table sets the last two: the microdescriptor is there; it
# can be used.
(AUTHORITY, BADEXIT, EXIT, FAST, GUARD, HSDIR, MIDDLEONLY, NOEDCONSENSUS, RUNNING, STABLE,
 STALEDESC, SYBIL, V2DIR, VALID, PROTO_DIRCACHE2, PROTO_FLOWCTRL1, PROTO_FLOWCTRL2,
 PROTO_HSDIR2, PROTO_HSINTRO4, PROTO_HSINTRO5, PROTO_HSREND2, PROTO_LINK4, PROTO_LINK5,
 PROTO_RELAY2, PROTO_RELAY3, PROTO_RELAY4, HAVE_MICRODESC, USABLE) = [
    1 << i for i in range(28)
]
_WORDS = (
    b"Authority BadExit Exit Fast Guard HSDir MiddleOnly NoEdConsensus Running Stable "
    b"StaleDesc Sybil V2Dir Valid DirCache=2 FlowCtrl=1 FlowCtrl=2 HSDir=2 HSIntro=4 "
    b"HSIntro=5 HSRend=2 Link=4 Link=5 Relay=2 Relay=3 Relay=4"
).split()


def _versions(words):
    # b"Link=1-3,5" as b"Link=1", b"Link=2", … (tor-spec 9); other words as they are.
    for word in words:
        name, equals, ranges = word.partition(b"=")
        if not equals:
            yield name
        for one in ranges.split(b",") if ranges else ():
            low, _, high = one.partition(b"-")
            low, high = int(low), int(high or low)
            if not 0 <= low <= high <= 63:
                raise ValueError
            for version in range(low, high + 1):
                yield name + b"=%d" % version


SUPPORTED_PROTOCOLS = [
    word.decode()
    for word in _versions(
        b"Cons=1-2 Desc=1-2 DirCache=2 FlowCtrl=1 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=4-5 "
        b"Microdesc=1-3 Relay=1-3".split()
    )
]


def _integers(text):
    # {name: integer} of b"circwindow=1000 …"
    pairs = [word.partition(b"=") for word in text.split()]
    return {name.decode(): int(value) for name, _, value in pairs}


_TIMES = ("valid_after", "fresh_until", "valid_until")
# A consensus is usable that long before and after its validity, as in tor.
_GRACE = 86400
_LEAST_METHOD = 28
_MAX_LINE = 65536


class Consensus:
    """The head and the foot of a consensus (dir-spec 3.4.1).

    `valid_after`, `fresh_until`, `valid_until` (seconds since 1970); `params`,
    `bandwidth_weights` ({name: integer}); `srv_previous`, `srv_current` (32 bytes or
    None); `required_client_protocols` (list of text like "Link=4"); and, not stored,
    `digest` (SHA-256 of what is signed) and `signatures` ({(identity, signing key
    digest): signature}).
    """

    def param(self, name, default, low=0, high=2147483647):
        """Return the parameter `name` (param-spec), kept within `low` and `high`."""
        return min(max(self.params.get(name, default), low), high)

    def missing_certs(self, certs, when):
        """List the (identity, signing key digest) of signatures that `certs` cannot check."""
        return [pair for pair in self.signatures if certs.get(pair, (0, 0))[1] < when]

    def verify(self, certs, authorities, when):
        """Raise DirectoryError unless more than half of `authorities` signed this.

        `authorities`: all identities known (20 bytes each); `certs`: from
        `parse_authority_certs`; `when`: the time at which those must be good.
        """
        good = set()
        for pair, signature in self.signatures.items():
            key, expires = certs.get(pair, (None, 0))
            if pair[0] in authorities and expires >= when:
                if rsa_verify(key, self.digest, signature):
                    good.add(pair[0])
        if len(good) * 2 <= len(authorities):
            raise DirectoryError(
                "%d of %d authorities signed the consensus: it takes more than half"
                % (len(good), len(authorities))
            )

    def check_times(self, when):
        """Raise DirectoryError or ClockError unless this can be used at the time `when`."""
        hours = (when - self.valid_after) // 3600
        if when > self.valid_until + _GRACE:
            raise DirectoryError("the consensus is %d hours old (or the clock is ahead)" % hours)
        if when < self.valid_after - _GRACE:
            raise ClockError("the clock of this machine is %d hours behind: set it" % -hours)

    def dump(self):
        """Return what `load` takes: text."""
        kept = {}
        for name, value in self.__dict__.items():
            if name not in ("digest", "signatures"):
                kept[name] = hexlify(value) if isinstance(value, bytes) else value
        return json.dumps(kept)

    def load(self, text):
        for name, value in json.loads(text).items():
            setattr(self, name, binascii.unhexlify(value) if value and name[:3] == "srv" else value)
        return self


class ConsensusParser:
    """Parse a consensus of the microdescriptor flavour as it arrives.

    Each relay that has a microdescriptor goes to `table.add(rsa_id, md_digest, address,
    port, ipv6_net, flags, weight)`; signatures of others than `authorities` are dropped.
    """

    def __init__(self, authorities, table):
        self._authorities, self._add = authorities, table.add
        # What is not parsed yet, behind the end of a line
        self._rest = b"\n"
        self._bits = {}
        self._hash, self._digest = hashlib.sha256(), None
        # The lines before and after the relays; the arguments of `add` in between
        self._head, self._foot, self._relay = [], None, None

    def feed(self, data):
        """Parse the next piece, of any size; ProtocolError if it is malformed."""
        data = self._rest + data
        end = data.rfind(b"\n")
        try:
            if not self._digest:
                mark = b"\ndirectory-signature "
                cut = data.find(mark)
                self._hash.update(data[1 : end + 1 if cut < 0 else cut + len(mark)])
                if cut >= 0:
                    self._digest = self._hash.digest()
                    self._lines(data[1 : cut + 1])
                    if self._foot is None:
                        raise ValueError
                    data, end = data[cut:], end - cut
            self._lines(data[1 : end + 1])
        except (ValueError, IndexError, TypeError):
            raise ProtocolError("the consensus is malformed")
        self._rest = data[end:]
        if len(self._rest) > _MAX_LINE:
            raise ProtocolError("a line of the consensus is too long")

    def _lines(self, data):
        # The hot loop: 50,000 lines.
        relay, bits, beside = self._relay, self._bits, self._foot
        if beside is None and not relay:
            beside = self._head
        for line in data.split(b"\n")[:-1]:
            kind = line[:2]
            if kind == b"r " and self._foot is None or kind == b"di" and relay:
                if relay and relay[1]:
                    self._add(*relay)
                beside = relay = None
                if kind == b"di":
                    self._foot = beside = []
                    continue
                word = line.split(b" ")
                address = bytes([int(x) for x in word[5].split(b".")])
                relay = [_b64(word[2], 20), None, address, int(word[6]), 0, RUNNING | VALID, 0]
            elif beside is not None:
                beside.append(line)
                if len(beside) > 2000:
                    raise ValueError
            elif kind == b"s " or kind == b"pr":
                if line not in bits:
                    if len(bits) > 1000:
                        bits.clear()
                    words = set(_versions(line.split(b" ")))
                    bits[line] = sum([1 << i for i in range(26) if _WORDS[i] in words])
                relay[5] |= bits[line]
            elif kind == b"m ":
                relay[1] = _b64(line[2:], 32)
            elif line[:12] == b"w Bandwidth=":
                relay[6] = min(int(line[12:].split(b" ")[0]), 0xFFFFFFFF)
            elif line[:3] == b"a [" and not relay[4]:
                # The /32 of b"a [2001:db8::1]:9001"
                high, low = line[3:].split(b":", 2)[:2]
                relay[4] = int(high or b"0", 16) << 16 | int(low or b"0", 16)
        self._relay = relay

    def finish(self):
        """Return the Consensus: parsed, not verified."""
        if len(self._rest) > 1 or not self._digest:
            raise ProtocolError("the consensus is truncated")
        c = Consensus()
        c.digest, c.signatures, signed = self._digest, {}, 0
        try:
            self._finish_head(c, document_items(self._head))
            foot = document_items(self._foot)
            while foot[signed][0] != b"directory-signature":
                signed += 1
            # What stands after the first signature is not signed.
            c.bandwidth_weights = _integers(one_item(foot[:signed], b"bandwidth-weights", b"")[0])
            for keyword, arguments, body in foot[signed:]:
                word = arguments.split(b" ")
                # Without a name the algorithm is SHA-1, which this flavour does not use.
                if keyword == b"directory-signature" and len(word) == 3 and word[0] == b"sha256":
                    identity, key = binascii.unhexlify(word[1]), binascii.unhexlify(word[2])
                    if identity in self._authorities:
                        c.signatures[identity, key] = body
        except (ValueError, IndexError):
            raise ProtocolError("head or foot of the consensus is malformed")
        return c

    def _finish_head(self, c, items):
        if (
            self._head[0] != b"network-status-version 3 microdesc"
            or one_item(items, b"vote-status")[0] != b"consensus"
            or int(one_item(items, b"consensus-method")[0]) < _LEAST_METHOD
        ):
            raise ProtocolError("this is no consensus of the microdescriptor flavour")
        for name in _TIMES:
            setattr(c, name, parse_time(one_item(items, name.replace("_", "-").encode())[0]))
        if not c.valid_after < c.fresh_until <= c.valid_until:
            raise ValueError
        c.params = _integers(one_item(items, b"params", b"")[0])
        required = one_item(items, b"required-client-protocols", b"")[0].split()
        c.required_client_protocols = [word.decode() for word in _versions(required)]
        for name in ("previous", "current"):
            value = one_item(items, b"shared-rand-%s-value" % name.encode(), b"")[0]
            setattr(c, "srv_" + name, _b64(value.split(b" ")[-1], 32) if value else None)


class Microdesc:
    """A microdescriptor: `digest` (SHA-256), `ntor_key`, `ed_id` (32 bytes or None),
    `family` (the first 4 bytes of each member's RSA identity), `family_ids` (8 bytes of
    the SHA-256 of each), `policy` (the exit policy summary, b"accept 80,443-445").
    """

    ntor_key = ed_id = None
    family_ids = policy = b""
    bad = False


# In 2022 the largest family had 201 members.
_MAX_FAMILY, _MAX_POLICY = 4 * 1024, 2048


class MicrodescParser:
    """Parse microdescriptors (dir-spec 3.3) as they arrive; each goes to `sink(microdesc)`.

    Nothing is trusted here: `sink` looks whether it asked for that digest.  A malformed
    one has `bad` set.
    """

    def __init__(self, sink):
        self._sink, self._rest, self._md = sink, b"", None

    def feed(self, data):
        """Parse the next piece, of any size; ProtocolError if it is malformed."""
        data = self._rest + data
        at = start = 0
        end = data.find(b"\n") + 1
        while end:
            line = data[at : end - 1]
            if line == b"onion-key":
                self._end(data[start:at])
                self._md, self._hash, start = Microdesc(), hashlib.sha256(), at
                self._md.family = bytearray()
            elif self._md:
                self._line(line)
            at, end = end, data.find(b"\n", end) + 1
        if self._md:
            # A family line can have 128 KB: what is complete of it is taken at once.
            if len(data) - at > 2048 and data[at : at + 7].split(b" $")[0] in (b"", b"family"):
                end = data.rfind(b" ")
                self._line(data[at:end])
                at = end
            self._hash.update(data[start:at])
        self._rest = data[at:]
        if len(self._rest) > _MAX_LINE:
            raise ProtocolError("a line of a microdescriptor is too long")

    def finish(self):
        """Take the end of the last one; ProtocolError if it is truncated."""
        if self._rest:
            raise ProtocolError("a microdescriptor is truncated")
        self._end(b"")

    def _end(self, tail):
        md, self._md = self._md, None
        if md:
            self._hash.update(tail)
            md.digest, md.family = self._hash.digest(), bytes(md.family)
            md.bad = md.bad or not md.ntor_key or not md.ed_id
            self._sink(md)

    def _line(self, line):
        md, word = self._md, line.split(b" ")
        try:
            if word[0] == b"ntor-onion-key":
                md.ntor_key = _b64(word[1], 32)
            elif word[0] == b"id" and word[1] == b"ed25519":
                md.bad = md.bad or md.ed_id is not None
                md.ed_id = _b64(word[2], 32)
            elif word[0] == b"p":
                md.policy = line[2:] if len(line) < _MAX_POLICY else b""
            elif word[0] == b"family-ids":
                md.family_ids = b"".join([sha256(one)[:8] for one in word[1:17] if one])
            elif word[0] == b"family" or line[:2] == b" $":
                # Nicknames are passed over: no one vouches for them.
                for one in word[1:]:
                    if one[:1] == b"$" and len(md.family) < _MAX_FAMILY:
                        md.family += binascii.unhexlify(one[1:9])
        except (ProtocolError, ValueError, IndexError):
            md.bad = True


# ═══ 7. Relay table ═════════════════════════════════════════════════════════
# The network as fixed records, sorted by RSA identity as in the consensus.  What a
# pass over the relays needs stands in columns of integers.

# RSA identity; first half of the microdescriptor's digest; Ed25519 identity, and
# until it is known the second half of the digest; ntor key; IPv4 address; port.
_RECORD = ">20s16s32s32s4sH"
_SIZE = 106
_COLUMNS = "IIHIHH"
_MAX_RELAYS = 65535
# Distinct exit policies and families, in bytes: a relay beyond that has no family
# and no exit.
_MAX_BESIDE = 4 << 20
# In the machine's byte order, as the columns are.
_MAGIC = struct.pack("I", 0x6D740001)


class Relay:
    """A relay: `index`, `rsa_id` (20 bytes), `address` (text), `port`, `flags`, `weight`;
    if it is `usable` (has its microdescriptor) also `ed_id` and `ntor_key` (32 bytes).
    """

    def __init__(self, table, i):
        self.index, self.flags, self.weight = i, table.flags[i], table.weights[i]
        fields = struct.unpack_from(_RECORD, table.records, i * _SIZE)
        self.rsa_id, _, self.ed_id, self.ntor_key, address, self.port = fields
        self.address = "%d.%d.%d.%d" % tuple(address)
        self.usable = bool(self.flags & USABLE)


class RelayTable:
    """The relays of a consensus, by index; `flags` and `weights` are arrays of integers."""

    def __init__(self):
        self.use_family_lists = self.use_family_ids = True
        self._fill([array(c) for c in _COLUMNS], bytearray(), [b""], [b""])

    def _fill(self, columns, records, policies, families):
        self.records, self._columns = records, columns
        self.flags, self.weights, self._nets, self._nets6 = columns[:4]
        # Numbers of the relay's exit policy and family among the distinct ones.
        self._policy, self._family = columns[4:]
        self._policies, self._families = policies, families
        self._numbers = {}
        for values in policies, families:
            for number, value in enumerate(values):
                self._numbers[values is policies, value] = number
        self._beside = sum([len(value) for value in policies + families])
        self._ports = {}

    def add(self, rsa_id, md_digest, address, port, ipv6_net, flags, weight):
        """Append a relay; `address`: 4 bytes, `ipv6_net`: the first 4 bytes of the IPv6 one."""
        n = len(self.flags)
        if n >= _MAX_RELAYS or n and self._field(n - 1, 0, 20) >= rsa_id:
            raise ProtocolError("the consensus has too many relays, or not in order")
        if not 0 < port < 65536 or len(address) != 4:
            raise ProtocolError("the consensus has a relay with a bad address")
        self.records += struct.pack(
            _RECORD, rsa_id, md_digest, md_digest[16:], b"", address, port
        )
        net = address[0] << 8 | address[1]
        for column, value in zip(self._columns, (flags, weight, net, ipv6_net, 0, 0)):
            column.append(value)

    def __len__(self):
        return len(self.flags)

    def relay(self, i):
        return Relay(self, i)

    def _field(self, i, at, size):
        at += i * _SIZE
        return bytes(self.records[at : at + size])

    def rsa_id(self, i):
        return self._field(i, 0, 20)

    def ed_id(self, i):
        return self._field(i, 36, 32)

    def find(self, rsa_id):
        """Return the index of the relay with that RSA identity, or -1."""
        low, high = 0, len(self.flags)
        while low < high:
            middle = (low + high) // 2
            if self._field(middle, 0, 20) < rsa_id:
                low = middle + 1
            else:
                high = middle
        return low if self._field(low, 0, 20) == rsa_id else -1

    def find_ed(self, ed_id):
        """Return the index of the usable relay with that Ed25519 identity, or -1."""
        at = _find(self.records, ed_id, 36, _SIZE)
        return at // _SIZE if at >= 0 and self.flags[at // _SIZE] & USABLE else -1

    def scan(self):
        """Return an iterator of (index, flags, weight, IPv4 /16 as an integer)."""
        return zip(range(len(self.flags)), self.flags, self.weights, self._nets)

    def subnets(self, i):
        """Return the relay's IPv4 /16 and IPv6 /32 (0: none) as integers."""
        return self._nets[i], self._nets6[i]

    def missing(self):
        """Return an iterator of (index, digest) of the microdescriptors not here yet."""
        for i in range(len(self.flags)):
            if not self.flags[i] & HAVE_MICRODESC:
                yield i, self._field(i, 20, 32)

    def set_microdesc(self, i, md):
        """Take over the Microdesc `md`, whose digest is that of relay `i`.

        A malformed one is not asked for again, and the relay is not used.
        """
        if md.bad:
            self.flags[i] |= HAVE_MICRODESC
        else:
            family = bytes((len(md.family_ids),)) + md.family_ids + md.family
            self._set(i, md.ed_id + md.ntor_key, md.policy, family if len(family) > 1 else b"")

    def _set(self, i, keys, policy, family):
        self.records[i * _SIZE + 36 : i * _SIZE + 100] = keys
        self._policy[i] = self._number(self._policies, policy)
        self._family[i] = self._number(self._families, family)
        self.flags[i] |= HAVE_MICRODESC | USABLE

    def _number(self, values, value):
        # Exit policies repeat, and the members of a family list the same family.
        key = values is self._policies, value
        if key not in self._numbers:
            if self._beside + len(value) > _MAX_BESIDE:
                return 0
            self._beside += len(value)
            self._numbers[key] = len(values)
            values.append(value)
            self._ports = {}
        return self._numbers[key]

    def carry_over(self, old):
        """Take from the table `old` the relays whose microdescriptor is still the same."""
        j = 0
        for i in range(len(self.flags)):
            key = self._field(i, 0, 36)
            while j < len(old) and old._field(j, 0, 20) < key[:20]:
                j += 1
            if j < len(old) and old._field(j, 0, 36) == key:
                self.flags[i] |= old.flags[j] & HAVE_MICRODESC
                if old.flags[j] & USABLE:
                    policy = old._policies[old._policy[j]]
                    self._set(i, old._field(j, 36, 64), policy, old._families[old._family[j]])

    def same_family(self, i, j):
        """Return whether the relays `i` and `j` list each other, or share a family id."""
        a, b = self._families[self._family[i]], self._families[self._family[j]]
        if not a or not b:
            return False
        ids_a, ids_b = a[1 : 1 + a[0]], b[1 : 1 + b[0]]
        for at in range(0, len(ids_a), 8):
            if self.use_family_ids and _find(ids_b, ids_a[at : at + 8], 0, 8) >= 0:
                return True
        return (
            self.use_family_lists
            and _find(a, self._field(j, 0, 4), 1 + a[0], 4) >= 0
            and _find(b, self._field(i, 0, 4), 1 + b[0], 4) >= 0
        )

    def exit_allows(self, i, port):
        """Return whether the exit policy summary of the relay `i` allows `port`."""
        if port not in self._ports:
            if len(self._ports) > 15:
                self._ports = {}
            self._ports[port] = bytes([_allows(p, port) for p in self._policies])
        return bool(self._ports[port][self._policy[i]])

    def exits(self, i):
        """Return whether the exit policy summary of the relay `i` allows anything."""
        return self._policies[self._policy[i]] not in (b"", b"reject 1-65535")

    def save(self, path, network_id, consensus):
        """Write the table, and its Consensus, to the file `path`; OSError.

        `network_id`: 32 bytes that tell this network from others.
        """
        body = [consensus.dump().encode(), self.records] + [bytes(c) for c in self._columns]
        for values in self._policies, self._families:
            body.append(b"".join([struct.pack(">H", len(v)) + v for v in values]))
        start = _MAGIC + network_id + struct.pack(">10I", *[len(piece) for piece in body])
        digest = hashlib.sha256(start)
        for piece in body:
            digest.update(piece)
        write_file(path, [start] + body + [digest.digest()])


def _find(packed, item, start, step):
    # The index of `item` in `packed`, at `start` or a number of `step` bytes after it.
    at = packed.find(item, start)
    while at >= 0 and (at - start) % step:
        at = packed.find(item, at + 1)
    return at


def _allows(policy, port):
    word, _, ports = policy.partition(b" ")
    try:
        for one in ports.split(b","):
            low, _, high = one.partition(b"-")
            if int(low) <= port <= int(high or low):
                return int(word == b"accept")
    except ValueError:
        return 0
    return int(word == b"reject")


def load_table(path, network_id):
    """Return the (RelayTable, Consensus) that `save` wrote; None if damaged, or another's."""
    body = []
    try:
        with open(path, "rb") as f:
            start = f.read(76)
            if len(start) < 76 or start[:36] != _MAGIC + network_id:
                return None
            digest = hashlib.sha256(start)
            for size in struct.unpack(">10I", start[36:]):
                body.append(f.read(min(size, 1 << 24)))
                digest.update(body[-1])
            if f.read(33) != digest.digest():
                return None
    except (OSError, ValueError):
        return None
    beside = []
    for r in Reader(body[8]), Reader(body[9]):
        beside.append([])
        while r.left():
            beside[-1].append(r.take(r.uint(2)))
    table = RelayTable()
    columns = [array(c, piece) for c, piece in zip(_COLUMNS, body[2:8])]
    table._fill(columns, bytearray(body[1]), *beside)
    return table, Consensus().load(body[0].decode())


# ═══ 8. Cells and handshakes ════════════════════════════════════════════════
# The bodies of cells and relay messages, the certificates of the link, and the
# handshakes ntor, CREATE_FAST and hs-ntor (tor-spec 3 to 6, rend-spec-v3 3 and 4).

PADDING, RELAY, DESTROY, CREATE_FAST, CREATED_FAST = 0, 3, 4, 5, 6
VERSIONS, NETINFO, RELAY_EARLY, CREATE2, CREATED2, PADDING_NEGOTIATE = 7, 8, 9, 10, 11, 12
VPADDING, CERTS, AUTH_CHALLENGE = 128, 129, 130

RELAY_BEGIN, RELAY_DATA, RELAY_END, RELAY_CONNECTED, RELAY_SENDME = 1, 2, 3, 4, 5
RELAY_TRUNCATED, RELAY_DROP, RELAY_RESOLVE, RELAY_RESOLVED, RELAY_BEGIN_DIR = 9, 10, 11, 12, 13
RELAY_EXTEND2, RELAY_EXTENDED2 = 14, 15
RELAY_ESTABLISH_INTRO, RELAY_ESTABLISH_RENDEZVOUS = 32, 33
RELAY_INTRODUCE1, RELAY_INTRODUCE2, RELAY_RENDEZVOUS1, RELAY_RENDEZVOUS2 = 34, 35, 36, 37
RELAY_INTRO_ESTABLISHED, RELAY_RENDEZVOUS_ESTABLISHED, RELAY_INTRODUCE_ACK = 38, 39, 40

CELL_BODY = 509
RELAY_DATA_MAX = 498

# By number: tor-spec 6.3 and 5.4.
END_REASONS = (
    "no reason", "no reason given", "host not found", "connection refused",
    "forbidden by the exit's policy", "circuit destroyed", "closed", "timeout",
    "no route to the host", "relay hibernates", "internal error of the relay",
    "relay lacks resources", "connection reset", "protocol error", "relay is no directory",
)
DESTROY_REASONS = (
    "no reason given", "protocol error", "internal error of a relay", "as requested",
    "relay hibernates", "relay lacks resources", "next relay not reachable",
    "next relay has another identity", "link between relays closed", "too old", "timeout",
    "destroyed further on", "no such service",
)
END_MISC, END_CONNECTREFUSED, END_EXITPOLICY, END_DESTROY, END_DONE, END_TIMEOUT = 1, 3, 4, 5, 6, 7
END_INTERNAL, END_RESOURCELIMIT, END_CONNRESET, END_TORPROTOCOL = 10, 11, 12, 13


def reason_text(reasons, number):
    """Return the words for `number` of END_REASONS or DESTROY_REASONS."""
    return reasons[number] if number < len(reasons) else "unknown reason %d" % number


def cell(circ_id, command, body=b""):
    """Return a whole cell of link protocol 4 or 5 (tor-spec 3): 514 bytes, or a variable one."""
    if command == VERSIONS:
        return struct.pack(">HBH", 0, command, len(body)) + body
    if command >= 128:
        return struct.pack(">IBH", circ_id, command, len(body)) + body
    return struct.pack(">IB", circ_id, command) + body + bytes(CELL_BODY - len(body))


# ─── addresses and link specifiers ───


def address_bytes(text):
    """Return the 4 bytes of an IPv4 address, or b"" where `text` is none."""
    parts = text.split(".")
    if len(parts) != 4 or not all(p and not p.strip("0123456789") for p in parts):
        return b""
    return bytes(int(p) for p in parts) if all(int(p) < 256 for p in parts) else b""


def address_text(data):
    """Return the text of an address of 4 or 16 bytes."""
    if len(data) == 4:
        return ".".join(str(b) for b in data)
    return ":".join("%x" % n for n in struct.unpack(">8H", data))


# The first two bytes, and how many bits of them count (RFC 6890).
_PRIVATE = (
    (0, 8), (0xA00, 8), (0x6440, 10), (0x7F00, 8), (0xA9FE, 16), (0xAC10, 12), (0xC0A8, 16),
    (0xE000, 3),
)


def is_private(address):
    """Tell whether the IPv4 address (text) is not on the public Internet."""
    n = int.from_bytes(address_bytes(address)[:2], "big")
    return any((n ^ first) >> (16 - bits) == 0 for first, bits in _PRIVATE)


class Target:
    """A relay as others describe it: `rsa_id`, `ed_id`, `ntor_key`, `address`, `port`, and
    `specifiers`, the link specifiers as they came (tor-spec 5.1.2)."""


def link_specifiers(relay):
    """Return the link specifiers of a Relay or Target, with their count."""
    return getattr(relay, "specifiers", None) or b"\x03\x00\x06%s%s\x02\x14%s\x03\x20%s" % (
        address_bytes(relay.address), struct.pack(">H", relay.port), relay.rsa_id, relay.ed_id
    )


def parse_link_specifiers(reader, ntor_key=None):
    """Take link specifiers, with their count, from `reader`; return a Target."""
    start = reader.at
    found = {}
    for _ in range(reader.uint(1)):
        kind = reader.uint(1)
        found[kind] = reader.take(reader.uint(1))
    if [len(found.get(kind, b"")) for kind in (0, 2, 3)] != [6, 20, 32]:
        raise ProtocolError("link specifiers lack an identity or an IPv4 address")
    target = Target()
    target.address = address_text(found[0][:4])
    target.port = int.from_bytes(found[0][4:], "big")
    target.rsa_id, target.ed_id, target.ntor_key = found[2], found[3], ntor_key
    target.specifiers = bytes(reader.data[start : reader.at])
    return target


# ─── link handshake (tor-spec 4) ───


def _x509_key(der, when):
    # Check the self-signed RSA identity certificate; return its key in DER.
    what = "RSA identity certificate"
    outer = Reader(der_take(Reader(der, what), 0x30), what)
    tbs = Reader(der_take(outer, 0x30), what)
    signed = outer.data[: outer.at]
    der_take(outer, 0x30)
    signature = der_take(outer, 3)[1:]
    # Version, serial number, algorithm, issuer; subject.
    for tag in (0xA0, 2, 0x30, 0x30):
        der_take(tbs, tag)
    validity = Reader(der_take(tbs, 0x30), what)
    # UTCTime, with two digits for the year: until 2049.
    bounds = der_take(validity, 0x17), der_take(validity, 0x17)
    der_take(tbs, 0x30)
    info = Reader(der_take(tbs, 0x30), what)
    der_take(info, 0x30)
    key_der = der_take(info, 3)[1:]
    if not bounds[0] <= (b"%04d%02d%02d%02d%02d%02dZ" % tuple(utc(when)))[2:] <= bounds[1]:
        raise ProtocolError("%s is not valid now: check the clock" % what)
    digest = b"010\r\x06\t`\x86H\x01e\x03\x04\x02\x01\x05\x00\x04 " + sha256(signed)
    if not rsa_verify(rsa_public_key(key_der), digest, signature):
        raise ProtocolError("%s: bad signature" % what)
    return key_der


def parse_certs(body, tls_cert_sha256, rsa_id, ed_id, when):
    """Verify a CERTS cell whole (tor-spec 4.2); return the relay's identities (rsa_id, ed_id).

    `tls_cert_sha256` is that of the TLS certificate seen; `rsa_id` and `ed_id` are those
    expected, or None.  Raises ProtocolError.
    """
    reader = Reader(body, "CERTS")
    certs = {}
    for _ in range(reader.uint(1)):
        kind = reader.uint(1)
        if kind in certs:
            raise ProtocolError("CERTS: certificate %d comes twice" % kind)
        certs[kind] = reader.take(reader.uint(2))
    if not all(kind in certs for kind in (2, 4, 5, 7)):
        raise ProtocolError("CERTS: a certificate is missing")
    signing = parse_ed_cert(certs[4], "signing key certificate", 4)
    link = parse_ed_cert(certs[5], "TLS link certificate", 5)
    identity = signing.signing_key
    signing.check(None, when)
    link.check(signing.key, when)
    if (signing.key_type, link.key_type, link.key) != (1, 3, tls_cert_sha256):
        raise ProtocolError("CERTS: the TLS certificate is not the relay's")
    key_der = _x509_key(certs[2], when)
    if parse_crosscert(certs[7], rsa_public_key(key_der), when) != identity:
        raise ProtocolError("CERTS: the cross-certificate is for another identity")
    fingerprint = sha1(key_der)
    if rsa_id not in (None, fingerprint) or ed_id not in (None, identity):
        raise ProtocolError("CERTS: the relay is not the one that was expected")
    return fingerprint, identity


def netinfo(peer_address):
    """Return a client's NETINFO: time 0, the peer's address (text), none of our own."""
    return b"\x00\x00\x00\x00\x04\x04%s\x00" % address_bytes(peer_address)


def parse_netinfo(body):
    """Return (time in seconds since 1970, our address or None, [addresses of the relay])."""
    reader = Reader(body, "NETINFO")

    def address():
        kind = reader.uint(1)
        data = reader.take(reader.uint(1))
        return address_text(data) if (kind, len(data)) in ((4, 4), (6, 16)) else None

    stamp, ours = reader.uint(4), address()
    return stamp, ours, [address() for _ in range(reader.uint(1))]


def padding_negotiate(low=0, high=0):
    """Return PADDING_NEGOTIATE (padding-spec 2.2): send between `low` and `high` ms, or stop."""
    return struct.pack(">BBHH", 0, 2 if high else 1, low, high)


# ─── circuits: CREATE2, EXTEND2, ntor (tor-spec 5.1) ───

_NTOR = b"ntor-curve25519-sha256-1"


def create2(onionskin):
    """Return the body of CREATE2 that carries an ntor onionskin."""
    return struct.pack(">HH", 2, len(onionskin)) + onionskin


def parse_created2(body):
    """Return the handshake reply in the body of CREATED2 or EXTENDED2."""
    reader = Reader(body, "CREATED2")
    return reader.take(reader.uint(2))


def extend2(relay, onionskin):
    """Return the body of EXTEND2 towards `relay`, a Relay or Target."""
    return link_specifiers(relay) + create2(onionskin)


def ntor_start(rsa_id, B):
    """Begin ntor (tor-spec 5.1.4) with a relay's identity and ntor key: (state, onionskin)."""
    x, X = x25519_keypair()
    return (rsa_id, B, x, X), rsa_id + B + X


def ntor_finish(state, reply):
    """Check the relay's reply (Y, AUTH) and return Df, Db, Kf, Kb, KH: 20+20+16+16+20 bytes."""
    rsa_id, B, x, X = state
    reader = Reader(reply, "ntor reply")
    Y, auth = reader.take(32), reader.take(32)
    secret = x25519(x, Y) + x25519(x, B) + rsa_id + B + X + Y + _NTOR
    verify = hmac_sha256(_NTOR + b":verify", secret)
    mac = hmac_sha256(_NTOR + b":mac", verify + rsa_id + B + Y + X + _NTOR + b"Server")
    if not consteq(mac, auth):
        raise ProtocolError("ntor: the relay does not hold its onion key")
    return hkdf_sha256(secret, _NTOR + b":key_extract", _NTOR + b":key_expand", 92)


def fast_finish(x, reply):
    """Return the keys of CREATE_FAST `x` (20 bytes) and its reply, as `ntor_finish` does."""
    reader = Reader(reply, "CREATED_FAST")
    secret, kh = x + reader.take(20), reader.take(20)
    k = b"".join(sha1(secret + bytes([i])) for i in range(5))
    if not consteq(k[:20], kh):
        raise ProtocolError("CREATED_FAST: the relay's key hash is wrong")
    return k[20:92] + kh


# ─── streams (tor-spec 6.2 to 6.4) ───


def begin(host, port, flags=0):
    """Return the body of BEGIN; `host` is "" on an onion service's circuit."""
    data = b"%s:%d\x00" % (host.encode(), port)
    if len(data) > 400:
        raise AddressError("the host name is too long")
    return data + (flags.to_bytes(4, "big") if flags else b"")


def parse_begin(body):
    """Return (host, port) of a BEGIN."""
    text, end, _ = bytes(body).partition(b"\x00")
    host, colon, port = text.rpartition(b":")
    if not end or not colon or not 0 < len(port) < 6 or port.strip(b"0123456789"):
        raise ProtocolError("bad BEGIN")
    if not 0 < int(port) < 65536 or any(not 32 < c < 127 for c in host):
        raise ProtocolError("bad BEGIN")
    return host.decode(), int(port)


def parse_connected(body):
    """Return the address (text, or None) in a CONNECTED."""
    reader = Reader(body, "CONNECTED")
    if not body:
        return None
    v4 = reader.take(4)
    if v4 != bytes(4):
        return address_text(v4)
    return address_text(reader.take(16)) if reader.left() and reader.uint(1) == 6 else None


def parse_resolved(body):
    """Return the answers of a RESOLVED: [(type, value)].

    Types 4 and 6 are addresses (text), 0 is a host name (bytes), 240 and 241 errors.
    """
    reader = Reader(body, "RESOLVED")
    answers = []
    while reader.left():
        kind = reader.uint(1)
        value = reader.take(reader.uint(1))
        reader.take(4)
        if kind in (4, 6):
            if len(value) not in (4, 16):
                raise ProtocolError("bad RESOLVED")
            value = address_text(value)
        answers.append((kind, value))
    return answers


# ─── onion services: messages and hs-ntor (rend-spec-v3 3 and 4) ───

_HS = b"tor-hs-ntor-curve25519-sha3-256-1"


def hs_mac(key, message):
    """Return MAC(key, message) of rend-spec-v3 0.3."""
    return sha3_256(len(key).to_bytes(8, "big") + key + message)


def establish_intro(seed, auth_key, kh):
    """Return ESTABLISH_INTRO (3.1.1): seed and public key, and KH of the circuit's last hop."""
    data = b"\x02\x00\x20" + auth_key + b"\x00"
    data += hs_mac(kh, data)
    return data + b"\x00\x40" + ed25519_sign(seed, b"Tor establish-intro cell v1" + data)


def _intro_keys(exp, X, intro, subcredential):
    # ENC_KEY and MAC_KEY of INTRODUCE1 (3.3.2).
    secret = exp + intro.auth_key + X + intro.enc_key + _HS
    info = _HS + b":hs_key_expand" + subcredential
    keys = shake256(secret + _HS + b":hs_key_extract" + info, 64)
    return keys[:32], keys[32:]


def hs_ntor_client_intro(intro, subcredential, cookie, relay):
    """Return (state, body of INTRODUCE1) for the introduction point `intro` (3.2, 3.3).

    `intro` has `auth_key` and `enc_key`; `cookie` (20 bytes) names the rendezvous at `relay`.
    """
    x, X = x25519_keypair()
    enc_key, mac_key = _intro_keys(x25519(x, intro.enc_key), X, intro, subcredential)
    head = bytes(20) + b"\x02\x00\x20" + intro.auth_key + b"\x00"
    plain = cookie + b"\x00\x01\x00\x20" + relay.ntor_key + link_specifiers(relay)
    plain += bytes(max(0, 246 - len(head) - len(plain)))
    body = head + X + AesCtr(enc_key).crypt(plain)
    return (x, X, intro), body + hs_mac(mac_key, body)


def _rend_keys(secret, intro, X, Y):
    # AUTH_INPUT_MAC, and Df, Db, Kf, Kb of the rendezvous (3.3, 4.2).
    secret += intro.auth_key + intro.enc_key + X + Y + _HS
    verify = hs_mac(secret, _HS + b":hs_verify")
    auth = verify + intro.auth_key + intro.enc_key + Y + X + _HS + b"Server"
    seed = hs_mac(secret, _HS + b":hs_key_extract")
    return hs_mac(auth, _HS + b":hs_mac"), shake256(seed + _HS + b":hs_key_expand", 128)


def hs_ntor_client_finish(state, reply):
    """Check RENDEZVOUS2 and return Df, Db, Kf, Kb: 4 times 32 bytes."""
    x, X, intro = state
    reader = Reader(reply, "RENDEZVOUS2")
    Y, auth = reader.take(32), reader.take(32)
    mac, keys = _rend_keys(x25519(x, Y) + x25519(x, intro.enc_key), intro, X, Y)
    if not consteq(mac, auth):
        raise ProtocolError("RENDEZVOUS2: the service does not hold its keys")
    return keys


def _skip_extensions(reader):
    for _ in range(reader.uint(1)):
        reader.take(1)
        reader.take(reader.uint(1))


def hs_ntor_service(intro, b, subcredentials, body):
    """Open INTRODUCE2 at `intro`, whose encryption secret is `b`, trying each subcredential.

    Returns (Target of the rendezvous point, cookie, body of RENDEZVOUS1, 128 bytes of keys).
    """
    reader = Reader(body, "INTRODUCE2")
    if reader.take(55)[20:] != b"\x02\x00\x20" + intro.auth_key:
        raise ProtocolError("INTRODUCE2: not for this introduction point")
    _skip_extensions(reader)
    X = reader.take(32)
    cipher = reader.take(max(0, reader.left() - 32))
    mac = reader.take(32)
    exp = x25519(b, X)
    for subcredential in subcredentials:
        enc_key, mac_key = _intro_keys(exp, X, intro, subcredential)
        if consteq(hs_mac(mac_key, bytes(body[:-32])), mac):
            break
    else:
        raise ProtocolError("INTRODUCE2: the MAC is wrong")
    reader = Reader(AesCtr(enc_key).crypt(cipher), "INTRODUCE2")
    cookie = reader.take(20)
    _skip_extensions(reader)
    if reader.take(3) != b"\x01\x00\x20":
        raise ProtocolError("INTRODUCE2: unknown kind of onion key")
    target = parse_link_specifiers(reader, reader.take(32))
    y, Y = x25519_keypair()
    auth, keys = _rend_keys(x25519(y, X) + exp, intro, X, Y)
    # As long as tor's, which is as long as the older version's.
    return target, cookie, cookie + Y + auth + urandom(84), keys


def parse_introduce_ack(body):
    """Return the status of an INTRODUCE_ACK: 0 is success (3.2.2)."""
    return Reader(body, "INTRODUCE_ACK").uint(2)


# ═══ 9. Onion addresses and descriptors ═════════════════════════════════════
# Addresses, time periods, blinded keys, the hash ring, and descriptors, made
# and read (rend-spec-v3 1, 2 and 6, and its appendix F).


def _int8(n):
    return struct.pack(">Q", n)


def onion_address(key):
    """Return the address, with ".onion", of a service's public identity key (32 bytes)."""
    checksum = sha3_256(b".onion checksum" + key + b"\x03")[:2]
    return b32encode(key + checksum + b"\x03") + ".onion"


def parse_onion_address(text):
    """Return the public identity key (32 bytes) in an address; subdomains are ignored.

    Raises AddressError; a key with a torsion component is none either.
    """
    labels = text.lower().rstrip(".").split(".")
    if len(labels) < 2 or labels[-1] != "onion" or len(labels[-2]) != 56:
        raise AddressError("%s is not an onion address: 56 characters and .onion" % text)
    try:
        key = b32decode(labels[-2])[:32]
    except ProtocolError:
        key = bytes(32)
    if onion_address(key) != labels[-2] + ".onion" or not ed25519_valid(key):
        raise AddressError("%s is mistyped: its checksum or key is wrong" % text)
    return key


# ─── time periods, blinded keys, hash ring (2.1 to 2.3) ───


def time_periods(consensus, testing):
    """Return what is in force at the consensus's valid-after: (first, second, fetch).

    A service publishes for the first and the second, a client fetches by the third, which
    is one of them.  Each is (number of the time period, its length in minutes, shared
    random value, start of the protocol run that made the value).  `testing`: whether this
    is a TestingTorNetwork, where a period is as long as a protocol run.
    """
    after = consensus.valid_after
    interval = max(1, consensus.fresh_until - after)
    length = consensus.param("hsdir_interval", 1440, 5, 14400)
    if testing:
        length = max(1, 24 * interval // 60)
    offset = 12 * interval // 60
    start = after - after // interval % 24 * interval
    number = (after // 60 - offset) // length
    rotation = ((start // 60 - offset) // length + 1) * length * 60 + 12 * interval
    rotated = after >= rotation
    if rotated:
        number -= 1

    def period(number, value, start):
        disaster = b"shared-random-disaster" + _int8(length) + _int8(number)
        return number, length, value or sha3_256(disaster), start

    first = period(number, consensus.srv_previous, start - 24 * interval)
    second = period(number + 1, consensus.srv_current, start)
    return first, second, second if rotated else first


_BASEPOINT = (
    b"(15112221349535400772501151409588531511454012693041857206046113283949847762202, "
    b"46316835694926478169428394003475163141307993866256225615783033603165251855960)"
)


def blinding_param(key, period):
    """Return the hash that blinds the identity `key` in `period` (appendix A.2)."""
    nonce = b"key-blind" + _int8(period[0]) + _int8(period[1])
    return sha3_256(b"Derive temporary signing key\x00" + key + _BASEPOINT + nonce)


def subcredential(key, blinded):
    """Return the subcredential (2.1) of the identity `key` and its blinded key."""
    return sha3_256(b"subcredential" + sha3_256(b"credential" + key) + blinded)


def hs_index(blinded, replica, period):
    """Return where on the ring the descriptor of replica 1, 2, … lies."""
    tail = _int8(replica) + _int8(period[1]) + _int8(period[0])
    return sha3_256(b"store-at-idx" + blinded + tail)


def hsdir_index(ed_id, period):
    """Return where on the ring the directory `ed_id` lies."""
    return sha3_256(b"node-idx" + ed_id + period[2] + _int8(period[0]) + _int8(period[1]))


def hsdir_ring(table, consensus, blinded, period, store):
    """Return the indexes in `table` of the directories responsible for a descriptor.

    `store`: to publish to all of these; else to fetch from any of them.
    """
    replicas = consensus.param("hsdir_n_replicas", 2, 1, 16)
    if store:
        spread = consensus.param("hsdir_spread_store", 4, 1, 128)
    else:
        spread = consensus.param("hsdir_spread_fetch", 3, 1, 128)
    places = [
        (int.from_bytes(hs_index(blinded, r, period), "big"), []) for r in range(1, replicas + 1)
    ]
    keep = replicas * spread
    needed = HSDIR | PROTO_HSDIR2 | USABLE
    for i, flags, _, _ in table.scan():
        if flags & needed != needed:
            continue
        at = int.from_bytes(hsdir_index(table.ed_id(i), period), "big")
        for start, nearest in places:
            distance = at - start if at >= start else at - start + (1 << 256)
            if len(nearest) < keep or distance < nearest[-1][0]:
                nearest.append((distance, i))
                nearest.sort()
                if len(nearest) > keep:
                    nearest.pop()
    found = []
    for _, nearest in places:
        # A replica skips what an earlier one took.
        found += [i for _, i in nearest if i not in found][:spread]
    return found


def revision_counter(esk, seconds):
    """Return the revision counter of a descriptor, as tor makes it (appendix F).

    `esk`: the blinded secret key (64 bytes); `seconds` since the protocol run began that
    made the period's shared random value.
    """
    # tor hashes the closing zero of its C string, too.
    return ope_encrypt(sha3_256(b"rev-counter-generation\x00" + esk), seconds + 1)


def ope_encrypt(key, n):
    """Encrypt `n` so that order is preserved: the sum of n numbers of a key stream."""
    n = min(max(n, 1), 1 << 18)
    cipher = AesCtr(key)
    total = n
    for at in range(0, n, 256):
        count = min(256, n - at)
        total += sum(struct.unpack("<%dH" % count, cipher.crypt(bytes(2 * count))))
    return total


# ─── descriptors (2.4, 2.5) ───

_LIFETIME = 180
_CERT_HOURS = 54


def make_ed_cert(kind, key, when, esk, public):
    """Return a certificate (cert-spec 2.1) of `kind` for `key`, signed by (esk, public).

    It names its signing key, and is good for 54 hours from the hour of `when`.
    """
    head = struct.pack(">BBIB", 1, kind, when // 3600 + _CERT_HOURS, 1)
    body = head + key + b"\x01\x00\x20\x04\x00" + public
    return body + ed25519_sign_expanded(esk, public, body)


def _base64(data):
    return binascii.b2a_base64(data).strip()


def _armour(label, data):
    text = _base64(data)
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return b"-----BEGIN %s-----\n%s\n-----END %s-----" % (label, b"\n".join(lines), label)


def _enc_key_ed(u):
    # The Ed25519 form, sign 0, of an X25519 key: y = (u - 1) / (u + 1).
    p = (1 << 255) - 19
    u = int.from_bytes(u, "little") & (1 << 255) - 1
    return ((u - 1) * pow(u + 1, p - 2, p) % p).to_bytes(32, "little")


def _layer(salt, secret, revision, label):
    # The cipher of one layer, and the first input of its MAC (2.5.3).
    keys = shake256(secret + _int8(revision) + salt + label, 80)
    return AesCtr(keys[:32], keys[32:48]), _int8(32) + keys[48:] + _int8(16) + salt


def _seal(plain, secret, revision, label):
    salt = urandom(16)
    cipher, prefix = _layer(salt, secret, revision, label)
    data = cipher.crypt(plain)
    return _armour(b"MESSAGE", salt + data + sha3_256(prefix + data))


def _unseal(blob, secret, revision, label):
    cipher, prefix = _layer(blob[:16], secret, revision, label)
    if len(blob) < 49 or not consteq(sha3_256(prefix + blob[16:-32]), blob[-32:]):
        return None
    return cipher.crypt(blob[16:-32]).partition(b"\x00")[0]


_OUTER, _INNER = b"hsdir-superencrypted-data", b"hsdir-encrypted-data"
_SIGNED = b"Tor onion service descriptor sig v3"


def make_descriptor(esk, blinded, subcred, revision, intro_points, when):
    """Return a descriptor, ready to be published.

    `esk`, `blinded`: the blinded keys (64, 32 bytes); `subcred`: the subcredential;
    `intro_points`: Relays or Targets with `auth_key` and `enc_key`; `when`: now.
    """
    seed = urandom(32)
    signer, public = ed25519_expand(seed), ed25519_public(seed)
    secret = blinded + subcred

    def cert(kind, key):
        return _armour(b"ED25519 CERT", make_ed_cert(kind, key, when, signer, public))

    lines = [b"create2-formats 2"]
    for intro in intro_points:
        lines += [
            b"introduction-point " + _base64(link_specifiers(intro)),
            b"onion-key ntor " + _base64(intro.ntor_key),
            b"auth-key",
            cert(9, intro.auth_key),
            b"enc-key ntor " + _base64(intro.enc_key),
            b"enc-key-cert",
            cert(11, _enc_key_ed(intro.enc_key)),
        ]
    inner = _seal(b"\n".join(lines) + b"\n", secret, revision, _INNER)
    lines = [b"desc-auth-type x25519"]
    lines.append(b"desc-auth-ephemeral-key " + _base64(x25519_keypair()[1]))
    for _ in range(16):
        # Made up, so that nobody sees whether a service has authorized clients.
        lines.append(
            ("auth-client %s %s %s" % tuple(b64encode(urandom(n)) for n in (8, 16, 16))).encode()
        )
    lines += [b"encrypted", inner]
    outer = b"\n".join(lines)
    outer += bytes(-len(outer) % 10000)
    text = b"hs-descriptor 3\ndescriptor-lifetime %d\ndescriptor-signing-key-cert\n%s\n" % (
        _LIFETIME,
        _armour(
            b"ED25519 CERT", make_ed_cert(8, public, when, esk, blinded)
        ),
    )
    text += b"revision-counter %d\nsuperencrypted\n" % revision
    text += _seal(outer, secret, revision, _OUTER) + b"\n"
    signature = ed25519_sign_expanded(signer, public, _SIGNED + text)
    return text + b"signature %s\n" % b64encode(signature).encode()


def _desc_items(text):
    # [(keyword, arguments, object)] of a document in the meta-format of dir-spec 1.2.
    items = []
    armour = None
    for line in text.split(b"\n"):
        if armour is not None:
            if line.startswith(b"-----END "):
                items[-1][2] = b64decode(b"".join(armour))
                armour = None
            else:
                armour.append(line)
        elif line.startswith(b"-----BEGIN ") and items:
            armour = []
        elif line:
            keyword, _, arguments = line.partition(b" ")
            items.append([keyword, arguments, b""])
    return items


def _one(items, keyword):
    # The arguments and the object of the item that stands there exactly once.
    found = [item for item in items if item[0] == keyword]
    if len(found) != 1:
        raise ProtocolError("descriptor: %d times %s" % (len(found), keyword.decode()))
    return found[0][1], found[0][2]


def _number(text):
    if not 0 < len(text) < 20 or text.strip(b"0123456789"):
        raise ProtocolError("descriptor: bad number")
    return int(text)


def _ntor(items, keyword):
    kind, _, key = _one(items, keyword)[0].partition(b" ")
    key = b64decode(key.partition(b" ")[0])
    if kind != b"ntor" or len(key) != 32 or not any(key):
        raise ProtocolError("descriptor: bad %s" % keyword.decode())
    return key


def _intro_point(items, signing, when):
    # A Target with auth_key and enc_key; the certificates are by the key `signing`.
    def cert(keyword, kind):
        c = parse_ed_cert(_one(items, keyword)[1], "introduction point's certificate", kind)
        c.check(signing, when)
        return c.key

    reader = Reader(b64decode(items[0][1].partition(b" ")[0]), "introduction point")
    target = parse_link_specifiers(reader, _ntor(items, b"onion-key"))
    target.auth_key = cert(b"auth-key", 9)
    target.enc_key = _ntor(items, b"enc-key")
    if cert(b"enc-key-cert", 11) != _enc_key_ed(target.enc_key):
        raise ProtocolError("descriptor: enc-key-cert is for another key")
    return target


class Descriptor:
    """`revision`; `lifetime` in seconds; `intro_points`: Targets with auth_key, enc_key."""


def parse_descriptor(data, blinded, subcred, when):
    """Verify and decrypt a descriptor, and return it as a Descriptor.

    `blinded`: the blinded key it must be by; `subcred`: the subcredential; `when`: now.
    Introduction points that are not right are left out.  Raises ProtocolError.
    """
    text, end, signature = data.rpartition(b"\nsignature ")
    items = _desc_items(text)
    if not end or not text.startswith(b"hs-descriptor 3\n"):
        raise ProtocolError("descriptor: not of version 3, or cut off")
    cert = parse_ed_cert(
        _one(items, b"descriptor-signing-key-cert")[1], "descriptor's certificate",
        8,
    )
    cert.check(blinded, when)
    signature = b64decode(signature.rstrip(b"\n"))
    if len(signature) != 64 or not ed25519_verify(cert.key, _SIGNED + text + b"\n", signature):
        raise ProtocolError("descriptor: bad signature")
    descriptor = Descriptor()
    descriptor.lifetime = _number(_one(items, b"descriptor-lifetime")[0]) * 60
    descriptor.revision = revision = _number(_one(items, b"revision-counter")[0])
    if not 0 < descriptor.lifetime <= 43200:
        raise ProtocolError("descriptor: bad lifetime")
    secret = blinded + subcred
    outer = _unseal(_one(items, b"superencrypted")[1], secret, revision, _OUTER)
    if outer is None:
        raise ProtocolError("descriptor: the outer layer's MAC is wrong")
    inner = _unseal(_one(_desc_items(outer), b"encrypted")[1], secret, revision, _INNER)
    if inner is None:
        raise ProtocolError("descriptor: it is for authorized clients only, or corrupt")
    sections = [[]]
    for item in _desc_items(inner):
        if item[0] == b"introduction-point":
            sections.append([])
        sections[-1].append(item)
    if b"2" not in _one(sections[0], b"create2-formats")[0].split(b" "):
        raise ProtocolError("descriptor: no handshake that we know")
    descriptor.intro_points = []
    for section in sections[1:21]:
        try:
            descriptor.intro_points.append(_intro_point(section, cert.key, when))
        except ProtocolError as e:
            log(INFO, "introduction point refused: %s", e)
    if not descriptor.intro_points:
        raise ProtocolError("descriptor: no usable introduction point")
    return descriptor


# ═══ 10. Channel ════════════════════════════════════════════════════════════
# One TLS link to a relay, and the circuits that share it.  tor-spec 4 and 3.

# How much one read takes, and how much may wait to be written.
READ_SIZE = 4112 if MICROPYTHON else 1 << 18
QUEUE_SIZE = 16448 if MICROPYTHON else 1 << 18
LARGEST_VARIABLE_CELL = 16384
HANDSHAKE_SECONDS = 20


class Channel:
    """A link to one relay, whose identity CERTS has proved.

    `rsa_id`, `ed_id`: the relay's identities; `skew`: its clock minus ours in
    seconds; `circuits`: those that run over it; `closing`: a Promise that is
    set when the channel is gone.
    """

    def __init__(self, address, port):
        self.address, self.port = address, port
        self.rsa_id = self.ed_id = None
        self.skew = 0
        self.circuits = {}
        self.closing = Promise()
        self.used = ticks_ms()
        self._queue, self._queued = [], 0
        self._wake = asyncio.Event()
        self._blocked = []
        self._reader = self._writer = self._reading = None

    def __str__(self):
        name = " (%s)" % hexlify(self.rsa_id) if self.rsa_id else ""
        return "relay %s:%d%s" % (self.address, self.port, name)

    async def open(self, rsa_id, ed_id, seconds=HANDSHAKE_SECONDS):
        """Connect and shake hands; the relay must be `rsa_id` and, where given, `ed_id`.

        Raises ChannelError.  tor-spec 4.
        """
        try:
            self._reader, self._writer, certificate = await tls_connect(
                self.address, self.port, seconds
            )
            await asyncio.wait_for(self._handshake(certificate, rsa_id, ed_id), seconds)
        except asyncio.TimeoutError:
            await self._hang_up()
            raise ChannelError("%s did not answer within %d s" % (self, seconds))
        except (OSError, EOFError) as e:
            await self._hang_up()
            raise ChannelError("%s cannot be reached: %s" % (self, e or "link closed"))
        except ProtocolError as e:
            await self._hang_up()
            raise ChannelError("%s failed the link handshake: %s" % (self, e))
        except asyncio.CancelledError:
            await self._hang_up()
            raise
        self._reading = spawn(self._read())
        spawn(self._write())
        return self

    async def _handshake(self, certificate, rsa_id, ed_id):
        await self._send_now(struct.pack(">HBHHH", 0, VERSIONS, 4, 4, 5))
        circ_id, command, size = struct.unpack(">HBH", await self._reader.readexactly(5))
        if command != VERSIONS or size % 2 or size > 64:
            raise ProtocolError("cell %d where VERSIONS was due" % command)
        versions = await self._reader.readexactly(size)
        common = [v for v in struct.unpack(">%dH" % (size // 2), versions) if v in (4, 5)]
        if not common:
            raise ProtocolError("no link protocol in common")
        while True:
            command, body = await self._handshake_cell()
            if command == CERTS and self.rsa_id is None:
                self.rsa_id, self.ed_id = parse_certs(body, certificate(), rsa_id, ed_id, now())
            elif command == NETINFO and self.rsa_id is not None:
                break
            elif command not in (AUTH_CHALLENGE, VPADDING, PADDING):
                raise ProtocolError("cell %d out of place in the link handshake" % command)
        timestamp = parse_netinfo(body)[0]
        self.skew = timestamp - now() if timestamp else 0
        answer = cell(0, NETINFO, netinfo(self.address))
        if max(common) >= 5:
            # Padding against netflow records is not sent here, so the relay's is turned
            # down too: one side alone would stand out (padding-spec 2).
            answer += cell(0, PADDING_NEGOTIATE, padding_negotiate())
        await self._send_now(answer)

    async def _handshake_cell(self):
        head = await self._reader.readexactly(5)
        if head[4] < 128:
            return head[4], await self._reader.readexactly(509)
        size = int.from_bytes(await self._reader.readexactly(2), "big")
        if size > LARGEST_VARIABLE_CELL:
            raise ProtocolError("cell %d of %d bytes" % (head[4], size))
        return head[4], await self._reader.readexactly(size)

    async def _send_now(self, data):
        self._writer.write(data)
        await self._writer.drain()

    # ── Writing ──

    def room(self):
        """Return how many more cells the queue takes before senders must wait."""
        return (QUEUE_SIZE - self._queued) // 514

    def send(self, data):
        """Queue whole cells."""
        self._queue.append(data)
        self._queued += len(data)
        self._wake.set()

    def when_room(self, callback):
        """Call `callback()` once, when the queue has drained."""
        if callback not in self._blocked:
            self._blocked.append(callback)

    async def _write(self):
        try:
            while not self.closing.done() or self._queue:
                await self._wake.wait()
                self._wake.clear()
                if self._queue:
                    data, self._queue = b"".join(self._queue), []
                    self._writer.write(data)
                    self.used = ticks_ms()
                    await self._writer.drain()
                    self._queued -= len(data)
                    blocked, self._blocked = self._blocked, []
                    for callback in blocked:
                        callback()
        except (OSError, EOFError) as e:
            self.close("the link broke: %s" % e)
        await self._hang_up()

    async def _hang_up(self):
        writer, self._writer = self._writer, None
        if writer is not None:
            if self._reading is not None and self._reading is not current_task():
                self._reading.cancel()
            await hang_up(writer)

    # ── Reading ──

    async def _read(self):
        rest = b""
        try:
            while not self.closing.done():
                data = await self._reader.read(READ_SIZE)
                if not data:
                    raise EOFError("the relay closed the link")
                if rest:
                    data = rest + data
                done = self._cells(data)
                rest = data[done:]
        except (OSError, EOFError, ProtocolError) as e:
            self.close(str(e))

    def _cells(self, data):
        """Dispatch the whole cells at the front of `data`; return how many bytes those are.

        Relay cells in a row for one circuit go to it together.
        """
        at, end = 0, len(data)
        while end - at >= 7:
            command = data[at + 4]
            if command == RELAY:
                head, bodies = data[at : at + 5], []
                while at + 514 <= end and data[at : at + 5] == head:
                    bodies.append(data[at + 5 : at + 514])
                    at += 514
                if not bodies:
                    break
                circuit = self.circuits.get(int.from_bytes(head[:4], "big"))
                if circuit is not None:
                    circuit.receive(b"".join(bodies))
                continue
            size = 509
            body = at + 5
            if command >= 128 or command == VERSIONS:
                size = data[at + 5] << 8 | data[at + 6]
                body = at + 7
                if size > LARGEST_VARIABLE_CELL:
                    raise ProtocolError("the relay sent cell %d of %d bytes" % (command, size))
            if body + size > end:
                break
            if command in (VERSIONS, NETINFO, CERTS, AUTH_CHALLENGE):
                raise ProtocolError("the relay sent cell %d after the handshake" % command)
            circuit = self.circuits.get(int.from_bytes(data[at : at + 4], "big"))
            if circuit is not None:
                if command in (CREATED2, CREATED_FAST):
                    circuit.created(command, data[body : body + size])
                elif command == DESTROY:
                    circuit.destroyed(data[body])
            at = body + size
        return at

    # ── Circuits ──

    def adopt(self, circuit):
        """Give `circuit` an unused circuit ID of the initiator's half and return it."""
        if self.closing.done():
            raise ChannelError("the channel to %s is closed" % self)
        while True:
            circ_id = int.from_bytes(urandom(4), "big") | 0x80000000
            if circ_id not in self.circuits:
                self.circuits[circ_id] = circuit
                return circ_id

    def forget(self, circ_id):
        self.used = ticks_ms()
        self.circuits.pop(circ_id, None)

    def close(self, why="closed"):
        """Close the channel and its circuits; what is queued is still written."""
        if not self.closing.done():
            log(INFO, "Channel to %s: %s", self, why)
            self.closing.set(why)
            for circuit in list(self.circuits.values()):
                circuit.fail(CircuitError("the channel to %s is gone: %s" % (self, why), 8))
            self._wake.set()
            if not MICROPYTHON and self._reader is not None:
                spawn(self._linger())

    async def _linger(self):
        # A peer that reads nothing must not keep the socket for ever.
        await asyncio.sleep(2)
        await self._hang_up()


class Channels:
    """The open channels, one for each relay."""

    def __init__(self):
        self._open = {}

    async def get(self, address, port, rsa_id, ed_id=None, seconds=HANDSHAKE_SECONDS):
        """Return the channel to the relay, opening it where there is none; ChannelError."""
        found = self._open.get(rsa_id)
        if found is None:
            found = self._open[rsa_id] = Promise()
            channel = Channel(address, port)
            try:
                found.set(await channel.open(rsa_id, ed_id, seconds))
                spawn(self._watch(rsa_id, channel))
            except BaseException as e:
                del self._open[rsa_id]
                if not isinstance(e, TorError):
                    found.fail(ChannelError("%s: the attempt was given up" % channel))
                    raise
                found.fail(e)
        return await found.wait()

    async def _watch(self, rsa_id, channel):
        """Drop the channel when it closes; close it when it is idle; keep it alive until then."""
        while not channel.closing.done():
            try:
                await channel.closing.wait(60)
            except asyncio.TimeoutError:
                idle = ticks_diff(ticks_ms(), channel.used)
                if idle > 180000 and not channel.circuits:
                    channel.close("idle")
                elif idle > 240000:
                    channel.send(cell(0, PADDING, b""))
        self._open.pop(rsa_id, None)

    def close(self):
        """Close every channel."""
        for found in list(self._open.values()):
            if found.get() is not None:
                found.get().close()


# ═══ 11. Circuits and streams ═══════════════════════════════════════════════
# Relay encryption, extending, flow control, streams, teardown.  tor-spec 5–7.

# The most cells that are encrypted or queued in one go.
BATCH = 8 if MICROPYTHON else 128
CIRCUIT_WINDOW, CIRCUIT_INCREMENT = 1000, 100
STREAM_WINDOW, STREAM_INCREMENT = 500, 50
# A stream whose reader lags behind by more than this sends no SENDME.
READ_AHEAD = 16384 if MICROPYTHON else 1 << 18
# How much `write` takes before `drain` waits.
WRITE_AHEAD = 8192 if MICROPYTHON else 1 << 18


class Layer:
    """The relay encryption that one hop and we share; its key streams depend on position alone.

    `keys`: Df, Db, Kf, Kb in a row (ntor: SHA-1 and AES-128; onion hop: SHA3-256
    and AES-256).  `service`: we are the service's end of an onion hop, so what
    we send is "backward".  tor-spec 5.2, rend-spec-v3 4.2.1.
    """

    def __init__(self, keys, onion=False, service=False):
        seed, size = (32, 32) if onion else (20, 16)
        digest = Sha3_256 if onion else Sha1
        ends = [
            (
                digest(keys[at * seed : at * seed + seed]),
                AesCtr(keys[2 * seed + at * size : 2 * seed + at * size + size]),
            )
            for at in (0, 1)
        ]
        if service:
            ends.reverse()
        (self.out_digest, self.out_cipher), (self.in_digest, self.in_cipher) = ends


class Circuit:
    """A circuit over `channel`; `path` holds its relays, the nearest first.

    `on_control`: {relay command: function(body)} for messages that come unasked;
    `on_begin`: coroutine function(stream, host, port) that answers BEGIN cells, at a
    service; `kh`: KH of the last hop (20 bytes); `closing`: a Promise that is set to the reason when the circuit is gone.
    """

    def __init__(self, channel, window=CIRCUIT_WINDOW):
        self.channel = channel
        self.path = []
        self.streams = {}
        self.on_control = {}
        self.on_begin = None
        self.closing = Promise()
        self.error = self.kh = None
        self.born = ticks_ms()
        self._layers = []
        self._early = 8
        self._next_id = 1 + randbelow(65535)
        self._awaited = None
        self._initial = self._package = window
        self._deliver = CIRCUIT_WINDOW
        self._sent_tags = []
        self._short_after = randbelow(CIRCUIT_INCREMENT)
        self.circ_id = channel.adopt(self)

    def __str__(self):
        return "circuit %d over %s" % (self.circ_id & 0xFFFF, self.channel)

    @property
    def closed(self):
        return self.closing.done()

    # ── Building ──

    async def create(self, relay, seconds):
        """Make the first hop, by CREATE2 with ntor (tor-spec 5.1)."""
        state, onionskin = ntor_start(relay.rsa_id, relay.ntor_key)
        reply = await self._handshake(CREATE2, create2(onionskin), CREATED2, seconds)
        self._add_hop(relay, ntor_finish, state, reply)

    async def create_fast(self, relay, seconds):
        """Make the only hop of a directory circuit, by CREATE_FAST (tor-spec 5.1.3)."""
        x = urandom(20)
        reply = await self._handshake(CREATE_FAST, x, CREATED_FAST, seconds)
        self._add_hop(relay, fast_finish, x, reply)

    async def extend(self, relay, seconds):
        """Extend by one hop, by EXTEND2 with ntor (tor-spec 5.1.2)."""
        state, onionskin = ntor_start(relay.rsa_id, relay.ntor_key)
        body = extend2(relay, onionskin)
        reply = (await self.ask(RELAY_EXTEND2, body, (RELAY_EXTENDED2,), seconds))[1]
        self._add_hop(relay, ntor_finish, state, reply)

    async def _handshake(self, command, body, answer, seconds):
        self._awaited = ((answer,), Promise())
        self.channel.send(cell(self.circ_id, command, body))
        return (await self._answer(seconds))[1]

    def _add_hop(self, relay, finish, state, reply):
        try:
            keys = finish(state, parse_created2(reply) if finish is ntor_finish else reply)
        except ProtocolError as e:
            raise self.fail(CircuitError("%s: hop %d: %s" % (self, len(self.path) + 1, e), 1))
        self._layers.append(Layer(keys))
        self.kh = keys[72:92]
        self.path.append(relay)

    def add_onion_hop(self, keys, service=False):
        """Add the virtual hop of a rendezvous, `keys` 128 bytes (rend-spec-v3 4.2.1)."""
        self._layers.append(Layer(keys, True, service))
        self._package, self._deliver = self._initial, CIRCUIT_WINDOW

    # ── Control messages ──

    def expect(self, commands):
        """Return a Promise for the next message of `commands`, as (command, body).

        Any other unasked message closes the circuit.
        """
        self._awaited = (commands, Promise())
        return self._awaited[1]

    async def wait_control(self, commands, seconds):
        """Wait for the next message of `commands`: (command, body)."""
        if self._awaited is None or self._awaited[0] != commands:
            self.expect(commands)
        return await self._answer(seconds)

    async def ask(self, command, body, answers, seconds):
        """Send a message to the last hop and wait for one of `answers`: (command, body)."""
        self._check()
        self.expect(answers)
        self._send_relay(command, 0, body)
        return await self._answer(seconds)

    async def send_control(self, command, body):
        """Send a message to the last hop."""
        self._check()
        self._send_relay(command, 0, body)

    async def _answer(self, seconds):
        promise = self._awaited[1]
        try:
            return await promise.wait(seconds)
        except asyncio.TimeoutError:
            raise self.fail(CircuitError("%s: no answer within %d s" % (self, seconds), 10))

    def _check(self):
        if self.closing.done():
            raise self.error

    # ── Streams ──

    async def open_stream(self, host, port, seconds, flags=1):
        """Open a stream by BEGIN to host:port ("" for an onion service); StreamError."""
        return await self._open(RELAY_BEGIN, begin(host, port, flags), seconds)

    async def open_directory_stream(self, seconds):
        """Open a stream to the last hop's own directory (tor-spec 6.2.1)."""
        return await self._open(RELAY_BEGIN_DIR, b"", seconds)

    async def _open(self, command, body, seconds):
        stream = self._new_stream()
        self._send_relay(command, stream.stream_id, body)
        try:
            await stream.opened.wait(seconds)
        except asyncio.TimeoutError:
            stream.close()
            raise StreamError("no answer within %d s" % seconds, 7)
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    async def resolve(self, host, seconds=30):
        """Resolve `host` at the exit: a list of (type, value bytes) (tor-spec 6.4)."""
        stream = self._new_stream()
        self._send_relay(RELAY_RESOLVE, stream.stream_id, host.encode() + b"\0")
        try:
            body = await stream.opened.wait(seconds)
        except asyncio.TimeoutError:
            raise StreamError("no answer within %d s" % seconds, 7)
        finally:
            self.streams.pop(stream.stream_id, None)
        return parse_resolved(body)

    def _new_stream(self):
        self._check()
        for _ in range(65535):
            self._next_id = self._next_id % 65535 + 1
            if self._next_id not in self.streams:
                stream = self.streams[self._next_id] = Stream(self, self._next_id)
                return stream
        raise StreamError("the circuit has no stream ID left", 5)

    # ── Sending ──

    def _send_relay(self, command, stream_id, data):
        padding = RELAY_DATA_MAX - len(data)
        filler = bytes(min(padding, 4)) + (urandom(padding - 4) if padding > 4 else b"")
        kind = RELAY
        if command == RELAY_EXTEND2:
            kind, self._early = RELAY_EARLY, self._early - 1
        self._seal(kind, [(command, stream_id, len(data), data + filler)])

    def _seal(self, kind, messages):
        """Encrypt relay cells to the last hop, all at once, and queue them."""
        layer, pieces = self._layers[-1], []
        digest = layer.out_digest
        for command, stream_id, size, data in messages:
            digest.update(struct.pack(">BHHIH", command, 0, stream_id, 0, size))
            digest.update(data)
            tag = digest.digest()
            pieces.append(struct.pack(">BHH4sH", command, 0, stream_id, tag[:4], size))
            pieces.append(data)
            if command == RELAY_DATA:
                self._package -= 1
                if (self._initial - self._package) % CIRCUIT_INCREMENT == 0:
                    self._sent_tags.append(tag[:20])
        data = b"".join(pieces)
        for layer in reversed(self._layers):
            data = layer.out_cipher.crypt(data)
        head = struct.pack(">IB", self.circ_id, kind)
        if len(data) == 509:
            self.channel.send(head + data)
        else:
            pieces = []
            for at in range(0, len(data), 509):
                pieces.append(head)
                pieces.append(data[at : at + 509])
            self.channel.send(b"".join(pieces))

    def flush(self, stream):
        """Send what `stream` has to send, as far as windows and the channel's queue allow."""
        while stream.outgoing and not self.closing.done():
            room = self.channel.room()
            count = min(BATCH, room, self._package, stream.package)
            if count <= 0:
                if room <= 0:
                    self.channel.when_room(self._resume)
                return
            # The tags in SENDMEs must not be known before the cells arrive: at least one
            # cell in each window carries randomness (tor-spec 7.4, "sendme").
            messages, at, data = [], 0, memoryview(stream.outgoing)
            while at < len(data) and len(messages) < count:
                piece = bytes(data[at : at + RELAY_DATA_MAX])
                self._short_after -= 1
                if self._short_after < 0:
                    piece = piece[: RELAY_DATA_MAX - 20]
                    self._short_after = CIRCUIT_INCREMENT // 2 + randbelow(CIRCUIT_INCREMENT // 2)
                size = len(piece)
                at += size
                if size < RELAY_DATA_MAX:
                    gap = RELAY_DATA_MAX - size
                    piece += bytes(min(gap, 4)) + (urandom(gap - 4) if gap > 4 else b"")
                messages.append((RELAY_DATA, stream.stream_id, size, piece))
            data = None
            stream.outgoing = stream.outgoing[at:]
            stream.package -= len(messages)
            self._seal(RELAY, messages)
        stream.flushed()

    def _resume(self):
        for stream in list(self.streams.values()):
            if stream.outgoing:
                self.flush(stream)

    # ── Receiving ──

    def created(self, command, body):
        awaited, self._awaited = self._awaited, None
        if awaited is None or command not in awaited[0] or self._layers:
            self.fail(CircuitError("%s: CREATED out of place" % self, 1))
        else:
            awaited[1].set((command, bytes(body)))

    def destroyed(self, reason):
        text = reason_text(DESTROY_REASONS, reason)
        self.fail(CircuitError("%s was closed by a relay: %s" % (self, text), reason), False)

    def receive(self, data):
        """Decrypt and dispatch relay cells (509 bytes each) that came in a row."""
        early, last = [], len(self._layers) - 1
        try:
            for depth in range(last):
                data = self._layers[depth].in_cipher.crypt(data)
                for at in range(0, len(data), 509):
                    if data[at + 1] == 0 == data[at + 2]:
                        one = data[at : at + 509]
                        if self._recognise(depth, one):
                            # The layers behind never saw this cell: their key streams go on
                            # without it.
                            self._from_middle(one)
                            early.append(at)
                for at in reversed(early):
                    data = data[:at] + data[at + 509 :]
                early = []
            if last < 0:
                raise ProtocolError("a relay cell before the first hop")
            self._from_last(self._layers[last], bytearray(self._layers[last].in_cipher.crypt(data)))
        except ProtocolError as e:
            self.fail(CircuitError("%s: %s" % (self, e), 1))
        except MemoryError:
            self.fail(CircuitError("%s: out of memory" % self, 5))

    def _recognise(self, depth, one):
        trial = self._layers[depth].in_digest.copy()
        trial.update(one[:5] + b"\0\0\0\0" + one[9:])
        if trial.digest()[:4] != one[5:9]:
            return False
        self._layers[depth].in_digest = trial
        return True

    def _from_middle(self, one):
        command = one[0]
        if command == RELAY_TRUNCATED:
            raise ProtocolError("truncated: " + reason_text(DESTROY_REASONS, one[11]))
        if command != RELAY_DROP:
            raise ProtocolError("relay command %d from a middle hop" % command)

    def _from_last(self, layer, cells):
        """Check and dispatch the decrypted cells of the last hop."""
        view, digest, touched = memoryview(cells), layer.in_digest, None
        for at in range(0, len(cells), 509):
            command, recognised, stream_id, tag, size = struct.unpack_from(">BHH4sH", view, at)
            view[at + 5 : at + 9] = b"\0\0\0\0"
            digest.update(view[at : at + 509])
            found = digest.digest()
            if recognised or found[:4] != tag:
                raise ProtocolError("a relay cell that no hop recognises")
            if size > RELAY_DATA_MAX:
                raise ProtocolError("a relay cell of %d bytes" % size)
            data = view[at + 11 : at + 11 + size]
            if command == RELAY_DATA:
                self._deliver -= 1
                if self._deliver < 0 or not stream_id:
                    raise ProtocolError("more DATA than the window allows")
                stream = self.streams.get(stream_id)
                if stream is not touched and touched is not None:
                    touched.arrived()
                touched = stream
                if stream is not None:
                    stream.feed(data)
                if self._deliver <= CIRCUIT_WINDOW - CIRCUIT_INCREMENT:
                    self._deliver += CIRCUIT_INCREMENT
                    self._send_relay(RELAY_SENDME, 0, b"\1\0\x14" + found[:20])
            else:
                if touched is not None:
                    touched.arrived()
                    touched = None
                self._message(command, stream_id, bytes(data))
                if self.closing.done():
                    return
        if touched is not None:
            touched.arrived()

    def _message(self, command, stream_id, data):
        if stream_id:
            if command == RELAY_BEGIN and self.on_begin is not None:
                return self._begin(stream_id, data)
            stream = self.streams.get(stream_id)
            if stream is not None:
                stream.message(command, data)
            # A stream that was closed here may still be spoken to.
            elif command not in (RELAY_END, RELAY_SENDME, RELAY_CONNECTED, RELAY_RESOLVED):
                raise ProtocolError("relay command %d for stream %d" % (command, stream_id))
        elif command == RELAY_SENDME:
            self._sendme(data)
        elif self._awaited is not None and command in self._awaited[0]:
            awaited, self._awaited = self._awaited, None
            awaited[1].set((command, data))
        elif command in self.on_control:
            self.on_control[command](data)
        elif command == RELAY_TRUNCATED:
            reason = data[0] if data else 0
            raise ProtocolError("truncated: " + reason_text(DESTROY_REASONS, reason))
        elif command != RELAY_DROP:
            raise ProtocolError("relay command %d out of place" % command)

    def _sendme(self, data):
        # Version 1: the tag of the cell that made it due (tor-spec 7.3).
        if not self._sent_tags or len(data) < 23 or data[0] != 1:
            raise ProtocolError("a SENDME that was not due")
        if not consteq(self._sent_tags.pop(0), data[3:23]):
            raise ProtocolError("a SENDME for cells that were not sent")
        self._package += CIRCUIT_INCREMENT
        self._resume()

    def _begin(self, stream_id, data):
        if stream_id in self.streams:
            raise ProtocolError("BEGIN for stream %d, which is open" % stream_id)
        host, port = parse_begin(data)
        stream = self.streams[stream_id] = Stream(self, stream_id)
        spawn(self.on_begin(stream, host, port))

    # ── Closing ──

    def close(self, reason=0):
        """Close the circuit; its streams end.  Clients tell no reason (tor-spec 5.4)."""
        self.fail(CircuitError("%s was closed here" % self, reason))

    def fail(self, error, tell=True):
        """Close the circuit because of `error`, and return it."""
        if not self.closing.done():
            self.error = error
            self.channel.forget(self.circ_id)
            if tell and not self.channel.closing.done():
                self.channel.send(cell(self.circ_id, DESTROY, b"\0"))
            log(INFO, "%s", error)
            if self._awaited is not None:
                self._awaited[1].fail(error)
            for stream in list(self.streams.values()):
                stream.end(StreamError(str(error), 8))
            self.streams = {}
            self.closing.set(error)
        return self.error


class Stream:
    """A stream of bytes through a circuit: reader and writer in one, as asyncio has them."""

    def __init__(self, circuit, stream_id):
        self.circuit, self.stream_id = circuit, stream_id
        self.opened = Promise()
        self.package = self._deliver = STREAM_WINDOW
        self.outgoing = b""
        self._incoming = bytearray()
        self._ended = self._error = None
        self._closing = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    # ── Called by the circuit ──

    def feed(self, data):
        if self._ended or not (self.opened.done() or self.circuit.on_begin):
            raise ProtocolError("DATA on stream %d, which is not open" % self.stream_id)
        self._deliver -= 1
        if self._deliver < 0:
            raise ProtocolError("more DATA on stream %d than its window" % self.stream_id)
        if not self._closing:
            self._incoming.extend(data)

    def arrived(self):
        self._readable.set()
        self._acknowledge()

    def _acknowledge(self):
        while (
            self._deliver <= STREAM_WINDOW - STREAM_INCREMENT
            and len(self._incoming) < READ_AHEAD
            and not self._ended
        ):
            self._deliver += STREAM_INCREMENT
            self.circuit._send_relay(RELAY_SENDME, self.stream_id, b"")

    def message(self, command, data):
        if command == RELAY_END:
            reason = data[0] if data else 1
            text = reason_text(END_REASONS, reason)
            self.circuit.streams.pop(self.stream_id, None)
            self.end(StreamError("the stream was closed: %s" % text, reason))
        elif command == RELAY_SENDME:
            self.package += STREAM_INCREMENT
            if self.package > STREAM_WINDOW:
                raise ProtocolError("a SENDME on stream %d too many" % self.stream_id)
            self.circuit.flush(self)
        elif command in (RELAY_CONNECTED, RELAY_RESOLVED) and not self.opened.done():
            self.opened.set(data)
        else:
            raise ProtocolError("relay command %d on stream %d" % (command, self.stream_id))

    def end(self, error):
        """The other side, or the circuit, is gone; what arrived can still be read."""
        self._ended = True
        # Clients end with MISC whatever happened, so at a service it is no error.
        if error.reason != 6 and not (error.reason == 1 and self.circuit.on_begin):
            self._error = error
        self.outgoing = b""
        self.opened.fail(error)
        self._readable.set()
        self._writable.set()

    def flushed(self):
        self._writable.set()
        if self._closing and not self.outgoing:
            self._send_end(6 if self.circuit.on_begin else 1)

    def _send_end(self, reason):
        if not self._ended and self.circuit.streams.pop(self.stream_id, None):
            self._ended = True
            self.circuit._send_relay(RELAY_END, self.stream_id, bytes([reason]))
            self._readable.set()
            self._writable.set()

    # ── At a service ──

    async def accept(self):
        """Answer BEGIN with CONNECTED."""
        if not self._ended:
            self.opened.set()
            self.circuit._send_relay(RELAY_CONNECTED, self.stream_id, b"")

    async def reject(self, reason):
        """Answer BEGIN with END."""
        self._send_end(reason)

    # ── Reading ──

    def _take(self, n):
        if n >= len(self._incoming):
            piece, self._incoming = bytes(self._incoming), bytearray()
        else:
            piece, self._incoming = bytes(self._incoming[:n]), self._incoming[n:]
        self._acknowledge()
        return piece

    async def _more(self):
        """Wait for bytes; False at the end; StreamError where the stream broke."""
        if self._ended or self._closing:
            if self._error is not None:
                raise self._error
            return False
        self._readable.clear()
        await self._readable.wait()
        return True

    async def read(self, n=-1):
        """Return up to `n` bytes as they come, or all until the end; b"" at the end."""
        if n < 0:
            pieces = []
            while True:
                pieces.append(await self.read(65536))
                if not pieces[-1]:
                    return b"".join(pieces)
        while n and not self._incoming:
            if not await self._more():
                return b""
        return self._take(n)

    async def readexactly(self, n):
        """Return `n` bytes; EOFError when the stream ends before."""
        pieces = []
        while n:
            pieces.append(await self.read(n))
            if not pieces[-1]:
                raise EOFError("the stream ended %d bytes early" % n)
            n -= len(pieces[-1])
        return b"".join(pieces)

    async def readuntil(self, separator=b"\n", limit=65536):
        """Return bytes up to and with `separator`; EOFError, or StreamError past `limit`."""
        start = 0
        while True:
            at = self._incoming.find(separator, start)
            if at >= 0:
                return self._take(at + len(separator))
            start = max(0, len(self._incoming) - len(separator) + 1)
            if start > limit:
                raise StreamError("more than %d bytes without %r" % (limit, separator), 13)
            if not await self._more():
                raise EOFError("the stream ended before %r" % separator)

    async def readline(self):
        """Return a line with its end, or what is left where the stream ends."""
        try:
            return await self.readuntil(b"\n")
        except EOFError:
            return self._take(len(self._incoming))

    def at_eof(self):
        return bool(self._ended) and not self._incoming

    # ── Writing ──

    def write(self, data):
        """Send `data`; follow with `await drain()`."""
        if self._ended or self._closing:
            raise self._error or StreamError("the stream is closed", 6)
        waiting = bool(self.outgoing)
        self.outgoing = self.outgoing + bytes(data) if waiting else bytes(data)
        if not waiting:
            self.circuit.flush(self)

    async def drain(self):
        """Wait until there is room for more; StreamError where the stream broke."""
        while len(self.outgoing) > WRITE_AHEAD // 2 and not self._ended:
            self._writable.clear()
            await self._writable.wait()
        if self._error is not None:
            raise self._error

    def write_eof(self):
        """End the stream when all is sent.  Tor has no half-closed streams (tor-spec 6.3)."""
        self.close()

    def can_write_eof(self):
        return False

    def close(self):
        """End the stream when all is sent."""
        if not self._closing:
            self._closing = True
            self._readable.set()
            if not self.outgoing:
                self.flushed()

    def is_closing(self):
        return self._closing or bool(self._ended)

    async def wait_closed(self):
        while not self._ended:
            self._writable.clear()
            await self._writable.wait()

    def get_extra_info(self, name, default=None):
        return {"circuit": self.circuit}.get(name, default)


async def pump(stream, reader, writer):
    """Move bytes both ways between a Tor stream and a local connection until both ended."""

    async def outward():
        try:
            while True:
                data = await reader.read(16 * RELAY_DATA_MAX if MICROPYTHON else 65536)
                if not data:
                    break
                stream.write(data)
                await stream.drain()
        except (OSError, EOFError, TorError):
            pass
        stream.close()

    task = spawn(outward())
    try:
        while True:
            data = await stream.read(8192 if MICROPYTHON else 65536)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    except (OSError, TorError):
        pass
    stream.close()
    task.cancel()
    try:
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass


# ═══ 12. Paths and guards ═══════════════════════════════════════════════════
# Which relays a circuit goes through: bandwidth weights, networks and families
# (path-spec 2.2), entry guards (guard-spec), vanguards-lite (proposal 333).

# LongLivedPorts of tor: streams to them ask for Stable relays.
_LONG_LIVED = (21, 22, 706, 1863, 5050, 5190, 5222, 5223, 6523, 6667, 6697, 8300)
_DAY = 86400
_EVERY = RUNNING | VALID | PROTO_RELAY2 | PROTO_FLOWCTRL1 | FAST
# Role: position of its bandwidth weights, flags it must have, flags it must not have.
_ROLES = {
    "guard": ("g", _EVERY | GUARD | STABLE | V2DIR, NOEDCONSENSUS | MIDDLEONLY),
    "middle": ("m", _EVERY | USABLE, NOEDCONSENSUS),
    "exit": ("e", _EVERY | USABLE | EXIT, NOEDCONSENSUS | MIDDLEONLY | BADEXIT),
    "intro": ("m", _EVERY | USABLE | PROTO_HSINTRO4, NOEDCONSENSUS | MIDDLEONLY),
    "rend": ("m", _EVERY | USABLE | PROTO_HSREND2, NOEDCONSENSUS | MIDDLEONLY),
}
# Done without, as in tor, where no relay is left (exit policies still count).
_PREFERRED = FAST | STABLE | EXIT
# What bandwidth weights depend on.
_KIND = GUARD | EXIT | BADEXIT | V2DIR


def weight_factors(consensus, position):
    """Return {flags & _KIND: factor of the bandwidth} for the position "g", "m" or "e".

    Only the ratios of the factors count, which are integers (dir-spec, bandwidth-weights).
    """
    w = dict(consensus.bandwidth_weights, Wge=0)
    scale = consensus.param("bwweightscale", 10000, 1)
    names = ["W" + position + kind for kind in "mged"] + ["Wmb", "Wgb", "Web", "Wdb"]
    if min([w.get(name, -1) for name in names]) < 0:
        w = {name: scale for name in names}
    factors = {}
    for n in range(16):
        flags = n % 2 * GUARD + n // 2 % 2 * EXIT + n // 4 % 2 * BADEXIT + n // 8 * V2DIR
        kind = "mged"[n % 2 + 2 * (flags & (EXIT | BADEXIT) == EXIT)]
        factors[flags] = w["W" + position + kind] * (w["W" + kind + "b"] if n > 7 else scale)
    return factors


def distinct(table, i, j):
    """Tell whether relays `i` and `j` may share a path: other network, other family."""
    (net, net6), (other, other6) = table.subnets(i), table.subnets(j)
    return net != other and (not net6 or net6 != other6) and not table.same_family(i, j)


def _draw(weighed, total):
    at = randbelow(total)
    for i, w in weighed:
        at -= w
        if at < 0:
            return i


class Weights:
    """Chooses relays of one table at random, by the weights of one consensus."""

    def __init__(self, table, consensus):
        self.table, self.param = table, consensus.param
        self._factors = {p: weight_factors(consensus, p) for p in "gme"}

    def weigh(self, position, need, never=0):
        """Yield (index, weight) of the relays with all flags of `need` and none of `never`."""
        factors, mask = self._factors[position], need | never
        for i, flags, bandwidth, _ in self.table.scan():
            if flags & mask == need:
                yield i, bandwidth * factors[flags & _KIND]

    def pick(self, role, accept, stable=0):
        """Return the index of a relay for `role` that `accept(index)` takes, or None."""
        position, need, never = _ROLES[role]
        for need in (need | stable, need & ~_PREFERRED):
            total = sum(w for _, w in self.weigh(position, need, never))
            for _ in range(12 if total else 0):
                i = _draw(self.weigh(position, need, never), total)
                if accept(i):
                    return i
            # Acceptable ones are rare, or have no weight: look at each.
            left = [(i, w) for i, w in self.weigh(position, need, never) if accept(i)]
            if left:
                total = sum(w for _, w in left)
                return _draw(left, total) if total else left[randbelow(len(left))][0]
            if role == "guard":
                return None

    def percent(self):
        """Return for how many of 100 paths all microdescriptors are there (path-spec 2.1.0)."""
        percent = 100
        for position, need in (("g", GUARD), ("m", 0), ("e", EXIT)):
            total = sum(w for _, w in self.weigh(position, need))
            have = sum(w for _, w in self.weigh(position, need | USABLE))
            percent = percent * have // total if total else percent
        return percent


# guard-spec 4.5: after failing for up to so long, a guard is tried again after so
# many seconds, if it is primary, and if it is not.
_RETRY_SCHEDULE = (
    (6 * 3600, 600, 3600),
    (4 * _DAY, 5400, 4 * 3600),
    (7 * _DAY, 4 * 3600, 18 * 3600),
    (1 << 40, 9 * 3600, 36 * 3600),
)


class Guard:
    """A sampled guard (guard-spec 4.1); times in seconds since 1970, 0 for never."""

    def __init__(self, rsa_id, sampled_on, confirmed_on=0, unlisted_since=0):
        self.rsa_id, self.sampled_on = rsa_id, sampled_on
        self.confirmed_on, self.unlisted_since = confirmed_on, unlisted_since
        # Its place in the table, -1 while it is not listed as a guard; None: maybe.
        self.index, self.reachable = -1, None
        self.tried = self.failing_since = 0
        # Better guards that were down when it was picked.
        self.passed = ()

    def retry(self, primary, t):
        """Take it for reachable again if its time has come (guard-spec 4.5)."""
        if self.reachable is False:
            for longest, delay, other in _RETRY_SCHEDULE:
                if t - self.failing_since <= longest:
                    break
            if not 0 <= t - self.tried < (delay if primary else other):
                self.reachable = None


class Guards:
    """The entry guards of a client, stored as JSON in the file `path` (None: nowhere).

    `online` is when a relay last answered: whoever hears from one may set it.
    """

    def __init__(self, path=None):
        self.sample, self.online, self._path = [], 0, path
        data = path and read_file(path)
        if data:
            try:
                for rsa_id, *times in json.loads(data):
                    self.sample.append(Guard(b32decode(rsa_id), *[int(t) for t in times]))
            except (ValueError, TypeError, AttributeError, RuntimeError, ProtocolError):
                log(WARN, "%s is damaged: choosing new guards", path)
                self.sample = []

    def _save(self):
        kept = []
        for g in self.sample:
            kept.append((b32encode(g.rsa_id), g.sampled_on, g.confirmed_on, g.unlisted_since))
        try:
            if self._path:
                write_file(self._path, json.dumps(kept).encode())
        except OSError as e:
            log(WARN, "cannot store the guards in %s: %s", self._path, e)

    def update(self, weights):
        """Take over a new consensus, as the Weights of one that is usable now (guard-spec 4.10)."""
        self._weights, self._param = weights, weights.param
        self._lifetime = self._param("guard-lifetime-days", 120, 1, 3650) * _DAY
        confirmed = self._param("guard-confirmed-min-lifetime-days", 60, 1, 3650) * _DAY
        unlisted = self._param("guard-remove-unlisted-guards-after-days", 20, 1, 3650) * _DAY
        listed = set([i for i, _ in weights.weigh(*_ROLES["guard"])])
        self._n_listed = len(listed)
        t, kept = now(), []
        for g in self.sample:
            i = weights.table.find(g.rsa_id)
            g.index = i if i in listed else -1
            if i in listed:
                g.unlisted_since = 0
            elif not g.unlisted_since:
                g.unlisted_since = t - randbelow(unlisted // 5)
            old = g.sampled_on < t - self._lifetime and g.confirmed_on < t - confirmed
            if not old and (i in listed or g.unlisted_since >= t - unlisted):
                kept.append(g)
        # Guards of which none is listed are those of another network.
        self.sample = kept if [g for g in kept if g.index >= 0] else []
        self._fill()
        self._save()

    def _offline(self):
        return now() - self.online > self._param("guard-internet-likely-down-interval", 600, 1)

    def _fill(self):
        # guard-spec 4.2.  While the network seems to be down, failures do not count: or
        # relays would be sampled up to the limit.
        p, table, offline = self._param, self._weights.table, self._offline()
        usable = len([g for g in self.order() if offline or g.reachable is not False])
        least = p("guard-min-filtered-sample-size", 20, 1)
        most = self._n_listed * p("guard-max-sample-threshold-percent", 20, 1, 100) // 100
        most = max(least, min(most, p("guard-max-sample-size", 60, 1)))
        sampled = set([g.index for g in self.sample])
        for _ in range(min(least - usable, most - len(self.sample))):
            i = self._weights.pick("guard", lambda i: i not in sampled)
            if i is None:
                break
            g = Guard(table.relay(i).rsa_id, now() - randbelow(self._lifetime // 10))
            g.index = i
            sampled.add(i)
            self.sample.append(g)

    def order(self):
        """Return the listed guards as tor prefers them: confirmed ones first (guard-spec 4.3)."""
        listed = [g for g in self.sample if g.index >= 0]
        confirmed = [g for g in listed if g.confirmed_on]
        return confirmed + [g for g in listed if not g.confirmed_on]

    def primary(self):
        """Return the primary guards (guard-spec 4.4)."""
        return self.order()[: self._param("guard-n-primary-guards", 3, 1)]

    def pick(self, accept=None, directory=False):
        """Return the Relay to enter by (guard-spec 4.6); CircuitError if there is none.

        `accept(index)` can refuse a guard for this path.  For a one-hop circuit to a
        `directory` it needs no microdescriptor, and several guards take turns.
        """
        table, t, before = self._weights.table, now(), len(self.sample)
        self._fill()
        if len(self.sample) > before:
            self._save()
        primary, fit = self.primary(), []
        for g in self.order():
            if (directory or table.flags[g.index] & USABLE) and (not accept or accept(g.index)):
                g.retry(g in primary, t)
                fit.append(g)
        if not fit:
            raise CircuitError("no entry guard is left for this path")
        up = [g for g in fit if g.reachable is not False]
        if not up:
            up = fit
            for g in fit:
                g.reachable = None
        use = self._param("guard-n-primary-guards-to-use", 1, 1)
        if directory:
            use = self._param("guard-n-primary-dir-guards-to-use", 3, 1)
        best = [g for g in up if g in primary][:use] or up[:1]
        g = best[randbelow(len(best))]
        g.tried = t
        g.passed = () if g in primary else [other for other in fit if other in primary]
        return table.relay(g.index)

    def failed(self, rsa_id):
        """Note that a guard was not reached, or built no first hop (guard-spec 4.7)."""
        for g in self.sample:
            if g.rsa_id == rsa_id:
                g.reachable = False
                g.failing_since = g.failing_since or now()

    def succeeded(self, rsa_id):
        """Note that a circuit was built through a guard (guard-spec 4.8).

        Returns False if the circuit is to be closed and another path tried, because
        better guards may have come back with the network.
        """
        offline, self.online = self._offline(), now()
        for g in self.sample:
            if g.rsa_id == rsa_id:
                g.reachable, g.failing_since = True, 0
                for better in g.passed:
                    if offline and better.reachable is False:
                        better.reachable = None
                if [better for better in g.passed if better.reachable is not False]:
                    return False
                if not g.confirmed_on:
                    g.confirmed_on = now() - randbelow(self._lifetime // 10)
                    self._save()
        return True


class PathSelector:
    """Chooses the relays of circuits: lists of Relay, from the guard on.

    Relays whose RSA identity is in `exclude` are not chosen, except as guards.
    Raises CircuitError where no path is left.
    """

    def __init__(self, table, consensus, guards):
        self.guards = guards
        # Layer-2 guards, {RSA identity: when to replace it}: only in memory, as in tor.
        self.layer_two = {}
        self.update(table, consensus)

    def update(self, table, consensus):
        """Choose from a new table and consensus from now on."""
        self.table, self.weights = table, Weights(table, consensus)
        self.guards.update(self.weights)

    def _pick(self, role, used, exclude, stable=STABLE, apart=distinct, allows=None):
        table = self.table

        def accept(i):
            if i in used or allows and not allows(i) or table.relay(i).rsa_id in exclude:
                return False
            return not [j for j in used if not apart(table, i, j)]

        i = self.weights.pick(role, accept, stable)
        if i is None:
            raise CircuitError("no relay of the network fits as %s of this path" % role)
        return i

    def directory_guard(self):
        """Return the Relay for a one-hop directory circuit."""
        return self.guards.pick(None, True)

    def introduction_point(self, exclude=()):
        """Return a Relay that a service can make its introduction point."""
        return self.table.relay(self._pick("intro", (), exclude))

    def exit_path(self, port=None, exclude=()):
        """Return guard, middle and an exit that allows `port` (None: one to resolve names)."""
        table = self.table
        stable = STABLE if port in _LONG_LIVED else 0
        allows = (lambda i: table.exit_allows(i, port)) if port else table.exits
        last = self._pick("exit", (), exclude, stable, distinct, allows)
        guard = self.guards.pick(lambda i: i != last and distinct(table, i, last))
        middle = self._pick("middle", (last, guard.index), exclude, stable)
        return [guard, table.relay(middle), table.relay(last)]

    def onion_path(self, purpose, target=None, exclude=()):
        """Return the path of an onion circuit: guard, layer 2, middle and `target`.

        `target` is anything with an `rsa_id`.  Only a client's rendezvous point, which
        is chosen here, is the third hop: `purpose` "rend" without a target.
        """
        table = self.table
        vanguards = self.weights.param("vanguards-lite-enabled", 1, 0, 1)
        # Vanguards may be of one network or family, and the guard may be the target: what
        # avoided them would tell of them.  Only A-B-A is kept out, as in tor.
        apart = (lambda table, i, j: True) if vanguards else distinct
        known = table.find(target.rsa_id) if target else -1
        used = [known] if known >= 0 else []
        guard = self.guards.pick(
            lambda i: vanguards or not used or i != known and distinct(table, i, known)
        )
        used.append(guard.index)
        used.append(self._layer_two(used) if vanguards else self._pick("middle", used, exclude))
        last = self._pick("middle" if target else purpose, used, exclude, STABLE, apart)
        path = [guard, table.relay(used[-1]), table.relay(last)]
        return path + [target] if target else path

    def _layer_two(self, used):
        # Each lives for the longer of two times drawn at random.
        t, p, table, kept = now(), self.weights.param, self.table, {}
        low = p("guard-hs-l2-lifetime-min", _DAY, 1)
        span = max(p("guard-hs-l2-lifetime-max", 12 * _DAY, 1) - low, 1)
        for rsa_id, end in self.layer_two.items():
            if t < end <= t + low + span and table.find(rsa_id) >= 0:
                kept[rsa_id] = end
        while len(kept) < p("guard-hs-l2-number", 4, 1, 19):
            i = self.weights.pick("middle", lambda i: table.relay(i).rsa_id not in kept, STABLE)
            if i is None:
                break
            lifetime = low + max(randbelow(span), randbelow(span))
            kept[table.relay(i).rsa_id] = t + 1 + lifetime
        self.layer_two = kept
        left = [table.find(rsa_id) for rsa_id in kept]
        left = [i for i in left if i not in used and table.flags[i] & USABLE]
        if not left:
            raise CircuitError("no layer-2 guard is left for this path")
        return left[randbelow(len(left))]


# ═══ 13. Directory client ═══════════════════════════════════════════════════
# Which network this is; fetching, checking, caching and refreshing its directory
# (dir-spec 4 and 5).  Everything goes over OR ports, by BEGIN_DIR.

# Of tor 0.4.9.11: nickname, address and OR port, v3 identity, RSA identity.
_AUTHORITIES = """
moria1 128.31.0.39:9201
F533C81CEF0BC0267857C99B2F471ADF249FA232 1A25C6358DB91342AA51720A5038B72742732498
tor26 217.196.147.77:443
2F3DF9CA0E5D36F2685A2DA67184EB8DCB8CBA8C FAA4BCA4A6AC0FB4CA2F8AD5A11D9E122BA894F6
dizum 45.66.35.11:443
E8A9C45EDE6D711294FADF8E7951F4DE6CA56B58 7EA6EAD6FD83083C538F44038BBFA077587DD755
gabelmoo 131.188.40.189:443
ED03BB616EB2F60BEC80151114BB25CEF515B226 F2044413DAC2E02E3D6BCF4735A19BCA1DE97281
dannenberg 193.23.244.244:443
0232AF901C31A04EE9848595AF9BB7620D4C5B2E 7BE683E65D48141321C5ED92F075C55364AC7123
maatuska 171.25.193.9:80
49015F787433103580E3B66A1707A00E60F2D15B BD6A829255CB08E66FBE7D3748363586E46B3810
longclaw 199.58.81.140:443
23D15D965BC35114467363C165C4F724B64B4F66 74A910646BCEEFBCD2E874FC1DC997430F968145
bastet 204.13.164.118:443
27102BC123E7AF1D4741AE047E160C91ADC76B21 24E2F139121D4394C54B5BCC368B3B411857C413
faravahar 216.218.219.41:443
70849B868D606BAECFB6128C5E3D782029AA394F E3E42D35F801C9D5AB23584E0025D56FE2B33396
"""
# Of the same: 200 fallback mirrors, each 4 bytes IPv4 address, 2 port, 20 RSA identity.
_FALLBACKS = """
QEE+egG7TwZ8XEiBc5h7VozXJF8cpx3umWuiE/yJI/DgYIdF7SN6kYpzo3BTgCMzDxv0Xbm3ndYjjFvdBjPgrAl2PklkHc0bo6s6
IaqDufPa4R/mMof3nZwWh79/Op0UA2nKZNL9ERtgCWKIAbtureSjmrifHGv5iWaMwEbpxq38WrL+EhkjKRkyxrCz0V9s2kdjL7Il
el3zvAFPCNMfEiMqSa0GqVVgVDbARFniR6ckwjEjSuqVrDxfAbtw81/1nW83lZptm5CJuzHF1z85VsOayJIAUGCiEfIOdMfS2IS6
SSApZPXJT6AVD8yNXx+QMnQq1Xw9JD2gcTu239ghGN9XPS7Zmj+FIylzDCB8C3qbSLSZEhPh9bomouchz4jzsLMjKqIIxm47rzK3
CSDravgIH3z6XbHRqnXA+QGkAeioHUfEiMVAZNIP68O5koytpQKiE8yjJxBcQmeRy0e93dl6cesu/EzMhN6ymcBMmf0jLW2tevgY
9OHNp5Cd8uQBipmL4hETF7/IGQG7GTj4Bd6mXy81ETRGW/XV84FeUjVOUJ7aAbEGFlAABSoG/zxsK4p3c4M2ItavcCXd0AcjjPeV
dWwE0kWM7soklhOli7q/1wFDUEOnViMpItIxS8UUaJCo5cGciE2WwMv+qiQ+SC9pIO7UxNAWJa8Uc6iuq7KM3n7I1VPEKEuRpksj
KSlxGCSkns5ZW5spWUdZ/XzfWxuouXD5nAG7uG8o5j55csUz0fIMuU8PCq/z3FuQTBo6IykmvFEJ7jSV9GVdEzu+Cnf+FgjZp1KZ
ijkjL3rYDlGw04Z6jjJ4UDjqN+Qb9KKyk1rr5CMo2AbsDgDV6eg8Zh4HqVicP+VYP7NnmLJJIynNLqrjVS8Pc7nGn+MwHfCiulfP
1FH1YrgQAJsmCv6I9p1sfJgRc+Ia2CQ8p8Qqwzo6SAG70aOccBafLEtpDcm257A8O5q+kHtAQQEGAbth/cIKc/012Ww75e6YQVYh
CxCkkS0N4U4jKTAd1iG2jQtyV+oiH9k400/jeUvu2RcIAiMptCx5fMjNY8YPtkPoIKEdET309ciHfWcvIynEYOinAlku9SEWRmu6
JyXhH7gqyVBDrKIRWwQpROE5UI5qhJWqH28yDRCH2EkwUo16nAG6Cd0PgRgICR2soobLUM+FkZQWq9SrGcEnAFGaVhylefCRjU4M
eoUzgBuRxW/WBdSEYcQBu350rrhk5zhuBBxVUd1s58DItf6fvNVe9SMpHSL9sJQTLkFRdJaLwLUqU7OG0pwXv8gWAbuCGSGk8Ysu
FSFTyBOOaYn6SHRRgEKSwSEjKSA3plaMV3Gl2P9cZPwYGSR+b+57LYnJBSMpxP6rscD3cJMSszNFBA+8KWgod97BvWTGAbv92c10
BlguC1bEon1EEmroQ+r23aLJwpEjKTRfV28pyh8qO4YmKmFl4vnxqq2NLVNoiSWAz/nBgDbUAVecRzF3wNlbRjrTcfeANIS9IyrO
5GWgSPX1MmH0GMUlekKF5zw8ZoDocS8jKSQn43QpvR5e4JS930F9HSviosgDMgea2gG7FEL0DKM6wpRB9U72lvzASloWwweeRclT
IynCWpgtz+htZHJzzWbEeO4KEZP+TkBBAYABuy8yOX851Y6IsIY2IfxYxtf1lJGzwCp0HQG7AHvgExG5iu/f3Lf0ovFnKW5paCVg
CWJaAbuRG+Pxb6NgmgVv/1aBTKzW+GaeU9WQjhgjKUtYLz9LtN5W13KN6yKqJVNQhw+YudxlxyD74a9Tc+MkBWa1mPpIGtOGBUn2
FottRmT2IzLozKHGHroWFLq2tcp5K9xofzl7T8G9ZMcBvONCbxWiItqHiGFSJHInmZdZQ+5jXe0zL3Uziv5ObwUjSwGEMnwFKwnx
AZHq+vNS3YNWIPvu69wGbFkUOixhTeZgBgHtq4XCuWbTOHAAUOsO7nyV0rQyQRXAf+F1yx0d8YuZh323wSPw2V6hIDQFBss1oyUS
y6z9ZxzAphOrGcEZAbyX9w2CRmt+wXlkF1NJDv+RpSx5DBeBQNwBu+7X77nUn/HXE/P6QIOjbrl7oYQGF7/IFwG7esJdyeRgYVTe
ODBb3FpAvLy20Eqi2BI+AbtGDLcqEaWUj93eAyYD3b64N69mLMKcWQYjK9ubnX7VAEbcUtWgk2jhxT6B1A3ljWmCdyMpJJxwbw82
BCnzZ3GfAaIkYYa8ixfBjjtKI4z9FiVQoAI07SnkHOHHjGN0HNEDfgX/ZQoBuzHveLkBnWHPJZsiPbn4CUCZTto0REMgHyMplktO
inUmOml2lUHydkVj2r3ZldKSOw+6Iyn/tL8q6JbKjns8QZhVNGQV10PoiS2Jx2YjKdqMnVCZifgXXsPkh3iIFfe60trsQ9fqjSDu
rcNedptCo8q4VX4LUpXT8VJZXvjBbHVnIylDjz6kyfsNtj9Td6MnGrVDX61+BFTuCo5KOfEvjf3eGWnU5ZQHgePasybSjBIguVJ+
OQG7/68oSe7Tu7ZgMRc1Uc/V457OoySTWuoeIyta6NYUjLOxU6xjA5iKQ0iUmhJm9VIphAMjKVeekqMWgBERK+Qo4o8dsSuEfuZi
YAliQAG7jWnLzUZQKLMGCAxV6N+IWNmGAj1AQQB4Abugbkq+jkniW90dthjtJicGdCohW1k6GtgbvDnOA6ZgFrDWm8bCofNixihD
b+97ueVaUQPh/uurorb69Trh3I3ahoHOAmU336RAvF2yIymUNRzJ4X4AdB1pTwrDzVepwj4aQ8IxR/wjKVJ7+zzoGb6NdMKkiLg6
L0MyuHi1YAlinAG7GKZfxAmEglYQGuSukK/K4sAOB3ZGJ+q2IymsaMmbSybitHKSN7DbxwZQI2kJQF8RUbwjMOTKv7YDJI4Ml0Hr
pJJPk6BEXxQtW54NvCMpSbHvd3fFYEjTDT3XVr4e7f/fRwxZLzNaAbsG8+KJSKPG4rqLDH0QnHv8EtadxVXXQ+Yg+/pWHlNN3eY4
MPoLCkhCNe0juyejwCp0kAG7Pe5nmSZ5p4K9gdKAEnVEnHY3QeMzS41XI4z8ADutl7wGv0sc7LZCOSnWb/NJMi6l/DAjKZ90p365
128vzOWRyJom4P29EQq4uWRXjSMq7Fp41ZdHARlsk+nTJrhnK8BPq3xZLMEqAbtnXBz8b6u/y+TLW+d8/ioKj1dbjbL+LKMUBgUB
ARsyx3w//mjcSz5A/F0n+VAbhPOiDQG74zmXDHAhuwZvAzCD3H9AL8lc/Pxb4pBiAFAcdeHwKgp8u3DnLRlCmLPaOmIs304qyCIl
gS9R0HRnZVgKCki8qiG1bs95e5A+M7KIOiOMWCFPRgous+x0Xf7TbRkDFhMq47FcPCX3AbtHGG42MWiQV6fvIj7MXYaRip5nntE6
tOwjKQNx5OyQHE/Hf+oqpb5CGPC+H2zjk1rrFSOMXOpWMgyQTnMa6CeGbHG5DVBpb2pgCWJOAbvAV4MwVVhDLZSwJKHC7FzcW0gX
9TYkbKIBu0b5+5Q5F4WPYY8mSFld6s2THUQAxi6oESMpuPqQqLfam5CgmqBM0ugeJjqo2kxNIYDEIyk48U+PCzDTXEkaq17GdwAA
psp5TNjFzzEjKcNmOR5nopzpWaFRk9DPL57ZTzV4dTWbcSMpWE56cU1oJmCDuHM3LXZll732eTnCD3NdIylalATJr3LbEq3rL/gQ
59oS09Zs71k6GtgjKFbYeMlCzTj1KHB5l0lQZosY7MTNvPXZ0AG8svsqRB4q5MoEIKGH84j4tRN+UfRAQQGTAbvqq0J8aKUJquKy
RvJUIxN/ye2Uibm1P3wjKWF6u1XBRauBxjIuEIKFXw2sxl9kYAliJAG7yok6JxTmKsrHooVI9vabpa8iwCZAQT53AbtZg6eBtlJc
eRjP2aurA1u6FhBbMpNa6ygjjLtcizd/kHihNlMBW4xFOBQM4t1EBf9lGCMpyJl29BNRs/DNolw4W0HtJqJ2V5qncmeFAbvV6TVq
WVjkiRoST7dJgpsw63+NKcEfdewBu/FvpXPhqbW1RZIJcmGGmCNd144FNA4BqoFjQA7xoKOGAGQcuEWHVWiCjcHRTIm5gT4/IykH
rPsIAeT3T1YQ+HC1/LtVOdvL0asZwSMBuw8cKoRsIo75amI9nkIe9js70yvVbUZk9iMo0S++piR7JcD80J1eEj3Vm/lD17tAQT9C
AbsTWbtL8TgnItEYlbKYBT+amacxTsFz/a4Bu8FhGKtJn1eaT5XujLowdYumsvgEmjU6oQBuZv8ytdLtKOMQ4MNov9PO03mZiKxX
aiwoIynmAH9La/Y5BUcLVYB7qZbsSMcta16Mc3Ig+2bBAvpd30jJ7usEjBYwkztmxQ7MQF8KqUo5V5eViBqb64jkL92o5aRe52Bs
/AGrGcGDI0Z4YPCtJyxwRaJ8Z80hXUZ9jmefRa3512sjKblZEYl3KtjTKulg6VcKSSkvOh5ALVRrVCD7qRt6x6U9LgikXa90jCUP
tTXb3o8FaFS3HQYughR35stmAU3yOF98SL5W54hPH5OHgYoj8PwKg8c9naFG02CK5x9U4yKJDVnFX9lw9QA1P0PQWEomE8nbYxOC
/0htxrleochD1+qNHQaypO/Rs9rQ9foSe1wpu/5iViim2T7SY+6biz4Y/rq9lM3JhkFslX3zI/7el6K9LVoE6yMp9HXlmH5Eorex
Q6K+4/gSju/X5aO+eOUCAbsep6ZkVhlTjShv2+12iK+n+C4KUUS5fGmkVazQWwR4Osm4aKB9z5ReScV5JnmqwbtbTwG7PlkoDqZ8
kY9a1cv3l4ZDu3CgwWnUGGSKIymWBwaYcU3AeuKzd4ZGJbfvZOM79UEVXg0jKVCeq0xdEMmpoktOoM5ALAR6LWTmjoSdIyD7yhaE
UWt/7PPbdtQ/0C9W2LleimktUKsSIynacRJuHQsRYFUzt605ndWn7I4vDhdYmkUjKZCqxiRTiKmp7HBQgQd1UDAE/kC/LqaldCNb
Kx+nC+lUV6Cp3YeNPAWl/6RZYL9AQQGdAbucCVLm6A9RotN/LTBTt7LV4YbruUBBP00Bu4xpThcMM6EckVZdm8Gi8mSOkWfCXmQG
CwG7A+EHo2Y+kSZk9Kk03/RRJiwhg1eOLPOFIykBn+sizgTL0EibfyS+A4UYtk+iI2AJYlgBu+I36fOG8URW6Z7tNrH6xPn3ew+A
F40oByMpiez6ASGadtIi7daL8+6x3MOo0rPDsAMXIPucYfwKAUAe33HEBIZl5Tlo6BNR/Gj46ekjKSUxe1ybg8V0NRqPAW37S3BT
iTyXyzdRAko9mGl++T4m3VLNltP5mL8gsqQWIpFAQQExAbt+M48jzGYNg8AVAIdHN2fa0PsFViYtQ7ojKZIVoIyEAgjHkjXYIci1
e/szJFlFueNGNQG7t5K+4rUcxfj1MTljjI+JrhfXHrFaWqU6AbsBBt2ovoaqrPdp0+HTCGdJXp8+Ik/t1iYjLaTkmMbMNDKeYHUx
ACoZxZCP6r/T2bZJnSMp9GhU7azNFoKP6q/Gxu3cB93wRBGy7xG7IynglMXfxALOQC2t8taZ7IZBudW3bqiKt70jKevyq4+ztPcM
5XxJGm/zfX9mWRWauTLDG2mIhzcr+jR34l7MC8goADOL+S2s/vlAQT8HAbs0CXaky+Sy2EI6j5iRR3aoW5FRvVdi8u8fkDel6H69
C5mwllCzLI8+CFz4Om6nYAliugG7KKeR+enPytKG1C+D62dkgTIuTpm53GT0IyjA5zNKGBGEq9B2mNBK3BnhXj7hhIAAQJQg++Mb
PmPxMpYccMX87iGH9Pk1ORI0ubU8JyMp/zmwA3yvTpoBTbHMDk/ewZseazrBBVfbIylG2nn9zMG7iqLRpqEKTln1qPsRTNmcQ7BN
sn6oq59WlbidaCdg2wzwPDLyLVhybUZk9SM85aTwZbpOTLGT5Q/9MQugl4iieFZrvQpWIykMrfllC+bzy2oJ8p2LkSUNk92R5gUt
Y/sfkHXAt6JlC9MXzg/07jfeoJOq2QGbQEE+oAG7VO5UVly9o3k+20fsTl6MAeJJWjawQYYlAbuOy6ZINkVZ/nnbxwJGwMqr4IO0
bbnz2ucBuz32L07gqQ1ZsSbr+pWrjnmwCnOjk1rqdSMqiIWvYzn5/rl/7hbJInWColWl6JxeEHYXIPtQJ3S6BGbTrpt6eg6iJZzG
K4OYqV4XLWcjKe+kxefpIV6KPHqPPHTTE5Zn2pKlLSYU8CMtH5ohi/J2VUkn6+/+C4aCZpfL3dKSvtTUIykoD5ZDEbvMUZPHDd8M
LaPDjUV4xLB98oMBu+q7OQMj+A1EV7qlzu5RFFVwDpKdzbl97wG7J6PG4wG5gD8PV4Vq2l/YNNsEEv0tCagQAbtL19jThP92vLUl
bfQTBNqE93yL+mu9BfkTxbx6XpEVVEd/c0b6m2gCUNHYSxSvOYDfxiMp78bsK9m73HfdOKoth/1jbfwmqsAtVGssAFALcltf6+n3
7gpwUqPzjO6Dku/EqjmBbgYj8LI0NPUE31AAlsteWJVJXon2yzD9F4FAswG72tiBXBroKxiI9EcgyUFrH4kbNjnZdF8aIyn3fYSw
5J9We/wiq5u24okB1BN8urmBPkAjKRQcMX902S2kT6oHL2v9DJje/5BmQk4oWyE0YFWlGPA5ifhn33xDW2HVd212ixBAQQEWAbtI
Tk+bSGXho9dywBkw1ZaU9LrvTZIT1XgBu5n3hRJ4X0UjajUyKhZDqgjcY5m1Jd3Q2COMQ2IKBT1WWCZz904DJYMWRuEXwAmwQZVg
AbsmzSnQf64sJ+sxbuVR78fvlrpXhDmDH3wjjJgl2EmRkRS46QBcXQk7lfkSURqIQEEBmAG7FDq0gnG7CyvHr4/pSzBucBYv1sFV
1/m4AbtkvLqILUXOQrViJlZENeoNNkpygQ==
"""


class Network:
    """A Tor network: `authorities` [(nickname, v3 identity, RSA identity, address, OR port)],
    `fallbacks` [(RSA identity, address, OR port)], `testing` (TestingTorNetwork).
    """

    def __init__(self):
        self.authorities, self.fallbacks, self.testing = [], [], False

    def identities(self):
        """Return the set of the authorities' v3 identities."""
        return {authority[1] for authority in self.authorities}

    def network_id(self):
        """Return 32 bytes that tell this network from others."""
        return sha256(b"".join(sorted(self.identities())))


def load_network(path=None):
    """Return the Network that the file `path` describes; None: the public one."""
    if path is not None:
        text = read_file(path)
        if text is None:
            raise ConfigError("cannot read the network file %s" % path)
        return parse_network(text.decode())
    network = Network()
    words = _AUTHORITIES.split()
    for i in range(0, len(words), 4):
        address, _, port = words[i + 1].partition(":")
        v3ident, rsa_id = binascii.unhexlify(words[i + 2]), binascii.unhexlify(words[i + 3])
        network.authorities.append((words[i], v3ident, rsa_id, address, int(port)))
    r = Reader(b64decode(_FALLBACKS.replace("\n", "")))
    while r.left():
        address, port = "%d.%d.%d.%d" % tuple(r.take(4)), r.uint(2)
        network.fallbacks.append((r.take(20), address, port))
    return network


def parse_network(text):
    """Return the Network of the torrc lines DirAuthority, FallbackDir and TestingTorNetwork.

    Authorities without v3ident (of bridges) are left out, other lines are passed over.
    Raises ConfigError, which names the line.
    """
    network = Network()
    for line in text.split("\n"):
        word = line.split("#")[0].split()
        keyword = word[0].lower() if word else ""
        try:
            if keyword == "testingtornetwork":
                network.testing = word[1] == "1"
            elif keyword in ("dirauthority", "fallbackdir"):
                options = dict([w.split("=") for w in word[1:] if "=" in w])
                [at] = [i for i in range(1, len(word)) if ":" in word[i] and "=" not in word[i]]
                address, port = word[at].split(":")[0], int(options["orport"])
                rsa_id = _identity(options.get("id") or "".join(word[at + 1 :]))
                if keyword == "fallbackdir":
                    network.fallbacks.append((rsa_id, address, port))
                elif "v3ident" in options:
                    v3ident = _identity(options["v3ident"])
                    network.authorities.append((word[1], v3ident, rsa_id, address, port))
        except (ValueError, KeyError, IndexError):
            raise ConfigError("bad line in the network file: %s" % line.strip())
    if not network.authorities:
        raise ConfigError("the network file has no DirAuthority line with a v3ident")
    return network


def _identity(text):
    data = binascii.unhexlify(text)
    if len(data) != 20:
        raise ValueError
    return data


# ── HTTP ──

# Expanding by more than that, once so much has come out, is an attack, as in tor.
_MAX_FACTOR, _FACTOR_AFTER = 25, 5 << 20

if not MICROPYTHON:
    import lzma
    import zlib

    _DECODERS = {
        "deflate": zlib.decompressobj,
        "x-tor-lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, 16 << 20),
    }

    class Decoder:
        """Undoes a Content-Encoding (dir-spec 6.1) of one or more streams in a row."""

        def __init__(self, encoding):
            self._make = _DECODERS[encoding]
            self.stream = None

        def feed(self, data):
            """Yield what `data` expands to, in pieces of at most 64 KB."""
            more = False
            while data or more:
                stream = self.stream = self.stream or self._make()
                try:
                    piece = stream.decompress(data, 65536)
                except (zlib.error, lzma.LZMAError) as e:
                    raise ProtocolError("bad compressed data: %s" % e)
                more = len(piece) == 65536 and not stream.eof
                data = getattr(stream, "unconsumed_tail", b"")
                if stream.eof:
                    self.stream, data = None, stream.unused_data
                yield piece


async def http_request(stream, method, path, body=b"", limit=65536, sink=None):
    """Make a request over a directory stream, and return (status, body).

    At most `limit` bytes are taken.  With `sink`, a function, compression is allowed,
    and the body of a 200 answer goes there piece by piece.  ProtocolError, StreamError.
    """
    head = "%s %s HTTP/1.0\r\n" % (method, path)
    if sink and not MICROPYTHON:
        head += "Accept-Encoding: x-tor-lzma, deflate, identity\r\n"
    if method == "POST":
        head += "Content-Length: %d\r\n" % len(body)
    stream.write((head + "\r\n").encode() + body)
    await stream.drain()
    try:
        lines = (await stream.readuntil(b"\r\n\r\n", 8192)).decode().split("\r\n")
        version, status = lines[0].split(" ")[:2]
        fields = [line.partition(":") for line in lines[1:]]
        fields = {name.lower(): value.strip() for name, _, value in fields}
        status, length = int(status), int(fields.get("content-length", -1))
        encoding = fields.get("content-encoding", "identity")
        decoder = None if encoding == "identity" or MICROPYTHON else Decoder(encoding)
    except (ValueError, KeyError, EOFError):
        raise ProtocolError("the directory's answer is no HTTP")
    got, out, pieces = 0, 0, []
    while True:
        data = await stream.read(65536)
        if not data:
            break
        got += len(data)
        for piece in decoder.feed(data) if decoder else (data,):
            out += len(piece)
            if out > limit or out > _FACTOR_AFTER and out > _MAX_FACTOR * got:
                raise ProtocolError("the directory's answer is too long")
            if sink and status == 200:
                sink(piece)
            else:
                pieces.append(piece)
    if length not in (-1, got) or decoder and decoder.stream:
        raise ProtocolError("the directory's answer is cut off")
    return status, b"".join(pieces)


# ── The directory ──

# A consensus that is newer than this release may require what it lacks.
_RELEASED = 1795132800
_MAX_CONSENSUS, _MAX_MICRODESCS = 32 << 20, 8 << 20
_BATCH = 16 if MICROPYTHON else 92
_WORKERS = 1 if MICROPYTHON else 3
# The next directory is tried when the last has not answered for so long.
_HEDGE_SECONDS, _CONNECT_SECONDS, _FETCH_SECONDS = 5, 15, 120
_ATTEMPTS = 12
_PHASES = {
    5: ("conn", "Connecting to a relay"),
    10: ("conn_done", "Connected to a relay"),
    14: ("handshake", "Handshaking with a relay"),
    15: ("handshake_done", "Handshake with a relay done"),
    20: ("onehop_create", "Establishing an encrypted directory connection"),
    25: ("requesting_status", "Asking for networkstatus consensus"),
    30: ("loading_status", "Loading networkstatus consensus"),
    40: ("loading_keys", "Loading authority key certs"),
    45: ("requesting_descriptors", "Asking for relay descriptors"),
    50: ("loading_descriptors", "Loading relay descriptors"),
    75: ("enough_dirinfo", "Loaded enough directory info to build circuits"),
}


class Directory:
    """The directory of a network: `table` and `consensus`, from `bootstrap()` on.

    `directory_relay`: None, or a function that returns the Relay (a directory guard) to
    ask; `on_update()` is called when `table` and `consensus` were replaced or filled.
    """

    def __init__(self, network, data_dir, channels, progress):
        self.network, self._channels, self._progress = network, channels, progress
        self._path = data_dir + "/relays"
        self.table = self.consensus = self.directory_relay = None
        self.on_update = lambda: None
        self._certs = {}
        self._percent = 0
        self._left = []

    def _report(self, percent):
        if percent > self._percent:
            self._percent = percent
            phase = percent if percent in _PHASES else 50
            self._progress(percent, *_PHASES[phase])

    async def bootstrap(self):
        """Return when there is directory information enough for circuits.

        Raises DirectoryError, ClockError, and ConfigError when the network asks for what
        this release lacks.
        """
        cached = load_table(self._path, self.network.network_id())
        if cached:
            # Even if it is too old, most microdescriptors in it are still good.
            self.table, consensus = cached
            try:
                self._judge(consensus)
                return await self._fill(self.table, consensus, True)
            except (DirectoryError, ClockError) as e:
                log(INFO, "Not using the cached directory: %s", e)
        table, consensus = await self._fetch_consensus()
        await self._fill(table, consensus, True)

    async def refresh(self):
        """Keep the directory fresh, for ever (dir-spec 5.1)."""
        delay = 0
        while True:
            try:
                await self._fill(self.table, self.consensus, False)
                when = self._next_time()
                while now() < when:
                    await asyncio.sleep(min(when - now(), 60))
                table, consensus = await self._fetch_consensus()
                await self._fill(table, consensus, True)
                delay = 0
            except TorError as e:
                log(NOTICE, "The directory could not be refreshed: %s", e)
                delay = min(delay * 2 or (2 if self.network.testing else 30), 3600)
                await asyncio.sleep(delay + randbelow(delay))

    def _next_time(self):
        # As tor's update_consensus_networkstatus_fetch_time_impl.
        c = self.consensus
        start = c.fresh_until + (c.fresh_until - c.valid_after) * 3 // 4
        span = max((c.valid_until - start) * 7 // 8, 1)
        return min(start, c.valid_until - span - 1) + randbelow(span)

    def _judge(self, consensus):
        consensus.check_times(now())
        lacking = [p for p in consensus.required_client_protocols if p.encode() not in _SUPPORTED]
        if lacking and consensus.valid_after >= _RELEASED:
            raise ConfigError(
                "the network requires %s, which this release lacks: get a newer minitor"
                % " ".join(lacking)
            )

    # ── Asking ──

    def _source(self):
        # Fallback mirrors come before authorities, directory guards before both.
        if self.directory_relay and not self._left:
            relay = self.directory_relay()
            return relay.rsa_id, relay.address, relay.port
        if not self._left:
            for sources in [a[2:] for a in self.network.authorities], list(self.network.fallbacks):
                while sources:
                    self._left.append(sources.pop(randbelow(len(sources))))
        return self._left.pop()

    async def _circuit(self):
        # A one-hop circuit to a directory: to the first of several that answers.
        found, wake, error = Promise(), asyncio.Event(), None

        async def attempt():
            nonlocal error
            try:
                rsa_id, address, port = self._source()
                self._report(5)
                channel = await self._channels.get(address, port, rsa_id, None, _CONNECT_SECONDS)
                for percent in 10, 14, 15, 20:
                    self._report(percent)
                circuit = Circuit(channel)
                await circuit.create_fast(None, _CONNECT_SECONDS)
                if found.done():
                    circuit.close()
                found.set(circuit)
            except TorError as e:
                error = e
                log(INFO, "%s", e)
            wake.set()

        try:
            for _ in range(_ATTEMPTS):
                wake.clear()
                spawn(attempt())
                try:
                    await asyncio.wait_for(wake.wait(), _HEDGE_SECONDS)
                except asyncio.TimeoutError:
                    pass
                if found.done():
                    return await found.wait()
            raise DirectoryError("no directory can be reached: %s" % (error or "no answer"))
        finally:
            found.fail(CircuitError("given up"))

    async def _get(self, circuit, path, limit, sink):
        async def get():
            stream = await circuit.open_directory_stream(_CONNECT_SECONDS)
            try:
                return await http_request(stream, "GET", path, b"", limit, sink)
            finally:
                stream.close()

        try:
            status, _ = await asyncio.wait_for(get(), _FETCH_SECONDS)
        except asyncio.TimeoutError:
            raise DirectoryError("the directory is too slow")
        if status != 200:
            raise DirectoryError("the directory answered with status %d" % status)

    # ── Consensus ──

    async def _fetch_consensus(self):
        error = None
        for _ in range(_ATTEMPTS):
            circuit = await self._circuit()
            try:
                return await self._consensus_from(circuit)
            except (ProtocolError, DirectoryError, CircuitError, StreamError) as e:
                error = e
                log(INFO, "No consensus from %s: %s", circuit, e)
            finally:
                circuit.close()
        raise DirectoryError("no directory gave a consensus that can be used: %s" % error)

    async def _consensus_from(self, circuit):
        identities, table = self.network.identities(), RelayTable()
        parser = ConsensusParser(identities, table)

        def sink(piece):
            self._report(30)
            parser.feed(piece)

        self._report(25)
        # A mirror answers only if the consensus is signed by more than half of these.
        wanted = "+".join([hexlify(i[:3]).upper() for i in sorted(identities)])
        path = "/tor/status-vote/current/consensus-microdesc/" + wanted
        await self._get(circuit, path, _MAX_CONSENSUS, sink)
        consensus = parser.finish()
        # The certificates are judged by the consensus's time, and that by the clock.
        when, text = consensus.valid_after, []
        missing = consensus.missing_certs(self._certs, when)
        if missing:
            self._report(40)
            wanted = "+".join(["-".join([hexlify(i).upper() for i in pair]) for pair in missing])
            try:
                await self._get(circuit, "/tor/keys/fp-sk/" + wanted, 131072, text.append)
                self._certs.update(parse_authority_certs(b"".join(text), identities))
            except DirectoryError as e:
                log(INFO, "Authority certificates are missing: %s", e)
        consensus.verify(self._certs, identities, when)
        self._judge(consensus)
        if self.consensus and when < self.consensus.valid_after:
            raise DirectoryError("the directory's consensus is older than the one in use")
        return table, consensus

    # ── Microdescriptors ──

    async def _fill(self, table, consensus, until_ready):
        # Fetch microdescriptors, enough or all; then use the table.
        if self.table and table is not self.table:
            table.carry_over(self.table)
        table.use_family_lists = consensus.param("use-family-lists", 1, 0, 1)
        table.use_family_ids = consensus.param("use-family-ids", 1, 0, 1)
        least = consensus.param("min_paths_for_circs_pct", 60, 25, 95)
        weights = Weights(table, consensus)
        queue, again, step = table.missing(), [], len(table) // 32
        percent = arrived = failures = 0

        async def worker():
            nonlocal percent, arrived, failures
            circuit = None
            try:
                while failures < _ATTEMPTS:
                    if arrived >= step or not percent:
                        percent, arrived = weights.percent(), 0
                        if until_ready and percent >= least:
                            break
                        self._report(min(50 + 24 * percent // least, 74))
                    batch = again.pop() if again else []
                    while len(batch) < _BATCH:
                        pair = next(queue, None)
                        if pair is None:
                            break
                        batch.append(pair)
                    if not batch:
                        break
                    try:
                        circuit = circuit or await self._circuit()
                        await self._microdescs_from(circuit, table, batch)
                    except TorError as e:
                        log(INFO, "No microdescriptors from %s: %s", circuit, e)
                    left = [pair for pair in batch if not table.flags[pair[0]] & HAVE_MICRODESC]
                    arrived += len(batch) - len(left)
                    if left:
                        failures += 1
                        again.append(left)
                        if circuit:
                            circuit.close()
                        circuit = None
            finally:
                if circuit:
                    circuit.close()

        before = sum([flags & HAVE_MICRODESC > 0 for flags in table.flags])
        if before < len(table):
            self._report(45)
            await asyncio.gather(*[worker() for _ in range(_WORKERS)])
        if weights.percent() < least:
            raise DirectoryError("too few microdescriptors came: %d %%" % weights.percent())
        if before < sum([flags & HAVE_MICRODESC > 0 for flags in table.flags]) or (
            consensus is not self.consensus
        ):
            self.table, self.consensus = table, consensus
            try:
                table.save(self._path, self.network.network_id(), consensus)
            except OSError as e:
                log(WARN, "The directory cannot be stored in %s: %s", self._path, e)
            self._report(75)
            self.on_update()

    async def _microdescs_from(self, circuit, table, batch):
        wanted = {digest: i for i, digest in batch}

        def take(md):
            i = wanted.pop(md.digest, None)
            if i is not None:
                table.set_microdesc(i, md)

        parser = MicrodescParser(take)
        path = "/tor/micro/d/" + "-".join([b64encode(digest) for digest in wanted])
        await self._get(circuit, path, _MAX_MICRODESCS, parser.feed)
        parser.finish()


# ═══ 13b. Circuit pool ══════════════════════════════════════════════════════
# Which circuit serves which purpose; building, retrying, keeping a few ready.

BUILD_SECONDS = 20
ATTEMPTS = 6
# tor's MaxCircuitDirtiness: no new stream joins an older exit circuit.
DIRTY_MS = 600000
SPARES = 0 if MICROPYTHON else 2


_PURPOSES = {
    "rendezvous": "rend",
    "hsdir": "hsdir",
    "intro": "intro",
    "service_intro": "intro",
    "service_rendezvous": "rend",
}


class TorCore:
    """Channels, directory, paths and the circuits built from them.

    `network`: the path of a file that describes a network, None for the public one.
    """

    def __init__(self, data_dir, network=None, progress=None):
        self.data_dir = data_dir
        self.network = load_network(network)
        self.progress = progress or (lambda percent, tag, summary: None)
        self.channels = Channels()
        self.directory = Directory(self.network, data_dir, self.channels, self.progress)
        self.paths = None
        self.onion_circuits = {}
        self._exits = []
        self._spare, self._filling = [], False
        self._tasks = []

    async def bootstrap(self):
        """Get the directory ready; from then on it is refreshed in the background."""
        await self.directory.bootstrap()
        guards = Guards(self.data_dir + "/guards.json")
        self.paths = PathSelector(self.directory.table, self.directory.consensus, guards)
        self.directory.on_update = self._updated
        self.directory.directory_relay = self.paths.directory_guard
        self._tasks.append(spawn(self.directory.refresh()))
        self.progress(90, "ap_handshake_done", "Handshake finished with a relay to build circuits")
        self.progress(95, "circuit_create", "Establishing a Tor circuit")
        self._keep(await self.circuit_to("rendezvous"))
        self.progress(100, "done", "Done")

    def _updated(self):
        self.paths.update(self.directory.table, self.directory.consensus)

    async def aclose(self):
        """Close every circuit and channel, and stop the background tasks."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self.channels.close()
        # The writer tasks send what is queued, DESTROY cells among it.
        await asyncio.sleep(0.05)

    # ── Building ──

    async def build_circuit(self, path, seconds=BUILD_SECONDS):
        """Build a circuit through the relays of `path`; ChannelError, CircuitError."""
        first, guards = path[0], self.paths.guards
        try:
            channel = await self.channels.get(
                first.address, first.port, first.rsa_id, first.ed_id, seconds
            )
            window = self.directory.consensus.param("circwindow", CIRCUIT_WINDOW, 100, 1000)
            circuit = Circuit(channel, window)
            await circuit.create(first, seconds)
        except TorError:
            guards.failed(first.rsa_id)
            raise
        try:
            if not guards.succeeded(first.rsa_id):
                raise CircuitError("better guards may be back")
            for relay in path[1:]:
                await circuit.extend(relay, seconds)
        except BaseException:
            circuit.close()
            raise
        return circuit

    async def circuit_to(self, purpose, target=None, attempts=ATTEMPTS):
        """Return a circuit for `purpose`, trying other paths where one fails; CircuitError.

        "exit": an exit circuit that may be shared, for port `target`; "rendezvous": three
        hops, the last one random; "hsdir", "intro", "service_intro", "service_rendezvous":
        to `target`, by three hops.
        """
        if purpose == "exit":
            return await self._exit_circuit(target)
        purpose = _PURPOSES[purpose]
        circuit = self._take_spare(target)
        if circuit is None:
            return await self._onion_circuit(purpose, target, attempts)
        if target is not None:
            try:
                await circuit.extend(target, BUILD_SECONDS)
            except CircuitError as e:
                log(INFO, "%s", e)
                if attempts < 2:
                    raise
                return await self._onion_circuit(purpose, target, attempts - 1)
        return circuit

    async def _onion_circuit(self, purpose, target, attempts=ATTEMPTS):
        error = None
        for _ in range(attempts):
            try:
                return await self.build_circuit(self.paths.onion_path(purpose, target))
            except (ChannelError, CircuitError) as e:
                error = e
                log(INFO, "A circuit for %s failed: %s", purpose, e)
        raise CircuitError("no circuit for %s in %d attempts: %s" % (purpose, attempts, error))

    # ── Circuits kept ready: three hops that any target can follow ──

    def _keep(self, circuit):
        if len(self._spare) < SPARES:
            self._spare.append(circuit)
        else:
            circuit.close()

    def _take_spare(self, target):
        self._spare = [c for c in self._spare if not c.closed]
        for circuit in self._spare:
            # Not A-B-A; the guard may be the target, as in tor.
            if target is None or target.rsa_id not in [r.rsa_id for r in circuit.path[1:]]:
                self._spare.remove(circuit)
                break
        else:
            circuit = None
        if SPARES and not self._filling:
            self._filling = True
            spawn(self._fill())
        return circuit

    async def _fill(self):
        try:
            while len(self._spare) < SPARES:
                self._keep(await self._onion_circuit("rend", None))
        except TorError as e:
            log(INFO, "%s", e)
        finally:
            self._filling = False

    # ── Exit circuits ──

    async def _exit_circuit(self, port):
        self._exits = [
            entry
            for entry in self._exits
            if not (entry[1].done() and (entry[1].get() is None or entry[1].get().closed))
            and ticks_diff(ticks_ms(), entry[0]) < DIRTY_MS
        ]
        for _, promise, ports in self._exits:
            if port in ports or promise.done() and self._allows(promise.get(), port):
                ports.add(port)
                return await promise.wait()
        promise = Promise()
        self._exits.append((ticks_ms(), promise, {port}))
        error = None
        for _ in range(ATTEMPTS):
            try:
                promise.set(await self.build_circuit(self.paths.exit_path(port)))
                return promise.get()
            except (ChannelError, CircuitError) as e:
                error = e
            except BaseException as e:
                promise.fail(CircuitError("the attempt was given up: %s" % e))
                raise
        error = CircuitError("no circuit to an exit in %d attempts: %s" % (ATTEMPTS, error))
        promise.fail(error)
        raise error

    def _allows(self, circuit, port):
        table = self.directory.table
        i = table.find(circuit.path[-1].rsa_id)
        return i >= 0 and table.exit_allows(i, port)

    def retire(self, circuit):
        """Give `circuit` no new stream."""
        self._exits = [e for e in self._exits if not e[1].done() or e[1].get() is not circuit]


# ═══ 14. Onion client ═══════════════════════════════════════════════════════
# Descriptor, introduction, rendezvous (rend-spec-v3 3 and 4), and streams over
# the circuit that comes of it; all streams to a service share one.

_HSDIR_SECONDS = 30
_ANSWER_SECONDS = 20
_REND_SECONDS = 40
_BEGIN_SECONDS = 40
# A rendezvous circuit without streams is kept so long: tor's MaxCircuitDirtiness.
_IDLE_SECONDS = 600
_MAX_PEERS = 8 if MICROPYTHON else 256
MAX_DESCRIPTOR = 50000


class OnionPeer:
    """What the client keeps of one service: its descriptor, and the circuit to it.

    `circuit`: a Promise, set while the circuit is being built or stands.
    """

    def __init__(self, key):
        self.key = key
        self.circuit = self.descriptor = self.blinded = self.subcredential = None
        self.until = 0

    def find_blinded(self, tor):
        """Compute the blinded key in force; return the time period it is for."""
        network = tor.directory.network
        period = time_periods(tor.directory.consensus, network.testing)[2]
        blinded = ed25519_blind_public(self.key, blinding_param(self.key, period))
        if blinded != self.blinded:
            self.blinded, self.descriptor = blinded, None
            self.subcredential = subcredential(self.key, blinded)
        return period


async def hsdir_request(tor, relay, method, path, body=b""):
    """Ask a directory of onion services over four hops: (status, body)."""
    circuit = await tor.circuit_to("hsdir", relay)
    try:
        stream = await circuit.open_directory_stream(_HSDIR_SECONDS)
        asking = http_request(stream, method, path, body, MAX_DESCRIPTOR)
        return await asyncio.wait_for(asking, _HSDIR_SECONDS)
    except asyncio.TimeoutError:
        raise DirectoryError("a directory of onion services does not answer")
    finally:
        circuit.close()


async def _fetch_descriptor(tor, peer):
    # From one responsible directory after the other, in random order (2.2.3).
    directory, period = tor.directory, peer.find_blinded(tor)
    ring = hsdir_ring(directory.table, directory.consensus, peer.blinded, period, False)
    path = "/tor/hs/3/" + b64encode(peer.blinded)
    problem = "none of %d directories has it. Is the address right, and the service up?" % len(ring)
    while ring:
        relay = directory.table.relay(ring.pop(randbelow(len(ring))))
        try:
            status, body = await hsdir_request(tor, relay, "GET", path)
            if status == 200:
                found = parse_descriptor(body, peer.blinded, peer.subcredential, now())
                peer.descriptor, peer.until = found, now() + found.lifetime
                return
            log(INFO, "a directory has no descriptor: status %d", status)
        except TorError as e:
            problem = "%s" % e
            log(INFO, "fetching a descriptor failed: %s", e)
    raise DescriptorError("no descriptor of %s: %s" % (onion_address(peer.key), problem))


async def _rendezvous_point(tor, cookie):
    circuit = await tor.circuit_to("rendezvous")
    await circuit.ask(
        RELAY_ESTABLISH_RENDEZVOUS, cookie, (RELAY_RENDEZVOUS_ESTABLISHED,), _ANSWER_SECONDS
    )
    return circuit


async def _introduce(tor, peer, intro):
    # Meet the service through one introduction point; the joined circuit.
    if not tor.directory.network.testing and is_private(intro.address):
        raise OnionError("an introduction point has a private address")
    cookie = urandom(20)
    rend, introducing = circuits = await asyncio.gather(
        _rendezvous_point(tor, cookie), tor.circuit_to("intro", intro), return_exceptions=True
    )
    try:
        for circuit in circuits:
            if isinstance(circuit, BaseException):
                raise circuit
        if rend.closed:
            raise rend.error
        # A circuit takes each message only where it is expected, and once: RENDEZVOUS2 not
        # before INTRODUCE1 is on its way and the keys are bound to it (bug 41297).
        state, body = hs_ntor_client_intro(intro, peer.subcredential, cookie, rend.path[-1])
        joined = rend.expect((RELAY_RENDEZVOUS2,))
        _, ack = await introducing.ask(
            RELAY_INTRODUCE1, body, (RELAY_INTRODUCE_ACK,), _ANSWER_SECONDS
        )
        status = parse_introduce_ack(ack)
        if status:
            raise OnionError("an introduction point refused: status %d" % status)
        try:
            _, reply = await joined.wait(_REND_SECONDS)
        except asyncio.TimeoutError:
            raise CircuitError("the service did not come to the rendezvous point")
        rend.add_onion_hop(hs_ntor_client_finish(state, reply))
        introducing.close()
        return rend
    except BaseException:
        for circuit in circuits:
            if not isinstance(circuit, BaseException):
                circuit.close()
        raise


async def _meet(tor, peer):
    # Try the introduction points, and once more with a new descriptor.
    error, tried = None, -1
    for _ in range(2):
        peer.find_blinded(tor)
        if peer.descriptor is None or peer.until < now():
            await _fetch_descriptor(tor, peer)
        if peer.descriptor.revision == tried:
            break
        tried = peer.descriptor.revision
        points = sorted(peer.descriptor.intro_points, key=lambda _: randbelow(1 << 30))
        for _ in range(6):
            if not points:
                break
            intro = points.pop(0)
            try:
                return await _introduce(tor, peer, intro)
            except TorError as e:
                error = e
                log(INFO, "introduction failed: %s", e)
                if not isinstance(e, OnionError):
                    points.append(intro)
        peer.descriptor = None
    raise OnionError(
        "%s cannot be reached, it may be down: %s" % (onion_address(peer.key), error)
    )


async def _serve_peer(tor, peer, promise):
    # Build the circuit, and close it when it was idle for long.
    try:
        circuit = await _meet(tor, peer)
    except BaseException as e:
        peer.circuit = None
        known = isinstance(e, TorError)
        promise.fail(e if known else OnionError("the attempt was given up: %s" % e))
        if not known:
            raise
        return
    promise.set(circuit)
    while not circuit.closed:
        try:
            await circuit.closing.wait(_IDLE_SECONDS)
        except asyncio.TimeoutError:
            if not circuit.streams:
                circuit.close()
    if peer.circuit is promise:
        peer.circuit = None


async def onion_circuit(tor, key, isolation=None):
    """Return the circuit to the service `key`, building it if there is none; OnionError."""
    name = (key, isolation)
    peers = tor.onion_circuits
    peer = peers.get(name)
    if peer is None:
        for old in list(peers) if len(peers) >= _MAX_PEERS else ():
            if peers[old].circuit is None:
                del peers[old]
        peer = peers[name] = OnionPeer(key)
    promise = peer.circuit
    if promise is None or promise.done() and promise.get().closed:
        promise = peer.circuit = Promise()
        spawn(_serve_peer(tor, peer, promise))
    return await promise.wait()


async def connect_onion(tor, key, port, isolation=None):
    """Open a stream to `port` of the service with the identity `key` (32 bytes).

    Streams of one `isolation` (anything hashable) share a circuit.  Raises OnionError,
    StreamError.
    """
    for last in (False, False, True):
        circuit = await onion_circuit(tor, key, isolation)
        try:
            return await circuit.open_stream("", port, _BEGIN_SECONDS, 0)
        except (CircuitError, StreamError) as e:
            if isinstance(e, StreamError) and e.reason == END_DONE:
                raise StreamError("%s has no port %d" % (onion_address(key), port), END_DONE)
            if e.reason == END_TIMEOUT:
                # The service may have gone without a word.
                circuit.close()
            if last or not circuit.closed:
                raise


# ═══ 15. Onion service ══════════════════════════════════════════════════════
# Introduction points, publishing, and answering introductions (rend-spec-v3 2
# to 4); keys as tor's HiddenServiceDir holds them.

INTRO_POINTS = 3
# tor: at most so many introduction circuits in so many seconds.
_INTRO_LAUNCHES, _INTRO_SPAN_MS = 10, 300000
_UPLOADS = 1 if MICROPYTHON else 4
# Rendezvous circuits of one service: being built, and in all.
_MAX_MEETINGS, _MAX_CIRCUITS = (4, 8) if MICROPYTHON else (64, 1024)
_MAX_STREAMS = 8 if MICROPYTHON else 512
_SERVICE_IDLE_SECONDS = 1200
_SECRET_HEAD = b"== ed25519v1-secret: type0 ==\x00\x00\x00"
_PUBLIC_HEAD = b"== ed25519v1-public: type0 ==\x00\x00\x00"


def load_service_key(key_dir):
    """Return (expanded secret key, public key) from a folder in tor's HiddenServiceDir format.

    A new key is made where there is none.  Raises ConfigError.
    """
    secret = key_dir + "/hs_ed25519_secret_key"
    try:
        private_dir(key_dir)
        data = read_file(secret)
        if data is None:
            data = _SECRET_HEAD + ed25519_expand(urandom(32))
            if "hs_ed25519_secret_key" in os.listdir(key_dir):
                raise ConfigError("%s cannot be read: whose is it?" % secret)
            write_file(secret, data)
        if len(data) != 96 or data[:32] != _SECRET_HEAD:
            raise ConfigError("%s is no key of a version 3 onion service" % secret)
        public = ed25519_public_expanded(data[32:])
        for name, content in (
            ("hs_ed25519_public_key", _PUBLIC_HEAD + public),
            ("hostname", onion_address(public).encode() + b"\n"),
        ):
            if read_file(key_dir + "/" + name) != content:
                write_file(key_dir + "/" + name, content)
    except OSError as e:
        raise ConfigError("the folder %s cannot be used for a key: %s" % (key_dir, e))
    return data[32:], public


async def open_target(target):
    """Connect to a local target, "unix:/path" or (host, port): (reader, writer)."""
    if isinstance(target, str):
        return await asyncio.open_unix_connection(target[5:])
    return await asyncio.open_connection(target[0], target[1])


class OnionService:
    """An onion service: its key in `key_dir`, `ports` {virtual port: target}.

    A target is a local port, (host, port), "unix:/path" or a coroutine function that gets
    (reader, writer).  `address`; `rate`: introductions a second that are answered in the
    long run, eight times as many in a burst.  Raises ConfigError.
    """

    def __init__(self, tor, key_dir, ports):
        self.tor, self.key_dir, self.ports = tor, key_dir, {}
        for port, target in ports.items():
            if isinstance(target, int):
                target = ("127.0.0.1", target)
            unix = isinstance(target, str) and target[:5] == "unix:" and not MICROPYTHON
            if not (unix or isinstance(target, tuple) and len(target) == 2 or callable(target)):
                raise ConfigError("%r is no target for an onion service" % (target,))
            self.ports[port] = target
        self._esk, self.key = load_service_key(key_dir)
        self.address = onion_address(self.key)
        self.rate = 25
        self.intros = []
        self.circuits = set()
        self._meetings = 0
        # In thousandths of an introduction.
        self._bucket, self._filled = 8000 * self.rate, ticks_ms()
        self._launched = []
        self._periods = {}
        self._rings = None
        self._uploaded = {}
        self._changed = asyncio.Event()
        self._published = Promise()
        self._tasks = []

    async def start(self):
        """Open the service, and return when its descriptors were offered to all directories."""
        self._tasks = [spawn(self._keep_intros()), spawn(self._keep_published())]
        await self._published.wait()

    async def close(self):
        """Take the service down."""
        for task in self._tasks:
            task.cancel()
        for circuit in [i.circuit for i in self.intros if i.circuit] + list(self.circuits):
            circuit.close()
        self._published.fail(OnionError("the service was closed"))

    def _random_param(self, low, high, default):
        low = self.tor.directory.consensus.param(low, default[0], 1)
        high = self.tor.directory.consensus.param(high, default[1], low)
        return low + randbelow(high - low + 1)

    # ── Introduction points (3.1) ──

    def _new_intro(self):
        # A Relay, apart from the others, with what belongs to an introduction point.
        table, paths = self.tor.directory.table, self.tor.paths
        others = [table.find(i.rsa_id) for i in self.intros]
        for _ in range(20):
            intro = paths.onion_path("intro", None, [i.rsa_id for i in self.intros])[-1]
            if all([j < 0 or distinct(table, intro.index, j) for j in others]):
                break
        intro.seed = urandom(32)
        intro.auth_key = ed25519_public(intro.seed)
        intro.b, intro.enc_key = x25519_keypair()
        intro.circuit, intro.ready, intro.seen = None, False, set()
        intro.until = now() + self._random_param(
            "hs_intro_min_lifetime", "hs_intro_max_lifetime", (64800, 86400)
        )
        # This bounds `seen`, too.
        intro.left = self._random_param(
            "hs_intro_min_introduce2", "hs_intro_max_introduce2",
            (512, 1024) if MICROPYTHON else (16384, 32768),
        )
        return intro

    async def _keep_intros(self):
        while True:
            try:
                while len(self.intros) < INTRO_POINTS:
                    intro = self._new_intro()
                    self.intros.append(intro)
                    self._tasks.append(spawn(self._keep_intro(intro)))
            except TorError as e:
                log(WARN, "no introduction point for %s: %s", self.address, e)
            await asyncio.sleep(1)
            self._tasks = [t for t in self._tasks if not t.done()]

    async def _keep_intro(self, intro):
        # An introduction point's whole life; a lost circuit is built anew, three times.
        try:
            for _ in range(4):
                await self._launch()
                try:
                    await self._establish(intro)
                except TorError as e:
                    log(INFO, "introduction point lost: %s", e)
                    break
                intro.ready = True
                self._changed.set()
                while not intro.circuit.closed and now() < intro.until and intro.left > 0:
                    try:
                        await intro.circuit.closing.wait(10)
                    except asyncio.TimeoutError:
                        pass
                if not intro.circuit.closed:
                    break
                intro.ready = False
        finally:
            if intro.circuit:
                intro.circuit.close()
            self.intros.remove(intro)

    async def _launch(self):
        # Wait until one more introduction circuit may be built.
        while True:
            t = ticks_ms()
            self._launched = [a for a in self._launched if ticks_diff(t, a) < _INTRO_SPAN_MS]
            if len(self._launched) < _INTRO_LAUNCHES:
                self._launched.append(t)
                return
            await asyncio.sleep(1)

    async def _establish(self, intro):
        intro.circuit = circuit = await self.tor.circuit_to("service_intro", intro)
        circuit.on_control[RELAY_INTRODUCE2] = lambda body: self._introduced(intro, body)
        message = establish_intro(intro.seed, intro.auth_key, circuit.kh)
        await circuit.ask(
            RELAY_ESTABLISH_INTRO, message, (RELAY_INTRO_ESTABLISHED,), _ANSWER_SECONDS
        )

    # ── Publishing (2.2.1, 2.4) ──

    def _keys(self, period):
        # The blinded secret and public key, and the subcredential, of a time period.
        found = self._periods.get(period[:2])
        if found is None:
            param = blinding_param(self.key, period)
            blinded = ed25519_blind_public(self.key, param)
            found = ed25519_blind_secret(self._esk, param), blinded
            found += (subcredential(self.key, blinded),)
            self._periods[period[:2]] = found
        return found

    def _find_rings(self):
        # [(period, indexes of the directories)], computed anew for each consensus.
        directory = self.tor.directory
        consensus, table = directory.consensus, directory.table
        if self._rings is None or self._rings[0] is not consensus:
            periods = time_periods(consensus, directory.network.testing)[:2]
            keys = [period[:2] for period in periods]
            self._periods = {k: v for k, v in self._periods.items() if k in keys}
            rings = [
                (p, hsdir_ring(table, consensus, self._keys(p)[1], p, True)) for p in periods
            ]
            self._rings = (consensus, rings)
            self._uploaded = {k: v for k, v in self._uploaded.items() if k[0] in keys}
        return self._rings[1]

    async def _keep_published(self):
        while True:
            waited = 0
            # All introduction points, or after a while those that are there.
            while not any([i.ready for i in self.intros]) or waited < 30 and (
                len(self.intros) < INTRO_POINTS or not all([i.ready for i in self.intros])
            ):
                await asyncio.sleep(1)
                waited += 1
            self._changed.clear()
            tried = failed = 0
            for period, ring in self._find_rings():
                some, bad = await self._publish(period, ring)
                tried, failed = tried + some, failed + bad
            if tried > failed:
                self._published.set()
            elif tried:
                log(WARN, "the descriptors of %s could not be published", self.address)
            # A new consensus, a changed introduction point or the time can make it due.
            for _ in range(20 if failed else 60):
                if self._changed.is_set() or self._rings[0] is not self.tor.directory.consensus:
                    break
                await asyncio.sleep(1)

    async def _publish(self, period, ring):
        # Upload to the directories that lack the present state: (tried, failed).
        intros = [i for i in self.intros if i.ready]
        state = set([i.auth_key for i in intros])
        table, todo = self.tor.directory.table, []
        for i in ring:
            done, until = self._uploaded.get((period[:2], table.rsa_id(i)), (None, 0))
            if done != state or until < now():
                todo.append(table.relay(i))
        if not todo or not state:
            return 0, 0
        esk, blinded, subcred = self._keys(period)
        revision = revision_counter(esk, now() - period[3])
        text = make_descriptor(esk, blinded, subcred, revision, intros, now())
        tried, failed = len(todo), []

        async def upload():
            while todo:
                relay = todo.pop()
                try:
                    answer = await hsdir_request(
                        self.tor, relay, "POST", "/tor/hs/3/publish", text
                    )
                    if answer[0] != 200:
                        raise DirectoryError("status %d" % answer[0])
                    # tor: again after one to two hours.
                    until = now() + 3600 + randbelow(3600)
                    self._uploaded[(period[:2], relay.rsa_id)] = state, until
                except TorError as e:
                    failed.append(relay)
                    log(INFO, "a descriptor could not be uploaded: %s", e)

        await asyncio.gather(*[upload() for _ in range(_UPLOADS)])
        log(INFO, "period %d: %d descriptors of %d uploaded", period[0], tried - len(failed), tried)
        return tried, len(failed)

    # ── Introductions and rendezvous (3.3, 4) ──

    def _introduced(self, intro, body):
        t = ticks_ms()
        grown = self._bucket + ticks_diff(t, self._filled) * self.rate
        self._bucket, self._filled = min(grown, 8000 * self.rate), t
        full = self._meetings >= _MAX_MEETINGS or len(self.circuits) >= _MAX_CIRCUITS
        if full or self._bucket < 1000:
            log(INFO, "an introduction is dropped: too many")
            return
        self._bucket -= 1000
        self._meetings += 1
        spawn(self._answer(intro, body))

    async def _answer(self, intro, body):
        try:
            circuit = await self._join(intro, body)
        except (TorError, asyncio.TimeoutError) as e:
            log(INFO, "an introduction came to nothing: %s", e)
            return
        finally:
            self._meetings -= 1
        self.circuits.add(circuit)
        while not circuit.closed:
            try:
                await circuit.closing.wait(_SERVICE_IDLE_SECONDS)
            except asyncio.TimeoutError:
                if not circuit.streams:
                    circuit.close()
        self.circuits.discard(circuit)

    async def _join(self, intro, body):
        # Meet the client at the rendezvous point that INTRODUCE2 names.
        subcreds = [keys[2] for keys in self._periods.values()]
        target, cookie, answer, keys = hs_ntor_service(intro, intro.b, subcreds, body)
        if any([cookie in i.seen for i in self.intros]):
            raise ProtocolError("INTRODUCE2: the rendezvous cookie was used before")
        intro.seen.add(cookie)
        intro.left -= 1
        directory = self.tor.directory
        if is_private(target.address) and not directory.network.testing:
            raise ProtocolError("INTRODUCE2: the rendezvous point has a private address")
        attempts = directory.consensus.param("hs_service_max_rdv_failures", 2, 1, 10)
        circuit = await self.tor.circuit_to("service_rendezvous", target, attempts)
        await circuit.send_control(RELAY_RENDEZVOUS1, answer)
        circuit.add_onion_hop(keys, True)
        circuit.on_begin = self._begin
        return circuit

    # ── Streams ──

    async def _begin(self, stream, host, port):
        target = self.ports.get(port)
        if target is None:
            # As if closed, and no second guess on this circuit.
            await stream.reject(END_DONE)
            stream.circuit.close()
        elif len(stream.circuit.streams) > _MAX_STREAMS:
            await stream.reject(END_RESOURCELIMIT)
        elif callable(target):
            await stream.accept()
            try:
                await target(stream, stream)
            except Exception as e:
                log(WARN, "the handler of port %d failed: %s: %s", port, type(e).__name__, e)
            stream.close()
        else:
            try:
                reader, writer = await open_target(target)
            except OSError as e:
                log(WARN, "port %d leads to %s, which cannot be reached: %s", port, target, e)
                return await stream.reject(END_CONNECTREFUSED)
            await stream.accept()
            await pump(stream, reader, writer)


# ═══ 16. Tor ════════════════════════════════════════════════════════════════
# What programs use: AsyncTor, and on top of it the blocking Tor.

CONNECT_SECONDS = 120  # tor's SocksTimeout
PAGE_LIMIT = 1 << 26
# END reasons after which tor asks another exit (tor-spec 6.3): MISC, RESOLVEFAILED,
# EXITPOLICY, DESTROY, NOROUTE, HIBERNATING, RESOURCELIMIT; and TIMEOUT, our own.
_ASK_ANOTHER_EXIT = (1, 2, 4, 5, 7, 8, 9, 11)


def default_data_dir(network=None):
    """Return the folder for state: minitor in $XDG_STATE_HOME or ~/.local/state.

    For a network file it is FILE.minitor: two networks never share guards or keys.
    """
    if network or MICROPYTHON:
        return (network + "." if network else "") + "minitor"
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return state + "/minitor"


def check_target(host, port):
    """Raise AddressError unless `host` may be a name or an address, and `port` is a port."""
    if not 0 < len(host) < 256 or not all(c in _BASE32 + "0189-_.:" for c in host.lower()):
        raise AddressError("%r is neither a host name (in ASCII) nor an address" % host)
    if not isinstance(port, int) or not 0 < port < 65536:
        raise AddressError("%r is no port: 1 to 65535" % (port,))


class AsyncTor(TorCore):
    """A Tor client and a host of onion services, for asyncio.

    `data_dir`: a folder for state (default_data_dir); `network`: a file that describes
    another Tor network, as a torrc does (default $MINITOR_NETWORK); `progress`:
    function(percent, tag, summary), told how bootstrapping goes.

        async with minitor.AsyncTor() as tor:
            reader, writer = await tor.open_connection("example.com", 80)
    """

    def __init__(self, data_dir=None, network=None, progress=None):
        if network is None and hasattr(os, "getenv"):
            network = os.getenv("MINITOR_NETWORK")
        self.services = []
        TorCore.__init__(self, data_dir or default_data_dir(network), network, progress)

    async def start(self):
        """Read or fetch the directory; DirectoryError, ChannelError, ClockError."""
        try:
            private_dir(self.data_dir)
            await self.bootstrap()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def aclose(self):
        """Take the services down, close all circuits and links."""
        while self.services:
            await self.services.pop().close()
        await TorCore.aclose(self)

    __aenter__ = start

    async def __aexit__(self, *_):
        await self.aclose()

    async def open_connection(self, host, port, timeout=CONNECT_SECONDS):
        """Connect to `host`: a name, which the exit resolves, an address, an onion address.

        Returns (reader, writer) as asyncio does.  Raises AddressError, CircuitError,
        OnionError, StreamError, TorTimeout.
        """
        check_target(host, port)
        if host.lower().endswith(".onion"):
            opening = connect_onion(self, parse_onion_address(host), port)
        else:
            opening = self._at_exit(port, lambda circuit: circuit.open_stream(host, port, 20))
        try:
            stream = await asyncio.wait_for(opening, timeout)
        except asyncio.TimeoutError:
            raise TorTimeout("connecting to %s took longer than %d s" % (host, timeout))
        return stream, stream

    async def resolve(self, host):
        """Return the IP addresses (text) of `host` as an exit sees them; StreamError."""
        check_target(host, 443)
        answers = await self._at_exit(443, lambda circuit: circuit.resolve(host))
        addresses = [value for kind, value in answers if kind in (4, 6)]
        if not addresses:
            raise StreamError("the exit finds no address of " + host, 2)
        return addresses

    async def _at_exit(self, port, ask):
        for left in (2, 1, 0):
            circuit = await self.circuit_to("exit", port)
            try:
                return await ask(circuit)
            except (CircuitError, StreamError) as e:
                if not left or not circuit.closed and e.reason not in _ASK_ANOTHER_EXIT:
                    raise
                self.retire(circuit)

    async def create_onion_service(self, port, target=None, key_dir=None):
        """Host an onion service; return it once it can be reached: `.address`, `.close()`.

        `port`: what visitors connect to; `target`: where that leads, a local port
        (default: the same), (host, port), "unix:/path" or a coroutine function(reader,
        writer).  For several ports, {port: target}.  `key_dir`: the folder of its key,
        as tor's HiddenServiceDir (default: onion_service in the data folder).
        """
        ports = port if isinstance(port, dict) else {port: target or port}
        for number in ports:
            check_target("-", number)
        key_dir = key_dir or self.data_dir + "/onion_service"
        if any(service.key_dir == key_dir for service in self.services):
            raise ConfigError("a service has the key in %s already: give a key_dir" % key_dir)
        service = OnionService(self, key_dir, ports)
        self.services.append(service)
        await service.start()
        return service

    if not MICROPYTHON:

        async def create_connection(self, address, timeout=None):
            """Connect to (host, port) and return a real socket.socket with that timeout."""
            stream, _ = await self.open_connection(*address, timeout or CONNECT_SECONDS)
            end, ours = socket.socketpair()
            spawn(pump(stream, *await asyncio.open_connection(sock=ours)))
            end.settimeout(timeout)
            return end

        async def urlopen(
            self, url, data=None, headers=None, timeout=CONNECT_SECONDS, context=None
        ):
            """Return the http.client.HTTPResponse to a GET, or to a POST of the bytes `data`.

            `headers`: dict; `timeout`: seconds for connecting, and for each silence;
            `context`: an ssl.SSLContext.  Redirects are followed.  TorError.
            The response's `read` blocks: under asyncio, call it in a thread.
            """
            loop = asyncio.get_running_loop()

            def connect(*target):
                opening = self.create_connection(*target)
                return asyncio.run_coroutine_threadsafe(opening, loop).result()

            args = connect, url, data, headers, timeout, context
            return await loop.run_in_executor(None, _http_open, *args)

        async def http_get(self, url):
            """Fetch a page as text, "http://" may lack; TorError for a status of 400 or above."""
            response = await self.urlopen(url)
            return await asyncio.get_running_loop().run_in_executor(None, _http_text, response)


if not MICROPYTHON:
    import functools
    import socket
    import threading

    def _http_open(connect, url, data, headers, timeout, context):
        import http.client  # slow, and most programs never ask
        from urllib.parse import quote, urljoin, urlsplit

        plain = {"User-Agent": "Mozilla/5.0", "Connection": "close"}
        headers, sock = dict(plain, **headers or {}), None
        url = url if "://" in url else "http://" + url
        try:
            for _ in range(10):
                parts = urlsplit(url)
                host, port = parts.hostname, {"http": 80, "https": 443}.get(parts.scheme)
                if not host or not port:
                    raise AddressError("%s is no URL of http or https" % url)
                link = http.client.HTTPConnection(host, parts.port or port)
                link.default_port = port
                sock = connect((host, link.port), timeout)
                if port == 443:
                    tls = context or ssl.create_default_context()
                    sock = tls.wrap_socket(sock, server_hostname=host)
                link.sock = sock
                path = (parts.path or "/") + "?" * bool(parts.query) + parts.query
                path = quote(path, "!$%&'()*+,/:;=?@[]")
                link.request("GET" if data is None else "POST", path, data, headers)
                response = link.getresponse()
                sock.close()  # the response keeps what it needs
                response.url, where = url, response.headers.get("Location")
                if response.status not in (301, 302, 303, 307, 308) or not where:
                    return response
                response.close()
                url = urljoin(url, where)
                if urlsplit(url)[:2] != parts[:2]:
                    headers = plain  # cookies and passwords were for the first server
                data = data if response.status > 303 else None
            raise ProtocolError("%s: redirected too often" % url)
        except (OSError, ValueError, http.client.HTTPException) as e:
            if sock:
                sock.close()
            kind = TorTimeout if isinstance(e, socket.timeout) else StreamError
            raise kind("%s: %s" % (url, e))

    def _http_text(response):
        with response:
            if response.status >= 400:
                text = (response.url, response.status, response.reason)
                raise TorError("%s: %d %s" % text)
            try:
                body = response.read(PAGE_LIMIT)
                if not response.length:
                    return body.decode(response.headers.get_content_charset("utf-8"), "replace")
            except Exception as e:
                raise StreamError("%s: %s" % (response.url, e))
            raise StreamError("%s: %d bytes are missing" % (response.url, response.length))

    def _waiting(method):
        @functools.wraps(method)
        def call(self, *args, **named):
            return self.run(getattr(self._tor, method.__name__), *args, **named)

        return call

    class Tor:
        """AsyncTor for programs without an event loop: its methods wait; any thread may call.

        It is ready when constructed, with AsyncTor's arguments.

            with minitor.Tor() as tor:
                print(tor.http_get("<56 characters>.onion"))
        """

        def __init__(self, data_dir=None, network=None, progress=None):
            self._tor, started = None, threading.Event()
            main = self._main(started)
            self._thread = threading.Thread(target=asyncio.run, args=(main,), daemon=True)
            self._thread.start()
            started.wait()
            try:
                # Made inside the loop: until Python 3.10 an Event belongs to a loop at once.
                self._tor = self.run(AsyncTor, data_dir, network, progress)
                self.run(self._tor.start)
            except BaseException:
                self.close()
                raise

        create_connection = _waiting(AsyncTor.create_connection)
        create_onion_service = _waiting(AsyncTor.create_onion_service)
        http_get = _waiting(AsyncTor.http_get)
        resolve = _waiting(AsyncTor.resolve)
        urlopen = _waiting(AsyncTor.urlopen)

        async def _main(self, started):
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await self._stop.wait()

        def run(self, function, *args, **named):
            """Call `function`, plain or a coroutine function, in Tor's event loop, and wait.

            So `tor.run(service.close)` ends an onion service.
            """
            if threading.current_thread() is self._thread:
                raise ConfigError("Tor's own event loop must not wait: use AsyncTor there")
            if not self._thread.is_alive():
                raise ConfigError("this Tor is closed")

            async def call():
                try:
                    result = function(*args, **named)
                    return await result if asyncio.iscoroutine(result) else result
                except asyncio.CancelledError:
                    raise TorError("Tor was closed meanwhile")

            future = asyncio.run_coroutine_threadsafe(call(), self._loop)
            try:
                return future.result()
            except KeyboardInterrupt:
                future.cancel()
                raise

        def close(self):
            """Take the services down, close everything, end the thread."""
            if self._thread.is_alive():
                try:
                    if self._tor:
                        self.run(self._tor.aclose)
                finally:
                    self._loop.call_soon_threadsafe(self._stop.set)
                    self._thread.join()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()


# ═══ 19. Command line ═══════════════════════════════════════════════════════
# python minitor.py --serve, --get, --address; and the web server behind --serve.

OWN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>minitor</title>
<body style="max-width:36em;margin:4em auto;padding:0 1em;font:1.1em/1.6 sans-serif">
<h1>It works.</h1>
<p>This page came to you through Tor, from an onion service that <b>minitor</b> hosts: Tor in
one Python file, with no tor program, web server or open port behind it.</p>
<p>To put something else here: <code>python minitor.py --serve FOLDER</code>, or
<code>--serve PORT</code> for what listens there already."""


def web_page(html, status="200 OK", **fields):
    import io

    fields["Content-Type"] = "text/html; charset=utf-8"
    return status, fields, io.BytesIO(html.encode())


def web_handler(answer):
    """Return a handler(reader, writer) that serves GET and HEAD over HTTP.

    `answer(path)` returns status (text), header fields (dict) and body (an open file).
    """

    async def handler(reader, writer):
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            method, target, _ = (head.decode("latin-1").partition("\r\n")[0] + "  ").split(" ", 2)
            if method in ("GET", "HEAD"):
                status, fields, body = answer(target)
            else:
                status, fields, body = web_page("", "405 Method Not Allowed", Allow="GET, HEAD")
            with body:
                size = body.seek(0, 2)
                body.seek(0)
                # Neither Date nor Server: they would tell about the clock and the machine.
                fields.update({"Content-Length": size, "Connection": "close"})
                lines = ["HTTP/1.1 " + status] + ["%s: %s" % field for field in fields.items()]
                piece = ("\r\n".join(lines) + "\r\n\r\n").encode()
                while piece:
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 120)
                    piece = b"" if method == "HEAD" else body.read(min(size, 1 << 16))
                    size -= len(piece)
        except (OSError, EOFError, TorError, asyncio.TimeoutError):
            pass
        writer.close()

    return handler


def web_folder(root):
    """Return the `answer` of web_handler that serves what lies in the folder `root`."""
    import html
    import mimetypes
    from urllib.parse import quote, unquote

    root = os.path.realpath(root)

    def listing(names, folder):
        title = html.escape("/" + "/".join(names))
        entries = sorted(e.name + "/" * e.is_dir() for e in os.scandir(folder))
        rows = "".join(
            '<li><a href="./%s">%s</a>' % (quote(name), html.escape(name))
            for name in entries if name[0] != "."
        )
        return web_page("<!doctype html><title>%s</title><h1>%s</h1><ul>%s" % (title, title, rows))

    def find(target):
        path = unquote(target.partition("?")[0])
        names = [name for name in path.split("/") if name]
        # Hidden files stay hidden, so there is no ".." either; a link must not lead outside.
        if any(name[0] == "." and name != ".well-known" for name in names):
            raise ValueError
        at = os.path.realpath(os.path.join(root, *names))
        if os.path.isdir(at) and path[-1:] != "/":
            where = quote("/".join([""] + names)) + "/"
            return web_page("", "301 Moved Permanently", Location=where)
        index = os.path.realpath(os.path.join(at, "index.html"))
        at = index if os.path.isfile(index) else at
        if os.path.commonpath((root, at)) != root:
            raise ValueError
        if os.path.isdir(at):
            return listing(names, at)
        kind, coding = mimetypes.guess_type(at)
        kind = kind if kind and not coding else "application/octet-stream"
        kind += "; charset=utf-8" * (kind[:5] == "text/")
        return "200 OK", {"Content-Type": kind}, open(at, "rb")

    def answer(target):
        try:
            return find(target)
        except (OSError, ValueError):
            return web_page("<!doctype html><title>404</title><h1>Not found", "404 Not Found")

    return answer


def serve_target(what):
    """Return the target (see create_onion_service) that --serve's argument names; ConfigError."""
    if not what:
        return web_handler(lambda path: web_page(OWN_PAGE))
    if what[:5] == "unix:":
        return what
    host, _, port = what.rpartition(":")
    if port.isdecimal():
        host = host.strip("[]")
        check_target(host or "-", int(port))
        return (host, int(port)) if host else int(port)
    if not os.path.isdir(what):
        raise ConfigError("--serve %s: no port, no host:port, no folder" % what)
    return web_handler(web_folder(what))


def parse_arguments(argv):
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, "minitor: %s (see --help)\n" % message)

    parser = Parser("minitor", description="Tor in one Python file.", allow_abbrev=False)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--serve", nargs="?", const="", metavar="WHAT",
        help="host an onion service: a page of its own, a PORT, HOST:PORT, unix:/PATH, a FOLDER")
    add("--get", "--host", metavar="URL", help="fetch a URL, or an onion address, and print it")
    add("--address", action="store_true", help="print the address that --serve has")
    add = parser.add_argument
    add("-o", metavar="FILE", help="with --get: write to FILE")
    add("--port", type=int, default=80, help="with --serve: the port visitors use (80)")
    add("--key-dir", metavar="DIR", help="the service's key, as tor's HiddenServiceDir")
    add("--data-dir", metavar="DIR", help="state (default: ~/.local/state/minitor)")
    add("--network", metavar="FILE", help="another Tor network (default: $MINITOR_NETWORK)")
    add("-v", action="count", default=0, help="say more; -vv: everything")
    add("--version", action="version", version="minitor " + __version__)
    return parser.parse_args(argv)


def fetch(tor, url, path):
    """Fetch `url` to the file `path`, or to standard output."""
    import shutil

    with tor.urlopen(url) as response:
        if response.status >= 400:
            raise TorError("%s: %d %s" % (response.url, response.status, response.reason))
        with open(path + ".part", "wb") if path else sys.stdout.buffer as out:
            shutil.copyfileobj(response, out)
        if response.length:
            raise StreamError("%s: the last %d bytes are missing" % (url, response.length))
    if path:
        os.replace(path + ".part", path)


def run_command(options):
    def progress(percent, tag, summary):
        print("Bootstrapped %d%% (%s): %s" % (percent, tag, summary), file=sys.stderr, flush=True)

    network = options.network or os.environ.get("MINITOR_NETWORK")
    data_dir = options.data_dir or default_data_dir(network)
    if options.address:
        private_dir(data_dir)
        print(onion_address(load_service_key(options.key_dir or data_dir + "/onion_service")[1]))
        return
    check_target("-", options.port)
    target = None if options.get else serve_target(options.serve)
    with Tor(data_dir, network, progress) as tor:
        if options.get:
            return fetch(tor, options.get, options.o)
        service = tor.create_onion_service(options.port, target, options.key_dir)
        print(service.address, flush=True)
        while True:
            time.sleep(3600)


def main(argv=None):
    """Run the command line `argv` (default: the program's) and return the exit status."""
    import signal

    options = parse_arguments(argv)
    set_log((WARN, INFO, DEBUG)[min(options.v, 2)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(options)
    except KeyboardInterrupt:
        return 130 if options.get else 0
    except Exception as e:
        if options.v > 1 or not isinstance(e, (TorError, OSError)):
            print_exception(e)
        print("minitor: %s" % e, file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
