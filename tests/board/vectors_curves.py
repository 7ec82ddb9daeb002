"""Vectors of section 5, for both runtimes: RFC 7748, RFC 8032, tor's own, and refusals."""

import json
import sys

import minitor
from minitor import ProtocolError

b = minitor.binascii.unhexlify
hexlify = lambda data: data.hex()  # noqa: E731
P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493


def little(n):
    return n.to_bytes(32, "little")


def refused(function, *args):
    try:
        function(*args)
    except ProtocolError:
        return True
    return False


# X25519: RFC 7748, sections 5.2 and 6.1.
for k, u, out in (
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
):
    assert hexlify(minitor.x25519(b(k), b(u))) == out, k
alice = b("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
bob = b("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
A = b("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
B = b("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
assert minitor.x25519(alice) == A and minitor.x25519(bob) == B
shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
assert hexlify(minitor.x25519(alice, B)) == hexlify(minitor.x25519(bob, A)) == shared
x, X = minitor.x25519_keypair()
assert len(x) == len(X) == 32 and minitor.x25519(x) == X
k = u = b"\t" + bytes(31)
for i in range(1 if minitor.MICROPYTHON else 1000):
    k, u = minitor.x25519(k, u), k
    if i == 0:
        assert hexlify(k).startswith("422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e803")
    if i == 999:
        assert hexlify(k).startswith("684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d")

# X25519: points of low order, their encodings above p, and each with the bit that is masked.
EIGHT = 0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0
EIGHTH = 0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F
for u in (0, 1, EIGHT, EIGHTH, P - 1, P, P + 1):
    assert refused(minitor.x25519, alice, little(u)), u
    assert refused(minitor.x25519, alice, little(u + 2**255)), u
assert refused(minitor.x25519, alice, b"") and refused(minitor.x25519, alice, B + b"\0")
# Otherwise u is taken modulo p, and its top bit is ignored.
assert minitor.x25519(alice, little(9 + 2**255)) == minitor.x25519(alice, little(P + 9)) == A

# Ed25519: RFC 8032, section 7.1.
for seed, public, message, signature in (
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
    (
        "833fe62409237b9d62ec77587520911e9a759cec1d19755b7da901b96dca3d42",
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b589"
        "09351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9bef1177331a704",
    ),
):
    assert hexlify(minitor.ed25519_public(minitor.ed25519_expand(b(seed)))) == public
    assert hexlify(
        minitor.ed25519_sign(minitor.ed25519_expand(b(seed)), b(public), b(message))
    ) == signature
    assert minitor.ed25519_verify(b(public), b(message), b(signature))

# Ed25519 with blinding: tor's vectors.
with open(sys.argv[1] + "/vectors.json") as f:
    tor = json.load(f)["ed25519"]
for i in range(len(tor["secret_keys"])):
    v = {}
    for name in tor:
        v[name] = b(tor[name][i])
    esk, public = v["expanded_secret_keys"], v["public_keys"]
    assert minitor.ed25519_expand(v["secret_keys"]) == esk
    assert minitor.ed25519_public(esk) == public
    signature = minitor.ed25519_sign(esk, public, public)
    assert signature == v["self_signatures"]
    assert minitor.ed25519_verify(public, public, signature)
    blind, blinded = v["blinded_secret_keys"], v["blinded_public_keys"]
    param = v["blinding_params"]
    assert minitor.ed25519_blind_secret(esk, param) == blind
    assert minitor.ed25519_blind_public(public, param) == blinded
    assert minitor.ed25519_public(blind) == blinded
signature = minitor.ed25519_sign(blind, blinded, b"message")
assert minitor.ed25519_verify(blinded, b"message", signature)

# Ed25519: what is refused.
verify = minitor.ed25519_verify
assert not verify(blinded, b"massage", signature)
assert not verify(public, b"message", signature)
for at in (0, 31, 32, 63):
    bad = bytearray(signature)
    bad[at] ^= 16
    assert not verify(blinded, b"message", bytes(bad)), at
assert not verify(blinded, b"message", signature[:63])
assert not verify(blinded, b"message", signature + b"\0")
assert not verify(blinded, b"message", b"")
assert not verify(blinded[:31], b"message", signature)
s = int.from_bytes(signature[32:], "little")
assert not verify(blinded, b"message", signature[:32] + little(s + L))

Y8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
SIGN = 1 << 255
LOW_ORDER = (1, P - 1, 0, SIGN, Y8, Y8 + SIGN, P - Y8, P - Y8 + SIGN)
NOT_CANONICAL = (P, P + 1, P + 3, P + SIGN, P + 1 + SIGN, 2**255 - 1, 2**256 - 1, 1 + SIGN)
for y in LOW_ORDER:
    assert not minitor.ed25519_valid(little(y)), y
    # S = 0 and R = -hA, for whichever h turns up among eight messages.
    for message in b"12345678":
        assert not verify(little(y), bytes([message]), little(1) + bytes(32)), y
for y in NOT_CANONICAL + (2, P - 2):
    assert not minitor.ed25519_valid(little(y)), y
    assert not verify(little(y), b"", little(1) + bytes(32)), y
    assert refused(minitor.ed25519_blind_public, little(y), bytes(32)), y
assert not minitor.ed25519_valid(public[:31]) and not minitor.ed25519_valid(public + b"\0")
assert minitor.ed25519_valid(public) and minitor.ed25519_valid(blinded)
# A key plus a point of order 8, 4, 2: no low order, but a torsion component.
for y in (Y8, 0, P - 1):
    mixed = minitor._add(minitor._decode(public), minitor._decode(little(y)))
    assert not minitor.ed25519_valid(minitor._multiply((1, mixed))), y

# RSA: a key of 1024 bits made for this test, and its signature over a bare digest.
DER = b(
    "30818902818100b6845bba1a623259391c0b397289a7f59230a365aecaac11e58e5db202be495ce4"
    "8ca5eb495393a54b2045b14e85369c83fb98c26b717b9343482e24809e7a2e7c27ebcfd92dfd6baf"
    "2de8d3ea4591a260bbe812aafbf1382013b8d3cf4a3f32d7b7b9966362a943b1a552c91300d5c2ad"
    "7dd4b0aa03cb8029e69b0b0938ddff0203010001"
)
RSA_SIGNATURE = b(
    "253da9d6884752a1eda110462218a847a2abaa1c919ea4dc9a7f7f32fb7d735bd4000f904b9bd92a"
    "d1b7498b0679420b10eccfa986ff7117c9aaafc9d89d325a30bdcca649a94f2a5241678f4ab3d124"
    "15984a3d74089a7f1983b3c582f9f2ba4287f3169e8a957e093ed0bc2461330c0aa0c8778c58b3e3"
    "7cd31e908849bb73"
)
digest = minitor.sha256(b"minitor")
key = minitor.rsa_public_key(DER)
assert len(key) == 128 and key[0] == 0xB6
assert minitor.rsa_verify(key, digest, RSA_SIGNATURE)
assert not minitor.rsa_verify(key, digest[:20], RSA_SIGNATURE)
assert not minitor.rsa_verify(key, minitor.sha256(b"else"), RSA_SIGNATURE)
assert not minitor.rsa_verify(key, digest, RSA_SIGNATURE[:-1])
assert not minitor.rsa_verify(key, digest, b"\0" + RSA_SIGNATURE)
assert not minitor.rsa_verify(key, digest, b"")
assert not minitor.rsa_verify(key, digest, bytes(128))
for n in range(len(DER)):
    assert refused(minitor.rsa_public_key, DER[:n]), n
assert refused(minitor.rsa_public_key, DER + b"\0")
print("ok")
