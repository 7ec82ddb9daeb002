# Start Tor with clocks that are wrong by so many hours, each in its turn.
#     wrong_clock.py NETWORK_FILE DATA_DIR HOURS...
# Lines: "HOURS started", or "HOURS ErrorClass text"; with "told" if `progress` was told of it.

import asyncio
import sys

import minitor

right = minitor.now


async def start(network, data_dir, hours):
    told = []
    minitor.now = lambda: right() + 3600 * hours
    progress = lambda percent, tag, text: told.append(text) if tag == "clock_skew" else None
    tor = minitor.AsyncTor(data_dir, network, progress)
    try:
        await tor.start()
        await tor.aclose()
        what = "started"
    except minitor.TorError as e:
        what = "%s %s%s" % (type(e).__name__, e, " told" if told == [str(e)] else "")
    print(hours, what)


async def main(network, data_dir, *hours):
    for one in hours:
        await start(network, data_dir, int(one))


asyncio.run(main(*sys.argv[1:]))
