"""Sections 1 to 3: platform, errors, readers, base32 and base64."""

import os

import minitor
from minitor import ProtocolError, Reader


def refused(function, *args):
    try:
        function(*args)
    except ProtocolError:
        return True
    return False


# Reader.
r = Reader(b"\1\2\3\4\5", "thing")
assert r.uint(1) == 1 and r.uint(2) == 0x203 and r.left() == 2 and r.take(0) == b""
assert refused(r.take, 3) and r.take(2) == b"\4\5" and r.left() == 0 and refused(r.uint, 1)
assert Reader(memoryview(b"abc")).take(2) == b"ab"

# Base64 (RFC 4648, section 10), with and without padding, and what is none.
for plain, text in (
    (b"", ""),
    (b"f", "Zg=="),
    (b"fo", "Zm8="),
    (b"foo", "Zm9v"),
    (b"foob", "Zm9vYg=="),
    (b"fooba", "Zm9vYmE="),
    (b"foobar", "Zm9vYmFy"),
    (b"\xfb\xff\xfe", "+//+"),
):
    assert minitor.b64encode(plain) == text.rstrip("=")
    for form in (text, text.rstrip("=")):
        assert minitor.b64decode(form.encode()) == plain, form
for text in (b"Z", b"Zm9vY", b"Zm9v-", b"Zm 9v", b"Zm9v\n", b"Z=9v", b"Zm9\xc3\xa9", b"Zm9\xff"):
    assert refused(minitor.b64decode, text), text

# Base32 (RFC 4648, section 10), lower case.
assert minitor.b32encode(b"fooba") == "mzxw6ytb"
assert minitor.b32encode(bytes(5)) == "aaaaaaaa"
assert minitor.b32decode("mzxw6ytb") == b"fooba" and refused(minitor.b32decode, "MZXW6YTB")
assert minitor.b32decode("aaaaaaaa") == bytes(5)
data = bytes(range(35))
assert minitor.b32decode(minitor.b32encode(data)) == data
for text in ("mzxw6yt1", "mzxw6yt=", "mzxw6yt\xe9"):
    assert refused(minitor.b32decode, text), text

# Platform.
assert minitor.consteq(b"ab", b"ab") and not minitor.consteq(b"ab", b"ac")
assert not minitor.consteq(b"ab", b"abc")
assert minitor.now() > 1700000000
seen = [0] * 5
for i in range(400):
    seen[minitor.randbelow(5)] += 1
assert min(seen) > 30 and minitor.randbelow(1) == 0
assert 0 <= minitor.randbelow(1 << 64) < 1 << 64
assert len(minitor.urandom(7)) == 7
assert minitor.sha256(b"abc").hex().startswith("ba7816bf8f01cfea414140de5dae2223")
before = minitor.ticks_ms()
assert 0 <= minitor.ticks_diff(minitor.ticks_ms(), before) < 5000

folder = "/tmp/minitor-%s" % minitor.urandom(8).hex()
minitor.private_dir(folder + "/a/b")
path = folder + "/a/b/file"
assert minitor.read_file(path) is None
minitor.write_file(path, b"first")
minitor.write_file(path, b"second")
assert minitor.read_file(path) == b"second" and os.listdir(folder + "/a/b") == ["file"]
minitor.write_file(path, bytearray(b"third"))
assert minitor.read_file(path) == b"third"
os.remove(path)
for name in (folder + "/a/b", folder + "/a", folder):
    os.rmdir(name)

lines = []
minitor.set_log(minitor.INFO, lambda severity, text: lines.append((severity, text)))
minitor.log(minitor.INFO, "%d%%", 45)
minitor.log(minitor.DEBUG, "not this")
minitor.set_log(minitor.NOTICE)
assert lines == [(minitor.INFO, "45%")], lines
for error in (minitor.AddressError, minitor.DescriptorError, minitor.ClockError):
    assert issubclass(error, minitor.TorError)
assert minitor.StreamError("text", 6).reason == 6 and str(minitor.CircuitError("text")) == "text"


async def promises():
    first, second, third = minitor.Promise(), minitor.Promise(), minitor.Promise()

    async def work():
        first.set(1)
        first.set(2)
        second.set(error=minitor.CircuitError("gone", 3))
        assert second.done()

    minitor.spawn(work())
    assert await first.wait(5) == 1 and await first.wait() == 1
    try:
        await second.wait(5)
        raise AssertionError
    except minitor.CircuitError as e:
        assert e.reason == 3
    try:
        await third.wait(0.05)
        raise AssertionError
    except minitor.asyncio.TimeoutError:
        pass


minitor.asyncio.run(promises())
print("ok")
