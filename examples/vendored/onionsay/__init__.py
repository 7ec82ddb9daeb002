"""Say something at an .onion address. minitor comes along as onionsay/_minitor.py."""

from ._minitor import Tor, TorError

__all__ = ["TorError", "read", "serve"]


def serve(text, ready, folder=None):
    """Say `text` to whoever connects, until interrupted; `ready(address)` is called once."""
    import threading

    async def say(reader, writer):
        writer.write(text.encode())
        await writer.drain()
        writer.close()

    with Tor(folder) as tor:
        ready(tor.create_onion_service(7, say).address)
        threading.Event().wait()


def read(address, folder=None):
    """Return what is said at `address`."""
    with Tor(folder) as tor, tor.create_connection((address, 7), timeout=120) as connection:
        with connection.makefile("rb") as file:
            return file.read(100000).decode()
