"""A thermostat with a web interface at a .onion address: on a board, or to try on a computer.

    python examples/thermostat/thermostat.py

On an ESP32, board_boot.py starts it ("app": "thermostat"); this file and page.html stand there
beside minitor.mpy.  It heats with or without a network.  A DS18B20 on pin 4 measures, a relay
on pin 5 switches the heating; where there is no sensor, as on a computer, a room is simulated.

    GET  /api             {"temperature": 20.8, "setpoint": 21.0, "heating": true, ...}
    GET  /api/history     the last 24 hours, a value every five minutes, the newest last
    POST /api/setpoint    {"setpoint": 21.5}

Whoever knows the address can read and set: it is the key of the house, so treat it as one.
"""

import asyncio
import json
import math
import sys
import time
from array import array

SENSOR_PIN, RELAY_PIN = 4, 5
LOWEST, HIGHEST, STEP = 5.0, 30.0, 0.5
HYSTERESIS = 0.2
MEASURE_SECONDS, RECORD_SECONDS, RECORDS = 5, 300, 288
FOLDER = __file__.rpartition("/")[0]
PAGE = (FOLDER + "/" if FOLDER else "") + "page.html"


# ── The device: what measures and heats ──


class SimulatedRoom:
    """A room that cools towards the weather outside, and warms up while it is heated."""

    simulated = True

    def __init__(self):
        self.degrees = 18.4

    def step(self, seconds, heating, when):
        outside = 6 - 4 * math.cos((when % 86400 - 14400) * math.pi / 43200)
        self.degrees += ((4.2 if heating else 0) - (self.degrees - outside) / 8) * seconds / 3600

    async def measure(self, heating):
        self.step(MEASURE_SECONDS, heating, int(time.time()))
        return self.degrees


class RealRoom:
    """A DS18B20 and a relay; OSError or IndexError where there is no sensor."""

    simulated = False

    def __init__(self):
        import ds18x20
        import machine
        import onewire

        self.sensor = ds18x20.DS18X20(onewire.OneWire(machine.Pin(SENSOR_PIN)))
        self.rom = self.sensor.scan()[0]
        self.relay = machine.Pin(RELAY_PIN, machine.Pin.OUT, value=0)

    async def measure(self, heating):
        self.relay.value(heating)
        self.sensor.convert_temp()
        await asyncio.sleep(1)
        return self.sensor.read_temp(self.rom)


class Thermostat:
    """The set-point, what was measured last, and a history in two bytes a value."""

    def __init__(self, room):
        self.room, self.setpoint, self.heating, self.degrees = room, 21.0, False, 18.4
        # Hundredths of a degree; a set-point has one more while heating.
        self.temperatures, self.setpoints = array("h"), array("h")

    def control(self, degrees):
        self.degrees = degrees
        limit = HYSTERESIS if self.heating else -HYSTERESIS
        self.heating = degrees < self.setpoint + limit

    def record(self):
        for values, value in (
            (self.temperatures, int(self.degrees * 100)),
            (self.setpoints, int(self.setpoint * 100) + self.heating),
        ):
            if len(values) == RECORDS:
                # Moved in place: a slice would be a new array each time.
                for i in range(1, RECORDS):
                    values[i - 1] = values[i]
                values[-1] = value
            else:
                values.append(value)

    def simulate(self):
        """Fill the history: the last day of two, with cooler nights."""
        now = int(time.time())
        for when in range(now - 2 * RECORDS * RECORD_SECONDS, now, 60):
            self.setpoint = 21.0 if 5 <= when // 3600 % 24 < 21 else 17.5
            self.room.step(60, self.heating, when)
            self.control(self.room.degrees)
            if when // 60 % (RECORD_SECONDS // 60) == 0:
                self.record()
        self.setpoint = 21.0

    def state(self):
        return {
            "temperature": round(self.degrees, 1),
            "setpoint": self.setpoint,
            "heating": self.heating,
            "simulated": self.room.simulated,
        }

    def set(self, text):
        """Take the set-point from a text; ValueError."""
        degrees = float(text)
        if not LOWEST <= degrees <= HIGHEST:
            raise ValueError("from %d to %d degrees" % (LOWEST, HIGHEST))
        self.setpoint = round(degrees / STEP) * STEP
        self.control(self.degrees)


try:
    thermostat = Thermostat(RealRoom())
except (ImportError, OSError, IndexError):
    thermostat = Thermostat(SimulatedRoom())
    thermostat.simulate()


async def always():
    """Measure and heat, with a network or without."""
    passed = 0
    while True:
        try:
            thermostat.control(await thermostat.room.measure(thermostat.heating))
        except (OSError, ValueError) as e:
            # Rather cold than on fire.
            thermostat.heating = False
            print("the sensor failed:", e)
        passed += MEASURE_SECONDS
        if passed >= RECORD_SECONDS:
            thermostat.record()
            passed = 0
        await asyncio.sleep(MEASURE_SECONDS)


# ── The page: made in pieces, so that it is never whole in memory ──

WIDTH, HEIGHT = RECORDS, 400


def curve(t, height):
    """Yield the temperatures as an SVG path, closed outside of the picture."""
    left = WIDTH - len(t.temperatures)
    yield "M%d %dV%d" % (left - 9, HEIGHT + 9, height(t.temperatures[0]))
    for i, value in enumerate(t.temperatures):
        yield "%s%d %d" % (" " if i else "L", left + i, height(value))
    yield "h9V%dz" % (HEIGHT + 9)


def steps(t, height):
    """Yield the set-points as an SVG path: where it begins, and where it changes."""
    left, last = WIDTH - len(t.setpoints), None
    for i, value in enumerate(t.setpoints):
        if value | 1 != last:
            yield ("M%d %d" if last is None else "H%dV%d") % (left + i, height(value))
            last = value | 1
    yield "H%d" % WIDTH


def heated(t):
    """Yield the times of heating as an SVG path of bars at the bottom."""
    left, since = WIDTH - len(t.setpoints), None
    for i, value in enumerate(t.setpoints):
        if value % 2 and since is None:
            since = i
        if since is not None and (not value % 2 or i == len(t.setpoints) - 1):
            yield "M%d %dh%dv-12h-%dz" % (left + since, HEIGHT, i - since, i - since)
            since = None


def chart(t):
    """Yield the last 24 hours as an SVG, and the degrees beside it."""
    both = [f(values) // 100 for f in (min, max) for values in (t.temperatures, t.setpoints)]
    lowest = min(both) - 1
    span = max(both) + 1 - lowest
    apart = 1 if span < 8 else 2 if span < 14 else 5
    marks = [d for d in range(lowest + 1, lowest + span) if d % apart == 0]
    height = lambda value: HEIGHT - (value - lowest * 100) * HEIGHT // (span * 100)

    size = WIDTH, HEIGHT
    yield '<div class="chart"><svg viewBox="0 0 %d %d" preserveAspectRatio="none">' % size
    for degrees in marks:
        yield '<path class="grid" d="M0 %dh%d"/>' % (height(degrees * 100), WIDTH)
    for kind, path in (("set", steps(t, height)), ("curve", curve(t, height)), ("on", heated(t))):
        yield '<path class="%s" d="' % kind
        yield from path
        yield '"/>'
    yield "</svg>"
    for degrees in marks:
        yield '<i style="top:%d%%">%d°</i>' % (height(degrees * 100) * 100 // HEIGHT, degrees)
    yield "</div>"


def now(t):
    """Yield the part of the page that changes."""
    what = "Heating to" if t.heating else "Holding"
    yield '<section class="card now %s"><h2>Now</h2>' % ("heating" if t.heating else "idle")
    yield '<p class="big">%.1f<small>°C</small></p><p class="state">' % t.degrees
    yield "%s %.1f °C</p></section>" % (what, t.setpoint)
    yield '<section class="card"><h2>Set-point</h2><form method="post" action="/setpoint">'
    for sign, to in (("−", t.setpoint - STEP), ("+", t.setpoint + STEP)):
        off = "" if LOWEST <= to <= HIGHEST else " disabled"
        yield '<button name="setpoint" value="%.1f"%s>%s</button>' % (to, off, sign)
        if sign == "−":
            yield "<output>%.1f<small>°C</small></output>" % t.setpoint
    yield '</form></section><section class="card wide"><h2>The last 24 hours</h2>'
    if t.temperatures:
        yield from chart(t)
    yield '<div class="hours"><i>24 h ago</i><i>18 h</i><i>12 h</i><i>6 h</i><i>now</i></div>'
    yield '<p class="legend"><b class="curve"></b>temperature<b class="set"></b>set-point'
    yield '<b class="on"></b>heating</p></section>'
    if t.room.simulated:
        yield '<p class="note">No sensor here: this room is simulated.</p>'


def page(t):
    with open(PAGE) as f:
        for text in f:
            if text.strip() == "<!-- now -->":
                yield from now(t)
            else:
                yield text


def history(t):
    yield '{"seconds": %d, "temperature": [' % RECORD_SECONDS
    for i, value in enumerate(t.temperatures):
        yield ", %.2f" % (value / 100) if i else "%.2f" % (value / 100)
    yield '], "setpoint": ['
    for i, value in enumerate(t.setpoints):
        yield ", %.1f" % (value / 100) if i else "%.1f" % (value / 100)
    yield '], "heating": ['
    for i, value in enumerate(t.setpoints):
        yield (", %d" if i else "%d") % (value % 2)
    yield "]}\n"


# ── The web server ──

HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain"
HEAD = (
    "HTTP/1.1 %s\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
    "Cache-Control: no-store\r\n"
    "Referrer-Policy: no-referrer\r\nX-Content-Type-Options: nosniff\r\n"
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'\r\n%s\r\n"
)


def answer(method, path, fields, body):
    """Return status, content type, more header lines, and what to send (iterable of texts)."""
    t = thermostat
    if method == "POST":
        # From a page of somebody else, a browser would send that page's address.
        origin = fields.get("origin", "http://" + fields.get("host", ""))
        if origin.partition("://")[2] != fields.get("host", ""):
            return "403 Forbidden", TEXT, "", ("not from here\n",)
        try:
            if path == "/api/setpoint":
                t.set(json.loads(body)["setpoint"])
                return "200 OK", JSON, "", (json.dumps(t.state()), "\n")
            if path == "/setpoint":
                t.set(body.partition("setpoint=")[2])
                return "303 See Other", TEXT, "Location: /\r\n", ()
        except (ValueError, TypeError, KeyError) as e:
            return "400 Bad Request", TEXT, "", ("not a set-point: %s\n" % e,)
    elif method == "GET":
        if path == "/":
            return "200 OK", HTML, "", page(t)
        if path == "/now":
            return "200 OK", HTML, "", now(t)
        if path == "/api":
            return "200 OK", JSON, "", (json.dumps(t.state()), "\n")
        if path == "/api/history":
            return "200 OK", JSON, "", history(t)
    return "404 Not Found", TEXT, "", ("not here\n",)


async def request(reader):
    """Return method, path, {header field in small letters: value} and body; ValueError."""
    head = (await reader.readuntil(b"\r\n\r\n", 4096)).decode()
    lines = head.split("\r\n")
    method, path = lines[0].split(" ")[:2]
    fields = {}
    for text in lines[1:]:
        name, _, value = text.partition(":")
        fields[name.lower()] = value.strip()
    size = int(fields.get("content-length", 0))
    if not 0 <= size <= 200:
        raise ValueError("too long")
    return method, path.partition("?")[0], fields, (await reader.readexactly(size)).decode()


async def handler(reader, writer):
    """Answer one visitor."""
    try:
        status, kind, more, texts = answer(*await asyncio.wait_for(request(reader), 60))
    except (ValueError, asyncio.TimeoutError):
        status, kind, more, texts = "400 Bad Request", TEXT, "", ("not understood\n",)
    writer.write((HEAD % (status, kind, more)).encode())
    # In chunks, so that nobody takes a part for the whole, of a few cells each: for what is
    # written goes out at once, in a cell or more of its own.
    pieces, size = [], 0
    for text in texts:
        pieces.append(text)
        size += len(text)
        if size > 1400:
            await send(writer, pieces)
            pieces, size = [], 0
    if pieces:
        await send(writer, pieces)
    await send(writer, ())
    writer.close()


async def send(writer, pieces):
    """Send a chunk of HTTP; the empty one is the last."""
    data = "".join(pieces).encode()
    writer.write(("%x\r\n" % len(data)).encode() + data + b"\r\n")
    await writer.drain()


async def host():
    import minitor

    async with minitor.AsyncTor() as tor:
        service = await tor.create_onion_service(80, handler)
        print("http://%s/" % service.address)
        await always()


if __name__ == "__main__":
    sys.path.insert(0, (FOLDER or ".") + "/../..")
    try:
        asyncio.run(host())
    except KeyboardInterrupt:
        pass
