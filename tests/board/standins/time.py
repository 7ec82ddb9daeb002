"""MicroPython's `time` with a clock that can be set, and goes on over a reset.

scene.json, "year": what it shows first; "ahead": of the right time, in seconds.
"""

import utime
from utime import *

from scene import SCENE, seconds

try:
    with open("clock") as f:
        YEAR = [int(f.read())]
except OSError:
    YEAR = [SCENE.get("year", 2026)]


def set_year(year):
    YEAR[0] = year
    with open("clock", "w") as f:
        f.write(str(year))


def gmtime(at=None):
    return (YEAR[0],) + utime.gmtime()[1:] if at is None else utime.gmtime(at)


def time():
    return utime.time() + seconds() + SCENE.get("ahead", 0)
