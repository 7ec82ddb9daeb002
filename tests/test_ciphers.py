"""AES in counter mode: OpenSSL's and the portable one give the bytes that they should."""

import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import minitor

PATHS = pytest.mark.parametrize("kind", [minitor.AesCtrOpenssl, minitor.AesCtrPortable])
SIZES = pytest.mark.parametrize("size", [16, 32])


def reference(key, iv):
    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update


# FIPS 197, C.1 and C.3: one block, here as a counter.
@PATHS
@pytest.mark.parametrize(
    "size, block",
    [(16, "69c4e0d86a7b0430d8cdb78070b4c55a"), (32, "8ea2b7ca516745bfeafc49904b496089")],
)
def test_fips_197(kind, size, block):
    counter = bytes(range(0, 256, 17))
    assert kind(bytes(range(size)), counter).crypt(bytes(16)).hex() == block


# SP 800-38A, F.5.1 and F.5.5.
PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)


@PATHS
@pytest.mark.parametrize(
    "key, cipher",
    [
        (
            "2b7e151628aed2a6abf7158809cf4f3c",
            "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
            "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee",
        ),
        (
            "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
            "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
            "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
        ),
    ],
)
def test_sp_800_38a(kind, key, cipher):
    counter = bytes(range(0xF0, 0x100))
    assert kind(bytes.fromhex(key), counter).crypt(PLAIN).hex() == cipher
    assert kind(bytes.fromhex(key), counter).crypt(bytes.fromhex(cipher)) == PLAIN


@PATHS
@SIZES
def test_random_lengths_and_splits(kind, size):
    chance = random.Random(size)
    for _ in range(6):
        key, iv = os.urandom(size), os.urandom(16)
        ours, theirs = kind(key, iv), reference(key, iv)
        for _ in range(10):
            data = os.urandom(chance.choice((0, 1, 2, 15, 16, 17, 509, 5 * 509, 20000)))
            out = ours.crypt(chance.choice((bytes, bytearray, memoryview))(data))
            assert type(out) is bytes and out == theirs(data)


@PATHS
@SIZES
def test_the_counter_starts_at_zero_and_wraps(kind, size):
    key = os.urandom(size)
    assert kind(key).crypt(bytes(100)) == reference(key, bytes(16))(bytes(100))
    for below in (0, 1, 5, 2047, 2048, 2049, 1 << 32, 1 << 64):
        iv = ((1 << 128) - 1 - below).to_bytes(16, "big")
        assert kind(key, iv).crypt(bytes(40000)) == reference(key, iv)(bytes(40000))


@PATHS
@SIZES
def test_batches_of_cells(kind, size):
    key = os.urandom(size)
    ours, theirs = kind(key), reference(key, bytes(16))
    for cells in (1, 3, 64, 128, 2, 128):
        data = os.urandom(509 * cells)
        assert ours.crypt(data) == theirs(data)


@PATHS
def test_blocks_and_keys_of_one_byte(kind):
    for x in range(0, 256, 5 if kind is minitor.AesCtrPortable else 1):
        key, iv = bytes([x]) * 16, bytes([255 - x]) * 16
        assert kind(key, iv).crypt(bytes(16)) == reference(key, iv)(bytes(16))
        assert kind(key * 2, iv).crypt(bytes(16)) == reference(key * 2, iv)(bytes(16))


@PATHS
def test_what_goes_in_stays_as_it_was(kind):
    for n in (0, 1, 2, 509):
        data = bytearray(n)
        cipher = kind(bytes(16))
        first, second = cipher.crypt(data), cipher.crypt(data)
        assert data == bytearray(n)
        assert first + second == kind(bytes(16)).crypt(bytes(2 * n))
    # Bytes that the interpreter shares are not written to.
    assert [bytes([x]) for x in range(256)] == [bytes(bytearray([x])) for x in range(256)]
    assert bytes(0) == b"" and bytes(1) == b"\x00"


@PATHS
def test_ciphers_are_independent(kind):
    key = os.urandom(16)
    ciphers = [(kind(key), reference(key, bytes(16))) for _ in range(20)]
    for i, (ours, theirs) in enumerate(ciphers):
        assert ours.crypt(bytes(17 * i)) == theirs(bytes(17 * i))
    del ciphers[::2]
    gc.collect()
    for ours, theirs in ciphers:
        assert ours.crypt(bytes(100)) == theirs(bytes(100))


def test_a_key_of_another_length_is_refused():
    with pytest.raises(KeyError):
        minitor.AesCtrOpenssl(bytes(17))
    gc.collect()


@pytest.mark.parametrize(
    "before, name",
    [
        ("", "AesCtrOpenssl"),
        ("os.environ['MINITOR_PORTABLE_AES'] = '1'", "AesCtrPortable"),
        # No ctypes; an OpenSSL without the functions.
        ("sys.modules['ctypes'] = None", "AesCtrPortable"),
        ("import _ssl, _struct; _ssl.__file__ = _struct.__file__", "AesCtrPortable"),
        ("import _ssl; _ssl.__file__ = '/nonexistent'", "AesCtrPortable"),
    ],
)
def test_which_one_is_taken(before, name):
    environment = {k: v for k, v in os.environ.items() if k != "MINITOR_PORTABLE_AES"}
    environment["PYTHONPATH"] = str(Path(minitor.__file__).parent)
    script = "import os, sys\n%s\nimport minitor\nprint(minitor.AesCtr.__name__)" % before
    script += "\nprint(minitor.AesCtr(bytes(16)).crypt(bytes(16)).hex())"
    out = subprocess.check_output([sys.executable, "-c", script], env=environment)
    assert out.decode().split() == [name, "66e94bd4ef8a2c3b884cfa59ca342b2e"]
