"""What the stand-ins play: scene.json in the current folder ("speed": of the time in it)."""

import json
import utime

try:
    with open("scene.json") as f:
        SCENE = json.load(f)
except OSError:
    SCENE = {}
SPEED = SCENE.get("speed", 1)
START = utime.ticks_ms()


def seconds():
    """Return the seconds since the start, as the scene counts them."""
    return utime.ticks_diff(utime.ticks_ms(), START) * SPEED / 1000
