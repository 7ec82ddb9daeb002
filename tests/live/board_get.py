# MicroPython, and CPython: fetch an address from an onion service and print how many bytes came.
#     board_get.py NETWORK_FILE DATA_DIR HOST PORT PATH [KEY_OF_A_CLIENT]

import asyncio
import hashlib
import sys

import minitor


async def main(network, data_dir, host, port, path, key=None):
    async with minitor.AsyncTor(data_dir=data_dir, network=network) as tor:
        if key:
            tor.add_onion_key(host, key)
        reader, writer = await tor.open_connection(host, int(port))
        writer.write(b"GET %s HTTP/1.0\r\n\r\n" % path.encode())
        await writer.drain()
        while (await reader.readline()).strip():
            pass
        digest, size = hashlib.sha256(), 0
        while True:
            data = await reader.read(4096)
            if not data:
                break
            size += len(data)
            digest.update(data)
        print("fetched", size, digest.digest().hex())
        writer.close()


asyncio.run(main(*sys.argv[1:]))
