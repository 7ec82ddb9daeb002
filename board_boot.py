"""Starts minitor and an application on a board: copy it there as main.py.

Beside it: minitor*.mpy, the application, and settings.json (SETTINGS, below, has the rest of it):
    {"ssid": "the WiFi", "password": "its password", "app": "thermostat"}
The application is a module with the first or the second of these coroutine functions, or both:
    handler(reader, writer)    answers a visitor of the onion service
    main(tor)                  runs once Tor is up; `tor` is a minitor.AsyncTor
    always()                   runs from power-on, with a network or without
Where anything fails, or one of the last two ends, the board starts anew, after 5 s, then 10, 20,
... 600.  For a prompt that stays after Ctrl-C, "watchdog_seconds" has to be 0: no watchdog.
"""

import asyncio
import gc
import json
import machine
import network
import ntptime
import sys
import time

# Defaults, or the type of what must not be missing.  "heap_budget": as AsyncTor's, 0: its own.
SETTINGS = {"ssid": str, "password": str, "app": str, "port": 80, "ntp_host": "pool.ntp.org"}
SETTINGS.update({"watchdog_seconds": 120, "data_dir": "minitor", "network": "", "heap_budget": 0})
REJOIN, NTP_TRIES, FIRST_PAUSE, LONGEST_PAUSE, STEADY = 30, 5, 5, 600, 600
SettingsError = type("SettingsError", (Exception,), {})

def load_settings(path):
    """Return the settings in the JSON file `path` as a dict; SettingsError."""
    try:
        with open(path) as f:
            settings = json.load(f)
        names = sorted(set(settings.keys()) | set(SETTINGS))
    except OSError:
        raise SettingsError("%s is missing" % path)
    except (ValueError, AttributeError):
        raise SettingsError('%s is not of the form {"name": value, "name": value}' % path)
    for name in names:
        default = SETTINGS.get(name)
        kind = default if default is str else type(default)
        if type(settings.setdefault(name, default)) is not kind:
            what = {int: "has to be a number", str: "has to be a text"}.get(kind, "is not known")
            what = "is missing" if settings[name] is str else what
            raise SettingsError('%s: "%s" %s' % (path, name, what))
    return settings


def load(name):
    gc.collect()
    return __import__(name)  # the caller collects the rest, which this stack still holds


async def tend(wlan, feed, settings):
    """Feed the watchdog; join the WiFi, and join it again whenever it is lost."""
    joined, seconds = False, 0
    while True:
        feed()
        if wlan.isconnected() != joined:
            joined, seconds = not joined, 0
            print("WiFi: joined as " + wlan.ifconfig()[0] if joined else "WiFi: lost")
        if not joined and seconds % REJOIN == 0:
            if seconds:
                wrong = wlan.status() == network.STAT_WRONG_PASSWORD
                print("WiFi: not joined yet" + ": wrong password?" * wrong)
            try:
                wlan.disconnect()  # or connect would fail while it is still trying
                wlan.connect(settings["ssid"], settings["password"])
            except OSError as e:
                print("WiFi: %s" % e)
        seconds += not joined
        await asyncio.sleep(1)


async def set_clock(host):
    """Set the clock by NTP; after some tries, one that is plausible (after a reset) will do."""
    ntptime.host, tries, error = host, 0, True
    while error:
        tries, error = tries + 1, None
        try:
            ntptime.settime()
        except (OSError, IndexError) as e:  # IndexError: the name has no address
            error = e if tries < NTP_TRIES else None
        if not 2026 <= time.gmtime()[0] < 2100:
            error = error or "this is the year %d" % time.gmtime()[0]
        if error:
            print("Clock: no time from %s yet: %s" % (host, error))
            await asyncio.sleep(min(2 * tries, 60))


async def serve(settings, wlan, minitor, app, up, progress):
    """Start Tor and the service, append the time to `up`, and run the application's `main`."""
    while not wlan.isconnected():
        await asyncio.sleep(1)
    await set_clock(settings["ntp_host"])
    more = settings["network"] or None, progress, settings["heap_budget"]
    async with minitor.AsyncTor(settings["data_dir"], *more) as tor:
        if hasattr(app, "handler"):
            service = await tor.create_onion_service(settings["port"], app.handler)
            print("This board is at %s, port %d" % (service.address, settings["port"]))
        up.append(time.time())
        serving = hasattr(app, "handler") and not hasattr(app, "main")
        await (asyncio.Event().wait() if serving else app.main(tor))


async def boot():
    over, up = asyncio.Event(), []

    def progress(*step):
        print("Bootstrapped %d%% (%s): %s" % step)
        if step[1] == "clock_skew":
            machine.RTC().datetime((2000, 1, 1, 5, 0, 0, 0, 0))  # now only NTP will do
            over.set()

    async def guard(work):
        try:
            await work
            print("The application ended")
        except Exception as e:
            sys.print_exception(e)
        over.set()

    try:
        settings = load_settings("settings.json")
        wlan = network.WLAN(network.STA_IF)
        wlan.active(True)  # first: it needs memory that Python's heap would take and keep
        minitor, app = load("minitor"), load(settings["app"])
        gc.collect()
        gc.collect()
        seconds = settings["watchdog_seconds"]
        feed = machine.WDT(timeout=1000 * seconds).feed if seconds else lambda: None
        works = [tend(wlan, feed, settings), serve(settings, wlan, minitor, app, up, progress)]
        works += [app.always()] if hasattr(app, "always") else []
        tasks = [asyncio.create_task(guard(work)) for work in works]
        await over.wait()
    except (SettingsError, ImportError) as e:  # starting anew would not mend these
        return print("Not started: %s" % e)
    except Exception as e:
        sys.print_exception(e)
    memory = machine.RTC().memory  # outlives a reset
    times = 0 if up and time.time() - up[0] > STEADY else (memory() or b"\0")[0]
    seconds = min(FIRST_PAUSE << times, LONGEST_PAUSE)
    memory(bytes([min(times + 1, 9)]))
    print("Starting anew in %d s" % seconds)
    await asyncio.sleep(seconds)
    machine.reset()


if __name__ == "__main__":
    asyncio.run(boot())
