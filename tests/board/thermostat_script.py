# MicroPython and CPython: examples/thermostat without Tor.     thermostat_script.py FOLDER

import asyncio
import gc
import json
import sys

sys.path.insert(0, sys.argv[1])


class Noon:
    """The time: at night the room is cool."""

    time = staticmethod(lambda: 1700049600)


before, sys.modules["time"] = sys.modules.get("time"), Noon

import thermostat

if before:
    sys.modules["time"] = before
t = thermostat.thermostat


class Visitor:
    """Reader and writer of one request."""

    def __init__(self, text):
        self.text, self.sent, self.largest, self.closed = text.encode(), b"", 0, False

    async def readuntil(self, separator, limit):
        assert limit <= 4096
        head, separator, self.text = self.text.partition(separator)
        if not separator:
            raise EOFError
        return head + separator

    async def readexactly(self, n):
        if len(self.text) < n:
            raise EOFError
        return self.text[:n]

    def write(self, data):
        self.sent += data
        self.largest = max(self.largest, len(data))

    async def drain(self):
        pass

    def close(self):
        self.closed = True


def ask(line, body="", fields=""):
    """Return status and body of the answer to a request."""
    head = "%s HTTP/1.1\r\nHost: x.onion\r\n%sContent-Length: %d\r\n\r\n"
    visitor = Visitor(head % (line, fields, len(body)) + body)
    asyncio.run(thermostat.handler(visitor, visitor))
    assert visitor.closed and visitor.largest < 4000
    head, _, rest = visitor.sent.partition(b"\r\n\r\n")
    body, size, visitor = b"", 1, None
    while size:
        gc.collect()
        number, _, rest = rest.partition(b"\r\n")
        size = int(number, 16)
        assert rest[size : size + 2] == b"\r\n"
        body, rest = body + rest[:size], rest[size + 2 :]
    assert not rest
    return head.decode().split(" ")[1], body.decode()


status, text = ask("GET /")
assert status == "200" and "<svg" in text and text.rstrip().endswith("</script>")
assert text.count("°C") == 3 and "<!--" not in text and len(text) < 12000, len(text)
assert ask("GET /?x=1")[0] == "200" and ask("GET /now")[1] in text

state = json.loads(ask("GET /api")[1])
assert state["setpoint"] == 21 and 20 < state["temperature"] < 22 and state["simulated"] is True
past = json.loads(ask("GET /api/history")[1])
assert len(past["temperature"]) == len(past["setpoint"]) == len(past["heating"]) == 288
assert past["seconds"] == 300 and set(past["setpoint"]) == {17.5, 21} == set(past["setpoint"])
assert set(past["heating"]) == {0, 1} and 16 < min(past["temperature"]) < 18

status, text = ask("POST /api/setpoint", '{"setpoint": 23.6}')
assert status == "200" and json.loads(text)["setpoint"] == 23.5 and json.loads(text)["heating"]
assert "Heating to 23.5" in ask("GET /now")[1]
assert ask("POST /setpoint", "setpoint=18.5")[0] == "303" and t.setpoint == 18.5 and not t.heating
same = "Origin: http://x.onion\r\n"
assert ask("POST /setpoint", "setpoint=19", same)[0] == "303" and t.setpoint == 19
assert ask("POST /setpoint", "setpoint=20", "Origin: http://y.onion\r\n")[0] == "403"
assert ask("POST /setpoint", "setpoint=20", "Origin: null\r\n")[0] == "403"
for body in ("setpoint=31", "setpoint=nan", "setpoint=inf", "setpoint=-inf", "setpoint=", "x"):
    assert ask("POST /setpoint", body)[0] == "400", body
for body in ("", "{}", "[]", "7", "{", '{"setpoint": null}', '{"setpoint": {}}'):
    assert ask("POST /api/setpoint", body)[0] == "400", body
assert t.setpoint == 19
assert ask("GET /other")[0] == ask("PUT /")[0] == "404"
assert ask("POST /setpoint", "x" * 201)[0] == "400"
for text in ("x\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", "\xff\r\n\r\n"):
    visitor = Visitor(text)
    asyncio.run(thermostat.handler(visitor, visitor))
    assert visitor.sent.startswith(b"HTTP/1.1 400 ") and visitor.closed

# A new device has no past, and then a little of it.
new = thermostat.Thermostat(thermostat.SimulatedRoom())
assert "<svg" not in "".join(thermostat.now(new))
for i in range(400):
    new.control(15 + i / 10)
    new.record()
    assert any(["<svg" in part for part in thermostat.now(new)])
assert len(new.temperatures) == 288 and 5489 <= new.temperatures[287] <= 5491

# The sensor fails: no heating.
async def fails(heating):
    raise OSError("CRC")


async def watch():
    t.heating, t.room.measure = True, fails
    task = asyncio.create_task(thermostat.always())
    await asyncio.sleep(0.1)
    task.cancel()
    assert not t.heating


asyncio.run(watch())
print("ok")
