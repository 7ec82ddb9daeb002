"""Section 4's hashes, as CPython and as MicroPython get them."""

import hashlib
import hmac
import os
import random
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import minitor


def for_micropython():
    """Return the names of section 4 as they are on MicroPython."""
    source = Path(minitor.__file__).read_text()
    section = source[source.index("# === 4. ") : source.index("# === 5. ")]
    names = dict(vars(minitor), MICROPYTHON=True)
    exec(compile(section, "section 4", "exec"), names)
    assert names["Sha1"] is not hashlib.sha1
    return names


PORTABLE = for_micropython()
SECTIONS = pytest.mark.parametrize("section", [vars(minitor), PORTABLE], ids=["host", "portable"])
KINDS = pytest.mark.parametrize(
    "name, reference", [("Sha1", hashlib.sha1), ("Sha3_256", hashlib.sha3_256)]
)
# FIPS 180-4's and FIPS 202's examples.
LONG = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
VECTORS = [
    ("sha1", b"abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
    ("sha1", LONG, "84983e441c3bd26ebaae4aa1f95129e5e54670f1"),
    ("sha3_256", b"", "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a"),
    ("sha3_256", LONG, "41c0dba2a9d6240849100376a8235e2c82e1b9998a999e21db32dd97496d3376"),
    (
        "sha512",
        b"abc",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
    ),
]


@SECTIONS
@pytest.mark.parametrize("name, data, digest", VECTORS)
def test_vectors(section, name, data, digest):
    assert section[name](data).hex() == digest


@SECTIONS
def test_shake256(section):
    for size in (0, 1, 64, 135, 136, 137, 300):
        data = os.urandom(size)
        for n in (1, 32, 64, 128, 136, 137, 272, 500):
            assert section["shake256"](data, n) == hashlib.shake_256(data).digest(n)


@SECTIONS
@pytest.mark.parametrize("name", ["sha1", "sha3_256", "sha512"])
def test_every_length_around_the_blocks(section, name):
    for size in list(range(0, 280, 3)) + [55, 56, 63, 64, 111, 112, 119, 127, 128, 135, 136, 1000]:
        data = os.urandom(size)
        assert section[name](data) == getattr(hashlib, name)(data).digest()


@SECTIONS
@KINDS
def test_any_split_gives_one_digest(section, name, reference):
    chance = random.Random(4)
    for _ in range(10):
        state, data = section[name](), b""
        for _ in range(12):
            piece = chance.choice((bytes, bytearray, memoryview))(os.urandom(chance.randrange(200)))
            state.update(piece)
            data += piece
            assert state.digest() == reference(data).digest()
        assert state.digest() == state.digest()


@SECTIONS
@KINDS
def test_copies_are_independent(section, name, reference):
    for size in (0, 3, 64, 136, 509):
        one = section[name](bytes(size))
        two = one.copy()
        two.update(b"two" * 60)
        three = two.copy()
        one.update(b"one")
        three.update(b"three")
        assert one.digest() == reference(bytes(size) + b"one").digest()
        assert two.digest() == reference(bytes(size) + b"two" * 60).digest()
        assert three.digest() == reference(bytes(size) + b"two" * 60 + b"three").digest()


def test_the_running_hashes_are_the_interpreters_own():
    assert minitor.Sha1 is hashlib.sha1 and minitor.Sha3_256 is hashlib.sha3_256


# RFC 4231, 4.2 to 4.8 (without the truncated one).
@pytest.mark.parametrize(
    "key, data, mac",
    [
        (
            b"\x0b" * 20,
            b"Hi There",
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        ),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (
            b"\xaa" * 20,
            b"\xdd" * 50,
            "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
        ),
        (
            bytes(range(1, 26)),
            b"\xcd" * 50,
            "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
        ),
        (
            b"\xaa" * 131,
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
        (
            b"\xaa" * 131,
            b"This is a test using a larger than block-size key and a larger than block-size data."
            b" The key needs to be hashed before being used by the HMAC algorithm.",
            "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
        ),
    ],
)
def test_hmac_vectors(key, data, mac):
    assert minitor.hmac_sha256(key, data).hex() == mac


def test_hmac():
    for size in (0, 1, 63, 64, 65, 200):
        key, data = os.urandom(size), os.urandom(2 * size)
        assert minitor.hmac_sha256(key, data) == hmac.new(key, data, "sha256").digest()


# RFC 5869, A.1 to A.3.
@pytest.mark.parametrize(
    "secret, salt, info, okm",
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf_vectors(secret, salt, info, okm):
    assert minitor.hkdf_sha256(secret, salt, info, len(okm) // 2).hex() == okm


@pytest.mark.parametrize("n", [1, 20, 31, 32, 33, 64, 72, 92, 8160])
def test_hkdf(n):
    secret, salt, info = os.urandom(64), os.urandom(20), os.urandom(30)
    theirs = HKDF(hashes.SHA256(), n, salt, info).derive(secret)
    assert minitor.hkdf_sha256(secret, salt, info, n) == theirs
