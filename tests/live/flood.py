# CPython: a client that heeds no window floods one stream of a circuit; prints how that ends.
#     flood.py NETWORK_FILE DATA_DIR ADDRESS

import asyncio
import sys

import minitor


async def main(network, data_dir, address):
    async with minitor.AsyncTor(data_dir=data_dir, network=network) as tor:
        flood, _ = await tor.open_connection(address, 7)
        other, _ = await tor.open_connection(address, 7)
        assert other.circuit is flood.circuit
        flood._package = flood.circuit.window = 1 << 30
        sent = 0
        try:
            # Its handler waits for the end of a line.
            while sent < 1000000:
                flood.write(bytes(4980))
                sent += 4980
                await flood.drain()
                await asyncio.sleep(0.1)  # relays close circuits that flood them
            print("let through")
        except minitor.StreamError as e:
            print("lost the stream: %d" % e.reason)
        other.write(b"a line\n")
        print((await asyncio.wait_for(other.read(), 60)).decode(), end="")


asyncio.run(main(*sys.argv[1:4]))
