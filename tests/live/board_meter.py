# MicroPython: host a service, and print the memory that lives at most in each phase.
#     board_meter.py NETWORK_FILE DATA_DIR PORT [PERIOD]
# Lines: "phase NAME live N peak N seconds N" (bytes) at its end, and "still live N peak N" each
# PERIOD seconds (2).  A collection goes before each sample: what counts is what cannot be freed.

import asyncio
import gc
import sys
import time

import pollroom  # noqa: F401

peak, started = 0, time.ticks_ms()


def sample():
    global peak
    gc.collect()
    live = gc.mem_alloc()
    peak = max(peak, live)
    return live


def phase(name):
    global peak, started
    gc.collect()
    live, now = sample(), time.ticks_ms()
    seconds = time.ticks_diff(now, started) / 1000
    print("phase %s live %d peak %d seconds %.1f" % (name, live, peak, seconds))
    peak, started = 0, now


def load():
    # Within a function: what is left on the stack otherwise keeps 12 KB alive.
    import minitor  # noqa: F401


async def sampler(pause):
    while True:
        sample()
        await asyncio.sleep_ms(pause)


async def settle():
    # What ran before leaves words on the stack that keep memory until others overwrite them.
    for _ in range(4):
        await asyncio.sleep_ms(20)


async def main(network, data_dir, port, period="2"):
    minitor = sys.modules["minitor"]
    sampling = asyncio.create_task(sampler(50))
    tor = minitor.AsyncTor(data_dir, network)
    await tor.start()
    await settle()
    phase("bootstrap")
    service = await tor.create_onion_service({80: int(port)})
    await settle()
    phase("publish")
    print(service.address)
    sampling.cancel()
    asyncio.create_task(sampler(1000))
    while True:
        await asyncio.sleep(float(period))
        print("still live %d peak %d" % (sample(), peak))


load()
phase("import")
asyncio.run(main(*sys.argv[1:]))
