"""Vectors of section 4, for both runtimes: FIPS 180-4 and 202, SP 800-38A, RFC 4231 and 5869."""

import minitor

b = minitor.binascii.unhexlify
hexlify = lambda data: data.hex()  # noqa: E731
LONG = b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqr"
LONG += b"lmnopqrsmnopqrstnopqrstu"
PLAIN = b(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)

assert hexlify(minitor.sha1(b"abc")) == "a9993e364706816aba3e25717850c26c9cd0d89d"
assert hexlify(minitor.sha3_256(b"")) == (
    "a7ffc6f8bf1ed76651c14756a061d662f580ff4de43b49fa82d80a4b80f8434a"
)
assert hexlify(minitor.sha3_256(b"abc")) == (
    "3a985da74fe225b2045c172d6bd390bd855f086e3e9d525b46bfe24511431532"
)
assert hexlify(minitor.shake256(b"", 64)) == (
    "46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f"
    "d75dc4ddd8c0f200cb05019d67b592f6fc821c49479ab48640292eacb3b7c4be"
)
assert hexlify(minitor.sha512(b"abc")) == (
    "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
    "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
)
assert hexlify(minitor.sha512(LONG)) == (
    "8e959b75dae313da8cf4f72814fc143f8f7779c6eb9f7fa17299aeadb6889018"
    "501d289e4900f7e4331b99dec4b5433ac7d329eeb6dd26545e96e55b874be909"
)

# Running states: any split gives one result, a copy lives on its own.
for kind, once in ((minitor.Sha1, minitor.sha1), (minitor.Sha3_256, minitor.sha3_256)):
    data = bytes(range(256)) * 3
    for size in (1, 7, 63, 64, 65, 135, 136, 137, 509, 768):
        state = kind()
        for i in range(0, 768, size):
            state.update(data[i : i + size])
        fork = state.copy()
        assert state.digest() == once(data) and state.digest() == once(data), size
        fork.update(b"more")
        assert fork.digest() == once(data + b"more") and state.digest() == once(data), size
    assert kind(b"abc").digest() == once(b"abc")

# At every length around the ends of blocks SHA-512 pads as it should.
chain = b""
for n in range(260):
    if n < 2 or 108 < n < 132 or n > 236:
        chain = minitor.sha512(chain + bytes(n))
assert hexlify(chain[:16]) == "3ade9474aa21ef0766e4c8eef0342f48"
assert hexlify(minitor.shake256(bytes(300), 400)[-16:]) == "df483194af6882937e1b5cb55db54c12"

# Many blocks.
assert hexlify(minitor.sha512(bytes(range(256)) * 8)[-16:]) == "2460fcde9db2f1d2c2fb2dbfb7f481d4"

# Wherever both stand in memory, and however long: exclusive-or touches nothing else.
source = bytes([i * 7 & 255 for i in range(80)])
for at in range(5):
    for start in range(5):
        for n in (0, 1, 2, 3, 7, 8, 11, 12, 13, 16, 19, 27, 40, 63):
            target = bytearray(range(100, 180))
            minitor._xor(target, at, source, start, n)
            for i in range(80):
                other = source[start + i - at] if at <= i < at + n else 0
                assert target[i] == 100 + i ^ other, (at, start, n)

# RFC 4231, cases 1, 2 and 6; RFC 5869, case 1.
assert hexlify(minitor.hmac_sha256(b"\x0b" * 20, b"Hi There")) == (
    "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"
)
assert hexlify(minitor.hmac_sha256(b"Jefe", b"what do ya want for nothing?")) == (
    "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
)
assert hexlify(
    minitor.hmac_sha256(b"\xaa" * 131, b"Test Using Larger Than Block-Size Key - Hash Key First")
) == ("60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54")
salt, info = b("000102030405060708090a0b0c"), b("f0f1f2f3f4f5f6f7f8f9")
assert hexlify(minitor.hkdf_sha256(b"\x0b" * 22, salt, info, 42)) == (
    "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")

# AES in counter mode: SP 800-38A, F.5.1 and F.5.5, whole and split.
for key, out in (
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
):
    iv = b("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    assert hexlify(minitor.AesCtr(b(key), iv).crypt(PLAIN)) == out
    for size in (1, 15, 16, 17, 40):
        cipher = minitor.AesCtr(b(key), iv)
        pieces = [cipher.crypt(PLAIN[i : i + size]) for i in range(0, len(PLAIN), size)]
        assert hexlify(b"".join(pieces)) == out, size
    # The counter starts at zero unless told, and runs over into all 16 bytes.
    zeros = minitor.AesCtr(b(key)).crypt(bytes(32))
    assert zeros == minitor.AesCtr(b(key), bytes(16)).crypt(bytes(32))
    over = minitor.AesCtr(b(key), b"\xff" * 16).crypt(bytes(48))
    assert over[16:] == zeros
    if minitor.MICROPYTHON:
        # Where it stands, as a cell behind its header.
        cipher, cell = minitor.AesCtr(b(key)), bytearray(514)
        for i in range(3):
            cell[:5] = b"head5"
            cipher.apply(cell, 5, 509)
        assert cell[:5] == b"head5"
        twice = minitor.AesCtr(b(key))
        apart = [twice.crypt(bytes(509)) for i in range(3)]
        assert cell[5:] == bytes([x ^ y ^ z for x, y, z in zip(*apart)])
    cell = minitor.AesCtr(b(key))
    assert cell.crypt(bytes(509)) + cell.crypt(bytes(509 * 3)) == (
        minitor.AesCtr(b(key)).crypt(bytes(509 * 4))
    )
print("ok")
