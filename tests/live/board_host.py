# MicroPython, and CPython: host a service for a local port, and one answered by a coroutine.
#     board_host.py NETWORK_FILE DATA_DIR PORT [KEY_OF_A_CLIENT...]

import asyncio
import sys

import minitor
import pollroom  # noqa: F401

async def greet(reader, writer):
    line = await reader.readline()
    writer.write(b"the board read " + line)
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def main(network, data_dir, port, *clients):
    async with minitor.AsyncTor(data_dir=data_dir, network=network) as tor:
        clients = list(clients) or None
        service = await tor.create_onion_service({80: int(port), 7: greet}, None, None, clients)
        print(service.address)
        while True:
            await asyncio.sleep(60)


asyncio.run(main(*sys.argv[1:]))
