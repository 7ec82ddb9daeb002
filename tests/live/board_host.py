# MicroPython, and CPython: host a service for a local port, and one answered by a coroutine.
#     board_host.py NETWORK_FILE DATA_DIR PORT

import asyncio
import sys

import minitor

if sys.implementation.name == "micropython":
    # Unix ports crash when a poll object that holds a TLS stream, too, grows past four sockets
    # (extmod/modselect.c moves the stream's null pointer): it grows before.  Chips are spared.
    import socket
    from asyncio import core

    sockets = [socket.socket() for _ in range(32)]
    for one in sockets:
        core._io_queue.poller.register(one, 1)
    for one in sockets:
        core._io_queue.poller.unregister(one)
        one.close()


async def greet(reader, writer):
    line = await reader.readline()
    writer.write(b"the board read " + line)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def main(network, data_dir, port):
    async with minitor.AsyncTor(data_dir=data_dir, network=network) as tor:
        service = await tor.create_onion_service({80: int(port), 7: greet})
        print(service.address)
        while True:
            await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:4]))
