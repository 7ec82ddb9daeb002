"""The viper code of section 4 on CPython, in a memory that is as strict as a chip's.

A load that is not aligned, or beside the buffer, stops an ESP32; where 32-bit MicroPython is
tested such a load works.  Integers have 32 bits here.
"""

import hashlib
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import minitor

SPAN = 1 << 20


class Uint(int):
    """An unsigned word."""

    def __new__(cls, value):
        return int.__new__(cls, value & 0xFFFFFFFF)


def wrapping(name):
    function = getattr(int, name)
    return lambda a, b: Uint(function(a, b))


for _name in "add sub and or xor lshift rshift".split():
    setattr(Uint, "__%s__" % _name, wrapping("__%s__" % _name))
    setattr(Uint, "__r%s__" % _name, wrapping("__r%s__" % _name))


def uint(value):
    return Uint(value) if isinstance(value, int) else int.from_bytes(value, "big")


class Memory:
    """Buffers at addresses of their own."""

    def __init__(self):
        self.buffers = []

    def address(self, value):
        if isinstance(value, int):
            return value
        for i, buffer in enumerate(self.buffers):
            if buffer is value:
                break
        else:
            i = len(self.buffers)
            self.buffers.append(value)
        return (i + 1) * SPAN

    def pointer(self, size):
        return lambda value: Pointer(self, size, self.address(value))


class Pointer:
    def __init__(self, memory, size, address):
        self.memory, self.size, self.start = memory, size, address

    def __int__(self):
        return self.start

    def _place(self, index):
        address = self.start + index * self.size
        assert address % self.size == 0, "not aligned"
        buffer, at = self.memory.buffers[address // SPAN - 1], address % SPAN
        assert at + self.size <= len(buffer), "beside the buffer"
        return buffer, slice(at, at + self.size)

    def __getitem__(self, index):
        buffer, place = self._place(index)
        return int.from_bytes(buffer[place], "little", signed=self.size > 1)

    def __setitem__(self, index, value):
        buffer, place = self._place(index)
        buffer[place] = (value & (1 << 8 * self.size) - 1).to_bytes(self.size, "little")


class Aes:
    """cryptolib's aes in mode 1, ECB."""

    def __init__(self, key, mode):
        assert mode == 1
        self.encryptor = Cipher(algorithms.AES(bytes(key)), modes.ECB()).encryptor()

    def encrypt(self, data, out):
        out[:] = self.encryptor.update(bytes(data))


@pytest.fixture(scope="module", params=["viper", "plain"])
def section(request):
    """The names of section 4 as 32-bit MicroPython has them, and as 64-bit MicroPython."""
    source = Path(minitor.__file__).read_text()
    memory = Memory()
    names = dict(
        vars(minitor),
        MICROPYTHON=True,
        NARROW=request.param == "viper",
        micropython=SimpleNamespace(viper=lambda function: function),
        ptr8=memory.pointer(1),
        ptr32=memory.pointer(4),
        uint=uint,
        aes=Aes,
    )
    text = source[source.index("# === 4. ") : source.index("# === 5. ")]
    exec(compile(text, "section 4", "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.parametrize("name", ["sha1", "sha3_256", "sha512"])
def test_hashes(section, name):
    kind = {"sha1": section._Sha1, "sha3_256": section._Sha3, "sha512": section._Sha512}[name]
    chance = random.Random(name)
    for size in (0, 1, 55, 56, 64, 111, 112, 128, 135, 136, 137, 300):
        data = chance.randbytes(size)
        assert kind(data).digest() == hashlib.new(name, data).digest()
    state, right = kind(), hashlib.new(name)
    data = bytearray(chance.randbytes(600))
    for size in (3, 17, 131, 200):
        # From places that are not aligned, as in a cell.
        start = chance.randrange(50)
        state.update(data, start, size)
        right.update(data[start : start + size])
        assert state.digest() == right.digest()
    if name != "sha512":
        state.stamp(data, 7)
        assert data[7:11] == right.digest()[:4]


def test_exclusive_or(section):
    chance = random.Random(1)
    for _ in range(300):
        n, at, start = [chance.randrange(most) for most in (60, 9, 9)]
        source, target = chance.randbytes(start + n), bytearray(chance.randbytes(at + n))
        right = bytes(x ^ y for x, y in zip(target[at:], source[start:]))
        section._xor(target, at, source, start, n)
        assert target[at:] == right


@pytest.mark.parametrize("size", [16, 32])
def test_aes_in_counter_mode(section, size):
    chance = random.Random(size)
    for iv in (bytes(16), b"\xff" * 16, b"\xff" * 14 + b"\xfe\xff"):
        key = chance.randbytes(size)
        ours = section.AesCtrCryptolib(key, iv)
        right = Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()
        for n in (1, 15, 16, 17, 509, 527, 528, 529, 1200):
            data = chance.randbytes(n)
            assert ours.crypt(data) == right.update(data)
            cell = bytearray(chance.randbytes(514))
            expected = cell[:5] + right.update(bytes(cell[5:]))
            ours.apply(cell, 5, 509)
            assert cell == expected


def test_few_cipher_objects_are_kept(section):
    ciphers = [section.AesCtrCryptolib(bytes([i]) * 16) for i in range(20)]
    for cipher in ciphers * 2:
        cipher.crypt(b"x")
    assert sum(cipher._out is not None for cipher in ciphers) == section._RECENT


def test_the_memory_itself():
    memory, buffer = Memory(), bytearray(8)
    pointer = memory.pointer(4)(buffer)
    pointer[1] = -2
    assert buffer[4:] == b"\xfe\xff\xff\xff" and pointer[1] == -2 and Uint(pointer[1]) >> 31 == 1
    for place in (int(pointer) + 2, int(pointer) + 8):
        with pytest.raises(AssertionError):
            memory.pointer(4)(place)[0]
