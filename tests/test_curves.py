"""Section 5 against the package cryptography; fixed vectors are in board/vectors_curves.py."""

import hashlib
import os
import random

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import minitor

ROUNDS = 40
L = minitor._L
P = minitor._P


def raw(key):
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def little(n):
    return n.to_bytes(32, "little")


def test_x25519():
    for i in range(ROUNDS):
        k, theirs = os.urandom(32), os.urandom(32)
        key = x25519.X25519PrivateKey.from_private_bytes(k)
        assert minitor.x25519(k) == raw(key.public_key())
        # Any 32 bytes are a key: on the curve, on its twist, with the top bit or without.
        peer = x25519.X25519PublicKey.from_public_bytes(theirs)
        assert minitor.x25519(k, theirs) == key.exchange(peer)


def test_ed25519_sign_and_verify():
    for i in range(ROUNDS):
        seed, message = os.urandom(32), os.urandom(i * 7)
        key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        public = raw(key.public_key())
        assert minitor.ed25519_public(minitor.ed25519_expand(seed)) == public
        esk = minitor.ed25519_expand(seed)
        signature = minitor.ed25519_sign(esk, public, message)
        assert signature == key.sign(message)
        assert minitor.ed25519_verify(public, message, signature)
        assert minitor.ed25519_valid(public)


def test_ed25519_refuses_any_flipped_bit():
    seed, message = os.urandom(32), b"message"
    public, esk = minitor.ed25519_public(minitor.ed25519_expand(seed)), minitor.ed25519_expand(seed)
    signature = minitor.ed25519_sign(esk, public, message)
    for bit in random.sample(range(512), 64):
        bad = (int.from_bytes(signature, "big") ^ 1 << bit).to_bytes(64, "big")
        assert not minitor.ed25519_verify(public, message, bad)
    for bit in random.sample(range(256), 32):
        bad = (int.from_bytes(public, "big") ^ 1 << bit).to_bytes(32, "big")
        assert not minitor.ed25519_verify(bad, message, signature)


def test_ed25519_agrees_on_which_bytes_are_points():
    def on_curve(y):
        u, v = (y * y - 1) % P, (minitor._D * y * y + 1) % P
        x2 = u * pow(v, P - 2, P) % P
        return x2 == 0 or pow(x2, (P - 1) // 2, P) == 1

    for i in range(ROUNDS):
        y = random.randrange(P)
        for sign in (0, 1 << 255):
            point = minitor._decode(little(y + sign))
            assert (point is not None) == on_curve(y)
            assert point is None or minitor._multiply((1, point)) == little(y + sign)


def test_ed25519_signature_of_a_small_multiple_of_the_order():
    # S + L makes the equation hold as well; both implementations refuse it.
    key = ed25519.Ed25519PrivateKey.generate()
    public, signature = raw(key.public_key()), key.sign(b"m")
    malleable = signature[:32] + little(int.from_bytes(signature[32:], "little") + L)
    assert not minitor.ed25519_verify(public, b"m", malleable)
    with pytest.raises(InvalidSignature):
        key.public_key().verify(malleable, b"m")


def test_ed25519_equation_is_without_cofactor():
    # R with a point of order 2 added: right only once multiplied by 8.
    seed = os.urandom(32)
    public, esk = minitor.ed25519_public(minitor.ed25519_expand(seed)), minitor.ed25519_expand(seed)
    a = int.from_bytes(esk[:32], "little")
    r = random.randrange(L)
    R = minitor._multiply((r, minitor._BASE), (1, (0, -1, 1, 0)))
    h = int.from_bytes(hashlib.sha512(R + public + b"m").digest(), "little")
    signature = R + little((r + h * a) % L)
    assert not minitor.ed25519_verify(public, b"m", signature)
    with pytest.raises(InvalidSignature):
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, b"m")


def test_multiplication_is_additive():
    B = x, y, z, t = minitor._BASE
    for i in range(ROUNDS):
        a, b = random.getrandbits(256), random.getrandbits(random.randrange(256))
        joint = minitor._multiply((a, B), (b, (-x, y, z, -t)))
        assert joint == minitor._multiply(((a - b) % L, B))
    for k in (0, 1, 2, 15, 16, 17, 31, 32, 2**256 - 1, L, L - 1, 2**255 - 1):
        chained = minitor._multiply((k % L, B))
        assert minitor._multiply((k, B)) == chained
    assert minitor._multiply((L, B)) == little(1)


def test_blinding_commutes_with_the_public_key():
    for i in range(ROUNDS):
        esk, param = minitor.ed25519_expand(os.urandom(32)), os.urandom(32)
        public = minitor.ed25519_public(esk)
        blinded = minitor.ed25519_blind_public(public, param)
        secret = minitor.ed25519_blind_secret(esk, param)
        assert minitor.ed25519_public(secret) == blinded
        signature = minitor.ed25519_sign(secret, blinded, b"m")
        ed25519.Ed25519PublicKey.from_public_bytes(blinded).verify(signature, b"m")


def rsa_sign(private, padded):
    numbers = private.private_numbers()
    n = numbers.public_numbers.n
    return pow(int.from_bytes(padded, "big"), numbers.d, n).to_bytes(private.key_size // 8, "big")


@pytest.mark.parametrize("size", [1024, 2048, 3072])
def test_rsa(size):
    private = rsa.generate_private_key(65537, size)
    der = private.public_key().public_bytes(Encoding.DER, PublicFormat.PKCS1)
    key = minitor.rsa_public_key(der)
    n = private.public_key().public_numbers().n
    assert int.from_bytes(key, "big") == n
    for digest in (os.urandom(20), os.urandom(32)):
        fill = size // 8 - 3 - len(digest)
        right = b"\0\1" + b"\xff" * fill + b"\0" + digest
        signature = rsa_sign(private, right)
        assert minitor.rsa_verify(key, digest, signature)
        assert not minitor.rsa_verify(key, digest[:-1], signature)
        beyond = int.from_bytes(signature, "big") + n
        if beyond < 1 << size:
            assert not minitor.rsa_verify(key, digest, beyond.to_bytes(size // 8, "big"))
        for wrong in (
            b"\0\2" + right[2:],
            b"\0\0" + right[2:],
            b"\0\1" + b"\xff" * (fill - 1) + b"\0\0" + digest,
            b"\0\1" + b"\xff" * (fill - 1) + b"\xfe\0" + digest,
            b"\0\1" + b"\xff" * 8 + b"\0" + digest + bytes(fill - 8),
            b"\0\1" + b"\xff" * (fill + 1) + digest,
            b"\0\1\0" + bytes(fill) + digest,
        ):
            assert not minitor.rsa_verify(key, digest, rsa_sign(private, wrong))


def der(tag, body):
    size = len(body)
    if size < 128:
        return bytes([tag, size]) + body
    return bytes([tag, 0x82]) + size.to_bytes(2, "big") + body


def test_rsa_key_is_refused():
    def key(n, e=b"\1\0\1"):
        return der(0x30, der(2, n) + der(2, e))

    n = b"\0" + b"\xc1" * 256
    assert minitor.rsa_public_key(key(n)) == n[1:]
    for bad in (
        b"",
        b"\x30\x00",
        b"\x30\x80" + key(n)[4:] + b"\0\0",
        b"\x31" + key(n)[1:],
        key(n)[:-1],
        key(n) + b"\0",
        key(n, b"\3"),
        key(n, b"\0\1\0\1"),
        key(n, b""),
        key(b""),
        key(b"\0"),
        key(b"\0\0" + n),
        key(n[1:]),
        key(b"\0" + b"\xc1" * 127),
        key(b"\0" + b"\xc1" * 513),
        key(n[:-1] + b"\xc0"),
        key(b"\0\x41" + n[2:]),
        der(0x30, der(2, n) + der(2, b"\1\0\1") + der(2, b"\1")),
        # Lengths in more bytes than they need, or in more than a key can need.
        b"\x30\x83\0" + key(n)[2:],
        der(0x30, b"\2\x82\0\x81\0" + b"\xc1" * 128 + der(2, b"\1\0\1")),
        der(0x30, der(2, n) + b"\2\x81\3\1\0\1"),
    ):
        with pytest.raises(minitor.ProtocolError):
            minitor.rsa_public_key(bad)


def test_rsa_key_parser_lets_nothing_else_out():
    good = der(0x30, der(2, b"\0" + b"\xc1" * 128) + der(2, b"\1\0\1")).hex()
    for i in range(2000):
        bad = bytearray.fromhex(good)[: random.randrange(1, 150)]
        for j in range(random.randrange(4)):
            bad[random.randrange(len(bad))] = random.randrange(256)
        try:
            minitor.rsa_public_key(bytes(bad))
        except minitor.ProtocolError:
            pass
