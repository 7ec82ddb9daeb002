"""What bench_instructions.py counts: a script for MicroPython.

    counted.py TASK N       does the task N times, after what it needs
"""

import os
import struct
import sys

import minitor as m

H = m.binascii.unhexlify


class Link:
    closed, circuits = None, {}

    def send(self, data):
        self.sent = data


class Stream:
    def feed(self, data):
        pass

    def arrived(self):
        pass


class Thing(m.Record):
    pass


class Directories:
    """A table of relays that are all directories: 400, a tenth of the network's."""

    flags = [m.HSDIR | m.HSDIR2 | m.USABLE] * 400

    def ed_id(self, i):
        return b"%032d" % (i * 7919)

    def identities(self, need):
        for i in range(400):
            yield i, self.ed_id(i)


class NoParams:
    def param(self, name, default, low=0, high=0):
        return default


def ends(*onion):
    """Return both ends of a circuit with these layers."""
    pair = m.Circuit(Link()), m.Circuit(Link())
    for kind in onion:
        keys = os.urandom(128)
        for end, service in zip(pair, (False, True)):
            end._layers.append(m.Layer(keys, kind, service))
            end.streams[1] = Stream()
    return pair


def cells(far, count):
    made = []
    for i in range(count):
        far.send(m.DATA, 1, bytes(498))
        made.append(bytearray(far.channel.sent[5:]))
    return made


def ntor():
    secret = H("706f6461792069207075742e2e2e2e2e2e2e2e4a454c4c59206f6e2074686973")
    m.urandom = lambda n: secret[:n]
    reply = H(
        "0040390480a14362761d6aec1fea840f6e9e928fb2adb7b25c670be1045e35133a37"
        "1cbdf68b89923e1f85e8e18ee6e805ea333fe4849c790ffd2670bd80fec95cc8"
    )
    relay = H("69546f6c64596f7541626f75745374616972732e")
    B = H("ccbc8541904d18af08753eae967874749e6149f873de937f57f8fd903a21c471")

    def task():
        create, finish = m.ntor(relay, B)
        finish(reply)

    return task


def sent():
    near, far = ends(False, False, False, False, True)
    return lambda: near.send(m.DATA, 1, bytes(498))


def received(*onion):
    near, far = ends(*onion or (False, False, False, False, True))
    waiting = cells(far, 21)
    return lambda: near.receive(waiting.pop(0))


def hs_ntor():
    intro, relay, subcred = Thing(), Thing(), b"s" * 32
    intro.b, intro.enc_key = m.x25519_keypair()
    intro.auth_key, relay.ntor_key = b"a" * 32, b"n" * 32
    relay.specifiers = b"\3\0\6\x7f\0\0\1\x13\x89\2\x14" + b"r" * 20 + b"\3\x20" + b"e" * 32
    body, _ = m.hs_ntor_client(intro, subcred, b"c" * 20, relay)
    return lambda: m.hs_ntor_service(intro, [bytes(32), subcred], body)


def ring():
    period = 20000, 1440, b"v" * 32, 0
    return lambda: m.hsdir_ring(Directories(), NoParams(), b"b" * 32, period, "store")


def feed(parser, text):
    for at in range(0, len(text), 498):
        parser.feed(text[at : at + 498])


# As those of 2024, in every other relay an IPv6 address.
RELAY = b"""\
r Unnamed%04d %s 2038-01-01 00:00:00 198.51.%d.7 9001 0
%sm %s
s Fast Guard HSDir Running Stable V2Dir Valid
v Tor 0.4.8.11
pr Conflux=1 Cons=1-2 Desc=1-2 DirCache=2 FlowCtrl=1-2 HSDir=2 HSIntro=4-5 HSRend=1-2 Link=1-5\
 LinkAuth=1,3 Microdesc=1-2 Padding=2 Relay=1-4
w Bandwidth=%d
"""
MICRODESC = b"onion-key\n-----BEGIN RSA PUBLIC KEY-----\n%s-----END RSA PUBLIC KEY-----\n"
MICRODESC += b"ntor-onion-key %s\nfamily%s\np reject 22,25,465,587\nid ed25519 %s\n"


def b64(data):
    return m.b64encode(data).encode()


def consensus():
    # 72 relays, a hundredth of the network's, and one that waits for its end.
    relays = []
    for i in range(73):
        six = b"a [2001:db8::%x]:9001\n" % i if i & 1 else b""
        ids = b64(struct.pack(">I16x", i * 50000000)), b64(bytes(28) + struct.pack(">I", i))
        relays.append(RELAY % (i, ids[0], i, six, ids[1], i * 100))
    text = b"".join(relays)
    head = b"network-status-version 3 microdesc\nvote-status consensus\n"

    def task():
        parser, found = m.ConsensusParser(lambda *relay: found.append(1)), []
        feed(parser, head + text + b"directory-footer\n")
        assert len(found) == 72, len(found)

    return task


def microdescs():
    # 72, with 15 members of a family each: 80 KB.
    member = b" $" + b"0123456789ABCDEF" * 2 + b"01234567"
    lines = b"".join([b64(bytes(48)) + b"\n" for i in range(3)])
    text = b"".join(
        [MICRODESC % (lines, b64(b"n" * 32), member * 15, b64(b"%032d" % i)) for i in range(72)]
    )

    def task():
        found = []
        parser = m.MicrodescParser(lambda *microdesc: found.append(1))
        feed(parser, text)
        parser.finish()
        assert len(found) == 72, len(found)

    return task


def rsa():
    n = b"\xff" * 255 + b"\x0f"
    return lambda: m.rsa_verify(n, bytes(32), b"\x77" * 256)


def block(function, *rounds):
    state = bytearray(200)
    return lambda: function(state, *rounds)


TASKS = {
    "keccak": lambda: block(m._keccak),
    "sha1": lambda: block(m._sha1),
    "sha512": lambda: block(m._sha512, m._ROUNDS),
    "ntor": ntor,
    "sent": sent,
    "received": received,
    "received from a directory": lambda: received(False),
    "hs_ntor": hs_ntor,
    "ring": ring,
    "consensus": consensus,
    "microdescs": microdescs,
    "rsa": rsa,
}
if __name__ == "__main__":
    task = TASKS[sys.argv[1]]()
    for i in range(int(sys.argv[2])):
        task()
    print("ok")
