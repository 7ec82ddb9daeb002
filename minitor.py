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

# === 1. Platform ============================================================
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
    import gc
    import tls

    # Collected early, what lives long stays together, and large pieces find room.
    gc.threshold((gc.mem_free() + gc.mem_alloc()) // 4)
    # MicroPython counts from 1970 on Unix and from 2000 on a chip.
    _EPOCH = 946684800 if time.gmtime(0)[0] == 2000 else 0
    ticks_ms, ticks_diff = time.ticks_ms, time.ticks_diff
    print_exception = sys.print_exception

    def consteq(a, b):
        """Compare two byte strings in constant time."""
        bits = len(a) ^ len(b)
        for x, y in zip(a, b):
            bits |= x ^ y
        return bits == 0

    def private_dir(path):
        """Make the folder `path`, and those above it."""
        at = ""
        for part in path.split("/"):
            at += part + "/"
            try:
                os.mkdir(at[:-1])
            except OSError:
                pass
else:
    import hmac
    import ssl

    _EPOCH = 0
    consteq = hmac.compare_digest

    def ticks_ms():
        """Return milliseconds of a clock that never goes back; compare with `ticks_diff`."""
        return int(time.monotonic() * 1000)

    def ticks_diff(later, earlier):
        return later - earlier

    def print_exception(error):
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)

    def private_dir(path):
        """Make the folder `path`, and those above it, and let only its owner in."""
        os.makedirs(path, 0o700, exist_ok=True)
        os.chmod(path, 0o700)


def hexlify(data):
    """Return `data` in hexadecimal, as text."""
    return binascii.hexlify(data).decode()


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
    """Replace the file `path` by `data` (bytes, or a list of bytes) in one step."""
    # Two processes may share a folder.
    partial = path + (".tmp" if MICROPYTHON else ".%d.tmp" % os.getpid())
    opener = None if MICROPYTHON else lambda name, flags: os.open(name, flags, mode)
    with open(partial, "wb") if MICROPYTHON else open(partial, "wb", opener=opener) as f:
        for piece in data if isinstance(data, list) else (data,):
            f.write(piece)
        f.flush()
        if not MICROPYTHON:
            os.fsync(f.fileno())
    (os.rename if MICROPYTHON else os.replace)(partial, path)


DEBUG, INFO, NOTICE, WARN, ERR = 0, 1, 2, 3, 4
SEVERITIES = ("debug", "info", "notice", "warn", "err")
_log = [NOTICE, None]


def set_log(severity, sink=None):
    """Pass messages of `severity` and above to `sink(severity, text)`; None: standard error."""
    _log[:] = [severity, sink]


def log(severity, text, *args):
    """Log `text % args`.  Callers never pass private keys or addresses of clients."""
    if severity >= _log[0]:
        text = text % args if args else text
        if _log[1]:
            return _log[1](severity, text)
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

    def set(self, value=None, error=None):
        if not self._event.is_set():
            self._value, self._error = value, error
            self._event.set()

    def fail(self, error):
        self.set(None, error)

    async def wait(self, seconds=None):
        """Return the value or raise the exception; asyncio.TimeoutError after `seconds`."""
        if not self._event.is_set():
            # `seconds` None is for ever.
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
            _tasks.discard(asyncio.current_task())

    task = asyncio.create_task(run())
    _tasks.add(task)
    return task


async def tls_connect(address, port, seconds):
    """Open a TLS connection to a relay; `address` is an IP address as text.

    Returns reader, writer, and a function that gives the SHA-256 of the relay's certificate
    once something was read: it is CERTS that proves the identity (tor-spec 4.2).  Raises
    OSError, asyncio.TimeoutError.
    """
    if MICROPYTHON:
        context, seen, limit = tls.SSLContext(tls.PROTOCOL_TLS_CLIENT), [b""], {}

        def note(der, depth):
            # `der` is a view on memory that is gone afterwards.
            if depth == 0:
                seen[0] = sha256(der)
            return 0

        context.verify_mode, context.verify_callback = tls.CERT_OPTIONAL, note
    else:
        context, limit = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), {"limit": 1 << 18}
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Shaped like a host name and random, as tor's are: a fixed one, or none, would stand out.
    name = "www." + "".join(chr(97 + b % 26) for b in urandom(8 + randbelow(12))) + ".com"
    opening = asyncio.open_connection(address, port, ssl=context, server_hostname=name, **limit)
    reader, writer = await asyncio.wait_for(opening, seconds)
    if not MICROPYTHON:
        seen = [sha256(writer.get_extra_info("ssl_object").getpeercert(True))]
    return reader, writer, lambda: seen[0]


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


# === 2. Errors ==============================================================
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


# === 3. Bytes ===============================================================
# Readers and writers of binary structures, base32 and base64.


def require(good, text):
    """Raise ProtocolError(text) unless `good`."""
    if not good:
        raise ProtocolError(text)


def decimal(text, least, most):
    """Return the number in `text` (bytes); ProtocolError unless in [least, most]."""
    digits = 0 < len(text) < 21 and not text.strip(b"0123456789")
    require(digits and least <= int(text) <= most, "bad number")
    return int(text)


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


def b64decode(text, size=None):
    """Decode base64 (text or bytes, padded or not, without blanks) of `size` bytes, if given.

    ProtocolError if it is not.  MicroPython's decoder takes garbage for something, so the
    alphabet is checked first.
    """
    if isinstance(text, str):
        text = text.encode()
    text = text.rstrip(b"=")
    if len(text) % 4 == 1 or text.strip(_BASE64):
        raise ProtocolError("bad base64")
    try:
        data = binascii.a2b_base64(text + b"==="[: -len(text) % 4])
    except ValueError:
        raise ProtocolError("bad base64")
    if size not in (None, len(data)):
        raise ProtocolError("base64 of %d bytes, not %d" % (len(data), size))
    return data


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


# === 4. Hashes and ciphers ==================================================
# SHA-1, SHA-2, SHA-3, HMAC, HKDF, AES in counter mode (tor-spec 0.3).  Sha1, Sha3_256:
# update(data), copy(), digest(); AesCtr(key[, iv]): crypt(data) goes on in the key stream.

if MICROPYTHON:
    from cryptolib import aes

    _MASK = (1 << 64) - 1

    class _Hash:
        def __init__(self, data=b"", state=None):
            self._state, self._length, self._rest = state or (self._start, 0, b"")
            self.update(data)

        def copy(self):
            return type(self)(b"", (self._state, self._length, self._rest))

        def update(self, data):
            self._length += len(data)
            data = memoryview(self._rest + bytes(data))
            while len(data) >= self._size:
                self._absorb(data[: self._size])
                data = data[self._size :]
            self._rest = bytes(data)

        def digest(self):
            end = self.copy()
            n = self._size // 8
            n += -(self._length + 1 + n) % self._size
            end.update(b"\x80" + (self._length * 8).to_bytes(n, "big"))
            return struct.pack(self._format, *end._state)

    class Sha1(_Hash):
        _size = 64
        _format = ">5I"
        _start = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)

        def _absorb(self, block):
            mask = 0xFFFFFFFF
            w = list(struct.unpack(">16I", block))
            while len(w) < 80:
                x = w[-3] ^ w[-8] ^ w[-14] ^ w[-16]
                w.append((x << 1 | x >> 31) & mask)
            state = self._state
            for i, x in enumerate(w):
                a, b, c, d, e = state
                x += (a << 5 | a >> 27) + e
                if i < 20:
                    x += (d ^ b & (c ^ d)) + 0x5A827999
                elif 40 <= i < 60:
                    x += (b & c | d & (b | c)) + 0x8F1BBCDC
                else:
                    x += (b ^ c ^ d) + (0x6ED9EBA1 if i < 60 else 0xCA62C1D6)
                state = x & mask, a, (b << 30 | b >> 2) & mask, c, d
            self._state = [(x + y) & mask for x, y in zip(self._state, state)]

    def _roots(last, power):
        # 64 bits after the point (FIPS 180-4 4.2.3).
        for p in range(2, last + 1):
            if all(p % q for q in range(2, p)):
                x = 0
                for i in range(66, -1, -1):
                    x |= ((x | 1 << i) ** power <= p << 64 * power) << i
                yield x & _MASK

    class Sha512(_Hash):
        _size = 128
        _format = ">8Q"
        _start = list(_roots(19, 2))
        _k = list(_roots(409, 3))

        def _absorb(self, block):
            mask = _MASK

            def turns(x, i, j, k):
                x |= x << 64
                return (x >> i ^ x >> j ^ x >> k) & mask

            w = list(struct.unpack(">16Q", block))
            while len(w) < 80:
                x = turns(w[-15], 1, 8, 71) + turns(w[-2], 19, 61, 70)
                w.append(w[-16] + w[-7] + x & mask)
            state = self._state
            for k, w in zip(self._k, w):
                a, b, c, d, e, f, g, h = state
                x = turns(e, 14, 18, 41) + (g ^ e & (f ^ g)) + h + k + w
                y = turns(a, 28, 34, 39) + (a & b | c & (a | b)) + x
                state = y & mask, a, b, c, (d + x) & mask, e, f, g
            self._state = [(x + y) & mask for x, y in zip(self._state, state)]

    class Sha3_256(_Hash):
        _size = 136
        _start = (0,) * 25
        _bits = b"\x01\x1a^p\x1f!yU\x0e\x0c5&?O]SRH\x16fyX!t"  # FIPS 202 3.2.5

        def _absorb(self, block):
            mask = _MASK
            block = struct.unpack("<17Q", block) + (0,) * 8
            a = [x ^ y for x, y in zip(self._state, block)]
            b = a[:]
            for bits in self._bits:
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
            self._state = a

        def digest(self, n=32, suffix=6):
            end = self.copy()
            size = 136 - self._length % 136
            end.update((suffix + (1 << 8 * size - 1)).to_bytes(size, "little"))
            out = struct.pack("<17Q", *end._state[:17])
            while len(out) < n:
                end._absorb(bytes(136))
                out += struct.pack("<17Q", *end._state[:17])
            return out[:n]

    class AesCtr:
        # No cipher object is kept: 313 bytes.

        def __init__(self, key, iv=bytes(16)):
            self._key = key
            self._at = int.from_bytes(iv, "big") << 4

        def crypt(self, data):
            out = []
            at = 0
            while at < len(data):
                # To a multiple of 1 KB: only the counter's last byte changes.
                piece = data[at : at + 1024 - (self._at & 1023)]
                n = len(piece)
                skip = self._at & 15
                counter = (self._at >> 4 & (1 << 128) - 1).to_bytes(16, "big")
                blocks = bytearray(counter * (skip + n + 15 >> 4))
                for i in range(15, len(blocks), 16):
                    blocks[i] += i >> 4
                aes(self._key, 1).encrypt(blocks, blocks)
                x = int.from_bytes(blocks[skip : skip + n], "big") ^ int.from_bytes(piece, "big")
                out.append(x.to_bytes(n, "big"))
                at += n
                self._at += n
            return b"".join(out)

else:
    Sha1, Sha3_256, Sha512 = hashlib.sha1, hashlib.sha3_256, hashlib.sha512

    # The portable AES works on planes, integers with one bit for each block: moving bytes and
    # doubling costs nothing.  A byte is eight planes, the highest bit first.
    _BLOCKS = 2048
    _ONES = (1 << _BLOCKS) - 1
    _LOW_BITS = ((1 << 128 * _BLOCKS) - 1) // 255
    _COUNT = [_ONES // ((1 << (1 << j)) + 1) << (1 << j) for j in range(10, -1, -1)]

    def _planes(data):
        return [_ONES * (x >> j & 1) for x in data for j in range(7, -1, -1)]

    def _sum(a, b):
        return [x ^ y for x, y in zip(a, b)]

    def _times(p, q):
        # GF(2^4) on the basis z, z^2, z^3, z^4, where z^5 = 1.
        a, b, c, d = p
        e, f, g, h = q
        x = a & h ^ b & g ^ c & f ^ d & e
        y = a & f ^ b & e ^ d & h ^ x
        z = a & g ^ b & f ^ c & e ^ x
        return b & h ^ c & g ^ d & f ^ x, a & e ^ c & h ^ d & g ^ x, y, z

    def _sub_byte(a, b, c, d, e, f, g, h):
        # The S-box less its 0x63, by way of GF(2^4)[y] / (y^2 + y + z): the inverse of
        # p·y + q is (p·y + p + q)·s^7 where s = (z·p^2 + q·(p + q))^2.
        x, y = f ^ h, a ^ c ^ g
        q = x ^ e, x, c ^ h, y ^ b ^ h
        p = a, b, c, d = b ^ c ^ d, y, a ^ b ^ d ^ e ^ f, y ^ e ^ f
        r = _sum(p, q)
        a, b, c, d = _sum(_times(q, r), (b, b ^ c, a ^ b, b ^ d))
        s = t = c, a, d, b
        for x in 0, 1:
            t = _times((t[2], t[0], t[3], t[1]), s)
        a, b, c, d = _times(r, t)
        e, f, g, h = _times(p, t)
        x = c ^ f ^ g ^ h
        y = a ^ d ^ x
        return [b ^ c ^ g, e ^ f ^ h, y ^ c, y, c ^ h, b ^ c ^ d, d, x]

    def _round_keys(key):
        # FIPS 197 5.2, as planes; the S-box's 0x63 is in all but the first.
        s = _sub_byte(*_COUNT[3:])
        box = [sum((s[j] >> x & 1) << 7 - j for j in range(8)) ^ 0x63 for x in range(256)]
        size = len(key)
        w = list(key)
        for i in range(size, 4 * size + 112, 4):
            t = w[-4:]
            if i % size in (0, 16):
                t = [box[x] for x in t]
            if i % size == 0:
                t = [t[1] ^ b"\1\2\4\x08\x10 @\x80\x1b6"[i // size - 1], t[2], t[3], t[0]]
            w += _sum(t, w[-size:])
        return _planes([x ^ 0x63 * (i > 15) for i, x in enumerate(w)])

    class AesCtrPortable:
        def __init__(self, key, iv=bytes(16)):
            self._keys = _round_keys(key)
            self._stream = bytearray()
            n = int.from_bytes(iv, "big")
            self._counter = n & -_BLOCKS
            self.crypt(bytes(n % _BLOCKS * 16))

        def _extend(self):
            keys = self._keys
            s = _sum(_planes(self._counter.to_bytes(16, "big")), keys)
            s[117:] = _sum(s[117:], _COUNT)
            self._counter = (self._counter + _BLOCKS) % (1 << 128)
            for at in range(128, len(keys), 128):
                k = keys[at : at + 128]
                t = []
                s *= 5
                for i in range(0, 640, 40):
                    t += _sub_byte(*s[i : i + 8])
                # MixColumns
                n = [t[i & 96 | i + 8 & 31] for i in range(128)]
                u = _sum(t, n)
                s = [u[i & 120 | i + 1 & 7] ^ n[i] ^ u[i ^ 16] ^ k[i] for i in range(128)]
                for i in range(0, 128, 8):
                    for j in 3, 4, 6:
                        s[i + j] ^= u[i]
            t = _sum(t, k)
            x = 0
            for j in range(8):
                # Digits, as characters, have their bit lowest.
                digits = bytearray(16 * _BLOCKS)
                for i in range(16):
                    digits[15 - i :: 16] = bin(t[8 * i + j] | _ONES + 1)[3:].encode()
                x = x << 1 | int.from_bytes(digits, "big") & _LOW_BITS
            self._stream += x.to_bytes(16 * _BLOCKS, "little")

        def crypt(self, data):
            n = len(data)
            while len(self._stream) < n:
                self._extend()
            x = int.from_bytes(data, "big") ^ int.from_bytes(self._stream[:n], "big")
            del self._stream[:n]
            return x.to_bytes(n, "big")

    class AesCtrOpenssl:
        def __init__(self, key, iv=bytes(16)):
            self._context = c = _evp.EVP_CIPHER_CTX_new()
            self._free = _evp.EVP_CIPHER_CTX_free
            _evp.EVP_EncryptInit_ex(c, _ciphers[len(key)](), None, bytes(key), bytes(iv))

        def __del__(self):
            self._free(self._context)

        def crypt(self, data):
            n = len(data)
            # Filled in place; shorter ones are shared by all of Python.
            out = bytes(n if n > 1 else 2)
            _encrypt(self._context, out, _size, bytes(data), n)
            return out[:n]

    AesCtr = AesCtrPortable
    try:
        import _ssl
        import ctypes

        # The interpreter's own; calls are too short to let go of its lock.
        _evp = ctypes.PyDLL(_ssl.__file__)
        _encrypt, _size = _evp.EVP_EncryptUpdate, ctypes.byref(ctypes.c_int())
        _ciphers = {16: _evp.EVP_aes_128_ctr, 32: _evp.EVP_aes_256_ctr}
        for _f in _evp.EVP_CIPHER_CTX_new, _ciphers[16], _ciphers[32]:
            _f.restype = ctypes.POINTER(ctypes.c_char)
        if AesCtrOpenssl(bytes(16)).crypt(bytes(4)) == b"f\xe9K\xd4":
            if not os.environ.get("MINITOR_PORTABLE_AES"):
                AesCtr = AesCtrOpenssl
    except Exception:
        pass  # Not here.


def sha1(data):
    return hashlib.sha1(data).digest()


def sha3_256(data):
    return Sha3_256(data).digest()


def shake256(data, n):
    """Return `n` bytes of SHAKE-256 of `data`."""
    if MICROPYTHON:
        return Sha3_256(data).digest(n, 31)
    return hashlib.shake_256(data).digest(n)


def sha512(data):
    return Sha512(data).digest()


def hmac_sha256(key, data):
    key = (sha256(key) if len(key) > 64 else key) + bytes(64)
    inner, outer = [bytes(b ^ x for b in key[:64]) for x in (0x36, 0x5C)]
    return sha256(outer + sha256(inner + data))


def hkdf_sha256(secret, salt, info, n):
    """Return `n` bytes as RFC 5869 derives them."""
    key = hmac_sha256(salt, secret)
    out = block = b""
    for i in range(1, (n + 63) // 32):
        block = hmac_sha256(key, block + info + bytes((i,)))
        out += block
    return out[:n]


# === 5. Curves and signatures ===============================================
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
    block = b"\0\1" + b"\xff" * (size - 3 - len(digest)) + b"\0" + digest
    return pow(s, e, n) == int.from_bytes(block, "big")


# === 6. Certificates and documents ==========================================
# cert-spec, and dir-spec's authority certificates, consensus and microdescriptors.


def check_ed_cert(data, what, kind, public, when):
    """Return the key type, key and signing key (or None) of a certificate (cert-spec 2.1).

    ProtocolError, naming `what`, unless it is of type `kind`, good at the time `when`, and
    signed by `public` (None: by the signing key in it).
    """
    r, signing_key = Reader(data, what), None
    good, expires = r.take(2) == bytes((1, kind)), r.uint(4) * 3600
    key_type, key = r.uint(1), r.take(32)
    for _ in range(r.uint(1)):
        size, extension, flags = r.uint(2), r.uint(1), r.uint(1)
        body = r.take(size)
        if extension == 4:
            signing_key, flags = body, size != 32
        good = good and not flags & 1
    signed, signature = data[: r.at], r.take(64)
    require(good and not r.left(), "%s is malformed, or not of type %d" % (what, kind))
    require(expires >= when, what + " has expired, or the clock is ahead")
    public = public or signing_key
    require(public and signing_key in (None, public), what + " is signed by another key")
    require(ed25519_verify(public, signed, signature), what + " has a bad signature")
    return key_type, key, signing_key


def parse_crosscert(data, rsa_key, when):
    """Return the Ed25519 identity that `rsa_key` certifies in `data` (cert-spec 2.3)."""
    r = Reader(data, "RSA cross-certificate")
    key, expires, signature = r.take(32), r.uint(4) * 3600, r.take(r.uint(1))
    digest = sha256(b"Tor TLS RSA/Ed25519 cross-certificate" + data[:36])
    good = expires >= when and not r.left() and rsa_verify(rsa_key, digest, signature)
    require(good, "RSA cross-certificate is expired or wrong")
    return key


def document_items(lines):
    """Return [[keyword, arguments, object]] of a document's lines (dir-spec 1.2), as bytes."""
    items, armour = [], None
    for line in lines:
        if line.startswith(b"-----BEGIN ") and items:
            armour = []
        elif line.startswith(b"-----END ") and armour is not None:
            items[-1][2], armour = b64decode(b"".join(armour)), None
        elif armour is not None:
            armour.append(line)
        elif line:
            keyword, _, arguments = line.partition(b" ")
            items.append([keyword, arguments, b""])
    return items


def one_item(items, keyword, default=None):
    """Return arguments and object of the only `keyword`, or `default` if given; ProtocolError."""
    found = [item[1:] for item in items if item[0] == keyword]
    if not found and default is not None:
        return default, b""
    require(len(found) == 1, "a document has %d times %s" % (len(found), keyword.decode()))
    return found[0]


def parse_time(text):
    """Return b"2024-05-17 17:00:00" as seconds since 1970; ProtocolError."""
    try:
        month, day, hour, minute, second = [int(text[i : i + 2]) for i in (5, 8, 11, 14, 17)]
        year = int(text[:4])
    except ValueError:
        year = 0
    good = 1970 <= year and 0 < month < 13 and 0 < day < 32 and 0 <= hour < 24
    require(good, "bad time in a document")
    # In a year that begins with March the leap day comes last.
    year -= month < 3
    day += year * 365 + year // 4 - year // 100 + year // 400 + ((month + 9) % 12 * 153 + 2) // 5
    return (day - 719469) * 86400 + hour * 3600 + minute * 60 + second


def parse_authority_certs(text, identities):
    """Return {(identity, signing key digest): (key, expires)} of key certificates (dir-spec 3.1).

    Those of others than `identities` are passed over; ProtocolError if one is wrong.
    """
    found, mark, end = {}, b"dir-key-certificate-version 3\n", b"\ndir-key-certification\n"
    for one in text.split(mark)[1:]:
        items = document_items(one.split(b"\n"))
        names = b"identity-key", b"signing-key", b"key-crosscert", b"key-certification"
        objects = [one_item(items, b"dir-" + name)[1] for name in names]
        fingerprint, digest = sha1(objects[0]), sha1(mark + one.partition(end)[0] + end)
        if fingerprint in identities:
            identity, key = [rsa_public_key(der) for der in objects[:2]]
            good = rsa_verify(identity, digest, objects[3])
            good = good and rsa_verify(key, fingerprint, objects[2])
            require(good, "an authority certificate has a bad signature")
            expires = parse_time(one_item(items, b"dir-key-expires")[0])
            found[fingerprint, sha1(objects[1])] = key, expires
    return found


# What the table keeps of a relay's flags and protocol versions, as bits of an integer.
FLAG_WORDS = (
    "Authority BadExit Exit Fast Guard HSDir MiddleOnly NoEdConsensus Running Stable "
    "StaleDesc V2Dir Valid FlowCtrl=1 HSDir=2 HSIntro=4 HSRend=2 Relay=2"
).split()
AUTHORITY, BADEXIT, EXIT, FAST, GUARD, HSDIR, MIDDLEONLY = 1, 2, 4, 8, 16, 32, 64
NOEDCONSENSUS, RUNNING, STABLE, STALEDESC, V2DIR, VALID = 128, 256, 512, 1024, 2048, 4096
PROTO_FLOWCTRL1, PROTO_HSDIR2, PROTO_HSINTRO4 = 1 << 13, 1 << 14, 1 << 15
PROTO_HSREND2, PROTO_RELAY2 = 1 << 16, 1 << 17
# Set by the table: the microdescriptor is there; it can be used.
HAVE_MICRODESC, USABLE = 1 << 18, 1 << 19

# What the network may require; a consensus that is newer than this release can ask for more.
_SUPPORTED = (
    "Cons=1-2 Desc=1-2 DirCache=2 FlowCtrl=1 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=4-5 "
    "Microdesc=1-3 Relay=1-3"
)
_RELEASED = 1795132800
# A consensus is usable that long before and after its validity, as in tor.
_GRACE = 86400
# In 2024 what stands before the relays, and behind, had 4 KB each.  Of each member of a family
# 4 bytes are kept; in 2022 the largest had 201.
_MAX_ENTRY, _MAX_FAMILY = 32768, 4096


def number_ranges(text):
    """Yield (low, high) of each range in "80,443-445"; ValueError."""
    for one in text.split(","):
        low, _, high = one.partition("-")
        yield int(low), int(high or low)


def _versions(text):
    # "Link=1-2,5 Fast" as "Link=1", "Link=2", "Link=5", "Fast" (tor-spec 9).
    for word in text.split():
        name, equals, ranges = word.partition("=")
        if not equals:
            yield name
        for low, high in number_ranges(ranges) if ranges else ():
            require(0 <= low <= high < 64, "bad protocol version")
            for version in range(low, high + 1):
                yield "%s=%d" % (name, version)


def _integers(text):
    # "circwindow=1000 ..." as {name: integer}
    pairs = [word.partition("=") for word in text.split()]
    return {name: int(value) for name, _, value in pairs}


class Consensus:
    """A consensus without its relays (dir-spec 3.4.1): `valid_after`, `fresh_until`,
    `valid_until` (Unix time); `params`, `bandwidth_weights` ({name: integer}); `srv_previous`,
    `srv_current` (32 bytes or None); `required_client_protocols` (["Link=4", ...]); `head`;
    unless loaded, `digest` and `signatures` ({(identity, signing key digest): signature}).
    """

    def load(self, head):
        """Take over `head`, the lines of all that as bytes, and return self; ProtocolError."""
        items, self.head = document_items(head.split(b"\n")), head

        def text(name, default=None):
            return one_item(items, name, default)[0].decode()

        try:
            kind = text(b"network-status-version"), text(b"vote-status")
            good = kind == ("3 microdesc", "consensus") and int(text(b"consensus-method")) >= 28
            self.valid_after = parse_time(text(b"valid-after"))
            self.fresh_until = parse_time(text(b"fresh-until"))
            self.valid_until = parse_time(text(b"valid-until"))
            good = good and self.valid_after < self.fresh_until <= self.valid_until
            require(good, "this is no consensus of the microdescriptor flavour")
            self.params = _integers(text(b"params", b""))
            self.bandwidth_weights = _integers(text(b"bandwidth-weights", b""))
            required = text(b"required-client-protocols", b"")
            self.required_client_protocols = list(_versions(required))
            srvs = [text(b"shared-rand-%s-value" % one, b"") for one in (b"previous", b"current")]
            srvs = [b64decode(srv.split(" ")[-1], 32) if srv else None for srv in srvs]
            self.srv_previous, self.srv_current = srvs
        except ValueError:
            raise ProtocolError("the consensus is malformed")
        return self

    def param(self, name, default, low=0, high=2147483647):
        """Return the parameter `name` (param-spec), kept within `low` and `high`."""
        return min(max(self.params.get(name, default), low), high)

    def missing_certs(self, certs, when):
        """List the (identity, signing key digest) of signatures that `certs` cannot check."""
        return [pair for pair in self.signatures if certs.get(pair, (0, -1))[1] < when]

    def verify(self, certs, authorities, when):
        """Raise DirectoryError unless more than half of `authorities` (identities) signed this.

        `certs`, from `parse_authority_certs`, must be good at the time `when`.
        """
        good, missing = set(), self.missing_certs(certs, when)
        for pair, signature in self.signatures.items():
            if pair not in missing and rsa_verify(certs[pair][0], self.digest, signature):
                good.add(pair[0])
        counts = len(good & set(authorities)), len(authorities)
        if counts[0] * 2 <= counts[1]:
            text = "%d of %d authorities signed the consensus: it takes more than half"
            raise DirectoryError(text % counts)

    def check_times(self, when):
        """Raise DirectoryError, ClockError or ConfigError unless this can be used at `when`."""
        hours = (when - self.valid_after) // 3600
        if when > self.valid_until + _GRACE:
            raise DirectoryError("the consensus is %d hours old (or the clock is ahead)" % hours)
        if when < self.valid_after - _GRACE:
            raise ClockError("the clock of this machine is %d hours behind: set it" % -hours)
        lacking = sorted(set(self.required_client_protocols) - set(_versions(_SUPPORTED)))
        if lacking and self.valid_after >= _RELEASED:
            raise ConfigError("get a newer minitor: the network requires " + " ".join(lacking))


class _Splitter:
    # Cuts what arrives at each `_mark`, for the method `_entry`.
    _rest = b""

    def feed(self, data):
        """Parse the next piece, of any size; ProtocolError if it is malformed."""
        entries = (self._rest + data).split(self._mark)
        self._rest = entries.pop()
        try:
            for entry in entries:
                self._entry(entry)
        except (ValueError, IndexError):
            raise ProtocolError("a document is malformed")
        require(len(self._rest) <= _MAX_ENTRY, "a part of a document is too long")


class ConsensusParser(_Splitter):
    """Parses a consensus as it arrives; its relays go to `table.add`.

    Signatures of others than `authorities` (identities) are dropped.
    """

    _mark, _head = b"\nr ", None

    def __init__(self, authorities, table):
        self._authorities, self._add, self._bits = authorities, table.add, {}

    def _entry(self, text):
        require(b"\ndirectory-signature " not in text, "the consensus is malformed")
        if self._head is None:
            self._head, self._hash = text, hashlib.sha256(text)
        else:
            self._hash.update(self._mark + text)
            lines = text.split(b"\n")
            self._relay(lines[0].split(b" "), {line[:2]: line[2:] for line in lines[1:]}.get)

    def _relay(self, fields, get):
        digest, words = get(b"m "), get(b"s ", b"") + get(b"pr", b"")
        # Few are distinct.
        if words not in self._bits:
            if len(self._bits) > 255:
                self._bits = {}
            found = set(_versions(words.decode()))
            self._bits[words] = sum([1 << i for i, word in enumerate(FLAG_WORDS) if word in found])
        if digest:
            address = bytes([int(x) for x in fields[4].split(b".")])
            high, low = (get(b"a ", b"").partition(b"[")[2] + b"::").split(b":")[:2]
            net = int(b"0" + high, 16) << 16 | int(b"0" + low, 16)
            weight = int(get(b"w ", b"").partition(b"Bandwidth=")[2].split(b" ")[0] or 0)
            flags, weight = RUNNING | VALID | self._bits[words], min(weight, 0xFFFFFFFF)
            keys = b64decode(fields[1], 20), b64decode(digest, 32)
            self._add(*keys, address, int(fields[5]), net, flags, weight)

    def finish(self):
        """Return the Consensus: parsed, not verified; ProtocolError."""
        signed, mark, signatures = self._rest.partition(b"\ndirectory-signature ")
        self._rest, footer, weights = signed.partition(b"\ndirectory-footer\n")
        good = footer and self._head and signatures[-1:] == b"\n"
        require(good, "the consensus is truncated, or has no relays")
        self.feed(self._mark)
        self._hash.update(footer + weights + mark)
        c = Consensus().load(self._head.partition(b"\ndir-source ")[0] + b"\n" + weights)
        c.digest, c.signatures = self._hash.digest(), {}
        for _, arguments, body in document_items((mark + signatures).split(b"\n")):
            try:
                # Without a name the algorithm is SHA-1, which this flavour does not use.
                algorithm, identity, key = arguments.split(b" ")
                pair = binascii.unhexlify(identity), binascii.unhexlify(key)
            except ValueError:
                continue
            if algorithm == b"sha256" and pair[0] in self._authorities:
                c.signatures[pair] = body
        return c


class Microdesc:
    """`digest` (SHA-256), `ntor_key`, `ed_id`, `family` (4 bytes of each RSA identity),
    `family_ids` (8 of each SHA-256), `policy` (b"accept 80,443-445"), `bad` (malformed).
    """

    ntor_key = ed_id = None
    family = family_ids = policy = b""
    bad = False


class MicrodescParser(_Splitter):
    """Parses microdescriptors (dir-spec 3.3) as they arrive; each goes to `sink(microdesc)`."""

    _mark, _md = b"\n", None

    def __init__(self, sink):
        self._sink = sink

    def feed(self, data):
        """Parse the next piece, of any size; ProtocolError if it is malformed."""
        super().feed(data)
        # A family line can have 128 KB.
        cut = self._rest.rfind(b" $")
        if cut > 2048:
            self._entry(self._rest[:cut], b"")
            self._rest = self._rest[cut:]

    def finish(self):
        """Take the end of the last one; ProtocolError if it is truncated."""
        require(not self._rest, "a microdescriptor is truncated")
        self._entry(b"onion-key")

    def _entry(self, line, end=b"\n"):
        md = self._md
        if line == b"onion-key":
            if md:
                md.digest = self._hash.digest()
                md.bad = md.bad or not md.ntor_key or not md.ed_id
                self._sink(md)
            self._md, self._hash = Microdesc(), hashlib.sha256(b"onion-key\n")
        elif md:
            self._hash.update(line + end)
            try:
                self._item(md, line.split(b" "))
            except (ProtocolError, ValueError, IndexError):
                md.bad = True

    def _item(self, md, word):
        if word[0] == b"ntor-onion-key":
            md.ntor_key = b64decode(word[1], 32)
        elif word[:2] == [b"id", b"ed25519"]:
            md.bad |= md.ed_id is not None
            md.ed_id = b64decode(word[2], 32)
        elif word[0] == b"p":
            md.policy = b" ".join(word[1:])
        elif word[0] == b"family-ids":
            md.family_ids = b"".join([sha256(one)[:8] for one in word[1:17] if one])
        elif word[0] in (b"family", b""):
            # Nicknames are passed over: no one vouches for them.
            members = [binascii.unhexlify(one[1:9]) for one in word if one[:1] == b"$"]
            md.family = (md.family + b"".join(members))[:_MAX_FAMILY]


# === 7. Relay table =========================================================
# Fixed records, sorted by RSA identity as in the consensus, and columns of integers.

# RSA identity; half of the microdescriptor's digest; Ed25519 identity, and until that
# is known the other half; ntor key; IPv4 address; port.
_RECORD, _SIZE = ">20s16s32s32s4sH", 106
# Flags, weight, IPv4 /16, IPv6 /32; the numbers of exit policy, family and family ids.
_COLUMNS = "IIHIHHH"
_MAX_RELAYS = 65535
# Distinct exit policies and families, in bytes, and less than 65536: what is beyond is none.
_MAX_BESIDE = 4 << 20
# Part of a file's checksum: releases that number the flags otherwise do not believe it.
_LAYOUT = repr((1, _RECORD, _COLUMNS, FLAG_WORDS, USABLE, sys.byteorder)).encode()


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


def _pieces(packed, size):
    return [packed[at : at + size] for at in range(0, len(packed), size)]


class RelayTable:
    """The relays of a consensus, by index; `flags` and `weights` are arrays of integers."""

    def __init__(self, records=b"", columns=None, beside=(b"",)):
        self.use_family_lists = self.use_family_ids = True
        self.records = bytearray(records)
        self._columns = columns or [array(c) for c in _COLUMNS]
        self.flags, self.weights, self._nets, self._nets6 = self._columns[:4]
        # Distinct exit policies, families and family ids, and their numbers.
        self._beside, self._numbers = list(beside), {text: n for n, text in enumerate(beside)}
        self._room = _MAX_BESIDE - sum([len(text) + 64 for text in beside])

    def add(self, rsa_id, md_digest, address, port, ipv6_net, flags, weight):
        """Append a relay; `address`: 4 bytes; `ipv6_net`: the IPv6 /32, or 0; ProtocolError."""
        n = len(self)
        good = 0 < port < 65536 and len(address) == 4 and not (weight | ipv6_net) >> 32
        require(good, "a relay of the consensus is malformed")
        good = n < _MAX_RELAYS and (not n or self.rsa_id(n - 1) < rsa_id)
        require(good, "the consensus has too many relays, or not in order")
        fields = rsa_id, md_digest, md_digest[16:], b"", address, port
        self.records += struct.pack(_RECORD, *fields)
        values = flags, weight, address[0] << 8 | address[1], ipv6_net, 0, 0, 0
        for column, value in zip(self._columns, values):
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
        """Return the index of the relay `rsa_id`, or -1."""
        low, high = 0, len(self.flags)
        while low < high:
            at = (low + high) // 2
            low, high = (at + 1, high) if self.rsa_id(at) < rsa_id else (low, at)
        return low if self.rsa_id(low) == rsa_id else -1

    def scan(self):
        """Iterate over (index, flags, weight, IPv4 /16)."""
        return zip(range(len(self.flags)), self.flags, self.weights, self._nets)

    def subnets(self, i):
        """Return a relay's IPv4 /16 and IPv6 /32 (0: none) as integers."""
        return self._nets[i], self._nets6[i]

    def missing(self):
        """Yield (index, digest) of the microdescriptors that are not here yet."""
        for i in range(len(self.flags)):
            if not self.flags[i] & HAVE_MICRODESC:
                yield i, self._field(i, 20, 32)

    def set_microdesc(self, i, md):
        """Take over the Microdesc `md` of relay `i`; with a malformed one it is not used."""
        self.flags[i] |= HAVE_MICRODESC
        if not md.bad:
            self._set(i, md.ed_id + md.ntor_key, (md.policy, md.family, md.family_ids))

    def _set(self, i, keys, beside):
        self.records[i * _SIZE + 36 : i * _SIZE + 100] = keys
        self.flags[i] |= USABLE
        for column, text in zip(self._columns[4:], beside):
            # Exit policies repeat, and the members of a family list the same family.
            if text not in self._numbers and len(text) + 64 <= self._room:
                self._room -= len(text) + 64
                self._numbers[text] = len(self._beside)
                self._beside.append(text)
            column[i] = self._numbers.get(text, 0)

    def _texts(self, i):
        return [self._beside[column[i]] for column in self._columns[4:]]

    def carry_over(self, old):
        """Take over from the table `old` what microdescriptors that are the same told."""
        for i in range(len(self.flags)):
            j = old.find(self.rsa_id(i))
            if j >= 0 and old._field(j, 20, 16) == self._field(i, 20, 16):
                self.flags[i] |= old.flags[j] & HAVE_MICRODESC
                if old.flags[j] & USABLE:
                    self._set(i, old._field(j, 36, 64), old._texts(j))

    def same_family(self, i, j):
        """Tell whether the relays `i` and `j` list each other, or share a family id."""
        (_, list_i, ids_i), (_, list_j, ids_j) = self._texts(i), self._texts(j)
        if self.use_family_ids and set(_pieces(ids_i, 8)) & set(_pieces(ids_j, 8)):
            return True
        listed = self.rsa_id(j)[:4] in _pieces(list_i, 4)
        return self.use_family_lists and listed and self.rsa_id(i)[:4] in _pieces(list_j, 4)

    def exit_allows(self, i, port):
        """Tell whether the exit policy summary of the relay `i` allows `port`."""
        word, _, ports = self._texts(i)[0].partition(b" ")
        try:
            inside = [low for low, high in number_ranges(ports.decode()) if low <= port <= high]
        except ValueError:
            return False
        return word == (b"accept" if inside else b"reject")

    def exits(self, i):
        """Tell whether the relay `i` allows any port."""
        return self._texts(i)[0] not in (b"", b"reject 1-65535")

    def save(self, path, network_id, consensus):
        """Write table and Consensus to the file `path`, for the Network of that id; OSError."""
        pieces = [consensus.head, self.records] + self._columns + self._beside
        pieces = [bytes(piece) for piece in pieces]
        body = b"".join([struct.pack(">I", len(piece)) + piece for piece in pieces])
        write_file(path, [sha256(_LAYOUT + network_id + body), body])


def load_table(path, network_id):
    """Return the (RelayTable, Consensus) that `save` wrote; None if it did not write that."""
    data = read_file(path) or b""
    r, pieces = Reader(data[32:]), []
    if sha256(_LAYOUT + network_id + r.data) != data[:32]:
        return None
    while r.left():
        pieces.append(r.take(r.uint(4)))
    columns = [array(code, piece) for code, piece in zip(_COLUMNS, pieces[2:9])]
    return RelayTable(pieces[1], columns, pieces[9:]), Consensus().load(pieces[0])


# === 8. Cells and handshakes ================================================
# Bodies of cells and relay messages, and the handshakes (tor-spec 3 to 6, rend-spec-v3 3, 4).

PADDING, RELAY, DESTROY, CREATE_FAST, CREATED_FAST = 0, 3, 4, 5, 6
VERSIONS, NETINFO, RELAY_EARLY, CREATE2, CREATED2, PADDING_NEGOTIATE = range(7, 13)
VPADDING, CERTS, AUTH_CHALLENGE = 128, 129, 130

RELAY_BEGIN, RELAY_DATA, RELAY_END, RELAY_CONNECTED, RELAY_SENDME = range(1, 6)
RELAY_TRUNCATED, RELAY_DROP, RELAY_RESOLVE, RELAY_RESOLVED, RELAY_BEGIN_DIR = range(9, 14)
RELAY_EXTEND2, RELAY_EXTENDED2, RELAY_XOFF, RELAY_XON, RELAY_DATA_MAX = 14, 15, 43, 44, 498
RELAY_ESTABLISH_INTRO, RELAY_ESTABLISH_RENDEZVOUS, RELAY_INTRODUCE1 = range(32, 35)
RELAY_INTRODUCE2, RELAY_RENDEZVOUS1, RELAY_RENDEZVOUS2 = range(35, 38)
RELAY_INTRO_ESTABLISHED, RELAY_RENDEZVOUS_ESTABLISHED, RELAY_INTRODUCE_ACK = range(38, 41)

# By number: tor-spec 6.3 and 5.4.
END_REASONS = (
    "no reason|no reason given|host not found|connection refused|against the exit's policy|"
    "circuit destroyed|closed|timeout|no route|relay hibernates|internal error|"
    "out of resources|connection reset|protocol error|relay is no directory"
).split("|")
DESTROY_REASONS = (
    "no reason given|protocol error|internal error|as requested|relay hibernates|"
    "out of resources|next relay not reachable|next relay is another|link closed|too old|"
    "timeout|destroyed further on|no such service"
).split("|")
END_CONNECTREFUSED, END_DONE, END_TIMEOUT, END_RESOURCELIMIT = 3, 6, 7, 11


def reason_text(reasons, number):
    """Return the words for `number` in one of the tables above."""
    return reasons[number] if number < len(reasons) else "unknown reason %d" % number


def cell(circ_id, command, body=b""):
    """Return a cell of fixed length, 514 bytes (tor-spec 3)."""
    return struct.pack(">IB", circ_id, command) + body + bytes(509 - len(body))


def _tagged(r, size):
    # A count, then [(type, value)], with lengths of `size` bytes.
    return [(r.uint(1), r.take(r.uint(size))) for _ in range(r.uint(1))]


def address_bytes(text):
    """Return the 4 bytes of an IPv4 address, or b""."""
    try:
        parts = [decimal(part, 0, 255) for part in text.encode().split(b".")]
    except ProtocolError:
        return b""
    return bytes(parts) if len(parts) == 4 else b""


def address_text(data):
    """Return an address of 4 or 16 bytes as text."""
    if len(data) == 4:
        return "%d.%d.%d.%d" % tuple(data)
    return ":".join(["%x" % n for n in struct.unpack(">8H", data)])


def is_private(address):
    """Return whether an IPv4 address (text) is not a public one (RFC 6890)."""
    a, b = address_bytes(address)[:2]
    block = a, b & {100: 0xC0, 172: 0xF0}.get(a, 0xFF)
    return a > 223 or block in ((100, 64), (169, 254), (172, 16), (192, 168)) or a in (0, 10, 127)


class Target:
    """A relay as others describe it: a Relay's fields, and `specifiers` as they came."""


def link_specifiers(relay):
    """Return the link specifiers (tor-spec 5.1.2) of a Relay or Target, count first."""
    return getattr(relay, "specifiers", None) or b"\3\0\6%s%s\2\x14%s\3\x20%s" % (
        address_bytes(relay.address), relay.port.to_bytes(2, "big"), relay.rsa_id, relay.ed_id
    )


def parse_link_specifiers(r, ntor_key):
    """Take link specifiers, count first, from the Reader `r`; return a Target."""
    start, t, pairs = r.at, Target(), _tagged(r, 1)
    t.specifiers = bytes(r.data[start : r.at])
    # Relays take the first address.  In EXTEND2 88 bytes follow.
    found, ids = dict(reversed(pairs)), [kind for kind, _ in pairs if kind in (2, 3)]
    sizes = [len(found.get(kind, b"")) for kind in (0, 2, 3)]
    good = sizes == [6, 20, 32] and len(ids) == 2 and len(t.specifiers) <= RELAY_DATA_MAX - 88
    require(good, "unusable link specifiers")
    t.address, t.port = address_text(found[0][:4]), int.from_bytes(found[0][4:], "big")
    t.rsa_id, t.ed_id, t.ntor_key = found[2], found[3], ntor_key
    return t


def parse_certs(body, tls_cert_sha256, rsa_id, ed_id, when):
    """Verify CERTS whole (tor-spec 4.2); return the relay's (rsa_id, ed_id).

    `tls_cert_sha256`: of the certificate seen; `rsa_id`, `ed_id`: what is expected, or None.
    """
    pairs = _tagged(Reader(body, "CERTS"), 2)
    certs = dict(pairs)
    good = len(certs) == len(pairs) and all([kind in certs for kind in (2, 4, 5, 7)])
    require(good, "CERTS: a certificate is missing, or comes twice")
    kind, key, signing = check_ed_cert(certs[4], "signing key certificate", 4, None, when)
    link_kind, link, _ = check_ed_cert(certs[5], "TLS link certificate", 5, key, when)
    good = (kind, link_kind, link) == (1, 3, tls_cert_sha256)
    require(good, "CERTS: the TLS certificate is not the relay's")
    # Of the X.509 certificate only the key counts, of 1024 bits: the cross-certificate proves it.
    at = certs[2].find(b"\x30\x81\x89\x02\x81\x81\x00")
    key = certs[2][at : at + 140]
    identity = parse_crosscert(certs[7], rsa_public_key(key), when)
    require(identity == signing, "CERTS: its identities do not belong together")
    good = rsa_id in (None, sha1(key)) and ed_id in (None, identity)
    require(good, "CERTS: not the relay that was expected")
    return sha1(key), identity


def netinfo(peer_address):
    """Return a client's NETINFO (tor-spec 4.5): the peer's address, no time, no own address."""
    return b"\0\0\0\0\4\4%s\0" % address_bytes(peer_address)


def parse_netinfo(body):
    """Return the relay's time (seconds since 1970) and our address (bytes)."""
    r = Reader(body, "NETINFO")
    return r.uint(4), r.take(1) and r.take(r.uint(1))


def padding_negotiate():
    """Return PADDING_NEGOTIATE that stops padding (padding-spec 2.2)."""
    return b"\0\1\0\0\0\0"


_NTOR = b"ntor-curve25519-sha256-1"


def create2(onionskin):
    """Return CREATE2 with the 84 bytes of an ntor onionskin."""
    return b"\0\2\0\x54" + onionskin


def parse_created2(body):
    """Return the reply in CREATED2 or EXTENDED2."""
    r = Reader(body, "CREATED2")
    return r.take(r.uint(2))


def extend2(relay, onionskin):
    """Return EXTEND2 to a Relay or Target."""
    return link_specifiers(relay) + create2(onionskin)


def _split(reply, size):
    # A relay's public value, and what authenticates it.
    r = Reader(reply, "handshake")
    return r.take(size), r.take(size)


def ntor_start(rsa_id, B):
    """Begin ntor (tor-spec 5.1.4) with the onion key `B`; return (state, onionskin)."""
    x, X = x25519_keypair()
    return (rsa_id, B, x, X), rsa_id + B + X


def ntor_finish(state, reply):
    """Check the relay's reply; return Df, Db, Kf, Kb, KH (20, 20, 16, 16, 20 bytes)."""
    rsa_id, B, x, X = state
    Y, auth = _split(reply, 32)
    secret = x25519(x, Y) + x25519(x, B) + rsa_id + B + X + Y + _NTOR
    verify = hmac_sha256(_NTOR + b":verify", secret)
    mac = hmac_sha256(_NTOR + b":mac", verify + rsa_id + B + Y + X + _NTOR + b"Server")
    require(consteq(mac, auth), "ntor: the relay does not hold its onion key")
    return hkdf_sha256(secret, _NTOR + b":key_extract", _NTOR + b":key_expand", 92)


def fast_finish(x, reply):
    """As `ntor_finish`, for CREATE_FAST with `x`, 20 bytes (tor-spec 5.1.3)."""
    y, kh = _split(reply, 20)
    k = b"".join([sha1(x + y + bytes([i])) for i in range(5)])
    require(consteq(k[:20], kh), "CREATED_FAST: the key hash is wrong")
    return k[20:92] + kh


def begin(host, port, flags):
    """Return BEGIN (tor-spec 6.2); `host` is "" for an onion service."""
    return b"%s:%d\0" % (host.encode(), port) + (flags.to_bytes(4, "big") if flags else b"")


def parse_begin(body):
    """Return (host, port) of BEGIN."""
    text, end, _ = body.partition(b"\0")
    host, colon, port = text.rpartition(b":")
    require(end and colon and max(host or b"0") < 127, "bad BEGIN")
    return host.decode(), decimal(port, 1, 65535)


def parse_resolved(body):
    """Return [(type, value)] of RESOLVED (tor-spec 6.4): types 4 and 6 are addresses (text)."""
    r, answers = Reader(body, "RESOLVED"), []
    while r.left():
        kind, value, _ = r.uint(1), r.take(r.uint(1)), r.take(4)
        if kind in (4, 6):
            require(len(value) == (4 if kind == 4 else 16), "bad RESOLVED")
            value = address_text(value)
        answers.append((kind, value))
    return answers


# rend-spec-v3 3 and 4.  `intro` is an introduction point, with `auth_key` and `enc_key`.

_HS = b"tor-hs-ntor-curve25519-sha3-256-1"
_EXTRACT, _EXPAND = _HS + b":hs_key_extract", _HS + b":hs_key_expand"
_AUTH = b"\2\0\x20"


def hs_mac(key, message):
    """Return MAC(key, message) of 0.3."""
    return sha3_256(len(key).to_bytes(8, "big") + key + message)


def establish_intro(seed, auth_key, kh):
    """Return ESTABLISH_INTRO (3.1.1); `kh` is KH of the circuit's last hop."""
    data = _AUTH + auth_key + b"\0"
    data += hs_mac(kh, data)
    return data + b"\0\x40" + ed25519_sign(seed, b"Tor establish-intro cell v1" + data)


def _intro_keys(exp, X, intro, subcred):
    # ENC_KEY and MAC_KEY (3.3.2).
    secret = exp + intro.auth_key + X + intro.enc_key + _HS
    keys = shake256(secret + _EXTRACT + _EXPAND + subcred, 64)
    return keys[:32], keys[32:]


def _rend_keys(secret, intro, X, Y):
    # AUTH_INPUT_MAC; Df, Db, Kf, Kb of the rendezvous (3.3.2, 4.2).
    ids = intro.auth_key + intro.enc_key
    secret += ids + X + Y + _HS
    auth = hs_mac(secret, _HS + b":hs_verify") + ids + Y + X + _HS + b"Server"
    return hs_mac(auth, _HS + b":hs_mac"), shake256(hs_mac(secret, _EXTRACT) + _EXPAND, 128)


def hs_ntor_client_intro(intro, subcred, cookie, relay, flow=False):
    """Return (state, INTRODUCE1) to meet at `relay` with `cookie`, 20 bytes (3.2, 3.3).

    `flow`: ask for congestion control.
    """
    x, X = x25519_keypair()
    enc_key, mac_key = _intro_keys(x25519(x, intro.enc_key), X, intro, subcred)
    # Extension 1 asks for congestion control.
    plain = cookie + (b"\1\1\0" if flow else b"\0")
    plain += b"\1\0\x20" + relay.ntor_key + link_specifiers(relay)
    # tor's are at least 310 bytes long.
    plain += bytes(max(0, 190 - len(plain)))
    body = bytes(20) + _AUTH + intro.auth_key + b"\0" + X + AesCtr(enc_key).crypt(plain)
    return (x, X, intro), body + hs_mac(mac_key, body)


def hs_ntor_client_finish(state, reply):
    """Check RENDEZVOUS2; return Df, Db, Kf, Kb of 32 bytes each."""
    x, X, intro = state
    Y, auth = _split(reply, 32)
    mac, keys = _rend_keys(x25519(x, Y) + x25519(x, intro.enc_key), intro, X, Y)
    require(consteq(mac, auth), "RENDEZVOUS2: the service does not hold its keys")
    return keys


def hs_ntor_service(intro, b, subcreds, body):
    """Open INTRODUCE2 by the secret `b` of `intro` and one of the subcredentials (3.3).

    Returns the rendezvous point (a Target, with `flow`: congestion control is asked for),
    cookie, RENDEZVOUS1 and keys as the client has.
    """
    r = Reader(body, "INTRODUCE2")
    require(r.take(55)[20:] == _AUTH + intro.auth_key, "INTRODUCE2: for another key")
    _tagged(r, 1)
    X = r.take(32)
    cipher, mac = r.take(max(0, r.left() - 32)), r.take(32)
    exp = x25519(b, X)
    for subcred in subcreds:
        enc_key, mac_key = _intro_keys(exp, X, intro, subcred)
        if consteq(hs_mac(mac_key, body[:-32]), mac):
            break
    else:
        raise ProtocolError("INTRODUCE2: the MAC is wrong")
    r = Reader(AesCtr(enc_key).crypt(cipher), "INTRODUCE2")
    cookie = r.take(20)
    flow = 1 in [kind for kind, _ in _tagged(r, 1)]
    require(r.take(3) == b"\1\0\x20", "INTRODUCE2: unknown kind of onion key")
    target = parse_link_specifiers(r, r.take(32))
    target.flow = flow
    y, Y = x25519_keypair()
    auth, keys = _rend_keys(x25519(y, X) + exp, intro, X, Y)
    # As long as tor's.
    return target, cookie, cookie + Y + auth + urandom(84), keys


# === 9. Onion addresses and descriptors =====================================
# Addresses, time periods, the hash ring, descriptors (rend-spec-v3 1, 2, 6, appendices A, F).


def onion_address(key):
    """Return the address, with ".onion", of a public identity key (32 bytes)."""
    checksum = sha3_256(b".onion checksum" + key + b"\3")[:2]
    return b32encode(key + checksum + b"\3") + ".onion"


def parse_onion_address(text):
    """Return the public identity key (32 bytes) in an address, subdomains aside.

    AddressError if it is none, or its key has a torsion component.
    """
    name = ".".join(text.lower().rstrip(".").split(".")[-2:])
    if len(name) != 62 or name[56:] != ".onion":
        raise AddressError("%s is not an onion address: 56 characters and .onion" % text)
    try:
        key = b32decode(name[:56])[:32]
        if onion_address(key) == name and ed25519_valid(key):
            return key
    except ProtocolError:
        pass
    raise AddressError("%s is mistyped: its checksum or key is wrong" % text)


def time_periods(consensus, testing):
    """Return the time periods at the consensus's valid-after (2.2.1).

    The first and the second are a service's, the third, one of them, is the clients'.  Each is
    (number, minutes, shared random value, start of the value's protocol run).  `testing`: in
    a TestingTorNetwork a period is as long as a run.
    """
    after = consensus.valid_after
    interval = max(1, consensus.fresh_until - after)
    offset, run = 12 * interval, 24 * interval
    length = max(1, run // 60) if testing else consensus.param("hsdir_interval", 1440, 5, 14400)
    start = after - after // interval % 24 * interval
    number, next_number = [(t // 60 - offset // 60) // length + 1 for t in (after, start)]
    rotated = after >= next_number * length * 60 + offset

    def period(number, value, start):
        disaster = b"shared-random-disaster" + struct.pack(">QQ", length, number)
        return number, length, value or sha3_256(disaster), start

    first = period(number - 1 - rotated, consensus.srv_previous, start - run)
    second = period(number - rotated, consensus.srv_current, start)
    return first, second, second if rotated else first


_BASEPOINT = (
    b"(15112221349535400772501151409588531511454012693041857206046113283949847762202, "
    b"46316835694926478169428394003475163141307993866256225615783033603165251855960)"
)


def blinding_param(key, period):
    """Return the hash that blinds an identity key in `period` (A.2)."""
    nonce = b"key-blind" + struct.pack(">QQ", period[0], period[1])
    return sha3_256(b"Derive temporary signing key\0" + key + _BASEPOINT + nonce)


def subcredential(key, blinded):
    """Return the subcredential (2.1) of an identity key and its blinded key."""
    return sha3_256(b"subcredential" + sha3_256(b"credential" + key) + blinded)


def hs_index(blinded, replica, period):
    """Return the place of replica 1, 2, ... on the ring (2.2.3)."""
    place = struct.pack(">QQQ", replica, period[1], period[0])
    return sha3_256(b"store-at-idx" + blinded + place)


def hsdir_index(ed_id, period):
    """Return a directory's place on the ring."""
    return sha3_256(b"node-idx" + ed_id + period[2] + struct.pack(">QQ", period[0], period[1]))


def hsdir_ring(table, consensus, blinded, period, store):
    """Return the indexes of the directories where to store, or to fetch, a descriptor."""
    replicas = consensus.param("hsdir_n_replicas", 2, 1, 16)
    name, default = ("hsdir_spread_store", 4) if store else ("hsdir_spread_fetch", 3)
    spread = consensus.param(name, default, 1, 128)
    starts = [hs_index(blinded, n + 1, period) for n in range(replicas)]
    places = [(int.from_bytes(start, "big"), []) for start in starts]
    keep, needed, found = replicas * spread, HSDIR | PROTO_HSDIR2 | USABLE, []
    for i, flags, _, _ in table.scan():
        if flags & needed == needed:
            at = int.from_bytes(hsdir_index(table.ed_id(i), period), "big")
            for start, nearest in places:
                nearest.append((at - start + (at < start and 1 << 256), i))
                if len(nearest) > 2 * keep:
                    nearest[:] = sorted(nearest)[:keep]
    for _, nearest in places:
        # A replica skips what an earlier one took.
        found += [i for _, i in sorted(nearest) if i not in found][:spread]
    return found


def ope_encrypt(key, n):
    """Return the sum of the first `n` numbers of a key stream."""
    total = n = min(max(n, 1), 1 << 18)
    cipher = AesCtr(key)
    for at in range(0, n, 256):
        count = min(256, n - at)
        total += sum(struct.unpack("<%dH" % count, cipher.crypt(bytes(2 * count))))
    return total


def revision_counter(esk, seconds):
    """Return a revision counter as tor makes it (F.2).

    `esk`: the blinded secret key; `seconds`: since the period's protocol run began.
    """
    # tor hashes the zero that ends its string, too.
    return ope_encrypt(sha3_256(b"rev-counter-generation\0" + esk), seconds + 1)


def make_ed_cert(kind, key, when, esk, public):
    """Return a certificate (cert-spec 2.1) of `kind` for `key`, good for 54 hours."""
    body = struct.pack(">BBIB", 1, kind, when // 3600 + 54, 1) + key + b"\1\0\x20\4\0" + public
    return body + ed25519_sign_expanded(esk, public, body)


def _base64(data):
    return binascii.b2a_base64(data).strip()


def _armour(label, data):
    text = _base64(data)
    lines = b"\n".join([text[i : i + 64] for i in range(0, len(text), 64)])
    return b"-----BEGIN %s-----\n%s\n-----END %s-----" % (label, lines, label)


def _enc_key_ed(u):
    # The Ed25519 form, sign 0, of an X25519 key: y = (u - 1) / (u + 1).
    p = (1 << 255) - 19
    u = int.from_bytes(u, "little") & (1 << 255) - 1
    return ((u - 1) * pow(u + 1, p - 2, p) % p).to_bytes(32, "little")


_OUTER, _INNER = b"hsdir-superencrypted-data", b"hsdir-encrypted-data"
_SIGNED = b"Tor onion service descriptor sig v3"


def _layer(salt, secret, label):
    # The cipher of a layer; the function from salt and ciphertext to the MAC (2.5.3).
    keys = shake256(secret + salt + label, 80)
    return AesCtr(keys[:32], keys[32:48]), lambda data: hs_mac(keys[48:], bytes(7) + b"\x10" + data)


def _seal(plain, secret, label):
    salt = urandom(16)
    cipher, mac = _layer(salt, secret, label)
    data = salt + cipher.crypt(plain)
    return _armour(b"MESSAGE", data + mac(data))


def _unseal(blob, secret, label):
    # None where the MAC is wrong.
    cipher, mac = _layer(blob[:16], secret, label)
    good = len(blob) > 48 and consteq(mac(blob[:-32]), blob[-32:])
    return cipher.crypt(blob[16:-32]).partition(b"\0")[0] if good else None


def make_descriptor(esk, blinded, subcred, revision, intro_points, when, flow=0):
    """Return a descriptor to publish (2.4, 2.5).

    `esk`, `blinded`: the blinded keys; `intro_points`: Relays or Targets, with `auth_key`
    and `enc_key`; `when`: now; `flow`: the SENDME increment of congestion control, or 0.
    """
    seed, secret = urandom(32), blinded + subcred + struct.pack(">Q", revision)
    signer, public = ed25519_expand(seed), ed25519_public(seed)

    def cert(kind, key, esk=signer, by=public):
        return _armour(b"ED25519 CERT", make_ed_cert(kind, key, when, esk, by))

    inner = b"create2-formats 2\n" + (b"flow-control 1-2 %d\n" % flow if flow else b"")
    for i in intro_points:
        inner += b"introduction-point %s\nonion-key ntor %s\nauth-key\n%s\n" % (
            _base64(link_specifiers(i)), _base64(i.ntor_key), cert(9, i.auth_key)
        )
        inner += b"enc-key ntor %s\nenc-key-cert\n%s\n" % (
            _base64(i.enc_key), cert(11, _enc_key_ed(i.enc_key))
        )
    outer = b"desc-auth-type x25519\ndesc-auth-ephemeral-key %s\n" % _base64(x25519_keypair()[1])
    for _ in range(16):
        # Made up, so that nobody sees whether there are authorized clients.
        made_up = tuple([b64encode(urandom(n)) for n in (8, 16, 16)])
        outer += ("auth-client %s %s %s\n" % made_up).encode()
    outer += b"encrypted\n" + _seal(inner, secret, _INNER)
    outer += bytes(-len(outer) % 10000)
    text = b"hs-descriptor 3\ndescriptor-lifetime 180\ndescriptor-signing-key-cert\n%s\n" % (
        cert(8, public, esk, blinded)
    )
    text += b"revision-counter %d\nsuperencrypted\n%s\n" % (revision, _seal(outer, secret, _OUTER))
    signature = ed25519_sign_expanded(signer, public, _SIGNED + text)
    return text + b"signature %s\n" % b64encode(signature).encode()


def _cert(items, keyword, kind, public, when):
    # The key in a certificate by the key `public`.
    data = one_item(items, keyword)[1]
    key_type, key, signing = check_ed_cert(data, keyword.decode(), kind, public, when)
    require((key_type, signing) == (1, public), "descriptor: bad certificate")
    return key


def _ntor(items, keyword):
    # Other kinds of keys may stand beside it.
    words = [item[1].split(b" ") for item in items if item[0] == keyword]
    keys = [b64decode(word[1], 32) for word in words if word[0] == b"ntor" and len(word) > 1]
    require(len(keys) == 1 and any(keys[0]), "descriptor: bad " + keyword.decode())
    return keys[0]


def _intro_point(lines, signing, when):
    # A Target; the certificates are by the key `signing`.
    r = Reader(b64decode(lines[0].split(b" ")[0]), "introduction point")
    items = document_items(lines[1:])
    target = parse_link_specifiers(r, _ntor(items, b"onion-key"))
    target.auth_key = _cert(items, b"auth-key", 9, signing, when)
    target.enc_key = _ntor(items, b"enc-key")
    certified = _cert(items, b"enc-key-cert", 11, signing, when)
    require(certified == _enc_key_ed(target.enc_key), "enc-key-cert is for another key")
    return target


class Descriptor:
    """`revision`; `lifetime` in seconds; `intro_points`: Targets with auth_key, enc_key."""


def parse_descriptor(data, blinded, subcred, when):
    """Verify and decrypt a descriptor by the key `blinded`; return a Descriptor.

    Bad introduction points are left out; ProtocolError if none is left.
    """
    text, end, signature = data.rpartition(b"\nsignature ")
    good = end and text.startswith(b"hs-descriptor 3\n")
    require(good, "descriptor: truncated, or not of version 3")
    items = document_items(text.split(b"\n"))
    signing = _cert(items, b"descriptor-signing-key-cert", 8, blinded, when)
    signature = b64decode(signature.rstrip(b"\n"), 64)
    good = ed25519_verify(signing, _SIGNED + text + b"\n", signature)
    require(good, "descriptor: bad signature")
    descriptor = Descriptor()
    descriptor.lifetime = 60 * decimal(one_item(items, b"descriptor-lifetime")[0], 30, 720)
    descriptor.revision = decimal(one_item(items, b"revision-counter")[0], 0, (1 << 64) - 1)
    secret = blinded + subcred + struct.pack(">Q", descriptor.revision)
    for keyword, label, error in (
        (b"superencrypted", _OUTER, "the outer layer is corrupt"),
        (b"encrypted", _INNER, "it is for authorized clients only, or corrupt"),
    ):
        plain = _unseal(one_item(items, keyword)[1], secret, label)
        require(plain is not None, "descriptor: " + error)
        sections = plain.split(b"\nintroduction-point ")
        items = document_items(sections[0].split(b"\n"))
    formats = one_item(items, b"create2-formats")[0].split(b" ")
    require(b"2" in formats, "descriptor: unknown handshakes")
    # tor offers "1-2 31": versions, and the SENDME increment of the consensus.
    versions, _, increment = one_item(items, b"flow-control", b"1 1")[0].partition(b" ")
    descriptor.flow = decimal(increment, 1, 254) if versions.endswith(b"2") else 0
    descriptor.intro_points = []
    for section in sections[1:21]:
        try:
            descriptor.intro_points.append(_intro_point(section.split(b"\n"), signing, when))
        except ProtocolError as e:
            log(INFO, "introduction point refused: %s", e)
    require(descriptor.intro_points, "descriptor: no usable introduction point")
    return descriptor


# === 10. Channel ============================================================
# One TLS link to a relay, and the circuits that share it (tor-spec 3 and 4).

# How much one read takes, and how much may wait to be written.
READ_SIZE = 4112 if MICROPYTHON else 1 << 18
QUEUE_SIZE = 16448 if MICROPYTHON else 1 << 18
LARGEST_VARIABLE_CELL = 16384
HANDSHAKE_SECONDS = 20
IDLE_MS, KEEPALIVE_MS = 180000, 240000


class Channel:
    """A link to one relay.

    `rsa_id`, `ed_id`: its identities, proved by CERTS; `skew`: its clock minus ours in
    seconds; `circuits`: {circuit ID: Circuit}; `closing`: a Promise that is set to the
    reason when the channel is gone.
    """

    def __init__(self, address, port):
        self.address, self.port = address, port
        self.rsa_id = self.ed_id = None
        self.skew = 0
        self.circuits = {}
        self.closing = Promise()
        self.used = ticks_ms()
        self._opened, self._version = Promise(), 0
        self._queue, self._queued, self._blocked = [], 0, []
        self._wake = asyncio.Event()
        self._tasks = []

    def __str__(self):
        name = " (%s)" % hexlify(self.rsa_id) if self.rsa_id else ""
        return "relay %s:%d%s" % (self.address, self.port, name)

    async def open(self, rsa_id, ed_id, seconds=HANDSHAKE_SECONDS):
        """Connect and shake hands; the relay must be `rsa_id` and, where given, `ed_id`.

        Returns the channel.  Raises ChannelError.
        """
        self._wanted = rsa_id, ed_id
        try:
            reader, writer, self._certificate = await tls_connect(self.address, self.port, seconds)
            self._tasks = [spawn(self._read(reader)), spawn(self._write(writer))]
            self.send(struct.pack(">HBHHH", 0, VERSIONS, 4, 4, 5))
            await self._opened.wait(seconds)
        except asyncio.TimeoutError:
            self.close("no answer within %d s" % seconds)
        except OSError as e:
            self.close("cannot be reached: %s" % e)
        except asyncio.CancelledError:
            self.close("given up")
            raise
        if self.closing.done():
            raise ChannelError("%s: %s" % (self, self.closing.get()))
        return self

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

    async def _write(self, writer):
        try:
            while self._queue or not self.closing.done():
                await self._wake.wait()
                self._wake.clear()
                data, self._queue = b"".join(self._queue), []
                writer.write(data)
                self.used = ticks_ms()
                await writer.drain()
                self._queued -= len(data)
                blocked, self._blocked = self._blocked, []
                for callback in blocked:
                    callback()
        except OSError as e:
            self.close("the link broke: %s" % e)
        finally:
            self._tasks[0].cancel()
            await hang_up(writer)

    # ── Reading ──

    async def _read(self, reader):
        rest = b""
        try:
            while not self.closing.done():
                data = await reader.read(READ_SIZE)
                if not data:
                    raise OSError("the relay closed it")
                data = rest + data if rest else data
                rest = data[self._cells(data) :]
        except OSError as e:
            self.close("the link broke: %s" % e)
        except ProtocolError as e:
            self.close("the relay broke the link protocol: %s" % e)

    def _cells(self, data):
        """Dispatch the whole cells at the front of `data`; return how many bytes those are.

        Relay cells in a row for one circuit go to it together.
        """
        at, end = 0, len(data)
        while end - at >= 5:
            # The circuit ID has 2 bytes in VERSIONS, then 4.
            body = at + (5 if self._version else 3)
            command = data[body - 1]
            if not self._version and command != VERSIONS:
                raise ProtocolError("cell %d where VERSIONS was due" % command)
            circuit = self.circuits.get(int.from_bytes(data[at : body - 1], "big"))
            if command == RELAY and self._opened.done():
                head, cells = data[at:body], []
                while at + 514 <= end and data[at : at + 5] == head:
                    cells.append(data[at + 5 : at + 514])
                    at += 514
                if not cells:
                    break
                if circuit is not None:
                    circuit.receive(b"".join(cells))
                continue
            size = 509
            if command >= 128 or command == VERSIONS:
                if body + 2 > end:
                    break
                size, body = data[body] << 8 | data[body + 1], body + 2
                if size > LARGEST_VARIABLE_CELL:
                    raise ProtocolError("cell %d of %d bytes" % (command, size))
            if body + size > end:
                break
            at = body + size
            if not self._opened.done():
                self._handshake(command, data[body:at])
            elif command in (VERSIONS, NETINFO, CERTS, AUTH_CHALLENGE):
                raise ProtocolError("cell %d after the handshake" % command)
            elif circuit is not None:
                circuit.receive(data[body:at], command)
        return at

    def _handshake(self, command, body):
        # VERSIONS, CERTS, AUTH_CHALLENGE (which clients do not answer), NETINFO.
        if command == VERSIONS and not self._version:
            offered = [body[i] << 8 | body[i + 1] for i in range(0, len(body) - 1, 2)]
            self._version = max([v for v in offered if v in (4, 5)] or [0])
            if not self._version:
                raise ProtocolError("no link protocol in common")
        elif command == CERTS and self.rsa_id is None:
            ids = parse_certs(body, self._certificate(), self._wanted[0], self._wanted[1], now())
            self.rsa_id, self.ed_id = ids
        elif command == NETINFO and self.rsa_id is not None:
            timestamp = parse_netinfo(body)[0]
            self.skew = timestamp - now() if timestamp else 0
            self.send(cell(0, NETINFO, netinfo(self.address)))
            if self._version == 5:
                # Padding against netflow records is not sent here, so the relay's is turned
                # down too: one side alone would stand out (padding-spec 2).
                self.send(cell(0, PADDING_NEGOTIATE, padding_negotiate()))
            self._opened.set()
        elif command not in (AUTH_CHALLENGE, VPADDING, PADDING):
            raise ProtocolError("cell %d out of place in the handshake" % command)

    # ── Circuits ──

    def adopt(self, circuit):
        """Give `circuit` an unused circuit ID of the initiator's half, and return it."""
        if self.closing.done():
            raise ChannelError("the channel to %s is closed" % self)
        circ_id = 0
        while not circ_id or circ_id in self.circuits:
            circ_id = int.from_bytes(urandom(4), "big") | 0x80000000
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
            self._opened.set()
            for circuit in list(self.circuits.values()):
                circuit.fail("the channel is gone: %s" % why, 8)
            self._wake.set()
            spawn(self._linger())

    async def _linger(self):
        # A peer that reads nothing must not keep the socket for ever.
        await asyncio.sleep(2)
        for task in self._tasks:
            task.cancel()


class Channels:
    """The open channels, one for each relay."""

    def __init__(self):
        self._open = {}

    async def get(self, address, port, rsa_id, ed_id=None, seconds=HANDSHAKE_SECONDS):
        """Return the channel to the relay, opening it where there is none; ChannelError."""
        found = self._open.get(rsa_id)
        if found is None:
            found = self._open[rsa_id] = Promise()
            try:
                found.set(await Channel(address, port).open(rsa_id, ed_id, seconds))
                spawn(self._watch(rsa_id, found.get()))
            except BaseException as e:
                del self._open[rsa_id]
                found.fail(e if isinstance(e, TorError) else ChannelError("given up: %s" % e))
                if not isinstance(e, TorError):
                    raise
        return await found.wait()

    async def _watch(self, rsa_id, channel):
        # Drop the channel when it closes; close it when it is idle; keep it alive until then.
        while not channel.closing.done():
            try:
                await channel.closing.wait(60)
            except asyncio.TimeoutError:
                idle = ticks_diff(ticks_ms(), channel.used)
                if idle > IDLE_MS and not channel.circuits:
                    channel.close("idle")
                elif idle > KEEPALIVE_MS:
                    channel.send(cell(0, PADDING))
        self._open.pop(rsa_id, None)

    def close(self):
        """Close every channel."""
        for found in list(self._open.values()):
            if found.get() is not None:
                found.get().close()


# === 11. Circuits and streams ===============================================
# Relay encryption, extending, flow control, streams, teardown (tor-spec 5 to 7).

# The most cells that are encrypted in one go.
BATCH = 8 if MICROPYTHON else 128
CIRCUIT_WINDOW, CIRCUIT_INCREMENT, STREAM_WINDOW, STREAM_INCREMENT = 1000, 100, 500, 50
# With congestion control, XOFF takes the place of stream windows.
NO_LIMIT, XOFF_LIMIT = float("inf"), 500 * 498
# With so much unread a stream sends no SENDME; with so much unsent `drain` waits.
READ_AHEAD, WRITE_AHEAD = (16384, 8192) if MICROPYTHON else (1 << 18, 1 << 17)


class Layer:
    """Relay encryption shared with one hop (tor-spec 5.2; `onion`: rend-spec-v3 4.2.1).

    `keys`: Df, Db, Kf, Kb in a row; `service`: we are the service, and send "backward".
    """

    def __init__(self, keys, onion=False, service=False):
        digest, form = (Sha3_256, "32s32s32s32s") if onion else (Sha1, "20s20s16s16s")
        Df, Db, Kf, Kb = struct.unpack_from(form, keys)
        if service:
            Df, Db, Kf, Kb = Db, Df, Kb, Kf
        self.out_digest, self.out_cipher = digest(Df), AesCtr(Kf)
        self.in_digest, self.in_cipher = digest(Db), AesCtr(Kb)

    def sent(self, body):
        """Return whether this hop sent the decrypted cell, and if so, count it."""
        trial = self.in_digest.copy()
        trial.update(body[:5] + bytes(4) + body[9:])
        if trial.digest()[:4] != body[5:9]:
            return False
        self.in_digest = trial
        return True


def sendme_increment(param):
    """Return after how many cells congestion control sends a SENDME; 0 where it is not used."""
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
        """Adapt to a SENDME after `rtt` ms; `inflight`: cells, with those acknowledged."""
        cwnd, increment = self.cwnd, self.increment
        alpha, beta, gamma, delta = self._marks
        self._rtt = rtt = (2 * rtt + self._rtt) / 3 if self._rtt else max(rtt, 1)
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
            grow = increment
            if cwnd > self._cap:
                grow = max((increment * self._cap + cwnd) // (2 * cwnd), 1)
            self._slow = grow * cwnd > increment * increment and cwnd < 5000
            cwnd += grow
        self.cwnd = max(cwnd, self._least)
        self._acks += 1
        if self._acks * increment >= self.cwnd:
            self._acks, self._full = 0, False


def congestion_control(param, wanted):
    """Return a Vegas if the consensus (`param`) has congestion control and the peer `wanted` it."""
    return Vegas(param) if not MICROPYTHON and wanted and sendme_increment(param) else None


class Stream:
    """A stream of bytes through a circuit: reader and writer in one, as asyncio has them."""

    outgoing, _error = b"", None
    _stopped = _ended = _closing = False

    def __init__(self, circuit, stream_id):
        self.circuit, self.stream_id, self._incoming = circuit, stream_id, bytearray()
        circuit.streams[stream_id] = self
        self.opened, self._changed = Promise(), asyncio.Event()
        self.package = NO_LIMIT if circuit.vegas else STREAM_WINDOW
        # None for DATA before CONNECTED.
        self._deliver = self.package if circuit.on_begin else 0

    # --- Called by the circuit ---

    def feed(self, data):
        self._deliver -= 1
        if self._deliver < 0 or len(self._incoming) > 16 * XOFF_LIMIT:
            raise ProtocolError("DATA on stream %d too early, or too much" % self.stream_id)
        if not self._closing:
            self._incoming.extend(data)

    def arrived(self):
        """Wake the reader, and let the other side go on, or stop it."""
        self._changed.set()
        unread = len(self._incoming)
        if self._ended:
            return
        while self._deliver <= STREAM_WINDOW - STREAM_INCREMENT and unread < READ_AHEAD:
            self._deliver += STREAM_INCREMENT
            self.circuit.send(RELAY_SENDME, self.stream_id, b"")
        # With congestion control: XON when half is read.
        stop = unread * (2 if self._stopped else 1) > XOFF_LIMIT
        if self.circuit.vegas and stop != self._stopped:
            self._stopped = stop
            command, body = (RELAY_XOFF, bytes(1)) if stop else (RELAY_XON, bytes(5))
            self.circuit.send(command, self.stream_id, body)

    def message(self, command, data):
        if command == RELAY_END:
            reason = data[0] if data else 1
            text = "the stream was closed: " + reason_text(END_REASONS, reason)
            self.end(StreamError(text, reason))
        elif command in (RELAY_XOFF, RELAY_XON) and self.circuit.vegas:
            self.package = 0 if command == RELAY_XOFF else NO_LIMIT
        elif command == RELAY_SENDME and self.package <= STREAM_WINDOW - STREAM_INCREMENT:
            self.package += STREAM_INCREMENT
        elif command in (RELAY_CONNECTED, RELAY_RESOLVED) and not self.opened.done():
            self._deliver = NO_LIMIT if self.circuit.vegas else STREAM_WINDOW
            self.opened.set(data)
        else:
            raise ProtocolError("relay command %d on stream %d" % (command, self.stream_id))
        self.circuit.flush(self)

    def flushed(self):
        self._changed.set()
        if self._closing and not self.outgoing:
            self.send_end(END_DONE if self.circuit.on_begin else 1)

    def send_end(self, reason):
        """End the stream, or refuse it."""
        if not self._ended:
            self.end(StreamError("closed here", END_DONE))
            self.circuit.send(RELAY_END, self.stream_id, bytes([reason]))

    def end(self, error):
        self._ended, self.outgoing = True, b""
        # Clients end with MISC whatever happened, so at a service it is no error.
        if error.reason != END_DONE and not (error.reason == 1 and self.circuit.on_begin):
            self._error = error
        self.circuit.streams.pop(self.stream_id, None)
        self.opened.fail(error)
        self._changed.set()

    def accept(self):
        """Answer BEGIN, at a service."""
        if not self._ended:
            self.opened.set()
            self.circuit.send(RELAY_CONNECTED, self.stream_id, b"")

    # --- Reading ---

    def _take(self, n):
        piece = bytes(memoryview(self._incoming)[:n])
        self._incoming = self._incoming[n:]
        self.arrived()
        return piece

    async def _change(self):
        self._changed.clear()
        await self._changed.wait()

    async def _more(self):
        # Wait for bytes; False at the end; StreamError where the stream broke.
        over = self.is_closing()
        if not over:
            await self._change()
        elif self._error:
            raise self._error
        return not over

    async def read(self, n=-1):
        """Return up to `n` bytes as they come, or all until the end; b"" at the end."""
        pieces = []
        while n < 0:
            pieces.append(await self.read(65536))
            if not pieces[-1]:
                return b"".join(pieces)
        while n and not self._incoming:
            if not await self._more():
                return b""
        return self._take(n)

    async def readexactly(self, n):
        """Return `n` bytes; EOFError when the stream ends before."""
        data = b""
        while len(data) < n:
            piece = await self.read(n - len(data))
            if not piece:
                raise EOFError("the stream ended %d bytes early" % (n - len(data)))
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
            return self._take(len(self._incoming))

    # --- Writing ---

    def write(self, data):
        """Send `data`; follow with `await drain()`."""
        if self.is_closing():
            raise self._error or StreamError("the stream is closed", END_DONE)
        self.outgoing += bytes(data)
        self.circuit.flush(self)

    async def drain(self):
        """Wait until there is room for more; StreamError where the stream broke."""
        while len(self.outgoing) > WRITE_AHEAD:
            await self._change()
        if self._error:
            raise self._error

    def close(self):
        """End the stream when all is sent.  Tor has no half-closed streams (tor-spec 6.3)."""
        self._closing = True
        self.flushed()

    def is_closing(self):
        return self._closing or self._ended

    async def wait_closed(self):
        while not self._ended:
            await self._change()

    def get_extra_info(self, name, default=None):
        return self.circuit if name == "circuit" else default


_TO_CLOSED = RELAY_END, RELAY_SENDME, RELAY_CONNECTED, RELAY_RESOLVED, RELAY_XOFF, RELAY_XON


class Circuit:
    """A circuit over `channel`; `path` holds its relays, the nearest first.

    `on_control`: {relay command: function(body)} for what comes unasked; `on_begin`: at a
    service, coroutine function(stream, host, port); `kh`: KH of the last hop; `closing`: a
    Promise, set to the CircuitError at the end.
    """

    on_begin = kh = vegas = None
    _inflight, _deliver, _increment = 0, CIRCUIT_WINDOW, CIRCUIT_INCREMENT

    def __init__(self, channel, window=CIRCUIT_WINDOW):
        self.channel, self.closing, self._window = channel, Promise(), window
        self.path, self.streams, self.on_control, self._layers = [], {}, {}, []
        # What is expected, and the Promise of its body.
        self._awaited = None, Promise()
        self._last_id, self._short_after = randbelow(65536), randbelow(50)
        # Tag and time of the cells that are due a SENDME.
        self._due = []
        self.circ_id = channel.adopt(self)

    def __str__(self):
        return "circuit %d over %s" % (self.circ_id & 0xFFFF, self.channel)

    @property
    def closed(self):
        return self.closing.done()

    # --- Building ---

    async def extend(self, relay, seconds):
        """Add `relay` by ntor (tor-spec 5.1); None: the only hop, by CREATE_FAST.  CircuitError."""
        if relay:
            finish, (state, onionskin) = ntor_finish, ntor_start(relay.rsa_id, relay.ntor_key)
            asked = CREATE2, create2(onionskin), CREATED2
            if self.path:
                asked = RELAY_EXTEND2, extend2(relay, onionskin), RELAY_EXTENDED2
        else:
            finish, state = fast_finish, urandom(20)
            asked = CREATE_FAST, state, CREATED_FAST
        reply = await self.ask(*asked, seconds)
        try:
            keys = finish(state, parse_created2(reply) if relay else reply)
        except ProtocolError as e:
            raise self.fail("hop %d: %s" % (len(self.path) + 1, e), 1)
        self.path.append(relay)
        self._layers.append(Layer(keys))
        self.kh = keys[72:]

    def add_onion_hop(self, keys, service=False, vegas=None):
        """Add the virtual hop of a rendezvous; `vegas`: what congestion_control returned."""
        self._layers.append(Layer(keys, True, service))
        if vegas:
            self.vegas, self._increment, self._window = vegas, vegas.increment, vegas.cwnd

    def expect(self, command):
        """Return a Promise of the body of the next message, which must be a `command`."""
        self._awaited = command, Promise()
        return self._awaited[1]

    async def ask(self, command, body, answer, seconds):
        """Send a message to the last hop, or a CREATE cell; return the body of the `answer`."""
        promise = self.expect(answer)
        if self._layers:
            self.send(command, 0, body)
        else:
            self.channel.send(cell(self.circ_id, command, body))
        try:
            return await promise.wait(seconds)
        except asyncio.TimeoutError:
            raise self.fail("no answer within %d s" % seconds, 10)

    async def open_stream(self, command, body, seconds):
        """Open a stream by BEGIN, BEGIN_DIR or RESOLVE (tor-spec 6.2, 6.4); StreamError."""
        if len(self.streams) > 60000:
            raise StreamError("the circuit has no stream ID left", END_RESOURCELIMIT)
        # In turn: the END of a stream that was closed here may still be on its way.
        self._last_id = self._last_id % 65535 + 1
        while self._last_id in self.streams:
            self._last_id = self._last_id % 65535 + 1
        stream = Stream(self, self._last_id)
        self.send(command, stream.stream_id, body)
        try:
            await stream.opened.wait(seconds)
            return stream
        except BaseException as e:
            stream.close()
            if isinstance(e, asyncio.TimeoutError):
                raise StreamError("no answer within %d s" % seconds, END_TIMEOUT)
            raise

    async def resolve(self, host):
        """Resolve `host` at the exit: what `parse_resolved` returns."""
        stream = await self.open_stream(RELAY_RESOLVE, host.encode() + b"\0", 30)
        self.streams.pop(stream.stream_id, None)
        return parse_resolved(stream.opened.get())

    # --- Sending ---

    def send(self, command, stream_id, *pieces):
        """Send relay messages to the last hop, all at once; CircuitError on a closed circuit."""
        if self.closed:
            raise self.closing.get()
        digest, cells = self._layers[-1].out_digest, []
        for data in pieces:
            size = len(data)
            if size < RELAY_DATA_MAX:
                data = (data + bytes(4) + urandom(RELAY_DATA_MAX - size))[:RELAY_DATA_MAX]
            digest.update(struct.pack(">BHHIH", command, 0, stream_id, 0, size))
            digest.update(data)
            tag = digest.digest()
            cells += struct.pack(">BHH4sH", command, 0, stream_id, tag[:4], size), data
            if command == RELAY_DATA:
                self._inflight += 1
                if self._inflight % self._increment == 0:
                    self._due.append((tag[:20], ticks_ms()))
        data = b"".join(cells)
        for layer in reversed(self._layers):
            data = layer.out_cipher.crypt(data)
        # At most eight are early, of which no path here has more than four (tor-spec 5.6).
        kind = RELAY_EARLY if command == RELAY_EXTEND2 else RELAY
        cells = [data[at : at + 509] for at in range(0, len(data), 509)]
        self.channel.send(struct.pack(">IB", self.circ_id, kind).join([b""] + cells))

    def flush(self, stream):
        """Send what `stream` has to send, as far as windows and the channel's queue allow."""
        while stream.outgoing and not self.closed:
            room = self.channel.room()
            if room <= 0:
                return self.channel.when_room(self._resume)
            count = min(BATCH, room, self._window - self._inflight, stream.package)
            if count <= 0:
                return
            pieces, at = [], 0
            while at < len(stream.outgoing) and len(pieces) < count:
                size = RELAY_DATA_MAX
                # In each window a cell with random bytes: no SENDME before its time (7.4).
                self._short_after -= 1
                if self._short_after < 0:
                    size, self._short_after = RELAY_DATA_MAX - 20, 50 + randbelow(50)
                pieces.append(stream.outgoing[at : at + size])
                at += size
            stream.outgoing = stream.outgoing[at:]
            stream.package -= len(pieces)
            self.send(RELAY_DATA, stream.stream_id, *pieces)
        stream.flushed()

    def _resume(self):
        for stream in list(self.streams.values()):
            if stream.outgoing:
                self.flush(stream)

    # --- Receiving ---

    def receive(self, data, command=RELAY):
        """Take the body of a cell, or those of relay cells (509 bytes each) in a row."""
        try:
            if command == RELAY:
                self._decrypt(data)
            elif command == DESTROY:
                text = "closed by a relay: " + reason_text(DESTROY_REASONS, data[0])
                self.fail(text, data[0], False)
            elif command in (CREATED2, CREATED_FAST):
                require(self._answers(command, data), "CREATED out of place")
        except (ProtocolError, MemoryError) as e:
            self.fail(str(e) or "out of memory", 1)

    def _decrypt(self, data):
        require(self._layers, "a relay cell before the first hop")
        for layer in self._layers[:-1]:
            data, ours = layer.in_cipher.crypt(data), []
            for at in range(0, len(data), 509):
                if data[at + 1] == 0 == data[at + 2] and layer.sent(data[at : at + 509]):
                    self._unasked(data[at], data[at + 11])
                    ours.insert(0, at)
            # The layers behind never saw these: their key streams go on without.
            for at in ours:
                data = data[:at] + data[at + 509 :]
        layer, touched = self._layers[-1], {}
        digest, view = layer.in_digest, memoryview(bytearray(layer.in_cipher.crypt(data)))
        for at in range(0, len(view), 509):
            command, recognised, stream_id, tag, size = struct.unpack_from(">BHH4sH", view, at)
            view[at + 5 : at + 9] = b"\0\0\0\0"
            digest.update(view[at : at + 509])
            found = digest.digest()
            if recognised or found[:4] != tag or size > RELAY_DATA_MAX:
                raise ProtocolError("a relay cell that no hop recognises, or of %d bytes" % size)
            data = view[at + 11 : at + 11 + size]
            if command != RELAY_DATA:
                self._message(command, stream_id, bytes(data))
                if self.closed:
                    return
                continue
            self._deliver -= 1
            if self._deliver < 0 or not stream_id:
                raise ProtocolError("more DATA than the window allows")
            stream = self.streams.get(stream_id)
            if stream:
                stream.feed(data)
                touched[stream_id] = stream
            if self._deliver <= CIRCUIT_WINDOW - self._increment:
                self._deliver += self._increment
                self.send(RELAY_SENDME, 0, b"\1\0\x14" + found[:20])
        for stream in touched.values():
            stream.arrived()

    def _answers(self, command, body):
        awaited, promise = self._awaited
        if command == awaited:
            self._awaited = None, promise
            promise.set(body)
        return command == awaited

    def _unasked(self, command, reason):
        if command == RELAY_TRUNCATED:
            raise ProtocolError("truncated: " + reason_text(DESTROY_REASONS, reason))
        require(command == RELAY_DROP, "relay command %d out of place" % command)

    def _message(self, command, stream_id, data):
        stream = self.streams.get(stream_id)
        if stream:
            stream.message(command, data)
        elif stream_id and command == RELAY_BEGIN and self.on_begin:
            spawn(self.on_begin(Stream(self, stream_id), *parse_begin(data)))
        elif stream_id:
            # One that was closed here may still be spoken to.
            require(command in _TO_CLOSED, "relay command %d for no stream" % command)
        elif command == RELAY_SENDME:
            # Version 1: the tag of the cell that made it due (tor-spec 7.3).
            good = self._due and data[:1] == b"\1" and consteq(self._due[0][0], data[3:23])
            require(good, "a SENDME that was not due, or for other cells")
            rtt = ticks_diff(ticks_ms(), self._due.pop(0)[1])
            if self.vegas:
                self.vegas.acked(self._inflight, rtt)
                self._window = self.vegas.cwnd
            self._inflight -= self._increment
            self._resume()
        elif command in self.on_control:
            self.on_control[command](data)
        elif not self._answers(command, data):
            self._unasked(command, data[0] if data else 0)

    def close(self):
        self.fail("closed here")

    def fail(self, text, reason=0, tell=True):
        """Close the circuit and its streams (tor-spec 5.4); return the first such CircuitError."""
        if not self.closed:
            error = CircuitError("%s: %s" % (self, text), reason)
            log(INFO, "%s", error)
            self.closing.set(error)
            self.channel.forget(self.circ_id)
            if tell:
                # Clients give no reason.
                self.channel.send(cell(self.circ_id, DESTROY))
            self._awaited[1].fail(error)
            for stream in list(self.streams.values()):
                stream.end(StreamError(str(error), 8))
        return self.closing.get()


async def pump(stream, reader, writer):
    """Move bytes both ways between a Tor stream and a local connection until one ends."""

    async def move(source, sink):
        try:
            while data := await source.read(WRITE_AHEAD // 2):
                sink.write(data)
                await sink.drain()
        except (OSError, TorError):
            pass
        stream.close()

    task = spawn(move(reader, stream))
    await move(stream, writer)
    task.cancel()
    try:
        writer.close()
        await writer.wait_closed()
    except OSError:
        pass


# ═══ 12. Paths and guards ═══════════════════════════════════════════════════
# Which relays a circuit goes through: bandwidth weights, networks and families
# (path-spec 2.2), entry guards (guard-spec), vanguards-lite (proposal 333).

_NEED = RUNNING | VALID | FAST | PROTO_RELAY2 | PROTO_FLOWCTRL1
_NEVER = NOEDCONSENSUS | MIDDLEONLY
# Role: position of its bandwidth weights, flags it must have, flags it must not have.
_ROLES = {
    "guard": ("g", _NEED | GUARD | STABLE | V2DIR, _NEVER),
    "middle": ("m", _NEED | USABLE, NOEDCONSENSUS),
    "exit": ("e", _NEED | USABLE | EXIT, _NEVER | BADEXIT),
    "intro": ("m", _NEED | USABLE | PROTO_HSINTRO4, _NEVER),
    "rend": ("m", _NEED | USABLE | PROTO_HSREND2, _NEVER),
}
# Done without, as in tor, where no relay is left.
_SPARE = FAST | STABLE | EXIT


def distinct(table, i, j):
    """Return whether the networks and families of relays `i` and `j` differ (path-spec 2.2)."""
    (net, net6), (other, other6) = table.subnets(i), table.subnets(j)
    return net != other and (not net6 or net6 != other6) and not table.same_family(i, j)


def _one_of(relays, what):
    if not relays:
        raise CircuitError("no %s is left for this path" % what)
    return relays[randbelow(len(relays))]


class Weights:
    """Chooses relays of one table at random, by the bandwidth weights of one consensus."""

    def __init__(self, table, consensus):
        self.table, self.param, self._factors, self._failed = table, consensus.param, {}, {}
        given = dict(consensus.bandwidth_weights, Wge=0)
        for position in "gme":
            # Only ratios count, whatever bwweightscale is (dir-spec 3.8.3).
            w = [given.get("W" + position + kind, -1) for kind in "mged"]
            w = zip((0, GUARD, EXIT, GUARD | EXIT), w if min(w) >= 0 else (1, 1, 1, 1))
            self._factors[position] = dict(w)

    def weigh(self, position, need, never=0):
        """Yield (index, weight) of the relays with all flags of `need` and none of `never`."""
        factors, mask, kind = self._factors[position], need | never, GUARD | EXIT
        for i, flags, bandwidth, _ in self.table.scan():
            if flags & mask == need:
                # Not 0: where no relay has a weight, all are alike.
                yield i, bandwidth * factors[flags & kind] or 1

    def pick(self, role, accept, stable=0):
        """Return the index of a relay for `role` that `accept(index)` takes; CircuitError."""
        position, need, never = _ROLES[role]
        doubts, least = self.doubtful(), need & ~_SPARE
        for need, avoid in ((need | stable, doubts), (least, doubts), (least, ())):
            left = [
                (i, w)
                for i, w in self.weigh(position, need, never)
                if i not in avoid and accept(i)
            ]
            at = randbelow(sum(w for _, w in left) or 1)
            for i, w in left:
                at -= w
                if at < 0:
                    return i
        return _one_of((), role)

    def failed(self, rsa_id):
        """Note that a circuit could not be extended to that relay: others are tried first."""
        failed, t = self._failed, now()
        self._failed = dict((r, failed[r]) for r in failed if failed[r] > t)
        self._failed[rsa_id] = t + 120

    def doubtful(self):
        """Return the indexes of the relays that failed lately."""
        return [self.table.find(r) for r in self._failed if self._failed[r] > now()]

    def percent(self):
        """Return for how many of 100 paths the microdescriptors are there (path-spec 2.1.0)."""
        percent = 100
        for position, need in (("g", GUARD), ("m", 0), ("e", EXIT)):
            flags = (need | USABLE, need)
            have, total = [sum(w for _, w in self.weigh(position, need)) for need in flags]
            percent = percent * have // total if total else percent
        return percent


class Guard:
    """A sampled guard, good `until` then; `index` -1: not listed now (guard-spec 4.1)."""

    failing_since = failed_at = 0

    def __init__(self, rsa_id, until, confirmed=0, index=-1):
        self.rsa_id, self.until, self.confirmed, self.index = rsa_id, until, confirmed, index

    def down(self):
        # Tried again after 10 minutes, in the end 9 hours, nearly as in guard-spec 4.5.
        wait = min(max(600, (self.failed_at - self.failing_since) // 4), 32400)
        return 0 <= now() - self.failed_at < wait


class Guards:
    """The entry guards of a client, stored as JSON in the file `path` (None: nowhere)."""

    def __init__(self, path=None):
        # `online`: when a relay last answered.
        self.sample, self.online, self._path = [], 0, path
        try:
            stored = json.loads(read_file(path or "") or b"[]")
            self.sample = [Guard(b32decode(g[0]), int(g[1]), int(g[2])) for g in stored]
        except Exception:
            log(WARN, "%s is damaged: choosing new guards", path)

    def _save(self):
        stored = [(b32encode(g.rsa_id), g.until, g.confirmed) for g in self.sample]
        try:
            if self._path:
                write_file(self._path, json.dumps(stored).encode())
        except OSError as e:
            log(WARN, "cannot store the guards in %s: %s", self._path, e)

    def update(self, weights):
        """Take over a new consensus, as its Weights, and sample guards (guard-spec 4.2, 4.10)."""
        self._weights, self._param = weights, weights.param
        self.sample = [g for g in self.sample if g.until > now()]
        free = set([i for i, _ in weights.weigh(*_ROLES["guard"])])
        for g in self.sample:
            i = weights.table.find(g.rsa_id)
            g.index = i if i in free else -1
            free.discard(i)
        # A failure counts once a relay has answered since: a network that is down uses up
        # no guards.
        listed = self._order()
        usable = [g for g in listed if g.failed_at > self.online or not g.down()]
        lack = self._param("guard-min-filtered-sample-size", 20, 1) - len(usable)
        room = self._param("guard-max-sample-size", 60, 1) - len(listed)
        for _ in range(min(lack, room, len(free))):
            i = weights.pick("guard", lambda i: i in free)
            free.remove(i)
            until = self._until("lifetime", 120)
            self.sample.append(Guard(weights.table.rsa_id(i), until, 0, i))
        self._save()

    def _until(self, name, days):
        # At random, so that it does not tell when it was set (guard-spec A.2).
        days = self._param("guard-%s-days" % name, days, 1, 3650)
        return now() + days * 86400 - randbelow(days * 8640)

    def _order(self):
        # Confirmed ones come first (guard-spec 4.3).
        listed = [g for g in self.sample if g.index >= 0]
        return [g for g in listed if g.confirmed] + [g for g in listed if not g.confirmed]

    def primary(self):
        """Return the primary guards (guard-spec 4.4)."""
        return self._order()[: self._param("guard-n-primary-guards", 3, 1)]

    def pick(self, accept=lambda i: True, kind="guards", use=1):
        """Return the Relay to enter by, one whose index `accept` takes (4.6); CircuitError."""
        table, primary = self._weights.table, self.primary()
        fit = [g for g in self._order() if table.flags[g.index] & USABLE and accept(g.index)]
        # Where all are down, the best take turns.
        up = [g for g in fit if not g.down()] or sorted(fit[:3], key=lambda g: g.failed_at)[:1]
        use = self._param("guard-n-primary-%s-to-use" % kind, use, 1)
        best = [g for g in up if g in primary][:use] or up[:1]
        return table.relay(_one_of([g.index for g in best], "entry guard"))

    def failed(self, rsa_id):
        """Note that a guard was not reached, or built no first hop (4.7)."""
        for g in self.sample:
            if g.rsa_id == rsa_id:
                g.failed_at = now()
                g.failing_since = g.failing_since or g.failed_at

    def network_up(self):
        """Note that a relay answered: what failed in a long silence is tried again (4.8)."""
        silence = self._param("guard-internet-likely-down-interval", 600, 1)
        for g in self.sample:
            if g.failed_at > self.online and now() > self.online + silence:
                g.failed_at = 0
        self.online = now()

    def succeeded(self, rsa_id):
        """Note that a circuit was built through a guard (4.8).

        False: close it and try another path, as better guards may be up again.
        """
        self.network_up()
        primary = self.primary()
        for g in self.sample:
            if g.rsa_id == rsa_id:
                g.failed_at = g.failing_since = 0
                if g not in primary and [p for p in primary if p.failing_since and not p.down()]:
                    return False
                if not g.confirmed:
                    g.confirmed = 1
                    g.until = max(g.until, self._until("confirmed-min-lifetime", 60))
                    self._save()
        return True


class PathSelector(Weights):
    """Chooses paths: lists of Relay, from the guard on.  All raise CircuitError."""

    def __init__(self, table, consensus, guards):
        # Layer-2 guards, {RSA identity: when to replace it}: only in memory, as in tor.
        self.guards, self.layer_two = guards, {}
        self.update(table, consensus)

    def update(self, table, consensus):
        """Use a new table and consensus."""
        Weights.__init__(self, table, consensus)
        self.guards.update(self)

    def directory_guard(self):
        """Return the Relay for a one-hop directory circuit."""
        return self.guards.pick(kind="dir-guards", use=3)

    def exit_path(self, port=None):
        """Return guard, middle and an exit that allows `port` (None: one to resolve names)."""
        table = self.table
        allows = (lambda i: table.exit_allows(i, port)) if port else table.exits
        # tor's LongLivedPorts, roughly.
        stable = 0 if port in (80, 443) else STABLE
        last = self.pick("exit", allows, stable)
        return self._path([last], ("middle",), stable) + [table.relay(last)]

    def onion_path(self, purpose, target=None, exclude=()):
        """Return guard, layer-2 guard, middle and `target` (anything with an `rsa_id`).

        `target` None: for "rend", the third hop is the rendezvous point; for "intro", one is
        chosen whose RSA identity is not in `exclude`.
        """
        table = self.table
        if target is None and purpose == "intro":
            i = self.pick(purpose, lambda i: table.rsa_id(i) not in exclude, STABLE)
            target = table.relay(i)
        known = table.find(target.rsa_id) if target else -1
        lite = self.param("vanguards-lite-enabled", 1, 0, 1)
        roles = "layer 2" if lite else "middle", "middle" if target else purpose
        path = self._path([known] if known >= 0 else [], roles, STABLE, lite)
        return path + [target] if target else path

    def _path(self, used, roles, stable, lite=0):
        # A guard, and relays for `roles`.  Behind vanguards only A-B-A is kept out, as in
        # tor: to avoid their families, or a guard as target, would tell of them.
        def apart(i):
            return i not in used if lite else all([distinct(self.table, i, j) for j in used])

        path = [self.guards.pick(lambda i: lite or apart(i))]
        for role in roles:
            used.append(path[-1].index)
            pick = self._layer_two if role == "layer 2" else self.pick
            path.append(self.table.relay(pick(role, apart, stable)))
        return path

    def _layer_two(self, role, accept, stable):
        # Each lives for the longer of two times drawn at random.
        p, table, two, t = self.param, self.table, self.layer_two, now()
        for rsa_id in [r for r in two if two[r] <= t or table.find(r) < 0]:
            del two[rsa_id]
        low = p("guard-hs-l2-lifetime-min", 86400, 1)
        span = max(p("guard-hs-l2-lifetime-max", 12 * 86400, 1) - low, 1)
        while len(two) < p("guard-hs-l2-number", 4, 1, 19):
            i = self.pick("middle", lambda i: table.rsa_id(i) not in two, stable)
            two[table.rsa_id(i)] = t + 1 + low + max(randbelow(span), randbelow(span))
        left = [i for i in map(table.find, two) if accept(i) and table.flags[i] & USABLE]
        doubts = self.doubtful()
        return _one_of([i for i in left if i not in doubts] or left, role)


# === 13. Directory client ===================================================
# Which network this is; its directory, fetched over OR ports by BEGIN_DIR, checked, cached
# and refreshed (dir-spec 4 and 5).

# Of tor 0.4.9.11: nickname, OR port, v3 identity; address, RSA identity.
_AUTHORITIES = """
moria1 9201 F533C81CEF0BC0267857C99B2F471ADF249FA232
128.31.0.39 1A25C6358DB91342AA51720A5038B72742732498
tor26 443 2F3DF9CA0E5D36F2685A2DA67184EB8DCB8CBA8C
217.196.147.77 FAA4BCA4A6AC0FB4CA2F8AD5A11D9E122BA894F6
dizum 443 E8A9C45EDE6D711294FADF8E7951F4DE6CA56B58
45.66.35.11 7EA6EAD6FD83083C538F44038BBFA077587DD755
gabelmoo 443 ED03BB616EB2F60BEC80151114BB25CEF515B226
131.188.40.189 F2044413DAC2E02E3D6BCF4735A19BCA1DE97281
dannenberg 443 0232AF901C31A04EE9848595AF9BB7620D4C5B2E
193.23.244.244 7BE683E65D48141321C5ED92F075C55364AC7123
maatuska 80 49015F787433103580E3B66A1707A00E60F2D15B
171.25.193.9 BD6A829255CB08E66FBE7D3748363586E46B3810
longclaw 443 23D15D965BC35114467363C165C4F724B64B4F66
199.58.81.140 74A910646BCEEFBCD2E874FC1DC997430F968145
bastet 443 27102BC123E7AF1D4741AE047E160C91ADC76B21
204.13.164.118 24E2F139121D4394C54B5BCC368B3B411857C413
faravahar 443 70849B868D606BAECFB6128C5E3D782029AA394F
216.218.219.41 E3E42D35F801C9D5AB23584E0025D56FE2B33396
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
    """A Tor network, of torrc lines DirAuthority (with v3ident) and TestingTorNetwork in `text`.

    `authorities`, `fallbacks`: [(RSA identity, address, OR port)]; `identities`: the set of
    the authorities' v3 identities; `testing`; `id`: 32 bytes.  ConfigError names a bad line.
    """

    def __init__(self, text, fallbacks=()):
        self.authorities, self.fallbacks = [], fallbacks
        self.identities, self.testing = set(), False
        for line in text.split("\n"):
            line = line.split("#")[0].strip()
            word = line.split() or [""]
            try:
                if word[0].lower() == "testingtornetwork":
                    self.testing = word[1] == "1"
                elif word[0].lower() == "dirauthority" and "v3ident=" in line:
                    options = dict([w.split("=") for w in word if "=" in w])
                    at = [":" in w and "=" not in w for w in word].index(True)
                    ids = options["v3ident"], "".join(word[at + 1 :])
                    identity, rsa_id = [binascii.unhexlify(i) for i in ids]
                    if len(identity) != 20 or len(rsa_id) != 20:
                        raise ValueError
                    place = word[at].split(":")[0], int(options["orport"])
                    self.authorities.append((rsa_id,) + place)
                    self.identities.add(identity)
            except (ValueError, KeyError, IndexError):
                raise ConfigError("bad line in the network file: %s" % line)
        if not self.authorities:
            raise ConfigError("the network file has no DirAuthority with a v3ident")
        self.id = sha256(b"".join(sorted(self.identities)))


def load_network(path=None):
    """Return the Network that the file `path` describes (ConfigError); None: the public one."""
    if path is not None:
        try:
            with open(path, "rb") as f:
                return Network(f.read().decode())
        except (OSError, UnicodeError) as e:
            raise ConfigError("cannot read the network file %s: %s" % (path, e))
    word, packed, fallbacks = _AUTHORITIES.split(), binascii.a2b_base64(_FALLBACKS), []
    for at in range(0, len(packed), 26):
        address, port, rsa_id = struct.unpack_from(">4sH20s", packed, at)
        fallbacks.append((rsa_id, "%d.%d.%d.%d" % tuple(address), port))
    line = "DirAuthority %s orport=%s v3ident=%s %s: %s"
    lines = [line % tuple(word[i : i + 5]) for i in range(0, len(word), 5)]
    return Network("\n".join(lines), fallbacks)


class _Identity:
    eof, unused_data = True, b""

    def decompress(self, data, size):
        return data


# Content-Encodings (dir-spec 6.1).
if MICROPYTHON:
    _DECODERS = {"identity": _Identity}
else:
    import lzma
    import zlib

    _DECODERS = {
        "x-tor-lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, 16 << 20),
        "deflate": zlib.decompressobj,
        "identity": _Identity,
    }


async def http_request(stream, method, path, body=b"", limit=65536, sink=None):
    """Make a request over a directory stream, and return (status, body); TorErrors.

    The body may have `limit` bytes.  With `sink`, a function, it may come compressed, and
    goes there piece by piece if the status is 200.
    """
    head = "%s %s HTTP/1.0\r\n" % (method, path)
    if sink:
        head += "Accept-Encoding: %s\r\n" % ", ".join(_DECODERS)
    if body:
        head += "Content-Length: %d\r\n" % len(body)
    stream.write((head + "\r\n").encode() + body)
    await stream.drain()
    try:
        lines = (await stream.readuntil(b"\r\n\r\n", 8192)).decode().lower().split("\r\n")
        status = int(lines[0].split(" ")[1])
        fields = [line.partition(":") for line in lines]
        fields = {name: value.strip() for name, _, value in fields}
        make = _DECODERS[fields.get("content-encoding", "identity")]
        missing = int(fields.get("content-length", -1))
    except (ValueError, KeyError, IndexError, EOFError):
        raise ProtocolError("the directory's answer is no HTTP")
    decoder, more, pieces = None, False, []
    keep = sink if sink and status == 200 else pieces.append
    while data := await stream.read(65536):
        missing -= len(data)
        while data or more:
            decoder = decoder or make()
            try:
                piece = decoder.decompress(data, 65536)
            except Exception as e:
                raise ProtocolError("bad compressed data: %s" % e)
            more = len(piece) == 65536 and not decoder.eof
            data = getattr(decoder, "unconsumed_tail", b"")
            if decoder.eof:
                # Another may follow.
                decoder, data = None, decoder.unused_data
            limit -= len(piece)
            if limit < 0:
                raise ProtocolError("the directory's answer is too long")
            keep(piece)
    if decoder or missing and "content-length" in fields:
        raise ProtocolError("the directory's answer is cut off")
    return status, b"".join(pieces)


_CONNECT_SECONDS, _FETCH_SECONDS = 15, 600 if MICROPYTHON else 120


async def directory_request(circuit, path, limit, sink=None, body=b"", seconds=None):
    """Ask the directory at the end of `circuit`, as http_request does: the body; TorErrors."""
    stream = await circuit.open_stream(RELAY_BEGIN_DIR, b"", _CONNECT_SECONDS)
    try:
        asking = http_request(stream, "POST" if body else "GET", path, body, limit, sink)
        status, body = await asyncio.wait_for(asking, seconds or _FETCH_SECONDS)
    except asyncio.TimeoutError:
        raise DirectoryError("the directory is too slow")
    finally:
        stream.close()
    if status != 200:
        raise DirectoryError("the directory answered with status %d" % status)
    return body


_BATCH, _WORKERS = (16, 1) if MICROPYTHON else (92, 3)
# The next directory is tried when one has not answered for so long; the least time between
# two consensuses, whatever stands in them.
_HEDGE_SECONDS, _PAUSE_SECONDS, _TRIES = 5, 5, 4
# Tag and summary, in tor's words.
_PHASES = {
    5: "conn Connecting to a relay",
    10: "conn_done Connected to a relay",
    14: "handshake Handshaking with a relay",
    15: "handshake_done Handshake with a relay done",
    20: "onehop_create Establishing an encrypted directory connection",
    25: "requesting_status Asking for networkstatus consensus",
    30: "loading_status Loading networkstatus consensus",
    40: "loading_keys Loading authority key certs",
    45: "requesting_descriptors Asking for relay descriptors",
    50: "loading_descriptors Loading relay descriptors",
    75: "enough_dirinfo Loaded enough directory info to build circuits",
}


class Directory:
    """The directory of a network: `table` and `consensus`, from `bootstrap()` on.

    To be set: `on_update()`, called when these have changed; `directory_relay()`, the Relay
    (a directory guard) to ask; `directory_failed(rsa_id)`, called when one is not reached.
    """

    def __init__(self, network, data_dir, channels, progress):
        self.network, self._channels, self._progress = network, channels, progress
        self._path = data_dir + "/relays"
        self.table = self.consensus = self.directory_relay = None
        self.on_update, self.directory_failed = lambda: None, lambda rsa_id: None
        self._certs, self._percent, self._failures = {}, 0, 0

    def _report(self, percent):
        if percent > self._percent:
            self._percent = percent
            self._progress(percent, *_PHASES.get(percent, _PHASES[50]).split(" ", 1))

    async def bootstrap(self):
        """Return when circuits can be built; DirectoryError, ClockError, ConfigError."""
        cached = load_table(self._path, self.network.id)
        if cached:
            # Even if it is too old, most microdescriptors in it are still good.
            self.table = cached[0]
            try:
                cached[1].check_times(now())
                self.consensus = cached[1]
                return await self._fill(*cached)
            except (DirectoryError, ClockError) as e:
                log(INFO, "Not using the cached directory: %s", e)
        await self._fill(*await self._ask(self._consensus_from))

    async def refresh(self):
        """Keep the directory fresh, for ever (dir-spec 5.1)."""
        delay = 0
        while True:
            try:
                await self._fill(self.table, self.consensus, True)
                when = self._next_time()
                await asyncio.sleep(_PAUSE_SECONDS)
                while now() < when:
                    await asyncio.sleep(min(when - now(), 60))
                table, consensus = await self._ask(self._consensus_from)
                if consensus.valid_after <= self.consensus.valid_after:
                    raise DirectoryError("there is no newer consensus")
                await self._fill(table, consensus)
                delay = 0
            except TorError as e:
                log(NOTICE, "The directory could not be refreshed: %s", e)
                self._failures = 0
                delay = min(delay * 2 or (2 if self.network.testing else 30), 3600)
                await asyncio.sleep(delay + randbelow(delay))

    def _next_time(self):
        # As tor's update_consensus_networkstatus_fetch_time_impl.
        c = self.consensus
        start = c.fresh_until + (c.fresh_until - c.valid_after) * 3 // 4
        span = max((c.valid_until - start) * 7 // 8, 1)
        return min(start, c.valid_until - span - 1) + randbelow(span)

    def _source(self):
        # Fallback mirrors come before authorities, directory guards before both.
        if self.directory_relay and self._failures < 2 * _TRIES:
            relay = self.directory_relay()
            return relay.rsa_id, relay.address, relay.port
        places = self._failures < 3 * _TRIES and self.network.fallbacks
        places = places or self.network.authorities
        return places[randbelow(len(places))]

    async def _circuit(self):
        # A one-hop circuit to the first of several directories that answers.
        found, error = Promise(), None

        async def attempt():
            nonlocal error
            rsa_id = None
            try:
                rsa_id, address, port = self._source()
                self._report(5)
                get = self._channels.get(address, port, rsa_id, None, _CONNECT_SECONDS)
                circuit = Circuit(await get)
                for percent in (10, 14, 15, 20):
                    self._report(percent)
                await circuit.extend(None, _CONNECT_SECONDS)
                if found.done():
                    circuit.close()
                found.set(circuit)
            except TorError as e:
                error = e
                self._failures += 1
                self.directory_failed(rsa_id)
            over.set()

        for _ in range(4 * _TRIES):
            over = Promise()
            spawn(attempt())
            try:
                await over.wait(_HEDGE_SECONDS)
            except asyncio.TimeoutError:
                pass
            if found.done():
                break
        found.fail(DirectoryError("no directory can be reached: %s" % error))
        return await found.wait()

    async def _ask(self, use, *args):
        # What `use(circuit, *args)` returns with the first of several directories that serves.
        for _ in range(3 * _TRIES):
            circuit = await self._circuit()
            try:
                result = await use(circuit, *args)
                self._failures = 0
                return result
            except (ProtocolError, DirectoryError, CircuitError, StreamError) as e:
                error = e
                self._failures += 1
                log(INFO, "Leaving the directory of %s: %s", circuit, e)
            finally:
                circuit.close()
        raise DirectoryError("no directory gave what can be used: %s" % error)

    async def _consensus_from(self, circuit):
        # A new RelayTable and its Consensus, verified.
        identities, table, text = self.network.identities, RelayTable(), []
        parser = ConsensusParser(identities, table)

        def sink(piece):
            self._report(30)
            parser.feed(piece)

        self._report(25)
        # A mirror answers only if more than half of these signed what it has.
        path = "/tor/status-vote/current/consensus-microdesc/"
        path += "+".join([hexlify(i[:3]) for i in sorted(identities)]).upper()
        await directory_request(circuit, path, 32 << 20, sink)
        consensus = parser.finish()
        # The certificates are judged by the consensus's time, and that by the clock.
        when = consensus.valid_after
        missing = consensus.missing_certs(self._certs, when)
        if missing:
            self._report(40)
            path = "/tor/keys/fp-sk/"
            path += "+".join(["%s-%s" % (hexlify(i), hexlify(k)) for i, k in missing]).upper()
            try:
                await directory_request(circuit, path, 128 << 10, text.append)
                self._certs.update(parse_authority_certs(b"".join(text), identities))
            except DirectoryError as e:
                log(INFO, "Authority certificates are missing: %s", e)
        consensus.verify(self._certs, identities, when)
        try:
            consensus.check_times(now())
        except DirectoryError:
            # Whose clock is wrong?  Authorities alone are believed, and asked next.
            self._failures, channel = 3 * _TRIES, circuit.channel
            known = channel.rsa_id in [a[0] for a in self.network.authorities]
            if known and abs(channel.skew) > 3600:
                skew = -channel.skew // 60
                raise ClockError("the clock of this machine is wrong by %+d minutes" % skew)
            raise
        return table, consensus

    async def _fill(self, table, consensus, whole=False):
        # Fetch the microdescriptors, enough of them or all; then use the table.
        changed = table is not self.table
        if changed and self.table:
            table.carry_over(self.table)
        table.use_family_lists = consensus.param("use-family-lists", 1, 0, 1)
        table.use_family_ids = consensus.param("use-family-ids", 1, 0, 1)
        weights = Weights(table, consensus)
        least = consensus.param("min_paths_for_circs_pct", 60, 25, 95)
        until = 101 if whole else least
        for _ in range(3):
            if weights.percent() >= until or next(table.missing(), None) is None:
                break
            changed = True
            self._report(45)
            args = self._microdescs_from, weights, until, table.missing()
            try:
                await asyncio.gather(*[self._ask(*args) for _ in range(_WORKERS)])
            except DirectoryError as e:
                log(INFO, "%s", e)
                break
        if weights.percent() < least:
            raise DirectoryError("too few microdescriptors came")
        if changed:
            self.table, self.consensus = table, consensus
            try:
                table.save(self._path, self.network.id, consensus)
            except OSError as e:
                log(WARN, "The directory cannot be stored in %s: %s", self._path, e)
            self.on_update()
        self._report(75)

    async def _microdescs_from(self, circuit, weights, until, queue):
        # Fetch those of `queue` until `until` percent of paths can be built.
        table = weights.table

        def sink(md):
            i = wanted.pop(md.digest, None)
            if i is not None:
                table.set_microdesc(i, md)

        for count in range(len(table)):
            if count % 8 == 0:
                percent = weights.percent()
                if percent >= until:
                    break
                self._report(50 + 24 * percent // until)
            wanted = {digest: i for _, (i, digest) in zip(range(_BATCH), queue)}
            if not wanted:
                break
            path = "/tor/micro/d/" + "-".join([b64encode(digest) for digest in wanted])
            parser = MicrodescParser(sink)
            await directory_request(circuit, path, 8 << 20, parser.feed)
            parser.finish()


# === 13b. Circuits for every purpose ===
# Trying again, sharing, keeping some ready, closing what is idle.

BUILD_SECONDS = 20
DIRTY_MS = 600000  # tor's MaxCircuitDirtiness
SPARES = 0 if MICROPYTHON else 2


def is_dirty(circuit):
    """Tell whether `circuit`, in use `since` then, gets no new stream."""
    return circuit.closed or ticks_diff(ticks_ms(), circuit.since) > DIRTY_MS


async def close_idle(circuit):
    """Wait for the end of `circuit`; close it once it is dirty and carries no stream."""
    while not circuit.closed:
        try:
            await circuit.closing.wait(30)
        except asyncio.TimeoutError:
            if is_dirty(circuit) and not circuit.streams:
                circuit.close()


async def shared(circuits, name, make, fits=lambda circuit: False):
    """Return the circuit `name` of {name: Promise}, or one that `fits`, or what `make()` gives."""
    for other, promise in list(circuits.items()):
        circuit = promise.get()
        if is_dirty(circuit) if circuit else promise.done():
            del circuits[other]
        elif other == name or circuit and fits(circuit):
            return await promise.wait()
    promise = circuits[name] = Promise()

    async def keep():
        try:
            promise.set(await make())
            await close_idle(promise.get())
        except TorError as e:
            promise.fail(e)
        finally:
            promise.fail(CircuitError("given up"))

    spawn(keep())
    return await promise.wait()


class TorCore:
    """Directory, paths and circuits of an AsyncTor, which has the arguments."""

    def __init__(self, data_dir, network, progress):
        self.data_dir, self.channels = data_dir, Channels()
        self.progress, network = progress or (lambda *_: None), load_network(network)
        self.directory = Directory(network, data_dir, self.channels, self.progress)
        self.updates = 0  # of the directory
        self.descriptors, self.onion_circuits, self._exits = {}, {}, {}
        self._spares, self._tasks = [], []

    async def bootstrap(self):
        """Get the directory and a first circuit; from then on keep both fresh."""
        directory = self.directory
        await directory.bootstrap()
        guards = Guards(self.data_dir + "/guards.json")
        self.paths = PathSelector(directory.table, directory.consensus, guards)
        directory.on_update, directory.directory_failed = self._update, guards.failed
        directory.directory_relay = self.paths.directory_guard
        self.progress(95, "circuit_create", "Establishing a Tor circuit")
        self._spares = [await self.circuit_to()]
        self._tasks = [spawn(directory.refresh()), spawn(self._keep_spares())]
        self.progress(100, "done", "Done")

    def _update(self):
        self.updates += 1
        self.paths.update(self.directory.table, self.directory.consensus)

    async def aclose(self):
        for task in self._tasks:
            task.cancel()
        self.channels.close()
        await asyncio.sleep(0.05)  # what is queued goes out, as DESTROY

    async def circuit_to(self, target=None, attempts=None, choose=None):
        """Return a circuit of three hops and `target`, or one along `choose()`; CircuitError."""
        if target and is_private(target.address) and not self.directory.network.testing:
            raise CircuitError("a relay with a private address: " + target.address)
        guards = self.paths.guards
        attempts = attempts or (3 if target else 6)  # a target may be down for good
        for _ in range(attempts):
            circuit = None if choose else self._spare(target)
            if circuit:
                path = circuit.path + ([target] if target else [])
            else:
                path = choose() if choose else self.paths.onion_path("rend", target)
            try:
                if not circuit:
                    hop = path[0]
                    channel = await self.channels.get(hop.address, hop.port, hop.rsa_id, hop.ed_id)
                    circuit = Circuit(channel, self.paths.param("circwindow", 1000, 100, 1000))
                circuit.since = ticks_ms()
                for hop in path[len(circuit.path) :]:
                    await circuit.extend(hop, BUILD_SECONDS)
                    if len(circuit.path) == 1 and not guards.succeeded(hop.rsa_id):
                        raise CircuitError("better guards may be up again")
                return circuit
            except BaseException as e:
                n = len(circuit.path) if circuit else 0
                if circuit:
                    circuit.close()
                if not isinstance(e, (ChannelError, CircuitError)):
                    raise
                (self.paths if n else guards).failed(path[n].rsa_id)
                error = e
                log(INFO, "a circuit failed: %s", e)
        raise CircuitError("no circuit in %d attempts: %s" % (attempts, error))

    def _spare(self, target):
        # Not for A-B-A; but the guard may be the target, as in tor.
        for circuit in list(self._spares):
            self._spares.remove(circuit)
            again = target and target.rsa_id in [r.rsa_id for r in circuit.path[1:]]
            if not again and not is_dirty(circuit):
                return circuit
            circuit.close()

    async def _keep_spares(self):
        choose = lambda: self.paths.onion_path("rend")
        while True:
            try:
                while len(self._spares) < SPARES:
                    self._spares.append(await self.circuit_to(choose=choose))
            except TorError:
                await asyncio.sleep(60)
            await asyncio.sleep(1)

    async def _exit_circuit(self, port):
        table = self.directory.table

        def fits(circuit):
            i = table.find(circuit.path[-1].rsa_id)
            return i >= 0 and table.exit_allows(i, port)

        make = lambda: self.circuit_to(choose=lambda: self.paths.exit_path(port))
        return await shared(self._exits, port, make, fits)


# === 14. Onion client ===
# Descriptor, introduction, rendezvous (rend-spec-v3 2 to 4).

_REND_SECONDS = 40
_MAX_DESCRIPTORS = 8 if MICROPYTHON else 256


def descriptor_place(tor, key, n):
    """Return start, blinding parameter and key, subcredential, directories of period `n`."""
    directory = tor.directory
    table, consensus = directory.table, directory.consensus
    period = time_periods(consensus, directory.network.testing)[n]
    param = blinding_param(key, period)
    blinded = ed25519_blind_public(key, param)
    ring = [table.relay(i) for i in hsdir_ring(table, consensus, blinded, period, n < 2)]
    return period[3], param, blinded, subcredential(key, blinded), ring


async def hsdir_request(tor, relay, path, body=b""):
    """Return the body of an onion-service directory's answer."""
    circuit = await tor.circuit_to(relay)
    try:
        return await directory_request(circuit, path, 50000, None, body, 30)
    finally:
        circuit.close()


async def _try_each(items, use, kind, text):
    # What `use(item)` returns for the first of `items`, at random, that works.
    error = "none is known"
    for item in sorted(items, key=lambda _: randbelow(1 << 30)):
        try:
            return await use(item)
        except TorError as e:
            error = e
            log(INFO, "trying another: %s", e)
    raise kind("%s %s" % (text, error))


async def _find_descriptor(tor, key):
    found, text = tor.descriptors.get(key), "no descriptor of %s: is it right, and up?"
    if found and now() < found.until:
        return found
    _, _, blinded, subcred, ring = descriptor_place(tor, key, 2)

    async def fetch(relay):
        text = await hsdir_request(tor, relay, "/tor/hs/3/" + b64encode(blinded))
        return parse_descriptor(text, blinded, subcred, now())

    found = await _try_each(ring, fetch, DescriptorError, text % onion_address(key))
    found.subcred, found.until = subcred, now() + found.lifetime
    if len(tor.descriptors) >= _MAX_DESCRIPTORS:
        tor.descriptors.clear()
    tor.descriptors[key] = found
    return found


async def _introduce(tor, descriptor, intro):
    circuits, cookie = [await tor.circuit_to()], urandom(20)
    rend = circuits[0]
    try:
        established = rend.expect(RELAY_RENDEZVOUS_ESTABLISHED)
        rend.send(RELAY_ESTABLISH_RENDEZVOUS, 0, cookie)
        circuits.append(await tor.circuit_to(intro))
        await established.wait(BUILD_SECONDS)
        if rend.closed:
            raise rend.closing.get()
        # A message is taken only where it is expected, and once: RENDEZVOUS2 not before
        # INTRODUCE1 is on its way, with keys bound to it (bug 41297).
        vegas = congestion_control(tor.paths.param, descriptor.flow)
        subcred = descriptor.subcred
        state, body = hs_ntor_client_intro(intro, subcred, cookie, rend.path[-1], vegas)
        joined, answer = rend.expect(RELAY_RENDEZVOUS2), RELAY_INTRODUCE_ACK
        ack = await circuits[1].ask(RELAY_INTRODUCE1, body, answer, BUILD_SECONDS)
        require(ack[:2] == b"\0\0", "an introduction point refused: " + hexlify(ack[:2]))
        keys = hs_ntor_client_finish(state, await joined.wait(_REND_SECONDS))
        rend.add_onion_hop(keys, False, vegas)
        return circuits.pop(0)
    except asyncio.TimeoutError:
        raise OnionError("nothing came from the rendezvous point")
    finally:
        for circuit in circuits:
            circuit.close()


async def _meet(tor, key):
    # A service that lost relays publishes anew within seconds.
    end, pause = now() + _REND_SECONDS, 0
    while True:
        descriptor = await _find_descriptor(tor, key)
        text = "%s cannot be reached, is it up?" % onion_address(key)
        use = lambda intro: _introduce(tor, descriptor, intro)
        try:
            return await _try_each(descriptor.intro_points, use, OnionError, text)
        except OnionError:
            descriptor.until = 0
            if now() > end:
                raise
        await asyncio.sleep(pause)
        pause = 3


async def onion_circuit(tor, key):
    """Return a circuit to the service with the identity `key`, shared; OnionError."""
    circuit = await shared(tor.onion_circuits, key, lambda: _meet(tor, key))
    circuit.since = ticks_ms()  # as in tor: a new one would be dear
    return circuit


# === 15. Onion service ===
# Introduction points, publishing, introductions, streams (rend-spec-v3 2 to 4).

INTRO_POINTS = 3
# Introductions in a second; tasks, about one a circuit; streams on one; uploads at once.
_RATE, _MAX_TASKS, _MAX_STREAMS, _UPLOADS = (2, 14, 8, 1) if MICROPYTHON else (25, 1024, 512, 4)
# An introduction point lives for once or twice as many: this bounds memory, too.
_INTRODUCTIONS = 512 if MICROPYTHON else 16384


def load_service_key(key_dir):
    """Return (expanded secret key, public key) of a HiddenServiceDir, made if it has none."""
    path, head = key_dir + "/hs_ed25519_", b"== ed25519v1-%s: type0 ==\0\0\0"
    try:
        private_dir(key_dir)
        if "hs_ed25519_secret_key" not in os.listdir(key_dir):
            write_file(path + "secret_key", head % b"secret" + ed25519_expand(urandom(32)))
        data = read_file(path + "secret_key") or b""
        if len(data) != 96 or data[:32] != head % b"secret":
            raise ConfigError("%ssecret_key cannot be read, or is no key of version 3" % path)
        public = ed25519_public_expanded(data[32:])
        write_file(path + "public_key", head % b"public" + public)
        write_file(key_dir + "/hostname", onion_address(public).encode() + b"\n")
    except OSError as e:
        raise ConfigError("the folder %s cannot hold a key: %s" % (key_dir, e))
    return data[32:], public


class OnionService:
    """See create_onion_service.  `rate`: introductions in a second, eight times that in a burst."""

    def __init__(self, tor, key_dir, ports):
        self.tor, self.key_dir, self.ports = tor, key_dir, {}
        for port, target in ports.items():
            if isinstance(target, int):
                target = "127.0.0.1", target
            unix = not MICROPYTHON and isinstance(target, str) and target.startswith("unix:")
            if not (unix or callable(target) or isinstance(target, tuple) and len(target) == 2):
                raise ConfigError("%r is no target for an onion service" % (target,))
            self.ports[port] = target
        self._esk, self.key = load_service_key(key_dir)
        self.address, self.rate = onion_address(self.key), _RATE
        self.intros, self.circuits, self._tasks, self._launched = [], [], [], [0] * 10
        # `_tokens`: introductions that may be answered now; `_shown`: published auth_keys.
        self._tokens, self._shown, self._periods, self._published = 8 * _RATE, (), (), Promise()

    async def start(self):
        """Return when the descriptors were published."""
        self._tasks = [spawn(self._keep_intros()), spawn(self._keep_published())]
        await self._published.wait()

    async def close(self):
        """Take the service down."""
        if self in self.tor.services:
            self.tor.services.remove(self)
        for task in self._tasks:
            task.cancel()
        for circuit in list(self.circuits):
            circuit.close()
        self._published.fail(OnionError("the service was closed"))

    def _over(self, intro):
        listed = self.tor.directory.table.find(intro.rsa_id) >= 0
        return not listed or now() > intro.until or intro.left <= 0

    async def _keep_intros(self):
        while True:
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tokens = min(self._tokens + self.rate, 8 * self.rate)
            try:
                while len([i for i in self.intros if not self._over(i)]) < INTRO_POINTS:
                    self._add_intro()
            except TorError as e:
                log(WARN, "no introduction point for %s: %s", self.address, e)
                await asyncio.sleep(10)
            await asyncio.sleep(1)

    def _add_intro(self):
        table, pick = self.tor.directory.table, self.tor.paths.pick
        used = [table.find(i.rsa_id) for i in self.intros]
        apart = lambda i: all([j < 0 or distinct(table, i, j) for j in used])
        intro = table.relay(pick("intro", apart, STABLE))
        intro.seed, intro.ready, intro.cookies = urandom(32), False, set()
        intro.auth_key = ed25519_public(intro.seed)
        intro.b, intro.enc_key = x25519_keypair()
        intro.until = now() + 64800 + randbelow(21600)
        intro.left = _INTRODUCTIONS + randbelow(_INTRODUCTIONS)
        self.intros.append(intro)
        self._tasks.append(spawn(self._keep_intro(intro)))

    async def _keep_intro(self, intro):
        circuit, answer = None, RELAY_INTRO_ESTABLISHED
        try:
            # As tor: again three times, but not eleven circuits in five minutes.
            for _ in range(4):
                while 0 <= now() - self._launched[0] < 300:
                    await asyncio.sleep(1)
                self._launched = self._launched[1:] + [now()]
                circuit = await self.tor.circuit_to(intro)
                circuit.on_control[RELAY_INTRODUCE2] = lambda body: self._introduced(intro, body)
                message = establish_intro(intro.seed, intro.auth_key, circuit.kh)
                await circuit.ask(RELAY_ESTABLISH_INTRO, message, answer, BUILD_SECONDS)
                intro.ready = True
                # It stays until the descriptor names another.
                while not circuit.closed and (
                    intro.auth_key in self._shown or not self._over(intro)
                ):
                    await asyncio.sleep(1)
                intro.ready = False
                if self._over(intro):
                    break
        except TorError as e:
            log(INFO, "introduction point lost: %s", e)
        finally:
            self.intros.remove(intro)
            if circuit:
                circuit.close()

    async def _keep_published(self):
        # `due`: when a directory wants this `state` of a descriptor.
        waited, updates, state, due = 0, None, None, {}
        while True:
            await asyncio.sleep(1)
            ready = sorted([i for i in self.intros if i.ready], key=self._over)[:INTRO_POINTS]
            # All are waited for, for a while.
            waited = waited + 1 if len(ready) < INTRO_POINTS else 0
            if not ready or 0 < waited < 30:
                continue
            old, state = state, set([i.auth_key for i in ready])
            due = due if state == old else {}
            try:
                if updates != self.tor.updates:
                    self._periods = [descriptor_place(self.tor, self.key, n) for n in (0, 1)]
                    updates = self.tor.updates
                for period in self._periods:
                    await self._publish(ready, due, *period)
            except MemoryError:
                pass  # again in 20 seconds
            if [t for t in due.values() if t > now() + 20]:
                self._shown = state
                self._published.set()
            else:
                log(WARN, "the descriptors of %s could not be published", self.address)
                await asyncio.sleep(20)

    async def _publish(self, intros, due, start, param, blinded, subcred, ring):
        t, tor = now(), self.tor
        todo = [relay for relay in ring if due.get(blinded + relay.rsa_id, 0) < t]
        for relay in todo:
            due[blinded + relay.rsa_id] = t + 20

        async def upload(relay):
            try:
                await hsdir_request(tor, relay, "/tor/hs/3/publish", text)
                due[blinded + relay.rsa_id] = t + 3600 + randbelow(3600)  # as tor
            except TorError as e:
                log(INFO, "a descriptor was not uploaded: %s", e)

        if todo:
            esk = ed25519_blind_secret(self._esk, param)
            revision, flow = revision_counter(esk, t - start), sendme_increment(tor.paths.param)
            text = make_descriptor(esk, blinded, subcred, revision, intros, t, flow)
        while todo:
            await asyncio.gather(*[upload(relay) for relay in todo[:_UPLOADS]])
            todo = todo[_UPLOADS:]

    def _introduced(self, intro, body):
        full = len(self._tasks) >= _MAX_TASKS
        idle = [c for c in self.circuits if full and not c.streams]
        if not self._tokens or intro.left < -_INTRODUCTIONS or full and not idle:
            return log(INFO, "an introduction is dropped: too many")
        if full:
            idle[0].close()
        self._tokens -= 1
        self._tasks.append(spawn(self._answer(intro, body)))

    async def _answer(self, intro, body):
        # Meet the client at the rendezvous point of INTRODUCE2 (3.3, 4).
        subcreds, param = [period[3] for period in self._periods], self.tor.paths.param
        try:
            target, cookie, answer, keys = hs_ntor_service(intro, intro.b, subcreds, body)
            used = [i for i in self.intros if cookie in i.cookies]
            require(not used, "its rendezvous cookie was used before")
            intro.cookies.add(cookie)
            intro.left -= 1
            attempts = param("hs_service_max_rdv_failures", 2, 1, 10)
            circuit = await self.tor.circuit_to(target, attempts)
            circuit.send(RELAY_RENDEZVOUS1, 0, answer)
            circuit.add_onion_hop(keys, True, congestion_control(param, target.flow))
        except TorError as e:
            return log(INFO, "an introduction came to nothing: %s", e)
        circuit.on_begin = self._begin
        self.circuits.append(circuit)
        await close_idle(circuit)
        self.circuits.remove(circuit)

    async def _begin(self, stream, host, port):
        circuit, target = stream.circuit, self.ports.get(port)
        circuit.since = ticks_ms()
        if target is None:
            # No second guess.  DESTROY waits, or overtakes END.
            circuit.on_begin = None
            stream.send_end(END_DONE)
            await asyncio.sleep(0.2)
            return circuit.close()
        if len(circuit.streams) > _MAX_STREAMS:
            return stream.send_end(END_RESOURCELIMIT)
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
            severity = INFO if isinstance(e, (TorError, EOFError)) else WARN
            log(severity, "what port %d leads to failed: %s: %s", port, type(e).__name__, e)
            return stream.send_end(END_CONNECTREFUSED)
        stream.accept()
        await pump(stream, reader, writer)


# === 16. Tor ===
# What programs use.


def default_data_dir(network=None):
    if network:
        return network + ".minitor"
    if MICROPYTHON:
        return "minitor"
    return (os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) + "/minitor"


def check_target(host, port):
    named = 0 < len(host) < 256 and not host.lower().strip(_BASE32 + "0189-_.:")
    if not named or not isinstance(port, int) or not 0 < port < 65536:
        raise AddressError("no host name in ASCII, no address, or no port: %r:%r" % (host, port))


class AsyncTor(TorCore):
    """Tor for asyncio.  `data_dir`: a folder for state; `network`: a torrc file of another
    Tor network (default $MINITOR_NETWORK); `progress`: function(percent, tag, summary).
    """

    def __init__(self, data_dir=None, network=None, progress=None):
        if network is None and hasattr(os, "getenv"):
            network = os.getenv("MINITOR_NETWORK")
        self.services = []
        TorCore.__init__(self, data_dir or default_data_dir(network), network, progress)

    async def start(self):
        """Get the directory and a circuit; Circuit-, Clock-, Config-, DirectoryError."""
        try:
            private_dir(self.data_dir)
        except OSError as e:
            raise ConfigError("the folder %s cannot be used: %s" % (self.data_dir, e))
        try:
            await self.bootstrap()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def aclose(self):
        """Take the services down, close all circuits and links."""
        for service in list(self.services):
            await service.close()
        await TorCore.aclose(self)

    __aenter__ = start

    async def __aexit__(self, *_):
        await self.aclose()

    async def open_connection(self, host, port, timeout=120):
        """Connect to a name, IP or onion address; return (reader, writer), as asyncio.

        AddressError, CircuitError, OnionError, StreamError, TorTimeout.
        """
        check_target(host, port)
        key, asked = None, (host, port, 1)
        if host.lower().endswith(".onion"):
            key, asked = parse_onion_address(host), ("", port, 0)
        ask = lambda circuit: circuit.open_stream(RELAY_BEGIN, begin(*asked), 30)
        opening = self._on_circuit(ask, port, key)
        try:
            stream = await asyncio.wait_for(opening, timeout)
        except asyncio.TimeoutError:
            raise TorTimeout("connecting to %s took longer than %s s" % (host, timeout))
        except StreamError as e:
            raise StreamError("%s:%d: %s" % (host, port, e), e.reason)
        return stream, stream

    async def resolve(self, host):
        """Return the IP addresses (text) of `host` as an exit sees them; StreamError."""
        check_target(host, 443)
        answers = await self._on_circuit(lambda circuit: circuit.resolve(host), 443)
        addresses = [value for kind, value in answers if kind in (4, 6)]
        if not addresses:
            raise StreamError("the exit finds no address of " + host, 2)
        return addresses

    async def _on_circuit(self, ask, port, key=None):
        # What `ask(circuit)` returns; another circuit, as tor, after these END reasons (6.3).
        again = (END_TIMEOUT,) if key else (1, 2, 4, 5, 7, 8, 9, 11)
        for last in (False, False, True):
            circuit = await (onion_circuit(self, key) if key else self._exit_circuit(port))
            try:
                return await ask(circuit)
            except (CircuitError, StreamError) as e:
                if not circuit.closed and e.reason not in again:
                    raise
                circuit.since -= 2 * DIRTY_MS
                if last:
                    raise

    async def create_onion_service(self, port, target=None, key_dir=None):
        """Host an onion service; return it, with `address` and `close`, once it is reachable.

        `target` of `port`: a local port (default: the same), (host, port), "unix:/path", or a
        coroutine function(reader, writer); for several ports, `port` is {port: target}.
        `key_dir`: as tor's HiddenServiceDir (default: onion_service in `data_dir`).
        """
        ports = port if isinstance(port, dict) else {port: target or port}
        for number in ports:
            check_target("localhost", number)
        key_dir = key_dir or self.data_dir + "/onion_service"
        if key_dir in [service.key_dir for service in self.services]:
            raise ConfigError("a service has the key in %s already: give a key_dir" % key_dir)
        service = OnionService(self, key_dir, ports)
        self.services.append(service)
        try:
            await service.start()
        except BaseException:
            await service.close()
            raise
        return service


if not MICROPYTHON:
    import socket
    import threading
    from concurrent import futures
    from types import SimpleNamespace

    def _http_opener(tor, context):
        # urllib with http and https alone, no proxy, and every connection from `tor`.
        import http.client as http  # slow, and most programs never ask
        import urllib.request as web

        class Link(http.HTTPConnection):
            def connect(self):
                self.sock = tor.create_connection((self.host, self.port), self.timeout)

        class TlsLink(http.HTTPSConnection, Link):
            pass  # HTTPSConnection wraps what Link connects

        errors = web.HTTPErrorProcessor, web.HTTPDefaultErrorHandler, web.UnknownHandler

        class Handler(web.HTTPHandler, web.HTTPSHandler, web.HTTPRedirectHandler, *errors):
            http_open = lambda self, request: self.do_open(Link, request)
            https_open = lambda self, request: self.do_open(TlsLink, request, context=context)

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


class Tor:
    """AsyncTor for programs without asyncio; ready when constructed, any thread may call."""

    def __init__(self, data_dir=None, network=None, progress=None):
        self._tor, self._loop = AsyncTor(data_dir, network, progress), asyncio.new_event_loop()
        self._stop, run = self._loop.create_future(), self._loop.run_until_complete
        self._thread = threading.Thread(target=run, args=(self._main(),), daemon=True)
        self._thread.start()
        try:
            self.run(self._tor.start())
        except BaseException:
            self.close()
            raise

    async def _main(self):
        await self._stop
        await self._tor.aclose()
        # More than once: `wait_for` before Python 3.12 may lose a cancellation.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=0.1)

    def run(self, coroutine):
        """Run `coroutine` in Tor's event loop; return its result."""
        if self._stop.done() or threading.current_thread() is self._thread:
            coroutine.close()
            raise ConfigError("this Tor is closed, or would have to wait for itself")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except futures.CancelledError:
            raise TorError("Tor was closed meanwhile")
        finally:
            future.cancel()  # after Ctrl-C

    def __enter__(self):
        return self

    def close(self, *_):
        """Take the services down, close everything, end the thread."""
        if not self._stop.done():
            self._loop.call_soon_threadsafe(self._stop.set_result, None)
        self._thread.join()
        self._loop.close()

    __exit__ = close

    def resolve(self, host):
        """As AsyncTor.resolve."""
        return self.run(self._tor.resolve(host))

    def create_onion_service(self, port, target=None, key_dir=None):
        """As AsyncTor.create_onion_service; `close` waits, too."""
        service = self.run(self._tor.create_onion_service(port, target, key_dir))
        return SimpleNamespace(address=service.address, close=lambda: self.run(service.close()))

    def create_connection(self, address, timeout=None):
        """Connect to (host, port): a socket.socket, `timeout` its timeout in seconds."""

        async def connect():
            stream, _ = await self._tor.open_connection(*address, timeout)
            end, ours = socket.socketpair()
            spawn(pump(stream, *await asyncio.open_connection(sock=ours)))
            return end

        end = self.run(connect())
        end.settimeout(timeout)
        return end

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


# === 19. Command line ===
# And the web server behind --serve.

OWN_PAGE = """<!doctype html><title>minitor</title><h1>It works.</h1>
<p>This page came from an onion service hosted by minitor, Tor in one Python file.
<p>For something else, <code>minitor.py --serve FOLDER</code> or <code>--serve PORT</code>.
"""


def web_answer(folder, method, path):
    """Return status (and header lines) and body (an open file) of the answer."""
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
        if path[-1:] == "/" and os.path.isfile(at + "index.html"):
            at += "index.html"
        at = os.path.realpath(at)
        # Hidden files stay hidden, so there is no ".." either; a link must not lead outside.
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
        request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        status, body = web_answer(folder, *(request.split() + [b"", b""])[:2])
        with body:
            size = body.seek(0, 2)
            body.seek(0)
            # Neither Date nor Server: they would tell about the clock and the machine.
            head = "HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
            piece = (head % (status, size)).encode()
            while piece:
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 120)
                piece = body.read(min(size, 1 << 16)) if request[:4] != b"HEAD" else b""
                size -= len(piece)
    except (OSError, EOFError, TorError, asyncio.TimeoutError):
        pass
    writer.close()


def serve_target(what):
    """Return create_onion_service's target for --serve's argument; ConfigError."""
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


def run_command(options):
    import shutil

    if options.address:
        data_dir = options.data_dir or default_data_dir(options.network)
        private_dir(data_dir)
        _, key = load_service_key(options.key_dir or data_dir + "/onion_service")
        return print(onion_address(key))
    check_target("localhost", options.port)
    target = options.get or serve_target(options.serve)
    progress = lambda *what: print("Bootstrapped %d%% (%s): %s" % what, file=sys.stderr)
    with Tor(options.data_dir, options.network, progress) as tor:
        if not options.get:
            service = tor.create_onion_service(options.port, target, options.key_dir)
            print(service.address, flush=True)
            return threading.Event().wait()
        with tor.urlopen(options.get) as response:
            with open(options.o or 1, "wb", closefd=bool(options.o)) as out:
                http_call(options.get, shutil.copyfileobj, response, out)
        if response.length:
            raise StreamError("%s: %d bytes are missing" % (options.get, response.length))


def main(argv=None):
    """Run the command line `argv` (default: the program's); return the exit status."""
    import argparse
    import signal

    parser = argparse.ArgumentParser("minitor", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, "minitor: %s (see --help)\n" % message)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--serve", nargs="?", const="", metavar="WHAT",
        help="host a page of its own, PORT, HOST:PORT, unix:/PATH or FOLDER at an onion address")
    add("--get", "--host", metavar="URL", help="fetch a URL or onion address")
    add("--address", action="store_true", help="print the service's address")
    add = parser.add_argument
    add("-o", metavar="FILE", help="where --get writes (standard output)")
    add("--port", type=int, default=80, help="the service's port (80)")
    add("--key-dir", help="the service's key, as tor's HiddenServiceDir")
    add("--data-dir", help="state (~/.local/state/minitor)")
    network = os.environ.get("MINITOR_NETWORK")
    add("--network", default=network, help="another Tor network ($MINITOR_NETWORK)")
    add("-v", action="count", default=0, help="say more")
    add("--version", action="version", version="minitor " + __version__)
    options = parser.parse_args(argv)
    set_log((WARN, INFO, DEBUG)[min(options.v, 2)])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_command(options)
    except KeyboardInterrupt:
        return 130 if options.get else 0
    except Exception as e:
        if options.v > 1:
            print_exception(e)
        print("minitor:", " ".join(str(e).split()), file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
