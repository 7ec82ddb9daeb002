"""Links to a relay that misbehaves in the way that each test chooses.

The relay is made here from cert-spec and tor-spec with the package `cryptography`; how links to
real relays work is tested in tests/live.
"""

import asyncio
import datetime
import hashlib
import os
import ssl
import struct
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.x509.oid import NameOID

import minitor

RAW = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
HOUR = 3600


def self_signed(key):
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "www.example.net")])
    day = datetime.timedelta(days=1)
    today = datetime.datetime.utcnow()
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(today - day).not_valid_after(today + day)
    return builder.sign(key, hashes.SHA256())


def ed_cert(kind, key_type, key, signer, expires=None):
    hours = int(time.time() if expires is None else expires) // HOUR + (expires is None) * 24
    extension = struct.pack(">HBB", 32, 4, 1) + signer.public_key().public_bytes(*RAW)
    body = struct.pack(">BBIB", 1, kind, hours, key_type) + key + b"\1" + extension
    return body + signer.sign(body)


class FakeRelay:
    """Certificates of one relay, and a server that shakes hands and then sends `after`."""

    def __init__(self, folder):
        self.identity = ed25519.Ed25519PrivateKey.generate()
        self.signing = ed25519.Ed25519PrivateKey.generate()
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=1024)
        tls_key = ec.generate_private_key(ec.SECP256R1())
        tls = self_signed(tls_key)
        self.tls_digest = hashlib.sha256(tls.public_bytes(serialization.Encoding.DER)).digest()
        der = self.rsa.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.PKCS1
        )
        self.rsa_id = hashlib.sha1(der).digest()
        self.ed_id = self.identity.public_key().public_bytes(*RAW)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        path = os.path.join(str(folder), "relay.pem")
        with open(path, "wb") as f:
            f.write(
                tls_key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
                + tls.public_bytes(serialization.Encoding.PEM)
            )
        self.context.load_cert_chain(path)
        self.certs = {
            2: self_signed(self.rsa).public_bytes(serialization.Encoding.DER),
            4: ed_cert(4, 1, self.signing.public_key().public_bytes(*RAW), self.identity),
            5: ed_cert(5, 3, self.tls_digest, self.signing),
            7: self.crosscert(self.ed_id),
        }
        self.versions = (3, 4, 5)
        self.clock = 0
        self.hello = None
        self.after = b""
        self.seen = b""

    def crosscert(self, ed_id, hours=24):
        body = ed_id + struct.pack(">I", int(time.time()) // HOUR + hours)
        digest = hashlib.sha256(b"Tor TLS RSA/Ed25519 cross-certificate" + body).digest()
        # The specification signs the bare digest.
        n = self.rsa.private_numbers()
        size = n.public_numbers.n.bit_length() // 8 + bool(n.public_numbers.n.bit_length() % 8)
        block = b"\0\1" + b"\xff" * (size - 35) + b"\0" + digest
        signature = pow(int.from_bytes(block, "big"), n.d, n.public_numbers.n).to_bytes(size, "big")
        return body + bytes([len(signature)]) + signature

    def greeting(self):
        versions = b"".join(struct.pack(">H", v) for v in self.versions)
        certs = bytes([len(self.certs)])
        for kind, cert in self.certs.items():
            certs += struct.pack(">BH", kind, len(cert)) + cert
        challenge = os.urandom(32) + b"\0\1\0\3"
        netinfo = struct.pack(">I", int(time.time()) + self.clock)
        netinfo += b"\4\4\x7f\0\0\1" + b"\1\4\4\x7f\0\0\1"
        return (
            struct.pack(">HBH", 0, 7, len(versions)) + versions
            + struct.pack(">IBH", 0, 128, 5) + b"extra"
            + struct.pack(">IBH", 0, 129, len(certs)) + certs
            + struct.pack(">IBH", 0, 130, len(challenge)) + challenge
            + b"\0\0\0\0\0" + bytes(509)
            + struct.pack(">IB", 0, 8) + netinfo.ljust(509, b"\0")
        )

    async def serve(self, reader, writer):
        self.writer = writer
        try:
            self.seen = await reader.readexactly(9)
            writer.write(self.greeting() if self.hello is None else self.hello)
            self.seen += await reader.readexactly(514)
            writer.write(self.after)
            while True:
                data = await reader.read(4096)
                if not data:
                    break
                self.seen += data
        except (OSError, EOFError):
            pass
        finally:
            writer.close()


@pytest.fixture
def relay(tmp_path):
    return FakeRelay(tmp_path)


def connect(relay, then=None, rsa_id=None, ed_id=None, seconds=5):
    """Open a channel to `relay`, run `then(channel)`, and return the channel."""

    async def main():
        server = await asyncio.start_server(relay.serve, "127.0.0.1", 0, ssl=relay.context)
        port = server.sockets[0].getsockname()[1]
        wanted = rsa_id or relay.rsa_id, ed_id or relay.ed_id
        channel = minitor.Channel("127.0.0.1", port, *wanted, seconds)
        try:
            await channel.opened.wait()
            if then:
                await then(channel)
        finally:
            channel.close()
            await asyncio.sleep(0.01)
            server.close()
        return channel

    return asyncio.run(asyncio.wait_for(main(), 30))


def test_a_link_says_what_a_client_says(relay):
    relay.clock = 1000

    async def then(channel):
        assert (channel.rsa_id, channel.ed_id) == (relay.rsa_id, relay.ed_id)
        assert 990 < channel.skew < 1010
        while len(relay.seen) < 9 + 2 * 514:
            await asyncio.sleep(0.01)

    connect(relay, then)
    assert relay.seen[:9] == b"\0\0\7\0\4\0\4\0\5"
    # NETINFO without a time and without an address of ours; padding turned down.
    netinfo, negotiate = relay.seen[9:523], relay.seen[523:1037]
    assert netinfo[:16] == b"\0\0\0\0\x08" + bytes(4) + b"\4\4\x7f\0\0\1\0"
    assert negotiate[:7] == b"\0\0\0\0\x0c\0\1"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.certs.pop(7), "missing"),
        (lambda r: r.certs.update({5: ed_cert(5, 3, bytes(32), r.signing)}), "TLS"),
        (lambda r: r.certs.update({5: ed_cert(5, 3, r.tls_digest, r.identity)}), "sign"),
        (lambda r: r.certs.update({5: ed_cert(5, 3, r.tls_digest, r.signing, 1e9)}), "expired"),
        (lambda r: r.certs.update({4: r.certs[4][:-2] + bytes([r.certs[4][-2] ^ 1]) + r.certs[4][-1:]}), "signature|wrong"),
        (lambda r: r.certs.update({7: r.crosscert(bytes(32))}), "not the relay expected"),
        (lambda r: r.certs.update({7: r.crosscert(r.ed_id, -30)}), "expired"),
        (lambda r: r.certs.update({2: self_signed(ec_key()).public_bytes(DER)}), "."),
        (lambda r: r.certs.update({2: b"\x30\x80"}), "."),
        (lambda r: setattr(r, "versions", (3,)), "no link protocol"),
        (lambda r: setattr(r, "hello", b"\0\0\x08\0\0"), "VERSIONS"),
        (lambda r: setattr(r, "hello", b"HTTP/1.1 400 Bad Request\r\n\r\n"), "VERSIONS"),
        (lambda r: setattr(r, "hello", b"\0\0\7\0\2\0\4" + b"\0\0\0\0\x81\xff\xff"), "65535"),
        (lambda r: setattr(r, "hello", b"\0\0\7\0\2\0\4" + b"\0\0\0\0\x03" + bytes(509)), "cell 3"),
        (lambda r: setattr(r, "hello", b"\0\0\7\0\2\0\4" + b"\0\0\0\0\x08" + bytes(509)), "cell 8"),
    ],
)
def test_a_relay_that_does_not_prove_its_identity_is_refused(relay, change, message):
    change(relay)
    with pytest.raises(minitor.ChannelError, match=message):
        connect(relay)


def test_expired_certificates_are_judged_once_the_relay_said_its_time(relay):
    """Whose clock is wrong may be clear then; such a link is not used."""
    relay.clock = -60 * HOUR
    relay.certs[5] = ed_cert(5, 3, relay.tls_digest, relay.signing, time.time() - 20 * HOUR)
    channels = []

    async def main():
        server = await asyncio.start_server(relay.serve, "127.0.0.1", 0, ssl=relay.context)
        place = "127.0.0.1", server.sockets[0].getsockname()[1], relay.rsa_id
        links = minitor.Channels()
        try:
            with pytest.raises(minitor.ChannelError, match="expired, or the clock is ahead"):
                await links.get(*place)
        finally:
            server.close()
        channels.append(links.open[relay.rsa_id])

    asyncio.run(asyncio.wait_for(main(), 30))
    assert channels[0].expired and -61 * HOUR < channels[0].skew < -59 * HOUR
    # Nothing more was said to it.
    assert len(relay.seen) == 9


DER = serialization.Encoding.DER


def ec_key():
    return ec.generate_private_key(ec.SECP256R1())


def test_another_relay_than_expected_is_refused(relay):
    for ids in ({"rsa_id": bytes(20)}, {"ed_id": bytes(32)}):
        with pytest.raises(minitor.ChannelError, match="not the relay"):
            connect(relay, **ids)


def test_a_relay_that_says_nothing_is_given_up(relay):
    relay.hello = b""
    with pytest.raises(minitor.ChannelError, match="within 1 s"):
        connect(relay, seconds=1)


def test_nobody_there_is_told():
    async def main():
        with pytest.raises(minitor.ChannelError, match="127.0.0.1:1"):
            await minitor.Channel("127.0.0.1", 1, bytes(20), None, 5).opened.wait()

    asyncio.run(main())


@pytest.mark.parametrize(
    "after, message",
    [
        (b"\0\0\0\0\xff\xff\xff" + bytes(10), "65535"),
        (b"\0\0\0\0\x07\0\2\0\4", "cell 7"),
        (b"\0\0\0\0\x08" + bytes(509), "cell 8"),
        (b"\0\0\0\0\x81\0\1\0", "cell 129"),
    ],
)
def test_a_bad_cell_closes_the_channel_and_says_so(relay, after, message):
    relay.after = after

    async def then(channel):
        circuit = minitor.Circuit(channel)
        while not channel.closed:
            await asyncio.sleep(0.01)
        assert message in str(channel.closed)
        assert circuit.closed and not channel.circuits
        with pytest.raises(minitor.ChannelError):
            minitor.Circuit(channel)

    connect(relay, then)


def test_padding_and_unknown_cells_are_tolerated(relay):
    known = b"\0\0\0\0\0" + bytes(509) + b"\0\0\0\0\x80\0\5hello"
    unknown = b"\x80\0\0\1\x42" + bytes(509) + b"\0\0\0\0\xf0\0\2hi" + b"\x80\0\0\1\3" + bytes(509)
    relay.after = (known + unknown) * 50

    async def then(channel):
        await asyncio.sleep(0.2)
        assert not channel.closed

    connect(relay, then)


def test_a_link_that_breaks_takes_its_circuits_along(relay):
    async def then(channel):
        circuit = minitor.Circuit(channel)
        extending = asyncio.ensure_future(circuit.extend(None, 5))
        await asyncio.sleep(0.05)
        relay.writer.transport.abort()
        with pytest.raises(minitor.CircuitError, match="127.0.0.1"):
            await extending

    connect(relay, then)


def test_two_callers_share_one_channel(relay):
    async def main():
        count = []

        async def serve(reader, writer):
            count.append(1)
            await relay.serve(reader, writer)

        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=relay.context)
        port = server.sockets[0].getsockname()[1]
        channels = minitor.Channels()
        wanted = ("127.0.0.1", port, relay.rsa_id, relay.ed_id)
        one, two = await asyncio.gather(channels.get(*wanted), channels.get(*wanted))
        assert one is two and len(count) == 1
        one.close()
        three = await channels.get(*wanted)
        assert three is not one and len(count) == 2
        channels.close()
        await asyncio.sleep(0.05)
        assert three.closed
        server.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_caller_that_gives_up_takes_nobody_along(relay):
    async def main():
        server = await asyncio.start_server(relay.serve, "127.0.0.1", 0, ssl=relay.context)
        channels = minitor.Channels()
        wanted = ("127.0.0.1", server.sockets[0].getsockname()[1], relay.rsa_id, relay.ed_id)
        one, two = [asyncio.ensure_future(channels.get(*wanted)) for _ in range(2)]
        await asyncio.sleep(0)
        one.cancel()
        assert (await two).ed_id == relay.ed_id
        # What is still being opened is closed with the others.
        channels.close()
        three = asyncio.ensure_future(channels.get(*wanted))
        await asyncio.sleep(0)
        channels.close()
        with pytest.raises(minitor.ChannelError, match="closed"):
            await three
        server.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_what_was_closed_before_it_began_is_not_dialed(monkeypatch):
    """Bridges that are turned on close all links: no other relay is called after that."""
    dialed = []

    async def dial(*where):
        dialed.append(where)
        raise OSError("nobody")

    async def main():
        for closed in True, False:
            channel = minitor.Channel("127.0.0.1", 1, b"g" * 20, None, 5)
            if closed:
                channel.close("gone")
            await asyncio.sleep(0.01)
        return len(dialed)

    monkeypatch.setattr(minitor.Channel, "_dial", staticmethod(dial))
    assert asyncio.run(main()) == 1
