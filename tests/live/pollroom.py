"""MicroPython on Unix: room for 32 sockets in asyncio's poll object.

These ports crash when one that holds a TLS stream, too, grows past four sockets
(extmod/modselect.c moves the stream's null pointer): it grows before.  Chips are spared.
"""

import sys

if sys.implementation.name == "micropython":
    import socket
    from asyncio import core

    sockets = [socket.socket() for _ in range(32)]
    for one in sockets:
        core._io_queue.poller.register(one, 1)
    for one in sockets:
        core._io_queue.poller.unregister(one)
        one.close()
