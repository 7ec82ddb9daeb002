"""A made-up Tor network of signed directory documents, for tests that need no relay."""

import base64
import hashlib
import time

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

FLAGS = "Fast Guard HSDir Running Stable V2Dir Valid"
PROTOCOLS = "FlowCtrl=1-2 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=1-5 Relay=1-4"
HEAD = """network-status-version 3 microdesc
vote-status consensus
consensus-method 33
valid-after %s
fresh-until %s
valid-until %s
voting-delay 300 300
client-versions
known-flags Authority Exit Fast Guard HSDir Running Stable V2Dir Valid
required-client-protocols Cons=2 Desc=2 Link=4 Microdesc=2 Relay=2
params circwindow=1000 hsdir_interval=1440
shared-rand-previous-value 8 %s
shared-rand-current-value 8 %s
dir-source one 0232AF901C31A04EE9848595AF9BB7620D4C5B2E 10.0.0.1 10.0.0.1 80 443
contact someone
vote-digest B475B153AB5B2F4D2365A85DB3BDFD93E78E0BE6
dir-source two 0232AF901C31A04EE9848595AF9BB7620D4C5B2F 10.0.0.2 10.0.0.2 80 443
contact someone
vote-digest B475B153AB5B2F4D2365A85DB3BDFD93E78E0BE7
"""


def b64(data):
    return base64.b64encode(data).decode().rstrip("=")


def read_certs(text, identities, size=1 << 20):
    """Return what minitor takes of authority certificates, fed in pieces of `size` bytes."""
    import minitor

    certs = {}
    parser = minitor.CertParser(certs, identities)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    return certs


def stamp(seconds):
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def armour(label, data):
    text = base64.b64encode(data).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "-----BEGIN %s-----\n%s\n-----END %s-----\n" % (label, "\n".join(lines), label)


class RsaKey:
    def __init__(self, bits=1024):
        self.key = rsa.generate_private_key(65537, bits)
        self.der = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.PKCS1
        )
        self.digest = hashlib.sha1(self.der).digest()

    def sign(self, digest):
        numbers = self.key.private_numbers()
        n = numbers.public_numbers.n
        size = (n.bit_length() + 7) // 8
        padded = b"\0\1" + b"\xff" * (size - 3 - len(digest)) + b"\0" + digest
        return pow(int.from_bytes(padded, "big"), numbers.d, n).to_bytes(size, "big")


class Authority:
    def __init__(self, name, expires=None):
        self.name = name
        self.identity, self.signing = RsaKey(), RsaKey()
        self.id = self.identity.digest
        self.cert = self.certify(expires or int(time.time()) + 1000000)

    def certify(self, expires):
        text = "dir-key-certificate-version 3\nfingerprint %s\n" % self.id.hex().upper()
        text += "dir-key-published %s\ndir-key-expires %s\n" % (stamp(0), stamp(expires))
        text += "dir-identity-key\n" + armour("RSA PUBLIC KEY", self.identity.der)
        text += "dir-signing-key\n" + armour("RSA PUBLIC KEY", self.signing.der)
        text += "dir-key-crosscert\n" + armour("ID SIGNATURE", self.signing.sign(self.id))
        text += "dir-key-certification\n"
        signature = self.identity.sign(hashlib.sha1(text.encode()).digest())
        return (text + armour("SIGNATURE", signature)).encode()


class FakeRelay:
    def __init__(self, n, **options):
        self.n = n
        self.rsa_id = hashlib.sha1(b"relay %d" % n).digest()
        self.ed_id = hashlib.sha256(b"ed %d" % n).digest()
        self.ntor_key = hashlib.sha256(b"ntor %d" % n).digest()
        self.address = "10.%d.%d.1" % (n // 200, n % 200)
        self.flags, self.weight, self.policy = FLAGS, 1000, ""
        self.family, self.family_ids, self.extra = [], [], ""
        self.__dict__.update(options)

    def microdesc(self):
        text = "onion-key\nntor-onion-key %s\n" % b64(self.ntor_key)
        if self.family:
            text += "family %s\n" % " ".join("$" + m.rsa_id.hex().upper() for m in self.family)
        if self.family_ids:
            text += "family-ids %s\n" % " ".join(self.family_ids)
        if self.policy:
            text += "p %s\n" % self.policy
        return (text + "%sid ed25519 %s\n" % (self.extra, b64(self.ed_id))).encode()

    def digest(self):
        return hashlib.sha256(self.microdesc()).digest()

    def entry(self):
        return "r relay%d %s 2038-01-01 00:00:00 %s 9001 0\na [2001:db%x::1]:9001\nm %s\n" % (
            self.n,
            b64(self.rsa_id),
            self.address,
            self.n % 16,
            b64(self.digest()),
        ) + "s %s\nv Tor 0.4.9.11\npr %s\nw Bandwidth=%d\n" % (self.flags, PROTOCOLS, self.weight)


class FakeNet:
    """Authorities, relays, and the documents that they publish."""

    def __init__(self, relays=20, authorities=3):
        self.authorities = [Authority("auth%d" % i) for i in range(authorities)]
        self.relays = [FakeRelay(i) for i in range(relays)]
        for r in self.relays[::3]:
            r.flags, r.policy = "Exit " + r.flags, "accept 80,443,8000-9000"
        self.valid_after = int(time.time()) // 3600 * 3600

    @property
    def identities(self):
        return {a.id for a in self.authorities}

    def torrc(self):
        return "".join(
            "DirAuthority %s orport=9001 v3ident=%s 127.0.0.%d:9030 %s\n"
            % (a.name, a.id.hex().upper(), i + 1, hashlib.sha1(a.name.encode()).hexdigest())
            for i, a in enumerate(self.authorities)
        )

    def certs(self):
        return b"".join(a.cert for a in self.authorities)

    def unsigned(self):
        t = self.valid_after
        srv = b64(bytes(range(32))) + "="
        text = HEAD % (stamp(t), stamp(t + 3600), stamp(t + 10800), srv, srv)
        for r in sorted(self.relays, key=lambda r: r.rsa_id):
            text += r.entry()
        return text + "directory-footer\nbandwidth-weights Wbd=0 Wbe=0 Wgg=10000\n"

    def consensus(self, text=None, signers=None):
        text = text or self.unsigned()
        digest = hashlib.sha256((text + "directory-signature ").encode()).digest()
        for a in self.authorities if signers is None else signers:
            text += "directory-signature sha256 %s %s\n" % (
                a.id.hex().upper(),
                a.signing.digest.hex().upper(),
            )
            text += armour("SIGNATURE", a.signing.sign(digest))
        return text.encode()

    def microdescs(self, digests=None):
        return b"".join(
            r.microdesc() for r in self.relays if digests is None or r.digest() in digests
        )
