"""A private Tor network whose directory lists as many relays as the public one.

    python tests/bigdir.py [--relays N] [-- COMMAND...]     as tests/tornet.py

Twelve of them run, as in tests/tornet.py, with nearly all of the weight and the only HSDir flags:
paths and onion services work.  The others exist on paper.  Nobody votes: the documents below are
signed with the authorities' keys, lie in the cache of every tor before it starts, and are served
by real relays, three of which have the authorities' addresses.

    with BigNet(7200) as net:
        net.sizes           # bytes: {"consensus": 2600000, "microdescs": 8600000, "certs": 6000}
"""

import base64
import hashlib
import os
import random
import sys
import time

import tornet
from cryptography.hazmat.primitives import serialization
from fakenet import armour, b64, stamp
from tornet import AUTHORITIES, RELAYS, TorNet

# From here on: counted in the public network's consensus of 2024-05-17 17:00 (7,195 relays).
FLAGS = (
    (1972, "Fast Guard HSDir Running Stable V2Dir Valid"),
    (843, "Exit Fast Guard HSDir Running Stable V2Dir Valid"),
    (744, "Fast Guard Running Stable V2Dir Valid"),
    (592, "Exit Fast Running Stable Valid"),
    (591, "Fast Running V2Dir Valid"),
    (538, "Fast HSDir Running Stable V2Dir Valid"),
    (351, "Fast Running Stable Valid"),
    (322, "Exit Fast Guard Running Stable V2Dir Valid"),
    (306, "Fast Running Stable V2Dir Valid"),
    (288, "Exit Fast HSDir Running Stable V2Dir Valid"),
    (158, "Running Stable V2Dir Valid"),
    (96, "Fast Running Valid"),
    (95, "Running V2Dir Valid"),
    (77, "Exit Fast Running Stable V2Dir Valid"),
    (61, "Running Stable Valid"),
    (39, "Exit Fast Running V2Dir Valid"),
    (28, "Exit Running V2Dir Valid"),
    (23, "Running Valid"),
    (8, "Fast Running StaleDesc V2Dir Valid"),
    (5, "BadExit Fast MiddleOnly Running Stable Valid"),
)
VERSIONS = ((4418, "0.4.8.11"), (2044, "0.4.8.10"), (183, "0.4.8.8"), (550, "0.4.8.7"))
# The deciles of bandwidth, in thousands; here a thousandth, beside what the running relays have.
BANDWIDTHS = (0, 0.38, 1.5, 3.2, 5.5, 8, 10, 13, 18, 28, 200)
WEIGHT = 2000000  # of a running relay: as much as tor takes
WITH_IPV6 = 3466 / 7195
NICKNAMES = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PROTOCOLS = (
    "Conflux=1 Cons=1-2 Desc=1-2 DirCache=2 FlowCtrl=1-2 HSDir=2 HSIntro=4-5 HSRend=1-2"
    " Link=1-5 LinkAuth=1,3 Microdesc=1-2 Padding=2 Relay=1-4"
)
REQUIRED = "Cons=2 Desc=2 Link=4 Microdesc=2 Relay=2"
RECOMMENDED = "Cons=2 Desc=2 DirCache=2 HSDir=2 HSIntro=4 HSRend=2 Link=4-5 Microdesc=2 Relay=2"
KNOWN_FLAGS = (
    "Authority BadExit Exit Fast Guard HSDir MiddleOnly NoEdConsensus Running Stable StaleDesc"
    " Sybil V2Dir Valid"
)
# As if no position were scarce: the few that run have to serve in all.
BANDWIDTH_WEIGHTS = " ".join("W%s=10000" % kind for kind in (
    "bd be bg bm db eb ed ee eg em gb gd gg gm mb md me mg mm".split()))
# As many as in the public network's consensus, which nobody knows.
PARAMS = " ".join("MadeUpParameter%d=%d" % (n * n, 7 ** (n % 9)) for n in range(45))
# Of that network's nine authorities; the rest is made up, and signs nothing that counts.
VOTERS = 9
# Microdescriptors of 2022: family lines are 60 % of their bytes, the longest names 201.  So the
# families: (how many, of how many members).  Those of 7,200 relays come to 8.6 MB.
FAMILIES = ((1, 201), (2, 120), (4, 70), (10, 40), (30, 20), (100, 6), (400, 2))
POLICIES = (
    "accept 20-23,43,53,79-81,88,110,143,194,220,389,443,464,531,543-544,554,563,636,706,749,873,"
    "902-904,981,989-995,1194,1220,1293,1500,1533,1677,1723,1755,1863,2082-2083,2086-2087,"
    "2095-2096,2102-2104,3128,3389,3690,4321,4643,5050,5190,5222-5223,5228,5900,6660-6669,6679,"
    "6697,8000,8008,8074,8080,8082,8087-8088,8232-8233,8332-8333,8443,8888,9418,9999-10000,11371,"
    "19294,19638,50002,64738",
    "accept 80,443",
    "reject 25,119,135-139,445,563,1214,4661-4666,6346-6429,6699,6881-6999",
)


class Paper:
    """A relay that only the directory knows."""

    def __init__(self, rng, rsa_id):
        self.rsa_id, self.ed_id, self.ntor_key = rsa_id, rng.randbytes(32), rng.randbytes(32)
        self.nickname = "".join(rng.choices(NICKNAMES, k=rng.randint(1, 19)))
        # Never x.x.0.x, where other networks on this machine listen.
        self.address = "127.%d.%d.%d" % (rng.randrange(256), rng.randint(1, 255),
                                         rng.randint(1, 254))
        self.port = rng.choice((443, 9001, 9001, rng.randint(1024, 65535)))
        # Descriptors have to lie where they are looked for.
        self.flags = pick(rng, FLAGS).replace("HSDir ", "")
        place = rng.randrange(len(BANDWIDTHS) - 1)
        self.weight = max(1, int(rng.uniform(*BANDWIDTHS[place:place + 2])))
        self.policy = rng.choice(POLICIES) if "Exit " in self.flags else ""
        self.version, self.ipv6, self.family = pick(rng, VERSIONS), rng.random() < WITH_IPV6, ()
        self.rng = rng


class Running(Paper):
    """As a Paper, of a relay of TorNet that runs."""

    def __init__(self, rng, node):
        super().__init__(rng, bytes.fromhex(node.fingerprint))
        with open(os.path.join(node.dir, "keys", "secret_onion_key_ntor"), "rb") as f:
            self.ntor_key = f.read()[64:]
        self.ed_id = base64.b64decode(node.ed25519 + "=")
        self.nickname, self.address, self.port = node.nickname, node.address, node.or_port
        self.version, self.ipv6, self.weight = "0.4.9.11", False, WEIGHT
        self.flags, self.policy = "Exit Fast Guard HSDir Running Stable V2Dir Valid", POLICIES[2]
        if node.role == "authority":
            self.flags, self.weight = "Authority Running V2Dir Valid", 0
        if node.role in ("authority", "noexit"):
            self.flags, self.policy = self.flags.replace("Exit ", ""), ""
        if node.role == "nohsdir":
            self.flags = self.flags.replace("HSDir ", "")
        if node.role == "web":
            self.policy = POLICIES[1]


class Voter:
    """An authority that no client knows."""

    address, dir_port, or_port = "127.0.0.9", 80, 443

    def __init__(self, rng):
        self.nickname, self.v3ident = "voter%d" % rng.randrange(99), rng.randbytes(20).hex().upper()


def pick(rng, table):
    return rng.choices([row[1] for row in table], [row[0] for row in table])[0]


def microdesc(relay):
    """Return the text of a relay's microdescriptor."""
    # An RSA key of 1024 bits that nobody has.
    key = b"\x30\x81\x89\x02\x81\x81\0" + bytes([relay.rng.randint(128, 255)])
    key += relay.rng.randbytes(126) + b"\xff\x02\x03\1\0\1"
    text = "onion-key\n" + armour("RSA PUBLIC KEY", key)
    text += "ntor-onion-key %s\n" % b64(relay.ntor_key)
    if relay.family:
        text += "family %s\n" % " ".join(sorted("$" + m.hex().upper() for m in relay.family))
    if relay.policy:
        text += "p %s\n" % relay.policy
    return text + "id ed25519 %s\n" % b64(relay.ed_id)


def entry(relay, digest):
    """Return the lines of a relay in the consensus."""
    text = "r %s %s 2038-01-01 00:00:00 %s %d 0\n" % (
        relay.nickname, b64(relay.rsa_id), relay.address, relay.port)
    if relay.ipv6:
        groups = tuple(relay.rng.getrandbits(16) for _ in range(4))
        text += "a [2a0%x:%x:%x:%x::1]:%d\n" % ((groups[0] & 15,) + groups[1:] + (relay.port,))
    return text + "m %s\ns %s\nv Tor %s\npr %s\nw Bandwidth=%d%s\n" % (
        b64(digest), relay.flags, relay.version, PROTOCOLS, relay.weight,
        "" if relay.weight else " Unmeasured=1")


def head(rng, authorities, params, valid_after, interval):
    """Return what stands before the relays in a consensus."""
    lines = ["network-status-version 3 microdesc", "vote-status consensus", "consensus-method 33"]
    for name, n in (("valid-after", 0), ("fresh-until", 1), ("valid-until", 3)):
        lines.append("%s %s" % (name, stamp(valid_after + n * interval)))
    lines += ["voting-delay 300 300", "client-versions", "server-versions"]
    lines.append("known-flags " + KNOWN_FLAGS)
    for kind in ("client", "relay"):
        lines.append("recommended-%s-protocols %s" % (kind, RECOMMENDED))
    for kind in ("client", "relay"):
        lines.append("required-%s-protocols %s" % (kind, REQUIRED))
    words = PARAMS.split() + ["%s=%d" % item for item in params.items()]
    lines.append("params " + " ".join(sorted(words)))
    for which in ("previous", "current"):
        value = base64.b64encode(rng.randbytes(32)).decode()
        lines.append("shared-rand-%s-value 8 %s" % (which, value))
    for node in authorities:
        lines.append("dir-source {0.nickname} {0.v3ident} {0.address} {0.address} {0.dir_port} "
                     "{0.or_port}\ncontact {1}".format(node, "somebody"))
        lines.append("vote-digest " + rng.randbytes(20).hex().upper())
    return "\n".join(lines) + "\n"


def signature(digest, key_file):
    """Return the digest of an authority's signing key, and its signature of `digest`."""
    with open(key_file, "rb") as f:
        key = serialization.load_pem_private_key(f.read(), None)
    der = key.public_key().public_bytes(serialization.Encoding.DER,
                                        serialization.PublicFormat.PKCS1)
    # PKCS #1 without the name of the hash, as no library offers it.
    numbers, size = key.private_numbers(), key.key_size // 8
    padded = b"\0\1" + b"\xff" * (size - 3 - len(digest)) + b"\0" + digest
    signed = pow(int.from_bytes(padded, "big"), numbers.d, numbers.public_numbers.n)
    return hashlib.sha1(der).digest(), signed.to_bytes(size, "big")


def make_relays(rng, nodes, total):
    """Return the relays of a directory of `total`, sorted, with their families."""
    real = [Running(rng, node) for node in nodes]
    # A client has to read all: who matters comes last.
    last = max(int.from_bytes(relay.rsa_id, "big") for relay in real)
    paper = [Paper(rng, rng.randrange(last).to_bytes(20, "big")) for _ in range(total - len(real))]
    left = list(paper)
    rng.shuffle(left)
    for number, members in FAMILIES:
        # The longest line belongs to any directory that is large.
        number = max(number * total // 7200, 1000 <= total and members == FAMILIES[0][1])
        for _ in range(number):
            family, left = left[:members], left[members:]
            for relay in family:
                relay.family = [r.rsa_id for r in family]
    pair = [r for node, r in zip(nodes, real) if node.role == "family"]
    for relay in pair:
        relay.family = [r.rsa_id for r in pair]
    return sorted(real + paper, key=lambda relay: relay.rsa_id)


class BigNet(TorNet):
    """A TorNet whose directory lists `total` relays; the same ones for the same `seed`.

    `sizes`: bytes of its documents by name; `valid_after`: of its only consensus, which an hour
    later is not fresh any more.
    """

    DOCUMENTS = {"consensus": "cached-microdesc-consensus", "microdescs": "cached-microdescs",
                 "certs": "cached-certs"}

    def __init__(self, total=7200, relays=RELAYS, seed=1, params=None, progress=None):
        self.total, self.seed, self.sizes = total, seed, {}
        # All weight is with few relays, the last of which is far behind.
        params = dict({"min_paths_for_circs_pct": 95}, **(params or {}))
        super().__init__(relays, 3600, params, progress=progress)

    def _make(self, count):
        super()._make(count)
        os.makedirs(self.dir + "/documents")
        self.progress("writing a directory of %d relays" % self.total)
        for kind, text in self._documents().items():
            self.sizes[kind] = len(text)
            with open(os.path.join(self.dir, "documents", self.DOCUMENTS[kind]), "w") as f:
                f.write(text)
        for node in self.relays:
            self._prefill(node.dir)

    def _documents(self):
        rng, authorities = random.Random(self.seed), self.relays[:AUTHORITIES]
        voters = authorities + [Voter(rng) for _ in range(VOTERS - AUTHORITIES)]
        voters.sort(key=lambda node: node.v3ident)
        # So that it is good for an hour yet.
        self.valid_after = int(time.time()) // 60 * 60
        params = dict(self.params, hsdir_interval=1440)
        text, micro = head(rng, voters, params, self.valid_after, self.interval), []
        for relay in make_relays(rng, self.relays, self.total):
            micro.append(microdesc(relay))
            text += entry(relay, hashlib.sha256(micro[-1].encode()).digest())
        text += "directory-footer\nbandwidth-weights %s\n" % BANDWIDTH_WEIGHTS
        digest = hashlib.sha256((text + "directory-signature ").encode()).digest()
        # Two of three: more than half.
        for node in [node for node in voters if node is not authorities[-1]]:
            key_digest, signed = rng.randbytes(20), rng.randbytes(256)
            if node in authorities:
                key = os.path.join(node.dir, "keys", "authority_signing_key")
                key_digest, signed = signature(digest, key)
            text += "directory-signature sha256 %s %s\n" % (
                node.v3ident, key_digest.hex().upper())
            text += armour("SIGNATURE", signed)
        certs = [tornet._read(node.dir + "/keys/authority_certificate") for node in authorities]
        listed = "@last-listed %s\n" % stamp(self.valid_after)
        return {"consensus": text, "certs": "".join(certs),
                "microdescs": "".join(listed + one for one in micro)}

    def _prefill(self, folder):
        # tor never changes these files, it replaces them.
        for name in self.DOCUMENTS.values():
            os.link(os.path.join(self.dir, "documents", name), os.path.join(folder, name))

    def _folder(self, kind):
        folder = super()._folder(kind)
        os.makedirs(folder, 0o700)
        self._prefill(folder)
        return folder

    def _authority_text(self, node):
        return ""

    def _wait_usable(self, count):
        self.progress("waiting for the relays")
        for node in self.relays:
            tornet._wait(node.bootstrapped, tornet.START_SECONDS, node.nickname, node.process)


def main():
    total = 7200
    if "--relays" in sys.argv:
        at = sys.argv.index("--relays")
        total = int(sys.argv[at + 1])
        del sys.argv[at:at + 2]
    tornet.TorNet = lambda relays, interval, params, torrc, delay, progress: BigNet(
        total, progress=progress)
    return tornet.main()


if __name__ == "__main__":
    sys.exit(main())
